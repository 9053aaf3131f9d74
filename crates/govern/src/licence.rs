//! Which licences may go into a model.
//!
//! Ids are SPDX's, or `LicenseRef-…` for texts SPDX does not know. An id that is
//! not on the list is refused, an absent or unknown one too. Expressions
//! (`A OR B`) are not read: whoever holds the text says which one applies.

use crate::Check;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The licences that may be used, compared without regard to case, as SPDX asks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LicencePolicy {
    allowed: BTreeSet<String>,
}

impl LicencePolicy {
    /// A policy that allows exactly `ids`.
    pub fn new<S: AsRef<str>>(ids: impl IntoIterator<Item = S>) -> Self {
        Self {
            allowed: ids
                .into_iter()
                .map(|id| id.as_ref().trim().to_owned())
                .collect(),
        }
    }

    /// Whether `id` may be used. `None`, an empty id and `unknown` never may.
    pub fn allows(&self, id: Option<&str>) -> bool {
        match id.map(str::trim) {
            None | Some("") => false,
            Some(id) if id.eq_ignore_ascii_case("unknown") => false,
            Some(id) => self.allowed.iter().any(|a| a.eq_ignore_ascii_case(id)),
        }
    }

    /// Checks the base model's licence and the number of documents under each
    /// data licence.
    pub fn check(&self, model: Option<&str>, data: &BTreeMap<String, u64>) -> Check {
        let mut faults = Vec::new();
        if !self.allows(model) {
            faults.push(format!(
                "the base model is under {}",
                model.unwrap_or("no known licence")
            ));
        }
        for (id, documents) in data.iter().filter(|(id, _)| !self.allows(Some(id))) {
            let id = if id.trim().is_empty() {
                "no known licence"
            } else {
                id
            };
            faults.push(format!("{documents} documents are under {id}"));
        }
        let documents: u64 = data.values().sum();
        let allowed = self
            .allowed
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ");
        let passed = faults.is_empty();
        let detail = if passed {
            format!("base model and {documents} documents are under allowed licences ({allowed})")
        } else {
            format!(
                "{}; allowed: {}",
                faults.join("; "),
                if allowed.is_empty() { "none" } else { &allowed }
            )
        };
        Check {
            name: "licence".into(),
            passed,
            detail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_is_refused_and_numbers_are_given() {
        let policy = LicencePolicy::new(["CC-BY-4.0", "Apache-2.0", "unknown"]);
        for (id, allowed) in [
            (Some("Apache-2.0"), true),
            (Some("apache-2.0 "), true),
            (Some("GPL-3.0-only"), false),
            (Some("CC-BY-4.0 OR MIT"), false),
            (Some("unknown"), false),
            (Some(""), false),
            (None, false),
        ] {
            assert_eq!(policy.allows(id), allowed, "{id:?}");
        }
        let mut data: BTreeMap<_, _> = [("CC-BY-4.0".to_owned(), 150)].into();
        let good = policy.check(Some("Apache-2.0"), &data);
        assert!(
            good.passed && good.detail.contains("150 documents"),
            "{}",
            good.detail
        );
        data.insert("CC-BY-NC-4.0".into(), 3);
        data.insert(String::new(), 4);
        let bad = policy.check(None, &data);
        assert!(!bad.passed);
        for part in [
            "no known licence",
            "3 documents are under CC-BY-NC-4.0",
            "4 documents",
        ] {
            assert!(bad.detail.contains(part), "{}", bad.detail);
        }
        assert!(
            !LicencePolicy::default()
                .check(Some("MIT"), &BTreeMap::new())
                .passed
        );
    }
}
