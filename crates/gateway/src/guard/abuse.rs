//! End users who keep violating policies: throttled, looked at, refused.
//!
//! A user is what the client calls them (`safety_identifier`, else `user`), hashed
//! with a salt and the tenant, since two tenants' user 1 are two people. The hash
//! stands for them in the ledger and towards upstreams; the id itself goes no
//! further. What people decide (`ashlar abuse`) is seen within a second.

use super::{Shared, Who};
use crate::{
    ask::{Ask, Endpoint},
    error::refuse,
    guard::settings::AbuseSettings,
    table::Plan,
    upstream::Dialect,
};
use ashlar_api::ApiError;
use ashlar_core::{Digest, clock};
use ashlar_store::{AbuseEvent, AbuseLimits, AbuseState, Store};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

/// How long a standing is believed.
const FRESH: Duration = Duration::from_secs(1);
/// Most users kept in memory.
const MOST: usize = 20_000;
/// Digits of a hash: 128 bits.
const DIGITS: usize = 32;

/// A violation that counts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Strike {
    pub(super) policy: String,
    pub(super) kind: String,
    pub(super) weight: f64,
}

/// What is known of users between requests.
#[derive(Debug, Default)]
pub(crate) struct Standings {
    users: Mutex<HashMap<String, Known>>,
    salt: OnceLock<String>,
}

#[derive(Debug, Clone)]
struct Known {
    state: AbuseState,
    at: Instant,
    /// Requests a throttled user may still make.
    room: f64,
    room_at: Instant,
}

/// A user of one request.
pub(crate) struct EndUser {
    hash: String,
    settings: AbuseSettings,
    store: Store,
    shared: Arc<Shared>,
}

impl AbuseSettings {
    /// The limits as the store counts.
    pub fn limits(&self) -> AbuseLimits {
        AbuseLimits {
            window_ms: (self.window_h * 3_600_000.0) as i64,
            throttle_at: self.throttle_at,
            review_at: self.review_at,
            ban_at: self.ban_at,
        }
    }
}

/// `id`'s hash.
fn hash(salt: &str, tenant: &str, id: &str) -> String {
    // Lengths part the fields: no two triples read alike.
    let text = format!("{salt}\n{}\n{tenant}\n{id}", tenant.len());
    let digest = Digest::of(text.as_bytes());
    format!("user-{}", &digest.hex()[..DIGITS])
}

impl EndUser {
    /// The user that `ask` names, and `ask` with their hash in the name's place;
    /// `None` where it names none.
    ///
    /// # Errors
    /// When there is no salt to be had.
    pub(super) fn of(
        shared: &Arc<Shared>,
        store: &Store,
        settings: &AbuseSettings,
        who: &Who,
        ask: Ask,
        plan: &Plan,
    ) -> Result<(Ask, Option<Self>), ApiError> {
        let mut named = None;
        for name in ["user", "safety_identifier"] {
            // One of another type would be nobody's, and go on as it is.
            if let Some(id) = ask.typed::<String>(name, "a string")?.filter(|id| !id.is_empty()) {
                named = Some((name, id));
            }
        }
        let Some((name, id)) = named else { return Ok((ask, None)) };
        let salt = match shared.standings.salt.get() {
            Some(salt) => salt.clone(),
            None => {
                let unset = |name: &String| ApiError::internal(format!("guard.abuse.salt_env: the variable {name} is not set"));
                let found = match &settings.salt_env {
                    Some(name) => std::env::var(name).map_err(|_| unset(name))?,
                    None => store.salt("abuse-salt").map_err(|e| ApiError::internal(format!("no salt for users: {e}")))?,
                };
                shared.standings.salt.get_or_init(|| found).clone()
            }
        };
        let tenant = who.team.as_deref().or(who.key.as_deref()).unwrap_or("");
        let hash = hash(&salt, tenant, &id);
        // The newer name where all who may answer take it.
        let takes = |d: Dialect| matches!(d, Dialect::Engine | Dialect::Openai | Dialect::Ashlar | Dialect::Anthropic);
        let newer = ask.endpoint.inner() == Endpoint::Chat && plan.stages.iter().flat_map(|s| &s.order).all(|t| takes(t.node.dialect));
        let to = if newer { "safety_identifier" } else { name };
        let json = serde_json::Value::from(hash.clone()).to_string();
        let mut ask = ask.with(to, &json)?;
        if name != to || ask.raw("user").is_some() && to != "user" {
            ask = ask.with("user", "null")?;
        }
        Ok((ask, Some(Self { hash, settings: settings.clone(), store: store.clone(), shared: shared.clone() })))
    }

