//! Ingest, score, decide, deduplicate, scrub and pack, as Arrow functions on
//! DataFusion.
//!
//! What may not happen here: a document dropped without a decision that names
//! the rule, its version and the reason ([`curate`] counts and fails
//! otherwise); output that depends on the number of partitions or the order of
//! the sources (the pipeline tests compare bytes); a document that comes back
//! because the copy it duplicated was taken down (tested as a property); a
//! half-written file (each is written beside its place and renamed).
//!
//! Limit: texts and attributes of one run are held in memory; what grows with
//! the square of a bucket, the pairs of near-duplicates, is counted on
//! distinct texts.

#![forbid(unsafe_code)]

mod config;
mod curate;
mod dedup;
mod error;
pub mod functions;
pub mod minhash;
mod pack;
pub mod repetition;
mod source;
mod table;

pub use config::{CurateConfig, MinHashConfig, OnBad};
pub use curate::{CurateReport, KeptDoc, OPS, curate, read_kept, read_observations, read_siblings};
pub use error::DataError;
pub use pack::{DocSpan, PackReport, PackedSample, Qa, pack, read_pack, read_qa};
