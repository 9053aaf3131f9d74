//! Signing in to the console with a key, and the door before its data.
//!
//! Where keys are required, everything below `/ashlar/` is for keys that may see
//! the console: sent along like any other, or shown once to `POST /ashlar/session`
//! for a cookie that scripts cannot read and other sites' pages cannot send.
//!
//! What may not happen here: a cookie that outlives its key (each request looks
//! the key up again), or one that holds the secret. Sessions are this process's
//! own: after a restart, and at another replica, one signs in again.

use crate::{
    app::App,
    door::{Caller, denied},
    error::{Failure, refuse},
    intake,
};
use ashlar_api::ApiError;
use ashlar_core::digest::to_hex;
use ashlar_store::Access;
use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
    routing::get,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

const COOKIE: &str = "ashlar_session";
/// How long one stays signed in.
const LASTS: Duration = Duration::from_secs(12 * 3600);
const PATH: &str = "/ashlar/session";

/// Who is signed in: random token → key and end.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<HashMap<String, (String, Instant)>>);

impl Sessions {
    fn with<T>(&self, f: impl FnOnce(&mut HashMap<String, (String, Instant)>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn open(&self, key: &str, now: Instant) -> Result<String, ApiError> {
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes).map_err(|e| ApiError::internal(format!("no random bytes: {e}")))?;
        let token = to_hex(&bytes);
        self.with(|held| {
            held.retain(|_, (_, until)| *until > now);
            held.insert(token.clone(), (key.to_owned(), now + LASTS));
        });
        Ok(token)
    }

    fn key(&self, token: &str, now: Instant) -> Option<String> {
        self.with(|held| held.get(token).filter(|(_, until)| *until > now).map(|(key, _)| key.clone()))
    }
}

pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new().route(PATH, get(show).post(sign_in).delete(sign_out))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SignIn {
    key: String,
}

/// The session's token among the cookies.
fn token(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get_all(header::COOKIE).into_iter().filter_map(|v| v.to_str().ok());
    cookies.flat_map(|c| c.split(';')).find_map(|c| {
        let (name, value) = c.trim().split_once('=')?;
        (name == COOKIE).then_some(value)
    })
}

/// The key whose holder sends these headers, by cookie or by itself, if it may see
/// the console.
fn console_key(app: &App, headers: &HeaderMap) -> Result<Arc<Access>, ApiError> {
    let accounts = app.state.accounts.as_ref();
    let session = token(headers).and_then(|t| app.sessions.key(t, Instant::now()));
    let access = match (session, accounts) {
        (Some(id), Some(accounts)) => accounts.access(&id).map_err(|e| denied(&e))?,
        _ => {
            let nobody = || ApiError::unauthorized("sign in with a key that may see the console");
            Caller::of(app, headers)?.access().cloned().ok_or_else(nobody)?
        }
    };
    may_see(&access).map(|()| access)
}

fn may_see(access: &Access) -> Result<(), ApiError> {
    if access.key().settings.console {
        return Ok(());
    }
    let message = "this key may not see the console; `ashlar keys create NAME --console` makes one that may";
    Err(ApiError { kind: "permission_error".into(), ..refuse(403, "console_not_allowed", message.into()) })
}

/// Before everything of the console: where keys are required, its data are for
/// keys that may see it. The page itself is for all, since one signs in there.
pub(crate) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let data = request.uri().path().starts_with("/ashlar/") && request.uri().path() != PATH;
    if data
        && app.state.config.require_keys
        && let Err(e) = console_key(&app, request.headers())
    {
        return Failure::from(e).into_response();
    }
    next.run(request).await
}

/// Before what reads the ledgers: what has ended is there for whoever looks. A
/// database that is not reached does not keep the console from showing the rest.
pub(crate) async fn written(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if let Some(accounts) = &app.state.accounts {
        let _ = tokio::time::timeout(Duration::from_secs(1), accounts.flush()).await;
    }
    app.ledger.flush().await;
    next.run(request).await
}

/// `{required, signed_in, key, team}`.
async fn show(State(app): State<Arc<App>>, headers: HeaderMap) -> Json<Value> {
    let access = console_key(&app, &headers).ok();
    Json(json!({
        "required": app.state.config.require_keys,
        "signed_in": access.is_some(),
        "key": access.as_ref().map(|a| &a.key().settings.name),
        "team": access.as_ref().and_then(|a| a.team()).map(|t| &t.settings.name),
    }))
}

async fn sign_in(State(app): State<Arc<App>>, request: Request) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    let body = intake::read_body(&app.state.config, &parts.headers, body).await?;
    let asked: SignIn = serde_json::from_slice(&body).map_err(|e| {
        ApiError::bad_request(format!("the body must be {{\"key\": \"…\"}}: {e}"), Some("key"), Some("invalid_json"))
    })?;
    let no_accounts = || ApiError::not_found("this server has no keys", None, Some("no_keys"));
    let accounts = app.state.accounts.as_ref().ok_or_else(no_accounts)?;
    let access = accounts.authenticate(asked.key.trim()).map_err(|e| denied(&e))?;
    may_see(&access)?;
    let token = app.sessions.open(&access.key().id, Instant::now())?;
    Ok(with_cookie(&token, LASTS.as_secs()))
}

async fn sign_out(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if let Some(token) = token(&headers) {
        app.sessions.with(|held| held.remove(token));
    }
    with_cookie("", 0)
}

fn with_cookie(token: &str, seconds: u64) -> Response {
    let cookie = format!("{COOKIE}={token}; Path=/ashlar; Max-Age={seconds}; HttpOnly; SameSite=Strict");
    let mut response = StatusCode::NO_CONTENT.into_response();
    // Digits and fixed words.
    if let Ok(value) = HeaderValue::try_from(cookie) {
        response.headers_mut().insert(header::SET_COOKIE, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_ends_by_itself() {
        let (sessions, now) = (Sessions::default(), Instant::now());
        let token = sessions.open("key-1", now).unwrap();
        assert_eq!(sessions.key(&token, now).as_deref(), Some("key-1"));
        assert_eq!(sessions.key(&token, now + LASTS), None);
        assert_eq!(sessions.key(&token[1..], now), None);
        sessions.open("key-2", now + LASTS).unwrap();
        assert_eq!(sessions.with(|held| held.len()), 1, "what has ended is forgotten");
    }

    #[test]
    fn the_token_is_found_among_cookies() {
        let found = |cookie: &str| {
            let headers = HeaderMap::from_iter([(header::COOKIE, HeaderValue::try_from(cookie).unwrap())]);
            token(&headers).map(str::to_owned)
        };
        assert_eq!(found("a=b; ashlar_session=12;c=d").as_deref(), Some("12"));
        assert_eq!(found("xashlar_session=12"), None);
    }
}
