//! `[guard]` of the configuration file.

use super::{Action, Stage, categories::Category};
use crate::config::ConfigError;
use ashlar_text::detect::Kind;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// `[guard]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardSettings {
    /// What is looked for and what is done about it, by name.
    pub policies: BTreeMap<String, PolicySettings>,
    /// What becomes of end users whose requests keep violating policies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub abuse: Option<AbuseSettings>,
}

/// What a policy looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckKind {
    /// Personal data and secrets, by pattern and checksum.
    Pii,
    /// Phrases of `phrases`, but for those within `allow`.
    Phrases,
    /// The 13 categories, by a lexicon.
    Moderation,
    /// A classifier over the encoder's vectors, trained by `ashlar guard train`.
    Head,
    /// A served model's verdict.
    Judge,
    /// Attempts to take the model's instructions over.
    Injection,
    /// Whether an answer is JSON of the schema that was asked for.
    Schema,
    /// Text of documents that were taken down.
    Takedown,
}

impl CheckKind {
    /// Its name in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pii => "pii",
            Self::Phrases => "phrases",
            Self::Moderation => "moderation",
            Self::Head => "head",
            Self::Judge => "judge",
            Self::Injection => "injection",
            Self::Schema => "schema",
            Self::Takedown => "takedown",
        }
    }

    /// Whether it says which bytes it found.
    pub(super) const fn spans(self) -> bool {
        matches!(self, Self::Pii | Self::Phrases | Self::Takedown)
    }
}

/// When text leaves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Release {
    /// At once; a violation ends what has not left.
    Before,
    /// Once it is judged.
    #[default]
    After,
}

/// What stands for a judge's verdict that cannot be had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// A violation.
    #[default]
    Closed,
    /// None.
    Open,
}

/// How a judge is asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The conversation as it is: the judge's own chat template makes the task
    /// of it, as Llama Guard's does.
    #[default]
    LlamaGuard,
    /// A task in words, for a model that is no judge by training; it answers as
    /// Llama Guard does.
    Instructions,
}

/// `[guard.policies.NAME]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicySettings {
    /// What it looks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<CheckKind>,
    /// Whose text.
    pub on: Vec<Stage>,
    /// What is done. Left out: shadow for injection, block for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_violation: Option<Action>,
    /// When an answer's text leaves.
    pub release: Release,
    /// Routes it holds for: names, or beginnings that end in `*`. Empty: all.
    pub models: Vec<String>,
    /// Keys' ids it holds for, likewise.
    pub keys: Vec<String>,
    /// Teams' ids it holds for, likewise.
    pub teams: Vec<String>,
    /// Keys and teams it does not hold for, likewise.
    pub except: Vec<String>,
    /// Kinds of personal data. Empty: all.
    pub kinds: Vec<String>,
    /// Phrases that violate: words, `a|b`, `stem*`, `..` for up to four words.
    pub phrases: Vec<String>,
    /// Phrases within which none of `phrases` counts.
    pub allow: Vec<String>,
    /// By category, or `all`: the score from which on it is a violation.
    pub thresholds: BTreeMap<String, f64>,
    /// Other thresholds for these teams or keys.
    pub tenants: BTreeMap<String, BTreeMap<String, f64>>,
    /// The classifier's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<PathBuf>,
    /// The served model that judges.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<String>,
    /// How it is asked.
    pub protocol: Protocol,
    /// What stands for a verdict that cannot be had.
    pub on_failure: OnFailure,
    /// Seconds for a verdict.
    pub timeout_s: f64,
    /// Characters of an answer that a judge or head reads at once.
    pub window_chars: usize,
    /// Characters after which it is asked again.
    pub step_chars: usize,
    /// For takedown: words in a row that are no chance.
    pub words: usize,
    /// For schema: the schema's file, where the request's own is not to be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schema_file: Option<PathBuf>,
    /// How much a violation counts against its end user. Left out: 1 for block
    /// and flag of a request, else 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strike: Option<f64>,
}

