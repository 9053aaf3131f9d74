//! An upstream that does what the model it is asked for is called, over plain
//! sockets, so that it can do what no HTTP library would let it.

use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
};

/// A request the mock got.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Value,
}

/// What is known of a mock, and what it can be told.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) seen: Mutex<Vec<Seen>>,
    /// Answers that could not be sent to their end: the other side had gone.
    pub(crate) abandoned: AtomicUsize,
    /// Connections taken.
    pub(crate) connections: AtomicUsize,
    /// Probes are answered with 503, and so is `flaky`.
    pub(crate) down: AtomicBool,
    /// Requests of the model `once`.
    pub(crate) once: AtomicUsize,
}

pub(crate) struct Mock {
    pub(crate) at: SocketAddr,
    pub(crate) state: Arc<State>,
}

/// Text of a good answer, one piece a token.
pub(crate) const TOKENS: [&str; 4] = ["Grüße", " from", " the", " mock"];

impl Mock {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (at, state) = (listener.local_addr().unwrap(), Arc::new(State::default()));
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                shared.connections.fetch_add(1, SeqCst);
                socket.set_nodelay(true).unwrap();
                tokio::spawn(converse(socket, shared.clone()));
            }
        });
        Self { at, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1", self.at)
    }

    /// The last request that was no probe.
    pub(crate) fn last(&self) -> Seen {
        self.state.seen.lock().unwrap().last().unwrap().clone()
    }

    pub(crate) fn asked(&self) -> usize {
        self.state.seen.lock().unwrap().len()
    }
}

pub(crate) async fn converse(mut socket: impl AsyncRead + AsyncWrite + Unpin, state: Arc<State>) {
    let mut buffer = Vec::new();
    loop {
        let Some(request) = read(&mut socket, &mut buffer).await else { return };
        if request.path.ends_with("/health") || request.path.ends_with("/models") {
            let status = if state.down.load(SeqCst) { "503 Service Unavailable" } else { "200 OK" };
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\nok");
            if socket.write_all(head.as_bytes()).await.is_err() {
                return;
            }
            continue;
        }
        state.seen.lock().unwrap().push(request.clone());
        match answer(&mut socket, &request, &state).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => {
                state.abandoned.fetch_add(1, SeqCst);
                return;
            }
        }
    }
}

async fn read(socket: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<Seen> {
    loop {
        if let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8(buffer[..end].to_vec()).unwrap();
            let mut lines = head.split("\r\n");
            let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
            let headers: Vec<(String, String)> =
                lines.map(|l| l.split_once(": ").unwrap()).map(|(k, v)| (k.to_lowercase(), v.to_owned())).collect();
            let length = headers.iter().find(|(k, _)| k == "content-length").map_or(0, |(_, v)| v.parse().unwrap());
            if buffer.len() >= end + 4 + length {
                let body = serde_json::from_slice(&buffer[end + 4..end + 4 + length]).unwrap_or_default();
                buffer.drain(..end + 4 + length);
                return Some(Seen { path, headers, body });
            }
        }
        let mut some = [0; 16 << 10];
        match socket.read(&mut some).await {
            Ok(0) | Err(_) => return None,
            Ok(n) => buffer.extend_from_slice(&some[..n]),
        }
    }
}

pub(crate) fn usage() -> Value {
    json!({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 5}})
}

fn whole(usage: Option<Value>) -> String {
    let mut body = json!({
        "id": "theirs", "object": "chat.completion", "created": 5, "model": "their-name",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": TOKENS.concat(), "reasoning_content": "hm"},
            "logprobs": {"content": [1]}, "finish_reason": "stop"}],
        "system_fingerprint": "fp",
    });
    if let Some(usage) = usage {
        body["usage"] = usage;
    }
    body.to_string()
}

fn json(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
}

