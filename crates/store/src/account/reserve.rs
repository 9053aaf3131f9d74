//! Reserve, then settle: the life of one request.
//!
//! [`Accounts::reserve`] takes what the request may use at most from every limit
//! of key, team and end user, mostly in memory. [`Reservation::durable`] waits
//! until that is written: call it before anything of the answer leaves, and the
//! time it takes passes while the upstream works. [`Reservation::settle`] puts
//! what was used in place of what was reserved, once: it consumes the
//! reservation, and one that is dropped settles by its drop, as cancelled.

use super::{
    AccountError, Accounts, Access, Bound, Limit, Measure, ReserveError, Shared,
    cells::{Answer, Need},
    db,
    price::{Cost, PriceList, Tokens},
    usage::{CostColumns, Counts, Finish, UsageRow, int},
    writer::{Admit, Ask, Entry, Settle},
};
use ashlar_core::{Decimal, clock};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering::Relaxed},
};
use tokio::sync::{mpsc, oneshot};

/// A request that asks to be let in.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Its id, that of its response; never used twice.
    pub id: String,
    /// The request this is a further attempt of, a hedge or a retry: it is
    /// charged for tokens and money, not as a request.
    pub attempt_of: Option<String>,
    /// Its key; `None` on a server without keys: metered, not limited.
    pub access: Option<Arc<Access>>,
    /// The end user as [`Accounts::user_hash`] has it.
    pub end_user: Option<String>,
    /// The model.
    pub model: String,
    /// The adapter.
    pub adapter: Option<String>,
    /// The release that serves it.
    pub release: Option<String>,
    /// The backend it is to go to; of several the dearest.
    pub backend: String,
    /// The route, e.g. `/v1/chat/completions`.
    pub endpoint: String,
    /// Whether it streams.
    pub stream: bool,
    /// The most it can use: the prompt's tokens as input, the limit of generated
    /// tokens as output.
    pub most: Tokens,
    /// The most it can use of the machine for itself, in microseconds; for
    /// backends that are priced by it.
    pub most_machine_us: u64,
}

/// How it ended.
#[derive(Debug, Clone)]
pub struct Used {
    /// How.
    pub finish: Finish,
    /// Tokens by class.
    pub tokens: Tokens,
    /// Where the counts are from.
    pub counts: Counts,
    /// Microseconds of the machine for itself: of each step, its time by this
    /// request's share of it.
    pub machine_us: u64,
    /// The model that answered, where it is another than asked for.
    pub model: Option<String>,
    /// The backend that answered, where it is another.
    pub backend: Option<String>,
    /// The adapter that answered, where it is another.
    pub adapter: Option<String>,
    /// The release that answered, or none; it counts where `backend` is given.
    pub release: Option<String>,
    /// Microseconds before the first forward pass.
    pub queue_us: u64,
    /// Microseconds to the first token, where there was one.
    pub ttft_us: Option<u64>,
    /// Microseconds in all.
    pub total_us: u64,
    /// What went wrong.
    pub error: Option<String>,
    /// Whether model or guard refused.
    pub refusal: bool,
    /// The guard's verdicts in short, no contents.
    pub guard: Option<String>,
}

impl Used {
    /// An end with nothing used.
    pub fn new(finish: Finish) -> Self {
        Self {
            finish,
            tokens: Tokens::default(),
            counts: Counts::Measured,
            machine_us: 0,
            model: None,
            backend: None,
            adapter: None,
            release: None,
            queue_us: 0,
            ttft_us: None,
            total_us: 0,
            error: None,
            refusal: false,
            guard: None,
        }
    }
}

/// What of an open request is kept in the database: enough to settle it for a
/// process that died.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Open {
    pub(super) id: String,
    attempt_of: Option<String>,
    api_key: Option<String>,
    team: Option<String>,
    end_user: Option<String>,
    tags: BTreeMap<String, String>,
    model: String,
    adapter: Option<String>,
    release: Option<String>,
    backend: String,
    endpoint: String,
    stream: bool,
    at_ms: i64,
    most: Tokens,
    most_machine_us: u64,
    cost: CostColumns,
    /// Counter, start and end of its window, amount reserved.
    pub(super) charges: Vec<(Arc<str>, i64, Option<i64>, Decimal)>,
}

