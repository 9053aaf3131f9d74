//! Responses: every admitted request settles exactly once.
//!
//! Admission and settlement are single statements whose conditions the database
//! checks, so that of two settlers one wins and the other is told. Prompts are
//! not kept; an answer is kept where the caller hands it in.

use crate::{
    StoreError,
    ledger::{Store, session_path},
    lock,
};
use ashlar_core::clock;
use serde::{Deserialize, Serialize};
use sqlx::{Row as _, sqlite::SqliteRow};

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
    /// `stop`, `length`, `cancelled` or `error`.
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
    /// In the currency of the price list.
    pub cost: f64,
    /// Whether the model or the guard refused.
    pub refusal: bool,
    /// The text, where it is kept.
    pub answer: Option<String>,
    /// What went wrong.
    pub error: Option<String>,
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
}

impl Store {
    /// Writes a request down before any of it is answered.
    ///
    /// # Errors
    /// [`StoreError::AlreadyAdmitted`] when the id is known.
    pub async fn admit(&self, a: &Admission) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        let done = sqlx::query(
            "INSERT INTO response (id, session, release, model, backend, endpoint, at_ms, seed, stream) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (id) DO NOTHING",
        )
        .bind(&a.id)
        .bind(&self.inner.session)
        .bind(&a.release)
        .bind(&a.model)
        .bind(&a.backend)
        .bind(&a.endpoint)
        .bind(a.at_ms)
        // Two's complement: SQL has no unsigned integers.
        .bind(a.seed.map(|s| s as i64))
        .bind(a.stream)
        .execute(&mut *write.tx)
        .await?;
        write.commit().await?;
        if done.rows_affected() == 1 {
            Ok(())
        } else {
            Err(StoreError::AlreadyAdmitted(a.id.clone()))
        }
    }

    /// Settles an admitted request, once.
    ///
    /// # Errors
    /// [`StoreError::AlreadySettled`], [`StoreError::UnknownResponse`],
    /// [`StoreError::Finish`].
    pub async fn settle(&self, id: &str, s: &Settlement) -> Result<(), StoreError> {
        if !matches!(&*s.finish, "stop" | "length" | "cancelled" | "error") {
            return Err(StoreError::Finish(s.finish.clone()));
        }
        let mut write = self.write().await?;
        let done = sqlx::query(
            "UPDATE response SET settled_ms = $2, finish = $3, prompt_tokens = $4, cached_tokens = $5, \
             completion_tokens = $6, queue_ms = $7, ttft_ms = $8, total_ms = $9, cost = $10, refusal = $11, \
             answer = $12, error = $13 WHERE id = $1 AND finish IS NULL",
        )
        .bind(id)
        .bind(clock::now_ms())
        .bind(&s.finish)
        .bind(s.prompt_tokens as i64)
        .bind(s.cached_tokens as i64)
        .bind(s.completion_tokens as i64)
        .bind(s.queue_ms)
        .bind(s.ttft_ms)
        .bind(s.total_ms)
        .bind(s.cost)
        .bind(s.refusal)
        .bind(&s.answer)
        .bind(&s.error)
        .execute(&mut *write.tx)
        .await?;
        write.commit().await?;
        if done.rows_affected() == 1 {
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
            cost: number("cost")?,
            refusal: row.try_get::<Option<bool>, _>("refusal")?.unwrap_or(false),
            answer: row.try_get("answer")?,
            error: row.try_get("error")?,
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
    })
}
