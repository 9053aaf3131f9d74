//! Matrices that a folder keeps quantized: GPTQ, AWQ, compressed-tensors, FP8.
//!
//! `quantization_config` says how; which matrices are so, their tensors say: one
//! that has a plain `weight` is plain. Codes, scales and zero points are taken as
//! they stand and packed as [`Runs`]; shapes are held against the configuration.
//! Activations keep this program's own precision, whatever the file would have
//! them rounded to: their scales are not read.
//!
//! What may not happen here: a tensor as large as the matrix in a wider type.
//! Layouts: AutoGPTQ's `qlinear_cuda` (v1) and GPTQModel's `gptq_v2`, AutoAWQ's
//! `WQLinear_GEMM`, compressed-tensors' `pack_to_int32`, transformers'
//! `FineGrainedFP8Config`. Rejected: GEMV and Marlin layouts, which are a kernel's
//! own; 2 and 3 bits.

use crate::{
    ModelError,
    keys::Keys,
    source::{Source, Tensor, Unpacked},
};
use ashlar_core::DType;
use ashlar_kernels::{KernelError, PackedMatrix, Runs};
use serde_json::Value as Json;
use std::{borrow::Cow, ops::Range};

/// Keys that do not change what the stored tensors mean: how they were found, on
/// what they should run, what becomes of activations.
const HARMLESS: [&str; 42] = [
    "act_group_aware", "activation", "activation_scheme", "backend", "batch_size", "block_name_to_quantize",
    "cache_block_outputs", "damp_auto_increment", "damp_percent", "dataset", "dequantize", "desc_act", "do_fuse",
    "dynamic", "exllama_config", "expert_dtype", "fuse_max_seq_len", "global_compression_ratio", "hyb_act",
    "ignored_layers", "is_marlin_format", "kv_cache_scheme", "lm_head", "max_input_length", "meta",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "modules_to_convert", "modules_to_fuse", "mse", "pad_token_id", "quantizer",
    "static_groups", "sym", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "version",
];
/// The same of one of compressed-tensors' groups and of its weights.
const HARMLESS_GROUP: [&str; 3] = ["input_activations", "output_activations", "targets"];
const HARMLESS_WEIGHTS: [&str; 6] = ["actorder", "dynamic", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"];

/// Where a scale holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spread {
    /// The whole matrix, or each row: what the tensor's shape says.
    Rows,
    /// Each row's runs of so many values along k.
    Groups(usize),
    /// Blocks of so many rows and values along k.
    Blocks([usize; 2]),
}

/// How a folder's quantized matrices are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Gptq { bits: usize, spread: Spread, less: u32, ordered: bool },
    Awq { spread: Spread, zeros: bool },
    Fp8 { spread: Spread },
    Compressed { bits: usize, spread: Spread, zeros: bool },
}

impl Scheme {
    /// Reads a `config.json`'s `quantization_config`, where there is one.
    pub(crate) fn from_hf(json: &[u8]) -> Result<Option<Self>, ModelError> {
        let Some(k) = Keys::from_json(json)?.nested("quantization_config")? else { return Ok(None) };
        let names = |key| k.list(key).map(drop);
        names("modules_to_not_convert")?;
        names("ignore")?;
        let method = k.text("quant_method")?.or(k.text("method")?).ok_or_else(|| k.lacks("quant_method"))?;
        let scheme = match method {
            "gptq" => Self::gptq(&k),
            "awq" => Self::awq(&k),
            "fp8" => Self::fp8(&k),
            "compressed-tensors" => Self::compressed(&k),
            other => Err(k.must("quant_method", other, "gptq, awq, fp8 or compressed-tensors")),
        }?;
        k.finish_but(&HARMLESS)?;
        Ok(Some(scheme))
    }

