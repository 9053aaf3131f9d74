//! Chat templates: a conversation to text, and safely to tokens.
//!
//! Rendered text alone cannot be tokenized safely: `<|im_end|>` typed by a user
//! looks like the template's own. So [`ChatTemplate::encode`] renders twice,
//! once with a placeholder for each content, and lets only the markup between
//! the placeholders hold control tokens. Rejected: refusing or escaping such
//! contents, which forbids people to write about their tools.

use crate::{TextError, Tokenizer, error::clip, jinja};
use ashlar_core::{Digest, clock};
use minijinja::{Environment, Error, context};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: &str, content: &str) -> Self {
        Self {
            role: role.to_owned(),
            content: content.to_owned(),
        }
    }
}

/// A compiled chat template. Clones share it.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Inner>);

struct Inner {
    env: Environment<'static>,
    bos: String,
    eos: String,
    source_len: usize,
    digest: Digest,
}

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are the texts of those tokens.
    ///
    /// # Errors
    /// [`TextError::Template`] with the line that does not compile.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TextError> {
        let env = jinja::compile(source).map_err(|e| template_error(&e))?;
        let mut hasher = ashlar_core::Hasher::new();
        for part in [source, bos, eos] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Ok(Self(Arc::new(Inner {
            env,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            source_len: source.len(),
            digest: hasher.finish(),
        })))
    }

    /// The digest of the template and its two token texts.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }

    /// The conversation as text; with `add_generation_prompt`, up to where the
    /// assistant begins to write.
    ///
    /// # Errors
    /// [`TextError::Template`] when the template raises or runs out of fuel,
    /// [`TextError::Role`], [`TextError::TooLong`].
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        check_roles(messages)?;
        self.render_at(messages, add_generation_prompt, clock::now_ms())
    }

    fn render_at(&self, messages: &[Message], prompt: bool, now: i64) -> Result<String, TextError> {
        let inner = &*self.0;
        // Each message can bring the template's markup once and its text twice.
        let text: usize = messages.iter().map(|m| m.content.len()).sum();
        let limit = (messages.len() + 2) * (inner.source_len + 1024) + 2 * text;
        let context = context! {
            messages => messages,
            add_generation_prompt => prompt,
            bos_token => inner.bos,
            eos_token => inner.eos,
            tools => (),
            documents => (),
            __now_ms => now, // `jinja::NOW`
        };
        jinja::render(&inner.env, context, limit)
            .map_err(|e| template_error(&e))?
            .ok_or(TextError::TooLong { limit })
    }

    /// The conversation as tokens. Control tokens come from the template alone,
    /// never from a content; where contents hold no control token's text, this
    /// is `tokenizer.encode(render(..), true)`.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`];
    /// [`TextError::Rewrites`] when the template changes contents.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, TextError> {
        self.encode_at(tokenizer, messages, add_generation_prompt, clock::now_ms())
    }

    pub(crate) fn encode_at(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        prompt: bool,
        now: i64,
    ) -> Result<Vec<u32>, TextError> {
        check_roles(messages)?;
        let rendered = self.render_at(messages, prompt, now)?;
        let segments = self.segments(messages, &rendered, prompt, now)?;
        let mut ids = Vec::new();
        // Plain text since the last control token, markup and contents joined,
        // so that words are split as in one string.
        let mut plain = String::new();
        for segment in &segments {
            match segment {
                Segment::Content(text) => plain.push_str(text),
                Segment::Markup(text) => {
                    let mut from = 0;
                    for (range, id) in tokenizer.controls(text)? {
                        plain.push_str(text.get(from..range.start).unwrap_or_default());
                        ids.extend(tokenizer.encode(&plain, false)?);
                        plain.clear();
                        ids.push(id);
                        from = range.end;
                    }
                    plain.push_str(text.get(from..).unwrap_or_default());
                }
            }
        }
        ids.extend(tokenizer.encode(&plain, false)?);
        Ok(ids)
    }

    /// Cuts `rendered` into markup and contents, and proves the cut: joined,
    /// the segments are `rendered`.
    fn segments<'m>(
        &self,
        messages: &'m [Message],
        rendered: &str,
        prompt: bool,
        now: i64,
    ) -> Result<Vec<Segment<'m>>, TextError> {
        // A private-use character that occurs nowhere marks the placeholders.
        let mark = ('\u{F0000}'..='\u{FFFFD}')
            .find(|&c| !rendered.contains(c) && messages.iter().all(|m| !m.content.contains(c)))
            .ok_or(TextError::Rewrites)?;
        let marked: Vec<Message> = messages
            .iter()
            .enumerate()
            .map(|(i, m)| Message {
                role: m.role.clone(),
                // An empty content may be left out by a template that asks.
                content: match m.content.is_empty() {
                    true => String::new(),
                    false => format!("{mark}{i}{mark}"),
                },
            })
            .collect();
        let skeleton = self.render_at(&marked, prompt, now)?;
        let whole = |text: &'m str| text;
        let trimmed = |text: &'m str| text.trim();
        for content in [whole as fn(&'m str) -> &'m str, trimmed] {
            let mut segments = Vec::new();
            // Odd parts stand between two marks: the number of a message.
            for (n, part) in skeleton.split(mark).enumerate() {
                segments.push(if n % 2 == 0 {
                    Segment::Markup(part.to_owned())
                } else {
                    let message = part.parse().ok().and_then(|i: usize| messages.get(i));
                    Segment::Content(content(&message.ok_or(TextError::Rewrites)?.content))
                });
            }
            let joined: String = segments.iter().map(Segment::text).collect();
            if joined == rendered {
                return Ok(segments);
            }
        }
        Err(TextError::Rewrites)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChatTemplate({})", self.0.digest.short())
    }
}

enum Segment<'m> {
    Markup(String),
    Content(&'m str),
}

impl Segment<'_> {
    fn text(&self) -> &str {
        match self {
            Self::Markup(text) => text,
            Self::Content(text) => text,
        }
    }
}

/// A role stands in the markup as it is, so it must be a word.
fn check_roles(messages: &[Message]) -> Result<(), TextError> {
    let word = |r: &str| {
        (1..=64).contains(&r.len())
            && r.bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
    };
    match messages.iter().position(|m| !word(&m.role)) {
        None => Ok(()),
        Some(index) => Err(TextError::Role {
            index,
            role: clip(&messages[index].role),
        }),
    }
}

fn template_error(error: &Error) -> TextError {
    let mut why = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(e) = source {
        why = format!("{why}: {e}");
        source = e.source();
    }
    TextError::Template { why }
}
