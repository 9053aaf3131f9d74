//! Requests through the whole backend, on the fake model.

use super::*;
use crate::fake::{BOOM, Fake, text};
use ashlar_api::{ChatMessage, Finish};
use futures::{StreamExt, executor::block_on};
use std::time::Duration;

const BLOCKS: usize = 16;

const CONFIG: EngineConfig = EngineConfig {
    kv_type: ashlar_model::KvType::F16,
    kv_blocks: Some(BLOCKS),
    max_batch: 4,
    max_prefill: 64,
    max_queue: 3,
    max_queue_bytes: 64 << 10,
    threads: None,
    memory_bytes: Some(1 << 30),
};

fn plan(config: &EngineConfig) -> MemoryPlan {
    let need = Need {
        weights: 0,
        kv_block: 1000,
        workspace: 0,
        context: 4096,
        threads: 1,
    };
    MemoryPlan::fit(need, config, available(config)).unwrap()
}

fn with(config: EngineConfig, pause: Duration) -> LocalBackend {
    let (tokenizer, template) = text();
    let plan = plan(&config);
    let mut fake = Fake::new(plan.kv_blocks);
    fake.pause = pause;
    LocalBackend::start("m", fake, plan, tokenizer, Some(template), config).unwrap()
}

fn backend(pause: Duration) -> LocalBackend {
    with(CONFIG, pause)
}

fn chat(content: &str) -> ChatRequest {
    ChatRequest {
        temperature: Some(0.0),
        max_tokens: Some(20),
        ..ChatRequest::new("m", vec![ChatMessage::user(content)])
    }
}

fn ids(ids: Vec<u32>, max_tokens: u32) -> CompletionRequest {
    CompletionRequest {
        prompt: Prompt::Tokens(ids),
        max_tokens: Some(max_tokens),
        ..CompletionRequest::new("m", "")
    }
}

fn refused(r: Result<EventStream, ApiError>) -> ApiError {
    r.err().expect("must be refused")
}

