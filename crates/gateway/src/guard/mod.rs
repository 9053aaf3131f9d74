//! The guard: what may be asked, and what may be answered.
//!
//! Policies of the configuration (`settings`, compiled in `policy`) hold for
//! models, keys and teams, for requests, answers or both. A request passes
//! [`request`] before anyone is asked: it is refused, or goes on changed
//! (redacted, or with pseudonyms), or as it came. Every piece of its answer,
//! streamed or whole, of whatever endpoint, passes [`Answer`], which
//! `Session::pass` gives it to: text leaves once it is judged (`channel`), a
//! field that no one knows does not (`shape`). What was found is written into the
//! response's row (`log`), by kind, never by word; what counts against an end
//! user, into the abuse ledger (`abuse`).
//!
//! What may not happen here: an endpoint or a way of streaming that goes by
//! without this; a secret of which a part has left when it is found; a judge that
//! is silent taken for one that agrees (unless a policy says so).
//!
//! What it cannot do: see what is encoded, paraphrased or drawn, or put together
//! what a model spreads over two texts. Names and postal addresses are not found.

mod abuse;
mod active;
mod answer;
mod categories;
mod channel;
mod injection;
mod judge;
mod lexicon;
mod log;
mod moderations;
mod phrases;
mod policy;
mod schema;
mod settings;
mod shape;
mod takedown;
mod texts;

pub(crate) use answer::Answer;
pub(crate) use log::{Counters, Counts, Log};
pub use log::{Action, Stage, Verdict};
pub use settings::{AbuseSettings, CheckKind, GuardSettings, OnFailure, PolicySettings, Protocol, Release};
pub use takedown::{Takedowns, shingles};

use crate::{
    app::{App, GatewayState},
    ask::{Ask, Endpoint},
    config::ConfigError,
    door::Caller,
    session::Session,
    table::{Plan, Table},
    upstream::Piece,
};
pub(crate) use phrases::Phrases;
use abuse::{EndUser, Standings};
use active::Active;
use ashlar_api::ApiError;
use ashlar_text::detect::Vault;
use axum::{
    Json,
    http::HeaderMap,
    response::{IntoResponse as _, Response},
};
use judge::{AskJudge, Turn};
use policy::{Check, Policy};
use schema::Schema;
use serde_json::{Value, json};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Most tokens of a judge's answer.
const VERDICT_TOKENS: u32 = 64;
/// How often takedowns are looked for.
const LOOK: Duration = Duration::from_secs(1);

/// Fields that spell the answer out a second time, in ways no policy reads.
const SPELT_TWICE: &[&str] = &[
    "logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids",
    "return_hidden_states", "return_tokens", "n_probs", "post_sampling_probs", "logprob_token_ids",
];

/// What all requests of a server share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) counters: Arc<Counters>,
    standings: Standings,
}

/// A configuration's policies at work.
#[derive(Default)]
pub(crate) struct Guard {
    policies: Vec<Arc<Policy>>,
    abuse: Option<AbuseSettings>,
}

impl Guard {
    /// Compiles `settings`.
    ///
    /// # Errors
    /// When a policy cannot be put to work.
    pub(crate) fn new(settings: &GuardSettings, state: &GatewayState) -> Result<Self, ConfigError> {
        let policies = settings.policies.iter().map(|(name, p)| {
            Policy::new(name, p, &state.takedowns, state.encoder.as_ref().map(|e| &e.id)).map(Arc::new)
        });
        if let Some(name) = settings.abuse.as_ref().and_then(|a| a.salt_env.as_ref())
            && std::env::var(name).is_err()
        {
            let why = format!("the environment variable {name} is not set");
            return Err(ConfigError::Invalid { path: "guard.abuse.salt_env".into(), why });
        }
        Ok(Self { policies: policies.collect::<Result<_, _>>()?, abuse: settings.abuse.clone() })
    }
}

