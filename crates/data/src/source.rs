//! Reads folders and files into documents.
//!
//! A document is what one line of a `.jsonl` file, or one whole `.txt` or
//! `.md` file, holds (front matter aside). Its identity is the hash of its raw text; where it was
//! seen is told apart from that. Nothing is passed over in silence: a malformed
//! line is an error or is set aside and counted, files of other kinds are
//! listed.

use crate::{DataError, OnBad, table::io};
use ashlar_core::{Digest, json};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// One raw document as one source showed it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Raw {
    pub doc: Digest,
    pub source: String,
    pub line: u64,
    pub id: String,
    pub title: String,
    pub text: String,
    pub licence: Option<String>,
    pub consent: Option<String>,
    pub lang: Option<String>,
    /// The other fields of the line, as canonical JSON.
    pub attributes: Option<String>,
}

/// A line that is not a document.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub(crate) struct Bad {
    pub source: String,
    pub line: u64,
    pub column: u64,
    pub problem: String,
    pub bytes: String,
}

#[derive(Debug, Default)]
pub(crate) struct Ingested {
    pub documents: Vec<Raw>,
    pub bad: Vec<Bad>,
    /// Files of other kinds.
    pub ignored: Vec<String>,
}

/// Reads all `sources`; the result does not depend on their order.
pub(crate) fn ingest(
    sources: &[PathBuf],
    on_bad: OnBad,
    text_licence: Option<&str>,
) -> Result<Ingested, DataError> {
    let mut out = Ingested::default();
    for source in sources {
        let label = source
            .file_name()
            .map_or_else(|| ".".into(), |n| n.to_string_lossy().into_owned());
        if source.is_dir() {
            let mut files = Vec::new();
            walk(source, "", &mut files)?;
            for (path, name) in files {
                if !file(
                    &path,
                    &format!("{label}/{name}"),
                    &name,
                    text_licence,
                    on_bad,
                    &mut out,
                )? {
                    out.ignored.push(format!("{label}/{name}"));
                }
            }
        } else if !file(source, &label, &label, text_licence, on_bad, &mut out)? {
            return Err(DataError::UnknownKind(source.clone()));
        }
    }
    if out.documents.is_empty() {
        let sources: Vec<_> = sources.iter().map(|s| s.display().to_string()).collect();
        return Err(DataError::NoDocuments {
            sources: sources.join(", "),
            ignored: out.ignored.len(),
        });
    }
    out.documents.sort();
    out.bad.sort();
    out.ignored.sort();
    Ok(out)
}

/// Visible files below `folder`, by name with `/` between parts.
fn walk(folder: &Path, prefix: &str, out: &mut Vec<(PathBuf, String)>) -> Result<(), DataError> {
    let entries = std::fs::read_dir(folder).map_err(io(folder))?;
    let mut entries = entries.collect::<Result<Vec<_>, _>>().map_err(io(folder))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let path = entry.path();
        if path.is_dir() {
            walk(&path, &format!("{prefix}{name}/"), out)?;
        } else {
            out.push((path, format!("{prefix}{name}")));
        }
    }
    Ok(())
}

/// Reads one file; `false` when its kind is not one of ours.
fn file(
    path: &Path,
    source: &str,
    id: &str,
    text_licence: Option<&str>,
    on_bad: OnBad,
    out: &mut Ingested,
) -> Result<bool, DataError> {
    let lines = match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl") => true,
        Some("txt" | "md") => false,
        _ => return Ok(false),
    };
    let bytes = std::fs::read(path).map_err(io(path))?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let mut take = |line: u64, part: &[u8], read: Result<Raw, (u64, String)>| match read {
        Ok(raw) => {
            out.documents.push(raw);
            Ok(())
        }
        Err((column, problem)) if on_bad == OnBad::Error => Err(DataError::Malformed {
            file: source.to_owned(),
            line,
            column,
            problem,
        }),
        Err((column, problem)) => {
            out.bad.push(Bad {
                source: source.to_owned(),
                line,
                column,
                problem,
                bytes: String::from_utf8_lossy(part).into_owned(),
            });
            Ok(())
        }
    };
    if lines {
        for (number, part) in bytes.split(|b| *b == b'\n').enumerate() {
            if part.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let line = number as u64 + 1;
            take(line, part, read_line(part, source, line))?;
        }
    } else {
        let read = utf8(bytes)
            .map_err(|(column, problem)| (1, column, problem))
            .and_then(|text| read_page(text, source, id, path, text_licence));
        match read {
            Ok(raw) => take(1, bytes, Ok(raw))?,
            Err((line, column, problem)) => take(line, bytes, Err((column, problem)))?,
        }
    }
    Ok(true)
}