impl Open {
    fn row(&self, used: Used, cost: CostColumns, now_ms: i64) -> UsageRow {
        UsageRow {
            id: self.id.clone(),
            attempt_of: self.attempt_of.clone(),
            api_key: self.api_key.clone(),
            team: self.team.clone(),
            end_user: self.end_user.clone(),
            tags: self.tags.clone(),
            model: used.model.unwrap_or_else(|| self.model.clone()),
            adapter: used.adapter.or_else(|| self.adapter.clone()),
            release: if used.backend.is_some() { used.release } else { self.release.clone() },
            backend: used.backend.unwrap_or_else(|| self.backend.clone()),
            endpoint: self.endpoint.clone(),
            stream: self.stream,
            at_ms: self.at_ms,
            settled_ms: now_ms,
            tokens: (&used.tokens).into(),
            counts: used.counts,
            machine_us: int(used.machine_us),
            cost,
            queue_us: int(used.queue_us),
            ttft_us: used.ttft_us.map(int),
            total_us: int(used.total_us),
            finish: used.finish,
            error: used.error,
            refusal: used.refusal,
            guard: used.guard,
        }
    }

    /// The row of a request whose process died: charged with what was reserved,
    /// since nobody knows how far it came, and marked as estimated.
    pub(super) fn killed(&self, now_ms: i64) -> UsageRow {
        let used = Used {
            tokens: self.most,
            counts: Counts::Estimated,
            machine_us: self.most_machine_us,
            total_us: u64::try_from(now_ms - self.at_ms).unwrap_or(0).saturating_mul(1000),
            error: Some("the serving process ended before the answer did".into()),
            ..Used::new(Finish::Killed)
        };
        self.row(used, self.cost.clone(), now_ms)
    }
}

/// An admitted request. Dropped unsettled it settles as cancelled, with what was
/// reserved as the estimate of what was used.
#[derive(Debug)]
pub struct Reservation {
    shared: Arc<Shared>,
    facts: Arc<Open>,
    needs: Arc<[Need]>,
    prices: Option<Arc<PriceList>>,
    generation: u64,
    /// Whether it is reserved and not settled.
    open: bool,
    /// Whether the caller has it.
    handed: bool,
    written: Option<oneshot::Receiver<Result<(), AccountError>>>,
}

/// A limit and what of it is left beside this request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// The limit.
    pub limit: Limit,
    /// What is left, as far as this replica knows.
    pub left: Decimal,
    /// When the window ends.
    pub ends_ms: Option<i64>,
}

/// The settlement of a request on its way to the ledger.
#[derive(Debug)]
pub struct Settled {
    /// What it cost.
    pub cost: Cost,
    written: Option<(oneshot::Receiver<()>, mpsc::UnboundedSender<Entry>)>,
}

impl Settled {
    /// Waits until the row is in the ledger. Need not be called: the row gets
    /// there anyway.
    ///
    /// # Errors
    /// [`AccountError::Closed`] when the process ends before; the request is then
    /// settled by others.
    pub async fn written(self) -> Result<(), AccountError> {
        match self.written {
            Some((written, entries)) => {
                // Makes the writer hurry.
                let _ = entries.send(Entry::Flush(oneshot::channel().0));
                written.await.map_err(|_| AccountError::Closed)
            }
            None => Err(AccountError::Closed),
        }
    }
}

