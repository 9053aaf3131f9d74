//! Questions and answers about kept documents as samples to train on.
//!
//! One sample for each phrasing of a question, rendered with the model's own
//! chat template, with a mask on the answer. Each sample names the documents it
//! exposes the model to and where. Nothing is truncated: what is too long for
//! the model is the trainer's to refuse, with the numbers.

use crate::{
    DataError, KeptDoc,
    table::{self, Table},
};
use ashlar_core::Digest;
use ashlar_text::{ChatTemplate, Message, Tokenizer, detect, masked_chat};
use datafusion::arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanBuilder, ListArray, ListBuilder, StringArray,
        StringBuilder, StructArray, UInt32Array, UInt32Builder,
    },
    buffer::OffsetBuffer,
    datatypes::{DataType, Field, UInt32Type},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

/// A question in several phrasings, with its answer, about one document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qa {
    /// Its id.
    pub id: String,
    /// The corpus id of the document that answers it.
    pub doc: String,
    /// Phrasings to train on.
    pub train: Vec<String>,
    /// Phrasings kept back for evaluation; never packed.
    pub held_out: Vec<String>,
    /// The answer.
    pub answer: String,
    /// Strings of which one in a reply makes it right.
    #[serde(default)]
    pub accept: Vec<String>,
}

/// A part of a sample that stands on one document: tokens `start..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocSpan {
    /// The document.
    pub doc: Digest,
    /// First token.
    pub start: u32,
    /// One past the last token.
    pub end: u32,
}

/// One sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedSample {
    /// The question it comes from.
    pub qa: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Whether each is a target; as long as `tokens`.
    pub trained: Vec<bool>,
    /// The documents it exposes, and where.
    pub docs: Vec<DocSpan>,
}

/// What packing did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PackReport {
    /// Samples written.
    pub samples: u64,
    /// Questions packed.
    pub questions: u64,
    /// Questions left out, their document not being kept, by document id.
    pub left_out: BTreeMap<String, u64>,
    /// Documents that at least one sample exposes.
    pub documents: u64,
    /// Tokens in all samples.
    pub tokens: u64,
    /// Tokens that are targets.
    pub trained_tokens: u64,
    /// Tokens of the longest sample.
    pub longest: u64,
    /// Findings replaced by tags in questions and answers, by kind.
    pub redactions: BTreeMap<String, u64>,
}

/// Reads a `.jsonl` file of questions.
///
/// # Errors
/// [`DataError::Io`], or [`DataError::Malformed`] for a line that is not a
/// question, has no phrasing or answer, or repeats an id.
pub fn read_qa(path: &Path) -> Result<Vec<Qa>, DataError> {
    let text = std::fs::read_to_string(path).map_err(table::io(path))?;
    let mut ids = BTreeSet::new();
    let mut out = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let bad = |column: usize, problem: String| DataError::Malformed {
            file: path.display().to_string(),
            line: number as u64 + 1,
            column: column as u64,
            problem,
        };
        let qa: Qa = serde_json::from_str(line).map_err(|e| {
            let said = e.to_string();
            let problem = said.split(" at line ").next().unwrap_or_default();
            bad(e.column(), problem.to_owned())
        })?;
        if qa.train.is_empty() || qa.answer.trim().is_empty() {
            return Err(bad(
                1,
                format!("question {:?} has no phrasing or no answer", qa.id),
            ));
        }
        if !ids.insert(qa.id.clone()) {
            return Err(bad(1, format!("id {:?} is used twice", qa.id)));
        }
        out.push(qa);
    }
    Ok(out)
}

/// Packs the questions about `kept` documents to `out`: a `.parquet` path, or a
/// folder that gets `pack.parquet`. Samples stand in the order of `qa`, then of
/// phrasings. Questions about other documents are left out and counted.
///
/// # Errors
/// [`DataError::Ambiguous`] when a question's document id names several,
/// [`DataError::Text`] when a conversation cannot be rendered, and those of
/// writing.
pub fn pack(
    kept: &[KeptDoc],
    qa: &[Qa],
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    out: &Path,
) -> Result<PackReport, DataError> {
    let mut by_id: BTreeMap<&str, Vec<&KeptDoc>> = BTreeMap::new();
    for document in kept {
        by_id.entry(&document.id).or_default().push(document);
    }
    let mut report = PackReport::default();
    let mut samples = Vec::new();
    let mut documents = BTreeSet::new();
    for question in qa {
        let document = match by_id.get(question.doc.as_str()).map(Vec::as_slice) {
            None | Some([]) => {
                *report.left_out.entry(question.doc.clone()).or_default() += 1;
                continue;
            }
            Some([one]) => one,
            Some(many) => {
                return Err(DataError::Ambiguous {
                    qa: question.id.clone(),
                    doc: question.doc.clone(),
                    count: many.len(),
                });
            }
        };
        report.questions += 1;
        documents.insert(document.doc);
        for phrasing in &question.train {
            let mut turn = |role: &str, content: &str| {
                let (content, found) = detect::redact(content);
                for (kind, n) in found {
                    *report
                        .redactions
                        .entry(kind.as_str().to_owned())
                        .or_default() += n;
                }
                Message {
                    role: role.to_owned(),
                    content,
                }
            };
            let turns = [turn("user", phrasing), turn("assistant", &question.answer)];
            let masked =
                masked_chat(tokenizer, template, &turns).map_err(|source| DataError::Text {
                    qa: question.id.clone(),
                    source,
                })?;
            let n = masked.tokens.len();
            report.tokens += n as u64;
            report.trained_tokens += masked.trained.iter().filter(|t| **t).count() as u64;
            report.longest = report.longest.max(n as u64);
            samples.push(PackedSample {
                qa: question.id.clone(),
                tokens: masked.tokens,
                trained: masked.trained,
                docs: vec![DocSpan {
                    doc: document.doc,
                    start: 0,
                    end: u32::try_from(n).unwrap_or(u32::MAX),
                }],
            });
        }
    }
    report.samples = samples.len() as u64;
    report.documents = documents.len() as u64;
    let path = if out.extension().is_some_and(|e| e == "parquet") {
        out.to_owned()
    } else {
        std::fs::create_dir_all(out).map_err(table::io(out))?;
        out.join("pack.parquet")
    };
    write(&samples, &path)?;
    Ok(report)
}

