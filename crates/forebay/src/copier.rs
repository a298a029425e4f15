//! Registered page cache on its way to the device, a little at a time.
//!
//! What is in the copy stream cannot be overtaken. So a thread adds what was read ahead only when little is left there to copy,
//! and not while readers bring a page that somebody waits for. A model that takes over from another finds the link busy for a
//! moment, not with all that was read ahead for the other. What somebody waits for is added at once: whoever launches work
//! may then run ahead of the link by all that is mapped, and the link goes on when a thread wakes late.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use forebay_core::{Bytes, PageRef};
use forebay_device::{Event, PinnedBuffer};
use forebay_store::{ReaderPool, Urgency};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::cache::registered::RegisteredPage;
use crate::filler;
use crate::state::Shared;
use crate::vbar::Vbar;
use crate::{EngineError, Result};

/// While more than this, and more than a page, is left in the copy stream, nothing is added that nobody waits for: 0.6 ms of the
/// link, in which the thread has to notice that a page was copied and add the next.
const ENOUGH: Bytes = Bytes::mib(32);
/// What a device pins at least.
const BACK_SIZE: Bytes = Bytes::kib(4);
/// How often it looks.
const POLL: Duration = Duration::from_micros(100);

/// One page's copy.
#[derive(Debug)]
pub(crate) struct PageCopy {
    pub(crate) vbar: Arc<Vbar>,
    pub(crate) page: u32,
    pub(crate) registered: Arc<RegisteredPage>,
    pub(crate) filled: Arc<Event>,
}

/// See the module's documentation. Dropping it ends the thread, and drops what it was given and has not begun.
pub(crate) struct Copier {
    shared: Arc<Shared>,
    thread: ReaderPool<UnderWay>,
}

/// What is to be copied. Lock order: `waiting` is a leaf.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    waiting: Mutex<Waiting>,
    /// Something is waited for, or is not any more.
    changed: Condvar,
}

/// Pages to be copied, in the order in which they came.
#[derive(Debug, Default)]
struct Waiting {
    /// Somebody waits for them.
    urgent: VecDeque<PageCopy>,
    ahead: VecDeque<PageCopy>,
    /// Pages that somebody waits for and readers bring.
    brought: usize,
}

/// Readers bring a page that somebody waits for, as long as this lives.
#[derive(Debug)]
pub(crate) struct Brought(Arc<Shared>);

/// What the thread added to the copy stream and has not seen the end of, oldest first.
#[derive(Default)]
struct UnderWay {
    copies: VecDeque<(Event, Bytes)>,
    spare: Vec<Event>,
    /// Where a few bytes of each page are copied back to. Without it nobody is let in.
    back: Option<PinnedBuffer>,
}

impl Copier {
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Self> {
        let device = Arc::clone(&shared.device);
        let thread = ReaderPool::new("forebay-copy", 1, move |_| {
            let mut under_way = UnderWay::default();
            under_way.back = PinnedBuffer::new(Arc::clone(&device), BACK_SIZE).ok();
            under_way
        });
        Ok(Copier { shared, thread: thread.map_err(EngineError::Readers)? })
    }

    /// Has a page copied. The state learns of it once the copy is enqueued.
    pub(crate) fn submit(&self, urgency: Urgency, copy: PageCopy) {
        let shared = Arc::clone(&self.shared);
        let mut waiting = shared.copies.waiting.lock();
        match urgency {
            Urgency::Urgent => waiting.urgent.push_back(copy),
            Urgency::Ahead => waiting.ahead.push_back(copy),
        }
        drop(waiting);
        shared.copies.changed.notify_all();
        // Any page: which one is next is decided when there is room for it.
        self.thread.submit(urgency, move |under_way| {
            let _lost = LostWithPanic(&shared);
            under_way.copy_next(&shared);
        });
    }
}

impl Brought {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        shared.copies.waiting.lock().brought += 1;
        Brought(Arc::clone(shared))
    }
}

