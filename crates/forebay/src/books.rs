//! What the engine knows of pages beside the policy: who used them, what they wait for, what went wrong.

use std::collections::HashMap;
use std::sync::Arc;

use forebay_core::{FrameId, PageRef, Pins, Schedule, VbarId};
use forebay_device::{Device, Event, Frame, StreamHandle};

use crate::vbar::Vbar;
use crate::{EngineError, Result};

/// One page.
#[derive(Debug, Default)]
pub(crate) struct PageBook {
    /// Every release since the page was mapped is in `uses`. If not, any known stream may have used it.
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
}

/// One VBAR.
#[derive(Debug)]
pub(crate) struct VbarBook {
    pub(crate) vbar: Arc<Vbar>,
    pub(crate) pages: Vec<PageBook>,
    pub(crate) mapped: u32,
    pub(crate) closing: bool,
    pub(crate) schedule: Schedule,
    pub(crate) trace_tail: u64,
    /// Used at least once: read-ahead makes sense.
    pub(crate) started: bool,
}

/// A frame and the event that says its page's bytes are there.
#[derive(Debug)]
pub(crate) struct FrameBook {
    pub(crate) frame: Frame,
    pub(crate) filled: Arc<Event>,
}

/// The books of one device.
#[derive(Debug)]
pub(crate) struct Books {
    device: Arc<dyn Device>,
    pub(crate) vbars: HashMap<VbarId, VbarBook>,
    pub(crate) frames: HashMap<FrameId, FrameBook>,
    /// Every stream that ever used a weight.
    streams: Vec<StreamHandle>,
    spare_events: Vec<Arc<Event>>,
    /// Set for good when the device or a thread of the engine is lost.
    pub(crate) fatal: Option<EngineError>,
}

impl Books {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        Books {
            device,
            vbars: HashMap::new(),
            frames: HashMap::new(),
            streams: Vec::new(),
            spare_events: Vec::new(),
            fatal: None,
        }
    }

    pub(crate) fn know_stream(&mut self, stream: StreamHandle) {
        if !self.streams.contains(&stream) {
            self.streams.push(stream);
        }
    }

    pub(crate) fn page(&mut self, page: PageRef) -> &mut PageBook {
        &mut self.vbar(page.vbar).pages[page.page.as_usize()]
    }

    pub(crate) fn vbar(&mut self, id: VbarId) -> &mut VbarBook {
        self.vbars.get_mut(&id).expect("a VBAR with pages has a book")
    }

    /// Notes that work now in `stream` is the last that uses these pages on it.
    pub(crate) fn used_until_now(&mut self, pages: &[PageRef], stream: StreamHandle) {
        match self.mark(stream) {
            Ok(event) => {
                for &page in pages {
                    let uses = &mut self.page(page).uses;
                    uses.retain(|(other, _)| *other != stream);
                    uses.push((stream, Arc::clone(&event)));
                }
            }
            Err(error) => self.lost(error),
        }
    }

    /// A page may have been used on any known stream.
    pub(crate) fn used_somewhere(&mut self, page: PageRef) {
        self.page(page).tracked = false;
    }

    pub(crate) fn lost(&mut self, error: EngineError) {
        tracing::error!(%error, "the engine stops");
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

    /// An event at the end of what is now in the stream.
    fn mark(&mut self, stream: StreamHandle) -> Result<Arc<Event>> {
        let event = self.spare_event()?;
        // SAFETY: whoever uses a weight on a stream keeps the stream alive while the weight's model is attached (see
        // `Attachment::acquire`).
        unsafe { event.record(stream) }?;
        Ok(event)
    }

    /// What must complete before a page that was just claimed may be unmapped.
    fn leave(&mut self, page: PageRef) -> Result<()> {
        let entry = self.page(page);
        let uses = std::mem::take(&mut entry.uses);
        let (tracked, frame) = (entry.tracked, entry.frame);
        let mut leaving = Vec::with_capacity(2);
        if tracked {
            leaving.extend(uses.into_iter().map(|(_, event)| event));
        } else {
            self.recycle(uses.into_iter().map(|(_, event)| event));
            for stream in self.streams.clone() {
                match self.mark(stream) {
                    Ok(event) => leaving.push(event),
                    Err(EngineError::Device(error)) if !error.is_lost() => {
                        tracing::warn!(?stream, %error, "a stream that used weights is gone and no longer waited for");
                        self.streams.retain(|other| *other != stream);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        leaving.extend(frame.and_then(|frame| self.frames.get(&frame)).map(|book| Arc::clone(&book.filled)));
        self.page(page).leaving = leaving;
        Ok(())
    }
}

impl Pins for Books {
    fn pin(&mut self, page: PageRef) {
        self.vbar(page.vbar).vbar.cell(page.page.0).pin();
    }

    fn unpin(&mut self, page: PageRef) {
        self.vbar(page.vbar).vbar.cell(page.page.0).unpin();
    }

    fn claim(&mut self, page: PageRef) -> bool {
        let claimed = self.vbar(page.vbar).vbar.cell(page.page.0).try_claim();
        if claimed && let Err(error) = self.leave(page) {
            self.lost(error);
        }
        claimed
    }

    fn set_streamed(&mut self, page: PageRef) -> bool {
        let before = self.vbar(page.vbar).vbar.cell(page.page.0).set_streamed(true);
        if !before.is_filled() {
            self.page(page).tracked = true;
        }
        before.pins() > 0
    }

    fn set_resident(&mut self, page: PageRef) {
        self.vbar(page.vbar).vbar.cell(page.page.0).set_streamed(false);
        self.page(page).tracked = false;
    }
}
