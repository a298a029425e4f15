//! One loaded object, kept loaded and read with every bound checked.

use std::ffi::{CStr, CString, c_int, c_void};
use std::mem::{MaybeUninit, size_of};
use std::ops::Range;
use std::ptr::NonNull;

use libc::{Elf64_Phdr, PF_R, PF_W, PT_DYNAMIC, PT_GNU_RELRO, PT_LOAD};

use crate::{ImportError, Result};

/// A loaded object.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) path: String,
    handle: Handle,
    base: usize,
    segments: Vec<Segment>,
    dynamic: Range<usize>,
    /// What the linker makes read-only when it is done.
    relro: Range<usize>,
}

#[derive(Clone, Debug)]
struct Segment {
    range: Range<usize>,
    readable: bool,
    writable: bool,
}

/// What the linker knows of a loaded object, with addresses as they are.
#[derive(Clone, Debug, Default)]
struct Found {
    path: CString,
    base: usize,
    segments: Vec<Segment>,
    dynamic: Range<usize>,
    relro: Range<usize>,
}

/// Keeps an object loaded.
#[derive(Debug)]
struct Handle(NonNull<c_void>);

// SAFETY: the linker's calls take a handle on any thread.
unsafe impl Send for Handle {}
// SAFETY: as above; the handle is only read.
unsafe impl Sync for Handle {}

impl Image {
    /// The loaded object with this path, or this last part of its path.
    pub(crate) fn loaded(name: &str) -> Result<Self> {
        let not_loaded = || ImportError::NotLoaded { object: name.to_owned() };
        let seen = find(|path| is_named(path, name)).ok_or_else(not_loaded)?;
        let handle = Handle::of_loaded(&seen.path).ok_or_else(not_loaded)?;
        // Only now it cannot go, so what was seen before is looked up once more.
        let found = find(|path| path == &*seen.path).ok_or_else(not_loaded)?;
        let path = found.path.to_string_lossy().into_owned();
        let Found { base, segments, dynamic, relro, .. } = found;
        Ok(Image { path, handle, base, segments, dynamic, relro })
    }

    /// The address of something at `address` in the object's own numbering, or of something the linker numbered already.
    pub(crate) fn address(&self, address: u64) -> usize {
        let address = address as usize;
        let is_final = self.segments.iter().any(|segment| segment.range.contains(&address));
        if is_final { address } else { self.base.wrapping_add(address) }
    }

    /// The address of a place that relocations name, which the linker leaves in the object's own numbering.
    pub(crate) fn relocated(&self, offset: u64) -> usize {
        self.base.wrapping_add(offset as usize)
    }

    /// The dynamic section.
    pub(crate) fn dynamic(&self) -> Range<usize> {
        self.dynamic.clone()
    }

    /// Whether an address lies in the object.
    pub(crate) fn contains(&self, address: usize) -> bool {
        self.segments.iter().any(|segment| segment.range.contains(&address))
    }

    /// Whether the linker made the place read-only after it was done.
    pub(crate) fn is_relro(&self, address: usize) -> bool {
        let page = page_size();
        let (start, end) = (self.relro.start & !(page - 1), self.relro.end & !(page - 1));
        (start..end).contains(&address)
    }

    /// Whether the place lies in a segment that can be written to, RELRO apart.
    pub(crate) fn is_writable(&self, address: usize) -> bool {
        self.segment(address, size_of::<usize>()).is_some_and(|segment| segment.writable)
    }

    /// A plain value of the object; `None` outside of what is mapped readable.
    pub(crate) fn read<T: Plain>(&self, address: usize) -> Option<T> {
        self.segment(address, size_of::<T>()).filter(|segment| segment.readable)?;
        // SAFETY: the bytes lie in a readable segment of an object that stays loaded, and any bytes are a `T`.
        Some(unsafe { (address as *const T).read_unaligned() })
    }

    /// Whether the object has these bytes at `address`.
    pub(crate) fn has(&self, address: usize, bytes: &[u8]) -> bool {
        (address..).zip(bytes).all(|(address, byte)| self.read::<u8>(address) == Some(*byte))
    }

