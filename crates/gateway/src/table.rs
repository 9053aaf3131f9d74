//! What is routed where, as of the last reading of the configuration.
//!
//! A request holds the table it began with; a new table replaces the old one for
//! those that come after. Backends whose settings did not change keep their
//! connections, health and load over a reload.
//!
//! What may not happen here: a file that cannot be used takes anything away. It
//! is refused as a whole, and said so in /health and /metrics.

use crate::{
    app::{GatewayConfig, GatewayState},
    ask::Ask,
    config::{Config, ConfigError, ModelSettings, Policy, RetrySettings},
    guard::Guard,
    mirror::Mirror,
    node::Node,
    route::{Budget, Canary, Choice, Decision, Fit, Load, PrefixIndex, Route, Rule, Target, random},
    upstream::Dialect,
};
use ashlar_api::{ApiError, ModelInfo};
use ashlar_core::{Digest, clock};
use ashlar_store::PriceList;
use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

/// Loads by backend and model.
type Loads = Arc<Mutex<HashMap<(String, String), Arc<Load>>>>;

/// A configuration at work.
pub(crate) struct Table {
    pub(crate) limits: GatewayConfig,
    pub(crate) nodes: Vec<Arc<Node>>,
    pub(crate) retry: RetrySettings,
    pub(crate) budget: Budget,
    /// The file's resolved form.
    pub(crate) config: Config,
    pub(crate) guard: Guard,
    routes: BTreeMap<String, Arc<Route>>,
    /// Alias → route.
    aliases: BTreeMap<String, String>,
    prefix: Arc<PrefixIndex>,
    loads: Loads,
    prices: Option<Arc<PriceList>>,
    created: i64,
}

/// A request's way, decided and not begun.
pub(crate) struct Plan {
    /// The route asked for, then its fallbacks.
    pub(crate) stages: Vec<PlanStage>,
    pub(crate) decision: Arc<Decision>,
}

/// One route of a plan.
pub(crate) struct PlanStage {
    pub(crate) route: Arc<Route>,
    pub(crate) order: Vec<Arc<Target>>,
    pub(crate) blocks: Vec<u64>,
    /// Whether a draw gave it to the route's canary.
    pub(crate) drawn: Option<bool>,
}