impl Accounts {
    /// Reserves what `request` may use at most against every limit of its key,
    /// team and end user: all, or none. Mostly some microseconds in memory; a
    /// transaction where a limit needs to be claimed from the database.
    ///
    /// # Errors
    /// [`ReserveError::Exceeded`] names the limit, its numbers and when to try
    /// again.
    pub async fn reserve(&self, request: Request) -> Result<Reservation, ReserveError> {
        let shared = self.shared();
        let prices = shared.prices();
        let at_ms = clock::now_ms();
        let cost = price(prices.as_deref(), &request.model, &request.backend, at_ms, &request.most, request.most_machine_us);
        let needs = needs(&request, &cost, at_ms)?;
        if request.id.is_empty() || request.id.contains('\0') {
            let why = format!("{:?} is no id", request.id);
            return Err(AccountError::Setting { field: "id".into(), why }.into());
        }
        let charge = |n: &Need| (n.cell.0.clone(), n.cell.1, n.end_ms, Decimal::from_picos(n.amount));
        let access = request.access;
        let facts = Arc::new(Open {
            id: request.id,
            attempt_of: request.attempt_of,
            api_key: access.as_ref().map(|a| a.key().id.clone()),
            team: access.as_ref().and_then(|a| a.team()).map(|t| t.id.clone()),
            end_user: request.end_user,
            tags: access.as_ref().map(|a| a.tags().clone()).unwrap_or_default(),
            model: request.model,
            adapter: request.adapter,
            release: request.release,
            backend: request.backend,
            endpoint: request.endpoint,
            stream: request.stream,
            at_ms,
            most: request.most,
            most_machine_us: request.most_machine_us,
            cost: (&cost).into(),
            charges: needs.iter().map(charge).collect(),
        });
        let body = db::batch(&*facts).map_err(ReserveError::Accounts)?;
        let mut reservation = Reservation {
            shared: shared.clone(),
            facts,
            needs: needs.into(),
            prices,
            generation: 0,
            open: false,
            handed: false,
            written: None,
        };
        let answer = shared.cells.lock().reserve(&reservation.needs);
        match answer {
            Answer::Exceeded(e) => Err(ReserveError::Exceeded(Box::new(e))),
            Answer::Reserved(generation) => {
                let (ack, written) = oneshot::channel();
                let admit = Admit { id: reservation.facts.id.clone(), body, ack };
                reservation.reserved(generation);
                if shared.entries.send(Entry::Admit(admit)).is_err() {
                    reservation.release();
                    return Err(AccountError::Closed.into());
                }
                shared.stats.in_memory.fetch_add(1, Relaxed);
                reservation.written = Some(written);
                reservation.handed = true;
                Ok(reservation)
            }
            Answer::Ask => {
                let (ack, answer) = oneshot::channel();
                let ask = Ask { reservation, body, ack };
                shared.stats.asked.fetch_add(1, Relaxed);
                shared.entries.send(Entry::Ask(Box::new(ask))).map_err(|_| AccountError::Closed)?;
                // Should this future be dropped while it waits, the reservation is
                // dropped with the answer and settles as unused.
                let mut reservation = answer.await.map_err(|_| AccountError::Closed)??;
                reservation.handed = true;
                Ok(reservation)
            }
        }
    }
}

impl Reservation {
    /// The request's id.
    pub fn id(&self) -> &str {
        &self.facts.id
    }

    /// When it was admitted.
    pub fn at_ms(&self) -> i64 {
        self.facts.at_ms
    }

    pub(super) fn needs(&self) -> Arc<[Need]> {
        self.needs.clone()
    }

    pub(super) fn reserved(&mut self, generation: u64) {
        self.generation = generation;
        self.open = true;
    }

    /// Gives back in memory what was reserved there.
    pub(super) fn release(&mut self) {
        if std::mem::take(&mut self.open) {
            let nothing = vec![0; self.needs.len()];
            self.shared.cells.lock().settle(self.generation, &self.needs, &nothing);
        }
    }

    /// Waits until the admission is written and survives the process. Nothing of
    /// an answer may leave before.
    ///
    /// # Errors
    /// When it could not be written: the request is then not admitted and the
    /// reservation void.
    pub async fn durable(&mut self) -> Result<(), AccountError> {
        let Some(written) = &mut self.written else { return Ok(()) };
        let result = written.await.unwrap_or(Err(AccountError::Closed));
        self.written = None;
        if let Err(e) = &result {
            self.release();
            // The row of another request with this id stays.
            if !matches!(e, AccountError::AlreadyAdmitted(_)) {
                let entry = Settle { id: self.facts.id.clone(), row: None, generation: u64::MAX, spent: Vec::new(), ack: None };
                let _ = self.shared.entries.send(Entry::Settle(entry));
            }
        }
        result
    }

    /// What is left of each of its limits.
    pub fn left(&self) -> Vec<Left> {
        if self.needs.is_empty() {
            return Vec::new();
        }
        let front = self.shared.cells.lock();
        let left = |n: &Need| Left {
            limit: n.bound.limit.clone(),
            left: Decimal::from_picos(front.left(n).max(0)),
            ends_ms: n.end_ms,
        };
        self.needs.iter().map(left).collect()
    }

