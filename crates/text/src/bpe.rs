//! Byte-pair encoding, byte-level and SentencePiece's.
//!
//! Equal to the `tokenizers` crate token by token, which `tests/bpe.rs` checks:
//! neighbours that join first join first, the leftmost of equals. By hand,
//! because that crate takes seconds to read a quarter of a million tokens and
//! encodes some megabytes a second.
//!
//! SentencePiece's merges are never listed: whether two neighbours join is
//! whether their joint text is a token, and its score says when.

use crate::{
    TextError,
    error::clip,
    split::{Split, cut},
    vocab::Vocab,
};
use aho_corasick::{AhoCorasick, MatchKind};
use foldhash::fast::RandomState;
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
    ops::Range,
};

/// SentencePiece's space, U+2581.
pub(crate) const SPACE: char = '▁';
const SPACE_BYTES: &[u8] = "▁".as_bytes();

/// An encoder of plain text and of the tokens that stand in it as they are.
pub(crate) struct Bpe {
    pub(crate) vocab: Vocab,
    model: Model,
    added: AhoCorasick,
    /// Id of each pattern of `added`, and whether it is a control token.
    added_ids: Vec<(u32, bool)>,
}

enum Model {
    Bytes(Bytes),
    Scores(Scores),
}

/// Byte-level BPE.
struct Bytes {
    splits: &'static [Split],
    /// Whether a word that is a token skips the merges.
    whole_words: bool,
    /// The token of each byte.
    bytes: Vec<Option<u32>>,
    /// Rank and joint token of a pair.
    merges: HashMap<(u32, u32), (u32, u32), RandomState>,
}

/// SentencePiece's BPE.
struct Scores {
    /// By id: the score as a number that falls as it rises; none where pairs
    /// may not join to this token.
    order: Vec<Option<u32>>,
    /// Whether text is read as if a space stood before it.
    prefix: bool,
    unknown: Option<u32>,
    /// The tokens that stand for single bytes.
    bytes: Vec<Option<u32>>,
    ascii: Vec<Option<u32>>,
    /// Characters that some token has before a space. After any other, no merge
    /// reaches over the space: words are encoded one by one.
    before_space: HashSet<char, RandomState>,
}

/// What two neighbours join to. Smaller ones join first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Join {
    rank: u64,
    at: u32,
    id: u32,
}

const NEVER: Join = Join {
    rank: u64::MAX,
    at: u32::MAX,
    id: u32::MAX,
};

/// A part of a text.
pub(crate) enum Part {
    /// A token that stands there as it is, and its bytes.
    Token(u32, Range<usize>),
    /// Bytes of plain text.
    Plain(Range<usize>),
}

/// A vocabulary's added token: its id and whether it is a control token.
pub(crate) type Added = (u32, bool);

impl Bpe {
    /// Byte-level BPE with merges by falling precedence: the left part, a space,
    /// the right part.
    ///
    /// # Errors
    /// [`TextError::Vocabulary`] for a merge of or to no tokens.
    pub(crate) fn by_merges(
        vocab: Vocab,
        added: Vec<Added>,
        merges: &[String],
        splits: &'static [Split],
        whole_words: bool,
    ) -> Result<Self, TextError> {
        let mut map = HashMap::with_capacity_and_hasher(merges.len(), RandomState::default());
        for (rank, merge) in (0u32..).zip(merges) {
            // The left part is never empty and may itself be a space.
            let skip = merge.chars().next().map_or(0, char::len_utf8);
            let (left, right) = merge[skip..]
                .split_once(' ')
                .map(|(left, right)| (&merge[..skip + left.len()], right))
                .ok_or_else(|| TextError::Vocabulary(format!("merge {:?} has one part", clip(merge))))?;
            let id = |token: &str| {
                vocab.id(token.as_bytes()).ok_or_else(|| {
                    TextError::Vocabulary(format!("merge {:?}: {:?} is no token", clip(merge), clip(token)))
                })
            };
            let pair = (id(left)?, id(right)?);
            let joint = match vocab.joined(pair.0, pair.1) {
                Some(joint) => joint,
                None => id(&[left, right].concat())?,
            };
            map.insert(pair, (rank, joint));
        }
        let bytes = (0..=255).map(|b| vocab.id(crate::bytes::char_of(b).encode_utf8(&mut [0; 4]).as_bytes()));
        let bytes = Bytes {
            splits,
            whole_words,
            bytes: bytes.collect(),
            merges: map,
        };
        Self::new(vocab, added, Model::Bytes(bytes))
    }

