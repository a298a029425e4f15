//! What a machine without the GPU that was asked for is told.

use forebay_device::cuda::{self, CudaDevice};
use forebay_device::{Device, DeviceError};

#[test]
fn a_gpu_that_is_not_there_is_unavailable_with_a_remedy() {
    match CudaDevice::open(4096) {
        Err(DeviceError::Unavailable { device, reason, remedy }) => {
            assert_eq!(device, "cuda:4096");
            assert!(!reason.is_empty() && !remedy.is_empty());
        }
        other => panic!("{other:?}"),
    }
    let error = cuda::describe(4096).unwrap_err().to_string();
    assert!(error.ends_with(": cuda:4096"), "{error}");
}

#[test]
fn every_gpu_that_is_counted_is_described() {
    match cuda::device_count() {
        Ok(count) => {
            assert!(count > 0);
            for ordinal in 0..count {
                let info = cuda::describe(ordinal).unwrap();
                println!("{info}");
                assert!(!info.name.is_empty() && info.driver_version >= (12, 0));
                if info.virtual_memory {
                    let device = CudaDevice::open(ordinal).unwrap();
                    assert_eq!(*device.info(), info);
                    assert!(device.memory().unwrap().total <= info.total_memory);
                }
            }
        }
        Err(DeviceError::Unavailable { device, reason, .. }) => {
            println!("no GPU: {reason}");
            assert_eq!(device, "cuda");
        }
        Err(other) => panic!("{other:?}"),
    }
}
