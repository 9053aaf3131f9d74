//! A linear head over an encoder's vectors: which of several labels a text has
//! (softmax), or which of them at once (one sigmoid each).
//!
//! Training is a convex problem solved by L-BFGS, so that the same examples
//! give the same head. The weight of the L2 penalty is chosen by
//! cross-validation on the training part; the temperature (Guo et al. 2017)
//! is fitted to the predictions made there on examples left out; the figures of
//! the report are of a part that neither saw.
//!
//! What may not happen here: a head used with vectors of another encoder than
//! it was trained on, or a figure in its report that its training has seen. The
//! same text twice is on one side of the split, whatever its label.

mod lbfgs;
mod score;

pub use score::Report;

use crate::embed::EncoderId;
use ashlar_core::{Fault, Hint};
use serde::{Deserialize, Serialize};

/// Names the file format; another one is refused.
const FORMAT: &str = "ashlar-head/1";
/// Penalties tried, strongest first.
const PENALTIES: [f64; 7] = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];
/// Parts of the cross-validation.
const FOLDS: usize = 5;
/// Fewest examples that can be split and still say something.
const FEWEST: usize = 20;

/// How many labels a text has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadKind {
    /// One: probabilities add up to 1.
    Softmax,
    /// Any number: each label has a probability of its own.
    Sigmoid,
}

/// A trained head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    format: String,
    /// How many labels a text has.
    pub kind: HeadKind,
    /// What the rows of the weights are for.
    pub labels: Vec<String>,
    /// Whose vectors it reads.
    pub encoder: EncoderId,
    /// What logits are divided by.
    pub temperature: f32,
    /// How it did on examples it has not seen.
    pub report: Report,
    bias: Vec<f32>,
    /// A row of `dimensions` for each label.
    weights: Vec<Vec<f32>>,
}

/// What a head cannot be made of.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum HeadError {
    /// Too few examples.
    #[error("{got} examples are too few to train on and to check with: at least {FEWEST} are needed")]
    Few {
        /// Examples given.
        got: usize,
    },
    /// A label with hardly any example, or without one that lacks it.
    #[error("label {label:?} has {with} examples and {without} without it: at least 2 of each are needed")]
    Label {
        /// The label.
        label: String,
        /// Examples that have it.
        with: usize,
        /// Examples that do not.
        without: usize,
    },
    /// Fewer labels than make a choice.
    #[error("{0} labels are no choice")]
    Labels(usize),
    /// An example whose parts do not fit.
    #[error("example {index}: {why}")]
    Example {
        /// Its place.
        index: usize,
        /// What is wrong with it.
        why: String,
    },
    /// A file that is no head.
    #[error("it is not a head that can be used: {0}")]
    File(String),
    /// A head for other vectors.
    #[error("it was trained on vectors of {wanted}, the encoder here is {got}")]
    Encoder {
        /// The encoder it was trained on.
        wanted: String,
        /// The one at hand.
        got: String,
    },
}

impl Hint for HeadError {
    fn fault(&self) -> Fault {
        Fault::Input
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Encoder { .. } => Some("train it again with this encoder, or name the other one in [encoder]".into()),
            Self::Few { .. } | Self::Label { .. } => Some("add labelled prompts".into()),
            _ => None,
        }
    }
}

/// Examples for [`Head::train`]: a vector each, and how much of each label it
/// has (0 to 1; softmax: they add up to 1).
#[derive(Debug, Clone, Default)]
pub struct Examples {
    /// Vectors of the encoder's dimensions.
    pub rows: Vec<Vec<f32>>,
    /// A value for each label.
    pub targets: Vec<Vec<f32>>,
}

impl HeadKind {
    /// Logits to probabilities.
    fn squash(self, z: &mut [f64]) {
        match self {
            Self::Sigmoid => z.iter_mut().for_each(|z| *z = 1.0 / (1.0 + (-*z).exp())),
            Self::Softmax => {
                let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                z.iter_mut().for_each(|z| *z = (*z - top).exp());
                let sum: f64 = z.iter().sum();
                z.iter_mut().for_each(|z| *z /= sum);
            }
        }
    }

