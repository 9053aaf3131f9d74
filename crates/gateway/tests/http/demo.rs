//! A server with something to see in each view of the console: backends, a canary,
//! keys, teams and users, ten thousand old responses and a few new ones.

use crate::{
    mock::Mock,
    support::{MODEL, Reply, Server},
};
use ashlar_core::{Decimal, clock};
use ashlar_store::{AccountSettings, Accounts, Admission, Ended, KeySettings, Settlement, Store, TeamSettings};
use serde_json::{Value, json};

/// A name that is a script where it is not text.
pub(crate) const HOSTILE: &str = "<script>window.pwned=1</script>";
/// Old responses.
const OLD: usize = 10_000;

pub(crate) struct Demo {
    pub(crate) server: Server,
    /// Secrets of keys.
    keys: Vec<String>,
    /// A response that two backends could have given, asked with the key `notebook`.
    pub(crate) routed: String,
    _mock: Mock,
    _home: tempfile::TempDir,
}

fn config(mock: &Mock) -> String {
    let backend = |name: &str| format!("[backends.{name}]\nkind = \"vllm\"\nurl = \"{}\"\nprobe = \"\"\nbreaker_failures = 1000\n", mock.url());
    let hostile = json!(HOSTILE);
    let unpriced = "[models.unpriced]\ntargets = [{ backend = \"gpu-a\" }]\n";
    ["gpu-a", "gpu-b", "trial"].map(backend).concat()
        + "[models.kiln]\npolicy = \"latency\"\ntargets = [{ backend = \"gpu-a\", model = \"good\" }, { backend = \"gpu-b\", model = \"good\" }]\n"
        + "[models.books]\npolicy = \"weighted\"\ntargets = [{ backend = \"gpu-a\", model = \"good\" }, { backend = \"trial\", model = \"good\" }]\n"
        + "canary = { backend = \"trial\", share = 0.3 }\n"
        + unpriced
        + &format!("[models.{hostile}]\ntargets = [{{ backend = \"gpu-a\", model = \"good\" }}]\n")
        + "[models.broken]\nretries = 0\ntargets = [{ backend = \"gpu-b\", model = \"500\" }]\n"
        + "[guard.policies.secrets-out]\ncheck = \"pii\"\non = [\"request\"]\non_violation = \"redact\"\n"
}

impl Demo {
    pub(crate) async fn start() -> Self {
        let (mock, home) = (Mock::start().await, tempfile::tempdir().unwrap());
        let at = home.path().join("accounts.db");
        let accounts = Accounts::open(AccountSettings::new(at.to_str().unwrap().parse().unwrap())).await.unwrap();
        let mut keys = Vec::new();
        for (team, name) in [("Research", "notebook"), ("Support", "helpdesk"), ("Support", HOSTILE)] {
            let teams = accounts.teams().await.unwrap();
            let team = match teams.into_iter().find(|t| t.settings.name == team) {
                Some(team) => team,
                None => accounts.create_team(&TeamSettings { name: team.into(), ..Default::default() }).await.unwrap(),
            };
            let settings = KeySettings { name: name.into(), team: Some(team.id), ..Default::default() };
            keys.push(accounts.create_key(&settings).await.unwrap().1.reveal().to_owned());
        }
        let config = ashlar_gateway::Config::parse(&config(&mock)).unwrap();
        let server = Server::of(|state| (state.routing, state.accounts) = (config, Some(accounts))).await;
        old(&server.store).await;
        let mut demo = Self { server, keys, routed: String::new(), _mock: mock, _home: home };
        for round in 0..24 {
            demo.round(round).await;
        }
        let reply = demo.ask(0, "kiln", "Which tile stands the frost? Write to anna@example.org.", "ada", false).await;
        demo.routed = reply.header("x-ashlar-response-id").unwrap_or_else(|| panic!("{reply:?}")).to_owned();
        demo
    }

    /// A request of each kind.
    pub(crate) async fn round(&self, n: usize) {
        let stream = n.is_multiple_of(2);
        for (model, prompt) in [
            ("kiln", "How long does it cool?"),
            ("books", "Who wrote of stone?"),
            (MODEL, "When does the kiln cool down?"),
            (HOSTILE, HOSTILE),
        ] {
            self.ask(n % self.keys.len(), model, prompt, ["ada", "grace", "mallory"][n % 3], stream).await;
        }
        match n % 4 {
            0 => drop(self.ask(2, MODEL, "refuse", "mallory", false).await),
            1 => drop(self.ask(1, "unpriced", "What is this worth?", "grace", stream).await),
            2 => drop(self.ask(0, "broken", "Anyone?", "ada", stream).await),
            _ => {}
        }
    }