    fn gptq(k: &Keys) -> Result<Self, ModelError> {
        let bits = k.size("bits")?;
        if bits != 4 && bits != 8 {
            return Err(k.must("bits", bits, "4 or 8"));
        }
        k.only("pack_dtype", &"int32".into(), "int32")?;
        let format = k.text("checkpoint_format")?.or(k.text("format")?).unwrap_or("gptq");
        let less = match format {
            "gptq" => 1,
            "gptq_v2" => 0,
            other => return Err(k.must("checkpoint_format", other, "gptq or gptq_v2")),
        };
        Ok(Self::Gptq { bits, spread: group(k)?, less, ordered: k.flag("desc_act", false)? })
    }

    fn awq(k: &Keys) -> Result<Self, ModelError> {
        k.only("bits", &4.into(), "4")?;
        for key in ["version", "format"] {
            let layout = k.text(key)?.unwrap_or("gemm");
            if !layout.eq_ignore_ascii_case("gemm") {
                return Err(k.must(key, layout, "gemm"));
            }
        }
        Ok(Self::Awq { spread: group(k)?, zeros: k.flag("zero_point", true)? })
    }

    fn fp8(k: &Keys) -> Result<Self, ModelError> {
        for (key, known) in [("fmt", ["e4m3", "e5m2"]), ("scale_fmt", ["float", "ue8m0"])] {
            match k.text(key)? {
                Some(other) if !known.contains(&other) => return Err(k.must(key, other, "one this program knows")),
                _ => {}
            }
        }
        Ok(Self::Fp8 { spread: blocks(k, "weight_block_size")?.unwrap_or(Spread::Rows) })
    }

    fn compressed(k: &Keys) -> Result<Self, ModelError> {
        let known = ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"];
        let layout = |k: &Keys| match k.text("format")? {
            Some(other) if !known.contains(&other) => {
                Err(k.must("format", other, "pack-quantized, int-quantized, float-quantized or naive-quantized"))
            }
            _ => Ok(()),
        };
        layout(k)?;
        k.only("quantization_status", &"compressed".into(), "compressed")?;
        for key in ["sparsity_config", "transform_config", "moe_sparsity_config"] {
            // An empty object says that there is none.
            if let Some(some) = k.nested(key)? {
                some.finish()?;
            }
        }
        let groups = k.nested("config_groups")?.ok_or_else(|| k.lacks("config_groups"))?;
        let mut all = None;
        for name in groups.names() {
            let one = groups.nested(name)?.ok_or_else(|| groups.lacks(name))?;
            layout(&one)?;
            let w = one.nested("weights")?.ok_or_else(|| one.lacks("weights"))?;
            let bits = w.size("num_bits")?;
            let zeros = !w.flag("symmetric", true)?;
            match (w.text("type")?.unwrap_or("int"), bits) {
                ("int", 4 | 8) | ("float", 8) => {}
                (kind, _) => return Err(w.must("num_bits", format!("{bits} ({kind})"), "4 or 8 (int), 8 (float)")),
            }
            let spread = match (w.text("strategy")?, group(&w), blocks(&w, "block_structure")?) {
                (Some("tensor" | "channel"), ..) => Spread::Rows,
                (Some("group") | None, group, _) => group?,
                (Some("block"), _, Some(block)) => block,
                (Some("block"), ..) => return Err(w.lacks("block_structure")),
                (Some(other), ..) => return Err(w.must("strategy", other, "tensor, channel, group or block")),
            };
            w.finish_but(&HARMLESS_WEIGHTS)?;
            one.finish_but(&HARMLESS_GROUP)?;
            let scheme = Self::Compressed { bits, spread, zeros };
            if all.is_some_and(|all| all != scheme) {
                return Err(k.must("config_groups", "groups that differ", "alike for all weights"));
            }
            all = Some(scheme);
        }
        all.ok_or_else(|| k.must("config_groups", "empty", "at least one group"))
    }

