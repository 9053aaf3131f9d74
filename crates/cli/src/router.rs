//! `ashlar gateway train-router` and `calibrate`: labelled prompts in, a file
//! for the gateway's policies out.

use crate::{encoder, jsonl, out};
use anyhow::{Context, Result, bail, ensure};
use ashlar_gateway::{Embed, EncoderInfo, EncoderSettings, Examples, Head, HeadKind, Quality, Scored, Want};
use serde::Deserialize;
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Prompts encoded at once.
const PAGE: usize = 64;

/// Where prompts come from, what reads them, and where the result goes.
#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    /// The encoder: a folder in Hugging Face's layout, as in [encoder] of the gateway's file.
    #[arg(long, value_name = "DIR")]
    pub(crate) encoder: PathBuf,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

/// What the threshold is chosen for.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Wanted {
    /// At most this share of requests to the strong model, 0 to 1.
    #[arg(long, value_name = "SHARE")]
    share: Option<f64>,
    /// At least this mean score, with as few requests to the strong model as that takes.
    #[arg(long, value_name = "SCORE")]
    quality: Option<f64>,
}

/// `{prompt, label}`, or `{prompt, model, score}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labelled {
    prompt: String,
    label: Option<String>,
    model: Option<String>,
    score: Option<f64>,
}

/// `{prompt, scores: {model: score}}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Evaluated {
    prompt: String,
    scores: BTreeMap<String, f64>,
}

pub(crate) fn open(files: &Files) -> Result<(Embed, EncoderInfo)> {
    encoder::open(&EncoderSettings { path: files.encoder.clone(), name: None, truncatable: false })
}

