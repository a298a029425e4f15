//! The device's primary context: the one PyTorch uses too, current for the length of a call.

use std::marker::PhantomData;

use super::driver::Driver;
use super::types::{Code, Handle, Ordinal, SUCCESS};
use crate::Result;

/// A reference to a device's primary context, given back when dropped.
#[derive(Debug)]
pub(super) struct PrimaryContext {
    driver: &'static Driver,
    device: Ordinal,
    handle: Handle,
}

impl PrimaryContext {
    /// Takes a reference, making the context if it is the first one. The driver's code where that fails.
    pub(super) fn retain(driver: &'static Driver, device: Ordinal) -> std::result::Result<Self, Code> {
        let mut handle = 0;
        // SAFETY: the result has a place to go; the driver checks the device.
        match unsafe { (driver.table.primary_ctx_retain)(&mut handle, device) } {
            SUCCESS => Ok(PrimaryContext { driver, device, handle }),
            code => Err(code),
        }
    }

    /// Makes the context the calling thread's until the guard goes, which puts back what the thread had.
    pub(super) fn enter(&self) -> Result<Current<'_>> {
        let mut current = 0;
        // SAFETY: the result has a place to go.
        let code = unsafe { (self.driver.table.ctx_get_current)(&mut current) };
        self.driver.check("cuCtxGetCurrent", code, || "this thread's context".to_owned())?;
        let pushed = current != self.handle;
        if pushed {
            // SAFETY: the context is retained as long as `self` lives.
            let code = unsafe { (self.driver.table.ctx_push_current)(self.handle) };
            self.driver.check("cuCtxPushCurrent", code, || format!("the context of cuda:{}", self.device))?;
        }
        Ok(Current { driver: self.driver, pushed, _context: PhantomData })
    }
}

impl Drop for PrimaryContext {
    fn drop(&mut self) {
        // SAFETY: gives back the one reference that `retain` took.
        let code = unsafe { (self.driver.table.primary_ctx_release)(self.device) };
        let released = self
            .driver
            .check("cuDevicePrimaryCtxRelease", code, || format!("the context of cuda:{}", self.device));
        match released {
            Ok(()) => {}
            Err(error) if error.is_lost() => tracing::debug!(%error, "a context went with its driver"),
            Err(error) => tracing::warn!(%error, "a context could not be given back"),
        }
    }
}

/// The context is current on this thread. Bound to the thread by its pointer marker.
#[must_use]
pub(super) struct Current<'a> {
    driver: &'static Driver,
    pushed: bool,
    _context: PhantomData<(&'a PrimaryContext, *const ())>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = 0;
            // SAFETY: the result has a place to go; what is popped is what `enter` pushed on this thread.
            let code = unsafe { (self.driver.table.ctx_pop_current)(&mut popped) };
            if let Err(error) =
                self.driver.check("cuCtxPopCurrent", code, || "this thread's context".to_owned())
            {
                tracing::warn!(%error, "this thread's context could not be put back");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn current(driver: &Driver) -> Handle {
        let mut current = 0;
        // SAFETY: the result has a place to go.
        let code = unsafe { (driver.table.ctx_get_current)(&mut current) };
        driver.check("cuCtxGetCurrent", code, String::new).unwrap();
        current
    }

    #[test]
    fn the_callers_context_comes_back() {
        let driver = match Driver::get("cuda:0") {
            Ok(driver) => driver,
            Err(error) => return println!("skipped: {error}"),
        };
        let context = PrimaryContext::retain(driver, 0).unwrap();
        // A test's thread is new, so it has no context.
        assert_eq!(current(driver), 0);
        let outer = context.enter().unwrap();
        drop(context.enter().unwrap());
        assert_eq!(current(driver), context.handle, "an inner call took the outer one's context away");
        drop(outer);
        assert_eq!(current(driver), 0);
    }
}
