//! The encoder in this process as an upstream: vectors, and documents ranked by
//! them.

use super::{Chunk, End, Piece, Pieces, Tokens, Upstream, UpstreamError};
use crate::{
    ask::{Ask, Endpoint},
    embed::{self, Embed, EncoderInfo},
};
use ashlar_api::{ApiError, Finish, ModelInfo};
use base64::Engine as _;
use serde_json::{Value, json};

/// Most texts of a request, as in OpenAI's API.
const MOST: usize = 2048;

/// The encoder.
pub(crate) struct Encode {
    pub(crate) embed: Embed,
    pub(crate) info: EncoderInfo,
    pub(crate) created: i64,
}

fn invalid(param: &str, message: String) -> ApiError {
    ApiError::bad_request(message, Some(param), Some("invalid_value"))
}

/// What is asked, read.
struct Wanted {
    texts: Vec<String>,
    base64: bool,
    dimensions: usize,
    /// For a ranking: the texts' own JSON, and how many are wanted. The query is
    /// the first text.
    ranking: Option<(Vec<Value>, usize)>,
}

impl Encode {
    fn read(&self, ask: &Ask) -> Result<Wanted, ApiError> {
        let known: &[&str] = match ask.endpoint {
            Endpoint::Embeddings => &["model", "input", "encoding_format", "dimensions", "user", "safety_identifier", "stream"],
            Endpoint::Rerank => &["model", "query", "documents", "top_n", "user", "safety_identifier", "stream"],
            other => {
                let message = format!("{} is an encoder: it answers /v1/embeddings and /v1/rerank, not {}", self.info.id.name, other.path());
                return Err(ApiError::bad_request(message, Some("model"), Some("unsupported_endpoint")));
            }
        };
        if let Some((field, _)) = ask.fields().find(|(f, _)| !known.contains(f)) {
            let field: String = field.chars().take(80).collect();
            return Err(ApiError::bad_request(format!("unknown field {field:?}"), Some(&field), Some("unknown_parameter")));
        }
        if ask.endpoint == Endpoint::Rerank {
            return self.read_ranking(ask);
        }
        let texts = match ask.typed::<Value>("input", "a string or an array of strings")? {
            Some(Value::String(s)) => vec![s],
            Some(Value::Array(list)) if list.iter().all(Value::is_string) => {
                list.into_iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
            }
            Some(Value::Array(list)) if list.iter().all(|v| v.is_u64() || v.is_array()) => {
                let message = "input as token ids is not supported here: send text".to_owned();
                return Err(ApiError::bad_request(message, Some("input"), Some("unsupported_parameter")));
            }
            _ => return Err(ApiError::bad_request("input must be a string or an array of strings", Some("input"), Some("invalid_type"))),
        };
        let base64 = match ask.typed::<String>("encoding_format", "\"float\" or \"base64\"")?.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => return Err(invalid("encoding_format", "encoding_format must be \"float\" or \"base64\"".into())),
        };
        let full = self.info.id.dimensions;
        let dimensions = ask.typed::<usize>("dimensions", "a count")?.unwrap_or(full);
        if dimensions == 0 || dimensions > full {
            return Err(invalid("dimensions", format!("dimensions must be between 1 and {full}, got {dimensions}")));
        }
        if dimensions < full && !self.info.truncatable {
            let message = format!(
                "dimensions: {} was not trained to be cut to {dimensions} of its {full} dimensions; [encoder] truncatable = true allows it",
                self.info.id.name
            );
            return Err(invalid("dimensions", message));
        }
        self.fits(&texts, "input")?;
        Ok(Wanted { texts, base64, dimensions, ranking: None })
    }

    fn read_ranking(&self, ask: &Ask) -> Result<Wanted, ApiError> {
        let query: String = ask.typed("query", "a string")?.ok_or_else(|| invalid("query", "query is required".into()))?;
        let documents: Vec<Value> = ask.typed("documents", "an array of strings or objects with a text")?.unwrap_or_default();
        let mut texts = vec![query];
        for (i, d) in documents.iter().enumerate() {
            let name = format!("documents[{i}]");
            let text = d.as_str().or(d["text"].as_str());
            texts.push(text.ok_or_else(|| invalid(&name, format!("{name} must be a string or an object with a text")))?.to_owned());
        }
        let top = ask.typed::<usize>("top_n", "a count")?.filter(|n| *n > 0).unwrap_or(documents.len());
        self.fits(&texts, "documents")?;
        Ok(Wanted { texts, base64: false, dimensions: self.info.id.dimensions, ranking: Some((documents, top)) })
    }

    fn fits(&self, texts: &[String], name: &str) -> Result<(), ApiError> {
        if texts.is_empty() || texts.len() > MOST {
            return Err(invalid(name, format!("{name} must hold between 1 and {MOST} texts, it has {}", texts.len())));
        }
        match texts.iter().position(String::is_empty) {
            Some(i) => Err(invalid(name, format!("{name}: text {i} is empty"))),
            None => Ok(()),
        }
    }
}

