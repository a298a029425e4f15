//! How much of the host's memory the page cache may have, as far as the system and its memory cgroups tell.

use std::fs;
use std::path::{Path, PathBuf};

use forebay_core::Bytes;

const CGROUPS: &str = "/sys/fs/cgroup";
/// Version 1 has a number for "no limit": the largest there is, of whole pages.
const NO_LIMIT: Bytes = Bytes::new(1 << 62);

/// The host's memory as this process may use it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ram {
    pub(crate) total: Bytes,
    /// What could be had without swapping, page cache included.
    pub(crate) available: Bytes,
    /// Page cache that processes have mapped, as they have their programs and libraries.
    pub(crate) mapped: Bytes,
    /// The memory cgroup above the process that leaves least.
    pub(crate) cgroup: Option<Cgroup>,
    /// Of the last ten seconds, the percentage in which something waited for memory.
    pub(crate) pressure: f64,
}

/// A memory cgroup with a limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cgroup {
    pub(crate) limit: Bytes,
    pub(crate) used: Bytes,
    /// The part of `used` that is page cache, and can be had again.
    pub(crate) file: Bytes,
    /// The part of `file` that processes have mapped.
    mapped: Bytes,
    pressure: f64,
}

impl Ram {
    /// As it is now. `None` where the system does not tell.
    pub(crate) fn read() -> Option<Ram> {
        let text = |path: &str| fs::read_to_string(path).ok();
        let (available, mapped, total) = meminfo(&text("/proc/meminfo")?)?;
        let cgroup = text("/proc/self/cgroup").and_then(|own| tightest(Path::new(CGROUPS), &own));
        let pressure = text("/proc/pressure/memory").map_or(0.0, |text| some_of_10_s(&text));
        let pressure = cgroup.map_or(pressure, |cgroup| pressure.max(cgroup.pressure));
        Some(Ram { total, available, mapped, cgroup, pressure })
    }

    /// What the page cache may take, what it holds now included.
    pub(crate) fn cache_room(&self) -> Bytes {
        self.cgroup.map_or(self.available, |cgroup| self.available.min(cgroup.room()))
    }

    /// What the page cache may take of files that nobody has mapped: what is mapped is in use. `ours` is what this engine has
    /// mapped of its weights.
    pub(crate) fn unmapped_room(&self, ours: Bytes) -> Bytes {
        let beside = |room: Bytes, mapped: Bytes| room.saturating_sub(mapped.saturating_sub(ours));
        let room = beside(self.available, self.mapped);
        self.cgroup.map_or(room, |cgroup| room.min(beside(cgroup.room(), cgroup.mapped)))
    }

    /// The memory that there is for this process and those it shares its limit with.
    pub(crate) fn limit(&self) -> Bytes {
        self.cgroup.map_or(self.total, |cgroup| self.total.min(cgroup.limit))
    }
}

impl Cgroup {
    /// One without pressure.
    #[cfg(test)]
    pub(crate) fn new(limit: Bytes, used: Bytes, file: Bytes) -> Self {
        Cgroup { limit, used, file, mapped: Bytes::ZERO, pressure: 0.0 }
    }

    /// What is left when all that can be had again was given back.
    pub(crate) fn room(&self) -> Bytes {
        self.limit.saturating_sub(self.used.saturating_sub(self.file))
    }
}

/// The cgroup that leaves least among the process's own and those above it, of version 2 or 1. `own` is the text of
/// `/proc/self/cgroup`. `None` where none has a limit.
fn tightest(root: &Path, own: &str) -> Option<Cgroup> {
    let folders = own.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let root: PathBuf = match controllers {
            "" => root.to_owned(),
            _ if controllers.split(',').any(|controller| controller == "memory") => root.join("memory"),
            _ => return None,
        };
        let folder = root.join(path.strip_prefix('/')?);
        Some((root, folder))
    });
    let all = folders.flat_map(|(root, folder)| {
        let up_to_root = folder.ancestors().take_while(|folder| folder.starts_with(&root));
        up_to_root.map(read_cgroup).collect::<Vec<_>>()
    });
    all.flatten().min_by_key(Cgroup::room)
}

