//! The spans of time a limit counts over.
//!
//! Windows are fixed and aligned to UTC, so that every replica agrees on them
//! without talking. Rejected: sliding windows, whose state is a list of
//! requests rather than a number.

use crate::clock;
use serde::{Deserialize, Serialize};

/// A span of time after which a limit starts anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Window {
    /// From one full minute to the next.
    Minute,
    /// From one full hour to the next.
    Hour,
    /// From midnight to midnight, UTC.
    Day,
    /// From the first of a month to the first of the next, UTC.
    Month,
    /// For ever: a budget that is not renewed.
    Total,
}

impl Window {
    /// The name in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Month => "month",
            Self::Total => "total",
        }
    }

    /// Start of the window `at_ms` lies in, in milliseconds since 1970; 0 for
    /// [`Window::Total`].
    pub fn start(self, at_ms: i64) -> i64 {
        let whole = |ms: i64| at_ms.div_euclid(ms) * ms;
        match self {
            Self::Minute => whole(60_000),
            Self::Hour => whole(3_600_000),
            Self::Day => whole(86_400_000),
            Self::Month => {
                let (year, month, _) = clock::civil(at_ms.div_euclid(86_400_000));
                clock::days(year, month, 1) * 86_400_000
            }
            Self::Total => 0,
        }
    }

    /// Start of the next window; `None` for [`Window::Total`].
    pub fn end(self, at_ms: i64) -> Option<i64> {
        let start = self.start(at_ms);
        match self {
            Self::Minute => Some(start + 60_000),
            Self::Hour => Some(start + 3_600_000),
            Self::Day => Some(start + 86_400_000),
            // No month has more than 31 days, and 32 days end within the next.
            Self::Month => Some(self.start(start + 32 * 86_400_000)),
            Self::Total => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn months_end_where_the_calendar_says() {
        let bounds = |ms| {
            let end = Window::Month.end(ms).unwrap();
            (clock::rfc3339(Window::Month.start(ms)), clock::rfc3339(end))
        };
        let (start, end) = bounds(951_827_696_123);
        assert_eq!((&*start, &*end), ("2000-02-01T00:00:00.000Z", "2000-03-01T00:00:00.000Z"));
        let (start, end) = bounds(1_798_761_599_999);
        assert_eq!((&*start, &*end), ("2026-12-01T00:00:00.000Z", "2027-01-01T00:00:00.000Z"));
    }

    proptest! {
        #[test]
        fn windows_tile_time(ms in -1i64 << 40..1i64 << 44) {
            for w in [Window::Minute, Window::Hour, Window::Day, Window::Month] {
                let (start, end) = (w.start(ms), w.end(ms).unwrap());
                prop_assert!(start <= ms && ms < end, "{w:?}");
                prop_assert_eq!(w.start(start), start);
                prop_assert_eq!(w.start(end - 1), start);
                prop_assert_eq!(w.start(end), end);
            }
        }
    }
}
