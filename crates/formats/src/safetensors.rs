//! safetensors: a JSON header, then the values, with no gap and no overlap.
//!
//! Stricter than the reference reader in one point: a name that appears twice
//! is an error, where JSON parsers keep the last.

use crate::{FormatError, TensorInfo, TensorView, error::clip, gguf::slice, pickle, read::Cursor};
use ashlar_core::DType;
use serde::{
    Deserialize,
    de::{Deserializer, MapAccess, Visitor},
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    io::Write,
    ops::Range,
};

/// The reference reader's limit on the header, in bytes.
pub const MAX_HEADER: u64 = 100_000_000;

const METADATA: &str = "__metadata__";

const TYPES: [(&str, DType); 11] = [
    ("F64", DType::F64),
    ("F32", DType::F32),
    ("F16", DType::F16),
    ("BF16", DType::BF16),
    ("I64", DType::I64),
    ("I32", DType::I32),
    ("I16", DType::I16),
    ("I8", DType::I8),
    ("U8", DType::U8),
    ("F8_E4M3", DType::F8_E4M3),
    ("F8_E5M2", DType::F8_E5M2),
];

/// A parsed safetensors file that borrows the bytes.
#[derive(Debug, Clone)]
pub struct SafeTensors<'a> {
    metadata: BTreeMap<String, String>,
    /// In the order of their data.
    tensors: Vec<Info>,
    index: HashMap<String, usize>,
    bytes: &'a [u8],
}

#[derive(Debug, Clone)]
struct Info {
    name: String,
    shape: Vec<usize>,
    dtype: DType,
    /// Within the file; inside it, checked by `head`.
    range: Range<u64>,
}

/// One entry of the header.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The whole header: `__metadata__` apart, because its values are strings.
#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    entries: Vec<(String, Entry)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct ByName;
        impl<'de> Visitor<'de> for ByName {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(twice(&name));
                    }
                    if name == METADATA {
                        header.metadata = map.next_value::<Strings>()?.0;
                    } else {
                        header.entries.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        d.deserialize_map(ByName)
    }
}

/// The values of `__metadata__`; a key that repeats is an error here too.
struct Strings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if out.contains_key(&key) {
                        return Err(twice(&key));
                    }
                    out.insert(key, value);
                }
                Ok(Strings(out))
            }
        }
        d.deserialize_map(Pairs)
    }
}

fn twice<E: serde::de::Error>(name: &str) -> E {
    E::custom(format!("{:?} appears twice", clip(name)))
}

impl<'a> SafeTensors<'a> {
    /// Reads the header of `bytes` and checks that the tensors cover the rest.
    ///
    /// # Errors
    /// [`FormatError`] for anything that is not a well-formed file.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        Self::head(bytes, bytes.len() as u64)
    }

    /// [`SafeTensors::parse`] of a file of `len` bytes that begins with `bytes`.
    /// They need only reach to the end of the header, [`head_bytes`] of them;
    /// tensors beyond are in [`SafeTensors::infos`] alone.
    ///
    /// # Errors
    /// As [`SafeTensors::parse`]; [`FormatError::Truncated`] also where more of the
    /// file is wanted.
    pub fn head(bytes: &'a [u8], len: u64) -> Result<Self, FormatError> {
        if bytes.get(8).is_some_and(|&b| b != b'{') {
            pickle::refuse(bytes)?;
            return Err(FormatError::Magic {
                expected: "safetensors",
                found: bytes[..bytes.len().min(9)].escape_ascii().to_string(),
            });
        }
        let mut c = Cursor::new(bytes);
        let length = head_bytes(c.array("header length")?)? - 8;
        let header: Header = serde_json::from_slice(c.take("header", length)?)
            .map_err(|e| FormatError::json("safetensors header", &e))?;
        let start = c.at() as u64;
        let data = len.saturating_sub(start);

        let mut tensors = header
            .entries
            .into_iter()
            .map(|(name, entry)| info(name, &entry, data))
            .collect::<Result<Vec<_>, _>>()?;
        tensors.sort_by(|a, b| {
            (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name))
        });
        let mut end = 0;
        for t in &tensors {
            if t.range.start != end {
                return Err(FormatError::Offset {
                    name: clip(&t.name),
                    offset: t.range.start,
                    bytes: t.range.end - t.range.start,
                    why: "it does not begin where the one before ends",
                    limit: end,
                });
            }
            end = t.range.end;
        }
        if end != data {
            return Err(FormatError::Size {
                name: "(all)".to_owned(),
                need: end,
                found: data,
            });
        }
        for t in &mut tensors {
            // No overflow: both are at most `len`.
            t.range = start + t.range.start..start + t.range.end;
        }
        let index = tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        Ok(Self {
            metadata: header.metadata,
            tensors,
            index,
            bytes,
        })
    }

    /// The free-form strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors whose bytes were given, in the order of their data.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.tensors.iter().filter_map(|t| self.view(t))
    }

    /// The tensor called `name`, if its bytes were given.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.index.get(name).and_then(|&i| self.view(&self.tensors[i]))
    }

    /// All tensors in the order of their data.
    pub fn infos(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|t| TensorInfo {
            name: &t.name,
            shape: &t.shape,
            dtype: t.dtype,
            range: t.range.clone(),
        })
    }

    fn view<'s>(&'s self, info: &'s Info) -> Option<TensorView<'s>> {
        Some(TensorView {
            name: &info.name,
            shape: info.shape.clone(),
            dtype: info.dtype,
            data: slice(self.bytes, &info.range)?,
        })
    }
}