pub(crate) fn vectors(embed: &Embed, prompts: &[&str]) -> Result<Vec<Vec<f32>>> {
    let bar = out::bar(prompts.len() as u64, "encode");
    let mut rows = Vec::with_capacity(prompts.len());
    for page in prompts.chunks(PAGE) {
        rows.extend(embed(page).map_err(|e| anyhow::anyhow!(e.message))?);
        bar.inc(page.len() as u64);
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// Each prompt with the labels it has, a share each: a prompt that several
/// models answer equally well is divided among them.
fn labels(read: Vec<Labelled>) -> Result<BTreeMap<String, Vec<(String, f32)>>> {
    let mut by_label: BTreeMap<String, Vec<(String, f32)>> = BTreeMap::new();
    let mut by_model: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    for (i, line) in read.into_iter().enumerate() {
        match line {
            Labelled { prompt, label: Some(label), model: None, score: None } => {
                let before = by_label.insert(prompt.clone(), vec![(label.clone(), 1.0)]);
                if let Some([(other, _)]) = before.as_deref().filter(|b| b[0].0 != label) {
                    bail!("example {}: the prompt {prompt:?} is labelled {other:?} before, {label:?} here", i + 1);
                }
            }
            Labelled { prompt, label: None, model: Some(model), score: Some(score) } => {
                ensure!(score.is_finite(), "example {}: the score is no finite number", i + 1);
                let before = by_model.entry(prompt).or_default().insert(model.clone(), score);
                ensure!(before.is_none(), "example {}: {model:?} has a score for this prompt before", i + 1);
            }
            _ => bail!("example {}: it must be {{prompt, label}} or {{prompt, model, score}}", i + 1),
        }
    }
    ensure!(by_label.is_empty() || by_model.is_empty(), "some examples have labels, some have scores: give one kind");
    for (prompt, scores) in by_model {
        let best = scores.values().copied().fold(f64::NEG_INFINITY, f64::max);
        let winners: Vec<String> = scores.into_iter().filter(|(_, s)| *s == best).map(|(m, _)| m).collect();
        let share = 1.0 / winners.len() as f32;
        by_label.insert(prompt, winners.into_iter().map(|m| (m, share)).collect());
    }
    Ok(by_label)
}

/// Trains the head of `policy = "task"`.
pub(crate) fn train(data: &Path, files: &Files, as_json: bool) -> Result<()> {
    let labelled = labels(jsonl::read(data)?)?;
    let mut names: Vec<String> = labelled.values().flatten().map(|(l, _)| l.clone()).collect();
    names.sort();
    names.dedup();
    let (embed, info) = open(files)?;
    let prompts: Vec<&str> = labelled.keys().map(String::as_str).collect();
    let share = |of: &[(String, f32)], name: &String| of.iter().find(|(l, _)| l == name).map_or(0.0, |(_, s)| *s);
    let examples = Examples {
        rows: vectors(&embed, &prompts)?,
        targets: labelled.values().map(|of| names.iter().map(|n| share(of, n)).collect()).collect(),
    };
    let head = Head::train(info.id, HeadKind::Softmax, names, &examples)?;
    fs::write(&files.out, head.to_json()?).with_context(|| format!("cannot write {}", files.out.display()))?;
    let r = &head.report;
    if as_json {
        return out::json(&json!({"labels": head.labels, "report": r, "temperature": head.temperature, "file": files.out}));
    }
    let percent = |x: f64| format!("{:.1} %", x * 100.0);
    out::line(format!(
        "held out {} of {}: accuracy {}, the most frequent label {}, macro F1 {:.3}",
        r.held_out,
        r.held_out + r.trained_on,
        percent(r.accuracy),
        percent(r.baseline),
        r.macro_f1
    ));
    out::line(format!("calibration error {:.3} at temperature {:.2}, {:.3} without", r.ece, head.temperature, r.ece_before));
    for (label, scores) in head.labels.iter().zip(&r.labels) {
        out::line(match scores {
            Some([p, rc, f1]) => format!("  {label}: precision {p:.3}, recall {rc:.3}, F1 {f1:.3}"),
            None => format!("  {label}: none held out"),
        });
    }
    out::note(format!("{} written: name it in [models.NAME.task] with policy = \"task\"", files.out.display()));
    Ok(())
}

/// Chooses the threshold of `policy = "quality"`.
pub(crate) fn calibrate(data: &Path, (strong, weak): (&str, &str), wanted: &Wanted, files: &Files, as_json: bool) -> Result<()> {
    ensure!(strong != weak, "the strong and the weak model are both {strong:?}");
    let want = match (wanted.share, wanted.quality) {
        (Some(s), None) => Want::Share(s),
        (None, Some(q)) => Want::Quality(q),
        // clap lets nothing else through.
        _ => bail!("give --share or --quality"),
    };
    let evaluated: Vec<Evaluated> = jsonl::read(data)?;
    let (embed, info) = open(files)?;
    let prompts: Vec<&str> = evaluated.iter().map(|e| e.prompt.as_str()).collect();
    let rows = vectors(&embed, &prompts)?;
    let mut scored = Vec::with_capacity(rows.len());
    for (i, (row, e)) in rows.into_iter().zip(&evaluated).enumerate() {
        let of = |model: &str| {
            let known = || format!("prompt {} has no score of {model:?}; it has: {}", i + 1, e.scores.keys().cloned().collect::<Vec<_>>().join(", "));
            e.scores.get(model).copied().with_context(known)
        };
        scored.push(Scored { row, strong: of(strong)?, weak: of(weak)? });
    }
    let q = Quality::calibrate(info.id, (strong, weak), &scored, want)?;
    fs::write(&files.out, q.to_json()?).with_context(|| format!("cannot write {}", files.out.display()))?;
    if as_json {
        return out::json(&json!({
            "strong": strong, "weak": weak, "chosen": q.chosen, "curve": q.curve, "recovered": q.recovered,
            "report": q.report(), "file": files.out,
        }));
    }
    out::line(format!("{:>9}  {:>8}  {:>8}  {:>8}", "threshold", "share", "quality", "random"));
    for p in &q.curve {
        let mark = if *p == q.chosen { "  <- chosen" } else { "" };
        out::line(format!("{:>9.4}  {:>8.3}  {:>8.4}  {:>8.4}{mark}", p.threshold, p.share, p.quality, p.random));
    }
    out::line(format!(
        "chosen: {:.1} % to {strong:?} from {:.4} on, quality {:.4} (at random {:.4}); {:.3} of the gap recovered over all shares, at random 0.5",
        q.chosen.share * 100.0,
        q.chosen.threshold,
        q.chosen.quality,
        q.chosen.random,
        q.recovered
    ));
    out::note(format!("{} written: name it in [models.NAME.quality] with policy = \"quality\"", files.out.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<BTreeMap<String, Vec<(String, f32)>>> {
        labels(text.lines().map(|l| serde_json::from_str(l).map_err(Into::into)).collect::<Result<_>>()?)
    }

    #[test]
    fn the_best_model_is_the_label_and_equals_share() {
        let got = of(concat!(
            "{\"prompt\":\"p\",\"model\":\"a\",\"score\":1}\n{\"prompt\":\"p\",\"model\":\"b\",\"score\":0.5}\n",
            "{\"prompt\":\"q\",\"model\":\"a\",\"score\":2}\n{\"prompt\":\"q\",\"model\":\"b\",\"score\":2}"
        ))
        .expect("labels");
        assert_eq!(got["p"], [("a".to_owned(), 1.0)]);
        assert_eq!(got["q"], [("a".to_owned(), 0.5), ("b".to_owned(), 0.5)]);
    }

    #[test]
    fn contradictions_are_named() {
        for (text, says) in [
            ("{\"prompt\":\"p\",\"label\":\"a\"}\n{\"prompt\":\"p\",\"label\":\"b\"}", "labelled \"a\" before"),
            ("{\"prompt\":\"p\",\"label\":\"a\"}\n{\"prompt\":\"q\",\"model\":\"b\",\"score\":1}", "give one kind"),
            ("{\"prompt\":\"p\",\"model\":\"a\"}", "example 1: it must be"),
            ("{\"prompt\":\"p\",\"model\":\"a\",\"score\":1}\n{\"prompt\":\"p\",\"model\":\"a\",\"score\":2}", "has a score"),
        ] {
            let e = of(text).expect_err("a contradiction").to_string();
            assert!(e.contains(says), "{e}");
        }
    }
}
