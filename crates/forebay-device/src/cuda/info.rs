//! What GPUs there are. Makes no context, so asking takes no GPU memory.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;

use forebay_core::Bytes;

use super::driver::Driver;
use super::types::{
    COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, Ordinal, READ_ONLY_HOST_REGISTER_SUPPORTED,
    VIRTUAL_MEMORY_SUPPORTED,
};
use crate::{DeviceError, Result};

/// How many GPUs this process sees.
///
/// # Errors
/// [`DeviceError::Unavailable`] where there is no usable driver or it sees no GPU.
pub fn device_count() -> Result<u32> {
    count(Driver::get("cuda")?)
}

/// Describes a GPU, whether or not Forebay can use it.
///
/// # Errors
/// [`DeviceError::Unavailable`] where there is no usable driver or no such GPU.
pub fn describe(ordinal: u32) -> Result<CudaInfo> {
    let driver = Driver::get(&format!("cuda:{ordinal}"))?;
    CudaInfo::read(driver, find(driver, ordinal)?)
}

/// What the driver says of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CudaInfo {
    /// The N of `cuda:N`.
    pub ordinal: u32,
    /// The hardware's name.
    pub name: String,
    /// The highest CUDA version that the driver supports, major and minor.
    pub driver_version: (u32, u32),
    /// The compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// All of its memory.
    pub total_memory: Bytes,
    /// Whether addresses can be reserved and mapped, without which Forebay cannot use the GPU.
    pub virtual_memory: bool,
    /// Whether its copy engine can read mapped files where they are in the page cache.
    pub registers_files: bool,
}

impl CudaInfo {
    pub(super) fn read(driver: &Driver, device: Ordinal) -> Result<Self> {
        let attribute = |attribute| attribute_of(driver, device, attribute);
        let mut total = 0;
        // SAFETY: the result has a place to go; the driver made the device number.
        let code = unsafe { (driver.table.device_total_mem)(&mut total, device) };
        driver.check("cuDeviceTotalMem", code, || format!("cuda:{device}"))?;
        Ok(CudaInfo {
            ordinal: device.unsigned_abs(),
            name: name_of(driver, device)?,
            driver_version: (driver.version.unsigned_abs() / 1000, driver.version.unsigned_abs() % 1000 / 10),
            compute_capability: (
                attribute(COMPUTE_CAPABILITY_MAJOR)?.unsigned_abs(),
                attribute(COMPUTE_CAPABILITY_MINOR)?.unsigned_abs(),
            ),
            total_memory: Bytes::new(total as u64),
            virtual_memory: attribute(VIRTUAL_MEMORY_SUPPORTED)? != 0,
            // Drivers that do not know the attribute cannot do it.
            registers_files: attribute(READ_ONLY_HOST_REGISTER_SUPPORTED).is_ok_and(|value| value != 0),
        })
    }
}

impl fmt::Display for CudaInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CudaInfo {
            ordinal, name, driver_version, compute_capability, total_memory, virtual_memory, ..
        } = self;
        write!(f, "cuda:{ordinal}: {name}, {total_memory}, compute capability ")?;
        write!(f, "{}.{}, ", compute_capability.0, compute_capability.1)?;
        write!(f, "driver for CUDA {}.{}, ", driver_version.0, driver_version.1)?;
        write!(f, "{} virtual memory management", if *virtual_memory { "with" } else { "without" })
    }
}

/// The driver's number for the GPU of this ordinal.
pub(super) fn find(driver: &Driver, ordinal: u32) -> Result<Ordinal> {
    let count = count(driver)?;
    if ordinal >= count {
        let (gpus, last) = (if count == 1 { "GPU" } else { "GPUs" }, count.saturating_sub(1));
        return Err(DeviceError::Unavailable {
            device: format!("cuda:{ordinal}"),
            reason: format!("this process sees {count} {gpus}"),
            remedy: format!("use an ordinal from 0 to {last}, or look at CUDA_VISIBLE_DEVICES"),
        });
    }
    let mut device = 0;
    // SAFETY: the result has a place to go; the driver checks the ordinal. It fits: there are fewer than `i32::MAX`.
    let code = unsafe { (driver.table.device_get)(&mut device, ordinal as c_int) };
    driver.check("cuDeviceGet", code, || format!("cuda:{ordinal}"))?;
    Ok(device)
}

fn count(driver: &Driver) -> Result<u32> {
    let mut count = 0;
    // SAFETY: the result has a place to go.
    let code = unsafe { (driver.table.device_get_count)(&mut count) };
    driver.check("cuDeviceGetCount", code, || "the number of GPUs".to_owned())?;
    Ok(count.unsigned_abs())
}

fn name_of(driver: &Driver, device: Ordinal) -> Result<String> {
    let mut name = [0_u8; 256];
    // SAFETY: the driver writes at most the given number of bytes.
    let code = unsafe {
        (driver.table.device_get_name)(name.as_mut_ptr().cast::<c_char>(), name.len() as c_int, device)
    };
    driver.check("cuDeviceGetName", code, || format!("cuda:{device}"))?;
    let name = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy);
    Ok(name.map_or_else(|_| "a GPU without a name".to_owned(), |name| name.into_owned()))
}

fn attribute_of(driver: &Driver, device: Ordinal, attribute: c_int) -> Result<c_int> {
    let mut value = 0;
    // SAFETY: the result has a place to go; the driver checks both numbers.
    let code = unsafe { (driver.table.device_get_attribute)(&mut value, attribute, device) };
    driver.check("cuDeviceGetAttribute", code, || format!("attribute {attribute} of cuda:{device}"))?;
    Ok(value)
}
