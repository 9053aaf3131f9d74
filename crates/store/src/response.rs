//! Responses: every admitted request settles exactly once.
//!
//! [`Store::record`] writes any number of admissions and settlements in one
//! transaction of two statements whose conditions the database checks, so that of
//! two settlers one wins and the other is told. Prompts are not kept; an answer
//! is kept where the caller hands it in.

use crate::{
    StoreError,
    account::db::batch,
    ledger::{Store, session_path},
    lock,
};
use ashlar_core::{Decimal, clock};
use serde::{Deserialize, Serialize};
use sqlx::{Row as _, sqlite::SqliteRow};
use std::collections::HashSet;

/// A request that was let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// The response's id.
    pub id: String,
    /// The release that serves it; `None` for a model served without one.
    pub release: Option<String>,
    /// The model as the client named it, or its digest without a release.
    pub model: String,
    /// The backend's name.
    pub backend: String,
    /// The route, e.g. `/v1/chat/completions`.
    pub endpoint: String,
    /// When.
    pub at_ms: i64,
    /// The sampler's seed.
    pub seed: Option<u64>,
    /// Whether it streams.
    pub stream: bool,
}

/// How it ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Settlement {
    /// `stop`, `length`, `tool_calls`, `content_filter`, `cancelled`, `error` or,
    /// said by another process than the one that served it, `killed`.
    pub finish: String,
    /// Tokens of the prompt, cached ones included.
    pub prompt_tokens: u64,
    /// Those of them that were in the prefix cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Milliseconds before the first forward pass.
    pub queue_ms: f64,
    /// Milliseconds to the first token.
    pub ttft_ms: f64,
    /// Milliseconds in all.
    pub total_ms: f64,
    /// In the currency of the price list; `None` where it is not known.
    pub cost: Option<Decimal>,
    /// Whether the model or the guard refused.
    pub refusal: bool,
    /// The text, where it is kept.
    pub answer: Option<String>,
    /// What went wrong.
    pub error: Option<String>,
    /// What the guard did: a JSON array of `{policy, stage, action, kind, score,
    /// released_chars, count}`; `None` when it did nothing.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "as_json")]
    pub guard: Option<String>,
}

/// JSON that is kept as text, read and written as the JSON it is.
mod as_json {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};
    use serde_json::Value;

    pub(super) fn serialize<S: Serializer>(text: &Option<String>, to: S) -> Result<S::Ok, S::Error> {
        // What does not parse is shown as the text it is.
        let value = text.as_ref().map(|t| serde_json::from_str(t).unwrap_or_else(|_| Value::from(t.as_str())));
        value.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
        Ok(Option::<Value>::deserialize(from)?.map(|v| v.to_string()))
    }
}

/// Who answered. Where it is another than was admitted, the row names it in place
/// of the first choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// The release, where it was one.
    pub release: Option<String>,
    /// The model's name for clients.
    pub model: String,
    /// The backend's name.
    pub backend: String,
}

/// A response that is over, on its way to the ledger.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// Its id.
    pub id: String,
    /// How it began, where that was not written before: the row is written whole.
    pub admission: Option<Admission>,
    /// How it ended.
    pub settlement: Settlement,
    /// Who answered; `None`: whoever it was admitted for.
    pub answered: Option<Answered>,
    /// Why it went where it went, as JSON.
    pub route: Option<String>,
}

/// What [`Store::record`] wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Ids that are admitted now; one that is missing was known before.
    pub admitted: HashSet<String>,
    /// Ids that are settled now; one that is missing was settled before, or never
    /// admitted.
    pub settled: HashSet<String>,
}

/// A response as the ledger has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ResponseRow {
    /// How it began.
    #[serde(flatten)]
    pub admission: Admission,
    /// When it settled.
    pub settled_ms: Option<i64>,
    /// How it ended; `None` while it runs. `finish` is `killed` when the process
    /// died under it.
    pub settlement: Option<Settlement>,
    /// Why it went where it went, once it is settled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<serde_json::Value>,
}

const ADMIT: &str = "INSERT INTO response (id, session, release, model, backend, endpoint, at_ms, seed, stream) \
     WITH e AS MATERIALIZED (SELECT value AS v FROM json_each($1)) \
     SELECT v->>0, $2, v->>1, v->>2, v->>3, v->>4, v->>5, v->>6, v->>7 FROM e WHERE 1 = 1 \
     ON CONFLICT (id) DO NOTHING RETURNING id";

// The columns of who answered stay as they were where it was the first choice.
const SETTLE: &str = "WITH e AS MATERIALIZED (SELECT value AS v FROM json_each($1)) \
     UPDATE response SET settled_ms = $2, finish = v->0->>1, prompt_tokens = v->0->>2, cached_tokens = v->0->>3, \
     completion_tokens = v->0->>4, queue_ms = v->1->>0, ttft_ms = v->1->>1, total_ms = v->1->>2, cost = v->1->>3, \
     refusal = v->1->>4, answer = v->2->>0, error = v->2->>1, route = v->2->>2, guard = v->2->>3, \
     release = CASE WHEN v->3->>0 IS NULL THEN release ELSE v->3->>2 END, \
     model = COALESCE(v->3->>0, model), backend = COALESCE(v->3->>1, backend) \
     FROM e WHERE response.id = v->0->>0 AND finish IS NULL RETURNING id";

