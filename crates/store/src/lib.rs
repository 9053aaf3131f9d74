//! Content-addressed objects, the ledger, runs and the transparency log.
//!
//! A home folder holds everything durable:
//!
//! | path | content |
//! |---|---|
//! | `objects/sha256/ab/<hex>` | immutable bytes, named by their digest |
//! | `accounts.db` | SQLite: keys, limits, usage; elsewhere with PostgreSQL ([`account`]) |
//! | `ledger.db` | SQLite: artifacts, runs, documents, releases, responses |
//! | `log/` | hashes and checkpoint of the Merkle tree over the ledger's entries |
//! | `runs/<key>/` | scratch of runs that are not finished |
//! | `locks/` | advisory locks; empty files that may be removed when nothing runs |
//! | `keys/` | signing keys, written by others |
//!
//! What may not happen here: an object is never changed in place; lineage is
//! never written except through a [`Run`]; no row that the log vouches for is
//! ever updated; each logical step is one transaction, so that `kill -9`
//! anywhere leaves a state that [`Store::open`] repairs or ignores.
//!
//! SQLite runs with a write-ahead log and `synchronous = NORMAL`: a killed
//! process loses nothing, a power cut at most the last responses; releases,
//! takedowns and finished runs are flushed to disk before they are reported.
//!
//! ```
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! use ashlar_core::ArtifactKind;
//! use ashlar_store::{Stage, Store};
//! let home = tempfile::tempdir().unwrap();
//! let store = Store::open(home.path()).await.unwrap();
//! let text = store.put_bytes(ArtifactKind::Source, "text", b"mortar").await.unwrap();
//! for reused in [false, true] {
//!     let outcome = match store.stage("shout", &(), &[("text", text)], "1").await.unwrap() {
//!         Stage::Reused(outcome) => outcome,
//!         Stage::Run(mut run) => {
//!             run.output_bytes("loud", ArtifactKind::Report, "loud", b"MORTAR").await.unwrap();
//!             run.finish(serde_json::json!({})).await.unwrap()
//!         }
//!     };
//!     assert_eq!(outcome.reused, reused);
//! }
//! # });
//! ```

#![forbid(unsafe_code)]

mod abuse;
pub mod account;
mod document;
mod error;
mod find;
mod ledger;
mod lineage;
mod lock;
mod log;
mod object;
pub mod pull;
mod release;
mod response;
mod run;
mod trace;
mod verify;

pub use account::{
    Access, AccountError, AccountSettings, AccountStats, Accounts, Cost, Counts, Database, Denied, Dimension, Exceeded, Finish,
    Key, KeySettings, Left, Limit, Measure, PriceList, Request, Reservation, ReserveError, Scope, Secret, Settled, Standing, Team,
    TeamSettings, TokenClass, Tokens, UsageFilter, UsageRow, UsageSum, Used,
};
pub use abuse::{AbuseEvent, AbuseLimits, AbuseState, AbuseUser};
pub use document::{DocumentRow, Observation};
pub use error::StoreError;
pub use find::{ResponseFilter, ResponseSum};
pub use ledger::{Artifact, Store};
pub use lineage::{Exposed, Takedown};
pub use release::{Release, ReleaseRow};
pub use response::{Admission, Answered, Ended, Recorded, ResponseRow, Settlement};
pub use run::{Exposure, Outcome, Run, Stage};
pub use trace::{Edge, Node, Trace};
pub use verify::LedgerReport;