impl Default for PolicySettings {
    fn default() -> Self {
        Self {
            check: None,
            on: vec![Stage::Request, Stage::Answer],
            on_violation: None,
            release: Release::After,
            models: Vec::new(),
            keys: Vec::new(),
            teams: Vec::new(),
            except: Vec::new(),
            kinds: Vec::new(),
            phrases: Vec::new(),
            allow: Vec::new(),
            thresholds: BTreeMap::new(),
            tenants: BTreeMap::new(),
            head: None,
            judge: None,
            protocol: Protocol::default(),
            on_failure: OnFailure::default(),
            timeout_s: 10.0,
            window_chars: 2000,
            step_chars: 400,
            words: 12,
            schema_file: None,
            strike: None,
        }
    }
}

/// `[guard.abuse]`: an end user's strikes within the window, and what follows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AbuseSettings {
    /// Hours after which a strike no longer counts.
    pub window_h: f64,
    /// Strikes from which on requests are slowed down.
    pub throttle_at: f64,
    /// Strikes from which on someone should look.
    pub review_at: f64,
    /// Strikes from which on requests are refused, until someone says otherwise.
    pub ban_at: f64,
    /// Requests a minute of one who is slowed down.
    pub throttled_per_minute: u32,
    /// The environment variable that holds the salt of the hashes; replicas that
    /// share users share it. Left out: one of this home's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub salt_env: Option<String>,
    /// Where a refused user is told to appeal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub appeal: Option<String>,
}

impl Default for AbuseSettings {
    fn default() -> Self {
        Self {
            window_h: 24.0 * 7.0,
            throttle_at: 3.0,
            review_at: 5.0,
            ban_at: 10.0,
            throttled_per_minute: 6,
            salt_env: None,
            appeal: None,
        }
    }
}

impl GuardSettings {
    /// What form alone does not say.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        for (name, p) in &self.policies {
            p.check_one(name)?;
        }
        let Some(a) = &self.abuse else { return Ok(()) };
        let invalid = |key: &str, why: String| Err(ConfigError::Invalid { path: format!("guard.abuse.{key}"), why });
        if !(a.window_h > 0.0 && a.window_h <= 1e5) {
            return invalid("window_h", format!("it must be above 0 and at most 100000, got {}", a.window_h));
        }
        if !(0.0 < a.throttle_at && a.throttle_at <= a.review_at && a.review_at <= a.ban_at && a.ban_at.is_finite()) {
            let why = format!("0 < throttle_at <= review_at <= ban_at must hold, got {}, {}, {}", a.throttle_at, a.review_at, a.ban_at);
            return invalid("throttle_at", why);
        }
        if a.throttled_per_minute == 0 {
            return invalid("throttled_per_minute", "it must be at least 1, got 0: to refuse all, lower ban_at".into());
        }
        Ok(())
    }
}

impl PolicySettings {
    /// What is done about a violation.
    pub(super) fn action(&self) -> Action {
        let injection = self.check == Some(CheckKind::Injection);
        self.on_violation.unwrap_or(if injection { Action::Shadow } else { Action::Block })
    }

