//! Every admitted request settles exactly once, in the usage ledger and among the
//! responses, whatever happens to it; and replicas never overspend together.

use crate::{
    databases::{self, Place, on_both},
    door::{CHAT, accounts, body, guarded, key, limited},
    mock::Mock,
    support::{MODEL, PRICES, Reply, Server, chat_body},
    upstreams::{config, two},
};
use ashlar_gateway::{Config, GatewayState};
use ashlar_store::{Accounts, Counts, Finish, PriceList, ResponseRow, Store, UsageFilter, UsageRow};
use serde_json::json;
use std::{
    collections::BTreeMap,
    io::BufRead as _,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};
use tokio::{io::AsyncReadExt as _, net::TcpListener};

on_both!(two_gateways_never_overspend_one_budget, a_killed_gateway_leaves_nothing_open);

fn id(reply: &Reply) -> String {
    reply.header("x-ashlar-response-id").unwrap_or_else(|| panic!("{reply:?}")).to_owned()
}

async fn usage(accounts: &Accounts) -> BTreeMap<String, UsageRow> {
    accounts.flush().await.unwrap();
    let rows = accounts.usage_page(&UsageFilter::default(), None, 10_000).await.unwrap();
    let n = rows.len();
    let rows: BTreeMap<_, _> = rows.into_iter().map(|r| (r.id.clone(), r)).collect();
    assert_eq!(rows.len(), n, "a row is doubled");
    rows
}

