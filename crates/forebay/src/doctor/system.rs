//! What the operating system gives this process: memory, pinned memory, a look at its own address space.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use forebay_core::Bytes;
use forebay_store::ProcessMaps;
use rustix::process::{Resource, getrlimit};

use super::Check;

/// With less than this the page cache holds too little of a model to be of use.
const ENOUGH: Bytes = Bytes::gib(1);

const CGROUPS: &str = "/sys/fs/cgroup";

/// Memory that is left for the page cache, which is where streamed weights come from.
pub(super) fn memory() -> Check {
    let Some((available, total)) = fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(meminfo)
    else {
        let remedy = "mount /proc with its file meminfo";
        return Check::limited(
            "memory",
            "how much memory there is cannot be told from /proc/meminfo",
            remedy,
        );
    };
    let cgroup =
        fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| tightest(Path::new(CGROUPS), &text));
    let mut detail = format!("{available} of {total} available");
    let mut left = available;
    if let Some(Cgroup { limit, used, file }) = cgroup {
        detail.push_str(&format!(
            "; this memory cgroup is limited to {limit}, {used} in use ({file} of them files)"
        ));
        left = left.min(limit.saturating_sub(used.saturating_sub(file)));
    }
    if left >= ENOUGH {
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

/// A memory cgroup with a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cgroup {
    limit: Bytes,
    used: Bytes,
    /// The part of `used` that is page cache.
    file: Bytes,
}

/// The cgroup (version 2) with the lowest limit among the process's own and those above it. `own` is the text of
/// `/proc/self/cgroup`. `None` where none has a limit.
fn tightest(root: &Path, own: &str) -> Option<Cgroup> {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder: PathBuf = root.join(path);
    let up_to_root = folder.ancestors().take_while(|folder| folder.starts_with(root));
    up_to_root.filter_map(read_cgroup).min_by_key(|cgroup| cgroup.limit)
}

fn read_cgroup(folder: &Path) -> Option<Cgroup> {
    let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
    let number = |text: String| text.trim().parse().ok().map(Bytes::new);
    let stat = read("memory.stat").unwrap_or_default();
    let file = stat.lines().find_map(|line| line.strip_prefix("file ")?.parse().ok());
    Some(Cgroup {
        limit: read("memory.max").and_then(number)?,
        used: read("memory.current").and_then(number)?,
        file: file.map_or(Bytes::ZERO, Bytes::new),
    })
}

/// Available and total memory.
fn meminfo(text: &str) -> Option<(Bytes, Bytes)> {
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok().map(Bytes::kib)
    };
    Some((value("MemAvailable:")?, value("MemTotal:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_table() {
        let text = "MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n";
        assert_eq!(meminfo(text), Some((Bytes::kib(12_000_000), Bytes::kib(24_000_000))));
        assert_eq!(meminfo("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn the_tightest_limit_above_the_process_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |folder: &str, files: [&str; 3]| {
            let folder = root.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            for (file, text) in ["memory.max", "memory.current", "memory.stat"].iter().zip(files) {
                fs::write(folder.join(file), text).unwrap();
            }
        };
        write("outer/inner", ["max\n", "7\n", "file 1\n"]);
        write("outer", ["4096\n", "1000\n", "anon 700\nfile 300\nfile_mapped 5\n"]);
        let outer = Cgroup { limit: Bytes::new(4096), used: Bytes::new(1000), file: Bytes::new(300) };
        assert_eq!(tightest(root.path(), "4:memory:/x\n0::/outer/inner\n"), Some(outer));
        assert_eq!(tightest(root.path(), "0::/other\n"), None);
        assert_eq!(tightest(root.path(), "4:memory:/outer\n"), None);
    }
}
