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

mod kind;
mod language;
mod numbers;
mod scanner;
mod secrets;
mod vault;

pub use kind::{Finding, Kind, Kinds, UnknownKind};
pub use language::language;
pub use scanner::{MAX_UNSETTLED, Scanner};
pub use vault::{Held, Restorer, Vault};

use regex::Regex;
use std::{collections::BTreeMap, sync::LazyLock};

/// Compiles a pattern written in this crate; the tests of `detect` run each.
fn pattern(source: &str) -> Regex {
    Regex::new(source).expect("a pattern literal of this crate, compiled by its tests")
}

static EMAIL: LazyLock<Regex> = LazyLock::new(|| {
    pattern(concat!(
        r"[\p{L}\p{N}._%+'-]*[\p{L}\p{N}_%+-]",
        r"(?:@|\s?[\[({](?:at|AT|ät)[\])}]\s?)",
        r"(?:[\p{L}\p{N}](?:[\p{L}\p{N}-]*[\p{L}\p{N}])?(?:\.|\s?[\[({](?:dot|DOT|punkt)[\])}]\s?))+",
        r"\p{L}[\p{L}-]*\p{L}",
    ))
});

fn emails(text: &str, out: &mut Vec<Finding>) {
    for m in EMAIL.find_iter(text) {
        // `git@host.org:path` is a repository, no mailbox; nor is `logo@2x.png`.
        let mut after = text[m.end()..].chars();
        let remote = after.next() == Some(':')
            && after
                .next()
                .is_some_and(|c| c.is_alphanumeric() || c == '/');
        let image = [".png", ".jpg", ".svg", ".gif", ".webp"]
            .iter()
            .any(|e| m.as_str().ends_with(e));
        if !remote && !image {
            let lead = m.as_str().len() - m.as_str().trim_start_matches(['\'', '.']).len();
            out.push(Finding {
                kind: Kind::Email,
                start: m.start() + lead,
                end: m.end(),
            });
        }
    }
}

/// Everything of [`Kinds::CORE`] in `text`, in order, disjoint.
pub fn pii(text: &str) -> Vec<Finding> {
    Scanner::new(Kinds::CORE).find(text)
}

/// Joins findings that share a byte.
fn merge(mut found: Vec<Finding>) -> Vec<Finding> {
    found.sort_by_key(|f| (f.start, f.end));
    let mut out: Vec<Finding> = Vec::with_capacity(found.len());
    for f in found {
        match out.last_mut() {
            Some(last) if f.start < last.end => {
                last.end = last.end.max(f.end);
                last.kind = last.kind.min(f.kind);
            }
            _ => out.push(f),
        }
    }
    out
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
