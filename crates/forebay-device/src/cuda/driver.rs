//! The driver library: loaded once, and its codes turned into errors.

use std::ffi::c_int;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use libloading::Library;

use super::table::{self, CUDA_VERSION, Table};
use super::types::{Code, DEVICE_UNAVAILABLE, NO_DEVICE, NOT_READY, SUCCESS};
use crate::{DeviceError, Result};

const LIBRARY: &str = "libcuda.so.1";
const USE_HOST: &str = "use the device \"host\"";

/// The loaded driver. There is one in a process, for as long as the process lives.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) table: Table,
    /// The highest CUDA version that the driver supports, as 1000 * major + 10 * minor.
    pub(super) version: c_int,
}

impl Driver {
    /// The process's driver, initialised. `device` is named in the error.
    pub(super) fn get(device: &str) -> Result<&'static Driver> {
        static DRIVER: OnceLock<std::result::Result<Driver, Unusable>> = OnceLock::new();
        let driver = DRIVER.get_or_init(Driver::load).as_ref().map_err(|why| why.of(device))?;
        // Not remembered: a failure to initialise may pass (a GPU that another process holds), a repetition is free.
        driver.init().map_err(|why| why.of(device))?;
        Ok(driver)
    }

    /// `Ok` where a call succeeded.
    pub(super) fn check(
        &self,
        call: &'static str,
        code: Code,
        context: impl FnOnce() -> String,
    ) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        let (name, context) = (self.describe(code), context());
        Err(if is_fatal(code) {
            DeviceError::Lost { call, code, name, context }
        } else {
            DeviceError::Driver { call, code, name, context }
        })
    }

    /// A code's name and meaning.
    pub(super) fn describe(&self, code: Code) -> String {
        let name = table::text(self.table.get_error_name, code).unwrap_or("an unknown code");
        match table::text(self.table.get_error_string, code) {
            Some(meaning) => format!("{name}, {meaning}"),
            None => name.to_owned(),
        }
    }

    fn load() -> std::result::Result<Driver, Unusable> {
        // SAFETY: the driver's initialisers have no preconditions, and the library is never unloaded.
        let library = unsafe { Library::new(LIBRARY) }.map_err(|error| {
            let why =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Unusable {
                reason: format!("the NVIDIA driver library {LIBRARY} could not be loaded ({why})"),
                remedy: format!(
                    "install the NVIDIA driver, start the container with its GPUs, or {USE_HOST}"
                ),
            }
        })?;
        // Unloading a driver that has threads of its own is not safe; it stays, also where it is found unusable.
        let library: &'static Library = Box::leak(Box::new(library));
        let version = version_of(library)?;
        if version < CUDA_VERSION {
            return Err(Unusable {
                reason: format!(
                    "the NVIDIA driver supports CUDA {}, and {} is the least",
                    shown_version(version),
                    shown_version(CUDA_VERSION)
                ),
                remedy: format!("update the NVIDIA driver to 525 or later, or {USE_HOST}"),
            });
        }
        let table = Table::resolve(library).map_err(|symbol| Unusable {
            reason: format!("the NVIDIA driver has no function {symbol}"),
            remedy: format!("update the NVIDIA driver, or {USE_HOST}"),
        })?;
        Ok(Driver { table, version })
    }

    fn init(&self) -> std::result::Result<(), Unusable> {
        // SAFETY: may be called at any time, any number of times; zero is the only value allowed.
        match unsafe { (self.table.init)(0) } {
            SUCCESS => Ok(()),
            NO_DEVICE => Err(Unusable {
                reason: "the NVIDIA driver sees no GPU".to_owned(),
                remedy: format!("look at CUDA_VISIBLE_DEVICES and what nvidia-smi lists, or {USE_HOST}"),
            }),
            code => Err(Unusable {
                reason: format!("the NVIDIA driver did not start with {} (code {code})", self.describe(code)),
                remedy: format!("look at what nvidia-smi says, or {USE_HOST}"),
            }),
        }
    }
}

/// Why there is no driver, whichever device is asked for.
#[derive(Debug)]
struct Unusable {
    reason: String,
    remedy: String,
}

impl Unusable {
    fn of(&self, device: &str) -> DeviceError {
        let Unusable { reason, remedy } = self;
        DeviceError::Unavailable { device: device.to_owned(), reason: reason.clone(), remedy: remedy.clone() }
    }
}

/// Repeats a call while the driver says "not ready": mapping calls do under pressure, and a moment later succeed.
/// Gives up after about 50 ms with the driver's last answer.
pub(super) fn retried(call: &'static str, mut attempt: impl FnMut() -> Code) -> Code {
    const FIRST: Duration = Duration::from_micros(100);
    const ATTEMPTS: u32 = 10;
    for round in 1..ATTEMPTS {
        let code = attempt();
        if code != NOT_READY {
            return code;
        }
        tracing::debug!(call, round, "the driver is not ready");
        thread::sleep(FIRST * (1 << (round - 1)));
    }
    attempt()
}

/// Whether every later call in this process will fail too. These are the codes that the driver's header documents so,
/// the driver shutting down (4), and a GPU that went away while it was in use (46).
fn is_fatal(code: Code) -> bool {
    const DEINITIALIZED: Code = 4;
    matches!(
        code,
        DEINITIALIZED | DEVICE_UNAVAILABLE | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 805..=807 | 911
    )
}

fn version_of(library: &Library) -> std::result::Result<c_int, Unusable> {
    let broken = |what: String| Unusable {
        reason: format!("{LIBRARY} {what}"),
        remedy: format!("install the NVIDIA driver anew, or {USE_HOST}"),
    };
    // SAFETY: the driver's function of this name has this signature.
    let get_version =
        unsafe { library.get::<unsafe extern "C" fn(*mut c_int) -> Code>("cuDriverGetVersion") }
            .map_err(|_| broken("has no function cuDriverGetVersion".to_owned()))?;
    let mut version = 0;
    // SAFETY: the result has a place to go; the call is allowed before initialisation.
    match unsafe { get_version(&mut version) } {
        SUCCESS => Ok(version),
        code => Err(broken(format!("did not tell its version (code {code})"))),
    }
}

fn shown_version(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_ready_is_tried_again_and_then_reported() {
        let mut answers = [NOT_READY, NOT_READY, SUCCESS].into_iter();
        assert_eq!(retried("test", || answers.next().unwrap()), SUCCESS);
        let mut attempts = 0;
        let never = || {
            attempts += 1;
            NOT_READY
        };
        assert_eq!(retried("test", never), NOT_READY);
        assert_eq!(attempts, 10);
    }

    #[test]
    fn other_refusals_are_not_repeated() {
        let mut answers = [1, SUCCESS].into_iter();
        assert_eq!(retried("test", || answers.next().unwrap()), 1);
    }
}
