//! End users whose requests violate policies: strikes, and what people decided.
//!
//! A user is a salted hash (see [`Store::salt`]); who it is, only the caller that
//! sent the id knows. Strikes are kept as they fell; standing is what follows
//! from those within a window since the user was last cleared. Throttling ends by
//! itself, a review and a ban only by someone's word.

use crate::{StoreError, ledger::Store};
use ashlar_core::{clock, digest::to_hex};
use serde::{Deserialize, Serialize};
use sqlx::{Row as _, sqlite::SqliteRow};
use std::{
    fmt,
    fs::OpenOptions,
    io::{ErrorKind, Write as _},
    str::FromStr,
};

/// Where a user stands, from good to bad.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AbuseState {
    /// Nothing to say.
    #[default]
    Clear,
    /// Slowed down.
    Throttled,
    /// Slowed down, and someone should look.
    Review,
    /// Refused.
    Banned,
}

impl AbuseState {
    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Throttled => "throttled",
            Self::Review => "review",
            Self::Banned => "banned",
        }
    }
}

impl fmt::Display for AbuseState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for AbuseState {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        let known = [Self::Clear, Self::Throttled, Self::Review, Self::Banned].into_iter().find(|s| s.as_str() == name);
        known.ok_or_else(|| StoreError::Corrupt(format!("abuse state {name:?} is unknown")))
    }
}

/// Strikes from which on a user stands worse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AbuseLimits {
    /// Milliseconds after which a strike no longer counts.
    pub window_ms: i64,
    /// From here on slowed down.
    pub throttle_at: f64,
    /// From here on to be looked at.
    pub review_at: f64,
    /// From here on refused.
    pub ban_at: f64,
}

/// One violation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AbuseEvent {
    /// The response it fell in.
    pub response: String,
    /// When.
    pub at_ms: i64,
    /// The policy.
    pub policy: String,
    /// What was found.
    pub kind: String,
    /// How much it counts.
    pub weight: f64,
}

/// A user.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct AbuseUser {
    /// The hash.
    pub user: String,
    /// Where they stand.
    pub state: AbuseState,
    /// When that began.
    pub changed_ms: i64,
    /// Strikes that count.
    pub strikes: f64,
    /// Strikes ever.
    pub events: u64,
    /// What was said at the last decision.
    pub note: Option<String>,
    /// What the user says for themselves.
    pub appeal: Option<String>,
    /// When they said it.
    pub appeal_ms: Option<i64>,
}

const USERS: &str = "SELECT u.*, \
    (SELECT COUNT(*) FROM abuse_event e WHERE e.user = u.user) AS events, \
    (SELECT COALESCE(SUM(e.weight), 0.0) FROM abuse_event e WHERE e.user = u.user AND e.at_ms > $1 AND e.at_ms > u.cleared_ms) AS strikes \
    FROM abuse_user u";

impl Store {
    /// Writes violations of `user` down; where they stand now.
    ///
    /// # Errors
    /// When the ledger refuses.
    pub async fn strike(&self, user: &str, events: &[AbuseEvent], limits: &AbuseLimits) -> Result<AbuseUser, StoreError> {
        let now = clock::now_ms();
        let mut write = self.write().await?;
        sqlx::query("INSERT INTO abuse_user (user, state, changed_ms, cleared_ms) VALUES ($1, 'clear', $2, 0) ON CONFLICT (user) DO NOTHING")
            .bind(user)
            .bind(now)
            .execute(&mut *write.tx)
            .await?;
        for e in events {
            sqlx::query("INSERT INTO abuse_event (user, response, at_ms, policy, kind, weight) VALUES ($1, $2, $3, $4, $5, $6)")
                .bind(user)
                .bind(&e.response)
                .bind(e.at_ms)
                .bind(&e.policy)
                .bind(&e.kind)
                .bind(e.weight)
                .execute(&mut *write.tx)
                .await?;
        }
        let row = sqlx::query(&format!("{USERS} WHERE u.user = $2"))
            .bind(now - limits.window_ms)
            .bind(user)
            .fetch_one(&mut *write.tx)
            .await?;
        let mut found = user_of(&row)?;
        let earned = earned(found.strikes, limits);
        // People's decisions and reviews do not lapse.
        if earned > found.state && earned >= AbuseState::Review {
            sqlx::query("UPDATE abuse_user SET state = $2, changed_ms = $3 WHERE user = $1")
                .bind(user)
                .bind(earned.as_str())
                .bind(now)
                .execute(&mut *write.tx)
                .await?;
            found.changed_ms = now;
        }
        found.state = found.state.max(earned);
        write.commit().await?;
        Ok(found)
    }

