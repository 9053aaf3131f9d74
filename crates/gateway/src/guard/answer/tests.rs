use super::*;
use crate::guard::active::tests::active;

const KEY: &str = "AKIAIOSFODNN7EXAMPLE";

fn chunk(choices: Value) -> Piece {
    let object = json!({"object": "chat.completion.chunk", "created": 5, "choices": choices});
    Piece::Chunk(Chunk { fields: fields(&object), gains: 1, ..Chunk::default() })
}

fn delta(index: u64, delta: Value) -> Piece {
    chunk(json!([{"index": index, "delta": delta, "finish_reason": null}]))
}

fn finish(index: u64) -> Piece {
    chunk(json!([{"index": index, "delta": {}, "finish_reason": "stop"}]))
}

fn end() -> Piece {
    Piece::Done(End { finish: Finish::Stop, refused: false, tokens: Tokens::estimate(3, 9), timings: None })
}

/// What a client joins: texts by choice and channel, finish reasons, and how it
/// ended.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    texts: BTreeMap<(u64, String), String>,
    finishes: Vec<(u64, String)>,
    raw: String,
    end: Option<Finish>,
}

impl Seen {
    fn text(&self, choice: u64, channel: &str) -> &str {
        self.texts.get(&(choice, channel.to_owned())).map_or("", String::as_str)
    }

    fn take(&mut self, piece: &Piece) {
        match piece {
            Piece::Text(t) | Piece::Rest(t) => self.texts.entry((0, "content".into())).or_default().push_str(t),
            Piece::Chunk(c) if c.fields.is_empty() => {}
            Piece::Chunk(c) => {
                self.raw += &c.fields;
                let mut object: Map<String, Value> = serde_json::from_str(&format!("{{{}}}", c.fields)).unwrap();
                let shape = shape::read(&mut object).unwrap();
                assert!(shape.removed.is_empty(), "{:?}", shape.removed);
                let object = Value::Object(object);
                for leaf in shape.leaves {
                    let text = object.pointer(&leaf.at).unwrap().as_str().unwrap();
                    assert!(self.finishes.iter().all(|(c, _)| *c != leaf.choice) || text.is_empty(), "text after its finish");
                    self.texts.entry((leaf.choice, leaf.channel)).or_default().push_str(text);
                }
                for choice in object["choices"].as_array().unwrap() {
                    if let Some(reason) = choice["finish_reason"].as_str() {
                        self.finishes.push((choice["index"].as_u64().unwrap(), reason.into()));
                    }
                }
            }
            Piece::Started { .. } => {}
            Piece::Done(end) => self.end = Some(end.finish),
        }
    }
}

async fn run_with(active: Active, stream: bool, pieces: Vec<Piece>) -> (Seen, Vec<crate::guard::Verdict>) {
    let active = Arc::new(active);
    let mut guard = Answer::new(active.clone(), stream, true, 3);
    let mut seen = Seen::default();
    for piece in pieces {
        for out in guard.push(piece).await {
            seen.take(&out);
        }
        if guard.over() {
            break;
        }
    }
    (seen, active.log.lines())
}

async fn run(toml: &str, stream: bool, pieces: Vec<Piece>) -> (Seen, Vec<crate::guard::Verdict>) {
    run_with(active(toml), stream, pieces).await
}

const REDACT: &str = "[guard.policies.a]\ncheck = \"pii\"\non_violation = \"redact\"";
const BLOCK: &str = "[guard.policies.a]\ncheck = \"pii\"";

