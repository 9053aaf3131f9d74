//! Whose a machine's time is, when it gives several answers at once.
//!
//! While n answers are under way each has an n-th of the time: their shares add up
//! to the time the machine was busy, whatever they were. Kept as one clock a
//! machine that runs n times slower while n share it (virtual time, as in fair
//! queueing: Demers, Keshav, Shenker 1989), so that an answer's share is two
//! readings, not a walk over all others. Measured from the request's being sent,
//! so waiting for its turn at the machine counts as being there.
//!
//! Rejected: by tokens. A token of prompt costs a fraction of a generated one, and
//! only the engine knows which.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

#[derive(Debug, Default)]
struct Clock {
    read: Option<Instant>,
    running: u32,
    /// Seconds of the machine for itself that each of those running was given
    /// since it began.
    each_s: f64,
}

impl Clock {
    fn advance(&mut self, now: Instant) {
        if let Some(read) = self.read.filter(|_| self.running > 0) {
            self.each_s += now.saturating_duration_since(read).as_secs_f64() / f64::from(self.running);
        }
        self.read = self.read.max(Some(now));
    }
}

/// A machine.
#[derive(Debug, Default)]
pub(crate) struct Machine(Mutex<Clock>);

/// An answer's part of a machine, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Share {
    machine: Arc<Machine>,
    from_s: f64,
}

impl Machine {
    fn at<T>(&self, now: Instant, f: impl FnOnce(&mut Clock) -> T) -> T {
        let mut clock = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        clock.advance(now);
        f(&mut clock)
    }

    /// One more answer is under way.
    pub(crate) fn share(self: &Arc<Self>, now: Instant) -> Share {
        let from_s = self.at(now, |clock| {
            clock.running += 1;
            clock.each_s
        });
        Share { machine: self.clone(), from_s }
    }
}

impl Share {
    /// Microseconds of the machine for itself, so far.
    pub(crate) fn micros(&self, now: Instant) -> u64 {
        ((self.machine.at(now, |clock| clock.each_s) - self.from_s) * 1e6).round().max(0.0) as u64
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.machine.at(Instant::now(), |clock| clock.running = clock.running.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn shares_add_up_to_the_time_it_was_busy() {
        let (machine, start) = (Arc::new(Machine::default()), Instant::now());
        // Times yet to come, so that a drop's own reading of the clock adds nothing.
        let at = |ms| start + Duration::from_secs(3600) + Duration::from_millis(ms);
        let a = machine.share(at(0));
        let b = machine.share(at(100));
        let b_us = b.micros(at(300));
        drop(b);
        let a_us = a.micros(at(400));
        assert_eq!((a_us, b_us), (100_000 + 100_000 + 100_000, 100_000));
        drop(a);
        let c = machine.share(at(1000));
        assert_eq!(c.micros(at(1500)), 500_000, "idle time is nobody's");
    }
}
