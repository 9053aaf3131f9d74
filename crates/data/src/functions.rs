//! The curation functions as Arrow scalar functions, so that the same SQL runs
//! in this process or on a cluster whose sessions call [`register`].
//!
//! Each is pure and stateless: settings come in as literal arguments. A null
//! text gives null.

use crate::{minhash, repetition};
use ashlar_core::Digest;
use ashlar_text::detect;
use datafusion::{
    arrow::{
        array::{
            ArrayRef, AsArray, BooleanArray, Float64Array, Float64Builder, ListBuilder,
            StringArray, StringBuilder, UInt64Array, UInt64Builder,
        },
        datatypes::{DataType, Field},
    },
    common::{ScalarValue, exec_err},
    error::Result,
    logical_expr::{ColumnarValue, Volatility, create_udf},
    prelude::SessionContext,
};
use std::{collections::HashSet, sync::Arc};

/// Registers every function of this module with `session`:
///
/// | function | result |
/// |---|---|
/// | `text_lines(text)` | the distinct trimmed lines that hold a letter or digit |
/// | `without_lines(text, lines)` | the text without those lines; see [`without_lines`] |
/// | `removed_lines(text, lines)` | their byte ranges `[start, end, …]` in the text |
/// | `words(text)` | number of words |
/// | `lang(text)`, `lang_confidence(text)` | ISO 639-1 code and 0..1 |
/// | `repetition(text)` | the shares of [`repetition::MEASURES`] |
/// | `text_key(text)` | digest of the text with white space collapsed |
/// | `minhash_bands(text, ngram, permutations, bands)` | hashes of the bands |
/// | `shingles(text, ngram)` | sorted hashes of the shingles |
/// | `consent(value)` | `allowed`, `opt-out` or `unknown` |
/// | `licence_allowed(licence, list)` | whether an SPDX expression is covered |
/// | `redact(text)` | the text with personal data and secrets as tags |
/// | `redactions(text)` | a JSON object of counts by kind |
pub fn register(session: &SessionContext) {
    let list = |t| DataType::List(Arc::new(Field::new_list_field(t, true)));
    let numbers = || list(DataType::UInt64);
    text(session, "text_lines", 0, list(DataType::Utf8), |t, _| {
        let mut out = ListBuilder::new(StringBuilder::new());
        for value in t {
            if let Some(v) = value {
                let mut seen = HashSet::new();
                for line in v.lines().map(str::trim) {
                    if line.contains(char::is_alphanumeric) && seen.insert(line) {
                        out.values().append_value(line);
                    }
                }
            }
            out.append(value.is_some());
        }
        Ok(Arc::new(out.finish()))
    });
    text(session, "without_lines", 1, DataType::Utf8, |t, args| {
        let lines = line_set(&args[0])?;
        Ok(strings(t, |v| Some(without_lines(v, &lines).0)))
    });
    text(session, "removed_lines", 1, numbers(), |t, args| {
        let lines = line_set(&args[0])?;
        Ok(lists(t, |v| without_lines(v, &lines).1))
    });
    text(session, "words", 0, DataType::UInt64, |t, _| {
        let count = |v| minhash::words(v).len() as u64;
        Ok(Arc::new(
            t.iter().map(|v| v.map(count)).collect::<UInt64Array>(),
        ))
    });
    text(session, "lang", 0, DataType::Utf8, |t, _| {
        Ok(strings(t, |v| {
            detect::language(v).map(|(code, _)| code.to_owned())
        }))
    });
    text(session, "lang_confidence", 0, DataType::Float64, |t, _| {
        let confidence = |v| detect::language(v).map(|(_, c)| c);
        Ok(Arc::new(
            t.iter()
                .map(|v| v.and_then(confidence))
                .collect::<Float64Array>(),
        ))
    });
    text(session, "repetition", 0, list(DataType::Float64), |t, _| {
        let mut out = ListBuilder::new(Float64Builder::new());
        for value in t {
            if let Some(v) = value {
                out.values().append_slice(&repetition::measure(v));
            }
            out.append(value.is_some());
        }
        Ok(Arc::new(out.finish()))
    });
    text(session, "text_key", 0, DataType::Utf8, |t, _| {
        Ok(strings(t, |v| {
            let words: Vec<&str> = v.split_whitespace().collect();
            Some(Digest::of(words.join(" ").as_bytes()).to_string())
        }))
    });
    text(session, "minhash_bands", 3, numbers(), |t, args| {
        let [n, permutations, bands] = [number(&args[0])?, number(&args[1])?, number(&args[2])?];
        Ok(lists(t, |v| {
            let shingles = minhash::shingles(v, n);
            if shingles.is_empty() {
                return Vec::new();
            }
            minhash::bands(&minhash::signature(&shingles, permutations), bands)
        }))
    });
    text(session, "shingles", 1, numbers(), |t, args| {
        let n = number(&args[0])?;
        Ok(lists(t, |v| minhash::shingles(v, n)))
    });
    text(session, "consent", 0, DataType::Utf8, |t, _| {
        let out: StringArray = t.iter().map(|v| Some(consent(v))).collect();
        Ok(Arc::new(out))
    });
    text(
        session,
        "licence_allowed",
        1,
        DataType::Boolean,
        |t, args| {
            let list = string(&args[0])?;
            let allowed: Vec<&str> = list.lines().collect();
            let out: BooleanArray = t
                .iter()
                .map(|v| Some(v.is_some_and(|v| licence_allowed(v, &allowed))))
                .collect();
            Ok(Arc::new(out))
        },
    );
    text(session, "redact", 0, DataType::Utf8, |t, _| {
        Ok(strings(t, |v| Some(detect::redact(v).0)))
    });
    text(session, "redactions", 0, DataType::Utf8, |t, _| {
        Ok(strings(t, |v| {
            let counts: serde_json::Map<_, _> = detect::redact(v)
                .1
                .into_iter()
                .map(|(kind, n)| (kind.as_str().to_owned(), n.into()))
                .collect();
            Some(serde_json::Value::Object(counts).to_string())
        }))
    });
}

