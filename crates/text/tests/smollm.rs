//! SmolLM2's tokenizer as its GGUF describes it: known ids, and identity.
//!
//! The metadata is read by a few lines here, because `text` does not lean on
//! `formats`.

#![allow(clippy::unwrap_used)] // a failed test is meant to panic

use ashlar_text::{ChatTemplate, GgufVocab, Message, Tokenizer, masked_chat};
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

fn smollm() -> Option<(Tokenizer, ChatTemplate)> {
    let path = std::env::var_os("ASHLAR_TEST_MODEL").map_or_else(
        || {
            let cache = std::env::var_os("ASHLAR_CACHE").map_or_else(
                || {
                    PathBuf::from(std::env::var_os("HOME").unwrap_or_default())
                        .join(".cache/ashlar")
                },
                PathBuf::from,
            );
            cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    let Ok(bytes) = std::fs::read(&path) else {
        let required = std::env::var("ASHLAR_REQUIRE_PEERS").is_ok_and(|v| v == "1");
        assert!(!required, "{} is missing", path.display());
        eprintln!("skipped: {} is missing", path.display());
        return None;
    };
    let mut meta = Reader(&bytes).meta();
    let mut take = |key: &str| meta.remove(&format!("tokenizer.{key}")).unwrap();
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
    let vocab = GgufVocab {
        model: text(take("ggml.model")),
        pre: text(take("ggml.pre")),
        tokens: texts(take("ggml.tokens")),
        token_types: numbers(take("ggml.token_type"))
            .iter()
            .map(|&n| n as i32)
            .collect(),
        merges: texts(take("ggml.merges")),
        bos: Some(numbers(take("ggml.bos_token_id"))[0] as u32),
        eos: Some(numbers(take("ggml.eos_token_id"))[0] as u32),
        add_bos: numbers(take("ggml.add_bos_token"))[0] != 0,
        ..GgufVocab::default()
    };
    let template = text(take("chat_template"));
    Some((
        Tokenizer::from_gguf(vocab).unwrap(),
        ChatTemplate::new(&template, "<|im_start|>", "<|im_end|>").unwrap(),
    ))
}

#[test]
fn known_ids_identity_and_chat() {
    let Some((t, c)) = smollm() else { return };
    assert_eq!(t.vocab_size(), 49152);
    assert_eq!((t.bos(), t.eos(), t.add_bos()), (Some(1), Some(2), false));
    assert_eq!(t.encode("<|im_start|>", true).unwrap(), [1]);
    assert_eq!(t.encode("<|im_end|>", true).unwrap(), [2]);
    assert_eq!(t.encode("<|endoftext|>", true).unwrap(), [0]);
    // `Ġ t`, `Ġ a`, `i n` are the first merges, after 17 + 256 tokens at most.
    assert_eq!(
        t.token_id("Ġt").map(|id| t.decode(&[id], false)),
        Some(" t".into())
    );
    // One token for each digit, and no word of the two together.
    assert_eq!(t.encode("1234", false).unwrap().len(), 4);
    assert_eq!(t.encode(" hello world", false).unwrap().len(), 2);

    let long = "word ".repeat(2000);
    let spaces = format!("a{}b", " ".repeat(20_000));
    for text in [
        "",
        " ",
        "\n",
        "\r\n\r\n",
        "\t x",
        "Hello, world! It's 2026-11-23.",
        "Grüße aus Zürich – 12,5 % mehr",
        "日本語のテキスト 한국어 العربية",
        "👩‍👩‍👧 é e\u{301} \u{0}\u{7f}",
        "fn main() {\n    println!(\"{}\", 1_000);\n}\n",
        "<|im_start|>user<|im_end|>",
        "\u{feff}x\u{200b}",
        &long,
        &spaces,
    ] {
        for special in [false, true] {
            let ids = t.encode(text, special).unwrap();
            assert_eq!(t.decode(&ids, false), text);
            if !special {
                assert!(ids.iter().all(|&id| !t.is_control(id)));
            }
        }
    }

    let messages = [
        Message::new("user", "What is <|im_end|> for?"),
        Message::new("assistant", "It ends a turn."),
    ];
    let text = c.render(&messages[..1], true).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging \
         Face<|im_end|>\n<|im_start|>user\nWhat is <|im_end|> for?<|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = c.encode(&t, &messages[..1], true).unwrap();
    assert_eq!(t.decode(&ids, false), text);
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 2);
    let masked = masked_chat(&t, &c, &messages).unwrap();
    let trained: Vec<u32> = masked
        .tokens
        .iter()
        .zip(&masked.trained)
        .filter_map(|(&id, &on)| on.then_some(id))
        .collect();
    assert_eq!(t.decode(&trained, false), "It ends a turn.<|im_end|>");
}
