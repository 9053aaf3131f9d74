//! The door: how many requests, and how many bytes of them, may wait.
//!
//! A request holds a ticket from the door until its first step. What may not
//! happen: a queue longer than its two limits, or a ticket that is never given
//! back (it is given back by being dropped, whatever ended the request).

use ashlar_api::{ApiError, BackendStats};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

/// What clients and the scheduler both see.
#[derive(Default)]
pub(crate) struct Shared {
    /// Requests past the door that have not had their first step.
    queued: AtomicUsize,
    /// Bytes of these.
    bytes: AtomicUsize,
    stats: Mutex<BackendStats>,
}

/// Most that may wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) requests: usize,
    pub(crate) bytes: usize,
    /// Requests computed together, for the time a refused client is told.
    pub(crate) batch: usize,
}

/// A place in the queue.
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    bytes: usize,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shared.queued.fetch_sub(1, Ordering::Relaxed);
        self.shared.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Shared {
    /// The statistics; they stay readable after a panic elsewhere.
    pub(crate) fn stats(&self) -> MutexGuard<'_, BackendStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    pub(crate) fn queued_bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Lets a request of `bytes` in, or refuses it with 429.
    pub(crate) fn enter(self: &Arc<Self>, bytes: usize, room: Room) -> Result<Ticket, ApiError> {
        let take = |counter: &AtomicUsize, n: usize, most: usize| {
            let admit = |now: usize| now.checked_add(n).filter(|&sum| sum <= most);
            counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, admit)
        };
        if take(&self.queued, 1, room.requests).is_err() {
            let message = format!(
                "{} requests are waiting already, the most that may",
                room.requests
            );
            return Err(full(message, room));
        }
        if let Err(waiting) = take(&self.bytes, bytes, room.bytes) {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            let message = format!(
                "requests of {waiting} bytes are waiting already; this one of {bytes} would \
                 exceed the {} that may wait",
                room.bytes
            );
            return Err(full(message, room));
        }
        Ok(Ticket {
            shared: Arc::clone(self),
            bytes,
        })
    }

    /// 429 when no further request can enter now: asked before work is put
    /// into one, without taking a place.
    pub(crate) fn peek(self: &Arc<Self>, room: Room) -> Result<(), ApiError> {
        self.enter(0, room).map(drop)
    }
}

fn full(message: String, room: Room) -> ApiError {
    let retry = 1 + room.requests / room.batch.max(1) / 4;
    ApiError::overloaded(message, u32::try_from(retry).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_tickets_come_back() {
        let shared = Arc::new(Shared::default());
        let room = Room {
            requests: 2,
            bytes: 100,
            batch: 1,
        };
        let first = shared.enter(60, room).unwrap();
        let e = shared.enter(41, room).err().unwrap();
        assert_eq!((e.status, e.code.as_deref()), (429, Some("queue_full")));
        assert!(e.retry_after.is_some());
        for n in ["60", "41", "100"] {
            assert!(e.message.contains(n), "{}", e.message);
        }
        assert_eq!((shared.queued(), shared.queued_bytes()), (1, 60));
        let second = shared.enter(40, room).unwrap();
        let e = shared.enter(0, room).err().unwrap();
        assert!(e.message.starts_with("2 requests"), "{}", e.message);
        assert!(shared.peek(room).is_err());
        drop((first, second));
        assert_eq!((shared.queued(), shared.queued_bytes()), (0, 0));
        assert!(shared.enter(usize::MAX, room).is_err(), "no overflow");
        assert!(shared.peek(room).is_ok());
        assert_eq!((shared.queued(), shared.queued_bytes()), (0, 0));
    }
}
