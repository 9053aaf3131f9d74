//! Random schedules: whoever else is served, and however, a request's events
//! are those it has alone.

use super::*;
use crate::fake::{Fake, mix, text};
use ashlar_api::Sampling;
use proptest::prelude::*;
use tokio::sync::mpsc::{self, UnboundedReceiver};

const END: u32 = 257;

#[derive(Debug, Clone)]
struct Ask {
    /// Prompts of one family share their beginning.
    family: u64,
    prompt: usize,
    tail: u64,
    /// Length of the scored continuation; 0 generates.
    score: usize,
    max_tokens: usize,
    seed: i64,
    temperature: f32,
    penalty: f32,
    stop: Option<String>,
    arrives: usize,
    leaves: Option<usize>,
}

impl Ask {
    fn tokens(&self) -> Vec<u32> {
        (0..self.prompt + self.score)
            .map(|i| {
                let own = i + 5 >= self.prompt;
                let source = if own { self.tail } else { self.family };
                (mix(source, i as u64) % 256) as u32
            })
            .collect()
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    let size = (
        0u64..2,
        1usize..120,
        0u64..3,
        prop_oneof![3 => Just(0usize), 1 => 1usize..50],
    );
    let sampling = (
        1usize..45,
        any::<i64>(),
        prop_oneof![Just(0f32), Just(0.9)],
        prop_oneof![Just(0f32), Just(1.5)],
        prop::option::of("[ -~]"),
    );
    (
        size,
        sampling,
        0usize..30,
        prop_oneof![2 => Just(None), 1 => (0usize..25).prop_map(Some)],
    )
        .prop_map(
            |(
                (family, prompt, tail, score),
                (max_tokens, seed, temperature, penalty, stop),
                arrives,
                leaves,
            )| Ask {
                family,
                prompt,
                tail,
                score,
                max_tokens,
                seed,
                temperature,
                penalty,
                stop,
                arrives,
                leaves,
            },
        )
}

enum Inbox {
    Events(UnboundedReceiver<Result<Event, ApiError>>),
    Score(oneshot::Receiver<Result<Score, ApiError>>),
}

/// What a client saw, without times and without what a cache may change.
#[derive(Debug, Clone, PartialEq, Default)]
struct Seen {
    text: String,
    tokens: Vec<(u32, Option<f32>)>,
    end: Option<(Finish, u32)>,
    score: Option<Score>,
}

fn job(a: &Ask) -> (Job, Inbox) {
    let (tokenizer, _) = text();
    let s = Sampling {
        temperature: Some(a.temperature),
        frequency_penalty: Some(a.penalty),
        seed: Some(a.seed),
        ..Sampling::default()
    };
    let (work, inbox) = if a.score > 0 {
        let (reply, answer) = oneshot::channel();
        let work = Work::Score(Scoring {
            context: a.prompt,
            reply: Some(reply),
            logprob: 0.0,
            greedy: true,
        });
        (work, Inbox::Score(answer))
    } else {
        let (events, inbox) = mpsc::unbounded_channel();
        let work = Work::Generate(Generate {
            events,
            sampler: Sampler::new(&Sampling {
                logprobs: true,
                ..s
            }),
            decoder: tokenizer.stream(),
            stops: Stops::new(a.stop.iter().cloned().collect()),
            max_tokens: a.max_tokens,
            every_token: true,
        });
        (work, Inbox::Events(inbox))
    };
    (
        Job {
            tokens: a.tokens(),
            work,
            sent: Instant::now(),
        },
        inbox,
    )
}

fn read(inbox: &mut Inbox, seen: &mut Seen) {
    match inbox {
        Inbox::Score(answer) => {
            if let Ok(score) = answer.try_recv() {
                seen.score = Some(score.unwrap());
            }
        }
        Inbox::Events(events) => {
            while let Ok(event) = events.try_recv() {
                assert!(seen.end.is_none(), "an event after the end");
                match event.unwrap() {
                    Event::Started { .. } => {}
                    Event::Token { text, id, logprob } => {
                        seen.text.push_str(&text);
                        seen.tokens.push((id, logprob));
                    }
                    Event::Done { finish, usage, .. } => {
                        seen.end = Some((finish, usage.completion_tokens));
                    }
                }
            }
        }
    }
}

/// Runs all asks together; `None` for those that left before their end.
fn together(asks: &[Ask], blocks: usize, limits: Limits) -> (Vec<(Seen, bool)>, BackendStats) {
    let shared = Arc::new(Shared::default());
    let mut s = Scheduler::new(
        Fake::new(blocks),
        blocks,
        limits,
        vec![END],
        Arc::clone(&shared),
    );
    let mut open: Vec<Option<Inbox>> = asks.iter().map(|_| None).collect();
    let mut seen = vec![(Seen::default(), true); asks.len()];
    let last = asks.iter().map(|a| a.arrives).max().unwrap_or(0);
    for step in 0.. {
        assert!(step < 20_000, "the schedule does not end");
        for (i, a) in asks.iter().enumerate() {
            if a.arrives == step {
                let (job, inbox) = job(a);
                shared.queued.fetch_add(1, Ordering::Relaxed);
                s.push(job);
                open[i] = Some(inbox);
            }
            if a.leaves.is_some_and(|l| a.arrives + l == step)
                && seen[i].0.end.is_none()
                && seen[i].0.score.is_none()
            {
                open[i] = None;
                seen[i].1 = false;
            }
        }
        s.step();
        let held: std::collections::BTreeSet<u32> =
            s.running.iter().flat_map(|q| &q.blocks).copied().collect();
        assert_eq!(
            s.blocks.total() - s.blocks.free(),
            held.len(),
            "blocks nobody holds are taken"
        );
        for (inbox, seen) in open.iter_mut().zip(&mut seen) {
            if let Some(inbox) = inbox {
                read(inbox, &mut seen.0);
            }
        }
        if step > last && s.idle() {
            break;
        }
    }
    assert_eq!(s.blocks.free(), blocks, "blocks leaked");
    assert_eq!(shared.queued.load(Ordering::Relaxed), 0);
    (seen, s.stats.clone())
}

fn alone(a: &Ask) -> Seen {
    let a = Ask {
        arrives: 0,
        leaves: None,
        ..a.clone()
    };
    together(
        &[a],
        64,
        Limits {
            batch: 1,
            prefill: 4096,
        },
    )
    .0
    .remove(0)
    .0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn company_changes_nothing(
        asks in prop::collection::vec(ask(), 1..9),
        blocks in 6usize..14,
        batch in 1usize..9,
        prefill in prop_oneof![1usize..40, 40usize..400],
    ) {
        let (seen, _) = together(&asks, blocks, Limits { batch, prefill });
        for (a, (seen, stayed)) in asks.iter().zip(seen) {
            let whole = alone(a);
            prop_assert!(whole.end.is_some() || whole.score.is_some());
            if stayed {
                prop_assert_eq!(seen, whole);
            } else {
                prop_assert!(whole.text.starts_with(&seen.text));
                prop_assert!(whole.tokens.starts_with(&seen.tokens));
            }
        }
    }
}

fn plain(prompt: usize, max_tokens: usize) -> Ask {
    Ask {
        family: 1,
        prompt,
        tail: 1,
        score: 0,
        max_tokens,
        seed: 1,
        temperature: 0.0,
        penalty: 0.0,
        stop: None,
        arrives: 0,
        leaves: None,
    }
}

/// The property above is empty unless schedules really preempt and reuse.
#[test]
fn a_tight_pool_preempts_and_a_repeat_hits_the_cache() {
    let asks: Vec<Ask> = (0..4)
        .map(|i| Ask {
            tail: i,
            seed: i as i64,
            temperature: 0.9,
            ..plain(60, 60)
        })
        .collect();
    let (seen, stats) = together(
        &asks,
        9,
        Limits {
            batch: 4,
            prefill: 64,
        },
    );
    assert!(stats.preemptions > 0, "{stats:?}");
    for (a, (seen, _)) in asks.iter().zip(seen) {
        assert_eq!(seen, alone(a));
    }
    let twice = [
        plain(100, 5),
        Ask {
            arrives: 200,
            ..plain(100, 5)
        },
    ];
    let (seen, stats) = together(
        &twice,
        9,
        Limits {
            batch: 4,
            prefill: 64,
        },
    );
    assert_eq!(
        (stats.prefix_queries, stats.prefix_hits, stats.cached_tokens),
        (2, 1, 96)
    );
    assert_eq!(seen[0], seen[1]);
}

#[test]
fn leaving_frees_blocks_within_one_step() {
    let shared = Arc::new(Shared::default());
    let mut s = Scheduler::new(
        Fake::new(8),
        8,
        Limits {
            batch: 2,
            prefill: 64,
        },
        vec![],
        Arc::clone(&shared),
    );
    let (job, inbox) = job(&plain(50, 100));
    shared.queued.fetch_add(1, Ordering::Relaxed);
    s.push(job);
    s.step();
    assert_eq!(shared.stats().blocks_used, 2);
    drop(inbox);
    s.step();
    let stats = shared.stats().clone();
    assert_eq!(
        (stats.blocks_used, stats.cancelled, stats.running),
        (0, 1, 0)
    );
}

#[test]
fn a_stop_string_is_never_sent() {
    let whole = alone(&plain(20, 60));
    let stop: String = whole.text.chars().skip(5).take(2).collect();
    let at = whole.text.find(&stop).unwrap();
    let cut = alone(&Ask {
        stop: Some(stop),
        ..plain(20, 60)
    });
    assert_eq!(cut.text, whole.text[..at]);
    assert_eq!(cut.end.unwrap().0, Finish::Stop);
}

#[test]
fn a_score_is_the_sum_of_the_tokens_logprobs() {
    let generated = alone(&plain(40, 10));
    let ids: Vec<u32> = generated.tokens.iter().map(|t| t.0).collect();
    let sum: f64 = generated
        .tokens
        .iter()
        .map(|t| f64::from(t.1.unwrap()))
        .sum();
    let mut tokens = plain(40, 1).tokens();
    tokens.extend(&ids);
    let (reply, mut answer) = oneshot::channel();
    let work = Work::Score(Scoring {
        context: 40,
        reply: Some(reply),
        logprob: 0.0,
        greedy: true,
    });
    let shared = Arc::new(Shared::default());
    shared.queued.fetch_add(1, Ordering::Relaxed);
    let mut s = Scheduler::new(
        Fake::new(8),
        8,
        Limits {
            batch: 2,
            prefill: 7,
        },
        vec![],
        shared,
    );
    s.push(Job {
        tokens,
        work,
        sent: Instant::now(),
    });
    while !s.idle() {
        s.step();
    }
    let score = answer.try_recv().unwrap().unwrap();
    assert!(score.greedy, "greedy text is the likeliest");
    assert_eq!(score.tokens as usize, ids.len());
    assert!(
        (score.logprob - sum).abs() < 1e-4,
        "{} {sum}",
        score.logprob
    );
}
