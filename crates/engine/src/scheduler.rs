//! Which tokens run in the next step, and whose blocks they use.
//!
//! Each step: take new jobs, drop those nobody waits for, admit waiting ones
//! that fit in the order of `queue`, give every running sequence its next token
//! or a chunk of its prompt, sample. Out of blocks, the running sequence of the
//! last rank gives its up and is recomputed later.
//!
//! What is promised to a request past the door: it fits the pool alone, so it
//! ends; its memory is there, since pool, buffers and queue are allotted before
//! the first one is served; it starts after a bounded number of others (see
//! `queue`); a next token waits for one step of at most `batch + prefill`
//! tokens. Not promised: that it runs without being recomputed, for blocks of
//! answers that may end early are not set aside.
//!
//! What may not happen: reading a block before it was written by the same
//! prefix (blocks are published only after the step that filled them), a
//! sequence ending without its blocks going back, or one request's failure
//! ending the service of those outside its step.
//!
//! Rejected: setting `max_tokens` of every request aside at admission. Most
//! answers end long before, and the pool would stand half empty.
//! Rejected: letting small requests pass one that does not fit. Large ones
//! would then wait for as long as small ones come.

mod door;
mod queue;
mod seq;

use door::Ticket;
pub(crate) use door::{Room, Shared};

use crate::{
    blocks::Blocks,
    forward::Forward,
    sampler::{self, Choice, Sampler, Scratch},
    stop::Stops,
};
use ashlar_api::{ApiError, BackendStats, Event, Finish, Score};
use ashlar_core::Digest;
use ashlar_model::{BLOCK, Item, Want};
use ashlar_text::StreamDecoder;
use queue::Queue;
use seq::{Leader, Seq, count};
use std::{
    any::Any,
    collections::HashMap,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    time::Instant,
};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

/// Rows of logits that scores ask for in one step; each is a whole vocabulary.
pub(crate) const SCORE_ROWS: usize = 32;
/// Steps that may panic one after the other; then the fault is not a request's.
const MAX_PANICS: u32 = 3;

