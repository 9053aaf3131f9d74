//! The one task that writes: admissions, claims, settlements, in batches.
//!
//! Durability is paid here, once a batch: everything that arrived while the
//! last transaction ran goes into the next. An admission is acknowledged after
//! the commit that holds its reservation, and from then on survives `kill -9`;
//! a settlement deletes the reservation and writes the usage row in one
//! transaction, so that a request is in exactly one of the two. SQLite is not
//! synced at each commit (`synchronous = NORMAL`): a power cut, unlike a killed
//! process, may take the last moments with it. PostgreSQL does as its
//! `synchronous_commit` says.
//!
//! What may not happen here: a settlement is never dropped. While the database
//! cannot be reached it waits in memory, and nothing new is acknowledged. A
//! commit whose outcome is unknown is repeated: every statement says what shall
//! be, not by how much it changes. Counters are written by their replica alone,
//! with the number it holds.

use super::{
    AccountError, AccountSettings, ReserveError, Shared,
    cells::{Cells, CellId, Claims, Need},
    db::{self, Database, Db, Tx},
    reserve::Reservation,
    sweep, usage,
};
use crate::lock::Lock;
use ashlar_core::{Decimal, id};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// Entries of one transaction at most: some milliseconds of work.
const BATCH: usize = 1024;

/// How long a settlement waits for others.
const LINGER: Duration = Duration::from_millis(5);

/// How long an admission waits for half as many as are under way: alone it waits
/// for nobody, and among many a transaction costs each of them little.
const COMPANY: Duration = Duration::from_millis(1);

/// A request that memory let in, to be written down.
pub(super) struct Admit {
    pub(super) id: String,
    pub(super) body: String,
    pub(super) ack: oneshot::Sender<Result<(), AccountError>>,
}

/// A request that needs more than is claimed.
pub(super) struct Ask {
    pub(super) reservation: Reservation,
    pub(super) body: String,
    pub(super) ack: oneshot::Sender<Result<Reservation, ReserveError>>,
}

/// The end of a request. Without a row its reservation is only taken back.
pub(super) struct Settle {
    pub(super) id: String,
    pub(super) row: Option<String>,
    pub(super) generation: u64,
    pub(super) spent: Vec<(CellId, i128)>,
    pub(super) ack: Option<oneshot::Sender<()>>,
}

pub(super) enum Entry {
    Admit(Admit),
    Ask(Box<Ask>),
    Settle(Settle),
    Flush(oneshot::Sender<()>),
    Close(oneshot::Sender<Result<(), AccountError>>),
}

/// What the database has of a cell of ours.
#[derive(Debug, Clone, Copy)]
struct Written {
    spent: i128,
    end_ms: Option<i64>,
}

#[derive(Default)]
struct Batch {
    admits: Vec<Admit>,
    asks: Vec<Ask>,
    settles: Vec<Settle>,
    flushes: Vec<oneshot::Sender<()>>,
    close: Option<oneshot::Sender<Result<(), AccountError>>>,
}

/// A replica's membership: the row others see, and with SQLite the locked file
/// that tells them at once when this process is gone.
pub(super) struct Member {
    pub(super) id: String,
    pub(super) _lock: Option<Lock>,
}

impl Member {
    pub(super) async fn join(db: &Db, settings: &AccountSettings) -> Result<Self, AccountError> {
        let id = id::new("replica");
        let lock = sweep::lock(settings, &id)?;
        let mut tx = db.begin().await?;
        let sql = "INSERT INTO replica (id, started_ms, lease_until_ms) VALUES ($1, NOW_MS, NOW_MS + CAST($2 AS BIGINT))";
        tx.execute(sql, &[&id, &settings.lease.as_millis().to_string()]).await?;
        tx.commit().await?;
        Ok(Self { id, _lock: lock })
    }
}

