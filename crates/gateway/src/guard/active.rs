//! The policies that hold for one request, and what they found.

use super::{
    Stage, Who,
    abuse::{EndUser, Strike},
    judge::{AskJudge, Judgement},
    log::{Counters, Log},
    policy::{Check, Policy},
    schema::Schema,
    settings::OnFailure,
};
use crate::embed::{self, Embed};
use ashlar_text::detect::Vault;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// Labels of a classifier that say that all is well.
const HARMLESS: &[&str] = &["safe", "none", "ok", "harmless"];

/// What guards one request's answer.
pub(crate) struct Active {
    pub(super) policies: Vec<Arc<Policy>>,
    pub(super) who: Who,
    pub(super) log: Arc<Log>,
    pub(super) counters: Arc<Counters>,
    /// The pseudonyms of the request.
    pub(super) vault: Option<Vault>,
    /// The schema that the request asked for.
    pub(super) schema: Option<Arc<Schema>>,
    /// What was said, for a judge of the answer.
    pub(super) said: String,
    pub(super) ask: AskJudge,
    pub(super) embed: Option<Embed>,
    /// Whom strikes are held against; `None` where no one counts or is named.
    pub(super) user: Option<EndUser>,
    pub(super) strikes: Mutex<Vec<Strike>>,
}

impl Active {
    /// Writes the strikes so far down.
    pub(super) async fn strike(&self, response: &str) {
        let strikes = std::mem::take(&mut *self.strikes.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(user) = self.user.as_ref().filter(|_| !strikes.is_empty()) {
            user.strike(response, strikes).await;
        }
    }

    /// Writes down that `policy` found `kind`.
    pub(super) fn found(&self, policy: &Policy, stage: Stage, kind: &str, score: f64) {
        if self.log.note(&policy.name, stage, policy.action, kind, score) {
            self.counters.verdict(&policy.name, stage, policy.action, kind);
            let weight = policy.strike(stage);
            if weight > 0.0 {
                let strike = Strike { policy: policy.name.clone(), kind: kind.to_owned(), weight };
                self.strikes.lock().unwrap_or_else(PoisonError::into_inner).push(strike);
            }
        }
    }

    /// Asks a judge about `window`; whether it is a violation, which is written
    /// down.
    pub(super) async fn judged(&self, policy: &Policy, stage: Stage, window: &str) -> bool {
        let judgement = self.ask(policy, stage, window).await;
        self.weigh(policy, stage, judgement)
    }

    /// A judge's or classifier's word on `window`.
    pub(super) async fn ask(&self, policy: &Policy, stage: Stage, window: &str) -> Result<Judgement, String> {
        match &policy.check {
            Check::Head(head) => {
                let by = self.embed.as_ref().ok_or("there is no encoder")?;
                let limit = Duration::from_secs_f64(policy.settings.timeout_s);
                let rows = tokio::time::timeout(limit, embed::embed(by, vec![window.to_owned()])).await;
                let rows = rows.map_err(|_| format!("no verdict within {} s", limit.as_secs_f64()))?.map_err(|e| e.message)?;
                let row = rows.first().ok_or("the encoder gave nothing")?;
                let scores = head.predict(row).map_err(|e| e.to_string())?;
                let over = head.labels.iter().zip(scores).map(|(l, s)| (l, f64::from(s))).filter(|(l, s)| {
                    !HARMLESS.contains(&l.as_str()) && *s >= policy.threshold(l, &self.who)
                });
                let over: Vec<(String, f64)> = over.map(|(l, s)| (l.clone(), s)).collect();
                Ok(if over.is_empty() { Judgement::Safe } else { Judgement::Unsafe(over) })
            }
            _ => ask(&self.ask, policy, stage, &self.said, window).await,
        }
    }

    /// Writes a judge's word down; whether it is a violation.
    pub(super) fn weigh(&self, policy: &Policy, stage: Stage, judgement: Result<Judgement, String>) -> bool {
        match judgement {
            Ok(Judgement::Safe) => false,
            Ok(Judgement::Unsafe(kinds)) => {
                kinds.iter().for_each(|(kind, score)| self.found(policy, stage, kind, *score));
                true
            }
            Err(_) => {
                self.counters.judge_failure();
                let closed = policy.settings.on_failure == OnFailure::Closed;
                if closed {
                    self.found(policy, stage, "no_verdict", 1.0);
                } else {
                    self.log.note(&policy.name, stage, super::Action::Shadow, "no_verdict", 1.0);
                }
                closed
            }
        }
    }

    /// Whether there is nothing to look at and nothing to put back.
    pub(super) fn idle(&self) -> bool {
        self.policies.is_empty() && self.vault.is_none()
    }

    /// Whether text leaves only once all of it is there.
    pub(super) fn whole(&self) -> bool {
        self.policies.iter().any(|p| matches!(p.check, Check::Schema(_)) && p.holds())
    }

    /// Whether an answer could be changed or ended.
    pub(super) fn enforces(&self) -> bool {
        self.vault.is_some() || self.policies.iter().any(|p| p.action.enforces())
    }
}

/// Asks a judge, for so long and no longer.
pub(super) async fn ask(judge: &AskJudge, policy: &Policy, stage: Stage, said: &str, window: &str) -> Result<Judgement, String> {
    let limit = Duration::from_secs_f64(policy.settings.timeout_s);
    let model = policy.settings.judge.clone().unwrap_or_default();
    let messages = super::judge::messages(policy.settings.protocol, stage, said, window);
    let word = tokio::time::timeout(limit, judge(model, messages)).await;
    let word = word.map_err(|_| format!("no verdict within {} s", limit.as_secs_f64()))??;
    super::judge::parse(&word)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::Config;

    /// The answer's policies of a configuration, with a judge that calls `bad`
    /// unsafe.
    pub(crate) fn active(toml: &str) -> Active {
        let config = Config::parse(toml).unwrap();
        let policies = config.guard.policies.iter().map(|(n, p)| Arc::new(Policy::new(n, p, &Arc::default(), None).unwrap()));
        Active {
            policies: policies.collect(),
            who: Who::default(),
            log: Arc::default(),
            counters: Arc::default(),
            vault: None,
            schema: None,
            said: String::new(),
            ask: Arc::new(|_, messages| {
                let bad = messages.iter().any(|m| m.content.contains("bad"));
                let broken = messages.iter().any(|m| m.content.contains("broken"));
                Box::pin(async move {
                    if broken {
                        return Err("it is not there".into());
                    }
                    Ok(if bad { "unsafe\nS1,S10" } else { "safe" }.to_owned())
                })
            }),
            embed: None,
            user: None,
            strikes: Mutex::default(),
        }
    }
}
