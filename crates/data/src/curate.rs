//! From sources to the documents that are kept, with a decision for each.
//!
//! The order of the rules is that of [`OPS`]; the first that fails is the
//! reason. Boilerplate lines are taken out before anything is measured, and
//! recorded; personal data and secrets are taken out of what is kept. Copies
//! are sought over *all* documents, so that a takedown reaches every sibling,
//! also one that another rule drops today.

use crate::{
    CurateConfig, DataError, OnBad,
    dedup::{self, Pairs},
    functions, repetition,
    source::{self, Ingested, Raw},
    table::{self, Table},
};
use ashlar_core::Digest;
use ashlar_store::Observation;
use ashlar_text::detect;
use datafusion::{
    arrow::{
        array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, StringArray, UInt64Array},
        datatypes::{Float64Type, UInt64Type},
    },
    datasource::MemTable,
    functions_nested::expr_fn::array_element,
    logical_expr::{Expr, when},
    prelude::{ParquetReadOptions, SessionConfig, SessionContext, col, lit},
};
use serde::Serialize;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashSet},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The rules in the order they are applied, each with its version.
pub const OPS: [(&str, u32); 8] = [
    ("taken_down", 1),
    ("opt_out", 1),
    ("licence", 1),
    ("language", 1),
    ("length", 1),
    ("repetition", 1),
    ("exact_duplicate", 1),
    ("near_duplicate", 1),
];

/// What curation did.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct CurateReport {
    /// Documents read.
    pub raw: u64,
    /// Documents kept; `kept` plus all of `dropped` is `raw`.
    pub kept: u64,
    /// Documents dropped, by the rule that did it.
    pub dropped: BTreeMap<String, u64>,
    /// Findings replaced by tags in kept documents, by kind.
    pub redactions: BTreeMap<String, u64>,
    /// Kept documents with at least one of them.
    pub redacted_documents: u64,
    /// Kept documents by language.
    pub languages: BTreeMap<String, u64>,
    /// Different lines that are boilerplate.
    pub boilerplate_lines: u64,
    /// Documents that lost at least one line to it.
    pub boilerplate_documents: u64,
    /// Documents that are a copy of a representative.
    pub siblings: u64,
    /// Documents in the largest cluster of copies.
    pub largest_cluster: u64,
    /// Pairs whose similarity was computed.
    pub candidate_pairs: u64,
    /// Malformed lines set aside.
    pub quarantined: u64,
    /// Files of other kinds, passed over.
    pub ignored: Vec<String>,
}

/// A document as it goes into packing: scrubbed, without boilerplate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptDoc {
    /// Digest of the raw text.
    pub doc: Digest,
    /// Its id in the corpus.
    pub id: String,
    /// Its title, scrubbed.
    pub title: String,
    /// Its text, scrubbed.
    pub text: String,
    /// ISO 639-1 code, where known.
    pub lang: Option<String>,
}

/// What was measured of one row.
struct Measured {
    consent: String,
    lang: Option<String>,
    confidence: Option<f64>,
    words: u64,
    repetition: Vec<f64>,
    removed: Vec<u64>,
    key: String,
}

/// Why a row was dropped.
struct Drop {
    op: &'static str,
    reason: String,
    score: Option<f64>,
}

