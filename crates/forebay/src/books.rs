//! What the engine knows of pages beside the policy: who used them, what they wait for, what went wrong.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use forebay_core::{Bytes, FrameId, PageRef, Pins, Schedule, VbarId};
use forebay_device::{Device, DeviceAddr, DeviceError, Event, Frame, StreamHandle};

use crate::cache::registered::RegisteredPage;
use crate::lease::Lent;
use crate::vbar::Vbar;
use crate::{EngineError, Result};

/// One page.
#[derive(Debug, Default)]
pub(crate) struct PageBook {
    /// Every release since the page was mapped is in `uses`. If not, any stream known to its VBAR may have used it.
    tracked: bool,
    /// The last release on each stream.
    uses: Vec<(StreamHandle, Arc<Event>)>,
    /// What must have completed before the page is unmapped, set when it is claimed.
    pub(crate) leaving: Vec<Arc<Event>>,
    /// Backed at this moment.
    pub(crate) mapped: bool,
    /// The frame of the latest mapping.
    pub(crate) frame: Option<FrameId>,
    /// Why the latest fill failed.
    pub(crate) error: Option<EngineError>,
    /// How often it was filled without being registered.
    pub(crate) fills: u32,
    /// Its bytes cannot be registered.
    pub(crate) stays_in_ring: bool,
    /// Its bytes in the page cache, where the copy engine reads them by itself.
    pub(crate) registered: Option<Arc<RegisteredPage>>,
}

/// One VBAR.
#[derive(Debug)]
pub(crate) struct VbarBook {
    pub(crate) vbar: Arc<Vbar>,
    pub(crate) pages: Vec<PageBook>,
    pub(crate) mapped: u32,
    pub(crate) closing: bool,
    /// Detached with its memory kept.
    pub(crate) parked: bool,
    /// Pages of these ranks are read through the page cache, all others past it. `None`: all through it.
    pub(crate) cached: Option<Range<u32>>,
    pub(crate) schedule: Schedule,
    pub(crate) trace_tail: u64,
    /// Uses that were taken in, those while it was lent included.
    pub(crate) uses: u64,
    /// Used at least once: read-ahead makes sense.
    pub(crate) started: bool,
    /// Whom to ask for the pages while they are lent as a whole.
    pub(crate) lent: Option<Arc<Lent>>,
    /// The ends of its streams as they were marked, earliest first.
    pub(crate) marks: VecDeque<Marks>,
}

/// The ends of a VBAR's streams at one time.
#[derive(Debug)]
pub(crate) struct Marks {
    /// They come behind the work on pages that were used last at this time, or before.
    covers: u64,
    /// Those that were not reached yet when somebody looked.
    ends: Vec<Arc<Event>>,
}

/// Marks that are kept of a VBAR. Without earlier ones later ones are waited for.
const MOST_MARKS: usize = 16;

impl VbarBook {
    /// Whether it is neither closed nor parked.
    pub(crate) fn is_open(&self) -> bool {
        !self.closing && !self.parked
    }
}

/// A frame and the event that says its page's bytes are there.
#[derive(Debug)]
pub(crate) struct FrameBook {
    pub(crate) frame: Frame,
    pub(crate) filled: Arc<Event>,
}

/// A page that was claimed, as it was then.
#[derive(Debug)]
struct Claimed {
    page: PageRef,
    /// Every use since it was mapped is in `uses`.
    is_known: bool,
    uses: Vec<(StreamHandle, Arc<Event>)>,
    frame: Option<FrameId>,
}

/// The books of one device.
#[derive(Debug)]
pub(crate) struct Books {
    device: Arc<dyn Device>,
    pub(crate) vbars: HashMap<VbarId, VbarBook>,
    pub(crate) frames: HashMap<FrameId, FrameBook>,
    spare_events: Vec<Arc<Event>>,
    /// Claimed since the last [`leave`](Books::leave).
    claimed: Vec<Claimed>,
    /// Set for good when the device or a thread of the engine is lost.
    pub(crate) fatal: Option<EngineError>,
    /// To be logged by the mover: under the lock a log that calls back would wait for ever.
    pub(crate) warnings: Vec<String>,
}