#[tokio::test]
async fn every_text_of_every_choice_is_a_channel() {
    let secret = |cut: usize| (KEY[..cut].to_owned(), format!("{} .", &KEY[cut..]));
    for cut in 0..=KEY.len() {
        let (head, tail) = secret(cut);
        let mut pieces = Vec::new();
        for part in [&head, &tail] {
            pieces.push(delta(0, json!({"role": "assistant", "content": part})));
            pieces.push(delta(1, json!({"content": part})));
            pieces.push(delta(2, json!({"refusal": part})));
            pieces.push(delta(3, json!({"reasoning_content": part})));
            pieces.push(delta(4, json!({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})));
            pieces.push(delta(5, json!({"tool_calls": [{"index": 7, "type": "custom", "custom": {"input": part}}]})));
            pieces.push(delta(6, json!({"function_call": {"arguments": part}})));
            pieces.push(chunk(json!([{"index": 7, "text": part, "finish_reason": null}])));
        }
        pieces.extend((0..8).map(finish));
        pieces.push(end());
        let (seen, log) = run(REDACT, true, pieces).await;
        assert!(!seen.raw.contains(KEY) && !seen.raw.contains("AKIA"), "{cut}: {}", seen.raw);
        assert_eq!(seen.texts.values().filter(|t| *t == "<SECRET> .").count(), 8, "{cut}: {:?}", seen.texts);
        assert_eq!((seen.finishes.len(), seen.end), (8, Some(Finish::Stop)));
        assert_eq!((log[0].count, log[0].kind.as_str()), (8, "secret"));
    }
}

#[tokio::test]
async fn a_block_ends_all_choices_and_says_what_had_left() {
    let pieces = vec![
        delta(0, json!({"role": "assistant", "content": ""})),
        delta(0, json!({"content": "Good morning. "})),
        delta(1, json!({"content": "other "})),
        delta(0, json!({"content": "AKIAIOSF"})),
        delta(0, json!({"content": "ODNN7EXAMPLE and"})),
        delta(0, json!({"content": " more"})),
        end(),
    ];
    let (seen, log) = run(BLOCK, true, pieces).await;
    assert!(!seen.raw.contains("AKIA") && "Good morning. ".starts_with(seen.text(0, "content")), "{}", seen.raw);
    assert_eq!(seen.finishes, [(0, "content_filter".into()), (1, "content_filter".into())]);
    assert_eq!(seen.end, Some(Finish::ContentFilter));
    let left: usize = seen.texts.values().map(|t| t.chars().count()).sum();
    assert_eq!((log[0].action, log[0].released_chars), (Action::Block, left as u64));
}

#[tokio::test]
async fn a_whole_answer_is_judged_whole() {
    let message = |content: &str| {
        let object = json!({"object": "chat.completion", "created": 5, "odd": "field", "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": format!("{{\"k\":\"{KEY}\"}}")}}]},
             "logprobs": {"content": [KEY]}, "finish_reason": "stop"}]});
        vec![Piece::Chunk(Chunk { fields: fields(&object), gains: 1, usage: Some("{}".into()), ..Chunk::default() }), end()]
    };
    let (seen, log) = run(REDACT, false, message(&format!("Use {KEY}."))).await;
    assert!(!seen.raw.contains(KEY) && !seen.raw.contains("odd"));
    assert_eq!(seen.text(0, "content"), "Use <SECRET>.");
    assert_eq!(seen.text(0, "tool_calls/0/function"), "{\"k\":\"<SECRET>\"}");
    assert!(log.iter().any(|l| l.policy == SHAPE && l.kind == "odd"));
    let (seen, _) = run(BLOCK, false, message("All is well.")).await;
    assert_eq!((seen.text(0, "content"), seen.end), ("", Some(Finish::ContentFilter)));
    assert_eq!(seen.finishes, [(0, "content_filter".into())]);
    assert!(!seen.raw.contains("well") && !seen.raw.contains("AKIA"));
}

#[tokio::test]
async fn an_engines_tokens_are_guarded_as_well() {
    let text = format!("It is {KEY}, or anna@example.org. Grüße 🧱");
    for stream in [true, false] {
        for size in 1..8 {
            let chars: Vec<char> = text.chars().collect();
            let mut pieces = vec![Piece::Started { prompt_tokens: 4, cached_tokens: 1 }];
            pieces.extend(chars.chunks(size).map(|c| Piece::Text(c.iter().collect())));
            pieces.push(end());
            let (seen, _) = run(REDACT, stream, pieces.clone()).await;
            assert_eq!(seen.text(0, "content"), "It is <SECRET>, or <EMAIL>. Grüße 🧱", "{size}");
            let (seen, _) = run(BLOCK, stream, pieces).await;
            assert!("It is ".starts_with(seen.text(0, "content")) && seen.end == Some(Finish::ContentFilter));
        }
    }
}