pub(super) struct Writer {
    db: Db,
    settings: AccountSettings,
    shared: std::sync::Weak<Shared>,
    cells: Arc<Cells>,
    member: Member,
    written: HashMap<CellId, Written>,
    dirty: HashSet<CellId>,
    backlog: Vec<Settle>,
    /// Requests admitted and not settled, as far as was written.
    under_way: usize,
    replicas: i128,
    renewed: Instant,
    swept: Instant,
    failures: u32,
}

impl Writer {
    pub(super) fn new(db: Db, settings: AccountSettings, shared: &Arc<Shared>, member: Member) -> Self {
        Self {
            db,
            settings,
            shared: Arc::downgrade(shared),
            cells: shared.cells.clone(),
            member,
            written: HashMap::new(),
            dirty: HashSet::new(),
            backlog: Vec::new(),
            under_way: 0,
            replicas: 1,
            renewed: Instant::now(),
            swept: Instant::now(),
            failures: 0,
        }
    }

    /// Writes until the accounts are closed or all who could send are gone.
    pub(super) async fn run(mut self, mut entries: mpsc::UnboundedReceiver<Entry>) {
        let mut tick = tokio::time::interval(self.settings.tick);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Settlements that nobody waits for wait for company, so that no admission
        // waits for them; admissions wait a moment for each other.
        let mut held = Batch::default();
        let (mut until, mut soon) = (tokio::time::Instant::now(), tokio::time::Instant::now());
        loop {
            let waits = !held.settles.is_empty() || held.asks_in() > 0;
            let next = if held.asks_in() > 0 { soon.min(until) } else { until };
            let (settles, admits) = (held.settles.is_empty(), held.asks_in() == 0);
            let ticked = tokio::select! {
                entry = entries.recv() => match entry {
                    Some(entry) => { held.take(entry); false }
                    None => break,
                },
                _ = tokio::time::sleep_until(next), if waits => false,
                _ = tick.tick() => true,
            };
            for _ in 0..BATCH {
                let Ok(entry) = entries.try_recv() else { break };
                held.take(entry);
            }
            let now = tokio::time::Instant::now();
            if settles {
                until = now + LINGER;
            }
            if admits {
                soon = now + COMPANY;
            }
            let hurries = held.hurries();
            let settle = hurries || now >= until || held.settles.len() >= BATCH;
            let admit = hurries || now >= soon || held.asks_in() >= self.under_way.saturating_sub(held.settles.len()) / 2 || held.asks_in() >= BATCH;
            let mut batch = held.split(settle, admit || (settle && !held.settles.is_empty()));
            if batch.is_empty() && batch.close.is_none() && !ticked {
                continue;
            }
            let close = batch.close.take();
            self.turn(batch, ticked).await;
            if let Some(close) = close {
                // A closed channel refuses what comes after.
                entries.close();
                let mut last = Batch::default();
                while let Ok(entry) = entries.try_recv() {
                    last.take(entry);
                }
                self.turn(last, false).await;
                let _ = close.send(self.leave().await);
                return;
            }
        }
        self.backlog.append(&mut held.settles);
        // Nobody waits for the answer; what cannot be written now is found by others.
        let _ = self.leave().await;
    }

    async fn turn(&mut self, mut batch: Batch, ticked: bool) {
        batch.settles.splice(0..0, std::mem::take(&mut self.backlog));
        if ticked {
            let alone = self.replicas <= 1;
            self.dirty.extend(self.cells.lock().trim(alone, false));
        }
        let due = self.renewed.elapsed() > self.settings.lease / 4;
        let idle = batch.is_empty() && self.dirty.is_empty() && !due;
        if !idle {
            self.write(batch, ticked || due, due).await;
        }
        if ticked && self.swept.elapsed() > self.settings.lease / 3 {
            self.swept = Instant::now();
            match sweep::sweep(&self.db, &self.settings, &self.member.id).await {
                Ok(swept) => {
                    if let Some(shared) = self.shared.upgrade() {
                        shared.died(swept);
                    }
                }
                Err(e) => self.failed(&e),
            }
        }
    }

