//! What works on this machine, found out by doing it.
//!
//! Nothing here changes the machine. A check of a GPU makes the driver's context in this process, which holds some
//! hundred MiB of GPU memory until the process ends.
//!
//! ```
//! use forebay::doctor::{self, Status};
//!
//! let checks = doctor::examine();
//! println!("{}", doctor::table(&checks));
//! let host = checks.iter().find(|check| check.name == "host").expect("the host is always examined");
//! assert_eq!(host.status, Status::Works);
//! ```

mod devices;
mod system;
mod trial;

use std::fmt;

/// Whether something works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// As it should.
    Works,
    /// With less speed, or not in every case.
    Limited,
    /// Not at all.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What: a device's name, or a part of the system.
    pub name: String,
    /// Whether it works.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it, where something can be done.
    pub remedy: Option<String>,
}

/// Looks at everything that Forebay needs, or makes use of where it is there: devices first.
pub fn examine() -> Vec<Check> {
    let mut checks = vec![devices::host()];
    checks.extend(devices::cuda());
    checks.extend([system::memory(), system::locked_memory(), system::memory_map()]);
    checks
}

/// Checks as a table for people.
pub fn table(checks: &[Check]) -> impl fmt::Display {
    Table(checks)
}

impl Check {
    fn works(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Check { name: name.into(), status: Status::Works, detail: detail.into(), remedy: None }
    }

    fn limited(name: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Check { name: name.into(), status: Status::Limited, detail: detail.into(), remedy }
    }

    fn missing(name: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Check { name: name.into(), status: Status::Missing, detail: detail.into(), remedy }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Status::Works => "works",
            Status::Limited => "limited",
            Status::Missing => "missing",
        })
    }
}

struct Table<'a>(&'a [Check]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
        for Check { name, status, detail, remedy } in self.0 {
            writeln!(f, "{name:<width$}  {status:<7}  {detail}")?;
            if let Some(remedy) = remedy {
                writeln!(f, "{:<width$}           -> {remedy}", "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_puts_remedies_below_what_they_cure() {
        let checks = [
            Check::works("host", "a page of 2 MiB was read back"),
            Check::missing("CUDA driver", "the driver could not be loaded", "install it"),
            Check::limited("memory", "100 MiB available", "close other programs"),
        ];
        let expected = "\
host         works    a page of 2 MiB was read back
CUDA driver  missing  the driver could not be loaded
                      -> install it
memory       limited  100 MiB available
                      -> close other programs
";
        assert_eq!(table(&checks).to_string(), expected);
    }

    #[test]
    fn the_host_works_and_whatever_does_not_has_a_remedy() {
        let checks = examine();
        assert_eq!(checks[0].name, "host");
        assert_eq!(checks[0].status, Status::Works, "{}", checks[0].detail);
        for check in checks {
            assert_eq!(check.status == Status::Works, check.remedy.is_none(), "{check:?}");
            assert!(!check.detail.is_empty(), "{check:?}");
        }
    }
}