    fn known<T>(&self, f: impl FnOnce(&mut HashMap<String, Known>) -> T) -> T {
        f(&mut self.shared.standings.users.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Refuses a banned user, and a throttled one who asks too often.
    ///
    /// # Errors
    /// 403 or 429; 503 when no one knows where they stand.
    pub(super) async fn check(&self) -> Result<(), ApiError> {
        let now = Instant::now();
        let fresh = self.known(|users| users.get(&self.hash).filter(|k| now.duration_since(k.at) < FRESH).map(|k| k.state));
        let state = match fresh {
            Some(state) => state,
            None => {
                let found = self.store.abuse_user(&self.hash, &self.settings.limits()).await;
                let found = found.map_err(|e| ApiError::unavailable(format!("the user's standing cannot be read: {e}")))?;
                let state = found.map_or(AbuseState::Clear, |u| u.state);
                self.stands(state, now);
                state
            }
        };
        let refused = match state {
            AbuseState::Clear => return Ok(()),
            AbuseState::Banned => {
                let appeal = self.settings.appeal.as_deref().map(|a| format!(" To appeal: {a}.")).unwrap_or_default();
                let message = format!(
                    "requests of this end user are refused after repeated violations of the usage policies; reference {}.{appeal}",
                    self.hash
                );
                ApiError { kind: "permission_error".into(), ..refuse(403, "user_banned", message) }
            }
            AbuseState::Throttled | AbuseState::Review => {
                let rate = f64::from(self.settings.throttled_per_minute);
                let wait = self.known(|users| {
                    let known = users.get_mut(&self.hash)?;
                    known.room = (known.room + now.duration_since(known.room_at).as_secs_f64() * rate / 60.0).min(rate);
                    known.room_at = now;
                    if known.room >= 1.0 {
                        known.room -= 1.0;
                        return None;
                    }
                    Some(((1.0 - known.room) * 60.0 / rate).ceil() as u32)
                });
                let Some(seconds) = wait else { return Ok(()) };
                let message = format!(
                    "requests of this end user are slowed down to {} a minute after violations of the usage policies; reference {}",
                    self.settings.throttled_per_minute, self.hash
                );
                ApiError { code: Some("user_throttled".into()), ..ApiError::overloaded(message, seconds.max(1)) }
            }
        };
        self.shared.counters.abuse_refusal();
        Err(refused)
    }

    fn stands(&self, state: AbuseState, now: Instant) {
        let room = f64::from(self.settings.throttled_per_minute);
        self.known(|users| {
            if users.len() >= MOST && !users.contains_key(&self.hash) {
                users.retain(|_, k| now.duration_since(k.at) < FRESH || k.state != AbuseState::Clear);
                if users.len() >= MOST {
                    users.clear();
                }
            }
            let known = users.entry(self.hash.clone()).or_insert(Known { state, at: now, room, room_at: now });
            (known.state, known.at) = (state, now);
        });
    }

    /// Writes strikes down.
    pub(super) async fn strike(&self, response: &str, strikes: Vec<Strike>) {
        let at_ms = clock::now_ms();
        let event = |s: Strike| AbuseEvent { response: response.to_owned(), at_ms, policy: s.policy, kind: s.kind, weight: s.weight };
        let events: Vec<AbuseEvent> = strikes.into_iter().map(event).collect();
        // A ledger that fails says so in /health; the answer is not held up.
        if let Ok(user) = self.store.strike(&self.hash, &events, &self.settings.limits()).await {
            self.stands(user.state, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::hash;

    #[test]
    fn two_tenants_users_are_two() {
        let all = [hash("s", "a", "1"), hash("s", "b", "1"), hash("t", "a", "1"), hash("s", "a\n1", ""), hash("s", "", "a\n1")];
        for (i, one) in all.iter().enumerate() {
            assert!(!all[..i].contains(one) && !one.contains('\n') && one.len() == 37);
        }
        assert_eq!(hash("s", "a", "1"), all[0]);
    }
}
