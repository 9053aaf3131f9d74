//! The model card: Markdown with the front matter model hubs read.
//!
//! Rendered from what the ledger holds; nothing is written by hand and nothing
//! is claimed that was not measured. It says *exposed to*, never *learned from*:
//! lineage shows what a model saw and not what it kept.

use crate::{GateReport, gate::Score};
use ashlar_core::Digest;
use std::{collections::BTreeMap, fmt::Write as _};

/// What a card tells.
#[derive(Debug, Clone)]
pub struct CardInput {
    /// The model's name.
    pub name: String,
    /// The tuned model's licence, as an SPDX id.
    pub licence: String,
    /// Languages of the kept documents, ISO 639-1.
    pub languages: Vec<String>,
    /// The base model's name, e.g. its hub id.
    pub base: String,
    /// The base model's file.
    pub base_digest: Digest,
    /// The base model's licence.
    pub base_licence: String,
    /// How the weights are stored, e.g. `Q8_0`.
    pub format: String,
    /// The LoRA adapter, where there is one.
    pub adapter: Option<Digest>,
    /// The data snapshot.
    pub snapshot: Digest,
    /// Documents read.
    pub raw: u64,
    /// Documents kept.
    pub kept: u64,
    /// Documents dropped, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Spans replaced by typed tags, by type.
    pub redactions: BTreeMap<String, u64>,
    /// Kept documents by licence.
    pub data_licences: BTreeMap<String, u64>,
    /// Settings of the training run, resolved.
    pub training: BTreeMap<String, String>,
    /// Evaluations, in the order to be shown.
    pub evaluations: Vec<Evaluation>,
    /// Flips and divergence of the quantized model, each with its number.
    pub quantization: BTreeMap<String, String>,
    /// What the model is for.
    pub intended_use: String,
    /// What it is not for, and what is known to go wrong.
    pub limits: Vec<String>,
    /// The gate's report, once it has been run.
    pub gate: Option<GateReport>,
}

/// One row of the card's evaluation table.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// What was asked.
    pub task: String,
    /// The base model's score.
    pub base: Score,
    /// The tuned model's score.
    pub tuned: Score,
    /// Two-sided p-value of the exact McNemar test; absent where none was made.
    pub p_value: Option<f64>,
}

/// Renders `input` as Markdown. The same input gives the same bytes.
pub fn card(input: &CardInput) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = render(input, &mut out);
    out
}

fn render(c: &CardInput, out: &mut String) -> std::fmt::Result {
    front_matter(c, out)?;
    writeln!(out, "# {}\n\n{}\n", line(&c.name), line(&c.intended_use))?;

    writeln!(out, "## Model\n\n| | |\n|---|---|")?;
    row(out, "base", &format!("{} ({})", c.base, c.base_licence))?;
    row(out, "base digest", &c.base_digest.to_string())?;
    row(out, "stored as", &c.format)?;
    if let Some(adapter) = c.adapter {
        row(out, "adapter", &adapter.to_string())?;
    }

    writeln!(
        out,
        "\n## Data\n\nThis model was exposed to the {} documents kept in snapshot `{}`. Exposure is what the records show; \
         they do not show influence.\n",
        c.kept, c.snapshot
    )?;
    let dropped: u64 = c.dropped.values().sum();
    writeln!(
        out,
        "Of {} documents read, {} were kept and {dropped} dropped.\n",
        c.raw, c.kept
    )?;
    table(out, ["dropped because", "documents"], &c.dropped)?;
    table(out, ["redacted", "spans"], &c.redactions)?;
    table(
        out,
        ["licence of kept documents", "documents"],
        &c.data_licences,
    )?;

    writeln!(out, "## Training\n")?;
    table(out, ["setting", "value"], &c.training)?;

    writeln!(
        out,
        "## Evaluation\n\n| task | base | tuned | p (exact McNemar) |\n|---|---|---|---|"
    )?;
    for e in &c.evaluations {
        let p = e
            .p_value
            .map_or_else(|| "not tested".into(), |p| format!("{p:.2e}"));
        writeln!(
            out,
            "| {} | {} | {} | {p} |",
            cell(&e.task),
            score(e.base),
            score(e.tuned)
        )?;
    }
    writeln!(out)?;
    if !c.quantization.is_empty() {
        writeln!(out, "## Quantization\n\nAgainst the unquantized model.\n")?;
        table(out, ["measure", "value"], &c.quantization)?;
    }
    if let Some(gate) = &c.gate {
        writeln!(
            out,
            "## Release gate\n\n| check | result | detail |\n|---|---|---|"
        )?;
        for check in &gate.checks {
            let result = if check.passed { "passed" } else { "failed" };
            writeln!(
                out,
                "| {} | {result} | {} |",
                cell(&check.name),
                cell(&check.detail)
            )?;
        }
        writeln!(out)?;
    }
    writeln!(out, "## Limits\n")?;
    for limit in &c.limits {
        writeln!(out, "- {}", line(limit))?;
    }
    Ok(())
}

