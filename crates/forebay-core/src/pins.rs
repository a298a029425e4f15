//! What the policy asks about pins.

use crate::PageRef;

/// The pins of all pages, kept by whoever runs the policy (in the engine: one atomic word a page, so that acquiring
/// a resident page takes no lock).
///
/// A page is *claimed* when the policy takes its frame away. From that moment nobody may pin it without asking
/// [`Policy::demand`](crate::Policy::demand).
pub trait Pins {
    /// Adds a pin to a page that the policy holds a frame for.
    fn pin(&mut self, page: PageRef);

    /// Takes a pin added by [`pin`](Pins::pin) back.
    fn unpin(&mut self, page: PageRef);

    /// Claims a page if it has no pins; whether it did.
    fn claim(&mut self, page: PageRef) -> bool;

    /// From now on the page is streamed: [`Policy::released`](crate::Policy::released) is to be called when its last
    /// pin goes. Whether it has pins at this moment.
    fn set_streamed(&mut self, page: PageRef) -> bool;

    /// What the page holds is out of date: nobody pins it any more without asking
    /// [`Policy::demand`](crate::Policy::demand), until it is backed again.
    fn set_stale(&mut self, page: PageRef);

    /// From now on the page is resident: releases need not be told.
    fn set_resident(&mut self, page: PageRef);
}
