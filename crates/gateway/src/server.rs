//! The router and its life: bind, serve, stop.
//!
//! Stopping has two phases: new connections are refused and answers in flight
//! may finish for the configured grace; then they are cut off and settle as
//! cancelled. [`serve`] returns only when every settlement is written.

use crate::{
    app::{App, GatewayState},
    ask::{Ask, Endpoint},
    config::{Config, ConfigError},
    console,
    door::Caller,
    embed,
    error::{Failure, refuse},
    intake,
    metrics::Metrics,
    mirror::Copies,
    node::Node,
    openapi, protocol,
    recorder::{Ledger, LiveTable},
    reply::{Form, RESPONSE_ID},
    route::Decisions,
    session::Session,
    signin::{self, Sessions},
    table::{Table, Tables},
    upstream::Dialect,
};
use ashlar_api::{ModelInfo, ModelList, ModelObject};
use ashlar_store::PriceList;
use axum::{
    Json, Router,
    extract::{Path, Request, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt as _,
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
/// How often the configuration file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Whether the servers of `config` can be set up: keys are there, certificates
/// can be read, addresses are addresses. Nothing is sent.
///
/// # Errors
/// What [`serve`] would refuse at its start.
pub fn check(config: &Config) -> Result<(), ConfigError> {
    config.accounts.price_list()?;
    let servers = config.backends.iter().filter(|(_, b)| b.kind != Some(Dialect::Engine));
    servers.map(|(name, settings)| Node::server(name, settings)).try_for_each(|n| n.map(drop))
}

/// Serves `state` on `listener` until `shutdown` is ready, then stops in order.
///
/// # Errors
/// When the listener's address cannot be read, accepting fails, the
/// configuration cannot be put to work (see [`check`]), keys are required and
/// there are none, or usage was priced with another list of this version.
pub async fn serve(
    listener: TcpListener,
    mut state: GatewayState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let listen = listener.local_addr()?;
    let grace = state.config.grace;
    state.config.require_keys |= state.routing.accounts.require_keys;
    match (&state.accounts, &state.prices) {
        (None, _) if state.config.require_keys => {
            return Err(std::io::Error::other("keys are required, and there are no accounts to check them against"));
        }
        (Some(accounts), Some(list)) => {
            accounts.set_prices(PriceList::clone(list)).await.map_err(std::io::Error::other)?;
        }
        _ => {}
    }
    let accounts = state.accounts.clone();
    let metrics = Arc::new(Metrics::new());
    let (ledger, writer) = Ledger::new(state.store.clone(), metrics.clone());
    // Owned by this function: it ends with the last recorder, which may be
    // later than our return only when a connection does not close in time.
    tokio::spawn(writer);
    let (cut_off, stop) = watch::channel(false);
    let table = Table::build(&state, state.routing.clone(), None).map_err(std::io::Error::other)?;
    table.watch(None);
    let app = Arc::new(App {
        tables: Tables::new(table),
        state,
        ledger,
        metrics,
        live: LiveTable::default(),
        decisions: Decisions::default(),
        copies: Copies::default(),
        sessions: Sessions::default(),
        stop,
    });
    let watching = watch_file(app.clone());
    let (fired, told) = oneshot::channel();
    // A stream's pieces are small: waiting for an acknowledgement before the next
    // one costs 40 ms each.
    let listener = listener.tap_io(|socket| {
        // A socket that is gone already fails at its first use.
        let _ = socket.set_nodelay(true);
    });
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
        never = watching => match never {},
    };
    app.copies.stop().await;
    app.ledger.flush().await;
    if let Some(accounts) = accounts {
        // What cannot be written now is settled by the next to open them.
        let _ = accounts.flush().await;
    }
    result
}

/// Reads the configuration file again on SIGHUP, and when it is another than a
/// second ago, and the scores of canaries as they come. Its bytes are compared, not its times: a mounted file that is a
/// link to a folder that was exchanged has any time.
async fn watch_file(app: Arc<App>) -> std::convert::Infallible {
    let mut hangup = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).ok();
    loop {
        let told = async {
            match &mut hangup {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        // Either way the file is read.
        let _ = tokio::time::timeout(LOOK, told).await;
        if let Some(path) = &app.state.routing_file {
            app.tables.read(&app.state, path).await;
        }
        for (_, canary) in app.tables.now().canaries() {
            canary.read_scores().await;
        }
    }
}

fn router(app: Arc<App>, listen: SocketAddr) -> Router {
    let mut router = Router::new();
    for endpoint in Endpoint::ALL {
        let handler = move |State(app): Shared, request: Request| async move { answer(&app, endpoint, request).await };
        router = router.route(endpoint.path(), post(handler));
    }
    router = router
        .route("/openapi.json", get(|| async { Json(openapi::document()) }))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics));
    let config = &app.state.config;
    if listen.ip().is_loopback() || config.open_console || config.require_keys {
        let guarded = console::routes().merge(signin::routes());
        router = router.merge(guarded.route_layer(middleware::from_fn_with_state(app.clone(), signin::guard)));
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
    let message = format!("no route {method} {path}; see /openapi.json");
    refuse(404, "not_found", message).into()
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let path: String = uri.path().chars().take(100).collect();
    let message = format!("{path} does not take {method}; the Allow header says what it takes");
    refuse(405, "method_not_allowed", message).into()
}

/// Errors in the form of the client's protocol.
async fn answer(app: &Arc<App>, endpoint: Endpoint, request: Request) -> Response {
    let response = run(app, endpoint, request).await.unwrap_or_else(IntoResponse::into_response);
    let failed = response.status().is_client_error() || response.status().is_server_error();
    if endpoint == Endpoint::Messages && failed { protocol::messages::error_response(response).await } else { response }
}

/// The one path of every endpoint.
async fn run(app: &Arc<App>, endpoint: Endpoint, request: Request) -> Result<Response, Failure> {
    let arrived = Instant::now();
    let (parts, body) = request.into_parts();
    let table = app.tables.now();
    let caller = Caller::of(app, &parts.headers)?;
    let body = intake::read_body(&table.limits, &parts.headers, body).await?;
    let ask = Ask::read(endpoint, parts.headers, body, arrived)?;
    let route = caller.route(app, &table, &ask.model)?;
    let ask = caller.narrow(ask, &route)?;
    if table.wants_vector(&route) {
        embed::question(&app.state, &ask).await;
    }
    let plan = table.plan(&ask, route)?;
    let mut entered = match caller.enter(app, &table, &ask, &plan).await {
        Ok(entered) => entered,
        Err(refused) => return Ok(refused),
    };
    let limits = std::mem::take(&mut entered.limits);
    let session = Session::open(app, &table, &ask, plan, entered).await?;
    let mut response = Form::of(&ask, &session).answer(session).await?;
    response.headers_mut().extend(limits);
    Ok(response)
}

async fn models(State(app): Shared, headers: HeaderMap) -> Result<Json<ModelList>, Failure> {
    let caller = Caller::of(&app, &headers)?;
    Ok(Json(caller.models(app.models()).into()))
}

async fn model(State(app): Shared, headers: HeaderMap, Path(id): Path<String>) -> Result<Json<ModelObject>, Failure> {
    let table = app.tables.now();
    let route = Caller::of(&app, &headers)?.route(&app, &table, &id)?;
    let model = table.models().into_iter().find(|m| m.id == route.name);
    let model = model.unwrap_or_else(|| ModelInfo {
        id: route.name.clone(),
        created: 0,
        owned_by: "ashlar".into(),
        context: route.context,
    });
    Ok(Json(model.into()))
}

/// 200 while at least one backend can serve and the ledger takes entries; a
/// configuration file that was refused is told of, and is no reason to be
/// replaced.
async fn health(State(app): Shared) -> Response {
    let now = Instant::now();
    let table = app.tables.now();
    let unhealthy = |n: &Node| n.check(now).err().map(|u| u.why);
    let backends: Vec<_> =
        table.nodes.iter().map(|n| json!({"name": n.name, "kind": n.dialect, "unhealthy": unhealthy(n)})).collect();
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
        "config_error": app.tables.file().error,
        "ledger": ledger.err().map(|e| e.to_string()),
    });
    (status, Json(body)).into_response()
}

async fn metrics(State(app): Shared) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let page = app.metrics.render(app.gauges());
    ([(header::CONTENT_TYPE, kind)], page).into_response()
}
