//! The usage ledger: one row a settled request, never changed after.

use super::{
    AccountError, Accounts,
    db::Tx,
    price::{Cost, Tokens},
};
use ashlar_core::Decimal;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt::Write as _, sync::LazyLock};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// At a natural end or a stop sequence.
    Stop,
    /// At its limit of tokens.
    Length,
    /// With a call of a tool.
    ToolCalls,
    /// By the guard or the upstream's filter.
    ContentFilter,
    /// The client went away.
    Cancelled,
    /// It failed.
    Error,
    /// The process that served it died, and another settled it.
    Killed,
}

impl Finish {
    /// The name in the ledger.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::ContentFilter => "content_filter",
            Self::Cancelled => "cancelled",
            Self::Error => "error",
            Self::Killed => "killed",
        }
    }
}

/// Where token counts are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counts {
    /// The engine that used them.
    #[default]
    Measured,
    /// Our own counting, or what was reserved.
    Estimated,
}

/// A settled request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageRow {
    /// The request's id, that of its response.
    pub id: String,
    /// The request this was a further attempt of: a hedge or a retry.
    pub attempt_of: Option<String>,
    /// The key's id; `None` on a server without keys.
    pub api_key: Option<String>,
    /// The team's id.
    pub team: Option<String>,
    /// The end user, hashed.
    pub end_user: Option<String>,
    /// Those of key and team at the time.
    #[serde(with = "json_text")]
    pub tags: BTreeMap<String, String>,
    /// The model that answered.
    pub model: String,
    /// The adapter.
    pub adapter: Option<String>,
    /// The release.
    pub release: Option<String>,
    /// The backend that answered.
    pub backend: String,
    /// The route.
    pub endpoint: String,
    /// Whether it streamed.
    #[serde(with = "flag")]
    pub stream: bool,
    /// When it was admitted.
    pub at_ms: i64,
    /// When it was settled.
    pub settled_ms: i64,
    /// Tokens by class.
    #[serde(flatten)]
    pub tokens: TokenColumns,
    /// Where the counts are from.
    pub counts: Counts,
    /// Microseconds of the machine for itself.
    pub machine_us: i64,
    /// What it cost.
    #[serde(flatten)]
    pub cost: CostColumns,
    /// Microseconds before the first forward pass.
    pub queue_us: i64,
    /// Microseconds to the first token, where there was one.
    pub ttft_us: Option<i64>,
    /// Microseconds in all.
    pub total_us: i64,
    /// How it ended.
    pub finish: Finish,
    /// What went wrong.
    pub error: Option<String>,
    /// Whether model or guard refused.
    #[serde(with = "flag")]
    pub refusal: bool,
    /// The guard's verdicts in short.
    pub guard: Option<String>,
}

/// Tokens as SQL has them: integers of 63 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct TokenColumns {
    pub input: i64,
    pub cache_read: i64,
    pub cache_write: i64,
    pub output: i64,
    pub reasoning: i64,
}

/// Cost in whole and in parts; see [`Cost`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CostColumns {
    #[serde(with = "picos")]
    pub cost: Option<Decimal>,
    #[serde(with = "picos")]
    pub cost_input: Option<Decimal>,
    #[serde(with = "picos")]
    pub cost_cache_read: Option<Decimal>,
    #[serde(with = "picos")]
    pub cost_cache_write: Option<Decimal>,
    #[serde(with = "picos")]
    pub cost_output: Option<Decimal>,
    #[serde(with = "picos")]
    pub cost_reasoning: Option<Decimal>,
    #[serde(with = "picos")]
    pub cost_machine: Option<Decimal>,
    pub currency: Option<String>,
    /// Why the cost is not known.
    pub no_cost_reason: Option<String>,
    pub price_version: Option<String>,
}

impl From<&Tokens> for TokenColumns {
    fn from(t: &Tokens) -> Self {
        Self {
            input: int(t.input),
            cache_read: int(t.cache_read),
            cache_write: int(t.cache_write),
            output: int(t.output),
            reasoning: int(t.reasoning),
        }
    }
}

