//! The engine on a real model: the same promises as on the fake one, and the
//! speed. Skipped where the model file is absent.

use ashlar_api::{
    Backend, ChatMessage, ChatRequest, CompletionRequest, Event, EventStream, Finish, Prompt,
};
use ashlar_engine::{EngineConfig, EngineError, LocalBackend, MemoryPlan, vocab};
use ashlar_model::{Model, ModelError, Pool, formats::Gguf};
use futures::{StreamExt, executor::block_on, future::join_all};
use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

fn model() -> Option<PathBuf> {
    let path = std::env::var_os("ASHLAR_TEST_MODEL").map_or_else(
        || {
            let cache = std::env::var_os("ASHLAR_CACHE").map_or_else(
                || {
                    PathBuf::from(std::env::var_os("HOME").unwrap_or_default())
                        .join(".cache/ashlar")
                },
                PathBuf::from,
            );
            cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    if path.is_file() {
        return Some(path);
    }
    assert!(
        std::env::var("ASHLAR_REQUIRE_PEERS").as_deref() != Ok("1"),
        "no model at {}",
        path.display()
    );
    eprintln!("skipped: no model at {}", path.display());
    None
}

fn open(config: EngineConfig) -> Option<LocalBackend> {
    Some(LocalBackend::open("m", &model()?, None, None, config).unwrap())
}

fn ask_for(content: &str, max_tokens: u32) -> ChatRequest {
    ChatRequest {
        temperature: Some(0.0),
        max_tokens: Some(max_tokens),
        ..ChatRequest::new("m", vec![ChatMessage::user(content)])
    }
}

async fn text(stream: EventStream) -> (String, Finish, u32, u32) {
    let mut out = String::new();
    let mut stream = stream;
    while let Some(event) = stream.next().await {
        match event.unwrap() {
            Event::Started { .. } => {}
            Event::Token { text, .. } => out.push_str(&text),
            Event::Done { finish, usage, .. } => {
                return (out, finish, usage.completion_tokens, usage.cached_tokens());
            }
        }
    }
    panic!("no end");
}

#[test]
fn it_knows_the_capital_of_france() {
    let Some(b) = open(EngineConfig::default()) else {
        return;
    };
    // A continuation it is sure of: which of two close answers a chat gets turns
    // on the last bits of int8 activations.
    let request = CompletionRequest {
        temperature: Some(0.0),
        max_tokens: Some(12),
        ..CompletionRequest::new("m", "The capital of France is")
    };
    let (answer, finish, ..) = block_on(async { text(b.complete(request).await.unwrap()).await });
    eprintln!("{answer:?} {finish:?}");
    assert!(answer.contains("Paris"), "{answer:?}");
    let (paris, rome) = block_on(async {
        let c = "The capital of France is";
        (
            b.score(c, " Paris").await.unwrap(),
            b.score(c, " Rome").await.unwrap(),
        )
    });
    eprintln!("{paris:?} {rome:?}");
    assert!(paris.logprob > rome.logprob && paris.logprob < 0.0);
}

#[test]
fn company_changes_nothing() {
    let requests: Vec<ChatRequest> = (0..6)
        .map(|i| ChatRequest {
            temperature: Some(if i % 2 == 0 { 0.0 } else { 0.8 }),
            seed: Some(i),
            max_tokens: Some(24),
            ..ChatRequest::new(
                "m",
                vec![
                    ChatMessage::system("You are a helpful assistant who answers in one sentence and never lies about stones, walls or masons."),
                    ChatMessage::user(format!("Tell me about number {i} and {}", "stone ".repeat(i as usize * 5))),
                ],
            )
        })
        .collect();
    let Some(b) = open(EngineConfig {
        kv_blocks: Some(64),
        max_batch: 1,
        ..EngineConfig::default()
    }) else {
        return;
    };
    let alone: Vec<_> = requests
        .iter()
        .map(|r| block_on(async { text(b.chat(r.clone()).await.unwrap()).await }))
        .map(|(text, finish, n, _)| (text, finish, n))
        .collect();
    drop(b);
    let tight = EngineConfig {
        kv_blocks: Some(10),
        max_batch: 6,
        max_prefill: 17,
        ..EngineConfig::default()
    };
    let b = open(tight).unwrap();
    let mixed = block_on(async {
        let mut streams = Vec::new();
        for r in &requests {
            streams.push(b.chat(r.clone()).await.unwrap());
            drop(b.chat(r.clone()).await.unwrap());
        }
        join_all(streams.into_iter().map(text)).await
    });
    let stats = b.stats();
    eprintln!("{stats:?}");
    for (alone, (text, finish, n, _)) in alone.into_iter().zip(mixed) {
        assert_eq!(alone, (text, finish, n));
    }
    assert!(stats.prefix_hits > 0, "no prefix was reused");
}

/// A request of the random schedules.
#[derive(Debug, Clone)]
struct Ask {
    request: CompletionRequest,
    /// Before it is sent, after the one before.
    pause_ms: u64,
    /// Events after which its client vanishes.
    leaves: Option<usize>,
}

fn ask() -> impl Strategy<Value = Ask> {
    let shape = (0u32..2, 1usize..120, 0u32..3, 1u32..60);
    let sampling = (prop_oneof![Just(0f32), Just(0.8)], any::<i64>());
    let turn = (
        prop_oneof![Just(None), (-2i32..3).prop_map(Some)],
        prop::option::of("[ab]"),
        0u64..20,
        prop_oneof![3 => Just(None), 1 => (0usize..12).prop_map(Some)],
    );
    (shape, sampling, turn).prop_map(
        |(
            (family, prompt, tail, max_tokens),
            (temperature, seed),
            (priority, user, pause_ms, leaves),
        )| {
            let tokens = (0..prompt as u32).map(|i| {
                let own = if i as usize + 3 >= prompt {
                    tail * 97
                } else {
                    0
                };
                1000 + (family * 7919 + i * 631 + own) % 40_000
            });
            let request = CompletionRequest {
                prompt: Prompt::Tokens(tokens.collect()),
                temperature: Some(temperature),
                seed: Some(seed),
                max_tokens: Some(max_tokens),
                logprobs: true,
                priority,
                user,
                ..CompletionRequest::new("m", "")
            };
            Ask {
                request,
                pause_ms,
                leaves,
            }
        },
    )
}

/// What a client saw: tokens with the bits of their log-probabilities, which
/// are made of every logit of their row.
#[derive(Debug, Clone, PartialEq, Default)]
struct Seen {
    text: String,
    tokens: Vec<(u32, u32)>,
    finish: Option<Finish>,
}

async fn watch(mut stream: EventStream, leaves: Option<usize>) -> Seen {
    let mut seen = Seen::default();
    for _ in 0..leaves.unwrap_or(usize::MAX) {
        match stream.next().await.unwrap().unwrap() {
            Event::Started { .. } => {}
            Event::Token { text, id, logprob } => {
                seen.text.push_str(&text);
                seen.tokens.push((id, logprob.unwrap().to_bits()));
            }
            Event::Done { finish, .. } => {
                seen.finish = Some(finish);
                break;
            }
        }
    }
    seen
}

/// Any company, order of arrival, chunk size, number of threads, prefix hits,
/// preemption, priorities: bit for bit what one thread says alone.
#[test]
fn random_schedules_change_no_bit() {
    let Some(path) = model() else { return };
    let bytes = std::fs::read(path).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let (tokenizer, template) = vocab(&gguf, None).unwrap();
    let load = |threads| Arc::new(Model::from_gguf(&gguf, Pool::new(threads)).unwrap());
    let models = [load(1), load(2), load(5)];
    let serve = |model: &Arc<Model>, config| {
        LocalBackend::new(
            "m",
            Arc::clone(model),
            tokenizer.clone(),
            template.clone(),
            config,
        )
        .unwrap()
    };
    let config = ProptestConfig {
        cases: 10,
        failure_persistence: None,
        ..Default::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let strategy = (
        prop::collection::vec(ask(), 3..9),
        6usize..10,
        2usize..8,
        prop_oneof![1usize..20, 20usize..300],
        0usize..3,
    );
    let counts = [const { AtomicU64::new(0) }; 4];
    TestRunner::new_with_rng(config, rng)
        .run(&strategy, |(asks, blocks, batch, prefill, threads)| {
            let alone: Vec<Seen> = asks
                .iter()
                .map(|a| {
                    // A new engine for each, so that no prefix is known.
                    let one = EngineConfig {
                        max_batch: 1,
                        max_prefill: 512,
                        kv_blocks: Some(8),
                        ..EngineConfig::default()
                    };
                    let b = serve(&models[0], one);
                    block_on(async {
                        watch(b.complete(a.request.clone()).await.unwrap(), None).await
                    })
                })
                .collect();
            let b = serve(
                &models[threads],
                EngineConfig {
                    kv_blocks: Some(blocks),
                    max_batch: batch,
                    max_prefill: prefill,
                    ..EngineConfig::default()
                },
            );
            let mixed: Vec<Seen> = std::thread::scope(|scope| {
                let mut clients = Vec::new();
                for a in &asks {
                    std::thread::sleep(Duration::from_millis(a.pause_ms));
                    let b = &b;
                    clients.push(scope.spawn(move || {
                        block_on(async {
                            watch(b.complete(a.request.clone()).await.unwrap(), a.leaves).await
                        })
                    }));
                }
                clients.into_iter().map(|c| c.join().unwrap()).collect()
            });
            for ((a, alone), mixed) in asks.iter().zip(&alone).zip(&mixed) {
                prop_assert!(alone.finish.is_some());
                if a.leaves.is_none() || mixed.finish.is_some() {
                    prop_assert_eq!(alone, mixed);
                } else {
                    prop_assert!(alone.tokens.starts_with(&mixed.tokens));
                }
            }
            let s = b.stats();
            for (count, n) in
                counts
                    .iter()
                    .zip([s.prefix_hits, s.preemptions, s.cancelled, s.prefix_waits])
            {
                count.fetch_add(n, Ordering::Relaxed);
            }
            Ok(())
        })
        .unwrap();
    let [hits, preemptions, cancelled, waits] = counts.map(AtomicU64::into_inner);
    eprintln!(
        "{hits} prefix hits, {preemptions} preemptions, {cancelled} cancelled, {waits} waited for a prefix"
    );
    assert!(
        hits > 0 && preemptions > 0 && cancelled > 0,
        "the schedules were too tame"
    );
}

#[test]
fn a_file_cut_short_under_a_server_changes_nothing() {
    let Some(path) = model() else { return };
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("model.gguf");
    std::fs::copy(path, &copy).unwrap();
    let b = LocalBackend::open("m", &copy, None, None, EngineConfig::default()).unwrap();
    let run = || {
        block_on(async {
            text(b.chat(ask_for("Name a city.", 12)).await.unwrap())
                .await
                .0
        })
    };
    let before = run();
    std::fs::File::create(&copy).unwrap();
    assert_eq!(std::fs::metadata(&copy).unwrap().len(), 0);
    assert_eq!(run(), before);
    let e = LocalBackend::open("m", &copy, None, None, EngineConfig::default())
        .err()
        .unwrap();
    assert!(matches!(e, EngineError::Model(ModelError::Format(_))), "{e}");
}

#[test]
fn memory_is_planned_and_the_plan_is_kept() {
    let Some(path) = model() else { return };
    let open = |config| LocalBackend::open("m", &path, None, None, config);
    let b = open(EngineConfig::default()).unwrap();
    eprintln!("{}", b.plan());
    assert!(b.plan().total_bytes() <= b.plan().available_bytes.unwrap());
    let tight = EngineConfig {
        memory_bytes: Some(300_000_000),
        ..EngineConfig::default()
    };
    let b = open(tight).unwrap();
    let plan: &MemoryPlan = b.plan();
    eprintln!("{plan}");
    assert!(plan.total_bytes() <= 300_000_000 && plan.context < plan.model_context);
    assert_eq!(b.models()[0].context as usize, plan.context);
    assert_eq!(b.stats().blocks_total as usize, plan.kv_blocks);
    // Longer than what fits: refused at the door with the numbers.
    let ids = vec![7; plan.context + 1];
    let long = CompletionRequest {
        prompt: Prompt::Tokens(ids),
        max_tokens: Some(1),
        ..CompletionRequest::new("m", "")
    };
    let e = block_on(b.complete(long)).err().unwrap();
    assert_eq!(
        (e.status, e.code.as_deref()),
        (400, Some("context_length_exceeded"))
    );
    assert!(
        e.message.contains(&plan.context.to_string()),
        "{}",
        e.message
    );
    for (memory, file) in [(50_000_000, true), (120_000_000, false)] {
        let e = open(EngineConfig {
            memory_bytes: Some(memory),
            ..tight
        })
        .err()
        .unwrap();
        eprintln!("{e}");
        match e {
            EngineError::FileMemory { .. } => assert!(file),
            EngineError::Memory { .. } => assert!(!file),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn more_threads_than_processors_give_the_same_answer() {
    let answer = |threads| {
        let config = EngineConfig {
            threads: Some(threads),
            ..EngineConfig::default()
        };
        let b = open(config)?;
        assert_eq!(b.plan().threads, threads);
        if b.plan().processors < threads {
            assert!(
                b.plan().to_string().contains("lower threads"),
                "{}",
                b.plan()
            );
        }
        Some(block_on(async {
            text(b.chat(ask_for("Name a river.", 16)).await.unwrap())
                .await
                .0
        }))
    };
    let Some(one) = answer(1) else { return };
    assert_eq!(answer(24).unwrap(), one);
}

#[test]
fn a_conversation_reuses_its_prefix() {
    let Some(b) = open(EngineConfig::default()) else {
        return;
    };
    let prompt: Vec<u32> = (0..100u32).map(|i| 1000 + i * 7).collect();
    let request = CompletionRequest {
        prompt: Prompt::Tokens(prompt),
        temperature: Some(0.0),
        max_tokens: Some(8),
        ..CompletionRequest::new("m", "")
    };
    let run = || block_on(async { text(b.complete(request.clone()).await.unwrap()).await });
    let (first, second) = (run(), run());
    assert_eq!((first.3, second.3), (0, 96));
    assert_eq!(first.0, second.0);
}

/// Prints figures; fails only where nothing runs.
#[test]
fn speed() {
    let Some(b) = open(EngineConfig::default()) else {
        return;
    };
    for width in [1usize, 8] {
        let n = 64;
        let start = Instant::now();
        let tokens: u32 = block_on(async {
            let mut streams = Vec::new();
            for i in 0..width {
                let request = CompletionRequest {
                    prompt: Prompt::Tokens(vec![1, 2683 + i as u32]),
                    temperature: Some(0.0),
                    max_tokens: Some(n),
                    logit_bias: vec![(0, -100.0), (2, -100.0)],
                    ..CompletionRequest::new("m", "")
                };
                streams.push(b.complete(request).await.unwrap());
            }
            join_all(streams.into_iter().map(text))
                .await
                .iter()
                .map(|t| t.2)
                .sum()
        });
        assert_eq!(tokens, n * width as u32);
        let seconds = start.elapsed().as_secs_f64();
        eprintln!(
            "decode x{width}: {:.1} tokens/s",
            f64::from(tokens) / seconds
        );
    }
}
