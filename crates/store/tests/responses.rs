//! Every admitted request settles exactly once.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::*;

use ashlar_store::{Settlement, Store, StoreError};

#[tokio::test]
async fn a_response_comes_back_as_it_was_settled() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    let a = admission("r", None);
    store.admit(&a).await.unwrap();
    assert!(matches!(
        store.admit(&a).await,
        Err(StoreError::AlreadyAdmitted(_))
    ));
    assert!(
        store
            .response("r")
            .await
            .unwrap()
            .unwrap()
            .settlement
            .is_none()
    );
    let odd = store
        .settle(
            "r",
            &Settlement {
                finish: "done".into(),
                ..stop()
            },
        )
        .await;
    assert!(matches!(odd, Err(StoreError::Finish(_))), "{odd:?}");
    store.settle("r", &stop()).await.unwrap();
    let row = store.response("r").await.unwrap().unwrap();
    assert_eq!((row.admission, row.settlement), (a, Some(stop())));
    let again = store
        .settle(
            "r",
            &Settlement {
                finish: "error".into(),
                ..stop()
            },
        )
        .await;
    assert!(
        matches!(again, Err(StoreError::AlreadySettled { ref finish, .. }) if finish == "stop"),
        "{again:?}"
    );
    assert!(matches!(
        store.settle("s", &stop()).await,
        Err(StoreError::UnknownResponse(_))
    ));
    assert_eq!(store.responses(10).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_settlers_one_wins() {
    let home = tempfile::tempdir().unwrap();
    let stores = [
        Store::open(home.path()).await.unwrap(),
        Store::open(home.path()).await.unwrap(),
    ];
    for round in 0..10 {
        let id = format!("r{round}");
        stores[0].admit(&admission(&id, None)).await.unwrap();
        let settlers = (0..8).map(|i| {
            let (store, id) = (stores[i % 2].clone(), id.clone());
            tokio::spawn(async move {
                let s = Settlement {
                    completion_tokens: i as u64,
                    ..stop()
                };
                match store.settle(&id, &s).await {
                    Ok(()) => Some(i as u64),
                    Err(StoreError::AlreadySettled { .. }) => None,
                    Err(e) => panic!("{e}"),
                }
            })
        });
        let won: Vec<u64> = futures::future::try_join_all(settlers)
            .await
            .unwrap()
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(won.len(), 1);
        let row = stores[1].response(&id).await.unwrap().unwrap();
        assert_eq!(row.settlement.unwrap().completion_tokens, won[0]);
    }
}

#[tokio::test]
async fn orphans_of_the_dead_are_settled_and_the_living_left_alone() {
    let home = tempfile::tempdir().unwrap();
    let dead = Store::open(home.path()).await.unwrap();
    let living = Store::open(home.path()).await.unwrap();
    dead.admit(&admission("orphan", None)).await.unwrap();
    dead.admit(&admission("done", None)).await.unwrap();
    dead.settle("done", &stop()).await.unwrap();
    living.admit(&admission("running", None)).await.unwrap();
    let starting = Store::open(home.path()).await.unwrap();
    assert_eq!(
        starting.settle_orphans().await.unwrap(),
        0,
        "both still live"
    );
    drop(dead);
    assert_eq!(starting.settle_orphans().await.unwrap(), 1);
    assert_eq!(starting.settle_orphans().await.unwrap(), 0);
    let finish = async |id| {
        starting
            .response(id)
            .await
            .unwrap()
            .unwrap()
            .settlement
            .map(|s| s.finish)
    };
    assert_eq!(finish("orphan").await.as_deref(), Some("killed"));
    assert_eq!(finish("done").await.as_deref(), Some("stop"));
    assert_eq!(finish("running").await, None);
    assert!(matches!(
        starting.settle("orphan", &stop()).await,
        Err(StoreError::AlreadySettled { .. })
    ));
    living.settle("running", &stop()).await.unwrap();
}