impl From<&Cost> for CostColumns {
    fn from(c: &Cost) -> Self {
        // A column holds 9.2 million of the currency; more in one request is a
        // mistake somewhere, and is said rather than cut off.
        let fits = |d: &Option<Decimal>| d.is_none_or(|d| i64::try_from(d.picos()).is_ok());
        let whole = fits(&c.total) && fits(&c.machine) && c.classes.iter().all(fits);
        let keep = |d: Option<Decimal>| d.filter(|_| whole);
        let out_of_range = || "the cost is out of range".to_owned();
        Self {
            cost: keep(c.total),
            cost_input: keep(c.classes[0]),
            cost_cache_read: keep(c.classes[1]),
            cost_cache_write: keep(c.classes[2]),
            cost_output: keep(c.classes[3]),
            cost_reasoning: keep(c.classes[4]),
            cost_machine: keep(c.machine),
            currency: c.currency.clone(),
            no_cost_reason: c.reason.clone().or_else(|| (!whole).then(out_of_range)),
            price_version: c.version.clone(),
        }
    }
}

pub(super) fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Booleans as 0 and 1, which both databases have.
mod flag {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(b: &bool, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u8((*b).into())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
        Ok(u8::deserialize(d)? != 0)
    }
}

/// Money as an integer of picos.
mod picos {
    use ashlar_core::Decimal;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, ser::Error};

    pub(super) fn serialize<S: Serializer>(d: &Option<Decimal>, s: S) -> Result<S::Ok, S::Error> {
        let picos = d.map(|d| i64::try_from(d.picos()).map_err(S::Error::custom)).transpose()?;
        picos.serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Decimal>, D::Error> {
        let picos = Option::<i64>::deserialize(d)?;
        Ok(picos.map(|n| Decimal::from_picos(n.into())))
    }
}

/// A map as text that is JSON.
mod json_text {
    use serde::{Deserialize, Deserializer, Serializer, de, ser::Error};
    use std::collections::BTreeMap;

    pub(super) fn serialize<S: Serializer>(m: &BTreeMap<String, String>, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&serde_json::to_string(m).map_err(S::Error::custom)?)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, String>, D::Error> {
        serde_json::from_str(&String::deserialize(d)?).map_err(de::Error::custom)
    }
}

/// Columns in the order of the schema; numbers are marked.
const COLUMNS: &[(&str, bool)] = &[
    ("id", false),
    ("attempt_of", false),
    ("api_key", false),
    ("team", false),
    ("end_user", false),
    ("tags", false),
    ("model", false),
    ("adapter", false),
    ("release", false),
    ("backend", false),
    ("endpoint", false),
    ("stream", true),
    ("at_ms", true),
    ("settled_ms", true),
    ("input", true),
    ("cache_read", true),
    ("cache_write", true),
    ("output", true),
    ("reasoning", true),
    ("counts", false),
    ("machine_us", true),
    ("cost", true),
    ("cost_input", true),
    ("cost_cache_read", true),
    ("cost_cache_write", true),
    ("cost_output", true),
    ("cost_reasoning", true),
    ("cost_machine", true),
    ("currency", false),
    ("no_cost_reason", false),
    ("price_version", false),
    ("queue_us", true),
    ("ttft_us", true),
    ("total_us", true),
    ("finish", false),
    ("error", false),
    ("refusal", true),
    ("guard", false),
];

static INSERT: LazyLock<String> = LazyLock::new(|| {
    let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    let values = COLUMNS.iter().map(|(name, number)| match number {
        true => format!("CAST(e.value->>'{name}' AS BIGINT)"),
        false => format!("e.value->>'{name}'"),
    });
    let values = values.collect::<Vec<_>>().join(", ");
    // Materialized: SQLite would write each row's JSON anew for each column.
    format!(
        "INSERT INTO usage ({}, replica) WITH e AS MATERIALIZED (SELECT x.value FROM EACH($1) AS x) \
         SELECT {values}, $2 FROM e WHERE 1 = 1 ON CONFLICT (id) DO NOTHING",
        names.join(", ")
    )
});

/// `SELECT` of whole rows as JSON objects.
static SELECT: LazyLock<String> = LazyLock::new(|| {
    let pairs: Vec<String> = COLUMNS.iter().map(|(name, _)| format!("'{name}', {name}")).collect();
    format!("SELECT CAST(OBJECT_OF({}) AS TEXT) FROM usage", pairs.join(", "))
});

/// Writes rows of a replica, a JSON array of [`UsageRow`]s; how many were new.
pub(super) async fn insert(tx: &mut Tx, rows: &str, replica: &str) -> Result<u64, AccountError> {
    tx.execute(&INSERT, &[rows, replica]).await
}

