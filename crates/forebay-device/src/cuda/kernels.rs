//! The kernels behind [`Device::transform`](crate::Device::transform): compiled beforehand to PTX, of which the driver
//! translates each kernel for its GPU when a device first needs it. All at once take it two seconds.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CStr, CString, c_void};

use parking_lot::Mutex;

use super::driver::Driver;
use super::types::{Code, Handle};
use crate::{
    AddLowRank, Convert, DeviceAddr, DeviceError, EightBitSum, Element, Requantize, Result, Rounding, Scale,
    StreamHandle, Transform,
};

/// Made of kernels.cu by `make kernels`.
const PTX: &str = include_str!("kernels.ptx");

/// Threads a block, as in kernels.cu.
const THREADS: u32 = 256;
/// Rows of the tile of one block of `add_low_rank`, as in kernels.cu.
const TILE_ROWS: u64 = 32;
/// Packs of neighbouring elements in a row of such a tile.
const TILE_PACKS: u32 = 32;
/// Blocks of `add_low_rank` at most, where there are not more columns of tiles: each does several tiles then. So many are
/// whole rounds of two or three for each of a large GPU's processors; a few more would be another round.
const MOST_ADDING: u64 = 792;
/// Bytes that a thread of `convert` loads at once, as in kernels.cu.
const LOADED_AT_ONCE: u64 = 16;
/// Blocks of `convert` at most. So many loads keep a link busy, and leave the processors to others.
const MOST_CONVERTING: u64 = 64;

/// What comes before each kernel in [`PTX`].
const ENTRY: &str = "\n.visible .entry ";

/// The kernels, loaded into a context. They go with it.
#[derive(Debug)]
pub(super) struct Kernels {
    /// Those that were needed so far.
    loaded: Mutex<HashMap<Kernel, Handle>>,
}

/// One of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kernel {
    /// To a target, of rows that are whole packs or not.
    AddLowRank { to: Element, whole: bool },
    /// Likewise, with halves or floats between.
    AddTerms { to: Element, through: Element, whole: bool },
    /// From any element to a target.
    Convert { from: Element, to: Element },
    /// Of eight-bit elements, of which it also finds the largest.
    Requantize { of: Element, through: Element },
    /// What they are rounded by.
    RandomBytes,
    /// A row of a table.
    LookUp,
}

impl Kernel {
    /// Its name in kernels.cu.
    fn name(self) -> String {
        let pack = |to, whole| if whole { pack_of(to) } else { 1 };
        match self {
            Kernel::AddLowRank { to, whole } => format!("add_low_rank_{}_x{}", name_of(to), pack(to, whole)),
            Kernel::AddTerms { to, through, whole } => {
                format!("add_terms_{}_x{}_{}", name_of(to), pack(to, whole), name_of(through))
            }
            Kernel::Convert { from, to } => format!("convert_{}_{}", name_of(from), name_of(to)),
            Kernel::Requantize { of, through } => format!("requantize_{}_{}", name_of(of), name_of(through)),
            Kernel::RandomBytes => "random_bytes".to_owned(),
            Kernel::LookUp => "look_up".to_owned(),
        }
    }

    /// A module of this kernel alone; `None` where there is none.
    fn ptx(self) -> Option<String> {
        let (head, _) = PTX.split_once(ENTRY)?;
        let begins = format!("{}(", self.name());
        let kernel = PTX.split(ENTRY).skip(1).find(|kernel| kernel.starts_with(&begins))?;
        Some([head, ENTRY, kernel].concat())
    }
}

impl Kernels {
    /// Loads one into the current context, to find out whether the driver can: the others when they are needed.
    pub(super) fn load(driver: &Driver) -> Result<Kernels> {
        let kernels = Kernels { loaded: Mutex::default() };
        kernels.get(driver, Kernel::Convert { from: Element::F16, to: Element::Bf16 })?;
        Ok(kernels)
    }

    fn get(&self, driver: &Driver, kernel: Kernel) -> Result<Handle> {
        match self.loaded.lock().entry(kernel) {
            Entry::Occupied(known) => Ok(*known.get()),
            Entry::Vacant(place) => Ok(*place.insert(load(driver, kernel)?)),
        }
    }

