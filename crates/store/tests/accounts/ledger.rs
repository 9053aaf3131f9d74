//! The usage ledger: rows as they were settled, sums, pages, the export.

use crate::{
    PRICES,
    databases::{Place, on_both},
    key_with, request, used,
};
use ashlar_core::Decimal;
use ashlar_store::{
    Accounts, Counts, Dimension, Finish, KeySettings, PriceList, Request, TeamSettings, Tokens, UsageFilter, Used,
    account::{FOCUS_COLUMNS, FocusIssuer, write_focus_csv},
};

on_both!(a_row_is_what_was_settled, sums_are_exact, pages_and_export_miss_nothing, hostile_text_is_kept);

async fn a_row_is_what_was_settled(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    accounts.set_prices(PriceList::parse(PRICES).unwrap()).await.unwrap();
    let team = TeamSettings { name: "t".into(), tags: [("a".into(), "1".into()), ("b".into(), "1".into())].into(), ..Default::default() };
    let team = accounts.create_team(&team).await.unwrap();
    let tags = [("b".into(), "2".into())].into();
    let settings = KeySettings { name: "k".into(), team: Some(team.id.clone()), tags, ..Default::default() };
    let (key, secret) = accounts.create_key(&settings).await.unwrap();
    let access = accounts.authenticate(secret.reveal()).unwrap();
    let ask = Request {
        end_user: Some(accounts.user_hash("ann")),
        release: Some("rel-1".into()),
        adapter: Some("lora".into()),
        stream: true,
        ..request("r", &access, 100, 100)
    };
    let mut r = accounts.reserve(ask).await.unwrap();
    assert_eq!(accounts.usage("r").await.unwrap(), None);
    r.durable().await.unwrap();
    let at_ms = r.at_ms();
    let end = Used {
        tokens: Tokens { input: 10, cache_read: 20, cache_write: 0, output: 5, reasoning: 2 },
        counts: Counts::Estimated,
        backend: Some("other".into()),
        release: Some("rel-2".into()),
        queue_us: 7,
        ttft_us: Some(70),
        total_us: 700,
        error: Some("reset".into()),
        refusal: true,
        guard: Some("pii:2".into()),
        ..Used::new(Finish::Error)
    };
    r.settle(end).written().await.unwrap();
    let row = accounts.usage("r").await.unwrap().unwrap();
    assert_eq!((row.at_ms, row.settled_ms >= at_ms), (at_ms, true));
    assert_eq!((row.api_key, row.team, row.end_user), (Some(key.id), Some(team.id), Some(accounts.user_hash("ann"))));
    assert_eq!(row.tags, [("a".to_owned(), "1".to_owned()), ("b".into(), "2".into())].into());
    assert_eq!((&*row.model, &*row.backend, row.adapter.as_deref(), row.release.as_deref()), ("small", "other", Some("lora"), Some("rel-2")));
    assert_eq!((row.stream, row.refusal, row.counts, row.finish), (true, true, Counts::Estimated, Finish::Error));
    assert_eq!((row.tokens.input, row.tokens.cache_read, row.tokens.output, row.tokens.reasoning), (10, 20, 5, 2));
    assert_eq!((row.queue_us, row.ttft_us, row.total_us), (7, Some(70), 700));
    assert_eq!((row.error.as_deref(), row.guard.as_deref()), (Some("reset"), Some("pii:2")));
    let cost = row.cost;
    assert_eq!((cost.cost.unwrap().to_string(), cost.currency.as_deref(), cost.price_version.as_deref()), ("0.000026".into(), Some("USD"), Some("t1")));
    assert_eq!(cost.cost_cache_read.unwrap().to_string(), "0.000002");
    let local = Request { backend: "local".into(), most_machine_us: 2_000_000, ..request("m", &access, 100, 100) };
    let r = accounts.reserve(local).await.unwrap();
    r.settle(Used { machine_us: 1_500_000, ..used(100, 3) }).written().await.unwrap();
    let cost = accounts.usage("m").await.unwrap().unwrap().cost;
    assert_eq!((cost.cost.unwrap().to_string(), cost.cost_machine, cost.cost_input), ("0.75".into(), cost.cost, None));
    accounts.close().await.unwrap();
}