fn chunk(delta: Value, finish: Option<&str>) -> Value {
    json!({"id": "theirs", "object": "chat.completion.chunk", "created": 5, "model": "their-name",
        "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}], "odd": {"kept": true}})
}

fn event(data: &str) -> String {
    let frame = format!("data: {data}\n\n");
    format!("{:x}\r\n{frame}\r\n", frame.len())
}

const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// Answers by the model's name; whether the connection may go on.
async fn answer(socket: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &Seen, state: &State) -> std::io::Result<bool> {
    let model = request.body["model"].as_str().unwrap_or_default().to_owned();
    let stream = request.body["stream"] == true;
    macro_rules! send {
        ($($text:expr),*) => {{ $( socket.write_all($text.as_bytes()).await?; )* socket.flush().await?; }};
    }
    let pause = |ms| tokio::time::sleep(Duration::from_millis(ms));
    // Beside chat, whatever the model is but one that breaks.
    let beside = match request.path.rsplit('/').next() {
        Some("embeddings") => Some(json!({"object": "list", "model": "theirs", "usage": {"prompt_tokens": 2, "total_tokens": 2},
            "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]})),
        Some("rerank") => Some(json!({"id": "theirs", "model": "theirs", "usage": {"total_tokens": 4},
            "results": [{"index": 0, "relevance_score": 0.5}]})),
        Some("tokenize") => Some(json!({"count": 2, "max_model_len": 64, "tokens": [7, 8]})),
        Some("detokenize") => Some(json!({"prompt": "hi there"})),
        _ => None,
    };
    if let Some(body) = beside {
        send!(json("200 OK", "", &body.to_string()));
        return Ok(true);
    }
    match model.as_str() {
        "tools" => return tools(socket, stream).await,
        "500" => send!(json("500 Internal Server Error", "", r#"{"error":{"message":"it fell over","type":"x","code":500}}"#)),
        "401" => send!(json("401 Unauthorized", "", r#"{"error":{"message":"the key sk-very-secret is wrong"}}"#)),
        "400" => send!(json("400 Bad Request", "", r#"{"error":{"message":"top_p is odd","type":"invalid_request_error","param":"top_p","code":"odd"}}"#)),
        "429" => send!(json("429 Too Many Requests", "retry-after: 7\r\n", r#"{"error":"slow down","error_type":"overloaded"}"#)),
        "flaky" if state.down.load(SeqCst) => send!(json("503 Service Unavailable", "", "{}")),
        "once" if state.once.fetch_add(1, SeqCst) == 0 => send!(json("503 Service Unavailable", "Retry-After: 1\r\n", "{}")),
        "slow-head" => {
            pause(3000).await;
            send!(json("200 OK", "", &whole(Some(usage()))));
        }
        "late" => {
            pause(400).await;
            return good(socket, stream, Some(usage())).await;
        }
        "tools" => send!(json("200 OK", "", &whole(Some(usage())).replace("\"stop\"", "\"tool_calls\""))),
        "no-json" => send!(json("200 OK", "", "<html>gateway down</html>")),
        "error-200" => send!(json("200 OK", "", r#"{"error":{"message":"too long","code":400,"type":"invalid_request_error"}}"#)),
        "wrong-usage" => return good(socket, stream, Some(json!({"prompt_tokens": -1, "completion_tokens": "many"}))).await,
        "no-usage" => return good(socket, stream, None).await,
        // From here on a stream breaks after two tokens, a whole answer in its middle.
        "truncated" | "reset" | "stall" | "bad-event" | "error-event" | "endless" | "huge-line" | "drip" => {
            let (head, body) = if stream {
                let mut body = event(&chunk(json!({"role": "assistant", "content": ""}), None).to_string());
                for token in &TOKENS[..2] {
                    body += &event(&chunk(json!({"content": token}), None).to_string());
                }
                (STREAM.to_owned(), body)
            } else {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
                (head.to_owned(), "a\r\n{\"id\": \"x\"\r\n".to_owned())
            };
            send!(head, body);
            pause(20).await;
            match model.as_str() {
                "truncated" => send!("0\r\n\r\n"),
                "reset" => {}
                "stall" => pause(3000).await,
                "bad-event" => {
                    send!(event("{\"choices\": [{\"delta\": }]}"));
                    pause(200).await;
                }
                "error-event" => send!(event(r#"{"error":{"message":"out of memory","type":"x","code":507}}"#)),
                "endless" => loop {
                    send!(event(&chunk(json!({"content": "x".repeat(1000)}), None).to_string()));
                },
                "huge-line" => {
                    let piece = format!("400\r\n{}\r\n", "y".repeat(1024));
                    send!("6\r\ndata: \r\n");
                    loop {
                        send!(piece);
                    }
                }
                // One token now and then, until the other side goes.
                _ => loop {
                    send!(event(&chunk(json!({"content": "."}), None).to_string()));
                    let mut one = [0; 1];
                    if let Ok(Ok(0) | Err(_)) = tokio::time::timeout(Duration::from_millis(30), socket.read(&mut one)).await {
                        return Err(std::io::ErrorKind::ConnectionReset.into());
                    }
                },
            }
            return Ok(false);
        }
        "silent" => {
            // Headers, then nothing until the other side goes.
            send!(STREAM);
            let mut one = [0; 1];
            let _ = socket.read(&mut one).await;
            return Err(std::io::ErrorKind::ConnectionReset.into());
        }
        "claude" => return claude(socket, stream).await,
        "leak" => return leak(socket, request, stream).await,
        "judge" => {
            let bad = request.body["messages"].to_string().contains("bad");
            let text = if bad { "\n\nunsafe\nS1,S10" } else { "\n\nsafe" };
            let body = json!({"object": "chat.completion", "choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}], "usage": usage()});
            send!(json("200 OK", "", &body.to_string()));
        }
        _ => return good(socket, stream, Some(usage())).await,
    }
    Ok(true)
}

async fn good(socket: &mut (impl AsyncWrite + Unpin), stream: bool, usage: Option<Value>) -> std::io::Result<bool> {
    if !stream {
        socket.write_all(json("200 OK", "", &whole(usage)).as_bytes()).await?;
        return Ok(true);
    }
    let mut body = event(&chunk(json!({"role": "assistant", "content": ""}), None).to_string());
    for token in TOKENS {
        body += &event(&chunk(json!({"content": token}), None).to_string());
    }
    body += &event(&chunk(json!({}), Some("stop")).to_string());
    if let Some(usage) = usage {
        let mut last = chunk(json!({}), None);
        (last["choices"], last["usage"]) = (json!([]), usage);
        body += &event(&last.to_string());
    }
    body += &event("[DONE]");
    // In pieces that fit no event.
    socket.write_all(STREAM.as_bytes()).await?;
    for piece in (body + "0\r\n\r\n").as_bytes().chunks(37) {
        socket.write_all(piece).await?;
    }
    Ok(true)
}

/// Says a secret and an address, or greets whoever is `echo`ed, and cuts its bytes
/// where the prompt says `cut N`.
async fn leak(socket: &mut (impl AsyncWrite + Unpin), request: &Seen, stream: bool) -> std::io::Result<bool> {
    let prompt = request.body["prompt"].as_str().or(request.body["messages"][0]["content"].as_str()).unwrap_or("");
    let cut: usize = prompt.strip_prefix("cut ").and_then(|n| n.parse().ok()).unwrap_or(0);
    let tokens: &[&str] = match prompt.starts_with("echo") {
        true => &["Dear <EM", "AIL_1", ">, <EMAIL", "_2>!"],
        false => &["The key ", "is AKIAIOSF", "ODNN7EX", "AMPLE for anna@exa", "mple.org, Gr", "üße"],
    };
    let chat = request.path.ends_with("/chat/completions");
    let choice = |text: &str, finish: Option<&str>| match (chat, stream) {
        (true, true) => json!([{"index": 0, "delta": {"content": text}, "finish_reason": finish}]),
        (true, false) => json!([{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]),
        _ => json!([{"index": 0, "text": text, "logprobs": null, "finish_reason": finish}]),
    };
    let (head, body) = if stream {
        let mut body: String = tokens.iter().map(|t| event(&json!({"object": "x", "choices": choice(t, None)}).to_string())).collect();
        body += &event(&json!({"object": "x", "choices": choice("", Some("stop"))}).to_string());
        body += &event(&json!({"object": "x", "choices": [], "usage": usage()}).to_string());
        (STREAM.to_owned(), body + &event("[DONE]") + "0\r\n\r\n")
    } else {
        let whole = json("200 OK", "", &json!({"object": "y", "choices": choice(&tokens.concat(), Some("stop")), "usage": usage()}).to_string());
        (String::new(), whole)
    };
    socket.write_all(head.as_bytes()).await?;
    let (first, second) = body.as_bytes().split_at(cut.min(body.len()));
    socket.write_all(first).await?;
    socket.flush().await?;
    if cut > 0 {
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    socket.write_all(second).await?;
    socket.flush().await?;
    Ok(true)
}

/// Some text, then a call of a tool, its arguments in pieces.
async fn tools(socket: &mut (impl AsyncWrite + Unpin), stream: bool) -> std::io::Result<bool> {
    let call = |arguments: &str| json!([{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]);
    if !stream {
        let message = json!({"role": "assistant", "content": "Let me see.", "tool_calls": call("{\"city\": \"Köln\"}")});
        let body = json!({"object": "chat.completion", "created": 5, "usage": usage(),
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]});
        socket.write_all(json("200 OK", "", &body.to_string()).as_bytes()).await?;
        return Ok(true);
    }
    let mut body = event(&chunk(json!({"role": "assistant", "content": "Let me"}), None).to_string());
    body += &event(&chunk(json!({"content": " see."}), None).to_string());
    body += &event(&chunk(json!({"tool_calls": call("")}), None).to_string());
    for piece in ["{\"city\": ", "\"Köln\"}"] {
        body += &event(&chunk(json!({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}), None).to_string());
    }
    body += &event(&chunk(json!({}), Some("tool_calls")).to_string());
    let mut last = chunk(json!({}), None);
    (last["choices"], last["usage"]) = (json!([]), usage());
    body += &event(&last.to_string());
    body += &event("[DONE]");
    socket.write_all((STREAM.to_owned() + &body + "0\r\n\r\n").as_bytes()).await?;
    Ok(true)
}

async fn claude(socket: &mut (impl AsyncWrite + Unpin), stream: bool) -> std::io::Result<bool> {
    if !stream {
        let body = json!({"content": [{"type": "text", "text": "bonjour"}], "stop_reason": "max_tokens",
            "usage": {"input_tokens": 3, "cache_read_input_tokens": 10, "output_tokens": 2}});
        socket.write_all(json("200 OK", "", &body.to_string()).as_bytes()).await?;
        return Ok(true);
    }
    let mut body = String::new();
    for (name, data) in [
        ("message_start", json!({"type": "message_start", "message": {"usage": {"input_tokens": 3, "cache_read_input_tokens": 10, "output_tokens": 1}}})),
        ("content_block_start", json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})),
        ("content_block_delta", json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "bon"}})),
        ("content_block_delta", json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "jour"}})),
        ("message_delta", json!({"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 2}})),
        ("message_stop", json!({"type": "message_stop"})),
    ] {
        let frame = format!("event: {name}\ndata: {data}\n\n");
        body += &format!("{:x}\r\n{frame}\r\n", frame.len());
    }
    socket.write_all((STREAM.to_owned() + &body + "0\r\n\r\n").as_bytes()).await?;
    Ok(true)
}
