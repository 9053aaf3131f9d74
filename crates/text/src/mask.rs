//! Which tokens of a conversation are trained: the assistant's, each with its
//! end of turn.
//!
//! Found by rendering: what the template adds after the generation prompt is
//! the answer. This works with any template, needs no marks in it, and is
//! exactly what the model will have to write when served.

use crate::{ChatTemplate, Message, TextError, Tokenizer};
use ashlar_core::clock;

/// A tokenized conversation and its loss mask, of equal length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masked {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether each is a target of training.
    pub trained: Vec<bool>,
}

/// Tokenizes `messages` and marks the assistant's tokens with their
/// end-of-turn token; what the template writes after that token is not marked.
///
/// # Errors
/// [`TextError::NothingTrained`] when no token is marked, [`TextError::Prefix`]
/// when the template rewrites earlier turns, so that an answer cannot be
/// found, and those of [`ChatTemplate::encode`].
pub fn masked_chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<Masked, TextError> {
    let now = clock::now_ms();
    let encode = |n, prompt| template.encode_at(tokenizer, &messages[..n], prompt, now);
    let tokens = encode(messages.len(), false)?;
    let mut trained = vec![false; tokens.len()];
    for (index, message) in messages.iter().enumerate() {
        if message.role != "assistant" {
            continue;
        }
        let before = encode(index, true)?;
        let with = encode(index + 1, false)?;
        for part in [&before, &with] {
            let same = part.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
            if same < part.len() {
                return Err(TextError::Prefix {
                    index,
                    part: part.len(),
                    whole: tokens.len(),
                    at: same,
                });
            }
        }
        let answer = with.get(before.len()..).unwrap_or_default();
        // No content holds a control token, so the last one ends the turn.
        let end = answer
            .iter()
            .rposition(|&id| tokenizer.is_control(id))
            .map_or(answer.len(), |last| last + 1);
        trained[before.len()..before.len() + end].fill(true);
    }
    if !trained.contains(&true) {
        return Err(TextError::NothingTrained {
            tokens: tokens.len(),
            messages: messages.len(),
        });
    }
    Ok(Masked { tokens, trained })
}
