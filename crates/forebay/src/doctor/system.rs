//! What the operating system gives this process: memory, pinned memory, a look at its own address space.

use std::fs::File;
use std::os::unix::fs::FileExt;

use forebay_core::Bytes;
use forebay_store::ProcessMaps;
use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::cache::ram::{Cgroup, Ram};

/// With less than this the page cache holds too little of a model to be of use.
const ENOUGH: Bytes = Bytes::gib(1);

/// Memory that is left for the page cache, which is where streamed weights come from.
pub(super) fn memory() -> Check {
    let Some(ram) = Ram::read() else {
        let remedy = "mount /proc with its file meminfo";
        return Check::limited(
            "memory",
            "how much memory there is cannot be told from /proc/meminfo",
            remedy,
        );
    };
    let mut detail = format!("{} of {} available", ram.available, ram.total);
    if let Some(Cgroup { limit, used, file, .. }) = ram.cgroup {
        detail.push_str(&format!(
            "; this memory cgroup is limited to {limit}, {used} in use ({file} of them files)"
        ));
    }
    if ram.cache_room() >= ENOUGH {
        return Check::works("memory", detail);
    }
    let remedy = "end other programs or raise the container's memory limit; until then streamed weights come from disk \
                  in every pass";
    Check::limited("memory", detail, remedy)
}

/// How much the process may lock. To know, not to mend: the NVIDIA driver does not count what it pins against it, and
/// the trial of each GPU has shown that pinning works.
pub(super) fn locked_memory() -> Check {
    let limit = getrlimit(Resource::Memlock).current.map(Bytes::new);
    let detail = match limit {
        None => "no limit".to_owned(),
        Some(limit) => {
            format!("up to {limit}, which the NVIDIA driver's pinned memory does not count towards")
        }
    };
    Check::works("locked memory", detail)
}

/// Whether the files behind mapped tensors can be found.
pub(super) fn memory_map() -> Check {
    let name = "memory map";
    let remedy = "let the process read /proc/self/maps and /proc/self/pagemap; until then give models as files: tensors \
                  that were mapped by another library keep their memory";
    match ProcessMaps::snapshot().map_err(|error| error.to_string()).and_then(|_| read_pagemap()) {
        Ok(()) => Check::works(name, "the files behind mapped tensors can be found"),
        Err(reason) => Check::limited(name, reason, remedy),
    }
}

/// Reads the entry of one page, as finding out whether a page was written to does.
fn read_pagemap() -> Result<(), String> {
    const ENTRY: u64 = 8;
    let page = rustix::param::page_size() as u64;
    let probe = 0u8;
    let entry = std::ptr::from_ref(&probe).addr() as u64 / page * ENTRY;
    File::open("/proc/self/pagemap")
        .and_then(|file| file.read_exact_at(&mut [0; ENTRY as usize], entry))
        .map_err(|error| format!("cannot read /proc/self/pagemap: {error}"))
}
