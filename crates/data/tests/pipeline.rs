//! The invariants of curation and packing, on corpora made here and on the
//! quickstart's.

#![allow(clippy::unwrap_used)] // a failed test is meant to panic

use ashlar_core::{Digest, Hint};
use ashlar_data::{
    CurateConfig, CurateReport, DataError, OPS, OnBad, curate, minhash, pack, read_kept,
    read_observations, read_pack, read_qa, read_siblings,
};
use ashlar_text::{ChatTemplate, GgufVocab, Tokenizer, detect};
use datafusion::arrow::array::{AsArray, RecordBatch};
use datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const FILES: [&str; 5] = [
    "raw.parquet",
    "attributes.parquet",
    "decisions.parquet",
    "kept.parquet",
    "siblings.parquet",
];

fn block<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .unwrap()
        .block_on(future)
}

fn run(
    config: &CurateConfig,
    sources: &[PathBuf],
    taken: &[Digest],
    out: &Path,
    partitions: usize,
) -> Result<CurateReport, DataError> {
    block(curate(config, sources, taken, out, partitions))
}

/// Rules that let every language, licence and length of these tests pass.
fn lenient() -> CurateConfig {
    CurateConfig {
        min_words: 3,
        boilerplate_documents: u64::MAX,
        ..CurateConfig::default()
    }
}

fn write_lines(path: &Path, documents: &[Value]) {
    let lines: Vec<String> = documents.iter().map(Value::to_string).collect();
    fs::write(path, lines.join("\n")).unwrap();
}

/// A table's rows as columns of display strings; null is "".
fn column(path: &Path, name: &str) -> Vec<String> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(fs::File::open(path).unwrap()).unwrap();
    let batches: Vec<RecordBatch> = reader.build().unwrap().map(Result::unwrap).collect();
    let mut out = Vec::new();
    for batch in &batches {
        let column = batch.column_by_name(name).unwrap();
        if let Some(flags) = column.as_boolean_opt() {
            out.extend(flags.iter().map(|f| f.unwrap().to_string()));
        } else {
            let texts = column.as_string::<i32>();
            out.extend(texts.iter().map(|t| t.unwrap_or_default().to_owned()));
        }
    }
    out
}

/// Corpus id → rule that dropped it ("" = kept).
fn decisions(out: &Path) -> BTreeMap<String, String> {
    let path = out.join("decisions.parquet");
    let (ids, ops) = (column(&path, "id"), column(&path, "op"));
    let kept = column(&path, "kept");
    for (op, kept) in ops.iter().zip(&kept) {
        assert_eq!(op.is_empty(), kept == "true");
    }
    ids.into_iter().zip(ops).collect()
}

fn bytes(out: &Path) -> Vec<Digest> {
    let read = |f: &&str| Digest::of(&fs::read(out.join(f)).unwrap());
    FILES.iter().map(read).collect()
}

/// `n` words, different for each `seed`.
fn prose(seed: usize, n: usize) -> String {
    const WORDS: [&str; 24] = [
        "harbour", "rope", "letter", "window", "garden", "engine", "ticket", "morning", "captain",
        "island", "table", "weather", "signal", "bridge", "kitchen", "market", "lantern", "paper",
        "season", "station", "village", "coffee", "record", "anchor",
    ];
    let mut x = seed as u64 + 1;
    let mut next = || {
        x = x
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (x >> 33) as usize
    };
    let words: Vec<String> = (0..n)
        .map(|_| format!("{}{}", WORDS[next() % 24], next() % 9))
        .collect();
    words.join(" ")
}

fn document(id: &str, text: &str) -> Value {
    json!({"id": id, "title": id, "text": text, "licence": "MIT"})
}

