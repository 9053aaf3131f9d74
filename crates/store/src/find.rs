//! Responses found and added up, for people who look at them.
//!
//! A page is the newest responses before a given one, so that the ten thousandth
//! costs what the first did and nothing moves under a reader while new ones come.
//! Sums are the database's, of integers: costs are exact.

use crate::{ResponseRow, StoreError, ledger::Store, response::response_of};
use ashlar_core::Decimal;
use serde::Serialize;
use sqlx::{Row as _, sqlite::SqliteRow};

/// Which responses are meant. Empty fields mean all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResponseFilter {
    /// Admitted at or after.
    pub from_ms: Option<i64>,
    /// Part of the id, the answer or the error; ASCII letters match in either case.
    pub text: Option<String>,
    /// Of this model.
    pub model: Option<String>,
    /// Of this backend.
    pub backend: Option<String>,
    /// That ended so; `running` for those that did not end.
    pub finish: Option<String>,
    /// Refusals only, or all but them.
    pub refusal: Option<bool>,
}

/// Settled responses added up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ResponseSum {
    /// The model.
    pub model: String,
    /// The backend.
    pub backend: String,
    /// How they ended.
    pub finish: String,
    /// How many.
    pub requests: u64,
    /// Of them, refusals.
    pub refusals: u64,
    /// Of them, those whose cost is not known and not in `cost`.
    pub unpriced: u64,
    /// Tokens of the prompts, cached ones included.
    pub prompt_tokens: u64,
    /// Of them, those found in a cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Known cost, exact.
    pub cost: Decimal,
    /// Those that had a first token.
    pub first_tokens: u64,
    /// Mean milliseconds to it, of those.
    pub ttft_ms: Option<f64>,
    /// Mean milliseconds in all.
    pub total_ms: Option<f64>,
}

/// The cost column's whole part and picos, as integers: SQLite would add decimal
/// text up as binary floats.
const WHOLE: &str = "CAST(cost AS INTEGER)";
const PICOS: &str = "CASE WHEN instr(cost, '.') = 0 THEN 0 \
     ELSE CAST(substr(substr(cost, instr(cost, '.') + 1) || '000000000000', 1, 12) AS INTEGER) END";

impl Store {
    /// Up to `limit` responses, newest first, older than the one `before`, given by
    /// its time and id.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn find_responses(
        &self,
        filter: &ResponseFilter,
        before: Option<(i64, &str)>,
        limit: u32,
    ) -> Result<Vec<ResponseRow>, StoreError> {
        let pattern = filter.text.as_deref().map(|text| {
            let escaped = text.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
            format!("%{escaped}%")
        });
        sqlx::query(
            "SELECT * FROM response WHERE at_ms >= $1 AND at_ms <= $2 AND ($3 IS NULL OR at_ms < $2 OR id < $3) \
             AND ($4 IS NULL OR id LIKE $4 ESCAPE '\\' OR answer LIKE $4 ESCAPE '\\' OR error LIKE $4 ESCAPE '\\') \
             AND ($5 IS NULL OR model = $5) AND ($6 IS NULL OR backend = $6) \
             AND ($7 IS NULL OR COALESCE(finish, 'running') = $7) AND ($8 IS NULL OR COALESCE(refusal, 0) = $8) \
             ORDER BY at_ms DESC, id DESC LIMIT $9",
        )
        .bind(filter.from_ms.unwrap_or(i64::MIN))
        .bind(before.map_or(i64::MAX, |(at, _)| at))
        .bind(before.map(|(_, id)| id))
        .bind(pattern)
        .bind(&filter.model)
        .bind(&filter.backend)
        .bind(&filter.finish)
        .bind(filter.refusal)
        .bind(limit)
        .fetch_all(self.pool())
        .await?
        .iter()
        .map(response_of)
        .collect()
    }

    /// Responses admitted at or after `from_ms` and settled, added up by model,
    /// backend and end.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn response_sums(&self, from_ms: i64) -> Result<Vec<ResponseSum>, StoreError> {
        let sql = format!(
            "SELECT model, backend, finish, COUNT(*) AS requests, COALESCE(SUM(refusal), 0) AS refusals, \
             SUM(cost IS NULL) AS unpriced, COALESCE(SUM(prompt_tokens), 0) AS prompt_tokens, \
             COALESCE(SUM(cached_tokens), 0) AS cached_tokens, COALESCE(SUM(completion_tokens), 0) AS completion_tokens, \
             COALESCE(SUM({WHOLE}), 0) AS whole, COALESCE(SUM(({PICOS}) / 1000000), 0) AS micros, \
             COALESCE(SUM(({PICOS}) % 1000000), 0) AS picos, COUNT(NULLIF(ttft_ms, 0)) AS first_tokens, AVG(NULLIF(ttft_ms, 0)) AS ttft_ms, AVG(total_ms) AS total_ms \
             FROM response WHERE at_ms >= $1 AND finish IS NOT NULL GROUP BY model, backend, finish \
             ORDER BY model, backend, finish"
        );
        sqlx::query(&sql).bind(from_ms).fetch_all(self.pool()).await?.iter().map(sum_of).collect()
    }
}

