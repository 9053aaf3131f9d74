//! What the gateway costs: the same canned answers fetched directly and through
//! it, in turns.
//!
//! `cargo run --release -p ashlar-gateway --example gateway_bench` starts a mock
//! upstream and a gateway as processes of their own and prints, for request
//! bodies of 1 KB, 100 KB and 1 MB, streamed and not: added p50 and p99 with one
//! client, and requests a second with sixteen. `soak N` sends N small requests,
//! prints the gateway's memory along the way, and fails when it goes on growing.
//!
//! The gateway has everything on that it has: a key with a team, limits of
//! requests, tokens and money, prices, ledger, metrics, decisions, a guard that
//! redacts personal data both ways. Its home is a temporary folder.

use ashlar_gateway::{Config, GatewayState};
use ashlar_store::{AccountSettings, Accounts, Database, KeySettings, Limit, PriceList, Store, TeamSettings};
use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
};

type Any = Box<dyn std::error::Error + Send + Sync>;

/// Tokens of a streamed answer.
const TOKENS: usize = 16;

fn main() -> Result<(), Any> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let runtime = |many: bool| {
        let mut b = if many { tokio::runtime::Builder::new_multi_thread() } else { tokio::runtime::Builder::new_current_thread() };
        b.enable_all().build()
    };
    match words.as_slice() {
        ["mock"] => runtime(false)?.block_on(mock()),
        ["gateway", upstream] => runtime(true)?.block_on(gateway(upstream)),
        ["soak", n] => runtime(false)?.block_on(soak(n.parse()?)),
        ["rate", seconds] => runtime(false)?.block_on(rate(seconds.parse()?)),
        [] => runtime(false)?.block_on(compare()),
        _ => Err("usage: gateway_bench [soak N | rate SECONDS]".into()),
    }
}

/// A process of this program, and the address and key it printed.
struct Peer {
    child: Child,
    at: Place,
}

/// Where to ask, and with which key.
#[derive(Clone, Copy)]
struct Place {
    at: SocketAddr,
    key: Option<&'static str>,
}

impl Peer {
    async fn start(args: &[&str]) -> Result<Self, Any> {
        let mut child = Command::new(std::env::current_exe()?).args(args).stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().ok_or("no stdout")?;
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).map(|_| line)
        });
        // A process starts a peer or two.
        let line: &'static str = Box::leak(line.await??.into_boxed_str());
        let (at, key) = line.trim().split_once(' ').map_or((line.trim(), None), |(at, key)| (at, Some(key)));
        Ok(Self { child, at: Place { at: at.parse()?, key } })
    }

    /// Resident memory in KiB.
    fn memory(&self) -> Result<u64, Any> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Canned answers: whole, or a stream when the body says so.
