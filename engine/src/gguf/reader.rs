//! A bounds-checked cursor over the bytes of a GGUF header.
//! Knows how scalars, texts, arrays and values are written; not what any key means.

use std::path::Path;

use super::{Array, Value};
use crate::{Error, ErrorKind, Result};

/// Arrays of arrays deeper than this are refused: no known file nests twice.
const MAX_ARRAY_DEPTH: u32 = 4;

/// A cursor that never reads past its slice and always says what it was reading.
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) position: usize,
    pub(super) path: &'a Path,
}

/// Reads `n` little-endian scalars whose bytes have been checked to be there.
macro_rules! scalars {
    ($reader:expr, $count:expr, $what:expr, $type:ty) => {{
        const WIDTH: usize = size_of::<$type>();
        let length = $reader.check_count($count, WIDTH, $what)? * WIDTH;
        let bytes = $reader.take(length, $what)?;
        let (chunks, _) = bytes.as_chunks::<WIDTH>();
        chunks.iter().map(|chunk| <$type>::from_le_bytes(*chunk)).collect()
    }};
}

/// Reads one little-endian scalar.
macro_rules! scalar {
    ($reader:expr, $what:expr, $type:ty) => {
        <$type>::from_le_bytes($reader.array($what)?)
    };
}

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8]> {
        let left = self.bytes.len() - self.position;
        if length > left {
            return Err(self.corrupted(format!(
                "reading {what:?} at byte {}: expected {length} bytes, {left} are left",
                self.position
            )));
        }
        let taken = &self.bytes[self.position..self.position + length];
        self.position += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(scalar!(self, what, u32))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(scalar!(self, what, u64))
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        let length = self.check_count(length, 1, what)?;
        let start = self.position;
        let bytes = self.take(length, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|error| {
            self.corrupted(format!("{what:?} at byte {start} is not UTF-8")).with_source(error)
        })
    }

    /// `count` items of at least `min_bytes` each must fit in what is left.
    pub(super) fn check_count(&self, count: u64, min_bytes: usize, what: &str) -> Result<usize> {
        let left = self.bytes.len() - self.position;
        match usize::try_from(count) {
            Ok(count) if count <= left / min_bytes => Ok(count),
            _ => Err(self.corrupted(format!(
                "{what:?} at byte {}: {count} items of at least {min_bytes} bytes, {left} bytes \
                 are left",
                self.position
            ))),
        }
    }

    fn bool_of(&self, byte: u8, key: &str) -> Result<bool> {
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.corrupted(format!("{key:?}: expected bool 0 or 1, got {byte}"))),
        }
    }

    pub(super) fn value(&mut self, value_type: u32, key: &str) -> Result<Value> {
        Ok(match value_type {
            0 => Value::U8(scalar!(self, key, u8)),
            1 => Value::I8(scalar!(self, key, i8)),
            2 => Value::U16(scalar!(self, key, u16)),
            3 => Value::I16(scalar!(self, key, i16)),
            4 => Value::U32(scalar!(self, key, u32)),
            5 => Value::I32(scalar!(self, key, i32)),
            6 => Value::F32(scalar!(self, key, f32)),
            7 => {
                let byte = scalar!(self, key, u8);
                Value::Bool(self.bool_of(byte, key)?)
            }
            8 => Value::Str(self.string(key)?),
            9 => Value::Array(self.values(key, 1)?),
            10 => Value::U64(scalar!(self, key, u64)),
            11 => Value::I64(scalar!(self, key, i64)),
            12 => Value::F64(scalar!(self, key, f64)),
            other => return Err(self.corrupted(format!("{key:?}: unknown value type {other}"))),
        })
    }

    fn values(&mut self, key: &str, depth: u32) -> Result<Array> {
        let element_type = self.u32(key)?;
        let count = self.u64(key)?;
        Ok(match element_type {
            0 => Array::U8(scalars!(self, count, key, u8)),
            1 => Array::I8(scalars!(self, count, key, i8)),
            2 => Array::U16(scalars!(self, count, key, u16)),
            3 => Array::I16(scalars!(self, count, key, i16)),
            4 => Array::U32(scalars!(self, count, key, u32)),
            5 => Array::I32(scalars!(self, count, key, i32)),
            6 => Array::F32(scalars!(self, count, key, f32)),
            7 => {
                let length = self.check_count(count, 1, key)?;
                let bytes = self.take(length, key)?;
                Array::Bool(bytes.iter().map(|&b| self.bool_of(b, key)).collect::<Result<_>>()?)
            }
            8 => {
                let count = self.check_count(count, 8, key)?;
                Array::Str((0..count).map(|_| self.string(key)).collect::<Result<_>>()?)
            }
            9 if depth < MAX_ARRAY_DEPTH => {
                let count = self.check_count(count, 12, key)?;
                Array::Nested(
                    (0..count).map(|_| self.values(key, depth + 1)).collect::<Result<_>>()?,
                )
            }
            9 => {
                return Err(
                    self.corrupted(format!("{key:?}: arrays nest deeper than {MAX_ARRAY_DEPTH}"))
                );
            }
            10 => Array::U64(scalars!(self, count, key, u64)),
            11 => Array::I64(scalars!(self, count, key, i64)),
            12 => Array::F64(scalars!(self, count, key, f64)),
            other => return Err(self.corrupted(format!("{key:?}: unknown array type {other}"))),
        })
    }

    pub(super) fn corrupted(&self, what: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::Corrupted, format!("gguf {}: {what}", self.path.display()))
    }

    pub(super) fn model(&self, what: impl std::fmt::Display) -> Error {
        Error::model(format!("gguf {}: {what}", self.path.display()))
    }
}