/// Bytes of a file's beginning up to its first value, from its first eight.
///
/// # Errors
/// A header longer than [`MAX_HEADER`].
pub fn head_bytes(first: [u8; 8]) -> Result<u64, FormatError> {
    match u64::from_le_bytes(first) {
        length if length <= MAX_HEADER => Ok(8 + length),
        length => Err(FormatError::Value {
            what: "header length".to_owned(),
            found: length.to_string(),
            need: "at most 100000000 bytes",
        }),
    }
}

/// Checks one entry by itself: type, shape, and its range within `len` bytes of
/// values.
fn info(name: String, entry: &Entry, len: u64) -> Result<Info, FormatError> {
    let dtype = TYPES
        .iter()
        .find(|t| t.0 == entry.dtype)
        .map(|t| t.1)
        .ok_or_else(|| FormatError::Type {
            what: format!("tensor {:?}", clip(&name)),
            found: clip(&entry.dtype),
        })?;
    let (shape, need) = plain_extent(&name, dtype, &entry.shape)?;
    let [begin, end] = entry.data_offsets;
    let bytes = end.checked_sub(begin);
    let (Some(bytes), true) = (bytes, end <= len) else {
        return Err(FormatError::Offset {
            name: clip(&name),
            offset: begin,
            bytes: bytes.unwrap_or(0),
            why: "its data_offsets are reversed or end past the data",
            limit: len,
        });
    };
    if bytes != need as u64 {
        return Err(FormatError::Size {
            name: clip(&name),
            need: need as u64,
            found: bytes,
        });
    }
    Ok(Info {
        name,
        shape,
        dtype,
        range: begin..end,
    })
}

/// Shape in machine words and bytes. Unlike in GGUF, a scalar has shape `[]`
/// and a dimension may be zero.
fn plain_extent(
    name: &str,
    dtype: DType,
    sizes: &[u64],
) -> Result<(Vec<usize>, usize), FormatError> {
    let big = || FormatError::Shape {
        name: clip(name),
        dtype,
        shape: sizes.iter().copied().take(16).collect(),
        why: "its size overflows",
    };
    let mut shape = Vec::with_capacity(sizes.len());
    let mut elements = 1usize;
    for &d in sizes {
        let d = usize::try_from(d).map_err(|_| big())?;
        elements = elements.checked_mul(d).ok_or_else(big)?;
        shape.push(d);
    }
    Ok((shape, dtype.bytes_for(elements).ok_or_else(big)?))
}

/// Writes `tensors` (name, shape slowest first, type, little-endian bytes).
///
/// As in the reference writer, the widest types come first and names order the
/// rest, so that data is aligned and the bytes do not depend on the order given.
///
/// # Errors
/// A name that repeats or is `__metadata__`, a quantized type, data of another
/// length than the shape needs, a header over [`MAX_HEADER`], or `out`'s own.
pub fn write(
    tensors: &[(&str, &[usize], DType, &[u8])],
    metadata: &BTreeMap<String, String>,
    out: &mut impl Write,
) -> Result<(), FormatError> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|t| (std::cmp::Reverse(t.2.block_bytes()), t.0));

    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA.to_owned(), serde_json::json!(metadata));
    }
    let mut offset = 0usize;
    for &&(name, shape, dtype, data) in &order {
        let type_name = TYPES
            .iter()
            .find(|t| t.1 == dtype)
            .map(|t| t.0)
            .ok_or_else(|| FormatError::Type {
                what: format!("tensor {:?}", clip(name)),
                found: format!("{dtype:?}"),
            })?;
        let sizes: Vec<u64> = shape.iter().map(|&d| d as u64).collect();
        let (_, need) = plain_extent(name, dtype, &sizes)?;
        if need != data.len() {
            return Err(FormatError::Size {
                name: clip(name),
                need: need as u64,
                found: data.len() as u64,
            });
        }
        // The slices are all in memory, so their sum cannot overflow u64;
        // repeated slices could overflow usize in theory.
        let end = offset
            .checked_add(need)
            .ok_or_else(|| FormatError::Offset {
                name: clip(name),
                offset: offset as u64,
                bytes: need as u64,
                why: "the file would be larger than memory can address",
                limit: usize::MAX as u64,
            })?;
        let entry =
            serde_json::json!({"dtype": type_name, "shape": shape, "data_offsets": [offset, end]});
        if name == METADATA || header.insert(name.to_owned(), entry).is_some() {
            return Err(FormatError::Duplicate {
                what: "tensor",
                name: clip(name),
            });
        }
        offset = end;
    }
    let mut head =
        serde_json::to_vec(&header).map_err(|e| FormatError::json("safetensors header", &e))?;
    head.resize(head.len().next_multiple_of(8), b' ');
    if head.len() as u64 > MAX_HEADER {
        return Err(FormatError::Value {
            what: "header length".to_owned(),
            found: head.len().to_string(),
            need: "at most 100000000 bytes",
        });
    }
    let io = |e: std::io::Error| FormatError::Io(e.to_string());
    out.write_all(&(head.len() as u64).to_le_bytes())
        .map_err(io)?;
    out.write_all(&head).map_err(io)?;
    order
        .iter()
        .try_for_each(|t| out.write_all(t.3).map_err(io))
}
