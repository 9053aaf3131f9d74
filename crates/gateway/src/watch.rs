//! What one request is seen to do, from its first byte to the end of its answer:
//! its times, for `metrics`, and its spans, for `telemetry`.
//!
//! A [`Watch`] begins when the request does and accompanies its task, as
//! OpenTelemetry's context does, so that no step in between has to hand it on. A
//! [`Hop`] is one attempt at a backend, [`Observed`] the answer.
//!
//! What may not happen here: text of a prompt or an answer in a span unless the
//! configuration asks for contents; or a span of a request that is not recorded,
//! which costs the reading of two headers.

mod describe;

use crate::{
    app::App,
    ask::Ask,
    listener::Arrived,
    metrics::{Metrics, ModelSeries},
    node::Node,
    telemetry::{
        Exporter,
        context::{Context, Parent, TRACEPARENT, TRACESTATE},
        encode::attribute,
        proto::{Event, Span, SpanKind, Status},
        semconv,
    },
    upstream::{End, Piece, UpstreamError},
};
use ashlar_api::ApiError;
use ashlar_core::clock;
use axum::{
    extract::Request,
    http::{HeaderMap, HeaderValue, Method, Uri},
};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Instant,
};

tokio::task_local! {
    static WATCH: Arc<Watch>;
    static CARRIED: Carried;
}

/// What a request upstream carries of its trace.
#[derive(Debug, Clone)]
struct Carried {
    parent: HeaderValue,
    state: Option<HeaderValue>,
}

/// A request.
pub(crate) struct Watch {
    arrived: Instant,
    /// When all of it was read.
    read: OnceLock<Instant>,
    /// Where it is in a trace, its own or, unrecorded, its client's.
    context: Option<Context>,
    state: Option<HeaderValue>,
    span: Option<Recorded>,
}

/// The span of a request that is recorded; sent when the last who holds it is
/// gone.
struct Recorded {
    exporter: Arc<Exporter>,
    /// Nanoseconds since 1970 at its arrival.
    began: u64,
    span: Mutex<Span>,
}

/// The watch of the request that this task answers.
pub(crate) fn current() -> Option<Arc<Watch>> {
    WATCH.try_with(Arc::clone).ok()
}

/// Runs `work` for this task's request, but not as a part of it: what it asks is in
/// the same trace, and none of it in the request's span.
pub(crate) async fn apart<T>(work: impl Future<Output = T>) -> T {
    let Some(watch) = current() else { return work.await };
    let apart = Watch { arrived: Instant::now(), read: OnceLock::new(), context: watch.context, state: watch.state.clone(), span: None };
    WATCH.scope(Arc::new(apart), work).await
}

/// The request of this task has been read to its end.
pub(crate) fn read_to_its_end() {
    let _ = WATCH.try_with(|w| w.read.set(Instant::now()));
}

/// Adds what belongs to the attempt this task makes.
pub(crate) fn carry(headers: &mut HeaderMap) {
    let _ = CARRIED.try_with(|c| {
        headers.insert(TRACEPARENT, c.parent.clone());
        if let Some(state) = &c.state {
            headers.insert(TRACESTATE, state.clone());
        }
    });
}

impl Watch {
    /// The watch of `request` if it is for a model.
    pub(crate) fn begin(app: &App, listen: SocketAddr, request: &Request) -> Option<Arc<Self>> {
        let path = request.uri().path();
        if request.method() != Method::POST || !path.starts_with("/v1/") {
            return None;
        }
        let (arrived, now) = (Arrived::of(request), Instant::now());
        let (parent, exporter) = (Parent::of(request.headers()), app.telemetry.exporter());
        let sent = parent.as_ref().map(|p| p.context);
        let recorded = exporter.filter(|e| e.records(sent.map(|c| c.sampled)));
        let (context, span) = match recorded {
            Some(exporter) => {
                let context = sent.map_or_else(|| Context::root(true), |c| c.child());
                let ms = u64::try_from(clock::now_ms()).unwrap_or(0);
                let ago = u64::try_from((now - arrived).as_nanos()).unwrap_or(0);
                let began = ms.saturating_mul(1_000_000).saturating_sub(ago);
                let mut span = span(&context, sent.map(|c| c.span), SpanKind::Server, began);
                // The parent is another process's.
                span.flags |= if sent.is_some() { 0x300 } else { 0x100 };
                span.name = semconv::operation(path).to_owned();
                span.trace_state = parent.as_ref().and_then(|p| p.state.as_ref()?.to_str().ok()).unwrap_or_default().to_owned();
                span.attributes = vec![
                    attribute(semconv::HTTP_METHOD, "POST"),
                    attribute(semconv::URL_PATH, path.chars().take(100).collect::<String>()),
                    attribute(semconv::SERVER_ADDRESS, listen.ip().to_string()),
                    attribute(semconv::SERVER_PORT, i64::from(listen.port())),
                ];
                (Some(context), Some(Recorded { exporter, began, span: Mutex::new(span) }))
            }
            None => (sent, None),
        };
        let state = parent.and_then(|p| p.state);
        Some(Arc::new(Self { arrived, read: OnceLock::new(), context, state, span }))
    }

