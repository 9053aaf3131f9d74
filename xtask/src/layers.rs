//! The arrows between crates. The list is DESIGN's, top to bottom; a new edge is
//! a change of architecture and is written here first.

use anyhow::{Context, Result, bail};
use std::path::Path;

/// Each crate with those it may depend on. `cli` may lean on all.
const ARROWS: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("api", &["core"]),
    ("kernels", &["core"]),
    ("formats", &["core"]),
    ("store", &["core"]),
    ("text", &["core"]),
    ("model", &["core", "kernels", "formats"]),
    ("engine", &["core", "model", "text", "api"]),
    ("data", &["core", "text", "store"]),
    ("train", &["core", "model", "kernels", "formats", "text", "store"]),
    ("quant", &["core", "model", "kernels", "formats", "store"]),
    ("eval", &["core", "api", "text", "store"]),
    ("govern", &["core", "store", "formats"]),
    ("gateway", &["core", "engine", "text", "api", "store"]),
];

/// Fails with every edge that is not an arrow. Tests may lean on anything.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(root.join("crates"))? {
        let dir = entry?.path();
        let name = dir.file_name().and_then(|n| n.to_str()).context("crate folder name")?.to_owned();
        if name == "cli" {
            continue;
        }
        let manifest: toml::Table = std::fs::read_to_string(dir.join("Cargo.toml"))?.parse()?;
        let Some((_, allowed)) = ARROWS.iter().find(|(n, _)| *n == name) else {
            wrong.push(format!("crates/{name} is in no room: add it to ARROWS in xtask"));
            continue;
        };
        let deps = manifest.get("dependencies").and_then(toml::Value::as_table);
        for dep in deps.into_iter().flat_map(|t| t.keys()).filter_map(|d| d.strip_prefix("ashlar-")) {
            if !allowed.contains(&dep) {
                wrong.push(format!("{name} → {dep} is not an arrow of the design"));
            }
        }
    }
    if !wrong.is_empty() {
        bail!("layer check failed:\n  {}", wrong.join("\n  "));
    }
    Ok(())
}