    /// The matrix `name` of `[n, k]`, if it is quantized.
    pub(crate) fn find<'s, 'a>(
        self,
        source: &'s Source<'a>,
        name: &str,
        n: usize,
        k: usize,
    ) -> Result<Option<Quantized<'s, 'a>>, ModelError> {
        let stored = Stored { source, base: name.strip_suffix(".weight").unwrap_or(name), n, k };
        let dtype = source.peek(name).map(|t| t.dtype);
        let floats = matches!(dtype, Some(DType::F8_E4M3 | DType::F8_E5M2));
        match self {
            Self::Gptq { bits, spread, less, ordered } if stored.has("qweight") => {
                stored.gptq(bits, spread, less, ordered).map(Some)
            }
            Self::Awq { spread, zeros } if stored.has("qweight") => stored.awq(spread, zeros).map(Some),
            Self::Fp8 { spread } if floats => stored.floats(spread).map(Some),
            Self::Compressed { spread, .. } if floats => stored.floats(spread).map(Some),
            Self::Compressed { bits, spread, zeros } if stored.has("weight_packed") => {
                stored.packed(bits, spread, zeros).map(Some)
            }
            Self::Compressed { bits: 8, spread, zeros } if dtype == Some(DType::I8) => {
                stored.bytes(spread, zeros).map(Some)
            }
            _ => Ok(None),
        }
    }
}

/// `group_size`, of which -1 is all of k.
fn group(k: &Keys) -> Result<Spread, ModelError> {
    match k.get("group_size").and_then(Json::as_i64) {
        Some(-1) => Ok(Spread::Rows),
        _ => k.size("group_size").map(Spread::Groups),
    }
}

fn blocks(k: &Keys, key: &str) -> Result<Option<Spread>, ModelError> {
    let Some(sizes) = k.list(key)? else { return Ok(None) };
    let sizes: Vec<usize> = sizes.iter().filter_map(|v| v.as_u64().map(|v| v as usize)).collect();
    match sizes[..] {
        [rows, values] if rows > 0 && values > 0 => Ok(Some(Spread::Blocks([rows, values]))),
        _ => Err(k.must(key, format!("{sizes:?}"), "two counts")),
    }
}

/// A quantized matrix as its tensors have it.
pub(crate) struct Quantized<'s, 'a> {
    dtype: DType,
    k: usize,
    codes: Codes<'s, 'a>,
    /// Of all rows.
    runs: Runs,
}

/// Where a matrix's codes are.
enum Codes<'s, 'a> {
    /// A byte each, row by row; integers come unsigned after this is flipped.
    Bytes(&'s Tensor<'a>, u8),
    /// Four bits each, row by row, the low half first.
    Nibbles(&'s Tensor<'a>),
    /// Words of `[k / codes a word, n]`, of so many bits a code.
    Down(Words<'a>, usize),
    /// Words of `[k, n / 8]`, in AWQ's order.
    Across(Words<'a>),
}

/// A tensor of 32-bit words.
struct Words<'a> {
    bytes: Cow<'a, [u8]>,
    /// Words a row.
    width: usize,
}

impl Words<'_> {
    fn at(&self, row: usize, col: usize) -> u32 {
        let b = &self.bytes[(row * self.width + col) * 4..][..4];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}

/// The four bits of AWQ's word where the code of column `col` is.
fn slot(col: usize) -> usize {
    [0, 4, 1, 5, 2, 6, 3, 7][col % 8] * 4
}

/// The tensors of one matrix of `[n, k]`.
struct Stored<'s, 'a, 'b> {
    source: &'s Source<'a>,
    base: &'b str,
    n: usize,
    k: usize,
}

