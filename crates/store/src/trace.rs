//! Traces: the part of the lineage graph that one thing stands on and leads to.
//!
//! Edges point the way data flowed: document → artifact → run → artifact →
//! release → response. A trace says what was exposed to what; it never claims
//! that a document caused an answer.

use crate::{
    StoreError,
    document::observation_of,
    ledger::{Store, artifact_of, digest_of, parse_digest},
    lineage::Graph,
    release::release_of,
    response::{ResponseRow, response_of},
};
use ashlar_core::{Digest, clock::rfc3339};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::Row as _;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt::Write as _,
};

/// Documents or responses of one parent that the text and the picture show.
const SHOWN: usize = 12;

/// A thing an id can mean.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Thing {
    Response(String),
    Release(String),
    Run(String),
    Document(Digest),
    Artifact(Digest),
}

impl Thing {
    fn id(&self) -> String {
        match self {
            Self::Response(id) | Self::Release(id) | Self::Run(id) => id.clone(),
            Self::Document(d) | Self::Artifact(d) => d.to_string(),
        }
    }
}

/// One thing of a trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Node {
    /// Response, release or run id, or digest.
    pub id: String,
    /// `response`, `release`, `run`, `document`, an artifact kind, or `unknown`
    /// for an input that was never stored.
    pub kind: String,
    /// One line for people.
    pub label: String,
    /// What the ledger has on it.
    pub detail: Value,
}

/// One step of the data from a thing to the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Edge {
    /// Where the data came from.
    pub from: String,
    /// Where it went.
    pub to: String,
    /// In which role.
    pub role: String,
}

/// The graph around one thing. Nodes and edges come in the order in which the
/// walk met them, which depends on the ledger's content alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trace {
    /// The id of the thing asked for, in full.
    pub root: String,
    /// Everything met, the root first.
    pub nodes: Vec<Node>,
    /// How it hangs together.
    pub edges: Vec<Edge>,
}

impl Store {
    /// All that `id` can mean; names in full win over prefixes.
    pub(crate) async fn candidates(&self, id: &str) -> Result<BTreeSet<Thing>, StoreError> {
        let mut found = BTreeSet::new();
        for (table, thing) in [
            ("response", Thing::Response as fn(String) -> Thing),
            ("release", Thing::Release),
            ("run", Thing::Run),
        ] {
            let hit: Option<String> =
                sqlx::query_scalar(&format!("SELECT id FROM {table} WHERE id = $1"))
                    .bind(id)
                    .fetch_optional(self.pool())
                    .await?;
            found.extend(hit.map(thing));
        }
        let named: Vec<String> =
            sqlx::query_scalar("SELECT DISTINCT doc FROM observation WHERE id = $1")
                .bind(id)
                .fetch_all(self.pool())
                .await?;
        for doc in named {
            found.insert(Thing::Document(parse_digest(&doc)?));
        }
        let hex = id.strip_prefix("sha256:").unwrap_or(id);
        let is_hex = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !found.is_empty() || !is_hex || !(6..=64).contains(&hex.len()) {
            return Ok(found);
        }
        // "g" sorts after every hex digit, so this range is the prefix.
        let (low, high) = (format!("sha256:{hex}"), format!("sha256:{hex}g"));
        let within = async |table: &str, column: &str| {
            sqlx::query_scalar::<_, String>(&format!(
                "SELECT DISTINCT {column} FROM {table} WHERE {column} >= $1 AND {column} < $2 ORDER BY {column} LIMIT 21"
            ))
            .bind(&low)
            .bind(&high)
            .fetch_all(self.pool())
            .await
        };
        for (table, column) in [
            ("observation", "doc"),
            ("exposure", "doc"),
            ("sibling", "doc"),
            ("sibling", "representative"),
            ("takedown", "doc"),
        ] {
            for doc in within(table, column).await? {
                found.insert(Thing::Document(parse_digest(&doc)?));
            }
        }
        for digest in within("artifact", "digest").await? {
            let digest = parse_digest(&digest)?;
            // A document whose raw bytes are also stored is asked for as a document.
            if !found.contains(&Thing::Document(digest)) {
                found.insert(Thing::Artifact(digest));
            }
        }
        Ok(found)
    }