impl Drop for Brought {
    fn drop(&mut self) {
        self.0.copies.waiting.lock().brought -= 1;
        self.0.copies.changed.notify_all();
    }
}

impl Copies {
    /// Somebody waits for a page that may have been read ahead.
    pub(crate) fn hurry(&self, page: PageRef) {
        let mut waiting = self.waiting.lock();
        let place = waiting.ahead.iter().position(|copy| copy.vbar.page_ref(copy.page) == page);
        if let Some(copy) = place.and_then(|place| waiting.ahead.remove(place)) {
            waiting.urgent.push_back(copy);
            self.changed.notify_all();
        }
    }
}

impl Waiting {
    fn pop(&mut self) -> Option<PageCopy> {
        self.urgent.pop_front().or_else(|| self.ahead.pop_front())
    }
}

impl UnderWay {
    fn copy_next(&mut self, shared: &Arc<Shared>) {
        let room = self.wait_for_room(&shared.copies);
        let Some(copy) = shared.copies.waiting.lock().pop() else { return };
        let copied = room.and_then(|()| match self.spare.pop() {
            Some(event) => Ok(event),
            None => Ok(Event::new(Arc::clone(&shared.device))?),
        });
        match copied {
            Ok(copied) => {
                let (bytes, at) = (copy.registered.bytes(), copy.vbar.page_addr(copy.page));
                filler::fill_directly(shared, &copy, &copied, |stream| {
                    let Some(back) = &self.back else { return };
                    // SAFETY: the page is mapped until its fill event, recorded behind this, has completed. Nobody else
                    // uses the few bytes, and this stream writes them in turn.
                    unsafe { shared.gives_way.behind(bytes, at, back.as_ptr(), stream) };
                });
                // One that was not recorded, because the copy failed, is complete.
                self.copies.push_back((copied, bytes));
            }
            Err(error) => filler::finished(shared, &copy.vbar, copy.page, Err(Some(error))),
        }
    }

    /// Waits until there is a page that somebody waits for; or any, when little is left in the copy stream and readers bring
    /// none such.
    fn wait_for_room(&mut self, copies: &Copies) -> Result<()> {
        let mut waiting = copies.waiting.lock();
        loop {
            MutexGuard::unlocked(&mut waiting, || self.forget_copied())?;
            if !waiting.urgent.is_empty() || (waiting.brought == 0 && self.is_short()) {
                return Ok(());
            }
            match waiting.brought {
                0 => drop(copies.changed.wait_for(&mut waiting, POLL)),
                _ => copies.changed.wait(&mut waiting),
            }
        }
    }

    /// Forgets what has been copied.
    fn forget_copied(&mut self) -> Result<()> {
        while let Some((copied, _)) = self.copies.front()
            && copied.is_complete()?
        {
            self.forget_oldest();
        }
        Ok(())
    }

    fn forget_oldest(&mut self) {
        self.spare.extend(self.copies.pop_front().map(|(copied, _)| copied));
    }

    /// Whether little is left in the copy stream.
    fn is_short(&self) -> bool {
        self.copies.len() <= 1 || self.bytes() <= ENOUGH
    }

    fn bytes(&self) -> Bytes {
        self.copies.iter().map(|(_, bytes)| *bytes).sum()
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let ended = self.copies.iter().try_for_each(|(copied, _)| copied.synchronize());
        if ended.is_err() {
            // Nobody can know whether it is still written to.
            std::mem::forget(self.back.take());
        }
    }
}

impl std::fmt::Debug for Copier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copier").field("device", &self.shared.id).finish_non_exhaustive()
    }
}

/// A page whose copy panicked must not leave its users waiting for ever.
struct LostWithPanic<'a>(&'a Shared);

