//! Virtual keys and teams: who may ask for what.
//!
//! A secret is 256 random bits behind a fixed word; the database holds its
//! SHA-256 and its first digits, which tell keys apart for people and pick the
//! candidates whose hashes are compared in constant time. A slow hash (argon2,
//! bcrypt) makes guessing a password dear; nobody guesses 256 random bits, and
//! it would cost each request tens of milliseconds.

use super::{
    AccountError,
    limit::{self, Bound, Limit, Scope},
};
use ashlar_core::{Digest, digest::to_hex};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};
use subtle::ConstantTimeEq as _;

const WORD: &str = "sk-ashlar-";
/// Of the 64 digits, those that may be shown: 224 bits stay secret.
const SHOWN: usize = 8;

/// A key's secret, as its holder sends it. Shown once, never stored, and not
/// printed by `{:?}`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(super) fn new() -> Result<Self, AccountError> {
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes).map_err(|e| AccountError::Random(e.to_string()))?;
        Ok(Self(format!("{WORD}{}", to_hex(&bytes))))
    }

    /// Whether `text` means to be a secret of ours, good or not.
    pub fn is_like(text: &str) -> bool {
        text.starts_with(WORD)
    }

    /// The text to hand to the key's holder.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    pub(super) fn prefix(&self) -> &str {
        &self.0[..WORD.len() + SHOWN]
    }

    pub(super) fn hash(&self) -> Digest {
        Digest::of(self.0.as_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}…", self.prefix())
    }
}

/// The part of a presented secret that may be shown, where it has the shape of
/// one of ours.
pub(super) fn shape(text: &str) -> Option<&str> {
    let digits = text.strip_prefix(WORD)?;
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (digits.len() == 64 && digits.bytes().all(hex)).then(|| &text[..WORD.len() + SHOWN])
}

/// What an administrator says about a key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeySettings {
    /// For people.
    pub name: String,
    /// The team's id; its limits hold for the key, too.
    pub team: Option<String>,
    /// Models it may ask for: names, or beginnings that end in `*`. Empty: all.
    pub models: Vec<String>,
    /// What it may use.
    pub limits: Vec<Limit>,
    /// What each end user behind it may use.
    pub user_limits: Vec<Limit>,
    /// The highest priority it may ask for; without it, any.
    pub max_priority: Option<i32>,
    /// Carried into each usage row.
    pub tags: BTreeMap<String, String>,
    /// When it ends.
    pub expires_ms: Option<i64>,
    /// Whether its holder may see the console: every request, answers included.
    pub console: bool,
    /// Whether it is switched off for now.
    pub disabled: bool,
}

/// What an administrator says about a team.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TeamSettings {
    /// For people.
    pub name: String,
    /// Models its keys may ask for, as [`KeySettings::models`]; a key may narrow
    /// this, not widen it.
    pub models: Vec<String>,
    /// What its keys may use together.
    pub limits: Vec<Limit>,
    /// What each end user behind its keys may use.
    pub user_limits: Vec<Limit>,
    /// Carried into each usage row; a key's tag of the same name wins.
    pub tags: BTreeMap<String, String>,
    /// Whether all its keys are switched off for now.
    pub disabled: bool,
}

/// A team.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Team {
    /// `team-…`.
    pub id: String,
    /// When it was made.
    pub created_ms: i64,
    /// What is said about it.
    #[serde(flatten)]
    pub settings: TeamSettings,
}

/// A key without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Key {
    /// `key-…`.
    pub id: String,
    /// The first digits of its secret.
    pub prefix: String,
    /// When it was made.
    pub created_ms: i64,
    /// When it was revoked, for good.
    pub revoked_ms: Option<i64>,
    /// Until when the secret before the last rotation is good.
    pub old_until_ms: Option<i64>,
    /// What is said about it.
    #[serde(flatten)]
    pub settings: KeySettings,
}