    /// Enqueues what is no copy. The context is current.
    ///
    /// # Safety
    /// As [`Device::transform`](crate::Device::transform).
    pub(super) unsafe fn enqueue(
        &self,
        driver: &Driver,
        transform: &Transform,
        stream: StreamHandle,
    ) -> Result<()> {
        match transform {
            // SAFETY: the caller's promise.
            Transform::AddLowRank(add) => unsafe { self.add_low_rank(driver, add, stream) },
            // SAFETY: the caller's promise.
            Transform::Convert(convert) => unsafe { self.convert(driver, convert, stream) },
            // SAFETY: the caller's promise.
            Transform::Requantize(work) => unsafe { self.requantize(driver, work, stream) },
            // SAFETY: the caller's promise.
            Transform::Largest { sum, at } => unsafe { self.sum(driver, sum, [0; 2], at.get(), stream) },
            Transform::LookUp { number, table, to } => {
                let (mut number, mut table, mut to) = (number.get(), table.get(), to.get());
                let mut parameters = [pointer(&mut number), pointer(&mut table), pointer(&mut to)];
                let kernel = self.get(driver, Kernel::LookUp)?;
                // SAFETY: the parameters are the kernel's, and the memory is the caller's promise.
                unsafe { launch(driver, kernel, (1, 1), &mut parameters, stream) }
            }
            Transform::Copy { .. } => Err(DeviceError::invalid("cuLaunchKernel", "a copy".to_owned())),
        }
    }

    unsafe fn add_low_rank(&self, driver: &Driver, add: &AddLowRank, stream: StreamHandle) -> Result<()> {
        let factors = add.factors;
        let pack = pack_of(add.element);
        let bytes = u64::from(pack) * add.element.size().get();
        // Every pack lies in one row and is loaded at once.
        let whole = factors.columns.is_multiple_of(pack)
            && add.first.is_multiple_of(pack.into())
            && add.count.is_multiple_of(pack.into())
            && add.at.get().is_multiple_of(bytes);
        let pack = if whole { pack } else { 1 };
        let grid = tiles(rows_of(add.first, add.count, factors.columns), factors.columns, pack);
        let (mut at, mut first, mut count) = (add.at.get(), add.first, add.count);
        let (mut up, mut down, mut scale) = (factors.up.get(), factors.down.get(), factors.scale.get());
        let (mut columns, mut rank, mut row_base) = (factors.columns, factors.rank, factors.row_base);
        let mut kind = target(factors.element) as u32;
        let to = add.element;
        let (kernel, mut terms, [mut ends, mut by]) = match factors.rounding {
            Rounding::Once => (Kernel::AddLowRank { to, whole }, 0, [0, 0]),
            Rounding::Each { through, terms, ends, by } => {
                let kernel = Kernel::AddTerms { to, through, whole };
                (kernel, terms, [ends.get(), by.map_or(0, DeviceAddr::get)])
            }
        };
        // `add_low_rank` takes all but the last three.
        let mut parameters = [
            pointer(&mut at),
            pointer(&mut first),
            pointer(&mut count),
            pointer(&mut columns),
            pointer(&mut up),
            pointer(&mut down),
            pointer(&mut scale),
            pointer(&mut rank),
            pointer(&mut row_base),
            pointer(&mut kind),
            pointer(&mut ends),
            pointer(&mut terms),
            pointer(&mut by),
        ];
        let kernel = self.get(driver, kernel)?;
        // SAFETY: the parameters are the kernel's, and the memory is the caller's promise.
        unsafe { launch(driver, kernel, grid, &mut parameters, stream) }
    }

    unsafe fn convert(&self, driver: &Driver, convert: &Convert, stream: StreamHandle) -> Result<()> {
        let (mut scale, mut first, mut columns, mut scaled) = match convert.scale {
            Scale::None => (0, 0, 1, 0),
            Scale::One(at) => (at.get(), 0, 1, 1),
            Scale::Rows { at, first, columns } => (at.get(), first, columns, 2_u32),
        };
        let (mut to, mut from, mut count) = (convert.to.get(), convert.from.get(), convert.count);
        let at_once = LOADED_AT_ONCE / convert.from_element.size().get();
        let in_a_row = scaled != 2 || (first | columns).is_multiple_of(at_once);
        let mut packed = u32::from((to | from).is_multiple_of(LOADED_AT_ONCE) && in_a_row);
        let mut parameters = [
            pointer(&mut to),
            pointer(&mut from),
            pointer(&mut first),
            pointer(&mut count),
            pointer(&mut columns),
            pointer(&mut scale),
            pointer(&mut scaled),
            pointer(&mut packed),
        ];
        let kernel = Kernel::Convert { from: convert.from_element, to: convert.to_element };
        let kernel = self.get(driver, kernel)?;
        let loads = (convert.count * convert.from_element.size().get()).div_ceil(LOADED_AT_ONCE);
        let grid = (loads.div_ceil(THREADS.into()).min(MOST_CONVERTING), 1);
        // SAFETY: the parameters are the kernel's, and the memory is the caller's promise.
        unsafe { launch(driver, kernel, grid, &mut parameters, stream) }
    }