#[test]
fn each_rule_gives_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let footer = "\nPrinted copies are out of date.";
    let english = "The ferry leaves the harbour every morning at eight, and the ticket office \
        opens half an hour before that. Bring warm clothes and something to read for the trip.";
    let german = "Die Fähre verlässt jeden Morgen um acht Uhr den Hafen, und der Schalter öffnet \
        eine halbe Stunde vorher. Bitte bringen Sie warme Kleidung und etwas zu lesen mit.";
    let french = "Le bateau quitte le port tous les matins à huit heures et le guichet ouvre une \
        demi-heure plus tôt. Apportez des vêtements chauds et de quoi lire pendant le voyage.";
    let mut documents = vec![
        document("en", &format!("{english}{footer}")),
        document("en-copy", &format!("{english}\n\n")),
        document("de", &format!("{german}{footer}")),
        document("fr", &format!("{french}{footer}")),
        json!({"id": "short", "text": "The ferry is late.", "licence": "MIT", "lang": "en-GB"}),
        document("loop", &"please wait here for the next ferry ".repeat(12)),
        json!({"id": "opt", "text": format!("Once more. {english}"), "licence": "MIT", "consent": "opt_out"}),
        json!({"id": "nolic", "text": format!("Again then. {english}")}),
        json!({"id": "gpl", "text": format!("Another one. {english}"), "licence": "GPL-3.0-only"}),
    ];
    for i in 0..4 {
        documents.push(document(
            &format!("f{i}"),
            &format!("{}{footer}", prose(i, 60)),
        ));
    }
    // Near-duplicates: one word of a long text.
    let long = format!("{english} {}", prose(99, 80));
    documents.push(document("long", &long));
    documents.push(document(
        "long-near",
        &long.replace("warm clothes", "clothes"),
    ));
    documents.push(document("gone", &format!("{german} {}", prose(7, 90))));
    let taken = Digest::of(format!("{german} {}", prose(7, 90)).as_bytes());
    write_lines(&dir.path().join("a.jsonl"), &documents);
    let config = CurateConfig {
        languages: vec!["en".into(), "de".into()],
        licences: vec!["MIT".into()],
        boilerplate_share: 0.2,
        ..CurateConfig::default()
    };
    let out = dir.path().join("out");
    let sources = [dir.path().join("a.jsonl")];
    let report = run(&config, &sources, &[taken], &out, 4).unwrap();
    let decided = decisions(&out);
    let expect = [
        ("en", ""),
        ("en-copy", "exact_duplicate"),
        ("de", ""),
        ("fr", "language"),
        ("short", "length"),
        ("loop", "repetition"),
        ("opt", "opt_out"),
        ("nolic", "licence"),
        ("gpl", "licence"),
        ("long", ""),
        ("long-near", "near_duplicate"),
        ("gone", "taken_down"),
    ];
    for (id, op) in expect {
        assert_eq!(decided[id], op, "{id}");
    }
    assert_eq!(report.boilerplate_lines, 1);
    assert_eq!(report.boilerplate_documents, 7);
    assert!(
        read_kept(&out)
            .unwrap()
            .iter()
            .all(|d| !d.text.contains("Printed"))
    );
    let reasons = column(&out.join("decisions.parquet"), "reason");
    for (id, reason) in column(&out.join("decisions.parquet"), "id")
        .iter()
        .zip(reasons)
    {
        assert_eq!(reason.is_empty(), decided[id].is_empty(), "{id}: {reason}");
    }
    assert_eq!(
        report.kept + report.dropped.values().sum::<u64>(),
        report.raw
    );
    assert!(
        report
            .dropped
            .keys()
            .all(|op| OPS.iter().any(|(name, _)| name == op))
    );
}

#[test]
fn bytes_do_not_depend_on_partitions_order_or_an_earlier_death() {
    let dir = tempfile::tempdir().unwrap();
    let documents: Vec<Value> = (0..700)
        .map(|i| {
            let mut text = prose(i % 610, 40 + i % 50);
            if i % 7 == 0 {
                text += "\nwrite to anna@example.org";
            }
            document(&format!("d{i}"), &text)
        })
        .collect();
    let (a, b) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl"));
    write_lines(&a, &documents[..300]);
    write_lines(&b, &documents[300..]);
    let mut seen = BTreeSet::new();
    for (i, partitions) in [1, 4, 16].into_iter().enumerate() {
        let sources = if i == 1 {
            [b.clone(), a.clone()]
        } else {
            [a.clone(), b.clone()]
        };
        let out = dir.path().join(format!("out{partitions}"));
        if i == 2 {
            // What a killed run may leave: a half file beside, an old one in place.
            fs::create_dir_all(&out).unwrap();
            fs::write(out.join(".kept.parquet.tmp"), "PAR1 half").unwrap();
            fs::write(out.join("kept.parquet"), "old").unwrap();
        }
        let report = run(&lenient(), &sources, &[], &out, partitions).unwrap();
        assert!(
            report.kept < 700 && report.redactions["email"] > 50,
            "{report:?}"
        );
        seen.insert(bytes(&out));
        let left = fs::read_dir(&out).unwrap().count();
        assert_eq!(left, FILES.len());
    }
    assert_eq!(seen.len(), 1);
}