    /// SentencePiece's BPE; `joins` says which tokens pairs may join to.
    ///
    /// # Errors
    /// [`TextError::Vocabulary`] where the added tokens make no automaton.
    pub(crate) fn by_scores(
        vocab: Vocab,
        added: Vec<Added>,
        scores: &[f32],
        joins: impl Fn(u32) -> bool,
        prefix: bool,
        unknown: Option<u32>,
    ) -> Result<Self, TextError> {
        // `f32::total_cmp`, the other way round.
        let falling = |score: f32| {
            let bits = score.to_bits();
            if bits >> 31 == 0 { !(bits | 1 << 31) } else { bits }
        };
        let order = (0u32..).zip(scores).map(|(id, &score)| joins(id).then(|| falling(score)));
        let mut before_space = HashSet::default();
        for id in (0..vocab.len() as u32).filter(|&id| joins(id)) {
            let token = vocab.token(id);
            // Most tokens have a space at their head or none.
            let mut from = token.chars().next().map_or(0, char::len_utf8);
            while let Some(at) = find(&token.as_bytes()[from..], SPACE_BYTES) {
                before_space.extend(token[..from + at].chars().next_back());
                from += at + SPACE_BYTES.len();
            }
        }
        let ascii = (0..128u8).map(|b| vocab.id(&[b]));
        let bytes = (0..=255u8).map(|b| vocab.id(format!("<0x{b:02X}>").as_bytes()));
        let scores = Scores {
            order: order.collect(),
            prefix,
            unknown: unknown.filter(|&id| (id as usize) < vocab.len()),
            bytes: bytes.collect(),
            ascii: ascii.collect(),
            before_space,
        };
        Self::new(vocab, added, Model::Scores(scores))
    }

    fn new(vocab: Vocab, added_ids: Vec<Added>, model: Model) -> Result<Self, TextError> {
        let added = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(added_ids.iter().map(|&(id, _)| vocab.token(id)))
            .map_err(|e| TextError::Vocabulary(format!("{} added tokens: {e}", added_ids.len())))?;
        Ok(Self {
            vocab,
            model,
            added,
            added_ids,
        })
    }

    /// Cuts `text` at the added tokens in it; at control tokens only with
    /// `special`.
    pub(crate) fn parts(&self, text: &str, special: bool, mut each: impl FnMut(Part)) {
        let mut from = 0;
        for found in self.added.find_iter(text) {
            let (id, control) = self.added_ids[found.pattern().as_usize()];
            if control && !special {
                continue;
            }
            if from < found.start() {
                each(Part::Plain(from..found.start()));
            }
            each(Part::Token(id, found.range()));
            from = found.end();
        }
        if from < text.len() {
            each(Part::Plain(from..text.len()));
        }
    }

    /// The tokens of `text`; control tokens in it become themselves only with
    /// `special`.
    pub(crate) fn encode(&self, text: &str, special: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut scratch = Scratch::default();
        self.parts(text, special, |part| match part {
            Part::Token(id, _) => ids.push(id),
            Part::Plain(range) => self.plain(&text[range], &mut scratch, &mut ids),
        });
        ids
    }

    /// Appends the tokens of `text`, which has no added tokens.
    pub(crate) fn plain(&self, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        match &self.model {
            Model::Bytes(m) => cut(m.splits, text, &mut |word| m.word(&self.vocab, word, scratch, ids)),
            Model::Scores(m) => m.text(&self.vocab, text, scratch, ids),
        }
    }

    /// Bytes of text that a token made of plain text stands for.
    pub(crate) fn text_len(&self, id: u32) -> usize {
        let token = self.vocab.token(id);
        match self.model {
            Model::Bytes(_) => token.chars().count(),
            Model::Scores(_) => token.replace(SPACE, " ").len(),
        }
    }
}

/// Where `needle` first is in `hay`.
fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len()).position(|w| w == needle)
}

/// Lists used anew for each word.
#[derive(Default)]
pub(crate) struct Scratch {
    spelled: String,
    word: Vec<u32>,
    joins: Vec<Join>,
}

impl Bytes {
    fn word(&self, vocab: &Vocab, word: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if self.whole_words {
            scratch.spelled.clear();
            scratch.spelled.extend(word.bytes().map(crate::bytes::char_of));
            if let Some(id) = vocab.id(scratch.spelled.as_bytes()) {
                return ids.push(id);
            }
        }
        // As in that crate, a byte that is no token is left out.
        scratch.word.extend(word.bytes().filter_map(|b| self.bytes[b as usize]));
        let join = |left, right| {
            self.merges.get(&(left, right)).map_or(NEVER, |&(rank, id)| Join {
                rank: rank.into(),
                at: 0,
                id,
            })
        };
        scratch.flush(vocab, join, ids);
    }
}

