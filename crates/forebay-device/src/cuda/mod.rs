//! GPUs, through the CUDA driver library found at run time.
//!
//! Nothing is linked: without a driver or a GPU everything builds and loads, and [`CudaDevice::open`] says what is
//! missing. Only this folder calls the driver.
//!
//! Invariants:
//! * A call leaves the calling thread's current context as it found it.
//! * Nothing waits for the device: only [`Device::synchronize`](crate::Device::synchronize), for one event.
//! * A driver that says "not ready" to a mapping call is asked again, for some milliseconds.
//!
//! ```no_run
//! use forebay_device::{Device, cuda::CudaDevice};
//!
//! let device = CudaDevice::open(0)?;
//! println!("{}: {} free", device.name(), device.memory()?.free);
//! # Ok::<(), forebay_device::DeviceError>(())
//! ```

mod context;
mod device;
mod driver;
mod info;
mod kernels;
mod table;
mod types;

pub use device::CudaDevice;
pub use info::{CudaInfo, describe, device_count};