/// Registers a function of one text and `literals` constant arguments.
fn text(
    session: &SessionContext,
    name: &'static str,
    literals: usize,
    out: DataType,
    run: fn(&StringArray, &[ScalarValue]) -> Result<ArrayRef>,
) {
    let kind = match name {
        "minhash_bands" | "shingles" => DataType::Int64,
        _ => DataType::Utf8,
    };
    let mut inputs = vec![DataType::Utf8];
    inputs.resize(literals + 1, kind);
    let body = move |args: &[ColumnarValue]| {
        let [first, rest @ ..] = args else {
            return exec_err!("{name} needs a text");
        };
        let mut scalars = Vec::with_capacity(rest.len());
        for arg in rest {
            match arg {
                ColumnarValue::Scalar(s) => scalars.push(s.clone()),
                ColumnarValue::Array(_) => {
                    return exec_err!("the settings of {name} must be literals");
                }
            }
        }
        let array = first.to_array(1)?;
        let Some(texts) = array.as_string_opt::<i32>() else {
            return exec_err!("{name} needs a text, not {}", array.data_type());
        };
        let result = run(texts, &scalars)?;
        match first {
            ColumnarValue::Array(_) => Ok(ColumnarValue::Array(result)),
            ColumnarValue::Scalar(_) => Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(
                &result, 0,
            )?)),
        }
    };
    session.register_udf(create_udf(
        name,
        inputs,
        out,
        Volatility::Immutable,
        Arc::new(body),
    ));
}

fn strings(texts: &StringArray, f: impl Fn(&str) -> Option<String>) -> ArrayRef {
    Arc::new(
        texts
            .iter()
            .map(|v| v.and_then(&f))
            .collect::<StringArray>(),
    )
}

fn lists(texts: &StringArray, f: impl Fn(&str) -> Vec<u64>) -> ArrayRef {
    let mut out = ListBuilder::new(UInt64Builder::new());
    for value in texts {
        if let Some(v) = value {
            out.values().append_slice(&f(v));
        }
        out.append(value.is_some());
    }
    Arc::new(out.finish())
}

