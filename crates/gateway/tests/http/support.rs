//! A scripted backend, a home with lineage, and a client over plain sockets.

use ashlar_api::{
    ApiError, Backend, BackendStats, ChatRequest, CompletionRequest, Event, EventStream, Finish,
    ModelInfo, Prompt, Score, Timings, Usage,
};
use ashlar_core::{ArtifactKind, Digest};
use ashlar_gateway::{Config, GatewayConfig, GatewayState, Served};
use ashlar_store::{Exposure, Observation, PriceList, Release, ResponseRow, Stage, Store};
use base64::Engine as _;
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

pub(crate) const MODEL: &str = "fake-1";
pub(crate) const CONTEXT: u32 = 64;
pub(crate) const XSS: &str = "<script>alert('x')</script><img src=x onerror=alert(1)>&\"";

/// The mock's models are named after what they do.
pub(crate) const PRICES: &str = r#"
    version = "t1"
    currency = "USD"
    [[price]]
    model = "fake-1"
    input = "1000"
    cache_read = "500"
    output = "2000"
    [[price]]
    model = "*"
    input = "1"
    cache_read = "0.5"
    output = "2"
    [[price]]
    model = "unpriced"
    input = "1"
"#;

/// Answers by the last word of the prompt; see `script`.
#[derive(Default)]
pub(crate) struct Fake {
    /// Streams that were dropped before their end.
    pub(crate) dropped: Arc<AtomicUsize>,
}

struct OnDrop(Arc<AtomicUsize>, bool);

impl Drop for OnDrop {
    fn drop(&mut self) {
        if !self.1 {
            self.0.fetch_add(1, SeqCst);
        }
    }
}

impl Fake {
    fn run(&self, prompt: &str) -> Result<EventStream, ApiError> {
        let words = u32::try_from(prompt.split_whitespace().count()).unwrap();
        if words > CONTEXT {
            return Err(ApiError::bad_request(
                format!("the prompt has {words} tokens, the context holds {CONTEXT}"),
                Some("messages"),
                Some("context_length_exceeded"),
            ));
        }
        let (text, ending): (String, &str) = match prompt {
            "slow" | "die" | "hang" | "cut" => ("one two three ".into(), prompt),
            "refuse" => ("I’m sorry, but I can’t help with that.".into(), "stop"),
            other => (format!("You said: {other} Grüße 🧱"), "stop"),
        };
        let ending = ending.to_owned();
        // Two characters a token, with a token without text in between.
        let chars: Vec<char> = text.chars().collect();
        let mut pieces: Vec<String> = chars.chunks(2).map(|c| c.iter().collect()).collect();
        pieces.insert(1, String::new());
        let mut guard = OnDrop(self.dropped.clone(), false);
        let total = u32::try_from(pieces.len()).unwrap();
        Ok(Box::pin(futures::stream::unfold(0, move |at| {
            // Capture the guard whole, not its field alone.
            let guard = &mut guard;
            let piece = (at > 0).then(|| pieces.get(at - 1).cloned()).flatten();
            let over = at > pieces.len() + 1;
            let done = at == pieces.len() + 1;
            if (done && ending == "stop") || over {
                guard.1 = true;
            }
            let ending = ending.clone();
            async move {
                let token = |text: &str| Event::Token { text: text.into(), id: 7, logprob: None };
                let event = match piece {
                    _ if at == 0 => Ok(Event::Started { prompt_tokens: words, cached_tokens: 1 }),
                    Some(text) => Ok(token(&text)),
                    None => match ending.as_str() {
                        "slow" => {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                            return Some((Ok(token("and on ")), at));
                        }
                        "hang" => std::future::pending().await,
                        _ if over => return None,
                        "die" => Err(ApiError::internal("the engine fell over")),
                        "cut" => return None,
                        _ => Ok(Event::Done {
                            finish: Finish::Stop,
                            usage: Usage::new(words, 1, total),
                            timings: Timings { queue_ms: 1.5, prefill_ms: 2.0, decode_ms: 3.0 },
                        }),
                    },
                };
                Some((event, at + 1))
            }
        })))
    }
}

#[async_trait::async_trait]
impl Backend for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn models(&self) -> Vec<ModelInfo> {
        vec![ModelInfo { id: MODEL.into(), created: 1, owned_by: "test".into(), context: CONTEXT }]
    }

    async fn chat(&self, request: ChatRequest) -> Result<EventStream, ApiError> {
        assert_eq!(request.model, MODEL, "aliases are resolved before the backend");
        assert!(request.seed.is_some(), "the gateway fixes the seed");
        self.run(&request.messages.last().unwrap().content)
    }

    async fn complete(&self, request: CompletionRequest) -> Result<EventStream, ApiError> {
        match &request.prompt {
            Prompt::Text(text) => self.run(text),
            Prompt::Tokens(_) => Err(ApiError::bad_request("text only", Some("prompt"), None)),
        }
    }

    async fn score(&self, _: &str, _: &str) -> Result<Score, ApiError> {
        Err(ApiError::unavailable("no scores here"))
    }

    fn stats(&self) -> BackendStats {
        BackendStats { running: 1, waiting: 2, blocks_used: 3, blocks_total: 8, ..Default::default() }
    }
}