#[tokio::test]
async fn pseudonyms_come_back_wherever_they_are_cut() {
    let text = "Dear <EMAIL_1>, <EMAIL_2> is no one; write to b@c.org <EMAIL";
    for stream in [true, false] {
        for (one, _) in text.char_indices() {
            for (two, _) in text.char_indices().skip(one) {
                let mut a = active(REDACT);
                let mut vault = ashlar_text::detect::Vault::default();
                let asked = "I am anna@example.org";
                vault.hide(asked, &ashlar_text::detect::Scanner::new(ashlar_text::detect::Kinds::ALL).find(asked));
                a.vault = Some(vault);
                let parts = [&text[..one], &text[one..two], &text[two..]];
                let mut pieces: Vec<Piece> = parts.iter().map(|p| Piece::Text((*p).to_owned())).collect();
                pieces.push(end());
                let (seen, _) = run_with(a, stream, pieces).await;
                assert_eq!(seen.text(0, "content"), "Dear anna@example.org, <EMAIL_2> is no one; write to <EMAIL> <EMAIL", "{one} {two}");
            }
        }
    }
}

#[tokio::test]
async fn an_unknown_form_is_closed() {
    for odd in [
        Piece::Chunk(Chunk { fields: format!("\"object\":\"x\",\"output\":\"{KEY}\""), gains: 1, ..Chunk::default() }),
        Piece::Chunk(Chunk { fields: "not json".into(), gains: 1, ..Chunk::default() }),
        delta(0, json!({"content": [{"type": "text", "text": KEY}]})),
        delta(0, json!({"tool_calls": [{"index": 0, "function": {"name": KEY}}]})),
    ] {
        let (seen, log) = run(REDACT, true, vec![odd, end()]).await;
        assert!(!seen.raw.contains(KEY), "{}", seen.raw);
        assert_eq!(seen.end, Some(Finish::ContentFilter));
        assert_eq!(log.len(), 1);
    }
    let hidden = delta(0, json!({"content": "hi", "reasoning_details": [{"text": KEY}]}));
    let (seen, log) = run(REDACT, true, vec![hidden, finish(0), end()]).await;
    assert_eq!((seen.text(0, "content"), seen.end), ("hi", Some(Finish::Stop)));
    assert!(!seen.raw.contains(KEY) && log[0].kind == "message.reasoning_details");
}

#[tokio::test]
async fn texts_keep_their_order() {
    let pieces = vec![
        delta(0, json!({"reasoning_content": "a thought of anna"})),
        delta(0, json!({"content": "the answer "})),
        delta(0, json!({"content": "to bob"})),
        delta(0, json!({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{\"x\":1"}}]})),
        delta(0, json!({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]})),
        finish(0),
        end(),
    ];
    let active = Arc::new(active(REDACT));
    let mut guard = Answer::new(active, true, true, 3);
    let (mut seen, mut order) = (Seen::default(), Vec::new());
    for piece in pieces {
        for out in guard.push(piece).await {
            let before = seen.texts.clone();
            seen.take(&out);
            let grown = seen.texts.iter().filter(|(k, t)| before.get(*k).map_or(0, String::len) < t.len());
            order.extend(grown.map(|((_, name), _)| name.clone()));
        }
    }
    order.dedup();
    assert_eq!(order, ["reasoning_content", "content", "tool_calls/0/function"]);
    assert_eq!((seen.text(0, "content"), seen.text(0, "tool_calls/0/function")), ("the answer to bob", "{\"x\":1}"));
}

