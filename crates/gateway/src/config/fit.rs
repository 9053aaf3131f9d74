//! Settings of the policies that look at what a prompt is about.

use super::{ConfigError, ModelSettings, Policy};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// `[models.NAME.task]`: where prompts of each label go. The head is read with
/// this file; to use a retrained one, name a new file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSettings {
    /// Written by `ashlar gateway train-router`.
    pub head: PathBuf,
    /// Label → backend of one of the targets. A label that is left out is the
    /// name of a target's backend or model itself.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Below this probability of the likeliest label, `default` is asked.
    #[serde(default = "half")]
    pub min_probability: f64,
    /// The backend asked when no label is likely enough, or the encoder fails.
    pub default: String,
}

const fn half() -> f64 {
    0.5
}

/// `[models.NAME.quality]`: the strong target for prompts that need it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QualitySettings {
    /// Written by `ashlar gateway calibrate`.
    pub head: PathBuf,
    /// The strong target's backend.
    pub strong: String,
    /// The weak target's backend; asked, too, when the encoder fails.
    pub weak: String,
    /// In place of the file's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
}

/// What `m` says of these policies, as far as it can be checked without a head.
pub(super) fn check(name: &str, m: &ModelSettings, encoder: bool) -> Result<(), ConfigError> {
    let invalid = |key: &str, why: String| Err(ConfigError::Invalid { path: format!("models.{name}.{key}"), why });
    let target = |backend: &str| m.targets.iter().any(|t| t.backend == backend);
    let none = |backend: &str| format!("no target is on a backend {backend:?}");
    for (policy, key, given) in [(Policy::Task, "task", m.task.is_some()), (Policy::Quality, "quality", m.quality.is_some())] {
        if (m.policy == policy) != given {
            let why = if given { format!("the policy is not {key:?}: it would do nothing") } else { format!("the policy {key:?} needs it") };
            return invalid(key, why);
        }
        if given && !encoder {
            return invalid(key, "it needs an encoder: add [encoder] with its path".into());
        }
    }
    if let Some(t) = &m.task {
        if !(0.0..=1.0).contains(&t.min_probability) {
            return invalid("task.min_probability", format!("it must be between 0 and 1, got {}", t.min_probability));
        }
        for (key, backend) in t.labels.iter().chain([(&"default".to_owned(), &t.default)]) {
            if !target(backend) {
                return invalid(&format!("task.{key}"), none(backend));
            }
        }
    }
    if let Some(q) = &m.quality {
        if let Some(t) = q.threshold.filter(|t| !(0.0..=2.0).contains(t)) {
            return invalid("quality.threshold", format!("it must be between 0 and 2, got {t}"));
        }
        if let Some(backend) = [&q.strong, &q.weak].into_iter().find(|b| !target(b)) {
            return invalid("quality", none(backend));
        }
        if q.strong == q.weak {
            return invalid("quality.weak", "it is the strong one, too".into());
        }
    }
    Ok(())
}
