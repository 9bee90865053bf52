//! The GGUF container: header, metadata and where each tensor lies in the file, versions 2 and 3.
//! Knows no model, no tokenizer and no device: it reads bytes, it never touches tensor data.
//!
//! Source: the format description in ggml, `docs/gguf.md`. Every length is checked against the
//! bytes that are there before anything is allocated, so a hostile file costs an error, not memory.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

mod reader;
mod storage;

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod writer;

use reader::Reader;
pub(crate) use storage::GgmlType;
use storage::UNSUPPORTED_TYPES;

/// First four bytes of every file.
const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data where `general.alignment` is absent, in bytes.
const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml tensors have at most four dimensions.
const MAX_DIMS: u32 = 4;

/// A parsed header: everything in the file but the tensor data itself.
#[derive(Debug, Clone)]
pub(crate) struct Gguf {
    /// Key-value pairs by key.
    pub(crate) metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub(crate) tensors: HashMap<String, TensorInfo>,
    /// Where tensor data begins, in bytes from the start of the file.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests check where the data begins"))]
    pub(crate) data_offset: usize,
    path: PathBuf,
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(String),
    U64(u64),
    I64(i64),
    F64(f64),
    Array(Array),
}

/// An array of one element type; scalars are kept at their own width.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Str(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
    Nested(Vec<Array>),
}

/// Where a tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorInfo {
    /// Dimensions as the file gives them, fastest first: `[in_features, out_features]`.
    pub(crate) gguf_shape: Vec<usize>,
    /// The same reversed to row-major, slowest first: `[out_features, in_features]`.
    pub(crate) shape: Vec<usize>,
    /// How its elements are stored.
    pub(crate) ggml_type: GgmlType,
    /// Its bytes, counted from the start of the file; always inside it.
    pub(crate) range: Range<usize>,
}

impl Value {
    fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::Str(_) => "string",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
            Self::Array(array) => array.type_name(),
        }
    }

    /// Any integer type as `u64`, where the value fits.
    fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }
}

impl Array {
    fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "array of u8",
            Self::I8(_) => "array of i8",
            Self::U16(_) => "array of u16",
            Self::I16(_) => "array of i16",
            Self::U32(_) => "array of u32",
            Self::I32(_) => "array of i32",
            Self::F32(_) => "array of f32",
            Self::Bool(_) => "array of bool",
            Self::Str(_) => "array of string",
            Self::U64(_) => "array of u64",
            Self::I64(_) => "array of i64",
            Self::F64(_) => "array of f64",
            Self::Nested(_) => "array of array",
        }
    }
}

impl Gguf {
    /// Parses the header of `bytes`, the whole file; `path` is only for the text of errors.
    ///
    /// # Errors
    /// [`Corrupted`](crate::ErrorKind::Corrupted) where bytes are missing or contradict each other;
    /// [`Model`](crate::ErrorKind::Model) where the file is intact but not of a kind that is read here.
    pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let mut reader = Reader { bytes, position: 0, path };
        if reader.take(4, "magic")? != MAGIC {
            return Err(reader.model("magic is not \"GGUF\": not a GGUF file"));
        }
        let version = reader.u32("version")?;
        match version {
            2 | 3 => {}
            _ if matches!(version.swap_bytes(), 1..=3) => {
                return Err(reader.model("big-endian file, expected little-endian"));
            }
            _ => return Err(reader.model(format!("version {version}, expected 2 or 3"))),
        }
        let num_tensors = reader.u64("tensor count")?;
        let num_pairs = reader.u64("metadata count")?;
        // The least a tensor info (name length, dims, type, offset) and a pair (key length, type,
        // one byte) can take.
        reader.check_count(num_tensors, 24, "tensor count")?;
        reader.check_count(num_pairs, 13, "metadata count")?;

