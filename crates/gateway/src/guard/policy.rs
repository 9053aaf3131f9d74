//! A policy at work: its settings with everything compiled, and who it is for.

use super::{
    Action, CheckKind, Stage, Who,
    categories::Scores,
    injection, lexicon,
    phrases::Phrases,
    schema::Schema,
    settings::{PolicySettings, Release, listed},
    takedown::Takedowns,
};
use crate::{config::ConfigError, embed::EncoderId, head::Head};
use ashlar_text::detect::{Finding, Kind, Kinds, Scanner};
use std::{collections::BTreeMap, ops::Range, sync::Arc};

/// The score from which on a category is violated where nothing is said.
const THRESHOLD: f64 = 0.5;

/// A policy.
pub(crate) struct Policy {
    pub(super) name: String,
    pub(super) settings: PolicySettings,
    pub(super) action: Action,
    pub(super) check: Check,
}

/// What a policy looks for, compiled.
pub(super) enum Check {
    Pii(Scanner),
    Phrases { deny: Phrases<String>, allow: Phrases<()> },
    Moderation,
    Injection,
    /// A classifier.
    Head(Arc<Head>),
    Judge,
    Schema(Option<Arc<Schema>>),
    Takedown(Arc<Takedowns>),
}

/// Bytes of a text that violate, and as what.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Hit {
    pub(super) span: Range<usize>,
    pub(super) kind: String,
    /// What it is replaced by.
    pub(super) tag: String,
}

impl From<Finding> for Hit {
    fn from(f: Finding) -> Self {
        Self { span: f.start..f.end, kind: f.kind.as_str().into(), tag: f.kind.tag().into() }
    }
}

