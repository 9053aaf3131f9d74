//! The record of one response: admitted before any work, settled exactly once.
//!
//! Every completion endpoint goes through [`Recorder`]. It settles when the
//! answer ends, when it fails, or, through its drop, when whoever held it went
//! away: a client that disconnects drops its HTTP body and with it the
//! recorder. All entries pass one writer task in order, so that a settlement
//! never overtakes its admission and dropping needs no runtime; it writes in one
//! transaction what came while it wrote the last. The usage row, with what the
//! answer cost, goes the same way in the accounts, whose database may be another
//! one; both have the same id and the same end.
//!
//! What may not happen here: a second settlement (`open` is cleared by the
//! first, the store checks it again), one that is lost while the ledger cannot be
//! written (it is kept and tried again), or an answer without an admission:
//! nothing of it leaves before both have acknowledged that
//! ([`Recorder::admitted`]). The backend is asked meanwhile, so that its time and
//! the disk's are not added up. A killed process leaves admissions open;
//! `Store::settle_orphans` and the opening of the accounts close those.
//!
//! Rejected: a task spawned by each drop, which races with its own admission
//! and with the end of the process.

use crate::{
    app::App,
    ask::Ask,
    metrics::{Metrics, Sample},
    refusal,
    route::{Decision, Target},
    upstream::{End as Ending, Piece, Tokens},
};
use ashlar_api::Timings;
use ashlar_core::clock;
use ashlar_store::{Admission, Answered, Cost, Counts, Ended, Finish, Reservation, Settlement, Store, StoreError, Used};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// Most entries taken at once.
const BATCH: usize = 256;
/// How long a ledger that cannot be written is left alone.
const PAUSE: Duration = Duration::from_millis(100);

enum Entry {
    Admit(Admission, oneshot::Sender<Result<(), StoreError>>),
    Settle(Ended, Option<oneshot::Sender<()>>),
    Flush(oneshot::Sender<()>),
}

/// The way to the writer task.
pub(crate) struct Ledger(mpsc::UnboundedSender<Entry>);

impl Ledger {
    /// A ledger and the task that writes it; the task ends when the ledger and
    /// every recorder are gone.
    pub(crate) fn new(store: Store, metrics: Arc<Metrics>) -> (Self, impl Future<Output = ()>) {
        let (tx, mut rx) = mpsc::unbounded_channel();
        let writer = async move {
            let (mut entries, mut batch) = (Vec::with_capacity(BATCH), Batch::default());
            loop {
                let more = rx.recv_many(&mut entries, BATCH);
                // What could not be written is tried again, also when nothing comes.
                let pause = if batch.ends.is_empty() { Duration::MAX } else { PAUSE };
                let over = tokio::time::timeout(pause, more).await.is_ok_and(|n| n == 0);
                entries.drain(..).for_each(|e| batch.take(e));
                batch.write(&store, &metrics).await;
                if over {
                    break;
                }
            }
        };
        (Self(tx), writer)
    }

    /// Waits until all entries so far are written.
    pub(crate) async fn flush(&self) {
        let (ack, done) = oneshot::channel();
        if self.0.send(Entry::Flush(ack)).is_ok() {
            let _ = done.await;
        }
    }
}

/// What one transaction writes.
#[derive(Default)]
struct Batch {
    begins: Vec<Admission>,
    admitted: Vec<oneshot::Sender<Result<(), StoreError>>>,
    /// Kept until they are written.
    ends: Vec<Ended>,
    settled: Vec<Option<oneshot::Sender<()>>>,
    flushes: Vec<oneshot::Sender<()>>,
}

impl Batch {
    fn take(&mut self, entry: Entry) {
        match entry {
            Entry::Admit(admission, ack) => {
                self.begins.push(admission);
                self.admitted.push(ack);
            }
            Entry::Settle(ended, ack) => {
                self.ends.push(ended);
                self.settled.push(ack);
            }
            Entry::Flush(ack) => self.flushes.push(ack),
        }
    }

