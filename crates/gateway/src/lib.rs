//! The HTTP front door: one path for every endpoint, with metering, lineage
//! and a console.
//!
//! [`serve`] answers OpenAI's `/v1/chat/completions`, `/v1/completions` and
//! `/v1/models` from any [`ashlar_api::Backend`], records each response in the
//! ledger, and shows at `/` what is served, what runs, and where an answer
//! comes from. Routes below `/ashlar/` are the console's own.
//!
//! What may not happen here:
//! - an answer that the ledger has not admitted, or a response settled twice
//!   (`recorder`);
//! - a request field that is ignored (`ashlar_api` refuses it by name);
//! - text of a client or a document reaching a page unescaped (`graph` escapes,
//!   the console sets text only, and its policy forbids inline scripts);
//! - a page of another origin reading answers (`intake`).
//!
//! Tokenizing and inference are the backend's; keys, budgets and routing over
//! replicas are not here yet, so a server on an open address has no console
//! unless it is asked for.
#![forbid(unsafe_code)]

mod app;
mod console;
mod error;
mod graph;
mod intake;
mod metrics;
mod recorder;
pub mod refusal;
mod reply;
mod server;
mod session;

pub use app::{GatewayConfig, GatewayState, Prices, Rank, Served};
pub use server::serve;
