//! What may be used within a window of time, and the refusal of what is more.

use super::AccountError;
use ashlar_core::{Decimal, Window, clock};
use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc};

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// Admitted requests.
    Requests,
    /// Tokens of every class together.
    Tokens,
    /// Cost.
    Money,
}

impl Measure {
    /// The name in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Money => "money",
        }
    }
}

/// At most `amount` of `measure` in each `window`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// What is counted.
    pub measure: Measure,
    /// Over what time.
    pub window: Window,
    /// How much; whole but for money.
    pub amount: Decimal,
    /// For money, the currency of the price list (ISO 4217).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
}

/// Whether `code` has the form of ISO 4217's.
pub(super) fn is_currency(code: &str) -> bool {
    code.len() == 3 && code.bytes().all(|b| b.is_ascii_uppercase())
}

/// Refuses limits that contradict themselves or each other; `of` names them.
pub(super) fn check(of: &str, limits: &[Limit]) -> Result<(), AccountError> {
    let wrong = |i: usize, why: String| Err(AccountError::Setting { field: format!("{of}[{i}]"), why });
    for (i, limit) in limits.iter().enumerate() {
        let money = limit.measure == Measure::Money;
        if limit.amount < Decimal::ZERO {
            return wrong(i, format!("the amount {} is negative", limit.amount));
        }
        // What all replicas have claimed together must be a number, too.
        if limit.amount.picos() > i128::MAX >> 20 {
            return wrong(i, format!("the amount {} is out of range", limit.amount));
        }
        if !money && !limit.amount.is_whole() {
            return wrong(i, format!("{} {} is no whole number", limit.amount, limit.measure.as_str()));
        }
        if money != limit.currency.is_some() {
            return wrong(i, "a limit of money, and no other, has a currency".into());
        }
        if let Some(c) = &limit.currency
            && !is_currency(c)
        {
            return wrong(i, format!("{c:?} is no currency code such as \"USD\""));
        }
        let same = |l: &Limit| (l.measure, l.window) == (limit.measure, limit.window);
        if limits[..i].iter().any(same) {
            return wrong(i, format!("{} per {} is limited twice", limit.measure.as_str(), limit.window.as_str()));
        }
    }
    Ok(())
}

/// Whose limit it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// A key's.
    Key,
    /// A team's, shared by its keys.
    Team,
    /// An end user's, of a key or team.
    User,
}

/// A limit with its owner and the name of its counter.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    pub(super) id: Arc<str>,
    pub(super) scope: Scope,
    pub(super) limit: Limit,
}

impl Bound {
    pub(super) fn new(scope: Scope, owner: &str, limit: &Limit) -> Self {
        let id = format!("{owner}/{}/{}", limit.measure.as_str(), limit.window.as_str());
        Self { id: id.into(), scope, limit: limit.clone() }
    }
}

/// A request that a limit does not let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exceeded {
    /// Whose limit.
    pub scope: Scope,
    /// The counter's name: owner, measure and window.
    pub limit_id: String,
    /// The limit.
    pub limit: Limit,
    /// Spent, reserved or claimed by all replicas when it was refused.
    pub taken: Decimal,
    /// What the request asked for.
    pub asked: Decimal,
    /// When the window ends and it may be tried again; `None` where waiting does
    /// not help: the limit is a total, or the request alone is above it.
    pub retry_at_ms: Option<i64>,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Limit { measure, window, amount, currency } = &self.limit;
        let unit = currency.as_deref().unwrap_or(measure.as_str());
        let whose = match self.scope {
            Scope::Key => "this key",
            Scope::Team => "this key's team",
            Scope::User => "this end user",
        };
        let per = match window {
            Window::Total => "in all".to_owned(),
            w => format!("per {}", w.as_str()),
        };
        write!(f, "{whose} may use {amount} {unit} {per}; {} are taken and this request needs up to {}", self.taken, self.asked)?;
        match self.retry_at_ms {
            Some(at) => write!(f, "; try again at {}", clock::rfc3339(at)),
            None if self.asked > *amount => f.write_str("; ask for fewer tokens"),
            None => f.write_str("; the budget has to be raised"),
        }
    }
}
