//! Errors as HTTP answers: always JSON in OpenAI's form.

use crate::reply::RESPONSE_ID;
use ashlar_api::ApiError;
use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

/// An error on its way out, with the id of the response it ended, if any.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: ApiError,
    pub(crate) response_id: Option<String>,
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self {
            error,
            response_id: None,
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.error.status)
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(body(&self.error))).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.error.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(id) = self.response_id.and_then(|id| HeaderValue::try_from(id).ok()) {
            headers.insert(RESPONSE_ID, id);
        }
        response
    }
}

/// `{"error": …}`.
pub(crate) fn body(error: &ApiError) -> serde_json::Value {
    let e = error.body().error;
    serde_json::json!({"error": {
        "message": e.message, "type": e.kind, "param": e.param, "code": e.code,
    }})
}

/// An error of the request's form that `ApiError` has no constructor for.
pub(crate) fn refuse(status: u16, code: &str, message: String) -> ApiError {
    ApiError {
        status,
        ..ApiError::bad_request(message, None, Some(code))
    }
}
