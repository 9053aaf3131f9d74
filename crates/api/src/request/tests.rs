//! Every refusal by name, every benign value, and no panic on any bytes.

use super::*;
use proptest::prelude::*;
use serde_json::json;

fn chat(extra: Value) -> Result<ChatRequest, ApiError> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (k, v) in extra.as_object().unwrap() {
        body[k] = v.clone();
    }
    ChatRequest::parse(body.to_string().as_bytes())
}

#[track_caller]
fn refused(extra: Value, param: &str, code: &str, part: &str) {
    let e = chat(extra).unwrap_err();
    assert_eq!(e.status, 400, "{e:?}");
    assert_eq!(e.param.as_deref(), Some(param), "{e:?}");
    assert_eq!(e.code.as_deref(), Some(code), "{e:?}");
    assert!(e.message.contains(part), "{:?} lacks {part:?}", e.message);
}

#[test]
fn malformed_json_has_line_and_column() {
    let e = ChatRequest::parse(b"{\n  \"model\": \"m\",,\n}").unwrap_err();
    assert_eq!((e.status, e.code.as_deref()), (400, Some("invalid_json")));
    assert!(e.message.contains("line 2 column 16"), "{}", e.message);
    for body in [&b""[..], b"[]", b"\"x\"", b"{\"model\":\"\xff\"}", b"{} x"] {
        let e = ChatRequest::parse(body).unwrap_err();
        assert_eq!(e.code.as_deref(), Some("invalid_json"), "{e:?}");
    }
    let deep = format!("{{\"model\":{}", "[".repeat(100_000));
    assert!(ChatRequest::parse(deep.as_bytes()).is_err());
    let twice = ChatRequest::parse(br#"{"model":"m","model":"n"}"#).unwrap_err();
    assert!(twice.message.contains("\"model\" is given twice"));
}

#[test]
fn priority_is_any_integer_of_32_bits() {
    for (sent, read) in [(json!({}), None), (json!({"priority": -7}), Some(-7))] {
        assert_eq!(chat(sent.clone()).unwrap().priority, read);
        let mut body = sent;
        body["model"] = "m".into();
        body["prompt"] = "x".into();
        let r = CompletionRequest::parse(body.to_string().as_bytes()).unwrap();
        assert_eq!(r.priority, read);
    }
    let over = i64::from(i32::MAX) + 1;
    refused(
        json!({"priority": over}),
        "priority",
        "invalid_value",
        "2147483648",
    );
    refused(
        json!({"priority": "high"}),
        "priority",
        "invalid_type",
        "the string",
    );
}

#[test]
fn every_bad_value_is_named_with_its_numbers() {
    refused(
        json!({"temperature": 3}),
        "temperature",
        "invalid_value",
        "between 0 and 2, got 3",
    );
    refused(
        json!({"temperature": "hot"}),
        "temperature",
        "invalid_type",
        "the string \"hot\"",
    );
    refused(json!({"top_p": -0.1}), "top_p", "invalid_value", "got -0.1");
    refused(json!({"min_p": 2}), "min_p", "invalid_value", "got 2");
    refused(json!({"top_k": -2}), "top_k", "invalid_value", "got -2");
    refused(json!({"top_k": 1.5}), "top_k", "invalid_type", "integer");
    refused(
        json!({"max_tokens": 0}),
        "max_tokens",
        "invalid_value",
        "got 0",
    );
    refused(
        json!({"max_tokens": u64::MAX}),
        "max_tokens",
        "invalid_value",
        "got 18446744073709551615",
    );
    refused(
        json!({"max_completion_tokens": -1}),
        "max_completion_tokens",
        "invalid_value",
        "-1",
    );
    refused(
        json!({"max_completion_tokens": 5, "max_tokens": 6}),
        "max_tokens",
        "invalid_value",
        "give one",
    );
    refused(
        json!({"presence_penalty": 2.1}),
        "presence_penalty",
        "invalid_value",
        "2.1",
    );
    refused(
        json!({"frequency_penalty": -3}),
        "frequency_penalty",
        "invalid_value",
        "-3",
    );
    refused(
        json!({"repetition_penalty": 0}),
        "repetition_penalty",
        "invalid_value",
        "got 0",
    );
    refused(json!({"seed": 0.5}), "seed", "invalid_type", "integer");
    refused(
        json!({"stream": 1}),
        "stream",
        "invalid_type",
        "true or false",
    );
    refused(json!({"stop": 1}), "stop", "invalid_type", "got 1");
    refused(
        json!({"stop": ["a", ""]}),
        "stop[1]",
        "invalid_value",
        "empty",
    );
    refused(
        json!({"stop": ["a", 2]}),
        "stop[1]",
        "invalid_type",
        "got 2",
    );
    refused(
        json!({"stop": ["a", "b", "c", "d", "e"]}),
        "stop",
        "invalid_value",
        "5 strings, at most 4",
    );
    refused(
        json!({"stop": "x".repeat(1025)}),
        "stop[0]",
        "invalid_value",
        "1025 bytes",
    );
    refused(
        json!({"logit_bias": {"x": 1}}),
        "logit_bias.x",
        "invalid_value",
        "token id",
    );
    refused(
        json!({"logit_bias": {"7": 101}}),
        "logit_bias.7",
        "invalid_value",
        "101",
    );
    refused(
        json!({"logit_bias": [1]}),
        "logit_bias",
        "invalid_type",
        "an array",
    );
    refused(
        json!({"stream_options": {"include_usage": true}}),
        "stream_options",
        "invalid_value",
        "stream is true",
    );
    refused(
        json!({"stream": true, "stream_options": {"usage": true}}),
        "stream_options.usage",
        "unknown_parameter",
        "usage",
    );
    refused(
        json!({"metadata": {"a": 1}}),
        "metadata",
        "invalid_type",
        "strings",
    );
    refused(json!({"model": 5}), "model", "invalid_type", "got 5");
    refused(json!({"model": ""}), "model", "invalid_value", "empty");
    refused(
        json!({"model": null}),
        "model",
        "missing_required_parameter",
        "required",
    );
    refused(
        json!({"tempratur": null}),
        "tempratur",
        "unknown_parameter",
        "tempratur",
    );
}

#[test]
fn every_unsupported_field_is_named() {
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    for (key, value) in [
        ("tools", tool.clone()),
        ("functions", tool),
        ("tool_choice", json!("required")),
        ("function_call", json!({"name": "f"})),
        ("response_format", json!({"type": "json_object"})),
        ("logprobs", json!(true)),
        ("top_logprobs", json!(2)),
        ("n", json!(2)),
        ("modalities", json!(["audio"])),
        ("audio", json!({})),
        ("prediction", json!({})),
        ("reasoning_effort", json!("low")),
        ("verbosity", json!("low")),
        ("web_search_options", json!({})),
        ("store", json!(true)),
        ("service_tier", json!("flex")),
    ] {
        refused(json!({key: value}), key, "unsupported_parameter", key);
    }
}

#[test]
fn messages_are_checked_one_by_one() {
    let m = |v: Value| json!({"messages": v});
    refused(m(json!([])), "messages", "invalid_value", "empty");
    refused(m(json!("hi")), "messages", "invalid_type", "an array");
    refused(m(json!(["hi"])), "messages[0]", "invalid_type", "an object");
    refused(
        m(json!([{"content": "x"}])),
        "messages[0].role",
        "missing_required_parameter",
        "role",
    );
    refused(
        m(json!([{"role": "user"}])),
        "messages[0].content",
        "missing_required_parameter",
        "content",
    );
    refused(
        m(json!([{"role": "wizard", "content": "x"}])),
        "messages[0].role",
        "invalid_value",
        "wizard",
    );
    refused(
        m(json!([{"role": "tool", "content": "x"}])),
        "messages[0].role",
        "unsupported_parameter",
        "tool",
    );
    refused(
        m(json!([{"role": "user", "content": 1}])),
        "messages[0].content",
        "invalid_type",
        "got 1",
    );
    refused(
        m(json!([{"role": "user", "content": []}])),
        "messages[0].content",
        "invalid_value",
        "no parts",
    );
    refused(
        m(json!([{"role": "user", "content": "x", "nam": "y"}])),
        "messages[0].nam",
        "unknown_parameter",
        "nam",
    );
    refused(
        m(json!([{"role": "user", "content": "x", "name": "y"}])),
        "messages[0].name",
        "unsupported_parameter",
        "name",
    );
    refused(
        m(
            json!([{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]),
        ),
        "messages[1].content[1].type",
        "unsupported_parameter",
        "image_url",
    );
    let r = chat(m(json!([
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": null, "tool_calls": [], "annotations": []}
    ])))
    .unwrap();
    assert_eq!(
        r.messages,
        [ChatMessage::system("ab"), ChatMessage::assistant("c")]
    );
}

#[test]
fn benign_values_mean_no_change() {
    let plain = chat(json!({})).unwrap();
    let benign = chat(json!({
        "tools": [], "functions": [], "tool_choice": "none", "function_call": "auto",
        "parallel_tool_calls": true, "response_format": {"type": "text"}, "logprobs": false,
        "top_logprobs": 0, "modalities": ["text"], "logit_bias": {}, "store": false,
        "service_tier": "auto", "metadata": {"a": "b"}, "prompt_cache_key": "k", "stop": [],
        "temperature": null, "seed": null, "stream": null, "stream_options": null, "n": null,
        "audio": null, "reasoning_effort": null, "user": null
    }))
    .unwrap();
    assert_eq!(plain, benign);
    assert_eq!(chat(json!({"n": 1})).unwrap().n, Some(1));
}

#[test]
fn all_served_fields_arrive() {
    let r = chat(json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0, "frequency_penalty": 1, "logit_bias": {"7": -100}, "seed": -3,
        "max_tokens": 9, "max_completion_tokens": 9, "stop": "END", "stream": true,
        "stream_options": {"include_usage": true}, "user": "u", "safety_identifier": "s"
    }))
    .unwrap();
    assert_eq!(
        r.sampling(),
        Sampling {
            temperature: Some(0.5),
            top_p: Some(0.9),
            top_k: Some(0),
            min_p: Some(0.1),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(0.0),
            frequency_penalty: Some(1.0),
            logit_bias: vec![(7, -100.0)],
            seed: Some(-3),
            max_tokens: Some(9),
            stop: vec!["END".into()],
            logprobs: false,
        }
    );
    assert!(r.stream && r.stream_options.unwrap().include_usage);
    assert_eq!(
        (r.user.as_deref(), r.safety_identifier.as_deref()),
        (Some("u"), Some("s"))
    );
}

