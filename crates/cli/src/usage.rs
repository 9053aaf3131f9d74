//! `ashlar usage`: what was used and what it cost.

use crate::{keys::AccountsArg, out};
use anyhow::{Context, Result};
use ashlar_core::{Decimal, clock};
use ashlar_store::{Accounts, Dimension, UsageFilter, UsageSum, account::{FocusIssuer, write_focus_csv}};
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct UsageArgs {
    /// First day, UTC, e.g. 2026-11-01 [default: the first there is].
    #[arg(long, value_name = "DATE", value_parser = day)]
    from: Option<i64>,
    /// The day after the last, UTC.
    #[arg(long, value_name = "DATE", value_parser = day)]
    until: Option<i64>,
    /// What to add up by, e.g. team,model: api_key, team, end_user, model, adapter, release, backend, endpoint, finish, day or hour.
    #[arg(long, value_name = "WHAT", value_delimiter = ',', default_value = "model", value_parser = dimension)]
    by: Vec<Dimension>,
    /// Only of this key's id.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Only of this team's id.
    #[arg(long, value_name = "TEAM")]
    team: Option<String>,
    /// Only of this model, as its backend calls it.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Write every charge as CSV with the columns of FOCUS 1.2 instead.
    #[arg(long, value_name = "FILE")]
    export: Option<PathBuf>,
    /// Who pays, in the export.
    #[arg(long, value_name = "NAME", default_value = "default")]
    account: String,
    /// Who runs the gateway, in the export.
    #[arg(long, value_name = "NAME", default_value = "Ashlar")]
    provider: String,
    #[command(flatten)]
    at: AccountsArg,
}

fn day(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is no day such as 2026-11-01");
    let parts: Vec<i64> = text.split('-').map(|p| p.parse().ok()).collect::<Option<_>>().ok_or_else(wrong)?;
    let &[year @ 1970..=9999, month @ 1..=12, day @ 1..=31] = &*parts else { return Err(wrong()) };
    let days = clock::days(year, month, day);
    // The 31st of February is a day of March.
    if clock::civil(days) != (year, month, day) {
        return Err(wrong());
    }
    Ok(days * 86_400_000)
}

fn dimension(text: &str) -> Result<Dimension, String> {
    serde_json::from_value(text.into()).map_err(|e| e.to_string())
}

pub(crate) async fn run(home: &Path, args: &UsageArgs, as_json: bool) -> Result<()> {
    let accounts = args.at.open(home).await?;
    let done = report(&accounts, args, as_json).await;
    accounts.close().await?;
    done
}

async fn report(accounts: &Accounts, args: &UsageArgs, as_json: bool) -> Result<()> {
    let filter = UsageFilter {
        from_ms: args.from,
        until_ms: args.until,
        api_key: args.key.clone(),
        team: args.team.clone(),
        model: args.model.clone(),
        ..UsageFilter::default()
    };
    if let Some(file) = &args.export {
        let issuer = FocusIssuer { account_id: args.account.clone(), account_name: args.account.clone(), provider: args.provider.clone() };
        let to = std::fs::File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
        let rows = write_focus_csv(accounts, &filter, &issuer, std::io::BufWriter::new(to)).await?;
        if as_json {
            return out::json(&json!({"rows": rows, "file": file}));
        }
        out::line(format!("{rows} requests in {}", file.display()));
        return Ok(());
    }
    let sums = accounts.usage_sums(&filter, &args.by).await?;
    if as_json {
        return out::json(&json!({"by": args.by, "usage": sums}));
    }
    for sum in &sums {
        out::line(shown(sum, &args.by));
    }
    if sums.is_empty() {
        out::note("nothing was used");
    }
    Ok(())
}

fn shown(sum: &UsageSum, by: &[Dimension]) -> String {
    let of = sum.of.iter().zip(by).map(|(text, dimension)| match (dimension, text.parse()) {
        (Dimension::Day | Dimension::Hour, Ok(ms)) => clock::rfc3339(ms),
        _ if text.is_empty() => "–".into(),
        _ => text.clone(),
    });
    let t = &sum.tokens;
    let mut line = format!(
        "{}  {} requests  {} + {} cached in, {} out",
        of.collect::<Vec<_>>().join("  "),
        sum.requests,
        t.input + t.cache_write,
        t.cache_read,
        t.output + t.reasoning,
    );
    if let Some(currency) = sum.currency.as_ref().filter(|_| sum.cost != Decimal::ZERO || sum.unpriced < sum.requests) {
        line += &format!("  {} {currency}", sum.cost);
    }
    if sum.unpriced > 0 {
        line += &format!("  ({} without a price)", sum.unpriced);
    }
    if sum.estimated > 0 {
        line += &format!("  ({} estimated)", sum.estimated);
    }
    line
}

#[cfg(test)]
mod tests {
    #[test]
    fn days_are_days() {
        assert_eq!(super::day("1970-01-02"), Ok(86_400_000));
        for wrong in ["", "1970", "1970-02-30", "1970-13-01", "x-y-z", "1970-01-01-01"] {
            assert!(super::day(wrong).is_err(), "{wrong}");
        }
    }
}