    async fn ask(&self, key: usize, model: &str, prompt: &str, user: &str, stream: bool) -> Reply {
        let body = json!({"model": model, "messages": [{"role": "user", "content": prompt}], "stream": stream, "user": user});
        let secret = format!("Bearer {}", self.keys[key]);
        let headers = [("content-type", "application/json"), ("authorization", &*secret)];
        self.server.send("POST", "/v1/chat/completions", &headers, body.to_string().as_bytes()).await
    }
}

/// Responses of the six days before.
async fn old(store: &Store) {
    let now = clock::now_ms();
    let id = |i: usize| format!("chatcmpl-old-{i:06}");
    let begins: Vec<Admission> = (0..OLD)
        .map(|i| Admission {
            id: id(i),
            release: None,
            model: ["kiln", "books", HOSTILE][i % 3].into(),
            backend: ["gpu-a", "gpu-b", "trial"][i % 3].into(),
            endpoint: "/v1/chat/completions".into(),
            at_ms: now - 6 * 86_400_000 + (i as i64) * 51_000,
            seed: None,
            stream: i % 2 == 0,
        })
        .collect();
    let ends: Vec<Ended> = (0..OLD)
        .map(|i| Ended {
            id: id(i),
            admission: None,
            settlement: Settlement {
                finish: ["stop", "stop", "length", "stop", "content_filter", "stop", "error"][i % 7].into(),
                prompt_tokens: 200 + (i as u64 * 37) % 900,
                cached_tokens: (i as u64 * 17) % 200,
                completion_tokens: 20 + (i as u64 * 13) % 300,
                queue_ms: 2.0,
                ttft_ms: 40.0 + (i % 90) as f64,
                total_ms: 400.0 + (i % 1300) as f64,
                cost: (i % 11 != 0).then(|| Decimal::from_picos(1_234_567_000 * (1 + i as i128 % 9))),
                refusal: i % 23 == 0,
                answer: Some(format!("The tile {i} is laid in a bed of lime, and left to dry for {} days.", i % 9)),
                error: (i % 7 == 6).then(|| "the backend broke off after 512 bytes".into()),
                guard: (i % 7 == 4).then(|| r#"[{"policy":"pii","stage":"answer","action":"block","kind":"email","score":1.0,"released_chars":12,"count":1}]"#.into()),
            },
            answered: None,
            route: None,
        })
        .collect();
    store.record(&begins, &ends).await.unwrap();
}

/// Serves the seeded console with requests going on, until it is killed:
/// `ASHLAR_DEMO_SECONDS=600 cargo test … console_demo -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "serves until its time is over"]
async fn console_demo() {
    let demo = Demo::start().await;
    eprintln!("http://{}/?response={}", demo.server.at, demo.routed);
    let seconds: u64 = std::env::var("ASHLAR_DEMO_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(600);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let mut n = 0;
    while std::time::Instant::now() < end {
        n += 1;
        demo.round(n).await;
        tokio::time::sleep(std::time::Duration::from_millis(300 + (n as u64 * 97) % 500)).await;
    }
}

/// What the page is told, where a browser would not notice that it is wrong.
#[tokio::test(flavor = "multi_thread")]
async fn the_consoles_figures_are_those_of_the_ledgers() {
    let demo = Demo::start().await;
    let get = async |path: &str| {
        let reply = demo.server.get(path).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        reply.json()
    };
    // 24 rounds of four, 6 of each odd kind, and the last.
    let asked = 24 * 4 + 18 + 1;
    let series = get("/ashlar/series?minutes=5").await;
    let total = &series["total"];
    assert_eq!((&total["requests"], &total["settled"], &total["errors"]), (&json!(asked), &json!(asked), &json!(6)));
    assert_eq!(total["refusals"], 6);
    let counts = total["ttft"]["counts"].as_array().unwrap().iter().map(|c| c.as_u64().unwrap()).sum::<u64>();
    assert_eq!(counts, asked - 6, "each answer had one first token");
    assert_eq!((&series["budget"]["failed"], &series["budget"]["requests"]), (&json!(6), &json!(asked)));
    assert_eq!(demo.server.get("/ashlar/series?minutes=7").await.status, 400);

    let cost = get("/ashlar/cost?by=api_key").await;
    let decimal = |v: &Value| v.as_str().unwrap().parse::<Decimal>().unwrap();
    let sum = |rows: &Value| rows.as_array().unwrap().iter().map(|r| decimal(&r["cost"]).picos()).sum::<i128>();
    let all = sum(&cost["total"]);
    assert!(all > 0 && sum(&cost["rows"]) == all && sum(&cost["steps"]) == all, "{cost}");
    // Of what has a price only: elsewhere a class may be known and the whole not.
    let priced = get("/ashlar/cost?model=good").await;
    let parts: i128 = priced["total"][0]["parts"].as_array().unwrap().iter().map(|p| decimal(p).picos()).sum();
    assert_eq!(parts, sum(&priced["total"]), "the classes make up the whole");
    let requests = |c: &Value| c["rows"].as_array().unwrap().iter().map(|r| r["requests"].as_u64().unwrap()).sum::<u64>();
    assert_eq!(requests(&cost), asked);
    let unpriced: u64 = cost["total"].as_array().unwrap().iter().map(|t| t["unpriced"].as_u64().unwrap()).sum();
    assert!(unpriced >= 6, "{unpriced}");
    let key = cost["rows"].as_array().unwrap().iter().find(|r| cost["names"][r["of"][0].as_str().unwrap()] == "notebook").unwrap();
    let below = get(&format!("/ashlar/cost?by=end_user&api_key={}", key["of"][0].as_str().unwrap())).await;
    assert_eq!(requests(&below), key["requests"].as_u64().unwrap());
    assert_eq!(demo.server.get("/ashlar/cost?by=colour").await.status, 400);

    let cache = get("/ashlar/cache").await;
    let hits: u64 = cache["rows"].as_array().unwrap().iter().map(|r| r["cache_read"].as_u64().unwrap()).sum();
    let ledger: u64 = cost["total"].as_array().unwrap().iter().map(|t| t["tokens"]["cache_read"].as_u64().unwrap()).sum();
    assert!(hits > 0 && hits == ledger);
    assert!(decimal(&cache["saved"]).picos() > 0);

    let abuse = get("/ashlar/abuse").await;
    assert_eq!(abuse["users"][0]["refusals"], 6);
    assert!(!abuse.to_string().contains("mallory"), "only hashes");
    let one = get(&format!("/ashlar/requests/{}", demo.routed)).await;
    assert_eq!((&one["usage"]["api_key_name"], &one["usage"]["team_name"]), (&json!("notebook"), &json!("Research")));
    assert_eq!(one["usage"]["cost"], one["response"]["settlement"]["cost"], "both ledgers agree");
    assert_eq!(one["route"]["stages"][0]["candidates"].as_array().unwrap().len(), 2);

    let (mut pages, mut seen, mut next) = (0, std::collections::HashSet::new(), String::new());
    loop {
        let page = get(&format!("/ashlar/responses?limit=500{next}")).await;
        pages += 1;
        for row in page["responses"].as_array().unwrap() {
            assert!(seen.insert(row["id"].as_str().unwrap().to_owned()), "listed twice");
            assert!(row.get("route").is_none_or(Value::is_null), "the list stays small");
        }
        let Some(before) = page["next"].as_str() else { break };
        next = format!("&before={before}");
    }
    assert_eq!((seen.len() as u64, pages), (OLD as u64 + asked, 21));
    assert_eq!(demo.server.get("/ashlar/responses?before=now").await.status, 400);
    let found = get("/ashlar/responses?q=tile%209999%20&model=kiln&finish=content_filter").await;
    assert_eq!(found["responses"].as_array().unwrap().len(), usize::from(9999 % 7 == 4 && 9999 % 3 == 0));

    let wrong = demo.server.post("/ashlar/canaries/books/take-back", &json!({"backend": "gpu-a"})).await;
    assert_eq!(wrong.status, 404, "{}", wrong.body);
    let plain = demo.server.send("POST", "/ashlar/canaries/books/take-back", &[("content-type", "text/plain")], b"{\"backend\":\"trial\"}").await;
    assert_eq!(plain.status, 415, "what another site's form could send is refused");
    let done = demo.server.post("/ashlar/canaries/books/take-back", &json!({"backend": "trial"})).await.json();
    assert_eq!(done["taken_back"], true);
    for _ in 0..20 {
        demo.ask(0, "books", "Who?", "ada", false).await;
    }
    let now = get("/ashlar/canaries").await;
    assert!(now["canaries"][0]["rolled_back"].as_str().unwrap().contains("by hand"));
    let mut last: Vec<Value> = get("/ashlar/responses?limit=20&model=books").await["responses"].as_array().unwrap().clone();
    last.retain(|r| r["backend"] == "trial");
    assert_eq!(last, Vec::<Value>::new(), "nothing goes there any more");
    demo.server.stop().await;
}
