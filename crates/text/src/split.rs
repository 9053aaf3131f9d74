//! Pre-tokenizers of byte-level BPE: where text is cut before any merge. Names
//! and cuts follow llama.cpp's `llama-vocab.cpp`.
//!
//! The expressions are few and simple, so each is a function that looks at the
//! characters once. Rejected: running them as regular expressions, since their
//! look-ahead needs a backtracking engine, slow and with a limit of steps past
//! which it stops cutting. What a letter is, is asked of `regex-syntax` all the
//! same: its tables are those of the expressions that trained the vocabularies.

use crate::{TextError, error::clip};
use regex_syntax::hir::{Class, HirKind};
use std::sync::LazyLock;

/// One way of cutting; several are applied one after the other, each within the
/// pieces of the one before.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Split {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,N}|
    /// ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+` with the given N
    Llama3(usize),
    /// `\p{N}`
    Digit,
    /// `\p{N}+`
    Digits,
    /// `[\p{P}\$\+<=>\^~\|]+`
    Punctuation,
    /// `[0-9][0-9][0-9]`
    Thousand,
}

/// The splits of a pre-tokenizer, and whether a word that is a token as it
/// stands skips the merges.
pub(crate) fn pre_tokenizer(name: &str) -> Result<(&'static [Split], bool), TextError> {
    use Split::{Digit, Digits, Gpt2, Llama3, Punctuation, Thousand};
    Ok(match name {
        "gpt-2" | "mpt" | "olmo" | "jais" => (&[Gpt2], false),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => (&[Digit, Gpt2], false),
        "llama-bpe" | "llama-v3" | "llama3" => (&[Llama3(3)], true),
        "qwen2" | "stablelm2" | "deepseek-r1-qwen" => (&[Llama3(1)], false),
        "default" | "" => (&[Punctuation, Gpt2, Digits, Thousand], false),
        _ => {
            return Err(TextError::Unsupported {
                what: "GGUF pre-tokenizer",
                found: clip(name),
                known: "gpt-2, smollm, llama-bpe, qwen2, default and their equals",
            });
        }
    })
}

/// Cuts `text` by all of `splits` and gives each piece to `each`, in order.
pub(crate) fn cut<'t>(splits: &[Split], mut text: &'t str, each: &mut impl FnMut(&'t str)) {
    let Some((split, rest)) = splits.split_first() else {
        return each(text);
    };
    while !text.is_empty() {
        // A piece is never empty; a whole one is the safe answer to a fault here.
        let end = split.first(text).clamp(1, text.len());
        let (piece, after) = text.split_at_checked(end).unwrap_or((text, ""));
        cut(rest, piece, each);
        text = after;
    }
}

// Kinds of characters.
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 4;
const PUNCTUATION: u8 = 8;

/// The kind of every character.
static KINDS: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    let mut kinds = vec![0; 0x11_0000].into_boxed_slice();
    for (class, kind) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"\p{P}", PUNCTUATION)] {
        if let Ok(hir) = regex_syntax::parse(class)
            && let HirKind::Class(Class::Unicode(class)) = hir.kind()
        {
            for range in class.iter() {
                kinds[range.start() as usize..=range.end() as usize].iter_mut().for_each(|k| *k |= kind);
            }
        }
    }
    kinds
});

fn kind(c: char) -> u8 {
    KINDS[c as usize]
}

/// Bytes at the head of `text` whose characters are all as `is` says.
fn run(text: &str, is: impl Fn(char) -> bool) -> usize {
    text.find(|c| !is(c)).unwrap_or(text.len())
}

fn first_char(text: &str) -> Option<char> {
    text.chars().next()
}

impl Split {
    /// Bytes of the first piece of `text`, which is not empty.
    fn first(self, text: &str) -> usize {
        let runs = |is: fn(char) -> bool| match run(text, is) {
            0 => run(text, |c| !is(c)),
            n => n,
        };
        match self {
            Self::Gpt2 => gpt2(text),
            Self::Llama3(digits) => llama3(text, digits),
            Self::Digit => match first_char(text).filter(|&c| kind(c) & NUMBER != 0) {
                Some(c) => c.len_utf8(),
                None => run(text, |c| kind(c) & NUMBER == 0),
            },
            Self::Digits => runs(|c| kind(c) & NUMBER != 0),
            Self::Punctuation => {
                runs(|c| kind(c) & PUNCTUATION != 0 || matches!(c, '$' | '+' | '<' | '=' | '>' | '^' | '~' | '|'))
            }
            Self::Thousand => {
                let three = |w: &[u8]| w.iter().all(u8::is_ascii_digit);
                match text.as_bytes().windows(3).position(three) {
                    Some(0) => 3,
                    at => at.unwrap_or(text.len()),
                }
            }
        }
    }
}

/// Bytes of a contraction at the head of `text`. Without case, U+017F is an s.
fn contraction(text: &str, any_case: bool) -> Option<usize> {
    let rest = text.strip_prefix('\'')?;
    ["s", "t", "re", "ve", "m", "ll", "d"].into_iter().find_map(|end| {
        if !any_case {
            return rest.starts_with(end).then_some(1 + end.len());
        }
        if end == "s" && rest.starts_with('ſ') {
            return Some(1 + 'ſ'.len_utf8());
        }
        let head = rest.as_bytes().get(..end.len())?;
        head.eq_ignore_ascii_case(end.as_bytes()).then_some(1 + end.len())
    })
}

/// ` ?x+` for the kind of character that follows, if it is not white space.
fn word(text: &str) -> Option<(usize, u8)> {
    let skip = usize::from(text.starts_with(' '));
    let rest = &text[skip..];
    let of = kind(first_char(rest)?) & (LETTER | NUMBER | SPACE);
    let same = |c| kind(c) & (LETTER | NUMBER | SPACE) == of;
    (of != SPACE).then(|| (skip + run(rest, same), of))
}

/// `\s+(?!\S)|\s+`: white space but for its last character, which belongs to
/// the word that follows.
fn space(text: &str) -> usize {
    let all = run(text, |c| kind(c) & SPACE != 0);
    let last = text[..all].chars().next_back().map_or(0, char::len_utf8);
    if all == text.len() || all == last { all } else { all - last }
}

fn gpt2(text: &str) -> usize {
    contraction(text, false)
        .or_else(|| word(text).map(|(end, _)| end))
        .unwrap_or_else(|| space(text))
}

fn llama3(text: &str, digits: usize) -> usize {
    if let Some(end) = contraction(text, true) {
        return end;
    }
    let letters = |text| run(text, |c| kind(c) & LETTER != 0);
    let head = first_char(text).unwrap_or_default();
    let skip = match kind(head) & (LETTER | NUMBER) == 0 && !matches!(head, '\r' | '\n') {
        true => head.len_utf8(),
        false => 0,
    };
    match letters(&text[skip..]) {
        0 => {}
        n => return skip + n,
    }
    if kind(head) & NUMBER != 0 {
        let numbers = text.chars().take(digits).take_while(|&c| kind(c) & NUMBER != 0);
        return numbers.map(char::len_utf8).sum();
    }
    if let Some((end, 0)) = word(text) {
        return end + run(&text[end..], |c| matches!(c, '\r' | '\n'));
    }
    let all = run(text, |c| kind(c) & SPACE != 0);
    match text[..all].rfind(['\r', '\n']) {
        Some(at) => at + 1,
        None => space(text),
    }
}
