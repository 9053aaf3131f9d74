//! Serving a release or a file through the gateway, and asking it.

use crate::{out, trace::Overlaps};
use anyhow::{Context, Result, anyhow, bail, ensure};
use ashlar_api::Backend;
use ashlar_engine::{EngineConfig, KvType, LocalBackend, MemoryPlan};
use ashlar_gateway::{GatewayState, Served};
use ashlar_store::Store;
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

/// A running server.
pub(crate) struct Server {
    address: SocketAddr,
    model: String,
    plan: MemoryPlan,
    stop: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<()>>,
}

/// One answer and where it is recorded.
pub(crate) struct Answer {
    pub answer: String,
    pub response_id: String,
}

/// Binds `address`, which must be loopback: there are no keys yet to guard any
/// other.
pub(crate) async fn bind(address: &str) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; is another server there? choose another with --listen")
    })?;
    let local = listener.local_addr()?;
    ensure!(
        local.ip().is_loopback(),
        "{local} is not a loopback address, and requests are not yet checked for keys; listen on 127.0.0.1"
    );
    Ok(listener)
}

/// Serves what `model` names: a channel's current release, a GGUF file, or a
/// folder in Hugging Face's layout.
pub(crate) async fn start(
    store: &Store,
    model: &str,
    listener: TcpListener,
    engine: &EngineArgs,
) -> Result<Server> {
    let orphans = store.settle_orphans().await?;
    if orphans > 0 {
        out::note(format!("  {orphans} responses of a killed server settled"));
    }
    let address = listener.local_addr()?;
    let (path, name, served) = match store.current(model).await? {
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
        move || LocalBackend::open(&name, &path, template.as_deref(), config)
    })
    .await??;
    let plan = backend.plan().clone();
    let name = backend.models().first().map_or(name, |m| m.id.clone());
    let mut state = GatewayState::new(vec![Arc::new(backend)], store.clone());
    if let Some(release) = &served {
        state.releases.push(Served { id: release.id.clone(), channel: release.channel.clone(), model: name.clone() });
        if let Some(snapshot) = &release.snapshot {
            let overlaps = Overlaps::load(store, snapshot).await?;
            state.rank = Some(Arc::new(move |row| {
                let answer = row.settlement.as_ref().and_then(|s| s.answer.as_deref());
                answer.map(|a| overlaps.rank(a)).unwrap_or_default()
            }));
        }
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(ashlar_gateway::serve(listener, state, async move {
        // A dropped sender means the server's owner is gone: stop as well.
        let _ = stopped.await;
    }));
    Ok(Server { address, model: name, plan, stop, task })
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
        let mut body = json!({"model": self.model, "messages": messages, "max_tokens": 256});
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
        Ok(Answer { answer, response_id })
    }

    /// Lets answers in flight finish and stops.
    pub(crate) async fn stop(self) -> Result<()> {
        let _ = self.stop.send(());
        Ok(self.task.await??)
    }

    /// Serves until Ctrl-C or a termination signal.
    pub(crate) async fn until_interrupted(self) -> Result<()> {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            r = tokio::signal::ctrl_c() => r?,
            _ = term.recv() => {}
        }
        out::note("\nstopping: answers in flight may finish");
        self.stop().await
    }
}

/// `ashlar serve`.
pub(crate) async fn run(home: &Path, model: &str, listen: &str, engine: &EngineArgs, as_json: bool) -> Result<()> {
    let store = Store::open(home).await?;
    let server = start(&store, model, bind(listen).await?, engine).await?;
    if as_json {
        out::json(&json!({"address": server.address().to_string(), "model": server.model, "memory": server.plan}))?;
    }
    out::note(server.plan.to_string());
    out::note(format!("serving {} on http://{}  (console at /, API at /v1; Ctrl-C stops)", server.model, server.address()));
    server.until_interrupted().await
}
