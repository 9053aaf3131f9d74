//! What can go wrong with an upstream, and what a client is told.

use ashlar_api::ApiError;

/// How an attempt at an upstream failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum UpstreamError {
    /// No connection.
    #[error("backend {backend:?} cannot be reached: {why}")]
    Connect { backend: String, why: String },
    /// Nothing arrived in time.
    #[error("backend {backend:?} did not {what} within {seconds} s")]
    Timeout { backend: String, what: &'static str, seconds: f64 },
    /// The connection ended before the answer did.
    #[error("backend {backend:?} broke off after {bytes} bytes of its answer: {why}")]
    Closed { backend: String, bytes: u64, why: String },
    /// The answer is not what the protocol says.
    #[error("backend {backend:?} sent {what}: {why}")]
    Malformed { backend: String, what: &'static str, why: String },
    /// The answer is larger than allowed.
    #[error("backend {backend:?} sent {what} of more than {limit} bytes")]
    TooLarge { backend: String, what: &'static str, limit: u64 },
    /// The upstream said no.
    #[error("backend {backend:?} answered {status}: {message}")]
    Status {
        backend: String,
        status: u16,
        message: String,
        kind: Option<String>,
        param: Option<String>,
        code: Option<String>,
        /// Seconds.
        retry_after: Option<u32>,
    },
    /// The engine in this process, or a check before sending, said no.
    #[error("{0}")]
    Local(ApiError),
}

impl UpstreamError {
    /// Another attempt may go better; whoever asks has sent nothing on yet.
    pub(crate) fn retryable(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Timeout { .. } | Self::Closed { .. } | Self::Malformed { .. } => true,
            Self::TooLarge { .. } => false,
            // 401 and 403 are about our key: another backend has another.
            Self::Status { status, .. } => matches!(status, 401 | 403 | 404 | 408 | 409 | 425 | 429 | 500..),
            Self::Local(e) => matches!(e.status, 429 | 500..),
        }
    }

    /// It speaks against the backend's health, not the request or the load.
    pub(crate) fn unhealthy(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Timeout { .. } | Self::Closed { .. } | Self::Malformed { .. } => true,
            Self::TooLarge { .. } => false,
            Self::Status { status, .. } => matches!(status, 401 | 403 | 500..) && *status != 503,
            // An engine knows its own state (`Upstream::unhealthy`) and queue.
            Self::Local(_) => false,
        }
    }

    /// Seconds the backend wants to be left alone.
    pub(crate) fn rest(&self) -> Option<u32> {
        match self {
            Self::Status { status: 429 | 503, retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// A word for metrics and decisions.
    pub(crate) fn class(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "connect",
            Self::Timeout { .. } => "timeout",
            Self::Closed { .. } => "closed",
            Self::Malformed { .. } => "malformed",
            Self::TooLarge { .. } => "too_large",
            Self::Status { status: 429, .. } => "rate_limited",
            Self::Status { status: 500.., .. } => "server_error",
            Self::Status { .. } => "refused",
            Self::Local(_) => "local",
        }
    }
}

impl From<UpstreamError> for ApiError {
    /// A client's own mistakes keep the upstream's status and words; what the
    /// gateway or the upstream is to blame for becomes a 502, 503 or 504.
    fn from(e: UpstreamError) -> Self {
        let message = e.to_string();
        let server = |status: u16, code: &str| ApiError {
            status,
            code: Some(code.into()),
            ..ApiError::unavailable(message.clone())
        };
        match e {
            UpstreamError::Local(e) => e,
            UpstreamError::Connect { .. } => server(502, "upstream_unreachable"),
            UpstreamError::Timeout { .. } => server(504, "upstream_timeout"),
            UpstreamError::Closed { .. } => server(502, "upstream_closed"),
            UpstreamError::Malformed { .. } => server(502, "upstream_malformed"),
            UpstreamError::TooLarge { .. } => server(502, "upstream_too_large"),
            UpstreamError::Status { status, kind, param, code, retry_after, .. } => match status {
                // Our key is wrong there; the client's may be right.
                401 | 403 | 407 => server(502, "upstream_auth"),
                429 => ApiError {
                    code: code.or(Some("upstream_rate_limited".into())),
                    ..ApiError { retry_after, ..ApiError::overloaded(message, 1) }
                },
                503 => ApiError { retry_after, ..server(503, "upstream_unavailable") },
                408 | 504 => server(504, "upstream_timeout"),
                400..=499 => ApiError {
                    status,
                    kind: kind.unwrap_or_else(|| "invalid_request_error".into()),
                    param,
                    code,
                    ..ApiError::bad_request(message, None, None)
                },
                _ => server(502, "upstream_error"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_learn_whose_fault_it_is() {
        let status = |status: u16, retry_after| UpstreamError::Status {
            backend: "b".into(),
            status,
            message: "no".into(),
            kind: None,
            param: Some("top_p".into()),
            code: Some("c".into()),
            retry_after,
        };
        for (upstream, client, code) in [
            (400, 400, "c"),
            (401, 502, "upstream_auth"),
            (404, 404, "c"),
            (422, 422, "c"),
            (429, 429, "c"),
            (500, 502, "upstream_error"),
            (503, 503, "upstream_unavailable"),
            (504, 504, "upstream_timeout"),
            (302, 502, "upstream_error"),
        ] {
            let e = ApiError::from(status(upstream, Some(7)));
            assert_eq!((e.status, e.code.as_deref()), (client, Some(code)), "{upstream}");
            assert!(e.message.contains(&upstream.to_string()), "the upstream's own status: {}", e.message);
            assert_eq!(e.retry_after, matches!(upstream, 429 | 503).then_some(7));
        }
        assert!(!status(400, None).retryable() && status(429, None).retryable());
        assert!(status(500, None).unhealthy() && !status(429, None).unhealthy());
    }
}
