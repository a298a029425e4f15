//! Element types of tensors.

use std::fmt;
use std::str::FromStr;

use forebay_core::Bytes;

/// The type of a tensor's elements: every one that safetensors 0.8 knows.
///
/// ```
/// use forebay_store::Dtype;
/// assert_eq!("BF16".parse(), Ok(Dtype::Bf16));
/// assert_eq!(Dtype::F4.bits(), 4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// One byte, 0 or 1.
    Bool,
    /// 4-bit float (MX).
    F4,
    /// 6-bit float, 2 bits of exponent and 3 of mantissa (MX).
    F6E2M3,
    /// 6-bit float, 3 bits of exponent and 2 of mantissa (MX).
    F6E3M2,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// 8-bit float, 5 bits of exponent and 2 of mantissa.
    F8E5M2,
    /// 8-bit float, 4 bits of exponent and 3 of mantissa.
    F8E4M3,
    /// 8 bits of exponent, a scale (MX).
    F8E8M0,
    /// As [`F8E4M3`](Self::F8E4M3), without infinities and negative zero.
    F8E4M3Fnuz,
    /// As [`F8E5M2`](Self::F8E5M2), without infinities and negative zero.
    F8E5M2Fnuz,
    /// Signed, 16 bits.
    I16,
    /// Unsigned, 16 bits.
    U16,
    /// Half-precision float.
    F16,
    /// Brain float.
    Bf16,
    /// Signed, 32 bits.
    I32,
    /// Unsigned, 32 bits.
    U32,
    /// Single-precision float.
    F32,
    /// Complex, of two single-precision floats.
    C64,
    /// Double-precision float.
    F64,
    /// Signed, 64 bits.
    I64,
    /// Unsigned, 64 bits.
    U64,
}

impl Dtype {
    /// Every element type.
    pub const ALL: [Dtype; 22] = [
        Dtype::Bool,
        Dtype::F4,
        Dtype::F6E2M3,
        Dtype::F6E3M2,
        Dtype::U8,
        Dtype::I8,
        Dtype::F8E5M2,
        Dtype::F8E4M3,
        Dtype::F8E8M0,
        Dtype::F8E4M3Fnuz,
        Dtype::F8E5M2Fnuz,
        Dtype::I16,
        Dtype::U16,
        Dtype::F16,
        Dtype::Bf16,
        Dtype::I32,
        Dtype::U32,
        Dtype::F32,
        Dtype::C64,
        Dtype::F64,
        Dtype::I64,
        Dtype::U64,
    ];

    /// The name a safetensors header uses.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::Bool => "BOOL",
            Dtype::F4 => "F4",
            Dtype::F6E2M3 => "F6_E2M3",
            Dtype::F6E3M2 => "F6_E3M2",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::F8E5M2 => "F8_E5M2",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::F8E8M0 => "F8_E8M0",
            Dtype::F8E4M3Fnuz => "F8_E4M3FNUZ",
            Dtype::F8E5M2Fnuz => "F8_E5M2FNUZ",
            Dtype::I16 => "I16",
            Dtype::U16 => "U16",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::I32 => "I32",
            Dtype::U32 => "U32",
            Dtype::F32 => "F32",
            Dtype::C64 => "C64",
            Dtype::F64 => "F64",
            Dtype::I64 => "I64",
            Dtype::U64 => "U64",
        }
    }

    /// Bits of one element; several elements share a byte where this is less than 8.
    pub const fn bits(self) -> u64 {
        match self {
            Dtype::F4 => 4,
            Dtype::F6E2M3 | Dtype::F6E3M2 => 6,
            Dtype::Bool
            | Dtype::U8
            | Dtype::I8
            | Dtype::F8E5M2
            | Dtype::F8E4M3
            | Dtype::F8E8M0
            | Dtype::F8E4M3Fnuz
            | Dtype::F8E5M2Fnuz => 8,
            Dtype::I16 | Dtype::U16 | Dtype::F16 | Dtype::Bf16 => 16,
            Dtype::I32 | Dtype::U32 | Dtype::F32 => 32,
            Dtype::C64 | Dtype::F64 | Dtype::I64 | Dtype::U64 => 64,
        }
    }

    /// The size of a dense tensor of this `shape`; `None` where it is not a whole number of bytes, or past the
    /// end of the number range.
    pub fn size_of(self, shape: &[u64]) -> Option<Bytes> {
        let elements = shape.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim))?;
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then(|| Bytes::new(bits / 8))
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtypeName;

    fn from_str(name: &str) -> Result<Dtype, UnknownDtypeName> {
        let known = Dtype::ALL.into_iter().find(|dtype| dtype.name() == name);
        known.ok_or_else(|| UnknownDtypeName(name.to_owned()))
    }
}

/// A name that is not an element type's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the name of an element type: {0}")]
pub struct UnknownDtypeName(pub String);

#[cfg(test)]
mod tests {
    use super::Dtype;

    #[test]
    fn names_and_sizes_are_those_of_the_format() {
        for dtype in Dtype::ALL {
            let theirs: safetensors::Dtype = serde_json::from_value(dtype.name().into()).unwrap();
            assert_eq!(dtype.bits(), theirs.bitsize() as u64, "{dtype}");
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert_eq!("F3".parse::<Dtype>().map_err(|error| error.0), Err("F3".to_owned()));
    }

    #[test]
    fn sizes_are_whole_bytes_or_nothing() {
        let size = |dtype: Dtype, shape: &[u64]| dtype.size_of(shape).map(|bytes| bytes.get());
        assert_eq!(size(Dtype::Bf16, &[3, 5]), Some(30));
        assert_eq!(size(Dtype::F32, &[]), Some(4));
        assert_eq!(size(Dtype::F6E2M3, &[4]), Some(3));
        assert_eq!(size(Dtype::F4, &[3]), None);
        assert_eq!(size(Dtype::U8, &[u64::MAX, 2]), None);
        assert_eq!(size(Dtype::F64, &[u64::MAX / 8]), None);
    }
}
