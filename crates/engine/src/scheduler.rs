//! Which tokens run in the next step, and whose blocks they use.
//!
//! Each step: take new jobs, drop those nobody waits for, admit the oldest
//! waiting ones that fit, give every running sequence its next token or a chunk
//! of its prompt, sample. Out of blocks, the youngest running sequence gives
//! its up and is recomputed later; the oldest therefore always gets on, and a
//! job that fits the pool alone always ends.
//!
//! What may not happen: reading a block before it was written by the same
//! prefix (blocks are published only after the step that filled them), or a
//! sequence ending without its blocks going back.

use crate::{
    blocks::{Blocks, chain},
    forward::Forward,
    sampler::{self, Choice, Sampler, Scratch},
    stop::Stops,
};
use ashlar_api::{ApiError, BackendStats, Event, Finish, Score, Timings, Usage};
use ashlar_core::Digest;
use ashlar_model::{BLOCK, Item, Want};
use ashlar_text::StreamDecoder;
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, TryRecvError},
    },
    time::Instant,
};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

/// Rows of logits a score asks for in one step; each is a whole vocabulary.
const SCORE_ROWS: usize = 32;

/// What clients and the scheduler both see.
#[derive(Default)]
pub(crate) struct Shared {
    /// Jobs sent and not yet admitted.
    pub(crate) queued: AtomicUsize,
    pub(crate) stats: Mutex<BackendStats>,
}

impl Shared {
    /// The statistics; they stay readable after a panic elsewhere.
    pub(crate) fn stats(&self) -> std::sync::MutexGuard<'_, BackendStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request as it enters: checked, tokenized, and sure to fit the pool.
pub(crate) struct Job {
    /// The prompt, or context and continuation.
    pub(crate) tokens: Vec<u32>,
    pub(crate) work: Work,
    pub(crate) sent: Instant,
}

pub(crate) enum Work {
    Generate(Generate),
    Score(Scoring),
}

pub(crate) struct Generate {
    pub(crate) events: UnboundedSender<Result<Event, ApiError>>,
    pub(crate) sampler: Sampler,
    pub(crate) decoder: StreamDecoder,
    pub(crate) stops: Stops,
    pub(crate) max_tokens: usize,
    /// Send every token, also those without certain text.
    pub(crate) every_token: bool,
}

pub(crate) struct Scoring {
    /// Tokens in front of the continuation, at least one.
    pub(crate) context: usize,
    pub(crate) reply: Option<oneshot::Sender<Result<Score, ApiError>>>,
    pub(crate) logprob: f64,
    pub(crate) greedy: bool,
}

/// Limits of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) batch: usize,
    /// Prompt tokens a step.
    pub(crate) prefill: usize,
}

struct Seq {
    work: Work,
    tokens: Vec<u32>,
    prompt: usize,
    /// Tokens whose keys and values are in `blocks`.
    computed: usize,
    blocks: Vec<u32>,
    /// Chained digests of the full blocks of `tokens`.
    keys: Vec<Digest>,
    /// Of the prompt, found in the prefix cache at first admission.
    cached: usize,
    sent: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
}

/// One sequence's part of a step.
struct Part {
    seq: usize,
    len: usize,
    want: Want,
}

enum Outcome {
    Sampled(Option<Choice>),
    /// Log-probability of the token that follows, and whether it was likeliest.
    Scored(f64, bool),
}

impl Seq {
    fn new(job: Job) -> Self {
        Self {
            prompt: job.tokens.len(),
            tokens: job.tokens,
            work: job.work,
            computed: 0,
            blocks: Vec::new(),
            keys: Vec::new(),
            cached: 0,
            sent: job.sent,
            started: None,
            first: None,
        }
    }

    /// Tokens to compute before the sequence can go on: a score never reads
    /// past the token before its last.
    fn target(&self) -> usize {
        match self.work {
            Work::Generate(_) => self.tokens.len(),
            Work::Score(_) => self.tokens.len() - 1,
        }
    }

    /// Tokens that may come from the prefix cache: at least one row must be
    /// computed to have logits.
    fn reusable(&self) -> usize {
        match &self.work {
            Work::Generate(_) => self.tokens.len() - 1,
            Work::Score(s) => s.context - 1,
        }
    }

    /// Forgets what was computed; what was generated stays.
    fn restart(&mut self) {
        self.computed = 0;
        if let Work::Score(s) = &mut self.work {
            (s.logprob, s.greedy) = (0.0, true);
        }
    }

