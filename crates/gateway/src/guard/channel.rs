//! One text of an answer, held back until what is to leave is judged.
//!
//! A channel is what a client joins to one text: the content of a choice, its
//! reasoning, the arguments of a call. Text comes in pieces; what leaves is the
//! longest prefix that no policy has still to decide on, with what they found
//! replaced, then with the request's pseudonyms put back. Some of what has left
//! is kept as context, so that a policy sees words before its own.
//!
//! What may not happen here: a finding leaves in part because a piece ended in
//! its middle (the tests cut everywhere, and the whole text's result must come
//! out); a text is held without bound where no policy asks for it.

use super::{
    Action, Stage,
    active::Active,
    policy::{Check, Hit},
};
use ashlar_text::detect::Held;
use std::collections::BTreeSet;

/// Bytes that are kept for their words' sake after all is done with them.
const CONTEXT: usize = 512;

/// A channel.
#[derive(Debug, Default)]
pub(super) struct Channel {
    /// Context, then what waits.
    text: String,
    /// Bytes of the channel before `text`.
    base: usize,
    /// Bytes of `text` that have left.
    out: usize,
    restoring: Held,
    /// Its text is JSON: what is put back into it is escaped.
    json: bool,
    /// It was let go once because another text went on.
    pub(super) passed: bool,
    /// Of each policy.
    marks: Vec<Mark>,
}

#[derive(Debug, Default, Clone)]
struct Mark {
    /// Bytes of the channel whose findings are counted.
    counted: usize,
    /// Bytes of the channel that a judge has seen, or is asked about.
    asked: usize,
    /// Bytes of the channel that were graded.
    graded: usize,
    /// Kinds told of.
    told: BTreeSet<String>,
}

/// What came of a piece.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// This may leave.
    Free(String),
    /// The answer ends here.
    Blocked,
}

/// A judge's turn.
#[derive(Debug, PartialEq)]
pub(super) struct Due {
    pub(super) policy: usize,
    /// What it reads.
    pub(super) window: String,
    /// Bytes of the channel it will have judged.
    pub(super) upto: usize,
}

impl Channel {
    /// The channel `name` of a choice; see `shape`.
    pub(super) fn named(name: &str) -> Self {
        let json = name == "function_call" || name.starts_with("tool_calls/") && name.ends_with("/function");
        Self { json, ..Self::default() }
    }

    pub(super) fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Whether something waits.
    pub(super) fn waits(&self) -> bool {
        self.out < self.text.len()
    }

    fn marks(&mut self, active: &Active) {
        self.marks.resize(active.policies.len(), Mark::default());
    }

    /// What judges have to see now.
    pub(super) fn due(&mut self, active: &Active, end: bool) -> Vec<Due> {
        self.marks(active);
        let mut out = Vec::new();
        let whole = self.base + self.text.len();
        for (policy, p) in active.policies.iter().enumerate().filter(|(_, p)| p.asks()) {
            let mark = &mut self.marks[policy];
            let from = mark.asked.saturating_sub(self.base).min(self.text.len());
            let fresh = self.text.get(from..).unwrap_or("").chars().count();
            if fresh == 0 || (!end && fresh < p.settings.step_chars) {
                continue;
            }
            mark.asked = whole;
            let chars = self.text.chars().count();
            let window = self.text.chars().skip(chars.saturating_sub(p.settings.window_chars.max(fresh))).collect();
            out.push(Due { policy, window, upto: whole });
        }
        out
    }