/// Reads `sources` (folders, or `.jsonl`, `.txt`, `.md` files) and writes to
/// the folder `out`: `raw`, `attributes`, `decisions`, `kept` and
/// `siblings.parquet`, and `quarantine.jsonl` when lines are set aside.
///
/// `taken_down` documents go, with every copy of them. The bytes written depend
/// neither on `partitions` nor on the order of `sources`.
///
/// # Errors
/// [`DataError::Setting`], [`DataError::Malformed`], [`DataError::NoDocuments`]
/// and [`DataError::Io`] for what is handed in; the others are faults of ours.
pub async fn curate(
    config: &CurateConfig,
    sources: &[PathBuf],
    taken_down: &[Digest],
    out: &Path,
    partitions: usize,
) -> Result<CurateReport, DataError> {
    config.check()?;
    let ingested = source::ingest(sources, config.on_bad, config.text_licence.as_deref())?;
    std::fs::create_dir_all(out).map_err(table::io(out))?;
    write_quarantine(&ingested, config.on_bad, out)?;
    let raw = &ingested.documents;
    write_raw(raw, &out.join("raw.parquet"))?;

    let session = session(partitions);
    let path = out.join("raw.parquet");
    session
        .register_parquet("raw", path.to_string_lossy(), ParquetReadOptions::default())
        .await?;
    let boilerplate = boilerplate(&session, config, raw).await?;
    let measured = measure(&session, config, &boilerplate, raw.len()).await?;
    let keys: Vec<String> = measured.iter().map(|m| m.key.clone()).collect();
    let pairs = dedup::pairs(&session, &keys, &config.minhash).await?;

    let copies = Copies::new(raw, &pairs);
    let closure = copies.closure(raw, taken_down);
    let mut drops = filter(&session, config, &closure, raw, &measured).await?;
    deduplicate(raw, &pairs, &mut drops);

    let mut report = CurateReport {
        raw: raw.len() as u64,
        boilerplate_lines: boilerplate.len() as u64,
        boilerplate_documents: measured.iter().filter(|m| !m.removed.is_empty()).count() as u64,
        candidate_pairs: pairs.candidates,
        quarantined: ingested.bad.len() as u64,
        ignored: ingested.ignored.clone(),
        ..CurateReport::default()
    };
    for drop in drops.iter().flatten() {
        *report.dropped.entry(drop.op.to_owned()).or_default() += 1;
    }
    let redactions = write_kept(&session, raw, &measured, &drops, out, &mut report).await?;
    write_attributes(raw, &measured, &redactions, &out.join("attributes.parquet"))?;
    write_decisions(raw, &drops, &out.join("decisions.parquet"))?;
    copies.write(raw, &pairs, &out.join("siblings.parquet"), &mut report)?;

    let dropped = report.dropped.values().sum();
    if report.kept + dropped != report.raw {
        return Err(DataError::Unbalanced {
            kept: report.kept,
            dropped,
            raw: report.raw,
        });
    }
    Ok(report)
}

fn session(partitions: usize) -> SessionContext {
    let mut config = SessionConfig::new()
        .with_target_partitions(partitions.max(1))
        // Documents are long rows: small batches spread over partitions.
        .with_batch_size(128);
    config
        .options_mut()
        .execution
        .parquet
        .schema_force_view_types = false;
    let session = SessionContext::new_with_config(config);
    functions::register(&session);
    session
}

/// The lines that stand in so many different documents that they say nothing
/// of any one of them, sorted.
async fn boilerplate(
    session: &SessionContext,
    config: &CurateConfig,
    raw: &[Raw],
) -> Result<Vec<String>, DataError> {
    let documents = raw.iter().map(|r| r.doc).collect::<BTreeSet<_>>().len();
    let share = (documents as f64 * config.boilerplate_share).ceil() as u64;
    let least = config.boilerplate_documents.max(share);
    let batches = session
        .sql(&format!(
            "SELECT line FROM (SELECT doc, unnest(text_lines(text)) AS line FROM raw) \
             GROUP BY line HAVING count(DISTINCT doc) >= {least}"
        ))
        .await?
        .collect()
        .await?;
    let mut lines: Vec<String> = batches
        .iter()
        .flat_map(|b| b.column(0).as_string::<i32>().iter().flatten())
        .map(str::to_owned)
        .collect();
    lines.sort();
    Ok(lines)
}

