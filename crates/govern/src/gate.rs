//! The checks between a model and a channel.
//!
//! Each check states its numbers, passed or not, so that the report can be read
//! without the policy beside it. A number that is not a number fails its check.
//! Overriding a failed check has no switch here: change the policy, which is
//! hashed into the release.

use crate::{GovernError, LicencePolicy, Verified};
use ashlar_core::Digest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a model must show.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatePolicy {
    /// Least share of held-out questions answered right, 0 to 1.
    pub min_accuracy: f64,
    /// Largest p-value at which one model counts as better than another.
    pub max_p_value: f64,
    /// Largest loss of accuracy on general questions, as a share, 0 to 1.
    pub max_forgetting: f64,
}

impl Default for GatePolicy {
    /// 80 % right, p ≤ 0.01, at most 10 points forgotten.
    fn default() -> Self {
        Self {
            min_accuracy: 0.8,
            max_p_value: 0.01,
            max_forgetting: 0.1,
        }
    }
}

/// Right answers out of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Score {
    /// Items answered right.
    pub correct: u64,
    /// Items asked.
    pub total: u64,
}

impl Score {
    /// The share that is right; `None` when nothing was asked or more is right
    /// than was asked.
    pub fn accuracy(self) -> Option<f64> {
        (self.total > 0 && self.correct <= self.total)
            .then(|| self.correct as f64 / self.total as f64)
    }

    fn text(self) -> String {
        match self.accuracy() {
            Some(a) => format!("{}/{} ({:.1} %)", self.correct, self.total, a * 100.0),
            None => format!("{}/{}, which is no score", self.correct, self.total),
        }
    }
}

/// What the candidate owes to the model it is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expectation {
    /// It must be better, beyond chance: the base.
    Better,
    /// It must not be worse, beyond chance: the incumbent.
    NotWorse,
}

/// The candidate against another model on the same held-out questions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The other model, for people: `base`, or the incumbent's release id.
    pub with: String,
    /// The other model's score.
    pub score: Score,
    /// Two-sided p-value of the paired test (exact McNemar).
    pub p_value: f64,
    /// What must hold.
    pub expect: Expectation,
}

/// Everything the gate looks at.
#[derive(Debug)]
pub struct GateInput<'a> {
    /// What [`crate::verify_dir`] said about the model's folder.
    pub signature: Result<&'a Verified, &'a GovernError>,
    /// The candidate on the held-out questions.
    pub held_out: Score,
    /// Paired comparisons; one at least must ask for [`Expectation::Better`] or
    /// [`Expectation::NotWorse`].
    pub comparisons: Vec<Comparison>,
    /// The base on the general questions.
    pub general_base: Score,
    /// The candidate on the general questions.
    pub general: Score,
    /// The base model's licence.
    pub model_licence: Option<&'a str>,
    /// Kept documents by licence; the empty key counts those without one.
    pub data_licences: &'a BTreeMap<String, u64>,
    /// Documents taken down to which the candidate was exposed.
    pub open_takedowns: &'a [Digest],
    /// Thresholds.
    pub policy: &'a GatePolicy,
    /// Allowed licences.
    pub licences: &'a LicencePolicy,
}

/// One check and what it saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// `signature`, `accuracy`, `comparison`, `forgetting`, `licence` or
    /// `takedowns`.
    pub name: String,
    /// Whether it holds.
    pub passed: bool,
    /// The numbers.
    pub detail: String,
}

/// All checks, in a fixed order; none is left out when an earlier one fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateReport {
    /// The checks.
    pub checks: Vec<Check>,
}

impl GateReport {
    /// Whether every check holds. A report without checks does not pass.
    pub fn passed(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|c| c.passed)
    }

    /// The checks that failed.
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|c| !c.passed)
    }
}

/// Holds a candidate against its policy.
pub fn gate(input: &GateInput<'_>) -> GateReport {
    let mut checks = vec![signature(input), accuracy(input)];
    checks.extend(comparisons(input));
    checks.push(forgetting(input));
    checks.push(
        input
            .licences
            .check(input.model_licence, input.data_licences),
    );
    checks.push(takedowns(input));
    GateReport { checks }
}

fn check(name: &str, passed: bool, detail: String) -> Check {
    Check {
        name: name.into(),
        passed,
        detail,
    }
}

