//! Limits: what is let in, what is refused and with what numbers.

use crate::{
    PRICES,
    databases::{Place, on_both},
    key_with, limit, request, used,
};
use ashlar_core::{Decimal, clock};
use ashlar_store::{
    AccountError, Accounts, Exceeded, Finish, KeySettings, PriceList, ReserveError, Scope, TeamSettings, Tokens, Used,
};
use std::time::Duration;

on_both!(
    a_refusal_names_its_limit,
    money_is_counted_exactly,
    what_is_settled_is_given_back,
    team_and_end_user_have_limits_of_their_own,
    a_limit_that_is_lowered_holds,
    two_replicas_share_to_the_last_token,
    an_id_is_admitted_once,
);

fn exceeded(e: ReserveError) -> Exceeded {
    match e {
        ReserveError::Exceeded(e) => *e,
        e => panic!("{e}"),
    }
}

async fn a_refusal_names_its_limit(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let key = key_with(&accounts, &["requests/month/2", "tokens/day/1000", "tokens/total/5000"]).await;
    let before = clock::now_ms();
    let mut a = accounts.reserve(request("a", &key, 10, 90)).await.unwrap();
    a.durable().await.unwrap();
    let e = exceeded(accounts.reserve(request("b", &key, 1, 900)).await.unwrap_err());
    assert_eq!((e.scope, &*e.limit_id), (Scope::Key, &*format!("{}/tokens/day", key.key().id)));
    assert_eq!((e.taken, e.asked), (Decimal::from(100), Decimal::from(901)));
    let retry = e.retry_at_ms.unwrap();
    assert!(retry > before && retry % 86_400_000 == 0, "{e}");
    let e = exceeded(accounts.reserve(request("c", &key, 1, 1000)).await.unwrap_err());
    assert_eq!(e.retry_at_ms, None, "waiting does not help: {e}");
    assert!(e.to_string().contains("1000 tokens per day"), "{e}");
    let b = accounts.reserve(request("b", &key, 1, 1)).await.unwrap();
    let e = exceeded(accounts.reserve(request("d", &key, 1, 1)).await.unwrap_err());
    assert_eq!((e.taken, e.asked, &*e.limit_id), (2.into(), 1.into(), &*format!("{}/requests/month", key.key().id)));
    // A further attempt is no further request.
    let hedge = ashlar_store::Request { attempt_of: Some("a".into()), ..request("e", &key, 1, 1) };
    let hedge = accounts.reserve(hedge).await.unwrap();
    for r in [a, b, hedge] {
        r.settle(used(1, 1));
    }
    accounts.flush().await.unwrap();
    let standing = accounts.standing(&key.key().id, None).await.unwrap();
    let spent: Vec<String> = standing.iter().map(|s| s.spent.to_string()).collect();
    assert_eq!(spent, ["2", "6", "6"]);
    accounts.close().await.unwrap();
}

