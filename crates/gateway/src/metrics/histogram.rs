//! Histograms that many requests write at once, and their bounds.
//!
//! Bounds are vLLM's, so that panels drawn for it fit; inter-token latency has
//! finer ones below 10 ms, because a small model is faster than vLLM's first.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Seconds of the time to the first token.
pub(crate) const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between two tokens.
pub(crate) const ITL: &[f64] = &[
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Seconds of a whole request and of its phases.
pub(crate) const E2E: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Seconds of what the gateway does itself: most of it below a millisecond.
pub(crate) const OWN: &[f64] = &[
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
    2.5, 5.0, 10.0,
];
/// Tokens of a prompt or an answer.
pub(crate) const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0, 200_000.0, 500_000.0, 1_000_000.0,
];

/// Counts by bucket; the last count is of values above every bound. Readers may
/// see a count without its part of the sum, for as long as a write takes.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    counts: Box<[AtomicU64]>,
    /// The bits of an `f64`.
    sum: AtomicU64,
}

/// A histogram at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Buckets {
    pub(crate) bounds: Vec<f64>,
    /// One more than `bounds`.
    pub(crate) counts: Vec<u64>,
    pub(crate) sum: f64,
}

impl Histogram {
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0f64.to_bits()) }
    }

    /// Counts `value`; one that is no number is left out.
    pub(crate) fn observe(&self, value: f64) {
        if !value.is_finite() {
            return;
        }
        let bucket = self.bounds.partition_point(|b| *b < value);
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Relaxed);
        }
        let add = |bits| Some((f64::from_bits(bits) + value).to_bits());
        // It is never refused: `add` always has a value.
        let _ = self.sum.fetch_update(Relaxed, Relaxed, add);
    }

    pub(crate) fn now(&self) -> Buckets {
        Buckets {
            bounds: self.bounds.to_vec(),
            counts: self.counts.iter().map(|c| c.load(Relaxed)).collect(),
            sum: f64::from_bits(self.sum.load(Relaxed)),
        }
    }
}

impl Buckets {
    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds another of the same bounds.
    pub(crate) fn add(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.sum += other.sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_falls_under_it() {
        let h = Histogram::new(ITL);
        for v in [0.001, 0.0011, 1e9, f64::NAN, f64::INFINITY] {
            h.observe(v);
        }
        let b = h.now();
        assert_eq!(b.counts[..3], [0, 1, 1]);
        assert_eq!((b.counts.last(), b.count()), (Some(&1), 3));
        assert_eq!(b.sum, 0.001 + 0.0011 + 1e9);
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        let h = Histogram::new(TOKENS);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (0..10_000).for_each(|i| h.observe(f64::from(i % 7))));
            }
        });
        let each: f64 = (0..10_000).map(|i| f64::from(i % 7)).sum();
        assert_eq!((h.now().count(), h.now().sum), (40_000, 4.0 * each));
    }

    #[test]
    fn bounds_rise() {
        for bounds in [TTFT, ITL, E2E, OWN, TOKENS] {
            assert!(bounds.windows(2).all(|w| w[0] < w[1]));
        }
    }
}