impl Scores {
    fn text(&self, vocab: &Vocab, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let join = |left, right| {
            let found = vocab.joined(left, right).and_then(|id| {
                let order = self.order[id as usize]?;
                Some(Join {
                    rank: u64::from(order) << 32 | u64::from(id),
                    at: vocab.token(left).len() as u32,
                    id,
                })
            });
            found.unwrap_or(NEVER)
        };
        // The character before, if it is a token and nothing is pending.
        let mut before = None;
        // Unknown characters become one token, put in with the next known one.
        let mut unknown = None;
        let prefix = self.prefix.then_some(SPACE);
        let chars = prefix.into_iter().chain(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        for c in chars {
            let mut utf8 = [0; 4];
            let utf8 = c.encode_utf8(&mut utf8).as_bytes();
            let id = match self.ascii.get(c as usize) {
                Some(&id) => id,
                None => vocab.id(utf8),
            };
            if let Some(id) = id {
                scratch.word.extend(unknown.take());
                if c == SPACE && before.is_some_and(|c| !self.before_space.contains(&c)) {
                    scratch.flush(vocab, join, ids);
                }
                scratch.word.push(id);
                before = Some(c);
                continue;
            }
            before = None;
            if utf8.iter().all(|&b| self.bytes[b as usize].is_some()) {
                scratch.word.extend(utf8.iter().filter_map(|&b| self.bytes[b as usize]));
            } else {
                unknown = self.unknown;
            }
        }
        scratch.word.extend(unknown);
        scratch.flush(vocab, join, ids);
    }
}

/// Words up to this length look for the next join in all their pairs.
const SHORT: usize = 32;

impl Scratch {
    /// Joins what is in `word` and moves it to `ids`.
    fn flush(&mut self, vocab: &Vocab, join: impl Fn(u32, u32) -> Join, ids: &mut Vec<u32>) {
        if self.word.len() <= SHORT {
            self.short(&join);
            ids.append(&mut self.word);
        } else {
            long(vocab, &self.word, &join, ids);
            self.word.clear();
        }
    }

    fn short(&mut self, join: &impl Fn(u32, u32) -> Join) {
        let Self { word, joins, .. } = self;
        joins.clear();
        joins.extend(word.windows(2).map(|w| join(w[0], w[1])));
        // Of equals `min_by_key` takes the first.
        while let Some((i, best)) = joins.iter().copied().enumerate().min_by_key(|&(_, j)| (j.rank, j.at))
            && best.rank != NEVER.rank
        {
            word[i] = best.id;
            word.remove(i + 1);
            joins.remove(i);
            if i < joins.len() {
                joins[i] = join(word[i], word[i + 1]);
            }
            if i > 0 {
                joins[i - 1] = join(word[i - 1], word[i]);
            }
        }
    }
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    /// Neighbours; `NONE` at the ends.
    previous: u32,
    next: u32,
    /// Bytes of its token; joined symbols are longer.
    len: u32,
}

/// As `short` in O(n log n): a heap of all joins, of which those whose symbols
/// have changed meanwhile are passed over.
fn long(vocab: &Vocab, word: &[u32], join: &impl Fn(u32, u32) -> Join, ids: &mut Vec<u32>) {
    let len = |id| vocab.token(id).len() as u32;
    // Indices fit: `Tokenizer::encode` refuses longer texts.
    let n = word.len() as u32;
    let mut symbols: Vec<Symbol> = (0..n)
        .zip(word)
        .map(|(i, &id)| Symbol {
            id,
            previous: i.checked_sub(1).unwrap_or(NONE),
            next: if i + 1 < n { i + 1 } else { NONE },
            len: len(id),
        })
        .collect();
    let entry = |left: u32, j: Join| (j.rank != NEVER.rank).then_some(Reverse((j.rank, j.at, left, j.id)));
    let mut heap: BinaryHeap<_> =
        (0..n).zip(word.windows(2)).filter_map(|(i, w)| entry(i, join(w[0], w[1]))).collect();
    while let Some(Reverse((_, _, left, id))) = heap.pop() {
        let (l, right) = (symbols[left as usize], symbols[left as usize].next);
        // A symbol only ever grows, and one that was joined away is nothing:
        // lengths that add up are the pair that was meant.
        if l.id == NONE || right == NONE || l.len + symbols[right as usize].len != len(id) {
            continue;
        }
        let next = symbols[right as usize].next;
        symbols[right as usize].id = NONE;
        symbols[left as usize] = Symbol { id, next, len: len(id), ..l };
        if next != NONE {
            symbols[next as usize].previous = left;
            heap.extend(entry(left, join(id, symbols[next as usize].id)));
        }
        if l.previous != NONE {
            heap.extend(entry(l.previous, join(symbols[l.previous as usize].id, id)));
        }
    }
    ids.extend(symbols.iter().map(|s| s.id).filter(|&id| id != NONE));
}