impl Table {
    /// Puts `config` to work, keeping what `old` has of the same settings.
    ///
    /// # Errors
    /// When a backend cannot be set up, or an engine is named that was not
    /// opened at the start.
    pub(crate) fn build(state: &GatewayState, config: Config, old: Option<&Self>) -> Result<Self, ConfigError> {
        if old.is_some_and(|o| o.config.accounts != config.accounts) {
            let why = "the accounts are opened when the server starts: restart it for this change".into();
            return Err(ConfigError::Invalid { path: "accounts".into(), why });
        }
        let mut limits = state.config.clone();
        let server = &config.server;
        limits.max_body_bytes = server.max_body_bytes.unwrap_or(limits.max_body_bytes);
        limits.max_in_flight = server.max_in_flight.unwrap_or(limits.max_in_flight);
        limits.objective = server.objective.unwrap_or(limits.objective);
        limits.body_timeout = server.body_timeout_s.map_or(limits.body_timeout, Duration::from_secs_f64);
        limits.drain = server.drain_s.map_or(limits.drain, Duration::from_secs_f64);
        limits.grace = server.grace_s.map_or(limits.grace, Duration::from_secs_f64);
        limits.request_timeout = server.request_timeout_s.map_or(limits.request_timeout, Duration::from_secs_f64);
        if old.is_some_and(|t| t.config.encoder != config.encoder) {
            return Err(ConfigError::Invalid {
                path: "encoder".into(),
                why: "it is opened when the server starts: restart it to use another".into(),
            });
        }
        let kept = |name: &str| old.and_then(|t| t.nodes.iter().find(|n| n.name == name)).cloned();
        let mut nodes: Vec<Arc<Node>> = Vec::new();
        for backend in &state.backends {
            // A backend of a name taken by an earlier one still serves its own
            // models.
            let same = old.and_then(|t| t.nodes.get(nodes.len())).cloned();
            nodes.push(same.unwrap_or_else(|| Arc::new(Node::engine(backend.clone()))));
        }
        if let (Some(embed), Some(info)) = (&state.embed, &state.encoder) {
            let same = old.and_then(|t| t.nodes.get(nodes.len())).cloned();
            nodes.push(same.unwrap_or_else(|| Arc::new(Node::encoder(embed.clone(), info.clone()))));
        }
        let mut named: BTreeMap<String, Arc<Node>> = nodes.iter().rev().map(|n| (n.name.clone(), n.clone())).collect();
        for (name, settings) in &config.backends {
            if settings.kind == Some(Dialect::Engine) {
                // The command line opens engines under their names here.
                let engine = state.engines.get(name).and_then(|i| nodes.get(*i)).cloned();
                let engine = engine.ok_or_else(|| ConfigError::Backend {
                    backend: name.clone(),
                    why: "engines are opened when the server starts: restart it to serve this one".into(),
                })?;
                named.insert(name.clone(), engine);
                continue;
            }
            let node = match kept(name).filter(|n| n.settings.as_ref() == Some(settings)) {
                Some(node) => node,
                None => Arc::new(Node::server(name, settings)?),
            };
            named.insert(name.clone(), node.clone());
            nodes.push(node);
        }
        let prefix = old.map(|t| t.prefix.clone()).unwrap_or_default();
        let loads = old.map(|t| t.loads.clone()).unwrap_or_default();
        let mut routes = BTreeMap::new();
        let mut aliases = BTreeMap::new();
        for (name, settings) in &config.models {
            let mut route = route(name, settings, &named, &prefix, &loads, state.prices.as_ref())?;
            route.fit = Fit::load(name, settings, &route.targets, state.encoder.as_ref().map(|e| &e.id))?;
            // One that was taken back stays so until its settings change.
            let before = old.and_then(|t| t.routes.get(name)?.canary.clone());
            route.canary = settings.canary.as_ref().map(|c| {
                let same = before.filter(|b| b.settings == *c);
                same.unwrap_or_else(|| Arc::new(Canary::new(c.clone())))
            });
            if let Some(m) = &settings.mirror {
                let node = named.get(&m.backend).ok_or_else(|| ConfigError::Invalid {
                    path: format!("models.{name}.mirror.backend"),
                    why: format!("there is no backend {:?}", m.backend),
                })?;
                let before = old.and_then(|t| t.routes.get(name)?.mirror.clone());
                // What was compared goes on being counted while it is the same.
                let same = before.filter(|b| b.settings == *m && Arc::ptr_eq(&b.target.node, node));
                route.mirror = Some(same.unwrap_or_else(|| {
                    let model = model_on(node, m.model.as_ref(), name);
                    Arc::new(Mirror::new(m.clone(), Arc::new(target(node, &model, 0.0, state.prices.clone(), &loads))))
                }));
            }
            routes.insert(name.clone(), Arc::new(route));
            aliases.extend(settings.aliases.iter().map(|a| (a.clone(), name.clone())));
        }
        Ok(Self {
            limits,
            nodes,
            budget: Budget::new(config.retry.budget_ratio, config.retry.budget_per_s, Instant::now()),
            retry: config.retry.clone(),
            guard: Guard::new(&config.guard, state)?,
            config,
            routes,
            aliases,
            prefix,
            loads,
            prices: state.prices.clone(),
            created: clock::now_ms() / 1000,
        })
    }

    /// Starts the probes of backends that `old` did not have.
    pub(crate) fn watch(&self, old: Option<&Self>) {
        for node in &self.nodes {
            if !old.is_some_and(|t| t.nodes.iter().any(|n| Arc::ptr_eq(n, node))) {
                node.watch();
            }
        }
    }

    /// All served models, each once: those configured, then the engines' own.
    pub(crate) fn models(&self) -> Vec<ModelInfo> {
        let configured = self.routes.values().map(|r| ModelInfo {
            id: r.name.clone(),
            created: self.created,
            owned_by: r.targets.first().map_or("ashlar", |t| &t.node.name).to_owned(),
            context: r.context,
        });
        let mut models: Vec<ModelInfo> = configured.collect();
        for model in self.nodes.iter().flat_map(|n| n.upstream.models()) {
            if !models.iter().any(|m| m.id == model.id) {
                models.push(model);
            }
        }
        models
    }

    /// All canaries with their models' names.
    pub(crate) fn canaries(&self) -> impl Iterator<Item = (&str, &Canary)> {
        self.routes.values().filter_map(|r| Some((r.name.as_str(), r.canary.as_deref()?)))
    }