impl<'s, 'a> Stored<'s, 'a, '_> {
    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.base)
    }

    fn has(&self, part: &str) -> bool {
        self.source.peek(&self.name(part)).is_some()
    }

    /// A tensor of this type and shape.
    fn tensor(&self, part: &str, dtype: DType, shape: &[usize]) -> Result<&'s Tensor<'a>, ModelError> {
        let tensor = self.source.tensor(&self.name(part), shape)?;
        if tensor.dtype == dtype {
            return Ok(tensor);
        }
        Err(tensor.refused(KernelError::Unsupported { action: "codes, zero points or places of", dtype: tensor.dtype }))
    }

    fn words(&self, part: &str, rows: usize, width: usize) -> Result<Words<'a>, ModelError> {
        Ok(Words { bytes: self.tensor(part, DType::I32, &[rows, width])?.bytes()?, width })
    }

    /// Integer codes fill blocks, so that rows fill words.
    fn whole(&self) -> Result<(), ModelError> {
        if self.k.is_multiple_of(32) {
            return Ok(());
        }
        let cause = KernelError::Ragged { dtype: DType::U4, values: self.k, block: 32 };
        Err(ModelError::Tensor { name: self.base.into(), cause })
    }

    /// Values along k in a run.
    fn run(&self, spread: Spread) -> usize {
        match spread {
            Spread::Rows => self.k.max(1),
            Spread::Groups(len) | Spread::Blocks([_, len]) => len,
        }
    }

    /// Runs along k.
    fn count(&self, spread: Spread) -> usize {
        self.k.div_ceil(self.run(spread))
    }

    fn gptq(&self, bits: usize, spread: Spread, less: u32, ordered: bool) -> Result<Quantized<'s, 'a>, ModelError> {
        self.whole()?;
        let (n, per, count) = (self.n, 32 / bits, self.count(spread));
        let codes = self.words("qweight", self.k / per, n)?;
        let zeros = self.words("qzeros", count, n.div_ceil(per))?;
        let scales = self.source.floats(&self.name("scales"), &[count, n])?;
        let mask = u32::MAX >> (32 - bits);
        let zero = |row: usize, run: usize| ((zeros.at(run, row / per) >> (row % per * bits) & mask) + less) as i16;
        let order = if ordered || self.has("g_idx") { self.order("g_idx", self.run(spread))? } else { None };
        self.spare_bias()?;
        Ok(Quantized {
            dtype: if bits == 4 { DType::U4 } else { DType::U8 },
            k: self.k,
            codes: Codes::Down(codes, bits),
            runs: Runs {
                len: self.run(spread),
                scales: each(n, count, |row, run| scales[run * n + row]),
                zeros: each(n, count, zero),
                order,
            },
        })
    }

    /// GPTQ's tools once wrote a bias of zeros where a module has none.
    fn spare_bias(&self) -> Result<(), ModelError> {
        let name = self.name("bias");
        if let Some(bias) = self.source.peek(&name)
            && bias.bytes()?.iter().all(|&b| b == 0)
        {
            self.source.find(&name);
        }
        Ok(())
    }

    fn awq(&self, spread: Spread, zeros: bool) -> Result<Quantized<'s, 'a>, ModelError> {
        self.whole()?;
        let (n, count, width) = (self.n, self.count(spread), self.n.div_ceil(8));
        let codes = self.words("qweight", self.k, width)?;
        let words = (zeros || self.has("qzeros")).then(|| self.words("qzeros", count, width)).transpose()?;
        let scales = self.source.floats(&self.name("scales"), &[count, n])?;
        let zero = |row: usize, run: usize| {
            words.as_ref().map_or(8, |words| (words.at(run, row / 8) >> slot(row) & 15) as i16)
        };
        let points = each(n, count, zero);
        if let (false, Some(other)) = (zeros, points.iter().find(|&&z| z != 8)) {
            let what = format!("a zero point of {}", self.base);
            return Err(ModelError::Setting { what, value: other.to_string(), must: "8, for zero_point is false" });
        }
        Ok(Quantized {
            dtype: DType::U4,
            k: self.k,
            codes: Codes::Across(codes),
            runs: Runs {
                len: self.run(spread),
                scales: each(n, count, |row, run| scales[run * n + row]),
                zeros: points,
                order: None,
            },
        })
    }

    fn floats(&self, spread: Spread) -> Result<Quantized<'s, 'a>, ModelError> {
        let weight = self.source.tensor(&self.name("weight"), &[self.n, self.k])?;
        let inverse = if self.has("weight_scale_inv") { "weight_scale_inv" } else { "weight_scale" };
        Ok(Quantized {
            dtype: weight.dtype,
            k: self.k,
            codes: Codes::Bytes(weight, 0),
            runs: Runs { len: self.run(spread), scales: self.scales(inverse, spread)?, ..Runs::default() },
        })
    }

    fn packed(&self, bits: usize, spread: Spread, zeros: bool) -> Result<Quantized<'s, 'a>, ModelError> {
        self.whole()?;
        let codes = self.tensor("weight_packed", DType::I32, &[self.n, self.k / (32 / bits)])?;
        let shape = self.tensor("weight_shape", DType::I64, &[2])?;
        let sizes: Vec<i64> = shape.bytes()?.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        if sizes != [self.n as i64, self.k as i64] {
            let must = "the matrix's rows and columns";
            return Err(ModelError::Setting { what: shape.name.into(), value: format!("{sizes:?}"), must });
        }
        let order = if self.has("weight_g_idx") { self.order("weight_g_idx", self.run(spread))? } else { None };
        Ok(Quantized {
            dtype: if bits == 4 { DType::U4 } else { DType::U8 },
            k: self.k,
            codes: if bits == 4 { Codes::Nibbles(codes) } else { Codes::Bytes(codes, 0) },
            runs: self.compressed(bits, spread, zeros, order)?,
        })
    }

    fn bytes(&self, spread: Spread, zeros: bool) -> Result<Quantized<'s, 'a>, ModelError> {
        self.whole()?;
        let codes = self.tensor("weight", DType::I8, &[self.n, self.k])?;
        let runs = self.compressed(8, spread, zeros, None)?;
        Ok(Quantized { dtype: DType::U8, k: self.k, codes: Codes::Bytes(codes, 0x80), runs })
    }

    /// compressed-tensors' scales and zero points. These count from the middle of the
    /// codes, and in words they are packed as codes are, down the rows.
    fn compressed(
        &self,
        bits: usize,
        spread: Spread,
        zeros: bool,
        order: Option<Box<[u32]>>,
    ) -> Result<Runs, ModelError> {
        let (n, count, per, middle) = (self.n, self.count(spread), 32 / bits, 1 << (bits - 1));
        let name = self.name("weight_zero_point");
        let zeros = match self.source.peek(&name) {
            None if zeros => return Err(ModelError::Missing(self.source.full(&name))),
            None => vec![middle; n * count],
            Some(t) if t.dtype == DType::I32 => {
                let words = self.words("weight_zero_point", n.div_ceil(per), count)?;
                let mask = u32::MAX >> (32 - bits);
                each(n, count, |row, run| (words.at(row / per, run) >> (row % per * bits) & mask) as i16)
            }
            Some(t) => {
                let shape = self.shape(t, spread);
                let bytes = self.tensor("weight_zero_point", DType::I8, &shape)?.bytes()?;
                self.spread(spread, &bytes).into_iter().map(|b| i16::from(b as i8) + middle).collect()
            }
        };
        Ok(Runs { len: self.run(spread), scales: self.scales("weight_scale", spread)?, zeros, order })
    }

    /// The shape that `tensor`, one number a scale, should have.
    fn shape(&self, tensor: &Tensor, spread: Spread) -> Vec<usize> {
        match spread {
            // All of the matrix, or each row: `[]`, `[1]`, `[n]`, `[n, 1]`.
            Spread::Rows if matches!(tensor.shape, [] | [1] | [1, 1]) => tensor.shape.into(),
            Spread::Rows if tensor.shape == [self.n] => tensor.shape.into(),
            Spread::Rows => vec![self.n, 1],
            Spread::Groups(_) => vec![self.n, self.count(spread)],
            Spread::Blocks([rows, _]) => vec![self.n.div_ceil(rows), self.count(spread)],
        }
    }

    /// `values`, of a shape that [`Stored::shape`] allows, for each row.
    fn spread<T: Copy>(&self, spread: Spread, values: &[T]) -> Vec<T> {
        let count = self.count(spread);
        each(self.n, count, |row, run| match spread {
            Spread::Rows if values.len() == 1 => values[0],
            Spread::Blocks([rows, _]) => values[row / rows * count + run],
            _ => values[row * count + run],
        })
    }

    fn scales(&self, part: &str, spread: Spread) -> Result<Vec<f32>, ModelError> {
        let name = self.name(part);
        let tensor = self.source.find(&name).ok_or_else(|| ModelError::Missing(self.source.full(&name)))?;
        Ok(self.spread(spread, &tensor.floats(&self.shape(tensor, spread))?))
    }

    /// The order along k that has each group's values together, from the group of
    /// each k; `None` where they are together.
    fn order(&self, part: &str, len: usize) -> Result<Option<Box<[u32]>>, ModelError> {
        let tensor = self.tensor(part, DType::I32, &[self.k])?;
        let groups: Vec<i32> = tensor.bytes()?.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        // compressed-tensors leaves -1 where it never ordered anything.
        if groups.iter().all(|&g| g == -1) || groups.iter().enumerate().all(|(i, &g)| g as usize == i / len) {
            return Ok(None);
        }
        let count = self.k.div_ceil(len);
        let mut members = vec![Vec::new(); count];
        for (i, &g) in groups.iter().enumerate() {
            let Some(members) = usize::try_from(g).ok().and_then(|g| members.get_mut(g)) else {
                let what = format!("{}[{i}], of {count} groups,", tensor.name);
                return Err(ModelError::Setting { what, value: g.to_string(), must: "the number of a group" });
            };
            members.push(i as u32);
        }
        for (g, members) in members.iter().enumerate() {
            if members.len() != len.min(self.k - g * len) {
                let what = format!("the size of group {g} in {}", tensor.name);
                let must = "the group size, or in the last group what is left";
                return Err(ModelError::Setting { what, value: members.len().to_string(), must });
            }
        }
        Ok(Some(members.concat().into()))
    }
}

