//! What can be wrong with a vocabulary, a template or a conversation.

use ashlar_core::{Fault, Hint};

/// A tokenizer, template or conversation that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A kind of tokenizer that is not implemented.
    #[error("{what} {found:?} is not supported; {known} are")]
    Unsupported {
        /// Which property.
        what: &'static str,
        /// Its value.
        found: String,
        /// What is supported.
        known: &'static str,
    },
    /// A vocabulary that contradicts itself.
    #[error("vocabulary: {0}")]
    Vocabulary(String),
    /// The tokenizer refused the text.
    #[error("tokenizing {bytes} bytes: {why}")]
    Encode {
        /// Length of the text.
        bytes: usize,
        /// The tokenizer's words.
        why: String,
    },
    /// Plain text whose tokens would be control tokens.
    #[error("plain text would become the control token {token:?}")]
    Control {
        /// The token.
        token: String,
    },
    /// A template that does not compile, or failed while rendering.
    #[error("chat template: {why}")]
    Template {
        /// The engine's words, with the line.
        why: String,
    },
    /// A template whose output is beyond what its input can explain.
    #[error("chat template wrote more than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// A role that is not a short word.
    #[error("message {index}: role {role:?} must be 1 to 64 letters, digits, '_' or '-'")]
    Role {
        /// Position in the conversation.
        index: usize,
        /// The role, clipped.
        role: String,
    },
    /// A template that edits contents, so that they cannot be kept apart from
    /// its own markup.
    #[error("chat template changes the contents of messages beyond trimming them")]
    Rewrites,
    /// A conversation of which nothing would be trained.
    #[error("none of the {tokens} tokens of {messages} messages is trained: no answer in it")]
    NothingTrained {
        /// Tokens of the conversation.
        tokens: usize,
        /// Messages in it.
        messages: usize,
    },
    /// An earlier rendering is not a prefix of the whole one.
    #[error(
        "message {index}: what comes before and with it has {part} tokens, which differ from \
         the whole conversation's {whole} at token {at}"
    )]
    Prefix {
        /// The assistant message.
        index: usize,
        /// Tokens of the part.
        part: usize,
        /// Tokens of the whole.
        whole: usize,
        /// First difference.
        at: usize,
    },
}

impl Hint for TextError {
    fn fault(&self) -> Fault {
        Fault::Input
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Unsupported { .. } => "use a model with a byte-level BPE tokenizer",
            Self::NothingTrained { .. } => "give each sample a message of role assistant",
            Self::Prefix { .. } => {
                "split the conversation so that each answer comes last, and let no answer \
                 begin with white space"
            }
            Self::Rewrites => "use a template that inserts each message's content as it is",
            Self::Control { .. } => "remove the control token's text from the input",
            Self::Role { .. } => "use system, user, assistant or tool",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// At most 96 characters of foreign text.
pub(crate) fn clip(text: &str) -> String {
    let mut out: String = text.chars().take(96).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    out
}
