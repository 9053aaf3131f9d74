//! How fast requests are admitted and settled:
//! `accounts_bench DATABASE [REQUESTS [TASKS]]`, on a database of its own.
//!
//! Each request passes five limits of key, team and end user, waits until its
//! admission is durable, and settles. First as many tasks as said, then one.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use ashlar_store::{
    Access, AccountSettings, Accounts, Finish, KeySettings, Limit, PriceList, Request, TeamSettings, Tokens, Used,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

const PRICES: &str = "version = 'bench'\ncurrency = 'USD'\n[[price]]\nmodel = 'small'\ninput = '0.15'\noutput = '0.60'\n";

fn limit(json: &str) -> Limit {
    serde_json::from_str(json).unwrap()
}

#[derive(Default)]
struct Times {
    reserve: Vec<Duration>,
    durable: Vec<Duration>,
}

async fn one(accounts: &Accounts, access: &Arc<Access>, id: String, times: &mut Times) {
    let most = Tokens { input: 200, output: 400, ..Default::default() };
    let request = Request {
        id,
        access: Some(access.clone()),
        end_user: Some("0123456789abcdef".into()),
        model: "small".into(),
        backend: "up".into(),
        endpoint: "/v1/chat/completions".into(),
        most,
        ..Default::default()
    };
    let start = Instant::now();
    let mut reservation = accounts.reserve(request).await.unwrap();
    times.reserve.push(start.elapsed());
    reservation.durable().await.unwrap();
    times.durable.push(start.elapsed());
    reservation.settle(Used { tokens: Tokens { output: 150, ..most }, ..Used::new(Finish::Stop) });
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |q: f64| times[((times.len() - 1) as f64 * q) as usize].as_secs_f64() * 1e6;
    println!("  {what}: p50 {:.1} µs, p99 {:.1} µs", at(0.5), at(0.99));
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let database = args.next().expect("a database").parse().unwrap();
    let requests: u64 = args.next().map_or(100_000, |n| n.parse().unwrap());
    let tasks: u64 = args.next().map_or(256, |n| n.parse().unwrap());
    let accounts = Accounts::open(AccountSettings::new(database)).await.unwrap();
    accounts.set_prices(PriceList::parse(PRICES).unwrap()).await.unwrap();
    let team = TeamSettings {
        name: "bench".into(),
        limits: vec![
            limit(r#"{"measure":"money","window":"month","amount":"1000000","currency":"USD"}"#),
            limit(r#"{"measure":"tokens","window":"hour","amount":"100000000000"}"#),
        ],
        user_limits: vec![limit(r#"{"measure":"requests","window":"day","amount":"1000000000"}"#)],
        ..Default::default()
    };
    let team = accounts.create_team(&team).await.unwrap();
    let settings = KeySettings {
        name: "bench".into(),
        team: Some(team.id),
        limits: vec![
            limit(r#"{"measure":"requests","window":"minute","amount":"1000000000"}"#),
            limit(r#"{"measure":"tokens","window":"minute","amount":"100000000000"}"#),
        ],
        ..Default::default()
    };
    let (_, secret) = accounts.create_key(&settings).await.unwrap();
    let start = Instant::now();
    for _ in 0..100_000 {
        std::hint::black_box(accounts.authenticate(secret.reveal()).unwrap());
    }
    println!("authenticate: {:.2} µs", start.elapsed().as_secs_f64() * 10.0);
    let access = accounts.authenticate(secret.reveal()).unwrap();
    let run = ashlar_core::id::new("bench");
    for (tasks, requests) in [(tasks, requests), (1, requests / 50)] {
        let next = Arc::new(AtomicU64::new(0));
        let before = accounts.stats();
        let start = Instant::now();
        let work = (0..tasks).map(|_| {
            let (accounts, access, next, run) = (accounts.clone(), access.clone(), next.clone(), run.clone());
            tokio::spawn(async move {
                let mut times = Times::default();
                loop {
                    let i = next.fetch_add(1, Relaxed);
                    if i >= requests {
                        return times;
                    }
                    one(&accounts, &access, format!("{run}-{tasks}-{i}"), &mut times).await;
                }
            })
        });
        let (mut reserve, mut durable) = (Vec::new(), Vec::new());
        for task in work.collect::<Vec<_>>() {
            let times = task.await.unwrap();
            reserve.extend(times.reserve);
            durable.extend(times.durable);
        }
        accounts.flush().await.unwrap();
        let (seconds, stats) = (start.elapsed().as_secs_f64(), accounts.stats());
        let batches = stats.batches - before.batches;
        println!(
            "{tasks} tasks: {:.0} requests/s admitted, made durable and settled; {:.0} a transaction; {} asked the database",
            requests as f64 / seconds,
            requests as f64 / batches as f64,
            stats.asked - before.asked,
        );
        show("reserve", reserve);
        show("reserve and durable", durable);
    }
    accounts.close().await.unwrap();
}
