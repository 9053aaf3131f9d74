//! Settling for the dead.
//!
//! With SQLite a replica holds a file locked while it lives, and the operating
//! system lets go of it with the process: the dead are known at once. With
//! PostgreSQL a replica is dead once its lease has ended by the server's clock;
//! should it live after all, it finds its row gone and starts anew. Either way
//! deleting the replica's row, its reservations and its counters is one
//! transaction with the usage rows that replace them, so that of two sweepers
//! one finds nothing.

use super::{
    AccountError, AccountSettings,
    cells::CellId,
    db::{self, Database, Db, Tx},
    reserve::Open,
    usage::{self, UsageRow},
    writer::{CounterRow, put_counters},
};
use crate::lock::{self, Lock};
use ashlar_core::{Decimal, clock};
use std::{collections::HashMap, sync::Arc};

/// Counters of windows that ended longer ago are deleted, in milliseconds.
const KEEP: &str = "172800000";

/// What was found of dead replicas.
#[derive(Debug, Default)]
pub(super) struct Swept {
    /// Settled now.
    pub(super) killed: Vec<UsageRow>,
    /// What they had settled last, themselves.
    pub(super) last: Vec<UsageRow>,
}

impl Swept {
    fn add(&mut self, other: Self) {
        self.killed.extend(other.killed);
        self.last.extend(other.last);
    }
}

/// Takes the file that says that `replica` lives.
pub(super) fn lock(settings: &AccountSettings, replica: &str) -> Result<Option<Lock>, AccountError> {
    match &settings.database {
        Database::Sqlite(file) => Ok(lock::try_exclusive(&db::lock_file(file, replica))?),
        Database::Postgres(_) => Ok(None),
    }
}

/// Settles what dead replicas left open; what was found.
pub(super) async fn sweep(db: &Db, settings: &AccountSettings, own: &str) -> Result<Swept, AccountError> {
    let mut settled = Swept::default();
    let sql = "SELECT CAST(ROW_OF(id, lease_until_ms - NOW_MS) AS TEXT) FROM replica WHERE id <> $1";
    for row in db.rows(sql, &[own]).await? {
        let (id, left_ms): (String, i64) = serde_json::from_str(&row)?;
        settled.add(match &settings.database {
            Database::Sqlite(file) => {
                let path = db::lock_file(file, &id);
                let Some(_dead) = lock::try_exclusive(&path)? else { continue };
                let settled = take_over(db, &id, false).await?;
                // Where it cannot be removed it lies there, empty and harmless.
                let _ = std::fs::remove_file(&path);
                settled
            }
            Database::Postgres(_) if left_ms > 0 => continue,
            Database::Postgres(_) => take_over(db, &id, true).await?,
        });
    }
    let mut tx = db.begin().await?;
    tx.execute("DELETE FROM counter WHERE end_ms < NOW_MS - CAST($1 AS BIGINT)", &[KEEP]).await?;
    tx.commit().await?;
    Ok(settled)
}

/// Ends the membership of a replica that has nothing open.
pub(super) async fn retire(db: &Db, settings: &AccountSettings, replica: &str) -> Result<(), AccountError> {
    take_over(db, replica, false).await?;
    if let Database::Sqlite(file) = &settings.database {
        let _ = std::fs::remove_file(db::lock_file(file, replica));
    }
    Ok(())
}

async fn take_over(db: &Db, replica: &str, lease: bool) -> Result<Swept, AccountError> {
    let mut tx = db.begin().await?;
    tx.lock_claims().await?;
    let last = usage::last_of(&mut tx, replica).await?;
    let ended = if lease { " AND lease_until_ms < NOW_MS" } else { "" };
    if tx.execute(&format!("DELETE FROM replica WHERE id = $1{ended}"), &[replica]).await? == 0 {
        return Ok(Swept::default());
    }
    let left = tx.rows("DELETE FROM reservation WHERE replica = $1 RETURNING body", &[replica]).await?;
    let left = left.iter().map(|body| Ok(serde_json::from_str(body)?)).collect::<Result<Vec<Open>, AccountError>>()?;
    let now = clock::now_ms();
    let rows: Vec<UsageRow> = left.iter().map(|open| open.killed(now)).collect();
    for part in rows.chunks(1024) {
        usage::insert(&mut tx, &db::batch(part)?, replica).await?;
    }
    fold(&mut tx, replica, &left).await?;
    tx.commit().await?;
    Ok(Swept { killed: rows, last })
}

/// Adds what the replica spent, and what it had reserved, to the counters of the
/// dead; what else it had claimed is free again.
async fn fold(tx: &mut Tx, replica: &str, left: &[Open]) -> Result<(), AccountError> {
    let sql = "SELECT CAST(ROW_OF(limit_id, start_ms, end_ms, spent) AS TEXT) FROM counter WHERE replica = $1";
    let mut spent: HashMap<CellId, (Option<i64>, i128)> = HashMap::new();
    let mut add = |id: Arc<str>, start, end, amount: Decimal| {
        let cell = spent.entry((id, start)).or_insert((end, 0));
        cell.1 += amount.picos();
    };
    for row in tx.rows(sql, &[replica]).await? {
        let (id, start, end, amount): (Arc<str>, i64, Option<i64>, Decimal) = serde_json::from_str(&row)?;
        add(id, start, end, amount);
    }
    for charge in left.iter().flat_map(|open| &open.charges) {
        add(charge.0.clone(), charge.1, charge.2, charge.3);
    }
    tx.execute("DELETE FROM counter WHERE replica = $1", &[replica]).await?;
    let cells: Vec<(&str, i64)> = spent.keys().map(|(id, start)| (&**id, *start)).collect();
    let sql = "SELECT CAST(ROW_OF(c.limit_id, c.start_ms, c.spent) AS TEXT) FROM EACH($1) AS e \
               JOIN counter AS c ON c.limit_id = e.value->>0 AND c.start_ms = CAST(e.value->>1 AS BIGINT) WHERE c.replica = ''";
    for row in tx.rows(sql, &[&db::batch(&cells)?]).await? {
        let (id, start, amount): (Arc<str>, i64, Decimal) = serde_json::from_str(&row)?;
        if let Some(cell) = spent.get_mut(&(id, start)) {
            cell.1 += amount.picos();
        }
    }
    let row = |((id, start), (end, n))| (id, start, end, Decimal::from_picos(n), Decimal::from_picos(n));
    let rows: Vec<CounterRow> = spent.into_iter().map(row).collect();
    put_counters(tx, "", &rows).await
}
