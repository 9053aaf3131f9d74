//! Several processes on one database, and their sudden end.
//!
//! The other processes are this test binary again, told by its environment to
//! run [`worker`] as one.

use crate::{
    databases::{Place, on_both, settings},
    key_with, request, used,
};
use ashlar_core::Decimal;
use ashlar_store::{Accounts, ReserveError, UsageFilter};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

on_both!(two_processes_never_overspend, what_a_killed_process_admitted_settles_once);

const PLACE: &str = "ASHLAR_TEST_ACCOUNTS";
const SECRET: &str = "ASHLAR_TEST_ACCOUNTS_SECRET";
const NAME: &str = "ASHLAR_TEST_ACCOUNTS_NAME";

fn spawn(place: &Place, secret: &str, name: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["processes::worker", "--exact", "--nocapture", "--test-threads=1"])
        .env(PLACE, place.url())
        .env(SECRET, secret)
        .env(NAME, name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Not a test: what the other processes run. Eight tasks ask for requests of
/// random size until the budget is used up, and say aloud what was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker() {
    let Ok(place) = std::env::var(PLACE) else { return };
    let (secret, name) = (std::env::var(SECRET).unwrap(), std::env::var(NAME).unwrap());
    let accounts = Accounts::open(settings(place.parse().unwrap())).await.unwrap();
    let access = accounts.authenticate(&secret).unwrap();
    let next = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (accounts, access, next, name) = (accounts.clone(), access.clone(), next.clone(), name.clone());
            tokio::spawn(async move {
                let mut refused = 0;
                while refused < 40 {
                    let i = next.fetch_add(1, Relaxed);
                    let (id, most) = (format!("{name}-{i}"), 5 + i * 7919 % 40);
                    match accounts.reserve(request(&id, &access, 5, most)).await {
                        Ok(mut r) => {
                            refused = 0;
                            r.durable().await.unwrap();
                            say(&format!("admitted {id}"));
                            tokio::time::sleep(Duration::from_micros(i * 31 % 3000)).await;
                            let settled = r.settle(used(5, most - i % 3));
                            if i % 2 == 0 {
                                settled.written().await.unwrap();
                                say(&format!("settled {id}"));
                            }
                        }
                        Err(ReserveError::Exceeded(_)) => {
                            refused += 1;
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                        Err(e) => panic!("{e}"),
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    accounts.close().await.unwrap();
    say("done");
}

/// One whole line, so that a killed process leaves none but whole ones.
fn say(line: &str) {
    std::io::stdout().lock().write_all(format!("\n{line}\n").as_bytes()).unwrap();
}

async fn two_processes_never_overspend(place: Place) {
    const BUDGET: u64 = 20_000;
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let (secret, key) = secret_with(&accounts, &[&format!("tokens/total/{BUDGET}"), "requests/day/1000000"]).await;
    let workers: Vec<Child> = ["a", "b"].map(|name| spawn(&place, &secret, name)).into();
    let mut done = 0;
    let mut by_worker = Vec::new();
    for worker in workers {
        let out = worker.wait_with_output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        done += usize::from(text.lines().any(|l| l == "done"));
        by_worker.push(text.lines().filter(|l| l.starts_with("admitted")).count());
    }
    assert_eq!(done, 2, "both ended well");
    assert!(by_worker.iter().all(|n| *n > 50), "both had a share: {by_worker:?}");
    let sum = accounts.usage_sums(&UsageFilter::default(), &[]).await.unwrap().remove(0);
    assert_eq!(sum.requests, by_worker.iter().sum::<usize>() as u64);
    let spent = sum.tokens.total();
    assert!(spent <= BUDGET, "overspent: {spent}");
    assert!(spent > BUDGET - 2 * 50, "and it was used up: {spent}");
    let standing = accounts.standing(&key, None).await.unwrap();
    assert_eq!((standing[0].spent, standing[0].claimed), (spent.into(), spent.into()));
    assert_eq!(standing[1].spent, sum.requests.into());
    accounts.close().await.unwrap();
}

async fn secret_with(accounts: &Accounts, limits: &[&str]) -> (String, String) {
    let access = key_with(accounts, limits).await;
    let id = access.key().id.clone();
    let secret = accounts.rotate_key(&id, Duration::ZERO).await.unwrap();
    (secret.reveal().to_owned(), id)
}

async fn what_a_killed_process_admitted_settles_once(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let (secret, key) = secret_with(&accounts, &["tokens/total/100000000", "requests/month/100000000"]).await;
    let mut said: BTreeMap<String, bool> = BTreeMap::new();
    for round in 0..4u32 {
        let mut victim = spawn(&place, &secret, &format!("v{round}"));
        let out = BufReader::new(victim.stdout.take().unwrap());
        let (mut admitted, enough) = (0, 200 + 370 * round);
        for line in out.lines() {
            let line = line.unwrap();
            if let Some(id) = line.strip_prefix("admitted ") {
                assert!(said.insert(id.to_owned(), false).is_none());
                admitted += 1;
                if admitted == enough {
                    // SIGKILL; what it said until then is still in the pipe.
                    victim.kill().unwrap();
                }
            } else if let Some(id) = line.strip_prefix("settled ") {
                *said.get_mut(id).unwrap() = true;
            }
        }
        assert!(!victim.wait().unwrap().success());
        assert!(admitted >= enough, "{admitted}");
    }
    // With SQLite at once, with PostgreSQL when the leases end.
    let deadline = Instant::now() + Duration::from_secs(30);
    let replicas = "SELECT CAST(COUNT(*) AS BIGINT) FROM replica";
    while place.number(replicas).await > 1 && Instant::now() < deadline {
        accounts.settle_dead().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(place.number(replicas).await, 1, "only the living");
    assert_eq!(place.number("SELECT CAST(COUNT(*) AS BIGINT) FROM reservation").await, 0);

    let mut rows = BTreeMap::new();
    let mut after = None::<(i64, String)>;
    loop {
        let page = accounts.usage_page(&UsageFilter::default(), after.as_ref().map(|(a, i)| (*a, &**i)), 500).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some((last.at_ms, last.id.clone()));
        for row in page {
            assert!(rows.insert(row.id.clone(), row).is_none(), "a row is doubled");
        }
    }
    let lost: BTreeSet<_> = said.keys().filter(|id| !rows.contains_key(*id)).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    let killed = rows.values().filter(|r| r.finish.as_str() == "killed").count();
    assert!(killed > 0, "someone was in the middle of something");
    for (id, _) in said.iter().filter(|(_, settled)| **settled) {
        assert_eq!(rows[id].finish.as_str(), "stop", "{id} was acknowledged as settled");
    }
    // The budget agrees with the ledger to the token: what was admitted and not
    // acknowledged is in both or in neither.
    let tokens: i64 = rows.values().map(|r| r.tokens.input + r.tokens.output).sum();
    let standing = accounts.standing(&key, None).await.unwrap();
    assert_eq!(standing[0].spent, Decimal::from(tokens as u64));
    assert_eq!(standing[1].spent, Decimal::from(rows.len() as u64));
    assert_eq!((standing[0].claimed, standing[1].claimed), (standing[0].spent, standing[1].spent));
    assert_eq!(accounts.settle_dead().await.unwrap(), 0, "and once only");
    accounts.close().await.unwrap();
}
