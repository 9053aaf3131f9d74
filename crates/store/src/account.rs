//! Keys, limits and metering: who may ask, how much, and what it cost.
//!
//! Every request is admitted through [`Accounts::reserve`] and settles exactly
//! once into the usage ledger; see `account/reserve.rs` for its life,
//! `account/cells.rs` for how several processes share a limit, and
//! `account/writer.rs` for where durability is paid. The database is a file
//! (SQLite) or PostgreSQL; several processes may use either at once.
//!
//! What may not happen here: a request that is acknowledged and lost, or
//! settled twice; a limit overspent by two processes that each thought there was
//! room; a float in anything that is money; a secret in the database, in a log or
//! in an error.
//!
//! ```
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! use ashlar_store::{Accounts, AccountSettings, Finish, KeySettings, Request, Tokens, Used};
//! let home = tempfile::tempdir().unwrap();
//! let settings = AccountSettings::new(home.path().join("accounts.db").to_str().unwrap().parse().unwrap());
//! let accounts = Accounts::open(settings).await.unwrap();
//! let settings = KeySettings { name: "docs".into(), ..Default::default() };
//! let (key, secret) = accounts.create_key(&settings).await.unwrap();
//!
//! let access = accounts.authenticate(secret.reveal()).unwrap();
//! access.allows("small").unwrap();
//! let most = Tokens { input: 20, output: 100, ..Default::default() };
//! let request = Request { id: "resp-1".into(), access: Some(access), model: "small".into(), most, ..Default::default() };
//! let mut reservation = accounts.reserve(request).await.unwrap();
//! // … the request goes upstream …
//! reservation.durable().await.unwrap();
//! // … and the answer to the client.
//! let tokens = Tokens::of_whole(20, 0, 0, 7, 0).unwrap();
//! reservation.settle(Used { tokens, ..Used::new(Finish::Stop) }).written().await.unwrap();
//! assert_eq!(accounts.usage("resp-1").await.unwrap().unwrap().api_key, Some(key.id));
//! accounts.close().await.unwrap();
//! # });
//! ```

mod admin;
mod cells;
pub(crate) mod db;
mod directory;
mod error;
mod export;
mod key;
mod limit;
mod price;
mod reserve;
mod sweep;
mod usage;
mod writer;

pub use admin::Standing;
pub use db::Database;
pub use error::{AccountError, ReserveError};
pub use export::{FOCUS_COLUMNS, FocusIssuer, focus_rows, write_focus_csv};
pub use key::{Access, Denied, Key, KeySettings, Secret, Team, TeamSettings};
pub use limit::{Exceeded, Limit, Measure, Scope};
pub use price::{Cost, PriceList, TokenClass, Tokens};
pub use reserve::{Left, Request, Reservation, Settled, Used};
pub use usage::{CostColumns, Counts, Dimension, Finish, TokenColumns, UsageFilter, UsageRow, UsageSum};

use ashlar_core::{Digest, clock, digest::to_hex};
use cells::Cells;
use db::Db;
use directory::Directory;
use limit::Bound;
use serde::Serialize;
use std::{
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use writer::{Entry, Member, Writer};

/// Where accounts are, and how often replicas look at each other.
#[derive(Debug, Clone)]
pub struct AccountSettings {
    /// Where.
    pub database: Database,
    /// How often changes of keys are looked for.
    pub refresh: Duration,
    /// How long a revocation may go unseen: beyond it, no key is taken for good
    /// until keys could be read again. At least twice `refresh`.
    pub stale: Duration,
    /// How long a replica that is not heard of keeps its reservations
    /// (PostgreSQL; with SQLite its end is seen at once).
    pub lease: Duration,
    /// How often unused claims are given back.
    pub tick: Duration,
}

impl AccountSettings {
    /// The usual times: 1 s, 5 s, 15 s, 200 ms.
    pub fn new(database: Database) -> Self {
        Self {
            database,
            refresh: Duration::from_secs(1),
            stale: Duration::from_secs(5),
            lease: Duration::from_secs(15),
            tick: Duration::from_millis(200),
        }
    }

    fn check(&self) -> Result<(), AccountError> {
        let wrong = |field: &str, why: String| Err(AccountError::Setting { field: field.into(), why });
        if self.stale < self.refresh * 2 {
            return wrong("stale", format!("{:?} is less than twice refresh, {:?}", self.stale, self.refresh));
        }
        if self.lease < self.tick * 8 {
            return wrong("lease", format!("{:?} is less than eight times tick, {:?}", self.lease, self.tick));
        }
        if self.tick.is_zero() || self.refresh.is_zero() {
            return wrong("tick", "tick and refresh are times above zero".into());
        }
        Ok(())
    }
}

/// Keys, limits and the usage ledger, opened. Clones share it.
#[derive(Debug, Clone)]
pub struct Accounts(Arc<Owner>);

#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
    db: Db,
    settings: AccountSettings,
    salt: String,
    recovered: u64,
    refresher: JoinHandle<()>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.refresher.abort();
    }
}

/// What a reservation needs of the accounts.
#[derive(Debug)]
struct Shared {
    cells: Arc<Cells>,
    entries: mpsc::UnboundedSender<Entry>,
    prices: RwLock<Option<Arc<PriceList>>>,
    directory: Directory,
    stats: Stats,
    last_error: Mutex<Option<String>>,
}

