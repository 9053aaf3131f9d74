//! Serving a release or a file through the gateway, and asking it.

use crate::{doctor, encoder, out, trace::Overlaps};
use anyhow::{Context, Result, anyhow, bail, ensure};
use ashlar_api::Backend;
use ashlar_engine::{EngineConfig, KvType, LocalBackend, MemoryPlan, PackedCache};
use ashlar_gateway::{Config, Dialect, GatewayState, Served};
use ashlar_store::{AccountSettings, Accounts, ReleaseRow, Store};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

/// How the engine is set up; what is left out fits itself to the machine.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct EngineArgs {
    /// Threads that compute [default: one for each processor].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// How keys and values are kept: f16, bf16, f32 or int8 [default: f16].
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    kv_type: Option<KvType>,
    /// Tokens of context that all requests share [default: what memory holds].
    #[arg(long, value_name = "N")]
    kv_tokens: Option<usize>,
    /// Requests computed together [default: 16].
    #[arg(long, value_name = "N")]
    max_batch: Option<usize>,
    /// Pack the weights anew, and keep no packed form of them in the cache folder.
    #[arg(long)]
    no_packed_cache: bool,
    #[command(flatten)]
    template: TemplateArg,
}

/// The chat template, where the model's own is not to be used.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct TemplateArg {
    /// A chat template in Jinja, in place of the model's own or for one without.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
}

impl TemplateArg {
    /// Engine settings that differ in this alone.
    pub(crate) fn engine(self) -> EngineArgs {
        EngineArgs { template: self, ..EngineArgs::default() }
    }
}

fn kv_type(name: &str) -> Result<KvType, String> {
    let known = KvType::ALL.into_iter().find(|t| t.name() == name);
    known.ok_or_else(|| format!("one of {}", KvType::ALL.map(KvType::name).join(", ")))
}

impl EngineArgs {
    fn config(&self) -> EngineConfig {
        let default = EngineConfig::default();
        EngineConfig {
            threads: self.threads,
            kv_type: self.kv_type.unwrap_or(default.kv_type),
            kv_blocks: self.kv_tokens.map(|t| t.div_ceil(ashlar_model::BLOCK)),
            max_batch: self.max_batch.unwrap_or(default.max_batch),
            ..default
        }
    }
}

/// Packed weights of earlier starts, in at most a quarter of what the disk has free.
fn packed_cache() -> PackedCache {
    let folder = doctor::cache_dir().join("packed");
    PackedCache::new(&folder, doctor::free_bytes(&folder).unwrap_or(0) / 4)
}

/// Who is answered.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(crate) struct DoorArgs {
    /// Answer only requests with a good key (`ashlar keys create`), as `require_keys` in the file does.
    #[arg(long)]
    require_keys: bool,
    /// Answer whoever reaches the address, though it is not loopback and no keys are required.
    #[arg(long, conflicts_with = "require_keys")]
    no_keys: bool,
}

/// A running server.
pub(crate) struct Server {
    address: SocketAddr,
    /// Ids of what is served, the engines' first.
    models: Vec<String>,
    /// The engines' memory.
    plans: Vec<MemoryPlan>,
    accounts: Accounts,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<()>>,
}

/// One answer and where it is recorded.
pub(crate) struct Answer {
    pub answer: String,
    pub response_id: String,
}

/// Binds `address`, which must be loopback unless `open`: keys are required, or
/// it was said that none are.
pub(crate) async fn bind(address: &str, open: bool) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; is another server there? choose another with --listen")
    })?;
    let local = listener.local_addr()?;
    ensure!(
        open || local.ip().is_loopback(),
        "{local} is not a loopback address and no keys are required there: listen on 127.0.0.1, \
         give --require-keys, or --no-keys to answer whoever reaches it"
    );
    Ok(listener)
}

/// A model that was opened.
struct Engine {
    backend: LocalBackend,
    /// The id requests use.
    name: String,
    release: Option<ReleaseRow>,
}