/// For whom a policy may hold.
#[derive(Debug, Clone, Default)]
pub(crate) struct Who {
    /// The key's id.
    pub(crate) key: Option<String>,
    /// The team's.
    pub(crate) team: Option<String>,
}

impl Who {
    pub(crate) fn of(caller: &Caller) -> Self {
        let Some(access) = caller.access() else { return Self::default() };
        Self { key: Some(access.key().id.clone()), team: access.team().map(|t| t.id.clone()) }
    }
}

/// What the guard has to say of a request.
#[derive(Default)]
pub(crate) struct Guarded {
    active: Option<Arc<Active>>,
    refused: Option<ApiError>,
}

impl Guarded {
    /// The record of what is found.
    pub(crate) fn log(&self) -> Arc<Log> {
        self.active.as_ref().map(|a| a.log.clone()).unwrap_or_default()
    }

    /// What the client is told instead of an answer.
    pub(crate) fn refused(&self) -> Option<ApiError> {
        self.refused.clone()
    }

    /// The guard of the answer. Where no model writes, there is none: vectors and
    /// scores are no text, and what tokens spell is the client's own.
    pub(crate) fn answer(&self, ask: &Ask) -> Option<Answer> {
        let active = self.active.clone().filter(|a| !a.idle() && ask.endpoint.streams())?;
        Some(Answer::new(active, ask.stream, ask.endpoint.inner() == Endpoint::Chat, ask.prompt_estimate()))
    }

    /// Writes down what counts against the end user.
    pub(crate) async fn strike(&self, response: &str) {
        if let Some(active) = &self.active {
            active.strike(response).await;
        }
    }
}

/// Looks at a request: it comes back as it is to be asked, with the guard of its
/// answer.
///
/// # Errors
/// For what cannot be guarded, and is refused before anything is recorded.
pub(crate) async fn request(
    app: &Arc<App>,
    table: &Arc<Table>,
    ask: Ask,
    plan: &Plan,
    who: Who,
) -> Result<(Ask, Guarded), ApiError> {
    let (guard, began) = (&table.guard, Instant::now());
    if guard.policies.is_empty() && guard.abuse.is_none() {
        return Ok((ask, Guarded::default()));
    }
    let (mut ask, user) = match &guard.abuse {
        Some(settings) => EndUser::of(&app.guard, &app.state.store, settings, &who, ask, plan)?,
        None => (ask, None),
    };
    // A fallback's policies hold too: it may be who answers.
    let holds = |stage: Stage| -> Vec<Arc<Policy>> {
        let any = |p: &&Arc<Policy>| plan.stages.iter().any(|s| p.applies(stage, &s.route.name, &who));
        guard.policies.iter().filter(any).cloned().collect()
    };
    let (asked, answered) = (holds(Stage::Request), holds(Stage::Answer));
    let mut active = Active {
        schema: schema_of(&ask, &answered)?,
        policies: answered,
        log: Arc::default(),
        counters: app.guard.counters.clone(),
        vault: None,
        said: String::new(),
        ask: judge_of(app),
        embed: app.state.embed.clone(),
        user,
        strikes: Mutex::default(),
        who,
    };
    let mut refused = match &active.user {
        Some(user) => user.check().await.err(),
        None => None,
    };
    if refused.is_none() {
        spelt_once(&ask, &active)?;
        let changed;
        (changed, refused) = check(&ask, &asked, &mut active).await?;
        for (name, value) in changed {
            ask = ask.with(&name, &value.to_string())?;
        }
    }
    active.log.waited(began.elapsed());
    Ok((ask, Guarded { active: Some(Arc::new(active)), refused }))
}

