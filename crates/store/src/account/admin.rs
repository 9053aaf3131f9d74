//! What administrators do: teams and keys made, changed, rotated, revoked, and
//! how much of their limits is taken.

use super::{
    AccountError, Accounts, Bound, Key, KeySettings, Limit, PriceList, Scope, Secret, Team, TeamSettings,
    db::{self, Db, Tx},
    directory::{KeyRow, SELECT_TEAM, team_of},
};
use ashlar_core::{Decimal, clock, digest::to_hex, id};
use serde::Serialize;
use std::time::Duration;

/// How much of a limit is taken now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Standing {
    /// Whose limit it is.
    pub scope: Scope,
    /// The limit.
    pub limit: Limit,
    /// Spent in the window that is open now, as written so far.
    pub spent: Decimal,
    /// Spent, reserved, or claimed by replicas for requests to come.
    pub claimed: Decimal,
    /// When the window ends.
    pub ends_ms: Option<i64>,
}

/// The database's own salt, made at its first opening.
pub(super) async fn salt(db: &Db) -> Result<String, AccountError> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| AccountError::Random(e.to_string()))?;
    let mut tx = db.begin().await?;
    tx.execute("INSERT INTO account_salt (one, salt) VALUES (1, $1) ON CONFLICT (one) DO NOTHING", &[&to_hex(&bytes)]).await?;
    let salt = tx.one("SELECT salt FROM account_salt", &[]).await?;
    tx.commit().await?;
    Ok(salt)
}

pub(super) async fn remember_prices(db: &Db, list: &PriceList) -> Result<(), AccountError> {
    let mut tx = db.begin().await?;
    let sql = "INSERT INTO price_list (version, body, first_used_ms) VALUES ($1, $2, CAST($3 AS BIGINT)) ON CONFLICT (version) DO NOTHING";
    tx.execute(sql, &[list.version(), list.text(), &clock::now_ms().to_string()]).await?;
    let known: String = tx.one("SELECT body FROM price_list WHERE version = $1", &[list.version()]).await?;
    if known != list.text() {
        return Err(AccountError::PriceVersion(list.version().into()));
    }
    tx.commit().await
}

/// The next revision. Its row stays locked until the transaction ends.
async fn revise(tx: &mut Tx) -> Result<String, AccountError> {
    tx.one("UPDATE account_revision SET revision = revision + 1 RETURNING CAST(revision AS TEXT)", &[]).await
}

impl Accounts {
    /// Makes a team.
    ///
    /// # Errors
    /// [`AccountError::Setting`] names the field at fault.
    pub async fn create_team(&self, settings: &TeamSettings) -> Result<Team, AccountError> {
        settings.check()?;
        let team = Team { id: id::new("team"), created_ms: clock::now_ms(), settings: settings.clone() };
        let mut tx = self.db().begin().await?;
        let revision = revise(&mut tx).await?;
        let sql = "INSERT INTO team (id, revision, created_ms, body) VALUES ($1, CAST($2 AS BIGINT), CAST($3 AS BIGINT), $4)";
        tx.execute(sql, &[&team.id, &revision, &team.created_ms.to_string(), &db::batch(settings)?]).await?;
        self.changed(tx).await?;
        Ok(team)
    }

    /// Changes what is said about a team, from the next request of its keys on.
    ///
    /// # Errors
    /// [`AccountError::NotFound`], [`AccountError::Setting`].
    pub async fn update_team(&self, id: &str, settings: &TeamSettings) -> Result<(), AccountError> {
        settings.check()?;
        let mut tx = self.db().begin().await?;
        let revision = revise(&mut tx).await?;
        let sql = "UPDATE team SET revision = CAST($2 AS BIGINT), body = $3 WHERE id = $1";
        if tx.execute(sql, &[id, &revision, &db::batch(settings)?]).await? == 0 {
            return Err(AccountError::NotFound(id.into()));
        }
        self.changed(tx).await
    }

