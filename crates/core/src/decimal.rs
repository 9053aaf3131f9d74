//! Exact amounts of money, tokens and requests.
//!
//! [`Decimal`] counts picos (10⁻¹²) in an `i128`; [`Rate`] counts micros
//! (10⁻⁶). One micro per million tokens is one pico per token, and one micro a
//! second is one pico a microsecond: cost is a product of integers, so nothing
//! is ever rounded, and a sum has the same bits in any order.
//!
//! Rejected: `rust_decimal`, whose scale floats and which rounds without a
//! word once 96 bits are full; binary floats, which cannot write 0.1.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{fmt, str::FromStr};

const PICO: i128 = 1_000_000_000_000;

/// A decimal number with twelve places, exact, of magnitude below 1.7·10²⁶.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Decimal(i128);

/// Text that is no such number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecimalError {
    /// Not digits with at most one point among them.
    #[error("{0:?} is not a decimal number such as \"0.15\"")]
    Malformed(String),
    /// More places than can be kept exactly.
    #[error("{text:?} has {places} decimal places, at most {most} are kept exactly")]
    TooFine {
        /// What was read.
        text: String,
        /// Its decimal places.
        places: usize,
        /// How many there may be.
        most: usize,
    },
    /// Too large.
    #[error("{0:?} is out of range")]
    Range(String),
    /// Below zero where that has no meaning.
    #[error("{0:?} is negative")]
    Negative(String),
}

impl Decimal {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// `n` · 10⁻¹².
    pub const fn from_picos(n: i128) -> Self {
        Self(n)
    }

    /// The number times 10¹².
    pub const fn picos(self) -> i128 {
        self.0
    }

    /// The sum; `None` when it is out of range.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    /// The difference; `None` when it is out of range.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// Whether it has no fraction.
    pub fn is_whole(self) -> bool {
        self.0 % PICO == 0
    }
}

impl From<u64> for Decimal {
    fn from(n: u64) -> Self {
        Self(i128::from(n) * PICO)
    }
}

/// Reads `[-]digits[.digits]` as an integer of units of 10⁻ᵖˡᵃᶜᵉˢ.
fn parse(text: &str, places: u32) -> Result<i128, DecimalError> {
    let malformed = || DecimalError::Malformed(text.into());
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let all_digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) {
        return Err(malformed());
    }
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > places as usize {
        return Err(DecimalError::TooFine {
            text: text.into(),
            places: fraction.len(),
            most: places as usize,
        });
    }
    let number = |s: &str| if s.is_empty() { Some(0) } else { s.parse::<i128>().ok() };
    let scale = 10i128.pow(places - fraction.len() as u32);
    number(whole)
        .and_then(|w| w.checked_mul(10i128.pow(places)))
        .zip(number(fraction).map(|f| f * scale))
        .and_then(|(w, f)| w.checked_add(f))
        .map(|n| if negative { -n } else { n })
        .ok_or_else(|| DecimalError::Range(text.into()))
}

impl FromStr for Decimal {
    type Err = DecimalError;

    fn from_str(text: &str) -> Result<Self, DecimalError> {
        parse(text, 12).map(Self)
    }
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, pico) = (self.0.unsigned_abs(), PICO.unsigned_abs());
        let mut text = (n / pico).to_string();
        if n % pico != 0 {
            let fraction = format!("{:012}", n % pico);
            text.push('.');
            text.push_str(fraction.trim_end_matches('0'));
        }
        f.pad_integral(self.0 >= 0, "", &text)
    }
}

impl Serialize for Decimal {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Decimal {
    /// From a string: a JSON or TOML number with a point has been a binary
    /// float on its way and is not what was written.
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A price: of a million tokens, or of a second; six places, not negative.
///
/// ```
/// use ashlar_core::{Decimal, Rate};
/// let rate: Rate = "0.15".parse().unwrap();
/// assert_eq!(rate.times(1_234_567).to_string(), "0.18518505");
/// assert!("-1".parse::<Rate>().is_err() && "0.1234567".parse::<Rate>().is_err());
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u64);

impl Rate {
    /// What `n` tokens cost at a rate per million, or `n` microseconds at a rate
    /// per second. Exact, and in range for every rate and count.
    pub fn times(self, n: u64) -> Decimal {
        // Below 2⁶³ · 2⁶⁴ for a rate of at most i64::MAX micros.
        Decimal(i128::from(self.0) * i128::from(n))
    }
}

impl FromStr for Rate {
    type Err = DecimalError;

    fn from_str(text: &str) -> Result<Self, DecimalError> {
        let micros = parse(text, 6)?;
        if micros < 0 {
            return Err(DecimalError::Negative(text.into()));
        }
        let micros = i64::try_from(micros).map_err(|_| DecimalError::Range(text.into()))?;
        Ok(Self(micros.unsigned_abs()))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.times(1_000_000).fmt(f)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_number_is_refused() {
        for bad in ["", "-", ".", "1.", ".5", "1e3", "+1", "1,5", " 1", "1_000", "--1", "٣", "1.2.3", "NaN"] {
            assert!(matches!(bad.parse::<Decimal>(), Err(DecimalError::Malformed(_))), "{bad:?}");
        }
        let fine = "0.1234567890123".parse::<Decimal>();
        assert!(matches!(fine, Err(DecimalError::TooFine { places: 13, most: 12, .. })), "{fine:?}");
        assert!(matches!("9".repeat(40).parse::<Decimal>(), Err(DecimalError::Range(_))));
        assert!(matches!("9".repeat(27).parse::<Decimal>(), Err(DecimalError::Range(_))));
        assert!(matches!("9".repeat(14).parse::<Rate>(), Err(DecimalError::Range(_))));
        assert_eq!("0.10000000000000000000".parse::<Decimal>().unwrap().to_string(), "0.1");
        assert_eq!("-0.5".parse::<Decimal>().unwrap().to_string(), "-0.5");
        assert!(serde_json::from_str::<Decimal>("0.1").is_err(), "a JSON number is a float");
    }

    #[test]
    fn a_tenth_ten_times_is_one() {
        let tenth: Decimal = "0.1".parse().unwrap();
        let sum = (0..10).try_fold(Decimal::ZERO, |s, _| s.checked_add(tenth));
        assert_eq!(sum.unwrap(), Decimal::from(1));
        assert_eq!(Decimal(i128::MAX).checked_add(Decimal(1)), None);
    }

    proptest! {
        #[test]
        fn text_and_number_are_inverses(n in any::<i128>()) {
            let d = Decimal::from_picos(n >> 1);
            prop_assert_eq!(d.to_string().parse::<Decimal>().unwrap(), d);
            let json = serde_json::to_string(&d).unwrap();
            prop_assert_eq!(serde_json::from_str::<Decimal>(&json).unwrap(), d);
        }

        /// The cost of parts is the cost of the whole, whatever the parts.
        #[test]
        fn cost_is_linear(micros in 0u64..1 << 62, a in 0u64..1 << 62, b in 0u64..1 << 62) {
            let rate = Rate(micros);
            prop_assert_eq!(rate.times(a).checked_add(rate.times(b)), Some(rate.times(a + b)));
            prop_assert_eq!(rate.to_string().parse::<Rate>().unwrap(), rate);
        }

        #[test]
        fn hostile_text_does_not_panic(text in "\\PC{0,60}") {
            let _ = text.parse::<Decimal>();
        }
    }
}