    /// Everything that the thing called `id` stands on and leads to: for a
    /// response upwards, for a document (and its near-duplicates) downwards, for
    /// the rest both. `id` is a response, run or release id, a document's id in
    /// its corpus, a digest, or at least 6 hex digits of one.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`] with the candidates.
    pub async fn trace(&self, id: &str) -> Result<Trace, StoreError> {
        let found = self.candidates(id).await?;
        let mut all = found.iter();
        let root = match (all.next(), all.next()) {
            (None, _) => return Err(StoreError::NotFound(id.into())),
            (Some(root), None) => root.clone(),
            _ => {
                let candidates = found.iter().take(20).map(Thing::id).collect();
                return Err(StoreError::Ambiguous {
                    id: id.into(),
                    candidates,
                });
            }
        };
        let mut walk = Walk {
            store: self,
            graph: self.graph().await?,
            nodes: Vec::new(),
            edges: Vec::new(),
        };
        walk.nodes.push(root.clone());
        if !matches!(root, Thing::Document(_)) {
            walk.up(&root).await?;
        }
        if !matches!(root, Thing::Response(_)) {
            walk.down(&root).await?;
        }
        walk.finish(root.id()).await
    }
}

struct Walk<'a> {
    store: &'a Store,
    graph: Graph,
    nodes: Vec<Thing>,
    edges: Vec<(Thing, Thing, String)>,
}

