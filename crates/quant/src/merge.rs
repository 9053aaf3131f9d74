//! `W + α/r · B·A`, written as GGUF in the type asked for.
//!
//! The adapter is in Hugging Face's row order (rope halves apart), a llama GGUF
//! interleaves the pair of each rotation; the delta's rows are moved to GGUF's
//! order, so that the base bytes are never re-ordered.

use ashlar_core::{DType, Fault, Hint};
use ashlar_formats::{FormatError, Gguf, GgufWriter, Value, safetensors::SafeTensors};
use ashlar_kernels::{dequantize, quantize};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, io::Write};

/// What a merge did, tensor by tensor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MergeReport {
    /// Tensors that took a delta.
    pub merged: usize,
    /// How many tensors have each type in the file written.
    pub types: BTreeMap<String, usize>,
    /// Bits a weight, over all tensors.
    pub bits_per_weight: f64,
    /// Bytes of tensor data written.
    pub bytes: u64,
}

/// Why a merge was refused.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The base or adapter bytes are not what they should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A block type without arithmetic here.
    #[error("tensor {tensor:?}: {why}")]
    Tensor {
        /// The tensor's GGUF name.
        tensor: String,
        /// What is wrong with it.
        why: String,
    },
    /// The adapter holds something that the base has no place for.
    #[error("adapter tensor {0:?} fits no linear of the base")]
    Stray(String),
    /// Writing failed.
    #[error("writing the merged model: {0}")]
    Io(#[from] std::io::Error),
}

impl Hint for MergeError {
    fn fault(&self) -> Fault {
        match self {
            Self::Io(_) => Fault::Environment,
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Stray(_) => Some("was the adapter trained on this base?".into()),
            Self::Io(_) => Some("check the disk's free space".into()),
            _ => None,
        }
    }
}

/// The adapter's low-rank pair for one linear: `a` is [r, in], `b` [out, r].
struct Delta {
    a: Vec<f32>,
    b: Vec<f32>,
    rank: usize,
}

