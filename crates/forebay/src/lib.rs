//! Forebay: dynamic VRAM for model weights.
//!
//! A model far larger than the device's free memory runs out of the operating system's page cache. Every weight has one
//! address for life; an engine maps, fills and retires the pages beneath it as weights are used, within a budget.
//!
//! ```
//! use std::sync::Arc;
//! use forebay::device::host::{HostConfig, HostDevice};
//! use forebay::device::StreamHandle;
//! use forebay::store::Source;
//! use forebay::{Budget, Bytes, Engine, EngineConfig, LayoutOptions, Use, WeightKind, WeightSpec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Four weights of 2 MiB, memory for two of them.
//! let weights = (1u8..=4).map(|i| WeightSpec {
//!     name: format!("layer{i}.weight"),
//!     source: Source::memory(Arc::new(vec![i; 2 << 20])),
//!     kind: WeightKind::Whole,
//! });
//! let device = Arc::new(HostDevice::new(HostConfig::default())?);
//! let config = EngineConfig { budget: Budget::Fixed(Bytes::mib(4)), ..EngineConfig::default() };
//! let engine = Engine::new(device, config)?;
//! let model = engine.attach("model", weights.collect(), LayoutOptions::default())?;
//!
//! for pass in 0..3 {
//!     for weight in 0..4 {
//!         let pinned = model.acquire(weight, Use::on(StreamHandle::DEFAULT))?;
//!         let address = model.address(weight)?.get() as *const u8; // the same in every pass
//!         // SAFETY: the weight is pinned and filled, and on the host device an address is a pointer.
//!         assert_eq!(unsafe { *address }, weight as u8 + 1);
//!         drop(pinned); // work enqueued until now still finds the weight
//!     }
//! }
//! println!("{}", engine.stats());
//! # Ok(())
//! # }
//! ```
//!
//! The layers below are re-exported: [`device`] (backends), [`store`] (sources), [`policy`] (who keeps memory).

mod acquire;
mod ahead;
mod attachment;
mod books;
mod cache;
mod cell;
mod computed;
mod config;
mod converting;
mod copier;
mod copy_ends;
mod engine;
mod error;
mod explicit;
mod filler;
mod giving_way;
mod host_buffer;
mod layout;
mod lease;
mod mover;
mod operation;
mod parked;
mod patches;
mod reader;
mod room;
mod scratch;
mod state;
mod stats;
mod streams;
#[cfg(test)]
mod testing;
mod timeline;
mod trace;
mod transfer;
mod vbar;

pub mod doctor;
pub mod measure;
pub mod plan;

pub use acquire::Use;
pub use attachment::{Attachment, Begun, Held, Pinned, View, Waiting};
pub use computed::{Compute, Computed};
pub use config::{EngineConfig, RingConfig};
pub use converting::{Conversion, StoredScale};
pub use engine::Engine;
pub use error::{EngineError, Result};
pub use explicit::{ExplicitVbar, Signature};
pub use forebay_core::{self as policy, Bytes, PageState};
pub use forebay_device as device;
pub use forebay_store as store;
pub use host_buffer::{Growth, HostBuffer, HostBufferOptions, HostRange};
pub use layout::{ALIGNMENT, LayoutOptions, WeightKind, WeightSpec};
pub use lease::{Lease, Lending, Recall};
pub use operation::Operation;
pub use patches::{EightBits, Patch, Product, Scaling};
pub use room::{Ballast, Leases, Room, Squeeze};
pub use state::Budget;
pub use stats::{EngineStats, VbarStats};
pub use timeline::{Activity, Moment};
pub use transfer::{FilePart, OnDevice, ReadBy};