/// `of(row, run)` for each of `count` runs of `n` rows.
fn each<T>(n: usize, count: usize, of: impl Fn(usize, usize) -> T) -> Vec<T> {
    (0..n).flat_map(|row| (0..count).map(move |run| (row, run))).map(|(row, run)| of(row, run)).collect()
}

impl Quantized<'_, '_> {
    /// The rows of `runs`, one run after another, as one matrix.
    pub(crate) fn pack(&self, source: &Source, runs: &[Range<usize>]) -> Result<PackedMatrix, Unpacked> {
        let rows: Vec<usize> = runs.iter().cloned().flatten().collect();
        let count = self.k.div_ceil(self.runs.len.max(1));
        let of_rows = Runs {
            len: self.runs.len,
            scales: rows.iter().flat_map(|r| &self.runs.scales[r * count..][..count]).copied().collect(),
            zeros: match self.runs.zeros.is_empty() {
                true => Vec::new(),
                false => rows.iter().flat_map(|r| &self.runs.zeros[r * count..][..count]).copied().collect(),
            },
            order: self.runs.order.clone(),
        };
        let read = |i: usize, to: &mut [u8]| self.read(runs, &rows[i..], i, to).map_err(Unpacked::Model);
        PackedMatrix::read_runs(source.pool(), self.dtype, rows.len(), self.k, of_rows, read)
    }

