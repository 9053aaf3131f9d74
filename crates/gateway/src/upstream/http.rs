//! The way to one HTTP server: pooled connections, TLS, timeouts, limits.
//!
//! hyper's client on rustls: the server side is hyper already, and a gateway
//! needs each timeout by itself (connecting, first byte, between bytes), which
//! one for the whole request cannot stand for. Rejected: reqwest, which adds
//! redirects, cookies, proxies and decompression, all unwanted between two
//! servers, and hides which of the phases failed.
//!
//! What may not happen here: a key in an error or a log. It is a header marked
//! sensitive, and is struck out of what the server says back.

use super::{UpstreamError, retry_after};
use ashlar_core::clock;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, Uri,
    body::{Body as _, Incoming},
    header::{self, HeaderMap, HeaderName, HeaderValue},
};
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    error::Error,
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, timeout, timeout_at};
use tower_service::Service;

/// Most bytes read of an error's body.
const ERROR_BODY: u64 = 64 << 10;
/// Most characters of an upstream's error message passed on.
const ERROR_CHARS: usize = 500;

/// How a server is reached.
#[derive(Debug, Clone)]
pub(crate) struct LinkSettings {
    pub(crate) backend: String,
    /// Base address, without a slash at its end.
    pub(crate) url: String,
    /// Sent with every request: the key's header among them.
    pub(crate) headers: Vec<(String, String)>,
    /// The key, to be struck out of errors.
    pub(crate) secret: Option<String>,
    /// More roots of trust, PEM.
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) connect: Duration,
    pub(crate) first_byte: Duration,
    pub(crate) idle: Duration,
    pub(crate) probe: Duration,
    pub(crate) max_answer_bytes: u64,
    pub(crate) max_event_bytes: usize,
    pub(crate) idle_connections: usize,
}

/// Why no link could be made of the settings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("{0:?} is not an http or https address: write http://HOST:PORT/v1")]
    Url(String),
    #[error("header {0:?} cannot be sent")]
    Header(String),
    #[error("cannot read certificates of {path}: {why}")]
    Certificates { path: PathBuf, why: String },
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
}

type BoxError = Box<dyn Error + Send + Sync>;

/// A connector that gives up.
#[derive(Clone)]
struct Timed {
    inner: HttpsConnector<HttpConnector>,
    limit: Duration,
}

impl Service<Uri> for Timed {
    type Response = <HttpsConnector<HttpConnector> as Service<Uri>>::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (work, limit) = (self.inner.call(uri), self.limit);
        Box::pin(async move {
            timeout(limit, work).await.unwrap_or_else(|_| {
                let why = format!("no connection within {} s", limit.as_secs_f64());
                Err(std::io::Error::new(std::io::ErrorKind::TimedOut, why).into())
            })
        })
    }
}

/// The way to one server. Clones share the pool.
pub(crate) struct Link {
    client: Client<Timed, Full<Bytes>>,
    headers: HeaderMap,
    base: String,
    /// Scheme and host, for paths from the root.
    root: String,
    pub(crate) settings: LinkSettings,
}

impl Link {
    pub(crate) fn new(settings: LinkSettings) -> Result<Self, LinkError> {
        let base = settings.url.trim_end_matches('/').to_owned();
        let uri: Uri = base.parse().map_err(|_| LinkError::Url(base.clone()))?;
        let (Some("http" | "https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(LinkError::Url(base));
        };
        let root = format!("{}://{authority}", uri.scheme_str().unwrap_or("http"));
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(concat!("ashlar/", env!("CARGO_PKG_VERSION"))));
        for (name, value) in &settings.headers {
            let bad = || LinkError::Header(name.clone());
            let key = HeaderName::try_from(name).map_err(|_| bad())?;
            let mut value = HeaderValue::try_from(value).map_err(|_| bad())?;
            value.set_sensitive(true);
            headers.insert(key, value);
        }
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        http.enforce_http(false);
        http.set_keepalive(Some(Duration::from_secs(60)));
        let inner = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls(settings.ca_file.as_ref())?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .pool_max_idle_per_host(settings.idle_connections)
            .build(Timed { inner, limit: settings.connect });
        Ok(Self { client, headers, base, root, settings })
    }

    fn backend(&self) -> String {
        self.settings.backend.clone()
    }

