//! What a request costs: the price list, token classes, exact arithmetic.
//!
//! ```toml
//! version = "2026-11"
//! currency = "USD"
//!
//! [[price]]
//! model = "gpt-4o-mini"       # a name, or a beginning that ends in *
//! backend = "openai"          # optional; without it, any
//! from = 2026-01-01           # optional; until too
//! input = "0.15"              # of a million tokens
//! cache_read = "0.075"
//! cache_write = "input"       # the same as another class
//! output = "0.60"
//! reasoning = "output"
//!
//! [[machine]]
//! backend = "local"
//! second = "0.000231"         # of the machine for itself
//! ```
//!
//! Rates are strings, since a TOML float is a binary one. A class without a
//! rate costs nothing only while no token of it is used: else the cost of the
//! whole request is unknown, and says why. A backend with a `machine` rate is
//! priced by the machine's time alone: each request by its measured share.

use super::{AccountError, key::means, limit::is_currency};
use ashlar_core::{Decimal, Rate, clock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use toml::value::Datetime;

/// A kind of token with a price of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenClass {
    /// Of the prompt, computed, and not written to a cache at a price.
    Input,
    /// Of the prompt, found in a cache.
    CacheRead,
    /// Of the prompt, computed and written to a cache.
    CacheWrite,
    /// Generated and shown.
    Output,
    /// Generated while thinking.
    Reasoning,
}

impl TokenClass {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Input, Self::CacheRead, Self::CacheWrite, Self::Output, Self::Reasoning];

    /// The name in price lists and exports.
    pub fn as_str(self) -> &'static str {
        ["input", "cache_read", "cache_write", "output", "reasoning"][self as usize]
    }
}

/// Tokens by class. The classes are disjoint: each token is counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tokens {
    /// [`TokenClass::Input`].
    pub input: u64,
    /// [`TokenClass::CacheRead`].
    pub cache_read: u64,
    /// [`TokenClass::CacheWrite`].
    pub cache_write: u64,
    /// [`TokenClass::Output`].
    pub output: u64,
    /// [`TokenClass::Reasoning`].
    pub reasoning: u64,
}

impl Tokens {
    /// From counts of which each part is contained in its whole, as OpenAI's
    /// `usage` has them. `None` where the parts are more than the whole: such
    /// counts are wrong, and whoever got them counts for himself.
    ///
    /// ```
    /// use ashlar_store::Tokens;
    /// let tokens = Tokens::of_whole(100, 80, 5, 30, 12).unwrap();
    /// assert_eq!((tokens.input, tokens.output, tokens.total()), (15, 18, 130));
    /// assert_eq!(Tokens::of_whole(100, 80, 21, 30, 12), None);
    /// ```
    pub fn of_whole(prompt: u64, cache_read: u64, cache_write: u64, completion: u64, reasoning: u64) -> Option<Self> {
        Some(Self {
            input: prompt.checked_sub(cache_read)?.checked_sub(cache_write)?,
            cache_read,
            cache_write,
            output: completion.checked_sub(reasoning)?,
            reasoning,
        })
    }

    /// Those of one class.
    pub fn of(&self, class: TokenClass) -> u64 {
        [self.input, self.cache_read, self.cache_write, self.output, self.reasoning][class as usize]
    }

    /// All of them; saturating.
    pub fn total(&self) -> u64 {
        TokenClass::ALL.iter().fold(0, |sum, c| sum.saturating_add(self.of(*c)))
    }
}

