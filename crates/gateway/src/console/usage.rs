//! Cost and cache: the usage ledger added up by what one asks for.
//!
//! Without accounts the response ledger is added up instead: it knows model and
//! backend, and no keys, teams, users or token classes.
//!
//! What may not happen here: a binary float in anything that is money, or a sum
//! over two currencies.

use super::{Shared, account_failure, failure, period_ms};
use crate::{app::App, error::Failure};
use ashlar_api::ApiError;
use ashlar_core::{Decimal, clock};
use ashlar_store::{Accounts, Dimension, PriceList, Tokens, UsageFilter, UsageSum};
use axum::{
    Json,
    extract::{Query, State},
};
use serde_json::{Value, json};
use std::{collections::{BTreeMap, HashMap}, sync::Arc};

const DIMENSIONS: [(&str, Dimension); 7] = [
    ("api_key", Dimension::ApiKey),
    ("team", Dimension::Team),
    ("end_user", Dimension::EndUser),
    ("model", Dimension::Model),
    ("adapter", Dimension::Adapter),
    ("backend", Dimension::Backend),
    ("endpoint", Dimension::Endpoint),
];
/// Rows of a table; the rest is one more that says how many.
const MOST: usize = 200;

fn filter(query: &HashMap<String, String>) -> Result<UsageFilter, ApiError> {
    let text = |name: &str| query.get(name).cloned();
    Ok(UsageFilter {
        from_ms: Some(period_ms(query)?),
        until_ms: None,
        api_key: text("api_key"),
        team: text("team"),
        end_user: text("end_user"),
        model: text("model"),
        backend: text("backend"),
    })
}

/// Names of keys and teams by id.
async fn names(accounts: &Accounts) -> Result<BTreeMap<String, String>, Failure> {
    let keys = accounts.keys().await.map_err(account_failure)?;
    let teams = accounts.teams().await.map_err(account_failure)?;
    let keys = keys.into_iter().map(|k| (k.id, k.settings.name));
    Ok(keys.chain(teams.into_iter().map(|t| (t.id, t.settings.name))).collect())
}

