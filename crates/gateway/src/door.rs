//! The door: whose key it is, what it may ask for, and what is set aside for it.
//!
//! A request passes in this order: [`Caller::of`] before its body is read,
//! [`Caller::route`] and [`Caller::narrow`] before it is routed, [`Caller::enter`]
//! once it is known who could answer: that reserves the most it can use against
//! every limit of key, team and end user. `recorder` settles the reservation.
//!
//! What may not happen here: an answer that tells whether a key exists (unknown,
//! revoked, expired and disabled ones get the same words), a name of a model the
//! key may not ask for, or a request that goes on unmetered because the accounts
//! could not be asked.
//!
//! What a key may ask for are names. Where the operator's rules and fallbacks send
//! such a request is the operator's choice, and is priced as what it became.

use crate::{
    app::App,
    ask::Ask,
    error::{Failure, refuse},
    route::{Route, Target},
    table::{Plan, Table},
    upstream::Dialect,
};
use ashlar_api::{ApiError, ModelInfo};
use ashlar_core::{Decimal, clock};
use ashlar_store::{Access, Denied, Exceeded, Measure, Request, Reservation, ReserveError, Secret, Tokens};
use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// Bytes of JSON for which a token of prompt is set aside. Ordinary text has three
/// to four; text made to have fewer than two is charged in full when it settles.
const RESERVE_BYTES: u64 = 2;
/// Tokens set aside for what a chat template adds.
const TEMPLATE_TOKENS: u64 = 32;

/// Who asks; without a key where none is required.
#[derive(Debug, Clone)]
pub(crate) struct Caller(Option<Arc<Access>>);

/// One of the places that `max_in_flight` counts, until it is dropped.
pub(crate) struct Place(Arc<AtomicUsize>);