    /// Writes a batch and answers all who wait for it.
    async fn write(&mut self, mut batch: Batch, count: bool, renew: bool) {
        let mut claims = Claims::default();
        let mut verdicts = Vec::new();
        let before: Vec<(CellId, Option<Written>)> = self.add_spent(&batch.settles);
        let result = self.transact(&batch, &mut claims, &mut verdicts, count, renew).await;
        let accepted: Vec<Arc<[Need]>> = (batch.asks.iter().zip(&verdicts))
            .filter(|(_, v)| matches!(v, Verdict::Yes))
            .map(|(a, _)| a.reservation.needs())
            .collect();
        let accepted: Vec<&[Need]> = accepted.iter().map(|n| &**n).collect();
        let (generation, evicted) = {
            let mut front = self.cells.lock();
            match &result {
                Ok(_) => claims.apply(&mut front, &accepted),
                Err(_) => claims.undo(&mut front, &accepted),
            }
            let evicted = match &result {
                Ok(_) if count => front.evict(|id| self.written.get(id).filter(|_| !self.dirty.contains(id)).map(|w| w.spent)),
                _ => Vec::new(),
            };
            (front.generation(), evicted)
        };
        for id in evicted {
            self.written.remove(&id);
        }
        match result {
            Ok(admitted) => {
                self.failures = 0;
                self.under_way = (self.under_way + admitted.len()).saturating_sub(batch.settles.len());
                if let Some(shared) = self.shared.upgrade() {
                    shared.stats.batches.fetch_add(1, Relaxed);
                    shared.stats.settled.fetch_add(batch.settles.iter().filter(|s| s.row.is_some()).count() as u64, Relaxed);
                }
                batch.answer(verdicts, admitted, generation);
            }
            Err(e) => {
                for (id, old) in before.into_iter().rev() {
                    match old {
                        Some(old) => self.written.insert(id, old),
                        None => self.written.remove(&id),
                    };
                }
                // The outcome of a commit may be unknown: reservations that were
                // not acknowledged are taken back, settlements are repeated.
                let nobody = batch.asks.iter().map(|a| Settle {
                    id: a.reservation.id().to_owned(),
                    row: None,
                    generation: u64::MAX,
                    spent: Vec::new(),
                    ack: None,
                });
                self.backlog.extend(nobody);
                self.backlog.append(&mut batch.settles);
                self.dirty.extend(self.written.keys().cloned());
                batch.refuse(&e);
                self.failed(&e);
                if matches!(e, AccountError::Fenced) {
                    self.rejoin().await;
                } else {
                    // 20, 40, … 1280 ms.
                    self.failures = (self.failures + 1).min(7);
                    tokio::time::sleep(Duration::from_millis(10 << self.failures)).await;
                }
            }
        }
    }

    /// Adds what settlements spent; answers what was there before.
    fn add_spent(&mut self, settles: &[Settle]) -> Vec<(CellId, Option<Written>)> {
        let generation = self.cells.lock().generation();
        let mut before = Vec::new();
        for (id, amount) in settles.iter().filter(|s| s.generation == generation).flat_map(|s| &s.spent) {
            if let Some(w) = self.written.get_mut(id) {
                before.push((id.clone(), Some(*w)));
                w.spent += amount;
                self.dirty.insert(id.clone());
            }
        }
        before
    }

