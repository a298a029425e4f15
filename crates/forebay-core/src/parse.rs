//! Sizes as people write them.

use std::str::FromStr;

use crate::Bytes;

/// Bytes of each unit.
const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("B", 1),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// More decimal places than this are refused: they would not change the size.
const MAX_PLACES: usize = 18;

/// A size in none of the accepted forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParseBytesError {
    /// Not a number with a unit.
    Form(String),
    /// More than 64 bits of bytes.
    TooLarge(String),
}

impl std::fmt::Display for ParseBytesError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ParseBytesError::Form(value) => write!(
                f,
                "a size is a number, with KiB, MiB, GiB, TiB, KB, MB, GB or TB behind it unless it counts bytes, as in \
                 \"8GiB\" or \"1.5 GB\": {value:?}"
            ),
            ParseBytesError::TooLarge(value) => {
                write!(f, "a size is below 16777216 TiB: {value:?}")
            }
        }
    }
}

impl std::error::Error for ParseBytesError {}

impl FromStr for Bytes {
    type Err = ParseBytesError;

    /// Reads `8GiB`, `500 MB`, `1.5gib` or `4096`. A fraction of a byte is dropped.
    ///
    /// ```
    /// use forebay_core::Bytes;
    /// assert_eq!("1.5 GiB".parse(), Ok(Bytes::mib(1536)));
    /// assert_eq!("2MB".parse(), Ok(Bytes::new(2_000_000)));
    /// assert!("-1GiB".parse::<Bytes>().is_err());
    /// ```
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || ParseBytesError::Form(text.to_owned());
        let too_large = || ParseBytesError::TooLarge(text.to_owned());
        let trimmed = text.trim();
        let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(end);
        let unit = unit.trim_start();
        let (_, unit) = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(form)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        if whole.is_empty() || fraction.is_empty() || fraction.len() > MAX_PLACES || fraction.contains('.') {
            return Err(form());
        }
        // Digits only by now, so these fail for their size alone.
        let whole: u64 = whole.parse().map_err(|_| too_large())?;
        let fraction_of_unit = u128::from(fraction.parse::<u64>().map_err(|_| too_large())?)
            * u128::from(*unit)
            / 10u128.pow(fraction.len() as u32);
        let bytes = u128::from(whole) * u128::from(*unit) + fraction_of_unit;
        u64::try_from(bytes).map(Bytes::new).map_err(|_| too_large())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("123", 123),
            ("12 B", 12),
            ("500MB", 500_000_000),
            ("8GiB", 8 << 30),
            (" 8 gib ", 8 << 30),
            ("0.5KiB", 512),
            ("1.9", 1),
            ("18446744073709551615", u64::MAX),
            ("1.000000000000000001TiB", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes::new(bytes)), "{text:?}");
        }
    }

    #[test]
    fn what_is_printed_can_be_read() {
        for size in [Bytes::ZERO, Bytes::kib(1536), Bytes::mib(2), Bytes::gib(80)] {
            assert_eq!(size.to_string().parse(), Ok(size));
        }
    }

    #[test]
    fn other_forms_are_refused_by_value() {
        for text in [
            "",
            " ",
            "GiB",
            "-1",
            "-1GiB",
            "+1",
            "NaN",
            "inf",
            "1e9",
            "8G",
            "8 GiBB",
            "1.2.3MB",
            ".5GiB",
            "5.GiB",
            "0x10",
            "1,5GiB",
            "1.0000000000000000001TiB",
            "½GiB",
        ] {
            let error = text.parse::<Bytes>().unwrap_err();
            assert_eq!(error, ParseBytesError::Form(text.to_owned()));
            assert!(error.to_string().ends_with(&format!("{text:?}")), "{error}");
        }
        for text in ["18446744073709551616", "16777216TiB", "99999999999999999999 GiB"] {
            assert_eq!(text.parse::<Bytes>(), Err(ParseBytesError::TooLarge(text.to_owned())));
        }
    }
}