impl Place {
    /// One of `limit`, unless as many are taken.
    fn take(taken: &Arc<AtomicUsize>, limit: usize) -> Result<Self, usize> {
        let one_more = |n: usize| (n < limit).then_some(n + 1);
        taken.fetch_update(Relaxed, Relaxed, one_more).map(|_| Self(taken.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A request that was let in. One that goes no further gives back what was set aside
/// for it.
pub(crate) struct Entered {
    /// The id of the response, and of its row in the usage ledger.
    pub(crate) id: String,
    access: Option<Arc<Access>>,
    end_user: Option<String>,
    /// What is set aside; `None` on a server without accounts.
    pub(crate) reservation: Option<Reservation>,
    pub(crate) place: Option<Place>,
    /// `x-ratelimit-…`.
    pub(crate) limits: HeaderMap,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(reservation) = self.reservation.take() {
            reservation.withdraw();
        }
    }
}

/// The secret a client sends, as OpenAI's clients or as Anthropic's.
fn secret(headers: &HeaderMap) -> Option<&str> {
    let text = |name: HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
    let bearer = text(header::AUTHORIZATION).and_then(|v| {
        let (scheme, rest) = v.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(rest)
    });
    let secret = bearer.or_else(|| text(HeaderName::from_static("x-api-key")));
    secret.map(str::trim).filter(|s| !s.is_empty())
}

/// What a key that is not let in is told; the same for every reason but one, which
/// is ours.
pub(crate) fn denied(why: &Denied) -> ApiError {
    match why {
        Denied::Stale { .. } => ApiError {
            retry_after: Some(1),
            ..ApiError::unavailable("keys cannot be checked now: their database is not reached")
        },
        _ => ApiError::unauthorized("this key is not valid here"),
    }
}

impl Caller {
    /// Who sends these headers.
    ///
    /// # Errors
    /// 401 without a good key where one is required, or with a bad one of ours;
    /// 503 while keys cannot be checked.
    pub(crate) fn of(app: &App, headers: &HeaderMap) -> Result<Self, ApiError> {
        let required = app.state.config.require_keys;
        let Some(accounts) = &app.state.accounts else { return Ok(Self(None)) };
        match secret(headers) {
            // Clients of servers without keys send something all the same.
            Some(secret) if !required && !Secret::is_like(secret) => Ok(Self(None)),
            Some(secret) => accounts.authenticate(secret).map(|a| Self(Some(a))).map_err(|e| denied(&e)),
            None if required => {
                let message = "a key is required: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`";
                Err(ApiError { code: Some("missing_api_key".into()), ..ApiError::unauthorized(message) })
            }
            None => Ok(Self(None)),
        }
    }

    /// The gateway itself, which asks judges.
    pub(crate) const fn ours() -> Self {
        Self(None)
    }

    /// The key, where there is one.
    pub(crate) fn access(&self) -> Option<&Arc<Access>> {
        self.0.as_ref()
    }

    /// Whether it may ask for `model`.
    pub(crate) fn may(&self, model: &str) -> bool {
        self.0.as_ref().is_none_or(|a| a.allows(model).is_ok())
    }

    /// Of `models` those it may ask for.
    pub(crate) fn models(&self, models: Vec<ModelInfo>) -> Vec<ModelInfo> {
        models.into_iter().filter(|m| self.may(&m.id)).collect()
    }

    /// Who serves `name`.
    ///
    /// # Errors
    /// 403 when this key may not ask for it, whether it is served or not; else 404
    /// when it is not.
    pub(crate) fn route(&self, app: &App, table: &Table, name: &str) -> Result<Arc<Route>, ApiError> {
        let route = app.route(table, name);
        // An alias may be listed, or what it stands for.
        let may = self.may(name) || route.as_ref().is_ok_and(|r| self.may(&r.name));
        match route {
            Ok(route) if may => Ok(route),
            Err(_) if may => Err(ApiError::unknown_model(name, &self.names(app, table))),
            _ => {
                let shown: String = name.chars().take(100).collect();
                let names = self.names(app, table).join(", ");
                let message = format!("this key may not ask for the model {shown:?}; it may ask for: {names}");
                Err(ApiError {
                    kind: "permission_error".into(),
                    param: Some("model".into()),
                    ..refuse(403, "model_not_allowed", message)
                })
            }
        }
    }

    fn names(&self, app: &App, table: &Table) -> Vec<String> {
        app.names(table).into_iter().filter(|n| self.may(n)).collect()
    }

    /// `ask` with no higher priority than the key may ask for. Engines, ours here or in
    /// another process, answer higher ones first; some other servers take the field and
    /// count the other way.
    ///
    /// # Errors
    /// 400 for a priority that is no integer, and for one of a key with a ceiling that
    /// may go to a server of another kind.
    pub(crate) fn narrow(&self, table: &Table, ask: Ask, route: &Route) -> Result<Ask, ApiError> {
        let Some(access) = &self.0 else { return Ok(ask) };
        let sent: Option<i32> = ask.typed("priority", "an integer of 32 bits")?;
        let of = |kinds: &[Dialect]| route.targets.iter().any(|t| kinds.contains(&t.node.dialect));
        let ceiling = access.priority(i32::MAX) < i32::MAX;
        if sent.is_some() && ceiling {
            let fallbacks = route.fallback.iter().filter_map(|name| table.route(name));
            let reached = fallbacks.flat_map(|r| r.targets.clone()).chain(route.targets.iter().cloned());
            if let Some(other) = reached.map(|t| t.node.dialect).find(|d| !matches!(d, Dialect::Engine | Dialect::Ashlar)) {
                let message = format!("this key has a highest priority, which {} has no notion of: leave priority out", other.as_str());
                return Err(ApiError::bad_request(message, Some("priority"), Some("unsupported_parameter")));
            }
        }
        let allowed = access.priority(sent.unwrap_or(0));
        // What generates nothing waits for nothing.
        let implied = sent.is_some() || (of(&[Dialect::Engine]) && ask.endpoint.streams());
        if allowed == sent.unwrap_or(0) || !implied {
            return Ok(ask);
        }
        ask.with("priority", &allowed.to_string())
    }

    /// Lets a request in that may go to the targets of `plan`: the most it can use
    /// is reserved.
    ///
    /// # Errors
    /// The answer to give instead: 429 with the limit and its numbers, 503 when it
    /// could not be decided.
    pub(crate) async fn enter(&self, app: &App, table: &Table, ask: &Ask, plan: &Plan) -> Result<Entered, Response> {
        let refused = |error: ApiError| Failure::from(error).into_response();
        let limit = table.limits.max_in_flight;
        let place = Place::take(&app.in_flight, limit).map_err(|taken| {
            let message = format!("{taken} responses are in flight, the limit is {limit}");
            refused(ApiError::overloaded(message, 1))
        })?;
        let mut entered = Entered {
            id: ashlar_core::id::new(ask.endpoint.id_prefix()),
            access: self.0.clone(),
            end_user: None,
            reservation: None,
            place: Some(place),
            limits: HeaderMap::new(),
        };
        let Some(accounts) = &app.state.accounts else { return Ok(entered) };
        entered.end_user = end_user(ask).map(|user| accounts.user_hash(&user));
        let most = most(ask, plan, table.config.accounts.assume_tokens);
        let machine_us = u64::try_from(table.limits.request_timeout.as_micros()).unwrap_or(u64::MAX);
        let Some(target) = dearest(app, plan, &most, machine_us) else {
            return Err(refused(ApiError::internal("a plan without a target")));
        };
        let request = Request { most, most_machine_us: machine_us, ..entered.request(app, ask, target) };
        match accounts.reserve(request).await {
            Ok(reservation) => {
                for left in reservation.left() {
                    let limit = &left.limit;
                    limits(&mut entered.limits, limit.measure, limit.amount, left.left, left.ends_ms);
                }
                entered.reservation = Some(reservation);
                Ok(entered)
            }
            Err(ReserveError::Exceeded(e)) => Err(exceeded(&e)),
            Err(ReserveError::Unpriced(why)) => {
                let message = format!("this key has a limit of money, and {why}");
                Err(refused(ApiError { kind: "permission_error".into(), ..refuse(403, "price_unknown", message) }))
            }
            Err(ReserveError::Accounts(e)) => Err(refused(ApiError {
                retry_after: Some(1),
                ..ApiError::unavailable(format!("the request could not be admitted: {e}"))
            })),
            // The enum may grow.
            Err(e) => Err(refused(ApiError::internal(e.to_string()))),
        }
    }
}

impl Entered {
    fn request(&self, app: &App, ask: &Ask, target: &Target) -> Request {
        Request {
            id: self.id.clone(),
            access: self.access.clone(),
            end_user: self.end_user.clone(),
            model: target.model.clone(),
            release: app.release_of(target),
            backend: target.node.name.clone(),
            endpoint: ask.endpoint.path().to_owned(),
            stream: ask.stream,
            ..Request::default()
        }
    }

    /// Reserves for a second attempt of this request, at `target`: its id, and what
    /// is set aside. `None` where a limit forbids it.
    pub(crate) async fn again(&self, app: &App, ask: &Ask, target: &Target) -> Option<(String, Option<Reservation>)> {
        let id = ashlar_core::id::new(ask.endpoint.id_prefix());
        let Some(accounts) = &app.state.accounts else { return Some((id, None)) };
        let most = Tokens { input: ask.prompt_estimate().into(), ..Tokens::default() };
        let request = Request { id: id.clone(), attempt_of: Some(self.id.clone()), most, ..self.request(app, ask, target) };
        Some((id, Some(accounts.reserve(request).await.ok()?)))
    }
}

/// Who the caller asks for.
fn end_user(ask: &Ask) -> Option<Cow<'_, str>> {
    let text = |name| ask.typed::<Cow<'_, str>>(name, "a string").ok().flatten().filter(|u| !u.is_empty());
    text("safety_identifier").or_else(|| text("user"))
}

/// The most tokens `ask` can use, as far as that is known before it runs.
fn most(ask: &Ask, plan: &Plan, assume: u32) -> Tokens {
    let bytes = ask.prompt().len() + ask.raw("tools").map_or(0, str::len);
    let count = |name| ask.typed::<u32>(name, "an integer").ok().flatten().unwrap_or(1).max(1);
    let choices = u64::from(count("n").max(count("best_of")));
    // 0 is a context that no one knows.
    let contexts = plan.stages.iter().map(|s| if s.route.context == 0 { u32::MAX } else { s.route.context });
    let context = u64::from(contexts.max().unwrap_or(u32::MAX));
    let output = u64::from(ask.max_tokens().unwrap_or(assume)).min(context);
    Tokens {
        input: ((bytes as u64).div_ceil(RESERVE_BYTES) + TEMPLATE_TOKENS).min(context),
        output: output.saturating_mul(choices),
        ..Tokens::default()
    }
}

/// The target of `plan` at which the request costs most; one without a price is
/// dearer than any.
fn dearest<'a>(app: &App, plan: &'a Plan, most: &Tokens, machine_us: u64) -> Option<&'a Arc<Target>> {
    let mut targets = plan.stages.iter().flat_map(|s| &s.order);
    let first = targets.next()?;
    let Some(list) = &app.state.prices else { return Some(first) };
    let mut found: Option<(Decimal, &Arc<Target>)> = None;
    let (at, mut rest) = (clock::now_ms(), targets.peekable());
    if rest.peek().is_none() {
        return Some(first);
    }
    for target in std::iter::once(first).chain(rest) {
        let Some(cost) = list.cost(&target.model, &target.node.name, at, most, machine_us).total else { return Some(target) };
        if found.is_none_or(|(dearer, _)| cost > dearer) {
            found = Some((cost, target));
        }
    }
    found.map(|(_, target)| target)
}