impl Walk<'_> {
    /// From `root` against the flow of data.
    async fn up(&mut self, root: &Thing) -> Result<(), StoreError> {
        let mut seen = BTreeSet::from([root.clone()]);
        let mut open = vec![root.clone()];
        while let Some(at) = open.pop() {
            let sources = match &at {
                Thing::Response(id) => self.served_by(id).await?,
                Thing::Release(id) => self.released(id).await?,
                Thing::Run(id) => {
                    let reads = self.graph.reads.get(id).into_iter().flatten();
                    reads
                        .map(|(role, d)| (Thing::Artifact(*d), role.clone()))
                        .collect()
                }
                Thing::Artifact(digest) => {
                    let mut sources = Vec::new();
                    for run in self.graph.made_by.get(digest).into_iter().flatten() {
                        sources.push((Thing::Run(run.clone()), self.role(run, digest)));
                    }
                    for doc in self.held_by(digest).await? {
                        sources.push((Thing::Document(doc), "exposed".into()));
                    }
                    sources
                }
                Thing::Document(_) => Vec::new(),
            };
            let mut next = Vec::new();
            for (source, role) in sources {
                if seen.insert(source.clone()) {
                    self.nodes.push(source.clone());
                    next.push(source.clone());
                }
                self.edges.push((source, at.clone(), role));
            }
            open.extend(next.into_iter().rev());
        }
        Ok(())
    }

    /// From `root` with the flow of data.
    async fn down(&mut self, root: &Thing) -> Result<(), StoreError> {
        let mut seen = BTreeSet::from([root.clone()]);
        let mut open = vec![root.clone()];
        while let Some(at) = open.pop() {
            let mut targets = Vec::new();
            match &at {
                Thing::Document(doc) => {
                    if at == *root {
                        for sibling in self.store.sibling_closure(&[*doc]).await? {
                            if sibling != *doc {
                                targets
                                    .push((Thing::Document(sibling), "near-duplicate".to_string()));
                            }
                        }
                    }
                    for row in self
                        .store
                        .matching("exposure", "DISTINCT artifact", "doc", [doc.to_string()])
                        .await?
                    {
                        targets.push((
                            Thing::Artifact(digest_of(&row, "artifact")?),
                            "exposed".into(),
                        ));
                    }
                }
                Thing::Artifact(digest) => {
                    for run in self.graph.read_by.get(digest).into_iter().flatten() {
                        let reads = self.graph.reads.get(run).into_iter().flatten();
                        for (role, _) in reads.filter(|(_, d)| d == digest) {
                            targets.push((Thing::Run(run.clone()), role.clone()));
                        }
                    }
                    for role in ["model", "adapter", "snapshot", "evaluation", "statement"] {
                        for row in self
                            .store
                            .matching("release", "id", role, [digest.to_string()])
                            .await?
                        {
                            targets.push((Thing::Release(row.try_get("id")?), role.into()));
                        }
                    }
                    for row in self
                        .store
                        .matching("response", "id", "model", [digest.to_string()])
                        .await?
                    {
                        targets.push((Thing::Response(row.try_get("id")?), "served".into()));
                    }
                }
                Thing::Run(id) => {
                    let makes = self.graph.makes.get(id).into_iter().flatten();
                    targets.extend(makes.map(|(role, d)| (Thing::Artifact(*d), role.clone())));
                }
                Thing::Release(id) => {
                    for row in self
                        .store
                        .matching("response", "id", "release", [id.clone()])
                        .await?
                    {
                        targets.push((Thing::Response(row.try_get("id")?), "served".into()));
                    }
                }
                Thing::Response(_) => {}
            }
            targets.sort();
            let mut next = Vec::new();
            for (target, role) in targets {
                if seen.insert(target.clone()) {
                    self.nodes.push(target.clone());
                    next.push(target.clone());
                }
                self.edges.push((at.clone(), target, role));
            }
            open.extend(next.into_iter().rev());
        }
        Ok(())
    }

    fn role(&self, run: &str, digest: &Digest) -> String {
        let makes = self.graph.makes.get(run).into_iter().flatten();
        makes
            .filter(|(_, d)| d == digest)
            .map(|(role, _)| role.clone())
            .next()
            .unwrap_or_default()
    }

    async fn served_by(&self, response: &str) -> Result<Vec<(Thing, String)>, StoreError> {
        let Some(row) = self.store.response(response).await? else {
            return Ok(Vec::new());
        };
        let source = match row.admission.release {
            Some(release) => Thing::Release(release),
            None => match row.admission.model.parse() {
                Ok(digest) => Thing::Artifact(digest),
                Err(_) => return Ok(Vec::new()),
            },
        };
        Ok(vec![(source, "served".into())])
    }

    async fn released(&self, release: &str) -> Result<Vec<(Thing, String)>, StoreError> {
        let row = sqlx::query("SELECT * FROM release WHERE id = $1")
            .bind(release)
            .fetch_optional(self.store.pool())
            .await?;
        let Some(row) = row else {
            return Ok(Vec::new());
        };
        let r = release_of(&row)?;
        let parts = [
            (Some(r.model), "model"),
            (r.adapter, "adapter"),
            (r.snapshot, "snapshot"),
            (r.evaluation, "evaluation"),
            (Some(r.statement), "statement"),
        ];
        Ok(parts
            .into_iter()
            .filter_map(|(d, role)| Some((Thing::Artifact(d?), role.into())))
            .collect())
    }

    async fn held_by(&self, artifact: &Digest) -> Result<Vec<Digest>, StoreError> {
        let docs: Vec<String> = sqlx::query_scalar(
            "SELECT e.doc FROM (SELECT DISTINCT doc FROM exposure WHERE artifact = $1) AS e \
             LEFT JOIN (SELECT doc, MIN(id) AS id FROM observation GROUP BY doc) AS o ON o.doc = e.doc \
             ORDER BY o.id, e.doc",
        )
        .bind(artifact.to_string())
        .fetch_all(self.store.pool())
        .await?;
        docs.iter().map(|d| parse_digest(d)).collect()
    }

    /// Looks up what there is to say about each thing met.
    async fn finish(self, root: String) -> Result<Trace, StoreError> {
        let store = self.store;
        let ids = |want: fn(&Thing) -> bool| {
            self.nodes
                .iter()
                .filter(move |t| want(t))
                .map(Thing::id)
                .collect::<Vec<_>>()
        };
        let mut said: HashMap<(u8, String), (String, String, Value)> = HashMap::new();
        for row in store
            .matching(
                "artifact",
                "*",
                "digest",
                ids(|t| matches!(t, Thing::Artifact(_))),
            )
            .await?
        {
            let a = artifact_of(&row)?;
            let label = format!("{}, {}, {}", a.name, size(a.bytes), a.digest.short());
            said.insert(
                (0, a.digest.to_string()),
                (a.kind.to_string(), label, serde_json::to_value(&a)?),
            );
        }
        let mut seen_at: BTreeMap<Digest, Vec<_>> = BTreeMap::new();
        let docs = ids(|t| matches!(t, Thing::Document(_)));
        for row in store
            .matching("observation", "*", "doc", docs.iter().cloned())
            .await?
        {
            let o = observation_of(&row)?;
            seen_at.entry(o.doc).or_default().push(o);
        }
        let mut down = BTreeMap::new();
        for row in store
            .matching("takedown", "doc, reason", "doc", docs.iter().cloned())
            .await?
        {
            down.insert(digest_of(&row, "doc")?, row.try_get::<String, _>("reason")?);
        }
        for doc in &docs {
            let digest = parse_digest(doc)?;
            let mut observations = seen_at.remove(&digest).unwrap_or_default();
            observations.sort_by(|a, b| (&a.source, &a.id).cmp(&(&b.source, &b.id)));
            let mut label = match observations.first() {
                Some(o) if o.title.is_empty() => o.id.clone(),
                Some(o) => format!("{}, {}", o.id, o.title),
                None => digest.short(),
            };
            let reason = down.get(&digest);
            if reason.is_some() {
                label.push_str(" [taken down]");
            }
            let first = observations.first();
            let detail = json!({
                "doc": doc,
                "id": first.map(|o| &o.id),
                "title": first.map(|o| &o.title),
                "observations": observations,
                "taken_down": reason,
            });
            said.insert((1, doc.clone()), ("document".into(), label, detail));
        }
        for row in store
            .matching("run", "*", "id", ids(|t| matches!(t, Thing::Run(_))))
            .await?
        {
            let id: String = row.try_get("id")?;
            let (name, state): (String, String) = (row.try_get("name")?, row.try_get("state")?);
            let seconds: Option<f64> = row.try_get("seconds")?;
            let parse =
                |text: Option<String>| text.and_then(|t| serde_json::from_str::<Value>(&t).ok());
            let label = match seconds {
                Some(s) => format!("{name}, {state}, {s:.1} s, {id}"),
                None => format!("{name}, {state}, {id}"),
            };
            let detail = json!({
                "name": name,
                "state": state,
                "settings": parse(Some(row.try_get("settings")?)),
                "code": row.try_get::<String, _>("code")?,
                "host": row.try_get::<String, _>("host")?,
                "started_ms": row.try_get::<i64, _>("started_ms")?,
                "seconds": seconds,
                "summary": parse(row.try_get("summary")?),
                "error": row.try_get::<Option<String>, _>("error")?,
            });
            said.insert((2, id), ("run".into(), label, detail));
        }
        for row in store
            .matching(
                "release",
                "*",
                "id",
                ids(|t| matches!(t, Thing::Release(_))),
            )
            .await?
        {
            let r = release_of(&row)?;
            let label = format!(
                "{} → {}, {}, {}",
                r.channel,
                r.model.short(),
                rfc3339(r.created_ms),
                r.id
            );
            said.insert(
                (3, r.id.clone()),
                ("release".into(), label, serde_json::to_value(&r)?),
            );
        }
        for row in store
            .matching(
                "response",
                "*",
                "id",
                ids(|t| matches!(t, Thing::Response(_))),
            )
            .await?
        {
            let r = response_of(&row)?;
            said.insert(
                (4, r.admission.id.clone()),
                (
                    "response".into(),
                    response_label(&r),
                    serde_json::to_value(&r)?,
                ),
            );
        }
        let nodes = self.nodes.iter().fold(
            (Vec::new(), HashSet::new()),
            |(mut nodes, mut met), thing| {
                let id = thing.id();
                if met.insert(id.clone()) {
                    let table = match thing {
                        Thing::Artifact(_) => 0,
                        Thing::Document(_) => 1,
                        Thing::Run(_) => 2,
                        Thing::Release(_) => 3,
                        Thing::Response(_) => 4,
                    };
                    let (kind, label, detail) = said
                        .remove(&(table, id.clone()))
                        .unwrap_or_else(|| ("unknown".into(), id.clone(), Value::Null));
                    nodes.push(Node {
                        id,
                        kind,
                        label,
                        detail,
                    });
                }
                (nodes, met)
            },
        );
        let mut met = HashSet::new();
        let mut edges = Vec::new();
        for (from, to, role) in self.edges {
            let edge = (from.id(), to.id(), role);
            if met.insert(edge.clone()) {
                edges.push(Edge {
                    from: edge.0,
                    to: edge.1,
                    role: edge.2,
                });
            }
        }
        Ok(Trace {
            root,
            nodes: nodes.0,
            edges,
        })
    }
}

