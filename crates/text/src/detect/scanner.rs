//! A scanner for a chosen set of kinds, over a whole text or a growing one.
//!
//! Two passes nominate candidates: bytes that findings are made around (digits,
//! `@`, `:`, `=`, brackets) and the heads of keys. What is nominated is read by
//! hand-written parsers, each a function of at most [`KEPT`] bytes before its
//! start and a bounded number after it. The tests hold both to plain patterns
//! run over the whole text.
//!
//! Rejected: one automaton of all patterns (`regex::RegexSet`). It cannot know
//! where a checksum fails, and on digits its states are those of every kind.

use super::anchors::{self, Anchors, Class};
use super::text::Text;
use super::{Finding, Kind, Kinds};
use std::ops::Range;

/// A finding longer than this comes in pieces of this many bytes: a stream need
/// not wait for the end of what is known to be a secret. Most private keys are
/// shorter (RSA with 4096 bits has 3,272 bytes).
pub(super) const PIECE: usize = 4096;

/// What no parser looks further ahead than to decide whether there is a finding.
const DECIDED: usize = 4096;

/// What no parser looks further back than: a word of context, or the user's
/// name before a password in an address.
pub(super) const KEPT: usize = 512;

/// How far before the end of a text what is found may still change, in bytes:
/// `text.len() - Scanner::settled(text)` is at most this. In prose it is the
/// last word; the most is reached in a private key or token that is still open,
/// which comes in pieces of 4096 bytes.
pub const MAX_UNSETTLED: usize = DECIDED + PIECE + 16;

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

    /// Everything found in `text`, in order, disjoint. A finding longer than
    /// 4096 bytes comes in pieces that touch.
    pub fn find(&self, text: &str) -> Vec<Finding> {
        pieces(text, self.scan(text, 0).0)
    }

    /// The length of the prefix that nothing appended to `text` can change: no
    /// finding, now or later, starts before it and ends after it, and those
    /// that end by it are final. The rest is at most [`MAX_UNSETTLED`] bytes.
    pub fn settled(&self, text: &str) -> usize {
        self.find_settled(text).1
    }

    /// [`Self::find`] and [`Self::settled`] in one pass.
    pub fn find_settled(&self, text: &str) -> (Vec<Finding>, usize) {
        self.find_from(text, 0)
    }

    /// As `find_settled`, of findings that start at `from` or later; no finding
    /// may lie across `from`.
    pub(super) fn find_from(&self, text: &str, from: usize) -> (Vec<Finding>, usize) {
        let (found, pending) = self.scan(text, from);
        let found = pieces(text, found);
        let mut at = pending.min(tail(text)).max(from);
        if let Some(f) = found.iter().find(|f| f.start < at && at < f.end) {
            at = f.start;
        }
        (found, at)
    }

    /// The findings as they are nominated, and where the first candidate starts
    /// that more text could decide otherwise.
    fn scan(&self, text: &str, from: usize) -> (Vec<Finding>, usize) {
        let text = Text::new(text);
        let mut scan = Scan::new(&text, self.kinds, from);
        scan.run();
        (scan.found, scan.pending)
    }
}

/// One pass over a text.
pub(super) struct Scan<'t> {
    pub(super) text: &'t Text<'t>,
    pub(super) kinds: Kinds,
    /// Nothing that starts before it is a finding.
    pub(super) from: usize,
    pub(super) found: Vec<Finding>,
    pub(super) pending: usize,
    /// The end of the last address found.
    pub(super) email_end: usize,
    /// The end of the last token of letters and digits looked at.
    pub(super) token_end: usize,
    /// The last run of a secret's characters.
    pub(super) value: Range<usize>,
    /// The run of a dotted body that was walked last.
    pub(super) dotted: Range<usize>,
    /// Groups of digits that may belong together.
    pub(super) groups: Vec<Range<usize>>,
}

impl<'t> Scan<'t> {
    pub(super) fn new(text: &'t Text<'t>, kinds: Kinds, from: usize) -> Self {
        Self {
            text,
            kinds,
            from,
            found: Vec::new(),
            pending: text.len(),
            email_end: from,
            token_end: from,
            value: 0..0,
            dotted: 0..0,
            groups: Vec::new(),
        }
    }