/// `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`: of several limits the
/// one with least left.
fn limits(headers: &mut HeaderMap, measure: Measure, amount: Decimal, left: Decimal, ends_ms: Option<i64>) {
    let of = match measure {
        Measure::Requests => ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
        Measure::Tokens => ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
        // OpenAI has none for money, and how much is left is no client's business.
        Measure::Money => return,
    };
    let [limit, remaining, reset] = of.map(HeaderName::from_static);
    let held = headers.get(&remaining).and_then(|v| v.to_str().ok()?.parse::<Decimal>().ok());
    if held.is_some_and(|held| held <= left) {
        return;
    }
    let reset_in = ends_ms.map(|at| format!("{}s", seconds_until(at)));
    for (name, text) in [(limit, Some(amount.to_string())), (remaining, Some(left.to_string())), (reset, reset_in)] {
        match text.and_then(|t| HeaderValue::try_from(t).ok()) {
            Some(value) => headers.insert(name, value),
            None => headers.remove(name),
        };
    }
}

fn seconds_until(at_ms: i64) -> u32 {
    let ms = (at_ms - clock::now_ms()).max(0);
    u32::try_from(ms.unsigned_abs().div_ceil(1000)).unwrap_or(u32::MAX).max(1)
}

/// Marks the answer to a key that used up a limit of its own.
#[derive(Clone, Copy)]
pub(crate) struct UsedUp;

