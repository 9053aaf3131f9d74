//! One way to speak to SQLite and to PostgreSQL.
//!
//! Every argument is text (JSON for a batch, so that a thousand rows are one
//! statement), every answer one column of text (a JSON array of the row), and
//! SQL is written once, with a few words put in the dialect: `EACH($n)` is the
//! elements of a JSON array, one row `e.value` each; `ROW_OF(…)` and
//! `OBJECT_OF(…)` make JSON; `JSONTYPE` is the type `->>` takes; `NOW_MS` is the
//! clock that leases are held against, the server's where replicas may sit on
//! machines whose clocks disagree; `HOLD` locks the row it reads. Rejected: `sqlx::Any`, which has neither; two copies of each
//! statement; a builder of SQL.

use super::AccountError;
use sqlx::{
    PgPool, Postgres, Sqlite, SqlitePool, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use std::{
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};
use tokio::sync::{Mutex, OwnedMutexGuard};

const MIGRATIONS: &[&str] = &[include_str!("schema/1.sql"), include_str!("schema/2.sql")];

/// PostgreSQL's advisory locks, numbers of our own choosing: "ashl" + one digit.
const MIGRATE_LOCK: &str = "418430774321";
const CLAIM_LOCK: &str = "418430774322";

/// Where accounts are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Database {
    /// One file; several processes of one machine may share it.
    Sqlite(PathBuf),
    /// `postgres://user@host/name`, for replicas on several machines.
    Postgres(String),
}

impl FromStr for Database {
    type Err = AccountError;

    /// Reads `postgres://…`, `sqlite:FILE` or the name of a file.
    fn from_str(text: &str) -> Result<Self, AccountError> {
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Self::Postgres(text.into()));
        }
        let file = text.strip_prefix("sqlite://").or_else(|| text.strip_prefix("sqlite:")).unwrap_or(text);
        if file.is_empty() || file.contains("://") {
            // A URL may hold a password: only its scheme is repeated.
            let scheme = text.split_once("://").map_or("", |(s, _)| s);
            return Err(AccountError::Database(scheme.into()));
        }
        Ok(Self::Sqlite(file.into()))
    }
}

#[derive(Debug, Clone)]
enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// An open database.
#[derive(Debug, Clone)]
pub(super) struct Db {
    pool: Pool,
    /// SQLite has one writer; waiting here is cheaper than in its busy loop.
    writer: Arc<Mutex<()>>,
}

enum Inner {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

/// A write transaction; dropped without [`Tx::commit`] it leaves no trace.
pub(super) struct Tx {
    inner: Inner,
    _one_writer: Option<OwnedMutexGuard<()>>,
}

impl Db {
    pub(super) async fn open(at: &Database) -> Result<Self, AccountError> {
        let pool = match at {
            Database::Sqlite(file) => {
                let options = SqliteConnectOptions::new()
                    .filename(file)
                    .create_if_missing(true)
                    .journal_mode(SqliteJournalMode::Wal)
                    .synchronous(SqliteSynchronous::Normal)
                    .busy_timeout(Duration::from_secs(60));
                let pool = SqlitePoolOptions::new().max_connections(4).test_before_acquire(false);
                Pool::Sqlite(pool.connect_with(options).await?)
            }
            Database::Postgres(url) => {
                let options: PgConnectOptions = url.parse()?;
                let options = options.application_name("ashlar");
                let pool = PgPoolOptions::new().max_connections(4).acquire_timeout(Duration::from_secs(10));
                Pool::Postgres(pool.connect_with(options).await?)
            }
        };
        let db = Self { pool, writer: Arc::default() };
        db.migrate(MIGRATIONS).await?;
        Ok(db)
    }

    pub(super) async fn close(&self) {
        match &self.pool {
            Pool::Sqlite(p) => p.close().await,
            Pool::Postgres(p) => p.close().await,
        }
    }