fn signature(input: &GateInput<'_>) -> Check {
    match input.signature {
        Ok(v) => {
            let key = v.key.get(..12).unwrap_or(&v.key);
            check(
                "signature",
                true,
                format!(
                    "{} files signed by key {key}, root {}",
                    v.files.len(),
                    v.root
                ),
            )
        }
        Err(e) => check("signature", false, e.to_string()),
    }
}

fn accuracy(input: &GateInput<'_>) -> Check {
    let least = input.policy.min_accuracy;
    let passed = input.held_out.accuracy().is_some_and(|a| a >= least);
    check(
        "accuracy",
        passed,
        format!(
            "held-out {}, at least {:.1} % wanted",
            input.held_out.text(),
            least * 100.0
        ),
    )
}

fn comparisons(input: &GateInput<'_>) -> Vec<Check> {
    if input.comparisons.is_empty() {
        return vec![check(
            "comparison",
            false,
            "compared with 0 models, at least 1 is wanted".into(),
        )];
    }
    input
        .comparisons
        .iter()
        .map(|c| comparison(input, c))
        .collect()
}

fn comparison(input: &GateInput<'_>, other: &Comparison) -> Check {
    let (ours, theirs) = (input.held_out.accuracy(), other.score.accuracy());
    let same_items = input.held_out.total == other.score.total;
    let valid = (0.0..=1.0).contains(&other.p_value) && same_items;
    let beyond_chance = other.p_value <= input.policy.max_p_value;
    let (holds, wanted) = match other.expect {
        Expectation::Better => (ours > theirs && beyond_chance, "better"),
        Expectation::NotWorse => (ours >= theirs || !beyond_chance, "not worse"),
    };
    let detail = format!(
        "{} against {} {}, p = {:.3e}; wanted: {wanted} at p ≤ {}{}",
        input.held_out.text(),
        other.with,
        other.score.text(),
        other.p_value,
        input.policy.max_p_value,
        if same_items {
            ""
        } else {
            "; not the same number of items"
        },
    );
    check(
        "comparison",
        valid && ours.is_some() && theirs.is_some() && holds,
        detail,
    )
}

fn forgetting(input: &GateInput<'_>) -> Check {
    let most = input.policy.max_forgetting;
    let lost = match (input.general_base.accuracy(), input.general.accuracy()) {
        (Some(before), Some(after)) if input.general_base.total == input.general.total => {
            Some(before - after)
        }
        _ => None,
    };
    // A loss that is exactly the limit passes, whatever the last bit says.
    let passed = lost.is_some_and(|l| l <= most + 1e-12);
    let detail = format!(
        "general {} after, {} before: {}, at most {:.1} points may be lost",
        input.general.text(),
        input.general_base.text(),
        lost.map_or_else(
            || "not comparable".into(),
            |l| format!("{:+.1} points", -l * 100.0)
        ),
        most * 100.0,
    );
    check("forgetting", passed, detail)
}

