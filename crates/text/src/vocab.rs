//! A vocabulary: each token's text by id, and the id by the text.
//!
//! One text for all tokens and a table of ids beside it, so that a quarter of a
//! million tokens cost two allocations. The table's hash has a random key: a
//! vocabulary comes from a file, which must not choose its collisions.

use crate::{TextError, error::clip};
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use std::hash::BuildHasher;

pub(crate) struct Vocab {
    text: String,
    /// Where each token ends in `text`.
    ends: Vec<u32>,
    ids: HashTable<u32>,
    hasher: RandomState,
    longest: usize,
}

impl Vocab {
    /// The vocabulary of `tokens`, whose ids are their places.
    ///
    /// # Errors
    /// [`TextError::Vocabulary`] for a token that comes twice, or tokens of
    /// 4 GiB together.
    pub(crate) fn new(tokens: &[String]) -> Result<Self, TextError> {
        let bytes: usize = tokens.iter().map(String::len).sum();
        if u32::try_from(bytes.max(tokens.len())).is_err() {
            return Err(TextError::Vocabulary(format!("{} tokens take {bytes} bytes", tokens.len())));
        }
        let mut vocab = Self {
            text: String::with_capacity(bytes),
            ends: Vec::with_capacity(tokens.len()),
            ids: HashTable::with_capacity(tokens.len()),
            hasher: RandomState::default(),
            longest: 0,
        };
        for (id, token) in (0u32..).zip(tokens) {
            if vocab.id(token.as_bytes()).is_some() {
                return Err(TextError::Vocabulary(format!(
                    "token {:?} appears twice, the second time as id {id}",
                    clip(token)
                )));
            }
            vocab.text.push_str(token);
            vocab.ends.push(vocab.text.len() as u32);
            vocab.longest = vocab.longest.max(token.len());
            let Self { text, ends, ids, hasher, .. } = &mut vocab;
            ids.insert_unique(hasher.hash_one(token.as_bytes()), id, |&id| {
                hasher.hash_one(slice(text, ends, id).as_bytes())
            });
        }
        Ok(vocab)
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The text of a token; none outside the vocabulary.
    pub(crate) fn token(&self, id: u32) -> &str {
        slice(&self.text, &self.ends, id)
    }

    pub(crate) fn id(&self, token: &[u8]) -> Option<u32> {
        let is = |&id: &u32| slice(&self.text, &self.ends, id).as_bytes() == token;
        self.ids.find(self.hasher.hash_one(token), is).copied()
    }

    /// The id of two tokens' texts joined, neither being empty.
    pub(crate) fn joined(&self, left: u32, right: u32) -> Option<u32> {
        let (left, right) = (self.token(left).as_bytes(), self.token(right).as_bytes());
        let len = left.len() + right.len();
        if left.is_empty() || right.is_empty() || len > self.longest {
            return None;
        }
        let mut short = [0; 64];
        let Some(joined) = short.get_mut(..len) else {
            return self.id(&[left, right].concat());
        };
        joined[..left.len()].copy_from_slice(left);
        joined[left.len()..].copy_from_slice(right);
        self.id(joined)
    }
}

fn slice<'t>(text: &'t str, ends: &[u32], id: u32) -> &'t str {
    let i = id as usize;
    let start = i.checked_sub(1).and_then(|i| ends.get(i)).map_or(0, |&end| end as usize);
    ends.get(i).map_or("", |&end| &text[start..end as usize])
}