/// The rows that a replica settled last, newest first, some thousand at most. None
/// that was admitted a day before its last.
pub(super) async fn last_of(tx: &mut Tx, replica: &str) -> Result<Vec<UsageRow>, AccountError> {
    let sql = format!(
        "{} WHERE replica = $1 AND at_ms >= (SELECT started_ms FROM replica WHERE id = $1) AND at_ms >= \
         (SELECT at_ms FROM usage WHERE replica = $1 ORDER BY at_ms DESC LIMIT 1) - 86400000 \
         ORDER BY settled_ms DESC LIMIT 4096",
        *SELECT
    );
    tx.rows(&sql, &[replica]).await?.iter().map(|r| Ok(serde_json::from_str(r)?)).collect()
}

/// Which rows of the ledger are meant. Empty fields mean all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UsageFilter {
    /// Admitted at or after.
    pub from_ms: Option<i64>,
    /// Admitted before.
    pub until_ms: Option<i64>,
    /// Of this key.
    pub api_key: Option<String>,
    /// Of this team.
    pub team: Option<String>,
    /// Of this hashed end user.
    pub end_user: Option<String>,
    /// Of this model.
    pub model: Option<String>,
    /// Of this backend.
    pub backend: Option<String>,
}

/// Something to add usage up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Dimension {
    ApiKey,
    Team,
    EndUser,
    Model,
    Adapter,
    Release,
    Backend,
    Endpoint,
    Finish,
    /// The day of admission, UTC, as milliseconds since 1970.
    Day,
    /// The hour of admission, likewise.
    Hour,
}

impl Dimension {
    fn sql(self) -> &'static str {
        match self {
            Self::ApiKey => "COALESCE(api_key, '')",
            Self::Team => "COALESCE(team, '')",
            Self::EndUser => "COALESCE(end_user, '')",
            Self::Model => "model",
            Self::Adapter => "COALESCE(adapter, '')",
            Self::Release => "COALESCE(release, '')",
            Self::Backend => "backend",
            Self::Endpoint => "endpoint",
            Self::Finish => "finish",
            Self::Day => "CAST(at_ms - at_ms % 86400000 AS TEXT)",
            Self::Hour => "CAST(at_ms - at_ms % 3600000 AS TEXT)",
        }
    }
}

/// Usage added up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UsageSum {
    /// The values of the dimensions asked for, in their order; empty text where
    /// a row has none.
    pub of: Vec<String>,
    /// Currencies are not added to each other.
    pub currency: Option<String>,
    /// Rows.
    pub requests: u64,
    /// Of them, those whose counts are estimated.
    pub estimated: u64,
    /// Of them, those whose cost is not known and not in `cost`.
    pub unpriced: u64,
    /// Of them, refusals.
    pub refusals: u64,
    /// Tokens by class.
    pub tokens: Tokens,
    /// Known cost, exact.
    pub cost: Decimal,
    /// The same in parts: by token class, then the machine's.
    pub parts: [Decimal; 6],
    /// Microseconds of the machine for itself.
    pub machine_us: u64,
}

impl UsageFilter {
    /// The condition, whose argument `$1` is [`Self::argument`].
    fn condition(&self) -> String {
        let mut sql = String::from("1 = 1");
        let field = |name: &str| format!("(CAST($1 AS JSONTYPE)->>'{name}')");
        if self.from_ms.is_some() {
            let _ = write!(sql, " AND at_ms >= CAST({} AS BIGINT)", field("from_ms"));
        }
        if self.until_ms.is_some() {
            let _ = write!(sql, " AND at_ms < CAST({} AS BIGINT)", field("until_ms"));
        }
        let texts = [
            ("api_key", &self.api_key),
            ("team", &self.team),
            ("end_user", &self.end_user),
            ("model", &self.model),
            ("backend", &self.backend),
        ];
        for (name, _) in texts.iter().filter(|(_, v)| v.is_some()) {
            let _ = write!(sql, " AND {name} = {}", field(name));
        }
        sql
    }
}