    /// Runs `work` under this watch.
    pub(crate) async fn during<T>(self: &Arc<Self>, work: impl Future<Output = T>) -> T {
        WATCH.scope(self.clone(), work).await
    }

    /// The answer's head is on its way.
    pub(crate) fn answered(&self, status: u16) {
        self.note(|_, span| {
            span.attributes.push(attribute(semconv::HTTP_STATUS, i64::from(status)));
            if status >= 400 && span.status.is_none() {
                span.attributes.push(attribute(semconv::ERROR_TYPE, status.to_string()));
                // By the HTTP conventions a client's mistake is no error of a server.
                span.status = (status >= 500).then(|| failed(String::new()));
            }
        });
    }

    fn note(&self, f: impl FnOnce(&Recorded, &mut Span)) {
        if let Some(recorded) = &self.span {
            f(recorded, &mut recorded.span.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn nanos(&self, at: Instant) -> u64 {
        let began = self.span.as_ref().map_or(0, |s| s.began);
        began + u64::try_from(at.saturating_duration_since(self.arrived).as_nanos()).unwrap_or(0)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let end = self.nanos(Instant::now());
        if let Some(recorded) = self.span.take() {
            let mut span = recorded.span.into_inner().unwrap_or_else(PoisonError::into_inner);
            span.end_time_unix_nano = end;
            recorded.exporter.export(span);
        }
    }
}

fn span(context: &Context, parent: Option<[u8; 8]>, kind: SpanKind, began: u64) -> Span {
    Span {
        trace_id: context.trace.to_vec(),
        span_id: context.span.to_vec(),
        parent_span_id: parent.map(|p| p.to_vec()).unwrap_or_default(),
        kind: kind.into(),
        start_time_unix_nano: began,
        flags: u32::from(context.sampled),
        ..Span::default()
    }
}

fn failed(message: String) -> Status {
    Status { message, code: 2 }
}

/// One attempt at a backend, from its sending until its answer ends.
pub(crate) struct Hop {
    pub(crate) began: Instant,
    carried: Option<Carried>,
    /// With the request's watch, while it is recorded.
    span: Option<(Arc<Watch>, Box<Span>)>,
    over: bool,
}

impl Hop {
    pub(crate) fn begin(node: &Node, model: &str, endpoint: &str, hedge: bool) -> Self {
        let (began, watch) = (Instant::now(), current());
        let here = watch.as_ref().and_then(|w| w.context);
        let recorded = watch.clone().filter(|w| w.span.is_some()).zip(here);
        let (context, span) = match recorded {
            Some((watch, server)) => {
                let context = server.child();
                let mut span = span(&context, Some(server.span), SpanKind::Client, watch.nanos(began));
                let operation = semconv::operation(endpoint);
                span.name = format!("{operation} {model}");
                span.attributes = vec![
                    attribute(semconv::OPERATION, operation),
                    attribute(semconv::PROVIDER, node.dialect.as_str()),
                    attribute(semconv::REQUEST_MODEL, model),
                    attribute(semconv::BACKEND, node.name.as_str()),
                ];
                let url = node.settings.as_ref().and_then(|s| s.url.clone()).or(node.dialect.default_url().map(str::to_owned));
                if let Some(uri) = url.and_then(|u| u.parse::<Uri>().ok()) {
                    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
                    span.attributes.push(attribute(semconv::SERVER_ADDRESS, uri.host().unwrap_or_default()));
                    span.attributes.push(attribute(semconv::SERVER_PORT, i64::from(port)));
                }
                if hedge {
                    span.attributes.push(attribute(semconv::HEDGE, true));
                }
                (Some(context), Some((watch, Box::new(span))))
            }
            None => (here, None),
        };
        let state = watch.and_then(|w| w.state.clone());
        let carried = context.and_then(|c| Some(Carried { parent: c.header()?, state }));
        Self { began, carried, span, over: false }
    }

    /// Runs `work`; requests it sends carry the trace.
    pub(crate) async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        match &self.carried {
            Some(carried) => CARRIED.scope(carried.clone(), work).await,
            None => work.await,
        }
    }

    /// It broke off.
    pub(crate) fn failed(&mut self, error: &UpstreamError) {
        self.over = true;
        if let Some((_, span)) = &mut self.span {
            span.attributes.push(attribute(semconv::ERROR_TYPE, error.class()));
            if let UpstreamError::Status { status, .. } = error {
                span.attributes.push(attribute(semconv::HTTP_STATUS, i64::from(*status)));
            }
            // Not the message: an upstream may quote the prompt in it.
            span.status = Some(failed(format!("backend {}", error.class())));
        }
    }

    fn ended(&mut self, end: &End) {
        self.over = true;
        if let Some((_, span)) = &mut self.span {
            usage(span, end);
        }
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        let Some((watch, mut span)) = self.span.take() else { return };
        if !self.over {
            span.attributes.push(attribute(semconv::OUTCOME, "cancelled"));
        }
        span.end_time_unix_nano = watch.nanos(Instant::now());
        if let Some(recorded) = &watch.span {
            recorded.exporter.export(*span);
        }
    }
}

fn usage(span: &mut Span, end: &End) {
    let tokens = end.tokens.usage();
    span.attributes.extend([
        attribute(semconv::FINISH_REASONS, vec![end.finish.as_str().to_owned()]),
        attribute(semconv::INPUT_TOKENS, i64::from(tokens.prompt_tokens)),
        attribute(semconv::OUTPUT_TOKENS, i64::from(tokens.completion_tokens)),
        attribute(semconv::CACHE_READ_TOKENS, i64::from(tokens.cached_tokens())),
    ]);
}

/// An admitted request's answer.
pub(crate) struct Observed {
    watch: Option<Arc<Watch>>,
    metrics: Arc<Metrics>,
    series: Arc<ModelSeries>,
    endpoint: &'static str,
    model: String,
    backend: String,
    arrived: Instant,
    hop: Option<Hop>,
    first: Option<Instant>,
    last: Option<Instant>,
    outcome: &'static str,
    contents: Option<String>,
}

impl Observed {
    /// Begins with the admission of `ask` under `id`; `model` and `backend` are who
    /// is asked first.
    pub(crate) fn begin(app: &App, ask: &Ask, id: &str, model: &str, backend: &str) -> Self {
        let (watch, endpoint) = (current(), ask.endpoint.path());
        let mut contents = None;
        if let Some(watch) = &watch {
            watch.note(|recorded, span| {
                describe::request(span, ask, id, model);
                if recorded.exporter.contents {
                    span.attributes.push(attribute(semconv::INPUT_MESSAGES, describe::messages(ask.prompt())));
                    contents = Some(String::new());
                }
            });
        }
        let series = app.metrics.model(model, endpoint);
        if let Some(read) = watch.as_ref().and_then(|w| w.read.get()) {
            series.read.observe((*read - ask.arrived).as_secs_f64());
        }
        Self {
            watch,
            metrics: app.metrics.clone(),
            series,
            endpoint,
            model: model.to_owned(),
            backend: backend.to_owned(),
            arrived: ask.arrived,
            hop: None,
            first: None,
            last: None,
            outcome: "cancelled",
            contents,
        }
    }

    /// `backend` answers, as `model`.
    pub(crate) fn taken(&mut self, hop: Hop, model: &str, backend: &str) {
        if self.model != model {
            self.series = self.metrics.model(model, self.endpoint);
            model.clone_into(&mut self.model);
        }
        backend.clone_into(&mut self.backend);
        self.hop = Some(hop);
    }

    /// A piece came at `at` and goes to the client now.
    pub(crate) fn piece(&mut self, piece: &Piece, at: Instant) {
        if piece.gains() {
            if self.first.is_none() {
                self.first_token(at);
            }
            self.last = Some(at);
        }
        let text = match piece {
            Piece::Text(text) | Piece::Rest(text) => text,
            Piece::Chunk(chunk) => &chunk.text,
            Piece::Done(end) => return self.ended(end),
            Piece::Started { .. } => return,
        };
        if let Some(contents) = self.contents.as_mut().filter(|c| c.len() < describe::CONTENTS) {
            contents.push_str(text);
        }
    }

    fn first_token(&mut self, at: Instant) {
        self.first = Some(at);
        if let Some(hop) = &self.hop {
            let own = self.arrived.elapsed().saturating_sub(at.saturating_duration_since(hop.began));
            let read = self.watch.as_ref().and_then(|w| w.read.get());
            let read = read.map_or_else(Default::default, |r| r.saturating_duration_since(self.arrived));
            self.series.added.observe(own.saturating_sub(read).as_secs_f64());
        }
        if let Some(watch) = &self.watch {
            watch.note(|_, span| {
                let event = Event { time_unix_nano: watch.nanos(at), name: semconv::FIRST_TOKEN.into(), attributes: Vec::new() };
                span.events.push(event);
            });
        }
    }

    fn ended(&mut self, end: &End) {
        self.outcome = "answered";
        let tokens = end.tokens.usage();
        self.series.prompt.observe(f64::from(tokens.prompt_tokens));
        self.series.generation.observe(f64::from(tokens.completion_tokens));
        if let (Some(first), Some(last), 2..) = (self.first, self.last, tokens.completion_tokens)
            && last > first
        {
            self.series.per_token.observe((last - first).as_secs_f64() / f64::from(tokens.completion_tokens - 1));
        }
        if let Some(t) = end.timings {
            self.series.prefill.observe(t.prefill_ms / 1e3);
            self.series.decode.observe(t.decode_ms / 1e3);
            self.series.inference.observe((t.prefill_ms + t.decode_ms) / 1e3);
        }
        if let Some(watch) = &self.watch {
            watch.note(|_, span| usage(span, end));
        }
        if let Some(mut hop) = self.hop.take() {
            hop.ended(end);
        }
    }

    /// The settled answer was a refusal.
    pub(crate) fn refused(&mut self) {
        if let Some(watch) = &self.watch {
            let attributes = vec![
                attribute(semconv::EVALUATION_NAME, "refusal"),
                attribute(semconv::EVALUATION_LABEL, "refused"),
                attribute(semconv::EVALUATION_SCORE, 1.0),
            ];
            let event = Event { time_unix_nano: watch.nanos(Instant::now()), name: semconv::EVALUATION.into(), attributes };
            watch.note(|_, span| span.events.push(event));
        }
    }

    /// The backend broke off in the middle.
    pub(crate) fn upstream_failed(&mut self, error: &UpstreamError) {
        if let Some(mut hop) = self.hop.take() {
            hop.failed(error);
        }
    }

    /// The request failed.
    pub(crate) fn failed(&mut self, error: &ApiError) {
        self.outcome = "failed";
        if let Some(watch) = &self.watch {
            watch.note(|_, span| {
                let class = error.code.clone().unwrap_or_else(|| error.status.to_string());
                span.attributes.push(attribute(semconv::ERROR_TYPE, class));
                span.status = Some(failed(String::new()));
            });
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        let seconds = self.arrived.elapsed().as_secs_f64();
        self.metrics.ended(&self.model, &self.backend, self.outcome, seconds);
        if let Some(watch) = &self.watch {
            watch.note(|_, span| {
                span.name = format!("{} {}", semconv::operation(self.endpoint), self.model);
                span.attributes.extend([
                    attribute(semconv::RESPONSE_MODEL, self.model.as_str()),
                    attribute(semconv::BACKEND, self.backend.as_str()),
                    attribute(semconv::OUTCOME, self.outcome),
                ]);
                if let Some(text) = self.contents.take() {
                    span.attributes.push(attribute(semconv::OUTPUT_MESSAGES, describe::answer(text)));
                }
            });
        }
    }
}