    /// Lets go what may go; at the `end` all of it.
    pub(super) fn advance(&mut self, active: &Active, end: bool) -> Outcome {
        self.marks(active);
        let whole = self.text.len();
        // Up to where something may leave, and where all policies are done.
        let (mut limit, mut done) = (whole, whole);
        let mut replaced: Vec<Hit> = Vec::new();
        for (policy, mark) in active.policies.iter().zip(&mut self.marks) {
            let mut upto = whole;
            match &policy.check {
                Check::Pii(_) | Check::Phrases { .. } | Check::Takedown(_) => {
                    let (hits, settled) = policy.scan(&self.text);
                    upto = if end { whole } else { settled };
                    for hit in hits {
                        // A run of words taken down is one however it goes on.
                        let certain = hit.span.end <= upto || (policy.action == Action::Block && matches!(policy.check, Check::Takedown(_)));
                        if !certain {
                            continue;
                        }
                        if self.base + hit.span.start >= mark.counted {
                            mark.counted = self.base + hit.span.end;
                            active.found(policy, Stage::Answer, &hit.kind, 1.0);
                            if policy.action == Action::Block {
                                return Outcome::Blocked;
                            }
                        }
                        if policy.action.enforces() {
                            replaced.push(hit);
                        }
                    }
                }
                Check::Moderation | Check::Injection => {
                    // A word that may go on says nothing yet.
                    if !end {
                        upto = self.text.char_indices().rev().find(|(_, c)| !c.is_alphanumeric()).map_or(0, |(i, c)| i + c.len_utf8());
                    }
                    if self.base + upto > mark.graded {
                        mark.graded = self.base + upto;
                        for (kind, score) in policy.graded(self.text.get(..upto).unwrap_or(""), &active.who) {
                            if mark.told.insert(kind.clone()) {
                                active.found(policy, Stage::Answer, &kind, score);
                                if policy.action == Action::Block {
                                    return Outcome::Blocked;
                                }
                            }
                        }
                    }
                }
                // Whoever asks judges waits for them before calling this.
                Check::Judge | Check::Head(_) => upto = mark.asked.saturating_sub(self.base).min(whole),
                // Held against all of it, where there is one.
                Check::Schema(own) if end || (own.is_none() && active.schema.is_none()) => {}
                Check::Schema(_) => upto = 0,
            }
            done = done.min(upto);
            if policy.holds() {
                limit = limit.min(upto);
            }
        }
        // What is replaced is replaced whole.
        while let Some(hit) = replaced.iter().find(|h| h.span.start < limit && limit < h.span.end) {
            limit = hit.span.start;
        }
        let limit = self.text.floor_char_boundary(limit).max(self.out);
        let mut free = self.replace(replaced, limit);
        if let Some(vault) = &active.vault {
            free = self.restoring.push(vault, &free, self.json);
            if end {
                free += &std::mem::take(&mut self.restoring).finish();
            }
        }
        self.out = limit;
        let windows = active.policies.iter().filter(|p| p.asks()).map(|p| p.settings.window_chars * 4);
        self.forget(done.min(limit), windows.max().unwrap_or(0).max(CONTEXT));
        Outcome::Free(free)
    }

    /// What leaves up to `limit`, with `hits` replaced.
    fn replace(&self, mut hits: Vec<Hit>, limit: usize) -> String {
        hits.sort_by_key(|h| (h.span.start, std::cmp::Reverse(h.span.end)));
        let (mut free, mut at) = (String::new(), self.out);
        for hit in hits.iter().filter(|h| h.span.end > self.out && h.span.end <= limit) {
            if hit.span.end <= at {
                continue;
            }
            // What overlaps one replaced before is part of its tag.
            if hit.span.start >= at || at == self.out {
                free.push_str(self.text.get(at..hit.span.start).unwrap_or(""));
                free.push_str(&hit.tag);
            }
            at = hit.span.end;
        }
        free.push_str(self.text.get(at..limit).unwrap_or(""));
        free
    }

    /// Drops what lies more than `context` bytes before `done`, at a word's end where
    /// there is one.
    fn forget(&mut self, done: usize, context: usize) {
        if done < 2 * context {
            return;
        }
        let cut = self.text.floor_char_boundary(done - context);
        let space = self.text.get(cut..done).and_then(|t| t.find(char::is_whitespace));
        let cut = cut + space.unwrap_or(0);
        self.text.drain(..cut);
        self.base += cut;
        self.out -= cut;
    }

    /// What is kept; all of it where there is a schema.
    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::active::tests::active;
    use proptest::prelude::*;

    fn run(active: &Active, pieces: &[&str]) -> Result<String, String> {
        let (mut channel, mut out) = (Channel::default(), String::new());
        for (i, piece) in pieces.iter().enumerate() {
            channel.push(piece);
            match channel.advance(active, i + 1 == pieces.len()) {
                Outcome::Free(text) => out += &text,
                Outcome::Blocked => return Err(out),
            }
        }
        Ok(out)
    }

    const KEY: &str = "AKIAIOSFODNN7EXAMPLE";

    #[test]
    fn the_same_leaves_wherever_a_text_is_cut() {
        let text = format!("Grüße! Write to anna@example.org or use {KEY}; Project  Falcon is 🧱 secret.");
        let a = active("[guard.policies.a]\ncheck = \"pii\"\non_violation = \"redact\"\n[guard.policies.b]\ncheck = \"phrases\"\nphrases = [\"project falcon\"]\non_violation = \"redact\"");
        let want = "Grüße! Write to <EMAIL> or use <SECRET>; <REMOVED> is 🧱 secret.";
        assert_eq!(run(&a, &[&text]).unwrap(), want);
        let cuts: Vec<usize> = text.char_indices().map(|(i, _)| i).collect();
        for one in &cuts {
            assert_eq!(run(&a, &[&text[..*one], &text[*one..]]).unwrap(), want, "{one}");
            for two in cuts.iter().filter(|t| *t > one) {
                assert_eq!(run(&a, &[&text[..*one], &text[*one..*two], &text[*two..]]).unwrap(), want);
            }
        }
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
        assert_eq!(run(&a, &chars).unwrap(), want);
    }