impl Books {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        Books {
            device,
            vbars: HashMap::new(),
            frames: HashMap::new(),
            spare_events: Vec::new(),
            claimed: Vec::new(),
            fatal: None,
            warnings: Vec::new(),
        }
    }

    /// Bytes of all frames that exist, those that are on their way back to the device included.
    pub(crate) fn frame_bytes(&self) -> Bytes {
        self.frames.values().map(|book| book.frame.size()).sum()
    }

    pub(crate) fn page(&mut self, page: PageRef) -> &mut PageBook {
        &mut self.vbar(page.vbar).pages[page.page.as_usize()]
    }

    /// What says that a page's bytes are there, if it has memory.
    pub(crate) fn filled(&mut self, page: PageRef) -> Option<Arc<Event>> {
        let frame = self.page(page).frame?;
        self.frames.get(&frame).map(|book| Arc::clone(&book.filled))
    }

    pub(crate) fn vbar(&mut self, id: VbarId) -> &mut VbarBook {
        self.vbars.get_mut(&id).expect("a VBAR with pages has a book")
    }

    /// Notes that work now in `stream` is the last that uses these pages on it.
    pub(crate) fn used_until_now(&mut self, pages: &[PageRef], stream: StreamHandle) {
        let Ok(event) = self.mark(stream) else {
            // Marked again when the pages leave: a later mark covers what an earlier one would have.
            return pages.iter().for_each(|&page| self.used_somewhere(page));
        };
        for &page in pages {
            let uses = &mut self.page(page).uses;
            let earlier =
                uses.iter().position(|(other, _)| *other == stream).map(|at| uses.swap_remove(at).1);
            uses.push((stream, Arc::clone(&event)));
            self.recycle(earlier);
        }
    }

    /// A page may have been used on any stream known to its VBAR.
    pub(crate) fn used_somewhere(&mut self, page: PageRef) {
        self.page(page).tracked = false;
    }

    /// Takes all registered page cache out of the books. It may still be read by copies.
    pub(crate) fn take_registered(&mut self) -> Vec<Arc<RegisteredPage>> {
        let pages = self.vbars.values_mut().flat_map(|book| &mut book.pages);
        pages.filter_map(|page| page.registered.take()).collect()
    }

    pub(crate) fn lost(&mut self, error: EngineError) {
        self.fatal.get_or_insert(error);
    }

    /// An event that nobody waits for.
    pub(crate) fn spare_event(&mut self) -> Result<Arc<Event>> {
        match self.spare_events.pop() {
            Some(event) => Ok(event),
            None => Ok(Arc::new(Event::new(Arc::clone(&self.device))?)),
        }
    }

    /// Takes events back for another use, those excepted that somebody else still holds.
    pub(crate) fn recycle(&mut self, events: impl IntoIterator<Item = Arc<Event>>) {
        self.spare_events.extend(events.into_iter().filter(|event| Arc::strong_count(event) == 1));
    }

    /// A page is about to be backed: what it held before is out of its way.
    fn begin_life(&mut self, page: PageRef) {
        self.vbar(page.vbar).vbar.cell(page.page.0).set_stale(false);
    }

    /// An event at the end of what is now in the stream.
    fn mark(&mut self, stream: StreamHandle) -> Result<Arc<Event>> {
        let event = self.spare_event()?;
        // SAFETY: a stream exists as long as anything remembers its handle (see `StreamHandle`).
        let recorded = unsafe { event.record(stream) };
        if let Err(error) = recorded {
            self.recycle([event]);
            return Err(error.into());
        }
        Ok(event)
    }

    /// The page that has the last of some bytes, where the application read them to the pages of a model that it runs.
    pub(crate) fn page_that_keeps(&self, addr: DeviceAddr, bytes: Bytes) -> Option<PageRef> {
        let mut models = self.vbars.values().map(|book| &book.vbar).filter(|vbar| vbar.has_runs());
        models.find_map(|vbar| vbar.pages_at(addr, bytes).map(|pages| vbar.page_ref(*pages.end())))
    }

    /// The pages that were claimed since the last [`leave`](Books::leave).
    pub(crate) fn claimed(&self) -> impl Iterator<Item = PageRef> {
        self.claimed.iter().map(|claimed| claimed.page)
    }

    /// Finds what must complete before the pages may be unmapped that were claimed since the last call.
    pub(crate) fn leave(&mut self) {
        let mut claimed = std::mem::take(&mut self.claimed);
        for Claimed { page, is_known, uses, frame } in claimed.drain(..) {
            let mut leaving = Vec::with_capacity(2);
            if is_known {
                leaving.extend(uses.into_iter().map(|(_, event)| event));
            } else {
                self.recycle(uses.into_iter().map(|(_, event)| event));
                match self.ends_of_uses(page) {
                    Ok(ends) => leaving.extend(ends),
                    Err(error) => self.lost(error),
                }
            }
            leaving
                .extend(frame.and_then(|frame| self.frames.get(&frame)).map(|book| Arc::clone(&book.filled)));
            self.page(page).leaving = leaving;
        }
        self.claimed = claimed;
    }

    /// What must complete before a claimed page may be unmapped. Where streams were marked since it was used that is not done again:
    /// work that came behind it, another model's maybe, is not waited for. So pages that leave together share their marks.
    fn ends_of_uses(&mut self, page: PageRef) -> Result<Vec<Arc<Event>>> {
        let book = self.vbar(page.vbar);
        let (vbar, used_at) = (Arc::clone(&book.vbar), book.vbar.used_at(page.page.0));
        if let Some(place) = book.marks.iter().position(|marks| marks.covers >= used_at) {
            // What cannot be told is told to who waits for it.
            let is_reached = |event: &mut Arc<Event>| event.is_complete().unwrap_or(false);
            let mut reached: Vec<_> = book.marks[place].ends.extract_if(.., is_reached).collect();
            let ends = book.marks[place].ends.clone();
            if ends.is_empty() {
                // Behind these nobody needs those before them.
                reached.extend(book.marks.drain(..place).flat_map(|marks| marks.ends));
            }
            self.recycle(reached);
            return Ok(ends);
        }
        let covers = vbar.streams.marking.begin();
        let ends = self.mark_known_streams(&vbar)?;
        let marks = &mut self.vbar(page.vbar).marks;
        let earliest = if marks.len() < MOST_MARKS { None } else { marks.pop_front() };
        marks.push_back(Marks { covers, ends: ends.clone() });
        self.recycle(earliest.into_iter().flat_map(|marks| marks.ends));
        Ok(ends)
    }

    /// An event at the end of every stream that may have used a page of the VBAR.
    fn mark_known_streams(&mut self, vbar: &Vbar) -> Result<Vec<Arc<Event>>> {
        let mut marks = Vec::new();
        for stream in vbar.streams.all() {
            // A driver that refused once is asked once more: to go on without the mark is not safe.
            match self.mark(stream).or_else(|_| self.mark(stream)) {
                Ok(event) => marks.push(event),
                Err(EngineError::Device(error)) if is_no_stream(&error) => {
                    self.warnings.push(format!(
                        "a stream that used weights of {:?} is gone and no longer waited for: {error}",
                        vbar.name
                    ));
                    vbar.streams.forget(stream);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(marks)
    }
}

/// Whether the device says that there is no such stream, by CUDA's codes for an invalid value and an invalid handle.
fn is_no_stream(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Driver { code: 1 | 400, .. })
}

impl Pins for Books {
    fn pin(&mut self, page: PageRef) {
        self.vbar(page.vbar).vbar.cell(page.page.0).pin();
    }

    fn unpin(&mut self, page: PageRef) {
        let vbar = &self.vbar(page.vbar).vbar;
        // Whoever a page was lent to says of no use that it was one.
        vbar.note_use(page.page.0..=page.page.0);
        vbar.cell(page.page.0).unpin();
    }

    fn claim(&mut self, page: PageRef) -> bool {
        let Some(was) = self.vbar(page.vbar).vbar.cell(page.page.0).try_claim() else { return false };
        // The same decision may back the page again, and what is known of it is then about its next life.
        let entry = self.page(page);
        let (uses, frame) = (std::mem::take(&mut entry.uses), entry.frame);
        let is_known = entry.tracked || !was.was_used();
        self.claimed.push(Claimed { page, is_known, uses, frame });
        true
    }

    fn set_streamed(&mut self, page: PageRef) -> bool {
        let before = self.vbar(page.vbar).vbar.cell(page.page.0).set_streamed(true);
        if !before.is_filled() {
            self.begin_life(page);
            self.page(page).tracked = true;
        }
        before.pins() > 0
    }

    fn set_resident(&mut self, page: PageRef) {
        let before = self.vbar(page.vbar).vbar.cell(page.page.0).set_streamed(false);
        if !before.is_filled() {
            self.begin_life(page);
        }
        self.page(page).tracked = false;
    }

    fn set_stale(&mut self, page: PageRef) {
        self.vbar(page.vbar).vbar.cell(page.page.0).set_stale(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_core::{Mode, Policy, RankOrder, VbarSpec};
    use forebay_device::host::{HostConfig, HostDevice};
    use forebay_device::{Reservation, Stream};

    const SIZE: Bytes = Bytes::mib(2);

    /// Books of one VBAR with so many pages.
    fn of_one_vbar(pages: u32) -> (Books, Arc<Vbar>) {
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(HostConfig::default()).unwrap());
        let mut books = Books::new(Arc::clone(&device));
        let (order, mode) = (RankOrder::Address, Mode::Streamed);
        let spec = VbarSpec { pages, page_size: SIZE, order, mode, window: 0, uses_a_pass: 1 };
        let id = Policy::new(SIZE).add_vbar(spec);
        let reservation = Reservation::new(device, SIZE * u64::from(pages), SIZE).unwrap();
        let vbar = Arc::new(Vbar::new(id, "model".into(), reservation, SIZE, None));
        let book = VbarBook {
            vbar: Arc::clone(&vbar),
            pages: (0..pages).map(|_| PageBook::default()).collect(),
            mapped: pages,
            closing: false,
            parked: false,
            cached: None,
            schedule: Schedule::new(0),
            trace_tail: 0,
            uses: 0,
            started: false,
            lent: None,
            marks: VecDeque::new(),
        };
        books.vbars.insert(id, book);
        (books, vbar)
    }

    #[test]
    fn a_page_that_one_decision_takes_and_backs_again_is_unmapped_behind_its_uses() {
        let (mut books, vbar) = of_one_vbar(1);
        let stream = Stream::new(Arc::clone(&books.device)).unwrap();
        let page = vbar.page_ref(0);
        // Resident and used: nobody noted where.
        vbar.streams.know(stream.handle());
        vbar.cell(0).set_filled();
        assert!(vbar.cell(0).try_pin().is_some() && vbar.cell(0).unpin().is_some());
        assert!(books.claim(page));
        // Backed again as a streamed page, of which every release is noted.
        assert!(!books.set_streamed(page));
        books.leave();
        assert_eq!(books.page(page).leaving.len(), 1, "the stream that used it is waited for");
    }

    #[test]
    fn what_is_read_stays_as_long_as_the_page_with_its_last_byte_does_once_its_model_runs() {
        let (books, vbar) = of_one_vbar(3);
        let keeps = |from: u64, len: u64| {
            books.page_that_keeps(vbar.base().offset(Bytes::new(from)), Bytes::new(len))
        };
        let size = SIZE.get();
        assert_eq!(keeps(0, 1), None, "a buffer");
        vbar.begin_run();
        for (from, len, page) in [(0, 1, 0), (0, size, 0), (size - 1, 2, 1), (5, 2 * size, 2), (size, 0, 1)] {
            assert_eq!(keeps(from, len), Some(vbar.page_ref(page)), "{len} at {from}");
        }
        assert_eq!((keeps(3 * size - 1, 2), keeps(3 * size, 1)), (None, None), "past its end");
        assert_eq!(books.page_that_keeps(DeviceAddr::new(vbar.base().get() - 1), Bytes::new(1)), None);
    }
}