/// A request as it enters: checked, tokenized, and sure to fit the pool.
pub(crate) struct Job {
    /// The prompt, or context and continuation.
    pub(crate) tokens: Vec<u32>,
    pub(crate) work: Work,
    /// Lower goes sooner.
    pub(crate) priority: i32,
    /// Whose turn it takes.
    pub(crate) user: Option<Digest>,
    pub(crate) ticket: Ticket,
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

/// Why a step failed.
enum Failure {
    /// The model refused it; nothing was written.
    Refused(String),
    /// A bug, in the model or in choosing a token.
    Panicked(String),
}

/// Everything in flight.
pub(crate) struct Scheduler<F> {
    forward: F,
    blocks: Blocks,
    limits: Limits,
    /// Tokens that end an answer.
    ends: Vec<u32>,
    waiting: Queue,
    /// In the order of their ranks.
    running: Vec<Seq>,
    scratch: Scratch,
    shared: Arc<Shared>,
    stats: BackendStats,
    /// Panicked steps since the last good one.
    panics: u32,
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
            waiting: Queue::default(),
            running: Vec::new(),
            scratch: Scratch::default(),
            shared,
            stats: BackendStats::default(),
            panics: 0,
        };
        s.report();
        s
    }

    /// Works until every sender of `jobs` is gone, whereupon what is in flight
    /// ends as cancelled, or until the model cannot be used any more.
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
            if self.step().is_break() {
                return self.give_up();
            }
        }
    }

    fn stop(mut self) {
        for seq in self.running.iter_mut().chain(self.waiting.iter_mut()) {
            match seq.work {
                Work::Generate(_) => seq.done(Finish::Cancelled),
                Work::Score(_) => seq.fail(ApiError::unavailable("the engine is stopping")),
            }
        }
    }

    fn give_up(mut self) {
        let why = self.stats.unhealthy.clone().unwrap_or_default();
        for seq in self.running.iter_mut().chain(self.waiting.iter_mut()) {
            seq.fail(ApiError::unavailable(&why));
        }
    }

    pub(crate) fn idle(&self) -> bool {
        self.running.is_empty() && self.waiting.len() == 0
    }

    pub(crate) fn push(&mut self, job: Job) {
        let (account, arrival) = self.waiting.register(job.user);
        self.waiting.push(Seq::new(job, account, arrival));
    }

    /// Does one step; breaks when the model cannot be used any more.
    pub(crate) fn step(&mut self) -> ControlFlow<()> {
        self.drop_abandoned();
        self.admit();
        self.grow();
        let parts = self.plan();
        if !parts.is_empty() {
            match self.compute(&parts) {
                Ok(outcomes) => self.settle(&parts, outcomes),
                Err(failure) => self.fail(&parts, failure),
            }
        }
        let broken = self.panics >= MAX_PANICS;
        self.report();
        match broken {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
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
        let before = self.waiting.len();
        self.waiting.retain(|s| !s.abandoned());
        self.stats.cancelled += gone + (before - self.waiting.len()) as u64;
    }

    fn admit(&mut self) {
        let computed: HashMap<u64, usize> = self
            .running
            .iter()
            .map(|s| (s.arrival, s.computed))
            .collect();
        for seq in self.waiting.iter_mut() {
            // A leader that is done, or that gave its blocks up, holds no one.
            seq.leader = seq.leader.filter(|l| {
                computed
                    .get(&l.arrival)
                    .is_some_and(|&done| done < l.tokens)
            });
        }
        while self.running.len() < self.limits.batch
            && let Some(mut seq) = self.waiting.next()
        {
            let reusable = seq.reusable();
            seq.blocks = self.blocks.find(&seq.keys[..reusable]);
            seq.leader = self.leader(&seq, seq.blocks.len(), reusable);
            if seq.leader.is_some() {
                self.blocks.release(&mut seq.blocks);
                self.stats.prefix_waits += 1;
                self.waiting.push(seq);
                continue;
            }
            let need = seq.target().div_ceil(BLOCK);
            // Room for the running ones to grow by a block each, so that a new
            // one does not push out another at once.
            if need - seq.blocks.len() + self.running.len() > self.blocks.free() {
                self.blocks.release(&mut seq.blocks);
                self.waiting.push(seq);
                return;
            }
            self.waiting.admitted(&seq);
            seq.admitted();
            while seq.blocks.len() < need
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

    /// The running request that is about to compute more of this one's prefix
    /// than the `known` blocks: waiting for it costs nothing, since it is
    /// before this one in rank and so computes first.
    fn leader(&self, seq: &Seq, known: usize, reusable: usize) -> Option<Leader> {
        let ahead = self.running.iter().filter(|r| r.rank() < seq.rank());
        let shares = ahead.map(|r| {
            let blocks = r.common(seq).min(reusable).min(r.target() / BLOCK);
            (blocks, r)
        });
        let (blocks, leader) = shares
            .filter(|&(blocks, r)| blocks > known && r.computed < blocks * BLOCK)
            .max_by_key(|&(blocks, _)| blocks)?;
        Some(Leader {
            arrival: leader.arrival,
            tokens: blocks * BLOCK,
        })
    }

    /// What happens at first admission alone.
    fn start(&mut self, seq: &mut Seq) {
        seq.ticket = None;
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

    /// Gives each running sequence the block its next token needs, first ranks
    /// first.
    fn grow(&mut self) {
        self.running.sort_by_key(Seq::rank);
        let mut i = 0;
        while i < self.running.len() {
            let seq = &mut self.running[i];
            if seq.target() <= seq.blocks.len() * BLOCK {
                i += 1;
            } else if let Some(id) = self.blocks.take() {
                seq.blocks.push(id);
            } else if let Some(mut last) = self.running.pop() {
                self.blocks.release(&mut last.blocks);
                last.restart();
                self.stats.preemptions += 1;
                self.waiting.push(last);
            }
        }
    }

    fn plan(&self) -> Vec<Part> {
        let (mut budget, mut scores) = (self.limits.prefill, SCORE_ROWS);
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
                Work::Score(_) => (left.min(budget).min(scores), Want::All),
            };
            if len == 0 {
                continue;
            }
            if want == Want::All {
                scores -= len;
            }
            if left > 1 || want == Want::All {
                budget -= len;
            }
            parts.push(Part { seq: i, len, want });
        }
        parts
    }

    /// Runs the parts; the outcomes are those of the wanted rows in order, each
    /// with the index of its part.
    fn compute(&mut self, parts: &[Part]) -> Result<Vec<(usize, Outcome)>, Failure> {
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
        let forward = &mut self.forward;
        // After a panic the blocks of this step hold anything; they are given
        // back unpublished, so that nobody reads them before they are written.
        // Everything else that was borrowed is overwritten at its next use.
        let run = catch_unwind(AssertUnwindSafe(|| {
            forward.forward(&items, &mut |i, row| {
                let Some(&(p, next)) = rows.get(i) else {
                    return;
                };
                debug_assert_eq!(row.len(), vocab);
                let seq = &running[parts[p].seq];
                let outcome = match &seq.work {
                    Work::Generate(g) => {
                        Outcome::Sampled(g.sampler.choose(row, &seq.tokens, seq.prompt, scratch))
                    }
                    Work::Score(_) => {
                        let token = seq.tokens[next];
                        let likeliest = sampler::argmax(row).map(|(id, _)| id);
                        Outcome::Scored(sampler::logprob(row, token), likeliest == Some(token))
                    }
                };
                outcomes.push((p, outcome));
            })
        }));
        match run {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(Failure::Refused(format!("the model failed: {e}"))),
            Err(panic) => return Err(Failure::Panicked(message(&*panic).to_owned())),
        }
        if outcomes.len() != rows.len() {
            return Err(Failure::Refused(format!(
                "the model gave {} rows of logits, {} were wanted",
                outcomes.len(),
                rows.len()
            )));
        }
        Ok(outcomes)
    }

    fn settle(&mut self, parts: &[Part], outcomes: Vec<(usize, Outcome)>) {
        self.panics = 0;
        self.stats.steps += 1;
        self.stats
            .iteration_tokens
            .observe(parts.iter().map(|p| p.len as u64).sum());
        for part in parts {
            let seq = &mut self.running[part.seq];
            let full = seq.computed / BLOCK;
            seq.advance(part.len);
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
                    self.stats.failed += 1;
                    over[i] = true;
                }
                Outcome::Sampled(Some(choice)) => {
                    self.stats.generated_tokens += 1;
                    // A bug in turning one's tokens into text is no one else's.
                    let ends = &self.ends;
                    match catch_unwind(AssertUnwindSafe(|| seq.accept(choice, ends))) {
                        Ok(None) => {}
                        Ok(Some(finish)) => {
                            seq.done(finish);
                            self.stats.finished += 1;
                            over[i] = true;
                        }
                        Err(panic) => {
                            let why = format!("decoding a token failed: {}", message(&*panic));
                            seq.fail(ApiError::internal(why));
                            self.stats.failed += 1;
                            over[i] = true;
                        }
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

    /// Ends the requests of a failed step; their blocks go back unpublished.
    fn fail(&mut self, parts: &[Part], failure: Failure) {
        let why = match failure {
            Failure::Refused(why) => why,
            Failure::Panicked(why) => {
                self.panics += 1;
                self.stats.panics += 1;
                if self.panics >= MAX_PANICS {
                    self.stats.unhealthy = Some(format!(
                        "{MAX_PANICS} steps in a row panicked, the last: {why}"
                    ));
                }
                format!("a bug ended this step of the engine: {why}")
            }
        };
        let mut over = vec![false; self.running.len()];
        for part in parts {
            self.running[part.seq].fail(ApiError::internal(&why));
            self.stats.failed += 1;
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

/// The words of a panic.
pub(crate) fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

#[cfg(test)]
mod tests;
