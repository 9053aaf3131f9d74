//! Why a request went where it went.

use super::Judged;
use crate::{config::Policy, series::Phases, upstream::Tokens};
use serde::Serialize;
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

/// Requests remembered.
const CAPACITY: usize = 4096;

/// A target that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Candidate {
    pub(crate) backend: String,
    pub(crate) model: String,
    /// What the policy compared; lower is better.
    pub(crate) score: Option<f64>,
    /// How the score comes about.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) detail: String,
    /// Why it was left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) excluded: Option<String>,
}

/// A request that was sent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Attempt {
    pub(crate) backend: String,
    pub(crate) model: String,
    /// Milliseconds after the request's arrival.
    pub(crate) at_ms: f64,
    /// Until the outcome.
    pub(crate) took_ms: f64,
    /// `answered`, `lost the hedge`, or the error.
    pub(crate) outcome: String,
    pub(crate) hedge: bool,
}

/// One model's choice; a fallback is a second one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Stage {
    pub(crate) model: String,
    pub(crate) policy: Policy,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rule: Option<String>,
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) reason: String,
    /// What a classifier said of the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) judged: Option<Judged>,
}

/// The record of one request's way.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Decision {
    /// The model as the client named it.
    pub(crate) asked: String,
    pub(crate) stages: Vec<Stage>,
    attempts: Mutex<Vec<Attempt>>,
    tokens: Mutex<Option<Tokens>>,
    /// Where its time went, once it is over.
    phases: Mutex<Option<Phases>>,
}

impl Decision {
    pub(crate) fn new(asked: &str, stages: Vec<Stage>) -> Self {
        Self { asked: asked.to_owned(), stages, ..Self::default() }
    }

    pub(crate) fn attempted(&self, attempt: Attempt) {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner).push(attempt);
    }

    /// Seconds from arrival until it was sent to who answered, or was asked last.
    pub(crate) fn sent_s(&self) -> f64 {
        let attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        let answered = attempts.iter().find(|a| a.outcome == "answered").or(attempts.last());
        answered.map_or(0.0, |a| a.at_ms / 1e3)
    }

    /// What the request was billed for, and where its time went.
    pub(crate) fn settled(&self, tokens: Tokens, phases: Option<Phases>) {
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) = Some(tokens);
        *self.phases.lock().unwrap_or_else(PoisonError::into_inner) = phases;
    }
}

/// The latest decisions by response id.
#[derive(Debug, Default)]
pub(crate) struct Decisions(Mutex<(HashMap<String, Arc<Decision>>, VecDeque<String>)>);

impl Decisions {
    pub(crate) fn insert(&self, id: &str, decision: Arc<Decision>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, order) = &mut *held;
        if order.len() >= CAPACITY
            && let Some(oldest) = order.pop_front()
        {
            map.remove(&oldest);
        }
        order.push_back(id.to_owned());
        map.insert(id.to_owned(), decision);
    }

    pub(crate) fn get(&self, id: &str) -> Option<Arc<Decision>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.get(id).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_forgotten() {
        let decisions = Decisions::default();
        for i in 0..=CAPACITY {
            decisions.insert(&i.to_string(), Arc::default());
        }
        assert!(decisions.get("0").is_none() && decisions.get("1").is_some());
        assert_eq!(decisions.0.lock().unwrap().0.len(), CAPACITY);
    }
}
