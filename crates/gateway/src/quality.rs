//! When the strong model is worth its price: a threshold on the predicted
//! probability that it does better than the weak one (RouteLLM, Ong et al.
//! 2024).
//!
//! A head predicts from the prompt alone whether the strong model wins; a tie is
//! no win, since the weak model is cheaper. The curve and the threshold stand
//! on predictions of heads that have not seen the prompt (five parts, each
//! predicted by a head of the other four).
//!
//! What may not happen here: a threshold that promises what no threshold gave.

use crate::{
    embed::EncoderId,
    head::{Examples, Head, HeadError, HeadKind, Report},
};
use ashlar_core::{Fault, Hint};
use serde::{Deserialize, Serialize};

/// Names the file format.
const FORMAT: &str = "ashlar-quality/1";
/// The head's one label.
const LABEL: &str = "strong wins";
/// Points of the curve beside its two ends.
const STEPS: usize = 20;

/// A prompt's vector with the scores of both models, higher is better.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The encoder's.
    pub row: Vec<f32>,
    /// The strong model's score.
    pub strong: f64,
    /// The weak model's score.
    pub weak: f64,
}

/// What the threshold is chosen for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Want {
    /// At most this share of requests to the strong model.
    Share(f64),
    /// At least this mean score, with as few requests to the strong model as
    /// that takes.
    Quality(f64),
}

/// A threshold and what it gave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// From this probability on the strong model is asked.
    pub threshold: f64,
    /// Share of prompts it is asked.
    pub share: f64,
    /// Mean score of the answers.
    pub quality: f64,
    /// What the same share drawn at random would have.
    pub random: f64,
}

/// A calibrated threshold, as written to a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quality {
    format: String,
    /// The strong model, as the evaluation calls it.
    pub strong: String,
    /// The weak one.
    pub weak: String,
    /// The one chosen.
    pub chosen: Point,
    /// From no request to the strong model to all.
    pub curve: Vec<Point>,
    /// Mean over all shares of how much of the gap between the models is
    /// recovered; at random it is one half (RouteLLM's APGR).
    pub recovered: f64,
    head: Head,
}

/// What a threshold cannot be made of.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QualityError {
    /// The head cannot be trained or used.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// A quality no threshold gives.
    #[error("a mean score of {wanted} cannot be had: these models give between {least:.4} and {most:.4}")]
    Quality {
        /// What was asked for.
        wanted: f64,
        /// The least of the curve.
        least: f64,
        /// The most.
        most: f64,
    },
    /// A share that is none.
    #[error("a share must be between 0 and 1, got {0}")]
    Share(f64),
    /// A score that is no number.
    #[error("prompt {0}: a score is not a finite number")]
    Score(usize),
}

impl Hint for QualityError {
    fn fault(&self) -> Fault {
        Fault::Input
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Head(e) => e.hint(),
            Self::Quality { .. } => Some("ask for a quality within these bounds, or for a share".into()),
            _ => None,
        }
    }
}

impl Quality {
    /// Trains on `scored` and chooses the threshold for `want`.
    ///
    /// # Errors
    /// [`QualityError`].
    pub fn calibrate(encoder: EncoderId, (strong, weak): (&str, &str), scored: &[Scored], want: Want) -> Result<Self, QualityError> {
        if let Some(i) = scored.iter().position(|s| !s.strong.is_finite() || !s.weak.is_finite()) {
            return Err(QualityError::Score(i));
        }
        let examples = Examples {
            rows: scored.iter().map(|s| s.row.clone()).collect(),
            targets: scored.iter().map(|s| vec![f32::from(u8::from(s.strong > s.weak))]).collect(),
        };
        let head = Head::train(encoder, HeadKind::Sigmoid, vec![LABEL.into()], &examples)?;
        let unseen = head.unseen(&examples);
        let mut order: Vec<(f64, &Scored)> = unseen.iter().map(|p| f64::from(p[0])).zip(scored).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let points = points(&order);
        let (least, most) = points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, m), p| (l.min(p.quality), m.max(p.quality)));
        let chosen = match want {
            Want::Share(s) if !(0.0..=1.0).contains(&s) => return Err(QualityError::Share(s)),
            // Shares grow along the points; the first is 0.
            Want::Share(s) => points.iter().rfind(|p| p.share <= s + 1e-9),
            Want::Quality(q) => points.iter().find(|p| p.quality >= q),
        };
        let wanted = match want {
            Want::Share(w) | Want::Quality(w) => w,
        };
        let chosen = *chosen.ok_or(QualityError::Quality { wanted, least, most })?;
        let nearest = |share: f64| points.iter().min_by(|a, b| (a.share - share).abs().total_cmp(&(b.share - share).abs())).copied();
        let mut curve: Vec<Point> = (0..=STEPS).filter_map(|i| nearest(i as f64 / STEPS as f64)).collect();
        curve.dedup();
        let (low, high) = (points[0].quality, points[points.len() - 1].quality);
        let recovered = if high == low { 0.5 } else { area(&points, |p| (p.quality - low) / (high - low)) };
        Ok(Self { format: FORMAT.into(), strong: strong.into(), weak: weak.into(), chosen, curve, recovered, head })
    }

    /// Probability that the strong model does better on a prompt.
    ///
    /// # Errors
    /// For a vector of other dimensions.
    pub fn predict(&self, row: &[f32]) -> Result<f64, HeadError> {
        Ok(self.head.predict(row)?.first().copied().map_or(0.0, f64::from))
    }

    /// How well it is predicted who wins.
    pub fn report(&self) -> &Report {
        &self.head.report
    }

    /// The file's text.
    ///
    /// # Errors
    /// Never for a calibrated one.
    pub fn to_json(&self) -> Result<String, HeadError> {
        serde_json::to_string(self).map_err(|e| HeadError::File(e.to_string()))
    }

    /// Reads a file; see [`Head::from_json`].
    ///
    /// # Errors
    /// [`HeadError`].
    pub fn from_json(json: &[u8], encoder: &EncoderId) -> Result<Self, HeadError> {
        let read: Self = serde_json::from_slice(json).map_err(|e| HeadError::File(e.to_string()))?;
        if read.format != FORMAT {
            return Err(HeadError::File(format!("its format is {:?}, this version reads {FORMAT:?}", read.format)));
        }
        read.head.consistent(encoder)?;
        Ok(read)
    }
}

