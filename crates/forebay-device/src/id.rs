//! The names of devices.

use std::fmt;
use std::str::FromStr;

/// Which device: `host`, or a GPU by its CUDA ordinal.
///
/// ```
/// use forebay_device::DeviceId;
/// assert_eq!("cuda:1".parse(), Ok(DeviceId::Cuda(1)));
/// assert_eq!("cuda".parse(), Ok(DeviceId::Cuda(0)));
/// assert_eq!(DeviceId::Host.to_string(), "host");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceId {
    /// The embedded backend: memory of this process.
    Host,
    /// `cuda:N`.
    Cuda(u32),
}

/// A device name in none of the accepted forms.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a device is named \"host\", \"cuda\" (the first GPU) or \"cuda:N\": {0:?}")]
pub struct ParseDeviceError(String);

impl FromStr for DeviceId {
    type Err = ParseDeviceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let unknown = || ParseDeviceError(name.to_owned());
        match name.split_once(':') {
            None if name == "host" => Ok(DeviceId::Host),
            None if name == "cuda" => Ok(DeviceId::Cuda(0)),
            // `parse` alone would take a sign.
            Some(("cuda", ordinal)) if ordinal.bytes().all(|b| b.is_ascii_digit()) => {
                ordinal.parse().map(DeviceId::Cuda).map_err(|_| unknown())
            }
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceId::Host => f.write_str("host"),
            DeviceId::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceId;

    #[test]
    fn names_survive_the_round_trip_and_others_are_named_in_the_error() {
        for id in [DeviceId::Host, DeviceId::Cuda(0), DeviceId::Cuda(u32::MAX)] {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        for bad in ["", "cuda:", "cuda:+1", "cuda:-1", "cuda:4294967296", "Host", "cpu", "host:0", "cuda:0:1"]
        {
            let error = bad.parse::<DeviceId>().unwrap_err().to_string();
            assert!(error.ends_with(&format!("{bad:?}")), "{error}");
            assert!(error.contains("\"cuda:N\""), "{error}");
        }
    }
}