fn takedowns(input: &GateInput<'_>) -> Check {
    let open = input.open_takedowns;
    let shown: Vec<_> = open.iter().take(5).map(Digest::short).collect();
    let rest = if open.len() > 5 { ", …" } else { "" };
    let which = if shown.is_empty() {
        String::new()
    } else {
        format!(": {}{rest}", shown.join(", "))
    };
    check(
        "takedowns",
        open.is_empty(),
        format!("exposed to {} documents taken down{which}", open.len()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One change to a candidate that passes, and the check it must fail.
    type Spoil = fn(&mut GateInput<'_>);

    fn verdict(spoil: Spoil) -> GateReport {
        let root = Digest::of(b"root");
        let verified = Verified {
            name: "model".into(),
            root,
            files: vec![("weights".into(), root)],
            key: "ab".repeat(32),
        };
        let data = [("CC-BY-4.0".to_owned(), 160)].into();
        let mut input = GateInput {
            signature: Ok(&verified),
            held_out: Score {
                correct: 110,
                total: 120,
            },
            comparisons: vec![
                Comparison {
                    with: "base".into(),
                    score: Score {
                        correct: 1,
                        total: 120,
                    },
                    p_value: 1e-30,
                    expect: Expectation::Better,
                },
                Comparison {
                    with: "rel-1".into(),
                    score: Score {
                        correct: 112,
                        total: 120,
                    },
                    p_value: 0.7,
                    expect: Expectation::NotWorse,
                },
            ],
            general_base: Score {
                correct: 30,
                total: 40,
            },
            general: Score {
                correct: 26,
                total: 40,
            },
            model_licence: Some("Apache-2.0"),
            data_licences: &data,
            open_takedowns: &[],
            policy: &GatePolicy::default(),
            licences: &LicencePolicy::new(["Apache-2.0", "CC-BY-4.0"]),
        };
        spoil(&mut input);
        gate(&input)
    }

    #[test]
    fn a_good_candidate_passes_with_numbers_everywhere() {
        let report = verdict(|_| {});
        assert!(report.passed(), "{report:#?}");
        let names: Vec<_> = report.checks.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "signature",
                "accuracy",
                "comparison",
                "comparison",
                "forgetting",
                "licence",
                "takedowns"
            ]
        );
        for check in &report.checks {
            assert!(
                check.detail.contains(|c: char| c.is_ascii_digit()),
                "{check:?}"
            );
        }
        assert!(!GateReport { checks: vec![] }.passed());
    }

    #[test]
    fn each_fault_fails_its_own_check_only() {
        static BAD: GovernError = GovernError::BadSignature;
        static DOWN: std::sync::LazyLock<Vec<Digest>> =
            std::sync::LazyLock::new(|| (0..7u8).map(|i| Digest::of(&[i])).collect());
        static UNKNOWN: std::sync::LazyLock<BTreeMap<String, u64>> =
            std::sync::LazyLock::new(|| [(String::new(), 2)].into());
        let table: &[(&str, &str, Spoil)] = &[
            ("signature", "signature", |i| i.signature = Err(&BAD)),
            ("comparison", "p = 5", |i| i.comparisons[0].p_value = 0.05),
            ("comparison", "NaN", |i| i.comparisons[0].p_value = f64::NAN),
            ("comparison", "p = -1", |i| i.comparisons[0].p_value = -1.0),
            ("comparison", "0 models", |i| i.comparisons.clear()),
            ("comparison", "same number", |i| {
                i.comparisons[0].score.total = 60
            }),
            ("comparison", "119/120", |i| {
                i.comparisons[0].score.correct = 119
            }),
            ("comparison", "rel-1", |i| {
                i.comparisons[1] = Comparison {
                    with: "rel-1".into(),
                    score: Score {
                        correct: 119,
                        total: 120,
                    },
                    p_value: 0.004,
                    expect: Expectation::NotWorse,
                }
            }),
            ("forgetting", "-12.5 points", |i| i.general.correct = 25),
            ("forgetting", "not comparable", |i| {
                i.general = Score {
                    correct: 0,
                    total: 0,
                }
            }),
            ("forgetting", "not comparable", |i| {
                i.general_base.total = 41
            }),
            ("licence", "MIT", |i| i.model_licence = Some("MIT")),
            ("licence", "2 documents", |i| i.data_licences = &UNKNOWN),
            ("takedowns", "7 documents", |i| i.open_takedowns = &DOWN),
        ];
        for (name, number, spoil) in table {
            let report = verdict(*spoil);
            let failed: Vec<_> = report.failed().collect();
            assert!(!report.passed());
            assert_eq!(failed.len(), 1, "{failed:?}");
            assert_eq!(failed[0].name, *name);
            assert!(
                failed[0].detail.contains(number),
                "{:?} lacks {number:?}",
                failed[0]
            );
        }
    }

    #[test]
    fn accuracy_is_held_against_its_threshold() {
        // 96/120 is exactly 80 %; the comparison with the incumbent also falls.
        assert!(verdict(|i| i.held_out.correct = 96).passed());
        let report = verdict(|i| i.held_out.correct = 95);
        assert_eq!(
            report.failed().map(|c| c.name.as_str()).collect::<Vec<_>>(),
            ["accuracy"]
        );
        assert!(!verdict(|i| i.held_out.correct = 121).passed());
    }

    #[test]
    fn forgetting_exactly_the_limit_passes() {
        assert!(verdict(|i| i.general.correct = 26).passed());
    }
}
