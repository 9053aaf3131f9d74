//! Traces and metrics to an OpenTelemetry collector, by OTLP over HTTP with
//! protobuf.
//!
//! Off unless `[telemetry]` or an `OTEL_EXPORTER_OTLP_…` variable names a
//! collector. Prompts and answers are left out unless `contents` asks for them.
//!
//! What may not happen here: a request that waits for a collector. Spans go into
//! a queue of bounded length; what does not fit is dropped and counted, and so is
//! what a collector does not take.

pub(crate) mod context;
pub(crate) mod encode;
pub(crate) mod proto;
pub(crate) mod semconv;
pub(crate) mod settings;

use crate::{
    config::{ConfigError, TelemetrySettings},
    metrics::{STARTED, family::Family},
    upstream::{Link, LinkSettings, UpstreamError},
};
use ashlar_core::clock;
use prost::Message as _;
use proto::{Resource, Span};
use settings::{Resolved, Signal};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};

/// Most spans sent at once.
const BATCH: usize = 512;
/// How long a span waits for others.
const DELAY: Duration = Duration::from_secs(1);
/// Times a batch is sent before it is given up.
const ATTEMPTS: u32 = 3;
/// First pause between them; it doubles.
const BACKOFF: Duration = Duration::from_millis(500);
/// Longest pause, also when a collector asks for more.
const LONGEST: Duration = Duration::from_secs(10);
/// Time for what is left when the server stops.
const LAST: Duration = Duration::from_secs(3);

/// What became of what was sent.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) sent: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) failed: AtomicU64,
}

/// Reads all metrics; `None` once the server is gone.
pub(crate) type Collect = Arc<dyn Fn() -> Option<Vec<Family>> + Send + Sync>;

enum Item {
    Span(Box<Span>),
    Flush(oneshot::Sender<()>),
}

/// The way to a collector.
pub(crate) struct Exporter {
    spans: Option<mpsc::Sender<Item>>,
    flush_metrics: Option<mpsc::Sender<oneshot::Sender<()>>>,
    counts: Arc<Counts>,
    sample: f64,
    pub(crate) contents: bool,
}

fn link(signal: &Signal) -> Result<Link, ConfigError> {
    let mut headers = signal.headers.clone();
    headers.push(("content-type".into(), "application/x-protobuf".into()));
    let link = Link::new(LinkSettings {
        backend: "telemetry".into(),
        url: signal.url.clone(),
        headers,
        secret: None,
        ca_file: signal.ca_file.clone(),
        connect: signal.timeout,
        first_byte: signal.timeout,
        idle: signal.timeout,
        probe: signal.timeout,
        max_answer_bytes: 1 << 20,
        max_event_bytes: 1 << 20,
        idle_connections: 1,
    });
    link.map_err(|e| ConfigError::Invalid { path: "telemetry".into(), why: e.to_string() })
}

fn resource(attributes: &BTreeMap<String, String>) -> Resource {
    let mut list = vec![
        encode::attribute(semconv::SERVICE_VERSION, env!("CARGO_PKG_VERSION")),
        encode::attribute(semconv::SERVICE_INSTANCE, ashlar_core::id::new("gateway")),
    ];
    list.retain(|kv| !attributes.contains_key(&kv.key));
    list.extend(attributes.iter().map(|(k, v)| encode::attribute(k, v.as_str())));
    Resource { attributes: list }
}

impl Exporter {
    fn start(resolved: &Resolved, counts: Arc<Counts>, collect: Collect) -> Result<Self, ConfigError> {
        let resource = resource(&resolved.resource);
        let traces = resolved.traces.as_ref().map(link).transpose()?;
        let metrics = resolved.metrics.as_ref().map(link).transpose()?;
        let spans = traces.map(|link| {
            let (tx, rx) = mpsc::channel(resolved.queue);
            // Ends when the exporter and the requests that hold it are gone.
            tokio::spawn(send_spans(rx, link, resource.clone(), counts.clone()));
            tx
        });
        let flush_metrics = metrics.map(|link| {
            let (tx, rx) = mpsc::channel(1);
            tokio::spawn(send_metrics(rx, link, resource, counts.clone(), collect, resolved.interval));
            tx
        });
        Ok(Self { spans, flush_metrics, counts, sample: resolved.sample, contents: resolved.contents })
    }

    /// Whether a request is recorded whose client says `sampled`, or nothing.
    pub(crate) fn records(&self, sampled: Option<bool>) -> bool {
        self.spans.is_some() && sampled.unwrap_or_else(|| crate::route::random() < self.sample)
    }

