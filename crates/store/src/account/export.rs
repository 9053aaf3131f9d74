//! The usage ledger as a cost-and-usage data set: FOCUS column names (FinOps
//! Open Cost and Usage Specification, 1.2), as CSV.
//!
//! A row of the ledger becomes one charge a token class, one for the machine's
//! time where that is what is paid for, or one of nothing where nothing was
//! used, so that no request is missing. What FOCUS has no column for is in `x_`
//! columns. One deviation: a cost that is not known is empty, where FOCUS wants
//! a number, since nought would be a wrong one.
//!
//! Parquet is not written here: its library comes with DataFusion, which this
//! crate does not lean on. [`focus_rows`] hands whoever does the same cells.

use super::{
    AccountError, Accounts,
    price::TokenClass,
    usage::{UsageFilter, UsageRow},
};
use ashlar_core::{Decimal, Window, clock};

/// Who charges whom, which the ledger does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FocusIssuer {
    /// `BillingAccountId`: who pays.
    pub account_id: String,
    /// `BillingAccountName`.
    pub account_name: String,
    /// `ProviderName` and `InvoiceIssuerName`: who runs the gateway.
    pub provider: String,
}

/// The columns of a FOCUS export, in order.
pub const FOCUS_COLUMNS: [&str; 43] = [
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuPriceId",
    "SubAccountId",
    "Tags",
    "x_Adapter",
    "x_AttemptOf",
    "x_CostUnknown",
    "x_Counts",
    "x_EndUserId",
    "x_Endpoint",
    "x_Finish",
    "x_KeyId",
    "x_RequestId",
    "x_TokenClass",
];

/// A part of a request that has a price.
struct Charge {
    class: &'static str,
    cost: Option<Decimal>,
    quantity: Decimal,
    unit: &'static str,
    priced: Decimal,
    pricing_unit: &'static str,
    unit_price: Option<Decimal>,
}

fn charges(row: &UsageRow) -> Vec<Charge> {
    let (t, c) = (&row.tokens, &row.cost);
    if let Some(cost) = c.cost_machine {
        let seconds = micros(row.machine_us);
        let unit_price = per(cost, row.machine_us);
        return vec![Charge { class: "machine", cost: Some(cost), quantity: seconds, unit: "Seconds", priced: seconds, pricing_unit: "Seconds", unit_price }];
    }
    let counts = [t.input, t.cache_read, t.cache_write, t.output, t.reasoning];
    let costs = [c.cost_input, c.cost_cache_read, c.cost_cache_write, c.cost_output, c.cost_reasoning];
    let mut out = Vec::new();
    for (class, (n, cost)) in TokenClass::ALL.iter().zip(counts.into_iter().zip(costs)) {
        if n > 0 {
            out.push(Charge {
                class: class.as_str(),
                cost,
                quantity: Decimal::from(n.unsigned_abs()),
                unit: "Tokens",
                priced: micros(n),
                pricing_unit: "1000000 Tokens",
                unit_price: cost.and_then(|cost| per(cost, n)),
            });
        }
    }
    if out.is_empty() {
        let one = Decimal::from(1);
        out.push(Charge { class: "", cost: c.cost, quantity: one, unit: "Requests", priced: one, pricing_unit: "Requests", unit_price: None });
    }
    out
}

/// Millionths of `n`.
fn micros(n: i64) -> Decimal {
    Decimal::from_picos(i128::from(n) * 1_000_000)
}

/// The rate that made `n` tokens or microseconds cost this: exact, since the
/// cost is a product of the two.
fn per(cost: Decimal, n: i64) -> Option<Decimal> {
    (n > 0).then(|| Decimal::from_picos(cost.picos() / i128::from(n) * 1_000_000))
}

/// FOCUS writes times to the second.
fn time(ms: i64) -> String {
    let text = clock::rfc3339(ms);
    format!("{}Z", &text[..text.len() - 5])
}

/// The charges of one row of the ledger, each as the cells of [`FOCUS_COLUMNS`].
pub fn focus_rows(row: &UsageRow, issuer: &FocusIssuer) -> Vec<[String; 43]> {
    let text = |t: &Option<String>| t.clone().unwrap_or_default();
    let number = |d: Option<Decimal>| d.map(|d| d.to_string()).unwrap_or_default();
    let tags = serde_json::to_string(&row.tags).unwrap_or_default();
    let period = (Window::Month.start(row.at_ms), Window::Month.end(row.at_ms).unwrap_or(row.at_ms));
    let sku = |class: &str| format!("{}/{}/{class}", row.backend, row.model);
    let cells = |c: Charge| {
        let cost = number(c.cost);
        let price = row.cost.price_version.as_ref().map(|v| format!("{v}/{}", sku(c.class)));
        [
            cost.clone(),
            issuer.account_id.clone(),
            issuer.account_name.clone(),
            text(&row.cost.currency),
            time(period.1),
            time(period.0),
            "Usage".into(),
            String::new(),
            format!("{} {} of {} from {}", c.quantity, if c.class.is_empty() { "requests" } else { c.class }, row.model, row.backend),
            "Usage-Based".into(),
            // Exclusive, and never the start: a charge has a length.
            time(row.settled_ms.max(row.at_ms) + 1000),
            time(row.at_ms),
            c.quantity.to_string(),
            c.unit.into(),
            cost.clone(),
            cost.clone(),
            issuer.provider.clone(),
            cost,
            number(c.unit_price),
            "Standard".into(),
            c.priced.to_string(),
            c.pricing_unit.into(),
            issuer.provider.clone(),
            row.backend.clone(),
            row.release.clone().unwrap_or_else(|| row.model.clone()),
            "Model".into(),
            "AI and Machine Learning".into(),
            row.model.clone(),
            "Generative AI".into(),
            sku(c.class),
            price.unwrap_or_default(),
            text(&row.team),
            tags.clone(),
            text(&row.adapter),
            text(&row.attempt_of),
            text(&row.cost.no_cost_reason),
            match row.counts {
                super::Counts::Measured => "measured".into(),
                super::Counts::Estimated => "estimated".into(),
            },
            text(&row.end_user),
            row.endpoint.clone(),
            row.finish.as_str().into(),
            text(&row.api_key),
            row.id.clone(),
            c.class.into(),
        ]
    };
    charges(row).into_iter().map(cells).collect()
}

/// Writes the rows that `filter` means as CSV with a header, a page at a time;
/// how many rows of the ledger.
///
/// # Errors
/// When the database cannot be read or `to` cannot be written.
pub async fn write_focus_csv(
    accounts: &Accounts,
    filter: &UsageFilter,
    issuer: &FocusIssuer,
    to: impl std::io::Write,
) -> Result<u64, AccountError> {
    let failed = |e: csv::Error| AccountError::Export(e.to_string());
    let mut csv = csv::Writer::from_writer(to);
    csv.write_record(FOCUS_COLUMNS).map_err(failed)?;
    let (mut rows, mut after) = (0, None::<(i64, String)>);
    loop {
        let page = accounts.usage_page(filter, after.as_ref().map(|(at, id)| (*at, &**id)), 1000).await?;
        for row in &page {
            for cells in focus_rows(row, issuer) {
                csv.write_record(&cells).map_err(failed)?;
            }
        }
        rows += page.len() as u64;
        let Some(last) = page.last() else { break };
        after = Some((last.at_ms, last.id.clone()));
    }
    csv.flush().map_err(|e| AccountError::Export(e.to_string()))?;
    Ok(rows)
}