/// A page: `key: value` lines between two `---` lines, where it opens with
/// them, then the text.
fn read_page(
    whole: &str,
    source: &str,
    id: &str,
    path: &Path,
    text_licence: Option<&str>,
) -> Result<Raw, (u64, u64, String)> {
    let (mut fields, mut text) = (BTreeMap::new(), whole);
    if let Some(mut rest) = whole.strip_prefix("---\n") {
        for number in 2.. {
            let Some((line, after)) = rest.split_once('\n') else {
                return Err((1, 1, "front matter has no closing \"---\"".to_owned()));
            };
            rest = after;
            if line.trim_end() == "---" {
                break;
            }
            let Some((key, value)) = line.split_once(':') else {
                return Err((
                    number,
                    1,
                    format!("front matter {line:?} is not \"key: value\""),
                ));
            };
            let value = value.trim().trim_matches(['"', '\'']);
            fields.insert(key.trim().to_owned(), value.to_owned());
        }
        text = rest.trim();
    }
    let mut field = |names: &[&str]| names.iter().find_map(|n| fields.remove(*n));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let heading = text.lines().find_map(|l| l.strip_prefix("# "));
    let title = heading.map_or_else(|| stem.into_owned(), |h| h.trim().to_owned());
    Ok(Raw {
        doc: Digest::of(text.as_bytes()),
        source: source.to_owned(),
        line: 1,
        id: field(&["id"]).unwrap_or_else(|| id.to_owned()),
        title: field(&["title"]).unwrap_or(title),
        text: text.to_owned(),
        licence: field(&["licence", "license"]).or(text_licence.map(str::to_owned)),
        consent: field(&["consent"]),
        lang: field(&["lang", "language"]),
        attributes: (!fields.is_empty())
            .then(|| json::canonical(&fields).map_err(|e| (1, 1, e.to_string())))
            .transpose()?,
    })
}

fn utf8(bytes: &[u8]) -> Result<&str, (u64, String)> {
    std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        (
            at as u64 + 1,
            format!("byte {:#04x} is not UTF-8", bytes[at]),
        )
    })
}

/// One line of JSON as a document, or the column and what is wrong.
fn read_line(bytes: &[u8], source: &str, line: u64) -> Result<Raw, (u64, String)> {
    let text = utf8(bytes)?;
    let mut map: Map<String, Value> = serde_json::from_str(text).map_err(|e| {
        let said = e.to_string();
        let problem = said.split(" at line ").next().unwrap_or_default();
        (e.column() as u64, format!("not a JSON object: {problem}"))
    })?;
    // The column of a field is where its name stands.
    let at = |name: &str| {
        text.find(&format!("\"{name}\""))
            .map_or(1, |c| c as u64 + 1)
    };
    let mut field = |names: &[&str]| -> Result<Option<String>, (u64, String)> {
        for name in names {
            match map.shift_remove(*name) {
                None | Some(Value::Null) => {}
                Some(Value::String(s)) => return Ok(Some(s)),
                Some(Value::Number(n)) if *name == "id" => return Ok(Some(n.to_string())),
                Some(Value::Bool(b)) if *name == "consent" => {
                    return Ok(Some(if b { "allowed" } else { "opt-out" }.to_owned()));
                }
                Some(other) => {
                    return Err((
                        at(name),
                        format!("field {name:?} is {other}, needs a string"),
                    ));
                }
            }
        }
        Ok(None)
    };
    let missing = |name: &str| (1, format!("field {name:?} is missing"));
    let id = field(&["id"])?.ok_or_else(|| missing("id"))?;
    let text = field(&["text"])?.ok_or_else(|| missing("text"))?;
    let title = field(&["title"])?.unwrap_or_default();
    let licence = field(&["licence", "license"])?;
    let consent = field(&["consent"])?;
    let lang = field(&["lang", "language"])?;
    let attributes = (!map.is_empty())
        .then(|| json::canonical(&map).map_err(|e| (1, e.to_string())))
        .transpose()?;
    Ok(Raw {
        doc: Digest::of(text.as_bytes()),
        source: source.to_owned(),
        line,
        id,
        title,
        text,
        licence,
        consent,
        lang,
        attributes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named_by_line_and_column() {
        let read = |s: &str| read_line(s.as_bytes(), "a.jsonl", 3).unwrap_err();
        assert_eq!(read(r#"{"id":"a","text":"b""#).0, 20);
        assert_eq!(
            read(r#"{"id":"a"}"#),
            (1, "field \"text\" is missing".into())
        );
        let (column, problem) = read(r#"{"id":"a","text":[1]}"#);
        assert_eq!(column, 11);
        assert!(problem.contains("needs a string"), "{problem}");
        assert_eq!(read_line(b"{\"id\":\"\xff\"}", "a", 1).unwrap_err().0, 8);
    }

    #[test]
    fn front_matter_is_read() {
        let page = |s: &str| read_page(s, "d/a.md", "a.md", Path::new("d/a.md"), Some("MIT"));
        let raw = page("---\ntitle: Ports\nlicence: CC0-1.0\nteam: x\n---\n\n# P\nText\n").unwrap();
        assert_eq!(
            (raw.title.as_str(), raw.text.as_str()),
            ("Ports", "# P\nText")
        );
        assert_eq!(raw.licence.as_deref(), Some("CC0-1.0"));
        assert_eq!(raw.attributes.as_deref(), Some(r#"{"team":"x"}"#));
        let raw = page("# P\nText").unwrap();
        assert_eq!(
            (raw.title.as_str(), raw.licence.as_deref()),
            ("P", Some("MIT"))
        );
        assert_eq!(page("---\nwhat\n---\n").unwrap_err().0, 2);
        assert_eq!(page("---\na: b\n").unwrap_err().0, 1);
    }

    #[test]
    fn other_fields_are_kept() {
        let raw = read_line(
            br#"{"id":7,"text":"t","license":"MIT","consent":false,"team":"ops","b":[1]}"#,
            "a.jsonl",
            1,
        )
        .unwrap();
        assert_eq!(raw.id, "7");
        assert_eq!(raw.licence.as_deref(), Some("MIT"));
        assert_eq!(raw.consent.as_deref(), Some("opt-out"));
        assert_eq!(raw.attributes.as_deref(), Some(r#"{"b":[1],"team":"ops"}"#));
        assert_eq!(raw.doc, Digest::of(b"t"));
    }
}
