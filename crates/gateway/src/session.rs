//! One answer in the making: a request joined with its record.
//!
//! Streamed and whole answers both read a [`Session`], so there is one place
//! where pieces are recorded, the deadline is kept and the server's stop is
//! obeyed. Dropping it cancels the backend's work and settles the record.

use crate::{
    app::App,
    ask::Ask,
    attempt::{Attempts, Opened},
    door::Entered,
    error::Failure,
    guard::{Answer, Guarded},
    mirror::Listener,
    recorder::{Intake, Recorder},
    route::{Canary, InFlight, Seen, Target},
    table::{Plan, Table},
    upstream::{Dialect, End, Piece, Pieces, Tokens, UpstreamError},
    watch::Observed,
};
use ashlar_api::{ApiError, Finish};
use futures::StreamExt as _;
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};

/// An admitted request whose pieces are being read.
pub(crate) struct Session {
    recorder: Recorder,
    seen: Observed,
    /// The model that answers, as clients see it.
    model: String,
    target: Option<Arc<Target>>,
    flight: Option<InFlight>,
    canary: Option<(Arc<Canary>, bool)>,
    /// Compares the answer with a copy's.
    mirror: Option<Listener>,
    pieces: Option<Pieces>,
    /// Through which every piece passes; `None` where no policy holds.
    guard: Option<Answer>,
    /// Read ahead so that an early failure still has its HTTP status.
    ready: VecDeque<Piece>,
    last: Option<std::time::Instant>,
    deadline: Instant,
    timeout: Duration,
    stop: watch::Receiver<bool>,
}

/// The seed an engine uses when the client gave none, drawn from the response
/// id, so that the record always says which it was.
fn seed_of(id: &str) -> i64 {
    let hash = *ashlar_core::Digest::of(id.as_bytes()).as_bytes();
    let (low, _) = hash.split_at(4);
    low.iter().fold(0, |seed, byte| seed << 8 | i64::from(*byte))
}

impl Session {
    /// Admits `ask`, has it answered as `plan` says, and waits for the
    /// beginning.
    ///
    /// # Errors
    /// When the store does not admit it, or no backend begins an answer; the
    /// record is settled then.
    pub(crate) async fn open(
        app: &Arc<App>,
        table: &Arc<Table>,
        ask: &Ask,
        plan: Plan,
        mut entered: Entered,
        guarded: Guarded,
    ) -> Result<Self, Failure> {
        // A plan has a stage, and a stage a target, or it would be an error.
        let first = plan.stages.first().and_then(|s| Some((s.route.name.clone(), s.order.first()?.clone())));
        let (model, first) = first.ok_or_else(|| ApiError::internal("a plan without a target"))?;
        let id = entered.id.clone();
        let engine = first.node.dialect == Dialect::Engine;
        let sent: Option<i64> = ask.raw("seed").and_then(|raw| raw.parse().ok());
        let seed = sent.unwrap_or_else(|| seed_of(&id));
        app.decisions.insert(&id, plan.decision.clone());
        let intake = Intake {
            id: id.clone(),
            release: app.release_of(&first),
            model: model.clone(),
            backend: first.node.name.clone(),
            endpoint: ask.endpoint.path(),
            // The ledger keeps the 64 bits as they are.
            seed: sent.or(engine.then_some(seed)).map(|s| s as u64),
            stream: ask.stream,
            arrived: ask.arrived,
            prompt_estimate: ask.prompt_estimate(),
            decision: plan.decision.clone(),
            reservation: entered.reservation.take(),
            place: entered.place.take(),
            guard: guarded.log(),
        };
        let seen = Observed::begin(app, ask, &id, &model, &first.node.name);
        let recorder = Recorder::admit(app.clone(), intake);
        let timeout = table.limits.request_timeout;
        let mut session = Self {
            recorder,
            seen,
            model: model.clone(),
            target: None,
            flight: None,
            canary: None,
            mirror: None,
            pieces: None,
            guard: guarded.answer(ask),
            ready: VecDeque::new(),
            last: None,
            deadline: Instant::from_std(ask.arrived) + timeout,
            timeout,
            stop: app.stop.clone(),
        };
        if let Some(error) = guarded.refused() {
            session.refuse().await?;
            guarded.strike(&id).await;
            return Err(Failure { error, response_id: Some(id) });
        }
        session.recorder.sent_to(&first, &model, !engine);
        let attempts = Attempts { app, table, plan: &plan, ask, entered: &entered, seed };
        let opened = attempts.open();
        let guard = session.guard.take();
        let opened = async { opened.await.map_err(|e| clean(guard.as_ref(), e)) };
        let opened = session.guarded(opened).await;
        session.guard = guard;
        // Also before an error is told: it carries the response's id.
        session.admitted().await?;
        // What the answer does is counted at its end; this is what was asked.
        guarded.strike(&id).await;
        match opened {
            Ok(opened) => {
                let route = plan.stages.iter().find(|s| s.route.name == opened.model).map(|s| &s.route);
                let mirror = route.and_then(|r| r.mirror.as_ref());
                session.mirror = mirror.and_then(|m| Listener::draw(app, table, m, ask, &id, opened.hop.began));
                let taken = session.take(opened).await;
                taken.map_err(|error| Failure { error, response_id: Some(id) })?;
                Ok(session)
            }
            Err(error) => Err(Failure { error, response_id: Some(id) }),
        }
    }