/// A text as an SQL literal.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Registers the table `documents` with the body and measures of each row, and
/// returns the measures by row.
async fn measure(
    session: &SessionContext,
    config: &CurateConfig,
    boilerplate: &[String],
    rows: usize,
) -> Result<Vec<Measured>, DataError> {
    let lines = quote(&boilerplate.join("\n"));
    let licences = quote(&config.licences.join("\n"));
    let confidence = config.language_confidence;
    let frame = session
        .sql(&format!(
            "SELECT row, doc, title, body, removed, consent, licence_allowed, \
                    words(body) AS words, repetition(body) AS repetition, \
                    text_key(body) AS key, confidence, \
                    CASE WHEN confidence >= {confidence:?} THEN found ELSE declared END AS lang \
             FROM (SELECT *, lang(body) AS found, lang_confidence(body) AS confidence \
                   FROM (SELECT row, doc, title, \
                                without_lines(text, {lines}) AS body, \
                                removed_lines(text, {lines}) AS removed, \
                                consent(consent) AS consent, \
                                licence_allowed(licence, {licences}) AS licence_allowed, \
                                lower(split_part(lang, '-', 1)) AS declared \
                         FROM raw))"
        ))
        .await?;
    let schema = Arc::clone(frame.schema().inner());
    let parts = frame.collect_partitioned().await?;
    let mut out: Vec<Option<Measured>> = (0..rows).map(|_| None).collect();
    for batch in parts.iter().flatten() {
        let column = |name: &str| {
            batch
                .column_by_name(name)
                .ok_or_else(|| DataError::Engine(missing(name)))
        };
        let row = column("row")?.as_primitive::<UInt64Type>();
        let consent = column("consent")?.as_string::<i32>();
        let lang = column("lang")?.as_string::<i32>();
        let confidence = column("confidence")?.as_primitive::<Float64Type>();
        let words = column("words")?.as_primitive::<UInt64Type>();
        let repetition = column("repetition")?.as_list::<i32>();
        let removed = column("removed")?.as_list::<i32>();
        let key = column("key")?.as_string::<i32>();
        for i in 0..batch.num_rows() {
            let text = |a: &StringArray| a.is_valid(i).then(|| a.value(i).to_owned());
            let at = row.value(i) as usize;
            let Some(slot) = out.get_mut(at) else {
                return Err(DataError::Engine(missing("row")));
            };
            *slot = Some(Measured {
                consent: consent.value(i).to_owned(),
                lang: text(lang),
                confidence: confidence.is_valid(i).then(|| confidence.value(i)),
                words: words.value(i),
                repetition: repetition
                    .value(i)
                    .as_primitive::<Float64Type>()
                    .values()
                    .to_vec(),
                removed: removed
                    .value(i)
                    .as_primitive::<UInt64Type>()
                    .values()
                    .to_vec(),
                key: key.value(i).to_owned(),
            });
        }
    }
    session.register_table("documents", Arc::new(MemTable::try_new(schema, parts)?))?;
    let out: Option<Vec<Measured>> = out.into_iter().collect();
    out.ok_or_else(|| DataError::Engine(missing("row")))
}

fn missing(column: &str) -> datafusion::error::DataFusionError {
    datafusion::error::DataFusionError::Internal(format!("column {column} is not complete"))
}

/// Clusters of copies over all documents.
struct Copies {
    /// Class → smallest class of its cluster.
    cluster: BTreeMap<usize, usize>,
    /// Row → cluster.
    of: Vec<usize>,
    /// Cluster → the row that stands for it: the smallest by [`precedence`].
    representative: BTreeMap<usize, usize>,
}

/// What decides which copy stays, the least first: the longest in bytes, then the
/// smallest id, then the smallest digest. It depends on no order of reading.
fn precedence<'a>(
    row: usize,
    raw: &'a [Raw],
) -> (Reverse<usize>, &'a str, &'a Digest, &'a str, u64) {
    let document = &raw[row];
    (
        Reverse(document.text.len()),
        &document.id,
        &document.doc,
        &document.source,
        document.line,
    )
}

impl Copies {
    fn new(raw: &[Raw], pairs: &Pairs) -> Self {
        let cluster = dedup::clusters(pairs.class.iter().copied(), &pairs.edges);
        let of: Vec<usize> = pairs.class.iter().map(|c| cluster[c]).collect();
        let mut representative = BTreeMap::new();
        for (row, cluster) in of.iter().enumerate() {
            let best = representative.entry(*cluster).or_insert(row);
            if precedence(row, raw) < precedence(*best, raw) {
                *best = row;
            }
        }
        Self {
            cluster,
            of,
            representative,
        }
    }

    /// The documents in a cluster with one that is taken down, each with that
    /// one.
    fn closure(&self, raw: &[Raw], taken_down: &[Digest]) -> BTreeMap<Digest, Digest> {
        let taken: HashSet<&Digest> = taken_down.iter().collect();
        let mut cause: BTreeMap<usize, Digest> = BTreeMap::new();
        for (row, document) in raw.iter().enumerate() {
            if taken.contains(&document.doc) {
                cause.entry(self.of[row]).or_insert(document.doc);
            }
        }
        raw.iter()
            .zip(&self.of)
            .filter_map(|(r, cluster)| {
                let cause = *cause.get(cluster)?;
                Some((r.doc, if taken.contains(&r.doc) { r.doc } else { cause }))
            })
            .collect()
    }

