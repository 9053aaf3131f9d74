//! A load of streaming completions against any OpenAI-compatible server.
//!
//! Open loop: requests arrive at random times (Poisson) whether or not earlier
//! ones are answered, and latency counts from the time a request was due, so a
//! slow server cannot slow its own load down. Closed loop: each client sends
//! its next request when the last one is answered.
//!
//! What may not happen here: an unbounded count, length or time; a failed
//! request among the latencies; a prompt that depends on anything but the seed.
//!
//! Rejected: an async client. `ureq` is here already, decodes chunks as they
//! come, and a thread a request is cheap next to the model's work. Rejected:
//! the chat endpoint, whose template lengthens prompts differently by server.

use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read},
    net::IpAddr,
    str::FromStr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Most clients of a closed loop, and requests in flight in an open one.
pub(crate) const MOST_CLIENTS: usize = 1024;
/// Most requests of a run.
pub(crate) const MOST_REQUESTS: usize = 1_000_000;
/// Most tokens of a prompt part or an answer.
pub(crate) const MOST_TOKENS: u32 = 1 << 17;
/// Most bytes read of one answer.
const MOST_BYTES: u64 = 256 << 20;

/// Words that common vocabularies hold as one token with the space in front.
const WORDS: &str = "time year people way day man thing woman life child world school state family \
    student group country problem hand part place case week company system program question work \
    government number night point home water room mother area money story fact month lot right \
    study book eye job word business issue side kind head house service friend father power hour \
    game line end member law car city";

/// How many tokens: always as many, or evenly distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tokens {
    least: u32,
    most: u32,
}

impl FromStr for Tokens {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |t: &str| t.parse::<u32>().map_err(|_| format!("{t:?} is no count of tokens"));
        let (least, most) = match text.strip_prefix("uniform:") {
            None => (number(text)?, number(text)?),
            Some(range) => {
                let (a, b) = range.split_once("..").ok_or("write uniform:LEAST..MOST")?;
                (number(a)?, number(b)?)
            }
        };
        if least == 0 || least > most || most > MOST_TOKENS {
            return Err(format!("{text:?} must lie within 1..={MOST_TOKENS}, the least first"));
        }
        Ok(Self { least, most })
    }
}

impl std::fmt::Display for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.least == self.most {
            return write!(f, "{}", self.least);
        }
        write!(f, "uniform:{}..{}", self.least, self.most)
    }
}

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Arrival {
    /// `rate` a second on average.
    Open { rate: f64 },
    /// As soon as a client is free.
    Closed { clients: usize },
}

/// A whole load, resolved.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub url: String,
    pub model: String,
    pub key: Option<String>,
    pub arrival: Arrival,
    pub requests: usize,
    pub prompt_tokens: Tokens,
    pub output_tokens: Tokens,
    pub shared_prefix: u32,
    pub seed: u64,
    pub ban_tokens: Vec<u32>,
    pub timeout: Duration,
    pub time_limit: Duration,
}

/// splitmix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Within (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn tokens(&mut self, t: Tokens) -> u32 {
        t.least + (self.next() % u64::from(t.most - t.least + 1)) as u32
    }

    fn words(&mut self, n: u32, into: &mut String) {
        let words: Vec<&str> = WORDS.split_whitespace().collect();
        for _ in 0..n {
            if !into.is_empty() {
                into.push(' ');
            }
            into.push_str(words[self.next() as usize % words.len()]);
        }
    }
}

/// An answered request; times in seconds.
#[derive(Debug, Clone, Default)]
struct Answer {
    first: Option<f64>,
    last: f64,
    whole: f64,
    gaps: Vec<f64>,
    prompt: u64,
    cached: u64,
    output: u64,
}

/// What came of a load.
pub(crate) struct Report {
    answers: Vec<Answer>,
    errors: BTreeMap<String, u64>,
    /// What a server said when it refused a request.
    refusal: Option<String>,
    sent: usize,
    seconds: f64,
}