fn number(value: &ScalarValue) -> Result<usize> {
    match value {
        ScalarValue::Int64(Some(n)) if *n > 0 => Ok(usize::try_from(*n).unwrap_or(usize::MAX)),
        other => exec_err!("{other} is not a positive number"),
    }
}

fn string(value: &ScalarValue) -> Result<&str> {
    match value.try_as_str() {
        Some(Some(s)) => Ok(s),
        _ => exec_err!("{value} is not a text"),
    }
}

/// The lines of a literal; no line holds a line break, so that one text can
/// carry them all.
fn line_set(value: &ScalarValue) -> Result<HashSet<&str>> {
    Ok(string(value)?.lines().collect())
}

/// `text` without the lines of `lines` (compared trimmed), and the byte ranges
/// `[start, end, …]` that went.
///
/// A text that would lose more than half its words is left whole: it is a copy
/// of another document, which is for deduplication to judge, not one with a
/// common footer.
pub fn without_lines(text: &str, lines: &HashSet<&str>) -> (String, Vec<u64>) {
    let (mut kept, mut gone) = (String::new(), Vec::new());
    let (mut at, mut words_gone) = (0, 0);
    for line in text.split_inclusive('\n') {
        if lines.contains(line.trim()) {
            gone.extend([at as u64, (at + line.len()) as u64]);
            words_gone += minhash::words(line).len();
        } else {
            kept.push_str(line);
        }
        at += line.len();
    }
    if gone.is_empty() || 2 * words_gone > minhash::words(text).len() {
        return (text.to_owned(), Vec::new());
    }
    (kept.trim().to_owned(), gone)
}

/// What a consent signal says. One that is not understood counts as an
/// opt-out: a misspelt refusal must not become a permission.
fn consent(value: Option<&str>) -> &'static str {
    let value = value.map(|v| v.trim().to_lowercase().replace(['_', ' '], "-"));
    match value.as_deref() {
        None | Some("" | "unknown" | "none") => "unknown",
        Some("allowed" | "allow" | "opt-in" | "granted" | "yes" | "true" | "given") => "allowed",
        Some(_) => "opt-out",
    }
}

/// Whether `licence`, an SPDX expression of ids joined by `AND` or `OR`, is
/// covered by `allowed`; an empty list allows every licence that is named.
fn licence_allowed(licence: &str, allowed: &[&str]) -> bool {
    let one = |id: &str| {
        let id = id.trim();
        let named = !matches!(
            id.to_ascii_lowercase().as_str(),
            "" | "unknown" | "none" | "noassertion" | "other"
        );
        named && (allowed.is_empty() || allowed.iter().any(|a| a.eq_ignore_ascii_case(id)))
    };
    if licence.contains('(') {
        // Nested expressions: every id must be covered, which never allows
        // too much.
        return licence
            .split([' ', '(', ')'])
            .all(|w| matches!(w, "" | "AND" | "OR") || one(w));
    }
    licence
        .split(" OR ")
        .any(|option| option.split(" AND ").all(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boilerplate_goes_but_a_copy_stays() {
        let lines = HashSet::from(["Internal use only.", "a b c d"]);
        let (kept, gone) = without_lines("One two three four\n Internal use only.\r\nfive", &lines);
        assert_eq!(kept, "One two three four\nfive");
        assert_eq!(gone, [19, 40]);
        let copy = "a b c d\ne f";
        assert_eq!(without_lines(copy, &lines), (copy.to_owned(), vec![]));
    }

    #[test]
    fn doubt_is_a_refusal() {
        assert_eq!(consent(None), "unknown");
        assert_eq!(consent(Some("Opt_Out")), "opt-out");
        assert_eq!(consent(Some("opt-uot")), "opt-out");
        assert_eq!(consent(Some("allowed")), "allowed");
        assert!(licence_allowed("MIT OR GPL-3.0-only", &["mit"]));
        assert!(!licence_allowed("MIT AND GPL-3.0-only", &["MIT"]));
        assert!(!licence_allowed("(MIT OR ISC) AND GPL-3.0-only", &["MIT"]));
        assert!(!licence_allowed("unknown", &[]));
        assert!(licence_allowed("CC-BY-4.0", &[]));
    }
}
