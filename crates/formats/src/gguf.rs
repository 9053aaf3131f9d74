//! GGUF, versions 2 and 3, little-endian: metadata and tensors by name.
//!
//! Layout (ggml's `docs/gguf.md`): magic, version, tensor count, metadata
//! count, metadata, tensor descriptions, padding, data. The file stores a shape
//! fastest dimension first; views give it slowest first.
//!
//! Stricter than the format's own text where laxity helps only an attacker:
//! names are unique, no dimension is zero, tensors never share bytes.

use crate::{FormatError, TensorInfo, TensorView, Value, error::clip, pickle, read::Cursor, value::Decoder};
use ashlar_core::DType;
use std::{collections::HashMap, ops::Range};

pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
pub(crate) const ALIGNMENT: u64 = 32;
pub(crate) const MAX_DIMS: usize = 4;

/// Every type shared by ggml and [`DType`], with ggml's number.
const TYPES: [(u32, DType); 19] = [
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (10, DType::Q2_K),
    (11, DType::Q3_K),
    (12, DType::Q4_K),
    (13, DType::Q5_K),
    (14, DType::Q6_K),
    (20, DType::IQ4_NL),
    (24, DType::I8),
    (25, DType::I16),
    (26, DType::I32),
    (27, DType::I64),
    (28, DType::F64),
    (30, DType::BF16),
];

/// ggml's number of `dtype`; `None` for U8, which ggml lacks.
pub fn ggml_type(dtype: DType) -> Option<u32> {
    TYPES.iter().find(|t| t.1 == dtype).map(|t| t.0)
}

/// The type behind ggml's number `id`.
pub fn from_ggml_type(id: u32) -> Option<DType> {
    TYPES.iter().find(|t| t.0 == id).map(|t| t.1)
}

/// A parsed GGUF file that borrows the bytes.
#[derive(Debug, Clone)]
pub struct Gguf<'a> {
    meta: Vec<(&'a str, Value)>,
    meta_index: HashMap<&'a str, usize>,
    tensors: Vec<Info<'a>>,
    tensor_index: HashMap<&'a str, usize>,
    bytes: &'a [u8],
}

#[derive(Debug, Clone)]
struct Info<'a> {
    name: &'a str,
    shape: Vec<usize>,
    dtype: DType,
    /// Within the file; inside it, checked by `head`.
    range: Range<u64>,
}

impl<'a> Gguf<'a> {
    /// Reads the header of `bytes` and checks that every tensor lies within.
    ///
    /// # Errors
    /// [`FormatError`] for anything that is not a well-formed file.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        Self::head(bytes, bytes.len() as u64)
    }

    /// [`Gguf::parse`] of a file of `len` bytes that begins with `bytes`. They
    /// need only reach to the end of the header; tensors beyond them are in
    /// [`Gguf::infos`] alone.
    ///
    /// # Errors
    /// As [`Gguf::parse`]; [`FormatError::Truncated`] also where more of the file
    /// is wanted.
    pub fn head(bytes: &'a [u8], len: u64) -> Result<Self, FormatError> {
        let mut c = Cursor::new(bytes);
        if bytes.get(..4) != Some(MAGIC) {
            pickle::refuse(bytes)?;
            return Err(FormatError::Magic {
                expected: "GGUF",
                found: bytes[..bytes.len().min(8)].escape_ascii().to_string(),
            });
        }
        c.take("magic", 4)?;
        let version = c.u32("version")?;
        if !matches!(version, 2 | 3) {
            return Err(FormatError::Version { found: version });
        }
        // Least bytes: a tensor has name length, dims, one size, type, offset;
        // an entry has key length, type, and one byte.
        let n_tensors = c.count("tensor count", 8 + 4 + 8 + 4 + 8)?;
        let n_meta = c.count("metadata count", 8 + 4 + 1)?;

        let mut decoder = Decoder::new(bytes.len());
        let mut meta = Vec::with_capacity(n_meta);
        let mut meta_index = HashMap::with_capacity(n_meta);
        for i in 0..n_meta {
            let key = c.string("metadata key")?;
            if meta_index.insert(key, i).is_some() {
                return Err(duplicate("key", key));
            }
            meta.push((key, decoder.typed(key, &mut c)?));
        }
        let alignment = match meta_index.get(ALIGNMENT_KEY).map(|&i| &meta[i].1) {
            None => ALIGNMENT,
            Some(v) => v
                .as_u64()
                .filter(|v| v.is_power_of_two() && u32::try_from(*v).is_ok())
                .ok_or_else(|| FormatError::Value {
                    what: ALIGNMENT_KEY.to_owned(),
                    found: clip(&format!("{v:?}")),
                    need: "a power of two",
                })?,
        };

        let mut tensors = Vec::with_capacity(n_tensors);
        let mut tensor_index = HashMap::with_capacity(n_tensors);
        let mut extents = Vec::with_capacity(n_tensors);
        for i in 0..n_tensors {
            let name = c.string("tensor name")?;
            if tensor_index.insert(name, i).is_some() {
                return Err(duplicate("tensor", name));
            }
            let (info, offset, size) = description(name, alignment, &mut c)?;
            extents.push((offset, size, i));
            tensors.push(info);
        }

        let start = (c.at() as u64).next_multiple_of(alignment);
        let data = len.saturating_sub(start);
        extents.sort_unstable();
        let mut before: Option<(u64, usize)> = None;
        for (offset, size, i) in extents {
            let name = tensors[i].name;
            let end = offset
                .checked_add(size)
                .filter(|&end| end <= data)
                .ok_or_else(|| FormatError::Offset {
                    name: clip(name),
                    offset,
                    bytes: size,
                    why: "it ends past the data",
                    limit: data,
                })?;
            if let Some((end, other)) = before
                && offset < end
            {
                return Err(FormatError::Overlap {
                    a: clip(tensors[other].name),
                    b: clip(name),
                    offset,
                });
            }
            before = Some((end, i));
            // No overflow: they are at most `len`.
            tensors[i].range = start + offset..start + end;
        }
        Ok(Self {
            meta,
            meta_index,
            tensors,
            tensor_index,
            bytes,
        })
    }

    /// The metadata value of `key`.
    pub fn meta(&self, key: &str) -> Option<&Value> {
        self.meta_index.get(key).map(|&i| &self.meta[i].1)
    }

    /// All metadata in file order.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.meta.iter().map(|(k, v)| (*k, v))
    }

    /// The tensor called `name`, if its bytes were given.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'a>> {
        self.tensor_index
            .get(name)
            .and_then(|&i| self.view(&self.tensors[i]))
    }

    /// All tensors whose bytes were given, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'a>> {
        self.tensors.iter().filter_map(|t| self.view(t))
    }

    /// All tensors in file order.
    pub fn infos(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|t| TensorInfo {
            name: t.name,
            shape: &t.shape,
            dtype: t.dtype,
            range: t.range.clone(),
        })
    }

    fn view(&self, info: &Info<'a>) -> Option<TensorView<'a>> {
        Some(TensorView {
            name: info.name,
            shape: info.shape.clone(),
            dtype: info.dtype,
            data: slice(self.bytes, &info.range)?,
        })
    }
}

