//! GGUF's typed metadata values, read and written.
//!
//! Decoding is charged against a budget, because an array of bytes grows
//! 32-fold when each becomes a [`Value`].

use crate::{FormatError, error::clip, read::Cursor};
use std::io::{self, Write};

/// Arrays may hold arrays this deep; real files use one level.
const MAX_DEPTH: usize = 4;

/// A metadata value of GGUF.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    /// Values of one type. The type of an empty array is not kept.
    Array(Vec<Value>),
}

impl Value {
    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(s) => Some(s),
            _ => None,
        }
    }

    /// Any integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            _ => self.as_i64().and_then(|v| u64::try_from(v).ok()),
        }
    }

    /// Any integer that fits.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::I8(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::I64(v) => Some(v),
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => i64::try_from(v).ok(),
            _ => None,
        }
    }

    /// A float; `F64` is rounded.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(v) => Some(v),
            Self::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The items of an array.
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Self::Array(v) => Some(v),
            _ => None,
        }
    }

    /// GGUF's number of this value's type.
    fn type_id(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    /// Writes type and value, as a metadata entry has them.
    pub(crate) fn write_typed(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&self.type_id().to_le_bytes())?;
        self.write(out, 0)
    }

    fn write(&self, out: &mut impl Write, depth: usize) -> io::Result<()> {
        let refuse = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        match self {
            Self::U8(v) => out.write_all(&v.to_le_bytes()),
            Self::I8(v) => out.write_all(&v.to_le_bytes()),
            Self::U16(v) => out.write_all(&v.to_le_bytes()),
            Self::I16(v) => out.write_all(&v.to_le_bytes()),
            Self::U32(v) => out.write_all(&v.to_le_bytes()),
            Self::I32(v) => out.write_all(&v.to_le_bytes()),
            Self::U64(v) => out.write_all(&v.to_le_bytes()),
            Self::I64(v) => out.write_all(&v.to_le_bytes()),
            Self::F32(v) => out.write_all(&v.to_le_bytes()),
            Self::F64(v) => out.write_all(&v.to_le_bytes()),
            Self::Bool(v) => out.write_all(&[u8::from(*v)]),
            Self::String(v) => write_string(v, out),
            Self::Array(items) => {
                // An empty array has no type of its own; string is what
                // tokenizer keys, the only arrays readers insist on, expect.
                let of = items.first().map_or(8, Self::type_id);
                if depth >= MAX_DEPTH {
                    return refuse("metadata arrays nested too deep");
                }
                if items.iter().any(|v| v.type_id() != of) {
                    return refuse("a metadata array holds values of several types");
                }
                out.write_all(&of.to_le_bytes())?;
                out.write_all(&(items.len() as u64).to_le_bytes())?;
                items.iter().try_for_each(|v| v.write(out, depth + 1))
            }
        }
    }
}

pub(crate) fn write_string(text: &str, out: &mut impl Write) -> io::Result<()> {
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())
}

/// Fewest bytes a value of type `id` takes, or `None` for an unknown type.
fn least_bytes(id: u32) -> Option<u64> {
    Some(match id {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => 12,
        _ => return None,
    })
}

/// Decodes values, charging their size against a budget shared by a file.
pub(crate) struct Decoder {
    limit: usize,
    spent: usize,
}

impl Decoder {
    /// A budget for a file of `bytes`: its own size, and never less than 64 MiB,
    /// which a vocabulary-only file of the largest vocabularies in use needs.
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            limit: bytes.max(64 << 20),
            spent: 0,
        }
    }

    fn charge(&mut self, key: &str, n: usize, each: usize) -> Result<(), FormatError> {
        self.spent = n.saturating_mul(each).saturating_add(self.spent);
        if self.spent > self.limit {
            return Err(FormatError::Memory {
                key: clip(key),
                limit: self.limit,
            });
        }
        Ok(())
    }

    /// Reads type and value, as a metadata entry has them.
    pub(crate) fn typed(&mut self, key: &str, c: &mut Cursor<'_>) -> Result<Value, FormatError> {
        let id = c.u32(key)?;
        self.value(key, id, c, 0)
    }

    fn value(
        &mut self,
        key: &str,
        id: u32,
        c: &mut Cursor<'_>,
        depth: usize,
    ) -> Result<Value, FormatError> {
        let unknown = |id: u32| FormatError::Type {
            what: clip(key),
            found: id.to_string(),
        };
        Ok(match id {
            0 => Value::U8(u8::from_le_bytes(c.array(key)?)),
            1 => Value::I8(i8::from_le_bytes(c.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(c.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(c.array(key)?)),
            4 => Value::U32(c.u32(key)?),
            5 => Value::I32(i32::from_le_bytes(c.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(c.array(key)?)),
            7 => match c.array::<1>(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [found] => {
                    return Err(FormatError::Value {
                        what: clip(key),
                        found: found.to_string(),
                        need: "0 or 1, being a truth value",
                    });
                }
            },
            8 => {
                let text = c.string(key)?;
                self.charge(key, text.len(), 1)?;
                Value::String(text.to_owned())
            }
            9 => {
                if depth >= MAX_DEPTH {
                    return Err(FormatError::Depth {
                        key: clip(key),
                        limit: MAX_DEPTH,
                    });
                }
                let of = c.u32(key)?;
                let n = c.count(key, least_bytes(of).ok_or_else(|| unknown(of))?)?;
                self.charge(key, n, size_of::<Value>())?;
                let mut items = Vec::with_capacity(n);
                for _ in 0..n {
                    items.push(self.value(key, of, c, depth + 1)?);
                }
                Value::Array(items)
            }
            10 => Value::U64(c.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(c.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(c.array(key)?)),
            _ => return Err(unknown(id)),
        })
    }
}