    /// Writes each copy with its representative and their similarity.
    fn write(
        &self,
        raw: &[Raw],
        pairs: &Pairs,
        path: &Path,
        report: &mut CurateReport,
    ) -> Result<(), DataError> {
        let mut rows = BTreeMap::new();
        let mut sizes: BTreeMap<usize, BTreeSet<Digest>> = BTreeMap::new();
        for (row, document) in raw.iter().enumerate() {
            let head = self.representative[&self.of[row]];
            sizes.entry(self.of[row]).or_default().insert(document.doc);
            if raw[head].doc != document.doc {
                let similarity = pairs.similarity(pairs.class[row], pairs.class[head]);
                rows.insert(document.doc, (raw[head].doc, similarity));
            }
        }
        report.siblings = rows.len() as u64;
        report.largest_cluster = sizes.values().map(|s| s.len() as u64).max().unwrap_or(0);
        debug_assert_eq!(
            self.cluster.len(),
            pairs.class.iter().collect::<BTreeSet<_>>().len()
        );
        let of = |f: &dyn Fn(&(Digest, (Digest, f64))) -> String| -> ArrayRef {
            let rows: Vec<String> = rows.iter().map(|(a, b)| f(&(*a, *b))).collect();
            Arc::new(StringArray::from(rows))
        };
        let similarity: Float64Array = rows.values().map(|r| Some(r.1)).collect();
        let batch = table::table(vec![
            ("doc", of(&|r| r.0.to_string())),
            ("representative", of(&|r| r.1.0.to_string())),
            ("similarity", Arc::new(similarity)),
        ])?;
        table::write(path, &batch)
    }
}

/// Applies the rules that look at one document alone; `None` for those that
/// pass.
async fn filter(
    session: &SessionContext,
    config: &CurateConfig,
    closure: &BTreeMap<Digest, Digest>,
    raw: &[Raw],
    measured: &[Measured],
) -> Result<Vec<Option<Drop>>, DataError> {
    let texts = |list: &mut dyn Iterator<Item = String>| list.map(lit).collect::<Vec<Expr>>();
    let taken = texts(&mut closure.keys().map(Digest::to_string));
    let languages = texts(&mut config.languages.iter().cloned());
    let mut repetitive = lit(false);
    for (i, (name, _)) in repetition::MEASURES.iter().enumerate() {
        if let Some(most) = config.repetition.get(*name) {
            let share = array_element(col("repetition"), lit(i as i64 + 1));
            repetitive = repetitive.or(share.gt(lit(*most)));
        }
    }
    let foreign = if languages.is_empty() {
        lit(false)
    } else {
        col("lang")
            .is_null()
            .or(col("lang").in_list(languages, true))
    };
    let (min, max) = (lit(config.min_words), lit(config.max_words));
    let op = when(col("doc").in_list(taken, false), lit("taken_down"))
        .when(col("consent").eq(lit("opt-out")), lit("opt_out"))
        .when(col("licence_allowed").eq(lit(false)), lit("licence"))
        .when(foreign, lit("language"))
        .when(col("words").lt(min).or(col("words").gt(max)), lit("length"))
        .when(repetitive, lit("repetition"))
        .end()?;
    let batches = session
        .table("documents")
        .await?
        .select(vec![col("row"), op.alias("op")])?
        .collect()
        .await?;
    let mut out: Vec<Option<Drop>> = raw.iter().map(|_| None).collect();
    for batch in &batches {
        let rows = batch.column(0).as_primitive::<UInt64Type>().values();
        let ops = batch.column(1).as_string::<i32>();
        for (row, op) in rows.iter().zip(ops.iter()) {
            let row = *row as usize;
            out[row] = op.map(|op| explain(op, config, closure, &raw[row], &measured[row]));
        }
    }
    Ok(out)
}

