//! The only writer of stdout, and progress on stderr.
//!
//! Results go to stdout, everything else to stderr, so that `--json` can be
//! piped. A closed pipe is the reader's choice and ends quietly.

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;

/// One line on stdout.
pub(crate) fn line(text: String) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// One JSON value on stdout, on one line.
pub(crate) fn json(value: &serde_json::Value) -> Result<()> {
    line(serde_json::to_string(value)?);
    Ok(())
}

/// One line on stderr.
pub(crate) fn note(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr(), "{}", text.as_ref());
}

/// An error with its causes and, where one of them knows it, the next step.
pub(crate) fn error(error: &anyhow::Error) {
    note(format!("error: {error}"));
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        if !last.contains(&text) {
            note(format!("  because: {text}"));
        }
        last = text;
    }
    if let Some(hint) = hint(error) {
        note(format!("  next: {hint}"));
    }
}

/// The first hint in the chain. Trait objects cannot be asked for a second
/// trait, so the rooms' error types are tried one by one.
fn hint(error: &anyhow::Error) -> Option<String> {
    macro_rules! ask {
        ($cause:expr, $($error:ty),* $(,)?) => {
            $(if let Some(e) = $cause.downcast_ref::<$error>() { return ashlar_core::Hint::hint(e); })*
        };
    }
    for cause in error.chain() {
        ask!(
            cause,
            ashlar_store::StoreError,
            ashlar_store::AccountError,
            ashlar_store::pull::PullError,
            ashlar_data::DataError,
            ashlar_train::TrainError,
            ashlar_model::ModelError,
            ashlar_engine::EngineError,
            ashlar_engine::bench::BenchError,
            ashlar_eval::EvalError,
            ashlar_quant::MergeError,
            ashlar_govern::GovernError,
            ashlar_formats::FormatError,
            ashlar_gateway::ConfigError,
            ashlar_gateway::HeadError,
            ashlar_gateway::QualityError,
        );
    }
    None
}

/// Bytes for people: `93.8 MiB`.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut v, mut u) = (n as f64, 0);
    while v >= 1024.0 && u + 1 < units.len() {
        v /= 1024.0;
        u += 1;
    }
    if u == 0 { format!("{n} B") } else { format!("{v:.1} {}", units[u]) }
}

/// A bar of `total` steps on stderr; hidden where stderr is no terminal.
pub(crate) fn bar(total: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("    {prefix:<10} [{bar:32}] {pos}/{len} {msg}") {
        bar.set_style(style.progress_chars("█▌ "));
    }
    bar.set_prefix(what.to_string());
    bar
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_for_people() {
        assert_eq!(super::bytes(12), "12 B");
        assert_eq!(super::bytes(98_362_432), "93.8 MiB");
    }
}