impl Drop for LostWithPanic<'_> {
    fn drop(&mut self) {
        self.0.ends_with_panic("its copying thread");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use forebay_device::host::{HostConfig, HostDevice};
    use forebay_device::{DeviceAddr, PinnedBuffer, StreamHandle};
    use forebay_store::{Source, SourceFile};

    use super::*;
    use crate::state::State;
    use crate::timeline::Activity;
    use crate::{Attachment, Budget, Engine, EngineConfig, LayoutOptions, Use, WeightKind, WeightSpec};

    const PAGE: Bytes = Bytes::mib(2);
    const PAGES: u64 = 8;

    fn wait_until(engine: &Engine, is_so: impl Fn(&State) -> bool) {
        let start = std::time::Instant::now();
        while !is_so(&engine.shared().state.lock()) {
            assert!(start.elapsed().as_secs() < 20, "{}", engine.stats());
            std::thread::yield_now();
        }
    }

    fn use_weight(model: &Attachment, weight: usize) {
        drop(model.acquire(weight, Use::on(StreamHandle::DEFAULT)).expect("the weight"));
    }

    /// Two models of one file, all of it registered.
    fn registered_models() -> std::result::Result<(Arc<Engine>, [Attachment; 2]), Box<dyn std::error::Error>>
    {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(&vec![7; (PAGE * PAGES).as_usize()])?;
        let opened = SourceFile::open(file.path())?;
        let device = HostDevice::new(HostConfig { registers: true, ..HostConfig::default() })?;
        let config = EngineConfig { budget: Budget::Fixed(PAGE * 3 * PAGES), ..EngineConfig::default() };
        let engine = Engine::new(Arc::new(device), config)?;
        let attach = |name: &str| {
            let weight = |n: u64| WeightSpec {
                name: format!("w{n}"),
                source: Source::file(&opened, n * PAGE.get(), PAGE),
                kind: WeightKind::Whole,
            };
            let options = LayoutOptions { page_size: Some(PAGE), ..LayoutOptions::default() };
            engine.attach(name, (0..PAGES).map(weight).collect(), options)
        };
        let models = [attach("first")?, attach("second")?];
        for page in models.iter().flat_map(|model| (0..PAGES as u32).map(|page| model.vbar().page_ref(page)))
        {
            let mut state = engine.shared().state.lock();
            let plan = state.plan_of(page).expect("it lies in a file");
            let registered = plan.map()?.register(&engine.shared().device)?;
            state.registering.registered(registered.size());
            state.books.page(page).registered = Some(Arc::new(registered));
        }
        Ok((engine, models))
    }

    fn copy_of_first_page(engine: &Engine, model: &Attachment) -> Result<PageCopy> {
        let page = model.vbar().page_ref(0);
        let registered = engine.shared().state.lock().books.page(page).registered.clone();
        Ok(PageCopy {
            vbar: Arc::clone(model.vbar()),
            page: page.page.0,
            registered: registered.expect("it is registered"),
            filled: Arc::new(Event::new(Arc::clone(&engine.shared().device))?),
        })
    }

    #[test]
    fn what_somebody_waits_for_is_copied_before_what_was_read_ahead()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let (engine, [first, second]) = registered_models()?;
        let last = PAGES as u32 - 1;
        let copies = engine.shared().copy.lock();
        engine.start_recording();
        std::thread::scope(|scope| {
            scope.spawn(|| use_weight(&first, 0));
            let queued = || {
                let waiting = engine.shared().copies.waiting.lock();
                (waiting.urgent.len(), waiting.ahead.len())
            };
            wait_until(&engine, |_| queued() == (0, PAGES as usize - 1));
            scope.spawn(|| use_weight(&second, last as usize));
            wait_until(&engine, |_| queued().0 == 1);
            drop(copies);
        });
        let moments = engine.stop_recording().into_iter();
        let filled: Vec<u32> =
            moments.filter(|moment| moment.activity == Activity::Fill).map(|moment| moment.page).collect();
        let place = filled.iter().position(|page| *page == last);
        assert_eq!(place, Some(1), "behind the one that was being copied: {filled:?}");
        Ok(())
    }

    #[test]
    fn what_is_read_ahead_waits_for_what_readers_bring_until_somebody_waits_for_it()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let (engine, [first, _second]) = registered_models()?;
        let brought = Brought::new(engine.shared());
        let ahead = || engine.shared().copies.waiting.lock().ahead.len();
        use_weight(&first, 0);
        wait_until(&engine, |_| ahead() == PAGES as usize - 1);
        use_weight(&first, 3);
        assert_eq!(ahead(), PAGES as usize - 2);
        drop(brought);
        engine.settle()?;
        assert_eq!(ahead(), 0);
        Ok(())
    }

    #[test]
    fn what_was_copied_is_forgotten_also_where_somebody_always_waits()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let (engine, [model, _]) = registered_models()?;
        let device = || Arc::clone(&engine.shared().device);
        let stream = forebay_device::Stream::new(device())?;
        let (copies, mut under_way) = (Copies::default(), UnderWay::default());
        copies.waiting.lock().urgent.push_back(copy_of_first_page(&engine, &model)?);
        for _ in 0..100 {
            under_way.wait_for_room(&copies)?;
            let copied = under_way.spare.pop().map_or_else(|| Event::new(device()), Ok)?;
            // SAFETY: the stream lives.
            unsafe { copied.record(stream.handle()) }?;
            copied.synchronize()?;
            under_way.copies.push_back((copied, PAGE));
            assert!(under_way.copies.len() + under_way.spare.len() <= 2);
        }
        Ok(())
    }

    #[test]
    fn what_somebody_waits_for_is_added_though_much_is_in_the_copy_stream()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let (engine, [model, _]) = registered_models()?;
        let copy_delay = Duration::from_millis(300);
        let slow: Arc<dyn forebay_device::Device> =
            Arc::new(HostDevice::new(HostConfig { copy_delay, ..HostConfig::default() })?);
        let stream = forebay_device::Stream::new(Arc::clone(&slow))?;
        let (from, to) =
            (PinnedBuffer::new(Arc::clone(&slow), PAGE)?, PinnedBuffer::new(Arc::clone(&slow), PAGE)?);
        let target = DeviceAddr::new(to.as_ptr() as u64);
        // SAFETY: on this device both are memory of this process, which is dropped behind the wait for the copy.
        unsafe { slow.copy_to_device(target, from.as_ptr(), PAGE, stream.handle()) }?;

        let (copies, mut under_way) = (Copies::default(), UnderWay::default());
        for _ in 0..2 {
            let copied = Event::new(Arc::clone(&slow))?;
            // SAFETY: the stream lives.
            unsafe { copied.record(stream.handle()) }?;
            under_way.copies.push_back((copied, ENOUGH));
        }
        copies.waiting.lock().ahead.push_back(copy_of_first_page(&engine, &model)?);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(copy_delay / 10);
                copies.hurry(model.vbar().page_ref(0));
            });
            under_way.wait_for_room(&copies)
        })?;
        assert_eq!(under_way.copies.len(), 2, "it was not waited for");
        copies.waiting.lock().pop();
        copies.waiting.lock().ahead.push_back(copy_of_first_page(&engine, &model)?);
        under_way.wait_for_room(&copies)?;
        assert_eq!(under_way.copies.len(), 0, "what nobody waits for waits");
        Ok(())
    }

    #[test]
    fn little_is_in_the_copy_stream() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let device: Arc<dyn forebay_device::Device> = Arc::new(HostDevice::new(HostConfig::default())?);
        let copies = Copies::default();
        let mut under_way = UnderWay::default();
        let stream = forebay_device::Stream::new(Arc::clone(&device))?;
        for page in [Bytes::mib(2), Bytes::mib(32), Bytes::mib(64)] {
            for _ in 0..40 {
                under_way.wait_for_room(&copies)?;
                assert!(under_way.bytes() <= ENOUGH.max(page), "{} of pages of {page}", under_way.bytes());
                let copied = Event::new(Arc::clone(&device))?;
                // SAFETY: the stream lives.
                unsafe { copied.record(stream.handle()) }?;
                under_way.copies.push_back((copied, page));
            }
        }
        Ok(())
    }
}
