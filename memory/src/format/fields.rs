//! Fields of a record, one by one: numbers, texts, references.
//! Knows nothing of which record they make up.

use super::{BlobRef, Kind};
use crate::{Error, Metadata, Result, Role, Value};

const ROLES: [Role; 6] =
    [Role::System, Role::User, Role::Assistant, Role::Document, Role::Recalled, Role::Tool];

pub(super) fn role_code(role: Role) -> u8 {
    match role {
        Role::System => 1,
        Role::User => 2,
        Role::Assistant => 3,
        Role::Document => 4,
        Role::Recalled => 5,
        Role::Tool => 6,
    }
}

pub(super) fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(out, bytes.len() as u32);
    out.extend_from_slice(bytes);
}

pub(super) fn put_option(out: &mut Vec<u8>, text: Option<&str>) {
    out.push(u8::from(text.is_some()));
    if let Some(text) = text {
        put_bytes(out, text.as_bytes());
    }
}

pub(super) fn put_floats(out: &mut Vec<u8>, values: &[f32]) {
    put_u32(out, values.len() as u32);
    let start = out.len();
    // In one piece: a look at the room for each number took most of the time.
    out.resize(start + values.len() * 4, 0);
    for (bytes, value) in out[start..].chunks_exact_mut(4).zip(values) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

/// Metadata goes last in its record: without any, nothing is written.
pub(super) fn put_metadata(out: &mut Vec<u8>, metadata: &Metadata) {
    if metadata.is_empty() {
        return;
    }
    put_u32(out, metadata.len() as u32);
    for (key, value) in metadata {
        put_bytes(out, key.as_bytes());
        match value {
            Value::Flag(flag) => out.extend([0, u8::from(*flag)]),
            Value::Number(number) => {
                out.push(1);
                put_u64(out, number.to_bits());
            }
            Value::Text(text) => {
                out.push(2);
                put_bytes(out, text.as_bytes());
            }
        }
    }
}

pub(super) fn put_ref(out: &mut Vec<u8>, blob: &BlobRef) {
    out.push(blob.kind.code());
    put_u32(out, blob.segment);
    put_u64(out, blob.offset);
    put_u32(out, blob.len);
    put_u64(out, blob.hash);
}

pub(super) fn put_option_ref(out: &mut Vec<u8>, blob: Option<&BlobRef>) {
    out.push(u8::from(blob.is_some()));
    if let Some(blob) = blob {
        put_ref(out, blob);
    }
}

/// Reads fields in order; every length is checked against what is left before anything is allocated.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        if len > self.bytes.len() {
            return Err(Error::corrupted(format!(
                "{}: expected {len} more bytes, got {}",
                self.what,
                self.bytes.len()
            )));
        }
        let (head, tail) = self.bytes.split_at(len);
        self.bytes = tail;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn flag(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Error::corrupted(format!(
                "{}: expected a flag of 0 or 1, got {other}",
                self.what
            ))),
        }
    }

    pub(super) fn text(&mut self) -> Result<String> {
        let len = self.u32()? as usize;
        let bytes = self.take(len)?;
        String::from_utf8(bytes.to_vec()).map_err(|source| {
            Error::corrupted(format!("{}: expected UTF-8 text", self.what)).with_source(source)
        })
    }

    pub(super) fn option(&mut self) -> Result<Option<String>> {
        if self.flag()? { self.text().map(Some) } else { Ok(None) }
    }

    /// What [`put_metadata`] wrote as the last field.
    pub(super) fn metadata(&mut self) -> Result<Metadata> {
        let mut metadata = Metadata::new();
        if self.bytes.is_empty() {
            return Ok(metadata);
        }
        let num_entries = self.u32()?;
        for _ in 0..num_entries {
            let key = self.text()?;
            if metadata.last_key_value().is_some_and(|(last, _)| *last >= key) {
                return Err(Error::corrupted(format!(
                    "{}: expected ascending keys of metadata",
                    self.what
                )));
            }
            let value = match self.u8()? {
                0 => Value::Flag(self.flag()?),
                1 => Value::Number(f64::from_bits(self.u64()?)),
                2 => Value::Text(self.text()?),
                other => {
                    return Err(Error::corrupted(format!(
                        "{}: unknown kind of value {other}",
                        self.what
                    )));
                }
            };
            metadata.insert(key, value);
        }
        if metadata.is_empty() {
            return Err(Error::corrupted(format!("{}: expected entries of metadata", self.what)));
        }
        Ok(metadata)
    }

    pub(super) fn numbers<T>(&mut self, len: usize, from: impl Fn([u8; 4]) -> T) -> Result<Vec<T>> {
        let bytes = self.take(len.saturating_mul(4))?;
        Ok(bytes.chunks_exact(4).map(|four| from([four[0], four[1], four[2], four[3]])).collect())
    }

    pub(super) fn floats(&mut self) -> Result<Vec<f32>> {
        let len = self.u32()? as usize;
        self.numbers(len, f32::from_le_bytes)
    }

    /// Seven bits a byte, the lowest first; the highest bit says that more follow.
    #[inline]
    pub(super) fn varint(&mut self) -> Result<u64> {
        let mut number = 0;
        for (at, &byte) in self.bytes.iter().take(10).enumerate() {
            number |= u64::from(byte & 0x7f).wrapping_shl(7 * at as u32);
            if byte < 0x80 {
                self.bytes = &self.bytes[at + 1..];
                return Ok(number);
            }
        }
        Err(Error::corrupted(format!("{}: expected a number of at most 10 bytes", self.what)))
    }

    /// Bytes that were not read yet.
    pub(super) fn left(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn kind(&mut self) -> Result<Kind> {
        let code = self.u8()?;
        Kind::from_code(code)
            .ok_or_else(|| Error::corrupted(format!("{}: unknown record kind {code}", self.what)))
    }

    pub(super) fn role(&mut self) -> Result<Role> {
        let code = self.u8()?;
        ROLES
            .into_iter()
            .find(|&role| role_code(role) == code)
            .ok_or_else(|| Error::corrupted(format!("{}: unknown role {code}", self.what)))
    }

    pub(super) fn blob_ref(&mut self) -> Result<BlobRef> {
        Ok(BlobRef {
            kind: self.kind()?,
            segment: self.u32()?,
            offset: self.u64()?,
            len: self.u32()?,
            hash: self.u64()?,
        })
    }

    pub(super) fn option_ref(&mut self) -> Result<Option<BlobRef>> {
        if self.flag()? { self.blob_ref().map(Some) } else { Ok(None) }
    }

    pub(super) fn finish(&self) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        Err(Error::corrupted(format!("{}: {} bytes too many", self.what, self.bytes.len())))
    }
}
