//! Where imports cannot be redirected.

use std::ffi::c_void;

use crate::{ImportError, Result};

/// Never found on this system.
#[derive(Debug)]
pub enum Import {}

/// Never made on this system.
#[derive(Debug)]
pub enum Redirection {}

impl Import {
    /// Says that this system is not supported.
    ///
    /// # Errors
    /// Always [`ImportError::Unsupported`].
    pub fn find(_object: &str, _function: &str) -> Result<Self> {
        Err(ImportError::Unsupported)
    }

    /// Never called.
    pub fn original(&self) -> *mut c_void {
        match *self {}
    }

    /// Never called.
    pub fn symbol(&self, _name: &str) -> Option<*mut c_void> {
        match *self {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    ///
    /// # Safety
    /// None is needed.
    pub unsafe fn redirect(self, _replacement: *mut c_void) -> Result<Redirection> {
        match self {}
    }
}

impl Redirection {
    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn undo(self) -> Result<bool> {
        match self {}
    }
}
