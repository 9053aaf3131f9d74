//! Which target suits a prompt: by a classifier of its task, or by the
//! probability that the strong model does better.
//!
//! What may not happen here: a request that fails because the encoder did. It
//! goes where it goes without one, and the decision says why.

use super::{Candidate, Target};
use crate::{
    config::{ConfigError, ModelSettings},
    embed::EncoderId,
    head::{Head, HeadError},
    quality::Quality,
};
use serde::Serialize;
use std::{path::Path, sync::Arc};

/// A head at work on a route; places are those of the route's targets.
#[derive(Debug)]
pub(crate) enum Fit {
    Task { head: Box<Head>, places: Vec<usize>, default: usize, least: f32 },
    Quality { quality: Box<Quality>, strong: usize, weak: usize, threshold: f64 },
}

/// What the head said, for the record.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Judged {
    /// The likeliest label, or `strong wins`.
    pub(crate) label: String,
    pub(crate) probability: f64,
    /// What it was held against.
    pub(crate) threshold: f64,
}

impl Fit {
    /// Reads what the policy of `settings` needs; `None` for the others.
    ///
    /// # Errors
    /// For a file that cannot be used with this encoder, and for labels that
    /// lead nowhere.
    pub(crate) fn load(
        name: &str,
        settings: &ModelSettings,
        targets: &[Arc<Target>],
        encoder: Option<&EncoderId>,
    ) -> Result<Option<Self>, ConfigError> {
        let bad = |key: &str, why: String| ConfigError::Invalid { path: format!("models.{name}.{key}"), why };
        let on = |backend: &str| targets.iter().position(|t| t.node.name == backend);
        let read = |key: &str, path: &Path| {
            let id = encoder.ok_or_else(|| bad(key, "no encoder was opened when the server started".into()))?;
            let bytes = std::fs::read(path).map_err(|e| bad(key, format!("cannot read {}: {e}", path.display())))?;
            Ok((bytes, id))
        };
        let unfit = |key: &str, path: &Path, e: HeadError| bad(key, format!("{}: {e}", path.display()));
        if let Some(task) = &settings.task {
            let (bytes, id) = read("task.head", &task.head)?;
            let head = Head::from_json(&bytes, id).map_err(|e| unfit("task.head", &task.head, e))?;
            let mut places = Vec::new();
            for label in &head.labels {
                let named = || targets.iter().position(|t| t.node.name == *label || t.model == *label);
                let place = task.labels.get(label).map_or_else(named, |backend| on(backend));
                places.push(place.ok_or_else(|| bad("task.labels", format!("the head's label {label:?} leads to no target")))?);
            }
            if let Some(label) = task.labels.keys().find(|l| !head.labels.contains(l)) {
                return Err(bad("task.labels", format!("the head has no label {label:?}; it has: {}", head.labels.join(", "))));
            }
            let default = on(&task.default).ok_or_else(|| bad("task.default", "it is no target's backend".into()))?;
            return Ok(Some(Self::Task { head: Box::new(head), places, default, least: task.min_probability as f32 }));
        }
        let Some(q) = &settings.quality else { return Ok(None) };
        let (bytes, id) = read("quality.head", &q.head)?;
        let quality = Quality::from_json(&bytes, id).map_err(|e| unfit("quality.head", &q.head, e))?;
        let place = |backend: &str| on(backend).ok_or_else(|| bad("quality", format!("{backend:?} is no target's backend")));
        let threshold = q.threshold.unwrap_or(quality.chosen.threshold);
        Ok(Some(Self::Quality { strong: place(&q.strong)?, weak: place(&q.weak)?, threshold, quality: Box::new(quality) }))
    }

    /// Sorts `fit`, the places of targets that can answer, by the prompt's
    /// vector, or says why there is none.
    pub(crate) fn order(
        &self,
        vector: Option<&Result<Vec<f32>, String>>,
        fit: &mut [usize],
        candidates: &mut [Candidate],
    ) -> (String, Option<Judged>) {
        let first = |place: usize, fit: &mut [usize]| fit.sort_by_key(|i| *i != place);
        let unknown = |why: &str| format!("the prompt could not be classified: {why}");
        let row = match vector {
            Some(Ok(row)) => row,
            Some(Err(why)) => {
                first(self.fallback(), fit);
                return (unknown(why), None);
            }
            None => {
                first(self.fallback(), fit);
                return (unknown("it was not embedded"), None);
            }
        };
        match self {
            Self::Task { head, places, default, least } => {
                let p = match head.predict(row) {
                    Ok(p) => p,
                    Err(e) => {
                        first(*default, fit);
                        return (unknown(&e.to_string()), None);
                    }
                };
                for &i in fit.iter() {
                    let of = places.iter().zip(&p).filter(|(place, _)| **place == i).map(|(_, p)| f64::from(*p));
                    let sum: f64 = of.sum();
                    candidates[i].score = Some(1.0 - sum);
                    candidates[i].detail = format!("its labels have {sum:.3}");
                }
                let score = |i: &usize| candidates[*i].score.unwrap_or(f64::INFINITY);
                fit.sort_by(|a, b| score(a).total_cmp(&score(b)));
                let top = (0..p.len()).max_by(|&a, &b| p[a].total_cmp(&p[b]).then(b.cmp(&a))).unwrap_or(0);
                let label = head.labels.get(top).cloned().unwrap_or_default();
                let probability = p.get(top).copied().unwrap_or(0.0);
                let reason = if probability < *least {
                    first(*default, fit);
                    format!("{label:?} is the likeliest task with {probability:.3}, below {least}: the default")
                } else {
                    if let Some(place) = places.get(top) {
                        first(*place, fit);
                    }
                    format!("the task is {label:?} with {probability:.3}")
                };
                (reason, Some(Judged { label, probability: probability.into(), threshold: (*least).into() }))
            }
            Self::Quality { quality, strong, weak, threshold } => {
                let p = match quality.predict(row) {
                    Ok(p) => p,
                    Err(e) => {
                        first(*weak, fit);
                        return (unknown(&e.to_string()), None);
                    }
                };
                let (place, word) = if p >= *threshold { (*strong, "at least") } else { (*weak, "below") };
                first(place, fit);
                for &i in fit.iter().filter(|i| **i == *strong || **i == *weak) {
                    let wins = if i == *strong { p } else { 1.0 - p };
                    candidates[i].score = Some(1.0 - wins);
                    candidates[i].detail = format!("wins or ties with {wins:.3}");
                }
                let reason = format!("the strong model does better with {p:.3}, {word} {threshold:.3}");
                (reason, Some(Judged { label: "strong wins".into(), probability: p, threshold: *threshold }))
            }
        }
    }

    fn fallback(&self) -> usize {
        match self {
            Self::Task { default, .. } => *default,
            Self::Quality { weak, .. } => *weak,
        }
    }
}