impl Accounts {
    /// The row of one request, once it is settled.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn usage(&self, id: &str) -> Result<Option<UsageRow>, AccountError> {
        let rows = self.db().rows(&format!("{} WHERE id = $1", *SELECT), &[id]).await?;
        rows.first().map(|r| Ok(serde_json::from_str(r)?)).transpose()
    }

    /// Up to `limit` rows in order of admission, after the row `after`, given by
    /// its time and id: so a reader walks millions of rows a page at a time.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn usage_page(
        &self,
        filter: &UsageFilter,
        after: Option<(i64, &str)>,
        limit: u32,
    ) -> Result<Vec<UsageRow>, AccountError> {
        let (at, id) = after.unwrap_or((i64::MIN, ""));
        let sql = format!(
            "{} WHERE {} AND (at_ms, id) > (CAST($2 AS BIGINT), CAST($3 AS TEXT)) AND $1 = $1 \
             ORDER BY at_ms, id LIMIT CAST($4 AS BIGINT)",
            *SELECT,
            filter.condition()
        );
        let args = [&*serde_json::to_string(filter)?, &at.to_string(), id, &limit.to_string()];
        let rows = self.db().rows(&sql, &args).await?;
        rows.iter().map(|r| Ok(serde_json::from_str(r)?)).collect()
    }

    /// Usage added up by each combination of `by`.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn usage_sums(&self, filter: &UsageFilter, by: &[Dimension]) -> Result<Vec<UsageSum>, AccountError> {
        const COSTS: [&str; 7] =
            ["cost", "cost_input", "cost_cache_read", "cost_cache_write", "cost_output", "cost_reasoning", "cost_machine"];
        let mut columns: Vec<String> = by.iter().map(|d| d.sql().to_owned()).collect();
        columns.push("COALESCE(currency, '')".into());
        let keys = columns.join(", ");
        let sum = |what: &str| format!("CAST(COALESCE(SUM({what}), 0) AS TEXT)");
        columns.push("CAST(COUNT(*) AS TEXT)".into());
        for what in [
            "CASE WHEN counts = 'estimated' THEN 1 ELSE 0 END",
            "CASE WHEN cost IS NULL THEN 1 ELSE 0 END",
            "refusal",
            "input",
            "cache_read",
            "cache_write",
            "output",
            "reasoning",
            "machine_us",
        ] {
            columns.push(sum(what));
        }
        // In two halves: SQLite's sum is an integer of 64 bits, which 9.2 million
        // of the currency would fill.
        for cost in COSTS {
            columns.push(sum(&format!("{cost} / 1000000000")));
            columns.push(sum(&format!("{cost} % 1000000000")));
        }
        let sql = format!(
            "SELECT CAST(ROW_OF({}) AS TEXT) FROM usage WHERE {} AND $1 = $1 GROUP BY {keys} ORDER BY {keys}",
            columns.join(", "),
            filter.condition()
        );
        let rows = self.db().rows(&sql, &[&serde_json::to_string(filter)?]).await?;
        let parse = |text: &String| -> Result<UsageSum, AccountError> {
            let cells: Vec<String> = serde_json::from_str(text)?;
            let bad = || AccountError::Corrupt(format!("a sum of usage is {text}"));
            let (of, rest) = cells.split_at_checked(by.len()).ok_or_else(bad)?;
            let (currency, rest) = rest.split_first().ok_or_else(bad)?;
            let n: Vec<i128> = rest.iter().map(|c| c.parse()).collect::<Result<_, _>>().map_err(|_| bad())?;
            let [requests, estimated, unpriced, refusals, input, cache_read, cache_write, output, reasoning, machine, costs @ ..] = &*n else {
                return Err(bad());
            };
            let count = |n: &i128| u64::try_from(*n).map_err(|_| bad());
            let money: Vec<Decimal> = costs.chunks(2).map(|c| Decimal::from_picos(c[0] * 1_000_000_000 + c[1])).collect();
            let [cost, parts @ ..] = &*money else { return Err(bad()) };
            Ok(UsageSum {
                of: of.to_vec(),
                currency: (!currency.is_empty()).then(|| currency.clone()),
                requests: count(requests)?,
                estimated: count(estimated)?,
                unpriced: count(unpriced)?,
                refusals: count(refusals)?,
                tokens: Tokens {
                    input: count(input)?,
                    cache_read: count(cache_read)?,
                    cache_write: count(cache_write)?,
                    output: count(output)?,
                    reasoning: count(reasoning)?,
                },
                cost: *cost,
                parts: parts.try_into().map_err(|_| bad())?,
                machine_us: count(machine)?,
            })
        };
        rows.iter().map(parse).collect()
    }
}
