//! The record of one response: admitted before any work, settled exactly once.
//!
//! Every completion endpoint goes through [`Recorder`]. It settles when the
//! answer ends, when it fails, or, through its drop, when whoever held it went
//! away: a client that disconnects drops its HTTP body and with it the
//! recorder. All entries pass one writer task in order (`ledger`), so that a
//! settlement never overtakes its admission and dropping needs no runtime.
//!
//! With accounts, a request's reservation there is its admission, written before
//! anything of the answer leaves. When it is over, its usage row and its response
//! row are written once each, in this order, some milliseconds later, in batches
//! that nobody waits for: a process killed before leaves the reservation, which
//! settles as killed, and so does the response. Without accounts, the response is admitted in
//! the ledger, and its end is waited for. Either way it is in the ledger for
//! whoever looks at it over HTTP (`Ledger::flush`).
//!
//! What may not happen here: a second settlement (`open` is cleared by the
//! first, the store checks it again), or an answer without an admission: nothing
//! of it leaves before that is acknowledged ([`Recorder::admitted`]). The backend
//! is asked meanwhile, so that its time and the disk's are not added up. A killed
//! process leaves admissions open; `Store::settle_orphans` and the opening of the
//! accounts close those.
//!
//! Rejected: a task spawned by each drop, which races with its own admission
//! and with the end of the process.

use crate::{
    app::App,
    ask::Ask,
    door::Place,
    guard,
    ledger::Entry,
    machine::Share,
    metrics::Sample,
    refusal,
    route::{Decision, Target},
    series::Phases,
    upstream::{Chunk, End as Ending, Piece, Tokens},
};
use ashlar_api::Timings;
use ashlar_core::clock;
use ashlar_store::{Accounts, Admission, Answered, Cost, Counts, Ended, Finish, Reservation, Settlement, StoreError, Used};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// A response in flight, as the console shows it.
pub(crate) struct Live {
    id: String,
    model: String,
    endpoint: &'static str,
    stream: bool,
    at_ms: i64,
    arrived: Instant,
    prompt: AtomicU32,
    tokens: AtomicU32,
    /// Microseconds + 1; 0 before the first token.
    ttft_us: AtomicU64,
}

/// All responses in flight.
#[derive(Default)]
pub(crate) struct LiveTable(Mutex<BTreeMap<String, Arc<Live>>>);

