//! Encoders: a text in, one vector out.
//!
//! The same layers as a decoder's, but every token sees every other and norms
//! stand on the sums, so there is no cache to keep: keys and values live in the
//! workspace of one call. A text's vector does not depend on the others of the
//! call.

use crate::{
    BLOCK, Config, ModelError, Order, arch,
    cache,
    ffn::{self, Buffers},
    file::GgufFile,
    formats::{Gguf, Value},
    load::{Layer, Norm, Reader, weight},
    quantized::Scheme,
    source::{self, Folder, Source},
};
use ashlar_kernels::{KvLayer, KvType, PackedMatrix, Pool, add, attention};
use std::{path::Path, sync::Arc};

/// Where sentence-transformers says how token vectors become one.
const POOLING: &str = "1_Pooling/config.json";

/// How token vectors become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    First,
}

/// An encoder in memory, read-only: share it freely between threads.
pub struct Encoder {
    config: Config,
    pool: Arc<Pool>,
    pooling: Pooling,
    embed: PackedMatrix,
    /// `[position, hidden]`, the first token type's vector added.
    positions: Vec<f32>,
    embed_norm: Norm,
    layers: Vec<Layer>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Encoder {
    /// Loads a GGUF file, or a folder with `config.json` and safetensors, with
    /// a pool over all processors this process may use. How token vectors are
    /// pooled stands in the file's metadata, or in sentence-transformers'
    /// `1_Pooling/config.json`; without either it is the mean.
    ///
    /// # Errors
    /// As [`crate::Model::load`], for a decoder in place of an encoder, and for
    /// another pooling.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        Self::load_with(path, Pool::new(0))
    }

    /// [`Encoder::load`] on a pool of the caller's.
    ///
    /// # Errors
    /// As [`Encoder::load`].
    pub fn load_with(path: &Path, pool: Arc<Pool>) -> Result<Self, ModelError> {
        if path.is_dir() {
            let folder = Folder::open(path)?;
            let json = folder.file(source::CONFIG)?;
            let description = arch::from_hf(&json)?;
            let pooling = if folder.has(POOLING) { pooling(&folder.file(POOLING)?)? } else { Pooling::Mean };
            let shards = folder.shards()?;
            let source = Source::from_shards(&shards, description.1.prefix, Scheme::from_hf(&json)?, &pool)?;
            let names = ["embeddings.position_embeddings", "embeddings.token_type_embeddings"];
            return Self::build(&source, description, names, pooling, pool);
        }
        GgufFile::read(path, |file, gguf| Self::packed(gguf, &Source::from_file(gguf, file, &pool)?, pool))?
    }

    /// Packs a file that is in memory whole.
    ///
    /// # Errors
    /// As [`Encoder::load`], but for reading.
    pub fn from_gguf(gguf: &Gguf, pool: Arc<Pool>) -> Result<Self, ModelError> {
        Self::packed(gguf, &Source::from_gguf(gguf, &pool)?, pool)
    }

    fn packed(gguf: &Gguf, source: &Source, pool: Arc<Pool>) -> Result<Self, ModelError> {
        let description = arch::from_gguf(gguf, source)?;
        let key = format!("{}.pooling_type", description.0.architecture);
        let pooling = match gguf.meta(&key).map(Value::as_u64) {
            None | Some(Some(1)) => Pooling::Mean,
            Some(Some(2)) => Pooling::First,
            Some(other) => {
                let value = other.map_or("not a number".into(), |v| v.to_string());
                return Err(ModelError::Setting { what: key, value, must: "1 (mean) or 2 (first token)" });
            }
        };
        let names = ["position_embd", "token_types"];
        Self::build(source, description, names, pooling, pool)
    }

    fn build(
        source: &Source,
        (config, names): arch::Description,
        [position, kind]: [&str; 2],
        pooling: Pooling,
        pool: Arc<Pool>,
    ) -> Result<Self, ModelError> {
        if config.order != Order::Sum {
            let architecture = config.architecture;
            return Err(ModelError::Role { architecture, is: "a decoder: it continues text and does not embed it" });
        }
        let c = &config;
        let mut positions = source.floats(&weight(position), &[c.context, c.hidden])?;
        let kinds = source.floats(&weight(kind), &[2, c.hidden])?;
        positions.chunks_exact_mut(c.hidden).for_each(|row| add(row, &kinds[..c.hidden]));
        let reader = Reader { source, config: c, names: &names };
        let encoder = Self {
            embed: source.matrix(&weight(names.embed), c.vocab, c.hidden)?,
            positions,
            embed_norm: reader.norm(names.embed_norm, c.hidden)?,
            layers: (0..c.layers).map(|i| reader.layer(i)).collect::<Result<_, _>>()?,
            pooling,
            pool,
            config: config.clone(),
        };
        // The heads of pre-training, which a sentence's vector does not see.
        let heads = ["pooler.", "bert.pooler.", "cls."];
        source.finish(|name| name.ends_with("position_ids") || heads.iter().any(|h| name.starts_with(h)))?;
        Ok(encoder)
    }