    /// All mirrors with their models' names.
    pub(crate) fn mirrors(&self) -> impl Iterator<Item = (&str, &Mirror)> {
        self.routes.values().filter_map(|r| Some((r.name.as_str(), r.mirror.as_deref()?)))
    }

    /// All configured targets with their routes.
    pub(crate) fn targets(&self) -> impl Iterator<Item = (&Arc<Route>, &Arc<Target>)> {
        self.routes.values().flat_map(|r| r.targets.iter().map(move |t| (r, t)))
    }

    /// Requests the backend of this name is answering.
    pub(crate) fn in_flight(&self, backend: &str) -> u64 {
        let loads = self.loads.lock().unwrap_or_else(PoisonError::into_inner);
        loads.iter().filter(|((b, _), _)| b == backend).map(|(_, l)| u64::from(l.in_flight())).sum()
    }

    /// Names of models beside their ids.
    pub(crate) fn aliases(&self) -> impl Iterator<Item = &String> {
        self.aliases.keys()
    }

    /// The route named `id`, or by one of its aliases, or an engine's model.
    pub(crate) fn route(&self, id: &str) -> Option<Arc<Route>> {
        let configured = self.routes.get(id).or_else(|| self.routes.get(self.aliases.get(id)?));
        configured.cloned().or_else(|| self.engine_route(id))
    }

    fn engine_route(&self, id: &str) -> Option<Arc<Route>> {
        let mut found = None;
        for node in &self.nodes {
            if let Some(model) = node.upstream.models().into_iter().find(|m| m.id == id) {
                found = Some((node, model));
                break;
            }
        }
        let (node, model) = found?;
        let target = target(node, id, 1.0, self.prices.clone(), &self.loads);
        Some(Arc::new(Route {
            name: id.to_owned(),
            policy: Policy::Ordered,
            targets: vec![Arc::new(target)],
            rules: Vec::new(),
            fallback: Vec::new(),
            retries: 0,
            hedge_after: None,
            context: model.context,
            prefill_scale: 1.0,
            prefix: self.prefix.clone(),
            canary: None,
            fit: None,
            mirror: None,
        }))
    }

    /// Whether deciding on a request for `route` takes its prompt's vector: its
    /// own policy does, or that of a model it may come to.
    pub(crate) fn wants_vector(&self, route: &Route) -> bool {
        let others = route.fallback.iter().chain(route.rules.iter().filter_map(|r| r.settings.to.as_ref()));
        let mut others = others.filter_map(|name| self.routes.get(name));
        route.fit.is_some() || others.any(|r| r.fit.is_some() || r.fallback.iter().any(|f| self.routes.get(f).is_some_and(|r| r.fit.is_some())))
    }

    /// Decides on `ask`, which named `route`.
    ///
    /// # Errors
    /// When no target of the route or its fallbacks can take it.
    pub(crate) fn plan(&self, ask: &Ask, mut route: Arc<Route>) -> Result<Plan, ApiError> {
        let now = Instant::now();
        let mut stages = Vec::new();
        let mut records = Vec::new();
        if let Some((i, rule)) = route.rule(ask)
            && let Some(other) = rule.settings.to.as_ref().and_then(|to| self.routes.get(to))
        {
            records.push(crate::route::Stage {
                model: route.name.clone(),
                policy: route.policy,
                rule: Some(rule.name(i)),
                candidates: Vec::new(),
                reason: format!("the rule sends it to {}", other.name),
                judged: None,
            });
            route = other.clone();
        }
        let mut error = None;
        let fallback = route.fallback.iter().filter_map(|f| self.routes.get(f).cloned());
        for route in std::iter::once(route.clone()).chain(fallback) {
            let Choice { order, stage, blocks, drawn, error: none } = route.choose(ask, now, &mut random);
            records.push(stage);
            match none {
                None => stages.push(PlanStage { route, order, blocks, drawn }),
                Some(e) => {
                    error.get_or_insert(e);
                }
            }
        }
        if stages.is_empty() {
            return Err(error.unwrap_or_else(|| ApiError::unavailable("no one can answer")));
        }
        Ok(Plan { stages, decision: Arc::new(Decision::new(&ask.model, records)) })
    }
}

fn load(loads: &Loads, backend: &str, model: &str) -> Arc<Load> {
    let mut loads = loads.lock().unwrap_or_else(PoisonError::into_inner);
    loads.entry((backend.to_owned(), model.to_owned())).or_default().clone()
}