async fn money_is_counted_exactly(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let key = key_with(&accounts, &["money/month/0.001"]).await;
    let e = accounts.reserve(request("a", &key, 1, 1)).await.unwrap_err();
    assert!(matches!(e, ReserveError::Unpriced(ref why) if why.contains("no price list")), "{e}");
    let list = PriceList::parse(PRICES).unwrap();
    accounts.set_prices(list.clone()).await.unwrap();
    accounts.set_prices(list).await.unwrap();
    let other = PriceList::parse(&PRICES.replace("\"2\"", "\"3\"")).unwrap();
    assert!(matches!(accounts.set_prices(other).await, Err(AccountError::PriceVersion(v)) if v == "t1"));
    // 100 + 2 · 400 micros; 101 more do not fit, 100 do.
    let a = accounts.reserve(request("a", &key, 100, 400)).await.unwrap();
    let e = exceeded(accounts.reserve(request("b", &key, 101, 0)).await.unwrap_err());
    assert_eq!((e.taken.to_string(), e.asked.to_string()), ("0.0009".into(), "0.000101".into()));
    let b = accounts.reserve(request("b", &key, 100, 0)).await.unwrap();
    let cached = Tokens { input: 3, cache_read: 7, output: 1, reasoning: 1, ..Default::default() };
    let settled = a.settle(Used { tokens: cached, ..Used::new(Finish::Stop) });
    assert_eq!(settled.cost.total.unwrap().to_string(), "0.0000077");
    settled.written().await.unwrap();
    b.settle(used(0, 0)).written().await.unwrap();
    let standing = accounts.standing(&key.key().id, None).await.unwrap();
    assert_eq!(standing[0].spent.to_string(), "0.0000077");
    // A model without a price passes no limit of money.
    let odd = ashlar_store::Request { model: "odd".into(), ..request("c", &key, 1, 1) };
    assert!(matches!(accounts.reserve(odd).await, Err(ReserveError::Unpriced(_))));
    let free = key_with(&accounts, &[]).await;
    let odd = ashlar_store::Request { model: "odd".into(), ..request("c", &free, 1, 1) };
    let settled = accounts.reserve(odd).await.unwrap().settle(used(1, 1));
    assert_eq!(settled.cost.total, None);
    settled.written().await.unwrap();
    let row = accounts.usage("c").await.unwrap().unwrap();
    assert!(row.cost.cost.is_none() && row.cost.no_cost_reason.unwrap().contains("odd"));
    accounts.close().await.unwrap();
}

async fn what_is_settled_is_given_back(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let key = key_with(&accounts, &["tokens/total/1000"]).await;
    let mut whole = accounts.reserve(request("whole", &key, 100, 900)).await.unwrap();
    whole.durable().await.unwrap();
    assert!(accounts.reserve(request("x", &key, 0, 1)).await.is_err());
    whole.settle(used(1, 2));
    let e = exceeded(accounts.reserve(request("x", &key, 0, 998)).await.unwrap_err());
    assert_eq!(e.taken, 3.into());
    accounts.reserve(request("rest", &key, 0, 997)).await.unwrap().settle(used(0, 0));
    // Too low an estimate is charged in full.
    let low = accounts.reserve(request("low", &key, 0, 10)).await.unwrap();
    low.settle(used(0, 500)).written().await.unwrap();
    let standing = accounts.standing(&key.key().id, None).await.unwrap();
    assert_eq!(standing[0].spent, Decimal::from(503));
    // Dropped unsettled, a request is charged with what it reserved.
    drop(accounts.reserve(request("dropped", &key, 100, 20)).await.unwrap());
    accounts.flush().await.unwrap();
    let row = accounts.usage("dropped").await.unwrap().unwrap();
    assert_eq!((row.finish, row.tokens.output, row.counts), (Finish::Cancelled, 20, ashlar_store::Counts::Estimated));
    assert_eq!(accounts.standing(&key.key().id, None).await.unwrap()[0].spent, Decimal::from(623));
    accounts.close().await.unwrap();
}

async fn team_and_end_user_have_limits_of_their_own(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let team = TeamSettings { name: "t".into(), limits: vec![limit("requests/total/3")], user_limits: vec![limit("requests/total/2")], ..Default::default() };
    let team = accounts.create_team(&team).await.unwrap();
    let mut keys = Vec::new();
    for name in ["a", "b"] {
        let settings = KeySettings { name: name.into(), team: Some(team.id.clone()), ..Default::default() };
        let (_, secret) = accounts.create_key(&settings).await.unwrap();
        keys.push(accounts.authenticate(secret.reveal()).unwrap());
    }
    let (ann, bob) = (accounts.user_hash("ann"), accounts.user_hash("bob"));
    assert!(ann != bob && ann == accounts.user_hash("ann") && !ann.contains("ann"));
    let ask = |id: &str, key: usize, user: &str| ashlar_store::Request { end_user: Some(user.into()), ..request(id, &keys[key], 1, 1) };
    let mut open = vec![accounts.reserve(ask("1", 0, &ann)).await.unwrap(), accounts.reserve(ask("2", 1, &ann)).await.unwrap()];
    let e = exceeded(accounts.reserve(ask("3", 0, &ann)).await.unwrap_err());
    assert_eq!((e.scope, e.taken), (Scope::User, 2.into()));
    open.push(accounts.reserve(ask("3", 0, &bob)).await.unwrap());
    let e = exceeded(accounts.reserve(ask("4", 1, &bob)).await.unwrap_err());
    assert_eq!((e.scope, e.taken), (Scope::Team, 3.into()));
    open.into_iter().for_each(|r| drop(r.settle(used(1, 1))));
    accounts.flush().await.unwrap();
    let standing = accounts.standing(&keys[0].key().id, Some(&ann)).await.unwrap();
    let spent: Vec<_> = standing.iter().map(|s| (s.scope, s.spent)).collect();
    assert_eq!(spent, [(Scope::Team, 3.into()), (Scope::User, 2.into())]);
    accounts.close().await.unwrap();
}