    /// Where `user` stands; `None` who never violated anything.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn abuse_user(&self, user: &str, limits: &AbuseLimits) -> Result<Option<AbuseUser>, StoreError> {
        let row = sqlx::query(&format!("{USERS} WHERE u.user = $2"))
            .bind(clock::now_ms() - limits.window_ms)
            .bind(user)
            .fetch_optional(self.pool())
            .await?;
        row.map(|row| {
            let mut found = user_of(&row)?;
            found.state = found.state.max(earned(found.strikes, limits).min(AbuseState::Throttled));
            Ok(found)
        })
        .transpose()
    }

    /// All users who violated something, the worst first.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn abuse_users(&self, limits: &AbuseLimits) -> Result<Vec<AbuseUser>, StoreError> {
        let rows = sqlx::query(USERS).bind(clock::now_ms() - limits.window_ms).fetch_all(self.pool()).await?;
        let mut out = rows
            .iter()
            .map(|row| {
                let mut found = user_of(row)?;
                found.state = found.state.max(earned(found.strikes, limits).min(AbuseState::Throttled));
                Ok(found)
            })
            .collect::<Result<Vec<_>, StoreError>>()?;
        out.sort_by(|a, b| b.state.cmp(&a.state).then(b.strikes.total_cmp(&a.strikes)).then(a.user.cmp(&b.user)));
        Ok(out)
    }

    /// What `user` did, newest first.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn abuse_events(&self, user: &str) -> Result<Vec<AbuseEvent>, StoreError> {
        let rows = sqlx::query("SELECT * FROM abuse_event WHERE user = $1 ORDER BY at_ms DESC, id DESC")
            .bind(user)
            .fetch_all(self.pool())
            .await?;
        rows.iter()
            .map(|row| {
                Ok(AbuseEvent {
                    response: row.try_get("response")?,
                    at_ms: row.try_get("at_ms")?,
                    policy: row.try_get("policy")?,
                    kind: row.try_get("kind")?,
                    weight: row.try_get("weight")?,
                })
            })
            .collect()
    }

    /// Decides on `user`. Clearing takes all strikes so far off them.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a user no one has seen.
    pub async fn abuse_decide(&self, user: &str, state: AbuseState, note: &str) -> Result<(), StoreError> {
        let now = clock::now_ms();
        let cleared = if state == AbuseState::Clear { now } else { 0 };
        let mut write = self.write().await?;
        let done = sqlx::query(
            "UPDATE abuse_user SET state = $2, changed_ms = $3, note = $4, cleared_ms = MAX(cleared_ms, $5), \
             appeal = CASE WHEN $2 = 'clear' THEN NULL ELSE appeal END WHERE user = $1",
        )
        .bind(user)
        .bind(state.as_str())
        .bind(now)
        .bind(note)
        .bind(cleared)
        .execute(&mut *write.tx)
        .await?;
        write.commit().await?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(StoreError::NotFound(user.into())) }
    }

    /// Writes down what `user` says for themselves.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a user no one has seen.
    pub async fn abuse_appeal(&self, user: &str, text: &str) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        let done = sqlx::query("UPDATE abuse_user SET appeal = $2, appeal_ms = $3 WHERE user = $1")
            .bind(user)
            .bind(text)
            .bind(clock::now_ms())
            .execute(&mut *write.tx)
            .await?;
        write.commit().await?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(StoreError::NotFound(user.into())) }
    }

    /// 256 random bits of this home under `name`, in hexadecimal, drawn when
    /// first asked for.
    ///
    /// # Errors
    /// When the folder cannot be written, or there is no randomness.
    pub fn salt(&self, name: &str) -> Result<String, StoreError> {
        let path = self.home().join("keys").join(name);
        let read = || std::fs::read_to_string(&path).map_err(StoreError::io(&path));
        if path.exists() {
            return Ok(read()?.trim().to_owned());
        }
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes).map_err(|e| StoreError::Task(format!("no randomness: {e}")))?;
        let text = to_hex(&bytes);
        // Whole or not at all: another process may look at the same moment.
        let scratch = path.with_extension(ashlar_core::id::new("new"));
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&scratch).map_err(StoreError::io(&scratch))?;
        file.write_all(text.as_bytes()).map_err(StoreError::io(&scratch))?;
        let linked = std::fs::hard_link(&scratch, &path);
        let _ = std::fs::remove_file(&scratch);
        match linked {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(StoreError::io(&path)(e)),
            _ => Ok(read()?.trim().to_owned()),
        }
    }
}

fn earned(strikes: f64, limits: &AbuseLimits) -> AbuseState {
    match strikes {
        s if s >= limits.ban_at => AbuseState::Banned,
        s if s >= limits.review_at => AbuseState::Review,
        s if s >= limits.throttle_at => AbuseState::Throttled,
        _ => AbuseState::Clear,
    }
}

fn user_of(row: &SqliteRow) -> Result<AbuseUser, StoreError> {
    Ok(AbuseUser {
        user: row.try_get("user")?,
        state: row.try_get::<String, _>("state")?.parse()?,
        changed_ms: row.try_get("changed_ms")?,
        strikes: row.try_get("strikes")?,
        events: row.try_get::<i64, _>("events")? as u64,
        note: row.try_get("note")?,
        appeal: row.try_get("appeal")?,
        appeal_ms: row.try_get("appeal_ms")?,
    })
}
