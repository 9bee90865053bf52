//! Writes small GGUF files for tests.
//! Knows the format only as far as the tests need it: no quantisation, no checks.

use super::{Array, Value};

/// Collects metadata and tensors, then lays out the file.
#[derive(Default, Clone)]
pub(crate) struct Writer {
    pub(crate) version: Option<u32>,
    pub(crate) metadata: Vec<(String, Value)>,
    /// Name, GGUF-order dims, type id, data.
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl Writer {
    pub(crate) fn set(mut self, key: &str, value: Value) -> Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    pub(crate) fn strs<S: AsRef<str>>(self, key: &str, values: &[S]) -> Self {
        let values = values.iter().map(|v| v.as_ref().to_owned()).collect();
        self.set(key, Value::Array(Array::Str(values)))
    }

    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], type_id: u32, data: &[u8]) -> Self {
        self.tensors.push((name.to_owned(), dims.to_vec(), type_id, data.to_vec()));
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let alignment = self
            .metadata
            .iter()
            .find_map(|(key, value)| match (key.as_str(), value) {
                ("general.alignment", Value::U32(alignment)) => Some(*alignment as usize),
                _ => None,
            })
            .unwrap_or(32);
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.unwrap_or(3).to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_str(&mut out, key);
            out.extend(value_type(value).to_le_bytes());
            put_value(&mut out, value);
        }
        let mut data = Vec::new();
        for (name, dims, type_id, bytes) in &self.tensors {
            data.resize(data.len().next_multiple_of(alignment), 0);
            put_str(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(type_id.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(alignment), 0);
        out.extend(data);
        out
    }
}

fn put_str(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn value_type(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::Str(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::Str(v) => put_str(out, v),
        Value::Array(v) => put_array(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}

macro_rules! put_scalars {
    ($out:expr, $type_id:expr, $values:expr) => {{
        $out.extend(u32::to_le_bytes($type_id));
        $out.extend(($values.len() as u64).to_le_bytes());
        $values.iter().for_each(|v| $out.extend(v.to_le_bytes()));
    }};
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    match array {
        Array::U8(v) => put_scalars!(out, 0, v),
        Array::I8(v) => put_scalars!(out, 1, v),
        Array::U16(v) => put_scalars!(out, 2, v),
        Array::I16(v) => put_scalars!(out, 3, v),
        Array::U32(v) => put_scalars!(out, 4, v),
        Array::I32(v) => put_scalars!(out, 5, v),
        Array::F32(v) => put_scalars!(out, 6, v),
        Array::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            out.extend(v.iter().map(|&b| u8::from(b)));
        }
        Array::Str(v) => {
            out.extend(8u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|text| put_str(out, text));
        }
        Array::Nested(v) => {
            out.extend(9u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|inner| put_array(out, inner));
        }
        Array::U64(v) => put_scalars!(out, 10, v),
        Array::I64(v) => put_scalars!(out, 11, v),
        Array::F64(v) => put_scalars!(out, 12, v),
    }
}