/// Tokens of all texts.
///
/// # Errors
/// 400 for a text beyond the context: the rest of it would not count.
fn count(info: &EncoderInfo, texts: &[String]) -> Result<u32, ApiError> {
    let mut total = 0u32;
    for (i, text) in texts.iter().enumerate() {
        let n = u32::try_from((info.tokens)(text)?.len()).unwrap_or(u32::MAX);
        if n > info.context {
            let message = format!("text {i} has {n} tokens, {} takes {}", info.id.name, info.context);
            return Err(ApiError::bad_request(message, Some("input"), Some("context_length_exceeded")));
        }
        total = total.saturating_add(n);
    }
    Ok(total)
}

/// The first `dimensions` values, of length 1 again.
fn cut(row: &mut Vec<f32>, dimensions: usize) {
    if dimensions < row.len() {
        row.truncate(dimensions);
        let length = row.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
        row.iter_mut().for_each(|v| *v /= length);
    }
}

fn shown(row: &[f32], base64: bool) -> Value {
    if !base64 {
        return json!(row);
    }
    let bytes: Vec<u8> = row.iter().flat_map(|v| v.to_le_bytes()).collect();
    base64::engine::general_purpose::STANDARD.encode(bytes).into()
}

fn ranked(rows: &[Vec<f32>], documents: &[Value], top: usize) -> Vec<Value> {
    let Some((query, rows)) = rows.split_first() else { return Vec::new() };
    let score = |row: &Vec<f32>| -> f32 { row.iter().zip(query).map(|(a, b)| a * b).sum() };
    let mut scored: Vec<(usize, f32)> = rows.iter().map(score).enumerate().collect();
    scored.sort_by(|a, b| b.1.total_cmp(&a.1));
    scored.truncate(top);
    let text = |d: &Value| d.as_str().map_or_else(|| d.clone(), |s| json!({"text": s}));
    scored.into_iter().map(|(i, s)| json!({"index": i, "document": text(&documents[i]), "relevance_score": s})).collect()
}

#[async_trait::async_trait]
impl Upstream for Encode {
    fn check(&self, ask: &Ask, _model: &str) -> Result<(), ApiError> {
        self.read(ask).map(drop)
    }

    async fn send(&self, ask: &Ask, _model: &str, _seed: i64) -> Result<Pieces, UpstreamError> {
        let Wanted { texts, base64, dimensions, ranking } = self.read(ask).map_err(UpstreamError::Local)?;
        let info = self.info.clone();
        let counted = tokio::task::spawn_blocking(move || count(&info, &texts).map(|n| (n, texts))).await;
        let counted = counted.map_err(|e| UpstreamError::Local(ApiError::internal(e.to_string())))?;
        let (n, texts) = counted.map_err(UpstreamError::Local)?;
        let mut rows = embed::embed(&self.embed, texts).await.map_err(UpstreamError::Local)?;
        let fields = match ranking {
            Some((documents, top)) => format!("\"results\":{}", json!(ranked(&rows, &documents, top))),
            None => {
                rows.iter_mut().for_each(|r| cut(r, dimensions));
                let one = |(i, row): (usize, &Vec<f32>)| json!({"object": "embedding", "index": i, "embedding": shown(row, base64)});
                format!("\"object\":\"list\",\"data\":{}", json!(rows.iter().enumerate().map(one).collect::<Vec<_>>()))
            }
        };
        let usage = json!({"prompt_tokens": n, "total_tokens": n}).to_string();
        let chunk = Chunk { fields, usage: Some(usage), ..Chunk::default() };
        let end = End { finish: Finish::Stop, refused: false, tokens: Tokens { input: n, ..Tokens::default() }, timings: None };
        Ok(Box::pin(futures::stream::iter([Ok(Piece::Chunk(chunk)), Ok(Piece::Done(end))])))
    }

    async fn probe(&self) -> Result<(), UpstreamError> {
        Ok(())
    }

    fn models(&self) -> Vec<ModelInfo> {
        let id = &self.info.id;
        vec![ModelInfo { id: id.name.clone(), created: self.created, owned_by: "ashlar".into(), context: self.info.context }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_vector_has_length_one_and_the_best_comes_first() {
        let mut row = vec![0.6, 0.0, 0.8];
        cut(&mut row, 2);
        assert_eq!(row, [1.0, 0.0]);
        let rows = vec![vec![1.0, 0.0], vec![0.0, 1.0], vec![0.8, 0.6]];
        let got = ranked(&rows, &[json!("a"), json!({"text": "b"})], 1);
        assert_eq!((got.len(), &got[0]["index"], &got[0]["document"]), (1, &json!(1), &json!({"text": "b"})));
        assert_eq!(shown(&[1.0, -2.0], true), "AACAPwAAAMA=");
    }
}
