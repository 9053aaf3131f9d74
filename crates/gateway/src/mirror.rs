//! Shadow traffic: a share of requests is copied to another target once their
//! own answer has begun, and what comes back is compared and thrown away.
//!
//! A copy is recorded in the ledger under an endpoint of its own and in no key's
//! account. Both answers are compared by time, refusals, length and the words
//! they share.
//!
//! What may not happen here: a copy that delays, changes or fails the answer it
//! is a copy of. There is room for so many copies at once; with none left a copy
//! is not made, and counted as left out.

use crate::{
    app::App,
    ask::Ask,
    config::MirrorSettings,
    recorder::{Intake, Recorder},
    route::{Decision, InFlight, Stage, Target, random},
    table::Table,
    upstream::{Dialect, Piece, UpstreamError},
};
use ashlar_api::ApiError;
use futures::StreamExt as _;
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::JoinSet,
};

/// What the ids of copies begin with.
pub(crate) const PREFIX: &str = "mirror";
/// Bytes of an answer that are compared.
const COMPARED: usize = 64 << 10;

/// A route's mirror.
#[derive(Debug)]
pub(crate) struct Mirror {
    pub(crate) settings: MirrorSettings,
    pub(crate) target: Arc<Target>,
    room: Arc<Semaphore>,
    tally: Mutex<Tally>,
}

/// An answer, as far as it is compared.
#[derive(Debug, Default, Clone)]
struct Told {
    text: String,
    first_token: Option<Duration>,
    total: Duration,
    tokens: u32,
    refused: bool,
}

/// Sums over compared pairs: the copy's, and the answer's.
#[derive(Debug, Default)]
struct Tally {
    copied: u64,
    no_room: u64,
    /// The target was ill, or cannot do what was asked.
    unfit: u64,
    failed: u64,
    /// The client's own answer did not end well.
    alone: u64,
    pairs: u64,
    /// Pairs of which either has a text, and the sum of how far they agree.
    texts: u64,
    agreement: f64,
    refused: [u64; 2],
    /// Both answers or neither were refusals.
    refused_alike: u64,
    first_tokens: u64,
    first_token_s: [f64; 2],
    total_s: [f64; 2],
    tokens: [u64; 2],
}

/// All copies under way; dropped, they are cut off and settle as cancelled.
#[derive(Debug, Default)]
pub(crate) struct Copies(Mutex<JoinSet<()>>);

impl Copies {
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that are done make room.
        while set.try_join_next().is_some() {}
        set.spawn(work);
    }

    /// Cuts off what still runs.
    pub(crate) async fn stop(&self) {
        let mut set = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        set.shutdown().await;
    }
}

impl Mirror {
    pub(crate) fn new(settings: MirrorSettings, target: Arc<Target>) -> Self {
        let room = Arc::new(Semaphore::new(settings.queue));
        Self { settings, target, room, tally: Mutex::default() }
    }