    fn check_one(&self, name: &str) -> Result<(), ConfigError> {
        let invalid = |key: &str, why: String| Err(ConfigError::Invalid { path: format!("guard.policies.{name}.{key}"), why });
        let Some(check) = self.check else {
            return invalid("check", "it is missing: say what to look for".into());
        };
        if self.on.is_empty() {
            return invalid("on", "it is empty: the policy would do nothing".into());
        }
        let action = self.action();
        let replaces = matches!(action, Action::Redact | Action::Pseudonymize);
        if replaces && !check.spans() {
            return invalid("on_violation", format!("{} finds no words that could be replaced: use block, flag or shadow", check.as_str()));
        }
        if action == Action::Pseudonymize && check != CheckKind::Pii {
            return invalid("on_violation", "only pii has placeholders that can be put back".into());
        }
        if replaces && self.release == Release::Before && self.on.contains(&Stage::Answer) {
            return invalid("release", "what has left cannot be replaced: use after, or another on_violation".into());
        }
        if let Some(e) = self.kinds.iter().find_map(|k| k.parse::<Kind>().err()) {
            return invalid("kinds", e.to_string());
        }
        let usual = Self::default();
        let only = |key: &'static str, given: bool, of: &[CheckKind]| {
            let names = || of.iter().map(|c| c.as_str()).collect::<Vec<_>>().join(" and ");
            (given && !of.contains(&check)).then(|| (key, format!("only {} has it, this is {}", names(), check.as_str())))
        };
        let none = |key, given, of| only(key, given, &[of]);
        let foreign = [
            none("kinds", !self.kinds.is_empty(), CheckKind::Pii),
            none("phrases", !self.phrases.is_empty(), CheckKind::Phrases),
            none("allow", !self.allow.is_empty(), CheckKind::Phrases),
            none("head", self.head.is_some(), CheckKind::Head),
            none("judge", self.judge.is_some(), CheckKind::Judge),
            none("schema_file", self.schema_file.is_some(), CheckKind::Schema),
            none("words", self.words != usual.words, CheckKind::Takedown),
            none("protocol", self.protocol != usual.protocol, CheckKind::Judge),
            only("thresholds", !self.thresholds.is_empty(), &[CheckKind::Moderation, CheckKind::Injection, CheckKind::Head]),
            only("tenants", !self.tenants.is_empty(), &[CheckKind::Moderation, CheckKind::Injection, CheckKind::Head]),
            only("on_failure", self.on_failure != usual.on_failure, &[CheckKind::Judge, CheckKind::Head]),
            only("timeout_s", self.timeout_s != usual.timeout_s, &[CheckKind::Judge, CheckKind::Head]),
            only("window_chars", self.window_chars != usual.window_chars, &[CheckKind::Judge, CheckKind::Head]),
            only("step_chars", self.step_chars != usual.step_chars, &[CheckKind::Judge, CheckKind::Head]),
        ];
        if let Some((key, why)) = foreign.into_iter().flatten().next() {
            return invalid(key, why);
        }
        match check {
            CheckKind::Phrases if self.phrases.is_empty() => return invalid("phrases", "it is empty: nothing would be found".into()),
            CheckKind::Head if self.head.is_none() => return invalid("head", "it is missing: name the classifier's file".into()),
            CheckKind::Judge => match &self.judge {
                None => return invalid("judge", "it is missing: name a served model".into()),
                // It may be an engine's, which the file does not list.
                Some(_) => {}
            },
            CheckKind::Schema | CheckKind::Takedown if self.on.contains(&Stage::Request) && self.on.len() == 1 => {
                return invalid("on", format!("{} looks at answers only", check.as_str()));
            }
            _ => {}
        }
        for (key, list) in [("phrases", &self.phrases), ("allow", &self.allow)] {
            if let Err(why) = super::phrases::Phrases::new(list.iter().map(|p| (p.clone(), ()))) {
                return invalid(key, why);
            }
        }
        for (at, thresholds) in std::iter::once(("thresholds".to_owned(), &self.thresholds))
            .chain(self.tenants.iter().map(|(t, own)| (format!("tenants.{t}"), own)))
        {
            for (category, n) in thresholds {
                let known = check == CheckKind::Head || category == "all" || category.parse::<Category>().is_ok() || check == CheckKind::Injection && category == "injection";
                if !known {
                    let names = Category::ALL.map(Category::as_str).join(", ");
                    return invalid(&at, format!("there is no category {category:?}: known are all, {names}"));
                }
                if !(*n > 0.0 && *n <= 1.0) {
                    return invalid(&at, format!("{category} must be above 0 and at most 1, got {n}"));
                }
            }
        }
        if !(self.timeout_s > 0.0 && self.timeout_s <= 600.0) {
            return invalid("timeout_s", format!("it must be above 0 and at most 600, got {}", self.timeout_s));
        }
        if self.step_chars == 0 || self.window_chars < self.step_chars || self.window_chars > 1 << 20 {
            let why = format!("1 <= step_chars <= window_chars <= 1048576 must hold, got {} and {}", self.step_chars, self.window_chars);
            return invalid("step_chars", why);
        }
        if !(3..=64).contains(&self.words) {
            return invalid("words", format!("it must be between 3 and 64, got {}", self.words));
        }
        if self.strike.is_some_and(|s| !(0.0..=1e6).contains(&s)) {
            return invalid("strike", "it must be between 0 and 1000000".into());
        }
        Ok(())
    }
}

/// Whether a list of names and beginnings that end in `*` has `name`.
pub(super) fn listed(list: &[String], name: &str) -> bool {
    list.iter().any(|l| match l.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => l == name,
    })
}