    /// The transaction. Answers the ids that were admitted.
    async fn transact(
        &mut self,
        batch: &Batch,
        claims: &mut Claims,
        verdicts: &mut Vec<Verdict>,
        count: bool,
        renew: bool,
    ) -> Result<HashSet<String>, AccountError> {
        let mut tx = self.db.begin().await?;
        // Before our own row is held: whoever settles for the dead takes the two
        // in this order.
        if !batch.asks.is_empty() {
            tx.lock_claims().await?;
        }
        self.hold_lease(&mut tx, renew).await?;
        if count {
            self.replicas = tx.one("SELECT CAST(COUNT(*) AS TEXT) FROM replica", &[]).await?;
        }
        let mut grants = Vec::new();
        if !batch.asks.is_empty() {
            self.read_counters(&mut tx, &batch.asks, claims).await?;
            let mut front = self.cells.lock();
            for ask in &batch.asks {
                let verdict = claims.decide(&mut front, &ask.reservation.needs());
                verdicts.push(verdict.map_or_else(|e| Verdict::No(Box::new(e)), |()| Verdict::Yes));
            }
            grants = claims.grant(&front, self.replicas);
        }
        let admitted = insert_reservations(&mut tx, &self.member.id, batch, verdicts).await?;
        settle(&mut tx, &batch.settles, &self.member.id).await?;
        self.write_counters(&mut tx, grants).await?;
        tx.commit().await?;
        self.dirty.clear();
        if renew {
            self.renewed = Instant::now();
        }
        Ok(admitted)
    }

    async fn hold_lease(&self, tx: &mut Tx, renew: bool) -> Result<(), AccountError> {
        if !renew && matches!(self.settings.database, Database::Sqlite(_)) {
            // Our locked file says that we live.
            return Ok(());
        }
        let held = if renew {
            let sql = "UPDATE replica SET lease_until_ms = NOW_MS + CAST($1 AS BIGINT) WHERE id = $2";
            tx.execute(sql, &[&self.settings.lease.as_millis().to_string(), &self.member.id]).await? == 1
        } else {
            !tx.rows("SELECT id FROM replica WHERE id = $1 HOLD", &[&self.member.id]).await?.is_empty()
        };
        if held { Ok(()) } else { Err(AccountError::Fenced) }
    }

    /// Reads what all replicas have claimed of the cells that are asked for.
    async fn read_counters(&mut self, tx: &mut Tx, asks: &[Ask], claims: &mut Claims) -> Result<(), AccountError> {
        let needs: HashMap<CellId, Need> =
            asks.iter().flat_map(|a| a.reservation.needs().to_vec()).map(|n| (n.cell.clone(), n)).collect();
        let wanted: Vec<(&str, i64)> = needs.keys().map(|(id, start)| (&**id, *start)).collect();
        let sql = "SELECT CAST(ROW_OF(c.limit_id, c.start_ms, c.replica, c.spent, c.claimed) AS TEXT) FROM EACH($1) AS e \
                   JOIN counter AS c ON c.limit_id = e.value->>0 AND c.start_ms = CAST(e.value->>1 AS BIGINT)";
        let mut others: HashMap<CellId, i128> = HashMap::new();
        let mut own: HashMap<CellId, (i128, i128)> = HashMap::new();
        for row in tx.rows(sql, &[&db::batch(&wanted)?]).await? {
            let (id, start, replica, spent, claimed): (Arc<str>, i64, String, Decimal, Decimal) = serde_json::from_str(&row)?;
            if replica == self.member.id {
                own.insert((id, start), (spent.picos(), claimed.picos()));
            } else {
                *others.entry((id, start)).or_insert(0) += claimed.picos().max(spent.picos());
            }
        }
        let mut front = self.cells.lock();
        for (id, need) in &needs {
            if !front.contains(id) {
                let (spent, claimed) = own.get(id).copied().unwrap_or((0, 0));
                front.load(id, need, spent, claimed);
                self.written.insert(id.clone(), Written { spent, end_ms: need.end_ms });
            }
            claims.read(&front, need, others.get(id).copied().unwrap_or(0));
        }
        Ok(())
    }

    async fn write_counters(&mut self, tx: &mut Tx, grants: Vec<(CellId, i128)>) -> Result<(), AccountError> {
        let rows: Vec<CounterRow> = {
            let front = self.cells.lock();
            let granted: HashSet<&CellId> = grants.iter().map(|(id, _)| id).collect();
            let dirty = self.dirty.iter().filter(|id| !granted.contains(id));
            let dirty = dirty.map(|id| (id.clone(), front.claimed(id).unwrap_or(0)));
            let row = |(id, claimed): (CellId, i128)| {
                let w = self.written.get(&id)?;
                let claimed = Decimal::from_picos(claimed.max(w.spent));
                Some((id.0, id.1, w.end_ms, Decimal::from_picos(w.spent), claimed))
            };
            dirty.chain(grants.iter().cloned()).filter_map(row).collect()
        };
        put_counters(tx, &self.member.id, &rows).await
    }

