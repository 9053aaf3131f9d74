//! Requests: the list, a page at a time, and one of them with all that is known.

use super::{Shared, account_failure, failure, number};
use crate::{app::App, error::Failure};
use ashlar_api::ApiError;
use ashlar_core::Decimal;
use ashlar_store::{ResponseFilter, ResponseRow, StoreError, UsageRow};
use axum::{
    Json,
    extract::{Path, Query, State},
};
use serde_json::{Value, json};
use std::collections::HashMap;

/// Responses listed when no limit is asked for, and at most.
const RECENT: (i64, i64) = (50, 500);
/// Characters of an answer in the list; one request shows all of it.
const SHOWN: usize = 400;

/// `{responses, next}`, newest first; `next` is what `before` takes for the page
/// after this one. Filters: `q` (part of id, answer or error), `model`, `backend`,
/// `finish` (`running` too), `refusal=1`.
pub(super) async fn responses(
    State(app): Shared,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, Failure> {
    let limit = number(&query, "limit", RECENT.0, 1..=RECENT.1)?;
    let text = |name: &str| query.get(name).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
    let filter = ResponseFilter {
        from_ms: None,
        text: text("q"),
        model: text("model"),
        backend: text("backend"),
        finish: text("finish"),
        refusal: text("refusal").map(|t| t == "1"),
    };
    let before = text("before").map(|t| {
        let parts = t.split_once(',').and_then(|(at, id)| Some((at.parse::<i64>().ok()?, id.to_owned())));
        parts.ok_or_else(|| {
            let message = "before must be the `next` of an earlier page: a time in ms, a comma, an id";
            ApiError::bad_request(message, Some("before"), Some("invalid_value"))
        })
    });
    let before = before.transpose()?;
    let before = before.as_ref().map(|(at, id)| (*at, id.as_str()));
    // One more than asked for says whether there is another page.
    let most = u32::try_from(limit).unwrap_or(u32::MAX);
    let mut rows = app.state.store.find_responses(&filter, before, most + 1).await.map_err(failure)?;
    let more = rows.len() > most as usize;
    rows.truncate(most as usize);
    let next = rows.last().filter(|_| more).map(|r| format!("{},{}", r.admission.at_ms, r.admission.id));
    for row in &mut rows {
        row.route = None;
        if let Some(answer) = row.settlement.as_mut().and_then(|s| s.answer.as_mut())
            && let Some((cut, _)) = answer.char_indices().nth(SHOWN)
        {
            answer.truncate(cut);
            answer.push('…');
        }
    }
    Ok(Json(json!({"responses": rows, "next": next})))
}

/// `{response, route, usage}`: the ledger's row, why the request went where it
/// went, and who is charged for it, where there are accounts.
pub(super) async fn request(State(app): Shared, Path(id): Path<String>) -> Result<Json<Value>, Failure> {
    let mut response = app.state.store.response(&id).await.map_err(failure)?;
    let route = route(&app, &id, &mut response);
    if response.is_none() && route.is_null() {
        return Err(failure(StoreError::NotFound(id)));
    }
    let usage = match &app.state.accounts {
        Some(accounts) => accounts.usage(&id).await.map_err(account_failure)?,
        None => None,
    };
    let mut usage = usage.map(|u| exact(&u)).unwrap_or_default();
    if let (Some(accounts), Some(id)) = (&app.state.accounts, usage["api_key"].as_str())
        && let Ok(access) = accounts.access(id)
    {
        let team = access.team().map(|t| json!(t.settings.name));
        let name = json!(access.key().settings.name);
        usage["api_key_name"] = name;
        usage["team_name"] = json!(team);
    }
    Ok(Json(json!({"response": response, "route": route, "usage": usage})))
}

/// The row with its costs as decimal text: the ledger's are integers of picos,
/// which JavaScript's numbers do not hold.
fn exact(row: &UsageRow) -> Value {
    let mut shown = json!(row);
    if let Some(fields) = shown.as_object_mut() {
        for (_, cost) in fields.iter_mut().filter(|(name, _)| *name == "cost" || name.starts_with("cost_")) {
            *cost = json!(cost.as_i64().map(|picos| Decimal::from_picos(picos.into())));
        }
    }
    shown
}

/// The decision on a request: as it is while that is remembered, else as it was
/// written down.
pub(super) fn route(app: &App, id: &str, response: &mut Option<ResponseRow>) -> Value {
    let written = response.as_mut().and_then(|r| r.route.take());
    app.decisions.get(id).map_or_else(|| json!(written), |decision| json!(*decision))
}
