//! Any interleaving of reservations, settlements, drops and deaths on two
//! replicas keeps counters and ledger in step.

use crate::{
    databases::{Place, postgres, sqlite},
    key_with, request, used,
};
use ashlar_core::Decimal;
use ashlar_store::{Accounts, Reservation, ReserveError, UsageFilter};
use proptest::prelude::*;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

const CAP: u64 = 1000;

#[derive(Debug, Clone)]
enum Step {
    /// Replica, most.
    Reserve(usize, u64),
    /// Which of the open ones, used by parts of 100 of what was reserved.
    Settle(usize, u64),
    Drop(usize),
    /// Long enough for claims to be given back.
    Wait,
    /// The replica ends without a word; another takes its place.
    Die(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..2usize, 1..400u64).prop_map(|(r, n)| Step::Reserve(r, n)),
        6 => (any::<usize>(), 0..130u64).prop_map(|(i, p)| Step::Settle(i, p)),
        1 => any::<usize>().prop_map(Step::Drop),
        1 => Just(Step::Wait),
        1 => (0..2usize).prop_map(Step::Die),
    ]
}

/// A replica on a runtime of its own, whose end stops its tasks where they are.
struct Replica {
    runtime: Runtime,
    accounts: Accounts,
}

fn open(place: &Place) -> Replica {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let accounts = runtime.block_on(Accounts::open(place.settings())).unwrap();
    Replica { runtime, accounts }
}

fn run(place: &Place, steps: &[Step]) {
    let mut replicas = [open(place), open(place)];
    let key = replicas[0].runtime.block_on(key_with(&replicas[0].accounts, &[&format!("tokens/total/{CAP}"), "requests/total/100000"]));
    let id = key.key().id.clone();
    // Reservations in flight: replica, most, the thing itself.
    let mut open_now: Vec<(usize, u64, Reservation)> = Vec::new();
    let (mut admitted, mut over) = (0u64, 0u64);
    for (i, step) in steps.iter().enumerate() {
        match *step {
            Step::Reserve(at, most) => {
                let Replica { runtime, accounts } = &replicas[at];
                let made = runtime.block_on(async {
                    let mut r = accounts.reserve(request(&format!("r{i}"), &key, 0, most)).await?;
                    r.durable().await?;
                    Ok::<_, ReserveError>(r)
                });
                match made {
                    Ok(r) => {
                        admitted += 1;
                        open_now.push((at, most, r));
                    }
                    Err(ReserveError::Exceeded(e)) => assert!(e.taken <= Decimal::from(CAP + over) && e.taken.picos() + e.asked.picos() > 0, "{e}"),
                    Err(e) => panic!("{e}"),
                }
            }
            Step::Settle(which, percent) if !open_now.is_empty() => {
                let (_, most, r) = open_now.swap_remove(which % open_now.len());
                let tokens = most * percent / 100;
                over += tokens.saturating_sub(most);
                r.settle(used(0, tokens));
            }
            Step::Drop(which) if !open_now.is_empty() => drop(open_now.swap_remove(which % open_now.len())),
            Step::Settle(..) | Step::Drop(_) => {}
            Step::Wait => std::thread::sleep(Duration::from_millis(130)),
            Step::Die(at) => {
                let fresh = open(place);
                let Replica { runtime, accounts } = std::mem::replace(&mut replicas[at], fresh);
                // Its tasks first, so that nothing is tidied up.
                runtime.shutdown_timeout(Duration::from_secs(10));
                drop(accounts);
                open_now.retain(|(r, ..)| *r != at);
            }
        }
        // Written before the next step is looked at.
        for Replica { runtime, accounts } in &replicas {
            runtime.block_on(accounts.flush()).unwrap();
        }
        // On the runtime that drives its connections.
        let standing = replicas[0].runtime.block_on(replicas[0].accounts.standing(&id, None)).unwrap();
        let reserved: u64 = open_now.iter().map(|(_, most, _)| most).sum();
        let (spent, claimed) = (standing[0].spent.picos(), standing[0].claimed.picos());
        assert!(claimed >= spent + Decimal::from(reserved).picos(), "step {i}: {claimed} < {spent} + {reserved}");
        assert!(claimed <= Decimal::from(CAP + over).picos(), "step {i}: claimed {claimed} of {CAP} + {over}");
    }
    drop(open_now);
    for Replica { runtime, accounts } in replicas {
        runtime.block_on(accounts.close()).unwrap();
    }
    // Leases of the dead may still run.
    let last = open(place);
    let sum = last.runtime.block_on(async {
        for _ in 0..100 {
            last.accounts.settle_dead().await.unwrap();
            if place.number("SELECT CAST(COUNT(*) AS BIGINT) FROM replica").await == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(place.number("SELECT CAST(COUNT(*) AS BIGINT) FROM reservation").await, 0);
        last.accounts.usage_sums(&UsageFilter::default(), &[]).await.unwrap()
    });
    let (requests, tokens) = sum.first().map_or((0, 0), |s| (s.requests, s.tokens.total()));
    assert_eq!(requests, admitted, "each admitted request has one row");
    let standing = last.runtime.block_on(last.accounts.standing(&id, None)).unwrap();
    assert_eq!((standing[0].spent, standing[0].claimed), (tokens.into(), tokens.into()));
    assert_eq!(standing[1].spent, requests.into());
    last.runtime.block_on(last.accounts.close()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 30, ..ProptestConfig::default() })]

    #[test]
    fn counters_and_ledger_agree_on_sqlite(steps in prop::collection::vec(step(), 1..40)) {
        run(&sqlite(), &steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, max_shrink_iters: 10, ..ProptestConfig::default() })]

    #[test]
    fn counters_and_ledger_agree_on_postgres(steps in prop::collection::vec(step(), 1..30)) {
        let place = Builder::new_current_thread().enable_all().build().unwrap().block_on(postgres("counters_and_ledger_agree"));
        if let Some(place) = place {
            run(&place, &steps);
        }
    }
}
