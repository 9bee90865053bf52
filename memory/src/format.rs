//! Every byte that reaches the disk: records, payloads, checksums, versions. Drawn in docs/format.md.
//! Knows no file, index or lock; it turns values into bytes and back, and refuses bytes it did not write.

mod fields;
pub(crate) mod image;
mod payloads;
mod records;
mod runs;
pub(crate) mod vectors;

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed, xxh3_128_with_seed};

use self::fields::{Reader, put_bytes, put_u32, put_u64};
pub(crate) use self::payloads::{
    Body, ChunkSpan, TurnChunk, TurnChunks, TurnHead, decode_names, decode_summary, embedder_tag,
    encode_names, encode_summary,
};
#[cfg(test)]
use self::records::checksum;
pub(crate) use self::records::{
    Key, PageRecord, Record, SessionRecord, SnapshotRecord, StoreRecord, TurnRecord, record_version,
};
pub(crate) use self::runs::{MAX_RUN_TURNS, RunKey, decode_run, encode_run};
use crate::{Error, ErrorKind, Result};

/// Version of what is written; a later one is refused as [`ErrorKind::Incompatible`].
pub(crate) const VERSION: u32 = 4;
/// The earliest version that is still read.
const OLDEST_VERSION: u32 = 1;
/// Key of the record that says how the others are encrypted; itself it never is.
pub(crate) const CIPHER_KEY: &[u8] = b"e";
/// XChaCha20-Poly1305, the only cipher.
const CIPHER_XCHACHA20_POLY1305: u8 = 1;
/// First bytes of a segment file.
pub(crate) const SEGMENT_MAGIC: [u8; 8] = *b"mka-seg\n";
/// First bytes of a record in a segment file.
pub(crate) const RECORD_MAGIC: [u8; 4] = *b"mkaR";
/// Magic (8), version (4), number of the segment (4).
pub(crate) const SEGMENT_HEADER_BYTES: u64 = 16;
/// Magic (4), kind (1), zero (3), length (4), hash (8).
pub(crate) const RECORD_HEADER_BYTES: u64 = 20;
/// The longest payload of a record: 1 GiB, so that a length fits 32 bits with room to spare.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 1 << 30;

/// What the payload of a segment record is. Those of version 1 are read, and copied as they are, but not written any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Names of a session's scope.
    Names,
    /// A turn: text, source, tokens.
    Body,
    /// A turn's chunks and their vectors: derived from its body.
    Chunks,
    /// A page of a session's cache.
    Page,
    /// A snapshot's opaque state.
    State,
    /// A session's running means: derived from its chunks.
    Summary,
    /// Names without the session's number.
    NamesV1,
    /// A turn without subject and expiry.
    BodyV1,
    /// Chunks without the embedder's tag.
    ChunksV1,
    /// Running means without the embedder's tag.
    SummaryV1,
}

/// Every kind with its code.
const KINDS: [(Kind, u8); 10] = [
    (Kind::NamesV1, 1),
    (Kind::BodyV1, 2),
    (Kind::ChunksV1, 3),
    (Kind::Page, 4),
    (Kind::State, 5),
    (Kind::SummaryV1, 6),
    (Kind::Names, 7),
    (Kind::Body, 8),
    (Kind::Chunks, 9),
    (Kind::Summary, 10),
];

impl Kind {
    /// Whether it is a turn, of any version.
    pub(crate) fn is_body(self) -> bool {
        matches!(self, Kind::Body | Kind::BodyV1)
    }

    /// The code in the header of a record.
    pub(crate) fn code(self) -> u8 {
        KINDS.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, code)| *code)
    }

    /// Whether several records may refer to one of these: its payload names no session.
    pub(crate) fn is_shared(self) -> bool {
        matches!(self, Self::Page | Self::State)
    }

    fn from_code(code: u8) -> Option<Self> {
        KINDS.iter().find(|(_, known)| *known == code).map(|(kind, _)| *kind)
    }
}

/// Where a payload lies, and what its bytes must hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlobRef {
    pub(crate) segment: u32,
    /// Of the record's header, from the start of the file.
    pub(crate) offset: u64,
    /// Of the payload alone.
    pub(crate) len: u32,
    pub(crate) hash: u64,
    pub(crate) kind: Kind,
}

impl BlobRef {
    /// Bytes that the record takes in its segment.
    pub(crate) fn record_bytes(&self) -> u64 {
        RECORD_HEADER_BYTES + u64::from(self.len)
    }
}

