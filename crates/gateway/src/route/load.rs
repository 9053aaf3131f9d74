//! What a target is doing and how quick it was of late.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// After this time without a sample, a measured time has lost about two thirds
/// of its weight, so that a target that was slow once is tried again.
const MEMORY: Duration = Duration::from_secs(10);
/// What a request in flight counts on a target that has never answered.
const UNKNOWN_S: f64 = 1.0;

/// A mean that jumps up with a slow sample and sinks with time: the peak-EWMA
/// of Twitter's Finagle.
#[derive(Debug, Default)]
pub(crate) struct PeakEwma(Mutex<Option<(f64, Instant)>>);

impl PeakEwma {
    fn weight(since: Duration) -> f64 {
        (-since.as_secs_f64() / MEMORY.as_secs_f64()).exp()
    }

    /// Takes a sample, in seconds.
    pub(crate) fn observe(&self, seconds: f64, now: Instant) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match *held {
            Some((mean, at)) if seconds < mean => {
                // Half at least stays, or samples in quick succession, as tokens
                // are, would move nothing.
                let w = Self::weight(now.saturating_duration_since(at)).min(0.9);
                mean * w + seconds * (1.0 - w)
            }
            _ => seconds,
        };
        *held = Some((value, now));
    }

    /// The mean at `now`; `None` before the first sample.
    pub(crate) fn get(&self, now: Instant) -> Option<f64> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.map(|(mean, at)| mean * Self::weight(now.saturating_duration_since(at)))
    }
}

/// The load of one target.
#[derive(Debug, Default)]
pub(crate) struct Load {
    in_flight: AtomicU32,
    prefill_blocks: AtomicU64,
    decode_blocks: AtomicU64,
    ttft: PeakEwma,
    itl: PeakEwma,
    /// Mean tokens of its answers, times 16.
    answer: AtomicU64,
}

impl Load {
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Blocks of prompt being read, and of requests being answered.
    pub(crate) fn blocks(&self) -> (u64, u64) {
        (self.prefill_blocks.load(Relaxed), self.decode_blocks.load(Relaxed))
    }

    /// Mean time to first token and between tokens, in seconds.
    pub(crate) fn times(&self, now: Instant) -> (Option<f64>, Option<f64>) {
        (self.ttft.get(now), self.itl.get(now))
    }

    /// Seconds an answer of `tokens` would take, and how they come about.
    pub(crate) fn predicted_s(&self, tokens: u32, now: Instant) -> f64 {
        let queue = f64::from(self.in_flight()) + 1.0;
        match self.times(now) {
            (None, _) => (queue - 1.0) * UNKNOWN_S,
            (Some(ttft), itl) => (ttft + f64::from(tokens) * itl.unwrap_or(0.0)) * queue,
        }
    }

    pub(crate) fn gap(&self, seconds: f64, now: Instant) {
        self.itl.observe(seconds, now);
    }

    /// An answer had `tokens`.
    pub(crate) fn answered(&self, tokens: u32) {
        let new = u64::from(tokens) * 16;
        let old = self.answer.load(Relaxed);
        // Lost updates under contention cost a sample, no more.
        self.answer.store(if old == 0 { new } else { (old * 15 + new) / 16 }, Relaxed);
    }

    /// Tokens an answer has on average.
    pub(crate) fn usual_answer(&self) -> Option<u32> {
        let mean = self.answer.load(Relaxed) / 16;
        (mean > 0).then_some(u32::try_from(mean).unwrap_or(u32::MAX))
    }
}

/// A request under way; dropping it takes its load off.
#[derive(Debug)]
pub(crate) struct InFlight {
    load: Arc<Load>,
    blocks: u64,
    began: Instant,
    first: bool,
}

impl InFlight {
    /// A request of `blocks` new blocks of prompt is sent.
    pub(crate) fn new(load: &Arc<Load>, blocks: u64) -> Self {
        load.in_flight.fetch_add(1, Relaxed);
        load.prefill_blocks.fetch_add(blocks, Relaxed);
        Self { load: load.clone(), blocks, began: Instant::now(), first: false }
    }

    /// Its first token is there.
    pub(crate) fn first_token(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.first, true) {
            self.load.prefill_blocks.fetch_sub(self.blocks, Relaxed);
            self.load.decode_blocks.fetch_add(self.blocks, Relaxed);
            self.load.ttft.observe(now.saturating_duration_since(self.began).as_secs_f64(), now);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.load.in_flight.fetch_sub(1, Relaxed);
        let held = if self.first { &self.load.decode_blocks } else { &self.load.prefill_blocks };
        held.fetch_sub(self.blocks, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_count_at_once_and_fade() {
        let (mean, t) = (PeakEwma::default(), Instant::now());
        assert_eq!(mean.get(t), None);
        mean.observe(0.1, t);
        mean.observe(2.0, t);
        assert_eq!(mean.get(t), Some(2.0));
        mean.observe(0.1, t + Duration::from_millis(1));
        let after_one = mean.get(t + Duration::from_millis(1)).unwrap();
        assert!((1.0..2.0).contains(&after_one), "{after_one}");
        assert!(mean.get(t + Duration::from_secs(60)).unwrap() < 0.01);
    }

    #[test]
    fn load_goes_as_it_came() {
        let load = Arc::new(Load::default());
        let (mut a, b) = (InFlight::new(&load, 5), InFlight::new(&load, 7));
        assert_eq!((load.in_flight(), load.blocks()), (2, (12, 0)));
        a.first_token(Instant::now());
        a.first_token(Instant::now());
        assert_eq!(load.blocks(), (7, 5));
        assert!(load.predicted_s(10, Instant::now()) >= 0.0);
        drop((a, b));
        assert_eq!((load.in_flight(), load.blocks()), (0, (0, 0)));
        load.answered(100);
        load.answered(200);
        assert_eq!(load.usual_answer(), Some(106));
    }
}