        let mut metadata = BTreeMap::new();
        for _ in 0..num_pairs {
            let key = reader.string("metadata key")?;
            let value_type = reader.u32(&key)?;
            let value = reader.value(value_type, &key)?;
            if metadata.contains_key(&key) {
                return Err(reader.corrupted(format!("metadata key {key:?} appears twice")));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 20 => alignment,
                _ => {
                    return Err(reader.corrupted(format!(
                        "general.alignment: expected a power of two up to 2^20, got {value:?}"
                    )));
                }
            },
        };

        let mut raw = Vec::new();
        for _ in 0..num_tensors {
            raw.push(RawTensor::read(&mut reader)?);
        }
        let data_offset = (reader.position as u64).next_multiple_of(alignment);
        let mut tensors = HashMap::with_capacity(raw.len());
        for tensor in raw {
            let (name, info) = tensor.place(data_offset, alignment, &reader)?;
            if tensors.contains_key(&name) {
                return Err(reader.corrupted(format!("tensor {name:?} appears twice")));
            }
            tensors.insert(name, info);
        }
        let data_offset = usize::try_from(data_offset)
            .map_err(|_| reader.corrupted(format!("data offset {data_offset} is too large")))?;
        Ok(Self { metadata, tensors, data_offset, path: path.to_path_buf() })
    }

    /// The file this header was read from, for the text of errors.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// An unsigned integer; any integer type that holds the value is accepted.
    pub(crate) fn u32(&self, key: &str) -> Result<u32> {
        let value = self.value(key, "u32")?;
        let wide = value.as_u64().ok_or_else(|| self.mismatch(key, "u32", value))?;
        u32::try_from(wide).map_err(|_| self.mismatch(key, "u32", value))
    }

    /// A float; `f64` is narrowed.
    pub(crate) fn f32(&self, key: &str) -> Result<f32> {
        match self.value(key, "f32")? {
            Value::F32(value) => Ok(*value),
            Value::F64(value) => Ok(*value as f32),
            other => Err(self.mismatch(key, "f32", other)),
        }
    }

    /// A truth value.
    pub(crate) fn bool(&self, key: &str) -> Result<bool> {
        match self.value(key, "bool")? {
            Value::Bool(value) => Ok(*value),
            other => Err(self.mismatch(key, "bool", other)),
        }
    }

    /// A text.
    pub(crate) fn str(&self, key: &str) -> Result<&str> {
        match self.value(key, "string")? {
            Value::Str(value) => Ok(value),
            other => Err(self.mismatch(key, "string", other)),
        }
    }

    /// An array of texts.
    pub(crate) fn strs(&self, key: &str) -> Result<&[String]> {
        match self.value(key, "array of string")? {
            Value::Array(Array::Str(values)) => Ok(values),
            other => Err(self.mismatch(key, "array of string", other)),
        }
    }

    /// An array of signed integers (`i32`, or `u32` that fit).
    pub(crate) fn i32s(&self, key: &str) -> Result<Vec<i32>> {
        let value = self.value(key, "array of i32")?;
        match value {
            Value::Array(Array::I32(values)) => Ok(values.clone()),
            Value::Array(Array::U32(values)) => values
                .iter()
                .map(|&v| i32::try_from(v).map_err(|_| self.mismatch(key, "array of i32", value)))
                .collect(),
            other => Err(self.mismatch(key, "array of i32", other)),
        }
    }

    /// An array of floats.
    pub(crate) fn f32s(&self, key: &str) -> Result<&[f32]> {
        match self.value(key, "array of f32")? {
            Value::Array(Array::F32(values)) => Ok(values),
            other => Err(self.mismatch(key, "array of f32", other)),
        }
    }

    /// Whether the key is there at all: optional keys are asked for first, then read by type.
    pub(crate) fn contains(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// The tensor of that name.
    #[cfg(test)]
    pub(crate) fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| {
            Error::model(format!(
                "{}: tensor {name:?} is missing among {} tensors",
                self.path.display(),
                self.tensors.len()
            ))
        })
    }

    fn value(&self, key: &str, expected: &str) -> Result<&Value> {
        self.metadata.get(key).ok_or_else(|| {
            Error::model(format!(
                "{}: metadata {key:?}: expected {expected}, got nothing",
                self.path.display()
            ))
        })
    }

    fn mismatch(&self, key: &str, expected: &str, got: &Value) -> Error {
        let got = match got {
            Value::Array(_) | Value::Str(_) => got.type_name().to_owned(),
            scalar => format!("{} {scalar:?}", scalar.type_name()),
        };
        Error::model(format!(
            "{}: metadata {key:?}: expected {expected}, got {got}",
            self.path.display()
        ))
    }
}

