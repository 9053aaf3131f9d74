//! The `Retry-After` header: seconds, or a date (RFC 9110, 10.2.3).

use ashlar_core::clock;

/// Longest wait that is believed; a clock that is off must not close a backend
/// for years.
const MOST: u32 = 3600;

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// Seconds from `now_ms` on, at most an hour; `None` for what is neither.
pub(crate) fn seconds(value: &str, now_ms: i64) -> Option<u32> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        return Some(value.parse().unwrap_or(MOST).min(MOST));
    }
    let at = imf_fixdate(value)?;
    let wait = (at - now_ms.div_euclid(1000)).clamp(0, i64::from(MOST));
    u32::try_from(wait).ok()
}

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT`.
fn imf_fixdate(text: &str) -> Option<i64> {
    let (_, rest) = text.split_once(", ")?;
    let mut words = rest.split(' ');
    let day: i64 = words.next()?.parse().ok().filter(|d| (1..=31).contains(d))?;
    let name = words.next()?;
    let month = i64::try_from(MONTHS.iter().position(|m| *m == name)?).ok()? + 1;
    let year: i64 = words.next()?.parse().ok().filter(|y| (1970..=9999).contains(y))?;
    let mut time = words.next()?.split(':').map(|n| n.parse::<i64>().ok().filter(|n| (0..=60).contains(n)));
    let (h, m, s) = (time.next()??, time.next()??, time.next()??);
    (words.next() == Some("GMT")).then_some(())?;
    Some(clock::days(year, month, day) * 86_400 + h * 3600 + m * 60 + s)
}

#[cfg(test)]
mod tests {
    use super::{MOST, imf_fixdate, seconds};

    #[test]
    fn both_forms_are_read() {
        assert_eq!(imf_fixdate("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(imf_fixdate("Tue, 29 Feb 2000 12:34:56 GMT"), Some(951_827_696));
        let now = 784_111_770_500;
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(7));
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:00 GMT", now), Some(0));
        assert_eq!(seconds(" 12 ", 0), Some(12));
        assert_eq!(seconds("99999999999999999999", 0), Some(MOST));
        for odd in ["", "-1", "1.5", "soon", "Sun, 06 Nov 1994", "Sun, 06 Foo 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 CET"] {
            assert_eq!(seconds(odd, now), None, "{odd}");
        }
    }
}
