//! Paired statistics for two models on the same items.

use serde::{Deserialize, Serialize};

/// Outcome of McNemar's exact test.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct McNemar {
    /// Items the first got wrong and the second right.
    pub gained: u64,
    /// Items the first got right and the second wrong.
    pub lost: u64,
    /// Two-sided p-value: the chance of a split at least this uneven when
    /// either direction is equally likely. 1 when no item changed.
    pub p_value: f64,
}

/// McNemar's exact test on paired outcomes `(first right, second right)`.
///
/// Binomial with p = ½ over the discordant pairs, twice the smaller tail,
/// capped at 1 (McNemar 1947; the exact form needs no large-sample correction).
pub fn mcnemar(pairs: impl IntoIterator<Item = (bool, bool)>) -> McNemar {
    let (mut gained, mut lost) = (0u64, 0u64);
    for pair in pairs {
        match pair {
            (false, true) => gained += 1,
            (true, false) => lost += 1,
            _ => {}
        }
    }
    let n = gained + lost;
    // Terms by logarithms: 2^-n underflows for n > 1074.
    let mut ln_choose = 0.0f64;
    let mut tail = 0.0f64;
    for k in 0..=gained.min(lost) {
        if k > 0 {
            ln_choose += ((n - k + 1) as f64).ln() - (k as f64).ln();
        }
        tail += (ln_choose - n as f64 * std::f64::consts::LN_2).exp();
    }
    McNemar {
        gained,
        lost,
        p_value: (2.0 * tail).min(1.0),
    }
}

/// Wilson's 95 % interval for `right` of `n` (Wilson 1927); `(0, 1)` for n = 0.
pub fn wilson(right: usize, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let (z, n) = (1.959_963_984_540_054, n as f64);
    let p = right as f64 / n;
    let (z2, scale) = (z * z, 1.0 + z * z / n);
    let half = z * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    (
        ((p + z2 / (2.0 * n) - half) / scale).max(0.0),
        ((p + z2 / (2.0 * n) + half) / scale).min(1.0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(gained: usize, lost: usize, same: usize) -> Vec<(bool, bool)> {
        let rep = |p, n| std::iter::repeat_n(p, n);
        rep((false, true), gained)
            .chain(rep((true, false), lost))
            .chain(rep((true, true), same))
            .collect()
    }

    #[test]
    fn against_the_binomial_by_hand() {
        // 2·(1 + 10)/2^10
        let t = mcnemar(pairs(9, 1, 30));
        assert!((t.p_value - 22.0 / 1024.0).abs() < 1e-12, "{t:?}");
        assert_eq!((t.gained, t.lost), (9, 1));
        assert_eq!(mcnemar(pairs(0, 0, 5)).p_value, 1.0);
        assert_eq!(mcnemar(pairs(3, 3, 0)).p_value, 1.0);
        assert!((mcnemar(pairs(5, 0, 0)).p_value - 0.0625).abs() < 1e-12);
    }

    #[test]
    fn many_discordant_pairs_do_not_overflow() {
        let t = mcnemar(pairs(5000, 100, 0));
        assert!(t.p_value >= 0.0 && t.p_value < 1e-300);
        assert!(mcnemar(pairs(2000, 2000, 0)).p_value > 0.99);
    }

    #[test]
    fn wilson_matches_published_values() {
        let (lo, hi) = wilson(10, 20);
        assert!(
            (lo - 0.2993).abs() < 1e-4 && (hi - 0.7007).abs() < 1e-4,
            "{lo} {hi}"
        );
        assert_eq!(wilson(0, 0), (0.0, 1.0));
    }

    proptest::proptest! {
        #[test]
        fn symmetric_and_a_probability(a in 0usize..300, b in 0usize..300) {
            let (x, y) = (mcnemar(pairs(a, b, 1)).p_value, mcnemar(pairs(b, a, 1)).p_value);
            proptest::prop_assert!((x - y).abs() < 1e-9);
            proptest::prop_assert!((0.0..=1.0).contains(&x));
        }
    }
}