/// GGUF linear name ↔ Hugging Face module name within a layer.
const LINEARS: [(&str, &str); 7] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Writes `base` with `adapter` (a PEFT `adapter_model.safetensors`) merged at
/// `scale` = α/r, every matrix in `target`, to `out`.
///
/// Matrices already in `target` that take no delta are copied byte for byte;
/// vectors stay F32. `extra` metadata replaces the base's of the same key.
///
/// # Errors
/// A shape that does not fit, an adapter tensor without a place, a type that
/// cannot be read or written, or a full disk. Nothing is skipped silently.
pub fn merge_to_gguf(
    base: &Gguf<'_>,
    adapter: Option<(&SafeTensors<'_>, f32)>,
    target: DType,
    extra: &[(&str, Value)],
    out: &mut impl Write,
) -> Result<MergeReport, MergeError> {
    let mut deltas = match adapter {
        Some((tensors, scale)) => read_deltas(tensors, scale)?,
        None => BTreeMap::new(),
    };
    let heads = |key: &str| {
        let arch = base
            .meta("general.architecture")
            .and_then(Value::as_str)
            .unwrap_or("llama");
        base.meta(&format!("{arch}.attention.{key}"))
            .and_then(Value::as_u64)
            .map(|n| n as usize)
    };
    let (q_heads, kv_heads) = (heads("head_count"), heads("head_count_kv"));

    let mut writer = GgufWriter::new();
    for (key, value) in base.metadata() {
        if !extra.iter().any(|(k, _)| *k == key) {
            writer.meta(key, value.clone());
        }
    }
    for (key, value) in extra {
        writer.meta(key, value.clone());
    }
    let mut report = MergeReport::default();
    let mut weights = 0usize;
    for view in base.tensors() {
        let fail = |why: String| MergeError::Tensor {
            tensor: view.name.to_string(),
            why,
        };
        let count: usize = view.shape.iter().product();
        let delta = deltas.remove(&*view.name);
        let keep = delta.is_none() && (view.shape.len() < 2 || view.dtype == target);
        let (dtype, bytes) = if keep {
            (view.dtype, view.data.to_vec())
        } else {
            let &[rows, cols] = &view.shape[..] else {
                return Err(fail(format!("shape {:?} is not a matrix", view.shape)));
            };
            let mut w = vec![0.0; count];
            dequantize(view.dtype, view.data, &mut w).map_err(|e| fail(e.to_string()))?;
            if let Some(delta) = delta {
                let heads = if view.name.contains("attn_q.") {
                    q_heads
                } else if view.name.contains("attn_k.") {
                    kv_heads.or(q_heads)
                } else {
                    None
                };
                add(&mut w, rows, cols, &delta, heads).map_err(fail)?;
                report.merged += 1;
            }
            let mut bytes = Vec::new();
            quantize(target, &w, &mut bytes).map_err(|e| fail(e.to_string()))?;
            (target, bytes)
        };
        weights += count;
        report.bytes += bytes.len() as u64;
        *report.types.entry(format!("{dtype:?}")).or_default() += 1;
        writer.tensor(&view.name, &view.shape, dtype, bytes)?;
    }
    if let Some(name) = deltas.into_keys().next() {
        return Err(MergeError::Stray(name));
    }
    report.bits_per_weight = report.bytes as f64 * 8.0 / weights.max(1) as f64;
    writer.write_to(out)?;
    Ok(report)
}

/// Adds `B·A` to `w` [rows, cols], moving rows to the interleaved order where
/// the linear is rotated (`heads` is given).
fn add(
    w: &mut [f32],
    rows: usize,
    cols: usize,
    d: &Delta,
    heads: Option<usize>,
) -> Result<(), String> {
    let r = d.rank;
    if d.a.len() != r * cols || d.b.len() != rows * r {
        return Err(format!(
            "is [{rows}, {cols}], the adapter's pair makes [{}, {}]",
            d.b.len() / r.max(1),
            d.a.len() / r.max(1)
        ));
    }
    let head = match heads {
        Some(h) if h > 0 && rows % (2 * h) == 0 => rows / h,
        Some(h) => {
            return Err(format!(
                "{rows} rows do not split into {h} heads of even size"
            ));
        }
        None => 0,
    };
    for (row, out) in w.chunks_exact_mut(cols).enumerate() {
        let source = if head == 0 {
            row
        } else {
            let (h, i) = (row / head, row % head);
            h * head + (i % 2) * (head / 2) + i / 2
        };
        for (k, b) in d.b[source * r..][..r].iter().enumerate() {
            for (o, a) in out.iter_mut().zip(&d.a[k * cols..][..cols]) {
                *o += b * a;
            }
        }
    }
    Ok(())
}

/// PEFT tensors by GGUF tensor name, `scale` folded into B.
fn read_deltas(file: &SafeTensors<'_>, scale: f32) -> Result<BTreeMap<String, Delta>, MergeError> {
    let mut halves: BTreeMap<String, (Option<Vec<f32>>, Option<Vec<f32>>, usize)> = BTreeMap::new();
    for view in file.tensors() {
        let stray = || MergeError::Stray(view.name.to_string());
        let rest = view
            .name
            .strip_prefix("base_model.model.model.layers.")
            .ok_or_else(stray)?;
        let (layer, rest) = rest.split_once('.').ok_or_else(stray)?;
        let (module, half) = rest
            .strip_suffix(".weight")
            .and_then(|m| m.rsplit_once(".lora_"))
            .ok_or_else(stray)?;
        let (gguf, _) = LINEARS
            .iter()
            .find(|(_, hf)| *hf == module)
            .ok_or_else(stray)?;
        let mut values = vec![0.0; view.shape.iter().product()];
        dequantize(view.dtype, view.data, &mut values).map_err(|e| MergeError::Tensor {
            tensor: view.name.to_string(),
            why: e.to_string(),
        })?;
        let entry = halves
            .entry(format!("blk.{layer}.{gguf}.weight"))
            .or_default();
        match (half, &view.shape[..]) {
            ("A", &[r, _]) => (entry.0, entry.2) = (Some(values), r),
            ("B", &[_, _]) => {
                values.iter_mut().for_each(|v| *v *= scale);
                entry.1 = Some(values);
            }
            _ => return Err(stray()),
        }
    }
    halves
        .into_iter()
        .map(|(name, half)| match half {
            (Some(a), Some(b), rank) => Ok((name, Delta { a, b, rank })),
            _ => Err(MergeError::Tensor {
                tensor: name,
                why: "has only one of lora_A and lora_B".into(),
            }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_rotated_linears_move() {
        // One head of 4 rows; B·A puts its Hugging Face row number in each row.
        let d = Delta {
            a: vec![1.0],
            b: vec![0.0, 1.0, 2.0, 3.0],
            rank: 1,
        };
        let mut w = vec![0.0; 4];
        add(&mut w, 4, 1, &d, Some(1)).unwrap();
        assert_eq!(w, [0.0, 2.0, 1.0, 3.0]);
        let mut w = vec![10.0; 4];
        add(&mut w, 4, 1, &d, None).unwrap();
        assert_eq!(w, [10.0, 11.0, 12.0, 13.0]);
        assert!(add(&mut w, 2, 2, &d, None).unwrap_err().contains("[2, 2]"));
        assert!(add(&mut w, 4, 1, &d, Some(3)).is_err());
    }
}
