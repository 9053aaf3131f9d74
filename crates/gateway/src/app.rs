//! What the server is given, and what all its requests share.

use crate::{
    config::Config,
    embed::{Embed, EncoderInfo},
    ledger::Ledger,
    listener::Connections,
    metrics::{BackendGauges, Gauges, Metrics, ProcessGauges},
    mirror::Copies,
    recorder::LiveTable,
    series::Series,
    route::{Decisions, Route, Target},
    signin::Sessions,
    table::{Table, Tables},
    telemetry::Telemetry,
    tls::Tls,
    upstream::Dialect,
};
use ashlar_api::{ApiError, Backend, BackendStats, ModelInfo};
use ashlar_store::{Accounts, Cost, PriceList, ResponseRow, Store, Tokens};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// Documents that share text with an answer, best first: id and shared span.
pub type Rank = Arc<dyn Fn(&ResponseRow) -> Vec<(String, String)> + Send + Sync>;

/// Limits and manners of the server.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Responses in flight beyond which requests are refused.
    pub max_in_flight: usize,
    /// Time for a request body to arrive.
    pub body_timeout: Duration,
    /// Time for a whole answer.
    pub request_timeout: Duration,
    /// Time in which a server that is told to stop still takes requests, while
    /// /health says that it is draining: what a load balancer needs to notice.
    pub drain: Duration,
    /// Time answers in flight get to finish after that.
    pub grace: Duration,
    /// Whether only requests with a good key are answered, and the console asks
    /// for one. The configuration file may say so, too.
    pub require_keys: bool,
    /// The share of requests that should succeed: what is missing from 1 is the
    /// error budget the console shows.
    pub objective: f64,
    /// Names beyond localhost under which a loopback server may be asked.
    pub allowed_hosts: Vec<String>,
    /// Serve the console and `/ashlar/…`, which show answers to whoever asks,
    /// on an address that is not loopback, though no keys are required.
    pub open_console: bool,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            max_body_bytes: 4 << 20,
            max_in_flight: 256,
            body_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(600),
            drain: Duration::ZERO,
            grace: Duration::from_secs(10),
            require_keys: false,
            objective: 0.999,
            allowed_hosts: Vec::new(),
            open_console: false,
        }
    }
}

/// A release that is being served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// The release's id.
    pub id: String,
    /// Its channel; requests may use it as a model name.
    pub channel: String,
    /// The id under which a backend serves it.
    pub model: String,
}

/// Everything [`crate::serve`] works with.
#[derive(Clone)]
pub struct GatewayState {
    /// Who generates; the first that serves a model answers for it.
    pub backends: Vec<Arc<dyn Backend>>,
    /// Where responses are recorded.
    pub store: Store,
    /// Which served models are releases; the first is shown in the console.
    pub releases: Vec<Served>,
    /// Other names of served models: alias → model id.
    pub aliases: BTreeMap<String, String>,
    /// Finds the documents that share text with an answer.
    pub rank: Option<Rank>,
    /// Limits and manners.
    pub config: GatewayConfig,
    /// Servers, models and rules, as read from a file.
    pub routing: Config,
    /// Names of the file's engines: each with its place in `backends`.
    pub engines: BTreeMap<String, usize>,
    /// Text of documents that were taken down, by hashes; the server fills it from
    /// the store.
    pub takedowns: Arc<crate::guard::Takedowns>,
    /// The file, read again when it changes or on SIGHUP.
    pub routing_file: Option<PathBuf>,
    /// Keys, limits and the usage ledger. Without them nothing is limited, and
    /// the cost of an answer is in its response alone.
    pub accounts: Option<Accounts>,
    /// What tokens and machines cost.
    pub prices: Option<Arc<PriceList>>,
    /// The encoder of `[encoder]`, and which it is; both or neither.
    pub embed: Option<Embed>,
    /// What `embed` is: heads are checked against it.
    pub encoder: Option<EncoderInfo>,
}

impl GatewayState {
    /// A state with default limits, no release, no alias and no other servers.
    pub fn new(backends: Vec<Arc<dyn Backend>>, store: Store) -> Self {
        Self {
            backends,
            store,
            releases: Vec::new(),
            aliases: BTreeMap::new(),
            rank: None,
            config: GatewayConfig::default(),
            routing: Config::default(),
            engines: BTreeMap::new(),
            takedowns: Arc::default(),
            routing_file: None,
            accounts: None,
            prices: None,
            embed: None,
            encoder: None,
        }
    }
}