#[tokio::test]
async fn judges_close_or_open_and_are_waited_for() {
    let judge = |more: &str| format!("[guard.policies.j]\ncheck = \"judge\"\njudge = \"m\"\nstep_chars = 5\nwindow_chars = 20\n{more}");
    let say = |text: &str| {
        let mut pieces: Vec<Piece> = text.as_bytes().chunks(3).map(|c| Piece::Text(String::from_utf8(c.to_vec()).unwrap())).collect();
        pieces.push(end());
        pieces
    };
    for stream in [true, false] {
        let (seen, _) = run(&judge(""), stream, say("all is good and well")).await;
        assert_eq!((seen.text(0, "content"), seen.end), ("all is good and well", Some(Finish::Stop)));
        let (seen, log) = run(&judge(""), stream, say("all is fine but bad")).await;
        assert!(!seen.text(0, "content").contains("bad") && seen.end == Some(Finish::ContentFilter));
        assert_eq!(log.iter().map(|l| l.kind.as_str()).collect::<Vec<_>>(), ["illicit/violent", "violence", "hate"]);
        let (seen, log) = run(&judge(""), stream, say("it is broken")).await;
        assert_eq!((seen.end, log[0].kind.as_str()), (Some(Finish::ContentFilter), "no_verdict"));
        let (seen, _) = run(&judge("on_failure = \"open\""), stream, say("it is broken")).await;
        assert_eq!((seen.text(0, "content"), seen.end), ("it is broken", Some(Finish::Stop)));
        let (seen, log) = run(&judge("on_violation = \"shadow\""), stream, say("it is bad")).await;
        assert_eq!((seen.text(0, "content"), seen.end), ("it is bad", Some(Finish::Stop)));
        assert_eq!(log[0].action, Action::Shadow);
        let (seen, log) = run(&judge("release = \"before\""), stream, say("it is bad")).await;
        assert_eq!((seen.end, log[0].action), (Some(Finish::ContentFilter), Action::Block));
    }
}

#[tokio::test]
async fn a_schema_is_held_against_the_whole() {
    let toml = "[guard.policies.s]\ncheck = \"schema\"\non = [\"answer\"]";
    for (text, right) in [("{\"a\":1}", true), ("{\"a\":\"x\"}", false), ("Sure: {\"a\":1}", false)] {
        for stream in [true, false] {
            let mut a = active(toml);
            a.schema = Some(Arc::new(crate::guard::schema::Schema::of(json!({"required": ["a"], "properties": {"a": {"type": "number"}}})).unwrap()));
            let mut pieces: Vec<Piece> = text.chars().map(|c| Piece::Text(c.into())).collect();
            pieces.push(end());
            let (seen, _) = run_with(a, stream, pieces).await;
            let want = if right { (text, Some(Finish::Stop)) } else { ("", Some(Finish::ContentFilter)) };
            assert_eq!((seen.text(0, "content"), seen.end), want, "{text}");
        }
    }
}

#[tokio::test]
async fn an_upstreams_error_is_guarded() {
    let error = || ApiError::internal(format!("cannot parse {KEY}, mail anna@example.org"));
    let guard = |toml| Answer::new(Arc::new(active(toml)), true, true, 0);
    assert_eq!(guard(REDACT).error(error()).message, "cannot parse <SECRET>, mail <EMAIL>");
    assert!(!guard(BLOCK).error(error()).message.contains("AKIA"));
}

/// A stream's bytes: a secret and an address in every text, cut by the model.
fn upstream(chat: bool) -> Vec<u8> {
    let mut out = Vec::new();
    let mut event = |object: Value| out.extend_from_slice(format!("data: {object}\r\n\r\n").as_bytes());
    for part in ["Grüße, the key is AKIA", "IOSFODNN", "7EXAMPLE and \"anna@exam", "ple.org\" \u{1f9f1}."] {
        if !chat {
            event(json!({"object": "text_completion", "created": 1, "choices": [{"index": 0, "text": part, "logprobs": null, "finish_reason": null}]}));
            continue;
        }
        for delta in [json!({"content": part}), json!({"reasoning_content": part}), json!({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})] {
            event(json!({"object": "chat.completion.chunk", "created": 1, "choices": [{"index": 0, "delta": delta, "finish_reason": null}]}));
        }
    }
    event(json!({"object": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}));
    event(json!({"object": "x", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}));
    out.extend_from_slice(b"data: [DONE]\n\n");
    out
}

#[tokio::test]
async fn no_cut_of_the_upstreams_bytes_lets_a_secret_out() {
    for chat in [true, false] {
        let bytes = upstream(chat);
        // Texts of one choice that alternate are flushed at each change: whole
        // secrets are what must not be put together.
        for cut in 0..=bytes.len() {
            let pieces = crate::upstream::pieces(&[&bytes[..cut], &bytes[cut..]]);
            let (seen, _) = run(REDACT, true, pieces).await;
            assert_eq!(seen.end, Some(Finish::Stop), "{cut}");
            for text in seen.texts.values() {
                assert!(!text.contains(KEY) && !text.contains("anna@example.org"), "{cut}: {text}");
            }
            if !chat {
                assert_eq!(seen.text(0, "text"), "Grüße, the key is <SECRET> and \"<EMAIL>\" \u{1f9f1}.");
            }
        }
    }
}

