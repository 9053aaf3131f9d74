//! Safety and abuse: what was refused and found, by whom it was asked.

use super::{Shared, account_failure, failure, period_ms};
use crate::{error::Failure, app::App};
use ashlar_store::{Dimension, ResponseFilter, UsageFilter};
use axum::{
    Json,
    extract::{Query, State},
};
use serde_json::{Value, json};
use std::{collections::{BTreeMap, HashMap}, sync::Arc};

/// Newest responses whose verdicts are looked at.
const LOOKED_AT: u32 = 2000;
/// Most entries of the review queue, and offenders.
const MOST: usize = 100;
/// Guard actions that let nothing be seen changed or blocked.
const QUIET: [&str; 2] = ["allow", "pass"];

/// `{models, verdicts, review, looked_at}` of the last `days`: refusals and filtered
/// answers by model; verdicts of the guard by policy, stage, action and model among
/// the newest responses; and those among them a person may want to look at.
pub(super) async fn safety(
    State(app): Shared,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, Failure> {
    let from_ms = period_ms(&query)?;
    let models = by_model(&app, from_ms).await?;
    let filter = ResponseFilter { from_ms: Some(from_ms), ..ResponseFilter::default() };
    let rows = app.state.store.find_responses(&filter, None, LOOKED_AT).await.map_err(failure)?;
    let looked_at = rows.len();
    let (verdicts, review) = verdicts(rows.iter().map(|r| json!(r)));
    Ok(Json(json!({"models": models, "verdicts": verdicts, "review": review, "looked_at": looked_at, "most": LOOKED_AT})))
}

async fn by_model(app: &Arc<App>, from_ms: i64) -> Result<Vec<Value>, Failure> {
    let mut by: BTreeMap<String, [u64; 3]> = BTreeMap::new();
    for sum in app.state.store.response_sums(from_ms).await.map_err(failure)? {
        let [requests, refusals, filtered] = by.entry(sum.model).or_default();
        *requests += sum.requests;
        *refusals += sum.refusals;
        *filtered += if sum.finish == "content_filter" { sum.requests } else { 0 };
    }
    let shown = |(model, [requests, refusals, filtered]): (String, [u64; 3])| json!({"model": model, "requests": requests, "refusals": refusals, "filtered": filtered});
    Ok(by.into_iter().map(shown).collect())
}

/// The guard's verdicts on a response, where there are any.
fn guard(response: &Value) -> &[Value] {
    response.pointer("/settlement/guard").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Counts of verdicts, most first, and responses for review, newest first.
fn verdicts(responses: impl Iterator<Item = Value>) -> (Vec<Value>, Vec<Value>) {
    let mut counts: BTreeMap<[String; 4], u64> = BTreeMap::new();
    let mut review = Vec::new();
    for mut response in responses {
        let text = |v: &Value, name: &str| v[name].as_str().unwrap_or("").to_owned();
        let model = text(&response, "model");
        let mut acted = false;
        for verdict in guard(&response) {
            let key = [text(verdict, "policy"), text(verdict, "stage"), text(verdict, "action"), model.clone()];
            acted |= !QUIET.contains(&&*key[2]);
            *counts.entry(key).or_default() += 1;
        }
        let settlement = &response["settlement"];
        let wanted = acted || settlement["refusal"] == true || settlement["finish"] == "content_filter";
        if wanted && review.len() < MOST {
            if let Some(fields) = response.as_object_mut() {
                fields.remove("route");
            }
            review.push(response);
        }
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let shown = |([policy, stage, action, model], n): ([String; 4], u64)| json!({"policy": policy, "stage": stage, "action": action, "model": model, "count": n});
    (counts.into_iter().map(shown).collect(), review)
}

/// `{users, standings, source}`: hashed end users of the last `days` by answers that
/// were filtered or refused, worst first, whom the accounts know; and where those
/// stand whom the guard counts strikes against, under hashes of its own.
pub(super) async fn abuse(
    State(app): Shared,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, Failure> {
    let filter = UsageFilter { from_ms: Some(period_ms(&query)?), ..UsageFilter::default() };
    let limits = app.tables.now().config.guard.abuse.as_ref().map(|a| a.limits());
    let standings = match limits {
        Some(limits) => {
            let mut all = app.state.store.abuse_users(&limits).await.map_err(failure)?;
            all.truncate(MOST);
            json!(all)
        }
        None => json!(null),
    };
    let Some(accounts) = &app.state.accounts else {
        return Ok(Json(json!({"users": [], "standings": standings, "source": null})));
    };
    let sums = accounts.usage_sums(&filter, &[Dimension::EndUser, Dimension::Finish]).await.map_err(account_failure)?;
    let mut users: BTreeMap<String, [u64; 4]> = BTreeMap::new();
    let mut unnamed = 0;
    for sum in sums {
        let [user, finish] = &*sum.of else { continue };
        if user.is_empty() {
            unnamed += sum.requests;
            continue;
        }
        let [requests, filtered, refused, errors] = users.entry(user.clone()).or_default();
        *requests += sum.requests;
        *filtered += if finish == "content_filter" { sum.requests } else { 0 };
        *errors += if finish == "error" { sum.requests } else { 0 };
        *refused += sum.refusals;
    }
    let known = users.len();
    let mut users: Vec<_> = users.into_iter().filter(|(_, [_, filtered, refused, _])| filtered + refused > 0).collect();
    users.sort_by_key(|(_, [_, filtered, refused, _])| std::cmp::Reverse((*filtered, *refused)));
    users.truncate(MOST);
    let shown = |(user, [requests, filtered, refused, errors]): (String, [u64; 4])| {
        json!({"end_user": user, "requests": requests, "filtered": filtered, "refusals": refused, "errors": errors})
    };
    let users: Vec<Value> = users.into_iter().map(shown).collect();
    Ok(Json(json!({"users": users, "standings": standings, "known": known, "unnamed_requests": unnamed, "source": "accounts"})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_counted_and_what_acted_is_for_review() {
        let response = |id: &str, guard: Value, refusal: bool| {
            json!({"id": id, "model": "m", "route": {"long": 1}, "settlement": {"refusal": refusal, "finish": "stop", "guard": guard}})
        };
        let verdict = |policy: &str, action: &str| json!({"policy": policy, "stage": "answer", "action": action, "kind": "email"});
        let rows = [
            response("a", json!([verdict("pii", "redact"), verdict("pii", "redact"), verdict("topics", "allow")]), false),
            response("b", json!([verdict("topics", "pass")]), false),
            response("c", json!(null), true),
            json!({"id": "d", "model": "n", "settlement": null}),
            json!({"id": "e", "model": "n", "settlement": {"finish": "content_filter", "guard": [verdict("pii", "block")]}}),
        ];
        let (counts, review) = verdicts(rows.into_iter());
        assert_eq!(counts[0], json!({"policy": "pii", "stage": "answer", "action": "redact", "model": "m", "count": 2}));
        assert_eq!(counts.len(), 4);
        let ids: Vec<&str> = review.iter().map(|r| r["id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["a", "c", "e"]);
        assert!(review.iter().all(|r| r.get("route").is_none()));
    }
}