/// What `node` calls the model that is `name` here.
fn model_on(node: &Node, given: Option<&String>, name: &str) -> String {
    // An engine serves one model, whatever it is called here.
    let own = || node.upstream.models().into_iter().next().map(|m| m.id);
    given.cloned().or_else(own).unwrap_or_else(|| name.to_owned())
}

fn target(node: &Arc<Node>, model: &str, weight: f64, prices: Option<Arc<PriceList>>, loads: &Loads) -> Target {
    let mut key = DefaultHasher::new();
    (&node.name, model).hash(&mut key);
    Target {
        node: node.clone(),
        model: model.to_owned(),
        weight,
        prices,
        load: load(loads, &node.name, model),
        key: key.finish(),
    }
}

fn route(
    name: &str,
    settings: &ModelSettings,
    nodes: &BTreeMap<String, Arc<Node>>,
    prefix: &Arc<PrefixIndex>,
    loads: &Loads,
    prices: Option<&Arc<PriceList>>,
) -> Result<Route, ConfigError> {
    let mut targets = Vec::new();
    for (i, t) in settings.targets.iter().enumerate() {
        let node = nodes.get(&t.backend).ok_or_else(|| ConfigError::Invalid {
            path: format!("models.{name}.targets[{i}].backend"),
            why: format!("there is no backend {:?}", t.backend),
        })?;
        let model = model_on(node, t.model.as_ref(), name);
        targets.push(Arc::new(target(node, &model, t.weight, prices.cloned(), loads)));
    }
    let mut rules = Vec::new();
    for (i, rule) in settings.rules.iter().enumerate() {
        rules.push(Rule::new(rule).map_err(|e| ConfigError::Invalid {
            path: format!("models.{name}.rules[{i}].regex"),
            why: e.to_string(),
        })?);
    }
    Ok(Route {
        name: name.to_owned(),
        policy: settings.policy,
        targets,
        rules,
        fallback: settings.fallback.clone(),
        retries: settings.retries,
        hedge_after: settings.hedge_after_s.map(Duration::from_secs_f64),
        context: settings.context.unwrap_or(0),
        prefill_scale: settings.prefill_scale.unwrap_or(1.0),
        prefix: prefix.clone(),
        canary: None,
        fit: None,
        mirror: None,
    })
}

/// The table in force, and what came of the last file.
pub(crate) struct Tables {
    now: RwLock<Arc<Table>>,
    file: Mutex<File>,
}

#[derive(Debug, Default, Clone, serde::Serialize)]
pub(crate) struct File {
    /// Of the text last looked at.
    digest: Option<Digest>,
    /// Times a new file was put to work.
    pub(crate) reloads: u64,
    /// Times one was refused.
    pub(crate) failures: u64,
    /// Why the file as it is now is not in force.
    pub(crate) error: Option<String>,
}

impl Tables {
    pub(crate) fn new(table: Table) -> Self {
        Self { now: RwLock::new(Arc::new(table)), file: Mutex::new(File::default()) }
    }

    /// The table in force.
    pub(crate) fn now(&self) -> Arc<Table> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What came of the last file.
    pub(crate) fn file(&self) -> File {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads `path`; a text other than the last one is put to work, or refused.
    pub(crate) async fn read(&self, state: &GatewayState, path: &Path) {
        let text = tokio::fs::read_to_string(path).await;
        let digest = text.as_ref().ok().map(|t| Digest::of(t.as_bytes()));
        {
            let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
            let unreadable_before = text.is_err() && file.error.is_some() && file.digest.is_none();
            if (digest.is_some() && file.digest == digest) || unreadable_before {
                return;
            }
            file.digest = digest;
        }
        let old = self.now();
        let parsed = text.map_err(|e| format!("cannot read {}: {e}", path.display()));
        let parsed = parsed.and_then(|t| Config::parse(&t).map_err(|e| e.to_string()));
        let built = parsed.and_then(|config| {
            if config == old.config {
                return Ok(None);
            }
            Table::build(state, config, Some(&old)).map(Some).map_err(|e| e.to_string())
        });
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        match built {
            Ok(new) => {
                file.error = None;
                if let Some(table) = new {
                    table.watch(Some(&old));
                    file.reloads += 1;
                    *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
                }
            }
            Err(why) => {
                file.failures += 1;
                file.error = Some(why);
            }
        }
    }
}
