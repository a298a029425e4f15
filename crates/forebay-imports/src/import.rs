//! An imported function, and its redirection.

use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::image::{Image, page_size};
use crate::tables::Tables;
use crate::{ImportError, Result};

/// A function that a loaded object imports.
#[derive(Debug)]
pub struct Import {
    image: Image,
    function: String,
    slots: Vec<usize>,
    original: usize,
}

/// An imported function that goes elsewhere until it is undone. Dropping it leaves it as it is.
#[derive(Debug)]
#[must_use = "a redirection that is dropped cannot be undone"]
pub struct Redirection {
    import: Import,
    /// What each slot held before.
    before: Vec<usize>,
    replacement: usize,
}

impl Import {
    /// Finds the slots of `function` in the loaded object of this path or file name.
    ///
    /// # Errors
    /// Where the object is not loaded, does not import the function, or has tables that cannot be.
    pub fn find(object: &str, function: &str) -> Result<Self> {
        let image = Image::loaded(object)?;
        let slots = Tables::of(&image)?.slots(&image, function)?;
        if slots.is_empty() {
            let (object, function) = (image.path.clone(), function.to_owned());
            return Err(ImportError::NotImported { object, function });
        }
        let mut import = Import { image, function: function.to_owned(), slots, original: 0 };
        import.original = import.target().ok_or_else(|| ImportError::Unresolved {
            object: import.image.path.clone(),
            function: function.to_owned(),
        })?;
        Ok(import)
    }

    /// The function that calls go to without a redirection.
    pub fn original(&self) -> *mut c_void {
        self.original as *mut c_void
    }

    /// Another function of the library that the function comes from.
    pub fn symbol(&self, name: &str) -> Option<*mut c_void> {
        let name = CString::new(name).ok()?;
        Image::sibling(self.original, &name).map(std::ptr::NonNull::as_ptr)
    }

    /// Lets the object's calls go to `replacement`.
    ///
    /// # Errors
    /// [`ImportError::Protected`] where a slot cannot be written to; nothing is redirected then.
    ///
    /// # Safety
    /// `replacement` is a function of the same signature and calling convention, which stays loaded until the process
    /// ends: a call may be on its way to it when the redirection is undone.
    pub unsafe fn redirect(self, replacement: *mut c_void) -> Result<Redirection> {
        let replacement = replacement as usize;
        let before: Vec<usize> = self.slots.iter().map(|&slot| self.load(slot)).collect();
        for (done, &slot) in self.slots.iter().enumerate() {
            if let Err(error) = self.store(slot, replacement) {
                for (&slot, &value) in self.slots[..done].iter().zip(&before) {
                    self.store(slot, value)?;
                }
                return Err(error);
            }
        }
        Ok(Redirection { import: self, before, replacement })
    }

    /// What a slot leads to. One that is not bound yet leads into the object itself, and binding it would write over a
    /// redirection: then the function is looked up as the linker would.
    fn target(&self) -> Option<usize> {
        let bound = self.slots.iter().map(|&slot| self.load(slot));
        let mut bound = bound.filter(|&value| value != 0 && !self.image.contains(value));
        let name = CString::new(self.function.as_str()).ok()?;
        bound.next_back().or_else(|| self.image.symbol(&name).map(|address| address.as_ptr() as usize))
    }

    fn load(&self, slot: usize) -> usize {
        self.slot(slot).load(Ordering::Acquire)
    }

    fn store(&self, slot: usize, value: usize) -> Result<()> {
        let protected = |code| ImportError::Protected {
            object: self.image.path.clone(),
            function: self.function.clone(),
            code,
        };
        if !self.image.is_writable(slot) {
            return Err(protected(0));
        }
        let is_relro = self.image.is_relro(slot);
        if is_relro {
            protect(slot, libc::PROT_READ | libc::PROT_WRITE).map_err(protected)?;
        }
        self.slot(slot).store(value, Ordering::Release);
        if is_relro {
            // It was read-only for safety, which a failure here takes away and nothing else.
            protect(slot, libc::PROT_READ).ok();
        }
        Ok(())
    }

    fn slot(&self, slot: usize) -> &AtomicUsize {
        // SAFETY: an aligned word in the object, which stays loaded; the processor's calls read it as one word.
        unsafe { AtomicUsize::from_ptr(slot as *mut usize) }
    }
}

impl Redirection {
    /// Lets calls go where they went before. `false` where somebody else redirected them meanwhile: they stay as they are,
    /// and the replacement goes on to be called.
    ///
    /// # Errors
    /// [`ImportError::Protected`] where a slot cannot be written to.
    pub fn undo(self) -> Result<bool> {
        let import = &self.import;
        let mut all = true;
        for (&slot, &before) in import.slots.iter().zip(&self.before) {
            if import.load(slot) == self.replacement {
                import.store(slot, before)?;
            } else {
                all = false;
            }
        }
        Ok(all)
    }
}

/// Sets the protection of the page around an address.
fn protect(address: usize, protection: i32) -> std::result::Result<(), i32> {
    let page = page_size();
    let start = (address & !(page - 1)) as *mut c_void;
    // SAFETY: the page is the object's, and holds data that the linker is done with.
    if unsafe { libc::mprotect(start, page, protection) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}