// Both halves at once: `[admission, settlement]`.
const WHOLE: &str = "INSERT INTO response (id, session, release, model, backend, endpoint, at_ms, seed, stream, \
     settled_ms, finish, prompt_tokens, cached_tokens, completion_tokens, queue_ms, ttft_ms, total_ms, cost, refusal, \
     answer, error, route, guard) WITH e AS MATERIALIZED (SELECT value->0 AS a, value->1 AS v FROM json_each($1)) \
     SELECT a->>0, $2, CASE WHEN v->3->>0 IS NULL THEN a->>1 ELSE v->3->>2 END, COALESCE(v->3->>0, a->>2), \
     COALESCE(v->3->>1, a->>3), a->>4, a->>5, a->>6, a->>7, $3, v->0->>1, v->0->>2, v->0->>3, v->0->>4, v->1->>0, \
     v->1->>1, v->1->>2, v->1->>3, v->1->>4, v->2->>0, v->2->>1, v->2->>2, v->2->>3 \
     FROM e WHERE 1 = 1 ON CONFLICT (id) DO NOTHING RETURNING id";

/// `admission` as [`ADMIT`] reads it.
fn begun(a: &Admission) -> impl Serialize {
    // Two's complement: SQL has no unsigned integers.
    let seed = a.seed.map(|s| s as i64);
    (&a.id, &a.release, &a.model, &a.backend, &a.endpoint, a.at_ms, seed, i64::from(a.stream))
}

/// `ended` as [`SETTLE`] reads it.
fn ended(e: &Ended) -> impl Serialize {
    let (s, a) = (&e.settlement, e.answered.as_ref());
    let how = (&e.id, &s.finish, s.prompt_tokens as i64, s.cached_tokens as i64, s.completion_tokens as i64);
    let spent = (s.queue_ms, s.ttft_ms, s.total_ms, s.cost, i64::from(s.refusal));
    let by = (a.map(|a| &a.model), a.map(|a| &a.backend), a.and_then(|a| a.release.as_ref()));
    (how, spent, (&s.answer, &s.error, &e.route, &s.guard), by)
}

impl Store {
    /// Writes admissions, then settlements, in one transaction. What it says of
    /// them holds once it returns.
    ///
    /// # Errors
    /// [`StoreError::Finish`] for an ending that is none; nothing is written then.
    pub async fn record(&self, begins: &[Admission], ends: &[Ended]) -> Result<Recorded, StoreError> {
        // `killed` is said of a process by another.
        const FINISHES: [&str; 7] = ["stop", "length", "tool_calls", "content_filter", "cancelled", "error", "killed"];
        if let Some(odd) = ends.iter().find(|e| !FINISHES.contains(&&*e.settlement.finish)) {
            return Err(StoreError::Finish(odd.settlement.finish.clone()));
        }
        let json = |rows: Result<String, crate::AccountError>| rows.map_err(|e| StoreError::Corrupt(e.to_string()));
        let mut done = Recorded::default();
        if begins.is_empty() && ends.is_empty() {
            return Ok(done);
        }
        let mut write = self.write().await?;
        if !begins.is_empty() {
            let rows = json(batch(&begins.iter().map(begun).collect::<Vec<_>>()))?;
            let ids = sqlx::query_scalar(ADMIT).bind(rows).bind(&self.inner.session);
            done.admitted.extend(ids.fetch_all(&mut *write.tx).await?);
        }
        let now = clock::now_ms();
        let whole: Vec<_> = ends.iter().filter_map(|e| Some((begun(e.admission.as_ref()?), ended(e)))).collect();
        if !whole.is_empty() {
            let ids = sqlx::query_scalar(WHOLE).bind(json(batch(&whole))?).bind(&self.inner.session).bind(now);
            done.settled.extend(ids.fetch_all(&mut *write.tx).await?);
        }
        let open: Vec<_> = ends.iter().filter(|e| e.admission.is_none()).map(ended).collect();
        if !open.is_empty() {
            let ids = sqlx::query_scalar(SETTLE).bind(json(batch(&open))?).bind(now);
            done.settled.extend(ids.fetch_all(&mut *write.tx).await?);
        }
        write.commit().await?;
        Ok(done)
    }

    /// Writes a request down before any of it is answered.
    ///
    /// # Errors
    /// [`StoreError::AlreadyAdmitted`] when the id is known.
    pub async fn admit(&self, a: &Admission) -> Result<(), StoreError> {
        match self.record(std::slice::from_ref(a), &[]).await?.admitted.is_empty() {
            true => Err(StoreError::AlreadyAdmitted(a.id.clone())),
            false => Ok(()),
        }
    }