/// Opens what `model` names: a channel's current release, a GGUF file, or a
/// folder in Hugging Face's layout.
async fn open(store: &Store, model: &str, engine: &EngineArgs) -> Result<Engine> {
    let (path, name, release) = match store.current(model).await? {
        Some(release) => {
            if release.revoked {
                out::note(format!(
                    "warning: release {} was exposed to documents taken down since; `ashlar up` rebuilds without them",
                    release.id
                ));
            }
            let path = store
                .path(&release.model)
                .with_context(|| format!("model {} of release {} is gone from the store", release.model, release.id))?;
            let artifact = store.artifact(&release.model).await?;
            let name = artifact.map_or(model.to_string(), |a| a.name.trim_end_matches(".gguf").to_string());
            (path, name, Some(release))
        }
        None if Path::new(model).exists() => {
            let stem = Path::new(model).file_stem().map_or(model.into(), |s| s.to_string_lossy().into_owned());
            (model.into(), stem, None)
        }
        None => bail!("{model:?} is neither a channel with a release in {} nor a file or folder; `ashlar up` makes one", store.home().display()),
    };
    let backend = tokio::task::spawn_blocking({
        let (name, config) = (name.clone(), engine.config());
        let read = |file: &PathBuf| {
            let text = std::fs::read_to_string(file);
            text.with_context(|| format!("cannot read the chat template {}", file.display()))
        };
        let template = engine.template.chat_template.as_ref().map(read).transpose()?;
        let cache = (!engine.no_packed_cache).then(packed_cache);
        move || LocalBackend::open(&name, &path, template.as_deref(), cache.as_ref(), config)
    })
    .await??;
    let name = backend.models().first().map_or(name, |m| m.id.clone());
    Ok(Engine { backend, name, release })
}

/// Serves what `model` names.
pub(crate) async fn start(
    store: &Store,
    model: &str,
    listener: TcpListener,
    engine: &EngineArgs,
) -> Result<Server> {
    start_all(store, Some(model), Config::default(), None, DoorArgs::default(), listener, engine).await
}

/// Serves what `model` names and what `routing`, read from `file`, lists.
async fn start_all(
    store: &Store,
    model: Option<&str>,
    routing: Config,
    file: Option<&Path>,
    door: DoorArgs,
    listener: TcpListener,
    engine: &EngineArgs,
) -> Result<Server> {
    let settings = &routing.accounts;
    let accounts = Accounts::open(AccountSettings::new(settings.database(store.home())?)).await?;
    let prices = settings.price_list()?.map(Arc::new);
    let orphans = store.settle_orphans().await? + accounts.stats().recovered;
    if orphans > 0 {
        out::note(format!("  {orphans} responses of a killed server settled"));
    }
    let address = listener.local_addr()?;
    let mut state = GatewayState::new(Vec::new(), store.clone());
    state.routing = routing;
    state.routing_file = file.map(Path::to_owned);
    state.config.require_keys = door.require_keys;
    (state.accounts, state.prices) = (Some(accounts.clone()), prices);
    if let Some(settings) = state.routing.encoder.clone() {
        let (embed, info) = tokio::task::spawn_blocking(move || encoder::open(&settings)).await??;
        (state.embed, state.encoder) = (Some(embed), Some(info));
    }
    let listed = state.routing.backends.iter().filter(|(_, b)| b.kind == Some(Dialect::Engine));
    let listed = listed.filter_map(|(name, b)| Some((Some(name.clone()), b.serve.clone()?)));
    let wanted: Vec<(Option<String>, String)> = model.map(|m| (None, m.to_owned())).into_iter().chain(listed).collect();
    let (mut plans, mut models) = (Vec::new(), Vec::new());
    for (name, model) in wanted {
        let Engine { backend, name: id, release } = open(store, &model, engine).await?;
        if let Some(name) = name {
            state.engines.insert(name, state.backends.len());
        }
        plans.push(backend.plan().clone());
        state.backends.push(Arc::new(backend));
        models.push(id.clone());
        let Some(release) = release else { continue };
        if let Some(snapshot) = release.snapshot.as_ref().filter(|_| state.rank.is_none()) {
            let overlaps = Overlaps::load(store, snapshot).await?;
            state.rank = Some(Arc::new(move |row| {
                let answer = row.settlement.as_ref().and_then(|s| s.answer.as_deref());
                answer.map(|a| overlaps.rank(a)).unwrap_or_default()
            }));
        }
        state.releases.push(Served { id: release.id, channel: release.channel, model: id });
    }
    models.extend(state.routing.models.keys().filter(|m| !models.contains(m)).cloned().collect::<Vec<_>>());
    // What would only show once the server's task has ended.
    ashlar_gateway::check(&state.routing)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(ashlar_gateway::serve(listener, state, async move {
        // A dropped sender means the server's owner is gone: stop as well.
        let _ = stopped.await;
    }));
    Ok(Server { address, models, plans, accounts, stop, task })
}