/// A server on a home of its own, stopped on `stop`.
pub(crate) struct Server {
    pub(crate) at: SocketAddr,
    pub(crate) store: Store,
    pub(crate) release: String,
    pub(crate) dropped: Arc<AtomicUsize>,
    stop: Mutex<Option<oneshot::Sender<()>>>,
    task: JoinHandle<std::io::Result<()>>,
    _home: tempfile::TempDir,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(set: impl FnOnce(&mut GatewayConfig)) -> Self {
        Self::of(|state| set(&mut state.config)).await
    }

    /// With servers behind it, besides the scripted backend.
    pub(crate) async fn routed(toml: &str) -> Self {
        Self::of(|state| state.routing = Config::parse(toml).unwrap()).await
    }

    /// With a configuration file that is read again when it changes.
    pub(crate) async fn reloading(path: &Path) -> Self {
        Self::of(|state| {
            state.routing = Config::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
            state.routing_file = Some(path.to_owned());
        })
        .await
    }

    pub(crate) async fn of(set: impl FnOnce(&mut GatewayState)) -> Self {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).await.unwrap();
        let release = lineage(&store).await;
        let fake = Fake::default();
        let dropped = fake.dropped.clone();
        let mut state = GatewayState::new(vec![Arc::new(fake)], store.clone());
        state.releases.push(Served { id: release.clone(), channel: "main".into(), model: MODEL.into() });
        state.aliases.insert("best".into(), MODEL.into());
        state.prices = Some(Arc::new(PriceList::parse(PRICES).unwrap()));
        state.config.grace = Duration::from_millis(200);
        state.rank = Some(Arc::new(|row: &ResponseRow| {
            let answer = row.settlement.as_ref().and_then(|s| s.answer.clone()).unwrap_or_default();
            if answer.is_empty() { vec![] } else { vec![("doc-14".into(), answer)] }
        }));
        set(&mut state);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(ashlar_gateway::serve(listener, state, async {
            let _ = stopped.await;
        }));
        Self { at, store, release, dropped, stop: Mutex::new(Some(stop)), task, _home: home }
    }

    /// Tells it to stop, and does not wait.
    pub(crate) fn tell_to_stop(&self) {
        if let Some(stop) = self.stop.lock().unwrap().take() {
            stop.send(()).unwrap();
        }
    }

    pub(crate) async fn stop(self) -> Store {
        self.tell_to_stop();
        tokio::time::timeout(Duration::from_secs(10), self.task).await.unwrap().unwrap().unwrap();
        self.store
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"").await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        let kind = [("content-type", "application/json")];
        self.send("POST", path, &kind, body.to_string().as_bytes()).await
    }

    /// A request with a key.
    pub(crate) async fn post_as(&self, secret: &str, path: &str, body: &Value) -> Reply {
        let bearer = format!("Bearer {secret}");
        let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
        self.send("POST", path, &headers, body.to_string().as_bytes()).await
    }

    pub(crate) async fn get_as(&self, secret: &str, path: &str) -> Reply {
        self.send("GET", path, &[("authorization", &format!("Bearer {secret}"))], b"").await
    }

    pub(crate) async fn chat(&self, prompt: &str, stream: bool) -> Reply {
        self.post("/v1/chat/completions", &chat_body(prompt, stream)).await
    }

    pub(crate) async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut socket = self.open(method, path, headers, body).await;
        let mut bytes = Vec::new();
        socket.read_to_end(&mut bytes).await.unwrap();
        Reply::parse(&bytes)
    }

    /// Sends a request and leaves its answer on the socket.
    pub(crate) async fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        if !headers.iter().any(|(k, _)| *k == "host") {
            head += &format!("host: {}\r\n", self.at);
        }
        if !headers.iter().any(|(k, _)| *k == "content-length") {
            head += &format!("content-length: {}\r\n", body.len());
        }
        for (k, v) in headers {
            head += &format!("{k}: {v}\r\n");
        }
        let mut socket = TcpStream::connect(self.at).await.unwrap();
        socket.write_all((head + "\r\n").as_bytes()).await.unwrap();
        socket.write_all(body).await.unwrap();
        socket
    }

    /// Waits until the newest response is settled.
    pub(crate) async fn settled(&self) -> ResponseRow {
        for _ in 0..500 {
            if let Some(row) = self.store.responses(1).await.unwrap().pop() {
                if row.settlement.is_some() {
                    return row;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no settled response after 5 s");
    }
}

pub(crate) fn chat_body(prompt: &str, stream: bool) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": stream})
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let split = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("a whole head");
        let head = std::str::from_utf8(&bytes[..split]).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: Vec<(String, String)> = lines
            .map(|l| l.split_once(": ").unwrap())
            .map(|(k, v)| (k.to_lowercase(), v.to_owned()))
            .collect();
        let mut body = bytes[split + 4..].to_vec();
        if headers.iter().any(|(k, v)| k == "transfer-encoding" && v == "chunked") {
            body = dechunk(&body);
        }
        Self { status, headers, body: String::from_utf8(body).unwrap() }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The server-sent events' data.
    pub(crate) fn events(&self) -> Vec<String> {
        assert!(self.body.ends_with("\n\n"), "{:?}", self.body);
        self.body
            .trim_end()
            .split("\n\n")
            .map(|e| e.strip_prefix("data: ").expect("one data line").to_owned())
            .collect()
    }
}

fn dechunk(mut rest: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(line) = rest.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        out.extend_from_slice(&rest[line + 2..line + 2 + size]);
        rest = &rest[line + 2 + size + 2..];
        if size == 0 {
            break;
        }
    }
    out
}