/// Whether a URL's host is this machine.
pub(crate) fn is_loopback(url: &str) -> bool {
    let Ok(uri) = url.parse::<ureq::http::Uri>() else { return false };
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl Load {
    /// Sends everything and waits for the last answer; `done` is called after
    /// each request.
    pub(crate) fn run(&self, done: impl Fn() + Sync) -> Report {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(self.timeout))
            // A connection a request: one kept from before may be closed by the
            // server just as it is used, and ends as an error that is no fault of it.
            .max_idle_connections(0)
            .max_idle_connections_per_host(0)
            // A proxy from the environment would be measured too.
            .proxy(None)
            .build()
            .into();
        let mut prefix = String::new();
        Random(self.seed).words(self.shared_prefix, &mut prefix);
        let bodies: Vec<Value> = match self.requests {
            // Few enough to write beforehand, so that writing costs the server nothing.
            n if n <= 4096 => (0..n).map(|i| self.body(i, &prefix)).collect(),
            _ => Vec::new(),
        };
        let (outcomes, refusal) = (Mutex::new(Vec::new()), Mutex::new(None));
        let (next, flying) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let start = Instant::now();
        let one = |i: usize, due: Instant| {
            let outcome = match bodies.get(i) {
                Some(body) => self.ask(&agent, body, due, &refusal),
                None => self.ask(&agent, &self.body(i, &prefix), due, &refusal),
            };
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
            done();
        };
        thread::scope(|scope| match self.arrival {
            Arrival::Closed { clients } => {
                for _ in 0..clients.min(self.requests) {
                    scope.spawn(|| {
                        loop {
                            let i = next.fetch_add(1, Ordering::Relaxed);
                            if i >= self.requests || start.elapsed() > self.time_limit {
                                return;
                            }
                            one(i, Instant::now());
                        }
                    });
                }
            }
            Arrival::Open { rate } => {
                let mut random = Random(self.seed ^ 0x5eed_a441);
                let mut due = start;
                for i in 0..self.requests {
                    due += Duration::from_secs_f64((-random.unit().ln() / rate).min(3600.0));
                    if due - start > self.time_limit {
                        return;
                    }
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    if flying.fetch_add(1, Ordering::Relaxed) >= MOST_CLIENTS {
                        flying.fetch_sub(1, Ordering::Relaxed);
                        let full = Err(format!("not_sent_{MOST_CLIENTS}_in_flight"));
                        outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(full);
                        done();
                        continue;
                    }
                    let (one, flying) = (&one, &flying);
                    scope.spawn(move || {
                        one(i, due);
                        flying.fetch_sub(1, Ordering::Relaxed);
                    });
                }
            }
        });
        let seconds = start.elapsed().as_secs_f64();
        let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
        let sent = outcomes.len();
        let (mut answers, mut errors) = (Vec::new(), BTreeMap::new());
        for outcome in outcomes {
            match outcome {
                Ok(answer) => answers.push(answer),
                Err(kind) => *errors.entry(kind).or_default() += 1,
            }
        }
        let refusal = refusal.into_inner().unwrap_or_else(PoisonError::into_inner);
        Report { answers, errors, refusal, sent, seconds }
    }

    /// The `i`th request.
    fn body(&self, i: usize, prefix: &str) -> Value {
        let mut random = Random(self.seed.wrapping_add(1 + i as u64).wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mut prompt = prefix.to_owned();
        let own = random.tokens(self.prompt_tokens);
        random.words(own, &mut prompt);
        let mut body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": random.tokens(self.output_tokens),
            "temperature": 0.0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if !self.ban_tokens.is_empty() {
            let bias: Map<String, Value> = self.ban_tokens.iter().map(|t| (t.to_string(), json!(-100))).collect();
            body["logit_bias"] = bias.into();
        }
        body
    }

    /// Sends one request and reads its answer to the end; an error is its kind.
    fn ask(
        &self,
        agent: &ureq::Agent,
        body: &Value,
        due: Instant,
        refusal: &Mutex<Option<String>>,
    ) -> Result<Answer, String> {
        let mut request = agent.post(&self.url);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let response = request.send_json(body).map_err(|e| kind(&e).to_owned())?;
        let status = response.status();
        if !status.is_success() {
            let mut said = Vec::new();
            let _ = response.into_body().into_reader().take(500).read_to_end(&mut said);
            let mut refusal = refusal.lock().unwrap_or_else(PoisonError::into_inner);
            refusal.get_or_insert_with(|| String::from_utf8_lossy(&said).trim().to_owned());
            return Err(format!("http_{}", status.as_u16()));
        }
        let reader = response.into_body().into_reader().take(MOST_BYTES);
        read(BufReader::new(reader), || due.elapsed().as_secs_f64())
    }
}

/// Reads server-sent events; `clock` says the seconds since the request was due.
fn read(mut events: impl BufRead, clock: impl Fn() -> f64) -> Result<Answer, String> {
    let (mut answer, mut line, mut over, mut pieces) = (Answer::default(), String::new(), false, 0);
    loop {
        line.clear();
        let n = events.read_line(&mut line).map_err(|e| {
            let cause = e.get_ref().and_then(|c| c.downcast_ref::<ureq::Error>());
            match (cause, e.kind()) {
                (Some(ureq::Error::Timeout(_)), _) | (None, std::io::ErrorKind::TimedOut) => "timeout".to_owned(),
                (_, std::io::ErrorKind::InvalidData) => "bad_event".to_owned(),
                _ => "stream_cut".to_owned(),
            }
        })?;
        let now = clock();
        if n == 0 {
            break;
        }
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
        if data == "[DONE]" {
            over = true;
            continue; // The end of the stream is part of the whole time.
        }
        let event: Value = serde_json::from_str(data).map_err(|_| "bad_event")?;
        if event.get("error").is_some_and(|e| !e.is_null()) {
            return Err("error_in_stream".into());
        }
        let choice = &event["choices"][0];
        if choice["text"].as_str().is_some_and(|t| !t.is_empty()) {
            match answer.first {
                None => answer.first = Some(now),
                Some(_) => answer.gaps.push(now - answer.last),
            }
            answer.last = now;
            pieces += 1;
        }
        over |= choice["finish_reason"].is_string();
        if let Some(usage) = event.get("usage").filter(|u| u.is_object()) {
            answer.prompt = usage["prompt_tokens"].as_u64().unwrap_or(0);
            answer.cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
            answer.output = usage["completion_tokens"].as_u64().unwrap_or(0);
        }
    }
    if !over {
        return Err("stream_cut".into());
    }
    if answer.output == 0 {
        answer.output = pieces;
    }
    answer.whole = clock();
    Ok(answer)
}

fn kind(error: &ureq::Error) -> &'static str {
    match error {
        ureq::Error::Timeout(_) => "timeout",
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => "connect",
        ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => "connect",
        ureq::Error::Io(_) => "connection_lost",
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => "tls",
        _ => "protocol",
    }
}