/// The same ids, ends and costs in both ledgers.
fn parity(usage: &BTreeMap<String, UsageRow>, responses: &[ResponseRow]) {
    let responses: BTreeMap<_, _> = responses.iter().map(|r| (r.admission.id.clone(), r)).collect();
    let (used, answered): (Vec<_>, Vec<_>) = (usage.keys().filter(|id| !responses.contains_key(*id)).collect(), responses.keys().filter(|id| !usage.contains_key(*id)).collect());
    assert!(used.is_empty() && answered.is_empty(), "only in one: {used:?} {answered:?}");
    for (id, row) in usage {
        let response = responses[id];
        let settlement = response.settlement.as_ref().unwrap_or_else(|| panic!("{id} is open"));
        assert_eq!((row.finish.as_str(), row.cost.cost), (&*settlement.finish, settlement.cost), "{id}");
        assert_eq!(row.backend, response.admission.backend, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_both_ledgers_have_one_row_of_it() {
    let (_place, accounts) = accounts().await;
    let mock = Mock::start().await;
    let models = ["good", "500", "400", "no-json", "truncated", "reset", "stall", "bad-event", "no-usage", "wrong-usage", "tools"];
    let server = guarded(&accounts, &config(&mock, &models)).await;
    let secret = key(&accounts, limited(&["requests/total/1000", "tokens/total/10000000", "money/total/1000"])).await;
    let mut asked = BTreeMap::new();
    for model in models {
        for stream in [false, true].into_iter().filter(|s| model != "tools" || !s) {
            let reply = server.post_as(&secret, CHAT, &body(model, stream)).await;
            asked.insert(id(&reply), (model, stream));
        }
    }
    for (prompt, stream) in [("die", true), ("die", false), ("refuse", false)] {
        asked.insert(id(&server.post_as(&secret, CHAT, &chat_body(prompt, stream)).await), (MODEL, stream));
    }
    // Three clients leave: of a stream, before it begins, and of a whole answer.
    for (prompt, stream) in [("slow", true), ("hang", true), ("hang", false)] {
        let bearer = format!("Bearer {secret}");
        let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
        let mut socket = server.open("POST", CHAT, &headers, chat_body(prompt, stream).to_string().as_bytes()).await;
        if stream {
            socket.read_exact(&mut [0; 700]).await.unwrap();
        } else {
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        drop(socket);
    }
    // And one is cut off by the server's stop.
    let bearer = format!("Bearer {secret}");
    let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
    let _held = server.open("POST", CHAT, &headers, chat_body("hang", false).to_string().as_bytes()).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    let store = server.stop().await;

    let rows = usage(&accounts).await;
    parity(&rows, &store.responses(500).await.unwrap());
    assert_eq!(rows.len(), asked.len() + 4);
    let count = |finish| rows.values().filter(|r| r.finish == finish).count();
    assert_eq!((count(Finish::Cancelled), count(Finish::ToolCalls), count(Finish::Killed)), (4, 1, 0));
    for (id, (model, stream)) in &asked {
        let row = &rows[id];
        assert_eq!((row.model.as_str(), row.stream, &row.api_key), (*model, *stream, &Some(accounts.authenticate(&secret).unwrap().key().id.clone())));
        match *model {
            "good" | "tools" => {
                assert_eq!((row.tokens.input, row.tokens.cache_read, row.tokens.output, row.counts), (4, 5, 4, Counts::Measured));
                assert_eq!(row.cost.cost.unwrap().to_string(), "0.0000145", "4 at 1, 5 at 0.5, 4 at 2, of a million");
            }
            "no-usage" | "wrong-usage" => assert!(row.counts == Counts::Estimated && row.tokens.output >= 4, "{row:?}"),
            MODEL => {}
            _ => assert!(row.finish == Finish::Error && row.error.is_some(), "{row:?}"),
        }
    }
    // What is left of the limits is what the ledger does not have.
    let key = accounts.authenticate(&secret).unwrap().key().id.clone();
    let spent: i64 = rows.values().map(|r| r.tokens.input + r.tokens.cache_read + r.tokens.output + r.tokens.reasoning).sum();
    let standing = accounts.standing(&key, None).await.unwrap();
    assert_eq!((standing[0].spent, standing[1].spent), ((rows.len() as u64).into(), (spent as u64).into()));
    accounts.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_row_names_who_answered_and_why() {
    let (_place, accounts) = accounts().await;
    let mock = Mock::start().await;
    let toml = two(&mock, "500", "500", "fallback = [\"f\"]\nretries = 1") + "[models.f]\ntargets = [{ backend = \"b\", model = \"good\" }]\n";
    let server = guarded(&accounts, &toml).await;
    let secret = key(&accounts, Default::default()).await;
    let reply = server.post_as(&secret, CHAT, &body("m", false)).await;
    assert_eq!((reply.status, &reply.json()["model"]), (200, &json!("f")));
    accounts.flush().await.unwrap();
    let row = accounts.usage(&id(&reply)).await.unwrap().unwrap();
    assert_eq!((&*row.model, &*row.backend), ("good", "b"), "not the first choice, 500 at a");
    let store = server.stop().await;
    let row = store.response(&id(&reply)).await.unwrap().unwrap();
    assert_eq!((&*row.admission.model, &*row.admission.backend, row.admission.release), ("f", "b", None));
    let route = row.route.unwrap();
    let outcomes: Vec<_> = route["attempts"].as_array().unwrap().iter().map(|a| a["outcome"].as_str().unwrap()).collect();
    assert!(outcomes.len() == 3 && outcomes[0].contains("500") && outcomes[2] == "answered", "{route}");
    assert_eq!((&route["asked"], &route["tokens"]["cache_read"]), (&json!("m"), &json!(5)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hedge_that_lost_is_a_row_of_its_own_and_no_second_request() {
    let (_place, accounts) = accounts().await;
    let mock = Mock::start().await;
    let server = guarded(&accounts, &two(&mock, "late", "good", "hedge_after_s = 0.05")).await;
    let secret = key(&accounts, limited(&["requests/total/1"])).await;
    let reply = server.post_as(&secret, CHAT, &body("m", false)).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let store = server.stop().await;
    let rows = usage(&accounts).await;
    parity(&rows, &store.responses(10).await.unwrap());
    let (won, lost): (Vec<_>, Vec<_>) = rows.values().partition(|r| r.attempt_of.is_none());
    assert_eq!((won.len(), &*won[0].model, won[0].finish), (1, "good", Finish::Stop));
    assert_eq!((lost.len(), &*lost[0].model, lost[0].attempt_of.as_deref()), (1, "late", Some(&*id(&reply))));
    assert!(lost[0].counts == Counts::Estimated && lost[0].cost.cost.unwrap().picos() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_paid_for_by_its_time_however_many_share_it() {
    let (_place, accounts) = accounts().await;
    let server = Server::of(|state| {
        let list = format!("{PRICES}\n[[machine]]\nbackend = \"fake\"\nsecond = \"0.5\"\n");
        state.prices = Some(Arc::new(PriceList::parse(&list).unwrap()));
        state.accounts = Some(accounts.clone());
    })
    .await;
    let began = std::time::Instant::now();
    let hanging = |wait| {
        let server = &server;
        async move {
            let body = chat_body("slow", true).to_string();
            let mut socket = server.open("POST", CHAT, &[("content-type", "application/json")], body.as_bytes()).await;
            socket.read_exact(&mut [0; 700]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
    };
    tokio::join!(hanging(100), hanging(250), hanging(400));
    server.stop().await;
    let most = began.elapsed().as_micros();
    let rows = usage(&accounts).await;
    let sum: i64 = rows.values().map(|r| r.machine_us).sum();
    assert!(rows.len() == 3 && sum >= 400_000 && u128::from(sum.unsigned_abs()) <= most, "{sum} of {most}");
    for row in rows.values() {
        let cost = ashlar_core::Decimal::from_picos(i128::from(row.machine_us) * 500_000);
        assert_eq!((row.cost.cost, row.cost.cost_machine), (Some(cost), Some(cost)));
    }
}

async fn two_gateways_never_overspend_one_budget(place: Place) {
    const BUDGET: u64 = 6_000;
    let mock = Mock::start().await;
    let (a, b) = (Accounts::open(place.settings()).await.unwrap(), Accounts::open(place.settings()).await.unwrap());
    let secret = key(&a, limited(&[&format!("tokens/total/{BUDGET}")])).await;
    let toml = config(&mock, &["good", "no-usage"]);
    let servers = [guarded(&a, &toml).await, guarded(&b, &toml).await];
    while b.authenticate(&secret).is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let clients = (0..16).map(|i| {
        let (server, secret) = (&servers[i % 2], &secret);
        async move {
            let (mut served, mut refused) = (0, 0);
            while refused < 5 {
                let reply = server.post_as(secret, CHAT, &body(if i % 4 < 2 { "good" } else { "no-usage" }, i % 3 == 0)).await;
                match reply.status {
                    200 => (served, refused) = (served + 1, 0),
                    429 => {
                        refused += 1;
                        tokio::time::sleep(Duration::from_millis(40)).await;
                    }
                    _ => panic!("{reply:?}"),
                }
            }
            (i % 2, served)
        }
    });
    let mut served = [0; 2];
    for (at, n) in futures::future::join_all(clients).await {
        served[at] += n;
    }
    assert!(served.iter().all(|n| *n > 20), "both had a share: {served:?}");
    let mut responses = Vec::new();
    for server in servers {
        responses.extend(server.stop().await.responses(10_000).await.unwrap());
    }
    b.flush().await.unwrap();
    let rows = usage(&a).await;
    parity(&rows, &responses);
    let spent: i64 = rows.values().map(|r| r.tokens.input + r.tokens.cache_read + r.tokens.output).sum();
    let spent = u64::try_from(spent).unwrap();
    assert!(spent <= BUDGET, "overspent: {spent}");
    // What a last request would have had set aside.
    assert!(spent > BUDGET - 100, "and it was used up: {spent}");
    a.close().await.unwrap();
    b.close().await.unwrap();
}

const WORKER: [&str; 4] = ["ASHLAR_TEST_DOOR_HOME", "ASHLAR_TEST_DOOR_ACCOUNTS", "ASHLAR_TEST_DOOR_CONFIG", "ASHLAR_TEST_DOOR_SAYS"];

fn state(store: Store, accounts: Accounts, toml: &str) -> GatewayState {
    let mut state = GatewayState::new(Vec::new(), store);
    state.routing = Config::parse(toml).unwrap();
    state.accounts = Some(accounts);
    state.prices = Some(Arc::new(PriceList::parse(PRICES).unwrap()));
    state.config.require_keys = true;
    state
}

/// Not a test: the gateway that is killed, in a process of its own.
#[tokio::test(flavor = "multi_thread")]
async fn worker() {
    let Ok(home) = std::env::var(WORKER[0]) else { return };
    let [database, toml] = [WORKER[1], WORKER[2]].map(|name| std::env::var(name).unwrap());
    let accounts = Accounts::open(databases::settings(database.parse().unwrap())).await.unwrap();
    let state = state(Store::open(home.as_ref()).await.unwrap(), accounts, &toml);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    eprintln!("{}{}", WORKER[3], listener.local_addr().unwrap());
    ashlar_gateway::serve(listener, state, std::future::pending()).await.unwrap();
}

fn spawn(home: &std::path::Path, place: &Place, toml: &str) -> (Child, SocketAddr) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["settling::worker", "--exact", "--nocapture", "--test-threads=1"])
        .env(WORKER[0], home)
        .env(WORKER[1], place.url())
        .env(WORKER[2], toml)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let at = lines.find_map(|l| l.unwrap().strip_prefix(WORKER[3]).map(str::to_owned)).expect("an address");
    // It may say more, and must not wait for us to read it.
    std::thread::spawn(move || lines.for_each(drop));
    (child, at.parse().unwrap())
}

async fn a_killed_gateway_leaves_nothing_open(place: Place) {
    let mock = Mock::start().await;
    let toml = config(&mock, &["good", "drip"]).replace("_timeout_s = 0.3", "_timeout_s = 30");
    let home = tempfile::tempdir().unwrap();
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let secret = key(&accounts, limited(&["tokens/total/10000000", "requests/total/100000"])).await;
    let mut seen: BTreeMap<String, bool> = BTreeMap::new();
    for round in 0..3u64 {
        let (mut victim, at) = spawn(home.path(), &place, &toml);
        let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let clients: Vec<_> = (0..8)
            .map(|i| {
                let (secret, said) = (secret.clone(), said.clone());
                tokio::spawn(async move {
                    // Every fourth is in the middle of an answer when it happens.
                    let model = if i % 4 == 0 { "drip" } else { "good" };
                    while let Some((id, whole)) = ask(at, &secret, model).await {
                        said.send((id, whole)).unwrap();
                    }
                })
            })
            .collect();
        drop(said);
        tokio::time::sleep(Duration::from_millis(400 + 130 * round)).await;
        victim.kill().unwrap();
        victim.wait().unwrap();
        for client in clients {
            client.await.unwrap();
        }
        while let Some((id, whole)) = heard.recv().await {
            assert!(seen.insert(id, whole).is_none());
        }
    }
    assert!(seen.values().filter(|whole| **whole).count() > 50, "{}", seen.len());
    // The next gateway on this home; with PostgreSQL the leases have to end first.
    let store = Store::open(home.path()).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(ashlar_gateway::serve(listener, state(store.clone(), accounts.clone(), &toml), async {
        let _ = stopped.await;
    }));
    let open = "SELECT CAST(COUNT(*) AS BIGINT) FROM reservation";
    for _ in 0..400 {
        if place.number(open).await == 0 {
            break;
        }
        accounts.settle_dead().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(place.number(open).await, 0);
    // The gateway looks for what was settled once a second.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
    let rows = usage(&accounts).await;
    let responses = store.responses(100_000).await.unwrap();
    parity(&rows, &responses);
    for (id, whole) in &seen {
        let row = rows.get(id).unwrap_or_else(|| panic!("{id} was answered and has no row"));
        // The last whole answers' ends may have been in memory.
        assert!(*whole || row.finish == Finish::Killed, "{row:?}");
    }
    let killed = rows.values().filter(|r| r.finish == Finish::Killed).count();
    assert!(killed >= 6, "two were in the middle of an answer each time: {killed}");
    assert!(rows.values().all(|r| r.finish != Finish::Killed || r.counts == Counts::Estimated));
    let key = accounts.authenticate(&secret).unwrap().key().id.clone();
    let standing = accounts.standing(&key, None).await.unwrap();
    assert_eq!(standing[1].spent, (rows.len() as u64).into(), "each counts once");
    accounts.close().await.unwrap();
}

/// Asks until the end or the break of the answer; its id, once it began, and
/// whether it was whole.
async fn ask(at: SocketAddr, secret: &str, model: &str) -> Option<(String, bool)> {
    use tokio::io::AsyncWriteExt as _;
    let mut socket = tokio::net::TcpStream::connect(at).await.ok()?;
    let body = body(model, true).to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {at}\r\nauthorization: Bearer {secret}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.ok()?;
    let mut bytes = Vec::new();
    let whole = socket.read_to_end(&mut bytes).await.is_ok();
    let text = String::from_utf8_lossy(&bytes);
    let (_, rest) = text.split_once("x-ashlar-response-id: ")?;
    Some((rest.split("\r\n").next()?.to_owned(), whole && text.contains("[DONE]")))
}
