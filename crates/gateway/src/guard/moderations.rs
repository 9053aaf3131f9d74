//! `/v1/moderations`: OpenAI's schema, answered by the lexicon or a judge.
//!
//! `model` says by whom: left out or one of OpenAI's names, the lexicon; a
//! policy's name, that policy's check and thresholds. Nothing of it is recorded
//! but counters: what is sent here is not answered by a model and goes nowhere,
//! but to the judge that is asked for.

use super::{
    Shared, Stage, Who,
    active::ask,
    categories::{Category, Scores},
    judge::{AskJudge, Judgement},
    lexicon,
    policy::{Check, Policy},
};
use ashlar_api::ApiError;
use serde_json::{Map, Value, json};
use std::{str::FromStr as _, sync::Arc};

/// What the lexicon answers as.
const LEXICON: &str = "ashlar-lexicon-1";
/// OpenAI's names for its own.
const THEIRS: [&str; 5] =
    ["omni-moderation-latest", "omni-moderation-2024-09-26", "text-moderation-latest", "text-moderation-stable", "text-moderation-007"];
/// Most texts of one request.
const MOST: usize = 1000;

/// Answers a request's body.
///
/// # Errors
/// 400 naming the field; 502 when a judge gives no verdict.
pub(super) async fn answer(
    shared: &Arc<Shared>,
    policies: &[Arc<Policy>],
    judge: &AskJudge,
    who: &Who,
    body: &[u8],
) -> Result<Value, ApiError> {
    let bad = |message: String, param: Option<&str>, code: &str| ApiError::bad_request(message, param, Some(code));
    let body: Map<String, Value> = serde_json::from_slice(body)
        .map_err(|e| bad(format!("the body is not the JSON object expected: {e}"), None, "invalid_json"))?;
    if let Some(unknown) = body.keys().find(|k| !matches!(k.as_str(), "input" | "model")) {
        let unknown: String = unknown.chars().take(80).collect();
        return Err(bad(format!("{unknown} is not a field of this endpoint"), Some(&unknown), "unknown_parameter"));
    }
    let model = match body.get("model") {
        None | Some(Value::Null) => LEXICON,
        Some(Value::String(name)) => name,
        Some(_) => return Err(bad("model must be a string".into(), Some("model"), "invalid_type")),
    };
    let texts = texts(body.get("input"))?;
    let policy = policies.iter().find(|p| p.name == model && matches!(p.check, Check::Moderation | Check::Judge));
    if policy.is_none() && model != LEXICON && !THEIRS.contains(&model) {
        let names = policies.iter().filter(|p| matches!(p.check, Check::Moderation | Check::Judge)).map(|p| p.name.as_str());
        let names: Vec<&str> = [LEXICON].into_iter().chain(names).collect();
        let model: String = model.chars().take(100).collect();
        let message = format!("there is no moderation model {model:?}; there are: {}", names.join(", "));
        return Err(ApiError::not_found(message, Some("model"), Some("model_not_found")));
    }
    let mut results = Vec::with_capacity(texts.len());
    for text in &texts {
        results.push(match policy {
            Some(policy) if matches!(policy.check, Check::Judge) => {
                let said = ask(judge, policy, Stage::Request, "", text).await;
                let said = said.map_err(|why| ApiError {
                    status: 502,
                    code: Some("no_verdict".into()),
                    ..ApiError::internal(format!("the judge of policy {:?} gave no verdict: {why}", policy.name))
                });
                let (scores, flagged) = match said? {
                    Judgement::Safe => (Scores::default(), false),
                    Judgement::Unsafe(kinds) => {
                        let mut scores = Scores::default();
                        kinds.iter().filter_map(|(k, s)| Some((Category::from_str(k).ok()?, *s))).for_each(|(c, s)| scores.raise(c, s));
                        (scores, true)
                    }
                };
                result(&scores, |_, s| s >= 1.0, flagged)
            }
            _ => {
                let scores = lexicon::scores(text);
                let over = |c: Category, s: f64| s >= policy.map_or(0.5, |p| p.threshold(c.as_str(), who));
                let flagged = scores.iter().any(|(c, s)| over(c, s));
                result(&scores, over, flagged)
            }
        });
    }
    shared.counters.moderated(texts.len());
    let by = if policy.is_some() { model } else { LEXICON };
    Ok(json!({"id": ashlar_core::id::new("modr"), "model": by, "results": results}))
}

