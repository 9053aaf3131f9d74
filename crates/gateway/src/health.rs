//! Whether a backend may be asked: a circuit breaker fed by requests, probes,
//! and rests a backend asked for.
//!
//! Closed, open, half open after Nygard's "Release It!": a number of failures
//! in a row open the circuit, after a while a few trials go through, one success
//! closes it, one failure opens it for twice as long.
//!
//! What may not happen here: a request's own mistake counts against a backend
//! (`UpstreamError::unhealthy`), or a trial that is cancelled holds its place.

use crate::upstream::UpstreamError;
use serde_json::{Value, json};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Times the pause may double.
const MOST_DOUBLINGS: u32 = 4;

/// When a circuit opens and closes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct HealthSettings {
    pub(crate) failures: u32,
    pub(crate) open: Duration,
    pub(crate) trials: u32,
    pub(crate) probe_failures: u32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Circuit {
    Closed { failures: u32 },
    Open { until: Instant },
    HalfOpen { trials: u32 },
}

#[derive(Debug)]
struct State {
    circuit: Circuit,
    /// Times it opened without closing in between, less one.
    doublings: u32,
    rest: Option<Instant>,
    probe_failures: u32,
    probe_error: Option<String>,
    last_error: Option<String>,
    requests: u64,
    errors: u64,
    opened: u64,
}

/// The health of one backend.
#[derive(Debug)]
pub(crate) struct Health {
    settings: HealthSettings,
    state: Mutex<State>,
}

/// Why a backend is left out, and in how many seconds that may change.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Unfit {
    pub(crate) why: String,
    pub(crate) seconds: Option<u32>,
}

/// Leave to send one request.
#[derive(Debug)]
pub(crate) struct Permit {
    health: Arc<Health>,
    trial: bool,
}

impl Drop for Permit {
    /// What ended without a verdict, by a client that left, gives a trial back.
    fn drop(&mut self) {
        if self.trial {
            self.health.with(|s| {
                if let Circuit::HalfOpen { trials } = &mut s.circuit {
                    *trials = trials.saturating_sub(1);
                }
            });
        }
    }
}

impl Health {
    pub(crate) fn new(settings: HealthSettings) -> Self {
        let state = State {
            circuit: Circuit::Closed { failures: 0 },
            doublings: 0,
            rest: None,
            probe_failures: 0,
            probe_error: None,
            last_error: None,
            requests: 0,
            errors: 0,
            opened: 0,
        };
        Self { settings, state: Mutex::new(state) }
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a request could be sent at `now`.
    pub(crate) fn check(&self, now: Instant) -> Result<(), Unfit> {
        self.with(|s| self.fit(s, now))
    }

    fn fit(&self, s: &State, now: Instant) -> Result<(), Unfit> {
        let left = |until: Instant| {
            let s = until.saturating_duration_since(now).as_secs_f64().ceil();
            Some((s as u32).max(1))
        };
        if let Some(until) = s.rest.filter(|until| *until > now) {
            return Err(Unfit { why: "it asked to be left alone".into(), seconds: left(until) });
        }
        if s.probe_failures >= self.settings.probe_failures {
            let why = s.probe_error.clone().unwrap_or_default();
            return Err(Unfit { why: format!("its probes fail: {why}"), seconds: None });
        }
        match s.circuit {
            Circuit::Open { until } if until > now => {
                let why = s.last_error.as_deref().unwrap_or("failures");
                Err(Unfit { why: format!("its circuit is open: {why}"), seconds: left(until) })
            }
            Circuit::HalfOpen { trials } if trials >= self.settings.trials => {
                Err(Unfit { why: "its circuit is half open and a trial runs".into(), seconds: Some(1) })
            }
            _ => Ok(()),
        }
    }

    /// Leave to send a request at `now`.
    pub(crate) fn acquire(self: &Arc<Self>, now: Instant) -> Result<Permit, Unfit> {
        self.with(|s| {
            self.fit(s, now)?;
            s.requests += 1;
            let trials = match s.circuit {
                Circuit::Closed { .. } => return Ok(Permit { health: self.clone(), trial: false }),
                Circuit::Open { .. } => 0,
                Circuit::HalfOpen { trials } => trials,
            };
            s.circuit = Circuit::HalfOpen { trials: trials + 1 };
            Ok(Permit { health: self.clone(), trial: true })
        })
    }

    /// A request has its first token: enough to close the circuit, not to forget
    /// what was before. A backend that breaks off all its answers opens it again.
    pub(crate) fn answering(&self) {
        self.with(|s| {
            if matches!(s.circuit, Circuit::Open { .. } | Circuit::HalfOpen { .. }) {
                s.circuit = Circuit::Closed { failures: self.settings.failures - 1 };
            }
        });
    }

    /// A request went well to its end.
    pub(crate) fn success(&self) {
        self.with(|s| {
            s.circuit = Circuit::Closed { failures: 0 };
            s.doublings = 0;
        });
    }

    /// A request failed at `now`.
    pub(crate) fn failure(&self, error: &UpstreamError, now: Instant) {
        self.with(|s| {
            s.errors += 1;
            if let Some(seconds) = error.rest() {
                s.rest = Some(now + Duration::from_secs(seconds.into()));
            }
            if !error.unhealthy() {
                return;
            }
            s.last_error = Some(error.to_string());
            let open = match s.circuit {
                Circuit::Closed { failures } if failures + 1 < self.settings.failures => {
                    s.circuit = Circuit::Closed { failures: failures + 1 };
                    false
                }
                Circuit::Closed { .. } | Circuit::HalfOpen { .. } => true,
                // Sent before it opened: known already.
                Circuit::Open { .. } => false,
            };
            if open {
                let pause = self.settings.open * (1 << s.doublings);
                s.circuit = Circuit::Open { until: now + pause };
                s.doublings = (s.doublings + 1).min(MOST_DOUBLINGS);
                s.opened += 1;
            }
        });
    }

    /// What a probe found. One that goes well does not end an open circuit's pause:
    /// requests failed where probes may not.
    pub(crate) fn probed(&self, result: Result<(), &UpstreamError>, now: Instant) {
        self.with(|s| match result {
            Ok(()) => {
                s.probe_failures = 0;
                s.probe_error = None;
            }
            // A backend that only asks for rest is alive.
            Err(e) if matches!(e, UpstreamError::Status { status: 429, .. }) => {}
            Err(e) => {
                s.probe_failures = s.probe_failures.saturating_add(1);
                s.probe_error = Some(e.to_string());
                if let Some(seconds) = e.rest() {
                    s.rest = Some(now + Duration::from_secs(seconds.into()));
                }
            }
        });
    }

    /// 0 closed, 1 half open, 2 open.
    pub(crate) fn circuit(&self, now: Instant) -> (u8, &'static str) {
        self.with(|s| match s.circuit {
            Circuit::Closed { .. } => (0, "closed"),
            Circuit::Open { until } if until > now => (2, "open"),
            Circuit::Open { .. } | Circuit::HalfOpen { .. } => (1, "half-open"),
        })
    }

    /// Requests sent, those that failed, times the circuit opened.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        self.with(|s| (s.requests, s.errors, s.opened))
    }