    /// The cross-entropy of logits against targets.
    fn loss(self, z: &[f64], targets: &[f32]) -> f64 {
        match self {
            // log(1 + e^z) − t z, without overflow.
            Self::Sigmoid => z.iter().zip(targets).map(|(&z, &t)| z.max(0.0) + (-z.abs()).exp().ln_1p() - f64::from(t) * z).sum(),
            Self::Softmax => {
                let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let log_sum = top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
                z.iter().zip(targets).map(|(z, &t)| f64::from(t) * (log_sum - z)).sum()
            }
        }
    }
}

/// Weights while they are trained: label after label, `dimensions` and a bias.
struct Weights {
    dimensions: usize,
    values: Vec<f64>,
}

impl Weights {
    fn logits(&self, row: &[f32]) -> Vec<f64> {
        logits(&self.values, self.dimensions, row)
    }
}

fn logits(values: &[f64], dimensions: usize, row: &[f32]) -> Vec<f64> {
    let of = |w: &[f64]| w[dimensions] + w.iter().zip(row).map(|(w, &x)| w * f64::from(x)).sum::<f64>();
    values.chunks_exact(dimensions + 1).map(of).collect()
}

/// Weights with the least mean loss over the examples `which`, plus
/// `penalty / 2` times their squares; the bias is free.
fn fit(kind: HeadKind, examples: &Examples, which: &[usize], penalty: f64, start: Option<&Weights>) -> Weights {
    let dimensions = examples.rows.first().map_or(0, Vec::len);
    let labels = examples.targets.first().map_or(0, Vec::len);
    let stride = dimensions + 1;
    let start = start.map_or_else(|| vec![0.0; labels * stride], |w| w.values.clone());
    let n = which.len().max(1) as f64;
    let values = lbfgs::minimize(start, |values, gradient| {
        gradient.fill(0.0);
        let mut loss = 0.0;
        for &i in which {
            let (row, targets) = (&examples.rows[i], &examples.targets[i]);
            let mut z = logits(values, dimensions, row);
            loss += kind.loss(&z, targets) / n;
            kind.squash(&mut z);
            for ((p, &t), g) in z.iter().zip(targets).zip(gradient.chunks_exact_mut(stride)) {
                let residual = (p - f64::from(t)) / n;
                g.iter_mut().zip(row).for_each(|(g, &x)| *g += residual * f64::from(x));
                g[dimensions] += residual;
            }
        }
        for (w, g) in values.chunks_exact(stride).zip(gradient.chunks_exact_mut(stride)) {
            for (w, g) in w[..dimensions].iter().zip(&mut g[..dimensions]) {
                loss += penalty / 2.0 * w * w;
                *g += penalty * w;
            }
        }
        loss
    });
    Weights { dimensions, values }
}

/// The temperature with the least loss of `outs`: the loss is convex in its
/// inverse, so a golden section finds it.
fn temperature(kind: HeadKind, outs: &[(Vec<f64>, &[f32])]) -> f64 {
    let loss = |log_inverse: f64| -> f64 {
        let inverse = log_inverse.exp();
        outs.iter().map(|(z, t)| kind.loss(&z.iter().map(|z| z * inverse).collect::<Vec<_>>(), t)).sum()
    };
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (-3.0, 3.0);
    for _ in 0..60 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if loss(a) <= loss(b) { high = b } else { low = a }
    }
    (-(low + high) / 2.0).exp()
}

/// A number of the row alone, for drawing the same parts each time.
fn place(row: &[f32], salt: u8) -> u64 {
    let bytes = row.iter().flat_map(|v| v.to_le_bytes()).chain([salt]);
    let digest = ashlar_core::Digest::of(&bytes.collect::<Vec<u8>>());
    digest.as_bytes().iter().take(8).fold(0, |n, b| n << 8 | u64::from(*b))
}

/// The part of a cross-validation that a row is in.
fn fold(row: &[f32]) -> usize {
    (place(row, 1) % FOLDS as u64) as usize
}