async fn a_limit_that_is_lowered_holds(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let settings = KeySettings { name: "k".into(), limits: vec![limit("tokens/total/1000000")], ..Default::default() };
    let (key, secret) = accounts.create_key(&settings).await.unwrap();
    let access = accounts.authenticate(secret.reveal()).unwrap();
    accounts.reserve(request("a", &access, 0, 100)).await.unwrap().settle(used(0, 100));
    let lower = KeySettings { limits: vec![limit("tokens/total/150")], ..settings };
    accounts.update_key(&key.id, &lower).await.unwrap();
    let access = accounts.authenticate(secret.reveal()).unwrap();
    let e = exceeded(accounts.reserve(request("b", &access, 0, 51)).await.unwrap_err());
    assert_eq!(e.limit.amount, 150.into());
    tokio::time::sleep(Duration::from_millis(150)).await;
    accounts.reserve(request("c", &access, 0, 50)).await.unwrap().settle(used(0, 50));
    accounts.close().await.unwrap();
}

async fn two_replicas_share_to_the_last_token(place: Place) {
    let one = Accounts::open(place.settings()).await.unwrap();
    let key = key_with(&one, &["tokens/total/10000"]).await;
    let two = Accounts::open(place.settings()).await.unwrap();
    let (mut admitted, mut refused) = (0u64, 0);
    let mut i = 0;
    // What one replica has claimed and does not use comes back within a few ticks.
    while refused < 60 {
        i += 1;
        let accounts = [&one, &two][i % 2];
        match accounts.reserve(request(&format!("r{i}"), &key, 0, 7)).await {
            Ok(r) => {
                admitted += 1;
                refused = 0;
                r.settle(used(0, 7));
            }
            Err(ReserveError::Exceeded(_)) => {
                refused += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert_eq!(admitted, 10_000 / 7, "neither more nor less");
    two.close().await.unwrap();
    one.flush().await.unwrap();
    let standing = one.standing(&key.key().id, None).await.unwrap();
    assert_eq!(standing[0].spent, Decimal::from(admitted * 7));
    one.close().await.unwrap();
}

async fn an_id_is_admitted_once(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let key = key_with(&accounts, &["requests/total/100"]).await;
    let mut first = accounts.reserve(request("same", &key, 1, 1)).await.unwrap();
    first.durable().await.unwrap();
    for round in 0..2 {
        let again = match accounts.reserve(request("same", &key, 1, 1)).await {
            Ok(mut r) => r.durable().await.unwrap_err(),
            Err(ReserveError::Accounts(e)) => e,
            Err(e) => panic!("{e}"),
        };
        assert!(matches!(again, AccountError::AlreadyAdmitted(_)), "{round}: {again}");
    }
    first.settle(used(1, 1)).written().await.unwrap();
    let mut late = accounts.reserve(request("same", &key, 1, 1)).await.unwrap();
    assert!(matches!(late.durable().await, Err(AccountError::AlreadyAdmitted(_))));
    drop(late);
    accounts.flush().await.unwrap();
    let rows = place.number("SELECT CAST(COUNT(*) AS BIGINT) FROM usage").await;
    assert_eq!(rows, 1);
    assert_eq!(accounts.standing(&key.key().id, None).await.unwrap()[0].spent, 1.into());
    accounts.close().await.unwrap();
}