fn response_label(r: &ResponseRow) -> String {
    let end = match &r.settlement {
        Some(s) => format!(
            "{}, {} + {} tokens",
            s.finish, s.prompt_tokens, s.completion_tokens
        ),
        None => "running".into(),
    };
    format!(
        "{} {}, {end}, {}",
        r.admission.id,
        r.admission.endpoint,
        rfc3339(r.admission.at_ms)
    )
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// `text` without what could steer a terminal.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

impl Trace {
    /// Puts these documents first, in this order, and shows the second part (the
    /// span they share with an answer, say) with them. The first part is the
    /// document's digest or its id in the corpus; others are ignored.
    pub fn rank_documents(&mut self, order: &[(String, String)]) {
        let mut rank: HashMap<&str, (usize, &str)> = HashMap::new();
        for (i, (id, span)) in order.iter().enumerate() {
            rank.entry(id).or_insert((i, span));
        }
        let of = |node: &Node| {
            let by_id = node.detail.get("id").and_then(Value::as_str);
            (node.kind == "document")
                .then(|| rank.get(&*node.id).or_else(|| rank.get(by_id?)).copied())
                .flatten()
        };
        let mut places = Vec::new();
        let mut documents = Vec::new();
        for (i, node) in self
            .nodes
            .iter_mut()
            .enumerate()
            .filter(|(_, n)| n.kind == "document")
        {
            let found = of(node);
            if let (Some((_, span)), Value::Object(detail)) = (found, &mut node.detail) {
                detail.insert("span".into(), span.into());
            }
            places.push(i);
            documents.push((found.map_or(usize::MAX, |(i, _)| i), node.clone()));
        }
        documents.sort_by_key(|(rank, _)| *rank);
        for (place, (_, node)) in places.into_iter().zip(documents) {
            self.nodes[place] = node;
        }
    }

    fn index(&self) -> HashMap<&str, (usize, &Node)> {
        self.nodes
            .iter()
            .enumerate()
            .map(|(i, n)| (&*n.id, (i, n)))
            .collect()
    }

    /// As a tree: what the root stands on, then what it leads to. Long lists of
    /// documents and responses are cut to their first 12; JSON has them all.
    pub fn to_text(&self) -> String {
        let index = self.index();
        let mut out = String::new();
        let Some((_, root)) = index.get(&*self.root) else {
            return out;
        };
        let _ = writeln!(out, "{} {}", root.kind, plain(&root.label));
        for (title, up) in [("stands on", true), ("leads to", false)] {
            let mut next: HashMap<&str, Vec<&Edge>> = HashMap::new();
            for edge in &self.edges {
                let (at, _) = if up {
                    (&edge.to, &edge.from)
                } else {
                    (&edge.from, &edge.to)
                };
                next.entry(at).or_default().push(edge);
            }
            if next.contains_key(&*self.root) {
                let _ = writeln!(out, "{title}");
                let mut tree = Tree {
                    index: &index,
                    next,
                    up,
                    seen: HashSet::new(),
                    listed: HashSet::new(),
                    out: &mut out,
                };
                tree.seen.insert(&self.root);
                tree.children(&self.root, "");
            }
        }
        out.push_str("\"exposed to\" means: was among what this was made from. It does not say what caused an answer.\n");
        out
    }

    /// As a Graphviz digraph; long lists are cut as in [`Trace::to_text`].
    pub fn to_dot(&self) -> String {
        let quote = |text: &str| {
            format!(
                "\"{}\"",
                plain(text).replace('\\', "\\\\").replace('"', "\\\"")
            )
        };
        let index = self.index();
        let mut kept: HashSet<&str> = HashSet::new();
        let mut cut: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for kind in ["document", "response"] {
            let many = self
                .nodes
                .iter()
                .filter(|n| n.kind == kind && n.id != self.root);
            for (i, node) in many.enumerate() {
                if i < SHOWN {
                    kept.insert(&node.id);
                }
            }
        }
        let drawn = |n: &Node| {
            n.id == self.root
                || !matches!(&*n.kind, "document" | "response")
                || kept.contains(&*n.id)
        };
        let mut out = String::from(
            "digraph trace {\n  rankdir=LR;\n  node [shape=box, fontname=\"sans-serif\"];\n",
        );
        for node in self.nodes.iter().filter(|n| drawn(n)) {
            let style = match &*node.kind {
                "document" => ", shape=note",
                "run" => ", shape=ellipse",
                "release" | "response" => ", style=rounded",
                _ => "",
            };
            let bold = if node.id == self.root {
                ", penwidth=2"
            } else {
                ""
            };
            let _ = writeln!(
                out,
                "  {} [label={}{style}{bold}];",
                quote(&node.id),
                quote(&format!("{}: {}", node.kind, node.label))
            );
        }
        for edge in &self.edges {
            let (Some((_, from)), Some((_, to))) = (index.get(&*edge.from), index.get(&*edge.to))
            else {
                continue;
            };
            let role = if edge.role == "exposed" {
                "exposed to"
            } else {
                &*edge.role
            };
            if drawn(from) && drawn(to) {
                let _ = writeln!(
                    out,
                    "  {} -> {} [label={}];",
                    quote(&from.id),
                    quote(&to.id),
                    quote(role)
                );
            } else if drawn(to) {
                *cut.entry(("", &to.id)).or_default() += 1;
            } else if drawn(from) {
                *cut.entry((&from.id, "")).or_default() += 1;
            }
        }
        for (i, ((from, to), n)) in cut.into_iter().enumerate() {
            let more = format!("\"more {i}\"");
            let _ = writeln!(out, "  {more} [label=\"and {n} more\", shape=plaintext];");
            let (a, b) = if from.is_empty() {
                (more, quote(to))
            } else {
                (quote(from), more)
            };
            let _ = writeln!(out, "  {a} -> {b};");
        }
        out.push_str("}\n");
        out
    }
}

/// The text of one direction.
struct Tree<'a, 'o> {
    index: &'a HashMap<&'a str, (usize, &'a Node)>,
    next: HashMap<&'a str, Vec<&'a Edge>>,
    up: bool,
    seen: HashSet<&'a str>,
    /// Documents already listed under something further up the data.
    listed: HashSet<&'a str>,
    out: &'o mut String,
}

impl<'a> Tree<'a, '_> {
    fn children(&mut self, at: &'a str, indent: &str) {
        let edges = self.next.get(at).cloned().unwrap_or_default();
        let mut plain_ones: Vec<(&'a Node, &'a str)> = Vec::new();
        let mut many: BTreeMap<&'a str, Vec<(usize, &'a Node)>> = BTreeMap::new();
        for edge in edges {
            let other = if self.up { &*edge.from } else { &*edge.to };
            let Some(&(place, node)) = self.index.get(other) else {
                continue;
            };
            match &*node.kind {
                "document" if self.up => many.entry("document").or_default().push((place, node)),
                "response" if !self.up => many.entry("response").or_default().push((place, node)),
                _ => plain_ones.push((node, &edge.role)),
            }
        }
        let last_plain = plain_ones.len();
        let has_many = !many.is_empty();
        // Sources first, so that a document is listed where it entered.
        for (i, (node, role)) in plain_ones.into_iter().enumerate() {
            let last = i + 1 == last_plain && !has_many;
            let (branch, below) = if last {
                ("└─ ", "   ")
            } else {
                ("├─ ", "│  ")
            };
            let role = match role {
                "exposed" => "exposed to it: ".to_string(),
                _ if role == node.kind || role == "served" => String::new(),
                _ => format!("{role}: "),
            };
            let again = !self.seen.insert(&node.id);
            let more = again && self.next.contains_key(&*node.id);
            let note = if more { " (shown above)" } else { "" };
            let _ = writeln!(
                self.out,
                "{indent}{branch}{}{} {}{note}",
                plain(&role),
                node.kind,
                plain(&node.label)
            );
            if !again {
                self.children(&node.id, &format!("{indent}{below}"));
            }
        }
        for (kind, mut nodes) in many {
            nodes.sort_by_key(|(place, _)| *place);
            let total = nodes.len();
            let fresh: Vec<_> = nodes
                .into_iter()
                .filter(|(_, n)| self.listed.insert(&n.id))
                .collect();
            let s = if total == 1 { "" } else { "s" };
            let title = match kind {
                "document" => format!("exposed to {total} document{s}"),
                _ => format!("{total} response{s}"),
            };
            let note = match total - fresh.len() {
                0 => String::new(),
                above if above == total => ", listed above".into(),
                above => format!(", {above} of them listed above"),
            };
            let _ = writeln!(self.out, "{indent}└─ {title}{note}");
            let cut = fresh.len().saturating_sub(SHOWN);
            for (i, (_, node)) in fresh.iter().take(SHOWN).enumerate() {
                let branch = if i + 1 == fresh.len() {
                    "└─"
                } else {
                    "├─"
                };
                let span = node.detail.get("span").and_then(Value::as_str);
                let span = span.map_or(String::new(), |s| format!(" — shares {:?}", plain(s)));
                let _ = writeln!(self.out, "{indent}   {branch} {}{span}", plain(&node.label));
            }
            if cut > 0 {
                let _ = writeln!(self.out, "{indent}   └─ and {cut} more");
            }
        }
    }
}
