//! The router and its life: bind, serve, stop.
//!
//! Stopping has three phases. /health says that the server is draining while
//! everything is still answered, so that load balancers take it out before anyone
//! is refused; then new connections are refused and answers in flight may finish
//! for the configured grace; then they are cut off and settle as cancelled.
//! [`serve`] returns only when every settlement is written.

use crate::{
    app::{App, GatewayState},
    ask::{Ask, Endpoint},
    config::{Config, ConfigError},
    console,
    door::{Caller, UsedUp},
    embed,
    error::{Failure, refuse},
    guard, intake,
    ledger::Ledger,
    listener::{self, Arrived, Connections},
    metrics::Metrics,
    mirror::Copies,
    node::Node,
    openapi, protocol,
    recorder::{self, LiveTable},
    reply::{Form, RESPONSE_ID},
    route::Decisions,
    series::Series,
    session::Session,
    signin::{self, Sessions},
    table::{Table, Tables},
    telemetry::{self, Collect, Telemetry},
    tls::Tls,
    upstream::Dialect,
    watch::Watch,
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
};
use serde_json::json;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
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
    Tls::new(&config.server)?;
    telemetry::check(&config.telemetry)?;
    config.accounts.price_list()?;
    let servers = config.backends.iter().filter(|(_, b)| b.kind != Some(Dialect::Engine));
    servers.map(|(name, settings)| Node::server(name, settings)).try_for_each(|n| n.map(drop))
}

/// Serves `state` on `listener` until `shutdown` is ready, then stops in order.
///
/// # Errors
/// When the listener's address cannot be read, the configuration cannot be put to
/// work (see [`check`]), keys are required and there are none, or usage was priced
/// with another list of this version.
pub async fn serve(
    listener: TcpListener,
    mut state: GatewayState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let listen = listener.local_addr()?;
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
    let tls = Tls::new(&table.config.server).map_err(std::io::Error::other)?;
    telemetry::check(&table.config.telemetry).map_err(std::io::Error::other)?;
    table.watch(None);
    let app = Arc::new(App {
        tables: Tables::new(table),
        state,
        ledger,
        metrics,
        live: LiveTable::default(),
        in_flight: Arc::default(),
        series: Series::new(),
        decisions: Decisions::default(),
        copies: Copies::default(),
        telemetry: Telemetry::default(),
        tls: Arc::new(tls),
        connections: Arc::new(Connections::default()),
        draining: AtomicBool::new(false),
        sessions: Sessions::default(),
        guard: Arc::default(),
        stop,
    });
    recorder::record_left(&app);
    follow_telemetry(&app);
    let watching = watch_files(app.clone());
    let burying = record_left(app.clone());
    let forgetting = guard::watch_takedowns(app.clone());
    let (fired, told) = oneshot::channel();
    let stopping = app.clone();
    let server = listener::serve(listener, router(app.clone(), listen), app.tls.clone(), app.connections.clone(), async move {
        shutdown.await;
        stopping.draining.store(true, Relaxed);
        tokio::time::sleep(stopping.tables.now().limits.drain).await;
        let _ = fired.send(());
    });
    let closing = async {
        // Never fired means that the server ended by itself first.
        if told.await.is_ok() {
            tokio::time::sleep(app.tables.now().limits.grace).await;
            let _ = cut_off.send(true);
            tokio::time::sleep(CLOSING).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = server => {}
        () = closing => {}
        never = watching => match never {},
        never = burying => match never {},
        never = forgetting => match never {},
    }
    app.copies.stop().await;
    app.telemetry.flush().await;
    if let Some(accounts) = accounts {
        // What cannot be written now is settled by the next to open them.
        let _ = accounts.flush().await;
        // Found since the last look: nobody else will be told.
        recorder::record_left(&app);
    }
    app.ledger.flush().await;
    Ok(())
}

/// Sends telemetry as the configuration in force says.
fn follow_telemetry(app: &Arc<App>) {
    app.telemetry.follow(&app.tables.now().config.telemetry, || {
        let app = Arc::downgrade(app);
        let collect: Collect = Arc::new(move || app.upgrade().map(|app| app.metrics.collect(&app.gauges())));
        collect
    });
}

/// Reads the configuration file and the certificate again on SIGHUP, and when one
/// is another than a second ago. Bytes are compared, not times: a mounted file that
/// is a link to a folder that was exchanged has any time.
async fn watch_files(app: Arc<App>) -> std::convert::Infallible {
    // Without a file, a terminal that goes away ends the server, as it does others.
    let wanted = app.state.routing_file.is_some();
    let hangup = || tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).ok();
    let mut hangup = wanted.then(hangup).flatten();
    loop {
        let told = async {
            match &mut hangup {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        // Either way the files are read.
        let _ = tokio::time::timeout(LOOK, told).await;
        if let Some(path) = &app.state.routing_file {
            app.tables.read(&app.state, path).await;
        }
        app.tls.follow(&app.tables.now().config.server);
        follow_telemetry(&app);
        for (_, canary) in app.tables.now().canaries() {
            canary.read_scores().await;
        }
    }
}

/// Writes down, a second later at most, what the accounts found of processes that
/// died.
async fn record_left(app: Arc<App>) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(LOOK).await;
        recorder::record_left(&app);
    }
}

