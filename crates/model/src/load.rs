//! A checkpoint made ready to run: weights packed for the matmul.
//!
//! GGUF files and folders in Hugging Face's layout end in the same structures;
//! what differs (fused projections, names, gains) is undone here, row by row of
//! bytes, so that quantized rows stay as they are.

use crate::{
    Config, Experts, ModelError, Order, QkNorm,
    arch::{self, Description, ExpertNames, GateUp, Names, Qkv},
    file::GgufFile,
    formats::Gguf,
    packed::PackedCache,
    quantized::Scheme,
    source::{self, Folder, Source, Tensor},
};
use ashlar_kernels::{AttentionSpec, PackedMatrix, Pool, RopeTable};
use std::{ops::Range, path::Path, sync::Arc};

/// A matrix and, where there is one, its bias.
pub(crate) struct Linear {
    pub(crate) w: PackedMatrix,
    pub(crate) bias: Option<Vec<f32>>,
}

/// A norm's gains; with a bias it is a layer norm.
pub(crate) struct Norm {
    pub(crate) gain: Vec<f32>,
    pub(crate) bias: Option<Vec<f32>>,
}

/// A feed-forward layer.
pub(crate) struct Mlp {
    pub(crate) gate: Option<Linear>,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// What follows attention in a layer.
pub(crate) enum Ffn {
    Dense(Mlp),
    /// The router's products choose among the experts.
    Experts { router: PackedMatrix, experts: Vec<Mlp>, spec: Experts },
}

/// One layer.
pub(crate) struct Layer {
    pub(crate) attn_norm: Option<Norm>,
    pub(crate) attn_post_norm: Option<Norm>,
    pub(crate) ffn_norm: Option<Norm>,
    pub(crate) ffn_post_norm: Option<Norm>,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) o: Linear,
    /// Gains of the queries' and keys' norms, a head or the whole width long.
    pub(crate) qk_norm: Option<[Norm; 2]>,
    pub(crate) ffn: Ffn,
    pub(crate) attention: AttentionSpec,
}

/// A model in memory, read-only: share it freely between threads.
pub struct Model {
    pub(crate) config: Config,
    pub(crate) pool: Arc<Pool>,
    pub(crate) embed: PackedMatrix,
    pub(crate) embed_norm: Option<Norm>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Norm,
    /// `None` when the head is the embedding.
    pub(crate) head: Option<PackedMatrix>,
    pub(crate) rope: Option<RopeTable>,
    /// That of layers with a window, where they have their own.
    pub(crate) local_rope: Option<RopeTable>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Model {
    /// Loads a GGUF file, or a folder with `config.json` and safetensors, with
    /// a pool over all processors this process may use.
    ///
    /// # Errors
    /// An unreadable or malformed file, an unknown architecture or setting, a
    /// tensor missing, left over, of the wrong shape or of a type without a
    /// kernel, an encoder.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        Self::load_with(path, Pool::new(0))
    }

    /// [`Model::load`] on a pool of the caller's.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_with(path: &Path, pool: Arc<Pool>) -> Result<Self, ModelError> {
        Self::load_cached(path, pool, None)
    }

    /// [`Model::load_with`], from `cache` where it has what the files hold.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_cached(path: &Path, pool: Arc<Pool>, cache: Option<&PackedCache>) -> Result<Self, ModelError> {
        if path.is_dir() {
            let folder = Folder::open(path)?;
            let json = folder.file(source::CONFIG)?;
            let description = arch::from_hf(&json)?;
            let shards = folder.shards()?;
            let source = Source::from_shards(&shards, description.1.prefix, Scheme::from_hf(&json)?, &pool)?;
            let files: Vec<_> = shards.iter().map(|(file, _)| *file).collect();
            return Self::build(&source.cached(cache, &files, &json), description, pool);
        }
        GgufFile::read(path, |file, gguf| Self::from_file(file, gguf, pool, cache))?
    }

    /// Packs a file that is in memory whole.
    ///
    /// # Errors
    /// As [`Model::load`], but for reading.
    pub fn from_gguf(gguf: &Gguf, pool: Arc<Pool>) -> Result<Self, ModelError> {
        let source = Source::from_gguf(gguf, &pool)?;
        Self::build(&source, arch::from_gguf(gguf, &source)?, pool)
    }

    /// Reads and packs a file whose header is `gguf`, or takes it from `cache`.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn from_file(
        file: &GgufFile,
        gguf: &Gguf,
        pool: Arc<Pool>,
        cache: Option<&PackedCache>,
    ) -> Result<Self, ModelError> {
        let source = Source::from_file(gguf, file, &pool)?.cached(cache, &[&file.file], b"");
        Self::build(&source, arch::from_gguf(gguf, &source)?, pool)
    }

    fn build(source: &Source, (config, names): Description, pool: Arc<Pool>) -> Result<Self, ModelError> {
        if config.order == Order::Sum {
            let architecture = config.architecture;
            return Err(ModelError::Role { architecture, is: "an encoder: it embeds text and does not continue it" });
        }
        let c = &config;
        let head = weight(names.head);
        let embedded = |t: &Tensor| source.find(&weight(names.embed)).map_or(Ok(false), |e| t.same(e));
        let head = match (c.tied, source.find(&head)) {
            (true, None) => None,
            (true, Some(tensor)) if embedded(tensor)? => None,
            (true, Some(tensor)) => return Err(ModelError::Unused(tensor.name.into())),
            (false, _) => Some(source.matrix(&head, c.vocab, c.hidden)?),
        };
        let reader = Reader { source, config: c, names: &names };
        let table = |r: &crate::Rope| RopeTable::new(c.context, r.dim, r.theta, r.factors.as_deref(), r.scale);
        let model = Self {
            embed: source.matrix(&weight(names.embed), c.vocab, c.hidden)?,
            embed_norm: c.embedding_norm.then(|| reader.norm(names.embed_norm, c.hidden)).transpose()?,
            layers: (0..c.layers).map(|i| reader.layer(i)).collect::<Result<_, _>>()?,
            norm: reader.norm(names.norm, c.hidden)?,
            head,
            rope: c.rope.as_ref().map(table),
            local_rope: c.local_rope.as_ref().map(table),
            pool,
            config: c.clone(),
        };
        source.finish(spare)?;
        Ok(model)
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
        let layers = self.layers.iter().map(Layer::bytes).sum::<usize>();
        layers + self.embed.bytes() + self.head.as_ref().map_or(0, PackedMatrix::bytes)
    }
}