pub(crate) fn read_config(path: &Path) -> Result<Config> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Config::parse(&text).with_context(|| path.display().to_string())
}

/// `ashlar gateway check`: the file's resolved form.
pub(crate) fn check_config(path: &Path, as_json: bool) -> Result<()> {
    let config = read_config(path)?;
    ashlar_gateway::check(&config)?;
    if as_json {
        return out::json(&serde_json::to_value(&config)?);
    }
    out::line(toml::to_string(&config)?.trim_end().to_owned());
    out::note(format!("{}: {} backends, {} models, nothing was sent", path.display(), config.backends.len(), config.models.len()));
    Ok(())
}

impl Server {
    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Asks `question` at temperature 0 over HTTP, as any client would.
    pub(crate) async fn ask(&self, question: &str) -> Result<Answer> {
        self.chat(&[json!({"role": "user", "content": question})], Some(0.0)).await
    }

    /// Sends a conversation; the answer is at most 256 tokens.
    pub(crate) async fn chat(&self, messages: &[Value], temperature: Option<f64>) -> Result<Answer> {
        let url = format!("http://{}/v1/chat/completions", self.address);
        let mut body = json!({"model": self.models.first(), "messages": messages, "max_tokens": 256});
        if let Some(t) = temperature {
            body["temperature"] = t.into();
        }
        let reply: Value = tokio::task::spawn_blocking(move || -> Result<Value> {
            let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
            Ok(serde_json::from_str(&agent.post(&url).send_json(&body)?.body_mut().read_to_string()?)?)
        })
        .await??;
        let answer = reply["choices"][0]["message"]["content"].as_str();
        let answer = answer.ok_or_else(|| anyhow!("the server answered {reply}"))?.to_string();
        let response_id = reply["id"].as_str().unwrap_or_default().to_string();
        // The answer's row is written a moment after it; who looks over HTTP waits for that.
        let url = format!("http://{}/ashlar/requests/{response_id}", self.address);
        tokio::task::spawn_blocking(move || ureq::get(&url).call().map(drop)).await??;
        Ok(Answer { answer, response_id })
    }

    /// Lets answers in flight finish and stops.
    pub(crate) async fn stop(self) -> Result<()> {
        let _ = self.stop.send(());
        let done = self.task.await?;
        self.accounts.close().await?;
        Ok(done?)
    }

    /// Serves until Ctrl-C or a termination signal, or until serving fails.
    pub(crate) async fn until_interrupted(mut self) -> Result<()> {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            r = tokio::signal::ctrl_c() => r?,
            _ = term.recv() => {}
            ended = &mut self.task => return Ok(ended??),
        }
        out::note("\nstopping: answers in flight may finish");
        self.stop().await
    }
}

/// `ashlar serve`: `model`, by default the channel `prod` when no file is given,
/// and what the file `config` lists.
pub(crate) async fn run(
    home: &Path,
    model: Option<&str>,
    file: Option<&Path>,
    listen: &str,
    door: DoorArgs,
    engine: &EngineArgs,
    as_json: bool,
) -> Result<()> {
    let store = Store::open(home).await?;
    let model = model.or(file.is_none().then_some("prod"));
    let routing = file.map(read_config).transpose()?.unwrap_or_default();
    let keys = door.require_keys || routing.accounts.require_keys;
    if door.no_keys && routing.accounts.require_keys {
        bail!("--no-keys is given and the file requires keys: leave one out");
    }
    let listener = bind(listen, keys || door.no_keys).await?;
    let scheme = if routing.server.tls_cert.is_some() { "https" } else { "http" };
    let console = if keys || listener.local_addr()?.ip().is_loopback() { "console at /, " } else { "" };
    let server = start_all(&store, model, routing, file, door, listener, engine).await?;
    if as_json {
        let (address, plan) = (server.address().to_string(), server.plans.first());
        out::json(&json!({"address": address, "model": server.models.first(), "models": server.models, "memory": plan}))?;
    }
    server.plans.iter().for_each(|plan| out::note(plan.to_string()));
    let names = server.models.join(", ");
    out::note(format!("serving {names} on {scheme}://{}  ({console}API at /v1; Ctrl-C stops)", server.address()));
    server.until_interrupted().await
}
