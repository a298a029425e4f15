//! How fast this machine is where it matters for streaming: the link to a device, the page cache, a disk; and how much memory
//! there is.
//!
//! Each measurement takes a second or two at most, and gives back what it took. None evicts anything from the page cache.
//!
//! ```
//! use forebay::device;
//! use forebay::measure;
//! use forebay::store::SourceFile;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let file = tempfile::NamedTempFile::new()?;
//! # std::fs::write(file.path(), vec![1; 4 << 20])?;
//! # let path = file.path();
//! let link = measure::link(&device::open("host".parse()?)?)?;
//! println!("{link} from memory to the device");
//!
//! let file = SourceFile::open(path)?;
//! println!("{} from the page cache", measure::page_cache(&file, 4)?);
//! match measure::disk(&file, 4) {
//!     Ok(rate) => println!("{rate} from disk"),
//!     Err(reason) => println!("{reason}"), // a file in memory has no disk
//! }
//! # Ok(())
//! # }
//! ```

mod link;
mod reads;

pub use link::link;
pub use reads::{disk, page_cache};

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use forebay_core::Bytes;
use forebay_store::StoreError;

use crate::cache::ram::Ram;

/// The host's memory that this process may still have: without swapping, page cache that can be given back included, and within
/// the limits of its memory cgroups. `None` where the system does not tell.
pub fn available_memory() -> Option<Bytes> {
    Ram::read().map(|ram| ram.cache_room())
}

/// So many bytes in so much time. Prints as `55.2 GB/s`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// What was moved.
    pub bytes: Bytes,
    /// How long it took.
    pub time: Duration,
}

/// Why a disk has no rate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The file cannot be read past the page cache, so what a read takes says nothing of the disk.
    #[error("{} cannot be read past the page cache: {reason}", path.display())]
    Unmeasurable {
        /// The file.
        path: PathBuf,
        /// What its file system says, or is.
        reason: String,
    },
    /// The file could not be read at all.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Rate {
    /// Bytes a second. Zero where nothing was moved.
    pub fn bytes_per_s(&self) -> f64 {
        self.bytes.get() as f64 / self.time.as_secs_f64().max(1e-9)
    }

    /// How long `bytes` take at this rate.
    pub fn time_for(&self, bytes: Bytes) -> Duration {
        let seconds = bytes.get() as f64 / self.bytes_per_s();
        // No bytes at no rate take no time.
        Duration::try_from_secs_f64(seconds).unwrap_or(if bytes == Bytes::ZERO {
            Duration::ZERO
        } else {
            Duration::MAX
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:.1} GB/s", self.bytes_per_s() / 1e9))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_tells_how_long_other_sizes_take() {
        let rate = Rate { bytes: Bytes::new(3_000_000_000), time: Duration::from_millis(1500) };
        assert_eq!(rate.to_string(), "2.0 GB/s");
        assert_eq!(rate.time_for(Bytes::new(500_000_000)), Duration::from_millis(250));
        let nothing = Rate { bytes: Bytes::ZERO, time: Duration::ZERO };
        assert_eq!(nothing.time_for(Bytes::ZERO), Duration::ZERO);
        assert_eq!(nothing.time_for(Bytes::new(1)), Duration::MAX);
    }
}
