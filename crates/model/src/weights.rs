//! Plain `f32` weights in Hugging Face order, for the trainer.

use crate::{Config, ModelError, arch, file::GgufFile, formats::Gguf, source::Source};
use ashlar_kernels::Pool;
use std::path::Path;

/// One layer; matrices are `[out, in]`, row-major.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // Named as in Hugging Face's llama modules.
pub struct LayerWeights {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub o: Vec<f32>,
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    pub down: Vec<f32>,
    pub attn_norm: Vec<f32>,
    pub ffn_norm: Vec<f32>,
}

/// A whole model in `f32`. Rows of q and k are in Hugging Face order, where
/// rotary pairs lie half a head apart.
#[derive(Debug, Clone)]
pub struct Weights {
    /// Its dimensions.
    pub config: Config,
    /// `[vocab, hidden]`.
    pub embed: Vec<f32>,
    /// The last norm's gains.
    pub norm: Vec<f32>,
    /// The head `[vocab, hidden]`; `None` when it is the embedding.
    pub head: Option<Vec<f32>>,
    /// The layers in order.
    pub layers: Vec<LayerWeights>,
}

impl Weights {
    /// Unpacks a GGUF file.
    ///
    /// # Errors
    /// As [`crate::Model::load`], and any architecture but plain llama.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        GgufFile::read(path, |file, gguf| Self::unpack(gguf, &Source::from_file(gguf, file, &Pool::new(1))?))?
    }

    /// Unpacks a file that is in memory whole.
    ///
    /// # Errors
    /// As [`crate::Model::load`], but for reading.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        Self::unpack(gguf, &Source::from_gguf(gguf, &Pool::new(1))?)
    }

    fn unpack(gguf: &Gguf, source: &Source) -> Result<Self, ModelError> {
        let (config, _) = arch::from_gguf(gguf, source)?;
        let c = &config;
        if !c.plain() {
            let architecture = config.architecture;
            return Err(ModelError::Role { architecture, is: "not plain llama, the only kind trained here" });
        }
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let layers = (0..c.layers)
            .map(|i| {
                let read = |part: &str, shape: &[usize]| {
                    source.floats(&format!("blk.{i}.{part}.weight"), shape)
                };
                Ok(LayerWeights {
                    q: halves(&read("attn_q", &[q, c.hidden])?, c.head_dim, c.hidden),
                    k: halves(&read("attn_k", &[kv, c.hidden])?, c.head_dim, c.hidden),
                    v: read("attn_v", &[kv, c.hidden])?,
                    o: read("attn_output", &[c.hidden, q])?,
                    gate: read("ffn_gate", &[c.ffn, c.hidden])?,
                    up: read("ffn_up", &[c.ffn, c.hidden])?,
                    down: read("ffn_down", &[c.hidden, c.ffn])?,
                    attn_norm: read("attn_norm", &[c.hidden])?,
                    ffn_norm: read("ffn_norm", &[c.hidden])?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        let head = match c.tied {
            true => None,
            false => Some(source.floats("output.weight", &[c.vocab, c.hidden])?),
        };
        Ok(Self {
            embed: source.floats("token_embd.weight", &[c.vocab, c.hidden])?,
            norm: source.floats("output_norm.weight", &[c.hidden])?,
            head,
            layers,
            config,
        })
    }
}

/// Rows of each head from GGUF's interleaved order (pair i at 2i, 2i + 1) to
/// halves (i, i + head_dim / 2).
fn halves(rows: &[f32], head_dim: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_dim * width) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                out.extend(&head[(2 * pair + half) * width..][..width]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn interleaved_rows_become_halves() {
        let rows: Vec<f32> = (0..16).map(|v| v as f32).collect();
        let want = [0., 1., 4., 5., 2., 3., 6., 7., 8., 9., 12., 13., 10., 11., 14., 15.];
        assert_eq!(super::halves(&rows, 4, 2), want);
    }
}