    /// For the console.
    pub(crate) fn to_json(&self, now: Instant) -> Value {
        let unfit = self.check(now).err();
        let (_, circuit) = self.circuit(now);
        self.with(|s| {
            json!({
                "available": unfit.is_none(), "why": unfit.as_ref().map(|u| &u.why),
                "retry_after_s": unfit.as_ref().and_then(|u| u.seconds), "circuit": circuit,
                "probe_failures": s.probe_failures, "probe_error": s.probe_error,
                "last_error": s.last_error, "requests": s.requests, "errors": s.errors, "opened": s.opened,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_api::ApiError;

    fn health() -> Arc<Health> {
        let settings = HealthSettings { failures: 3, open: Duration::from_secs(10), trials: 1, probe_failures: 2 };
        Arc::new(Health::new(settings))
    }

    fn down() -> UpstreamError {
        UpstreamError::Connect { backend: "b".into(), why: "refused".into() }
    }

    #[test]
    fn failures_open_it_and_a_trial_closes_it() {
        let (h, t) = (health(), Instant::now());
        let at = |s: u64| t + Duration::from_secs(s);
        h.failure(&down(), t);
        h.failure(&down(), t);
        h.success();
        h.failure(&down(), t);
        h.failure(&down(), t);
        assert!(h.check(t).is_ok(), "two in a row are not three");
        h.failure(&down(), t);
        let unfit = h.check(at(1)).unwrap_err();
        assert!(unfit.why.contains("open") && unfit.seconds == Some(9), "{unfit:?}");
        assert_eq!(h.circuit(at(10)).1, "half-open");
        let trial = h.acquire(at(10)).unwrap();
        assert!(h.acquire(at(10)).is_err(), "one trial at a time");
        drop(trial);
        let _again = h.acquire(at(10)).unwrap();
        h.failure(&down(), at(10));
        assert_eq!(h.check(at(29)).unwrap_err().seconds, Some(1), "twice as long");
        let _trial = h.acquire(at(30)).unwrap();
        h.success();
        assert_eq!(h.circuit(at(30)).1, "closed");
        assert_eq!(h.counts().2, 2);
    }

    #[test]
    fn answers_that_break_off_open_it_too() {
        let (h, t) = (health(), Instant::now());
        for _ in 0..3 {
            h.answering();
            h.failure(&UpstreamError::Closed { backend: "b".into(), bytes: 9, why: "reset".into() }, t);
        }
        assert_eq!(h.circuit(t).1, "open");
        let later = t + Duration::from_secs(10);
        let _trial = h.acquire(later).unwrap();
        h.answering();
        assert!(h.acquire(later).is_ok(), "others may come once a trial has its first token");
        h.failure(&down(), later);
        assert_eq!(h.circuit(later).1, "open", "one failure suffices then");
    }

    #[test]
    fn load_and_mistakes_do_not_open_it() {
        let (h, t) = (health(), Instant::now());
        for _ in 0..9 {
            h.failure(&UpstreamError::Local(ApiError::bad_request("no", None, None)), t);
        }
        assert!(h.check(t).is_ok());
        let full = UpstreamError::Status {
            backend: "b".into(),
            status: 429,
            message: "full".into(),
            kind: None,
            param: None,
            code: None,
            retry_after: Some(3),
        };
        h.failure(&full, t);
        assert_eq!(h.check(t).unwrap_err().seconds, Some(3));
        assert!(h.check(t + Duration::from_secs(3)).is_ok());
    }

    #[test]
    fn probes_leave_it_out_and_bring_it_back() {
        let (h, t) = (health(), Instant::now());
        h.probed(Err(&down()), t);
        assert!(h.check(t).is_ok());
        h.probed(Err(&down()), t);
        assert!(h.check(t).unwrap_err().why.contains("refused"));
        h.probed(Ok(()), t);
        assert!(h.check(t).is_ok());
    }
}
