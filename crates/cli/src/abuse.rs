//! `ashlar abuse`: end users who violate policies, and what people decide.

use crate::{out, serve};
use anyhow::{Context, Result, bail};
use ashlar_gateway::guard::AbuseSettings;
use ashlar_core::clock::rfc3339;
use ashlar_store::{AbuseState, AbuseUser, Store};
use serde_json::json;
use std::path::{Path, PathBuf};

/// What is asked.
#[derive(clap::Subcommand)]
pub(crate) enum What {
    /// All end users who violated a policy, the worst first.
    List {
        /// The gateway's file, for its window and limits [default: theirs where none is written].
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// What one end user did, and what was decided.
    Show {
        /// The hash, as in `list` and in the errors that they got.
        user: String,
        /// As for `list`.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Decide on an end user after having looked: keep them slowed down.
    Review {
        /// The hash.
        user: String,
        /// Why; kept with the decision.
        #[arg(long, value_name = "TEXT")]
        note: String,
    },
    /// Refuse an end user's requests until `unban`.
    Ban {
        /// The hash.
        user: String,
        /// Why; kept with the decision.
        #[arg(long, value_name = "TEXT")]
        note: String,
    },
    /// Let an end user in again; violations so far no longer count.
    Unban {
        /// The hash.
        user: String,
        /// Why; kept with the decision.
        #[arg(long, value_name = "TEXT")]
        note: String,
    },
    /// Write down what an end user says for themselves.
    Appeal {
        /// The hash.
        user: String,
        /// Their words.
        #[arg(long, value_name = "TEXT")]
        text: String,
    },
}

fn settings(config: Option<&Path>) -> Result<AbuseSettings> {
    let read = config.map(serve::read_config).transpose()?;
    Ok(read.and_then(|c| c.guard.abuse).unwrap_or_default())
}

fn line(u: &AbuseUser) -> String {
    let appeal = u.appeal.as_ref().map_or("", |_| "  has appealed");
    format!("{}  {:<9} {:>6} strikes of {} events{appeal}", u.user, u.state.as_str(), u.strikes, u.events)
}

/// Does it.
pub(crate) async fn run(home: &Path, what: What, as_json: bool) -> Result<()> {
    let store = Store::open(home).await?;
    match what {
        What::List { config } => {
            let users = store.abuse_users(&settings(config.as_deref())?.limits()).await?;
            if as_json {
                return out::json(&serde_json::to_value(&users)?);
            }
            users.iter().for_each(|u| out::line(line(u)));
            out::note(format!("{} end users; `ashlar abuse show USER` says what one did", users.len()));
        }
        What::Show { user, config } => {
            let found = store.abuse_user(&user, &settings(config.as_deref())?.limits()).await?;
            let Some(found) = found else { bail!("no end user {user:?} has violated a policy; `ashlar abuse list` shows who has") };
            let events = store.abuse_events(&user).await?;
            if as_json {
                return out::json(&json!({"user": found, "events": events}));
            }
            out::line(line(&found));
            for (what, text) in [("decided", &found.note), ("appeal", &found.appeal)] {
                if let Some(text) = text {
                    out::line(format!("  {what}: {text}"));
                }
            }
            for e in &events {
                out::line(format!("  {}  {} ({}), weight {}, response {}", rfc3339(e.at_ms), e.policy, e.kind, e.weight, e.response));
            }
        }
        What::Review { user, note } => return decide(&store, &user, AbuseState::Review, &note, as_json).await,
        What::Ban { user, note } => return decide(&store, &user, AbuseState::Banned, &note, as_json).await,
        What::Unban { user, note } => return decide(&store, &user, AbuseState::Clear, &note, as_json).await,
        What::Appeal { user, text } => {
            store.abuse_appeal(&user, &text).await.with_context(|| format!("end user {user:?}"))?;
            if as_json {
                return out::json(&json!({"user": user, "appeal": text}));
            }
            out::note(format!("written down; `ashlar abuse unban {user} --note …` lets them in again"));
        }
    }
    Ok(())
}

async fn decide(store: &Store, user: &str, state: AbuseState, note: &str, as_json: bool) -> Result<()> {
    store.abuse_decide(user, state, note).await.with_context(|| format!("end user {user:?}"))?;
    if as_json {
        return out::json(&json!({"user": user, "state": state, "note": note}));
    }
    out::note(format!("{user} is {state}; running gateways know within a second"));
    Ok(())
}
