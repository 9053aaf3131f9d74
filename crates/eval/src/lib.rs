//! Tasks, scorers and paired statistics over any [`ashlar_api::Backend`].
//!
//! A task is a list of pinned items; running it yields one [`ItemResult`] an
//! item, never only an average, since two models with equal accuracy may
//! disagree on many items. What may not happen here: knowing which engine
//! answers, or retrying until an answer is right.
//!
//! Rejected: a second model as judge for the handbook task. An answer is right
//! when it holds the item's key strings, which anybody can check by reading.

pub mod stats;
pub mod task;

pub use stats::{McNemar, mcnemar};
pub use task::{ChoiceItem, EvalError, ItemResult, QaItem, Report, run_choice, run_qa};
