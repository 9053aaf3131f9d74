//! Who goes next: priority, then the user served least, then arrival.
//!
//! A lower priority number goes sooner. Among equal priorities a request that
//! was preempted goes first, then requests of the user who got the fewest
//! tokens (start-time fair queueing, Goyal et al. 1996, with tokens for
//! packets; a user who was idle starts level with those now served and cannot
//! save up). Every [`AGED`]th admission goes to the request that has waited
//! longest, whatever its priority and user, and that one is never pushed out by
//! a younger one again: with k older requests before it, a request starts
//! within `AGED * (k + 1)` admissions and then ends, whatever else is sent.
//!
//! Rejected: raising priorities with time. Priorities are any integers, so no
//! rate of raising bounds the wait; and times make a schedule unrepeatable.
//! Rejected: a heap. Keys change with every token served, and the door bounds
//! the queue to a length a scan passes in microseconds.

use super::seq::Seq;
use ashlar_core::Digest;
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// One admission in this many goes to the longest waiting request.
pub(crate) const AGED: u64 = 8;
/// Users remembered while they have nothing in flight.
const IDLE_ACCOUNTS: usize = 1024;

/// Tokens computed for one user; held by each of the user's requests.
#[derive(Default)]
pub(crate) struct Account(AtomicU64);

impl Account {
    /// Adds tokens computed.
    pub(crate) fn charge(&self, tokens: usize) {
        self.0.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    fn served(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Requests that hold no blocks.
#[derive(Default)]
pub(crate) struct Queue {
    waiting: Vec<Seq>,
    /// By a digest of the user's name, so that long names take no room.
    accounts: HashMap<Option<Digest>, Arc<Account>>,
    /// Tokens of the user served last, when chosen: where an idle user starts.
    now: u64,
    admitted: u64,
    arrivals: u64,
}

impl Queue {
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Seq> {
        self.waiting.iter_mut()
    }

    pub(crate) fn retain(&mut self, keep: impl FnMut(&Seq) -> bool) {
        self.waiting.retain(keep);
    }

    /// The account a new request of `user` is charged to, and its place in the
    /// order of arrival.
    pub(crate) fn register(&mut self, user: Option<Digest>) -> (Arc<Account>, u64) {
        if self.accounts.len() >= IDLE_ACCOUNTS && !self.accounts.contains_key(&user) {
            // What an idle user was ahead by is forgotten.
            self.accounts.retain(|_, a| Arc::strong_count(a) > 1);
        }
        let account = self.accounts.entry(user).or_default();
        if Arc::strong_count(account) == 1 {
            account.0.fetch_max(self.now, Ordering::Relaxed);
        }
        self.arrivals += 1;
        (Arc::clone(account), self.arrivals)
    }

    /// Puts in a new request, or back one that could not go on.
    pub(crate) fn push(&mut self, seq: Seq) {
        self.waiting.push(seq);
    }

    /// Takes out the request to admit next, but for those that wait for
    /// another's blocks.
    pub(crate) fn next(&mut self) -> Option<Seq> {
        let ready = self.waiting.iter().enumerate();
        let ready = ready.filter(|(_, s)| s.leader.is_none());
        let aged = self.admitted % AGED == AGED - 1;
        let (i, _) = if aged {
            ready.min_by_key(|(_, s)| s.arrival)?
        } else {
            ready.min_by_key(|(_, s)| {
                let fresh = s.started.is_none();
                (!s.aged, s.priority, fresh, s.account.served(), s.arrival)
            })?
        };
        let mut seq = self.waiting.swap_remove(i);
        seq.aged |= aged;
        Some(seq)
    }

    /// Counts an admission of what [`Queue::next`] gave.
    pub(crate) fn admitted(&mut self, seq: &Seq) {
        self.admitted += 1;
        self.now = self.now.max(seq.account.served());
    }
}