    /// A function by its name: as calls of the object find it.
    pub(crate) fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the name ends in a zero byte.
        let global = NonNull::new(unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) });
        // SAFETY: the handle is open, and the name ends in a zero byte.
        global.or_else(|| NonNull::new(unsafe { libc::dlsym(self.handle.0.as_ptr(), name.as_ptr()) }))
    }

    /// Another function of the library that has the function at `address`. Its addresses stay valid as long as that library
    /// is loaded, as it is at least while this object is: the object is bound to it.
    pub(crate) fn sibling(address: usize, name: &CStr) -> Option<NonNull<c_void>> {
        let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
        // SAFETY: any address may be asked for, and the answer has a place to go.
        if unsafe { libc::dladdr(address as *const c_void, info.as_mut_ptr()) } == 0 {
            return None;
        }
        // SAFETY: all zeros, or filled in by the call above.
        let path = NonNull::new(unsafe { info.assume_init() }.dli_fname.cast_mut())?;
        // SAFETY: the linker's names are strings.
        let handle = Handle::of_loaded(unsafe { CStr::from_ptr(path.as_ptr()) })?;
        // SAFETY: the handle is open, and the name ends in a zero byte.
        NonNull::new(unsafe { libc::dlsym(handle.0.as_ptr(), name.as_ptr()) })
    }

    fn segment(&self, address: usize, len: usize) -> Option<&Segment> {
        let end = address.checked_add(len)?;
        self.segments.iter().find(|segment| segment.range.start <= address && end <= segment.range.end)
    }
}

/// Values of which any bytes are one.
pub(crate) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for usize {}

impl Handle {
    fn of_loaded(path: &CStr) -> Option<Self> {
        // SAFETY: the path ends in a zero byte; RTLD_NOLOAD runs no code of the object.
        NonNull::new(unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) }).map(Handle)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once.
        unsafe { libc::dlclose(self.0.as_ptr()) };
    }
}

pub(crate) fn page_size() -> usize {
    // SAFETY: asks for a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

fn is_named(path: &CStr, name: &str) -> bool {
    let path = path.to_bytes();
    path == name.as_bytes() || path.rsplit(|byte| *byte == b'/').next() == Some(name.as_bytes())
}

/// The first loaded object whose path is accepted.
fn find(accepts: impl Fn(&CStr) -> bool) -> Option<Found> {
    struct Search<F> {
        accepts: F,
        found: Option<Found>,
    }

    unsafe extern "C" fn visit<F: Fn(&CStr) -> bool>(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        search: *mut c_void,
    ) -> c_int {
        // SAFETY: the linker hands a description that is valid for this call.
        let info = unsafe { &*info };
        // SAFETY: `search` is the one below, and nobody else uses it meanwhile.
        let search = unsafe { &mut *search.cast::<Search<F>>() };
        if info.dlpi_name.is_null() || info.dlpi_phdr.is_null() {
            return 0;
        }
        // SAFETY: the linker's names are strings.
        let path = unsafe { CStr::from_ptr(info.dlpi_name) };
        if !(search.accepts)(path) {
            return 0;
        }
        // SAFETY: the linker keeps that many headers there.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
        search.found = Some(Found::new(path, info.dlpi_addr as usize, headers));
        1
    }

    fn run<F: Fn(&CStr) -> bool>(mut search: Search<F>) -> Option<Found> {
        // SAFETY: `visit` takes a pointer to what `search` is, which outlives the call.
        unsafe { libc::dl_iterate_phdr(Some(visit::<F>), (&raw mut search).cast()) };
        search.found
    }

    run(Search { accepts, found: None })
}

impl Found {
    fn new(path: &CStr, base: usize, headers: &[Elf64_Phdr]) -> Self {
        let mut found = Found { path: path.to_owned(), base, ..Found::default() };
        for header in headers {
            let start = base.wrapping_add(header.p_vaddr as usize);
            let range = start..start.saturating_add(header.p_memsz as usize);
            match header.p_type {
                PT_LOAD => found.segments.push(Segment {
                    range,
                    readable: header.p_flags & PF_R != 0,
                    writable: header.p_flags & PF_W != 0,
                }),
                PT_DYNAMIC => found.dynamic = range,
                PT_GNU_RELRO => found.relro = range,
                _ => {}
            }
        }
        found
    }
}