/// One point a distinct prediction, from none to all at the strong model.
/// `order` is by falling prediction.
fn points(order: &[(f64, &Scored)]) -> Vec<Point> {
    let n = order.len() as f64;
    let weak = order.iter().map(|(_, s)| s.weak).sum::<f64>() / n;
    let strong = order.iter().map(|(_, s)| s.strong).sum::<f64>() / n;
    // A probability is below 2: this threshold lets nothing through.
    let mut points = vec![Point { threshold: 2.0, share: 0.0, quality: weak, random: weak }];
    let mut quality = weak;
    for (i, (p, s)) in order.iter().enumerate() {
        quality += (s.strong - s.weak) / n;
        // Equal predictions go the same way.
        if order.get(i + 1).is_none_or(|next| next.0 < *p) {
            let share = (i + 1) as f64 / n;
            points.push(Point { threshold: *p, share, quality, random: weak + share * (strong - weak) });
        }
    }
    points
}

/// The integral of `f` over the share, by trapezoids.
fn area(points: &[Point], f: impl Fn(&Point) -> f64) -> f64 {
    points.windows(2).map(|w| (w[1].share - w[0].share) * (f(&w[0]) + f(&w[1])) / 2.0).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::tests::{encoder, numbers};

    /// The strong model wins where the first value is high; else both are right.
    fn scored(n: usize) -> Vec<Scored> {
        let mut random = numbers(13);
        let one = |random: &mut dyn FnMut() -> f32| {
            let row: Vec<f32> = (0..4).map(|_| random() * 2.0 - 1.0).collect();
            let hard = row[0] + 0.4 * (random() - 0.5) > 0.3;
            Scored { row, strong: 1.0, weak: if hard { 0.0 } else { 1.0 } }
        };
        (0..n).map(|_| one(&mut random)).collect()
    }

    #[test]
    fn few_requests_bring_most_of_the_quality() {
        let scored = scored(600);
        let hard = scored.iter().filter(|s| s.weak < 0.5).count() as f64 / 600.0;
        let q = Quality::calibrate(encoder(4), ("big", "small"), &scored, Want::Quality(0.97)).unwrap();
        assert!(q.chosen.quality >= 0.97 && q.chosen.share < hard + 0.1, "{:?}, {hard} are hard", q.chosen);
        assert!(q.chosen.random < q.chosen.quality - 0.1, "{:?}", q.chosen);
        assert!(q.recovered > 0.75, "{}", q.recovered);
        assert!(q.predict(&[0.9, 0.0, 0.0, 0.0]).unwrap() > q.chosen.threshold);
        assert!(q.predict(&[-0.9, 0.0, 0.0, 0.0]).unwrap() < q.chosen.threshold);
        // The threshold gives on the prompts what the file says it gives.
        let asked = scored.iter().filter(|s| q.predict(&s.row).unwrap() >= q.chosen.threshold).count() as f64 / 600.0;
        assert!((asked - q.chosen.share).abs() < 0.05, "{asked} for {}", q.chosen.share);
        let read = Quality::from_json(q.to_json().unwrap().as_bytes(), &encoder(4)).unwrap();
        assert_eq!(read, q);
    }

    #[test]
    fn a_share_is_not_exceeded_and_a_dream_is_refused() {
        let scored = scored(300);
        for share in [0.0, 0.1, 0.5, 1.0] {
            let q = Quality::calibrate(encoder(4), ("s", "w"), &scored, Want::Share(share)).unwrap();
            assert!(q.chosen.share <= share + 1e-9 && q.chosen.share > share - 0.05, "{:?} for {share}", q.chosen);
            assert!(q.curve.windows(2).all(|w| w[0].share < w[1].share && w[0].threshold > w[1].threshold));
        }
        let e = Quality::calibrate(encoder(4), ("s", "w"), &scored, Want::Quality(1.5)).unwrap_err();
        assert!(e.to_string().contains("cannot be had") && e.to_string().contains("1.0000"), "{e}");
        assert!(Quality::calibrate(encoder(4), ("s", "w"), &scored, Want::Share(2.0)).is_err());
    }
}