impl Head {
    /// Trains on `examples` and checks with a fifth of them.
    ///
    /// # Errors
    /// [`HeadError`]: too few examples, also of one label, or parts that do not
    /// fit together.
    pub fn train(encoder: EncoderId, kind: HeadKind, labels: Vec<String>, examples: &Examples) -> Result<Self, HeadError> {
        check(&encoder, kind, &labels, examples)?;
        let n = examples.rows.len();
        let mut order: Vec<(u64, usize)> = (0..n).map(|i| (place(&examples.rows[i], 0), i)).collect();
        order.sort_unstable();
        // Equal texts have equal places, and the border is not among them.
        let mut border = n - n.div_ceil(5);
        while border > n / 2 && order[border - 1].0 == order[border].0 {
            border -= 1;
        }
        let (train, held): (Vec<usize>, Vec<usize>) = (
            order[..border].iter().map(|o| o.1).collect(),
            order[border..].iter().map(|o| o.1).collect(),
        );
        let (penalty, temperature) = cross_validate(kind, examples, &train);
        let weights = fit(kind, examples, &train, penalty, None);
        let stride = encoder.dimensions + 1;
        let rows = weights.values.chunks_exact(stride);
        let single = |w: &[f64]| w[..encoder.dimensions].iter().map(|w| *w as f32).collect::<Vec<f32>>();
        let mut head = Self {
            format: FORMAT.into(),
            kind,
            bias: rows.clone().map(|w| w[encoder.dimensions] as f32).collect(),
            weights: rows.map(single).collect(),
            labels,
            encoder,
            temperature: temperature as f32,
            report: Report::default(),
        };
        head.report = score::report(&head, examples, train.len(), &held, penalty);
        Ok(head)
    }

    /// What heads with this one's penalty and temperature predict for each of
    /// its examples when they have not seen it: five parts, each predicted by
    /// the other four.
    pub(crate) fn unseen(&self, examples: &Examples) -> Vec<Vec<f32>> {
        let all: Vec<usize> = (0..examples.rows.len()).collect();
        let mut out = vec![Vec::new(); all.len()];
        for f in 0..FOLDS {
            let (left_out, rest): (Vec<usize>, Vec<usize>) = all.iter().partition(|&&i| fold(&examples.rows[i]) == f);
            let weights = fit(self.kind, examples, &rest, self.report.l2, None);
            for i in left_out {
                let mut z = weights.logits(&examples.rows[i]);
                z.iter_mut().for_each(|z| *z /= f64::from(self.temperature));
                self.kind.squash(&mut z);
                out[i] = z.iter().map(|p| *p as f32).collect();
            }
        }
        out
    }

    /// The probability of each label, given a vector of the encoder's.
    ///
    /// # Errors
    /// [`HeadError::Example`] for a vector of other dimensions.
    pub fn predict(&self, row: &[f32]) -> Result<Vec<f32>, HeadError> {
        if row.len() != self.encoder.dimensions {
            let why = format!("it has {} dimensions, not {}", row.len(), self.encoder.dimensions);
            return Err(HeadError::Example { index: 0, why });
        }
        Ok(self.at(row, self.temperature))
    }

    fn at(&self, row: &[f32], temperature: f32) -> Vec<f32> {
        let of = |(w, b): (&Vec<f32>, &f32)| {
            let sum: f32 = w.iter().zip(row).map(|(w, x)| w * x).sum();
            f64::from((sum + b) / temperature)
        };
        let mut z: Vec<f64> = self.weights.iter().zip(&self.bias).map(of).collect();
        self.kind.squash(&mut z);
        z.iter().map(|p| *p as f32).collect()
    }

    /// The file's text.
    ///
    /// # Errors
    /// Never for a trained head: its numbers are finite.
    pub fn to_json(&self) -> Result<String, HeadError> {
        serde_json::to_string(self).map_err(|e| HeadError::File(e.to_string()))
    }

    /// Reads a file; `encoder` is the one whose vectors it shall read.
    ///
    /// # Errors
    /// [`HeadError::File`] for what is no head or contradicts itself,
    /// [`HeadError::Encoder`] for a head of another encoder.
    pub fn from_json(json: &[u8], encoder: &EncoderId) -> Result<Self, HeadError> {
        let head: Self = serde_json::from_slice(json).map_err(|e| HeadError::File(e.to_string()))?;
        head.consistent(encoder)?;
        Ok(head)
    }

