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
    priority: i32,
    user: Option<u8>,
    /// Its prompt makes the model panic.
    bad: bool,
    arrives: usize,
    leaves: Option<usize>,
}

impl Ask {
    fn tokens(&self) -> Vec<u32> {
        (0..self.prompt + self.score)
            .map(|i| {
                if self.bad && i + 1 == self.prompt {
                    return crate::fake::BOOM;
                }
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
        prop_oneof![2 => Just(0), 1 => -3i32..4, 1 => any::<i32>()],
        prop::option::of(0u8..3),
        0usize..30,
        prop_oneof![2 => Just(None), 1 => (0usize..25).prop_map(Some)],
    )
        .prop_map(
            |(
                (family, prompt, tail, score),
                (max_tokens, seed, temperature, penalty, stop),
                priority,
                user,
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
                priority,
                user,
                bad: false,
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
    failed: Option<u16>,
}

const ROOM: Room = Room {
    requests: usize::MAX,
    bytes: usize::MAX,
    batch: 1,
};

fn job(a: &Ask, shared: &Arc<Shared>) -> (Job, Inbox) {
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
            priority: a.priority,
            user: a.user.map(|u| Digest::of(&[u])),
            ticket: shared.enter(a.prompt, ROOM).unwrap(),
            sent: Instant::now(),
        },
        inbox,
    )
}

fn read(inbox: &mut Inbox, seen: &mut Seen) {
    match inbox {
        Inbox::Score(answer) => match answer.try_recv() {
            Ok(Ok(score)) => seen.score = Some(score),
            Ok(Err(e)) => seen.failed = Some(e.status),
            Err(_) => {}
        },
        Inbox::Events(events) => {
            while let Ok(event) = events.try_recv() {
                assert!(
                    seen.end.is_none() && seen.failed.is_none(),
                    "an event after the end"
                );
                match event {
                    Ok(Event::Started { .. }) => {}
                    Ok(Event::Token { text, id, logprob }) => {
                        seen.text.push_str(&text);
                        seen.tokens.push((id, logprob));
                    }
                    Ok(Event::Done { finish, usage, .. }) => {
                        seen.end = Some((finish, usage.completion_tokens));
                    }
                    Err(e) => seen.failed = Some(e.status),
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
                let (job, inbox) = job(a, &shared);
                s.push(job);
                open[i] = Some(inbox);
            }
            if a.leaves.is_some_and(|l| a.arrives + l == step)
                && seen[i].0.end.is_none()
                && seen[i].0.score.is_none()
                && seen[i].0.failed.is_none()
            {
                open[i] = None;
                seen[i].1 = false;
            }
        }
        assert!(s.step().is_continue());
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
    assert_eq!((shared.queued(), shared.queued_bytes()), (0, 0));
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Requests that make the model panic fail with those in their step; all
    /// others say what they say alone, and no block of a broken step is reused.
    #[test]
    fn a_panic_spares_those_outside_its_step(
        mut asks in prop::collection::vec(ask(), 3..9),
        bad in 1usize..3,
        blocks in 6usize..14,
        batch in 1usize..9,
        prefill in prop_oneof![1usize..40, 40usize..400],
    ) {
        // Two at the most: three in a row would be the engine's fault.
        asks[..bad].iter_mut().for_each(|a| a.bad = true);
        let (seen, stats) = together(&asks, blocks, Limits { batch, prefill });
        prop_assert!(stats.panics as usize <= bad);
        prop_assert_eq!(stats.unhealthy, None);
        let mut failed = 0;
        for (a, (seen, stayed)) in asks.iter().zip(seen) {
            failed += u64::from(seen.failed.is_some());
            if a.bad {
                prop_assert_eq!(seen.failed, stayed.then_some(500));
                continue;
            }
            let whole = alone(a);
            if seen.failed.is_none() && stayed {
                prop_assert_eq!(seen, whole);
            } else {
                prop_assert!(whole.text.starts_with(&seen.text));
                prop_assert!(whole.tokens.starts_with(&seen.tokens));
            }
        }
        prop_assert!(failed <= stats.failed);
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
        priority: 0,
        user: None,
        bad: false,
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

/// A scheduler on the fake model, its shared state, and who asked what.
fn scheduler(blocks: usize, batch: usize, prefill: usize) -> (Scheduler<Fake>, Arc<Shared>) {
    let shared = Arc::new(Shared::default());
    let limits = Limits { batch, prefill };
    let s = Scheduler::new(
        Fake::new(blocks),
        blocks,
        limits,
        vec![],
        Arc::clone(&shared),
    );
    (s, shared)
}

/// Sends `a`.
fn send(s: &mut Scheduler<Fake>, shared: &Arc<Shared>, a: &Ask) -> Inbox {
    let (job, inbox) = job(a, shared);
    s.push(job);
    inbox
}

fn seen(inbox: &mut Inbox) -> Seen {
    let mut seen = Seen::default();
    read(inbox, &mut seen);
    seen
}

#[test]
fn leaving_frees_blocks_within_one_step() {
    // Prefill 64 of a prompt of 50 ends in the first step; 20 does not.
    for (prefill, where_) in [(64, "mid-decode"), (20, "mid-prefill")] {
        let (mut s, shared) = scheduler(8, 2, prefill);
        let mut other = send(
            &mut s,
            &shared,
            &Ask {
                tail: 2,
                family: 9,
                ..plain(40, 30)
            },
        );
        let inbox = send(&mut s, &shared, &plain(50, 100));
        for _ in 0..3 {
            assert!(s.step().is_continue());
        }
        assert_eq!(shared.stats().running, 2, "{where_}");
        let left = &s.running[1];
        assert_eq!(left.computed < left.prompt, prefill == 20, "{where_}");
        let before = shared.stats().blocks_used;
        let held = left.blocks.len() as u32;
        drop(inbox);
        assert!(s.step().is_continue());
        let stats = shared.stats().clone();
        assert!(
            stats.blocks_used <= before - held + 1,
            "{where_}: {stats:?}"
        );
        assert_eq!((stats.cancelled, stats.running), (1, 1), "{where_}");
        while !s.idle() {
            assert!(s.step().is_continue());
        }
        let whole = alone(&Ask {
            tail: 2,
            family: 9,
            ..plain(40, 30)
        });
        if !whole.tokens.iter().any(|t| t.0 == END) {
            assert_eq!(seen(&mut other), whole, "{where_}");
        }
    }
}

/// In which order requests started, by their place in `asks`.
fn order(asks: &[Ask], batch: usize) -> Vec<usize> {
    let (mut s, shared) = scheduler(64, batch, 64);
    let mut open: Vec<Inbox> = asks.iter().map(|a| send(&mut s, &shared, a)).collect();
    let mut order = Vec::new();
    while !s.idle() {
        assert!(s.step().is_continue());
        for (i, inbox) in open.iter_mut().enumerate() {
            let Inbox::Events(events) = inbox else {
                continue;
            };
            while let Ok(event) = events.try_recv() {
                if matches!(event.unwrap(), Event::Started { .. }) {
                    order.push(i);
                }
            }
        }
    }
    assert_eq!(order.len(), asks.len());
    order
}

/// Distinct requests, so that none waits for another's prefix.
fn distinct(i: u64, priority: i32, user: Option<u8>) -> Ask {
    Ask {
        family: 100 + i,
        tail: 100 + i,
        priority,
        user,
        ..plain(40, 4)
    }
}

#[test]
fn lower_priorities_go_sooner_and_equal_ones_in_turn() {
    let asks: Vec<Ask> = [5, 0, i32::MAX, 0, -1, i32::MIN]
        .into_iter()
        .zip(0..)
        .map(|(p, i)| distinct(i, p, None))
        .collect();
    assert_eq!(order(&asks, 1), [5, 4, 1, 3, 0, 2]);
}

#[test]
fn a_user_with_many_requests_does_not_hold_up_another() {
    // Twenty of user 1 are waiting when user 2 sends three.
    let mut asks: Vec<Ask> = (0..20).map(|i| distinct(i, 0, Some(1))).collect();
    asks.extend((20..23).map(|i| distinct(i, 0, Some(2))));
    let order = order(&asks, 1);
    let place = |i| order.iter().position(|&o| o == i).unwrap();
    assert!(place(22) <= 6, "turns are taken: {order:?}");
    // By tokens, not by requests: user 2's are three times as long.
    for a in &mut asks[20..] {
        a.prompt = 120;
    }
    let long = self::order(&asks, 1);
    let place = |i| long.iter().position(|&o| o == i).unwrap();
    assert!(place(22) > 6 && place(22) <= 11, "tokens count: {long:?}");
}

/// An idle user starts level: neither ahead by what it did not use, nor behind.
#[test]
fn idleness_is_not_saved_up() {
    let (mut s, shared) = scheduler(64, 1, 64);
    let mut open = Vec::new();
    for i in 0..10 {
        open.push(send(&mut s, &shared, &distinct(i, 0, Some(1))));
    }
    for _ in 0..30 {
        assert!(s.step().is_continue());
    }
    // User 1 has had hundreds of tokens; 2 comes new and sends ten.
    for i in 20..30 {
        open.push(send(&mut s, &shared, &distinct(i, 0, Some(2))));
    }
    let mut starts = Vec::new();
    while !s.idle() {
        assert!(s.step().is_continue());
        starts.extend(
            s.running
                .iter()
                .filter(|r| r.computed <= 40)
                .map(|r| r.arrival),
        );
    }
    starts.dedup();
    let run = starts
        .chunk_by(|a, b| (*a <= 10) == (*b <= 10))
        .map(<[u64]>::len)
        .take(4)
        .max();
    assert!(
        run.unwrap() <= 3,
        "one user ran away with the engine: {starts:?}"
    );
}

#[test]
fn the_lowest_priority_gets_on_under_endless_higher_ones() {
    // Pool of 6: the high ones also push the low one out when they grow.
    let (mut s, shared) = scheduler(6, 4, 64);
    let low = Ask {
        priority: i32::MAX,
        user: Some(1),
        ..plain(60, 60)
    };
    let mut low_inbox = send(&mut s, &shared, &low);
    let mut open = Vec::new();
    let mut got = Seen::default();
    let (mut sent, mut kept) = (0, false);
    for step in 0.. {
        assert!(step < 3000, "starved behind {sent} others");
        while s.waiting.len() < 6 {
            sent += 1;
            let a = Ask {
                priority: -5,
                user: Some(2),
                max_tokens: 30,
                ..distinct(sent, -5, Some(2))
            };
            open.push(send(&mut s, &shared, &a));
        }
        assert!(s.step().is_continue());
        read(&mut low_inbox, &mut got);
        let low_runs = |aged| s.running.iter().any(|r| r.arrival == 1 && r.aged >= aged);
        kept |= low_runs(true);
        assert!(
            !kept || got.end.is_some() || low_runs(false),
            "pushed out in step {step}, though it had waited longest"
        );
        if got.end.is_some() {
            break;
        }
    }
    assert_eq!(got.text, alone(&low).text);
    assert!(
        s.stats.preemptions > 0,
        "the pool was not tight: {:?}",
        s.stats
    );
}

#[test]
fn a_prefix_on_its_way_is_computed_once() {
    let asks: Vec<Ask> = (0..4)
        .map(|i| Ask {
            tail: i,
            ..plain(200, 3)
        })
        .collect();
    let (mut s, shared) = scheduler(64, 4, 64);
    let mut open: Vec<Inbox> = asks.iter().map(|a| send(&mut s, &shared, a)).collect();
    while !s.idle() {
        assert!(s.step().is_continue());
    }
    let stats = &s.stats;
    assert_eq!(stats.prefix_waits, 3);
    assert_eq!(stats.cached_tokens, 3 * 192, "{stats:?}");
    // 200 once, then what follows the six shared blocks; of three generated
    // tokens each the last is not fed back.
    assert_eq!(stats.iteration_tokens.sum, 200 + 3 * 8 + 4 * 2);
    for (a, inbox) in asks.iter().zip(&mut open) {
        let whole = alone(a);
        assert_eq!(seen(inbox).text, whole.text);
    }
    // Who waits does so for the prefix, not for the answer after it.
    let (mut s, shared) = scheduler(64, 4, 64);
    let long = send(&mut s, &shared, &plain(200, 300));
    let next = send(&mut s, &shared, &plain(200, 3));
    for _ in 0..5 {
        assert!(s.step().is_continue());
    }
    assert_eq!(s.running.len(), 2, "the prefix was there after four steps");
    drop((long, next));
    // One that goes before in rank does not wait for one behind it.
    let (mut s, shared) = scheduler(64, 4, 64);
    let first = send(&mut s, &shared, &plain(200, 3));
    assert!(s.step().is_continue());
    let urgent = send(
        &mut s,
        &shared,
        &Ask {
            priority: -1,
            ..plain(200, 3)
        },
    );
    assert!(s.step().is_continue());
    assert_eq!((s.running.len(), s.stats.prefix_waits), (2, 0));
    drop((first, urgent));
}

/// Whoever is waited for may vanish; who waits then computes by itself.
#[test]
fn a_vanished_leader_holds_nobody() {
    let (mut s, shared) = scheduler(64, 4, 16);
    let leader = send(&mut s, &shared, &plain(200, 3));
    let mut follower = send(&mut s, &shared, &plain(200, 3));
    assert!(s.step().is_continue());
    assert_eq!((s.running.len(), s.waiting.len()), (1, 1));
    drop(leader);
    assert!(s.step().is_continue());
    assert_eq!((s.running.len(), s.waiting.len()), (1, 0));
    while !s.idle() {
        assert!(s.step().is_continue());
    }
    assert_eq!(seen(&mut follower).text, alone(&plain(200, 3)).text);
}

#[test]
fn a_running_answer_gets_a_token_each_step_whatever_prompts_come() {
    let (mut s, shared) = scheduler(64, 8, 32);
    let talk = Ask {
        temperature: 0.9,
        ..plain(30, 60)
    };
    let mut talking = send(&mut s, &shared, &talk);
    assert!(s.step().is_continue());
    let mut got = seen(&mut talking);
    let mut open = Vec::new();
    for step in 0..50 {
        if step % 5 == 0 {
            // High priority does not stop an answer that runs.
            let mut a = distinct(step, -9, Some(3));
            a.prompt = 200;
            open.push(send(&mut s, &shared, &a));
        }
        let before = (got.tokens.len(), s.stats.iteration_tokens.sum);
        assert!(s.step().is_continue());
        read(&mut talking, &mut got);
        if got.end.is_some() {
            break;
        }
        assert_eq!(got.tokens.len(), before.0 + 1, "no token in step {step}");
        let tokens = s.stats.iteration_tokens.sum - before.1;
        assert!(tokens <= 32 + 8, "a step of {tokens} tokens");
    }
    assert!(open.len() > 2);
}

#[test]
fn scores_share_the_rows_of_logits() {
    let (mut s, shared) = scheduler(64, 8, 400);
    let mut open: Vec<Inbox> = (0..5)
        .map(|i| {
            let a = Ask {
                score: 60,
                ..distinct(i, 0, None)
            };
            send(&mut s, &shared, &a)
        })
        .collect();
    while !s.idle() {
        let rows: usize = {
            s.drop_abandoned();
            s.admit();
            s.grow();
            let parts = s.plan();
            parts
                .iter()
                .filter(|p| p.want == Want::All)
                .map(|p| p.len)
                .sum()
        };
        assert!(rows <= SCORE_ROWS, "{rows} rows of logits");
        assert!(s.step().is_continue());
    }
    for inbox in &mut open {
        assert!(seen(inbox).score.is_some());
    }
}

fn failed(inbox: &mut Inbox) -> Option<u16> {
    let Inbox::Events(events) = inbox else {
        return None;
    };
    while let Ok(event) = events.try_recv() {
        if let Err(e) = event {
            return Some(e.status);
        }
    }
    None
}

#[test]
fn a_panic_ends_its_step_alone_and_leaves_no_block_known() {
    let (mut s, shared) = scheduler(16, 2, 64);
    let mut beside = send(&mut s, &shared, &plain(40, 50));
    assert!(s.step().is_continue());
    let (mut bad, mut bad_inbox) = job(
        &Ask {
            tail: 7,
            ..plain(40, 50)
        },
        &shared,
    );
    bad.tokens[39] = crate::fake::BOOM;
    s.push(bad);
    // A third waits, for the batch is full.
    let mut waits = send(&mut s, &shared, &distinct(3, 0, None));
    assert!(s.step().is_continue());
    assert_eq!(
        (failed(&mut bad_inbox), failed(&mut beside)),
        (Some(500), Some(500))
    );
    let stats = shared.stats().clone();
    assert_eq!((stats.panics, stats.failed, stats.unhealthy), (1, 2, None));
    assert_eq!(s.blocks.total() - s.blocks.free(), 0);
    // The first good step published one block; the panicked one none.
    assert_eq!(s.blocks.cached(), 1);
    while !s.idle() {
        assert!(s.step().is_continue());
    }
    assert_eq!(seen(&mut waits).text, alone(&distinct(3, 0, None)).text);
    assert_eq!(s.panics, 0, "a good step makes up for it");
}

#[test]
fn panic_upon_panic_is_the_engines_fault() {
    let (mut s, shared) = scheduler(16, 1, 64);
    let mut open = Vec::new();
    for i in 0..5 {
        let (mut bad, inbox) = job(&distinct(i, 0, None), &shared);
        bad.tokens[0] = crate::fake::BOOM;
        s.push(bad);
        open.push(inbox);
    }
    for _ in 1..MAX_PANICS {
        assert!(s.step().is_continue());
    }
    assert!(s.step().is_break());
    let why = shared.stats().unhealthy.clone().unwrap();
    assert!(why.contains("bad token"), "{why}");
    s.give_up();
    let statuses: Vec<_> = open.iter_mut().map(failed).collect();
    assert_eq!(
        statuses,
        [Some(500), Some(500), Some(500), Some(503), Some(503)]
    );
    assert_eq!(shared.queued(), 0);
}

#[test]
fn times_are_those_of_the_steps() {
    let (mut s, shared) = scheduler(16, 2, 16);
    s.forward.pause = std::time::Duration::from_millis(40);
    // Three chunks of prompt, then four further steps for five tokens.
    let mut inbox = send(&mut s, &shared, &plain(40, 5));
    std::thread::sleep(std::time::Duration::from_millis(20));
    while !s.idle() {
        assert!(s.step().is_continue());
    }
    std::thread::sleep(std::time::Duration::from_millis(120));
    let Inbox::Events(events) = &mut inbox else {
        panic!()
    };
    let mut done = None;
    while let Ok(event) = events.try_recv() {
        if let Event::Done { timings, usage, .. } = event.unwrap() {
            done = Some((timings, usage));
        }
    }
    let (t, usage) = done.unwrap();
    assert_eq!(usage.completion_tokens, 5);
    let about = |ms: f64, want: f64| ms >= want && ms < want + 110.0;
    assert!(
        about(t.queue_ms, 20.0) && about(t.prefill_ms, 120.0),
        "{t:?}"
    );
    assert!(about(t.decode_ms, 160.0), "{t:?}");
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
    let (mut s, shared) = scheduler(8, 2, 7);
    s.push(Job {
        tokens,
        work,
        priority: 0,
        user: None,
        ticket: shared.enter(0, ROOM).unwrap(),
        sent: Instant::now(),
    });
    while !s.idle() {
        assert!(s.step().is_continue());
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