/// Refuses fields whose answers would go around the guard.
fn spelt_once(ask: &Ask, active: &Active) -> Result<(), ApiError> {
    if !active.enforces() {
        return Ok(());
    }
    let asked = |name: &&str| ask.raw(name).is_some_and(|raw| !matches!(raw, "false" | "0" | "[]"));
    // `logprobs: 0` asks completions for the tokens' own.
    let zero = || ask.endpoint == Endpoint::Completions && ask.raw("logprobs") == Some("0");
    let found = SPELT_TWICE.iter().copied().find(|n| asked(n)).or_else(|| zero().then_some("logprobs"));
    let Some(name) = found else { return Ok(()) };
    let message = format!("{name} is not given where answers are guarded: it spells the text out a second time");
    Err(ApiError::bad_request(message, Some(name), Some("unsupported_parameter")))
}

/// The fields that change, and what the client is told if the request goes no
/// further.
async fn check(
    ask: &Ask,
    policies: &[Arc<Policy>],
    active: &mut Active,
) -> Result<(Vec<(String, Value)>, Option<ApiError>), ApiError> {
    let judged = active.policies.iter().any(|p| matches!(p.check, Check::Judge));
    if policies.is_empty() && !judged {
        return Ok((Vec::new(), None));
    }
    let mut fields = texts::read(ask)?;
    let said = texts::said(&fields);
    if let Some(last) = said.last().filter(|_| judged) {
        active.said.clone_from(last);
    }
    if let Some(name) = texts::unreadable(ask) {
        for policy in policies {
            active.found(policy, Stage::Request, "token_ids", 1.0);
            if policy.action.enforces() {
                let message = format!("{name} is given as token ids, which policy {:?} cannot read: send text", policy.name);
                let error = ApiError::bad_request(message, Some(name), Some("content_filter"));
                return Ok((Vec::new(), Some(error)));
            }
        }
    }
    let (mut vault, mut changed) = (Vault::default(), Vec::<String>::new());
    if policies.iter().any(|p| p.action == Action::Pseudonymize) {
        // What looks like a placeholder in any text is the user's own.
        texts::each(&mut fields, |text| {
            vault.avoid(text);
            None
        });
    }
    for policy in policies {
        let mut kinds: Vec<String> = Vec::new();
        match &policy.check {
            Check::Pii(_) | Check::Phrases { .. } => {
                let new = texts::each(&mut fields, |text| {
                    let hits = policy.hits(text);
                    hits.iter().for_each(|h| active.found(policy, Stage::Request, &h.kind, 1.0));
                    kinds.extend(hits.iter().map(|h| h.kind.clone()));
                    match (policy.action, &policy.check) {
                        _ if hits.is_empty() => None,
                        (Action::Pseudonymize, Check::Pii(scanner)) => Some(vault.hide(text, &scanner.find(text))),
                        (Action::Redact, _) => Some(redacted(text, hits)),
                        _ => None,
                    }
                });
                changed.extend(new);
            }
            Check::Moderation | Check::Injection => {
                // Each message by itself, so that where one ends is no word.
                for (kind, score) in said.iter().flat_map(|text| policy.graded(text, &active.who)) {
                    active.found(policy, Stage::Request, &kind, score);
                    kinds.push(kind);
                }
            }
            Check::Judge | Check::Head(_) => {
                // The turns before were judged in their requests. Whole: a judge that
                // cannot read so much does not say "safe".
                if let Some(last) = said.last()
                    && active.judged(policy, Stage::Request, last).await
                {
                    kinds.push("unsafe".into());
                }
            }
            Check::Schema(_) | Check::Takedown(_) => {}
        }
        if policy.action == Action::Block && !kinds.is_empty() {
            kinds.sort_unstable();
            kinds.dedup();
            let found = kinds.join(", ");
            let what = if matches!(policy.check, Check::Phrases { .. }) { "a phrase that is not allowed here" } else { &found };
            let message = format!("the request was refused by policy {:?}: it holds {what}", policy.name);
            let param = ask.endpoint.prompt();
            return Ok((Vec::new(), Some(ApiError::bad_request(message, Some(param), Some("content_filter")))));
        }
    }
    active.vault = (!vault.is_empty()).then_some(vault);
    fields.retain(|(name, _)| changed.contains(name));
    Ok((fields, None))
}

