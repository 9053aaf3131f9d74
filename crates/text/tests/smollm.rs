//! SmolLM2's tokenizer as its GGUF describes it: known ids, and identity.

#![allow(clippy::unwrap_used)] // a failed test is meant to panic

mod common;

use ashlar_text::{ChatTemplate, Message, Tokenizer, masked_chat};

fn smollm() -> Option<(Tokenizer, ChatTemplate)> {
    let (vocab, template) = common::vocab("ASHLAR_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf")?;
    Some((
        Tokenizer::from_gguf(vocab).unwrap(),
        ChatTemplate::new(&template.unwrap(), "<|im_start|>", "<|im_end|>").unwrap(),
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
