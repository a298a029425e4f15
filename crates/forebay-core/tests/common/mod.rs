//! What the behaviour tests share: a naive picture of the world that the policy speaks to.

#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod books;
pub(crate) mod engine;
pub(crate) mod machine;
pub(crate) mod turns;
pub(crate) mod verify;
pub(crate) mod victims;
pub(crate) mod world;

use forebay_core::{Bytes, Mode, PageIndex, PageRef, RankOrder, VbarId, VbarSpec};

/// Fails the case with a message when a condition does not hold.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}
pub(crate) use ensure;

/// What a check answers: the message says which promise was broken.
pub(crate) type Checked<T = ()> = Result<T, String>;

/// The smallest page.
pub(crate) const UNIT: Bytes = Bytes::mib(2);

pub(crate) fn page_at(vbar: VbarId, page: u32) -> PageRef {
    PageRef { vbar, page: PageIndex(page) }
}

/// A streamed VBAR of pages of one unit.
pub(crate) fn streamed(pages: u32, window: u32) -> VbarSpec {
    VbarSpec {
        pages,
        page_size: UNIT,
        order: RankOrder::Spread { first: 0, last: 0 },
        mode: Mode::Streamed,
        window,
        uses_a_pass: pages,
    }
}

/// An explicit VBAR of pages of one unit.
pub(crate) fn explicit(pages: u32) -> VbarSpec {
    VbarSpec { mode: Mode::Explicit, order: RankOrder::Address, ..streamed(pages, 0) }
}
