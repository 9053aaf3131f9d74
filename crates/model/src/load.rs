//! A GGUF file made ready to run: weights packed for the matmul.

use crate::{
    Config, ModelError,
    formats::{Gguf, TensorView},
};
use ashlar_kernels::{PackedMatrix, Pool, RopeTable, dequantize};
use std::{fs::File, path::Path, sync::Arc};

/// One layer's weights.
pub(crate) struct Layer {
    pub(crate) attn_norm: Vec<f32>,
    pub(crate) q: PackedMatrix,
    pub(crate) k: PackedMatrix,
    pub(crate) v: PackedMatrix,
    pub(crate) o: PackedMatrix,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) gate: PackedMatrix,
    pub(crate) up: PackedMatrix,
    pub(crate) down: PackedMatrix,
}

/// A model in memory, read-only: share it freely between threads.
pub struct Model {
    pub(crate) config: Config,
    pub(crate) pool: Arc<Pool>,
    pub(crate) embed: PackedMatrix,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Vec<f32>,
    /// `None` when the head is the embedding.
    pub(crate) head: Option<PackedMatrix>,
    pub(crate) rope: RopeTable,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Model {
    /// Loads a GGUF file of the llama architecture, with a pool over all
    /// processors this process may use.
    ///
    /// # Errors
    /// An unreadable or malformed file, another architecture, a tensor missing,
    /// of the wrong shape or of a type without a kernel.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        Self::load_with(path, Pool::new(0))
    }

    /// [`Model::load`] on a pool of the caller's.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_with(path: &Path, pool: Arc<Pool>) -> Result<Self, ModelError> {
        let map = map(path)?;
        Self::from_gguf(&Gguf::parse(&map)?, pool)
    }

    /// Packs a parsed file.
    ///
    /// # Errors
    /// As [`Model::load`], but for reading.
    pub fn from_gguf(gguf: &Gguf, pool: Arc<Pool>) -> Result<Self, ModelError> {
        let config = Config::from_gguf(gguf)?;
        let c = &config;
        let matrix = |name: &str, n, k| {
            let view = tensor(gguf, name, &[n, k])?;
            PackedMatrix::from_rows(view.dtype, n, k, view.data)
                .map_err(|cause| ModelError::Tensor { name: name.into(), cause })
        };
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let layers = (0..c.layers)
            .map(|i| {
                let name = |part: &str| format!("blk.{i}.{part}.weight");
                Ok(Layer {
                    attn_norm: vector(gguf, &name("attn_norm"), c.hidden)?,
                    q: matrix(&name("attn_q"), q, c.hidden)?,
                    k: matrix(&name("attn_k"), kv, c.hidden)?,
                    v: matrix(&name("attn_v"), kv, c.hidden)?,
                    o: matrix(&name("attn_output"), c.hidden, q)?,
                    ffn_norm: vector(gguf, &name("ffn_norm"), c.hidden)?,
                    gate: matrix(&name("ffn_gate"), c.ffn, c.hidden)?,
                    up: matrix(&name("ffn_up"), c.ffn, c.hidden)?,
                    down: matrix(&name("ffn_down"), c.hidden, c.ffn)?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        let factors = match gguf.tensor("rope_freqs.weight") {
            None => None,
            Some(_) => Some(vector(gguf, "rope_freqs.weight", c.head_dim / 2)?),
        };
        let head = match c.tied {
            true => None,
            false => Some(matrix("output.weight", c.vocab, c.hidden)?),
        };
        Ok(Self {
            embed: matrix("token_embd.weight", c.vocab, c.hidden)?,
            layers,
            norm: vector(gguf, "output_norm.weight", c.hidden)?,
            head,
            rope: RopeTable::new(c.context, c.head_dim, c.rope_theta, factors.as_deref(), 1.0),
            pool,
            config,
        })
    }

    /// Its dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The threads it runs on.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Bytes of packed matrices in memory.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        layers.chain([&self.embed]).chain(&self.head).map(PackedMatrix::bytes).sum()
    }
}

/// Maps a file. Its pages are read once, while packing.
pub(crate) fn map(path: &Path) -> Result<memmap2::Mmap, ModelError> {
    let fault = |e: std::io::Error| ModelError::Read { path: path.into(), cause: e.to_string() };
    let file = File::open(path).map_err(fault)?;
    // SAFETY: the map is read-only and dropped when loading ends. A file cut
    // short meanwhile would fault the process; model files are written under
    // another name and renamed, never changed in place.
    unsafe { memmap2::Mmap::map(&file) }.map_err(fault)
}

/// The tensor `name`, if its shape is `expected`.
pub(crate) fn tensor<'a>(
    gguf: &Gguf<'a>,
    name: &str,
    expected: &[usize],
) -> Result<TensorView<'a>, ModelError> {
    let view = gguf.tensor(name).ok_or_else(|| ModelError::Missing(name.into()))?;
    if view.shape != expected {
        let (expected, got) = (expected.to_vec(), view.shape);
        return Err(ModelError::Shape { name: name.into(), expected, got });
    }
    Ok(view)
}

/// The tensor `name` as `f32`.
pub(crate) fn floats(
    gguf: &Gguf,
    name: &str,
    expected: &[usize],
) -> Result<Vec<f32>, ModelError> {
    let view = tensor(gguf, name, expected)?;
    let mut out = vec![0.0; view.elements()];
    dequantize(view.dtype, view.data, &mut out)
        .map_err(|cause| ModelError::Tensor { name: name.into(), cause })?;
    Ok(out)
}

fn vector(gguf: &Gguf, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
    floats(gguf, name, &[len])
}