    pub(super) async fn begin(&self) -> Result<Tx, AccountError> {
        Ok(match &self.pool {
            Pool::Sqlite(p) => {
                let guard = self.writer.clone().lock_owned().await;
                let tx = p.begin_with("BEGIN IMMEDIATE").await?;
                Tx { inner: Inner::Sqlite(tx), _one_writer: Some(guard) }
            }
            Pool::Postgres(p) => Tx { inner: Inner::Postgres(p.begin().await?), _one_writer: None },
        })
    }

    /// Rows of a query outside a transaction.
    pub(super) async fn rows(&self, sql: &str, args: &[&str]) -> Result<Vec<String>, AccountError> {
        Ok(match &self.pool {
            Pool::Sqlite(p) => {
                let sql = sqlite(sql);
                let query = args.iter().fold(sqlx::query_scalar(&sql), |q, a| q.bind(*a));
                query.fetch_all(p).await?
            }
            Pool::Postgres(p) => {
                let sql = postgres(sql);
                let query = args.iter().fold(sqlx::query_scalar(&sql), |q, a| q.bind(*a));
                query.fetch_all(p).await?
            }
        })
    }

    async fn migrate(&self, migrations: &[&str]) -> Result<(), AccountError> {
        let mut tx = self.begin().await?;
        tx.lock(MIGRATE_LOCK).await?;
        tx.execute("CREATE TABLE IF NOT EXISTS account_schema (version BIGINT PRIMARY KEY)", &[]).await?;
        let sql = "SELECT CAST(COALESCE(MAX(version), 0) AS TEXT) FROM account_schema";
        let found: i64 = tx.one(sql, &[]).await?;
        let known = migrations.len() as i64;
        if found > known || found < 0 {
            return Err(AccountError::Schema { found, known });
        }
        for (version, sql) in (1i64..).zip(migrations).skip(found as usize) {
            match &mut tx.inner {
                Inner::Sqlite(t) => sqlx::raw_sql(sql).execute(&mut **t).await.map(drop)?,
                Inner::Postgres(t) => sqlx::raw_sql(sql).execute(&mut **t).await.map(drop)?,
            }
            let insert = "INSERT INTO account_schema (version) VALUES (CAST($1 AS BIGINT))";
            tx.execute(insert, &[&version.to_string()]).await?;
        }
        tx.commit().await
    }
}

impl Tx {
    pub(super) async fn commit(self) -> Result<(), AccountError> {
        match self.inner {
            Inner::Sqlite(t) => t.commit().await?,
            Inner::Postgres(t) => t.commit().await?,
        }
        Ok(())
    }

    /// Runs a statement; how many rows it changed.
    pub(super) async fn execute(&mut self, sql: &str, args: &[&str]) -> Result<u64, AccountError> {
        Ok(match &mut self.inner {
            Inner::Sqlite(t) => {
                let sql = sqlite(sql);
                let query = args.iter().fold(sqlx::query(&sql), |q, a| q.bind(*a));
                query.execute(&mut **t).await?.rows_affected()
            }
            Inner::Postgres(t) => {
                let sql = postgres(sql);
                let query = args.iter().fold(sqlx::query(&sql), |q, a| q.bind(*a));
                query.execute(&mut **t).await?.rows_affected()
            }
        })
    }

    /// Rows of a query, or of a statement that returns some.
    pub(super) async fn rows(&mut self, sql: &str, args: &[&str]) -> Result<Vec<String>, AccountError> {
        Ok(match &mut self.inner {
            Inner::Sqlite(t) => {
                let sql = sqlite(sql);
                let query = args.iter().fold(sqlx::query_scalar(&sql), |q, a| q.bind(*a));
                query.fetch_all(&mut **t).await?
            }
            Inner::Postgres(t) => {
                let sql = postgres(sql);
                let query = args.iter().fold(sqlx::query_scalar(&sql), |q, a| q.bind(*a));
                query.fetch_all(&mut **t).await?
            }
        })
    }