/// Why a request is not let in by its key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denied {
    /// No such key. Says no more, so that nobody learns which keys exist.
    #[error("this key is not known")]
    Unknown,
    /// Revoked.
    #[error("key {0} was revoked")]
    Revoked(String),
    /// Its time is over.
    #[error("key {id} expired at {}", ashlar_core::clock::rfc3339(*at_ms))]
    Expired {
        /// The key.
        id: String,
        /// When.
        at_ms: i64,
    },
    /// It or its team is switched off.
    #[error("key {0} is disabled")]
    Disabled(String),
    /// Not this model.
    #[error("key {id} may not ask for model {model:?}")]
    Model {
        /// The key.
        id: String,
        /// What was asked for.
        model: String,
    },
    /// Revocations have not been seen for longer than is promised.
    #[error("keys were last read {age_ms} ms ago, at most {most_ms} ms are allowed")]
    Stale {
        /// Since the last reading.
        age_ms: u64,
        /// The bound.
        most_ms: u64,
    },
}

impl KeySettings {
    pub(super) fn check(&self) -> Result<(), AccountError> {
        check(&self.name, &self.models, &self.limits, &self.user_limits)
    }
}

impl TeamSettings {
    pub(super) fn check(&self) -> Result<(), AccountError> {
        check(&self.name, &self.models, &self.limits, &self.user_limits)
    }
}

/// What keys and teams have in common.
fn check(name: &str, models: &[String], limits: &[Limit], user_limits: &[Limit]) -> Result<(), AccountError> {
    check_name(name)?;
    check_models(models)?;
    limit::check("limits", limits)?;
    limit::check("user_limits", user_limits)
}

fn check_name(name: &str) -> Result<(), AccountError> {
    let why = match name.chars().count() {
        0 => "is empty",
        201.. => "is longer than 200 characters",
        _ if name.contains('\0') => "contains NUL",
        _ => return Ok(()),
    };
    Err(AccountError::Setting { field: "name".into(), why: why.into() })
}

fn check_models(models: &[String]) -> Result<(), AccountError> {
    for (i, m) in models.iter().enumerate() {
        if m.is_empty() || m.strip_suffix('*').unwrap_or(m).contains(['*', '\0']) {
            let why = format!("{m:?} is neither a model's name nor the beginning of one and a final *");
            return Err(AccountError::Setting { field: format!("models[{i}]"), why });
        }
    }
    Ok(())
}

/// Whether `pattern`, a name or the beginning of one and a final `*`, means `model`.
pub(super) fn means(pattern: &str, model: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => model.starts_with(start),
        None => pattern == model,
    }
}

fn fits(models: &[String], model: &str) -> bool {
    models.is_empty() || models.iter().any(|pattern| means(pattern, model))
}

/// A key with its team, ready for requests.
#[derive(Debug)]
pub struct Access {
    key: Key,
    team: Option<Team>,
    pub(super) bounds: Vec<Bound>,
    /// Owner and limits of what each end user may use.
    per_user: Vec<(String, Vec<Limit>)>,
    pub(super) tags: BTreeMap<String, String>,
}

impl Access {
    pub(super) fn new(key: Key, team: Option<Team>) -> Self {
        let bound = |scope, id: &str, limits: &[Limit]| -> Vec<Bound> {
            limits.iter().map(|l| Bound::new(scope, id, l)).collect()
        };
        let mut bounds = bound(Scope::Key, &key.id, &key.settings.limits);
        let mut per_user = vec![(key.id.clone(), key.settings.user_limits.clone())];
        let mut tags = key.settings.tags.clone();
        if let Some(team) = &team {
            bounds.extend(bound(Scope::Team, &team.id, &team.settings.limits));
            per_user.push((team.id.clone(), team.settings.user_limits.clone()));
            for (k, v) in &team.settings.tags {
                tags.entry(k.clone()).or_insert_with(|| v.clone());
            }
        }
        per_user.retain(|(_, limits)| !limits.is_empty());
        Self { key, team, bounds, per_user, tags }
    }

    /// The key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Its team.
    pub fn team(&self) -> Option<&Team> {
        self.team.as_ref()
    }

    /// The tags of key and team.
    pub fn tags(&self) -> &BTreeMap<String, String> {
        &self.tags
    }

    /// What the end user of this hash may use.
    pub(super) fn user_bounds(&self, user: &str) -> impl Iterator<Item = Bound> {
        self.per_user.iter().flat_map(move |(owner, limits)| {
            let owner = format!("{owner}/user:{user}");
            limits.iter().map(move |limit| Bound::new(Scope::User, &owner, limit))
        })
    }