/// In prose, a client waits at most one token's time longer between two chunks, but
/// for one wait in twenty: a word may become an address until it ends. In tables
/// and code it takes longer, and the figures are only shown.
#[tokio::test]
async fn a_guarded_stream_waits_at_most_a_token_longer() {
    const PROSE: &str = "To apply for parental leave, write to your manager at least eight weeks before it begins. The form is on \
        the intranet, and the front desk keeps printed copies of it for those who would rather use a pen. Thirty people took \
        their leave last year, for twelve weeks on average, and most of them came back to the same team. The costs of a \
        course during that time are refunded as long as you hand in the bill within a month! You may call the desk during \
        office hours, or ask Ms. Lehmann, who has known the rules by heart since they were written. Is there anything else \
        that you would like to know? If so, please tell us; we are glad to help. ";
    const DENSE: &str = "In 2024, 31 people took it, for 12.5 weeks on average (see table 3-1). Up to 1,200 EUR, from 9:00 to \
        17:30.\n1. Open the portal.\n2. Choose a date; the earliest is 2025-03-01.\n```rust\nfn main() { println!(\"{}\", days(40_000)); }\n```\n";
    for (text, prose) in [(PROSE, true), (DENSE, false)] {
        let tokens = tokens(&text.repeat(4));
        for (name, policy) in [
            ("pii", REDACT),
            ("phrases", "[guard.policies.b]\ncheck = \"phrases\"\nphrases = [\"project falcon\", \"you may not\"]"),
            ("moderation", "[guard.policies.m]\ncheck = \"moderation\""),
            ("injection", "[guard.policies.i]\ncheck = \"injection\"\non_violation = \"block\""),
        ] {
            let (late, waits) = lateness(policy, &tokens).await;
            let at = |of: &[usize], q: f64| of[((of.len() - 1) as f64 * q) as usize];
            let mean = late.iter().sum::<usize>() as f64 / late.len() as f64;
            let of = |of: &[usize]| format!("p50 {}, p95 {}, p99 {}", at(of, 0.5), at(of, 0.95), at(of, 0.99));
            eprintln!("{name}, prose {prose}: characters late by tokens: mean {mean:.2}, {}; longer waits: {}", of(&late), of(&waits));
            assert!(!prose || (at(&waits, 0.95) <= 1 && at(&late, 0.95) <= 2), "{name}");
        }
    }
}

/// Cuts as large vocabularies do: common words whole with their space, numbers by
/// threes, other characters alone.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    for c in text.chars() {
        match tokens.last_mut() {
            Some(t) if c.is_alphabetic() && t.len() < 10 && (t == " " || t.ends_with(char::is_alphabetic)) => t.push(c),
            Some(t) if c.is_ascii_digit() && t.len() < 3 && t.ends_with(|c: char| c.is_ascii_digit()) => t.push(c),
            _ => tokens.push(c.into()),
        }
    }
    tokens
}

/// Of each character, how many tokens after its own it left; of each chunk, how many
/// tokens longer it was waited for. In order.
async fn lateness(toml: &str, tokens: &[String]) -> (Vec<usize>, Vec<usize>) {
    let mut guard = Answer::new(Arc::new(active(toml)), true, true, 3);
    let (mut came, mut left, mut last) = (Vec::new(), 0usize, 0);
    let (mut late, mut waits) = (Vec::new(), Vec::new());
    let began = std::time::Instant::now();
    for (i, token) in tokens.iter().enumerate() {
        came.extend(token.chars().map(|_| i));
        let mut text = String::new();
        for piece in guard.push(Piece::Text(token.clone())).await {
            if let Piece::Text(t) | Piece::Rest(t) = piece {
                text += &t;
            }
        }
        if !text.is_empty() {
            waits.push((i - last).saturating_sub(1));
            last = i;
        }
        for _ in text.chars() {
            late.push(i - came[left]);
            left += 1;
        }
    }
    eprint!("{:?} of work a token; ", began.elapsed() / tokens.len() as u32);
    assert!(late.len() > came.len() - 200);
    late.sort_unstable();
    waits.sort_unstable();
    (late, waits)
}
