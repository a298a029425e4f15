//! Devices: what there is, and whether a page really comes and goes there.

use std::sync::Arc;

use forebay_core::Bytes;
use forebay_device::cuda::{CudaDevice, CudaInfo, describe, device_count};
use forebay_device::host::{HostConfig, HostDevice};
use forebay_device::{Device, DeviceError};

use super::Check;
use super::trial::{self, Trial};

const DRIVER: &str = "CUDA driver";

pub(super) fn host() -> Check {
    let remedy =
        "allow memfd_create and mmap to this process (a seccomp profile may forbid them), and give it memory";
    let device = match HostDevice::new(HostConfig::default()) {
        Ok(device) => Arc::new(device) as Arc<dyn Device>,
        Err(error) => return Check::missing("host", error.to_string(), remedy),
    };
    after_trial("host", String::new(), &device, remedy)
}

/// The driver, then every GPU it sees.
pub(super) fn cuda() -> Vec<Check> {
    let count = match device_count() {
        Ok(count) => count,
        Err(error) => return vec![unusable(DRIVER, error)],
    };
    let gpus: Vec<_> = (0..count).map(|ordinal| (ordinal, describe(ordinal))).collect();
    let version = gpus.iter().find_map(|(_, info)| info.as_ref().ok()).map(|info| info.driver_version);
    let supports = version.map_or(String::new(), |(major, minor)| format!("supports CUDA {major}.{minor}, "));
    let plural = if count == 1 { "" } else { "s" };
    let mut checks = vec![Check::works(DRIVER, format!("{supports}sees {count} GPU{plural}"))];
    checks.extend(gpus.into_iter().map(|(ordinal, info)| match info {
        Ok(info) => gpu(&info),
        Err(error) => unusable(&format!("cuda:{ordinal}"), error),
    }));
    checks
}

fn gpu(info: &CudaInfo) -> Check {
    let name = format!("cuda:{}", info.ordinal);
    let (major, minor) = info.compute_capability;
    let mut found = format!("{}, compute capability {major}.{minor}, ", info.name);
    if !info.virtual_memory {
        let detail = format!("{found}{}, without virtual memory management", info.total_memory);
        let remedy =
            "use another GPU or the device \"host\"; virtual GPUs and WSL may lack what is needed here";
        return Check::missing(name, detail, remedy);
    }
    let device: Arc<dyn Device> = match CudaDevice::open(info.ordinal) {
        Ok(device) => device,
        Err(error) => return unusable(&name, error),
    };
    match device.memory() {
        Ok(memory) => found.push_str(&format!("{} of {} free, ", memory.free, memory.total)),
        Err(error) => return unusable(&name, error),
    }
    after_trial(&name, found, &device, "look at what nvidia-smi and the kernel's log (dmesg) say of this GPU")
}

fn after_trial(name: &str, found: String, device: &Arc<dyn Device>, remedy: &str) -> Check {
    let page: Bytes = device.granularity();
    match trial::one_page(device) {
        Ok(Trial::Passed) => {
            let done = format!("a page of {page} was reserved, mapped, filled, read back and unmapped");
            Check::works(name, found + &done)
        }
        Ok(Trial::WrongByte(at)) => {
            let detail =
                format!("{found}a page of {page} came back with another byte at offset {}", at.get());
            Check::missing(name, detail, "do not use this device; its memory or its driver is at fault")
        }
        Err(error) if error.is_out_of_memory() => {
            Check::limited(name, format!("{found}{error}"), "end other programs that use this device")
        }
        Err(error) => Check::missing(name, format!("{found}{error}"), remedy),
    }
}

fn unusable(name: &str, error: DeviceError) -> Check {
    match error {
        DeviceError::Unavailable { reason, remedy, .. } => Check::missing(name, reason, remedy),
        error if error.is_out_of_memory() => {
            Check::limited(name, error.to_string(), "end other programs that use this GPU")
        }
        error => Check::missing(name, error.to_string(), "look at what nvidia-smi says"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn a_full_device_is_limited_not_broken() {
        let config = HostConfig { capacity: Bytes::mib(1), ..HostConfig::default() };
        let full: Arc<dyn Device> = Arc::new(HostDevice::new(config).unwrap());
        let check = after_trial("host", "found, ".to_owned(), &full, "unused");
        assert_eq!(check.status, Status::Limited);
        assert!(check.detail.starts_with("found, create_frame found no room"), "{}", check.detail);
    }

    #[test]
    fn a_missing_driver_is_told_with_its_remedy() {
        let error = DeviceError::Unavailable {
            device: "cuda".to_owned(),
            reason: "no library".to_owned(),
            remedy: "install it".to_owned(),
        };
        assert_eq!(unusable(DRIVER, error), Check::missing(DRIVER, "no library", "install it"));
    }
}
