//! What goes back: completions, chunks and the model list, as OpenAI clients
//! read them.

use crate::{Finish, ModelInfo, Usage};
use serde::{Deserialize, Serialize};

/// A whole answer to a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatCompletion {
    /// The response id.
    pub id: String,
    /// `chat.completion`.
    pub object: String,
    /// Seconds since 1970.
    pub created: i64,
    /// The model that answered.
    pub model: String,
    /// One choice.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: Usage,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatChoice {
    /// 0.
    pub index: u32,
    /// The answer.
    pub message: ReplyMessage,
    /// Always null: not served yet.
    pub logprobs: Option<()>,
    /// Why it ended.
    pub finish_reason: Option<String>,
}

/// The assistant's message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplyMessage {
    /// `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
    /// Null: refusals come as content.
    pub refusal: Option<String>,
}

impl ChatCompletion {
    /// A finished answer.
    pub fn new(
        id: &str,
        created: i64,
        model: &str,
        content: String,
        finish: Finish,
        usage: Usage,
    ) -> Self {
        Self {
            id: id.into(),
            object: "chat.completion".into(),
            created,
            model: model.into(),
            choices: vec![ChatChoice {
                index: 0,
                message: ReplyMessage {
                    role: "assistant".into(),
                    content,
                    refusal: None,
                },
                logprobs: None,
                finish_reason: Some(finish.as_str().into()),
            }],
            usage,
        }
    }
}

/// One server-sent event of a streamed answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatChunk {
    /// The response id, the same in every chunk.
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: String,
    /// Seconds since 1970.
    pub created: i64,
    /// The model that answers.
    pub model: String,
    /// One choice; none in the last chunk when it carries usage.
    pub choices: Vec<ChunkChoice>,
    /// Token counts, in the last chunk alone and only when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// What one chunk adds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChunkChoice {
    /// 0.
    pub index: u32,
    /// The addition.
    pub delta: Delta,
    /// Always null: not served yet.
    pub logprobs: Option<()>,
    /// Null until the last one.
    pub finish_reason: Option<String>,
}

/// The addition itself; an empty one is `{}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// `assistant`, in the first chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

impl ChatChunk {
    fn with(id: &str, created: i64, model: &str, choices: Vec<ChunkChoice>) -> Self {
        Self {
            id: id.into(),
            object: "chat.completion.chunk".into(),
            created,
            model: model.into(),
            choices,
            usage: None,
        }
    }

    fn choice(delta: Delta, finish: Option<Finish>) -> Vec<ChunkChoice> {
        vec![ChunkChoice {
            index: 0,
            delta,
            logprobs: None,
            finish_reason: finish.map(|f| f.as_str().into()),
        }]
    }

    /// The first chunk: the role and no text.
    pub fn role(id: &str, created: i64, model: &str) -> Self {
        let delta = Delta {
            role: Some("assistant".into()),
            content: Some(String::new()),
        };
        Self::with(id, created, model, Self::choice(delta, None))
    }

    /// A chunk of text.
    pub fn text(id: &str, created: i64, model: &str, content: String) -> Self {
        let delta = Delta {
            role: None,
            content: Some(content),
        };
        Self::with(id, created, model, Self::choice(delta, None))
    }

    /// The last chunk with a choice.
    pub fn finish(id: &str, created: i64, model: &str, finish: Finish) -> Self {
        let choices = Self::choice(Delta::default(), Some(finish));
        Self::with(id, created, model, choices)
    }

    /// The closing chunk of `stream_options.include_usage`.
    pub fn usage(id: &str, created: i64, model: &str, usage: Usage) -> Self {
        Self {
            usage: Some(usage),
            ..Self::with(id, created, model, Vec::new())
        }
    }
}

/// An answer of `/v1/completions`, whole or one streamed piece of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextCompletion {
    /// The response id.
    pub id: String,
    /// `text_completion`.
    pub object: String,
    /// Seconds since 1970.
    pub created: i64,
    /// The model that answered.
    pub model: String,
    /// One choice; none in a closing usage chunk.
    pub choices: Vec<TextChoice>,
    /// Token counts: in a whole answer, and in the closing chunk when asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One continuation or a piece of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextChoice {
    /// 0.
    pub index: u32,
    /// Text.
    pub text: String,
    /// Always null: not served yet.
    pub logprobs: Option<()>,
    /// Why it ended; null in pieces before the last.
    pub finish_reason: Option<String>,
}

impl TextCompletion {
    /// A whole answer (`finish` and `usage` given), or a piece of a streamed one.
    pub fn new(
        id: &str,
        created: i64,
        model: &str,
        text: String,
        finish: Option<Finish>,
        usage: Option<Usage>,
    ) -> Self {
        Self {
            id: id.into(),
            object: "text_completion".into(),
            created,
            model: model.into(),
            choices: vec![TextChoice {
                index: 0,
                text,
                logprobs: None,
                finish_reason: finish.map(|f| f.as_str().into()),
            }],
            usage,
        }
    }

    /// The closing chunk of `stream_options.include_usage`.
    pub fn usage(id: &str, created: i64, model: &str, usage: Usage) -> Self {
        Self {
            choices: Vec::new(),
            ..Self::new(id, created, model, String::new(), None, Some(usage))
        }
    }
}

/// The answer of `/v1/models`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// The models.
    pub data: Vec<ModelObject>,
}

/// One model of the list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelObject {
    /// The name requests use.
    pub id: String,
    /// `model`.
    pub object: String,
    /// Seconds since 1970 when it was loaded.
    pub created: i64,
    /// Who made it available.
    pub owned_by: String,
    /// Tokens of prompt and answer together (vLLM's name for it), where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
}

impl From<ModelInfo> for ModelObject {
    fn from(m: ModelInfo) -> Self {
        Self {
            id: m.id,
            object: "model".into(),
            created: m.created,
            owned_by: m.owned_by,
            max_model_len: (m.context > 0).then_some(m.context),
        }
    }
}

impl From<Vec<ModelInfo>> for ModelList {
    fn from(models: Vec<ModelInfo>) -> Self {
        Self {
            object: "list".into(),
            data: models.into_iter().map(Into::into).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_spelt_as_clients_expect() {
        let json = |c: &ChatChunk| serde_json::to_string(c).unwrap();
        assert_eq!(
            json(&ChatChunk::role("r", 1, "m")),
            r#"{"id":"r","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}"#
        );
        assert!(
            json(&ChatChunk::finish("r", 1, "m", Finish::Length))
                .contains(r#""delta":{},"logprobs":null,"finish_reason":"length""#)
        );
        let usage = json(&ChatChunk::usage("r", 1, "m", Usage::new(5, 2, 3)));
        assert!(usage.ends_with(
            r#""choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8,"prompt_tokens_details":{"cached_tokens":2}}}"#
        ));
    }
}
