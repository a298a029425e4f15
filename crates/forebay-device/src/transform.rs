//! What a device does to bytes that are there: adding a product of low rank to a weight, converting elements, copying.
//!
//! Every result is defined bit for bit, so that devices agree: arithmetic is in float32, sums are fused multiply-adds in
//! ascending order, and a result is rounded once, or as [`Rounding`] says, to nearest even. A NaN becomes the one quiet NaN of
//! its type.

use forebay_core::Bytes;

use crate::{DeviceAddr, DeviceError, Result};

/// The type of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Brain float.
    Bf16,
    /// 8 bits, 4 of exponent and 3 of mantissa, finite but for NaN (`float8_e4m3fn`).
    F8E4m3,
    /// 8 bits, 5 of exponent and 2 of mantissa.
    F8E5m2,
}

impl Element {
    /// Every type of element.
    pub const ALL: [Element; 5] =
        [Element::F32, Element::F16, Element::Bf16, Element::F8E4m3, Element::F8E5m2];

    /// Bytes of one element.
    pub const fn size(self) -> Bytes {
        Bytes::new(match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
            Element::F8E4m3 | Element::F8E5m2 => 1,
        })
    }

    /// Whether results can be rounded to the nearest one. Those of eight bits are read, or rounded to by [`Requantize`].
    pub const fn is_target(self) -> bool {
        matches!(self, Element::F32 | Element::F16 | Element::Bf16)
    }

    /// Whether it has eight bits.
    pub const fn is_float8(self) -> bool {
        matches!(self, Element::F8E4m3 | Element::F8E5m2)
    }
}

/// One piece of work for [`Device::transform`](crate::Device::transform).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transform {
    /// See [`AddLowRank`].
    AddLowRank(AddLowRank),
    /// See [`Convert`].
    Convert(Convert),
    /// See [`Requantize`].
    Requantize(Requantize),
    /// Finds the largest magnitude of a sum before it is multiplied with its last number. A NaN is larger than all.
    Largest {
        /// The sum.
        sum: EightBitSum,
        /// A float32 of at least 0, which becomes the largest magnitude where that is larger.
        at: DeviceAddr,
    },
    /// Looks a number up: two float32 become those of row `n` of a table, where `n` are the bits of the half nearest to the number,
    /// without its sign.
    LookUp {
        /// The number, a float32.
        number: DeviceAddr,
        /// [`Transform::LOOKED_UP`] rows of two float32.
        table: DeviceAddr,
        /// Where the two go.
        to: DeviceAddr,
    },
    /// Copies bytes on the device.
    Copy {
        /// Where to.
        to: DeviceAddr,
        /// Where from; the two do not overlap.
        from: DeviceAddr,
        /// How many.
        len: Bytes,
    },
}

impl Transform {
    /// Rows of the table of [`Transform::LookUp`].
    pub const LOOKED_UP: usize = 1 << 15;

    /// Whether a device can do it.
    pub fn is_possible(&self) -> bool {
        self.check().is_ok()
    }

    /// Whether there is anything to do.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] for what no device can do.
    pub(crate) fn check(&self) -> Result<bool> {
        let invalid = || Err(DeviceError::invalid("transform", format!("{self:?}")));
        match self {
            Transform::AddLowRank(AddLowRank { element, factors, first, .. }) => {
                let targets =
                    element.is_target() && factors.element.is_target() && factors.rounding.is_possible();
                let shape = factors.rank > 0 && factors.columns > 0;
                if !targets || !shape || first / u64::from(factors.columns.max(1)) < factors.row_base.into() {
                    return invalid();
                }
            }
            Transform::Convert(Convert { to_element, scale, .. }) => {
                let is_empty_row = matches!(scale, Scale::Rows { columns: 0, .. });
                if !to_element.is_target() || is_empty_row {
                    return invalid();
                }
            }
            Transform::Requantize(Requantize { sum, to, random, threads, .. }) => {
                let in_packs = [to.get(), random.get(), *threads];
                let is_in_packs = in_packs.iter().all(|number| number.is_multiple_of(EightBitSum::AT_ONCE));
                if !sum.is_possible() || !is_in_packs || *threads == 0 || *random == sum.from {
                    return invalid();
                }
            }
            Transform::Largest { sum, at } => {
                if !sum.is_possible() || !at.get().is_multiple_of(4) {
                    return invalid();
                }
            }
            Transform::LookUp { number, table, to } => {
                if [number, table, to].iter().any(|at| !at.get().is_multiple_of(4)) {
                    return invalid();
                }
            }
            Transform::Copy { .. } => {}
        }
        Ok(match self {
            Transform::AddLowRank(add) => add.count > 0,
            Transform::Convert(convert) => convert.count > 0,
            Transform::Requantize(Requantize { sum, .. }) | Transform::Largest { sum, .. } => sum.count > 0,
            Transform::LookUp { .. } => true,
            Transform::Copy { len, .. } => *len > Bytes::ZERO,
        })
    }
}

/// Adds a product of low rank to a run of elements of a row-major weight, in place:
/// `w[i, j] += sum_k (scale[k] * up[i - row_base, k]) * down[k, j]`, or the terms of [`Rounding::Each`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddLowRank {
    /// The address of element `first`.
    pub at: DeviceAddr,
    /// The number of the first element in the weight.
    pub first: u64,
    /// How many elements.
    pub count: u64,
    /// The weight's elements; [`Element::is_target`].
    pub element: Element,
    /// The factors.
    pub factors: Factors,
}

