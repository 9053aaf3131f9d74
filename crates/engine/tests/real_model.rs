//! The engine on a real model: the same promises as on the fake one, and the
//! speed. Skipped where the model file is absent.

use ashlar_api::{
    Backend, ChatMessage, ChatRequest, CompletionRequest, Event, EventStream, Finish, Prompt,
};
use ashlar_engine::{EngineConfig, LocalBackend};
use futures::{StreamExt, executor::block_on, future::join_all};
use std::{path::PathBuf, time::Instant};

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
    Some(LocalBackend::open("m", &model()?, config).unwrap())
}

fn ask(content: &str, max_tokens: u32) -> ChatRequest {
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
    let (answer, finish, ..) = block_on(async {
        text(
            b.chat(ask("What is the capital of France?", 40))
                .await
                .unwrap(),
        )
        .await
    });
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
