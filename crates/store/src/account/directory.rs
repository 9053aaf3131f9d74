//! All keys in memory, kept up with the database by its revision.
//!
//! A change takes the next revision in the transaction that makes it, which
//! holds the row of the revision until it commits: so revisions appear in their
//! order, and whatever is above the last one seen is all that is new. While the
//! database cannot be read the last state serves, but no longer than promised.

use super::{
    AccountError, Access, Denied, Key, KeySettings, Shared, Team, TeamSettings,
    db::Db,
    key::{same, shape},
};
use ashlar_core::Digest;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, Weak},
    time::{Duration, Instant},
};

/// Prefix, hash, and until when: the last secret for ever, the one before for as
/// long as its rotation says.
type KnownSecret = (String, Digest, Option<i64>);

/// A key's hashes and what they open.
#[derive(Debug)]
struct Holder {
    access: Arc<Access>,
    secrets: Vec<KnownSecret>,
}

#[derive(Debug, Default)]
struct Index {
    revision: i64,
    teams: BTreeMap<String, Team>,
    keys: BTreeMap<String, Holder>,
    /// Ids by prefix: nearly always one.
    by_prefix: HashMap<String, Vec<String>>,
    read: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Directory {
    index: RwLock<Index>,
    stale: Duration,
}

/// A row of `api_key`.
#[derive(Debug, Deserialize)]
pub(super) struct KeyRow {
    pub(super) id: String,
    pub(super) created_ms: i64,
    pub(super) prefix: String,
    pub(super) hash: String,
    pub(super) old_prefix: Option<String>,
    pub(super) old_hash: Option<String>,
    pub(super) old_until_ms: Option<i64>,
    pub(super) revoked_ms: Option<i64>,
    pub(super) body: String,
}

impl KeyRow {
    pub(super) const SELECT: &str = "SELECT CAST(OBJECT_OF('id', id, 'created_ms', created_ms, 'prefix', prefix, 'hash', hash, \
         'old_prefix', old_prefix, 'old_hash', old_hash, 'old_until_ms', old_until_ms, 'revoked_ms', revoked_ms, \
         'body', body) AS TEXT) FROM api_key";

    pub(super) fn key(&self) -> Result<Key, AccountError> {
        Ok(Key {
            id: self.id.clone(),
            prefix: self.prefix.clone(),
            created_ms: self.created_ms,
            revoked_ms: self.revoked_ms,
            old_until_ms: self.old_until_ms,
            settings: serde_json::from_str::<KeySettings>(&self.body)?,
        })
    }
}

/// The team of a row `[id, created_ms, body]`.
pub(super) fn team_of(row: &str) -> Result<Team, AccountError> {
    let (id, created_ms, body): (String, i64, String) = serde_json::from_str(row)?;
    Ok(Team { id, created_ms, settings: serde_json::from_str::<TeamSettings>(&body)? })
}

pub(super) const SELECT_TEAM: &str = "SELECT CAST(ROW_OF(id, created_ms, body) AS TEXT) FROM team";

impl Directory {
    pub(super) fn new(stale: Duration) -> Self {
        Self { index: RwLock::default(), stale }
    }

    /// Reads what is new.
    pub(super) async fn refresh(&self, db: &Db) -> Result<(), AccountError> {
        let asked = Instant::now();
        let seen = self.index.read().unwrap_or_else(PoisonError::into_inner).revision;
        // The revision first: what is committed after it is read again.
        let rows = db.rows("SELECT CAST(revision AS TEXT) FROM account_revision", &[]).await?;
        let revision = rows.first().and_then(|r| r.parse::<i64>().ok());
        let revision = revision.ok_or_else(|| AccountError::Corrupt("there is no revision".into()))?;
        let (mut teams, mut keys) = (Vec::new(), Vec::new());
        if revision != seen {
            let seen = seen.to_string();
            let new = " WHERE revision > CAST($1 AS BIGINT)";
            for row in db.rows(&format!("{SELECT_TEAM}{new}"), &[&seen]).await? {
                teams.push(team_of(&row)?);
            }
            for row in db.rows(&format!("{}{new}", KeyRow::SELECT), &[&seen]).await? {
                let row: KeyRow = serde_json::from_str(&row)?;
                keys.push((row.key()?, secrets(&row)?));
            }
        }
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        index.put(teams, keys);
        index.revision = index.revision.max(revision);
        index.read = index.read.max(Some(asked));
        Ok(())
    }