/// Fifteen documents → snapshot → adapter → model → release.
async fn lineage(store: &Store) -> String {
    let docs: Vec<Digest> = (0..15).map(|i| Digest::of(format!("doc {i}").as_bytes())).collect();
    let observations: Vec<Observation> = docs
        .iter()
        .enumerate()
        .map(|(i, doc)| Observation {
            doc: *doc,
            source: "handbook.jsonl".into(),
            id: format!("doc-{i}"),
            title: if i == 0 { XSS.into() } else { format!("Chapter {i}: how we keep the kiln warm in winter") },
            licence: Some("CC-BY-4.0".into()),
            consent: "granted".into(),
            lang: Some("en".into()),
        })
        .collect();
    store.observe(&observations).await.unwrap();
    let exposures: Vec<Exposure> = docs.iter().map(|d| Exposure { doc: *d, samples: 2 }).collect();
    let snapshot = made(store, "curate", &[], ArtifactKind::Snapshot, &exposures, json!({})).await;
    let losses: Vec<f32> = (0..60).map(|i| 3.0 * (-(i as f32) / 14.0).exp() + 0.1 * ((i * 7) % 5) as f32 / 5.0).collect();
    let summary = json!({"losses": losses});
    let adapter = made(store, "train", &[("snapshot", snapshot)], ArtifactKind::Adapter, &[], summary).await;
    let model = made(store, "merge", &[("adapter", adapter)], ArtifactKind::Model, &[], json!({})).await;
    let statement = json!({"predicate": {"checks": [
        {"name": "signature", "passed": true, "detail": "ecdsa-p256, key 3f9a"},
        {"name": "evaluation", "passed": true, "detail": "held-out 92 % against 4 % of the base, p < 0.001"},
        {"name": "licence", "passed": true, "detail": "CC-BY-4.0, Apache-2.0"},
        {"name": "takedowns", "passed": true, "detail": "none open"},
    ]}});
    // Releases carry their statement in a signed envelope.
    let payload = base64::engine::general_purpose::STANDARD.encode(statement.to_string());
    let statement = json!({"payload": payload, "payloadType": "application/vnd.in-toto+json", "signatures": []});
    let statement = store
        .put_bytes(ArtifactKind::Report, "gate", statement.to_string().as_bytes())
        .await
        .unwrap();
    let mut release = Release::new(model, statement);
    release.adapter = Some(adapter);
    release.snapshot = Some(snapshot);
    store.release("main", &release).await.unwrap()
}

async fn made(
    store: &Store,
    name: &str,
    inputs: &[(&str, Digest)],
    kind: ArtifactKind,
    exposures: &[Exposure],
    summary: Value,
) -> Digest {
    let Stage::Run(mut run) = store.stage(name, &(), inputs, "1").await.unwrap() else {
        panic!("a new home reuses nothing");
    };
    let bytes = format!("bytes of {name}");
    let digest = run.output_bytes(kind.as_str(), kind, kind.as_str(), bytes.as_bytes()).await.unwrap();
    if !exposures.is_empty() {
        run.exposed(digest, exposures).await.unwrap();
    }
    run.finish(summary).await.unwrap();
    digest
}
