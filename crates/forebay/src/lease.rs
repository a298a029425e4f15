//! A model that fits, lent as a whole: its resident weights stay pinned until the engine asks for them back.
//!
//! Whoever holds a lease uses the weights without asking for each use, on any stream it has told of. The engine recalls
//! the lease the moment anybody needs memory that it holds, and takes nothing before it is returned.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forebay_device::StreamHandle;

use crate::acquire::{Found, Used};
use crate::attachment::{Attachment, Counted, View};
use crate::engine::Engine;
use crate::state::State;
use crate::vbar::Vbar;
use crate::{EngineError, Result};

/// Tells the holder of a lease to return it, at most once. Called under the engine's lock: it must not wait, nor call
/// the engine.
pub type Recall = Box<dyn Fn() + Send + Sync>;

/// The right to pin the resident weights of a model for long. Drop the views, then the lease, when it is recalled.
#[derive(Debug)]
#[must_use = "a lease that is dropped is returned"]
pub struct Lease {
    engine: Arc<Engine>,
    vbar: Arc<Vbar>,
    lent: Arc<Lent>,
}

/// What the engine knows of a lease.
pub(crate) struct Lent {
    recalled: AtomicBool,
    recall: Recall,
}

impl Attachment {
    /// Lends the model as a whole, if it fits beside the small weights of others, nobody waits for memory, and it is not
    /// lent already. From then on its pages are not taken before the lease is returned.
    pub fn lend(&self, recall: Recall) -> Option<Lease> {
        let lent = Arc::new(Lent { recalled: AtomicBool::new(false), recall });
        let reserved = self.reserved_by_others();
        let shared = self.engine().shared();
        let mut state = shared.state.lock();
        let id = self.vbar().id;
        let lends = state.is_open(id)
            && state.books.vbar(id).lent.is_none()
            && !state.is_wanted()
            && state.policy.lend(id, reserved);
        if !lends {
            return None;
        }
        state.policy.touch(id, 0);
        state.books.vbar(id).lent = Some(Arc::clone(&lent));
        drop(state);
        tracing::debug!(model = %self.name(), "lent as a whole");
        Some(Lease { engine: Arc::clone(self.engine()), vbar: Arc::clone(self.vbar()), lent })
    }
}

/// What [`Lease::view`] found.
#[derive(Debug)]
pub enum Lending {
    /// The weight, pinned.
    Lent(View),
    /// Its bytes are on their way in the copy stream.
    Pending,
    /// It is not resident.
    Absent,
}

impl Lease {
    /// Whether it is to be returned.
    pub fn is_recalled(&self) -> bool {
        self.lent.recalled.load(Ordering::Acquire)
    }

    /// A view of a weight of the model that was lent, if all of it is resident and its bytes are there.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for another attachment or a weight that does not exist.
    pub fn view(&self, attachment: &Attachment, weight: usize, stream: StreamHandle) -> Result<Lending> {
        if !Arc::ptr_eq(attachment.vbar(), &self.vbar) {
            return Err(EngineError::Invalid(format!("{:?} is not what was lent", attachment.name())));
        }
        let span = attachment.span(weight)?;
        let spans = std::slice::from_ref(&span);
        let shared = self.engine.shared();
        let found = shared.begin(spans, stream);
        if found == Found::Missing {
            return Ok(Lending::Absent);
        }
        let streamed = span.pages().any(|(vbar, page)| vbar.cell(page).load().is_streamed());
        if streamed || found == Found::Pending {
            shared.release(spans, Used::Nowhere);
            return Ok(if streamed { Lending::Absent } else { Lending::Pending });
        }
        let view = View::new(&self.engine, attachment, weight, Counted::View);
        // From here on it is counted as a view.
        shared.operations.fetch_sub(1, Ordering::AcqRel);
        view.map(Lending::Lent)
    }

    /// Pages that are lent are unmapped behind this stream's work, too. To be told before the work.
    pub fn know_stream(&self, stream: StreamHandle) {
        self.vbar.streams.know(stream);
    }

    /// A pass of the model begins: it goes to the top of the priorities. Takes no lock.
    pub fn note_use(&self) {
        self.vbar.passes_as_lent.fetch_add(1, Ordering::Release);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let shared = self.engine.shared();
        let mut state = shared.state.lock();
        if self.is_recalled() {
            state.recalled -= 1;
        }
        // A lease is in the books of its VBAR, which stay until it is returned.
        state.books.vbar(self.vbar.id).lent = None;
        state.decide(|policy, books, out| policy.returned(self.vbar.id, books, out));
        let gone = state.forget_if_gone(self.vbar.id);
        drop(state);
        drop(gone);
        shared.work.notify_one();
        shared.changed.notify_all();
    }
}

impl State {
    /// Asks for a lease back.
    pub(crate) fn recall(&mut self, lent: &Lent) {
        if !lent.recalled.swap(true, Ordering::AcqRel) {
            self.recalled += 1;
            (lent.recall)();
        }
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").field("recalled", &self.recalled).finish_non_exhaustive()
    }
}