    fn abandoned(&self) -> bool {
        match &self.work {
            Work::Generate(g) => g.events.is_closed(),
            Work::Score(s) => s.reply.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    fn extend_keys(&mut self) {
        while (self.keys.len() + 1) * BLOCK <= self.tokens.len() {
            let at = self.keys.len() * BLOCK;
            let key = chain(self.keys.last(), &self.tokens[at..at + BLOCK]);
            self.keys.push(key);
        }
    }

    fn fail(&mut self, error: ApiError) {
        // A send fails only when nobody listens any more.
        match &mut self.work {
            Work::Generate(g) => drop(g.events.send(Err(error))),
            Work::Score(s) => {
                if let Some(reply) = s.reply.take() {
                    drop(reply.send(Err(error)));
                }
            }
        }
    }

    fn usage(&self) -> Usage {
        Usage::new(
            count(self.prompt),
            count(self.cached),
            count(self.tokens.len() - self.prompt),
        )
    }

    fn timings(&self) -> Timings {
        let ms = |from: Instant, to: Option<Instant>| {
            to.map_or(0.0, |to| {
                to.saturating_duration_since(from).as_secs_f64() * 1e3
            })
        };
        let started = self.started.unwrap_or(self.sent);
        Timings {
            queue_ms: ms(self.sent, self.started),
            prefill_ms: ms(started, self.first),
            decode_ms: self.first.map_or(0.0, |f| ms(f, Some(Instant::now()))),
        }
    }

    fn done(&self, finish: Finish) {
        if let Work::Generate(g) = &self.work {
            let event = Event::Done {
                finish,
                usage: self.usage(),
                timings: self.timings(),
            };
            drop(g.events.send(Ok(event)));
        }
    }

    /// Takes a chosen token; returns how the sequence ends, if it does.
    fn accept(&mut self, choice: Choice, ends: &[u32]) -> Option<Finish> {
        let Work::Generate(g) = &mut self.work else {
            return None;
        };
        self.first.get_or_insert_with(Instant::now);
        self.tokens.push(choice.token);
        let ended = ends.contains(&choice.token);
        let full = self.tokens.len() - self.prompt >= g.max_tokens;
        let piece = if ended {
            None
        } else {
            g.decoder.push(choice.token)
        };
        let (mut text, mut stopped) = g.stops.push(&piece.unwrap_or_default());
        if !stopped && (ended || full) {
            // The last bytes may complete a stop string too.
            let (rest, hit) = g.stops.push(&g.decoder.finish().unwrap_or_default());
            text.push_str(&rest);
            stopped = hit;
            if !hit {
                text.push_str(&g.stops.finish());
            }
        }
        if !text.is_empty() || (g.every_token && !ended) {
            drop(g.events.send(Ok(Event::Token {
                text,
                id: choice.token,
                logprob: choice.logprob,
            })));
        }
        match (stopped || ended, full) {
            (true, _) => Some(Finish::Stop),
            (false, true) => Some(Finish::Length),
            (false, false) => None,
        }
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Everything in flight. Waiting and running are both ordered by age, and
/// whoever runs is older than whoever waits.
pub(crate) struct Scheduler<F> {
    forward: F,
    blocks: Blocks,
    limits: Limits,
    /// Tokens that end an answer.
    ends: Vec<u32>,
    waiting: VecDeque<Seq>,
    running: Vec<Seq>,
    scratch: Scratch,
    shared: Arc<Shared>,
    stats: BackendStats,
}

impl<F: Forward> Scheduler<F> {
    pub(crate) fn new(
        forward: F,
        blocks: usize,
        limits: Limits,
        ends: Vec<u32>,
        shared: Arc<Shared>,
    ) -> Self {
        let mut s = Self {
            forward,
            blocks: Blocks::new(blocks),
            limits,
            ends,
            waiting: VecDeque::new(),
            running: Vec::new(),
            scratch: Scratch::default(),
            shared,
            stats: BackendStats::default(),
        };
        s.report();
        s
    }

    /// Works until every sender of `jobs` is gone; what is then in flight ends
    /// as cancelled.
    pub(crate) fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            if self.idle() {
                match jobs.recv() {
                    Ok(job) => self.push(job),
                    Err(_) => return,
                }
            }
            loop {
                match jobs.try_recv() {
                    Ok(job) => self.push(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return self.stop(),
                }
            }
            self.step();
        }
    }

    fn stop(mut self) {
        for seq in self.running.iter_mut().chain(&mut self.waiting) {
            match seq.work {
                Work::Generate(_) => seq.done(Finish::Cancelled),
                Work::Score(_) => seq.fail(ApiError::unavailable("the engine is stopping")),
            }
        }
    }

    pub(crate) fn idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub(crate) fn push(&mut self, job: Job) {
        self.waiting.push_back(Seq::new(job));
    }

    pub(crate) fn step(&mut self) {
        self.drop_abandoned();
        self.admit();
        self.grow();
        let parts = self.plan();
        if !parts.is_empty() {
            match self.compute(&parts) {
                Ok(outcomes) => self.settle(&parts, outcomes),
                Err(error) => self.fail(&parts, &error),
            }
        }
        self.report();
    }

    fn drop_abandoned(&mut self) {
        let mut gone = 0;
        self.running.retain_mut(|s| {
            let abandoned = s.abandoned();
            if abandoned {
                self.blocks.release(&mut s.blocks);
                gone += 1;
            }
            !abandoned
        });
        let shared = &self.shared;
        self.waiting.retain(|s| {
            let abandoned = s.abandoned();
            if abandoned {
                gone += 1;
                if s.started.is_none() {
                    shared.queued.fetch_sub(1, Ordering::Relaxed);
                }
            }
            !abandoned
        });
        self.stats.cancelled += gone;
    }

    fn admit(&mut self) {
        while self.running.len() < self.limits.batch
            && let Some(mut seq) = self.waiting.pop_front()
        {
            seq.extend_keys();
            let reusable = (seq.reusable() / BLOCK).min(seq.keys.len());
            seq.blocks = self.blocks.find(&seq.keys[..reusable]);
            let missing = seq.target().div_ceil(BLOCK) - seq.blocks.len();
            // Room for the running ones to grow by a block each, so that a new
            // one does not push out another at once.
            if missing + self.running.len() > self.blocks.free() {
                self.blocks.release(&mut seq.blocks);
                self.waiting.push_front(seq);
                return;
            }
            seq.computed = seq.blocks.len() * BLOCK;
            while seq.blocks.len() < seq.target().div_ceil(BLOCK)
                && let Some(id) = self.blocks.take()
            {
                seq.blocks.push(id);
            }
            if seq.started.is_none() {
                self.start(&mut seq);
            }
            self.running.push(seq);
        }
    }

    /// What happens at first admission alone.
    fn start(&mut self, seq: &mut Seq) {
        self.shared.queued.fetch_sub(1, Ordering::Relaxed);
        seq.started = Some(Instant::now());
        seq.cached = seq.computed;
        self.stats.prompt_tokens += seq.prompt as u64;
        self.stats.cached_tokens += seq.cached as u64;
        self.stats.prefix_queries += 1;
        self.stats.prefix_hits += u64::from(seq.cached > 0);
        if let Work::Generate(g) = &seq.work {
            drop(g.events.send(Ok(Event::Started {
                prompt_tokens: count(seq.prompt),
                cached_tokens: count(seq.cached),
            })));
        }
    }

    /// Gives each running sequence the block its next token needs, oldest
    /// first.
    fn grow(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let seq = &mut self.running[i];
            if seq.target() <= seq.blocks.len() * BLOCK {
                i += 1;
            } else if let Some(id) = self.blocks.take() {
                seq.blocks.push(id);
            } else if let Some(mut youngest) = self.running.pop() {
                self.blocks.release(&mut youngest.blocks);
                youngest.restart();
                self.stats.preemptions += 1;
                self.waiting.push_front(youngest);
            }
        }
    }

    fn plan(&self) -> Vec<Part> {
        let mut budget = self.limits.prefill;
        let mut parts = Vec::with_capacity(self.running.len());
        for (i, seq) in self.running.iter().enumerate() {
            let left = seq.target() - seq.computed;
            let (len, want) = match &seq.work {
                // A next token is never kept waiting by prompts.
                Work::Generate(_) if left == 1 => (1, Want::Last),
                Work::Generate(_) if left <= budget => (left, Want::Last),
                Work::Generate(_) => (budget, Want::None),
                Work::Score(s) if seq.computed + 1 < s.context => {
                    ((s.context - 1 - seq.computed).min(budget), Want::None)
                }
                Work::Score(_) => (left.min(budget).min(SCORE_ROWS), Want::All),
            };
            if len == 0 {
                continue;
            }
            if left > 1 {
                budget -= len;
            }
            parts.push(Part { seq: i, len, want });
        }
        parts
    }

    /// Runs the parts; the outcomes are those of the wanted rows in order, each
    /// with the index of its part.
    fn compute(&mut self, parts: &[Part]) -> Result<Vec<(usize, Outcome)>, String> {
        let (running, scratch) = (&self.running, &mut self.scratch);
        let mut rows = Vec::new();
        let mut items = Vec::with_capacity(parts.len());
        for (p, part) in parts.iter().enumerate() {
            let seq = &running[part.seq];
            let end = seq.computed + part.len;
            match part.want {
                Want::None => {}
                Want::Last => rows.push((p, end)),
                Want::All => rows.extend((seq.computed + 1..=end).map(|next| (p, next))),
            }
            items.push(Item {
                tokens: &seq.tokens[seq.computed..end],
                start: seq.computed,
                blocks: &seq.blocks,
                want: part.want,
            });
        }
        let mut outcomes = Vec::with_capacity(rows.len());
        let vocab = self.forward.vocab();
        self.forward
            .forward(&items, &mut |i, row| {
                let Some(&(p, next)) = rows.get(i) else {
                    return;
                };
                debug_assert_eq!(row.len(), vocab);
                let seq = &running[parts[p].seq];
                outcomes.push((
                    p,
                    match &seq.work {
                        Work::Generate(g) => Outcome::Sampled(g.sampler.choose(
                            row,
                            &seq.tokens,
                            seq.prompt,
                            scratch,
                        )),
                        Work::Score(_) => {
                            let token = seq.tokens[next];
                            let likeliest = sampler::argmax(row).map(|(id, _)| id);
                            Outcome::Scored(sampler::logprob(row, token), likeliest == Some(token))
                        }
                    },
                ));
            })
            .map_err(|e| format!("the model failed: {e}"))?;
        if outcomes.len() != rows.len() {
            return Err(format!(
                "the model gave {} rows of logits, {} were wanted",
                outcomes.len(),
                rows.len()
            ));
        }
        Ok(outcomes)
    }

    fn settle(&mut self, parts: &[Part], outcomes: Vec<(usize, Outcome)>) {
        self.stats.steps += 1;
        for part in parts {
            let seq = &mut self.running[part.seq];
            let full = seq.computed / BLOCK;
            seq.computed += part.len;
            seq.extend_keys();
            for b in full..seq.computed / BLOCK {
                self.blocks.publish(seq.blocks[b], seq.keys[b]);
            }
        }
        let mut over = vec![false; self.running.len()];
        for (p, outcome) in outcomes {
            let i = parts[p].seq;
            let seq = &mut self.running[i];
            match outcome {
                Outcome::Sampled(None) => {
                    seq.fail(ApiError::internal("the model gave no finite logit"));
                    over[i] = true;
                }
                Outcome::Sampled(Some(choice)) => {
                    self.stats.generated_tokens += 1;
                    if let Some(finish) = seq.accept(choice, &self.ends) {
                        seq.done(finish);
                        self.stats.finished += 1;
                        over[i] = true;
                    }
                }
                Outcome::Scored(logprob, likeliest) => {
                    if let Work::Score(s) = &mut seq.work {
                        s.logprob += logprob;
                        s.greedy &= likeliest;
                    }
                }
            }
        }
        for (seq, over) in self.running.iter_mut().zip(&mut over) {
            let finished = seq.computed == seq.target();
            if let Work::Score(s) = &mut seq.work
                && finished
                && let Some(reply) = s.reply.take()
            {
                drop(reply.send(Ok(Score {
                    logprob: s.logprob,
                    tokens: count(seq.prompt - s.context),
                    greedy: s.greedy,
                })));
                self.stats.finished += 1;
                *over = true;
            }
        }
        self.remove(&over);
    }

    fn fail(&mut self, parts: &[Part], why: &str) {
        let mut over = vec![false; self.running.len()];
        for part in parts {
            self.running[part.seq].fail(ApiError::internal(why));
            over[part.seq] = true;
        }
        self.remove(&over);
    }

    fn remove(&mut self, over: &[bool]) {
        let mut flags = over.iter();
        self.running.retain_mut(|s| {
            let over = flags.next().is_some_and(|&o| o);
            if over {
                self.blocks.release(&mut s.blocks);
            }
            !over
        });
    }

    /// Publishes the state.
    fn report(&mut self) {
        self.stats.running = count(self.running.len());
        self.stats.waiting = count(self.waiting.len());
        self.stats.blocks_total = count(self.blocks.total());
        self.stats.blocks_used = count(self.blocks.total() - self.blocks.free());
        self.stats.blocks_cached = count(self.blocks.cached());
        *self.shared.stats() = self.stats.clone();
    }
}

#[cfg(test)]
mod tests;
