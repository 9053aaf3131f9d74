//! Choices over targets that never answer.

use super::*;
use crate::{
    ask::Endpoint,
    config::RuleSettings,
    upstream::{Pieces, Upstream, UpstreamError},
};
use axum::http::HeaderMap;
use bytes::Bytes;

/// Takes no request with the field `tools` when `plain`.
struct Mute {
    plain: bool,
}

#[async_trait::async_trait]
impl Upstream for Mute {
    fn check(&self, ask: &Ask, _: &str) -> Result<(), ApiError> {
        match ask.raw("tools") {
            Some(_) if self.plain => Err(ApiError::bad_request("no tools", Some("tools"), None)),
            _ => Ok(()),
        }
    }

    async fn send(&self, _: &Ask, _: &str, _: i64) -> Result<Pieces, UpstreamError> {
        Err(UpstreamError::Local(ApiError::internal("mute")))
    }

    async fn probe(&self) -> Result<(), UpstreamError> {
        Ok(())
    }
}

fn target(name: &str, weight: f64, price: Option<f64>) -> Arc<Target> {
    Arc::new(Target {
        node: Arc::new(Node::fake(name, Box::new(Mute { plain: name == "plain" }))),
        model: "m".into(),
        weight,
        prices: price.map(|p| {
            let list = format!("version='1'\ncurrency='USD'\n[[price]]\nmodel='m'\ninput='{p}'\noutput='{p}'");
            Arc::new(PriceList::parse(&list).unwrap())
        }),
        load: Arc::default(),
        key: name.bytes().fold(7, |k, b| k * 31 + u64::from(b)),
    })
}

fn route(policy: Policy, targets: Vec<Arc<Target>>) -> Route {
    Route {
        name: "r".into(),
        policy,
        targets,
        rules: Vec::new(),
        fallback: Vec::new(),
        retries: 0,
        hedge_after: None,
        context: 0,
        prefill_scale: 1.0,
        prefix: Arc::default(),
        canary: None,
        fit: None,
        mirror: None,
    }
}