fn sum_of(row: &SqliteRow) -> Result<ResponseSum, StoreError> {
    let count = |column| Ok::<_, StoreError>(u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or(0));
    let part = |column| Ok::<_, StoreError>(i128::from(row.try_get::<i64, _>(column)?));
    Ok(ResponseSum {
        model: row.try_get("model")?,
        backend: row.try_get("backend")?,
        finish: row.try_get("finish")?,
        requests: count("requests")?,
        refusals: count("refusals")?,
        unpriced: count("unpriced")?,
        prompt_tokens: count("prompt_tokens")?,
        cached_tokens: count("cached_tokens")?,
        completion_tokens: count("completion_tokens")?,
        // Micros and the rest of the picos apart: a sum of picos alone is full
        // after nine million of the currency.
        cost: Decimal::from_picos(part("whole")? * 1_000_000_000_000 + part("micros")? * 1_000_000 + part("picos")?),
        first_tokens: count("first_tokens")?,
        ttft_ms: row.try_get("ttft_ms")?,
        total_ms: row.try_get("total_ms")?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Admission, Ended, Settlement};

    /// Responses `0..n`, three at each millisecond.
    async fn seeded(n: usize) -> (Store, tempfile::TempDir) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).await.unwrap();
        let begins: Vec<Admission> = (0..n)
            .map(|i| Admission {
                id: format!("r-{i:05}"),
                release: None,
                model: if i % 2 == 0 { "even" } else { "odd" }.into(),
                backend: "b".into(),
                endpoint: "/v1/completions".into(),
                at_ms: (i / 3) as i64,
                seed: None,
                stream: false,
            })
            .collect();
        let ends: Vec<Ended> = (1..n)
            .map(|i| Ended {
                admission: None,
                id: format!("r-{i:05}"),
                settlement: Settlement {
                    finish: if i % 10 == 0 { "error" } else { "stop" }.into(),
                    prompt_tokens: 10,
                    cached_tokens: 4,
                    completion_tokens: 2,
                    total_ms: 5.0,
                    cost: (i % 7 != 0).then(|| "1234567.000000000001".parse().unwrap()),
                    refusal: i % 5 == 0,
                    answer: Some(format!("answer {i} 100% a_b")),
                    ..Settlement::default()
                },
                answered: None,
                route: None,
            })
            .collect();
        store.record(&begins, &ends).await.unwrap();
        (store, home)
    }

    #[tokio::test]
    async fn pages_hold_each_response_once() {
        let (store, _home) = seeded(1000).await;
        let (mut seen, mut before): (Vec<String>, Option<(i64, String)>) = (vec![], None);
        loop {
            let at = before.as_ref().map(|(at, id)| (*at, id.as_str()));
            let page = store.find_responses(&ResponseFilter::default(), at, 64).await.unwrap();
            let Some(last) = page.last() else { break };
            before = Some((last.admission.at_ms, last.admission.id.clone()));
            seen.extend(page.into_iter().map(|r| r.admission.id));
        }
        let all: Vec<String> = (0..1000).rev().map(|i| format!("r-{i:05}")).collect();
        assert_eq!(seen, all);
    }

    #[tokio::test]
    async fn filters_mean_what_they_say() {
        let (store, _home) = seeded(100).await;
        let count = async |filter: ResponseFilter| store.find_responses(&filter, None, 1000).await.unwrap().len();
        let text = |t: &str| ResponseFilter { text: Some(t.into()), ..ResponseFilter::default() };
        assert_eq!(count(text("R-00042")).await, 1);
        assert_eq!(count(text("answer 7 ")).await, 1);
        assert_eq!(count(text("100%")).await, 99);
        assert_eq!(count(text("0%0")).await, 0, "a percent sign is one");
        assert_eq!(count(text("a-b")).await, 0, "an underscore is one");
        assert_eq!(count(ResponseFilter { model: Some("odd".into()), ..Default::default() }).await, 50);
        assert_eq!(count(ResponseFilter { finish: Some("error".into()), ..Default::default() }).await, 9);
        assert_eq!(count(ResponseFilter { finish: Some("running".into()), ..Default::default() }).await, 1);
        assert_eq!(count(ResponseFilter { refusal: Some(true), ..Default::default() }).await, 19);
        assert_eq!(count(ResponseFilter { from_ms: Some(30), ..Default::default() }).await, 10);
        assert_eq!(count(ResponseFilter { backend: Some("x' OR 1=1".into()), ..Default::default() }).await, 0);
    }

    #[tokio::test]
    async fn sums_are_exact() {
        let (store, _home) = seeded(100).await;
        let sums = store.response_sums(i64::MIN).await.unwrap();
        let all = |f: fn(&ResponseSum) -> u64| sums.iter().map(f).sum::<u64>();
        assert_eq!((all(|s| s.requests), all(|s| s.refusals), all(|s| s.unpriced)), (99, 19, 14));
        assert_eq!((all(|s| s.prompt_tokens), all(|s| s.cached_tokens)), (990, 396));
        let picos: i128 = sums.iter().map(|s| s.cost.picos()).sum();
        assert_eq!(picos, 85 * 1_234_567_000_000_000_001);
        assert_eq!(store.response_sums(1000).await.unwrap(), []);
        assert!(sums.iter().all(|s| s.ttft_ms.is_none() && s.total_ms == Some(5.0)));
    }
}