    unsafe fn requantize(&self, driver: &Driver, work: &Requantize, stream: StreamHandle) -> Result<()> {
        let (mut random, mut first, mut count) = (work.random.get(), work.sum.first, work.sum.count);
        let (mut keys, mut threads) = (keys_of(work.seed), work.threads);
        let mut parameters = [
            pointer(&mut random),
            pointer(&mut first),
            pointer(&mut count),
            pointer(&mut keys),
            pointer(&mut threads),
        ];
        let rounds = (first + count).div_ceil(4 * threads) - first / (4 * threads);
        let too_many = || DeviceError::invalid("cuLaunchKernel", format!("{rounds} rounds"));
        let across = (threads / EightBitSum::AT_ONCE).div_ceil(THREADS.into());
        let grid = (across, u32::try_from(rounds).map_err(|_| too_many())?);
        let kernel = self.get(driver, Kernel::RandomBytes)?;
        // SAFETY: the parameters are the kernel's, and the memory is the caller's promise.
        unsafe { launch(driver, kernel, grid, &mut parameters, stream) }?;
        let places = [work.to.get(), work.random.get()];
        // SAFETY: the caller's promise.
        unsafe { self.sum(driver, &work.sum, places, 0, stream) }
    }

    /// Has a sum rounded by the random bytes that are there, or its largest element found.
    ///
    /// # Safety
    /// As [`Device::transform`](crate::Device::transform).
    unsafe fn sum(
        &self,
        driver: &Driver,
        sum: &EightBitSum,
        [mut to, mut random]: [u64; 2],
        mut largest: u64,
        stream: StreamHandle,
    ) -> Result<()> {
        let factors = sum.factors;
        let Rounding::Each { through, mut terms, ends, by } = factors.rounding else {
            return Err(DeviceError::invalid("cuLaunchKernel", format!("no terms: {sum:?}")));
        };
        let or_none = |at: Option<DeviceAddr>| at.map_or(0, DeviceAddr::get);
        let (mut from, mut first, mut count) = (sum.from.get(), sum.first, sum.count);
        let mut times = or_none(sum.scale);
        let (mut up, mut down, mut scale) = (factors.up.get(), factors.down.get(), factors.scale.get());
        let (mut columns, mut rank) = (factors.columns, factors.rank);
        let mut kind = target(factors.element) as u32;
        let (mut ends, mut by) = (ends.get(), or_none(by));
        let mut parameters = [
            pointer(&mut to),
            pointer(&mut from),
            pointer(&mut random),
            pointer(&mut first),
            pointer(&mut count),
            pointer(&mut times),
            pointer(&mut largest),
            pointer(&mut columns),
            pointer(&mut up),
            pointer(&mut down),
            pointer(&mut scale),
            pointer(&mut rank),
            pointer(&mut kind),
            pointer(&mut ends),
            pointer(&mut terms),
            pointer(&mut by),
        ];
        let pack = EightBitSum::AT_ONCE as u32;
        let grid = tiles(rows_of(first, count, columns), columns, pack);
        let kernel = self.get(driver, Kernel::Requantize { of: sum.element, through })?;
        // SAFETY: the parameters are the kernel's, and the memory is the caller's promise.
        unsafe { launch(driver, kernel, grid, &mut parameters, stream) }
    }
}

/// What Philox mixes into its words, two a round: the halves of a key that grow by the numbers of its authors.
fn keys_of(seed: u64) -> [u32; 20] {
    std::array::from_fn(|n| {
        let (word, step) = if n % 2 == 0 { (seed, 0x9e37_79b9) } else { (seed >> 32, 0xbb67_ae85_u32) };
        (word as u32).wrapping_add(step.wrapping_mul(n as u32 / 2))
    })
}

/// Rows that have some of these elements.
fn rows_of(first: u64, count: u64, columns: u32) -> u64 {
    (first + count).div_ceil(columns.into()) - first / u64::from(columns)
}

/// Blocks down and across, for rows of such packs.
fn tiles(rows: u64, columns: u32, pack: u32) -> (u64, u32) {
    let across = columns.div_ceil(TILE_PACKS * pack);
    (rows.div_ceil(TILE_ROWS).min((MOST_ADDING / u64::from(across)).max(1)), across)
}

