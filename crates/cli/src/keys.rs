//! `ashlar keys`, `ashlar teams`: who may ask the gateway for what.

use crate::{out, serve};
use anyhow::{Context, Result, bail};
use ashlar_core::clock;
use ashlar_gateway::AccountsSettings;
use ashlar_store::{AccountSettings, Accounts, Key, KeySettings, Limit, TeamSettings};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

const DAY_MS: i64 = 86_400_000;

/// Where keys and usage are.
#[derive(Debug, Clone, Args)]
pub(crate) struct AccountsArg {
    /// The gateway's file, whose [accounts] names the database [default: accounts.db in the home folder].
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
}

impl AccountsArg {
    pub(crate) async fn open(&self, home: &Path) -> Result<Accounts> {
        let settings = match &self.config {
            Some(path) => serve::read_config(path)?.accounts,
            None => AccountsSettings::default(),
        };
        std::fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
        Ok(Accounts::open(AccountSettings::new(settings.database(home)?)).await?)
    }
}

/// What keys and teams have in common.
#[derive(Debug, Clone, Args)]
pub(crate) struct Bounds {
    /// A model it may ask for, or the beginning of names and a final *; may be given again [default: all].
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// What it may use: requests/minute=60, tokens/day=1000000, USD/month=50; may be given again.
    #[arg(long = "limit", value_name = "WHAT/WINDOW=AMOUNT", value_parser = limit)]
    limits: Vec<Limit>,
    /// What each end user behind it may use, likewise.
    #[arg(long = "user-limit", value_name = "WHAT/WINDOW=AMOUNT", value_parser = limit)]
    user_limits: Vec<Limit>,
    /// Carried into each of its usage rows; may be given again.
    #[arg(long = "tag", value_name = "NAME=VALUE", value_parser = tag)]
    tags: Vec<(String, String)>,
}