#[test]
fn completions() {
    let parse = |v: Value| CompletionRequest::parse(v.to_string().as_bytes());
    let ok = |p: Value| parse(json!({"model": "m", "prompt": p})).unwrap().prompt;
    assert_eq!(ok(json!("a")), Prompt::Text("a".into()));
    assert_eq!(ok(json!(["a"])), Prompt::Text("a".into()));
    assert_eq!(ok(json!([1, 2])), Prompt::Tokens(vec![1, 2]));
    assert_eq!(ok(json!([[1, 2]])), Prompt::Tokens(vec![1, 2]));
    assert_eq!(
        parse(json!({"model": "m", "prompt": "a"}))
            .unwrap()
            .max_tokens,
        Some(16)
    );
    for (body, param, code) in [
        (
            json!({"model": "m"}),
            "prompt",
            "missing_required_parameter",
        ),
        (
            json!({"model": "m", "prompt": []}),
            "prompt",
            "invalid_value",
        ),
        (
            json!({"model": "m", "prompt": ["a", "b"]}),
            "prompt",
            "unsupported_parameter",
        ),
        (
            json!({"model": "m", "prompt": [1, -2]}),
            "prompt[1]",
            "invalid_type",
        ),
        (
            json!({"model": "m", "prompt": [[1, "x"]]}),
            "prompt[0][1]",
            "invalid_type",
        ),
        (
            json!({"model": "m", "prompt": [[]]}),
            "prompt[0]",
            "invalid_type",
        ),
        (
            json!({"model": "m", "prompt": {"a": 1}}),
            "prompt",
            "invalid_type",
        ),
        (
            json!({"model": "m", "prompt": "a", "echo": true}),
            "echo",
            "unsupported_parameter",
        ),
        (
            json!({"model": "m", "prompt": "a", "suffix": "z"}),
            "suffix",
            "unsupported_parameter",
        ),
        (
            json!({"model": "m", "prompt": "a", "logprobs": 1}),
            "logprobs",
            "unsupported_parameter",
        ),
        (
            json!({"model": "m", "prompt": "a", "best_of": 2}),
            "best_of",
            "unsupported_parameter",
        ),
        (
            json!({"model": "m", "prompt": "a", "messages": []}),
            "messages",
            "unknown_parameter",
        ),
    ] {
        let e = parse(body).unwrap_err();
        assert_eq!(
            (e.status, e.param.as_deref(), e.code.as_deref()),
            (400, Some(param), Some(code))
        );
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
        prop::sample::select(vec!["text", "none", "auto", "user", "assistant"])
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((a_key(), inner), 0..5)
                .prop_map(|kv| Value::Object(kv.into_iter().collect())),
        ]
    })
}

