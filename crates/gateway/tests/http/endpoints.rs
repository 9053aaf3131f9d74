//! The endpoints beside chat and completions: the same admission, record and
//! backends, other words.

use crate::{
    mock::{Mock, TOKENS},
    peers::{script, shown, skip},
    support::{MODEL, Server},
};
use ashlar_api::ApiError;
use ashlar_core::Digest;
use ashlar_gateway::{Config, EncoderId, EncoderInfo, GatewayState};
use base64::Engine as _;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::process::Command;

const DIMENSIONS: usize = 4;

/// A vector a text: how many of its bytes are of each value modulo 4.
pub(crate) fn vector(text: &str) -> Vec<f32> {
    let mut row = vec![0f32; DIMENSIONS];
    text.bytes().for_each(|b| row[usize::from(b) % DIMENSIONS] += 1.0);
    let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
    row.iter().map(|v| v / length).collect()
}

pub(crate) fn encoder(state: &mut GatewayState) {
    state.embed = Some(Arc::new(|texts: &[&str]| {
        if texts.contains(&"fall over") {
            return Err(ApiError::internal("the encoder fell over"));
        }
        Ok(texts.iter().map(|t| vector(t)).collect())
    }));
    state.encoder = Some(EncoderInfo {
        id: EncoderId { name: "tiny-embed".into(), digest: Digest::of(b"tiny"), dimensions: DIMENSIONS },
        context: 8,
        truncatable: false,
        tokens: Arc::new(|text| Ok(text.split_whitespace().map(|_| 1).collect())),
    });
}

async fn server(mock: &Mock) -> Server {
    let mut toml = String::new();
    for model in ["good", "tools", "truncated", "500", "no-usage"] {
        toml += &format!(
            "[backends.\"{model}\"]\nkind = \"vllm\"\nurl = \"{}\"\nprobe = \"\"\n\
             [models.\"{model}\"]\nretries = 0\ntargets = [{{ backend = \"{model}\" }}]\n",
            mock.url()
        );
    }
    Server::of(|state| {
        encoder(state);
        state.routing = Config::parse(&toml).unwrap();
    })
    .await
}

/// Names and data of the events.
fn events(body: &str) -> Vec<(String, Value)> {
    let one = |e: &str| {
        let (name, data) = e.split_once('\n').expect("two lines");
        let data = data.strip_prefix("data: ").expect("data");
        (name.strip_prefix("event: ").expect("a name").to_owned(), serde_json::from_str(data).expect("JSON"))
    };
    body.trim_end().split("\n\n").map(one).collect()
}

fn message(model: &str, prompt: &str, stream: bool) -> Value {
    json!({"model": model, "max_tokens": 50, "stream": stream, "messages": [{"role": "user", "content": prompt}]})
}

