//! Keys and teams: made, used, changed, rotated, revoked, on several replicas.

use crate::databases::{Place, on_both};
use ashlar_store::{AccountError, AccountSettings, Accounts, Denied, KeySettings, TeamSettings};
use std::time::Duration;

on_both!(a_key_lives_and_ends, another_replica_sees_a_revocation, a_rotation_has_a_grace, schemas_go_forward);

fn named(name: &str) -> KeySettings {
    KeySettings { name: name.into(), ..Default::default() }
}

async fn a_key_lives_and_ends(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let team = TeamSettings { name: "law".into(), models: vec!["gpt-*".into()], tags: [("cost".into(), "7".into())].into(), ..Default::default() };
    let team = accounts.create_team(&team).await.unwrap();
    let settings = KeySettings { team: Some(team.id.clone()), max_priority: Some(3), ..named("docs\0".trim_end_matches('\0')) };
    let (key, secret) = accounts.create_key(&settings).await.unwrap();
    assert_eq!(accounts.keys().await.unwrap(), std::slice::from_ref(&key));
    assert_eq!(accounts.teams().await.unwrap(), std::slice::from_ref(&team));

    let access = accounts.authenticate(secret.reveal()).unwrap();
    assert_eq!((access.key(), access.team()), (&key, Some(&team)));
    assert_eq!((access.priority(9), access.priority(-1)), (3, -1));
    assert_eq!(access.tags()["cost"], "7");
    assert!(access.allows("gpt-4o").is_ok());
    assert!(matches!(access.allows("claude"), Err(Denied::Model { .. })));
    let mut wrong = secret.reveal().to_owned();
    wrong.replace_range(70..71, if &wrong[70..71] == "0" { "1" } else { "0" });
    for bad in ["", "sk-other", &wrong, &key.prefix] {
        assert_eq!(accounts.authenticate(bad).unwrap_err(), Denied::Unknown, "{bad}");
    }
    let digits = &secret.reveal()["sk-ashlar-".len() + 8..];
    let kept = place.number(&format!("SELECT CAST(COUNT(*) AS BIGINT) FROM api_key WHERE hash LIKE '%{digits}%' OR body LIKE '%{digits}%'")).await;
    assert_eq!(kept, 0, "the secret is not kept");

    // Changes of the team reach its keys.
    let off = TeamSettings { disabled: true, ..team.settings.clone() };
    accounts.update_team(&team.id, &off).await.unwrap();
    assert!(matches!(accounts.authenticate(secret.reveal()), Err(Denied::Disabled(_))));
    accounts.update_team(&team.id, &team.settings).await.unwrap();
    accounts.update_key(&key.id, &KeySettings { expires_ms: Some(1000), ..settings.clone() }).await.unwrap();
    assert!(matches!(accounts.authenticate(secret.reveal()), Err(Denied::Expired { at_ms: 1000, .. })));
    accounts.update_key(&key.id, &settings).await.unwrap();
    assert!(accounts.authenticate(secret.reveal()).is_ok());
    accounts.revoke_key(&key.id).await.unwrap();
    assert!(matches!(accounts.authenticate(secret.reveal()), Err(Denied::Revoked(_))));
    assert!(matches!(accounts.revoke_key(&key.id).await, Err(AccountError::Revoked(_))));
    assert!(matches!(accounts.update_key(&key.id, &settings).await, Err(AccountError::Revoked(_))));
    assert!(matches!(accounts.rotate_key("key-0", Duration::ZERO).await, Err(AccountError::NotFound(_))));
    let lost = KeySettings { team: Some("team-0".into()), ..named("x") };
    assert!(matches!(accounts.create_key(&lost).await, Err(AccountError::NotFound(_))));
    assert!(matches!(accounts.create_key(&named("")).await, Err(AccountError::Setting { .. })));
    accounts.close().await.unwrap();
}

async fn another_replica_sees_a_revocation(place: Place) {
    let here = Accounts::open(place.settings()).await.unwrap();
    let there = Accounts::open(place.settings()).await.unwrap();
    let (key, secret) = here.create_key(&named("a")).await.unwrap();
    let seen = async |good: bool| {
        for _ in 0..200 {
            if there.authenticate(secret.reveal()).is_ok() == good {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    };
    assert!(seen(true).await);
    here.revoke_key(&key.id).await.unwrap();
    assert!(seen(false).await);
    // A replica that cannot read keys lets nobody in beyond the bound.
    let (_, secret) = here.create_key(&named("b")).await.unwrap();
    let settings = AccountSettings { refresh: Duration::from_millis(20), stale: Duration::from_millis(400), ..place.settings() };
    let cut_off = Accounts::open(settings).await.unwrap();
    assert!(cut_off.authenticate(secret.reveal()).is_ok());
    place.sql("ALTER TABLE account_revision RENAME TO away").await;
    let mut denied = cut_off.authenticate(secret.reveal());
    for _ in 0..200 {
        if denied.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        denied = cut_off.authenticate(secret.reveal());
    }
    assert!(matches!(denied, Err(Denied::Stale { most_ms: 400, .. })), "{denied:?}");
}

async fn a_rotation_has_a_grace(place: Place) {
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let (key, first) = accounts.create_key(&named("a")).await.unwrap();
    let second = accounts.rotate_key(&key.id, Duration::from_secs(3600)).await.unwrap();
    assert!(accounts.authenticate(first.reveal()).is_ok());
    assert_eq!(accounts.authenticate(second.reveal()).unwrap().key().prefix, second.reveal()[..18]);
    let third = accounts.rotate_key(&key.id, Duration::ZERO).await.unwrap();
    assert_eq!(accounts.authenticate(first.reveal()).unwrap_err(), Denied::Unknown);
    assert_eq!(accounts.authenticate(second.reveal()).unwrap_err(), Denied::Unknown);
    assert!(accounts.authenticate(third.reveal()).is_ok());
}

/// A database of the first version gets the tables of the second and keeps its
/// rows; one of a later version is left alone.
async fn schemas_go_forward(place: Place) {
    place.sql(include_str!("../../src/account/schema/1.sql")).await;
    place.sql("CREATE TABLE account_schema (version BIGINT PRIMARY KEY); INSERT INTO account_schema VALUES (1)").await;
    let body = r#"{"name":"old hand","models":["small"]}"#;
    let hash = "ab".repeat(32);
    place.sql(&format!("INSERT INTO api_key (id, revision, created_ms, prefix, hash, body) VALUES ('key-1', 1, 5, 'sk-ashlar-00000000', 'sha256:{hash}', '{body}')")).await;
    place.sql("UPDATE account_revision SET revision = 1").await;
    let accounts = Accounts::open(place.settings()).await.unwrap();
    let keys = accounts.keys().await.unwrap();
    assert_eq!((keys.len(), &*keys[0].settings.name, keys[0].created_ms), (1, "old hand", 5));
    assert_eq!(accounts.usage("none").await.unwrap(), None, "the ledger's table is there");
    accounts.close().await.unwrap();
    place.sql("INSERT INTO account_schema VALUES (77)").await;
    let newer = Accounts::open(place.settings()).await.unwrap_err();
    assert!(matches!(newer, AccountError::Schema { found: 77, known: 3 }), "{newer}");
}
