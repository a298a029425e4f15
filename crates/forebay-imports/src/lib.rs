//! Functions that a loaded shared object imports, redirected to others.
//!
//! An object calls an imported function through a slot: a word of data that the dynamic linker fills in. The object's own
//! tables say which slot belongs to which function. To redirect a function is to write another address into its slots.
//! No code is changed, and only calls from this one object take the other way.
//!
//! Invariants:
//! * Nothing is read outside of the object's mapped segments, whatever its tables say.
//! * A slot that somebody else wrote to meanwhile is not written back.
//! * An object that was looked at stays loaded.
//!
//! Linux on x86-64; elsewhere [`Import::find`] says so.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod image;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod import;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod tables;
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod unsupported;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use import::{Import, Redirection};
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub use unsupported::{Import, Redirection};

/// The result of looking for an import or changing it.
pub type Result<T> = std::result::Result<T, ImportError>;

/// Why an import could not be found or redirected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// No object of this name is loaded.
    #[error("no shared object of this name is loaded: {object}")]
    NotLoaded {
        /// The name that was looked for.
        object: String,
    },

    /// The object does not call the function through a slot of its own.
    #[error("{object} does not import {function}: it was built in another way, or calls it by another name")]
    NotImported {
        /// The object's path.
        object: String,
        /// The function.
        function: String,
    },

    /// The slot is not bound yet, and nothing that is loaded has the function.
    #[error("nothing that is loaded has the function that {object} imports: {function}")]
    Unresolved {
        /// The object's path.
        object: String,
        /// The function.
        function: String,
    },

    /// The object's tables contradict themselves.
    #[error("the tables of {object} are not as the format has it: {what}")]
    Malformed {
        /// The object's path.
        object: String,
        /// What is wrong.
        what: &'static str,
    },

    /// The slot's memory could not be made writable.
    #[error("the slot of {function} in {object} cannot be written to (error {code})")]
    Protected {
        /// The object's path.
        object: String,
        /// The function.
        function: String,
        /// The system's error number; 0 where the segment is read-only by itself.
        code: i32,
    },

    /// Not on this system.
    #[error("imports can be redirected on Linux on x86-64 only")]
    Unsupported,
}