/// What the requests of one server share.
pub(crate) struct App {
    pub(crate) state: GatewayState,
    pub(crate) tables: Tables,
    pub(crate) ledger: Ledger,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) live: LiveTable,
    /// Places taken of `max_in_flight`.
    pub(crate) in_flight: Arc<AtomicUsize>,
    pub(crate) series: Series,
    pub(crate) decisions: Decisions,
    pub(crate) telemetry: Telemetry,
    pub(crate) tls: Arc<Tls>,
    pub(crate) connections: Arc<Connections>,
    /// The server was told to stop.
    pub(crate) draining: AtomicBool,
    pub(crate) sessions: Sessions,
    pub(crate) copies: Copies,
    /// What the guard counts and knows of users.
    pub(crate) guard: Arc<crate::guard::Shared>,
    /// True once answers in flight must end.
    pub(crate) stop: watch::Receiver<bool>,
}

impl App {
    /// All served models, each once.
    pub(crate) fn models(&self) -> Vec<ModelInfo> {
        self.tables.now().models()
    }

    /// Names a request may use: model ids, then aliases and channels.
    pub(crate) fn names(&self, table: &Table) -> Vec<String> {
        let mut names: Vec<String> = table.models().into_iter().map(|m| m.id).collect();
        let others = table.aliases().chain(self.state.aliases.keys());
        for name in others.chain(self.state.releases.iter().map(|r| &r.channel)) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// Who serves `name`: a model id goes before an alias, an alias before a
    /// release channel.
    pub(crate) fn route(&self, table: &Table, name: &str) -> Result<Arc<Route>, ApiError> {
        table
            .route(name)
            .or_else(|| table.route(self.state.aliases.get(name)?))
            .or_else(|| table.route(self.state.releases.iter().find(|r| r.channel == name).map(|r| &r.model)?))
            .ok_or_else(|| ApiError::unknown_model(name, &self.names(table)))
    }

    /// The release served as `model` by an engine.
    pub(crate) fn release(&self, model: &str) -> Option<String> {
        self.state.releases.iter().find(|r| r.model == model).map(|r| r.id.clone())
    }

    /// The release that `target` serves, where it is an engine's.
    pub(crate) fn release_of(&self, target: &Target) -> Option<String> {
        if target.node.dialect == Dialect::Engine { self.release(&target.model) } else { None }
    }

    /// Whether what `target` uses of its machine is measured.
    pub(crate) fn by_machine(&self, target: &Target, at_ms: i64) -> bool {
        let priced = |list: &Arc<PriceList>| list.by_machine(&target.node.name, at_ms);
        target.node.dialect == Dialect::Engine || self.state.prices.as_ref().is_some_and(priced)
    }

    /// The cost of `tokens` from `target`, or of its machine's time, where there are
    /// no accounts to say it.
    pub(crate) fn cost(&self, target: Option<&Target>, at_ms: i64, tokens: &Tokens, machine_us: u64) -> Cost {
        match (&self.state.prices, target) {
            (Some(list), Some(t)) => list.cost(&t.model, &t.node.name, at_ms, tokens, machine_us),
            _ => Cost { reason: Some("there is no price list".into()), ..Cost::default() },
        }
    }

    /// The engines' figures, added up, and each backend's health.
    pub(crate) fn gauges(&self) -> Gauges {
        let (mut engine, now) = (BackendStats::default(), Instant::now());
        self.state.backends.iter().for_each(|b| engine.add(b.stats()));
        let table = self.tables.now();
        let backends = table.nodes.iter().map(|n| {
            let (requests, errors, opened) = n.health.counts();
            BackendGauges {
                name: n.name.clone(),
                available: n.check(now).is_ok(),
                circuit: n.health.circuit(now).0,
                requests,
                errors,
                opened,
                in_flight: table.in_flight(&n.name),
            }
        });
        let canaries = table.canaries().map(|(model, c)| (model.to_owned(), c.rolled_back().is_some()));
        Gauges {
            in_flight: self.in_flight.load(Relaxed) as u64,
            engine,
            backends: backends.collect(),
            guard: self.guard.counters.counts(),
            canaries: canaries.collect(),
            file: self.tables.file(),
            process: self.process(),
        }
    }

    fn process(&self) -> ProcessGauges {
        let (tls, sent) = (self.tls.state(), &self.telemetry.counts);
        ProcessGauges {
            connections: self.connections.open.load(Relaxed),
            accepted: self.connections.accepted.load(Relaxed),
            handshakes_failed: self.connections.handshakes_failed.load(Relaxed),
            certificate_reloads: tls.reloads,
            certificate_failures: tls.failures,
            draining: self.draining.load(Relaxed),
            spans_sent: sent.sent.load(Relaxed),
            spans_dropped: sent.dropped.load(Relaxed),
            exports_failed: sent.failed.load(Relaxed),
        }
    }
}
