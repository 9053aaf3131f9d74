//! What the guard did: lines of one response's record, and counters of all.

use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Most lines kept for one response; one more counts the rest.
const MOST: usize = 64;
/// What that one is called.
const MORE: &str = "(more)";

/// Whose text was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// What the client sent.
    Request,
    /// What the model said.
    Answer,
}

impl Stage {
    /// Its name in records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Answer => "answer",
        }
    }
}

/// What is done about a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The request is refused, or the answer ends with `content_filter`.
    Block,
    /// What was found is replaced by its kind.
    Redact,
    /// What was found is replaced by a placeholder, and put back in the answer.
    Pseudonymize,
    /// It passes, and counts against the end user.
    Flag,
    /// It passes, and is written down.
    Shadow,
}

impl Action {
    /// Its name in records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Redact => "redact",
            Self::Pseudonymize => "pseudonymize",
            Self::Flag => "flag",
            Self::Shadow => "shadow",
        }
    }

    /// Whether text must wait for the verdict.
    pub(crate) const fn enforces(self) -> bool {
        matches!(self, Self::Block | Self::Redact | Self::Pseudonymize)
    }
}

/// One line of a response's `guard` field. Holds no text of anyone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The policy's name.
    pub policy: String,
    /// Where.
    pub stage: Stage,
    /// What was done.
    pub action: Action,
    /// What was found: a kind of personal data, a category, a word for a shape.
    pub kind: String,
    /// 0 to 1; 1 where a pattern leaves no doubt.
    pub score: f64,
    /// Characters of the answer that had left when the verdict fell.
    pub released_chars: u64,
    /// How many times.
    pub count: u64,
}

/// The record of one response in the making.
#[derive(Debug, Default)]
pub(crate) struct Log {
    lines: Mutex<Vec<Verdict>>,
    released: AtomicU64,
    /// Microseconds that the request waited for its verdicts.
    waited_us: AtomicU64,
}

impl Log {
    /// Writes a line, or adds to one that says the same; whether it is new.
    pub(crate) fn note(&self, policy: &str, stage: Stage, action: Action, kind: &str, score: f64) -> bool {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |v: &&mut Verdict| v.policy == policy && v.stage == stage && v.action == action && v.kind == kind;
        if let Some(line) = lines.iter_mut().find(same) {
            (line.count, line.score) = (line.count + 1, line.score.max(score));
            return false;
        }
        let mut verdict = Verdict {
            policy: policy.to_owned(),
            stage,
            action,
            kind: kind.to_owned(),
            score,
            released_chars: self.released(),
            count: 1,
        };
        if lines.len() < MOST {
            lines.push(verdict);
            return true;
        }
        match lines.get_mut(MOST) {
            Some(more) => more.count += 1,
            None => {
                (verdict.policy, verdict.kind) = (MORE.into(), MORE.into());
                lines.push(verdict);
            }
        }
        false
    }

    /// `text` has left.
    pub(crate) fn release(&self, text: &str) {
        self.released.fetch_add(text.chars().count() as u64, Relaxed);
    }

    pub(crate) fn released(&self) -> u64 {
        self.released.load(Relaxed)
    }

    /// The request waited as long as this for its verdicts.
    pub(crate) fn waited(&self, time: Duration) {
        self.waited_us.store(u64::try_from(time.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Seconds of [`Log::waited`].
    pub(crate) fn waited_s(&self) -> f64 {
        self.waited_us.load(Relaxed) as f64 / 1e6
    }

    /// The `guard` field; nothing when there is nothing to say.
    pub(crate) fn json(&self) -> Option<String> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        (!lines.is_empty()).then(|| serde_json::to_string(&*lines).unwrap_or_default())
    }

    #[cfg(test)]
    pub(crate) fn lines(&self) -> Vec<Verdict> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Counters of one server. They only grow.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    verdicts: Mutex<BTreeMap<(String, Stage, Action, String), u64>>,
    /// Verdicts of a judge that could not be had.
    judge_failures: AtomicU64,
    /// Texts judged at `/v1/moderations`.
    moderations: AtomicU64,
    /// Requests of throttled or banned end users that were refused.
    abuse_refusals: AtomicU64,
}

/// A moment's view of [`Counters`].
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Counts {
    /// Policy, stage, action, kind, and how many responses.
    pub(crate) verdicts: Vec<(String, Stage, Action, String, u64)>,
    pub(crate) judge_failures: u64,
    pub(crate) moderations: u64,
    pub(crate) abuse_refusals: u64,
}

impl Counters {
    pub(crate) fn verdict(&self, policy: &str, stage: Stage, action: Action, kind: &str) {
        let mut all = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        *all.entry((policy.to_owned(), stage, action, kind.to_owned())).or_default() += 1;
    }

    pub(crate) fn judge_failure(&self) {
        self.judge_failures.fetch_add(1, Relaxed);
    }

    pub(crate) fn moderated(&self, texts: usize) {
        self.moderations.fetch_add(texts as u64, Relaxed);
    }

    pub(crate) fn abuse_refusal(&self) {
        self.abuse_refusals.fetch_add(1, Relaxed);
    }

    /// All of them, for whoever exports them.
        pub(crate) fn counts(&self) -> Counts {
        let all = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        Counts {
            verdicts: all.iter().map(|((p, s, a, k), n)| (p.clone(), *s, *a, k.clone(), *n)).collect(),
            judge_failures: self.judge_failures.load(Relaxed),
            moderations: self.moderations.load(Relaxed),
            abuse_refusals: self.abuse_refusals.load(Relaxed),
        }
    }
}
