//! The record of one response: admitted before any work, settled exactly once.
//!
//! Every completion endpoint goes through [`Recorder`]. It settles when the
//! answer ends, when it fails, or, through its drop, when whoever held it went
//! away: a client that disconnects drops its HTTP body and with it the
//! recorder. All entries pass one writer task in order, so that a settlement
//! never overtakes its admission and dropping needs no runtime.
//!
//! What may not happen here: a second settlement (`open` is cleared by the
//! first, the store checks it again), or an answer without an admission: nothing
//! of it leaves before the store has acknowledged that ([`Recorder::admitted`]).
//! The backend is asked meanwhile, so that its time and the disk's are not added
//! up. A killed process leaves admissions open; `Store::settle_orphans` closes
//! those at the next start.
//!
//! Rejected: a task spawned by each drop, which races with its own admission
//! and with the end of the process.

use crate::{
    app::{App, Prices},
    ask::Ask,
    metrics::{Metrics, Sample},
    refusal,
    route::{Decision, Target},
    upstream::{End as Ending, Piece, Tokens},
};
use ashlar_api::Timings;
use ashlar_core::clock;
use ashlar_store::{Admission, Settlement, Store, StoreError};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};
use tokio::sync::{mpsc, oneshot};

/// Most entries taken at once.
const BATCH: usize = 256;

enum Entry {
    Admit(Admission, oneshot::Sender<Result<(), StoreError>>),
    Settle(String, Settlement, Option<oneshot::Sender<()>>),
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
            let mut batch = Vec::with_capacity(BATCH);
            while rx.recv_many(&mut batch, BATCH).await > 0 {
                write(&store, &metrics, batch.drain(..)).await;
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

/// Writes entries in their order. A receiver that is gone does not wait for the
/// answer.
async fn write(store: &Store, metrics: &Metrics, batch: impl Iterator<Item = Entry>) {
    for entry in batch {
        match entry {
            Entry::Admit(admission, ack) => {
                let result = store.admit(&admission).await;
                if result.is_err() {
                    metrics.ledger_error();
                }
                let _ = ack.send(result);
            }
            Entry::Settle(id, settlement, ack) => {
                if store.settle(&id, &settlement).await.is_err() {
                    metrics.ledger_error();
                }
                if let Some(ack) = ack {
                    let _ = ack.send(());
                }
            }
            Entry::Flush(ack) => {
                let _ = ack.send(());
            }
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

    pub(crate) fn len(&self) -> usize {
        self.with(|t| t.len())
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
    price: Option<Prices>,
    prompt_estimate: u32,
    /// Something was sent to a backend that bills by what it reads.
    remote: bool,
    answer: String,
    /// The answer, once settled, was a refusal.
    refused: bool,
    cached: u32,
    started: Option<Instant>,
    first: Option<Instant>,
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
            price: None,
            prompt_estimate: intake.prompt_estimate,
            remote: false,
            answer: String::new(),
            refused: false,
            cached: 0,
            started: None,
            first: None,
            last: None,
            admitted: Some(admitted),
            open: sent,
        }
    }

    /// Waits until the admission is written.
    ///
    /// # Errors
    /// When the store does not take it; there is nothing to settle then.
    pub(crate) async fn admitted(&mut self) -> Result<(), StoreError> {
        let Some(word) = self.admitted.take() else { return Ok(()) };
        let gone = || StoreError::Task("the ledger's writer has ended".into());
        let result = word.await.unwrap_or_else(|_| Err(gone()));
        if result.is_err() {
            self.open = false;
        }
        result
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

    /// The request is with `target` from now on.
    pub(crate) fn sent_to(&mut self, target: &Target, remote: bool) {
        self.price = target.price;
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
            Some(last) => self.app.metrics.token_gap(&self.live.model, self.live.endpoint, (now - last).as_secs_f64()),
            None => {
                self.first = Some(now);
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
        if self.settle(end, Some(ack)) {
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
        let since = |t: Option<Instant>| t.map(|t| (t - self.live.arrived).as_secs_f64());
        let (finish, tokens, queue_s, error, refused) = match end {
            End::Done(end) => {
                let queue_s = end.timings.map(|t: Timings| t.queue_ms / 1e3);
                (end.finish.as_str(), end.tokens, queue_s, None, end.refused)
            }
            End::Failed(e) => ("error", counted, since(self.started), Some(e.to_owned()), false),
            End::Cancelled => ("cancelled", counted, since(self.started), None, false),
        };
        self.decision.settled(tokens);
        let usage = tokens.usage();
        let (ttft_s, total_s) = (since(self.first), self.live.arrived.elapsed().as_secs_f64());
        let cost = self.price.unwrap_or(self.app.state.config.prices).cost(&usage);
        let refusal = refused || refusal::opens_with_refusal(&self.answer);
        self.refused = refusal;
        self.app.metrics.settled(&Sample {
            model: &self.live.model,
            endpoint: self.live.endpoint,
            finish,
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens(),
            completion_tokens: usage.completion_tokens,
            queue_s,
            ttft_s,
            total_s,
            refusal,
            cost: Some(cost),
            estimated: tokens.estimated,
        });
        let answer = std::mem::take(&mut self.answer);
        let settlement = Settlement {
            finish: finish.to_owned(),
            prompt_tokens: usage.prompt_tokens.into(),
            cached_tokens: usage.cached_tokens().into(),
            completion_tokens: usage.completion_tokens.into(),
            queue_ms: queue_s.unwrap_or(0.0) * 1e3,
            ttft_ms: ttft_s.unwrap_or(0.0) * 1e3,
            total_ms: total_s * 1e3,
            cost,
            refusal,
            answer: (!answer.is_empty()).then_some(answer),
            error,
        };
        let entry = Entry::Settle(self.live.id.clone(), settlement, ack);
        self.app.ledger.0.send(entry).is_ok()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.settle(End::Cancelled, None);
        self.app.live.with(|t| t.remove(&self.live.id));
    }
}

/// Books a request that was sent to `target` and beaten by another: a row of its
/// own, with the prompt guessed.
pub(crate) fn book_lost(app: &Arc<App>, ask: &Ask, model: &str, target: &Target) {
    let id = ashlar_core::id::new(ask.endpoint.id_prefix());
    let tokens = Tokens::estimate(ask.prompt_estimate(), 0);
    let cost = target.price.unwrap_or(app.state.config.prices).cost(&tokens.usage());
    let admission = Admission {
        id: id.clone(),
        release: None,
        model: model.to_owned(),
        backend: target.node.name.clone(),
        endpoint: ask.endpoint.path().to_owned(),
        at_ms: clock::now_ms(),
        seed: None,
        stream: ask.stream,
    };
    let settlement = Settlement {
        finish: "cancelled".into(),
        prompt_tokens: tokens.prompt().into(),
        total_ms: ask.arrived.elapsed().as_secs_f64() * 1e3,
        cost,
        error: Some("a hedge that lost; its tokens are estimated".into()),
        ..Settlement::default()
    };
    let (ack, _) = oneshot::channel();
    // The writer takes both in this order, and no one waits for them.
    let sent = app.ledger.0.send(Entry::Admit(admission, ack));
    if sent.is_ok() && app.ledger.0.send(Entry::Settle(id, settlement, None)).is_err() {
        app.metrics.ledger_error();
    }
}
