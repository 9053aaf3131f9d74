//! `cargo xtask test`: sets up what the tests need, then runs every one.
//!
//! The work is in the modules; this file is the order of it. The last line
//! printed is the sum over all test binaries, in libtest's own words.

mod dashboard;
mod layers;
mod peers;
mod tests;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has a parent folder")?;
    match std::env::args().nth(1).as_deref() {
        Some("test") => {
            layers::check(root)?;
            let peers = peers::set_up(root)?;
            tests::run(root, &peers)
        }
        Some("peers") => peers::set_up(root).map(drop),
        Some("layers") => layers::check(root),
        Some("dashboard") => dashboard::write(root),
        _ => bail!("usage: cargo xtask <test|peers|layers|dashboard>"),
    }
}

/// The folder for what tests fetch: `$ASHLAR_CACHE`, else `~/.cache/ashlar`.
fn cache() -> Result<PathBuf> {
    let var = |k| std::env::var_os(k).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("ASHLAR_CACHE")
        .or_else(|| Some(var("HOME")?.join(".cache/ashlar")))
        .context("neither ASHLAR_CACHE nor HOME is set: nowhere to keep the tests' model")
}