    /// Queues a span, or drops it.
    pub(crate) fn export(&self, span: Span) {
        let Some(queue) = &self.spans else { return };
        if queue.try_send(Item::Span(Box::new(span))).is_err() {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    async fn flush(&self) {
        let spans = async {
            let (ack, done) = oneshot::channel();
            if let Some(queue) = &self.spans
                && queue.send(Item::Flush(ack)).await.is_ok()
            {
                let _ = done.await;
            }
        };
        let metrics = async {
            let (ack, done) = oneshot::channel();
            if let Some(queue) = &self.flush_metrics
                && queue.send(ack).await.is_ok()
            {
                let _ = done.await;
            }
        };
        let _ = timeout(LAST, async { tokio::join!(spans, metrics) }).await;
    }
}

async fn send_spans(mut queue: mpsc::Receiver<Item>, link: Link, resource: Resource, counts: Arc<Counts>) {
    loop {
        let (mut batch, mut acks, mut until) = (Vec::new(), Vec::new(), None);
        let ended = loop {
            let item = match until {
                None => queue.recv().await,
                Some(deadline) => match timeout_at(deadline, queue.recv()).await {
                    Ok(item) => item,
                    Err(_) => break false,
                },
            };
            match item {
                None => break true,
                Some(Item::Flush(ack)) => {
                    acks.push(ack);
                    break false;
                }
                Some(Item::Span(span)) => {
                    batch.push(*span);
                    until.get_or_insert_with(|| Instant::now() + DELAY);
                    if batch.len() >= BATCH {
                        break false;
                    }
                }
            }
        };
        if !batch.is_empty() {
            let spans = batch.len() as u64;
            let body = encode::traces(&resource, batch).encode_to_vec();
            let refused = match send(&link, body).await {
                Ok(rejected) => rejected.min(spans),
                Err(_) => {
                    counts.failed.fetch_add(1, Relaxed);
                    spans
                }
            };
            counts.sent.fetch_add(spans - refused, Relaxed);
            counts.dropped.fetch_add(refused, Relaxed);
        }
        for ack in acks {
            let _ = ack.send(());
        }
        if ended {
            return;
        }
    }
}

async fn send_metrics(
    mut flush: mpsc::Receiver<oneshot::Sender<()>>,
    link: Link,
    resource: Resource,
    counts: Arc<Counts>,
    collect: Collect,
    interval: Duration,
) {
    loop {
        let ack = match timeout(interval, flush.recv()).await {
            Err(_) => None,
            Ok(Some(ack)) => Some(ack),
            Ok(None) => return,
        };
        let Some(families) = collect() else { return };
        let nanos = |ms: i64| u64::try_from(ms).unwrap_or(0).saturating_mul(1_000_000);
        let body = encode::metrics(&resource, &families, nanos(*STARTED), nanos(clock::now_ms())).encode_to_vec();
        // Points that were rejected are as lost as a report that was.
        if !matches!(send(&link, body).await, Ok(0)) {
            counts.failed.fetch_add(1, Relaxed);
        }
        if let Some(ack) = ack {
            let _ = ack.send(());
        }
    }
}

/// Sends `body` until it is taken, or cannot be; how many items of it were not.
async fn send(link: &Link, body: Vec<u8>) -> Result<u64, UpstreamError> {
    let body = bytes::Bytes::from(body);
    let mut pause = BACKOFF;
    let mut left = ATTEMPTS;
    loop {
        let sent = async { link.post("", body.clone()).await?.whole().await }.await;
        let error = match sent {
            Ok(reply) => {
                let reply = proto::Reply::decode(reply.as_slice()).unwrap_or_default();
                let rejected = reply.partial_success.map_or(0, |p| p.rejected);
                return Ok(u64::try_from(rejected).unwrap_or(0));
            }
            Err(e) => e,
        };
        left -= 1;
        // By OTLP's specification; anything else would fail again.
        let again = match &error {
            UpstreamError::Status { status, .. } => matches!(status, 429 | 502..=504),
            UpstreamError::Connect { .. } | UpstreamError::Timeout { .. } | UpstreamError::Closed { .. } => true,
            _ => false,
        };
        if !again || left == 0 {
            return Err(error);
        }
        let asked = error.rest().map(|s| Duration::from_secs(s.into()));
        tokio::time::sleep(asked.unwrap_or(pause).min(LONGEST)).await;
        pause *= 2;
    }
}

/// The exporter in force, if there is one.
#[derive(Default)]
pub(crate) struct Telemetry {
    now: RwLock<Option<Arc<Exporter>>>,
    /// What it was made of.
    settings: Mutex<Option<TelemetrySettings>>,
    pub(crate) counts: Arc<Counts>,
    error: Mutex<Option<String>>,
}

/// Whether an exporter can be made of `settings` and the environment.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn check(settings: &TelemetrySettings) -> Result<(), ConfigError> {
    let Some(resolved) = Resolved::of(settings, &|name| std::env::var(name).ok())? else { return Ok(()) };
    let signals = [&resolved.traces, &resolved.metrics];
    signals.into_iter().flatten().try_for_each(|s| link(s).map(drop))
}

impl Telemetry {
    pub(crate) fn exporter(&self) -> Option<Arc<Exporter>> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why there is none though there should be.
    pub(crate) fn error(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts `settings` to work when they are not the last ones. Ones that cannot
    /// be used leave the exporter as it was.
    pub(crate) fn follow(&self, settings: &TelemetrySettings, collect: impl FnOnce() -> Collect) {
        let mut last = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() == Some(settings) {
            return;
        }
        *last = Some(settings.clone());
        let resolved = Resolved::of(settings, &|name| std::env::var(name).ok());
        let made = resolved.and_then(|r| r.map(|r| Exporter::start(&r, self.counts.clone(), collect())).transpose());
        let error = match made {
            Ok(exporter) => {
                *self.now.write().unwrap_or_else(PoisonError::into_inner) = exporter.map(Arc::new);
                None
            }
            Err(e) => Some(e.to_string()),
        };
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = error;
    }

    /// Sends what is left, within a few seconds.
    pub(crate) async fn flush(&self) {
        if let Some(exporter) = self.exporter() {
            exporter.flush().await;
        }
    }
}
