//! The encoder by hand against the `tokenizers` crate: the same tokens for any
//! text, on vocabularies trained or made up here and on real ones.

#![allow(clippy::unwrap_used)] // a failed test is meant to panic

mod common;

use ashlar_text::{GgufVocab, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};

const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const PRE: [(&str, &[&str]); 5] = [
    ("gpt-2", &[GPT2]),
    ("smollm", &[r"\p{N}", GPT2]),
    ("llama-bpe", &[LLAMA3]),
    ("qwen2", &[QWEN2]),
    ("default", &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];

/// The `tokenizer.json` that says what `v` says. SentencePiece's merges are all
/// pairs of tokens whose joint text is one, by falling score.
fn reference(v: &GgufVocab) -> tokenizers::Tokenizer {
    let kind = |id: usize| v.token_types.get(id).copied().unwrap_or(1);
    let ids: serde_json::Map<String, Value> = v.tokens.iter().cloned().zip((0..).map(Value::from)).collect();
    let added: Vec<Value> = (v.tokens.iter().enumerate())
        .filter(|&(id, t)| matches!(kind(id), CONTROL | USER_DEFINED) && !t.is_empty())
        .map(|(id, t)| {
            json!({"id": id, "content": t, "special": kind(id) == CONTROL, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false})
        })
        .collect();
    let file = if v.model == "gpt2" {
        let split = |r: &&str| json!({"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": false});
        let regexes = PRE.iter().find(|p| p.0 == v.pre).unwrap().1;
        let mut stages: Vec<Value> = regexes.iter().map(split).collect();
        stages.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}));
        let merges: Vec<_> = v.merges.iter().map(|m| m.split_once(' ').unwrap()).collect();
        json!({"version": "1.0", "added_tokens": added,
               "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages},
               "model": {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": v.pre == "llama-bpe"}})
    } else {
        let mut merges = Vec::new();
        for (id, token) in v.tokens.iter().enumerate().filter(|&(id, _)| matches!(kind(id), 1 | USER_DEFINED | 5)) {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if ids.contains_key(left) && ids.contains_key(right) {
                    merges.push((v.scores[id], id, at, [left, right]));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let merges: Vec<_> = merges.into_iter().map(|m| m.3).collect();
        let mut stages = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        if v.add_space_prefix.unwrap_or(true) {
            stages.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        }
        json!({"version": "1.0", "added_tokens": added, "normalizer": {"type": "Sequence", "normalizers": stages},
               "model": {"type": "BPE", "vocab": ids, "merges": merges, "fuse_unk": true, "byte_fallback": true,
                         "unk_token": v.unknown.map(|id| &v.tokens[id as usize])}})
    };
    tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap()
}

/// Both encoders of a vocabulary.
struct Pair {
    ours: Tokenizer,
    parsing: tokenizers::Tokenizer,
    plain: tokenizers::Tokenizer,
    control: HashSet<u32>,
}

impl Pair {
    fn new(vocab: GgufVocab) -> Self {
        let parsing = reference(&vocab);
        let mut plain = parsing.clone();
        plain.set_encode_special_tokens(true);
        let kinds = (0..).zip(&vocab.token_types);
        let control = kinds.filter(|&(_, &k)| k == CONTROL).map(|(id, _)| id).collect();
        Self { ours: Tokenizer::from_gguf(vocab).unwrap(), parsing, plain, control }
    }

    fn agree(&self, text: &str) {
        for special in [true, false] {
            let theirs = if special { &self.parsing } else { &self.plain };
            let theirs = theirs.encode_fast(text, false).unwrap().get_ids().to_vec();
            match self.ours.encode(text, special) {
                Ok(ours) => assert_eq!(ours, theirs, "special {special}: {text:?}"),
                Err(_) => assert!(!special && theirs.iter().any(|id| self.control.contains(id)), "{text:?}"),
            }
        }
    }
}

/// The byte-level alphabet.
fn alphabet(byte: u8) -> char {
    let itself = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let nth = (0..byte).filter(|&b| !itself(b)).count() as u32;
    if itself(byte) { byte.into() } else { char::from_u32(0x100 + nth).unwrap() }
}

const CORPUS: &str = "the cat sat on the mat, didn't it? 12 cats, 1234 mats; fn main() { let x = 10; }\n\n    return x;\n\
    Übergröße naïve café 日本語 日本 한국어 👩‍👩‍👧 👧 I'll we've THEY'RE she'd   and    more\t\ttabs === <<>> !!! ... --- ___ \
    'ſame ſame ſame ſa ſa hello hello hello world aaaa aaaaaaaa hahaha hahahaha    \r\n\r\n $x+y~z|w^ 100 000 1000000";

/// Pairs joined most often in the corpus, first to last.
fn train(unit: impl Fn(&str) -> Vec<String>, words: &[&str], merges: usize) -> Vec<(String, String)> {
    let mut words: Vec<Vec<String>> = words.iter().map(|w| unit(w)).collect();
    let mut learned = Vec::new();
    for _ in 0..merges {
        let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        words.iter().flat_map(|w| w.windows(2)).for_each(|w| *counts.entry((&w[0], &w[1])).or_default() += 1);
        let Some((&(left, right), _)) = counts.iter().max_by_key(|c| c.1) else { break };
        let pair = (left.to_owned(), right.to_owned());
        for word in &mut words {
            let mut i = 0;
            while i + 1 < word.len() {
                if word[i] == pair.0 && word[i + 1] == pair.1 {
                    let right = word.remove(i + 1);
                    word[i] += &right;
                }
                i += 1;
            }
        }
        learned.push(pair);
    }
    learned
}

const SPECIAL: [&str; 6] = ["<|end|>", "<|start|>", "<|", "<tool>", "\n\n\n", "▁▁▁▁"];
const KINDS: [i32; 6] = [3, 3, 3, 4, 4, 4];

fn byte_level(pre: &str) -> GgufVocab {
    let unit = |w: &str| w.bytes().map(|b| alphabet(b).to_string()).collect();
    let words: Vec<&str> = CORPUS.split_inclusive(' ').flat_map(|w| [w.trim_end(), w]).collect();
    let merges = train(unit, &words, 300);
    let mut tokens: Vec<String> = SPECIAL.map(String::from).to_vec();
    let mut token_types = KINDS.to_vec();
    tokens.extend((0..=255).map(|b| alphabet(b).to_string()));
    for (left, right) in &merges {
        let joint = left.clone() + right;
        if !tokens.contains(&joint) {
            tokens.push(joint);
        }
    }
    token_types.resize(tokens.len(), 1);
    let merges = merges.into_iter().map(|(left, right)| left + " " + &right).collect();
    GgufVocab { model: "gpt2".into(), pre: pre.into(), tokens, token_types, merges, ..GgufVocab::default() }
}

/// Without `bytes`, characters outside the corpus are unknown.
fn sentence_piece(prefix: bool, bytes: bool) -> GgufVocab {
    let text = CORPUS.replace(' ', "▁");
    let unit = |w: &str| w.chars().map(String::from).collect();
    let words: Vec<&str> = text.split_inclusive('▁').chain([&*text]).collect();
    let mut tokens: Vec<String> = ["<unk>"].into_iter().chain(SPECIAL).map(String::from).collect();
    let mut token_types = [&[2], &KINDS[..]].concat();
    // A few bytes only: characters of others are unknown all the same.
    let some = |b: &u8| bytes || *b < 0x20;
    tokens.extend((0..=255u8).filter(some).map(|b| format!("<0x{b:02X}>")));
    token_types.resize(tokens.len(), 6);
    let joints = train(unit, &words, 300).into_iter().map(|(left, right)| left + &right);
    let joints: Vec<String> = joints.chain(text.chars().map(String::from)).collect();
    for token in joints {
        if !tokens.contains(&token) {
            tokens.push(token);
        }
    }
    token_types.resize(tokens.len(), 1);
    // Equal scores are common in real files.
    let scores = (0..tokens.len()).map(|i| -((i / 3) as f32)).collect();
    let (model, add_space_prefix, unknown) = ("llama".into(), Some(prefix), Some(0));
    GgufVocab { model, tokens, token_types, scores, add_space_prefix, unknown, ..GgufVocab::default() }
}

/// Text of all sorts: what people write, what programs write, what attackers write.
fn texts() -> impl Strategy<Value = String> {
    let words: Vec<&str> = CORPUS.split(' ').collect();
    let part = prop_oneof![
        4 => prop::sample::select(words).prop_map(str::to_owned),
        4 => "[ ]{1,5}",
        2 => r"[ \t\r\n\u{85}\u{a0}\u{2028}\u{3000}]{1,6}",
        2 => r"['’](s|S|ſ|t|re|RE|Ve|m|ll|LL|lL|d|D|x|K)",
        2 => r"[0-9]{1,8}|[٠-٩]{1,4}|[½²Ⅷ]{1,2}",
        2 => r"[!-/:-@\[-`{-~]{1,6}",
        2 => prop::sample::select(SPECIAL.to_vec()).prop_map(str::to_owned),
        1 => prop::sample::select(vec!["<0xC3>", "<unk>", "<|e", "▁", "▁▁", "\0", "\u{7f}", "\u{feff}", "\u{10ffff}"]).prop_map(str::to_owned),
        2 => any::<char>().prop_map(String::from),
        1 => any::<String>(),
        1 => (prop::sample::select(vec!["a", "ha", " ", "aa ", "=", "日", "é", "\n", "1", "👧"]), 1..300usize).prop_map(|(s, n)| s.repeat(n)),
    ];
    prop::collection::vec(part, 0..16).prop_map(|parts| parts.concat())
}

#[test]
fn byte_level_is_the_crates() {
    for (pre, _) in PRE {
        let pair = Pair::new(byte_level(pre));
        pair.agree(CORPUS);
        proptest!(ProptestConfig::with_cases(400), |(text in texts())| pair.agree(&text));
    }
}

#[test]
fn sentence_piece_is_the_crates() {
    for (prefix, bytes) in [(false, true), (true, true), (false, false), (true, false)] {
        let pair = Pair::new(sentence_piece(prefix, bytes));
        pair.agree(CORPUS);
        proptest!(ProptestConfig::with_cases(400), |(text in texts())| pair.agree(&text));
    }
}

/// Tokens of few letters, so that many of them join in many ways.
fn made_up(token: &'static str) -> impl Strategy<Value = (Vec<(String, i32)>, Vec<prop::sample::Index>)> {
    let token = (token, prop_oneof![8 => Just(1), 1 => Just(CONTROL), 1 => Just(USER_DEFINED)]);
    (prop::collection::vec(token, 1..40), prop::collection::vec(any::<prop::sample::Index>(), 0..120))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn made_up_merges_are_the_crates((tokens, picks) in made_up("[abĠ<]{1,5}"), pre in 0..PRE.len(), text in "[ab <c]{0,90}") {
        let mut list: Vec<(String, i32)> = ["a", "b", "Ġ", "<"].map(|t| (t.to_owned(), 1)).to_vec();
        list.extend(tokens);
        let mut seen = HashSet::new();
        list.retain(|t| seen.insert(t.0.clone()));
        // All pairs that make a token, shuffled, some twice.
        let mut merges: Vec<String> = Vec::new();
        for (token, _) in &list {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if seen.contains(left) && seen.contains(right) {
                    merges.push(format!("{left} {right}"));
                }
            }
        }
        let merges = if merges.is_empty() { merges } else { picks.iter().map(|i| i.get(&merges).clone()).collect() };
        let (tokens, token_types) = list.into_iter().unzip();
        let vocab = GgufVocab { model: "gpt2".into(), pre: PRE[pre].0.into(), tokens, token_types, merges, ..GgufVocab::default() };
        Pair::new(vocab).agree(&text);
    }

    #[test]
    fn made_up_scores_are_the_crates(
        (tokens, picks) in made_up("[ab▁<]{1,5}"), prefix: bool, unknown: bool, whole: bool, text in "[ab ▁<é\u{1}]{0,90}",
    ) {
        let mut list: Vec<(String, i32)> = vec![("<u>".into(), 2), ("<0x01>".into(), 6), ("<0xC3>".into(), 6)];
        if whole {
            list.push(("<0xA9>".into(), 6));
        }
        // Joint with the texts of bytes and of the unknown.
        list.extend(["<u>a", "<u><0x01>", "<0x01>▁", "<0x01>▁a", "<0xC3><0x01>", "b<u>", "a", "<"].map(|t| (t.to_owned(), 1)));
        list.extend(tokens);
        let mut seen = HashSet::new();
        list.retain(|t| seen.insert(t.0.clone()));
        let scores = (0..list.len()).map(|i| picks.get(i).map_or(0.0, |p| p.index(7) as f32 - 3.0)).collect();
        let (tokens, token_types) = list.into_iter().unzip();
        let unknown = unknown.then_some(0);
        let vocab = GgufVocab { model: "llama".into(), tokens, token_types, scores, add_space_prefix: Some(prefix), unknown, ..GgufVocab::default() };
        Pair::new(vocab).agree(&text);
    }
}

/// A megabyte of one thing: the encoder's steps grow as the text does. One that
/// grew as its square would take hours here.
#[test]
fn long_words_take_no_square_time() {
    let tokenizers = [Tokenizer::from_gguf(byte_level("llama-bpe")).unwrap(), Tokenizer::from_gguf(sentence_piece(false, true)).unwrap()];
    for t in tokenizers {
        for unit in ["a", " ", "ha", "\n", "日", "=", "1", "é", "<|", "a "] {
            let text = unit.repeat((1 << 20) / unit.len());
            let ids = t.encode(&text, true).unwrap();
            assert_eq!(t.decode(&ids, false), text);
        }
    }
}

fn real(variable: &str, name: &str) {
    let Some((vocab, _)) = common::vocab(variable, name) else { return };
    let pair = Pair::new(vocab);
    pair.agree(CORPUS);
    pair.agree(include_str!("bpe.rs"));
    for special in ["<|im_start|>user\nHi<|im_end|>\n", "<bos><start_of_turn>user\nHi<end_of_turn>\n<unused7>", "</table><h1>"] {
        pair.agree(special);
    }
    proptest!(ProptestConfig::with_cases(1000), |(text in texts())| pair.agree(&text));
}

#[test]
fn smollm_is_the_crates() {
    real("ASHLAR_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf");
}

#[test]
fn gemma_is_the_crates() {
    real("ASHLAR_TEST_GEMMA", "gemma-3-270m-q4_k_m.gguf");
}