/// A tensor info as it stands in the file, before its place is known.
struct RawTensor {
    name: String,
    dims: Vec<u64>,
    type_id: u32,
    offset: u64,
}

impl RawTensor {
    fn read(reader: &mut Reader<'_>) -> Result<Self> {
        let name = reader.string("tensor name")?;
        let num_dims = reader.u32(&name)?;
        if num_dims > MAX_DIMS {
            return Err(reader.corrupted(format!(
                "tensor {name:?}: {num_dims} dimensions, expected at most {MAX_DIMS}"
            )));
        }
        let mut dims = Vec::with_capacity(MAX_DIMS as usize);
        for _ in 0..num_dims {
            dims.push(reader.u64(&name)?);
        }
        let type_id = reader.u32(&name)?;
        let offset = reader.u64(&name)?;
        Ok(Self { name, dims, type_id, offset })
    }

    fn place(
        self,
        data_offset: u64,
        alignment: u64,
        reader: &Reader<'_>,
    ) -> Result<(String, TensorInfo)> {
        let Self { name, dims, type_id, offset } = self;
        let Some(ggml_type) = GgmlType::from_id(type_id) else {
            let known = UNSUPPORTED_TYPES.iter().find(|(id, _)| *id == type_id);
            return Err(match known {
                Some((_, type_name)) => reader
                    .model(format!("tensor {name:?}: storage type {type_name} is not supported")),
                None => {
                    reader.corrupted(format!("tensor {name:?}: unknown storage type {type_id}"))
                }
            });
        };
        let wrong = |what: String| reader.corrupted(format!("tensor {name:?}: {what}"));
        if dims.contains(&0) {
            return Err(wrong(format!("empty dimension in {dims:?}")));
        }
        let num_elements = dims
            .iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim))
            .ok_or_else(|| wrong(format!("shape {dims:?} overflows")))?;
        let row = dims.first().copied().unwrap_or(1);
        let block = ggml_type.block_elements() as u64;
        if row % block != 0 {
            return Err(wrong(format!(
                "rows of {row} elements, expected a multiple of {block} for {ggml_type:?}"
            )));
        }
        if offset % alignment != 0 {
            return Err(wrong(format!("offset {offset} is not a multiple of {alignment}")));
        }
        let file_bytes = reader.bytes.len() as u64;
        let range = (num_elements / block)
            .checked_mul(ggml_type.block_bytes() as u64)
            .and_then(|length| {
                let start = data_offset.checked_add(offset)?;
                Some((start, start.checked_add(length)?))
            })
            .filter(|&(_, end)| end <= file_bytes)
            .ok_or_else(|| {
                wrong(format!(
                    "{ggml_type:?} {dims:?} at data offset {offset} ends past the file's \
                     {file_bytes} bytes: the file is cut short"
                ))
            })?;
        // `range` ends inside a slice, and every dimension is at most the element count, which is
        // at most 256 times the bytes of that slice: on a 64-bit machine all fit `usize`.
        let gguf_shape = dims
            .iter()
            .map(|&dim| usize::try_from(dim))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| wrong(format!("shape {dims:?} does not fit this machine")))?;
        let shape = gguf_shape.iter().rev().copied().collect();
        let range = range.0 as usize..range.1 as usize;
        Ok((name, TensorInfo { gguf_shape, shape, ggml_type, range }))
    }
}
