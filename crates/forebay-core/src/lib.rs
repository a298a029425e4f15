//! Forebay's residency policy: which weights have memory behind them, and whose memory goes next.
//!
//! A pure state machine over plain data. Events come in ([`Policy::demand`], [`Policy::plan`], [`Policy::released`],
//! [`Policy::set_budget`], ...), [`Command`]s go out, and whoever runs it (the engine of crate `forebay`) executes
//! them in order. There is no I/O, no thread, no clock and no unsafe code here, so the policy is tested exhaustively
//! against a naive model and at sizes no machine has.
//!
//! ```
//! use forebay_core::*;
//! # struct NoPins;
//! # impl Pins for NoPins {
//! #     fn pin(&mut self, _: PageRef) {}
//! #     fn unpin(&mut self, _: PageRef) {}
//! #     fn claim(&mut self, _: PageRef) -> bool { true }
//! #     fn set_streamed(&mut self, _: PageRef) -> bool { false }
//! #     fn set_stale(&mut self, _: PageRef) {}
//! #     fn set_resident(&mut self, _: PageRef) {}
//! # }
//! let mut policy = Policy::new(Bytes::mib(64));
//! let vbar = policy.add_vbar(VbarSpec {
//!     pages: 8,
//!     page_size: Bytes::mib(32),
//!     order: RankOrder::Spread { first: 0, last: 0 },
//!     mode: Mode::Streamed,
//!     window: 2,
//!     uses_a_pass: 8,
//! });
//! let mut commands = Vec::new();
//! let page = PageRef { vbar, page: PageIndex(3) };
//! assert_eq!(policy.demand(&[page], Bytes::ZERO, &mut NoPins, &mut commands), Outcome::Granted);
//! assert!(matches!(commands[..], [Command::Create { .. }, Command::Map { .. }]));
//! ```
#![forbid(unsafe_code)]

mod eviction;
mod frames;
mod ids;
mod lent;
mod order;
mod parse;
mod pins;
mod policy;
mod rank_set;
mod report;
mod schedule;
mod turns;
mod units;
mod vbar;

pub use ids::{FrameId, PageIndex, PageRef, Rank, Serial, VbarId};
pub use order::{RankOrder, Ranks};
pub use parse::ParseBytesError;
pub use pins::Pins;
pub use policy::{Command, Outcome, Policy};
pub use report::PageState;
pub use schedule::Schedule;
pub use units::Bytes;
pub use vbar::{Mode, VbarSpec};