    fn connect_error(&self, e: &hyper_util::client::legacy::Error) -> UpstreamError {
        let mut why = e.to_string();
        let mut source = e.source();
        while let Some(inner) = source {
            why = inner.to_string();
            source = inner.source();
        }
        if e.is_connect() {
            UpstreamError::Connect { backend: self.backend(), why }
        } else {
            UpstreamError::Closed { backend: self.backend(), bytes: 0, why }
        }
    }

    /// Sends `body` to `tail`, see `Dialect::default_probe` for its form, and gives the answer's
    /// head once its status is 200.
    pub(crate) async fn post(&self, tail: &str, body: Bytes) -> Result<Reader, UpstreamError> {
        let deadline = Instant::now() + self.settings.first_byte;
        let mut reader = self.ask(Method::POST, self.uri(tail), body, deadline).await?;
        match reader.status {
            200 => Ok(reader),
            status => Err(self.refusal(status, &mut reader).await),
        }
    }

    /// Asks `path` with GET; see `Dialect::default_probe` for its form.
    pub(crate) async fn get(&self, path: &str) -> Result<(), UpstreamError> {
        let deadline = Instant::now() + self.settings.probe;
        let mut reader = self.ask(Method::GET, self.uri(path), Bytes::new(), deadline).await?;
        reader.limit = ERROR_BODY.max(4 << 20);
        match reader.status {
            200..=299 => {
                // Read to its end, so that the connection can be used again.
                while reader.next().await?.is_some() {}
                Ok(())
            }
            status => Err(self.refusal(status, &mut reader).await),
        }
    }

    fn uri(&self, path: &str) -> String {
        match path.strip_prefix("//") {
            Some(rest) => format!("{}/{rest}", self.root),
            None => format!("{}{path}", self.base),
        }
    }

    async fn ask(&self, method: Method, uri: String, body: Bytes, deadline: Instant) -> Result<Reader, UpstreamError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri.parse().map_err(|e| UpstreamError::Connect {
            backend: self.backend(),
            why: format!("{uri:?} is no address: {e}"),
        })?;
        *request.headers_mut() = self.headers.clone();
        crate::watch::carry(request.headers_mut());
        let response = match timeout_at(deadline, self.client.request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(e)) => return Err(self.connect_error(&e)),
            Err(_) => return Err(self.late("answer", self.settings.first_byte)),
        };
        Ok(Reader::new(self, response, deadline))
    }

    fn late(&self, what: &'static str, limit: Duration) -> UpstreamError {
        UpstreamError::Timeout { backend: self.backend(), what, seconds: limit.as_secs_f64() }
    }

    /// The error in a body with a status that is not 200.
    async fn refusal(&self, status: u16, reader: &mut Reader) -> UpstreamError {
        let mut body = Vec::new();
        reader.limit = ERROR_BODY;
        // What cannot be read of an error leaves the status, which counts.
        while let Ok(Some(piece)) = reader.next().await {
            body.extend_from_slice(&piece);
        }
        self.status_error(status, &body, reader.retry_after)
    }

    /// Reads an error body of any of the dialects' forms.
    pub(crate) fn status_error(&self, status: u16, body: &[u8], retry_after: Option<u32>) -> UpstreamError {
        let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
        // OpenAI, vLLM, SGLang, llama-server and Anthropic nest; old vLLM and
        // TGI do not; FastAPI calls it `detail`.
        let detail = json.get("error").filter(|e| e.is_object()).unwrap_or(&json);
        let text = |key: &str| detail.get(key).and_then(|v| v.as_str()).map(str::to_owned);
        let flat = || json.get("error").and_then(|v| v.as_str()).map(str::to_owned);
        let raw = || String::from_utf8_lossy(body).into_owned();
        let message = text("message").or_else(|| text("detail")).or_else(flat).unwrap_or_else(raw);
        let mut message: String = message.chars().take(ERROR_CHARS).collect();
        if let Some(secret) = self.settings.secret.as_deref().filter(|s| !s.is_empty()) {
            message = message.replace(secret, "[key]");
        }
        if message.trim().is_empty() {
            message = "no reason given".into();
        }
        UpstreamError::Status {
            backend: self.backend(),
            status,
            message,
            kind: text("type"),
            param: text("param"),
            code: text("code"),
            retry_after,
        }
    }
}