fn result(scores: &Scores, over: impl Fn(Category, f64) -> bool, flagged: bool) -> Value {
    let map = |f: &dyn Fn(Category, f64) -> Value| -> Map<String, Value> {
        scores.iter().map(|(c, s)| (c.as_str().to_owned(), f(c, s))).collect()
    };
    json!({
        "flagged": flagged,
        "categories": map(&|c, s| over(c, s).into()),
        "category_scores": map(&|_, s| s.into()),
        "category_applied_input_types": map(&|_, _| json!(["text"])),
    })
}

/// The texts of `input`: one for a string, one for each string of an array, one
/// for all parts together.
fn texts(input: Option<&Value>) -> Result<Vec<String>, ApiError> {
    let bad = |message: String, code: &str| ApiError::bad_request(message, Some("input"), Some(code));
    let wrong = || bad("input must be a string, an array of strings, or an array of parts".into(), "invalid_type");
    match input {
        None | Some(Value::Null) => Err(bad("input is required".into(), "missing_required_parameter")),
        Some(Value::String(text)) => Ok(vec![text.clone()]),
        Some(Value::Array(items)) if items.is_empty() => Err(bad("input is empty".into(), "invalid_value")),
        Some(Value::Array(items)) if items.len() > MOST => {
            Err(bad(format!("input has {} texts, the limit is {MOST}", items.len()), "invalid_value"))
        }
        Some(Value::Array(items)) if items.iter().all(Value::is_string) => {
            Ok(items.iter().filter_map(Value::as_str).map(str::to_owned).collect())
        }
        Some(Value::Array(parts)) => {
            let mut joined = Vec::new();
            for (i, part) in parts.iter().enumerate() {
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(text)) => joined.push(text),
                    (Some("image_url"), _) => {
                        return Err(bad(format!("input[{i}] is an image: only text is judged here"), "unsupported_value"));
                    }
                    _ => return Err(wrong()),
                }
            }
            Ok(vec![joined.join("\n")])
        }
        Some(_) => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::active::tests::active;

    async fn ask_for(body: Value) -> Result<Value, ApiError> {
        let a = active("[guard.policies.j]\ncheck = \"judge\"\njudge = \"m\"\n[guard.policies.strict]\ncheck = \"moderation\"\nthresholds = { all = 0.05 }");
        answer(&Arc::default(), &a.policies, &a.ask, &Who::default(), body.to_string().as_bytes()).await
    }

    #[tokio::test]
    async fn the_schema_is_openais() {
        let got = ask_for(json!({"input": ["I will kill you", "Good morning"], "model": "omni-moderation-latest"})).await.unwrap();
        assert_eq!(got["model"], LEXICON);
        assert!(got["id"].as_str().unwrap().starts_with("modr-"));
        let [bad, good] = got["results"].as_array().unwrap().as_slice() else { panic!("{got}") };
        assert_eq!((&bad["flagged"], &good["flagged"]), (&json!(true), &json!(false)));
        for field in ["categories", "category_scores", "category_applied_input_types"] {
            assert_eq!(bad[field].as_object().unwrap().len(), 13, "{field}");
        }
        assert_eq!(bad["categories"]["harassment/threatening"], true);
        assert_eq!(bad["category_applied_input_types"]["hate"], json!(["text"]));
    }

    #[tokio::test]
    async fn a_policy_judges_under_its_name() {
        let got = ask_for(json!({"input": [{"type": "text", "text": "a bad"}, {"type": "text", "text": "thing"}], "model": "j"})).await.unwrap();
        assert_eq!((&got["results"][0]["flagged"], &got["results"][0]["categories"]["hate"]), (&json!(true), &json!(true)));
        assert_eq!(got["results"].as_array().unwrap().len(), 1);
        assert_eq!(ask_for(json!({"input": "broken", "model": "j"})).await.unwrap_err().status, 502);
        let got = ask_for(json!({"input": "you useless, worthless pig", "model": "strict"})).await.unwrap();
        assert_eq!(got["results"][0]["flagged"], true);
    }

    #[tokio::test]
    async fn what_is_wrong_is_named() {
        for (body, status, param) in [
            (json!({}), 400, "input"), (json!({"input": 5}), 400, "input"), (json!({"input": []}), 400, "input"),
            (json!({"input": [1]}), 400, "input"), (json!({"input": "x", "model": "gpt"}), 404, "model"),
            (json!({"input": "x", "user": "u"}), 400, "user"),
            (json!({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}), 400, "input"),
        ] {
            let e = ask_for(body.clone()).await.unwrap_err();
            assert_eq!((e.status, e.param.as_deref()), (status, Some(param)), "{body}");
        }
    }
}