    /// Settles an admitted request, once.
    ///
    /// # Errors
    /// [`StoreError::AlreadySettled`], [`StoreError::UnknownResponse`],
    /// [`StoreError::Finish`].
    pub async fn settle(&self, id: &str, s: &Settlement) -> Result<(), StoreError> {
        let ended = Ended { id: id.into(), admission: None, settlement: s.clone(), answered: None, route: None };
        if !self.record(&[], &[ended]).await?.settled.is_empty() {
            return Ok(());
        }
        let earlier: Option<String> =
            sqlx::query_scalar("SELECT finish FROM response WHERE id = $1")
                .bind(id)
                .fetch_optional(self.pool())
                .await?;
        Err(match earlier {
            Some(finish) => StoreError::AlreadySettled {
                id: id.into(),
                finish,
            },
            None => StoreError::UnknownResponse(id.into()),
        })
    }

    /// Settles as `killed` what processes that are gone had admitted; how many.
    /// Requests of processes that still have this home open are left alone.
    ///
    /// # Errors
    /// When the ledger refuses.
    pub async fn settle_orphans(&self) -> Result<u64, StoreError> {
        let sessions: Vec<String> =
            sqlx::query_scalar("SELECT DISTINCT session FROM response WHERE finish IS NULL")
                .fetch_all(self.pool())
                .await?;
        let mut settled = 0;
        for session in sessions {
            let path = session_path(self.home(), &session);
            if session == self.inner.session
                || (path.exists() && lock::try_exclusive(&path)?.is_none())
            {
                continue;
            }
            let mut write = self.write().await?;
            settled += sqlx::query(
                "UPDATE response SET finish = 'killed', settled_ms = $2, \
                 error = 'the serving process ended before the answer did' WHERE session = $1 AND finish IS NULL",
            )
            .bind(&session)
            .bind(clock::now_ms())
            .execute(&mut *write.tx)
            .await?
            .rows_affected();
            write.commit().await?;
        }
        Ok(settled)
    }

    /// The response with this id.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn response(&self, id: &str) -> Result<Option<ResponseRow>, StoreError> {
        sqlx::query("SELECT * FROM response WHERE id = $1")
            .bind(id)
            .fetch_optional(self.pool())
            .await?
            .map(|row| response_of(&row))
            .transpose()
    }

    /// The newest `limit` responses, newest first.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn responses(&self, limit: u64) -> Result<Vec<ResponseRow>, StoreError> {
        sqlx::query("SELECT * FROM response ORDER BY at_ms DESC, id DESC LIMIT $1")
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_all(self.pool())
            .await?
            .iter()
            .map(response_of)
            .collect()
    }
}

pub(crate) fn response_of(row: &SqliteRow) -> Result<ResponseRow, StoreError> {
    let finish: Option<String> = row.try_get("finish")?;
    let tokens =
        |column| Ok::<_, StoreError>(row.try_get::<Option<i64>, _>(column)?.unwrap_or(0) as u64);
    let number =
        |column| Ok::<_, StoreError>(row.try_get::<Option<f64>, _>(column)?.unwrap_or(0.0));
    let settlement = match finish {
        None => None,
        Some(finish) => Some(Settlement {
            finish,
            prompt_tokens: tokens("prompt_tokens")?,
            cached_tokens: tokens("cached_tokens")?,
            completion_tokens: tokens("completion_tokens")?,
            queue_ms: number("queue_ms")?,
            ttft_ms: number("ttft_ms")?,
            total_ms: number("total_ms")?,
            cost: cost(row)?,
            refusal: row.try_get::<Option<bool>, _>("refusal")?.unwrap_or(false),
            answer: row.try_get("answer")?,
            error: row.try_get("error")?,
            guard: row.try_get("guard")?,
        }),
    };
    Ok(ResponseRow {
        admission: Admission {
            id: row.try_get("id")?,
            release: row.try_get("release")?,
            model: row.try_get("model")?,
            backend: row.try_get("backend")?,
            endpoint: row.try_get("endpoint")?,
            at_ms: row.try_get("at_ms")?,
            seed: row.try_get::<Option<i64>, _>("seed")?.map(|s| s as u64),
            stream: row.try_get("stream")?,
        },
        settled_ms: row.try_get("settled_ms")?,
        settlement,
        // Written by us as JSON.
        route: row.try_get::<Option<String>, _>("route")?.and_then(|text| serde_json::from_str(&text).ok()),
    })
}

fn cost(row: &SqliteRow) -> Result<Option<Decimal>, StoreError> {
    let text: Option<String> = row.try_get("cost")?;
    let bad = |t: &str| StoreError::Corrupt(format!("{t:?} is no cost"));
    text.map(|t| t.parse().map_err(|_| bad(&t))).transpose()
}