    fn tally<T>(&self, f: impl FnOnce(&mut Tally) -> T) -> T {
        f(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// For the console.
    pub(crate) fn to_json(&self) -> Value {
        self.tally(|t| {
            let n = t.pairs.max(1) as f64;
            let of = |v: [f64; 2], n: f64| json!({"mirror": v[0] / n, "answer": v[1] / n});
            let ms = |v: [f64; 2]| v.map(|s| s * 1e3);
            json!({
                "backend": self.target.node.name, "upstream_model": self.target.model, "share": self.settings.share,
                "copied": t.copied, "no_room": t.no_room, "unfit": t.unfit, "failed": t.failed, "alone": t.alone, "pairs": t.pairs,
                "agreement": (t.texts > 0).then(|| t.agreement / t.texts as f64),
                "refusals": {"mirror": t.refused[0], "answer": t.refused[1], "alike": t.refused_alike},
                "first_token_ms": of(ms(t.first_token_s), t.first_tokens.max(1) as f64),
                "total_ms": of(ms(t.total_s), n), "tokens": of(t.tokens.map(|n| n as f64), n),
            })
        })
    }

    fn compare(&self, copy: &Told, answer: &Told) {
        self.tally(|t| {
            t.pairs += 1;
            if !(copy.text.is_empty() && answer.text.is_empty()) {
                t.texts += 1;
                t.agreement += agreement(&copy.text, &answer.text);
            }
            t.refused[0] += u64::from(copy.refused);
            t.refused[1] += u64::from(answer.refused);
            t.refused_alike += u64::from(copy.refused == answer.refused);
            t.total_s[0] += copy.total.as_secs_f64();
            t.total_s[1] += answer.total.as_secs_f64();
            t.tokens[0] += u64::from(copy.tokens);
            t.tokens[1] += u64::from(answer.tokens);
            if let (Some(a), Some(b)) = (copy.first_token, answer.first_token) {
                t.first_tokens += 1;
                t.first_token_s[0] += a.as_secs_f64();
                t.first_token_s[1] += b.as_secs_f64();
            }
        });
    }
}

/// The share of words that two texts have in common: the F1 of their bags of
/// words (ROUGE-1, Lin 2004). Two empty texts agree.
fn agreement(a: &str, b: &str) -> f64 {
    let bag = |s: &str| {
        let mut bag: HashMap<String, u32> = HashMap::new();
        s.split_whitespace().for_each(|w| *bag.entry(w.to_lowercase()).or_default() += 1);
        bag
    };
    let (a, b) = (bag(a), bag(b));
    let (na, nb): (u32, u32) = (a.values().sum(), b.values().sum());
    if na + nb == 0 {
        return 1.0;
    }
    let common: u32 = a.iter().map(|(w, n)| (*n).min(b.get(w).copied().unwrap_or(0))).sum();
    2.0 * f64::from(common) / f64::from(na + nb)
}

/// Listens to an answer that is being copied.
pub(crate) struct Listener {
    arrived: Instant,
    told: Told,
    to: Option<oneshot::Sender<Told>>,
}

impl Listener {
    fn new(arrived: Instant) -> Self {
        Self { arrived, told: Told::default(), to: None }
    }

    /// Draws whether `ask`, whose answer has begun as `id`, is copied; if so it
    /// is on its way when this returns, and nothing was waited for. Times of the
    /// answer count from `began`, its sending, as the copy's do.
    pub(crate) fn draw(app: &Arc<App>, table: &Table, mirror: &Arc<Mirror>, ask: &Ask, id: &str, began: Instant) -> Option<Self> {
        if random() >= mirror.settings.share {
            return None;
        }
        let fit = mirror.target.node.upstream.check(ask, &mirror.target.model).is_ok();
        if !fit || mirror.target.node.check(Instant::now()).is_err() {
            mirror.tally(|t| t.unfit += 1);
            return None;
        }
        let Ok(room) = mirror.room.clone().try_acquire_owned() else {
            mirror.tally(|t| t.no_room += 1);
            return None;
        };
        mirror.tally(|t| t.copied += 1);
        let (to, told) = oneshot::channel();
        let copy = Copy {
            app: app.clone(),
            mirror: mirror.clone(),
            ask: ask.clone(),
            of: id.to_owned(),
            limit: table.limits.request_timeout,
            told,
            _room: room,
        };
        app.copies.spawn(copy.run());
        Some(Self { to: Some(to), ..Self::new(began) })
    }

    /// Takes note of a piece that came at `at`.
    pub(crate) fn note(&mut self, piece: &Piece, at: Instant) {
        let text = match piece {
            Piece::Text(text) | Piece::Rest(text) => text,
            Piece::Chunk(chunk) => &chunk.text,
            Piece::Started { .. } | Piece::Done(_) => return,
        };
        if piece.gains() {
            self.told.first_token.get_or_insert(at.saturating_duration_since(self.arrived));
        }
        let room = COMPARED.saturating_sub(self.told.text.len());
        self.told.text.push_str(&text[..text.floor_char_boundary(room)]);
    }

    /// The answer has ended well.
    pub(crate) fn ended(&mut self, tokens: u32, refused: bool) {
        let mut told = std::mem::take(&mut self.told);
        (told.total, told.tokens, told.refused) = (self.arrived.elapsed(), tokens, refused);
        if let Some(to) = self.to.take() {
            // The copy may have failed before.
            let _ = to.send(told);
        } else {
            self.told = told;
        }
    }
}

/// A copy on its way.
struct Copy {
    app: Arc<App>,
    mirror: Arc<Mirror>,
    ask: Ask,
    /// The id of the answer it is a copy of.
    of: String,
    limit: Duration,
    told: oneshot::Receiver<Told>,
    _room: OwnedSemaphorePermit,
}

impl Copy {
    async fn run(self) {
        let Self { app, mirror, ask, of, limit, told, _room } = self;
        let (target, arrived) = (&mirror.target, Instant::now());
        let Ok(_permit) = target.node.health.acquire(arrived) else {
            return mirror.tally(|t| t.unfit += 1);
        };
        let stage = Stage {
            model: ask.model.clone(),
            policy: crate::config::Policy::Ordered,
            rule: None,
            candidates: Vec::new(),
            reason: format!("a copy of {of}"),
            judged: None,
        };
        let decision = Arc::new(Decision::new(&ask.model, vec![stage]));
        let id = ashlar_core::id::new(PREFIX);
        app.decisions.insert(&id, decision.clone());
        let mut recorder = Recorder::admit(app.clone(), Intake {
            id,
            release: app.release_of(target),
            model: ask.model.clone(),
            backend: target.node.name.clone(),
            endpoint: ask.endpoint.mirrored(),
            seed: None,
            stream: ask.stream,
            arrived,
            prompt_estimate: ask.prompt_estimate(),
            decision,
            reservation: None,
            place: None,
            guard: Arc::default(),
        });
        recorder.sent_to(target, &ask.model, target.node.dialect != Dialect::Engine);
        let mut flight = InFlight::new(&target.load, 0);
        let mut own = Listener::new(arrived);
        let work = async {
            let mut pieces = target.node.upstream.send(&ask, &target.model, 0).await?;
            loop {
                let piece = pieces.next().await.unwrap_or_else(|| {
                    Err(UpstreamError::Local(ApiError::internal("the backend ended without finishing")))
                })?;
                let now = Instant::now();
                if piece.gains() && own.told.first_token.is_none() {
                    flight.first_token(now);
                }
                own.note(&piece, now);
                recorder.note(&piece, now).await;
                if let Piece::Done(end) = piece {
                    own.ended(end.tokens.completion(), recorder.refused());
                    target.load.answered(end.tokens.completion());
                    target.node.health.success();
                    return Ok::<_, UpstreamError>(());
                }
            }
        };
        let failure = match tokio::time::timeout(limit, work).await {
            Ok(Ok(())) => None,
            Ok(Err(e)) => {
                target.node.health.failure(&e, Instant::now());
                app.metrics.upstream_error(&target.node.name, e.class());
                Some(e.to_string())
            }
            Err(_) => Some(format!("no end after {} s", limit.as_secs_f64())),
        };
        if let Some(why) = failure {
            recorder.fail(&why).await;
            return mirror.tally(|t| t.failed += 1);
        }
        drop((recorder, flight));
        match told.await {
            Ok(answer) => mirror.compare(&own.told, &answer),
            Err(_) => mirror.tally(|t| t.alone += 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::agreement;

    #[test]
    fn agreement_is_the_share_of_common_words() {
        for (a, b, wanted) in [("", "", 1.0), ("a b", "", 0.0), ("The kiln", "the  kiln", 1.0), ("a b c d", "a x", 2.0 / 6.0), ("a a", "a", 2.0 / 3.0)] {
            assert!((agreement(a, b) - wanted).abs() < 1e-12, "{a:?} {b:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn it_is_symmetric_and_a_share(a: String, b: String) {
            let x = agreement(&a, &b);
            proptest::prop_assert!((0.0..=1.0).contains(&x) && x == agreement(&b, &a));
            proptest::prop_assert_eq!(agreement(&a, &a), 1.0);
        }
    }
}