    /// Writes and answers. A receiver that is gone does not wait for the answer.
    /// When it fails, who asks to be admitted is refused, and what is over stays.
    async fn write(&mut self, store: &Store, metrics: &Metrics) {
        let done = match store.record(&self.begins, &self.ends).await {
            Ok(done) => done,
            Err(e) => {
                metrics.ledger_error();
                self.begins.clear();
                for ack in self.admitted.drain(..) {
                    let _ = ack.send(Err(StoreError::Task(e.to_string())));
                }
                // Nobody waits for a ledger that is out of order.
                self.settled.iter_mut().for_each(|ack| *ack = None);
                return self.flushes.clear();
            }
        };
        for (a, ack) in self.begins.drain(..).zip(self.admitted.drain(..)) {
            let known = || StoreError::AlreadyAdmitted(a.id.clone());
            let _ = ack.send(done.admitted.contains(&a.id).then_some(()).ok_or_else(known));
        }
        for (e, ack) in self.ends.drain(..).zip(self.settled.drain(..)) {
            if !done.settled.contains(&e.id) {
                metrics.ledger_error();
            }
            if let Some(ack) = ack {
                let _ = ack.send(());
            }
        }
        for ack in self.flushes.drain(..) {
            let _ = ack.send(());
        }
    }
}

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

    /// Those that a client waits for: copies take no one's place.
    pub(crate) fn len(&self) -> usize {
        self.with(|t| t.keys().filter(|id| !id.starts_with(crate::mirror::PREFIX)).count())
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
    /// Who it was admitted for.
    first: Answered,
    /// Who it is with, and under which name for clients.
    target: Option<(Arc<Target>, String)>,
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
        let sent = app.ledger.0.send(Entry::Admit(admission, ack)).is_ok();
        // From here on the drop settles, also when the client leaves while the
        // store is still writing: the settlement is behind the admission.
        Self {
            app,
            live,
            decision: intake.decision,
            reservation: intake.reservation,
            first,
            target: None,
            prompt_estimate: intake.prompt_estimate,
            remote: false,
            answer: String::new(),
            refused: false,
            cached: 0,
            started: None,
            first_token: None,
            last: None,
            admitted: Some(admitted),
            open: sent,
        }
    }

    /// Waits until the admission is written, in the ledger and in the accounts.
    ///
    /// # Errors
    /// When either does not take it; what the other has of it is settled then.
    pub(crate) async fn admitted(&mut self) -> Result<(), String> {
        let Some(word) = self.admitted.take() else { return Ok(()) };
        let durable = async {
            match &mut self.reservation {
                Some(r) => r.durable().await.map_err(|e| e.to_string()),
                None => Ok(()),
            }
        };
        let (word, durable) = tokio::join!(word, durable);
        let gone = || StoreError::Task("the ledger's writer has ended".into());
        if let Err(e) = word.unwrap_or_else(|_| Err(gone())) {
            self.open = false;
            if let Some(r) = self.reservation.take() {
                r.settle(Used { error: Some(e.to_string()), ..Used::new(Finish::Error) });
            }
            return Err(e.to_string());
        }
        if let Err(e) = durable {
            self.reservation = None;
            self.fail(&e).await;
            return Err(e);
        }
        Ok(())
    }

    pub(crate) fn id(&self) -> &str {
        &self.live.id
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
        self.target = Some((target.clone(), model.to_owned()));
        self.remote = remote;
    }

    /// Takes note of a piece that came at `now`; one that ends the answer is
    /// settled before this returns, so that whoever sees the end also finds the
    /// record.
    pub(crate) async fn note(&mut self, piece: &Piece, now: Instant) {
        match piece {
            Piece::Started { prompt_tokens, cached_tokens } => {
                self.started = Some(now);
                self.cached = *cached_tokens;
                self.live.prompt.store(*prompt_tokens, Relaxed);
            }
            Piece::Text(text) => self.token(text, 1, now),
            Piece::Chunk(chunk) if chunk.gains > 0 => self.token(&chunk.text, chunk.gains, now),
            Piece::Chunk(_) => {}
            Piece::Done(end) => self.settle_and_wait(End::Done(end)).await,
        }
    }

    fn token(&mut self, text: &str, tokens: u32, now: Instant) {
        self.answer.push_str(text);
        self.live.tokens.fetch_add(tokens, Relaxed);
        match self.last {
            Some(last) => self.app.metrics.token_gap((now - last).as_secs_f64()),
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
        let (ack, written) = oneshot::channel();
        let Some(settled) = self.settle(end, Some(ack)) else { return };
        match settled {
            // Neither is lost when it cannot be written now.
            Some(usage) => drop(tokio::join!(written, usage.written())),
            None => drop(written.await),
        }
    }

    /// Sends the one settlement; `None` when it was sent before.
    fn settle(&mut self, end: End<'_>, ack: Option<oneshot::Sender<()>>) -> Option<Option<ashlar_store::Settled>> {
        if !std::mem::take(&mut self.open) {
            return None;
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
        self.decision.settled(tokens);
        let (ttft, total) = (since(self.first_token), self.live.arrived.elapsed());
        let refusal = refused || refusal::opens_with_refusal(&self.answer);
        self.refused = refusal;
        let answered = self.target.as_ref().map(|(target, model)| Answered {
            release: self.app.release_of(target),
            model: model.clone(),
            backend: target.node.name.clone(),
        });
        let target = self.target.as_ref().map(|(t, _)| t);
        let (cost, usage) = match self.reservation.take() {
            Some(reservation) => {
                let settled = reservation.settle(Used {
                    tokens: tokens.classes(),
                    counts: if tokens.estimated { Counts::Estimated } else { Counts::Measured },
                    machine_us: 0,
                    model: target.map(|t| t.model.clone()),
                    backend: target.map(|t| t.node.name.clone()),
                    release: answered.as_ref().and_then(|a| a.release.clone()),
                    queue_us: queue.map_or(0, micros),
                    ttft_us: ttft.map(micros),
                    total_us: micros(total),
                    error: error.clone(),
                    refusal,
                    ..Used::new(finish)
                });
                (settled.cost.clone(), Some(settled))
            }
            None => (self.app.cost(target.map(|t| &**t), self.live.at_ms, &tokens.classes()), None),
        };
        let usage_total = tokens.usage();
        self.app.metrics.settled(&Sample {
            model: &self.live.model,
            endpoint: self.live.endpoint,
            finish: finish.as_str(),
            prompt_tokens: usage_total.prompt_tokens,
            cached_tokens: usage_total.cached_tokens(),
            completion_tokens: usage_total.completion_tokens,
            queue_s: queue.map(|d| d.as_secs_f64()),
            ttft_s: ttft.map(|d| d.as_secs_f64()),
            total_s: total.as_secs_f64(),
            refusal,
            cost: amount(&cost),
            estimated: tokens.estimated,
        });
        let answer = std::mem::take(&mut self.answer);
        let ms = |d: Option<Duration>| d.map_or(0.0, |d| d.as_secs_f64() * 1e3);
        let ended = Ended {
            id: self.live.id.clone(),
            settlement: Settlement {
                finish: finish.as_str().to_owned(),
                prompt_tokens: usage_total.prompt_tokens.into(),
                cached_tokens: usage_total.cached_tokens().into(),
                completion_tokens: usage_total.completion_tokens.into(),
                queue_ms: ms(queue),
                ttft_ms: ms(ttft),
                total_ms: ms(Some(total)),
                cost: cost.total,
                refusal,
                answer: (!answer.is_empty()).then_some(answer),
                error,
            },
            answered: answered.filter(|a| *a != self.first),
            route: serde_json::to_string(&*self.decision).ok(),
        };
        if self.app.ledger.0.send(Entry::Settle(ended, ack)).is_err() {
            self.app.metrics.ledger_error();
        }
        Some(usage)
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
        // On its way; a drop waits for nothing.
        drop(self.settle(End::Cancelled, None));
        self.app.live.with(|t| t.remove(&self.live.id));
    }
}

/// Books a request that was sent to `target` and beaten by another: a row of its
/// own, with the prompt guessed.
pub(crate) fn book_lost(app: &App, ask: &Ask, model: &str, target: &Target, id: &str, reservation: Option<Reservation>) {
    let why = "a hedge that lost; its tokens are estimated";
    let tokens = Tokens::estimate(ask.prompt_estimate(), 0);
    let total = ask.arrived.elapsed();
    let cost = match reservation {
        Some(reservation) => {
            let used = Used {
                tokens: tokens.classes(),
                counts: Counts::Estimated,
                model: Some(target.model.clone()),
                backend: Some(target.node.name.clone()),
                release: app.release_of(target),
                total_us: micros(total),
                error: Some(why.into()),
                ..Used::new(Finish::Cancelled)
            };
            reservation.settle(used).cost
        }
        None => app.cost(Some(target), clock::now_ms(), &tokens.classes()),
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
    let ended = Ended { id: id.to_owned(), settlement, answered: None, route: None };
    let (ack, _) = oneshot::channel();
    // The writer takes both in this order, and no one waits for them.
    let sent = app.ledger.0.send(Entry::Admit(admission, ack));
    if sent.is_err() || app.ledger.0.send(Entry::Settle(ended, None)).is_err() {
        app.metrics.ledger_error();
    }
}