/// The factors of a product of low rank, on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factors {
    /// Rows x rank, row-major.
    pub up: DeviceAddr,
    /// Rank x columns, row-major.
    pub down: DeviceAddr,
    /// One float32 for each rank, or for each term of [`Rounding::Each`].
    pub scale: DeviceAddr,
    /// The elements of `up` and `down`; [`Element::is_target`].
    pub element: Element,
    /// The rank, 1 or more.
    pub rank: u32,
    /// Elements a row of the weight.
    pub columns: u32,
    /// The weight's row that the first row of `up` belongs to.
    pub row_base: u32,
    /// Where results are rounded.
    pub rounding: Rounding,
}

/// Where an addition of low rank is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Once, to the weight's elements.
    Once,
    /// The ranks are those of terms, one behind the other. Each element becomes one of `through`, then each term in turn does
    /// `w = through(w + through(scale[term] * sum_k up[i - row_base, k] * down[k, j]))`, and `w = through(w * by)` where there
    /// is such a number; at last it is rounded to the weight's elements. So a computation in torch that adds one product after
    /// another is had bit for bit.
    Each {
        /// What is rounded to on the way: float16, or float32, which rounds nothing.
        through: Element,
        /// How many terms, 1 or more.
        terms: u32,
        /// One ascending u32 for each term: the rank that it ends before. The last is the rank of the factors.
        ends: DeviceAddr,
        /// A float32 that each element is multiplied with behind the last term.
        by: Option<DeviceAddr>,
    },
}

impl Rounding {
    /// Whether a device can do it.
    pub const fn is_possible(self) -> bool {
        match self {
            Rounding::Once => true,
            Rounding::Each { through, terms, .. } => {
                matches!(through, Element::F16 | Element::F32) && terms > 0
            }
        }
    }
}

/// What a run of elements of a row-major weight of eight bits stands for, with the terms of [`Rounding::Each`] added: an element
/// begins as `through(from[n - first] * scale)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EightBitSum {
    /// Where the elements are; a multiple of [`EightBitSum::AT_ONCE`].
    pub from: DeviceAddr,
    /// What they are; [`Element::is_float8`].
    pub element: Element,
    /// The number of the first one in the weight; a multiple of [`EightBitSum::AT_ONCE`].
    pub first: u64,
    /// How many; likewise.
    pub count: u64,
    /// A float32 that the elements are multiplied with at first.
    pub scale: Option<DeviceAddr>,
    /// Of [`Rounding::Each`]; a row's elements are a multiple of [`EightBitSum::AT_ONCE`], and the first is row 0.
    pub factors: Factors,
}

impl EightBitSum {
    /// Elements that are worked on at once.
    pub const AT_ONCE: u64 = 8;

    fn is_possible(&self) -> bool {
        let factors = &self.factors;
        let is_in_terms = matches!(factors.rounding, Rounding::Each { .. }) && factors.rounding.is_possible();
        let in_packs = [factors.columns.into(), self.from.get(), self.first, self.count];
        let is_in_packs = in_packs.iter().all(|number| number.is_multiple_of(EightBitSum::AT_ONCE));
        let can = self.element.is_float8() && factors.element.is_target();
        can && is_in_terms && is_in_packs && factors.columns > 0 && factors.rank > 0 && factors.row_base == 0
    }
}

/// Rounds a sum to the elements that it began with, up or down at random.
///
/// What is rounded lies between two neighbours of its type, and becomes the one that is farther from zero where its distance from
/// the other, in 256ths of theirs, and the random byte `r(n)` are 256 or more together; the largest finite ones where it is beyond
/// them, and the negative one of them for a NaN.
///
/// `r(n)` is as torch's generator on a GPU draws bytes: the low one of a word of Philox4x32-10 (J. K. Salmon et al., "Parallel
/// random numbers: as easy as 1, 2, 3", 2011) with the seed as its key. Words go to `threads` threads in turn, of which each has
/// a counter of its own: with `n = (4 * i + word) * threads + thread` the counter is `(i, 0, thread, 0)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requantize {
    /// The sum.
    pub sum: EightBitSum,
    /// Where the results go; a multiple of [`EightBitSum::AT_ONCE`]. Where the elements are, or elsewhere.
    pub to: DeviceAddr,
    /// Memory for as many random bytes; likewise a multiple. Where the results go, if those go elsewhere, or elsewhere.
    pub random: DeviceAddr,
    /// Of the random bytes.
    pub seed: u64,
    /// Likewise; a multiple of [`EightBitSum::AT_ONCE`].
    pub threads: u64,
}

/// Converts elements: `to[n] = from[n] * scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convert {
    /// Where the results go.
    pub to: DeviceAddr,
    /// The elements of the results; [`Element::is_target`].
    pub to_element: Element,
    /// Where the elements are; the two do not overlap.
    pub from: DeviceAddr,
    /// What they are.
    pub from_element: Element,
    /// How many.
    pub count: u64,
    /// What to multiply them with.
    pub scale: Scale,
}

/// What converted elements are multiplied with, in float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Nothing.
    None,
    /// One float32 for all.
    One(DeviceAddr),
    /// A float32 for each row of a row-major tensor.
    Rows {
        /// The first row's.
        at: DeviceAddr,
        /// The number of the first converted element in the tensor.
        first: u64,
        /// Elements a row.
        columns: u64,
    },
}