    /// Takes a new lease after others have taken the last one for dead. What was
    /// claimed under it is theirs now.
    async fn rejoin(&mut self) {
        self.cells.lock().reset();
        self.written.clear();
        self.dirty.clear();
        match Member::join(&self.db, &self.settings).await {
            Ok(member) => self.member = member,
            Err(e) => self.failed(&e),
        }
        self.renewed = Instant::now();
    }

    fn failed(&self, e: &AccountError) {
        if let Some(shared) = self.shared.upgrade() {
            shared.stats.failures.fetch_add(1, Relaxed);
            *shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(e.to_string());
        }
    }

    /// Gives all claims back and ends the membership; with requests still open,
    /// it is left for others to settle them.
    async fn leave(&mut self) -> Result<(), AccountError> {
        for _ in 0..3 {
            if self.backlog.is_empty() {
                break;
            }
            self.turn(Batch::default(), false).await;
        }
        let (changed, busy) = {
            let mut front = self.cells.lock();
            (front.trim(true, true), front.busy())
        };
        self.dirty.extend(changed);
        let mut tx = self.db.begin().await?;
        self.hold_lease(&mut tx, true).await?;
        self.write_counters(&mut tx, Vec::new()).await?;
        tx.commit().await?;
        if !busy && self.backlog.is_empty() {
            sweep::retire(&self.db, &self.settings, &self.member.id).await?;
        }
        Ok(())
    }
}

/// Limit, start and end of the window, spent, claimed.
pub(super) type CounterRow = (Arc<str>, i64, Option<i64>, Decimal, Decimal);

/// Writes what `replica` has spent and claimed: these numbers, whatever was there.
pub(super) async fn put_counters(tx: &mut Tx, replica: &str, rows: &[CounterRow]) -> Result<(), AccountError> {
    if rows.is_empty() {
        return Ok(());
    }
    let sql = "INSERT INTO counter (limit_id, start_ms, end_ms, replica, spent, claimed) \
               SELECT e.value->>0, CAST(e.value->>1 AS BIGINT), CAST(e.value->>2 AS BIGINT), $2, e.value->>3, e.value->>4 \
               FROM EACH($1) AS e WHERE 1 = 1 ON CONFLICT (limit_id, start_ms, replica) \
               DO UPDATE SET spent = excluded.spent, claimed = excluded.claimed";
    tx.execute(sql, &[&db::batch(rows)?, replica]).await.map(drop)
}

/// What became of an [`Ask`].
enum Verdict {
    Yes,
    No(Box<super::Exceeded>),
}

async fn insert_reservations(
    tx: &mut Tx,
    replica: &str,
    batch: &Batch,
    verdicts: &[Verdict],
) -> Result<HashSet<String>, AccountError> {
    let asked = batch.asks.iter().zip(verdicts).filter(|(_, v)| matches!(v, Verdict::Yes));
    let asked = asked.map(|(a, _)| (a.reservation.id(), &*a.body));
    let mut rows = String::from("[");
    for (id, body) in batch.admits.iter().map(|a| (&*a.id, &*a.body)).chain(asked) {
        let comma = if rows.len() > 1 { "," } else { "" };
        rows += &format!("{comma}[{},{body}]", serde_json::to_string(id)?);
    }
    if rows.len() == 1 {
        return Ok(HashSet::new());
    }
    rows.push(']');
    let sql = "INSERT INTO reservation (id, replica, body) WITH e AS MATERIALIZED (SELECT x.value FROM EACH($1) AS x) \
               SELECT e.value->>0, $2, CAST(e.value->1 AS TEXT) FROM e WHERE NOT EXISTS (SELECT 1 FROM usage WHERE usage.id = e.value->>0) \
               ON CONFLICT (id) DO NOTHING RETURNING id";
    Ok(tx.rows(sql, &[&rows, replica]).await?.into_iter().collect())
}