fn a_key() -> impl Strategy<Value = String> {
    let known = vec![
        "model",
        "messages",
        "prompt",
        "role",
        "content",
        "type",
        "text",
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "include_usage",
        "n",
        "logit_bias",
        "max_tokens",
        "max_completion_tokens",
        "tools",
        "metadata",
        "response_format",
    ];
    prop_oneof![
        8 => prop::sample::select(known).prop_map(String::from),
        1 => "\\PC{0,8}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_never_panic(bytes: Vec<u8>) {
        let _ = ChatRequest::parse(&bytes);
        let _ = CompletionRequest::parse(&bytes);
    }

    #[test]
    fn any_json_is_read_or_refused_with_400(fields in prop::collection::vec((a_key(), any_json()), 0..8)) {
        let body = Value::Object(fields.into_iter().collect()).to_string();
        for e in [
            ChatRequest::parse(body.as_bytes()).err(),
            CompletionRequest::parse(body.as_bytes()).err(),
        ].into_iter().flatten() {
            prop_assert_eq!(e.status, 400);
            prop_assert!(e.param.is_some() || e.code.as_deref() == Some("invalid_json"));
        }
    }

    #[test]
    fn any_cut_of_a_good_body_is_refused(cut in 0usize..80) {
        let body = br#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stop":["a"],"seed":1}"#;
        prop_assert!(ChatRequest::parse(body).is_ok());
        prop_assert!(ChatRequest::parse(&body[..cut.min(body.len() - 1)]).is_err());
    }

    /// What Rust callers build reads back as itself over the wire.
    #[test]
    fn serialized_requests_read_back(content in "\\PC{0,20}", temperature in prop::option::of(0f32..2.0), stop in prop::collection::vec("[a-z]{1,4}", 0..4), seed in prop::option::of(any::<i64>())) {
        let r = ChatRequest { temperature, stop, seed, ..ChatRequest::new("m", vec![ChatMessage::user(content)]) };
        prop_assert_eq!(ChatRequest::parse(&serde_json::to_vec(&r).unwrap()).unwrap(), r);
    }
}
