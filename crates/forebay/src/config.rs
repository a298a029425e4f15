//! How an engine is to run.

use std::thread::available_parallelism;

use forebay_core::Bytes;

use crate::state::Budget;
use crate::{EngineError, Result};

/// How an engine is to run.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// How much of the device it may use.
    pub budget: Budget,
    /// The pinned memory that bytes go through on their way to the device.
    pub ring: RingConfig,
    /// How much of the page cache may be registered with the device at most, so that its copy engine reads it without the
    /// processor. Registered memory cannot be reclaimed; it is handed back when the host's memory is wanted elsewhere.
    /// `None`: what is really free. [`Bytes::ZERO`]: nothing.
    pub registered: Option<Bytes>,
    /// How much the page cache may hold of the weights at most. Where they take more, a part of what is streamed is read
    /// past it, so that the rest is found there. `None`: what the host's memory and the process's memory cgroups leave.
    pub page_cache: Option<Bytes>,
}

impl Default for EngineConfig {
    /// All memory that is free, but for 512 MiB.
    fn default() -> Self {
        EngineConfig {
            budget: Budget::Headroom(Bytes::mib(512)),
            ring: RingConfig::default(),
            registered: None,
            page_cache: None,
        }
    }
}

/// The pinned memory that bytes go through, and who moves them. It takes readers x slots x chunk.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// Threads that read. `None`: one a core, between 2 and 12.
    pub readers: Option<usize>,
    /// Chunks that a reader has under way: one is read while the others are copied.
    pub slots: u32,
    /// Bytes that are read and copied at once: a multiple of 4 KiB.
    pub chunk: Bytes,
}

impl Default for RingConfig {
    fn default() -> Self {
        RingConfig { readers: None, slots: 2, chunk: Bytes::kib(2560) }
    }
}

impl RingConfig {
    /// How many threads read.
    pub fn reader_threads(&self) -> usize {
        self.readers.unwrap_or_else(|| available_parallelism().map_or(2, usize::from).clamp(2, 12))
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.slots == 0 {
            return Err(EngineError::Invalid("a reader has at least one slot: 0".into()));
        }
        if self.chunk == Bytes::ZERO || !self.chunk.get().is_multiple_of(Bytes::kib(4).get()) {
            let chunk = self.chunk;
            return Err(EngineError::Invalid(format!("a chunk is a multiple of 4 KiB: {chunk}")));
        }
        Ok(())
    }
}