#[test]
fn a_malformed_line_is_named_or_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let good = document("a", &prose(1, 30));
    fs::write(
        dir.path().join("x.jsonl"),
        format!("{good}\n{{\"id\": \"b\", text: 1}}\n"),
    )
    .unwrap();
    fs::write(dir.path().join("picture.png"), "x").unwrap();
    let (sources, out) = ([dir.path().to_owned()], dir.path().join("out"));
    let error = run(&lenient(), &sources, &[], &out, 1).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("x.jsonl:2:13: not a JSON object"), "{said}");
    assert!(error.hint().unwrap().contains("quarantine"));
    let config = CurateConfig {
        on_bad: OnBad::Quarantine,
        ..lenient()
    };
    let report = run(&config, &sources, &[], &out, 1).unwrap();
    assert_eq!((report.raw, report.quarantined), (1, 1));
    assert_eq!(report.ignored.len(), 1);
    let set_aside = fs::read_to_string(out.join("quarantine.jsonl")).unwrap();
    assert!(set_aside.contains("\"line\":2"), "{set_aside}");
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let error = run(&lenient(), &[empty], &[], &out, 1).unwrap_err();
    assert!(matches!(error, DataError::NoDocuments { .. }));
}

#[test]
fn a_table_that_is_none_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kept.parquet");
    fs::write(&path, b"PAR1 not a table PAR1").unwrap();
    assert!(matches!(read_kept(&path), Err(DataError::Parquet(_))));
    assert!(matches!(read_pack(dir.path()), Err(DataError::Io { .. })));
}

/// Families of texts that differ by a few words, some under another licence or
/// opted out.
fn families() -> impl Strategy<Value = Vec<(String, bool, bool)>> {
    let edits = proptest::collection::vec(0usize..60, 0..4);
    let member = (
        0usize..5,
        edits,
        proptest::bool::weighted(0.2),
        proptest::bool::weighted(0.1),
    );
    proptest::collection::vec(member, 1..30).prop_map(|members| {
        members
            .into_iter()
            .enumerate()
            .map(|(n, (family, edits, unlicensed, opt_out))| {
                let base = prose(family, 60);
                let mut words: Vec<String> = base.split(' ').map(str::to_owned).collect();
                for at in edits {
                    words[at] = format!("edit{}", (n + at) % 4);
                }
                (words.join(" "), unlicensed, opt_out)
            })
            .collect()
    })
}