/// `{source, by, rows, total, steps, step_ms, names}`: usage of the last `days` by
/// `by`, dearest first; in all, by currency; and by day or hour. Filters go by the
/// names of the dimensions, so that each row leads to what is in it.
pub(super) async fn cost(
    State(app): Shared,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, Failure> {
    let by = query.get("by").map_or("model", String::as_str);
    let dimension = DIMENSIONS.iter().find(|(name, _)| *name == by).map(|(_, d)| *d).ok_or_else(|| {
        let known = DIMENSIONS.map(|(name, _)| name).join(", ");
        let shown: String = by.chars().take(40).collect();
        ApiError::bad_request(format!("by must be one of {known}, got {shown:?}"), Some("by"), Some("invalid_value"))
    })?;
    let filter = filter(&query)?;
    let Some(accounts) = &app.state.accounts else { return responses(&app, &query, by).await };
    let sums = async |by: &[Dimension]| accounts.usage_sums(&filter, by).await.map_err(account_failure);
    let mut rows = sums(&[dimension]).await?;
    rows.sort_by(|a, b| b.cost.cmp(&a.cost).then(b.requests.cmp(&a.requests)));
    let left_off = rows.len().saturating_sub(MOST);
    rows.truncate(MOST);
    let hourly = clock::now_ms() - filter.from_ms.unwrap_or(0) <= 3 * 86_400_000;
    let (step, step_ms) = if hourly { (Dimension::Hour, 3_600_000) } else { (Dimension::Day, 86_400_000) };
    Ok(Json(json!({
        "source": "accounts", "by": by, "rows": rows, "left_off": left_off, "total": sums(&[]).await?,
        "steps": sums(&[step]).await?, "step_ms": step_ms, "from_ms": filter.from_ms, "names": names(accounts).await?,
    })))
}

/// The same from the response ledger.
async fn responses(app: &Arc<App>, query: &HashMap<String, String>, by: &str) -> Result<Json<Value>, Failure> {
    let from_ms = period_ms(query)?;
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    let mut total = Row::default();
    let wanted = |name: &str, value: &str| query.get(name).is_none_or(|w| w == value);
    for sum in app.state.store.response_sums(from_ms).await.map_err(failure)? {
        if !wanted("model", &sum.model) || !wanted("backend", &sum.backend) {
            continue;
        }
        let of = match by {
            "model" => sum.model.clone(),
            "backend" => sum.backend.clone(),
            _ => String::new(),
        };
        let row = rows.entry(of).or_default();
        for row in [row, &mut total] {
            row.requests += sum.requests;
            row.unpriced += sum.unpriced;
            row.refusals += sum.refusals;
            row.tokens.input += sum.prompt_tokens.saturating_sub(sum.cached_tokens);
            row.tokens.cache_read += sum.cached_tokens;
            row.tokens.output += sum.completion_tokens;
            row.cost = row.cost.checked_add(sum.cost).ok_or_else(out_of_range)?;
        }
    }
    let currency = app.state.prices.as_ref().map(|p| p.currency());
    let shown = |of: &[&str], row: &Row| {
        json!({
            "of": of, "currency": currency, "requests": row.requests, "estimated": 0, "unpriced": row.unpriced,
            "refusals": row.refusals, "tokens": row.tokens, "cost": row.cost, "parts": null, "machine_us": 0,
        })
    };
    let mut sorted: Vec<(&String, &Row)> = rows.iter().collect();
    sorted.sort_by(|a, b| b.1.cost.cmp(&a.1.cost).then(b.1.requests.cmp(&a.1.requests)));
    let rows: Vec<Value> = sorted.iter().map(|(of, row)| shown(&[of], row)).collect();
    let all: Vec<Value> = (total.requests > 0).then(|| shown(&[], &total)).into_iter().collect();
    Ok(Json(json!({
        "source": "responses", "by": by, "rows": rows, "left_off": 0, "total": all, "steps": [], "step_ms": 0,
        "from_ms": from_ms, "names": {},
    })))
}

#[derive(Default)]
struct Row {
    requests: u64,
    unpriced: u64,
    refusals: u64,
    tokens: Tokens,
    cost: Decimal,
}

fn out_of_range() -> ApiError {
    ApiError::internal("the sum of costs is out of range")
}

/// `{rows, saved, currency, steps}`: of the last `days` and by model and backend,
/// prompt tokens, those found in a cache, and what they would have cost more at
/// today's prices had they been computed; `null` where there is no price for that.
pub(super) async fn cache(
    State(app): Shared,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, Failure> {
    let filter = filter(&query)?;
    let sums: Vec<(String, String, Tokens, u64)> = match &app.state.accounts {
        Some(accounts) => {
            let sums = accounts.usage_sums(&filter, &[Dimension::Model, Dimension::Backend]).await.map_err(account_failure)?;
            // Rows of two currencies are two sums of the same pair.
            merged(sums.into_iter().map(|s: UsageSum| (s.of[0].clone(), s.of[1].clone(), s.tokens, s.requests)))
        }
        None => {
            let sums = app.state.store.response_sums(filter.from_ms.unwrap_or(0)).await.map_err(failure)?;
            merged(sums.into_iter().map(|s| {
                let input = s.prompt_tokens.saturating_sub(s.cached_tokens);
                (s.model, s.backend, Tokens { input, cache_read: s.cached_tokens, ..Tokens::default() }, s.requests)
            }))
        }
    };
    let prices = app.state.prices.as_deref();
    let now_ms = clock::now_ms();
    let (mut total, mut unknown) = (Decimal::ZERO, 0);
    let mut rows = Vec::with_capacity(sums.len());
    for (model, backend, tokens, requests) in sums {
        let saved = prices.and_then(|p| saved(p, &model, &backend, now_ms, tokens.cache_read));
        match saved {
            Some(saved) => total = total.checked_add(saved).ok_or_else(out_of_range)?,
            None => unknown += tokens.cache_read,
        }
        rows.push(json!({
            "model": model, "backend": backend, "requests": requests, "saved": saved, "cache_read": tokens.cache_read,
            "prompt": tokens.input + tokens.cache_read + tokens.cache_write, "cache_write": tokens.cache_write,
        }));
    }
    rows.sort_by_key(|r| std::cmp::Reverse(r["cache_read"].as_u64()));
    Ok(Json(json!({
        "rows": rows, "saved": prices.map(|_| total), "unpriced_tokens": unknown,
        "currency": prices.map(PriceList::currency),
    })))
}

/// Sums of the same model and backend as one.
fn merged(sums: impl Iterator<Item = (String, String, Tokens, u64)>) -> Vec<(String, String, Tokens, u64)> {
    let mut by: BTreeMap<(String, String), (Tokens, u64)> = BTreeMap::new();
    for (model, backend, tokens, requests) in sums {
        let (all, n) = by.entry((model, backend)).or_default();
        all.input += tokens.input;
        all.cache_read += tokens.cache_read;
        all.cache_write += tokens.cache_write;
        *n += requests;
    }
    by.into_iter().map(|((model, backend), (tokens, n))| (model, backend, tokens, n)).collect()
}

/// What `tokens` of prompt cost less for being in the cache.
fn saved(prices: &PriceList, model: &str, backend: &str, at_ms: i64, tokens: u64) -> Option<Decimal> {
    if tokens == 0 {
        return Some(Decimal::ZERO);
    }
    if prices.by_machine(backend, at_ms) {
        return None;
    }
    let cost = |t: Tokens| prices.cost(model, backend, at_ms, &t, 0).total;
    let computed = cost(Tokens { input: tokens, ..Tokens::default() })?;
    computed.checked_sub(cost(Tokens { cache_read: tokens, ..Tokens::default() })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_money_is_the_difference_of_two_prices() {
        let list = "version = \"1\"\ncurrency = \"USD\"\n[[price]]\nmodel = \"m\"\ninput = \"0.15\"\ncache_read = \"0.05\"\noutput = \"1\"\n\
                    [[price]]\nmodel = \"blind\"\ninput = \"1\"\noutput = \"1\"\n[[machine]]\nbackend = \"own\"\nsecond = \"0.001\"\n";
        let list = PriceList::parse(list).unwrap();
        let saved = |model, backend, n| saved(&list, model, backend, 0, n).map(|d| d.to_string());
        assert_eq!(saved("m", "b", 3_000_001).as_deref(), Some("0.3000001"));
        assert_eq!(saved("m", "b", 0).as_deref(), Some("0"));
        assert_eq!(saved("blind", "b", 7), None, "no rate for cached tokens");
        assert_eq!(saved("unknown", "b", 7), None);
        assert_eq!(saved("m", "own", 7), None, "a machine's time is not by the token");
    }
}