/// The reason, with its numbers, that rule `op` dropped a document.
fn explain(
    op: &str,
    config: &CurateConfig,
    closure: &BTreeMap<Digest, Digest>,
    raw: &Raw,
    measured: &Measured,
) -> Drop {
    let (op, reason, score) = match op {
        "taken_down" => match closure.get(&raw.doc) {
            Some(cause) if *cause != raw.doc => {
                ("taken_down", format!("copy of taken-down {cause}"), None)
            }
            _ => ("taken_down", "taken down".to_owned(), None),
        },
        "opt_out" => {
            let said = raw.consent.as_deref().unwrap_or_default();
            ("opt_out", format!("consent is {said:?}"), None)
        }
        "licence" => {
            let reason = match &raw.licence {
                None => "licence is unknown".to_owned(),
                Some(l) if config.licences.is_empty() => format!("licence {l:?} names none"),
                Some(l) => format!("licence {l:?} is not in {}", config.licences.join(", ")),
            };
            ("licence", reason, None)
        }
        "language" => {
            let is = match &measured.lang {
                Some(l) => format!("language {l} is not in {}", config.languages.join(", ")),
                None => "language not recognised and not declared".to_owned(),
            };
            ("language", is, measured.confidence)
        }
        "length" => {
            let (n, min, max) = (measured.words, config.min_words, config.max_words);
            (
                "length",
                format!("{n} words, allowed {min} to {max}"),
                Some(n as f64),
            )
        }
        _ => {
            let worst = repetition::MEASURES
                .iter()
                .zip(&measured.repetition)
                .filter_map(|((name, _), share)| {
                    let most = config.repetition.get(*name)?;
                    (share > most).then_some((name, *share, *most))
                })
                .max_by(|a, b| (a.1 - a.2).total_cmp(&(b.1 - b.2)));
            let (reason, score) = match worst {
                Some((name, share, most)) => (format!("{name} {share:.3} is over {most}"), share),
                None => (String::new(), 0.0),
            };
            ("repetition", reason, Some(score))
        }
    };
    Drop { op, reason, score }
}

/// Drops, among what passed so far, all but one of each cluster of copies.
fn deduplicate(raw: &[Raw], pairs: &Pairs, drops: &mut [Option<Drop>]) {
    let mut of_class: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for row in 0..raw.len() {
        if drops[row].is_none() {
            of_class.entry(pairs.class[row]).or_default().push(row);
        }
    }
    let mut head: BTreeMap<usize, usize> = BTreeMap::new();
    for (class, rows) in &mut of_class {
        rows.sort_by_key(|r| precedence(*r, raw));
        head.insert(*class, rows[0]);
        for row in &rows[1..] {
            drops[*row] = Some(Drop {
                op: "exact_duplicate",
                reason: format!("same text as {:?}", raw[rows[0]].id),
                score: Some(1.0),
            });
        }
    }
    let cluster = dedup::clusters(head.keys().copied(), &pairs.edges);
    let mut stays: BTreeMap<usize, usize> = BTreeMap::new();
    for (class, root) in &cluster {
        let best = stays.entry(*root).or_insert(head[class]);
        if precedence(head[class], raw) < precedence(*best, raw) {
            *best = head[class];
        }
    }
    // The nearest other member, which is the proof of the drop.
    let mut nearest: BTreeMap<usize, (f64, usize)> = BTreeMap::new();
    for &(a, b, similarity) in &pairs.edges {
        if head.contains_key(&a) && head.contains_key(&b) {
            for (from, to) in [(a, b), (b, a)] {
                let best = nearest.entry(from).or_insert((similarity, to));
                if similarity > best.0 {
                    *best = (similarity, to);
                }
            }
        }
    }
    for (class, root) in &cluster {
        let (row, kept) = (head[class], stays[root]);
        if row != kept {
            let (score, near) = nearest.get(class).copied().unwrap_or((0.0, *class));
            let near = &raw[head[&near]].id;
            let kept = &raw[kept].id;
            drops[row] = Some(Drop {
                op: "near_duplicate",
                reason: format!(
                    "Jaccard {score:.3} with {near:?}; {kept:?} stands for the cluster"
                ),
                score: Some(score),
            });
        }
    }
}

fn write_quarantine(ingested: &Ingested, on_bad: OnBad, out: &Path) -> Result<(), DataError> {
    if on_bad == OnBad::Error {
        return Ok(());
    }
    let path = out.join("quarantine.jsonl");
    table::replace(&path, |file| {
        for bad in &ingested.bad {
            let line = serde_json::to_string(bad).map_err(|e| DataError::Io {
                path: path.clone(),
                source: e.into(),
            })?;
            writeln!(file, "{line}").map_err(table::io(&path))?;
        }
        Ok(())
    })
}

fn texts<'a, T: 'a>(rows: &'a [T], f: impl Fn(&'a T) -> Option<&'a str>) -> ArrayRef {
    Arc::new(rows.iter().map(f).collect::<StringArray>())
}

fn docs<'a>(rows: impl Iterator<Item = &'a Raw>) -> ArrayRef {
    Arc::new(
        rows.map(|r| Some(r.doc.to_string()))
            .collect::<StringArray>(),
    )
}