    /// Whether it may ask for `model`.
    ///
    /// # Errors
    /// [`Denied::Model`].
    pub fn allows(&self, model: &str) -> Result<(), Denied> {
        let team = self.team.as_ref().is_none_or(|t| fits(&t.settings.models, model));
        if team && fits(&self.key.settings.models, model) {
            return Ok(());
        }
        Err(Denied::Model { id: self.key.id.clone(), model: model.into() })
    }

    /// `asked`, or the key's ceiling where that is lower.
    pub fn priority(&self, asked: i32) -> i32 {
        self.key.settings.max_priority.map_or(asked, |most| asked.min(most))
    }

    /// Whether it is good at `now_ms`.
    pub(super) fn good(&self, now_ms: i64) -> Result<(), Denied> {
        let id = || self.key.id.clone();
        let (key, team) = (&self.key.settings, self.team.as_ref());
        if self.key.revoked_ms.is_some() {
            Err(Denied::Revoked(id()))
        } else if let Some(at_ms) = key.expires_ms.filter(|at| *at <= now_ms) {
            Err(Denied::Expired { id: id(), at_ms })
        } else if key.disabled || team.is_some_and(|t| t.settings.disabled) {
            Err(Denied::Disabled(id()))
        } else {
            Ok(())
        }
    }
}

/// Whether two hashes are the same, in a time that does not depend on where
/// they differ.
pub(super) fn same(a: &Digest, b: &Digest) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_long_random_and_not_printed() {
        let (a, b) = (Secret::new().unwrap(), Secret::new().unwrap());
        assert_ne!(a, b);
        assert_eq!(shape(a.reveal()), Some(a.prefix()));
        assert!(!format!("{a:?}").contains(&a.reveal()[WORD.len() + SHOWN..]));
        assert!(same(&a.hash(), &Digest::of(a.reveal().as_bytes())) && !same(&a.hash(), &b.hash()));
        for bad in ["", "sk-ashlar-", &a.reveal()[1..], &a.reveal().to_uppercase(), &format!("{}0", a.reveal())] {
            assert_eq!(shape(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_key_narrows_its_team() {
        let models = |m: &[&str]| m.iter().map(|m| (*m).to_owned()).collect::<Vec<_>>();
        let team = TeamSettings { name: "t".into(), models: models(&["gpt-*", "local"]), ..Default::default() };
        let key = |m: &[&str]| {
            let settings = KeySettings { name: "k".into(), models: models(m), ..Default::default() };
            let key = Key { id: "key-1".into(), prefix: String::new(), created_ms: 0, revoked_ms: None, old_until_ms: None, settings };
            Access::new(key, Some(Team { id: "team-1".into(), created_ms: 0, settings: team.clone() }))
        };
        assert!(key(&[]).allows("gpt-4o").is_ok());
        assert!(key(&["gpt-4o"]).allows("gpt-4o").is_ok());
        assert!(key(&["gpt-4o"]).allows("gpt-4o-mini").is_err());
        assert!(key(&["*"]).allows("claude").is_err(), "the team's list holds");
        assert!(key(&["claude"]).allows("claude").is_err());
        let bad = KeySettings { name: "k".into(), models: models(&["a*b"]), ..Default::default() };
        assert!(bad.check().unwrap_err().to_string().contains("models[0]"));
    }

    #[test]
    fn contradictory_limits_are_refused() {
        let limit = |json: &str| serde_json::from_str::<Limit>(json).unwrap();
        let requests = limit(r#"{"measure":"requests","window":"minute","amount":"10"}"#);
        let half = limit(r#"{"measure":"tokens","window":"day","amount":"0.5"}"#);
        let nothing = limit(r#"{"measure":"money","window":"month","amount":"5"}"#);
        let euros = limit(r#"{"measure":"money","window":"month","amount":"5","currency":"euro"}"#);
        let minus = limit(r#"{"measure":"tokens","window":"day","amount":"-1"}"#);
        assert!(limit::check("limits", std::slice::from_ref(&requests)).is_ok());
        for (wrong, said) in [
            (vec![requests.clone(), requests.clone()], "limits[1]: requests per minute is limited twice"),
            (vec![half], "no whole number"),
            (vec![nothing], "currency"),
            (vec![euros], "\"euro\""),
            (vec![minus], "negative"),
        ] {
            let e = limit::check("limits", &wrong).unwrap_err().to_string();
            assert!(e.contains(said), "{e}");
        }
    }
}