async fn settle(tx: &mut Tx, settles: &[Settle], replica: &str) -> Result<(), AccountError> {
    if settles.is_empty() {
        return Ok(());
    }
    let ids: Vec<[&str; 1]> = settles.iter().map(|s| [&*s.id]).collect();
    let sql = "DELETE FROM reservation WHERE id IN (SELECT e.value->>0 FROM EACH($1) AS e)";
    tx.execute(sql, &[&db::batch(&ids)?]).await?;
    let rows: Vec<&str> = settles.iter().filter_map(|s| s.row.as_deref()).collect();
    if !rows.is_empty() {
        usage::insert(tx, &format!("[{}]", rows.join(",")), replica).await?;
    }
    Ok(())
}

impl Batch {
    fn take(&mut self, entry: Entry) {
        match entry {
            Entry::Admit(a) => self.admits.push(a),
            Entry::Ask(a) => self.asks.push(*a),
            Entry::Settle(s) => self.settles.push(s),
            Entry::Flush(ack) => self.flushes.push(ack),
            Entry::Close(ack) => self.close = Some(ack),
        }
    }

    fn is_empty(&self) -> bool {
        self.admits.is_empty() && self.asks.is_empty() && self.settles.is_empty() && self.flushes.is_empty()
    }

    /// Requests that wait to be let in.
    fn asks_in(&self) -> usize {
        self.admits.len() + self.asks.len()
    }

    /// Takes out what is to be written now.
    fn split(&mut self, settle: bool, admit: bool) -> Self {
        let now = |due, held: &mut Vec<Settle>| if due { std::mem::take(held) } else { Vec::new() };
        let mut out = Self { settles: now(settle, &mut self.settles), ..Self::default() };
        if admit {
            (out.admits, out.asks) = (std::mem::take(&mut self.admits), std::mem::take(&mut self.asks));
        }
        (out.flushes, out.close) = (std::mem::take(&mut self.flushes), self.close.take());
        out
    }

    /// Whether someone waits for what was settled.
    fn hurries(&self) -> bool {
        !self.flushes.is_empty() || self.close.is_some()
    }

    /// Tells all who wait that it is written. Of several with one id the first
    /// has it. A receiver that is gone does not wait: an admission then settles
    /// through the drop of its reservation.
    fn answer(self, verdicts: Vec<Verdict>, mut admitted: HashSet<String>, generation: u64) {
        let taken = |id: &str| AccountError::AlreadyAdmitted(id.into());
        for a in self.admits {
            let first = admitted.remove(&a.id);
            let _ = a.ack.send(if first { Ok(()) } else { Err(taken(&a.id)) });
        }
        for (mut a, verdict) in self.asks.into_iter().zip(verdicts) {
            let _ = match verdict {
                Verdict::Yes => {
                    a.reservation.reserved(generation);
                    if admitted.remove(a.reservation.id()) {
                        a.ack.send(Ok(a.reservation))
                    } else {
                        let e = taken(a.reservation.id());
                        a.reservation.release();
                        a.ack.send(Err(e.into()))
                    }
                }
                Verdict::No(e) => a.ack.send(Err(ReserveError::Exceeded(e))),
            };
        }
        for ack in self.settles.into_iter().filter_map(|s| s.ack) {
            let _ = ack.send(());
        }
        for ack in self.flushes {
            let _ = ack.send(());
        }
    }

    /// Tells those who want in that they are not. A flush waits no longer: what
    /// it waited for is tried again.
    fn refuse(self, e: &AccountError) {
        for a in self.admits {
            let _ = a.ack.send(Err(e.clone()));
        }
        for a in self.asks {
            let _ = a.ack.send(Err(e.clone().into()));
        }
        drop(self.flushes);
    }
}