/// Waits for the scheduler to reach a state.
#[track_caller]
fn until(b: &LocalBackend, what: &str, reached: impl Fn(&BackendStats) -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !reached(&b.stats()) {
        assert!(Instant::now() < end, "never {what}: {:?}", b.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_answer_has_its_counts_and_times() {
    let b = backend(Duration::from_millis(1));
    let events: Vec<_> = block_on(async {
        b.chat(chat("hello"))
            .await
            .unwrap()
            .collect::<Vec<_>>()
            .await
    });
    let Some(Ok(Event::Started {
        prompt_tokens,
        cached_tokens: 0,
    })) = events.first()
    else {
        panic!("{events:?}");
    };
    let Some(Ok(Event::Done {
        finish,
        usage,
        timings,
    })) = events.last()
    else {
        panic!("{events:?}");
    };
    assert_eq!(usage.prompt_tokens, *prompt_tokens);
    assert_eq!(*finish == Finish::Length, usage.completion_tokens == 20);
    assert!(
        timings.prefill_ms >= 1.0 && timings.queue_ms >= 0.0,
        "{timings:?}"
    );
    // The last event leaves before its step is reported.
    until(&b, "idle", |s| {
        (s.finished, s.blocks_used, s.running) == (1, 0, 0)
    });
}

#[test]
fn too_long_is_refused_with_the_numbers() {
    let b = backend(Duration::ZERO);
    assert_eq!(b.models()[0].context, 512, "the pool bounds the context");
    let e = refused(block_on(b.complete(ids(vec![1; 500], 13))));
    assert_eq!(
        (e.status, e.code.as_deref()),
        (400, Some("context_length_exceeded"))
    );
    for n in ["500", "13", "513", "512"] {
        assert!(e.message.contains(n), "{}", e.message);
    }
    let e = refused(block_on(b.complete(ids(vec![1; 512], 1))));
    assert!(e.message.contains("no room"), "{}", e.message);
    let e = refused(block_on(b.chat(chat(&"x".repeat(1_000_000)))));
    assert_eq!(
        (e.param.as_deref(), e.code.as_deref()),
        (Some("messages"), Some("context_length_exceeded"))
    );
    let e = block_on(b.score(&"x".repeat(600), "y")).unwrap_err();
    assert_eq!(e.code.as_deref(), Some("context_length_exceeded"));
    let fits = block_on(async {
        b.complete(ids(vec![1; 500], 12))
            .await
            .unwrap()
            .collect::<Vec<_>>()
            .await
    });
    assert!(matches!(fits.last(), Some(Ok(Event::Done { .. }))));
}

#[test]
fn other_bad_requests_are_typed() {
    let b = backend(Duration::ZERO);
    let e = refused(block_on(b.chat(ChatRequest {
        model: "gpt".into(),
        ..chat("x")
    })));
    assert_eq!(
        (e.status, e.code.as_deref()),
        (404, Some("model_not_found"))
    );
    assert!(e.message.contains("served: m"));
    let e = refused(block_on(b.complete(ids(vec![1, 999], 1))));
    assert!(
        e.message.contains("prompt[1] is token 999"),
        "{}",
        e.message
    );
    let e = refused(block_on(b.chat(ChatRequest {
        logit_bias: vec![(259, 1.0)],
        ..chat("x")
    })));
    assert_eq!(e.param.as_deref(), Some("logit_bias"));
    let bad_role = ChatMessage {
        role: "a b".into(),
        content: String::new(),
    };
    let e = refused(block_on(b.chat(ChatRequest {
        messages: vec![bad_role],
        ..chat("")
    })));
    assert_eq!((e.status, e.param.as_deref()), (400, Some("messages")));
    let e = block_on(b.score("abc", "")).unwrap_err();
    assert_eq!(e.param.as_deref(), Some("continuation"));
    let (tokenizer, template) = text();
    let none = EngineConfig {
        kv_blocks: Some(0),
        ..CONFIG
    };
    assert!(matches!(
        check(&none),
        Err(EngineError::Setting {
            name: "kv_blocks",
            ..
        })
    ));
    drop((tokenizer, template));
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let b = backend(Duration::from_millis(2));
    let mut stream = block_on(b.complete(ids(vec![1; 60], 400))).unwrap();
    assert!(matches!(
        block_on(stream.next()),
        Some(Ok(Event::Started { .. }))
    ));
    drop(stream);
    until(&b, "freed", |s| s.blocks_used == 0 && s.cancelled == 1);
}

#[test]
fn a_full_queue_is_429_with_a_time() {
    let b = backend(Duration::from_millis(5));
    let mut held = Vec::new();
    let e = loop {
        match block_on(b.complete(ids(vec![9; 3], 100))) {
            Ok(stream) => held.push(stream),
            Err(e) => break e,
        }
        assert!(held.len() < 50, "the queue never filled");
    };
    assert_eq!((e.status, e.retry_after.is_some()), (429, true));
    drop(held);
    until(&b, "idle", |s| s.running == 0 && s.waiting == 0);
    assert!(
        block_on(b.complete(ids(vec![9; 3], 1))).is_ok(),
        "the queue is open again"
    );
}

/// The door's second limit: not the number of requests but their bytes.
#[test]
fn a_queue_longer_than_memory_is_429() {
    let config = EngineConfig {
        max_batch: 1,
        max_queue: 1000,
        max_queue_bytes: 20 << 10,
        ..CONFIG
    };
    let b = with(config, Duration::from_millis(5));
    let mut held = Vec::new();
    let e = loop {
        match block_on(b.complete(ids(vec![9; 400], 100))) {
            Ok(stream) => held.push(stream),
            Err(e) => break e,
        }
        assert!(held.len() < 1000, "the queue has no end");
    };
    // 2000 bytes each: ten wait, one or two have started.
    assert!((10..=13).contains(&held.len()), "{}", held.len());
    assert_eq!((e.status, e.code.as_deref()), (429, Some("queue_full")));
    assert!(
        e.retry_after.is_some() && e.message.contains("20480"),
        "{}",
        e.message
    );
    assert!(b.stats().queued_bytes <= 20 << 10);
    let first = held.remove(0);
    drop(held);
    until(&b, "empty", |s| s.waiting == 0 && s.queued_bytes == 0);
    let events = block_on(first.collect::<Vec<_>>());
    assert!(matches!(events.last(), Some(Ok(Event::Done { .. }))));
    let none = EngineConfig {
        max_queue_bytes: 1 << 10,
        ..CONFIG
    };
    let (tokenizer, template) = text();
    let e = LocalBackend::start("m", Fake::new(16), plan(&none), tokenizer, Some(template), none);
    assert!(
        matches!(
            e.err(),
            Some(EngineError::Setting {
                name: "max_queue_bytes",
                ..
            })
        ),
        "a queue that could never hold the longest request"
    );
}

#[test]
fn a_panic_fails_its_step_and_the_next_request_is_served() {
    let b = backend(Duration::from_millis(2));
    let bystander = block_on(b.complete(ids(vec![1; 10], 400))).unwrap();
    let culprit = block_on(b.complete(ids(vec![BOOM; 3], 4))).unwrap();
    let events = block_on(culprit.collect::<Vec<_>>());
    let Some(Err(e)) = events.last() else {
        panic!("{events:?}");
    };
    assert_eq!(e.status, 500);
    assert!(e.message.contains("bad token"), "{}", e.message);
    drop(bystander);
    assert_eq!(b.stats().unhealthy, None);
    let events = block_on(async { b.chat(chat("x")).await.unwrap().collect::<Vec<_>>().await });
    assert!(
        matches!(events.last(), Some(Ok(Event::Done { .. }))),
        "{events:?}"
    );
    until(&b, "idle", |s| (s.panics, s.blocks_used) == (1, 0));
}

/// The fake model behind a pool of real workers, one of which panics.
struct Pooled {
    fake: Fake,
    pool: Arc<Pool>,
    /// Tasks fail at tokens from here on.
    worst: u32,
}

impl Forward for Pooled {
    fn vocab(&self) -> usize {
        self.fake.vocab()
    }

    fn forward(
        &mut self,
        items: &[ashlar_model::Item<'_>],
        row: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ashlar_model::ModelError> {
        let (pool, worst) = (&self.pool, self.worst);
        let broken = items.iter().any(|i| i.tokens.iter().any(|&t| t >= worst));
        pool.run(64, |task, _| {
            assert!(!(broken && task == 63), "a worker broke down")
        });
        self.fake.forward(items, row)
    }
}

#[test]
fn a_panicking_worker_costs_its_step_alone() {
    let (tokenizer, template) = text();
    let forward = Pooled {
        fake: Fake::new(BLOCKS),
        pool: Pool::new(4),
        worst: 250,
    };
    let plan = plan(&CONFIG);
    let b = LocalBackend::start("m", forward, plan, tokenizer, Some(template), CONFIG).unwrap();
    for _ in 0..10 {
        let stream = block_on(b.complete(ids(vec![251; 3], 4))).unwrap();
        let events = block_on(stream.collect::<Vec<_>>());
        let Some(Err(e)) = events.last() else {
            panic!("{events:?}");
        };
        assert!(e.status == 500 && e.message.contains("broke down"), "{e}");
        // Good steps between the bad ones.
        assert!(block_on(b.score("abc", "d")).unwrap().logprob < 0.0);
    }
    assert_eq!(b.stats().unhealthy, None);
    until(&b, "idle", |s| (s.panics, s.blocks_used) == (10, 0));
}

#[test]
fn panic_after_panic_makes_it_unhealthy() {
    let b = backend(Duration::ZERO);
    for _ in 0..3 {
        let Ok(stream) = block_on(b.complete(ids(vec![BOOM; 3], 4))) else {
            break;
        };
        let events = block_on(stream.collect::<Vec<_>>());
        assert!(matches!(events.last(), Some(Err(e)) if e.status == 500));
    }
    until(&b, "unhealthy", |s| s.unhealthy.is_some());
    assert!(b.stats().unhealthy.unwrap().contains("bad token"));
    assert_eq!(refused(block_on(b.chat(chat("x")))).status, 503);
    assert_eq!(block_on(b.score("a", "b")).unwrap_err().status, 503);
}

#[test]
fn priority_and_user_reach_the_scheduler() {
    let config = EngineConfig {
        max_batch: 1,
        ..CONFIG
    };
    let b = with(config, Duration::from_millis(3));
    let mut first = block_on(b.complete(ids(vec![1; 10], 60))).unwrap();
    assert!(matches!(
        block_on(first.next()),
        Some(Ok(Event::Started { .. }))
    ));
    let ask = |priority| ChatRequest {
        priority: Some(priority),
        user: Some("u".into()),
        ..chat("x")
    };
    let (mut late, mut soon) = (
        block_on(b.chat(ask(3))).unwrap(),
        block_on(b.chat(ask(-3))).unwrap(),
    );
    drop(first);
    let events = block_on(soon.by_ref().collect::<Vec<_>>());
    assert!(matches!(events.last(), Some(Ok(Event::Done { .. }))));
    let late = block_on(late.by_ref().collect::<Vec<_>>());
    let queue = |events: &[Result<Event, ApiError>]| match events.last() {
        Some(Ok(Event::Done { timings, .. })) => timings.queue_ms,
        other => panic!("{other:?}"),
    };
    assert!(queue(&late) > queue(&events));
}

#[test]
fn stopping_the_engine_ends_its_streams_as_cancelled() {
    let b = backend(Duration::from_millis(2));
    let stream = block_on(b.complete(ids(vec![1; 10], 400))).unwrap();
    until(&b, "running", |s| s.running == 1);
    drop(b);
    let events = block_on(stream.collect::<Vec<_>>());
    let Some(Ok(Event::Done { finish, .. })) = events.last() else {
        panic!("{events:?}");
    };
    assert!(matches!(finish, Finish::Cancelled | Finish::Stop));
}

#[test]
fn scores_are_cut_where_the_harness_cuts() {
    let b = backend(Duration::ZERO);
    let s = |c: &str, t: &str| block_on(b.score(c, t)).unwrap();
    assert_eq!(s("ab", "cd").tokens, 2);
    // White space at the end of the context is scored with the continuation.
    assert_eq!(s("ab ", "cd"), s("ab", " cd"));
    assert_eq!(s("", "cd").tokens, 2);
    // Chain rule: the parts sum to the whole.
    let whole = s("ab", "cdef").logprob;
    assert!((whole - s("ab", "cd").logprob - s("abcd", "ef").logprob).abs() < 1e-6);
}