fn router(app: Arc<App>, listen: SocketAddr) -> Router {
    let mut router = Router::new();
    for endpoint in Endpoint::ALL {
        let handler = move |State(app): Shared, request: Request| async move { answer(&app, endpoint, request).await };
        router = router.route(endpoint.path(), post(handler));
    }
    router = router
        .route("/v1/moderations", post(moderate))
        .route("/openapi.json", get(|| async { Json(openapi::document()) }))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(health))
        .route("/livez", get(|| async { "ok" }))
        .route("/metrics", get(metrics));
    let config = &app.state.config;
    if listen.ip().is_loopback() || config.open_console || config.require_keys {
        let guarded = console::routes(&app).merge(signin::routes());
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
    let watch = Watch::begin(&app, listen, &request);
    let mut response = match (checked, &watch) {
        (Ok(()), Some(watch)) => watch.during(next.run(request)).await,
        (Ok(()), None) => next.run(request).await,
        (Err(e), _) => Failure::from(e).into_response(),
    };
    let (status, asks_a_model) = (response.status(), watch.is_some());
    if let Some(watch) = watch {
        watch.answered(status.as_u16());
    }
    if app.draining.load(Relaxed) {
        // A connection that is kept would go on being used.
        response.headers_mut().insert(header::CONNECTION, axum::http::HeaderValue::from_static("close"));
    }
    let admitted = response.headers().contains_key(RESPONSE_ID);
    if !admitted && (status.is_client_error() || status.is_server_error()) {
        app.metrics.rejected(status.as_u16());
        // A key that used up its own limit is not for want of anything here.
        let wanting = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
        if asks_a_model && wanting && response.extensions().get::<UsedUp>().is_none() {
            app.series.turned_away();
        }
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
    let arrived = Arrived::of(&request);
    let (parts, body) = request.into_parts();
    let table = app.tables.now();
    let caller = Caller::of(app, &parts.headers)?;
    let body = intake::read_body(&table.limits, &parts.headers, body).await?;
    crate::watch::read_to_its_end();
    let ask = Ask::read(endpoint, parts.headers, body, arrived)?;
    let route = caller.route(app, &table, &ask.model)?;
    let ask = caller.narrow(&table, ask, &route)?;
    if table.wants_vector(&route) {
        embed::question(&app.state, &ask).await;
    }
    let plan = table.plan(&ask, route)?;
    let mut entered = match caller.enter(app, &table, &ask, &plan).await {
        Ok(entered) => entered,
        Err(refused) => return Ok(refused),
    };
    let limits = std::mem::take(&mut entered.limits);
    let (ask, guarded) = guard::request(app, &table, ask, &plan, guard::Who::of(&caller)).await?;
    let session = Session::open(app, &table, &ask, plan, entered, guarded).await?;
    let mut response = Form::of(&ask, &session).answer(session).await?;
    response.headers_mut().extend(limits);
    Ok(response)
}

async fn moderate(State(app): Shared, request: Request) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    let table = app.tables.now();
    let who = guard::Who::of(&Caller::of(&app, &parts.headers)?);
    let body = intake::read_body(&table.limits, &parts.headers, body).await?;
    Ok(guard::moderations(&app, &table, &who, &body).await?)
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

/// 200 while at least one backend can serve and the ledger takes entries and no one
/// told the server to stop: whether to send requests here. Whether the process
/// lives is /livez's to say. A
/// configuration file that was refused is told of, and is no reason to be
/// replaced.
async fn health(State(app): Shared) -> Response {
    let now = Instant::now();
    let table = app.tables.now();
    let unhealthy = |n: &Node| n.check(now).err().map(|u| u.why);
    let backends: Vec<_> =
        table.nodes.iter().map(|n| json!({"name": n.name, "kind": n.dialect, "unhealthy": unhealthy(n)})).collect();
    // The encoder of this process is no reason to send it prompts, if there are others.
    let others = table.nodes.iter().any(|n| !n.encodes);
    let serving = table.nodes.iter().any(|n| n.encodes != others && n.check(now).is_ok());
    let ledger = app.state.store.responses(1).await;
    let draining = app.draining.load(Relaxed);
    let ok = serving && ledger.is_ok() && !draining;
    let status = if ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = json!({
        "status": if draining { "draining" } else if ok { "ok" } else { "unavailable" },
        "backends": backends,
        "config_error": app.tables.file().error,
        "tls_error": app.tls.state().error,
        "telemetry_error": app.telemetry.error(),
        "ledger": ledger.err().map(|e| e.to_string()),
    });
    (status, Json(body)).into_response()
}

async fn metrics(State(app): Shared) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let page = app.metrics.render(&app.gauges());
    ([(header::CONTENT_TYPE, kind)], page).into_response()
}