impl Mlp {
    fn bytes(&self) -> usize {
        self.gate.iter().chain([&self.up, &self.down]).map(|l| l.w.bytes()).sum()
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        let ffn = match &self.ffn {
            Ffn::Dense(mlp) => mlp.bytes(),
            Ffn::Experts { router, experts, .. } => router.bytes() + experts.iter().map(Mlp::bytes).sum::<usize>(),
        };
        ffn + [&self.q, &self.k, &self.v, &self.o].iter().map(|l| l.w.bytes()).sum::<usize>()
    }
}

/// Tensors that hold no part of the model: tables that old checkpoints carry
/// along, rotary factors for contexts longer than those taken, scales to round
/// activations by.
fn spare(name: &str) -> bool {
    let tail = [
        ".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".input_scale", ".input_zero_point",
        ".output_scale", ".k_scale", ".v_scale", ".activation_scale",
    ];
    name == "rope_factors_long.weight" || name == "rope_factors_short.weight" || name == "rope_freqs.weight"
        || tail.iter().any(|t| name.ends_with(t))
}

pub(crate) fn weight(name: &str) -> String {
    format!("{name}.weight")
}

/// Reads layers, whichever way they lie.
pub(crate) struct Reader<'r, 'a> {
    pub(crate) source: &'r Source<'a>,
    pub(crate) config: &'r Config,
    pub(crate) names: &'r Names,
}

impl Reader<'_, '_> {
    pub(crate) fn norm(&self, name: &str, width: usize) -> Result<Norm, ModelError> {
        let mut gain = self.source.floats(&weight(name), &[width])?;
        gain.iter_mut().for_each(|g| *g += self.names.gain_offset);
        let bias = self.config.layer_norm.then(|| self.source.floats(&format!("{name}.bias"), &[width]));
        Ok(Norm { gain, bias: bias.transpose()? })
    }

    /// A linear of `[n, k]`.
    fn linear(&self, name: &str, n: usize, k: usize, bias: bool) -> Result<Linear, ModelError> {
        let w = self.source.matrix(&weight(name), n, k)?;
        let bias = bias.then(|| self.source.floats(&format!("{name}.bias"), &[n])).transpose()?;
        Ok(Linear { w, bias })
    }

    /// Linears out of one tensor, each given by the runs of rows it takes, which
    /// together are all of them.
    fn split<const N: usize>(
        &self,
        name: &str,
        parts: [Vec<Range<usize>>; N],
        k: usize,
        bias: bool,
    ) -> Result<[Linear; N], ModelError> {
        let n = parts.iter().flatten().map(Range::len).sum();
        let all = bias.then(|| self.source.floats(&format!("{name}.bias"), &[n])).transpose()?;
        let one = |runs: Vec<Range<usize>>| {
            let bias = all.as_ref().map(|all| runs.iter().flat_map(|r| &all[r.clone()]).copied().collect());
            Ok(Linear { w: self.source.rows(&weight(name), n, k, &runs)?, bias })
        };
        let linears = parts.into_iter().map(one).collect::<Result<Vec<_>, ModelError>>()?;
        // As many as there were parts.
        linears.try_into().map_err(|_| ModelError::Missing(name.into()))
    }