    /// Its dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// One vector of [`Config::hidden`] values a text, of length 1. Texts are
    /// token ids with the special tokens the model was trained on.
    ///
    /// # Errors
    /// A text without tokens or beyond the context, a token outside the vocabulary.
    pub fn embed(&self, texts: &[&[u32]]) -> Result<Vec<Vec<f32>>, ModelError> {
        let c = &self.config;
        for (item, text) in texts.iter().enumerate() {
            if text.is_empty() {
                return Err(ModelError::Empty { item });
            }
            if text.len() > c.context {
                return Err(ModelError::Context { item, len: text.len(), context: c.context });
            }
            if let Some(&token) = text.iter().find(|&&t| t as usize >= c.vocab) {
                return Err(ModelError::Token { item, token, vocab: c.vocab });
            }
        }
        let states = self.run(texts);
        let mut rest = &states[..];
        let pool = |text: &&[u32]| {
            let (own, after) = rest.split_at(text.len() * c.hidden);
            rest = after;
            let mut out = vec![0.0; c.hidden];
            match self.pooling {
                Pooling::Mean => own.chunks_exact(c.hidden).for_each(|row| add(&mut out, row)),
                Pooling::First => out.copy_from_slice(&own[..c.hidden]),
            }
            // The mean's divisor falls out of the length.
            let length = out.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
            out.iter_mut().for_each(|v| *v /= length);
            out
        };
        Ok(texts.iter().map(pool).collect())
    }

    /// The last layer's row of every token, text after text.
    fn run(&self, texts: &[&[u32]]) -> Vec<f32> {
        let (c, pool) = (&self.config, &self.pool);
        // Each text has pages of its own: (text, position) and pages.
        let mut pages: Vec<Vec<u32>> = Vec::with_capacity(texts.len());
        let mut used = 0u32;
        for text in texts {
            let need = text.len().div_ceil(BLOCK) as u32;
            pages.push((used..used + need).collect());
            used += need;
        }
        let rows: Vec<(usize, usize)> =
            texts.iter().enumerate().flat_map(|(t, text)| (0..text.len()).map(move |p| (t, p))).collect();
        let m = rows.len();
        let mut cache = KvLayer::new(cache::layout(c, KvType::F32), used as usize);

        let mut x = vec![0.0; m * c.hidden];
        for (row, &(t, p)) in x.chunks_exact_mut(c.hidden).zip(&rows) {
            self.embed.dequantize_row(texts[t][p] as usize, row);
            add(row, &self.positions[p * c.hidden..][..c.hidden]);
        }
        let [mut q, mut k, mut v, mut mixed, mut back] = [const { Vec::new() }; 5];
        let mut buffers = Buffers::default();
        ffn::norm(pool, &x, &self.embed_norm, c.eps, &mut back);
        std::mem::swap(&mut x, &mut back);
        for w in &self.layers {
            ffn::linears(pool, &x, m, &mut [(&w.q, &mut q), (&w.k, &mut k), (&w.v, &mut v)]);
            cache.store(pool, &k, &v, |i| {
                let (t, p) = rows[i];
                (pages[t][p / BLOCK], p % BLOCK)
            });
            let whole = |i: usize| {
                let (t, _) = rows[i];
                (&pages[t][..], texts[t].len())
            };
            mixed.resize(q.len(), 0.0);
            attention(pool, &w.attention, &q, &cache, whole, &mut mixed);
            ffn::linears(pool, &mixed, m, &mut [(&w.o, &mut back)]);
            self.sum(&mut x, &mut back, w.attn_norm.as_ref());
            ffn::ffn(pool, &w.ffn, c.activation, &x, m, &mut buffers, &mut back);
            self.sum(&mut x, &mut back, w.ffn_norm.as_ref());
        }
        x
    }

    /// `x = norm(x + back)`.
    fn sum(&self, x: &mut Vec<f32>, back: &mut Vec<f32>, norm: Option<&Norm>) {
        add(x, back);
        if let Some(norm) = norm {
            ffn::norm(&self.pool, x, norm, self.config.eps, back);
            std::mem::swap(x, back);
        }
    }
}

/// Reads sentence-transformers' pooling.
fn pooling(json: &[u8]) -> Result<Pooling, ModelError> {
    let value: serde_json::Value = serde_json::from_slice(json)
        .map_err(|e| ModelError::Json { what: POOLING.into(), cause: e.to_string() })?;
    let on: Vec<&str> = value
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(k, v)| k.starts_with("pooling_mode_") && **v == serde_json::Value::Bool(true))
        .map(|(k, _)| k.as_str())
        .collect();
    match on[..] {
        ["pooling_mode_mean_tokens"] => Ok(Pooling::Mean),
        ["pooling_mode_cls_token"] => Ok(Pooling::First),
        _ => {
            let must = "the mean or the first token alone";
            Err(ModelError::Setting { what: POOLING.into(), value: on.join(", "), must })
        }
    }
}
