//! How a head does on examples that its training has not seen.

use super::{Examples, Head, HeadKind};
use serde::{Deserialize, Serialize};

/// Bins of the calibration error.
const BINS: usize = 10;

/// Figures of the held-out part.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Examples trained on.
    pub trained_on: usize,
    /// Examples held out.
    pub held_out: usize,
    /// Share whose labels are all right: the likeliest, or each on the right
    /// side of one half.
    pub accuracy: f64,
    /// What always guessing the most frequent would get.
    pub baseline: f64,
    /// Mean of the labels' F1.
    pub macro_f1: f64,
    /// By label, in their order: precision, recall and F1; a label without an
    /// example held out has none.
    pub labels: Vec<Option<[f64; 3]>>,
    /// Expected calibration error in ten bins (Guo et al. 2017), as trained.
    pub ece_before: f64,
    /// And with the temperature.
    pub ece: f64,
    /// The L2 penalty chosen.
    pub l2: f64,
}

/// Probability given to what was said, and whether it was right.
type Said = Vec<(f64, bool)>;

pub(super) fn report(head: &Head, examples: &Examples, trained_on: usize, held: &[usize], l2: f64) -> Report {
    let labels = head.labels.len();
    let (mut right, mut counts) = (0usize, vec![[0usize; 3]; labels]);
    let (mut before, mut after): (Said, Said) = (Vec::new(), Vec::new());
    let mut truths: std::collections::BTreeMap<Vec<bool>, usize> = std::collections::BTreeMap::new();
    for &i in held {
        let (row, targets) = (&examples.rows[i], &examples.targets[i]);
        let p = head.at(row, head.temperature);
        let (truth, said) = (decide(head.kind, targets), decide(head.kind, &p));
        right += usize::from(truth == said);
        for (c, (&t, &s)) in counts.iter_mut().zip(truth.iter().zip(&said)) {
            // Said and true, said, true.
            c[0] += usize::from(s && t);
            c[1] += usize::from(s);
            c[2] += usize::from(t);
        }
        confidences(head.kind, &p, &truth, &mut after);
        confidences(head.kind, &head.at(row, 1.0), &truth, &mut before);
        *truths.entry(truth).or_default() += 1;
    }
    let n = held.len().max(1) as f64;
    let scores = counts.iter().map(|&[both, said, truth]| {
        let ratio = |a: usize, b: usize| if b == 0 { 0.0 } else { a as f64 / b as f64 };
        let f1 = ratio(2 * both, said + truth);
        (truth > 0).then(|| [ratio(both, said), ratio(both, truth), f1])
    });
    let scores: Vec<Option<[f64; 3]>> = scores.collect();
    let known: Vec<f64> = scores.iter().flatten().map(|s| s[2]).collect();
    Report {
        trained_on,
        held_out: held.len(),
        accuracy: right as f64 / n,
        baseline: truths.values().max().copied().unwrap_or(0) as f64 / n,
        macro_f1: known.iter().sum::<f64>() / known.len().max(1) as f64,
        labels: scores,
        ece_before: calibration_error(&before),
        ece: calibration_error(&after),
        l2,
    }
}

/// Which labels probabilities or targets mean.
fn decide(kind: HeadKind, p: &[f32]) -> Vec<bool> {
    match kind {
        HeadKind::Sigmoid => p.iter().map(|p| *p >= 0.5).collect(),
        HeadKind::Softmax => {
            let top = (0..p.len()).max_by(|&a, &b| p[a].total_cmp(&p[b]).then(b.cmp(&a)));
            (0..p.len()).map(|i| Some(i) == top).collect()
        }
    }
}

fn confidences(kind: HeadKind, p: &[f32], truth: &[bool], out: &mut Said) {
    let said = decide(kind, p);
    match kind {
        HeadKind::Softmax => {
            let top = p.iter().copied().fold(0.0, f32::max);
            out.push((f64::from(top), said == truth));
        }
        HeadKind::Sigmoid => out.extend(p.iter().zip(said).zip(truth).map(|((&p, said), &truth)| {
            (f64::from(if said { p } else { 1.0 - p }), said == truth)
        })),
    }
}

fn calibration_error(said: &Said) -> f64 {
    let mut bins = [(0usize, 0.0, 0.0); BINS];
    for &(p, right) in said {
        let bin = &mut bins[((p * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + 1, bin.1 + p, bin.2 + f64::from(u8::from(right)));
    }
    bins.iter().map(|(_, p, right)| (p - right).abs()).sum::<f64>() / said.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::calibration_error;

    #[test]
    fn the_calibration_error_is_the_gap_between_said_and_right() {
        // Nine of ten said at 0.95, and half of them right.
        let said: Vec<_> = (0..10).map(|i| (0.95, i % 2 == 0)).collect();
        assert!((calibration_error(&said) - 0.45).abs() < 1e-9);
        let said: Vec<_> = (0..10).map(|i| (0.5, i % 2 == 0)).collect();
        assert!(calibration_error(&said) < 1e-9);
    }
}
