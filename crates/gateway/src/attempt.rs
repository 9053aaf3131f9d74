//! From a plan to the beginning of an answer: attempts, retries, hedges,
//! fallbacks.
//!
//! Everything here happens before the first token. Once a client may have seen
//! text, a failure is a failure: another model's continuation of it would be no
//! answer of anyone.
//!
//! What may not happen here: two answers to one request, or a request that was
//! sent and lost a hedge without a line in the ledger.

use crate::{
    app::App,
    ask::Ask,
    door::Entered,
    health::Permit,
    recorder,
    route::{Attempt, Canary, InFlight, Seen, Target, random},
    table::{Plan, PlanStage, Table},
    upstream::{Piece, Pieces, UpstreamError},
    watch::Hop,
};
use ashlar_api::ApiError;
use ashlar_store::Reservation;
use futures::{
    StreamExt as _,
    future::{Either, select},
};
use std::{
    collections::VecDeque,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

/// An answer that has begun.
pub(crate) struct Opened {
    pub(crate) target: Arc<Target>,
    /// The model's name for clients: a fallback's is not the one asked for.
    pub(crate) model: String,
    /// Read ahead, with the time each piece came.
    pub(crate) ready: VecDeque<(Piece, Instant)>,
    pub(crate) stream: Pieces,
    pub(crate) flight: InFlight,
    /// The canary this answer counts for or against.
    pub(crate) canary: Option<(Arc<Canary>, bool)>,
    pub(crate) hop: Hop,
    _permit: Permit,
}

/// What the attempts of one request share.
pub(crate) struct Attempts<'a> {
    pub(crate) app: &'a Arc<App>,
    pub(crate) table: &'a Table,
    pub(crate) plan: &'a Plan,
    pub(crate) ask: &'a Ask,
    pub(crate) entered: &'a Entered,
    pub(crate) seed: i64,
}

/// A second request under way: whoever loses is booked, also when it is dropped
/// undecided.
struct Hedge<'a> {
    all: &'a Attempts<'a>,
    model: &'a str,
    /// `None` when no one lost.
    loser: Option<Arc<Target>>,
    id: String,
    reservation: Option<Reservation>,
}

impl Drop for Hedge<'_> {
    fn drop(&mut self) {
        match (&self.loser, self.reservation.take()) {
            (Some(t), reservation) => recorder::book_lost(self.all.app, self.all.ask, self.model, t, &self.id, reservation),
            (None, Some(reservation)) => reservation.withdraw(),
            (None, None) => {}
        }
    }
}