/// What a request cost.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// In all; `None` where it is not known.
    pub total: Option<Decimal>,
    /// By [`TokenClass`]; `None` where a class with tokens has no rate, or where
    /// the machine's time is what is paid for.
    pub classes: [Option<Decimal>; 5],
    /// The machine's time, where that is what is paid for.
    pub machine: Option<Decimal>,
    /// ISO 4217; `None` without a price list.
    pub currency: Option<String>,
    /// The price list.
    pub version: Option<String>,
    /// Why `total` is not known.
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: String,
    currency: String,
    #[serde(default)]
    price: Vec<PriceEntry>,
    #[serde(default)]
    machine: Vec<MachineEntry>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct PriceEntry {
    model: String,
    backend: Option<String>,
    from: Option<Datetime>,
    until: Option<Datetime>,
    input: Option<toml::Value>,
    cache_read: Option<toml::Value>,
    cache_write: Option<toml::Value>,
    output: Option<toml::Value>,
    reasoning: Option<toml::Value>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineEntry {
    backend: String,
    from: Option<Datetime>,
    until: Option<Datetime>,
    second: toml::Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Price {
    model: String,
    backend: Option<String>,
    span: Span,
    rates: [Option<Rate>; 5],
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Machine {
    backend: String,
    span: Span,
    second: Rate,
}

/// From, and until just before, in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span(i64, i64);

impl Span {
    fn holds(self, at_ms: i64) -> bool {
        self.0 <= at_ms && at_ms < self.1
    }

    fn meets(self, other: Self) -> bool {
        self.0 < other.1 && other.0 < self.1
    }
}

/// Rates with the times they hold for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PriceList {
    version: String,
    currency: String,
    prices: Vec<Price>,
    machines: Vec<Machine>,
    /// The text it was read from.
    text: String,
}

fn wrong(field: impl Into<String>, why: impl Into<String>) -> AccountError {
    AccountError::Setting { field: field.into(), why: why.into() }
}

impl PriceList {
    /// Reads a price list.
    ///
    /// # Errors
    /// [`AccountError::Setting`] with the key at fault, e.g.
    /// `price[2].cache_read`; [`AccountError::Toml`] with line and column.
    pub fn parse(text: &str) -> Result<Self, AccountError> {
        let file: File = toml::from_str(text).map_err(|e| AccountError::Toml(e.to_string().trim_end().into()))?;
        if file.version.trim().is_empty() {
            return Err(wrong("version", "is empty: usage rows are recorded with it"));
        }
        if !is_currency(&file.currency) {
            return Err(wrong("currency", format!("{:?} is no currency code such as \"USD\"", file.currency)));
        }
        let prices = file.price.iter().enumerate().map(|(i, e)| price(&format!("price[{i}]"), e));
        let prices = prices.collect::<Result<Vec<_>, _>>()?;
        for (i, a) in prices.iter().enumerate() {
            let same = |b: &&Price| (&b.model, &b.backend) == (&a.model, &a.backend) && b.span.meets(a.span);
            if let Some(earlier) = prices[..i].iter().position(|b| same(&b)) {
                let why = format!("holds for the same model, backend and time as price[{earlier}]");
                return Err(wrong(format!("price[{i}].from"), why));
            }
        }
        let machines = file.machine.iter().enumerate().map(|(i, e)| machine(&format!("machine[{i}]"), e));
        let machines = machines.collect::<Result<Vec<_>, _>>()?;
        for (i, a) in machines.iter().enumerate() {
            let same = |b: &&Machine| b.backend == a.backend && b.span.meets(a.span);
            if let Some(earlier) = machines[..i].iter().position(|b| same(&b)) {
                let why = format!("holds for the same backend and time as machine[{earlier}]");
                return Err(wrong(format!("machine[{i}].from"), why));
            }
        }
        Ok(Self { version: file.version, currency: file.currency, prices, machines, text: text.into() })
    }

    /// Its version, as recorded with each row.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// ISO 4217.
    pub fn currency(&self) -> &str {
        &self.currency
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether `backend` is paid for by the machine's time.
    pub fn by_machine(&self, backend: &str, at_ms: i64) -> bool {
        self.machine(backend, at_ms).is_some()
    }

    /// The cost of `tokens` of `model` from `backend`, or of `machine_us`
    /// microseconds of the machine for itself, at the rates of `at_ms`.
    ///
    /// The entry that fits closest counts: one with the backend before one
    /// without, then the longer model name.
    pub fn cost(&self, model: &str, backend: &str, at_ms: i64, tokens: &Tokens, machine_us: u64) -> Cost {
        let mut cost = Cost {
            currency: Some(self.currency.clone()),
            version: Some(self.version.clone()),
            ..Cost::default()
        };
        if let Some(m) = self.machine(backend, at_ms) {
            cost.machine = Some(m.second.times(machine_us));
            cost.total = cost.machine;
            return cost;
        }
        let closest = |p: &&Price| (p.backend.is_some(), p.model.trim_end_matches('*').len(), !p.model.ends_with('*'));
        let fitting = self.prices.iter().filter(|p| p.fits(model, backend, at_ms)).max_by_key(closest);
        let Some(price) = fitting else {
            cost.reason = Some(format!("price list {} has no price of {model} from {backend} at {}", self.version, clock::rfc3339(at_ms)));
            return cost;
        };
        let mut total = Some(Decimal::ZERO);
        for class in TokenClass::ALL {
            let n = tokens.of(class);
            let part = match price.rates[class as usize] {
                Some(rate) => Some(rate.times(n)),
                None => (n == 0).then_some(Decimal::ZERO),
            };
            if part.is_none() {
                let why = || format!("price list {} has no rate of {} for {model} from {backend}", self.version, class.as_str());
                cost.reason.get_or_insert_with(why);
            }
            cost.classes[class as usize] = part;
            total = total.zip(part).and_then(|(t, p)| t.checked_add(p));
        }
        cost.total = total;
        if total.is_none() && cost.reason.is_none() {
            cost.reason = Some("the cost is out of range".into());
        }
        cost
    }

    fn machine(&self, backend: &str, at_ms: i64) -> Option<&Machine> {
        self.machines.iter().find(|m| m.backend == backend && m.span.holds(at_ms))
    }
}

impl Price {
    fn fits(&self, model: &str, backend: &str, at_ms: i64) -> bool {
        means(&self.model, model) && self.backend.as_ref().is_none_or(|b| b == backend) && self.span.holds(at_ms)
    }
}

fn price(at: &str, e: &PriceEntry) -> Result<Price, AccountError> {
    if e.model.is_empty() || e.model.strip_suffix('*').unwrap_or(&e.model).contains('*') {
        return Err(wrong(format!("{at}.model"), format!("{:?} is neither a name nor the beginning of one and a final *", e.model)));
    }
    let given = [&e.input, &e.cache_read, &e.cache_write, &e.output, &e.reasoning];
    let mut rates = [None; 5];
    for class in TokenClass::ALL {
        rates[class as usize] = resolve(at, class, &given, &mut BTreeSet::new())?;
    }
    if rates.iter().all(Option::is_none) {
        return Err(wrong(at, "has no rate"));
    }
    let span = span(at, e.from, e.until)?;
    Ok(Price { model: e.model.clone(), backend: e.backend.clone(), span, rates })
}

fn machine(at: &str, e: &MachineEntry) -> Result<Machine, AccountError> {
    let field = format!("{at}.second");
    let second = rate(&field, text_of(&field, &e.second)?)?;
    Ok(Machine { backend: e.backend.clone(), span: span(at, e.from, e.until)?, second })
}

/// The rate of `class`, through the classes it is said to be the same as.
fn resolve(
    at: &str,
    class: TokenClass,
    given: &[&Option<toml::Value>; 5],
    seen: &mut BTreeSet<TokenClass>,
) -> Result<Option<Rate>, AccountError> {
    let Some(value) = given[class as usize] else { return Ok(None) };
    let field = format!("{at}.{}", class.as_str());
    let text = text_of(&field, value)?;
    let Some(other) = TokenClass::ALL.into_iter().find(|c| c.as_str() == text) else {
        return rate(&field, text).map(Some);
    };
    if !seen.insert(class) {
        return Err(wrong(field, "is the same as itself"));
    }
    let found = resolve(at, other, given, seen)?;
    found.map(Some).ok_or_else(|| wrong(field, format!("is the same as {text:?}, which has no rate")))
}

fn text_of<'a>(field: &str, value: &'a toml::Value) -> Result<&'a str, AccountError> {
    let why = || format!("is {value}: write a rate in quotes, since a TOML number is a binary float");
    value.as_str().ok_or_else(|| wrong(field, why()))
}

fn rate(field: &str, text: &str) -> Result<Rate, AccountError> {
    text.parse().map_err(|e: ashlar_core::DecimalError| wrong(field, e.to_string()))
}

fn span(at: &str, from: Option<Datetime>, until: Option<Datetime>) -> Result<Span, AccountError> {
    let instant = |name: &str, d: Option<Datetime>, otherwise| match d {
        None => Ok(otherwise),
        Some(d) => millis(&d).ok_or_else(|| wrong(format!("{at}.{name}"), format!("{d} is neither a date nor a date and time"))),
    };
    let span = Span(instant("from", from, i64::MIN)?, instant("until", until, i64::MAX)?);
    if span.0 >= span.1 {
        return Err(wrong(format!("{at}.until"), "is not after from"));
    }
    Ok(span)
}

/// A date is its midnight; without an offset, UTC.
fn millis(d: &Datetime) -> Option<i64> {
    let date = d.date?;
    let days = clock::days(date.year.into(), date.month.into(), date.day.into());
    let in_day = d.time.map_or(0, |t| {
        let seconds = (i64::from(t.hour) * 60 + i64::from(t.minute)) * 60 + i64::from(t.second);
        seconds * 1000 + i64::from(t.nanosecond) / 1_000_000
    });
    let offset = match d.offset {
        Some(toml::value::Offset::Custom { minutes }) => i64::from(minutes) * 60_000,
        _ => 0,
    };
    Some(days * 86_400_000 + in_day - offset)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIST: &str = r#"
        version = "v7"
        currency = "USD"
        [[price]]
        model = "small"
        until = 2026-01-01
        input = "1"
        output = "2"
        [[price]]
        model = "small"
        from = 2026-01-01
        input = "0.15"
        cache_read = "0.075"
        output = "0.60"
        reasoning = "output"
        [[price]]
        model = "small"
        backend = "dear"
        input = "10"
        output = "20"
        [[price]]
        model = "sm*"
        input = "100"
        output = "100"
        [[machine]]
        backend = "local"
        second = "0.000231"
    "#;
    const JAN_2026: i64 = 1_767_225_600_000;

    fn list() -> PriceList {
        PriceList::parse(LIST).unwrap()
    }

    fn cost(model: &str, backend: &str, at_ms: i64, tokens: Tokens) -> Option<String> {
        list().cost(model, backend, at_ms, &tokens, 0).total.map(|d| d.to_string())
    }

    #[test]
    fn the_closest_entry_of_the_time_counts() {
        let tokens = Tokens { input: 1_000_000, output: 500_000, ..Default::default() };
        assert_eq!(cost("small", "x", JAN_2026 - 1, tokens).as_deref(), Some("2"));
        assert_eq!(cost("small", "x", JAN_2026, tokens).as_deref(), Some("0.45"));
        assert_eq!(cost("small", "dear", JAN_2026, tokens).as_deref(), Some("20"));
        assert_eq!(cost("smaller", "dear", JAN_2026, tokens).as_deref(), Some("150"));
    }

    #[test]
    fn what_has_no_rate_costs_an_unknown_amount() {
        let tokens = Tokens { input: 1, cache_write: 1, ..Default::default() };
        let c = list().cost("small", "x", JAN_2026, &tokens, 0);
        assert_eq!(c.total, None);
        assert!(c.reason.as_ref().unwrap().contains("cache_write"), "{c:?}");
        assert_eq!(c.classes[0].unwrap().to_string(), "0.00000015", "known parts stay");
        let c = list().cost("large", "x", JAN_2026, &tokens, 0);
        assert!(c.total.is_none() && c.reason.unwrap().contains("large"));
    }

    #[test]
    fn a_machine_is_paid_by_its_time() {
        let tokens = Tokens { input: 1_000_000, ..Default::default() };
        let c = list().cost("anything", "local", JAN_2026, &tokens, 1_500_000);
        assert_eq!(c.total.unwrap().to_string(), "0.0003465");
        assert_eq!(c.machine, c.total);
        assert_eq!(c.classes, [None; 5]);
    }

    #[test]
    fn errors_name_the_key() {
        let head = "version='1'\ncurrency='EUR'\n";
        for (text, said) in [
            ("currency='EUR'", "version"),
            ("version=' '\ncurrency='EUR'", "version"),
            ("version='1'\ncurrency='euro'", "currency"),
            ("version='1'\ncurrency='EUR'\nrate=1", "rate"),
            ("[[price]]\nmodel='m'\ninput=0.15", "price[0].input: is 0.15"),
            ("[[price]]\nmodel='m'\ninput='0.1500001'", "price[0].input"),
            ("[[price]]\nmodel='m'\ninput='-1'", "price[0].input"),
            ("[[price]]\nmodel='m'\ninput='1'\n[[price]]\nmodel='m'\nouput='1'", "ouput"),
            ("[[price]]\nmodel='m'\ninput='1'\n[[price]]\nmodel='m'\noutput='1'", "price[1].from"),
            ("[[price]]\nmodel='m'", "price[0]: has no rate"),
            ("[[price]]\nmodel='a*b'\ninput='1'", "price[0].model"),
            ("[[price]]\nmodel='m'\ninput='output'\noutput='input'", "price[0].input"),
            ("[[price]]\nmodel='m'\ninput='1'\nreasoning='output'", "price[0].reasoning"),
            ("[[price]]\nmodel='m'\ninput='1'\nfrom=2026-02-01\nuntil=2026-01-01", "price[0].until"),
            ("[[price]]\nmodel='m'\ninput='1'\nfrom=12:00:00", "price[0].from"),
            ("[[machine]]\nbackend='b'\nsecond=1", "machine[0].second"),
            ("[[machine]]\nbackend='b'\nsecond='1'\n[[machine]]\nbackend='b'\nsecond='1'", "machine[1].from"),
        ] {
            let text = if text.contains("urrency") || text.contains("ersion") { text.to_owned() } else { format!("{head}{text}") };
            let e = PriceList::parse(&text).unwrap_err().to_string();
            assert!(e.contains(said), "{text:?}: {e}");
        }
    }

    #[test]
    fn times_have_offsets() {
        let ms = |s: &str| millis(&s.parse().unwrap()).unwrap();
        assert_eq!(ms("2026-01-01"), JAN_2026);
        assert_eq!(ms("2026-01-01T01:00:00.5+01:00"), JAN_2026 + 500);
        assert_eq!(ms("2025-12-31T19:00:00-05:00"), JAN_2026);
    }

    proptest! {
        /// Splitting and summing are inverses, and the parts' costs are the whole's.
        #[test]
        fn classes_are_disjoint(p in 0u64..1 << 40, r in 0u64..1 << 40, w in 0u64..1 << 40, c in 0u64..1 << 40, t in 0u64..1 << 40) {
            match Tokens::of_whole(p, r, w, c, t) {
                None => prop_assert!(r + w > p || t > c),
                Some(tokens) => {
                    prop_assert_eq!(tokens.total(), p + c);
                    let tokens = Tokens { cache_write: 0, ..tokens };
                    let cost = list().cost("small", "x", JAN_2026, &tokens, 0);
                    let sum = cost.classes.iter().try_fold(Decimal::ZERO, |s, part| s.checked_add((*part)?));
                    prop_assert_eq!(cost.total, sum);
                    let picos = u128::from(tokens.input) * 150_000 + u128::from(r) * 75_000 + u128::from(c) * 600_000;
                    prop_assert_eq!(cost.total.unwrap().picos().unsigned_abs(), picos);
                }
            }
        }

        #[test]
        fn hostile_text_does_not_panic(text in "\\PC{0,200}") {
            let _ = PriceList::parse(&text);
        }
    }
}
