//! What can go wrong on a device, with the call, the code and the sizes.

use forebay_core::Bytes;

/// The result of a device call.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// A device call that did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device cannot be used by this process: no driver, no such ordinal, a driver that is too old.
    #[error("{reason}; {remedy}: {device}")]
    Unavailable {
        /// The device asked for, as its user wrote it.
        device: String,
        /// What was found.
        reason: String,
        /// What would make it work.
        remedy: String,
    },

    /// The device has no room. A caller may give something back and try again.
    #[error(
        "{call} found no room on the device{}; give other memory back or ask for less: {wanted} wanted",
        .free.map(|free| format!(" with {free} free")).unwrap_or_default()
    )]
    OutOfMemory {
        /// The call that was refused.
        call: &'static str,
        /// How much it asked for.
        wanted: Bytes,
        /// How much was free just after, where the device said so.
        free: Option<Bytes>,
    },

    /// The driver refused a call. The device is still usable.
    #[error("{call} was refused with {name} (code {code}): {context}")]
    Driver {
        /// The call that was refused.
        call: &'static str,
        /// The driver's code. The host backend uses the CUDA codes.
        code: i32,
        /// The code's name and the driver's description.
        name: String,
        /// Sizes and addresses of the call.
        context: String,
    },

    /// The device's context is gone for this process, and with it every allocation; every later call fails too.
    #[error(
        "{call} found that earlier work on the device had failed for good with {name} (code {code}); \
         restart the process to use the device again: {context}"
    )]
    Lost {
        /// The call that found out; not the one that caused it.
        call: &'static str,
        /// The driver's code.
        code: i32,
        /// The code's name and the driver's description.
        name: String,
        /// Sizes and addresses of the call.
        context: String,
    },

    /// The operating system refused a call.
    #[error("{call} was refused by the operating system ({error}): {context}")]
    System {
        /// The call that was refused.
        call: &'static str,
        /// The operating system's error number (`errno`).
        errno: i32,
        /// The same in words.
        error: String,
        /// Sizes and addresses of the call.
        context: String,
    },
}

impl DeviceError {
    /// Whether the call may succeed once memory has been given back.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, DeviceError::OutOfMemory { .. })
    }

    /// Whether the device is gone for the rest of this process.
    pub fn is_lost(&self) -> bool {
        matches!(self, DeviceError::Lost { .. })
    }

    /// Whether the device does not do this at all, so that there is no use in asking again.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, DeviceError::Driver { code: 801, .. })
    }

    /// An argument the GPU driver would refuse, refused by the host backend with the same code.
    pub(crate) fn invalid(call: &'static str, context: String) -> Self {
        DeviceError::Driver { call, code: 1, name: "invalid value".to_owned(), context }
    }

    /// What the GPU driver refuses with this code: to map a part of a frame, say.
    pub(crate) fn unsupported(call: &'static str, context: String) -> Self {
        DeviceError::Driver { call, code: 801, name: "operation not supported".to_owned(), context }
    }

    pub(crate) fn system(call: &'static str, errno: rustix::io::Errno, context: String) -> Self {
        DeviceError::System { call, errno: errno.raw_os_error(), error: errno.to_string(), context }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_what_was_wanted_and_what_there_was() {
        let full = DeviceError::OutOfMemory {
            call: "create_frame",
            wanted: Bytes::mib(32),
            free: Some(Bytes::mib(6)),
        };
        assert_eq!(
            full.to_string(),
            "create_frame found no room on the device with 6 MiB free; give other memory back or ask for less: \
             32 MiB wanted"
        );
        assert!(full.is_out_of_memory());
        assert!(!DeviceError::invalid("map", String::new()).is_out_of_memory());
    }
}