fn tls(ca_file: Option<&PathBuf>) -> Result<rustls::ClientConfig, LinkError> {
    let mut roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = ca_file {
        let bad = |why: String| LinkError::Certificates { path: path.clone(), why };
        let found = CertificateDer::pem_file_iter(path).map_err(|e| bad(e.to_string()))?;
        let mut count = 0;
        for certificate in found {
            let certificate = certificate.map_err(|e| bad(e.to_string()))?;
            roots.add(certificate).map_err(|e| bad(e.to_string()))?;
            count += 1;
        }
        if count == 0 {
            return Err(bad("it holds none".into()));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider);
    let builder = builder.with_safe_default_protocol_versions().map_err(LinkError::Tls)?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// An answer's body. Dropping it before its end closes the connection.
pub(crate) struct Reader {
    body: Incoming,
    backend: String,
    /// When the first byte of the body must be there.
    first: Option<(Instant, Duration)>,
    idle: Duration,
    bytes: u64,
    limit: u64,
    pub(crate) status: u16,
    pub(crate) event_stream: bool,
    pub(crate) max_event_bytes: usize,
    retry_after: Option<u32>,
}

impl Reader {
    fn new(link: &Link, response: Response<Incoming>, deadline: Instant) -> Self {
        let (head, body) = response.into_parts();
        let text = |name| head.headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
        Self {
            body,
            backend: link.backend(),
            first: Some((deadline, link.settings.first_byte)),
            idle: link.settings.idle,
            bytes: 0,
            limit: link.settings.max_answer_bytes,
            status: head.status.as_u16(),
            event_stream: text(header::CONTENT_TYPE).is_some_and(|t| t.trim_start().starts_with("text/event-stream")),
            max_event_bytes: link.settings.max_event_bytes,
            retry_after: text(header::RETRY_AFTER).and_then(|v| retry_after::seconds(v, clock::now_ms())),
        }
    }

    /// The next bytes; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, UpstreamError> {
        loop {
            let frame = self.body.frame();
            let frame = match self.first {
                Some((deadline, _)) => timeout_at(deadline, frame).await,
                None => timeout(self.idle, frame).await,
            };
            let frame = frame.map_err(|_| {
                let (what, limit) = match self.first {
                    Some((_, limit)) => ("begin its answer", limit),
                    None => ("go on", self.idle),
                };
                UpstreamError::Timeout { backend: self.backend.clone(), what, seconds: limit.as_secs_f64() }
            })?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|e| self.closed(e.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            if data.is_empty() {
                continue;
            }
            self.first = None;
            self.bytes += data.len() as u64;
            if self.bytes > self.limit {
                return Err(self.too_large("an answer", self.limit));
            }
            return Ok(Some(data));
        }
    }

    /// The whole body.
    pub(crate) async fn whole(&mut self) -> Result<Vec<u8>, UpstreamError> {
        let declared = self.body.size_hint().lower();
        if declared > self.limit {
            return Err(self.too_large("an answer", self.limit));
        }
        let mut whole = Vec::with_capacity(usize::try_from(declared).unwrap_or(0));
        while let Some(piece) = self.next().await? {
            whole.extend_from_slice(&piece);
        }
        Ok(whole)
    }

    pub(crate) fn closed(&self, why: String) -> UpstreamError {
        UpstreamError::Closed { backend: self.backend.clone(), bytes: self.bytes, why }
    }

    pub(crate) fn too_large(&self, what: &'static str, limit: u64) -> UpstreamError {
        UpstreamError::TooLarge { backend: self.backend.clone(), what, limit }
    }

    pub(crate) fn malformed(&self, what: &'static str, why: impl ToString) -> UpstreamError {
        UpstreamError::Malformed { backend: self.backend.clone(), what, why: why.to_string() }
    }

    /// Reads what may follow the last event, so that the connection goes back
    /// to the pool; not for long, and not in the way of the answer.
    pub(crate) fn finish(mut self) {
        use futures::FutureExt as _;
        if self.body.is_end_stream() {
            return;
        }
        if let Some(None | Some(Err(_))) = self.body.frame().now_or_never() {
            return;
        }
        tokio::spawn(async move {
            let rest = async { while let Some(Ok(_)) = self.body.frame().await {} };
            // A server that goes on talking loses its connection.
            let _ = timeout(Duration::from_millis(500), rest).await;
        });
    }
}
