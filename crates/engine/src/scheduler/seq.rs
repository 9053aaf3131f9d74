//! One request in flight: its tokens, its blocks, and what its client is told.

use super::{
    door::Ticket,
    queue::Account,
    {Job, Work},
};
use crate::{blocks::chain, sampler::Choice};
use ashlar_api::{ApiError, Event, Finish, Timings, Usage};
use ashlar_core::Digest;
use ashlar_model::BLOCK;
use std::{sync::Arc, time::Instant};
use tokio::sync::oneshot;

/// Whose blocks a request waits for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leader {
    /// Its arrival, which names it.
    pub(crate) arrival: u64,
    /// Tokens it must have computed.
    pub(crate) tokens: usize,
}

pub(crate) struct Seq {
    pub(crate) work: Work,
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt: usize,
    /// Tokens whose keys and values are in `blocks`.
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<u32>,
    /// Chained digests of the full blocks of `tokens`.
    pub(crate) keys: Vec<Digest>,
    /// Of the prompt, found in the prefix cache at first admission.
    pub(crate) cached: usize,
    pub(crate) priority: i32,
    pub(crate) arrival: u64,
    /// Was admitted for having waited longest.
    pub(crate) aged: bool,
    pub(crate) leader: Option<Leader>,
    pub(crate) account: Arc<Account>,
    /// Tokens already on the account, so that recomputing is not.
    charged: usize,
    /// Its place in the queue, until it starts.
    pub(crate) ticket: Option<Ticket>,
    sent: Instant,
    pub(crate) started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Seq {
    pub(crate) fn new(job: Job, account: Arc<Account>, arrival: u64) -> Self {
        let mut seq = Self {
            prompt: job.tokens.len(),
            tokens: job.tokens,
            work: job.work,
            computed: 0,
            blocks: Vec::new(),
            keys: Vec::new(),
            cached: 0,
            priority: job.priority,
            arrival,
            aged: false,
            leader: None,
            account,
            charged: 0,
            ticket: Some(job.ticket),
            sent: job.sent,
            started: None,
            first: None,
            last: None,
        };
        seq.extend_keys();
        seq
    }

    /// The order in which running requests get blocks and prompt tokens; the
    /// last gives its blocks up first.
    pub(crate) fn rank(&self) -> (bool, i32, u64) {
        let priority = if self.aged { 0 } else { self.priority };
        (!self.aged, priority, self.arrival)
    }

    /// Tokens to compute before the sequence can go on: a score never reads
    /// past the token before its last.
    pub(crate) fn target(&self) -> usize {
        match self.work {
            Work::Generate(_) => self.tokens.len(),
            Work::Score(_) => self.tokens.len() - 1,
        }
    }

    /// Blocks that may come from the prefix cache: at least one row must be
    /// computed to have logits.
    pub(crate) fn reusable(&self) -> usize {
        let tokens = match &self.work {
            Work::Generate(_) => self.tokens.len() - 1,
            Work::Score(s) => s.context - 1,
        };
        (tokens / BLOCK).min(self.keys.len())
    }

    /// Full blocks in which this and `other` begin alike.
    pub(crate) fn common(&self, other: &Self) -> usize {
        let pairs = self.keys.iter().zip(&other.keys);
        // Keys are chained, so the first difference is the last.
        pairs.take_while(|(a, b)| a == b).count()
    }

    /// Takes the blocks found in the cache, and charges the tokens that remain
    /// to be computed, unless they were charged before.
    pub(crate) fn admitted(&mut self) {
        self.computed = self.blocks.len() * BLOCK;
        self.charged = self.charged.max(self.computed);
        self.charge(self.target());
    }

    /// Records tokens computed.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.computed += tokens;
        self.charge(self.computed);
        self.extend_keys();
    }

    fn charge(&mut self, upto: usize) {
        self.account.charge(upto.saturating_sub(self.charged));
        self.charged = self.charged.max(upto);
    }

    /// Forgets what was computed; what was generated stays.
    pub(crate) fn restart(&mut self) {
        self.computed = 0;
        if let Work::Score(s) = &mut self.work {
            (s.logprob, s.greedy) = (0.0, true);
        }
    }

    pub(crate) fn abandoned(&self) -> bool {
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

    pub(crate) fn fail(&mut self, error: ApiError) {
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
        let ms = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64() * 1e3,
            _ => 0.0,
        };
        Timings {
            queue_ms: ms(Some(self.sent), self.started),
            prefill_ms: ms(self.started, self.first),
            decode_ms: ms(self.first, self.last),
        }
    }

    pub(crate) fn done(&self, finish: Finish) {
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
    pub(crate) fn accept(&mut self, choice: Choice, ends: &[u32]) -> Option<Finish> {
        let Work::Generate(g) = &mut self.work else {
            return None;
        };
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
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

pub(crate) fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
