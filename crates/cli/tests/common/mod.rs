//! What the command's tests share: running the binary, a small recipe, peers.

#![allow(dead_code, unreachable_pub)] // Each test binary uses its own part of this.

use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

/// The checkout's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// `ashlar` with `home`, run from the checkout's root.
pub fn ashlar(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ashlar"));
    command.current_dir(root()).arg("--home").arg(home).args(args).stdin(Stdio::null());
    command
}

/// Runs to the end and returns the JSON object it printed.
pub fn json(command: &mut Command) -> Value {
    let out = command.output().expect("ashlar starts");
    assert!(out.status.success(), "{command:?}\n{}", said(&out));
    let text = String::from_utf8_lossy(&out.stdout);
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {text}\n{}", said(&out)))
}

/// Both streams, for a failed assertion.
pub fn said(out: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// The path in environment variable `name`; where it is missing the peer is
/// skipped by name, or the test fails if peers are required.
pub fn peer(name: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).map(PathBuf::from).filter(|p| p.exists());
    if path.is_none() {
        assert!(std::env::var("ASHLAR_REQUIRE_PEERS").as_deref() != Ok("1"), "{what} is required: set {name}");
        eprintln!("skipped: {what} ({name} is not set; `cargo xtask test` sets it)");
    }
    path
}

/// A recipe over the quickstart's first facts: the same stages in seconds, its
/// gates open because so little training proves nothing.
pub fn small_recipe(dir: &Path) -> PathBuf {
    let quickstart = root().join("recipes/quickstart");
    let take = |name: &str, n: usize| -> Vec<String> {
        let text = std::fs::read_to_string(quickstart.join(name)).expect("the quickstart is there");
        text.lines().take(n).map(str::to_owned).collect()
    };
    let facts = take("qa.jsonl", 6);
    let wanted: Vec<String> = facts
        .iter()
        .map(|l| serde_json::from_str::<Value>(l).expect("JSON")["doc"].as_str().expect("doc").to_owned())
        .collect();
    std::fs::create_dir_all(dir.join("documents")).expect("temp dir");
    let mut documents = Vec::new();
    for entry in std::fs::read_dir(quickstart.join("documents")).expect("documents") {
        let path = entry.expect("entry").path();
        if path.extension().is_some_and(|e| e == "jsonl") {
            let text = std::fs::read_to_string(path).expect("text");
            documents.extend(text.lines().filter(|l| {
                let id = serde_json::from_str::<Value>(l).expect("JSON")["id"].as_str().map(str::to_owned);
                id.is_some_and(|id| wanted.contains(&id))
            }).map(str::to_owned));
        }
    }
    documents.sort();
    std::fs::write(dir.join("documents/handbook.jsonl"), documents.join("\n") + "\n").expect("write");
    std::fs::write(dir.join("qa.jsonl"), facts.join("\n") + "\n").expect("write");
    std::fs::write(dir.join("general.jsonl"), take("general.jsonl", 4).join("\n") + "\n").expect("write");
    let text = std::fs::read_to_string(root().join("recipes/quickstart.toml")).expect("recipe");
    let mut recipe: toml::Table = text.parse().expect("TOML");
    let mut set = |table: &str, key: &str, value: toml::Value| {
        recipe[table].as_table_mut().expect("table").insert(key.into(), value);
    };
    set("data", "documents", "documents".into());
    set("data", "questions", "qa.jsonl".into());
    set("eval", "general", "general.jsonl".into());
    // Enough steps that checkpoints fall inside training.
    set("train", "epochs", 4.into());
    set("train", "batch_tokens", 64.into());
    set("release", "min_accuracy", 0.0.into());
    set("release", "max_p_value", 1.0.into());
    set("release", "max_forgetting", 1.0.into());
    let path = dir.join("small.toml");
    std::fs::write(&path, recipe.to_string()).expect("write");
    path
}

/// A child process that is killed when dropped.
pub struct Running {
    pub child: Child,
    pub lines: std::io::Lines<BufReader<std::process::ChildStderr>>,
}

impl Running {
    /// Starts `command` with its stderr read by us.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        Self { child, lines }
    }

    /// The next line of stderr that holds `what`; what was said if none does.
    pub fn until(&mut self, what: &str) -> String {
        let mut said = Vec::new();
        for line in self.lines.by_ref().map_while(Result::ok) {
            if line.contains(what) {
                return line;
            }
            said.push(line);
        }
        panic!("{what:?} was not said, but:\n{}", said.join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `ashlar serve` on a free port; its base URL and the model's name.
pub fn served(home: &Path, model: &str) -> (Running, String, String) {
    served_with(home, &["--model", model])
}

/// The same with other arguments than a model.
pub fn served_with(home: &Path, more: &[&str]) -> (Running, String, String) {
    let args: Vec<&str> = ["serve", "--json", "--listen", "127.0.0.1:0"].into_iter().chain(more.iter().copied()).collect();
    let mut running = Running::start(&mut ashlar(home, &args));
    let mut first = String::new();
    let stdout = running.child.stdout.take().expect("piped");
    BufReader::new(stdout).read_line(&mut first).expect("a line");
    let value: Value = serde_json::from_str(&first).unwrap_or_else(|e| {
        panic!("{e}: {first:?} {:?}", running.lines.by_ref().map_while(Result::ok).collect::<Vec<_>>())
    });
    let get = |k: &str| value[k].as_str().expect("text").to_owned();
    (running, format!("http://{}", get("address")), get("model"))
}

/// Runs a peer script with `input` on stdin; its last line of stdout as JSON.
pub fn script(python: &Path, name: &str, args: &[&str], input: &str) -> Value {
    let mut child = Command::new(python)
        .arg(root().join("xtask/peers").join(name))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python starts");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("stdin");
    let out = child.wait_with_output().expect("ends");
    assert!(out.status.success(), "{name}: {}", said(&out));
    let text = String::from_utf8_lossy(&out.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap_or_else(|e| panic!("{name}: {e}: {text}"))
}
