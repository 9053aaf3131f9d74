//! `ashlar sign` and `ashlar verify`: OpenSSF Model Signing on a folder.

use crate::out;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::Path;

/// Where a folder's signature lies: `model.sig` inside it, as PyPI's
/// `model-signing` writes it.
pub(crate) const SIGNATURE: &str = "model.sig";

/// Signs every file below `dir` with the PEM key at `key`.
pub(crate) fn sign(dir: &Path, key: &Path, as_json: bool) -> Result<()> {
    let signature = dir.join(SIGNATURE);
    ashlar_govern::sign_dir(dir, key, &signature).with_context(|| format!("signing {}", dir.display()))?;
    if as_json {
        return out::json(&json!({"signed": dir, "signature": signature}));
    }
    out::line(format!("signed {} → {}", dir.display(), signature.display()));
    Ok(())
}

/// Checks the folder against its signature and `public_key`.
pub(crate) fn verify(dir: &Path, public_key: &Path, signature: Option<&Path>, as_json: bool) -> Result<()> {
    let default = dir.join(SIGNATURE);
    let signature = signature.unwrap_or(&default);
    match ashlar_govern::verify_dir(dir, signature, public_key) {
        Ok(_) if as_json => out::json(&json!({"verified": true, "dir": dir})),
        Ok(_) => {
            out::line(format!("verified: every file in {} is as it was signed", dir.display()));
            Ok(())
        }
        Err(e) => {
            if as_json {
                out::json(&json!({"verified": false, "dir": dir, "error": e.to_string()}))?;
            }
            bail!("{} does not verify: {e}", dir.display())
        }
    }
}

/// Checks every object and the transparency log of `home`.
pub(crate) async fn verify_ledger(home: &Path, as_json: bool) -> Result<()> {
    let report = ashlar_store::Store::open(home).await?.verify_ledger().await?;
    if as_json {
        out::json(&serde_json::to_value(&report)?)?;
    } else {
        out::line(format!("{} log entries, {} objects checked", report.entries, report.objects));
        report.faults.iter().for_each(|f| out::line(format!("  {f}")));
    }
    if !report.ok {
        bail!("the ledger does not verify: {} faults", report.faults.len());
    }
    Ok(())
}