/// The hash of a payload; the kind is its seed, so that one kind never passes for another.
pub(crate) fn payload_hash(kind: Kind, payload: &[u8]) -> u64 {
    xxh3_64_with_seed(payload, u64::from(kind.code()))
}

/// The hash of `parts` laid one behind the other.
pub(crate) fn parts_hash(kind: Kind, parts: &[&[u8]]) -> u64 {
    let mut hash = Xxh3::with_seed(u64::from(kind.code()));
    parts.iter().for_each(|part| hash.update(part));
    hash.digest()
}

/// The header of a segment file.
pub(crate) fn segment_header(number: u32) -> [u8; SEGMENT_HEADER_BYTES as usize] {
    segment_header_of(VERSION, number)
}

fn segment_header_of(version: u32, number: u32) -> [u8; SEGMENT_HEADER_BYTES as usize] {
    let mut header = [0; SEGMENT_HEADER_BYTES as usize];
    header[..8].copy_from_slice(&SEGMENT_MAGIC);
    header[8..12].copy_from_slice(&version.to_le_bytes());
    header[12..].copy_from_slice(&number.to_le_bytes());
    header
}

/// Whether a segment of this number, of any version that is read, begins so.
pub(crate) fn is_segment_header(number: u32, header: &[u8]) -> bool {
    (OLDEST_VERSION..=VERSION).any(|version| header == segment_header_of(version, number))
}

/// The header of a segment record.
pub(crate) fn record_header(kind: Kind, len: u32, hash: u64) -> [u8; RECORD_HEADER_BYTES as usize] {
    let mut header = [0; RECORD_HEADER_BYTES as usize];
    header[..4].copy_from_slice(&RECORD_MAGIC);
    header[4] = kind.code();
    header[8..12].copy_from_slice(&len.to_le_bytes());
    header[12..].copy_from_slice(&hash.to_le_bytes());
    header
}

/// Reads a record's header: kind, length, hash.
pub(crate) fn parse_record_header(header: &[u8]) -> Result<(Kind, u32, u64)> {
    let mut reader = Reader::new(header, "record header");
    if reader.array()? != RECORD_MAGIC {
        return Err(Error::corrupted("record header: expected its magic, got other bytes"));
    }
    let kind = reader.kind()?;
    if reader.array()? != [0u8; 3] {
        return Err(Error::corrupted("record header: expected three zero bytes"));
    }
    let parsed = (kind, reader.u32()?, reader.u64()?);
    reader.finish()?;
    Ok(parsed)
}

/// The hash that identifies an erased turn in a receipt.
pub(crate) fn turn_digest(seed: u64, session: u64, turn: u64, text: &str) -> u128 {
    let mut bytes = Vec::with_capacity(17 + text.len());
    bytes.push(b't');
    put_u64(&mut bytes, session);
    put_u64(&mut bytes, turn);
    bytes.extend_from_slice(text.as_bytes());
    xxh3_128_with_seed(&bytes, seed)
}

/// The hash that identifies an erased chunk of a session in a receipt.
pub(crate) fn chunk_digest(seed: u64, session: u64, turn: u64, id: u128) -> u128 {
    let mut bytes = Vec::with_capacity(33);
    bytes.push(b'c');
    put_u64(&mut bytes, session);
    put_u64(&mut bytes, turn);
    bytes.extend_from_slice(&id.to_le_bytes());
    xxh3_128_with_seed(&bytes, seed)
}

/// The record under [`CIPHER_KEY`]: version, cipher, and what tells whether a key is the right one.
pub(crate) fn encode_cipher(check: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_u32(&mut out, VERSION);
    out.push(CIPHER_XCHACHA20_POLY1305);
    put_bytes(&mut out, check);
    out
}

/// Reads what [`encode_cipher`] wrote.
pub(crate) fn decode_cipher(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut reader = Reader::new(bytes, "record of the cipher");
    let (version, cipher) = (reader.u32()?, reader.u8()?);
    if version > VERSION || cipher != CIPHER_XCHACHA20_POLY1305 {
        return Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "record of the cipher: expected format version up to {VERSION} and cipher {CIPHER_XCHACHA20_POLY1305}, got {version} and {cipher}"
            ),
        ));
    }
    let len = reader.u32()? as usize;
    let check = reader.take(len)?.to_vec();
    reader.finish()?;
    Ok(check)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
