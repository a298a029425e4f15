//! VBARs whose pages are lent as a whole.
//!
//! The pages of a model that fits are pinned all the time by somebody who gives them back when asked. The policy takes
//! none of them meanwhile, and lowers no watermark on the way: it asks them back, and decides again when they are.

use crate::vbar::Lent;
use crate::{Bytes, Command, Pins, Policy, VbarId};

impl Policy {
    /// Lends a VBAR, if it fits beside `reserved` bytes that cannot leave and nothing of it had to. Whether it did; a
    /// VBAR that is lent stays so.
    pub fn lend(&mut self, id: VbarId, reserved: Bytes) -> bool {
        let fits = |size: Bytes, budget| size.checked_add(reserved).is_some_and(|sum| sum <= budget);
        let (budget, held) = (self.budget, self.frames.held());
        let vbar = self.vbar(id);
        let size = vbar.spec.page_size * u64::from(vbar.spec.pages);
        let whole = vbar.lends() && vbar.watermark == vbar.spec.pages && fits(size, budget);
        let lends = whole && held <= budget && vbar.lent != Lent::AskedBack;
        if lends {
            vbar.lent = Lent::Yes;
        }
        lends
    }

    /// The pages of a VBAR are given back: they can be taken again, and what is over the budget leaves.
    pub fn returned(&mut self, id: VbarId, pins: &mut impl Pins, out: &mut Vec<Command>) {
        if std::mem::replace(&mut self.vbar(id).lent, Lent::No) == Lent::AskedBack {
            self.asked_back -= 1;
        }
        self.shrink(pins, out);
    }

    /// A VBAR that is to be given back and was not told so yet.
    pub fn take_recall(&mut self) -> Option<VbarId> {
        self.recalls.pop()
    }

    /// Whether a VBAR is lent and must be waited for; it is asked back then.
    pub(crate) fn asks_back(&mut self, id: VbarId) -> bool {
        let vbar = self.vbar(id);
        if vbar.lent == Lent::Yes {
            vbar.lent = Lent::AskedBack;
            self.asked_back += 1;
            self.recalls.push(id);
        }
        self.vbar(id).lent != Lent::No
    }
}