    #[test]
    fn a_block_lets_nothing_of_it_out() {
        let text = format!("The key is {KEY}, keep it.");
        let a = active("[guard.policies.a]\ncheck = \"pii\"");
        for (cut, _) in text.char_indices() {
            let out = run(&a, &[&text[..cut], &text[cut..]]).unwrap_err();
            assert!(text.starts_with(&out) && !out.contains("AKIA"), "{out}");
        }
        let log = a.log.lines();
        assert_eq!((log[0].kind.as_str(), log[0].action), ("secret", Action::Block));
    }

    #[test]
    fn who_only_watches_holds_nothing() {
        let a = active("[guard.policies.a]\ncheck = \"pii\"\non_violation = \"shadow\"\n[guard.policies.b]\ncheck = \"moderation\"\non_violation = \"flag\"");
        let mut channel = Channel::default();
        for piece in ["mail anna@exam", "ple.org. I will ki", "ll you, I will kill you", " now."] {
            channel.push(piece);
            assert_eq!(channel.advance(&a, false), Outcome::Free(piece.into()));
        }
        assert_eq!(channel.advance(&a, true), Outcome::Free(String::new()));
        let lines = a.log.lines();
        let kinds: Vec<_> = lines.iter().map(|l| (l.kind.as_str(), l.count)).collect();
        assert!(kinds.contains(&("email", 1)) && kinds.contains(&("harassment/threatening", 1)), "{kinds:?}");
    }

    #[test]
    fn a_long_answer_keeps_little() {
        let a = active("[guard.policies.a]\ncheck = \"phrases\"\nphrases = [\"never said\"]");
        let mut channel = Channel::default();
        for _ in 0..10_000 {
            channel.push("some words of an answer ");
            channel.advance(&a, false);
            assert!(channel.text.len() < 4 * CONTEXT, "{}", channel.text.len());
        }
    }

    #[test]
    fn judges_read_overlapping_windows() {
        let a = active("[guard.policies.j]\ncheck = \"judge\"\njudge = \"m\"\nwindow_chars = 10\nstep_chars = 4");
        let mut channel = Channel::default();
        channel.push("abc");
        assert_eq!(channel.due(&a, false), []);
        assert_eq!(channel.advance(&a, false), Outcome::Free(String::new()), "not judged, not out");
        channel.push("de");
        assert_eq!(channel.due(&a, false), [Due { policy: 0, window: "abcde".into(), upto: 5 }]);
        assert_eq!(channel.advance(&a, false), Outcome::Free("abcde".into()));
        channel.push("fghijklm");
        assert_eq!(channel.due(&a, false)[0].window, "defghijklm");
        channel.push("n");
        assert_eq!(channel.due(&a, true)[0].window, "efghijklmn");
    }

    /// What is only watched is forgotten no sooner than it is read: a key longer than
    /// the context is found.
    #[test]
    fn a_long_secret_is_found_in_the_shadow_too() {
        let key = format!("-----BEGIN PRIVATE KEY-----\n{}-----END PRIVATE KEY-----", "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7\n".repeat(40));
        for (action, release) in [("shadow", "after"), ("flag", "after"), ("block", "before")] {
            let a = active(&format!("[guard.policies.a]\ncheck = \"pii\"\non_violation = \"{action}\"\nrelease = \"{release}\""));
            let pieces: Vec<&str> = key.as_bytes().chunks(7).map(|c| std::str::from_utf8(c).unwrap()).chain([" end."]).collect();
            let _ = run(&a, &pieces);
            let kinds: Vec<String> = a.log.lines().into_iter().map(|l| l.kind).collect();
            assert_eq!(kinds, ["secret"], "{action} {release}");
        }
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(
            text in "(a@b[.]org|AKIAIOSFODNN7EXAMPLE|4111 1111 1111 1111|falcon|project |é| |\n|x|[.]|7){0,30}",
            cuts in proptest::collection::vec(0usize..400, 0..6),
        ) {
            let a = active("[guard.policies.a]\ncheck = \"pii\"\non_violation = \"redact\"\n[guard.policies.b]\ncheck = \"phrases\"\nphrases = [\"project falcon\", \"x x\"]\non_violation = \"redact\"");
            let mut at: Vec<usize> = cuts.into_iter().map(|c| text.floor_char_boundary(c.min(text.len()))).chain([0, text.len()]).collect();
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let whole = run(&a, &[&text]).unwrap();
            prop_assert_eq!(run(&a, &pieces).unwrap(), whole);
        }
    }
}
