//! Newtypes for sizes and indices, so that raw integers never cross a module.

use std::fmt;
use std::ops::{Add, AddAssign, Mul, Sub, SubAssign};

/// A number of bytes.
///
/// Arithmetic panics on overflow or underflow in every build: a wrapped size is a wrong address.
///
/// ```
/// use forebay_core::Bytes;
/// assert_eq!(Bytes::mib(2).pages_of(Bytes::mib(1)), 2);
/// assert_eq!(Bytes::new(1536 << 20).to_string(), "1.5 GiB");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Bytes = Bytes(0);
    /// More than any device has.
    pub const MAX: Bytes = Bytes(u64::MAX);

    /// `n` bytes.
    pub const fn new(n: u64) -> Self {
        Bytes(n)
    }

    /// `n` KiB (1024 bytes each).
    pub const fn kib(n: u64) -> Self {
        Bytes(n << 10)
    }

    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Bytes(n << 20)
    }

    /// `n` GiB.
    pub const fn gib(n: u64) -> Self {
        Bytes(n << 30)
    }

    /// The plain number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The plain number as an index. Lossless: Forebay supports 64-bit targets only.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }

    /// How many pages of `page` bytes hold this many bytes (rounded up).
    pub const fn pages_of(self, page: Bytes) -> u64 {
        self.0.div_ceil(page.0)
    }

    /// Rounded up to a multiple of `unit`, or `None` past the end of the number range.
    pub fn checked_align_up(self, unit: Bytes) -> Option<Bytes> {
        self.0.checked_next_multiple_of(unit.0).map(Bytes)
    }

    /// Subtraction that stops at zero.
    pub const fn saturating_sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }

    /// Addition, or `None` past the end of the number range.
    pub fn checked_add(self, other: Bytes) -> Option<Bytes> {
        self.0.checked_add(other.0).map(Bytes)
    }
}

impl Add for Bytes {
    type Output = Bytes;
    fn add(self, other: Bytes) -> Bytes {
        Bytes(self.0.checked_add(other.0).expect("size overflow"))
    }
}

impl Sub for Bytes {
    type Output = Bytes;
    fn sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.checked_sub(other.0).expect("size underflow"))
    }
}

impl Mul<u64> for Bytes {
    type Output = Bytes;
    fn mul(self, n: u64) -> Bytes {
        Bytes(self.0.checked_mul(n).expect("size overflow"))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Bytes) {
        *self = *self + other;
    }
}

impl SubAssign for Bytes {
    fn sub_assign(&mut self, other: Bytes) {
        *self = *self - other;
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(iter: I) -> Bytes {
        iter.fold(Bytes::ZERO, Add::add)
    }
}

impl fmt::Display for Bytes {
    /// Binary units with up to one decimal: `512 B`, `2 MiB`, `1.5 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in UNITS {
            if self.0 >> shift != 0 {
                let tenths = (u128::from(self.0) * 10 + (1 << (shift - 1))) >> shift;
                return match (tenths / 10, tenths % 10) {
                    (whole, 0) => write!(f, "{whole} {unit}"),
                    (whole, tenth) => write!(f, "{whole}.{tenth} {unit}"),
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Bytes;

    #[test]
    fn sizes_print_in_the_largest_unit_that_fits() {
        let shown = [0, 1023, 1024, 1536, 2 << 20, 80 << 30, u64::MAX].map(|n| Bytes::new(n).to_string());
        assert_eq!(shown, ["0 B", "1023 B", "1 KiB", "1.5 KiB", "2 MiB", "80 GiB", "16777216 TiB"]);
    }

    #[test]
    #[should_panic(expected = "size underflow")]
    fn underflow_is_never_silent() {
        let _ = Bytes::new(1) - Bytes::new(2);
    }
}
