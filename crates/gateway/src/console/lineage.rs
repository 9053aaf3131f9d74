//! Where an answer comes from, as a graph and as its picture.

use super::{Shared, failure, request::route};
use crate::{
    app::App,
    error::{Failure, refuse},
    graph::{self, Layout},
};
use ashlar_api::ApiError;
use ashlar_store::{ResponseRow, Trace};
use axum::{
    Json,
    extract::{Path, Query, State},
    http::header,
    response::{IntoResponse as _, Response},
};
use serde_json::{Value, json};
use std::{collections::HashMap, sync::Arc};

/// The picture carries its own styles and may do nothing else.
const PICTURE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// `{trace, response, route}` of any artifact, release, document or response.
pub(super) async fn trace(State(app): Shared, Path(id): Path<String>) -> Result<Json<Value>, Failure> {
    let (trace, mut response) = ranked(&app, &id).await?;
    let id = response.as_ref().map_or_else(String::new, |r| r.admission.id.clone());
    let route = route(&app, &id, &mut response);
    Ok(Json(json!({"trace": trace, "response": response, "route": route})))
}

/// `{id}.svg`, with `?layout=tall` for narrow screens.
pub(super) async fn picture(
    State(app): Shared,
    Path(file): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, Failure> {
    let Some(id) = file.strip_suffix(".svg") else {
        let shown: String = file.chars().take(80).collect();
        let message = format!("pictures are named ID.svg, not {shown:?}");
        return Err(refuse(404, "not_found", message).into());
    };
    let layout = match query.get("layout").map(String::as_str) {
        Some("tall") => Layout::Tall,
        _ => Layout::Wide,
    };
    let (trace, _) = ranked(&app, id).await?;
    let headers = [
        (header::CONTENT_TYPE, "image/svg+xml"),
        (header::CONTENT_SECURITY_POLICY, PICTURE_POLICY),
        (header::CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, graph::svg(&trace, layout)).into_response())
}

/// The trace of `id`; for a response, documents that share text with it first.
async fn ranked(app: &Arc<App>, id: &str) -> Result<(Trace, Option<ResponseRow>), Failure> {
    let store = &app.state.store;
    let mut trace = store.trace(id).await.map_err(failure)?;
    let response = store.response(&trace.root).await.map_err(failure)?;
    if let (Some(rank), Some(row)) = (app.state.rank.clone(), response.clone()) {
        // Comparing with every document is work for a thread that may block.
        let order = tokio::task::spawn_blocking(move || rank(&row))
            .await
            .map_err(|e| ApiError::internal(format!("the overlap search died: {e}")))?;
        trace.rank_documents(&order);
    }
    Ok((trace, response))
}