/// A file's range out of the bytes at hand.
pub(crate) fn slice<'a>(bytes: &'a [u8], range: &Range<u64>) -> Option<&'a [u8]> {
    bytes.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

fn duplicate(what: &'static str, name: &str) -> FormatError {
    FormatError::Duplicate {
        what,
        name: clip(name),
    }
}

/// Reads what follows a tensor's name; returns its offset and size as well.
fn description<'a>(
    name: &'a str,
    alignment: u64,
    c: &mut Cursor<'a>,
) -> Result<(Info<'a>, u64, u64), FormatError> {
    let dims = c.u32("tensor dimensions")? as usize;
    if dims == 0 || dims > MAX_DIMS {
        return Err(FormatError::Value {
            what: format!("number of dimensions of tensor {:?}", clip(name)),
            found: dims.to_string(),
            need: "1 to 4",
        });
    }
    let mut sizes = Vec::with_capacity(dims);
    for _ in 0..dims {
        sizes.push(c.u64("tensor shape")?);
    }
    sizes.reverse();
    let id = c.u32("tensor type")?;
    let dtype = from_ggml_type(id).ok_or_else(|| FormatError::Type {
        what: format!("tensor {:?}", clip(name)),
        found: id.to_string(),
    })?;
    let (shape, size) = extent(name, dtype, &sizes)?;
    let offset = c.u64("tensor offset")?;
    if !offset.is_multiple_of(alignment) {
        return Err(FormatError::Offset {
            name: clip(name),
            offset,
            bytes: size,
            why: "it is not on a multiple of the alignment",
            limit: alignment,
        });
    }
    let info = Info {
        name,
        shape,
        dtype,
        range: 0..0,
    };
    Ok((info, offset, size))
}

/// The shape in machine words and the bytes it takes, rows being whole blocks.
pub(crate) fn extent(
    name: &str,
    dtype: DType,
    sizes: &[u64],
) -> Result<(Vec<usize>, u64), FormatError> {
    let wrong = |why| FormatError::Shape {
        name: clip(name),
        dtype,
        shape: sizes.to_vec(),
        why,
    };
    if sizes.contains(&0) {
        return Err(wrong("a dimension is zero"));
    }
    let big = || wrong("its size overflows");
    let shape = sizes
        .iter()
        .map(|&n| usize::try_from(n).map_err(|_| big()))
        .collect::<Result<Vec<_>, _>>()?;
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(dtype.block_len()) {
        return Err(wrong("its rows do not fill whole blocks"));
    }
    // The product of values is checked too: readers multiply shapes.
    shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .ok_or_else(big)?;
    let bytes = shape[..shape.len().saturating_sub(1)]
        .iter()
        .try_fold(dtype.bytes_for(row).ok_or_else(big)?, |n, &d| {
            n.checked_mul(d)
        })
        .ok_or_else(big)?;
    Ok((shape, bytes as u64))
}
