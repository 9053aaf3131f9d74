//! Writes GGUF version 3 with alignment 32, as llama.cpp reads it.
//!
//! It writes to any `Write`; replacing a file safely (sibling, then rename) is
//! the caller's, so that a mapped file is never truncated.

use crate::{
    FormatError, Value,
    error::clip,
    gguf::{ALIGNMENT, ALIGNMENT_KEY, MAGIC, MAX_DIMS, extent, ggml_type},
    value::write_string,
};
use ashlar_core::DType;
use std::{
    collections::HashSet,
    io::{self, Write},
};

/// llama.cpp keeps names in 64 bytes with a closing zero.
const MAX_NAME: usize = 63;

/// Collects metadata and tensors, then writes them in the order given.
#[derive(Debug, Default, Clone)]
pub struct GgufWriter {
    meta: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
    names: HashSet<String>,
}

#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    type_id: u32,
    data: Vec<u8>,
}

impl GgufWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key`; a second value takes the first one's place. The alignment
    /// is always 32, so that copied metadata cannot contradict the layout.
    pub fn meta(&mut self, key: &str, value: Value) {
        let value = match key {
            ALIGNMENT_KEY => Value::U32(ALIGNMENT as u32),
            _ => value,
        };
        match self.meta.iter_mut().find(|(k, _)| k == key) {
            Some(entry) => entry.1 = value,
            None => self.meta.push((key.to_owned(), value)),
        }
    }

    /// Adds a tensor of `shape` (slowest dimension first) with its bytes.
    ///
    /// # Errors
    /// A name that is taken, or longer than llama.cpp's 63 bytes; a shape that
    /// is empty, beyond 4 dimensions, zero, or not in whole blocks; data of
    /// another length; U8, which ggml lacks.
    pub fn tensor(
        &mut self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        data: Vec<u8>,
    ) -> Result<(), FormatError> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(FormatError::Value {
                what: format!("length of tensor name {:?}", clip(name)),
                found: name.len().to_string(),
                need: "1 to 63 bytes",
            });
        }
        if shape.is_empty() || shape.len() > MAX_DIMS {
            return Err(FormatError::Value {
                what: format!("number of dimensions of tensor {name:?}"),
                found: shape.len().to_string(),
                need: "1 to 4",
            });
        }
        let type_id = ggml_type(dtype).ok_or_else(|| FormatError::Type {
            what: format!("tensor {name:?}"),
            found: format!("{dtype:?}"),
        })?;
        let sizes: Vec<u64> = shape.iter().map(|&d| d as u64).collect();
        let (shape, need) = extent(name, dtype, &sizes)?;
        if need != data.len() as u64 {
            return Err(FormatError::Size {
                name: name.to_owned(),
                need,
                found: data.len() as u64,
            });
        }
        if !self.names.insert(name.to_owned()) {
            return Err(FormatError::Duplicate {
                what: "tensor",
                name: name.to_owned(),
            });
        }
        self.tensors.push(Tensor {
            name: name.to_owned(),
            shape,
            type_id,
            data,
        });
        Ok(())
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Those of `out`; `InvalidInput` for an array of mixed types or arrays
    /// nested more than four deep.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let mut head = Vec::new();
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        head.extend_from_slice(&(self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            write_string(key, &mut head)?;
            value.write_typed(&mut head)?;
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            write_string(&t.name, &mut head)?;
            head.extend_from_slice(&(t.shape.len() as u32).to_le_bytes());
            for &d in t.shape.iter().rev() {
                head.extend_from_slice(&(d as u64).to_le_bytes());
            }
            head.extend_from_slice(&t.type_id.to_le_bytes());
            head.extend_from_slice(&offset.to_le_bytes());
            offset += (t.data.len() as u64).next_multiple_of(ALIGNMENT);
        }
        out.write_all(&head)?;
        pad(head.len(), out)?;
        for t in &self.tensors {
            out.write_all(&t.data)?;
            pad(t.data.len(), out)?;
        }
        Ok(())
    }
}

fn pad(written: usize, out: &mut impl Write) -> io::Result<()> {
    let align = ALIGNMENT as usize;
    out.write_all(&[0; ALIGNMENT as usize][..written.next_multiple_of(align) - written])
}