fn write(samples: &[PackedSample], path: &Path) -> Result<(), DataError> {
    let mut tokens = ListBuilder::new(UInt32Builder::new());
    let mut trained = ListBuilder::new(BooleanBuilder::new());
    let (mut doc, mut start, mut end) = (StringBuilder::new(), Vec::new(), Vec::new());
    for sample in samples {
        tokens.values().append_slice(&sample.tokens);
        tokens.append(true);
        trained.values().append_slice(&sample.trained);
        trained.append(true);
        for span in &sample.docs {
            doc.append_value(span.doc.to_string());
            start.push(span.start);
            end.push(span.end);
        }
    }
    let field = |name, kind| Arc::new(Field::new(name, kind, false));
    let spans = StructArray::from(vec![
        (
            field("doc", DataType::Utf8),
            Arc::new(doc.finish()) as ArrayRef,
        ),
        (
            field("start", DataType::UInt32),
            Arc::new(UInt32Array::from(start)),
        ),
        (
            field("end", DataType::UInt32),
            Arc::new(UInt32Array::from(end)),
        ),
    ]);
    let docs = ListArray::try_new(
        Arc::new(Field::new_list_field(spans.data_type().clone(), false)),
        OffsetBuffer::from_lengths(samples.iter().map(|s| s.docs.len())),
        Arc::new(spans),
        None,
    )?;
    let numbers: UInt32Array = (0..samples.len() as u32).map(Some).collect();
    let qa: StringArray = samples.iter().map(|s| Some(s.qa.as_str())).collect();
    let batch = table::table(vec![
        ("sample", Arc::new(numbers)),
        ("qa", Arc::new(qa)),
        ("tokens", Arc::new(tokens.finish())),
        ("trained", Arc::new(trained.finish())),
        ("docs", Arc::new(docs)),
    ])?;
    table::write(path, &batch)
}

/// Reads a pack: the file, or the folder that holds `pack.parquet`.
///
/// # Errors
/// [`DataError::Io`], [`DataError::Parquet`] or [`DataError::Table`].
pub fn read_pack(path: &Path) -> Result<Vec<PackedSample>, DataError> {
    let table = Table::read(&table::locate(path, "pack.parquet"))?;
    let mut out = Vec::new();
    let is = |kind: DataType| move |t: &DataType| matches!(t, DataType::List(f) if *f.data_type() == kind);
    let strukt = |t: &DataType| {
        let DataType::List(item) = t else {
            return false;
        };
        let DataType::Struct(fields) = item.data_type() else {
            return false;
        };
        let kinds = fields.iter().map(|f| f.data_type());
        kinds.eq([&DataType::Utf8, &DataType::UInt32, &DataType::UInt32])
    };
    for batch in &table.batches {
        let tokens = table.column(batch, "tokens", is(DataType::UInt32))?;
        let trained = table.column(batch, "trained", is(DataType::Boolean))?;
        let docs = table.column(batch, "docs", strukt)?;
        let qa = table.column(batch, "qa", |t| *t == DataType::Utf8)?;
        for row in 0..batch.num_rows() {
            let list = |a: &ArrayRef| a.as_list::<i32>().value(row);
            let tokens = list(tokens).as_primitive::<UInt32Type>().values().to_vec();
            let mask = list(trained);
            let trained: Vec<bool> = mask.as_boolean().values().iter().collect();
            if tokens.len() != trained.len() {
                return Err(table.fault("trained", "is not as long as tokens"));
            }
            let spans = list(docs);
            let spans = spans.as_struct();
            let doc = spans.column(0).as_string::<i32>();
            let [start, end] = [1, 2].map(|i| spans.column(i).as_primitive::<UInt32Type>());
            let docs = (0..spans.len())
                .map(|i| {
                    Ok(DocSpan {
                        doc: doc
                            .value(i)
                            .parse()
                            .map_err(|e| table.fault("docs", &format!("{e}")))?,
                        start: start.value(i),
                        end: end.value(i),
                    })
                })
                .collect::<Result<_, DataError>>()?;
            out.push(PackedSample {
                qa: qa.as_string::<i32>().value(row).to_owned(),
                tokens,
                trained,
                docs,
            });
        }
    }
    Ok(out)
}
