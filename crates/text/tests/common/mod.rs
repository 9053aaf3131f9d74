//! Tokenizers of real GGUF files. The metadata is read by a few lines here,
//! because `text` does not lean on `formats`.

use ashlar_text::GgufVocab;
use std::{collections::HashMap, path::PathBuf};

enum Meta {
    Text(String),
    Texts(Vec<String>),
    Numbers(Vec<i64>),
}

/// A reader of trusted bytes: the test may panic.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn number<const N: usize>(&mut self) -> u64 {
        let (head, rest) = self.0.split_at(N);
        self.0 = rest;
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(head);
        u64::from_le_bytes(bytes)
    }

    fn text(&mut self) -> String {
        let n = self.number::<8>() as usize;
        let (head, rest) = self.0.split_at(n);
        self.0 = rest;
        String::from_utf8(head.to_vec()).unwrap()
    }

    fn scalar(&mut self, kind: u64) -> i64 {
        (match kind {
            0 | 1 | 7 => self.number::<1>(),
            2 | 3 => self.number::<2>(),
            4..=6 => self.number::<4>(),
            _ => self.number::<8>(),
        }) as i64
    }

    fn meta(&mut self) -> HashMap<String, Meta> {
        self.number::<8>();
        self.number::<8>();
        (0..self.number::<8>())
            .map(|_| {
                let key = self.text();
                let value = match self.number::<4>() {
                    8 => Meta::Text(self.text()),
                    9 => {
                        let (kind, n) = (self.number::<4>(), self.number::<8>());
                        match kind {
                            8 => Meta::Texts((0..n).map(|_| self.text()).collect()),
                            _ => Meta::Numbers((0..n).map(|_| self.scalar(kind)).collect()),
                        }
                    }
                    kind => Meta::Numbers(vec![self.scalar(kind)]),
                };
                (key, value)
            })
            .collect()
    }
}

/// The file that `variable` names, or `name` in the cache; none where it is
/// missing and may be.
fn file(variable: &str, name: &str) -> Option<Vec<u8>> {
    let cached = || {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/ashlar");
        let cache = std::env::var_os("ASHLAR_CACHE").map_or_else(home, PathBuf::from);
        cache.join("models").join(name)
    };
    let path = std::env::var_os(variable).map_or_else(cached, PathBuf::from);
    let bytes = std::fs::read(&path).ok();
    if bytes.is_none() {
        let required = std::env::var("ASHLAR_REQUIRE_PEERS").is_ok_and(|v| v == "1");
        assert!(!required, "{} is missing", path.display());
        eprintln!("skipped: {} is missing", path.display());
    }
    bytes
}

/// The vocabulary of a file in the cache and its chat template, if it has one.
pub(crate) fn vocab(variable: &str, name: &str) -> Option<(GgufVocab, Option<String>)> {
    let bytes = file(variable, name)?;
    let mut meta = Reader(&bytes).meta();
    let mut take = |key: &str| meta.remove(&format!("tokenizer.{key}"));
    let text = |m| match m {
        Meta::Text(t) => t,
        _ => panic!("not a text"),
    };
    let texts = |m| match m {
        Meta::Texts(t) => t,
        _ => panic!("not texts"),
    };
    let numbers = |m| match m {
        Meta::Numbers(n) => n,
        _ => panic!("not numbers"),
    };
    let mut number = |key: &str| take(key).map(|m| numbers(m)[0]);
    let add_bos = number("ggml.add_bos_token").is_some_and(|n| n != 0);
    let add_space_prefix = number("ggml.add_space_prefix").map(|n| n != 0);
    let [bos, eos, unknown] = ["bos", "eos", "unknown"].map(|k| number(&format!("ggml.{k}_token_id")).map(|n| n as u32));
    let floats = |n: Vec<i64>| n.iter().map(|&n| f32::from_bits(n as u32)).collect();
    let integers = |n: Vec<i64>| n.iter().map(|&n| n as i32).collect();
    let vocab = GgufVocab {
        model: text(take("ggml.model").unwrap()),
        pre: take("ggml.pre").map(text).unwrap_or_default(),
        tokens: texts(take("ggml.tokens").unwrap()),
        token_types: take("ggml.token_type").map(numbers).map(integers).unwrap_or_default(),
        scores: take("ggml.scores").map(numbers).map(floats).unwrap_or_default(),
        merges: take("ggml.merges").map(texts).unwrap_or_default(),
        add_space_prefix,
        unknown,
        bos,
        eos,
        add_bos,
    };
    Some((vocab, take("chat_template").map(text)))
}