impl Shared {
    fn prices(&self) -> Option<Arc<PriceList>> {
        self.prices.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[derive(Debug, Default)]
struct Stats {
    in_memory: AtomicU64,
    asked: AtomicU64,
    settled: AtomicU64,
    batches: AtomicU64,
    failures: AtomicU64,
}

/// What the accounts did since they were opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AccountStats {
    /// Requests let in from memory.
    pub in_memory: u64,
    /// Requests the database was asked about.
    pub asked: u64,
    /// Usage rows written.
    pub settled: u64,
    /// Transactions.
    pub batches: u64,
    /// Transactions that failed; what they held was tried again.
    pub failures: u64,
    /// Requests of dead processes that were settled at the opening.
    pub recovered: u64,
    /// What the database said last when it failed.
    pub last_error: Option<String>,
}

impl Accounts {
    /// Opens the accounts, making or migrating their tables if need be, and
    /// settles what dead processes left. Needs a Tokio runtime, on which it runs
    /// two tasks: the writer and the reader of keys.
    ///
    /// # Errors
    /// [`AccountError::Schema`] when a newer program wrote the tables, and when
    /// the database cannot be reached.
    pub async fn open(mut settings: AccountSettings) -> Result<Self, AccountError> {
        settings.check()?;
        if let Database::Sqlite(file) = &mut settings.database {
            // Locks are found by this name, also after a change of folder.
            *file = std::path::absolute(&*file).map_err(crate::StoreError::io(file))?;
        }
        let db = Db::open(&settings.database).await?;
        let salt = admin::salt(&db).await?;
        let recovered = sweep::sweep(&db, &settings, "").await?;
        let directory = Directory::new(settings.stale);
        directory.refresh(&db).await?;
        let member = Member::join(&db, &settings).await?;
        let (entries, queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            cells: Arc::default(),
            entries,
            prices: RwLock::default(),
            directory,
            stats: Stats::default(),
            last_error: Mutex::default(),
        });
        let writer = Writer::new(db.clone(), settings.clone(), &shared, member);
        // Ends by itself: with `close`, or with the last reservation.
        drop(tokio::spawn(writer.run(queue)));
        let refresher = tokio::spawn(directory::keep_fresh(Arc::downgrade(&shared), db.clone(), settings.refresh));
        let owner = Owner { shared, db, settings, salt, recovered, refresher };
        Ok(Self(Arc::new(owner)))
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }

    fn db(&self) -> &Db {
        &self.0.db
    }

    /// The key whose secret this is, if it is good now. Some hundred nanoseconds,
    /// in memory. A revocation by another replica is seen after
    /// [`AccountSettings::refresh`], and at the latest after
    /// [`AccountSettings::stale`].
    ///
    /// # Errors
    /// Why it is not let in.
    pub fn authenticate(&self, secret: &str) -> Result<Arc<Access>, Denied> {
        self.shared().directory.authenticate(secret, clock::now_ms())
    }

    /// The key of this id, if it is good now: for whoever showed its secret before.
    ///
    /// # Errors
    /// Why it is not let in.
    pub fn access(&self, id: &str) -> Result<Arc<Access>, Denied> {
        self.shared().directory.access(id, clock::now_ms())
    }

    /// The end user's name as the ledger has it: hashed with a salt of this
    /// database, so that the ledger alone does not tell who it was.
    pub fn user_hash(&self, user: &str) -> String {
        let salted = [self.0.salt.as_bytes(), user.as_bytes()].concat();
        to_hex(&Digest::of(&salted).as_bytes()[..16])
    }

    /// Prices requests admitted from now on by `list`, and remembers its text
    /// under its version.
    ///
    /// # Errors
    /// [`AccountError::PriceVersion`] when the version stands for another text.
    pub async fn set_prices(&self, list: PriceList) -> Result<(), AccountError> {
        admin::remember_prices(self.db(), &list).await?;
        *self.shared().prices.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(list));
        Ok(())
    }

    /// The price list in use.
    pub fn prices(&self) -> Option<Arc<PriceList>> {
        self.shared().prices()
    }

    /// What was done so far.
    pub fn stats(&self) -> AccountStats {
        let shared = self.shared();
        let stats = &shared.stats;
        AccountStats {
            in_memory: stats.in_memory.load(Relaxed),
            asked: stats.asked.load(Relaxed),
            settled: stats.settled.load(Relaxed),
            batches: stats.batches.load(Relaxed),
            failures: stats.failures.load(Relaxed),
            recovered: self.0.recovered,
            last_error: shared.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Waits until everything so far is written.
    ///
    /// # Errors
    /// When it could not be written; it is tried again all the same.
    pub async fn flush(&self) -> Result<(), AccountError> {
        let (ack, done) = oneshot::channel();
        self.shared().entries.send(Entry::Flush(ack)).map_err(|_| AccountError::Closed)?;
        done.await.map_err(|_| AccountError::Corrupt("the last batch could not be written and is tried again".into()))
    }

    /// Settles for processes that are gone, as every opening and every third of a
    /// lease do; how many requests.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn settle_dead(&self) -> Result<u64, AccountError> {
        sweep::sweep(self.db(), &self.0.settings, "").await
    }

    /// Writes what is left, gives all claims back and closes the connections.
    /// Requests still open are settled by others, as killed.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub async fn close(self) -> Result<(), AccountError> {
        self.0.refresher.abort();
        let (ack, done) = oneshot::channel();
        self.shared().entries.send(Entry::Close(ack)).map_err(|_| AccountError::Closed)?;
        let result = done.await.unwrap_or(Err(AccountError::Closed));
        self.db().close().await;
        result
    }
}
