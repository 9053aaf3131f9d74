//! Personal data, secrets and the language of a text, found by pattern and
//! checksum.
//!
//! What may not happen here: no network, no model, no panic on any text. A
//! finding is never cut: where two touch, they become one under the stronger
//! kind, so that no part of either is left in the text.
//!
//! Rejected: names and addresses. Without a model they can only be guessed,
//! and a guess that silently misses is worse than a stated limit.
//!
//! ```
//! use ashlar_text::detect::redact;
//! let (text, counts) = redact("Ask anna@example.org, invoice 2024-0815.");
//! assert_eq!(text, "Ask <EMAIL>, invoice 2024-0815.");
//! assert_eq!(counts.values().sum::<u64>(), 1);
//! ```

mod anchors;
mod checks;
mod digits;
mod email;
mod hosts;
mod ids;
mod kind;
mod language;
mod named;
mod phone;
mod scanner;
mod secrets;
mod stream;
mod text;
mod tokens;
mod vault;

pub use kind::{Finding, Kind, Kinds, UnknownKind};
pub use language::language;
pub use scanner::{MAX_UNSETTLED, Scanner};
pub use stream::{Settled, Stream};
pub use vault::{Held, Restorer, Vault};

use std::collections::BTreeMap;

/// Everything of [`Kinds::CORE`] in `text`, in order, disjoint.
pub fn pii(text: &str) -> Vec<Finding> {
    Scanner::new(Kinds::CORE).find(text)
}

/// `text` with every finding replaced by its tag, and how many of each kind.
///
/// Runs until nothing is found, so that `redact(redact(x)) == redact(x)`. It
/// ends because no finding lies inside a tag: each round takes at least one
/// character away that is not part of a tag.
pub fn redact(text: &str) -> (String, BTreeMap<Kind, u64>) {
    let mut counts = BTreeMap::new();
    let mut text = text.to_owned();
    loop {
        let found = pii(&text);
        if found.is_empty() {
            return (text, counts);
        }
        let mut next = String::with_capacity(text.len());
        let mut at = 0;
        for f in found {
            next.push_str(&text[at..f.start]);
            next.push_str(f.kind.tag());
            *counts.entry(f.kind).or_insert(0) += 1;
            at = f.end;
        }
        next.push_str(&text[at..]);
        text = next;
    }
}

#[cfg(test)]
mod tests;
