//! Runs every test once, in one profile, and sums the results.

use crate::peers::Peers;
use anyhow::{Context, Result, bail};
use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

/// Sums of libtest's counts over all test binaries.
#[derive(Default)]
struct Sum {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// Fuzzes the parsers briefly, then runs the workspace's tests.
pub(crate) fn run(root: &Path, peers: &Peers) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["test", "--release", "--workspace", "--no-fail-fast"])
        .current_dir(root)
        .stdout(Stdio::piped());
    let known = [
        ("ASHLAR_TEST_MODEL", &peers.model),
        ("ASHLAR_TEST_GEMMA", &peers.gemma),
        ("ASHLAR_TEST_MINILM", &peers.minilm),
        ("ASHLAR_PEERS_PYTHON", &peers.python),
        ("ASHLAR_TRANSFORMERS_PYTHON", &peers.transformers),
        ("ASHLAR_PEERS_BROWSER", &peers.browser),
        ("ASHLAR_POSTGRES_BIN", &peers.postgres),
        ("ASHLAR_PROMETHEUS_BIN", &peers.prometheus),
        ("ASHLAR_DEPLOY_PYTHON", &peers.deploy),
        ("ASHLAR_HELM", &peers.helm),
    ];
    for (name, path) in known {
        if let Some(path) = path {
            cargo.env(name, path);
        }
    }
    if peers.required {
        cargo.env("ASHLAR_REQUIRE_PEERS", "1");
    }
    let mut child = cargo.spawn().context("cannot start cargo")?;
    let mut sum = Sum::default();
    let mut out = std::io::stdout();
    for line in BufReader::new(child.stdout.take().context("stdout is piped")?).lines() {
        let line = line?;
        sum.add(&line);
        writeln!(out, "{line}")?;
    }
    let status = child.wait()?;
    let word = if status.success() && sum.failed == 0 { "ok" } else { "FAILED" };
    writeln!(
        out,
        "test result: {word}. {} passed; {} failed; {} ignored",
        sum.passed, sum.failed, sum.ignored
    )?;
    if word != "ok" {
        bail!("cargo test ended with {status}");
    }
    Ok(())
}

impl Sum {
    /// Counts a `test result: ok. 3 passed; 0 failed; …` line.
    fn add(&mut self, line: &str) {
        let Some(counts) = line.strip_prefix("test result: ") else { return };
        for part in counts.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(n), Some(what)) = (words.next().and_then(|w| w.parse::<u64>().ok()), words.next()) else {
                continue;
            };
            match what {
                "passed" => self.passed += n,
                "failed" => self.failed += n,
                "ignored" => self.ignored += n,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod unit {
    use super::Sum;

    #[test]
    fn counts_are_summed() {
        let mut sum = Sum::default();
        sum.add("test result: ok. 7 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.02s");
        sum.add("test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s");
        sum.add("test tests::a ... ok");
        assert_eq!((sum.passed, sum.failed, sum.ignored), (10, 2, 2));
    }
}
