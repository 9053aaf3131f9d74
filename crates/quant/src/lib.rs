//! From a base model and an adapter to one quantized file, and how far that
//! file drifts from the exact one.
//!
//! What may not happen here: a tensor changing type without the report saying
//! so, or metadata of the base being dropped. GPTQ and AWQ are a later issue;
//! this crate rounds to nearest.
//!
//! Rejected: quantizing the embeddings again when the base already carries them
//! in the target type: a second rounding could only lose.

pub mod drift;
pub mod merge;

pub use drift::{Drift, compare};
pub use merge::{MergeError, MergeReport, merge_to_gguf};