    /// What a file must hold beyond its form.
    pub(crate) fn consistent(&self, encoder: &EncoderId) -> Result<(), HeadError> {
        let bad = |why: String| Err(HeadError::File(why));
        if self.format != FORMAT {
            return bad(format!("its format is {:?}, this version reads {FORMAT:?}", self.format));
        }
        let (labels, dimensions) = (self.labels.len(), self.encoder.dimensions);
        if self.weights.len() != labels || self.bias.len() != labels || labels == 0 {
            return bad(format!("{labels} labels, {} rows of weights, {} biases", self.weights.len(), self.bias.len()));
        }
        if let Some(row) = self.weights.iter().find(|w| w.len() != dimensions) {
            return bad(format!("a row of {} weights for {dimensions} dimensions", row.len()));
        }
        let finite = self.weights.iter().flatten().chain(&self.bias).all(|w| w.is_finite());
        if !finite || !(self.temperature.is_finite() && self.temperature > 0.0) {
            return bad("a weight or the temperature is not a usable number".into());
        }
        if self.encoder.digest != encoder.digest || dimensions != encoder.dimensions {
            let name = |e: &EncoderId| format!("{} ({}, {} dimensions)", e.name, e.digest.short(), e.dimensions);
            return Err(HeadError::Encoder { wanted: name(&self.encoder), got: name(encoder) });
        }
        Ok(())
    }
}

/// The penalty with the least loss on examples left out, and the temperature
/// that suits those predictions.
fn cross_validate(kind: HeadKind, examples: &Examples, train: &[usize]) -> (f64, f64) {
    let part: Vec<usize> = examples.rows.iter().map(|r| fold(r)).collect();
    let mut starts: Vec<Option<Weights>> = (0..FOLDS).map(|_| None).collect();
    let mut best: Option<(f64, f64, Vec<(Vec<f64>, &[f32])>)> = None;
    for penalty in PENALTIES {
        let mut outs = Vec::with_capacity(train.len());
        for (f, start) in starts.iter_mut().enumerate() {
            let (out, rest): (Vec<usize>, Vec<usize>) = train.iter().partition(|i| part[**i] == f);
            let weights = fit(kind, examples, &rest, penalty, start.as_ref());
            outs.extend(out.iter().map(|&i| (weights.logits(&examples.rows[i]), &examples.targets[i][..])));
            *start = Some(weights);
        }
        let loss: f64 = outs.iter().map(|(z, t)| kind.loss(z, t)).sum();
        match &best {
            Some((least, ..)) if loss >= *least => break,
            _ => best = Some((loss, penalty, outs)),
        }
    }
    // There is always a first penalty.
    best.map_or((PENALTIES[0], 1.0), |(_, penalty, outs)| (penalty, temperature(kind, &outs)))
}

fn check(encoder: &EncoderId, kind: HeadKind, labels: &[String], examples: &Examples) -> Result<(), HeadError> {
    let n = examples.rows.len();
    if labels.is_empty() || (kind == HeadKind::Softmax && labels.len() < 2) {
        return Err(HeadError::Labels(labels.len()));
    }
    if n < FEWEST {
        return Err(HeadError::Few { got: n });
    }
    for (index, row) in examples.rows.iter().enumerate() {
        let targets = examples.targets.get(index).map_or(&[][..], Vec::as_slice);
        let sum: f32 = targets.iter().sum();
        let why = if row.len() != encoder.dimensions || row.iter().any(|v| !v.is_finite()) {
            format!("a vector of {} finite values is needed, it has {}", encoder.dimensions, row.len())
        } else if targets.len() != labels.len() || targets.iter().any(|t| !(0.0..=1.0).contains(t)) {
            format!("{} values between 0 and 1 are needed, one a label, it has {}", labels.len(), targets.len())
        } else if kind == HeadKind::Softmax && (sum - 1.0).abs() > 1e-3 {
            format!("its labels add up to {sum}, not to 1")
        } else {
            continue;
        };
        return Err(HeadError::Example { index, why });
    }
    for (i, label) in labels.iter().enumerate() {
        let with = examples.targets.iter().filter(|t| t[i] > 0.0).count();
        let without = examples.targets.iter().filter(|t| t[i] < 1.0).count();
        if with < 2 || without < 2 {
            return Err(HeadError::Label { label: label.clone(), with, without });
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