fn row_numbers(n: usize) -> ArrayRef {
    Arc::new((0..n as u64).map(Some).collect::<UInt64Array>())
}

fn write_raw(raw: &[Raw], path: &Path) -> Result<(), DataError> {
    let lines: UInt64Array = raw.iter().map(|r| Some(r.line)).collect();
    let batch = table::table(vec![
        ("row", row_numbers(raw.len())),
        ("doc", docs(raw.iter())),
        ("source", texts(raw, |r| Some(&r.source))),
        ("line", Arc::new(lines)),
        ("id", texts(raw, |r| Some(&r.id))),
        ("title", texts(raw, |r| Some(&r.title))),
        ("text", texts(raw, |r| Some(&r.text))),
        ("licence", texts(raw, |r| r.licence.as_deref())),
        ("consent", texts(raw, |r| r.consent.as_deref())),
        ("lang", texts(raw, |r| r.lang.as_deref())),
        ("attributes", texts(raw, |r| r.attributes.as_deref())),
    ])?;
    table::write(path, &batch)
}

fn write_attributes(
    raw: &[Raw],
    measured: &[Measured],
    redactions: &BTreeMap<usize, String>,
    path: &Path,
) -> Result<(), DataError> {
    let words: UInt64Array = measured.iter().map(|m| Some(m.words)).collect();
    let confidence: Float64Array = measured.iter().map(|m| m.confidence).collect();
    let removed: StringArray = measured
        .iter()
        .map(|m| (!m.removed.is_empty()).then(|| format!("{:?}", m.removed)))
        .collect();
    let redacted: StringArray = (0..raw.len())
        .map(|r| redactions.get(&r).cloned())
        .collect();
    let mut columns: Vec<(&str, ArrayRef)> = vec![
        ("row", row_numbers(raw.len())),
        ("doc", docs(raw.iter())),
        ("key", texts(measured, |m| Some(&m.key))),
        ("consent", texts(measured, |m| Some(&m.consent))),
        ("lang", texts(measured, |m| m.lang.as_deref())),
        ("lang_confidence", Arc::new(confidence)),
        ("words", Arc::new(words)),
        ("boilerplate", Arc::new(removed)),
        ("redactions", Arc::new(redacted)),
    ];
    for (i, (name, _)) in repetition::MEASURES.iter().enumerate() {
        let shares: Float64Array = measured
            .iter()
            .map(|m| m.repetition.get(i).copied())
            .collect();
        columns.push((name, Arc::new(shares)));
    }
    table::write(path, &table::table(columns)?)
}

fn write_decisions(raw: &[Raw], drops: &[Option<Drop>], path: &Path) -> Result<(), DataError> {
    let lines: UInt64Array = raw.iter().map(|r| Some(r.line)).collect();
    let kept: BooleanArray = drops.iter().map(|d| Some(d.is_none())).collect();
    let version = |op| {
        OPS.iter()
            .find(|(name, _)| *name == op)
            .map(|(_, v)| u64::from(*v))
    };
    let versions: UInt64Array = drops
        .iter()
        .map(|d| d.as_ref().and_then(|d| version(d.op)))
        .collect();
    let scores: Float64Array = drops
        .iter()
        .map(|d| d.as_ref().and_then(|d| d.score))
        .collect();
    let batch = table::table(vec![
        ("row", row_numbers(raw.len())),
        ("doc", docs(raw.iter())),
        ("source", texts(raw, |r| Some(&r.source))),
        ("line", Arc::new(lines)),
        ("id", texts(raw, |r| Some(&r.id))),
        ("kept", Arc::new(kept)),
        ("op", texts(drops, |d| d.as_ref().map(|d| d.op))),
        ("version", Arc::new(versions)),
        (
            "reason",
            texts(drops, |d| d.as_ref().map(|d| d.reason.as_str())),
        ),
        ("score", Arc::new(scores)),
    ])?;
    table::write(path, &batch)
}