async fn sums_are_exact(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let dear = PRICES.replace("input = \"1\"", "input = \"9000000.000001\"");
    accounts.set_prices(PriceList::parse(&dear).unwrap()).await.unwrap();
    let keys = [key_with(&accounts, &[]).await, key_with(&accounts, &[]).await];
    // Each some 9 million: two of them overflow 64 bits of picos.
    for i in 0..6 {
        let r = accounts.reserve(request(&format!("r{i}"), &keys[i % 2], 1_000_000, 0)).await.unwrap();
        r.settle(used(1_000_000, 0));
    }
    let unpriced = Request { model: "odd".into(), ..request("odd", &keys[0], 1, 1) };
    accounts.reserve(unpriced).await.unwrap().settle(used(1, 1));
    // More than a column holds is said, not cut off.
    let huge = accounts.reserve(request("huge", &keys[1], 2_000_000, 0)).await.unwrap();
    huge.settle(used(2_000_000, 0)).written().await.unwrap();
    let huge = accounts.usage("huge").await.unwrap().unwrap();
    assert_eq!((huge.cost.cost, huge.cost.no_cost_reason.as_deref()), (None, Some("the cost is out of range")));
    let sums = accounts.usage_sums(&UsageFilter::default(), &[Dimension::ApiKey]).await.unwrap();
    assert_eq!(sums.len(), 2);
    for key in &keys {
        let sum = sums.iter().find(|s| s.of[0] == key.key().id).unwrap();
        assert_eq!((sum.requests, sum.unpriced), (4, 1));
        assert_eq!(sum.cost, "27000000.000003".parse::<Decimal>().unwrap());
        assert_eq!((sum.parts[0], sum.parts[1]), (sum.cost, Decimal::ZERO));
    }
    let all = accounts.usage_sums(&UsageFilter { model: Some("small".into()), ..Default::default() }, &[]).await.unwrap();
    assert_eq!((all.len(), all[0].tokens.input), (1, 8_000_000));
    let days = accounts.usage_sums(&UsageFilter::default(), &[Dimension::Day, Dimension::Model]).await.unwrap();
    assert!(days.iter().all(|s| s.of[0].parse::<i64>().unwrap() % 86_400_000 == 0));
    let none = UsageFilter { until_ms: Some(1000), ..Default::default() };
    assert!(accounts.usage_sums(&none, &[]).await.unwrap().is_empty());
    accounts.close().await.unwrap();
}

async fn pages_and_export_miss_nothing(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    accounts.set_prices(PriceList::parse(PRICES).unwrap()).await.unwrap();
    let key = key_with(&accounts, &[]).await;
    for i in 0..2345u64 {
        let r = accounts.reserve(request(&format!("r{i}"), &key, i, 1)).await.unwrap();
        r.settle(used(i, i % 2));
    }
    accounts.flush().await.unwrap();
    let filter = UsageFilter { api_key: Some(key.key().id.clone()), ..Default::default() };
    let (mut seen, mut after) = (std::collections::BTreeSet::new(), None::<(i64, String)>);
    loop {
        let page = accounts.usage_page(&filter, after.as_ref().map(|(a, i)| (*a, &**i)), 100).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some((last.at_ms, last.id.clone()));
        for row in page {
            assert!(seen.insert(row.id));
        }
    }
    assert_eq!(seen.len(), 2345);
    let issuer = FocusIssuer { account_id: "acme".into(), account_name: "ACME, \"the\" firm".into(), provider: "Ashlar".into() };
    let mut out = Vec::new();
    assert_eq!(write_focus_csv(&accounts, &filter, &issuer, &mut out).await.unwrap(), 2345);
    let mut csv = csv::Reader::from_reader(&*out);
    assert_eq!(csv.headers().unwrap(), &FOCUS_COLUMNS[..]);
    let at = |name: &str| FOCUS_COLUMNS.iter().position(|c| *c == name).unwrap();
    let (mut cost, mut tokens, mut ids) = (Decimal::ZERO, Decimal::ZERO, std::collections::BTreeSet::new());
    for record in csv.records() {
        let record = record.unwrap();
        assert_eq!(&record[at("BillingAccountName")], "ACME, \"the\" firm");
        assert!(record[at("ChargePeriodStart")] < record[at("ChargePeriodEnd")]);
        assert!(record[at("BillingPeriodStart")] <= record[at("ChargePeriodStart")]);
        cost = cost.checked_add(record[at("BilledCost")].parse().unwrap()).unwrap();
        if &record[at("ConsumedUnit")] == "Tokens" {
            tokens = tokens.checked_add(record[at("ConsumedQuantity")].parse().unwrap()).unwrap();
            let price = if &record[at("x_TokenClass")] == "input" { "1" } else { "2" };
            assert_eq!(&record[at("ListUnitPrice")], price);
        }
        ids.insert(record[at("x_RequestId")].to_owned());
    }
    let sum = accounts.usage_sums(&filter, &[]).await.unwrap().remove(0);
    assert_eq!((cost, tokens), (sum.cost, sum.tokens.total().into()));
    assert_eq!(ids.len(), 2345);
    accounts.close().await.unwrap();
}

async fn hostile_text_is_kept(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let key = key_with(&accounts, &[]).await;
    let odd = "q'\"\\u0000 \u{0}\u{7f}\u{2028}💥 $1 ); DROP TABLE usage; --";
    let ask = Request { model: odd.into(), end_user: Some(odd.into()), ..request("'; --", &key, 1, 1) };
    let mut r = accounts.reserve(ask).await.unwrap();
    r.durable().await.unwrap();
    r.settle(Used { error: Some(odd.into()), ..used(u64::MAX, 1) }).written().await.unwrap();
    let row = accounts.usage("'; --").await.unwrap().unwrap();
    let kept = odd.replace('\0', "\u{fffd}");
    assert_eq!((&*row.model, row.error.as_deref(), row.tokens.input), (&*kept, Some(&*kept), i64::MAX));
    assert!(accounts.reserve(Request { id: "a\0".into(), ..request("", &key, 1, 1) }).await.is_err());
    accounts.close().await.unwrap();
}