fn ask(prompt: &str, more: &str) -> Ask {
    let body = format!(r#"{{"model":"r","messages":[{{"role":"user","content":"{prompt}"}}]{more}}}"#);
    Ask::read(Endpoint::Chat, HeaderMap::new(), Bytes::from(body), Instant::now()).unwrap()
}

fn first(route: &Route, ask: &Ask) -> String {
    let choice = route.choose(ask, Instant::now(), &mut random);
    choice.order[0].node.name.clone()
}

#[test]
fn random_numbers_fill_the_unit() {
    let (mut sum, mut low) = (0.0, 1.0f64);
    for _ in 0..10_000 {
        let x = random();
        assert!(x > 0.0 && x < 1.0);
        sum += x;
        low = low.min(x);
    }
    assert!((0.48..0.52).contains(&(sum / 10_000.0)) && low < 0.01);
}

#[test]
fn weights_are_shares_and_zero_comes_last() {
    let route = route(Policy::Weighted, vec![target("a", 3.0, None), target("b", 1.0, None), target("c", 0.0, None)]);
    let mut counts = [0; 3];
    for _ in 0..4000 {
        let choice = route.choose(&ask("x", ""), Instant::now(), &mut random);
        assert_eq!(choice.order.len(), 3, "all are there as alternatives");
        counts[["a", "b", "c"].iter().position(|n| *n == choice.order[0].node.name).unwrap()] += 1;
    }
    assert!((2850..3150).contains(&counts[0]), "{counts:?}");
    assert_eq!(counts[2], 0);
}

#[test]
fn the_quicker_of_two_goes_first() {
    let (slow, quick) = (target("slow", 1.0, None), target("quick", 1.0, None));
    let now = Instant::now();
    for (t, s) in [(&slow, 2.0), (&quick, 0.1)] {
        let mut flight = InFlight::new(&t.load, 0);
        flight.first_token(now + Duration::from_secs_f64(s));
    }
    let route = route(Policy::Latency, vec![slow.clone(), quick.clone()]);
    for _ in 0..50 {
        assert_eq!(first(&route, &ask("x", "")), "quick");
    }
    // Thirty in flight there outweigh that it is twenty times quicker.
    let _busy: Vec<InFlight> = (0..30).map(|_| InFlight::new(&quick.load, 0)).collect();
    assert_eq!(first(&route, &ask("x", "")), "slow");
    let choice = route.choose(&ask("x", ""), now, &mut random);
    assert!(choice.stage.candidates.iter().all(|c| c.score.is_some() && !c.detail.is_empty()));
    assert!(choice.stage.reason.contains("slow") && choice.stage.reason.contains("quick"));
}

#[test]
fn two_of_many_are_drawn_so_that_no_one_takes_all() {
    let targets: Vec<_> = (0..8).map(|i| target(&format!("t{i}"), 1.0, None)).collect();
    let route = route(Policy::Latency, targets);
    let chosen: std::collections::BTreeSet<String> = (0..400).map(|_| first(&route, &ask("x", ""))).collect();
    assert!(chosen.len() >= 7, "{chosen:?}");
}

#[test]
fn the_cheapest_goes_first_and_no_price_last() {
    let route = route(Policy::Cost, vec![target("none", 1.0, None), target("dear", 1.0, Some(2.0)), target("cheap", 1.0, Some(1.0))]);
    let choice = route.choose(&ask("x", ",\"max_tokens\":10"), Instant::now(), &mut random);
    let names: Vec<&str> = choice.order.iter().map(|t| t.node.name.as_str()).collect();
    assert_eq!(names, ["cheap", "dear", "none"]);
}

#[test]
fn a_prompt_goes_where_its_beginning_is() {
    let (a, b) = (target("a", 1.0, None), target("b", 1.0, None));
    let route = route(Policy::PrefixAffine, vec![a.clone(), b.clone()]);
    let long = "w".repeat(prefix::BLOCK_BYTES * 20);
    let choice = route.choose(&ask(&long, ""), Instant::now(), &mut random);
    assert!(choice.blocks.len() >= 20);
    route.prefix.sent(&choice.blocks, b.key);
    for _ in 0..20 {
        assert_eq!(first(&route, &ask(&long, ",\"seed\":1")), "b");
    }
    assert_eq!(route.new_blocks(&ask(&long, ""), &b, &choice.blocks), 1);
    // Work enough on b outweighs its cache.
    let _busy = InFlight::new(&b.load, 50);
    assert_eq!(first(&route, &ask(&long, "")), "a");
}

#[test]
fn who_cannot_is_left_out_with_the_reason() {
    let r = route(Policy::Ordered, vec![target("plain", 1.0, None), target("full", 1.0, None)]);
    assert_eq!(first(&r, &ask("x", "")), "plain");
    let choice = r.choose(&ask("x", ",\"tools\":[]"), Instant::now(), &mut random);
    assert_eq!(choice.order.len(), 1);
    assert_eq!(choice.stage.candidates[0].excluded.as_deref(), Some("no tools"));
    let alone = route(Policy::Ordered, vec![target("plain", 1.0, None)]);
    let e = alone.choose(&ask("x", ",\"tools\":[]"), Instant::now(), &mut random).error.unwrap();
    assert_eq!((e.status, e.param.as_deref()), (400, Some("tools")));
    let down = UpstreamError::Connect { backend: "full".into(), why: "refused".into() };
    (0..5).for_each(|_| r.targets[1].node.health.failure(&down, Instant::now()));
    let e = r.choose(&ask("x", ",\"tools\":[]"), Instant::now(), &mut random).error.unwrap();
    assert_eq!((e.status, e.retry_after), (503, Some(5)), "it could be done once it is well");
    assert!(e.message.contains("circuit is open"), "{}", e.message);
}

#[test]
fn rules_restrict_the_candidates() {
    let mut r = route(Policy::Ordered, vec![target("a", 1.0, None), target("b", 1.0, None)]);
    let settings = RuleSettings { name: "long".into(), min_bytes: Some(200), only: vec!["b".into()], ..RuleSettings::default() };
    r.rules.push(Rule::new(&settings).unwrap());
    assert_eq!(first(&r, &ask("x", "")), "a");
    let choice = r.choose(&ask(&"x".repeat(300), ""), Instant::now(), &mut random);
    assert_eq!((choice.order[0].node.name.as_str(), choice.stage.rule.as_deref()), ("b", Some("long")));
}

#[test]
fn the_canary_gets_its_share_until_it_is_taken_back() {
    let mut r = route(Policy::Ordered, vec![target("old", 1.0, None), target("new", 1.0, None)]);
    let settings = crate::config::CanarySettings { backend: "new".into(), share: 0.2, alpha: 0.01, scores: None };
    let canary = Arc::new(Canary::new(settings));
    r.canary = Some(canary.clone());
    let asks = ask("x", "");
    let drawn = (0..2000).filter(|_| first(&r, &asks) == "new").count();
    assert!((320..480).contains(&drawn), "{drawn}");
    (0..30).for_each(|_| canary.seen(true, Seen::Failed));
    let choice = r.choose(&asks, Instant::now(), &mut random);
    assert!(choice.stage.candidates[1].excluded.as_ref().unwrap().contains("taken back"));
    assert!((0..200).all(|_| first(&r, &asks) == "old"));
}

#[test]
fn a_prompt_goes_where_its_task_is_at_home() {
    use crate::head::{Examples, Head, HeadKind, tests::{encoder, numbers}};
    let mut random = numbers(3);
    let mut examples = Examples::default();
    for i in 0..80 {
        let code = i % 2 == 0;
        examples.rows.push(vec![if code { 1.0 } else { -1.0 } + 0.4 * (random() - 0.5), random() - 0.5]);
        examples.targets.push(vec![f32::from(u8::from(code)), f32::from(u8::from(!code))]);
    }
    let head = Head::train(encoder(2), HeadKind::Softmax, vec!["code".into(), "talk".into()], &examples).unwrap();
    let mut r = route(Policy::Task, vec![target("plain", 1.0, None), target("talker", 1.0, None), target("coder", 1.0, None)]);
    r.fit = Some(Fit::Task { head: Box::new(head), places: vec![2, 1], default: 0, least: 0.9 });
    let choose = |vector: Result<Vec<f32>, String>| {
        let ask = ask("x", "");
        ask.vector.set(vector).unwrap();
        let choice = r.choose(&ask, Instant::now(), &mut random_fixed);
        let names: Vec<String> = choice.order.iter().map(|t| t.node.name.clone()).collect();
        (names, choice.stage)
    };
    let (names, stage) = choose(Ok(vec![1.0, 0.0]));
    assert_eq!((names[0].as_str(), names.len()), ("coder", 3), "the others remain as alternatives");
    let judged = stage.judged.unwrap();
    assert!(judged.label == "code" && judged.probability > 0.9 && stage.reason.contains("\"code\""), "{judged:?}");
    assert_eq!(choose(Ok(vec![-1.0, 0.0])).0[0], "talker");
    let (names, stage) = choose(Ok(vec![0.0, 0.0]));
    assert!(names[0] == "plain" && stage.reason.contains("the default"), "{}", stage.reason);
    let (names, stage) = choose(Err("it fell over".into()));
    assert!(names[0] == "plain" && stage.reason.contains("it fell over") && stage.judged.is_none());
    assert_eq!(choose(Ok(vec![1.0])).0[0], "plain", "a vector of other dimensions");
}

fn random_fixed() -> f64 {
    0.5
}