    /// All teams, oldest first.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn teams(&self) -> Result<Vec<Team>, AccountError> {
        let rows = self.db().rows(&format!("{SELECT_TEAM} ORDER BY id"), &[]).await?;
        rows.iter().map(|row| team_of(row)).collect()
    }

    /// Makes a key. Its secret is not kept: this is the one time it is seen.
    ///
    /// # Errors
    /// [`AccountError::Setting`] names the field at fault.
    pub async fn create_key(&self, settings: &KeySettings) -> Result<(Key, Secret), AccountError> {
        settings.check()?;
        let secret = Secret::new()?;
        let key = Key {
            id: id::new("key"),
            prefix: secret.prefix().into(),
            created_ms: clock::now_ms(),
            revoked_ms: None,
            old_until_ms: None,
            settings: settings.clone(),
        };
        let mut tx = self.db().begin().await?;
        let revision = revise(&mut tx).await?;
        known_team(&mut tx, settings).await?;
        let sql = "INSERT INTO api_key (id, revision, created_ms, prefix, hash, body) \
                   VALUES ($1, CAST($2 AS BIGINT), CAST($3 AS BIGINT), $4, $5, $6)";
        let args = [&*key.id, &revision, &key.created_ms.to_string(), &key.prefix, &secret.hash().to_string(), &db::batch(settings)?];
        tx.execute(sql, &args).await?;
        self.changed(tx).await?;
        Ok((key, secret))
    }

    /// Changes what is said about a key.
    ///
    /// # Errors
    /// [`AccountError::NotFound`], [`AccountError::Revoked`], [`AccountError::Setting`].
    pub async fn update_key(&self, id: &str, settings: &KeySettings) -> Result<(), AccountError> {
        settings.check()?;
        let mut tx = self.db().begin().await?;
        let revision = revise(&mut tx).await?;
        known_team(&mut tx, settings).await?;
        let sql = "UPDATE api_key SET revision = CAST($2 AS BIGINT), body = $3 WHERE id = $1 AND revoked_ms IS NULL";
        if tx.execute(sql, &[id, &revision, &db::batch(settings)?]).await? == 0 {
            return Err(missing(&mut tx, id).await);
        }
        self.changed(tx).await
    }

    /// Gives a key a new secret; the old one is good for `grace` more, so that
    /// its holders can change over one by one.
    ///
    /// # Errors
    /// [`AccountError::NotFound`], [`AccountError::Revoked`].
    pub async fn rotate_key(&self, id: &str, grace: Duration) -> Result<Secret, AccountError> {
        let secret = Secret::new()?;
        let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
        let until = clock::now_ms().saturating_add(grace_ms).to_string();
        let mut tx = self.db().begin().await?;
        let revision = revise(&mut tx).await?;
        let sql = "UPDATE api_key SET revision = CAST($2 AS BIGINT), old_prefix = prefix, old_hash = hash, \
                   old_until_ms = CAST($3 AS BIGINT), prefix = $4, hash = $5 WHERE id = $1 AND revoked_ms IS NULL";
        if tx.execute(sql, &[id, &revision, &until, secret.prefix(), &secret.hash().to_string()]).await? == 0 {
            return Err(missing(&mut tx, id).await);
        }
        self.changed(tx).await?;
        Ok(secret)
    }

    /// Revokes a key for good. Its row stays, for the ledger's sake.
    ///
    /// # Errors
    /// [`AccountError::NotFound`], [`AccountError::Revoked`].
    pub async fn revoke_key(&self, id: &str) -> Result<(), AccountError> {
        let mut tx = self.db().begin().await?;
        let revision = revise(&mut tx).await?;
        let sql = "UPDATE api_key SET revision = CAST($2 AS BIGINT), revoked_ms = CAST($3 AS BIGINT), old_prefix = NULL, \
                   old_hash = NULL, old_until_ms = NULL WHERE id = $1 AND revoked_ms IS NULL";
        if tx.execute(sql, &[id, &revision, &clock::now_ms().to_string()]).await? == 0 {
            return Err(missing(&mut tx, id).await);
        }
        self.changed(tx).await
    }

    /// All keys, oldest first, revoked ones too.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn keys(&self) -> Result<Vec<Key>, AccountError> {
        let rows = self.db().rows(&format!("{} ORDER BY id", KeyRow::SELECT), &[]).await?;
        rows.iter().map(|row| serde_json::from_str::<KeyRow>(row)?.key()).collect()
    }

    /// How much of the limits of a key and its team is taken, and of an end
    /// user's where `user` names one by its hash.
    ///
    /// # Errors
    /// [`AccountError::NotFound`], and when the database cannot be read.
    pub async fn standing(&self, key: &str, user: Option<&str>) -> Result<Vec<Standing>, AccountError> {
        let not_found = || AccountError::NotFound(key.into());
        let rows = self.db().rows(&format!("{} WHERE id = $1", KeyRow::SELECT), &[key]).await?;
        let key = serde_json::from_str::<KeyRow>(rows.first().ok_or_else(not_found)?)?.key()?;
        let team = match &key.settings.team {
            Some(team) => self.db().rows(&format!("{SELECT_TEAM} WHERE id = $1"), &[team]).await?,
            None => Vec::new(),
        };
        let access = super::Access::new(key, team.first().map(|row| team_of(row)).transpose()?);
        let mut bounds = access.bounds.clone();
        bounds.extend(user.into_iter().flat_map(|user| access.user_bounds(user)));
        let now = clock::now_ms();
        let cells: Vec<(&str, i64)> = bounds.iter().map(|b| (&*b.id, b.limit.window.start(now))).collect();
        let sql = "SELECT CAST(ROW_OF(c.limit_id, c.spent, c.claimed) AS TEXT) FROM EACH($1) AS e \
                   JOIN counter AS c ON c.limit_id = e.value->>0 AND c.start_ms = CAST(e.value->>1 AS BIGINT)";
        let rows = self.db().rows(sql, &[&db::batch(&cells)?]).await?;
        let rows = rows.iter().map(|r| Ok(serde_json::from_str(r)?)).collect::<Result<Vec<(String, Decimal, Decimal)>, AccountError>>()?;
        let sum = |id: &str, of: fn(&(String, Decimal, Decimal)) -> Decimal| {
            Decimal::from_picos(rows.iter().filter(|r| r.0 == id).map(|r| of(r).picos()).sum())
        };
        let standing = |b: &Bound| Standing {
            scope: b.scope,
            limit: b.limit.clone(),
            spent: sum(&b.id, |r| r.1),
            claimed: sum(&b.id, |r| r.2),
            ends_ms: b.limit.window.end(now),
        };
        Ok(bounds.iter().map(standing).collect())
    }

    /// Commits, and sees the change here at once.
    async fn changed(&self, tx: Tx) -> Result<(), AccountError> {
        tx.commit().await?;
        self.shared().directory.refresh(self.db()).await
    }
}

async fn known_team(tx: &mut Tx, settings: &KeySettings) -> Result<(), AccountError> {
    let Some(team) = &settings.team else { return Ok(()) };
    match tx.rows("SELECT id FROM team WHERE id = $1", &[team]).await?.is_empty() {
        true => Err(AccountError::NotFound(team.clone())),
        false => Ok(()),
    }
}

/// Why a key could not be changed.
async fn missing(tx: &mut Tx, id: &str) -> AccountError {
    match tx.rows("SELECT id FROM api_key WHERE id = $1", &[id]).await {
        Ok(rows) if rows.is_empty() => AccountError::NotFound(id.into()),
        Ok(_) => AccountError::Revoked(id.into()),
        Err(e) => e,
    }
}
