//! The settings of curation, each with its default.

use crate::{DataError, repetition};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What to do with a line that is not a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBad {
    /// Stop, and name file, line and column.
    #[default]
    Error,
    /// Write it to `quarantine.jsonl`, count it and go on.
    Quarantine,
}

/// Which documents are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CurateConfig {
    /// ISO 639-1 codes that are kept; none = every language.
    pub languages: Vec<String>,
    /// Below this the detector's word does not count, and the language that
    /// the source declared decides.
    pub language_confidence: f64,
    /// SPDX ids that are kept; none = every stated licence. A document without
    /// a licence is always dropped.
    pub licences: Vec<String>,
    /// The licence of `.txt` and `.md` files whose front matter states none.
    pub text_licence: Option<String>,
    /// Fewest words.
    pub min_words: u64,
    /// Most words.
    pub max_words: u64,
    /// Largest share of each measure of [`repetition::MEASURES`].
    pub repetition: BTreeMap<String, f64>,
    /// A line in at least this many documents, and in
    /// [`Self::boilerplate_share`] of all, is boilerplate.
    pub boilerplate_documents: u64,
    /// See [`Self::boilerplate_documents`].
    pub boilerplate_share: f64,
    /// Near-duplicates.
    pub minhash: MinHashConfig,
    /// What to do with a malformed line.
    pub on_bad: OnBad,
}

impl Default for CurateConfig {
    fn default() -> Self {
        Self {
            languages: Vec::new(),
            language_confidence: 0.5,
            licences: Vec::new(),
            text_licence: None,
            min_words: 20,
            max_words: 100_000,
            repetition: repetition::MEASURES
                .iter()
                .map(|(name, most)| ((*name).to_owned(), *most))
                .collect(),
            boilerplate_documents: 5,
            boilerplate_share: 0.05,
            minhash: MinHashConfig::default(),
            on_bad: OnBad::Error,
        }
    }
}

/// How near-duplicates are found. Candidates share a band of their MinHash
/// signatures; each is then verified by the true Jaccard similarity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MinHashConfig {
    /// Words in a shingle.
    pub ngram: usize,
    /// Length of a signature.
    pub permutations: usize,
    /// Bands of a signature. 32 bands of 4 miss a pair at the threshold once
    /// in 2·10⁷; the many candidates this brings cost only a verification.
    pub bands: usize,
    /// Jaccard similarity from which two documents are near-duplicates.
    pub threshold: f64,
}

impl Default for MinHashConfig {
    fn default() -> Self {
        Self {
            ngram: 5,
            permutations: 128,
            bands: 32,
            threshold: 0.8,
        }
    }
}

impl CurateConfig {
    /// Checks every range.
    ///
    /// # Errors
    /// [`DataError::Setting`] for the first that is out of its range.
    pub fn check(&self) -> Result<(), DataError> {
        let wrong = |setting, problem| Err(DataError::Setting { setting, problem });
        let m = &self.minhash;
        if self.min_words > self.max_words {
            let (min, max) = (self.min_words, self.max_words);
            return wrong("min_words", format!("{min} is more than max_words {max}"));
        }
        if m.ngram == 0 || m.ngram > 64 {
            return wrong("minhash.ngram", format!("{} is not in 1..=64", m.ngram));
        }
        if m.permutations == 0 || m.permutations > 4096 {
            return wrong(
                "minhash.permutations",
                format!("{} is not in 1..=4096", m.permutations),
            );
        }
        if m.bands == 0 || m.permutations % m.bands != 0 {
            return wrong(
                "minhash.bands",
                format!(
                    "{} does not divide {} permutations",
                    m.bands, m.permutations
                ),
            );
        }
        let shares = [
            ("minhash.threshold", m.threshold),
            ("language_confidence", self.language_confidence),
            ("boilerplate_share", self.boilerplate_share),
        ];
        for (setting, share) in shares {
            if !(0.0..=1.0).contains(&share) {
                return wrong(setting, format!("{share} is not in 0..=1"));
            }
        }
        if m.threshold == 0.0 {
            return wrong("minhash.threshold", "0 makes every pair a duplicate".into());
        }
        for name in self.repetition.keys() {
            if !repetition::MEASURES.iter().any(|(known, _)| known == name) {
                return wrong("repetition", format!("no measure is called {name:?}"));
            }
        }
        Ok(())
    }
}