/// The cluster of each text by comparing all pairs.
fn brute_clusters(texts: &[String], threshold: f64) -> Vec<usize> {
    let sets: Vec<_> = texts.iter().map(|t| minhash::shingles(t, 5)).collect();
    let mut cluster: Vec<usize> = (0..texts.len()).collect();
    for i in 0..texts.len() {
        for j in 0..i {
            if minhash::jaccard(&sets[i], &sets[j]) >= threshold {
                let (from, to) = (cluster[i], cluster[j]);
                for c in &mut cluster {
                    if *c == from {
                        *c = to;
                    }
                }
            }
        }
    }
    cluster
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn clusters_equal_brute_force_and_takedowns_close_over_them(
        members in families(),
        pick in any::<proptest::sample::Index>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let documents: Vec<Value> = members
            .iter()
            .enumerate()
            .map(|(i, (text, unlicensed, opt_out))| {
                let licence = if *unlicensed { Value::Null } else { json!("MIT") };
                let consent = if *opt_out { "opt-out" } else { "allowed" };
                json!({"id": format!("d{i:02}"), "text": text, "licence": licence, "consent": consent})
            })
            .collect();
        let source = dir.path().join("a.jsonl");
        write_lines(&source, &documents);
        let texts: Vec<String> = members.iter().map(|m| m.0.clone()).collect();
        let docs: Vec<Digest> = texts.iter().map(|t| Digest::of(t.as_bytes())).collect();
        let cluster = brute_clusters(&texts, 0.8);
        let out = dir.path().join("out");

        let before = run(&lenient(), std::slice::from_ref(&source), &[], &out, 2).unwrap();
        prop_assert_eq!(before.kept + before.dropped.values().sum::<u64>(), members.len() as u64);
        let siblings: BTreeMap<Digest, Digest> = read_siblings(&out).unwrap().into_iter().collect();
        let head = |d: &Digest| *siblings.get(d).unwrap_or(d);
        for i in 0..texts.len() {
            for j in 0..i {
                prop_assert_eq!(head(&docs[i]) == head(&docs[j]), cluster[i] == cluster[j]);
            }
        }
        // No two kept documents are copies, and a copy is dropped only for one kept.
        let kept: BTreeSet<String> = read_kept(&out).unwrap().into_iter().map(|d| d.id).collect();
        let decided = decisions(&out);
        let index = |id: &str| id[1..].parse::<usize>().unwrap();
        for a in &kept {
            for b in kept.range::<String, _>(..a) {
                let [a, b] = [index(a), index(b)].map(|i| minhash::shingles(&texts[i], 5));
                prop_assert!(minhash::jaccard(&a, &b) < 0.8);
            }
        }
        for (id, op) in &decided {
            if op.ends_with("duplicate") {
                prop_assert!(kept.iter().any(|k| cluster[index(k)] == cluster[index(id)]));
            }
        }

        let taken = pick.index(docs.len());
        run(&lenient(), &[source], &[docs[taken]], &out, 3).unwrap();
        let decided = decisions(&out);
        for i in 0..docs.len() {
            let gone = decided[&format!("d{i:02}")] == "taken_down";
            prop_assert_eq!(gone, cluster[i] == cluster[taken]);
        }
    }
}

/// A byte-level vocabulary with the control tokens of ChatML.
fn tokenizer() -> Tokenizer {
    let itself = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        .map(String::from)
        .to_vec();
    let mut token_types = vec![3; 3];
    let mut other = 0x100;
    for b in 0..=255u8 {
        let c = if itself(b) {
            char::from(b)
        } else {
            other += 1;
            char::from_u32(other - 1).unwrap()
        };
        tokens.push(c.to_string());
    }
    token_types.resize(tokens.len(), 1);
    Tokenizer::from_gguf(GgufVocab {
        model: "gpt2".into(),
        pre: "smollm".into(),
        tokens,
        token_types,
        merges: Vec::new(),
        bos: Some(1),
        eos: Some(2),
        add_bos: false,
        ..GgufVocab::default()
    })
    .unwrap()
}

fn template() -> ChatTemplate {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + \
        '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|im_start|>assistant\n' }}{% endif %}";
    ChatTemplate::new(source, "<|im_start|>", "<|im_end|>").unwrap()
}

fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/quickstart")
}

/// Settings of `recipes/quickstart.toml`.
fn quickstart_config() -> CurateConfig {
    CurateConfig {
        languages: vec!["en".into(), "de".into()],
        licences: ["CC-BY-4.0", "CC0-1.0", "Apache-2.0"]
            .map(String::from)
            .to_vec(),
        ..CurateConfig::default()
    }
}

