//! The one error clients see: a status and the OpenAI error body.
//!
//! Rejected: an enum per failure. The wire form is open-ended (`code` is a
//! string) and every room adds its own, so the value is the data itself.

use ashlar_core::{Fault, Hint};
use serde::{Deserialize, Serialize};

/// An error as it leaves over HTTP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status, 400–599.
    pub status: u16,
    /// What is wrong, with the numbers.
    pub message: String,
    /// OpenAI's `type`, e.g. `invalid_request_error`.
    pub kind: String,
    /// The request field at fault, e.g. `messages[1].role`.
    pub param: Option<String>,
    /// A word for programs, e.g. `context_length_exceeded`.
    pub code: Option<String>,
    /// Seconds after which the same request may pass; the `Retry-After` header.
    pub retry_after: Option<u32>,
}

/// `{"error": …}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error itself.
    pub error: ErrorDetail,
}

/// The inside of [`ErrorBody`]; `param` and `code` are present even when null,
/// as official clients expect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// What is wrong.
    pub message: String,
    /// Its class.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<String>,
}

impl ApiError {
    fn new(status: u16, kind: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            kind: kind.into(),
            param: None,
            code: None,
            retry_after: None,
        }
    }

    fn at(mut self, param: Option<&str>, code: Option<&str>) -> Self {
        self.param = param.map(str::to_owned);
        self.code = code.map(str::to_owned);
        self
    }

    /// 400: the request itself is at fault.
    pub fn bad_request(
        message: impl Into<String>,
        param: Option<&str>,
        code: Option<&str>,
    ) -> Self {
        Self::new(400, "invalid_request_error", message).at(param, code)
    }

    /// 401: no key, or not a valid one.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(401, "authentication_error", message).at(None, Some("invalid_api_key"))
    }

    /// 404: no such model or route.
    pub fn not_found(message: impl Into<String>, param: Option<&str>, code: Option<&str>) -> Self {
        Self::new(404, "invalid_request_error", message).at(param, code)
    }

    /// 404 `model_not_found`, naming what is served.
    pub fn unknown_model(model: &str, served: &[String]) -> Self {
        let model: String = model.chars().take(100).collect();
        Self::not_found(
            format!(
                "the model {model:?} is not served here; served: {}",
                served.join(", ")
            ),
            Some("model"),
            Some("model_not_found"),
        )
    }

    /// 429: this queue is full; retry after `retry_after` seconds.
    pub fn overloaded(message: impl Into<String>, retry_after: u32) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(429, "rate_limit_error", message).at(None, Some("queue_full"))
        }
    }

    /// 503: nothing can be served now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "server_error", message).at(None, Some("unavailable"))
    }

    /// 500: our fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "server_error", message).at(None, Some("internal_error"))
    }

    /// The JSON body.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                message: self.message.clone(),
                kind: self.kind.clone(),
                param: self.param.clone(),
                code: self.code.clone(),
            },
        }
    }
}

impl Hint for ApiError {
    fn fault(&self) -> Fault {
        match self.status {
            429 | 502..=504 => Fault::Environment,
            400..=499 => Fault::Input,
            _ => Fault::Bug,
        }
    }

    fn hint(&self) -> Option<String> {
        match (self.retry_after, self.code.as_deref()) {
            (Some(s), _) => Some(format!("try again in {s} s")),
            (_, Some("context_length_exceeded")) => {
                Some("shorten the messages or lower max_tokens".into())
            }
            (_, Some("unsupported_parameter" | "unknown_parameter")) => {
                Some("leave the field out".into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_what_openai_clients_read() {
        let e = ApiError::bad_request("temperature is 3", Some("temperature"), None);
        assert_eq!(
            serde_json::to_string(&e.body()).unwrap(),
            r#"{"error":{"message":"temperature is 3","type":"invalid_request_error","param":"temperature","code":null}}"#
        );
        let busy = ApiError::overloaded("64 wait", 2);
        assert_eq!(busy.fault(), Fault::Environment);
        assert_eq!(busy.hint().unwrap(), "try again in 2 s");
    }
}