/// `text` with `hits`, in order, replaced.
fn redacted(text: &str, hits: Vec<policy::Hit>) -> String {
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    for hit in hits {
        if hit.span.start >= at {
            out.push_str(text.get(at..hit.span.start).unwrap_or(""));
            out.push_str(&hit.tag);
        }
        at = at.max(hit.span.end);
    }
    out.push_str(text.get(at..).unwrap_or(""));
    out
}

/// The schema that a request asks for, where a policy holds answers against it.
fn schema_of(ask: &Ask, policies: &[Arc<Policy>]) -> Result<Option<Arc<Schema>>, ApiError> {
    let wanted = policies.iter().any(|p| matches!(p.check, Check::Schema(None)));
    let Some(format) = ask.raw("response_format").filter(|_| wanted) else { return Ok(None) };
    let format: Value = serde_json::from_str(format).unwrap_or_default();
    let schema = match format["type"].as_str() {
        Some("json_schema") => format["json_schema"].get("schema").cloned().unwrap_or(Value::Bool(true)),
        Some("json_object") => json!({"type": "object"}),
        _ => return Ok(None),
    };
    let schema = Schema::of(schema).map_err(|why| {
        let message = format!("answers cannot be held against this schema: {why}");
        ApiError::bad_request(message, Some("response_format"), Some("unsupported_schema"))
    })?;
    Ok(Some(Arc::new(schema)))
}

/// Asks served models as judges.
fn judge_of(app: &Arc<App>) -> AskJudge {
    let app = app.clone();
    Arc::new(move |model, messages| Box::pin(crate::watch::apart(judge(app.clone(), model, messages))))
}

/// Asks `model`; its text.
async fn judge(app: Arc<App>, model: String, messages: Vec<Turn>) -> Result<String, String> {
    let words = |e: ApiError| e.message;
    let body = json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": VERDICT_TOKENS});
    let ask = Ask::read(Endpoint::Chat, HeaderMap::new(), body.to_string().into(), Instant::now()).map_err(words)?;
    let table = app.tables.now();
    let plan = table.plan(&ask, app.route(&table, &ask.model).map_err(words)?).map_err(words)?;
    let entered = Caller::ours().enter(&app, &table, &ask, &plan).await.map_err(|_| "it could not be admitted".to_owned())?;
    let opened = Session::open(&app, &table, &ask, plan, entered, Guarded::default()).await;
    let mut session = opened.map_err(|f| words(f.error))?;
    let mut text = String::new();
    loop {
        match session.next().await.map_err(words)? {
            Piece::Text(t) | Piece::Rest(t) => text.push_str(&t),
            Piece::Chunk(chunk) => text.push_str(&chunk.text),
            Piece::Started { .. } => {}
            Piece::Done(_) => return Ok(text),
        }
    }
}

/// `/v1/moderations`.
///
/// # Errors
/// As the endpoint says.
pub(crate) async fn moderations(app: &Arc<App>, table: &Table, who: &Who, body: &[u8]) -> Result<Response, ApiError> {
    let answer = moderations::answer(&app.guard, &table.guard.policies, &judge_of(app), who, body).await?;
    Ok(Json(answer).into_response())
}

/// Keeps what was taken down known, until the server ends.
pub(crate) async fn watch_takedowns(app: Arc<App>) -> std::convert::Infallible {
    let mut known = 0;
    loop {
        // A ledger that cannot be read says so in /health; what is known stays.
        if let Ok(count) = app.state.store.takedown_shingle_count().await
            && count != known
            && let Ok(hashes) = app.state.store.takedown_shingles().await
        {
            app.state.takedowns.set(hashes.into_iter().collect());
            known = count;
        }
        tokio::time::sleep(LOOK).await;
    }
}