/// Has the driver translate a kernel for the current context's GPU.
fn load(driver: &Driver, kernel: Kernel) -> Result<Handle> {
    let name = kernel.name();
    let text = kernel.ptx().ok_or_else(|| broken(&format!("no {name}")))?;
    let text = CString::new(text).map_err(|_| broken("a zero byte"))?;
    let mut module = 0;
    // SAFETY: the result has a place to go, and the text ends in a zero byte.
    let code = unsafe { (driver.table.module_load_data)(&mut module, text.as_ptr().cast()) };
    driver.check("cuModuleLoadData", code, || name.clone())?;
    let c_name = CString::new(name.as_str()).map_err(|_| broken(&name))?;
    let mut function = 0;
    let c_name: &CStr = &c_name;
    // SAFETY: the result has a place to go, and the name ends in a zero byte.
    let code = unsafe { (driver.table.module_get_function)(&mut function, module, c_name.as_ptr()) };
    driver.check("cuModuleGetFunction", code, || name)?;
    Ok(function)
}

fn broken(what: &str) -> DeviceError {
    DeviceError::invalid("cuModuleLoadData", format!("kernels.ptx has {what}"))
}

fn pointer<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

/// # Safety
/// The parameters are those of the kernel, and its memory stays valid until it has completed.
unsafe fn launch(
    driver: &Driver,
    kernel: Handle,
    grid: (u64, u32),
    parameters: &mut [*mut c_void],
    stream: StreamHandle,
) -> Result<()> {
    let too_many = || DeviceError::invalid("cuLaunchKernel", format!("{} blocks", grid.0));
    let blocks = u32::try_from(grid.0).map_err(|_| too_many())?;
    // SAFETY: the caller's promise.
    let code: Code = unsafe {
        (driver.table.launch_kernel)(
            kernel,
            blocks,
            grid.1,
            1,
            THREADS,
            1,
            1,
            0,
            stream.get(),
            parameters.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    };
    driver.check("cuLaunchKernel", code, || format!("{blocks} x {} blocks of {THREADS} threads", grid.1))
}

/// How kernels.cu names an element.
fn name_of(element: Element) -> &'static str {
    match element {
        Element::F32 => "f32",
        Element::F16 => "f16",
        Element::Bf16 => "bf16",
        Element::F8E4m3 => "f8e4m3",
        Element::F8E5m2 => "f8e5m2",
    }
}

/// The number of a target, which is its number in [`Element::ALL`] too.
fn target(element: Element) -> usize {
    element as usize
}

/// Elements that a thread loads at once.
fn pack_of(element: Element) -> u32 {
    if element == Element::F32 { 4 } else { 8 }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// FNV-1a, as kernels.py computes it.
    fn hash(text: &str) -> u64 {
        text.bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }

    #[test]
    fn the_ptx_is_made_of_the_source() {
        let head = PTX.lines().next().unwrap();
        let source = hash(include_str!("kernels.cu"));
        assert!(
            head.contains(&format!("{source:016x}")),
            "kernels.cu has changed: run `make kernels` ({head})"
        );
        // The oldest driver that is supported takes this version.
        assert!(PTX.contains("\n.version 8.0\n.target sm_75\n"));
    }

    /// What is rounded to on the way.
    const THROUGH: [Element; 2] = [Element::F16, Element::F32];

    /// Every kernel there is.
    fn all() -> Vec<Kernel> {
        let of_target = |to| {
            let adding = [true, false].into_iter().flat_map(move |whole| {
                let terms = THROUGH.map(|through| Kernel::AddTerms { to, through, whole });
                terms.into_iter().chain([Kernel::AddLowRank { to, whole }])
            });
            adding.chain(Element::ALL.into_iter().map(move |from| Kernel::Convert { from, to }))
        };
        let (targets, eights): (Vec<_>, Vec<_>) =
            Element::ALL.into_iter().partition(|element| element.is_target());
        let requantizing =
            eights.into_iter().flat_map(|of| THROUGH.map(|through| Kernel::Requantize { of, through }));
        let all = targets.into_iter().flat_map(of_target).chain(requantizing);
        all.chain([Kernel::RandomBytes, Kernel::LookUp]).collect()
    }

    #[test]
    fn every_kernel_is_a_module_of_its_own() {
        for kernel in all() {
            let ptx = kernel.ptx().unwrap();
            assert!(ptx.contains(&format!(".entry {}(", kernel.name())), "{kernel:?}");
            assert!(ptx.contains("\n.target sm_75\n"), "{kernel:?}");
            assert_eq!(ptx.matches(".entry").count(), 1, "{kernel:?}");
            assert_eq!(ptx.matches('{').count(), ptx.matches('}').count(), "{kernel:?}");
            assert!(ptx.len() * 5 < PTX.len(), "{kernel:?}: {}", ptx.len());
        }
    }

    #[test]
    fn every_kernel_of_the_ptx_is_known_by_a_name_of_its_own() {
        let names: HashSet<String> = all().into_iter().map(Kernel::name).collect();
        assert_eq!(names.len(), all().len());
        assert_eq!(PTX.matches(ENTRY).count(), names.len());
    }
}
