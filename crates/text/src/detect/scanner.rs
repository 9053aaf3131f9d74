//! A scanner for a chosen set of kinds, over a whole text or a growing one.

use super::{Finding, Kinds, merge};
use super::{emails, numbers, secrets};

/// How far before the end of a text what is found may still change, in bytes:
/// `text.len() - Scanner::settled(text)` is at most this.
pub const MAX_UNSETTLED: usize = 8192;

/// Finds what [`Kinds`] say. Holds nothing of a text.
#[derive(Debug, Clone, Copy)]
pub struct Scanner {
    kinds: Kinds,
}

impl Scanner {
    /// A scanner for `kinds`.
    pub const fn new(kinds: Kinds) -> Self {
        Self { kinds }
    }

    /// What it looks for.
    pub const fn kinds(&self) -> Kinds {
        self.kinds
    }

    /// Everything found in `text`, in order, disjoint.
    pub fn find(&self, text: &str) -> Vec<Finding> {
        let mut found = Vec::new();
        secrets::find(text, &mut found);
        emails(text, &mut found);
        numbers::find(text, &mut found);
        found.retain(|f| self.kinds.has(f.kind));
        merge(found)
    }

    /// The length of the prefix that nothing appended to `text` can change: no
    /// finding, now or later, starts before it and ends after it, and those
    /// that end by it are final. The rest is at most [`MAX_UNSETTLED`] bytes.
    pub fn settled(&self, text: &str) -> usize {
        let mut at = text.floor_char_boundary(text.len().saturating_sub(MAX_UNSETTLED / 2));
        let found = self.find(text);
        if let Some(f) = found.iter().find(|f| f.start < at && at < f.end) {
            at = f
                .start
                .max(text.floor_char_boundary(text.len().saturating_sub(MAX_UNSETTLED)));
        }
        at
    }
}
