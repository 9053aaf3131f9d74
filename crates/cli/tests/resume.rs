//! `kill -9` in every stage, then `up` again: the same model comes out. And a
//! takedown: the next `up` rebuilds without the document and its siblings.

mod common;

use common::{Running, ashlar, json, peer, small_recipe};
use serde_json::Value;
use std::path::Path;

fn up(home: &Path, recipe: &Path) -> Value {
    json(&mut ashlar(home, &["up", recipe.to_str().expect("UTF-8"), "--no-serve", "--json"]))
}

fn names(result: &Value) -> Vec<String> {
    let stages = result["stages"].as_array().expect("stages");
    stages.iter().map(|s| s["name"].as_str().expect("name").to_owned()).collect()
}

#[test]
fn killed_in_every_stage_the_model_is_the_same() {
    let Some(_) = peer("ASHLAR_TEST_MODEL", "the test model") else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let recipe = small_recipe(dir.path());
    let clean = up(&dir.path().join("clean"), &recipe);
    let again = up(&dir.path().join("clean"), &recipe);
    assert_eq!(clean["model"], again["model"]);
    assert_eq!(clean["release"], again["release"]);
    for stage in again["stages"].as_array().expect("stages") {
        assert_eq!(stage["reused"], true, "{stage}");
    }

    // Killed as soon as the stage before is done, so inside each stage, at a
    // moment that differs from stage to stage.
    let home = dir.path().join("killed");
    let stages = names(&clean);
    for (n, before) in stages.iter().enumerate() {
        let args = ["up", recipe.to_str().expect("UTF-8"), "--no-serve", "--json"];
        let mut running = Running::start(&mut ashlar(&home, &args));
        running.until(&format!("  {before} "));
        std::thread::sleep(std::time::Duration::from_millis(40 * (n as u64 + 1)));
        running.child.kill().expect("kill");
        running.child.wait().expect("wait");
    }
    // In the middle of training: once a checkpoint is there.
    let home = dir.path().join("training");
    let args = ["up", recipe.to_str().expect("UTF-8"), "--no-serve", "--json"];
    let mut running = Running::start(&mut ashlar(&home, &args));
    let checkpoint = || {
        let runs = std::fs::read_dir(home.join("runs")).ok()?;
        runs.flatten().map(|e| e.path().join("checkpoints")).find(|p| {
            std::fs::read_dir(p).is_ok_and(|mut files| files.next().is_some())
        })
    };
    while checkpoint().is_none() {
        assert!(running.child.try_wait().expect("wait").is_none(), "ended before any checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    running.child.kill().expect("kill");
    running.child.wait().expect("wait");

    for home in ["killed", "training"] {
        let resumed = up(&dir.path().join(home), &recipe);
        assert_eq!(resumed["model"], clean["model"], "{home}");
        assert_eq!(resumed["snapshot"], clean["snapshot"], "{home}");
        assert_eq!(resumed["adapter"], clean["adapter"], "{home}");
        let report = json(&mut ashlar(&dir.path().join(home), &["verify", "--ledger", "--json"]));
        assert_eq!(report["ok"], true, "{report}");
    }
}

#[test]
fn a_takedown_closes_the_gate_and_the_next_up_is_without_it() {
    let Some(_) = peer("ASHLAR_TEST_MODEL", "the test model") else { return };
    let dir = tempfile::tempdir().expect("temp dir");
    let recipe = small_recipe(dir.path());
    let home = dir.path().join("home");
    let before = up(&home, &recipe);
    let response = before["sample"]["response_id"].as_str().expect("id");
    let trace = json(&mut ashlar(&home, &["trace", response, "--json"]));
    let documents: Vec<&Value> =
        trace["nodes"].as_array().expect("nodes").iter().filter(|n| n["kind"] == "document").collect();
    assert_eq!(documents.len() as u64, before["documents"]["kept"].as_u64().expect("count"));
    let victim = documents[0]["id"].as_str().expect("id");

    // The other way: from the document to the response.
    let down = json(&mut ashlar(&home, &["trace", victim, "--json"]));
    assert!(down["nodes"].as_array().expect("nodes").iter().any(|n| n["id"] == response));

    let dry = json(&mut ashlar(&home, &["takedown", victim, "--dry-run", "--json"]));
    assert!(dry["exposed"]["responses"].as_array().expect("list").iter().any(|r| r == response));
    assert!(dry["exposed"]["releases"].as_array().expect("list").iter().any(|r| *r == before["release"]));
    let still = up(&home, &recipe);
    assert_eq!(still["release"], before["release"], "a dry run must change nothing");

    json(&mut ashlar(&home, &["takedown", victim, "--reason", "asked to", "--json"]));
    let after = up(&home, &recipe);
    assert_ne!(after["model"], before["model"]);
    assert_eq!(after["documents"]["dropped"]["taken_down"], 1, "{}", after["documents"]);
    let response = after["sample"]["response_id"].as_str().expect("id");
    let trace = json(&mut ashlar(&home, &["trace", response, "--json"]));
    assert!(!trace["nodes"].as_array().expect("nodes").iter().any(|n| n["id"] == victim), "the document came back");
}