#[test]
fn the_quickstart_finds_what_was_planted() {
    let dir = tempfile::tempdir().unwrap();
    let (out, sources) = (dir.path().join("out"), [quickstart().join("documents")]);
    let report = run(&quickstart_config(), &sources, &[], &out, 2).unwrap();
    let planted = [
        ("opt_out", 6),
        ("licence", 7),
        ("language", 3),
        ("length", 3),
        ("repetition", 2),
        ("exact_duplicate", 4),
        ("near_duplicate", 12),
    ];
    let planted: BTreeMap<String, u64> = planted.map(|(op, n)| (op.to_owned(), n)).into();
    assert_eq!(report.dropped, planted, "{:#?}", decisions(&out));
    assert_eq!((report.raw, report.kept), (204, 204 - 37));
    // The footer, in each language.
    assert_eq!(report.boilerplate_lines, 2);
    assert_eq!(report.boilerplate_documents, 80);
    assert_eq!(report.redacted_documents, 25);
    let found: BTreeMap<String, u64> = [
        ("card", 3),
        ("email", 9),
        ("iban", 5),
        ("ip", 4),
        ("phone", 9),
        ("secret", 7),
    ]
    .map(|(kind, n)| (kind.to_owned(), n))
    .into();
    assert_eq!(report.redactions, found);
    for document in read_kept(&out).unwrap() {
        assert!(detect::pii(&document.text).is_empty(), "{}", document.id);
        assert!(!document.text.contains("Printed copies are out of date"));
    }
    let observed = read_observations(&out).unwrap();
    assert_eq!(observed.len(), 204);
    assert!(
        observed
            .iter()
            .any(|o| o.consent == "opt-out" && o.id == "people-diary")
    );

    // Every question's document survives; a takedown takes page, copy and question.
    let qa = read_qa(&quickstart().join("qa.jsonl")).unwrap();
    let kept = read_kept(&out).unwrap();
    let packed = pack(&kept, &qa, &tokenizer(), &template(), dir.path()).unwrap();
    assert_eq!((packed.questions, packed.left_out.len()), (60, 0));
    let page = kept.iter().find(|d| d.id == "people-choir").unwrap().doc;
    let report = run(&quickstart_config(), &sources, &[page], &out, 2).unwrap();
    assert_eq!(report.dropped["taken_down"], 2);
    let decided = decisions(&out);
    assert_eq!(decided["archive-choir"], "taken_down");
    let kept = read_kept(&out).unwrap();
    let packed = pack(&kept, &qa, &tokenizer(), &template(), dir.path()).unwrap();
    assert_eq!((packed.questions, packed.left_out["people-choir"]), (59, 1));
}

#[test]
fn a_pack_reads_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let (out, sources) = (dir.path().join("out"), dir.path().join("a.jsonl"));
    write_lines(
        &sources,
        &[document("a", &prose(1, 30)), document("b", &prose(2, 30))],
    );
    run(&lenient(), &[sources], &[], &out, 1).unwrap();
    let qa_path = dir.path().join("qa.jsonl");
    let question = |id: &str, doc: &str| {
        json!({"id": id, "doc": doc, "train": ["Who?", "Who is it?"], "held_out": ["Never packed?"],
               "answer": "Anna, anna@example.org.", "accept": ["Anna"]})
    };
    write_lines(&qa_path, &[question("q1", "a"), question("q2", "absent")]);
    let qa = read_qa(&qa_path).unwrap();
    let kept = read_kept(&out).unwrap();
    let file = dir.path().join("p.parquet");
    let (tokenizer, template) = (tokenizer(), template());
    let report = pack(&kept, &qa, &tokenizer, &template, &file).unwrap();
    assert_eq!((report.samples, report.questions), (2, 1));
    assert_eq!(report.left_out, BTreeMap::from([("absent".to_owned(), 1)]));
    assert_eq!(report.redactions["email"], 2);
    let samples = read_pack(&file).unwrap();
    assert_eq!(samples.len(), 2);
    for sample in &samples {
        assert_eq!(sample.tokens.len(), sample.trained.len());
        let answer: Vec<u32> = sample
            .tokens
            .iter()
            .zip(&sample.trained)
            .filter_map(|(t, trained)| trained.then_some(*t))
            .collect();
        assert_eq!(tokenizer.decode(&answer, false), "Anna, <EMAIL>.<|im_end|>");
        assert_eq!(sample.docs.len(), 1);
        assert_eq!(sample.docs[0].doc, Digest::of(prose(1, 30).as_bytes()));
        assert_eq!(
            (sample.docs[0].start, sample.docs[0].end as usize),
            (0, sample.tokens.len())
        );
    }
    let first = fs::read(&file).unwrap();
    pack(&kept, &qa, &tokenizer, &template, &file).unwrap();
    assert_eq!(first, fs::read(&file).unwrap());

    write_lines(&qa_path, &[question("q1", "a"), question("q1", "a")]);
    assert!(
        read_qa(&qa_path)
            .unwrap_err()
            .to_string()
            .contains("used twice")
    );
}