    /// Takes it back without a row: its request was never sent, and another row
    /// stands for what was.
    pub fn withdraw(mut self) {
        if self.open {
            self.release();
            let entry = Settle { id: self.facts.id.clone(), row: None, generation: u64::MAX, spent: Vec::new(), ack: None };
            let _ = self.shared.entries.send(Entry::Settle(entry));
        }
    }

    /// Settles with what was used. Returns at once; the row is written in the
    /// background, also while the database cannot be reached.
    pub fn settle(mut self, used: Used) -> Settled {
        self.finish(used)
    }

    fn finish(&mut self, used: Used) -> Settled {
        let facts = &self.facts;
        let model = used.model.as_deref().unwrap_or(&facts.model);
        let backend = used.backend.as_deref().unwrap_or(&facts.backend);
        let cost = price(self.prices.as_deref(), model, backend, facts.at_ms, &used.tokens, used.machine_us);
        if !std::mem::take(&mut self.open) {
            return Settled { cost, written: None };
        }
        let actual = |need: &Need| match need.bound.limit.measure {
            Measure::Requests => need.amount,
            Measure::Tokens => Decimal::from(used.tokens.total()).picos(),
            // What is not known was at most what was reserved.
            Measure::Money => cost.total.map_or(need.amount, Decimal::picos),
        };
        let actual: Vec<i128> = self.needs.iter().map(actual).collect();
        self.shared.cells.lock().settle(self.generation, &self.needs, &actual);
        let (ack, written) = oneshot::channel();
        // A row is text and numbers, which always become JSON.
        let row = db::batch(&facts.row(used, (&cost).into(), clock::now_ms())).ok();
        let entry = Settle {
            id: facts.id.clone(),
            row,
            generation: self.generation,
            spent: self.needs.iter().map(|n| n.cell.clone()).zip(actual).collect(),
            ack: Some(ack),
        };
        let sent = self.shared.entries.send(Entry::Settle(entry)).is_ok();
        Settled { cost, written: sent.then(|| (written, self.shared.entries.clone())) }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        let mut used = Used::new(Finish::Cancelled);
        if self.handed {
            used.tokens = self.facts.most;
            used.machine_us = self.facts.most_machine_us;
            used.counts = Counts::Estimated;
        }
        let since = clock::now_ms() - self.facts.at_ms;
        used.total_us = u64::try_from(since).unwrap_or(0).saturating_mul(1000);
        self.finish(used);
    }
}

fn price(prices: Option<&PriceList>, model: &str, backend: &str, at_ms: i64, tokens: &Tokens, machine_us: u64) -> Cost {
    match prices {
        Some(list) => list.cost(model, backend, at_ms, tokens, machine_us),
        None => Cost { reason: Some("there is no price list".into()), ..Cost::default() },
    }
}

/// What the request asks of each limit.
fn needs(request: &Request, cost: &Cost, at_ms: i64) -> Result<Vec<Need>, ReserveError> {
    let Some(access) = &request.access else { return Ok(Vec::new()) };
    let mut needs = Vec::with_capacity(access.bounds.len());
    let mut add = |bound: Bound| -> Result<(), ReserveError> {
        let Limit { measure, window, currency, .. } = &bound.limit;
        let amount = match measure {
            Measure::Requests if request.attempt_of.is_some() => return Ok(()),
            Measure::Requests => Decimal::from(1),
            Measure::Tokens => Decimal::from(request.most.total()),
            Measure::Money if &cost.currency != currency && cost.currency.is_some() => {
                let (limit, list) = (currency.as_deref().unwrap_or(""), cost.currency.as_deref().unwrap_or(""));
                return Err(ReserveError::Unpriced(format!("it is in {limit}, the price list in {list}")));
            }
            Measure::Money => {
                let why = || cost.reason.clone().unwrap_or_else(|| "its cost is not known".into());
                cost.total.ok_or_else(|| ReserveError::Unpriced(why()))?
            }
        };
        let (start, end_ms) = (window.start(at_ms), window.end(at_ms));
        needs.push(Need { cell: (bound.id.clone(), start), end_ms, amount: amount.picos(), bound });
        Ok(())
    };
    for bound in &access.bounds {
        add(bound.clone())?;
    }
    if let Some(user) = &request.end_user {
        for bound in access.user_bounds(user) {
            add(bound)?;
        }
    }
    Ok(needs)
}