fn front_matter(c: &CardInput, out: &mut String) -> std::fmt::Result {
    // JSON strings are YAML strings, whatever the name holds.
    let quoted = |s: &str| serde_json::Value::from(s).to_string();
    writeln!(out, "---\nlicense: {}", quoted(&c.licence.to_lowercase()))?;
    writeln!(
        out,
        "base_model: {}\nbase_model_relation: finetune",
        quoted(&c.base)
    )?;
    writeln!(out, "language:")?;
    for language in &c.languages {
        writeln!(out, "- {}", quoted(language))?;
    }
    writeln!(out, "---\n")
}

fn score(score: Score) -> String {
    match score.accuracy() {
        Some(a) => format!("{}/{} ({:.1} %)", score.correct, score.total, a * 100.0),
        None => "none".into(),
    }
}

/// A table of `rows`, or a line that says there are none.
fn table<V: ToString>(
    out: &mut String,
    head: [&str; 2],
    rows: &BTreeMap<String, V>,
) -> std::fmt::Result {
    if rows.is_empty() {
        return writeln!(out, "{}: none.\n", head[0]);
    }
    writeln!(out, "| {} | {} |\n|---|---|", head[0], head[1])?;
    for (name, value) in rows {
        row(out, name, &value.to_string())?;
    }
    writeln!(out)
}

fn row(out: &mut String, name: &str, value: &str) -> std::fmt::Result {
    writeln!(out, "| {} | {} |", cell(name), cell(value))
}

/// `text` on one line.
fn line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `text` as one cell of a table, without markup of its own.
fn cell(text: &str) -> String {
    line(text)
        .replace('\\', "\\\\")
        .replace('|', "\\|")
        .replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input() -> CardInput {
        let map =
            |pairs: &[(&str, u64)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect();
        CardInput {
            name: "handbook".into(),
            licence: "Apache-2.0".into(),
            languages: vec!["en".into(), "de".into()],
            base: "SmolLM2-135M-Instruct".into(),
            base_digest: Digest::of(b"base"),
            base_licence: "Apache-2.0".into(),
            format: "Q8_0".into(),
            adapter: Some(Digest::of(b"adapter")),
            snapshot: Digest::of(b"snapshot"),
            raw: 204,
            kept: 167,
            dropped: map(&[
                ("near-duplicate", 12),
                ("opt-out", 6),
                ("licence", 7),
                ("length", 12),
            ]),
            redactions: map(&[("EMAIL", 9)]),
            data_licences: map(&[("CC-BY-4.0", 160), ("CC0-1.0", 7)]),
            training: [("rank".to_owned(), "16".to_owned())].into(),
            evaluations: vec![Evaluation {
                task: "held-out | questions".into(),
                base: Score {
                    correct: 0,
                    total: 120,
                },
                tuned: Score {
                    correct: 117,
                    total: 120,
                },
                p_value: Some(1.2e-35),
            }],
            quantization: BTreeMap::new(),
            intended_use: "Answers questions\nabout the handbook.".into(),
            limits: vec!["Not for safety decisions.".into()],
            gate: None,
        }
    }

    #[test]
    fn it_says_what_was_measured() {
        let text = card(&input());
        for part in [
            "---\nlicense: \"apache-2.0\"\n",
            "exposed to the 167 documents",
            &format!("`{}`", Digest::of(b"snapshot")),
            "Of 204 documents read, 167 were kept and 37 dropped.",
            "| near-duplicate | 12 |",
            "| CC0-1.0 | 7 |",
            "| rank | 16 |",
            "| held-out \\| questions | 0/120 (0.0 %) | 117/120 (97.5 %) | 1.20e-35 |",
            "Answers questions about the handbook.",
            "- Not for safety decisions.",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("Quantization") && !text.contains("Release gate"));
        assert_eq!(text, card(&input()));
    }

    #[test]
    fn text_from_outside_cannot_forge_structure() {
        let mut c = input();
        c.base = "x\"\nlicense: mit\n---\n# forged | <script>".into();
        c.limits = vec!["one\n\n## Forged".into()];
        let text = card(&c);
        assert_eq!(text.lines().filter(|l| *l == "---").count(), 2);
        assert!(
            !text
                .lines()
                .any(|l| l.starts_with("# forged") || l.starts_with("## Forged"))
        );
        let (_, body) = text.split_once("\n---\n").unwrap();
        assert!(body.contains("\\| &lt;script>") && !body.contains('<'));
        assert!(!text.lines().any(|l| l == "license: mit"));
    }
}
