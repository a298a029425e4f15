//! Models that were detached with their memory kept, in case they come again.
//!
//! A parked model keeps its addresses, what is on the device of it, and what was learned of its order. Its memory is the
//! first that others take.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use forebay_core::VbarId;

use crate::Result;
use crate::attachment::Attachment;
use crate::engine::Engine;
use crate::layout::Layout;
use crate::state::State;
use crate::vbar::Vbar;

/// Parked models at most; then the one parked first goes.
const MOST: usize = 8;

impl Attachment {
    /// Detaches the model, but leaves on the device what nobody else needs: attaching the same weights of the same files
    /// under the same name again finds what is left of them. Later uses through this attachment find
    /// [`EngineError::Detached`](crate::EngineError::Detached) until then.
    ///
    /// A model with weights that lie in memory is detached as by [`detach`](Attachment::detach): nobody could tell that
    /// they are the same. So is one with patches or conversions, which the next attachment may not have.
    pub fn park(&self) {
        let is_in_files = self.layout().sources.iter().all(|source| source.is_file());
        if !is_in_files || self.has_patches() || !self.layout().conversions.is_empty() {
            return self.detach();
        }
        if self.leave() {
            self.engine().park(self.vbar());
        }
    }
}

impl Engine {
    fn park(&self, vbar: &Arc<Vbar>) {
        vbar.closed.store(true, Ordering::Release);
        let shared = self.shared();
        shared.state.lock().park(vbar);
        let mut parked = self.parked.lock();
        parked.push(Arc::clone(vbar));
        let excess = parked.len().saturating_sub(MOST);
        let gone: Vec<_> = parked.drain(..excess).collect();
        drop(parked);
        gone.iter().for_each(|vbar| self.close(vbar));
        shared.work.notify_one();
        shared.changed.notify_all();
    }

    /// The parked model of this name and these weights, attached again.
    pub(crate) fn unpark(&self, name: &str, layout: &Layout) -> Result<Option<Arc<Vbar>>> {
        let mut parked = self.parked.lock();
        let is_it = |vbar: &Arc<Vbar>| {
            vbar.name == name && vbar.layout.as_ref().is_some_and(|parked| parked.has_bytes_of(layout))
        };
        let Some(vbar) = parked.iter().position(is_it).map(|place| parked.remove(place)) else {
            return Ok(None);
        };
        drop(parked);
        let mut state = self.shared().state.lock();
        state.check()?;
        state.unpark(vbar.id);
        vbar.counters.reset();
        vbar.closed.store(false, Ordering::Release);
        Ok(Some(vbar))
    }

    /// Lets go of all parked models. What is on the device of them leaves now. How many there were.
    pub fn clear_parked(&self) -> usize {
        let gone = std::mem::take(&mut *self.parked.lock());
        gone.iter().for_each(|vbar| self.close(vbar));
        gone.len()
    }
}

impl State {
    fn park(&mut self, vbar: &Vbar) {
        // A use from before must not raise its priority afterwards.
        self.take_in_uses();
        self.take_plans_back(vbar);
        let book = self.books.vbar(vbar.id);
        (book.parked, book.started) = (true, false);
        if let Some(lent) = book.lent.clone() {
            self.recall(&lent);
        }
        self.policy.deprioritize(vbar.id);
    }

    fn unpark(&mut self, id: VbarId) {
        self.books.vbar(id).parked = false;
        self.policy.prioritize(id);
    }
}
