//! How many retries and hedges there may be, so that a failing backend is not
//! buried under them: a token bucket that requests fill, after Finagle's
//! retry budget.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Seconds of the steady allowance that can be saved up.
const SAVED_S: f64 = 10.0;
/// Requests whose share can be saved up.
const SAVED_REQUESTS: f64 = 1000.0;

/// The bucket.
#[derive(Debug)]
pub(crate) struct Budget {
    ratio: f64,
    per_s: f64,
    held: Mutex<(f64, Instant)>,
}

impl Budget {
    /// `ratio` retries a request and `per_s` a second.
    pub(crate) fn new(ratio: f64, per_s: f64, now: Instant) -> Self {
        Self { ratio, per_s, held: Mutex::new((per_s * SAVED_S, now)) }
    }

    /// A request came in.
    pub(crate) fn deposit(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let most = self.per_s * SAVED_S + self.ratio * SAVED_REQUESTS;
        held.0 = (held.0 + self.ratio).min(most.max(held.0));
    }

    /// Whether one more retry may be sent at `now`.
    pub(crate) fn withdraw(&self, now: Instant) -> bool {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now.saturating_duration_since(held.1).as_secs_f64();
        let steady = (since * self.per_s).min((self.per_s * SAVED_S - held.0).max(0.0));
        *held = (held.0 + steady, now);
        if held.0 < 1.0 {
            return false;
        }
        held.0 -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn retries_are_a_share_of_requests() {
        let t = Instant::now();
        let budget = Budget::new(0.5, 0.0, t);
        assert!(!budget.withdraw(t));
        for _ in 0..4 {
            budget.deposit();
        }
        assert!(budget.withdraw(t) && budget.withdraw(t) && !budget.withdraw(t));
        let steady = Budget::new(0.0, 1.0, t);
        let granted = (0..100).filter(|_| steady.withdraw(t)).count();
        assert_eq!(granted, 10);
        assert!(steady.withdraw(t + Duration::from_secs(1)));
        assert!(!steady.withdraw(t + Duration::from_secs(1)));
    }
}