    /// The index, if it was read lately enough.
    fn fresh(&self) -> Result<RwLockReadGuard<'_, Index>, Denied> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let age = index.read.map_or(Duration::MAX, |read| read.elapsed());
        if age > self.stale {
            let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
            return Err(Denied::Stale { age_ms: ms(age), most_ms: ms(self.stale) });
        }
        Ok(index)
    }

    pub(super) fn access(&self, id: &str, now_ms: i64) -> Result<Arc<Access>, Denied> {
        let access = self.fresh()?.keys.get(id).ok_or(Denied::Unknown)?.access.clone();
        access.good(now_ms).map(|()| access)
    }

    pub(super) fn authenticate(&self, secret: &str, now_ms: i64) -> Result<Arc<Access>, Denied> {
        let index = self.fresh()?;
        let prefix = shape(secret).ok_or(Denied::Unknown)?;
        let hash = Digest::of(secret.as_bytes());
        let candidates = index.by_prefix.get(prefix).into_iter().flatten();
        for holder in candidates.filter_map(|id| index.keys.get(id)) {
            let fits = |(_, h, until): &KnownSecret| same(h, &hash) && until.is_none_or(|u| now_ms < u);
            if holder.secrets.iter().any(fits) {
                return holder.access.good(now_ms).map(|()| holder.access.clone());
            }
        }
        Err(Denied::Unknown)
    }
}

fn secrets(row: &KeyRow) -> Result<Vec<KnownSecret>, AccountError> {
    let digest = |s: &str| s.parse().map_err(|e| AccountError::Corrupt(format!("{}: {e}", row.id)));
    let mut secrets = vec![(row.prefix.clone(), digest(&row.hash)?, None)];
    if let (Some(prefix), Some(hash), Some(until)) = (&row.old_prefix, &row.old_hash, row.old_until_ms) {
        secrets.push((prefix.clone(), digest(hash)?, Some(until)));
    }
    Ok(secrets)
}

impl Index {
    fn put(&mut self, teams: Vec<Team>, keys: Vec<(Key, Vec<KnownSecret>)>) {
        let changed: HashSet<String> = teams.iter().map(|t| t.id.clone()).collect();
        self.teams.extend(teams.into_iter().map(|t| (t.id.clone(), t)));
        if !changed.is_empty() {
            for holder in self.keys.values_mut() {
                let key = holder.access.key();
                if key.settings.team.as_ref().is_some_and(|t| changed.contains(t)) {
                    let team = key.settings.team.as_ref().and_then(|t| self.teams.get(t));
                    holder.access = Arc::new(Access::new(key.clone(), team.cloned()));
                }
            }
        }
        for (key, secrets) in keys {
            let id = key.id.clone();
            if let Some(old) = self.keys.remove(&id) {
                for (prefix, ..) in &old.secrets {
                    if let Some(ids) = self.by_prefix.get_mut(prefix) {
                        ids.retain(|i| *i != id);
                    }
                }
            }
            for (prefix, ..) in &secrets {
                self.by_prefix.entry(prefix.clone()).or_default().push(id.clone());
            }
            let team = key.settings.team.as_ref().and_then(|t| self.teams.get(t)).cloned();
            self.keys.insert(id, Holder { access: Arc::new(Access::new(key, team)), secrets });
        }
        self.by_prefix.retain(|_, ids| !ids.is_empty());
    }
}

/// Refreshes until the accounts are gone.
pub(super) async fn keep_fresh(shared: Weak<Shared>, db: Db, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let Some(shared) = shared.upgrade() else { return };
        // A failure shows as staleness, once it lasts.
        if let Err(e) = shared.directory.refresh(&db).await {
            *shared.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(e.to_string());
        }
    }
}