/// Scrubs and writes what is kept; the counts of redactions by row.
async fn write_kept(
    session: &SessionContext,
    raw: &[Raw],
    measured: &[Measured],
    drops: &[Option<Drop>],
    out: &Path,
    report: &mut CurateReport,
) -> Result<BTreeMap<usize, String>, DataError> {
    let rows = (0..raw.len()).filter(|r| drops[*r].is_none());
    session.register_batch("survivors", dedup::row_table(rows.map(|r| r as u64))?)?;
    let batches = session
        .sql(
            "SELECT d.row, redact(d.body), redact(d.title), \
                    redactions(concat(d.title, chr(10), d.body)) \
             FROM documents d JOIN survivors s ON d.row = s.row",
        )
        .await?
        .collect()
        .await?;
    let (mut scrubbed, mut counts) = (BTreeMap::new(), BTreeMap::new());
    for batch in &batches {
        let rows = batch.column(0).as_primitive::<UInt64Type>().values();
        let [body, title, found] = [1, 2, 3].map(|i| batch.column(i).as_string::<i32>());
        for (i, row) in rows.iter().enumerate() {
            let row = *row as usize;
            scrubbed.insert(row, (body.value(i).to_owned(), title.value(i).to_owned()));
            let found = found.value(i);
            if found != "{}" {
                counts.insert(row, found.to_owned());
            }
        }
    }
    report.kept = scrubbed.len() as u64;
    report.redacted_documents = counts.len() as u64;
    for found in counts.values() {
        let found: BTreeMap<String, u64> = serde_json::from_str(found)
            .map_err(|e| DataError::Engine(missing(&format!("redactions: {e}"))))?;
        for (kind, n) in found {
            *report.redactions.entry(kind).or_default() += n;
        }
    }
    for row in scrubbed.keys() {
        let lang = measured[*row].lang.as_deref().unwrap_or("unknown");
        *report.languages.entry(lang.to_owned()).or_default() += 1;
    }
    let rows: Vec<(usize, (String, String))> = scrubbed.into_iter().collect();
    let batch = table::table(vec![
        ("doc", docs(rows.iter().map(|r| &raw[r.0]))),
        ("id", texts(&rows, |r| Some(&raw[r.0].id))),
        ("title", texts(&rows, |r| Some(&r.1.1))),
        ("text", texts(&rows, |r| Some(&r.1.0))),
        ("lang", texts(&rows, |r| measured[r.0].lang.as_deref())),
        ("licence", texts(&rows, |r| raw[r.0].licence.as_deref())),
        ("source", texts(&rows, |r| Some(&raw[r.0].source))),
    ])?;
    table::write(&out.join("kept.parquet"), &batch)?;
    Ok(counts)
}

/// Reads what [`curate`] kept, from its folder or from `kept.parquet` itself.
///
/// # Errors
/// [`DataError::Io`], [`DataError::Parquet`] or [`DataError::Table`].
pub fn read_kept(path: &Path) -> Result<Vec<KeptDoc>, DataError> {
    let table = Table::read(&table::locate(path, "kept.parquet"))?;
    let columns = table.digests("doc")?.into_iter();
    let columns = columns
        .zip(table.texts("id")?)
        .zip(table.texts("title")?)
        .zip(table.texts("text")?)
        .zip(table.strings("lang")?);
    Ok(columns
        .map(|((((doc, id), title), text), lang)| KeptDoc {
            doc,
            id,
            title,
            text,
            lang,
        })
        .collect())
}

/// Reads where each document was seen, dropped ones too, from the folder that
/// [`curate`] wrote or from its `raw.parquet`.
///
/// # Errors
/// As [`read_kept`].
pub fn read_observations(path: &Path) -> Result<Vec<Observation>, DataError> {
    let table = Table::read(&table::locate(path, "raw.parquet"))?;
    let columns = table.digests("doc")?.into_iter();
    let columns = columns
        .zip(table.texts("source")?)
        .zip(table.texts("id")?)
        .zip(table.texts("title")?)
        .zip(table.strings("licence")?)
        .zip(table.strings("consent")?)
        .zip(table.strings("lang")?);
    Ok(columns
        .map(
            |((((((doc, source), id), title), licence), consent), lang)| Observation {
                doc,
                source,
                id,
                // Observations go to the ledger, where nothing personal belongs.
                title: detect::redact(&title).0,
                licence,
                consent: consent.unwrap_or_else(|| "unknown".to_owned()),
                lang,
            },
        )
        .collect())
}

/// Reads each copy with the document that stands for it, from the folder that
/// [`curate`] wrote or from its `siblings.parquet`.
///
/// # Errors
/// As [`read_kept`].
pub fn read_siblings(path: &Path) -> Result<Vec<(Digest, Digest)>, DataError> {
    let table = Table::read(&table::locate(path, "siblings.parquet"))?;
    let heads = table.digests("representative")?;
    Ok(table.digests("doc")?.into_iter().zip(heads).collect())
}