fn read_cgroup(folder: &Path) -> Option<Cgroup> {
    let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
    let number = |text: String| text.trim().parse().ok().map(Bytes::new);
    let stat = read("memory.stat").unwrap_or_default();
    let entry = |key: &str| {
        let mut fields = stat.lines().filter_map(|line| line.split_once(' '));
        let found = fields.find(|(name, _)| *name == key).and_then(|(_, value)| value.parse().ok());
        found.map_or(Bytes::ZERO, Bytes::new)
    };
    let pressure = read("memory.pressure").map_or(0.0, |text| some_of_10_s(&text));
    // Files in memory count as files, mapped ones too, but cannot be given back.
    if let Some(limit) = read("memory.max") {
        return Some(Cgroup {
            limit: number(limit)?,
            used: read("memory.current").and_then(number)?,
            file: entry("file").saturating_sub(entry("shmem")) + entry("slab_reclaimable"),
            mapped: entry("file_mapped").saturating_sub(entry("shmem")),
            pressure,
        });
    }
    let limit = read("memory.limit_in_bytes").and_then(number).filter(|limit| *limit < NO_LIMIT)?;
    let used = read("memory.usage_in_bytes").and_then(number)?;
    let file = entry("total_cache").saturating_sub(entry("total_shmem"));
    let mapped = entry("total_mapped_file").saturating_sub(entry("total_shmem"));
    Some(Cgroup { limit, used, file, mapped, pressure })
}

/// Memory that is available, that is mapped page cache, and all there is.
fn meminfo(text: &str) -> Option<(Bytes, Bytes, Bytes)> {
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok().map(Bytes::kib)
    };
    let mapped = value("Mapped:").unwrap_or(Bytes::ZERO);
    let shared = value("Shmem:").unwrap_or(Bytes::ZERO);
    Some((value("MemAvailable:")?, mapped.saturating_sub(shared), value("MemTotal:")?))
}

/// The percentage of the last ten seconds from the kernel's table of pressure; 0 where it is not told.
fn some_of_10_s(text: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix("some "));
    let field = line.and_then(|line| line.split(' ').find_map(|field| field.strip_prefix("avg10=")));
    field.and_then(|value| value.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_table() {
        let text = "MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n";
        assert_eq!(meminfo(text), Some((Bytes::kib(12_000_000), Bytes::ZERO, Bytes::kib(24_000_000))));
        let text = format!("{text}Mapped:  500 kB\nShmem:  200 kB\n");
        assert_eq!(meminfo(&text), Some((Bytes::kib(12_000_000), Bytes::kib(300), Bytes::kib(24_000_000))));
        assert_eq!(meminfo("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn pressure_is_read_from_the_kernels_table() {
        let text = "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!((some_of_10_s(text), some_of_10_s("")), (12.5, 0.0));
    }

    #[test]
    fn the_cgroup_above_the_process_that_leaves_least_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |folder: &str, files: [&str; 3]| {
            let folder = root.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            for (file, text) in ["memory.max", "memory.current", "memory.stat"].iter().zip(files) {
                fs::write(folder.join(file), text).unwrap();
            }
        };
        write("outer/middle/inner", ["max\n", "7\n", "file 1\n"]);
        write("outer/middle", ["5000\n", "100\n", "file 0\n"]);
        write(
            "outer",
            ["8192\n", "6000\n", "anon 700\nfile 3000\nfile_mapped 505\nshmem 500\nslab_reclaimable 200\n"],
        );
        let outer = Cgroup {
            mapped: Bytes::new(5),
            ..Cgroup::new(Bytes::new(8192), Bytes::new(6000), Bytes::new(2700))
        };
        assert_eq!(outer.room(), Bytes::new(8192 - 3300));
        assert_eq!(tightest(root.path(), "4:memory:/x\n0::/outer/middle/inner\n"), Some(outer));
        assert_eq!(tightest(root.path(), "0::/other\n"), None);
        assert_eq!(tightest(root.path(), "4:cpu:/outer\n"), None);
        // Version 1 beside it.
        let version_1 = |folder: &str, limit: &str| {
            let folder = root.path().join("memory").join(folder);
            fs::create_dir_all(&folder).unwrap();
            let stat = "cache 1\nshmem 1\ntotal_cache 900\ntotal_shmem 100\n";
            let files = [
                ("memory.limit_in_bytes", limit),
                ("memory.usage_in_bytes", "2000\n"),
                ("memory.stat", stat),
            ];
            files.into_iter().for_each(|(file, text)| fs::write(folder.join(file), text).unwrap());
        };
        version_1("own", "4096\n");
        version_1("", "9223372036854771712\n");
        let own = tightest(root.path(), "9:name=systemd:/\n4:cpu,memory:/own/below\n0::/other\n");
        assert_eq!(own, Some(Cgroup::new(Bytes::new(4096), Bytes::new(2000), Bytes::new(800))));
        assert_eq!(tightest(root.path(), "4:memory:/other\n"), None);
        let ram = Ram {
            total: Bytes::new(10_000),
            available: Bytes::new(9000),
            mapped: Bytes::new(4200),
            cgroup: Some(outer),
            pressure: 0.0,
        };
        assert_eq!((ram.cache_room(), ram.limit()), (Bytes::new(4892), Bytes::new(8192)));
        let beside = [0, 3, 7, 5000].map(|ours| ram.unmapped_room(Bytes::new(ours)).get());
        assert_eq!(beside, [4800, 4803, 4807, 4892]);
    }
}
