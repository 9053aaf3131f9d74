//! A model without weights for tests: its logits are a hash of every token it
//! reads through the page table, so any stale, foreign or missing block changes
//! the text.

use crate::forward::Forward;
use ashlar_model::{BLOCK, Item, ModelError, Want};
use ashlar_text::{ChatTemplate, GgufVocab, Tokenizer};

/// Byte tokens, then the control tokens.
pub(crate) const VOCAB: usize = 256 + 3;
/// Reading this token panics, as a bug in a model would.
pub(crate) const BOOM: u32 = 258;

pub(crate) struct Fake {
    slots: Vec<Option<u64>>,
    row: Vec<f32>,
    /// Slows each step down.
    pub(crate) pause: std::time::Duration,
}

pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let z = (a ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z ^ (z >> 29)
}

impl Fake {
    pub(crate) fn new(blocks: usize) -> Self {
        Self {
            slots: vec![None; blocks * BLOCK],
            row: vec![0.0; VOCAB],
            pause: std::time::Duration::ZERO,
        }
    }

    /// The logits after `hash`.
    fn logits(&mut self, hash: u64) {
        for (i, l) in self.row.iter_mut().enumerate() {
            *l = (mix(hash, i as u64 + 1) >> 40) as f32 / (1u64 << 24) as f32 * 9.0;
        }
        // Rarely wanted unless a test sends it.
        self.row[BOOM as usize] = -50.0;
    }
}

impl Forward for Fake {
    fn vocab(&self) -> usize {
        VOCAB
    }

    fn forward(
        &mut self,
        items: &[Item<'_>],
        row: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        std::thread::sleep(self.pause);
        let slot = |blocks: &[u32], p: usize| blocks[p / BLOCK] as usize * BLOCK + p % BLOCK;
        // All writes before all reads: two items must never share a block that
        // one of them writes.
        let mut written = std::collections::HashSet::new();
        for item in items {
            for (i, &t) in item.tokens.iter().enumerate() {
                assert_ne!(t, BOOM, "the fake model met its bad token");
                let p = item.start + i;
                let at = slot(item.blocks, p);
                assert!(written.insert(at), "a slot was written twice in one step");
                self.slots[at] = Some(mix(u64::from(t) + 1, p as u64));
            }
        }
        let mut n = 0;
        for item in items {
            let end = item.start + item.tokens.len();
            let mut hash = 1;
            for p in 0..end {
                let at = slot(item.blocks, p);
                assert!(
                    p >= item.start || !written.contains(&at),
                    "wrote into a shared block"
                );
                hash = mix(hash, self.slots[at].expect("read a slot nobody wrote"));
                let wanted = match item.want {
                    Want::None => false,
                    Want::Last => p + 1 == end,
                    Want::All => p >= item.start,
                };
                if wanted {
                    self.logits(hash);
                    row(n, &self.row);
                    n += 1;
                }
            }
        }
        Ok(())
    }
}

/// A tokenizer of single bytes, and a template in the manner of ChatML.
pub(crate) fn text() -> (Tokenizer, ChatTemplate) {
    let plain = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|b| {
            let code = if plain(b) {
                u32::from(b)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect();
    tokens.extend(["<|im_start|>", "<|im_end|>", "<|boom|>"].map(String::from));
    let mut token_types = vec![1; 256];
    token_types.extend([3; 3]);
    let tokenizer = Tokenizer::from_gguf(GgufVocab {
        model: "gpt2".into(),
        pre: "smollm".into(),
        tokens,
        token_types,
        bos: Some(256),
        eos: Some(257),
        ..GgufVocab::default()
    })
    .unwrap();
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                  {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let template = ChatTemplate::new(source, "<|im_start|>", "<|im_end|>").unwrap();
    (tokenizer, template)
}