impl LiveTable {
    fn with<T>(&self, f: impl FnOnce(&mut BTreeMap<String, Arc<Live>>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn to_json(&self) -> serde_json::Value {
        let rows = self.with(|t| t.values().cloned().collect::<Vec<_>>());
        rows.iter()
            .map(|l| {
                let ttft = l.ttft_us.load(Relaxed);
                serde_json::json!({
                    "id": l.id, "model": l.model, "endpoint": l.endpoint, "stream": l.stream,
                    "at_ms": l.at_ms, "elapsed_ms": l.arrived.elapsed().as_millis() as u64,
                    "prompt_tokens": l.prompt.load(Relaxed), "tokens": l.tokens.load(Relaxed),
                    "ttft_ms": (ttft > 0).then(|| (ttft - 1) as f64 / 1e3),
                })
            })
            .collect()
    }
}

/// What is known of a request before it runs.
pub(crate) struct Intake {
    pub(crate) id: String,
    pub(crate) release: Option<String>,
    pub(crate) model: String,
    pub(crate) backend: String,
    pub(crate) endpoint: &'static str,
    pub(crate) seed: Option<u64>,
    pub(crate) stream: bool,
    pub(crate) arrived: Instant,
    /// Tokens of the prompt, guessed: what is booked when no one counts.
    pub(crate) prompt_estimate: u32,
    pub(crate) decision: Arc<Decision>,
    /// What is set aside for it in the accounts.
    pub(crate) reservation: Option<Reservation>,
    /// Held while it is under way; `None` of a copy, which takes no client's.
    pub(crate) place: Option<Place>,
    /// What the guard does.
    pub(crate) guard: Arc<guard::Log>,
}

/// How a response ended.
enum End<'a> {
    Done(&'a Ending),
    Failed(&'a str),
    Cancelled,
}

/// The open record of one response.
pub(crate) struct Recorder {
    app: Arc<App>,
    live: Arc<Live>,
    decision: Arc<Decision>,
    reservation: Option<Reservation>,
    place: Option<Place>,
    guard: Arc<guard::Log>,
    /// Who it was admitted for.
    first: Answered,
    /// What is written with its end, where the accounts have admitted it.
    unwritten: Option<Admission>,
    /// Who it is with, and under which name for clients.
    target: Option<(Arc<Target>, String)>,
    /// Its part of that target's machine, where it is measured.
    share: Option<Share>,
    prompt_estimate: u32,
    /// Something was sent to a backend that bills by what it reads.
    remote: bool,
    answer: String,
    /// The answer, once settled, was a refusal.
    refused: bool,
    cached: u32,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last: Option<Instant>,
    /// The store's word on the admission, until it is heard.
    admitted: Option<oneshot::Receiver<Result<(), StoreError>>>,
    open: bool,
}

impl Recorder {
    /// Hands the admission to the ledger's writer.
    pub(crate) fn admit(app: Arc<App>, intake: Intake) -> Self {
        let live = Arc::new(Live {
            id: intake.id.clone(),
            model: intake.model.clone(),
            endpoint: intake.endpoint,
            stream: intake.stream,
            at_ms: clock::now_ms(),
            arrived: intake.arrived,
            prompt: AtomicU32::new(0),
            tokens: AtomicU32::new(0),
            ttft_us: AtomicU64::new(0),
        });
        app.live.with(|t| t.insert(live.id.clone(), live.clone()));
        if intake.place.is_some() {
            app.series.arrived(app.in_flight.load(Relaxed));
        }
        let first = Answered {
            release: intake.release.clone(),
            model: intake.model.clone(),
            backend: intake.backend.clone(),
        };
        let (ack, admitted) = oneshot::channel();
        let admission = Admission {
            id: intake.id,
            release: intake.release,
            model: intake.model,
            backend: intake.backend,
            endpoint: intake.endpoint.to_owned(),
            at_ms: live.at_ms,
            seed: intake.seed,
            stream: intake.stream,
        };
        let (admitted, unwritten, open) = match intake.reservation {
            Some(_) => (None, Some(admission), true),
            None => (Some(admitted), None, app.ledger.send(Entry::Admit(admission, ack))),
        };
        // From here on the drop settles, also when the client leaves while the
        // store is still writing: the settlement is behind the admission.
        Self {
            app,
            live,
            decision: intake.decision,
            reservation: intake.reservation,
            place: intake.place,
            guard: intake.guard,
            first,
            unwritten,
            target: None,
            share: None,
            prompt_estimate: intake.prompt_estimate,
            remote: false,
            answer: String::new(),
            refused: false,
            cached: 0,
            started: None,
            first_token: None,
            last: None,
            admitted,
            open,
        }
    }

    /// Waits until the admission is written.
    ///
    /// # Errors
    /// When it is not taken; there is nothing to settle then.
    pub(crate) async fn admitted(&mut self) -> Result<(), String> {
        if let Some(word) = self.admitted.take() {
            let gone = |_| Err(StoreError::Task("the ledger's writer has ended".into()));
            if let Err(e) = word.await.unwrap_or_else(gone) {
                self.open = false;
                return Err(e.to_string());
            }
        }
        if let Some(reservation) = &mut self.reservation
            && let Err(e) = reservation.durable().await
        {
            (self.open, self.reservation) = (false, None);
            return Err(e.to_string());
        }
        Ok(())
    }

    pub(crate) fn id(&self) -> &str {
        &self.live.id
    }

    /// The model that answers, as clients see it; the first choice until one does.
    fn model(&self) -> &str {
        self.target.as_ref().map_or(&self.live.model, |(_, model)| model)
    }

    /// Whether the settled answer was a refusal.
    pub(crate) fn refused(&self) -> bool {
        self.refused
    }

    /// The backend failed in the middle of its answer.
    pub(crate) fn upstream_error(&self, backend: &str, class: &'static str) {
        self.app.metrics.upstream_error(backend, class);
    }

    /// The request is with `target` from now on, as `model` for clients.
    pub(crate) fn sent_to(&mut self, target: &Arc<Target>, model: &str, remote: bool) {
        let same = self.target.as_ref().is_some_and(|(t, _)| Arc::ptr_eq(&t.node, &target.node));
        if !same {
            let measured = self.app.by_machine(target, self.live.at_ms);
            self.share = measured.then(|| target.node.machine.share(Instant::now()));
        }
        self.target = Some((target.clone(), model.to_owned()));
        self.remote = remote;
    }

    /// Takes note of a piece that came at `now`; one that ends the answer is
    /// settled before this returns.
    pub(crate) async fn note(&mut self, piece: &Piece, now: Instant) {
        match piece {
            Piece::Started { prompt_tokens, cached_tokens } => {
                self.started = Some(now);
                self.cached = *cached_tokens;
                self.live.prompt.store(*prompt_tokens, Relaxed);
            }
            Piece::Text(text) => self.token(text, 1, now),
            Piece::Chunk(chunk) if chunk.gains > 0 => self.token(&chunk.text, chunk.gains, now),
            // Text that was held back: its tokens came before.
            Piece::Chunk(Chunk { text, .. }) | Piece::Rest(text) => self.answer.push_str(text),
            Piece::Done(end) => self.settle_and_wait(End::Done(end)).await,
        }
    }

    fn token(&mut self, text: &str, tokens: u32, now: Instant) {
        self.answer.push_str(text);
        self.live.tokens.fetch_add(tokens, Relaxed);
        match self.last {
            Some(last) => {
                let gap = (now - last).as_secs_f64();
                self.app.metrics.token_gap(self.model(), self.live.endpoint, gap);
                if self.place.is_some() {
                    self.app.series.token_gap(gap);
                }
            }
            None => {
                self.first_token = Some(now);
                let us = (now - self.live.arrived).as_micros();
                let us = u64::try_from(us).unwrap_or(u64::MAX - 1);
                self.live.ttft_us.store(us + 1, Relaxed);
            }
        }
        self.last = Some(now);
    }

    /// Settles as an error, and waits for it to be written.
    pub(crate) async fn fail(&mut self, message: &str) {
        self.settle_and_wait(End::Failed(message)).await;
    }

    /// Settles as cancelled, and waits for it to be written.
    pub(crate) async fn cancel(&mut self) {
        self.settle_and_wait(End::Cancelled).await;
    }

    async fn settle_and_wait(&mut self, end: End<'_>) {
        // The accounts' word on the admission is enough to let the end leave.
        let (ack, written) = if self.unwritten.is_some() { (None, None) } else {
            let (ack, written) = oneshot::channel();
            (Some(ack), Some(written))
        };
        if self.settle(end, ack)
            && let Some(written) = written
        {
            let _ = written.await;
        }
    }

    /// Sends the one settlement; false when it was sent before.
    fn settle(&mut self, end: End<'_>, ack: Option<oneshot::Sender<()>>) -> bool {
        if !std::mem::take(&mut self.open) {
            return false;
        }
        let tokens = self.live.tokens.load(Relaxed);
        let counted = match self.live.prompt.load(Relaxed) {
            // No one counted: what was read is a guess, what came is at least
            // this.
            0 if self.remote => Tokens::estimate(self.prompt_estimate, tokens),
            prompt => Tokens {
                input: prompt.saturating_sub(self.cached),
                cache_read: self.cached.min(prompt),
                output: tokens,
                ..Tokens::default()
            },
        };
        let since = |t: Option<Instant>| t.map(|t| t - self.live.arrived);
        let (finish, tokens, queue, error, refused) = match end {
            End::Done(end) => {
                let queue = end.timings.map(|t: Timings| Duration::from_secs_f64(t.queue_ms.max(0.0) / 1e3));
                (ledger_finish(end.finish), end.tokens, queue, None, end.refused)
            }
            End::Failed(e) => (Finish::Error, counted, since(self.started), Some(e.to_owned()), false),
            End::Cancelled => (Finish::Cancelled, counted, since(self.started), None, false),
        };
        let (ttft, total) = (since(self.first_token), self.live.arrived.elapsed());
        // The guard looks between reading and sending.
        let (waited, s) = (self.guard.waited_s(), |d: Option<Duration>| d.map(|d| d.as_secs_f64()));
        let phases = Phases::of(self.decision.sent_s() - waited, waited, s(queue).unwrap_or(0.0), s(ttft), total.as_secs_f64());
        self.decision.settled(tokens, phases);
        let refusal = refused || refusal::opens_with_refusal(&self.answer);
        self.refused = refusal;
        let answered = self.target.as_ref().map(|(target, model)| Answered {
            release: self.app.release_of(target),
            model: model.clone(),
            backend: target.node.name.clone(),
        });
        let target = self.target.as_ref().map(|(t, _)| t);
        let machine_us = self.share.take().map_or(0, |s| s.micros(Instant::now()));
        let (cost, usage_row) = match self.reservation.take() {
            Some(reservation) => {
                let used = Used {
                    tokens: tokens.classes(),
                    counts: if tokens.estimated { Counts::Estimated } else { Counts::Measured },
                    machine_us,
                    model: target.map(|t| t.model.clone()),
                    backend: target.map(|t| t.node.name.clone()),
                    release: answered.as_ref().and_then(|a| a.release.clone()),
                    queue_us: queue.map_or(0, micros),
                    ttft_us: ttft.map(micros),
                    total_us: micros(total),
                    error: error.clone(),
                    refusal,
                    ..Used::new(finish)
                };
                let settled = reservation.settle(used);
                (settled.cost.clone(), Some(settled))
            }
            None => (self.app.cost(target.map(|t| &**t), self.live.at_ms, &tokens.classes(), machine_us), None),
        };
        let usage = tokens.usage();
        let sample = Sample {
            model: self.model(),
            endpoint: self.live.endpoint,
            finish: finish.as_str(),
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens(),
            completion_tokens: usage.completion_tokens,
            queue_s: queue.map(|d| d.as_secs_f64()),
            ttft_s: ttft.map(|d| d.as_secs_f64()),
            total_s: total.as_secs_f64(),
            refusal,
            cost: amount(&cost).zip(cost.currency.as_deref()),
            estimated: tokens.estimated,
        };
        self.app.metrics.settled(&sample);
        // A copy's end is no client's.
        if self.place.is_some() {
            self.app.series.settled(&sample, phases);
        }
        let answer = std::mem::take(&mut self.answer);
        let ms = |d: Option<Duration>| d.map_or(0.0, |d| d.as_secs_f64() * 1e3);
        let ended = Ended {
            id: self.live.id.clone(),
            admission: self.unwritten.take(),
            settlement: Settlement {
                finish: finish.as_str().to_owned(),
                prompt_tokens: usage.prompt_tokens.into(),
                cached_tokens: usage.cached_tokens().into(),
                completion_tokens: usage.completion_tokens.into(),
                queue_ms: ms(queue),
                ttft_ms: ms(ttft),
                total_ms: ms(Some(total)),
                cost: cost.total,
                refusal,
                answer: (!answer.is_empty()).then_some(answer),
                error,
                guard: self.guard.json(),
            },
            answered: answered.filter(|a| *a != self.first),
            route: serde_json::to_string(&*self.decision).ok(),
        };
        self.app.ledger.send(Entry::Settle(ended, usage_row, ack))
    }
}

/// The ledger's name of an end.
fn ledger_finish(finish: ashlar_api::Finish) -> Finish {
    match finish {
        ashlar_api::Finish::Stop => Finish::Stop,
        ashlar_api::Finish::Length => Finish::Length,
        ashlar_api::Finish::ToolCalls => Finish::ToolCalls,
        ashlar_api::Finish::ContentFilter => Finish::ContentFilter,
        ashlar_api::Finish::Cancelled => Finish::Cancelled,
    }
}

fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

/// A cost for a counter of floats.
fn amount(cost: &Cost) -> Option<f64> {
    cost.total.map(|d| d.picos() as f64 / 1e12)
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.settle(End::Cancelled, None);
        self.app.live.with(|t| t.remove(&self.live.id));
    }
}

/// Books a request that was sent to `target` and beaten by another: a row of its
/// own, with the prompt guessed.
pub(crate) fn book_lost(app: &App, ask: &Ask, model: &str, target: &Target, id: &str, reservation: Option<Reservation>) {
    let why = "a hedge that lost; its tokens are estimated";
    let tokens = Tokens::estimate(ask.prompt_estimate(), 0);
    let total = ask.arrived.elapsed();
    let (cost, usage) = match reservation {
        Some(reservation) => {
            let settled = reservation.settle(Used {
                tokens: tokens.classes(),
                counts: Counts::Estimated,
                model: Some(target.model.clone()),
                backend: Some(target.node.name.clone()),
                release: app.release_of(target),
                total_us: micros(total),
                error: Some(why.into()),
                ..Used::new(Finish::Cancelled)
            });
            (settled.cost.clone(), Some(settled))
        }
        None => (app.cost(Some(target), clock::now_ms(), &tokens.classes(), 0), None),
    };
    let admission = Admission {
        id: id.to_owned(),
        release: app.release_of(target),
        model: model.to_owned(),
        backend: target.node.name.clone(),
        endpoint: ask.endpoint.path().to_owned(),
        at_ms: clock::now_ms(),
        seed: None,
        stream: ask.stream,
    };
    let settlement = Settlement {
        finish: Finish::Cancelled.as_str().to_owned(),
        prompt_tokens: tokens.prompt().into(),
        total_ms: total.as_secs_f64() * 1e3,
        cost: cost.total,
        error: Some(why.into()),
        ..Settlement::default()
    };
    let ended = Ended { id: id.to_owned(), admission: Some(admission), settlement, answered: None, route: None };
    if !app.ledger.send(Entry::Settle(ended, usage, None)) {
        app.metrics.ledger_error();
    }
}

/// Writes down the responses of processes that died, where they could not do so
/// themselves: those killed under way, and those whose end is in the accounts
/// alone.
pub(crate) fn record_left(app: &App) {
    for row in app.state.accounts.iter().flat_map(Accounts::take_left) {
        let count = |n: i64| n.max(0).unsigned_abs();
        let killed = row.finish == Finish::Killed;
        let t = &row.tokens;
        let settlement = Settlement {
            finish: row.finish.as_str().to_owned(),
            // Of one that was killed nobody knows how far it came.
            prompt_tokens: if killed { 0 } else { count(t.input) + count(t.cache_read) + count(t.cache_write) },
            cached_tokens: if killed { 0 } else { count(t.cache_read) },
            completion_tokens: if killed { 0 } else { count(t.output) + count(t.reasoning) },
            queue_ms: row.queue_us as f64 / 1e3,
            ttft_ms: row.ttft_us.unwrap_or(0) as f64 / 1e3,
            total_ms: row.total_us as f64 / 1e3,
            cost: row.cost.cost,
            refusal: row.refusal,
            answer: None,
            error: row.error,
            guard: None,
        };
        let admission = Admission {
            id: row.id.clone(),
            release: row.release,
            model: row.model,
            backend: row.backend,
            endpoint: row.endpoint,
            at_ms: row.at_ms,
            seed: None,
            stream: row.stream,
        };
        let left = Ended { id: row.id, admission: Some(admission), settlement, answered: None, route: None };
        if !app.ledger.send(Entry::Left(left)) {
            app.metrics.ledger_error();
        }
    }
}
