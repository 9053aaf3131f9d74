//! `ashlar guard train`: labelled texts in, the file of a `check = "head"` policy
//! out.

use crate::{
    jsonl, out,
    router::{self, Files},
};
use anyhow::{Context, Result, ensure};
use ashlar_gateway::{Examples, Head, HeadKind};
use serde::Deserialize;
use serde_json::json;
use std::{collections::BTreeMap, fs, path::Path};

/// `{text, labels: [label, …]}`; no label says that all is well.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labelled {
    text: String,
    labels: Vec<String>,
}

/// Trains a head with a probability for each label by itself.
pub(crate) fn train(data: &Path, files: &Files, as_json: bool) -> Result<()> {
    let mut by_text: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (i, line) in jsonl::read::<Labelled>(data)?.into_iter().enumerate() {
        let mut labels = line.labels;
        labels.sort();
        labels.dedup();
        let before = by_text.insert(line.text, labels.clone());
        ensure!(before.is_none_or(|b| b == labels), "example {}: the same text has other labels before", i + 1);
    }
    let mut names: Vec<String> = by_text.values().flatten().cloned().collect();
    names.sort();
    names.dedup();
    let (embed, info) = router::open(files)?;
    let texts: Vec<&str> = by_text.keys().map(String::as_str).collect();
    let examples = Examples {
        rows: router::vectors(&embed, &texts)?,
        targets: by_text.values().map(|of| names.iter().map(|n| f32::from(u8::from(of.contains(n)))).collect()).collect(),
    };
    let head = Head::train(info.id, HeadKind::Sigmoid, names, &examples)?;
    fs::write(&files.out, head.to_json()?).with_context(|| format!("cannot write {}", files.out.display()))?;
    let r = &head.report;
    if as_json {
        return out::json(&json!({"labels": head.labels, "report": r, "temperature": head.temperature, "file": files.out}));
    }
    out::line(format!("held out {} of {}: macro F1 {:.3}, calibration error {:.3}", r.held_out, r.held_out + r.trained_on, r.macro_f1, r.ece));
    for (label, scores) in head.labels.iter().zip(&r.labels) {
        out::line(match scores {
            Some([p, rc, f1]) => format!("  {label}: precision {p:.3}, recall {rc:.3}, F1 {f1:.3}"),
            None => format!("  {label}: none held out"),
        });
    }
    out::note(format!("{} written: name it as `head` in a [guard.policies.NAME] with check = \"head\"", files.out.display()));
    Ok(())
}