    /// Fills `to` with the codes of whole rows, the first ones of `rows`, which are
    /// those of `runs` from number `i` on.
    fn read(&self, runs: &[Range<usize>], rows: &[usize], i: usize, to: &mut [u8]) -> Result<(), ModelError> {
        let k = self.k;
        match &self.codes {
            Codes::Bytes(tensor, flip) => {
                tensor.rows(runs, k, i, to)?;
                to.iter_mut().for_each(|b| *b ^= flip);
            }
            Codes::Nibbles(tensor) => {
                let mut packed = vec![0; to.len() / 2];
                tensor.rows(runs, k / 2, i, &mut packed)?;
                for (two, b) in to.chunks_exact_mut(2).zip(packed) {
                    two.copy_from_slice(&[b & 15, b >> 4]);
                }
            }
            Codes::Down(words, bits) => {
                let (per, mask) = (32 / bits, 255u8 >> (8 - bits));
                // Down the words first: those of neighbouring rows lie together.
                for at in 0..k / per {
                    for (to, &row) in to.chunks_exact_mut(k).zip(rows) {
                        let word = words.at(at, row);
                        for (j, to) in to[at * per..][..per].iter_mut().enumerate() {
                            *to = (word >> (j * bits)) as u8 & mask;
                        }
                    }
                }
            }
            Codes::Across(words) => {
                for at in 0..k {
                    for (to, &row) in to.chunks_exact_mut(k).zip(rows) {
                        to[at] = (words.at(at, row / 8) >> slot(row)) as u8 & 15;
                    }
                }
            }
        }
        if let Some(order) = &self.runs.order {
            let mut row = vec![0; k];
            for to in to.chunks_exact_mut(k) {
                row.copy_from_slice(to);
                to.iter_mut().zip(order).for_each(|(to, &i)| *to = row[i as usize]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        formats::safetensors::SafeTensors,
        source::{CONFIG, Folder},
    };
    use ashlar_kernels::Pool;
    use std::{path::Path, process::Command};

    /// Checkpoints by other programs, and their own reading of the weights.
    #[test]
    fn weights_have_the_bits_that_other_programs_read() {
        let Some(python) = std::env::var_os("ASHLAR_TRANSFORMERS_PYTHON") else {
            assert_ne!(std::env::var("ASHLAR_REQUIRE_PEERS").as_deref(), Ok("1"), "transformers is required");
            eprintln!("skipped: transformers (ASHLAR_TRANSFORMERS_PYTHON is not set; `cargo xtask test` sets it)");
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask/peers/quantized.py");
        let out = Command::new(python).arg(script).arg(dir.path()).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let mut matrices = 0;
        for folder in std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()) {
            if !folder.is_dir() {
                continue;
            }
            let files = Folder::open(&folder).unwrap();
            let (shards, scheme) = (files.shards().unwrap(), Scheme::from_hf(&files.file(CONFIG).unwrap()).unwrap());
            let scheme = scheme.unwrap();
            let source = Source::from_shards(&shards, "", Some(scheme), &Pool::new(2)).unwrap();
            let bytes = std::fs::read(folder.join("weights.safetensors")).unwrap();
            for want in SafeTensors::parse(&bytes).unwrap().tensors() {
                let [n, k] = want.shape[..] else { panic!("{} has shape {:?}", want.name, want.shape) };
                assert!(scheme.find(&source, want.name, n, k).unwrap().is_some(), "{} is plain", want.name);
                // In two parts, the first rows last.
                let runs = [n / 3..n, 0..n / 3];
                let w = source.rows(want.name, n, k, &runs).unwrap();
                let want_row = |i: usize| want.data[i * k * 4..][..k * 4].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                let mut row = vec![0.0; k];
                for (i, at) in runs.iter().cloned().flatten().enumerate() {
                    w.dequantize_row(i, &mut row);
                    // By value: zeros may have either sign.
                    assert!(row.iter().copied().eq(want_row(at)), "{}: {} row {at}", folder.display(), want.name);
                }
                matrices += 1;
            }
        }
        assert!(matrices > 300, "{matrices} matrices");
    }
}
