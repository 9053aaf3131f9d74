//! The router and its life: bind, serve, stop.
//!
//! Stopping has two phases: new connections are refused and answers in flight
//! may finish for the configured grace; then they are cut off and settle as
//! cancelled. [`serve`] returns only when every settlement is written.

use crate::{
    app::{App, GatewayState},
    console,
    error::{Failure, refuse},
    intake,
    metrics::Metrics,
    recorder::{Ledger, LiveTable},
    reply::{Form, RESPONSE_ID},
    session::{Call, Session},
};
use ashlar_api::{ApiError, ChatRequest, CompletionRequest, ModelList, ModelObject};
use axum::{
    Json, Router,
    extract::{Path, Request, State},
    http::{Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use serde_json::json;
use std::{
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
};

type Shared = State<Arc<App>>;

/// How long connections may take to close once their answers are cut off.
const CLOSING: Duration = Duration::from_secs(2);

/// Serves `state` on `listener` until `shutdown` is ready, then stops in order.
///
/// # Errors
/// When the listener's address cannot be read or accepting fails.
pub async fn serve(
    listener: TcpListener,
    state: GatewayState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let listen = listener.local_addr()?;
    let grace = state.config.grace;
    let metrics = Arc::new(Metrics::new());
    let (ledger, writer) = Ledger::new(state.store.clone(), metrics.clone());
    // Owned by this function: it ends with the last recorder, which may be
    // later than our return only when a connection does not close in time.
    tokio::spawn(writer);
    let (cut_off, stop) = watch::channel(false);
    let app = Arc::new(App {
        state,
        ledger,
        metrics,
        live: LiveTable::default(),
        stop,
    });
    let (fired, told) = oneshot::channel();
    let server = axum::serve(listener, router(app.clone(), listen)).with_graceful_shutdown(async {
        shutdown.await;
        let _ = fired.send(());
    });
    let closing = async {
        // Never fired means that the server ended by itself first.
        if told.await.is_ok() {
            tokio::time::sleep(grace).await;
            let _ = cut_off.send(true);
            tokio::time::sleep(CLOSING).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    let mut server = pin!(server.into_future());
    let result = tokio::select! {
        result = &mut server => result,
        () = closing => Ok(()),
    };
    app.ledger.flush().await;
    result
}

fn router(app: Arc<App>, listen: SocketAddr) -> Router {
    let mut router = Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(complete))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics));
    if listen.ip().is_loopback() || app.state.config.open_console {
        router = router.merge(console::routes());
    }
    router
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state((app.clone(), listen), gate))
        .with_state(app)
}

/// First and last for every request: host check, security headers, counting
/// of refusals.
async fn gate(
    State((app, listen)): State<(Arc<App>, SocketAddr)>,
    request: Request,
    next: Next,
) -> Response {
    let checked = intake::check_host(&app.state.config, listen, request.headers(), request.uri());
    let mut response = match checked {
        Ok(()) => next.run(request).await,
        Err(e) => Failure::from(e).into_response(),
    };
    let status = response.status();
    let admitted = response.headers().contains_key(RESPONSE_ID);
    if !admitted && (status.is_client_error() || status.is_server_error()) {
        app.metrics.rejected(status.as_u16());
    }
    for (name, value) in console::SECURITY_HEADERS {
        response
            .headers_mut()
            .entry(name)
            .or_insert(axum::http::HeaderValue::from_static(value));
    }
    response
}

async fn no_route(method: Method, uri: Uri) -> Failure {
    let path: String = uri.path().chars().take(100).collect();
    let message = format!("no route {method} {path}; see /v1/models, /v1/chat/completions, /v1/completions, /health, /metrics");
    refuse(404, "not_found", message).into()
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let path: String = uri.path().chars().take(100).collect();
    let message = format!("{path} does not take {method}; the Allow header says what it takes");
    refuse(405, "method_not_allowed", message).into()
}

async fn chat(State(app): Shared, request: Request) -> Result<Response, Failure> {
    run(&app, request, |b| ChatRequest::parse(b).map(Call::Chat)).await
}

async fn complete(State(app): Shared, request: Request) -> Result<Response, Failure> {
    run(&app, request, |b| CompletionRequest::parse(b).map(Call::Completion)).await
}

/// The one path of every completion endpoint.
async fn run(
    app: &Arc<App>,
    request: Request,
    parse: impl FnOnce(&[u8]) -> Result<Call, ApiError>,
) -> Result<Response, Failure> {
    let arrived = Instant::now();
    let (parts, body) = request.into_parts();
    let body = intake::read_body(&app.state.config, &parts.headers, body).await?;
    let call = parse(&body)?;
    drop(body);
    let target = app.target(call.model())?;
    let form = Form::of(&call, &target.model.id);
    let session = Session::open(app, call, target, arrived).await?;
    form.answer(session).await
}

async fn models(State(app): Shared) -> Json<ModelList> {
    Json(app.models().into())
}

async fn model(State(app): Shared, Path(id): Path<String>) -> Result<Json<ModelObject>, Failure> {
    Ok(Json(app.target(&id)?.model.into()))
}

/// 200 while at least one backend can serve and the ledger takes entries.
async fn health(State(app): Shared) -> Response {
    let backends: Vec<_> = app
        .state
        .backends
        .iter()
        .map(|b| json!({"name": b.name(), "unhealthy": b.stats().unhealthy}))
        .collect();
    let serving = backends.iter().any(|b| b["unhealthy"].is_null());
    let ledger = app.state.store.responses(1).await;
    let ok = serving && ledger.is_ok();
    let status = if ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = json!({
        "status": if ok { "ok" } else { "unavailable" },
        "backends": backends,
        "ledger": ledger.err().map(|e| e.to_string()),
    });
    (status, Json(body)).into_response()
}

async fn metrics(State(app): Shared) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let page = app.metrics.render(app.gauges());
    ([(header::CONTENT_TYPE, kind)], page).into_response()
}
