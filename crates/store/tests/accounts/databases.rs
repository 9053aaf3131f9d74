//! The databases that each test body runs on: a SQLite file, and a throw-away
//! PostgreSQL cluster of the Debian package where that is installed.

use ashlar_store::{AccountSettings, Database};
use sqlx::{Connection as _, PgConnection, SqliteConnection, sqlite::SqliteConnectOptions};
use std::{
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};
use tokio::sync::OnceCell;

/// A fresh database, gone with this value.
pub struct Place {
    pub database: Database,
    _folder: tempfile::TempDir,
}

impl Place {
    /// Settings whose times suit a test: a replica's end is seen within 2 s.
    pub fn settings(&self) -> AccountSettings {
        settings(self.database.clone())
    }

    /// As `ASHLAR_TEST_ACCOUNTS` names it to another process.
    pub fn url(&self) -> String {
        match &self.database {
            Database::Sqlite(file) => file.to_str().unwrap().into(),
            Database::Postgres(url) => url.clone(),
        }
    }

    /// Runs SQL that no program of ours would.
    pub async fn sql(&self, sql: &str) {
        match &self.database {
            Database::Sqlite(file) => {
                let options = SqliteConnectOptions::new().filename(file).create_if_missing(true);
                let mut c = SqliteConnection::connect_with(&options).await.unwrap();
                sqlx::raw_sql(sql).execute(&mut c).await.unwrap();
                c.close().await.unwrap();
            }
            Database::Postgres(url) => {
                let mut c = PgConnection::connect(url).await.unwrap();
                sqlx::raw_sql(sql).execute(&mut c).await.unwrap();
                c.close().await.unwrap();
            }
        }
    }

    /// The one number that `sql` gives, which casts it to BIGINT.
    pub async fn number(&self, sql: &str) -> i64 {
        match &self.database {
            Database::Sqlite(file) => {
                let mut c = SqliteConnection::connect(file.to_str().unwrap()).await.unwrap();
                sqlx::query_scalar(sql).fetch_one(&mut c).await.unwrap()
            }
            Database::Postgres(url) => {
                let mut c = PgConnection::connect(url).await.unwrap();
                sqlx::query_scalar(sql).fetch_one(&mut c).await.unwrap()
            }
        }
    }
}

pub fn settings(database: Database) -> AccountSettings {
    AccountSettings {
        refresh: Duration::from_millis(50),
        stale: Duration::from_secs(10),
        lease: Duration::from_millis(1500),
        tick: Duration::from_millis(50),
        ..AccountSettings::new(database)
    }
}

pub fn sqlite() -> Place {
    let folder = tempfile::tempdir().unwrap();
    Place { database: Database::Sqlite(folder.path().join("accounts.db")), _folder: folder }
}

/// A database of its own in the cluster of this process; `None`, and said so,
/// where there is no PostgreSQL.
pub async fn postgres(test: &str) -> Option<Place> {
    static CLUSTER: OnceCell<Option<PathBuf>> = OnceCell::const_new();
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let Some(socket) = CLUSTER.get_or_init(start).await else {
        eprintln!("skipped: {test}: there is no PostgreSQL here (Debian package postgresql, or ASHLAR_POSTGRES_BIN)");
        return None;
    };
    let name = format!("t{}", NEXT.fetch_add(1, Relaxed));
    let mut c = PgConnection::connect(&url(socket, "postgres")).await.unwrap();
    sqlx::query(&format!("CREATE DATABASE {name}")).execute(&mut c).await.unwrap();
    c.close().await.unwrap();
    Some(Place { database: Database::Postgres(url(socket, &name)), _folder: tempfile::tempdir().unwrap() })
}

fn url(socket: &Path, name: &str) -> String {
    format!("postgres://ashlar@localhost/{name}?host={}", socket.display())
}

/// Where `initdb` and `postgres` are.
fn programs() -> Option<PathBuf> {
    if let Some(bin) = std::env::var_os("ASHLAR_POSTGRES_BIN") {
        return Some(bin.into());
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|e| e.path().join("bin")).collect();
    found.retain(|bin| bin.join("initdb").is_file());
    found.sort();
    found.pop()
}

/// Starts a cluster that ends, and is deleted, with this process, however that
/// ends: its shell waits for our end of a pipe to close.
async fn start() -> Option<PathBuf> {
    let Some(bin) = programs() else {
        assert!(std::env::var_os("ASHLAR_REQUIRE_PEERS").is_none_or(|v| v != "1"), "PostgreSQL is required here");
        return None;
    };
    let folder = tempfile::tempdir().unwrap().keep();
    let mut shell = Command::new("sh");
    // PostgreSQL does not run as root.
    if let Some((uid, gid)) = unprivileged() {
        chown(&folder, Some(uid), Some(gid)).unwrap();
        shell.uid(uid).gid(gid);
    }
    let script = r#"
        "$0/initdb" -D "$1/data" -U ashlar --auth=trust --no-sync -E UTF8 --locale=C >"$1/log" 2>&1
        "$0/postgres" -D "$1/data" -k "$1" -c listen_addresses= -c fsync=off -c max_connections=200 >>"$1/log" 2>&1 &
        cat >/dev/null
        kill -INT $!
        wait
        rm -rf "$1"
    "#;
    // It ends when we do: there is nobody left to wait for it.
    #[allow(clippy::zombie_processes)]
    let mut child = shell
        .args(["-c", script])
        .arg(&bin)
        .arg(&folder)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Open until the process ends.
    std::mem::forget(child.stdin.take());
    for _ in 0..600 {
        if let Ok(c) = PgConnection::connect(&url(&folder, "postgres")).await {
            c.close().await.unwrap();
            return Some(folder);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
    panic!("PostgreSQL of {} does not start:\n{log}", bin.display());
}

/// Someone who is not root, where we are.
fn unprivileged() -> Option<(u32, u32)> {
    use std::os::unix::fs::MetadataExt as _;
    if std::fs::metadata("/proc/self").ok()?.uid() != 0 {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let find = |name: &str| {
        let line = users.lines().find(|l| l.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2).map(|id| id.parse().ok());
        Some((ids.next()??, ids.next()??))
    };
    find("postgres").or_else(|| find("nobody"))
}

/// Makes a test of each body for each database.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(crate::databases::sqlite()).await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                if let Some(place) = crate::databases::postgres(stringify!($name)).await {
                    super::$name(place).await;
                }
            })*
        }
    };
}
pub(crate) use on_both;
