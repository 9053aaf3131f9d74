//! A backend at run time: the way to it, its health, its probes.

use crate::{
    config::{BackendSettings, ConfigError},
    embed::{Embed, EncoderInfo},
    health::{Health, HealthSettings, Unfit},
    machine::Machine,
    upstream::{Anthropic, Dialect, Encode, Link, LinkSettings, Local, OpenAi, Upstream, UpstreamError},
};
use ashlar_api::Backend;
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::task::AbortHandle;

/// A backend.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) dialect: Dialect,
    pub(crate) upstream: Box<dyn Upstream>,
    pub(crate) health: Arc<Health>,
    /// Whose time it is, where that is what is paid for.
    pub(crate) machine: Arc<Machine>,
    /// What it was made of; `None` for an engine.
    pub(crate) settings: Option<BackendSettings>,
    /// It reads texts and generates none.
    pub(crate) encodes: bool,
    prober: Mutex<Option<AbortHandle>>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({}, {})", self.name, self.dialect.as_str())
    }
}

fn health(settings: &BackendSettings) -> Arc<Health> {
    Arc::new(Health::new(HealthSettings {
        failures: settings.breaker_failures,
        open: Duration::from_secs_f64(settings.breaker_open_s),
        trials: settings.breaker_trials,
        probe_failures: settings.probe_failures,
    }))
}

impl Node {
    /// The engine in this process.
    pub(crate) fn engine(backend: Arc<dyn Backend>) -> Self {
        Self::of(backend.name().to_owned(), Dialect::Engine, Box::new(Local(backend)), health(&BackendSettings::default()), None)
    }

    /// The encoder in this process.
    pub(crate) fn encoder(embed: Embed, info: EncoderInfo) -> Self {
        let (name, created) = (info.id.name.clone(), ashlar_core::clock::now_ms() / 1000);
        let upstream = Box::new(Encode { embed, info, created });
        let mut node = Self::of(name, Dialect::Engine, upstream, health(&BackendSettings::default()), None);
        node.encodes = true;
        node
    }

    /// For tests of what does not send.
    #[cfg(test)]
    pub(crate) fn fake(name: &str, upstream: Box<dyn Upstream>) -> Self {
        Self::of(name.to_owned(), Dialect::Vllm, upstream, health(&BackendSettings::default()), None)
    }

    fn of(
        name: String,
        dialect: Dialect,
        upstream: Box<dyn Upstream>,
        health: Arc<Health>,
        settings: Option<BackendSettings>,
    ) -> Self {
        Self { name, dialect, upstream, health, machine: Arc::default(), settings, encodes: false, prober: Mutex::new(None) }
    }

    /// A server.
    ///
    /// # Errors
    /// When its key, certificates or address are unusable.
    pub(crate) fn server(name: &str, settings: &BackendSettings) -> Result<Self, ConfigError> {
        let bad = |why: String| ConfigError::Backend { backend: name.to_owned(), why };
        let dialect = settings.kind.unwrap_or(Dialect::Openai);
        let secret = secret(settings).map_err(bad)?;
        let mut headers: Vec<(String, String)> = settings.headers.clone().into_iter().collect();
        if let Some(key) = &secret {
            headers.push(match dialect {
                Dialect::Anthropic => ("x-api-key".into(), key.clone()),
                _ => ("authorization".into(), format!("Bearer {key}")),
            });
        }
        if dialect == Dialect::Anthropic {
            headers.push(("anthropic-version".into(), crate::upstream::ANTHROPIC_VERSION.into()));
        }
        let link = Link::new(LinkSettings {
            backend: name.to_owned(),
            url: settings.url.clone().or(dialect.default_url().map(str::to_owned)).unwrap_or_default(),
            headers,
            secret,
            ca_file: settings.ca_file.clone(),
            connect: Duration::from_secs_f64(settings.connect_timeout_s),
            first_byte: Duration::from_secs_f64(settings.first_byte_timeout_s),
            idle: Duration::from_secs_f64(settings.idle_timeout_s),
            probe: Duration::from_secs_f64(settings.probe_timeout_s),
            max_answer_bytes: settings.max_answer_bytes,
            max_event_bytes: settings.max_event_bytes,
            idle_connections: settings.idle_connections,
        });
        let link = Arc::new(link.map_err(|e| bad(e.to_string()))?);
        let probe = settings.probe.clone().unwrap_or_else(|| dialect.default_probe().into());
        let upstream: Box<dyn Upstream> = match dialect {
            Dialect::Anthropic => Box::new(Anthropic { link, probe, max_tokens: settings.default_max_tokens }),
            _ => Box::new(OpenAi { link, dialect, probe }),
        };
        Ok(Self::of(name.to_owned(), dialect, upstream, health(settings), Some(settings.clone())))
    }

    /// Whether it could be asked at `now`.
    pub(crate) fn check(&self, now: Instant) -> Result<(), Unfit> {
        if let Some(why) = self.upstream.unhealthy() {
            return Err(Unfit { why, seconds: None });
        }
        self.health.check(now)
    }

    /// Probes it from now on, until it is dropped.
    pub(crate) fn watch(self: &Arc<Self>) {
        let Some(settings) = &self.settings else { return };
        if settings.probe.as_deref() == Some("") {
            return;
        }
        let (node, pause) = (Arc::downgrade(self), Duration::from_secs_f64(settings.probe_interval_s));
        let task = tokio::spawn(async move {
            loop {
                let Some(node) = node.upgrade() else { return };
                let result: Result<(), UpstreamError> = node.upstream.probe().await;
                node.health.probed(result.as_ref().copied(), Instant::now());
                drop(node);
                // Not all at once after a start.
                tokio::time::sleep(pause.mul_f64(0.9 + 0.2 * crate::route::random())).await;
            }
        });
        let mut held = self.prober.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = held.replace(task.abort_handle()) {
            old.abort();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(task) = self.prober.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

/// The key named by the settings.
fn secret(settings: &BackendSettings) -> Result<Option<String>, String> {
    let key = if let Some(name) = &settings.api_key_env {
        std::env::var(name).map_err(|_| format!("api_key_env: the environment variable {name} is not set"))?
    } else if let Some(path) = &settings.api_key_file {
        std::fs::read_to_string(path).map_err(|e| format!("api_key_file: cannot read {}: {e}", path.display()))?
    } else {
        return Ok(None);
    };
    let key = key.trim();
    if key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("the key is empty or holds spaces or unprintable characters".into());
    }
    Ok(Some(key.to_owned()))
}
