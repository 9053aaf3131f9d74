//! Files of one JSON value a line; a bad line is named.

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use std::{fs, path::Path};

/// The values of a file; empty lines are none.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let filled = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    filled.map(|(i, l)| serde_json::from_str(l).with_context(|| format!("{}, line {}", path.display(), i + 1))).collect()
}