impl Report {
    /// Requests answered in full.
    pub(crate) fn completed(&self) -> usize {
        self.answers.len()
    }

    /// The figures, with the settings they were taken under.
    pub(crate) fn json(&self, load: &Load) -> Value {
        let a = &self.answers;
        let sum = |of: fn(&Answer) -> u64| a.iter().map(of).sum::<u64>();
        let seconds = self.seconds.max(1e-9);
        let per_token = |a: &Answer| Some((a.last - a.first?) / a.output.checked_sub(1).filter(|&n| n > 0)? as f64);
        let (rate, clients) = match load.arrival {
            Arrival::Open { rate } => (Some(rate), None),
            Arrival::Closed { clients } => (None, Some(clients)),
        };
        json!({
            "url": load.url,
            "model": load.model,
            "rate": rate,
            "clients": clients,
            "requests": load.requests,
            "prompt_tokens": load.prompt_tokens.to_string(),
            "output_tokens": load.output_tokens.to_string(),
            "shared_prefix": load.shared_prefix,
            "seed": load.seed,
            "sent": self.sent,
            "completed": a.len(),
            "errors": self.errors,
            "first_refusal": self.refusal,
            "duration_s": self.seconds,
            "requests_per_s": a.len() as f64 / seconds,
            "output_tokens_per_s": sum(|a| a.output) as f64 / seconds,
            "total_prompt_tokens": sum(|a| a.prompt),
            "total_cached_tokens": sum(|a| a.cached),
            "total_output_tokens": sum(|a| a.output),
            "ttft_ms": spread(a.iter().filter_map(|a| a.first).collect()),
            "itl_ms": spread(a.iter().flat_map(|a| a.gaps.iter().copied()).collect()),
            "tpot_ms": spread(a.iter().filter_map(per_token).collect()),
            "e2e_latency_ms": spread(a.iter().map(|a| a.whole).collect()),
        })
    }
}