    /// The one value of a query that has one.
    pub(super) async fn one<T: FromStr>(&mut self, sql: &str, args: &[&str]) -> Result<T, AccountError> {
        let rows = self.rows(sql, args).await?;
        let text = rows.first().ok_or_else(|| AccountError::Corrupt(format!("no row from {sql}")))?;
        text.parse().map_err(|_| AccountError::Corrupt(format!("{text:?} from {sql}")))
    }

    /// Alone with all counters until the transaction ends. SQLite's writer is
    /// alone with everything anyway.
    pub(super) async fn lock_claims(&mut self) -> Result<(), AccountError> {
        self.lock(CLAIM_LOCK).await
    }

    async fn lock(&mut self, number: &str) -> Result<(), AccountError> {
        if matches!(self.inner, Inner::Postgres(_)) {
            let sql = "SELECT CAST(pg_advisory_xact_lock(CAST($1 AS BIGINT)) AS TEXT)";
            self.rows(sql, &[number]).await?;
        }
        Ok(())
    }
}

fn sqlite(sql: &str) -> String {
    let words = [
        ("ROW_OF(", "json_array("),
        ("OBJECT_OF(", "json_object("),
        ("JSONTYPE", "TEXT"),
        ("NOW_MS", "CAST(unixepoch('subsec') * 1000 AS BIGINT)"),
        (" HOLD", ""),
    ];
    put(sql, |arg| format!("json_each({arg})"), words)
}

fn postgres(sql: &str) -> String {
    let words = [
        ("ROW_OF(", "json_build_array("),
        ("OBJECT_OF(", "json_build_object("),
        ("JSONTYPE", "jsonb"),
        ("NOW_MS", "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"),
        (" HOLD", " FOR SHARE"),
    ];
    put(sql, |arg| format!("jsonb_array_elements(CAST({arg} AS jsonb))"), words)
}

/// Puts the words in a dialect.
fn put(sql: &str, each: impl Fn(&str) -> String, words: [(&str, &str); 5]) -> String {
    let mut out = String::with_capacity(sql.len() + 64);
    let mut rest = sql;
    while let Some((before, after)) = rest.split_once("EACH(") {
        let (arg, tail) = after.split_once(')').unwrap_or((after, ""));
        out.push_str(before);
        out.push_str(&each(arg));
        rest = tail;
    }
    out.push_str(rest);
    words.iter().fold(out, |sql, (word, with)| sql.replace(word, with))
}

/// A batch of rows as one argument. PostgreSQL's text holds no NUL: it becomes
/// the replacement character.
pub(crate) fn batch<T: serde::Serialize + ?Sized>(rows: &T) -> Result<String, AccountError> {
    let text = serde_json::to_string(rows)?;
    Ok(if text.contains("\\u0000") { without_nul(&text) } else { text })
}

/// JSON with each escaped NUL replaced, and no escaped backslash before `u0000`
/// taken for one.
fn without_nul(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(tail) = rest.strip_prefix("\\u0000") {
            out.push('\u{fffd}');
            rest = tail;
        } else {
            // A backslash and the ASCII character it escapes.
            out.push_str(&rest[..2]);
            rest = &rest[2..];
        }
    }
    out.push_str(rest);
    out
}

/// The path of the file that a SQLite replica holds locked while it lives.
pub(super) fn lock_file(database: &Path, replica: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(format!(".{replica}.lock"));
    name.into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let at = |s: &str| s.parse::<Database>();
        assert_eq!(at("sqlite:/a/b.db").unwrap(), Database::Sqlite("/a/b.db".into()));
        assert_eq!(at("b.db").unwrap(), Database::Sqlite("b.db".into()));
        assert!(matches!(at("postgres://u@h/d").unwrap(), Database::Postgres(_)));
        let refused = at("mysql://root:secret@h/d").unwrap_err().to_string();
        assert!(refused.contains("mysql") && !refused.contains("secret"), "{refused}");
    }

    #[test]
    fn nul_is_replaced_and_its_spelling_kept() {
        let text = batch(&["a\0b", "\\u0000", "\\\0"]).unwrap();
        let back: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, ["a\u{fffd}b", "\\u0000", "\\\u{fffd}"]);
    }
}