impl Attempts<'_> {
    /// Walks the plan until an answer begins.
    ///
    /// # Errors
    /// The last failure, when all attempts that may be made failed.
    pub(crate) async fn open(&self) -> Result<Opened, ApiError> {
        self.table.budget.deposit();
        // With no one else to ask, a client need not wait for the first token
        // to see that the answer has begun.
        let alone = match self.plan.stages.as_slice() {
            [one] => one.order.len() == 1 && one.route.retries == 0,
            _ => false,
        };
        let mut last = None;
        for stage in &self.plan.stages {
            match self.stage(stage, !alone).await {
                Ok(opened) => return Ok(opened),
                Err(e) => {
                    let hopeless = !e.retryable();
                    last = Some(e);
                    if hopeless {
                        break;
                    }
                }
            }
        }
        Err(last.map_or_else(|| ApiError::unavailable("no one can answer"), ApiError::from))
    }

    async fn stage(&self, stage: &PlanStage, wait: bool) -> Result<Opened, UpstreamError> {
        let retry = &self.table.retry;
        let mut next = 0;
        let mut last: Option<UpstreamError> = None;
        for attempt in 0..=stage.route.retries {
            let now = Instant::now();
            if attempt > 0 && !self.table.budget.withdraw(now) {
                self.app.metrics.retry("budget");
                break;
            }
            // The next in order that may be asked; after the last, the first.
            let n = stage.order.len();
            let found = (0..n).map(|i| (next + i) % n).find_map(|i| {
                let target = stage.order.get(i)?;
                Some((i, target, target.node.health.acquire(now).ok()?))
            });
            let (target, permit) = match found {
                Some((i, target, permit)) => {
                    next = i + 1;
                    (target, permit)
                }
                None => {
                    // Everyone rests or is open: wait, if it is not for long.
                    let wait = stage.order.iter().filter_map(|t| t.node.health.check(now).err()?.seconds).min();
                    let Some(wait) = wait.filter(|s| f64::from(*s) <= retry.max_wait_s) else { break };
                    tokio::time::sleep(Duration::from_secs(wait.into())).await;
                    let open = stage.order.iter().find_map(|t| Some((t, t.node.health.acquire(Instant::now()).ok()?)));
                    let Some(found) = open else { continue };
                    found
                }
            };
            if attempt > 0 {
                self.app.metrics.retry("retry");
                let again = n == 1 || attempt as usize >= n;
                if again {
                    let most = (retry.backoff_s * 2f64.powi(attempt as i32 - 1)).min(retry.max_wait_s);
                    tokio::time::sleep(Duration::from_secs_f64(most * random())).await;
                }
            }
            // Only what a draw assigned counts: no retry, no hedge.
            let drawn = stage.drawn.filter(|_| attempt == 0);
            let canary = stage.route.canary.clone().zip(drawn);
            if let Some((canary, drawn)) = &canary {
                canary.drawn(*drawn);
            }
            let began = Instant::now();
            match self.hedged(stage, target, permit, wait, attempt > 0).await {
                Ok(mut opened) => {
                    if let Some((canary, drawn)) = canary.filter(|_| Arc::ptr_eq(&opened.target, target)) {
                        canary.seen(drawn, Seen::FirstToken(began.elapsed().as_secs_f64()));
                        opened.canary = Some((canary, drawn));
                    }
                    return Ok(opened);
                }
                Err(e) => {
                    if let Some((canary, drawn)) = canary.filter(|_| e.unhealthy()) {
                        canary.seen(drawn, Seen::Failed);
                    }
                    if !e.retryable() {
                        return Err(e);
                    }
                    last = Some(e);
                }
            }
        }
        Err(last.unwrap_or_else(|| {
            let (mut why, mut seconds) = (String::new(), None);
            for unfit in stage.order.iter().filter_map(|t| t.node.health.check(Instant::now()).err()) {
                why = unfit.why;
                seconds = seconds.or(unfit.seconds);
            }
            let error = ApiError::unavailable(format!("no backend of {:?} can be asked now: {why}", stage.route.name));
            UpstreamError::Local(ApiError { retry_after: seconds, ..error })
        }))
    }

    /// Asks `target`, and a second one when the first is slow.
    async fn hedged(
        &self,
        stage: &PlanStage,
        target: &Arc<Target>,
        permit: Permit,
        wait: bool,
        retry: bool,
    ) -> Result<Opened, UpstreamError> {
        let Some(after) = stage.route.hedge_after.filter(|_| stage.order.len() > 1 && !retry) else {
            return self.one(stage, target, permit, wait, false).await;
        };
        let began = Instant::now();
        let mut first = pin!(self.one(stage, target, permit, wait, false));
        let second = match select(first.as_mut(), pin!(tokio::time::sleep(after))).await {
            Either::Left((result, _)) => return result,
            Either::Right(_) => stage.order.iter().find_map(|t| {
                let other = !Arc::ptr_eq(t, target);
                let permit = other.then(|| t.node.health.acquire(Instant::now()).ok()).flatten()?;
                Some((t, permit))
            }),
        };
        let Some((other, permit)) = second.filter(|_| self.table.budget.withdraw(Instant::now())) else {
            return first.await;
        };
        let Some((id, reservation)) = self.entered.again(self.app, self.ask, other).await else {
            return first.await;
        };
        self.app.metrics.retry("hedge");
        // The request's own record stands for the first, unless it loses.
        let mut hedge = Hedge { all: self, model: &stage.route.name, loser: Some(other.clone()), id, reservation };
        let hedge_began = Instant::now();
        let second = pin!(self.one(stage, other, permit, wait, true));
        match select(first, second).await {
            Either::Left((Ok(won), _)) => {
                self.lost(other, hedge_began, true);
                Ok(won)
            }
            Either::Right((Ok(won), _)) => {
                self.lost(target, began, false);
                hedge.loser = Some(target.clone());
                Ok(won)
            }
            // Who failed has cost nothing; the other goes on alone.
            Either::Left((Err(_), second)) => {
                let result = second.await;
                hedge.loser = None;
                result
            }
            Either::Right((Err(_), first)) => {
                hedge.loser = None;
                first.await
            }
        }
    }

    fn lost(&self, target: &Target, began: Instant, hedge: bool) {
        self.note(target, began, "lost the hedge".into(), hedge);
    }

    fn note(&self, target: &Target, began: Instant, outcome: String, hedge: bool) {
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        self.plan.decision.attempted(Attempt {
            backend: target.node.name.clone(),
            model: target.model.clone(),
            at_ms: ms(began.saturating_duration_since(self.ask.arrived)),
            took_ms: ms(began.elapsed()),
            outcome,
            hedge,
        });
    }

    /// One attempt: until the first token, or only the first piece unless `wait`.
    async fn one(
        &self,
        stage: &PlanStage,
        target: &Arc<Target>,
        permit: Permit,
        wait: bool,
        hedge: bool,
    ) -> Result<Opened, UpstreamError> {
        let mut hop = Hop::begin(&target.node, &target.model, self.ask.endpoint.path(), hedge);
        let began = hop.began;
        // Only the prefix-affine policy weighs blocks.
        let new = if stage.blocks.is_empty() { 0 } else { stage.route.new_blocks(self.ask, target, &stage.blocks) };
        let mut flight = InFlight::new(&target.load, new);
        if !stage.blocks.is_empty() {
            stage.route.prefix.sent(&stage.blocks, target.key);
        }
        let begun = async {
            let mut stream = target.node.upstream.send(self.ask, &target.model, self.seed).await?;
            let mut ready = VecDeque::new();
            loop {
                let piece = stream.next().await.unwrap_or_else(|| {
                    Err(UpstreamError::Local(ApiError::internal("the backend ended without finishing")))
                })?;
                let now = Instant::now();
                let token = piece.gains() || matches!(piece, Piece::Done(_));
                ready.push_back((piece, now));
                if token {
                    flight.first_token(now);
                }
                if token || !wait {
                    return Ok((stream, ready));
                }
            }
        };
        match hop.during(begun).await {
            Ok((stream, ready)) => {
                target.node.health.answering();
                self.note(target, began, "answered".into(), hedge);
                Ok(Opened {
                    target: target.clone(),
                    model: stage.route.name.clone(),
                    ready,
                    stream,
                    flight,
                    canary: None,
                    hop,
                    _permit: permit,
                })
            }
            Err(e) => {
                hop.failed(&e);
                target.node.health.failure(&e, Instant::now());
                self.app.metrics.upstream_error(&target.node.name, e.class());
                self.note(target, began, e.to_string(), hedge);
                Err(e)
            }
        }
    }
}