/// Mean and percentiles of seconds, in milliseconds; `null` without samples.
fn spread(mut seconds: Vec<f64>) -> Value {
    if seconds.is_empty() {
        return Value::Null;
    }
    seconds.sort_by(f64::total_cmp);
    let ms = |s: f64| (s * 1e6).round() / 1e3;
    json!({
        "mean": ms(seconds.iter().sum::<f64>() / seconds.len() as f64),
        "p50": ms(percentile(&seconds, 0.50)),
        "p90": ms(percentile(&seconds, 0.90)),
        "p95": ms(percentile(&seconds, 0.95)),
        "p99": ms(percentile(&seconds, 0.99)),
    })
}

/// Of sorted samples, between neighbours on a straight line.
fn percentile(sorted: &[f64], q: f64) -> f64 {
    let at = q * sorted.len().saturating_sub(1) as f64;
    let at_or = |i: usize| sorted.get(i).or(sorted.last()).copied().unwrap_or(0.0);
    let low = at_or(at as usize);
    low + (at_or(at as usize + 1) - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> Load {
        Load {
            url: String::new(),
            model: "m".into(),
            key: None,
            arrival: Arrival::Closed { clients: 1 },
            requests: 3,
            prompt_tokens: "uniform:2..5".parse().unwrap(),
            output_tokens: "7".parse().unwrap(),
            shared_prefix: 4,
            seed: 9,
            ban_tokens: vec![2],
            timeout: Duration::from_secs(1),
            time_limit: Duration::from_secs(1),
        }
    }

    #[test]
    fn distributions_are_read_and_kept() {
        for good in ["128", "uniform:64..512", "uniform:3..3"] {
            let t: Tokens = good.parse().unwrap();
            let mut random = Random(1);
            assert!((0..500).map(|_| random.tokens(t)).all(|n| (t.least..=t.most).contains(&n)));
        }
        for bad in ["", "0", "-1", "x", "uniform:5", "uniform:9..2", "999999999"] {
            assert!(bad.parse::<Tokens>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_this_machine_is_loopback() {
        for url in ["http://127.0.0.1:80", "http://localhost/x", "http://[::1]:8080"] {
            assert!(is_loopback(url), "{url}");
        }
        for url in ["http://10.0.0.1", "http://127.0.0.1.example.com", "http://localhost@example.com", "nonsense"] {
            assert!(!is_loopback(url), "{url}");
        }
    }

    #[test]
    fn prompts_come_from_the_seed_and_share_the_prefix() {
        let load = load();
        let mut prefix = String::new();
        Random(load.seed).words(load.shared_prefix, &mut prefix);
        let (a, b) = (load.body(0, &prefix), load.body(1, &prefix));
        assert_eq!(a, load.body(0, &prefix));
        assert_ne!(a["prompt"], b["prompt"]);
        for body in [a, b] {
            let prompt = body["prompt"].as_str().unwrap();
            assert!(prompt.starts_with(&prefix));
            assert!((6..=9).contains(&prompt.split(' ').count()), "{prompt}");
            assert_eq!((&body["max_tokens"], &body["logit_bias"]["2"]), (&json!(7), &json!(-100)));
        }
    }

    #[test]
    fn a_stream_is_timed_and_a_cut_one_is_an_error() {
        let whole = concat!(
            ": comment\n\ndata: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"length\"}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n",
        );
        let time = std::cell::Cell::new(0.0);
        let clock = || {
            time.set(time.get() + 1.0);
            time.get()
        };
        let answer = read(whole.as_bytes(), clock).unwrap();
        assert_eq!((answer.first, answer.gaps.as_slice()), (Some(3.0), &[2.0][..]));
        assert_eq!((answer.prompt, answer.output), (5, 2));
        let cut = &whole[..whole.find("data: {\"choices\":[{\"text\":\"b\"").unwrap()];
        assert_eq!(read(cut.as_bytes(), || 0.0).unwrap_err(), "stream_cut");
        assert_eq!(read("data: {\n".as_bytes(), || 0.0).unwrap_err(), "bad_event");
        let error = "data: {\"error\":{\"message\":\"no\"}}\n";
        assert_eq!(read(error.as_bytes(), || 0.0).unwrap_err(), "error_in_stream");
    }

    #[test]
    fn percentiles() {
        let sorted = [1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(percentile(&sorted, 0.5), 3.0);
        assert!((percentile(&sorted, 0.9) - 4.6).abs() < 1e-12);
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
        assert_eq!(spread(Vec::new()), Value::Null);
    }
}