/// 429 with the limit's numbers. Where waiting does not help, clients are told not
/// to try again, in the way OpenAI's obey.
fn exceeded(e: &Exceeded) -> Response {
    let wait = e.retry_at_ms.map(seconds_until);
    let (kind, code) = match (wait, e.limit.measure) {
        (Some(_), Measure::Requests | Measure::Tokens) => ("rate_limit_error", "rate_limit_exceeded"),
        _ => ("insufficient_quota", "insufficient_quota"),
    };
    let error = ApiError { kind: kind.into(), retry_after: wait, ..refuse(429, code, e.to_string()) };
    let mut response = Failure::from(error).into_response();
    response.extensions_mut().insert(UsedUp);
    let headers = response.headers_mut();
    let left = e.limit.amount.checked_sub(e.taken).filter(|d| d.picos() > 0).unwrap_or(Decimal::ZERO);
    limits(headers, e.limit.measure, e.limit.amount, left, e.retry_at_ms);
    if wait.is_none() {
        headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_where_either_client_puts_it() {
        let found = |headers: &[(&'static str, &str)]| {
            let headers: HeaderMap =
                headers.iter().map(|(k, v)| (HeaderName::from_static(k), HeaderValue::try_from(*v).unwrap())).collect();
            secret(&headers).map(str::to_owned)
        };
        assert_eq!(found(&[("authorization", "bearer  abc ")]).as_deref(), Some("abc"));
        assert_eq!(found(&[("x-api-key", "abc")]).as_deref(), Some("abc"));
        assert_eq!(found(&[("authorization", "Basic abc"), ("x-api-key", "def")]).as_deref(), Some("def"));
        assert_eq!(found(&[("authorization", "Bearer a"), ("x-api-key", "b")]).as_deref(), Some("a"));
        for none in [("authorization", "Bearer "), ("authorization", "abc"), ("x-api-key", " ")] {
            assert_eq!(found(&[none]), None, "{none:?}");
        }
    }

    #[test]
    fn of_two_limits_the_tighter_is_told() {
        let mut headers = HeaderMap::new();
        let at = clock::now_ms() + 4_500;
        for (amount, left, ends) in [(100u64, 40u64, Some(at + 60_000)), (50, 7, Some(at)), (1000, 900, None)] {
            limits(&mut headers, Measure::Tokens, amount.into(), left.into(), ends);
        }
        limits(&mut headers, Measure::Money, 5u64.into(), 1u64.into(), None);
        let told = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        assert_eq!((told("x-ratelimit-limit-tokens"), told("x-ratelimit-remaining-tokens")), (Some("50"), Some("7")));
        assert_eq!((told("x-ratelimit-reset-tokens"), headers.len()), (Some("5s"), 3));
    }
}
