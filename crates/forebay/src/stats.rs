//! Numbers for people: what is resident, what was moved, who waited.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_core::{Bytes, PageState};
use forebay_device::DeviceId;

/// Counts of one VBAR, added to by all threads.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) filled_bytes: AtomicU64,
    pub(crate) direct_bytes: AtomicU64,
    pub(crate) past_cache_bytes: AtomicU64,
    pub(crate) filled_pages: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) wait_ns: AtomicU64,
    pub(crate) longest_wait_ns: AtomicU64,
    pub(crate) looked_up_bytes: AtomicU64,
}

impl Counters {
    /// As for a model that was just attached.
    pub(crate) fn reset(&self) {
        let all = [
            &self.filled_bytes,
            &self.direct_bytes,
            &self.past_cache_bytes,
            &self.filled_pages,
            &self.waits,
            &self.wait_ns,
            &self.longest_wait_ns,
            &self.looked_up_bytes,
        ];
        all.into_iter().for_each(|counter| counter.store(0, Ordering::Relaxed));
    }

    pub(crate) fn waited(&self, time: Duration) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.wait_ns.fetch_add(nanoseconds, Ordering::Relaxed);
        self.longest_wait_ns.fetch_max(nanoseconds, Ordering::Relaxed);
    }
}

/// One attached model or explicit VBAR.
#[derive(Clone, Debug)]
pub struct VbarStats {
    /// Its name.
    pub name: String,
    /// Bytes of its weights (of an explicit VBAR: of its address range).
    pub bytes: Bytes,
    /// Bytes a page.
    pub page_size: Bytes,
    /// Where each page stands.
    pub pages: Vec<PageState>,
    /// Bytes of the pages that cannot leave now: small weights, weights of running operations and of views, and what
    /// is lent.
    pub pinned: Bytes,
    /// Whether it is lent as a whole.
    pub lent: bool,
    /// Whether it is detached and its memory kept until others need it.
    pub parked: bool,
    /// How many ranks are resident; pages above are streamed.
    pub watermark: u32,
    /// Bytes copied to the device since it was attached.
    pub filled: Bytes,
    /// Of these, bytes that the copy engine read from the registered page cache by itself.
    pub direct: Bytes,
    /// Of these, bytes that were read past the page cache, as there is no room for them in it.
    pub past_cache: Bytes,
    /// The ranks that have a share in the page cache and are read through it. `None` where it has room for all.
    pub cached: Option<Range<u32>>,
    /// Pages filled since it was attached.
    pub filled_pages: u64,
    /// Bytes of table rows looked up at their source.
    pub looked_up: Bytes,
    /// How often a use had to wait for its pages.
    pub waits: u64,
    /// How long uses waited together.
    pub wait_time: Duration,
    /// The longest of these waits.
    pub longest_wait: Duration,
    /// How often the use that came was not the one expected.
    pub mispredicted: u64,
}

impl VbarStats {
    /// Bytes of the pages in this state.
    pub fn in_state(&self, state: PageState) -> Bytes {
        self.page_size * self.pages.iter().filter(|&&page| page == state).count() as u64
    }
}

/// The engine of one device. Prints as a table.
#[derive(Clone, Debug)]
pub struct EngineStats {
    /// The device.
    pub device: DeviceId,
    /// The hardware's name.
    pub device_name: String,
    /// Bytes that frames may take at this moment.
    pub budget: Bytes,
    /// Bytes of all frames.
    pub held: Bytes,
    /// Bytes of frames that back nothing.
    pub free_frames: Bytes,
    /// Operations that hold weights at this moment.
    pub operations: usize,
    /// Exported tensors that hold weights for as long as they live.
    pub views: usize,
    /// Bytes of the small weights' pages, which stay as long as their models are attached.
    pub reserved: Bytes,
    /// Bytes of pinned host memory for copies.
    pub ring: Bytes,
    /// Bytes of page cache that the copy engine reads by itself.
    pub registered: Bytes,
    /// Highest priority first.
    pub vbars: Vec<VbarStats>,
}

impl fmt::Display for EngineStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} ({}): {} of {} in use, {} free frames, {} pinned host memory, {} registered page cache",
            self.device,
            self.device_name,
            self.held - self.free_frames,
            self.budget,
            self.free_frames,
            self.ring,
            self.registered,
        )?;
        writeln!(
            f,
            "{:<24} {:>10} {:>10} {:>10} {:>10} {:>10} {:>8} {:>10}",
            "model", "weights", "resident", "streamed", "absent", "copied", "waits", "waited"
        )?;
        for vbar in &self.vbars {
            writeln!(
                f,
                "{:<24} {:>10} {:>10} {:>10} {:>10} {:>10} {:>8} {:>8.1} s",
                shortened(&vbar.name),
                vbar.bytes.to_string(),
                vbar.in_state(PageState::Resident).to_string(),
                vbar.in_state(PageState::Streamed).to_string(),
                vbar.in_state(PageState::Absent).to_string(),
                vbar.filled.to_string(),
                vbar.waits,
                vbar.wait_time.as_secs_f64(),
            )?;
        }
        Ok(())
    }
}

fn shortened(name: &str) -> String {
    match name.char_indices().nth(24) {
        None => name.to_owned(),
        Some(_) => name.chars().take(23).chain(['…']).collect(),
    }
}