    async fn take(&mut self, opened: Opened) -> Result<(), ApiError> {
        let Opened { target, model, ready, stream, flight, canary, hop, .. } = opened;
        self.seen.taken(hop, &model, &target.node.name);
        self.recorder.sent_to(&target, &model, target.node.dialect != Dialect::Engine);
        (self.model, self.pieces, self.flight) = (model, Some(stream), Some(flight));
        (self.target, self.canary) = (Some(target), canary);
        for (piece, at) in ready {
            self.pass(piece, at).await?;
        }
        Ok(())
    }

    /// Lets a piece through the guard; what comes out is noted and ready.
    async fn pass(&mut self, piece: Piece, at: std::time::Instant) -> Result<(), ApiError> {
        let Some(mut guard) = self.guard.take() else {
            self.note(&piece, at).await;
            self.ready.push_back(piece);
            return Ok(());
        };
        // A judge may take its time.
        let out = self.guarded(async { Ok(guard.push(piece).await) }).await?;
        if guard.over() {
            // The upstream is told by this that it need not go on.
            (self.pieces, self.flight) = (None, None);
        }
        let done = out.iter().any(|p| matches!(p, Piece::Done(_)));
        for piece in out {
            self.note(&piece, at).await;
            self.ready.push_back(piece);
        }
        if done {
            guard.strike(self.recorder.id()).await;
        }
        self.guard = Some(guard);
        Ok(())
    }

    /// Settles a request that the guard refused.
    async fn refuse(&mut self) -> Result<(), ApiError> {
        self.admitted().await?;
        let end = End { finish: Finish::ContentFilter, refused: true, tokens: Tokens::default(), timings: None };
        self.note(&Piece::Done(end), std::time::Instant::now()).await;
        Ok(())
    }

    /// Waits until the admission is written.
    async fn admitted(&mut self) -> Result<(), ApiError> {
        self.recorder.admitted().await.map_err(|e| {
            let error = ApiError::unavailable(format!("the ledger did not take the request: {e}"));
            self.seen.failed(&error);
            error
        })
    }

    pub(crate) fn id(&self) -> &str {
        self.recorder.id()
    }

    /// The model that answers, as clients see it.
    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    /// Whether the answer is the engine's in this process.
    pub(crate) fn is_engine(&self) -> bool {
        self.target.as_ref().is_some_and(|t| t.node.dialect == Dialect::Engine)
    }

