//! The HTTP front door: one path for every endpoint, with metering, lineage
//! and a console.
//!
//! [`serve`] answers OpenAI's chat, completions, responses, embeddings and models,
//! Anthropic's messages, rerank, and vLLM's tokenizer below `/v1/` (all of them
//! in `/openapi.json`) from the engine in this process ([`ashlar_api::Backend`]) and
//! from servers over HTTP ([`Config`]), records each response in the ledger, and
//! shows at `/` what is served, what runs, and where an answer comes from.
//! Routes below `/ashlar/` are the console's own.
//!
//! A request's way, one function a step, in `server::run` and `session`:
//! whose key (`door`) → read (`intake`, `ask`) → route (`table`, `route`: a
//! decision, nothing is sent) → reserve (`door`) → admit (`recorder`) → ask
//! (`attempt`, `upstream`) → pieces (`session`) → reply (`reply`) → settle
//! (`recorder`). A guard of the request belongs before asking, a guard of the
//! answer into `Session::read`, through which every piece of every answer passes.
//! `watch` sees all of it, from the first byte that `listener` reads; `metrics` and
//! `telemetry` tell of it.
//!
//! What may not happen here:
//! - an answer that the ledger has not admitted, or a response settled twice
//!   (`recorder`);
//! - a request field that is ignored (`ashlar_api` and `upstream::dialect`
//!   refuse it by name);
//! - text of a client or a document reaching a page unescaped (`graph` escapes,
//!   the console sets text only, and its policy forbids inline scripts);
//! - a page of another origin reading answers (`intake`);
//! - a request that passes a key's limits by, whatever its endpoint (`door`);
//! - a piece of an answer that passes the guard by (`Session::pass`);
//! - an answer that waits for a scrape or a collector (`metrics`, `telemetry`).
//!
//! Tokenizing and inference are the backend's, keys and limits the store's. A
//! server that requires no keys has no console on an open address unless it is
//! asked for.
#![forbid(unsafe_code)]

mod app;
mod ask;
mod attempt;
mod config;
mod console;
mod door;
mod embed;
mod error;
mod graph;
pub mod guard;
mod head;
mod health;
mod intake;
mod ledger;
mod listener;
mod machine;
mod metrics;
mod mirror;
mod node;
mod openapi;
mod protocol;
mod quality;
mod recorder;
pub mod refusal;
mod reply;
mod route;
mod series;
mod server;
mod session;
mod signin;
mod table;
mod telemetry;
mod tls;
mod upstream;
mod watch;

pub use app::{GatewayConfig, GatewayState, Rank, Served};
pub use config::{
    AccountsSettings, BackendSettings, CanarySettings, Config, ConfigError, EncoderSettings, MirrorSettings, ModelSettings, Policy, QualitySettings, RetrySettings, RuleSettings,
    ServerSettings, TargetSettings, TaskSettings, TelemetrySettings,
};
pub use embed::{Embed, EncoderId, EncoderInfo};
pub use head::{Examples, Head, HeadError, HeadKind, Report};
pub use quality::{Point, Quality, QualityError, Scored, Want};
pub use server::{check, serve};
pub use upstream::{Dialect, Tokens};