#[derive(Subcommand)]
pub(crate) enum KeysVerb {
    /// Make a key and show its secret, once.
    Create {
        /// For people.
        name: String,
        /// The team it belongs to: its id or name.
        #[arg(long, value_name = "TEAM")]
        team: Option<String>,
        #[command(flatten)]
        bounds: Bounds,
        /// The highest priority it may ask for [default: any].
        #[arg(long, value_name = "N", allow_negative_numbers = true)]
        max_priority: Option<i32>,
        /// Days after which it ends [default: never].
        #[arg(long, value_name = "DAYS")]
        expires: Option<u32>,
        /// It may see the console: every request, answers included.
        #[arg(long)]
        console: bool,
    },
    /// List all keys, revoked ones too.
    List,
    /// Show a key and how much of its limits is taken.
    Show {
        /// Its id or name.
        key: String,
    },
    /// Give a key a new secret; the old one stays good for a while.
    Rotate {
        /// Its id or name.
        key: String,
        /// For how long, in hours.
        #[arg(long, value_name = "HOURS", default_value_t = 24)]
        grace: u64,
    },
    /// Switch a key off for good.
    Revoke {
        /// Its id or name.
        key: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum TeamsVerb {
    /// Make a team, whose limits its keys share.
    Create {
        /// For people.
        name: String,
        #[command(flatten)]
        bounds: Bounds,
    },
    /// List all teams.
    List,
}

/// `requests/minute=60`; money is named by its currency.
fn limit(text: &str) -> Result<Limit, String> {
    let wrong = || format!("{text:?} is not WHAT/WINDOW=AMOUNT, such as requests/minute=60, tokens/day=1000000 or USD/month=50");
    let (what, amount) = text.split_once('=').ok_or_else(wrong)?;
    let (measure, window) = what.split_once('/').ok_or_else(wrong)?;
    let money = measure.len() == 3 && measure.bytes().all(|b| b.is_ascii_uppercase());
    let currency = money.then_some(measure);
    let measure = if money { "money" } else { measure };
    let json = json!({"measure": measure, "window": window, "amount": amount, "currency": currency});
    serde_json::from_value(json).map_err(|e| format!("{}: {e}", wrong()))
}

fn tag(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
    Ok((name.into(), value.into()))
}

fn shown(limits: &[Limit]) -> String {
    let one = |l: &Limit| {
        let what = l.currency.as_deref().unwrap_or(l.measure.as_str());
        format!("{what}/{}={}", l.window.as_str(), l.amount)
    };
    limits.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// The one of `found` with this id or name.
fn pick<T>(what: &str, given: &str, found: Vec<T>, id: impl Fn(&T) -> &str, name: impl Fn(&T) -> &str) -> Result<T> {
    let mut named: Vec<T> = found.into_iter().filter(|t| id(t) == given || name(t) == given).collect();
    match (named.pop(), named.len()) {
        (None, _) => bail!("there is no {what} {given:?}; `ashlar {what}s list` shows all"),
        (Some(one), 0) => Ok(one),
        (Some(_), more) => bail!("{} {what}s are named {given:?}; give the id", more + 1),
    }
}

async fn key_of(accounts: &Accounts, given: &str) -> Result<Key> {
    let mut keys = accounts.keys().await?;
    // A revoked key's name may be used again.
    keys.retain(|k| k.revoked_ms.is_none() || k.id == given);
    pick("key", given, keys, |k| &k.id, |k| &k.settings.name)
}

fn state(key: &Key) -> &'static str {
    if key.revoked_ms.is_some() {
        "revoked"
    } else if key.settings.expires_ms.is_some_and(|at| at <= clock::now_ms()) {
        "expired"
    } else if key.settings.disabled {
        "disabled"
    } else {
        "good"
    }
}

pub(crate) async fn keys(home: &Path, at: &AccountsArg, verb: KeysVerb, as_json: bool) -> Result<()> {
    let accounts = at.open(home).await?;
    let done = keys_at(&accounts, verb, as_json).await;
    accounts.close().await?;
    done
}

async fn keys_at(accounts: &Accounts, verb: KeysVerb, as_json: bool) -> Result<()> {
    match verb {
        KeysVerb::Create { name, team, bounds, max_priority, expires, console } => {
            let team = match team {
                Some(team) => Some(pick("team", &team, accounts.teams().await?, |t| &t.id, |t| &t.settings.name)?.id),
                None => None,
            };
            let expires_ms = expires.map(|days| clock::now_ms() + i64::from(days) * DAY_MS);
            let Bounds { models, limits, user_limits, tags } = bounds;
            let tags: BTreeMap<_, _> = tags.into_iter().collect();
            let settings =
                KeySettings { name, team, models, limits, user_limits, max_priority, tags, expires_ms, console, disabled: false };
            let (key, secret) = accounts.create_key(&settings).await?;
            secret_shown(&key.id, secret.reveal(), serde_json::to_value(&key)?, as_json)
        }
        KeysVerb::List => {
            let keys = accounts.keys().await?;
            if as_json {
                return out::json(&json!({"keys": keys}));
            }
            for k in &keys {
                let s = &k.settings;
                let models = if s.models.is_empty() { "all models".into() } else { s.models.join(" ") };
                let console = if s.console { "  console" } else { "" };
                out::line(format!("{}  {:<8} {}…  {}  {models}  {}{console}", k.id, state(k), k.prefix, s.name, shown(&s.limits)));
            }
            Ok(())
        }
        KeysVerb::Show { key } => {
            let key = key_of(accounts, &key).await?;
            let standing = accounts.standing(&key.id, None).await?;
            if as_json {
                return out::json(&json!({"key": key, "standing": standing}));
            }
            out::line(format!("{}  {}  {}", key.id, state(&key), key.settings.name));
            for s in &standing {
                let ends = s.ends_ms.map(|at| format!(", until {}", clock::rfc3339(at))).unwrap_or_default();
                out::line(format!("  {}: {} spent, {} spent or set aside{ends}", shown(std::slice::from_ref(&s.limit)), s.spent, s.claimed));
            }
            Ok(())
        }
        KeysVerb::Rotate { key, grace } => {
            let key = key_of(accounts, &key).await?;
            let secret = accounts.rotate_key(&key.id, Duration::from_secs(grace.saturating_mul(3600))).await?;
            secret_shown(&key.id, secret.reveal(), serde_json::to_value(&key)?, as_json)
        }
        KeysVerb::Revoke { key } => {
            let key = key_of(accounts, &key).await?;
            accounts.revoke_key(&key.id).await?;
            if as_json {
                return out::json(&json!({"revoked": key.id}));
            }
            out::line(format!("revoked: {}", key.id));
            Ok(())
        }
    }
}

/// The secret alone on stdout, so that it can be piped.
fn secret_shown(id: &str, secret: &str, key: Value, as_json: bool) -> Result<()> {
    if as_json {
        return out::json(&json!({"key": key, "secret": secret}));
    }
    out::note(format!("{id}: this is the one time its secret is shown"));
    out::line(secret.to_owned());
    Ok(())
}

pub(crate) async fn teams(home: &Path, at: &AccountsArg, verb: TeamsVerb, as_json: bool) -> Result<()> {
    let accounts = at.open(home).await?;
    let done = teams_at(&accounts, verb, as_json).await;
    accounts.close().await?;
    done
}

async fn teams_at(accounts: &Accounts, verb: TeamsVerb, as_json: bool) -> Result<()> {
    match verb {
        TeamsVerb::Create { name, bounds: Bounds { models, limits, user_limits, tags } } => {
            let tags = tags.into_iter().collect();
            let settings = TeamSettings { name, models, limits, user_limits, tags, disabled: false };
            let team = accounts.create_team(&settings).await?;
            if as_json {
                return out::json(&json!({"team": team}));
            }
            out::line(team.id);
        }
        TeamsVerb::List => {
            let teams = accounts.teams().await?;
            if as_json {
                return out::json(&json!({"teams": teams}));
            }
            for t in &teams {
                let models = if t.settings.models.is_empty() { "all models".into() } else { t.settings.models.join(" ") };
                out::line(format!("{}  {}  {models}  {}", t.id, t.settings.name, shown(&t.settings.limits)));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_they_are_shown() {
        for text in ["requests/minute=60", "tokens/day=1000000", "USD/month=50.25", "EUR/total=1"] {
            assert_eq!(shown(&[limit(text).expect(text)]), text);
        }
        for wrong in ["requests", "requests/minute", "request/minute=1", "tokens/week=1", "tokens/day=x", "usd/month=1"] {
            assert!(limit(wrong).expect_err(wrong).contains("requests/minute=60"), "{wrong}");
        }
    }
}