    /// The next piece. After `Done` or an error there is nothing to read.
    pub(crate) async fn next(&mut self) -> Result<Piece, ApiError> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(piece);
            }
            self.read().await?;
        }
    }

    async fn note(&mut self, piece: &Piece, at: std::time::Instant) {
        // As of now: what came before the admission was written waited for it.
        self.recorder.note(piece, std::time::Instant::now()).await;
        self.seen.piece(piece, at);
        if let Some(mirror) = &mut self.mirror {
            mirror.note(piece, at);
        }
        if let Piece::Done(end) = piece {
            if self.recorder.refused() {
                self.seen.refused();
            }
            if let Some(target) = &self.target {
                target.load.answered(end.tokens.completion());
                target.node.health.success();
            }
            if let Some((canary, drawn)) = self.canary.as_ref().filter(|_| self.recorder.refused()) {
                canary.seen(*drawn, Seen::Refused);
            }
            if let Some(mirror) = &mut self.mirror {
                mirror.ended(end.tokens.completion(), self.recorder.refused());
            }
            (self.pieces, self.flight) = (None, None);
        }
        if piece.gains() {
            match (self.last, &self.target, &mut self.flight) {
                (Some(last), Some(target), _) => {
                    target.load.gap(at.saturating_duration_since(last).as_secs_f64(), at);
                }
                (None, _, Some(flight)) => flight.first_token(at),
                _ => {}
            }
            self.last = Some(at);
        }
    }

    async fn read(&mut self) -> Result<(), ApiError> {
        let mut pieces = self.pieces.take();
        let target = self.target.clone();
        let next = async {
            let result = match &mut pieces {
                Some(stream) => stream.next().await.unwrap_or_else(|| {
                    Err(UpstreamError::Local(ApiError::internal("the backend ended without finishing")))
                }),
                None => Err(UpstreamError::Local(ApiError::internal("the answer has ended"))),
            };
            result.map_err(|e| {
                if let Some(target) = &target {
                    target.node.health.failure(&e, std::time::Instant::now());
                    self.recorder.upstream_error(&target.node.name, e.class());
                    self.seen.upstream_failed(&e);
                }
                if let Some((canary, drawn)) = self.canary.as_ref().filter(|_| e.unhealthy()) {
                    canary.seen(*drawn, Seen::Failed);
                }
                clean(self.guard.as_ref(), ApiError::from(e))
            })
        };
        // Not through `guarded`: `next` borrows the recorder.
        let result = Guard { stop: self.stop.clone(), deadline: self.deadline, timeout: self.timeout }.run(next).await;
        let piece = self.verdict(result).await?;
        self.pieces = pieces;
        self.pass(piece, std::time::Instant::now()).await
    }

    /// Runs `work` until the deadline or the server's stop; a failure is settled.
    async fn guarded<T>(&mut self, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
        let guard = Guard { stop: self.stop.clone(), deadline: self.deadline, timeout: self.timeout };
        let result = guard.run(work).await;
        self.verdict(result).await
    }

    async fn verdict<T>(&mut self, result: Outcome<T>) -> Result<T, ApiError> {
        let error = match result {
            Outcome::Done(value) => return Ok(value),
            Outcome::Failed(error) => {
                self.seen.failed(&error);
                self.recorder.fail(&error.message).await;
                error
            }
            Outcome::Stopped => {
                self.recorder.cancel().await;
                ApiError::unavailable("the server is stopping")
            }
        };
        (self.pieces, self.flight) = (None, None);
        Err(error)
    }
}

/// An upstream's words may hold what the guard keeps in.
fn clean(guard: Option<&Answer>, error: ApiError) -> ApiError {
    match guard {
        Some(guard) => guard.error(error),
        None => error,
    }
}

enum Outcome<T> {
    Done(T),
    Failed(ApiError),
    Stopped,
}

/// What ends a request from outside.
struct Guard {
    stop: watch::Receiver<bool>,
    deadline: Instant,
    timeout: Duration,
}

impl Guard {
    async fn run<T>(mut self, work: impl Future<Output = Result<T, ApiError>>) -> Outcome<T> {
        // The watch's guard may not live across an await.
        let stopped = async move { self.stop.wait_for(|s| *s).await.map(drop) };
        tokio::select! {
            biased;
            _ = stopped => Outcome::Stopped,
            result = tokio::time::timeout_at(self.deadline, work) => match result {
                Ok(Ok(value)) => Outcome::Done(value),
                Ok(Err(e)) => Outcome::Failed(e),
                Err(_) => Outcome::Failed(ApiError {
                    status: 504,
                    code: Some("timeout".into()),
                    ..ApiError::internal(format!("no end after {} s, the limit for one answer", self.timeout.as_secs_f64()))
                }),
            }
        }
    }
}