async fn mock() -> Result<(), Any> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    announce(&listener.local_addr()?.to_string());
    let usage = r#""usage":{"prompt_tokens":9,"completion_tokens":16,"total_tokens":25}"#;
    let whole = format!(
        r#"{{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"{}"}},"finish_reason":"stop"}}],{usage}}}"#,
        "word ".repeat(TOKENS)
    );
    let whole = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{whole}", whole.len());
    let mut stream = String::from("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n");
    let mut event = |data: &str| {
        let frame = format!("data: {data}\n\n");
        stream += &format!("{:x}\r\n{frame}\r\n", frame.len());
    };
    for _ in 0..TOKENS {
        event(r#"{"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}"#);
    }
    event(r#"{"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#);
    event(&format!(r#"{{"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[],{usage}}}"#));
    event("[DONE]");
    stream += "0\r\n\r\n";
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let (whole, stream) = (whole.clone(), stream.clone());
        tokio::spawn(async move {
            let mut socket = BufReader::with_capacity(64 << 10, socket);
            let mut body = Vec::new();
            loop {
                let mut length = 0;
                loop {
                    let mut line = String::new();
                    match socket.read_line(&mut line).await {
                        Ok(0) | Err(_) => return,
                        Ok(2) => break,
                        Ok(_) => {
                            let lower = line.to_ascii_lowercase();
                            if let Some(n) = lower.strip_prefix("content-length:") {
                                length = n.trim().parse().unwrap_or(0);
                            }
                        }
                    }
                }
                body.resize(length, 0);
                if socket.read_exact(&mut body).await.is_err() {
                    return;
                }
                let streamed = body.windows(13).take(64).any(|w| w == b"\"stream\":true");
                let answer = if streamed { &stream } else { &whole };
                if socket.get_mut().write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
    }
}

#[allow(clippy::print_stdout)]
fn announce(line: &str) {
    println!("{line}");
}

/// A key whose limits all count and none of which is reached.
async fn key(accounts: &Accounts) -> Result<String, Any> {
    let limits = |texts: &[&str]| texts.iter().map(|t| serde_json::from_str::<Limit>(t)).collect::<Result<Vec<_>, _>>();
    let team = TeamSettings {
        name: "bench".into(),
        limits: limits(&[r#"{"measure":"money","window":"month","amount":"1000000","currency":"USD"}"#])?,
        ..TeamSettings::default()
    };
    let key = KeySettings {
        name: "bench".into(),
        team: Some(accounts.create_team(&team).await?.id),
        limits: limits(&[
            r#"{"measure":"requests","window":"minute","amount":"1000000000"}"#,
            r#"{"measure":"tokens","window":"day","amount":"100000000000000"}"#,
        ])?,
        ..KeySettings::default()
    };
    Ok(accounts.create_key(&key).await?.1.reveal().to_owned())
}

async fn gateway(upstream: &str) -> Result<(), Any> {
    let home = tempfile::tempdir()?;
    let store = Store::open(home.path()).await?;
    let mut state = GatewayState::new(Vec::new(), store);
    state.routing = Config::parse(&format!(
        "[backends.mock]\nkind = \"vllm\"\nurl = \"http://{upstream}/v1\"\nprobe = \"\"\n[models.m]\ntargets = [{{ backend = \"mock\" }}]\n\
         [guard.policies.pii]\ncheck = \"pii\"\non = [\"request\", \"answer\"]\non_violation = \"redact\"\n"
    ))?;
    let accounts = Accounts::open(AccountSettings::new(Database::Sqlite(home.path().join("accounts.db")))).await?;
    let prices = "version = \"b\"\ncurrency = \"USD\"\n[[price]]\nmodel = \"m\"\ninput = \"0.15\"\noutput = \"0.6\"\n";
    state.prices = Some(Arc::new(PriceList::parse(prices)?));
    state.config.require_keys = true;
    let key = key(&accounts).await?;
    state.accounts = Some(accounts);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    announce(&format!("{} {key}", listener.local_addr()?));
    ashlar_gateway::serve(listener, state, std::future::pending()).await?;
    Ok(())
}

/// One connection that asks the same again and again.
struct Client {
    socket: TcpStream,
    request: Vec<u8>,
    buffer: Vec<u8>,
}

/// Seconds to the first byte of the answer's body, and to its end.
struct Took {
    first: f64,
    all: f64,
}

impl Client {
    async fn connect(at: Place, bytes: usize, stream: bool) -> Result<Self, Any> {
        let socket = TcpStream::connect(at.at).await?;
        socket.set_nodelay(true)?;
        let filler = "The kiln is warm and the stone is cut square. ".repeat(bytes / 46 + 1);
        let filler = filler.get(..bytes.saturating_sub(90)).ok_or("cut")?;
        let body = format!(r#"{{"stream":{stream},"model":"m","messages":[{{"role":"user","content":"{filler}"}}]}}"#);
        let key = at.key.map(|k| format!("authorization: Bearer {k}\r\n")).unwrap_or_default();
        let length = body.len();
        let head = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{key}content-type: application/json\r\ncontent-length: {length}\r\n\r\n");
        Ok(Self { socket, request: (head + &body).into_bytes(), buffer: vec![0; 64 << 10] })
    }

    async fn ask(&mut self) -> Result<Took, Any> {
        let began = Instant::now();
        self.socket.write_all(&self.request).await?;
        let (mut held, mut first, mut body) = (0, None, None);
        loop {
            let n = self.socket.read(self.buffer.get_mut(held..).ok_or("answer too long")?).await?;
            if n == 0 {
                return Err("the server closed".into());
            }
            held += n;
            let seen = &self.buffer[..held];
            if body.is_none()
                && let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n")
            {
                let head = std::str::from_utf8(&seen[..end])?.to_ascii_lowercase();
                if !head.starts_with("http/1.1 200") {
                    return Err(String::from_utf8_lossy(seen).into());
                }
                let length = head.lines().find_map(|l| l.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
                body = Some((end + 4, length));
            }
            let Some((start, length)) = body else { continue };
            if held > start {
                first.get_or_insert_with(|| began.elapsed().as_secs_f64());
            }
            let over = match length {
                Some(n) => held >= start + n,
                None => seen.ends_with(b"0\r\n\r\n"),
            };
            if over {
                return Ok(Took { first: first.unwrap_or(0.0), all: began.elapsed().as_secs_f64() });
            }
        }
    }
}

fn percentile(sorted: &[f64], p: f64) -> f64 {
    let at = ((sorted.len() - 1) as f64 * p).round() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// Requests a second and sorted times of `clients` asking for `time`.
async fn load(at: Place, bytes: usize, stream: bool, clients: usize, time: Duration) -> Result<(f64, Vec<f64>, Vec<f64>), Any> {
    let began = Instant::now();
    let tasks = (0..clients).map(|_| async move {
        let mut client = Client::connect(at, bytes, stream).await?;
        let mut times = Vec::new();
        while began.elapsed() < time {
            times.push(client.ask().await?);
        }
        Ok::<_, Any>(times)
    });
    let mut all = Vec::new();
    for times in futures::future::join_all(tasks).await {
        all.extend(times?);
    }
    let rate = all.len() as f64 / began.elapsed().as_secs_f64();
    let mut first: Vec<f64> = all.iter().map(|t| t.first).collect();
    let mut whole: Vec<f64> = all.iter().map(|t| t.all).collect();
    first.sort_by(f64::total_cmp);
    whole.sort_by(f64::total_cmp);
    Ok((rate, first, whole))
}

#[allow(clippy::print_stdout)]
async fn compare() -> Result<(), Any> {
    let mock = Peer::start(&["mock"]).await?;
    let gateway = Peer::start(&["gateway", &mock.at.at.to_string()]).await?;
    println!("body, kind: added p50 / p99 in ms with one client (first byte | whole); requests/s with 16, direct → through");
    for bytes in [1 << 10, 100 << 10, 1 << 20] {
        for stream in [false, true] {
            let short = Duration::from_millis(700);
            // In turns, so that a slow moment of the machine hits both.
            let mut times: [Vec<f64>; 4] = Default::default();
            for _ in 0..2 {
                for (i, at) in [mock.at, gateway.at].into_iter().enumerate() {
                    let (_, first, whole) = load(at, bytes, stream, 1, short).await?;
                    times[2 * i].extend(first);
                    times[2 * i + 1].extend(whole);
                }
            }
            times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
            let added = |i: usize, p: f64| (percentile(&times[i + 2], p) - percentile(&times[i], p)) * 1e3;
            let (direct, ..) = load(mock.at, bytes, stream, 16, short).await?;
            let (through, ..) = load(gateway.at, bytes, stream, 16, Duration::from_secs(2)).await?;
            println!(
                "{:>7} B {:>6}: {:.3} / {:.3} | {:.3} / {:.3}; {direct:.0} → {through:.0}",
                bytes,
                if stream { "stream" } else { "whole" },
                added(0, 0.5), added(0, 0.99), added(1, 0.5), added(1, 0.99),
            );
        }
    }
    Ok(())
}

#[allow(clippy::print_stdout)]
async fn rate(seconds: u64) -> Result<(), Any> {
    let mock = Peer::start(&["mock"]).await?;
    let gateway = Peer::start(&["gateway", &mock.at.at.to_string()]).await?;
    let (rate, _, whole) = load(gateway.at, 1 << 10, false, 16, Duration::from_secs(seconds)).await?;
    println!("{rate:.0} requests/s, p50 {:.3} ms, p99 {:.3} ms", percentile(&whole, 0.5) * 1e3, percentile(&whole, 0.99) * 1e3);
    Ok(())
}

/// Fails when memory goes on growing once the caches are full: decisions hold
/// some 4,000 requests, and the database has a cache of its own.
#[allow(clippy::print_stdout)]
async fn soak(requests: usize) -> Result<(), Any> {
    let mock = Peer::start(&["mock"]).await?;
    let gateway = Peer::start(&["gateway", &mock.at.at.to_string()]).await?;
    let warm = (requests / 3).max(5000);
    let (mut done, mut full, mut stream) = (0, None, false);
    while done < warm + requests {
        stream = !stream;
        let (rate, first, _) = load(gateway.at, 1 << 10, stream, 16, Duration::from_secs(1)).await?;
        done += first.len();
        let memory = gateway.memory()?;
        if done >= warm {
            full.get_or_insert((done, memory));
        }
        println!("{done} requests, {rate:.0}/s, {memory} KiB");
    }
    let ((after, before), now) = (full.ok_or("no request was answered")?, gateway.memory()?);
    let (grown, more) = (now.saturating_sub(before), done - after);
    println!("{grown} KiB more after {more} further requests: {:.1} bytes a request", grown as f64 * 1024.0 / more as f64);
    let allowed = 4096 + before / 20;
    if grown > allowed {
        return Err(format!("memory grew by {grown} KiB from {before} KiB, {allowed} KiB are allowed").into());
    }
    Ok(())
}