    fn run(&mut self) {
        const NUMBERS: Kinds = Kinds::ALL.without(Kind::Secret).without(Kind::Email);
        let bytes = self.text.bytes;
        let first = self.from.saturating_sub(KEPT);
        let secrets = self.kinds.has(Kind::Secret);
        let emails = self.kinds.has(Kind::Email);
        let hosts = self.kinds.has(Kind::Ip) || self.kinds.has(Kind::Mac);
        let numbers = self.kinds.any(NUMBERS) || secrets;
        let (mut at, mut anchors) = (first, Anchors::new(bytes));
        while let Some((i, class)) = anchors.next(at) {
            at = i + 1;
            match class {
                Class::Digit if numbers => at = self.digits(i),
                Class::At if emails => self.email(i),
                Class::Open if emails && matches!(self.text.byte(i + 1), b'a' | b'A' | 0xc3 | 0) => {
                    self.email(i);
                }
                Class::Assign => {
                    if secrets {
                        self.assigned(i);
                    }
                    if bytes[i] == b':' && hosts {
                        self.colons(i);
                    }
                }
                Class::Joint if secrets => self.joint(i),
                _ => {}
            }
        }
        if secrets {
            anchors::heads(bytes, first, |start, end| self.head(start, end));
        }
    }

    /// Takes what `f` finds for a candidate that starts at `start`.
    pub(super) fn judge(&mut self, start: usize, f: impl FnOnce() -> Option<Finding>) {
        if start < self.from {
            return;
        }
        let (finding, hit) = self.text.watch(f);
        // What is longer than a parser looks ahead is a finding, and only its
        // end is open.
        let long = finding.is_some_and(|f| f.end - start > DECIDED);
        let open = finding.filter(|_| long).map_or(start, |f| f.end - 1);
        self.pend(hit, open);
        self.found.extend(finding);
    }

    /// A candidate from `start` on is undecided if `hit`.
    pub(super) fn pend(&mut self, hit: bool, start: usize) {
        if hit && start >= self.from {
            self.pending = self.pending.min(start);
        }
    }
}

/// Where candidates may start that text still to come would nominate: the last
/// word and a space after it, or what a candidate can reach back to of it.
fn tail(text: &str) -> usize {
    const REACH: usize = 320;
    let least = text.floor_char_boundary(text.len().saturating_sub(REACH));
    let last = &text[least..];
    let mut chars = last.chars();
    let word = match chars.next_back() {
        Some(c) if c.is_whitespace() => chars.as_str(),
        _ => last,
    };
    let space = word.char_indices().rev().find(|(_, c)| c.is_whitespace());
    least + space.map_or(0, |(i, c)| i + c.len_utf8())
}

/// Joins findings that share a byte, then cuts what is longer than [`PIECE`]
/// bytes (less a character).
pub(super) fn pieces(text: &str, mut found: Vec<Finding>) -> Vec<Finding> {
    if found.len() > 1 {
        found.sort_unstable_by_key(|f| (f.start, f.end));
    }
    let mut out: Vec<Finding> = Vec::with_capacity(found.len());
    let mut at = 0;
    while at < found.len() {
        let chain = at;
        let Finding { kind, start, mut end } = found[at];
        let mut strongest = kind;
        at += 1;
        while let Some(f) = found.get(at).filter(|f| f.start < end) {
            end = end.max(f.end);
            strongest = strongest.min(f.kind);
            at += 1;
        }
        let mut start = start;
        while end - start > PIECE {
            let cut = text.floor_char_boundary(start + PIECE);
            let within = found[chain..at].iter().filter(|f| f.start < cut && f.end > start);
            let kind = within.map(|f| f.kind).min().unwrap_or(strongest);
            out.push(Finding { kind, start, end: cut });
            start = cut;
        }
        let within = found[chain..at].iter().filter(|f| f.end > start);
        let kind = within.map(|f| f.kind).min().unwrap_or(strongest);
        out.push(Finding { kind, start, end });
    }
    out
}