impl Policy {
    pub(super) fn new(name: &str, settings: &PolicySettings, takedowns: &Arc<Takedowns>, encoder: Option<&EncoderId>) -> Result<Self, ConfigError> {
        let invalid = |key: &str, why: String| ConfigError::Invalid { path: format!("guard.policies.{name}.{key}"), why };
        let kind = settings.check.ok_or_else(|| invalid("check", "it is missing".into()))?;
        let phrases = |key: &str, list: &[String]| {
            Phrases::new(list.iter().map(|p| (p.clone(), p.clone()))).map_err(|why| invalid(key, why))
        };
        let check = match kind {
            CheckKind::Pii => {
                let named: Result<Kinds, _> = settings.kinds.iter().map(|k| k.parse::<Kind>()).collect();
                let named = named.map_err(|e| invalid("kinds", e.to_string()))?;
                Check::Pii(Scanner::new(if named.is_empty() { Kinds::ALL } else { named }))
            }
            CheckKind::Phrases => Check::Phrases {
                deny: phrases("phrases", &settings.phrases)?,
                allow: Phrases::new(settings.allow.iter().map(|p| (p.clone(), ()))).map_err(|why| invalid("allow", why))?,
            },
            CheckKind::Moderation => Check::Moderation,
            CheckKind::Injection => Check::Injection,
            CheckKind::Head => {
                let path = settings.head.clone().unwrap_or_default();
                let read = || {
                    let encoder = encoder.ok_or("it reads an encoder's vectors, and there is no [encoder]")?;
                    let json = std::fs::read(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
                    Head::from_json(&json, encoder).map_err(|e| e.to_string())
                };
                let head = read().map_err(|why| invalid("head", why))?;
                let graded = std::iter::once(&settings.thresholds).chain(settings.tenants.values()).flat_map(BTreeMap::keys);
                if let Some(odd) = graded.into_iter().find(|l| *l != "all" && !head.labels.contains(l)) {
                    return Err(invalid("thresholds", format!("the head has no label {odd:?}; it has {}", head.labels.join(", "))));
                }
                Check::Head(Arc::new(head))
            }
            CheckKind::Judge => Check::Judge,
            CheckKind::Schema => {
                let read = |path: &std::path::PathBuf| {
                    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
                    Schema::parse(&text).map(Arc::new)
                };
                let own = settings.schema_file.as_ref().map(read).transpose();
                Check::Schema(own.map_err(|why| invalid("schema_file", why))?)
            }
            CheckKind::Takedown => Check::Takedown(takedowns.clone()),
        };
        Ok(Self { name: name.to_owned(), settings: settings.clone(), action: settings.action(), check })
    }

    /// Whether it holds for what `who` asks of `model` at `stage`.
    pub(super) fn applies(&self, stage: Stage, model: &str, who: &Who) -> bool {
        let s = &self.settings;
        let among = |list: &[String], name: Option<&str>| list.is_empty() || name.is_some_and(|n| listed(list, n));
        let (key, team) = (who.key.as_deref(), who.team.as_deref());
        let excepted = [key, team].into_iter().flatten().any(|n| listed(&s.except, n));
        s.on.contains(&stage) && among(&s.models, Some(model)) && among(&s.keys, key) && among(&s.teams, team) && !excepted
    }

    /// Whether an answer's text must wait for this policy.
    pub(super) fn holds(&self) -> bool {
        self.action.enforces() && self.settings.release == Release::After
    }

    /// How much a violation counts against its end user.
    pub(super) fn strike(&self, stage: Stage) -> f64 {
        let counts = stage == Stage::Request && matches!(self.action, Action::Block | Action::Flag);
        self.settings.strike.unwrap_or(if counts { 1.0 } else { 0.0 })
    }

    /// The score from which on `category` is violated by `who`.
    pub(super) fn threshold(&self, category: &str, who: &Who) -> f64 {
        let own = |list: &BTreeMap<String, f64>| list.get(category).or_else(|| list.get("all")).copied();
        let tenant = [&who.key, &who.team].into_iter().flatten().find_map(|t| self.settings.tenants.get(t.as_str()));
        tenant.and_then(own).or_else(|| own(&self.settings.thresholds)).unwrap_or(THRESHOLD)
    }

    /// What is found in `text` byte by byte, in order.
    pub(super) fn hits(&self, text: &str) -> Vec<Hit> {
        match &self.check {
            Check::Pii(scanner) => scanner.find(text).into_iter().map(Hit::from).collect(),
            Check::Phrases { deny, allow } => {
                // Where each ends that is allowed, or one that began before it.
                let mut allowed: Vec<(usize, usize)> = allow.find(text).into_iter().map(|a| (a.span.start, a.span.end)).collect();
                allowed.sort_unstable();
                let mut last = 0;
                for (_, end) in &mut allowed {
                    last = last.max(*end);
                    *end = last;
                }
                let within = |span: &Range<usize>| {
                    let before = allowed.partition_point(|(start, _)| *start <= span.start);
                    before > 0 && span.end <= allowed[before - 1].1
                };
                let found = deny.find(text).into_iter().filter(|m| !within(&m.span));
                found.map(|m| Hit { span: m.span, kind: deny.value(m.pattern).cloned().unwrap_or_default(), tag: "<REMOVED>".into() }).collect()
            }
            Check::Takedown(takedowns) => takedowns
                .find(text, self.settings.words)
                .into_iter()
                .map(|span| Hit { span, kind: "takedown".into(), tag: "<REMOVED>".into() })
                .collect(),
            _ => Vec::new(),
        }
    }

    /// [`Self::hits`], and the prefix of `text` that they are done with, whatever
    /// follows.
    pub(super) fn scan(&self, text: &str) -> (Vec<Hit>, usize) {
        match &self.check {
            Check::Pii(scanner) => {
                let (found, settled) = scanner.find_settled(text);
                (found.into_iter().map(Hit::from).collect(), settled.min(text.len()))
            }
            Check::Phrases { deny, allow } => (self.hits(text), deny.settled(text).min(allow.settled(text))),
            Check::Takedown(takedowns) => (self.hits(text), takedowns.settled(text, self.settings.words)),
            _ => (Vec::new(), text.len()),
        }
    }

    /// What the scores of `text` violate: kind and score.
    pub(super) fn graded(&self, text: &str, who: &Who) -> Vec<(String, f64)> {
        match &self.check {
            Check::Moderation => self.above(&lexicon::scores(text), who),
            Check::Injection => {
                let score = injection::score(text);
                let over = score >= self.threshold("injection", who);
                over.then(|| ("injection".to_owned(), score)).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Whether it takes its time, and is asked for windows of a text.
    pub(super) fn asks(&self) -> bool {
        matches!(self.check, Check::Judge | Check::Head(_))
    }

    /// The categories whose scores reach their thresholds.
    pub(super) fn above(&self, scores: &Scores, who: &Who) -> Vec<(String, f64)> {
        let over = scores.iter().filter(|(c, s)| *s >= self.threshold(c.as_str(), who));
        over.map(|(c, s)| (c.as_str().to_owned(), s)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    fn policy(toml: &str) -> Policy {
        let config = Config::parse(&format!("[guard.policies.p]\n{toml}")).unwrap();
        Policy::new("p", &config.guard.policies["p"], &Arc::default(), None).unwrap()
    }

    fn who(key: &str, team: &str) -> Who {
        let some = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        Who { key: some(key), team: some(team) }
    }

    #[test]
    fn it_holds_for_those_it_lists() {
        let p = policy("check = \"pii\"\non = [\"answer\"]\nmodels = [\"chat*\"]\nteams = [\"team-a\", \"team-b\"]\nexcept = [\"key-9\"]");
        for (stage, model, key, team, holds) in [
            (Stage::Answer, "chat-1", "", "team-a", true),
            (Stage::Request, "chat-1", "", "team-a", false),
            (Stage::Answer, "other", "", "team-a", false),
            (Stage::Answer, "chat-1", "", "team-c", false),
            (Stage::Answer, "chat-1", "", "", false),
            (Stage::Answer, "chat-1", "key-9", "team-a", false),
        ] {
            assert_eq!(p.applies(stage, model, &who(key, team)), holds, "{model} {key} {team}");
        }
    }

    #[test]
    fn a_tenants_threshold_goes_before_the_others() {
        let p = policy("check = \"moderation\"\nthresholds = { all = 0.7, violence = 0.9 }\ntenants = { team-a = { violence = 0.1 } }");
        assert_eq!(p.threshold("violence", &who("", "")), 0.9);
        assert_eq!(p.threshold("violence", &who("k", "team-a")), 0.1);
        assert_eq!(p.threshold("hate", &who("", "team-a")), 0.7);
    }

    #[test]
    fn what_is_allowed_is_no_hit() {
        let p = policy("check = \"phrases\"\nphrases = [\"falcon\"]\nallow = [\"peregrine falcon\"]");
        let text = "a peregrine falcon, not project Falcon";
        let hits: Vec<_> = p.hits(text).into_iter().map(|h| h.span).collect();
        assert_eq!(hits, [32..38]);
    }
}