    fn qkv(&self, at: impl Fn(&str) -> String) -> Result<[Linear; 3], ModelError> {
        let (c, bias) = (self.config, self.config.qkv_bias);
        let (dim, q, kv) = (c.head_dim, c.heads * c.head_dim, c.kv_heads * c.head_dim);
        match self.names.qkv {
            Qkv::Apart([a, b, v]) => Ok([
                self.linear(&at(a), q, c.hidden, bias)?,
                self.linear(&at(b), kv, c.hidden, bias)?,
                self.linear(&at(v), kv, c.hidden, bias)?,
            ]),
            Qkv::Stacked(name) => {
                let parts = [0..q, q..q + kv, q + kv..q + 2 * kv];
                self.split(&at(name), parts.map(|run| vec![run]), c.hidden, bias)
            }
            Qkv::ByHead(_) if c.kv_heads != c.heads => {
                let (what, value) = ("key and value heads".into(), c.kv_heads.to_string());
                Err(ModelError::Setting { what, value, must: "the query heads' number, being stored beside them" })
            }
            Qkv::ByHead(name) => {
                let part = |part| move |head| (3 * head + part) * dim..(3 * head + part + 1) * dim;
                let parts = [0, 1, 2].map(|p| (0..c.heads).map(part(p)).collect());
                self.split(&at(name), parts, c.hidden, bias)
            }
        }
    }

    fn mlp(&self, at: impl Fn(&str) -> String) -> Result<Mlp, ModelError> {
        let (c, bias) = (self.config, self.config.ffn_bias);
        let (gate, up) = match self.names.gate_up {
            GateUp::Stacked(name) => {
                let parts = [0..c.ffn, c.ffn..2 * c.ffn].map(|run| vec![run]);
                let [gate, up] = self.split(&at(name), parts, c.hidden, bias)?;
                (Some(gate), up)
            }
            GateUp::Apart(gate, up) => {
                let gated = c.activation.gated();
                let gate = gated.then(|| self.linear(&at(gate), c.ffn, c.hidden, bias)).transpose()?;
                (gate, self.linear(&at(up), c.ffn, c.hidden, bias)?)
            }
        };
        Ok(Mlp { gate, up, down: self.linear(&at(self.names.down), c.hidden, c.ffn, bias)? })
    }

    fn experts(&self, count: usize, at: impl Fn(&str) -> String) -> Result<Vec<Mlp>, ModelError> {
        let c = self.config;
        let shapes = [(c.ffn, c.hidden), (c.ffn, c.hidden), (c.hidden, c.ffn)];
        let plain = |w| Linear { w, bias: None };
        let one = |e: usize| -> Result<Mlp, ModelError> {
            let part = |i: usize| -> Result<Linear, ModelError> {
                let (n, k) = shapes[i];
                match self.names.experts {
                    ExpertNames::Apart(names) => {
                        let name = at(names[i]).replace("{}", &e.to_string());
                        self.linear(&name, n, k, false)
                    }
                    ExpertNames::Stacked(names) => {
                        let tensor = self.source.tensor(&weight(&at(names[i])), &[count, n, k])?;
                        self.source.pack(tensor, k, std::slice::from_ref(&(e * n..(e + 1) * n))).map(plain)
                    }
                }
            };
            Ok(Mlp { gate: Some(part(0)?), up: part(1)?, down: part(2)? })
        };
        (0..count).map(one).collect()
    }

    pub(crate) fn layer(&self, index: usize) -> Result<Layer, ModelError> {
        let (c, names) = (self.config, self.names);
        let at = |name: &str| format!("{}{name}", names.layer.replace("{}", &index.to_string()));
        let norm = |name: &str, there: bool| there.then(|| self.norm(&at(name), c.hidden)).transpose();
        let before = c.order != Order::Post;
        let after = matches!(c.order, Order::Post | Order::Sandwich);
        let [q, k, v] = self.qkv(at)?;
        let width = |heads: usize| match c.qk_norm {
            Some(QkNorm::Width) => heads * c.head_dim,
            _ => c.head_dim,
        };
        let qk_norm = match c.qk_norm {
            None => None,
            Some(_) => Some([
                self.norm(&at(names.q_norm), width(c.heads))?,
                self.norm(&at(names.k_norm), width(c.kv_heads))?,
            ]),
        };
        Ok(Layer {
            attn_norm: norm(names.attn_norm, before)?,
            attn_post_norm: norm(names.attn_post_norm, after)?,
            ffn_norm: norm(names.ffn_norm, before)?,
            ffn_post_norm: norm(names.ffn_post_norm, after)?,
            q,
            k,
            v,
            o: self.linear(&at(names.o), c.hidden, c.heads * c.head_dim, c.o_bias)?,
            qk_norm,
            ffn: match c.experts {
                None => Ffn::Dense(self.mlp(at)?),
                Some(e) => {
                    let router = self.source.matrix(&weight(&at(names.router)), e.count, c.hidden)?;
                    Ffn::Experts { router, experts: self.experts(e.count, at)?, spec: e }
                }
            },
            attention: AttentionSpec {
                scale: c.attention_scale,
                window: c.windows[index],
                softcap: c.attention_softcap,
                alibi: c.slopes(),
            },
        })
    }
}