/// The message that a stream of events adds up to, as Anthropic's client does it.
fn assembled(events: &[(String, Value)]) -> Value {
    let mut message = events[0].1["message"].clone();
    let mut json = String::new();
    for (name, data) in events {
        assert_eq!(data["type"], name.as_str());
        let index = data["index"].as_u64().map(|i| usize::try_from(i).unwrap());
        match name.as_str() {
            "content_block_start" => {
                let content = message["content"].as_array_mut().unwrap();
                assert_eq!(Some(content.len()), index);
                content.push(data["content_block"].clone());
                json.clear();
            }
            "content_block_delta" => {
                let block = &mut message["content"][index.unwrap()];
                let delta = &data["delta"];
                match delta["type"].as_str().unwrap() {
                    "text_delta" => block["text"] = format!("{}{}", block["text"].as_str().unwrap(), delta["text"].as_str().unwrap()).into(),
                    "input_json_delta" => {
                        json += delta["partial_json"].as_str().unwrap();
                        block["input"] = serde_json::from_str(&json).unwrap_or(json!({}));
                    }
                    other => panic!("{other}"),
                }
            }
            "message_delta" => {
                message["stop_reason"] = data["delta"]["stop_reason"].clone();
                message["usage"] = data["usage"].clone();
            }
            _ => {}
        }
    }
    message["id"] = Value::Null;
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn anthropics_clients_get_the_same_answer_streamed_and_whole() {
    let mock = Mock::start().await;
    let server = server(&mock).await;
    for model in [MODEL, "good", "tools", "no-usage"] {
        let reply = server.post("/v1/messages", &message(model, "good morning", false)).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let mut whole = reply.json();
        // The mock thinks in whole answers alone.
        whole["content"].as_array_mut().unwrap().retain(|b| *b != json!({"type": "thinking", "thinking": "hm", "signature": ""}));
        assert_eq!((&whole["type"], &whole["role"], &whole["model"]), (&json!("message"), &json!("assistant"), &json!(model)));
        let id = reply.header("x-ashlar-response-id").unwrap();
        assert!(whole["id"] == id && id.starts_with("msg-"));
        let row = server.store.response(id).await.unwrap().unwrap();
        let settled = row.settlement.unwrap();
        assert_eq!((row.admission.endpoint.as_str(), row.admission.stream), ("/v1/messages", false));
        let usage = &whole["usage"];
        let input = usage["input_tokens"].as_i64().unwrap() + usage["cache_read_input_tokens"].as_i64().unwrap();
        assert_eq!((json!(input), &usage["output_tokens"]), (json!(settled.prompt_tokens), &json!(settled.completion_tokens)), "{model}");

        let streamed = server.post("/v1/messages", &message(model, "good morning", true)).await;
        assert_eq!(streamed.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let events = events(&streamed.body);
        assert_eq!((events[0].0.as_str(), events.last().unwrap().0.as_str()), ("message_start", "message_stop"));
        whole["id"] = Value::Null;
        if model != "no-usage" {
            assert_eq!(assembled(&events), whole, "{model}");
        }
        let wanted = match model {
            MODEL => json!([{"type": "text", "text": "You said: good morning Grüße 🧱"}]),
            "tools" => json!([{"type": "text", "text": "Let me see."}, {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}}]),
            _ => json!([{"type": "text", "text": TOKENS.concat()}]),
        };
        assert_eq!(whole["content"], wanted);
        assert_eq!(whole["stop_reason"], if model == "tools" { "tool_use" } else { "end_turn" });
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_in_the_words_of_the_protocol() {
    let mock = Mock::start().await;
    let server = server(&mock).await;
    let mut odd = message("good", "x", false);
    odd["mcp_servers"] = json!([]);
    for (body, status, kind, says) in [
        (message("nobody", "x", false), 404, "not_found_error", "nobody"),
        (odd, 400, "invalid_request_error", "mcp_servers"),
        (message("500", "x", true), 502, "api_error", "it fell over"),
    ] {
        let reply = server.post("/v1/messages", &body).await;
        let error = reply.json();
        assert_eq!((reply.status, &error["type"], &error["error"]["type"]), (status, &json!("error"), &json!(kind)), "{reply:?}");
        assert!(error["error"]["message"].as_str().unwrap().contains(says), "{error}");
    }
    for (path, body) in [
        ("/v1/messages", message("truncated", "x", true)),
        ("/v1/responses", json!({"model": "truncated", "input": "x", "stream": true})),
    ] {
        let reply = server.post(path, &body).await;
        let events = events(&reply.body);
        let (name, data) = events.last().unwrap();
        assert_eq!((reply.status, name.as_str(), &data["type"]), (200, "error", &json!("error")), "{path}: {data}");
        let id = reply.header("x-ashlar-response-id").unwrap();
        assert_eq!(server.store.response(id).await.unwrap().unwrap().settlement.unwrap().finish, "error");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_are_the_same_streamed_and_whole() {
    let mock = Mock::start().await;
    let server = server(&mock).await;
    for model in [MODEL, "good", "tools"] {
        let ask = |stream: bool| json!({"model": model, "input": "good morning", "stream": stream});
        let reply = server.post("/v1/responses", &ask(false)).await;
        let mut whole = reply.json();
        // What comes can be sent back, thoughts and calls among it.
        let mut turns = vec![json!({"role": "user", "content": "good morning"})];
        turns.extend(whole["output"].as_array().unwrap().iter().cloned());
        turns.push(json!({"role": "user", "content": "go on"}));
        let next = server.post("/v1/responses", &json!({"model": model, "input": turns})).await;
        assert_eq!(next.status, 200, "{next:?}");
        if model == "tools" {
            let sent = mock.last().body["messages"].clone();
            let roles: Vec<&str> = sent.as_array().unwrap().iter().map(|t| t["role"].as_str().unwrap()).collect();
            assert_eq!(roles, ["user", "assistant", "user"], "what is said and called at once is one turn: {sent}");
        }
        // The mock thinks in whole answers alone.
        whole["output"].as_array_mut().unwrap().retain(|o| o["type"] != "reasoning");
        assert_eq!((reply.status, &whole["status"]), (200, &json!("completed")), "{reply:?}");
        let text = &whole["output"][0]["content"][0];
        let wanted = match model {
            MODEL => "You said: good morning Grüße 🧱".to_owned(),
            "tools" => "Let me see.".to_owned(),
            _ => TOKENS.concat(),
        };
        assert_eq!((&text["type"], &text["text"]), (&json!("output_text"), &json!(wanted)));
        if model == "tools" {
            let call = &whole["output"][1];
            assert_eq!((&call["type"], &call["name"], &call["arguments"]), (&json!("function_call"), &json!("weather"), &json!("{\"city\": \"Köln\"}")));
        }
        let streamed = server.post("/v1/responses", &ask(true)).await;
        let events = events(&streamed.body);
        let numbers: Vec<u64> = events.iter().map(|(_, d)| d["sequence_number"].as_u64().unwrap()).collect();
        assert_eq!(numbers, (0..numbers.len() as u64).collect::<Vec<_>>());
        let of = |name: &str| events.iter().filter(|(n, _)| n == name).map(|(_, d)| d).collect::<Vec<_>>();
        let deltas: String = of("response.output_text.delta").iter().filter_map(|d| d["delta"].as_str()).collect();
        assert_eq!(deltas, wanted);
        let (name, last) = events.last().unwrap();
        let mut same = last["response"].clone();
        for (i, item) in whole["output"].as_array().unwrap().iter().enumerate() {
            same["output"][i]["id"] = item["id"].clone();
        }
        (same["id"], same["created_at"]) = (whole["id"].clone(), whole["created_at"].clone());
        assert_eq!((name.as_str(), &same), ("response.completed", &whole), "{model}");
    }
    let cut = server.post("/v1/responses", &json!({"model": "good", "input": "x", "previous_response_id": "resp_1"})).await;
    assert_eq!((cut.status, cut.json()["error"]["param"].as_str()), (400, Some("previous_response_id")));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_come_as_numbers_and_as_bytes() {
    let mock = Mock::start().await;
    let server = server(&mock).await;
    let path = "/v1/embeddings";
    let reply = server.post(path, &json!({"model": "tiny-embed", "input": ["one two", "three"]})).await;
    let body = reply.json();
    assert_eq!((reply.status, &body["usage"]), (200, &json!({"prompt_tokens": 3, "total_tokens": 3})), "{reply:?}");
    let row = |v: &Value| v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect::<Vec<f32>>();
    assert_eq!(row(&body["data"][0]["embedding"]), vector("one two"));
    assert_eq!((row(&body["data"][1]["embedding"]), &body["data"][1]["index"]), (vector("three"), &json!(1)));
    let packed = server.post(path, &json!({"model": "tiny-embed", "input": "three", "encoding_format": "base64"})).await.json();
    let bytes = base64::engine::general_purpose::STANDARD.decode(packed["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let floats: Vec<f32> = bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    assert_eq!(floats, vector("three"));
    let id = reply.header("x-ashlar-response-id").unwrap();
    let row = server.store.response(id).await.unwrap().unwrap();
    let settled = row.settlement.unwrap();
    assert_eq!((row.admission.endpoint.as_str(), settled.prompt_tokens, settled.completion_tokens), (path, 3, 0));
    for (body, param, says) in [
        (json!({"model": "tiny-embed", "input": "a b c d e f g h i"}), "input", "9 tokens, tiny-embed takes 8"),
        (json!({"model": "tiny-embed", "input": []}), "input", "between 1 and 2048"),
        (json!({"model": "tiny-embed", "input": [[1, 2]]}), "input", "send text"),
        (json!({"model": "tiny-embed", "input": "x", "dimensions": 2}), "dimensions", "truncatable"),
        (json!({"model": "tiny-embed", "input": "x", "dimensions": 5}), "dimensions", "between 1 and 4"),
        (json!({"model": "tiny-embed", "input": "x", "stream": true}), "stream", "at once"),
        (json!({"model": "tiny-embed", "input": "x", "user_id": "y"}), "user_id", "unknown field"),
        (json!({"model": MODEL, "input": "x"}), "model", "does not answer /v1/embeddings"),
    ] {
        let reply = server.post(path, &body).await;
        let error = &reply.json()["error"];
        assert_eq!((reply.status, error["param"].as_str()), (400, Some(param)), "{reply:?}");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
    let failed = server.post(path, &json!({"model": "tiny-embed", "input": "fall over"})).await;
    assert_eq!(failed.status, 500, "{failed:?}");
    let chat = server.post("/v1/chat/completions", &json!({"model": "tiny-embed", "messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!(chat.status, 400, "{chat:?}");
    let ranked = server.post("/v1/rerank", &json!({"model": "tiny-embed", "query": "aa", "documents": ["bb", "aa"], "top_n": 1})).await.json();
    assert_eq!((&ranked["results"][0]["index"], ranked["results"].as_array().unwrap().len()), (&json!(1), 1), "{ranked}");

    // The same through a server over HTTP.
    let far = server.post(path, &json!({"model": "good", "input": "hi", "encoding_format": "float"})).await.json();
    assert_eq!((&far["data"][0]["embedding"], &far["model"]), (&json!([0.5, -0.5]), &json!("good")));
    assert_eq!((mock.last().path.as_str(), &mock.last().body["input"]), ("/v1/embeddings", &json!("hi")));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_asked_of_the_server_that_has_the_model() {
    let mock = Mock::start().await;
    let server = server(&mock).await;
    let got = server.post("/v1/tokenize", &json!({"model": "good", "prompt": "hi there"})).await;
    assert_eq!((got.status, &got.json()["tokens"]), (200, &json!([7, 8])), "{got:?}");
    assert_eq!(mock.last().path, "/tokenize", "vLLM has it at the root");
    let got = server.post("/v1/detokenize", &json!({"model": "good", "tokens": [7, 8]})).await;
    assert_eq!(got.json()["prompt"], "hi there");
    let got = server.post("/v1/tokenize", &json!({"model": "good", "messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!(got.status, 200, "{got:?}");
    let id = got.header("x-ashlar-response-id").unwrap();
    let settled = server.store.response(id).await.unwrap().unwrap().settlement.unwrap();
    assert_eq!((settled.finish.as_str(), settled.completion_tokens), ("stop", 0));
    assert_eq!(server.post("/v1/tokenize", &json!({"model": "good"})).await.status, 400);
    server.stop().await;
}

/// Every endpoint is recorded, and described: the document has what the router
/// has, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn every_endpoint_is_recorded_and_described() {
    let mock = Mock::start().await;
    let server = server(&mock).await;
    let document = server.get("/openapi.json").await.json();
    let paths = document["paths"].as_object().unwrap();
    let mut posts = 0;
    for (path, item) in paths {
        let known = path.replace("{id}", MODEL);
        if item.get("get").is_some() {
            assert_eq!(server.get(&known).await.status, 200, "{path}");
            continue;
        }
        posts += 1;
        let required = item["post"]["requestBody"]["content"]["application/json"]["schema"]["required"].as_array().unwrap();
        let streams = item["post"]["responses"]["200"]["content"].get("text/event-stream").is_some();
        for stream in [false, true] {
            let mut body = json!({"model": "good", "stream": stream, "prompt": "x", "max_tokens": 5});
            for name in required.iter().map(|n| n.as_str().unwrap()) {
                body[name] = match name {
                    "messages" => json!([{"role": "user", "content": "x"}]),
                    "documents" => json!(["x"]),
                    "tokens" => json!([1]),
                    "model" | "max_tokens" => body[name].clone(),
                    _ => json!("x"),
                };
            }
            let takes = |name: &str| item["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"].get(name).is_some();
            for name in ["prompt", "max_tokens"] {
                if !takes(name) || path.ends_with("chat/completions") {
                    body.as_object_mut().unwrap().remove(name);
                }
            }
            if !stream && !streams {
                body.as_object_mut().unwrap().remove("stream");
            }
            if path.ends_with("/moderations") {
                // The guard's own: no model of ours answers, so there is nothing to record.
                assert_eq!(server.post(path, &json!({"input": "x"})).await.status, 200);
                continue;
            }
            let reply = server.post(path, &body).await;
            assert_eq!(reply.status, if stream && !streams { 400 } else { 200 }, "{path} {body}: {reply:?}");
            if reply.status == 200 {
                let id = reply.header("x-ashlar-response-id").unwrap();
                let row = server.store.response(id).await.unwrap().unwrap();
                assert_eq!((row.admission.endpoint.as_str(), row.admission.stream), (path.as_str(), stream));
                assert!(row.settlement.is_some(), "{path}");
            }
        }
    }
    assert_eq!(posts, 9);
    let none = server.post("/v1/no-such", &json!({})).await;
    assert!(none.status == 404 && none.body.contains("/openapi.json"), "{none:?}");
    server.stop().await;
}

/// With `openai` and `anthropic` of `ASHLAR_PEERS_PYTHON`.
#[tokio::test(flavor = "multi_thread")]
async fn the_official_clients_are_content() {
    let python = std::env::var("ASHLAR_PEERS_PYTHON").unwrap_or_else(|_| "python3".into());
    let probe = Command::new(&python).args(["-c", "import openai, anthropic"]).output().await;
    if !probe.is_ok_and(|o| o.status.success()) {
        return skip("a Python with openai and anthropic");
    }
    let mock = Mock::start().await;
    let server = server(&mock).await;
    let output = Command::new(&python)
        .args([&script("protocols.py"), &format!("http://{}", server.at), MODEL, "tools", "tiny-embed"])
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    server.stop().await;
}
