//! Records of the database: keys, values, their versions and checksums.
//! Knows no payload: what is long is referred to.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::fields::{Reader, put_bytes, put_option_ref, put_ref, put_u32, put_u64, role_code};
use super::{BlobRef, OLDEST_VERSION, VERSION, embedder_tag};
use crate::{Error, ErrorKind, Result, Role};

/// Facts about the whole store, written at creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoreRecord {
    pub(crate) seed: u64,
    pub(crate) dim: u32,
    pub(crate) embedder: String,
    /// Number of the next session; never used twice.
    pub(crate) next_session: u64,
    /// A `forget` was recorded but its bytes may still be in the segments.
    pub(crate) purge_pending: bool,
    /// Tag of the embedder whose vectors the records of version 1 hold, which have no tag.
    pub(crate) untagged: u64,
}

impl StoreRecord {
    /// The tag of the store's embedder.
    pub(crate) fn tag(&self) -> u64 {
        embedder_tag(&self.embedder, self.dim as usize)
    }
}

/// A session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionRecord {
    pub(crate) names: BlobRef,
    pub(crate) summary: Option<BlobRef>,
}

/// A turn, without its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TurnRecord {
    pub(crate) role: Role,
    pub(crate) time_ms: i64,
    /// Its place among all turns of its user, in the order of commits.
    pub(crate) order: u64,
    pub(crate) remember: bool,
    pub(crate) retracted: bool,
    /// None only for a forgotten turn.
    pub(crate) body: Option<BlobRef>,
    pub(crate) chunks: Option<BlobRef>,
}

/// A session's snapshot, without its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SnapshotRecord {
    pub(crate) fingerprint: [u8; 16],
    pub(crate) position: u64,
    pub(crate) num_window_pages: u64,
    pub(crate) state: BlobRef,
}

/// A page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageRecord {
    pub(crate) blob: BlobRef,
    /// 0 while the page is in the window; else its place among the session's evictions.
    pub(crate) evicted: u64,
}

/// The key of a database record: sorted by session, then by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    Store,
    Session(u64),
    Turn(u64, u64),
    Snapshot(u64),
    Page(u64, u64),
}

/// A database record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    Store(StoreRecord),
    Session(SessionRecord),
    Turn(TurnRecord),
    Snapshot(SnapshotRecord),
    Page(PageRecord),
}

impl Key {
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Big-endian numbers: the database's order is the numbers' order.
        let mut out = Vec::with_capacity(17);
        match *self {
            Self::Store => out.push(b'm'),
            Self::Session(session) => {
                out.push(b's');
                out.extend_from_slice(&session.to_be_bytes());
            }
            Self::Turn(session, turn) => {
                out.push(b't');
                out.extend_from_slice(&session.to_be_bytes());
                out.extend_from_slice(&turn.to_be_bytes());
            }
            Self::Snapshot(session) => {
                out.push(b'n');
                out.extend_from_slice(&session.to_be_bytes());
            }
            Self::Page(session, page) => {
                out.push(b'p');
                out.extend_from_slice(&session.to_be_bytes());
                out.extend_from_slice(&page.to_be_bytes());
            }
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes, "key");
        let prefix = reader.u8()?;
        let mut number = || Ok::<u64, Error>(u64::from_be_bytes(reader.array()?));
        let key = match prefix {
            b'm' => Self::Store,
            b's' => Self::Session(number()?),
            b't' => Self::Turn(number()?, number()?),
            b'n' => Self::Snapshot(number()?),
            b'p' => Self::Page(number()?, number()?),
            other => {
                return Err(Error::corrupted(format!("key: unknown prefix {other:#04x}")));
            }
        };
        reader.finish()?;
        Ok(key)
    }
}

impl Record {
    /// The value under `key`: version, fields, checksum over key and value.
    pub(crate) fn encode(&self, key: &Key) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        put_u32(&mut out, VERSION);
        match self {
            Self::Store(record) => {
                put_u64(&mut out, record.seed);
                put_u32(&mut out, record.dim);
                put_u64(&mut out, record.next_session);
                out.push(u8::from(record.purge_pending));
                put_bytes(&mut out, record.embedder.as_bytes());
                put_u64(&mut out, record.untagged);
            }
            Self::Session(record) => {
                put_ref(&mut out, &record.names);
                put_option_ref(&mut out, record.summary.as_ref());
            }
            Self::Turn(record) => {
                out.push(role_code(record.role));
                out.push(u8::from(record.remember) | u8::from(record.retracted) << 1);
                put_u64(&mut out, record.time_ms as u64);
                put_u64(&mut out, record.order);
                put_option_ref(&mut out, record.body.as_ref());
                put_option_ref(&mut out, record.chunks.as_ref());
            }
            Self::Snapshot(record) => {
                out.extend_from_slice(&record.fingerprint);
                put_u64(&mut out, record.position);
                put_u64(&mut out, record.num_window_pages);
                put_ref(&mut out, &record.state);
            }
            Self::Page(record) => {
                put_u64(&mut out, record.evicted);
                put_ref(&mut out, &record.blob);
            }
        }
        let sum = checksum(VERSION, key, &out);
        put_u64(&mut out, sum);
        out
    }

    /// Reads the value under `key`; the version is looked at before the checksum,
    /// so that a newer format says so.
    pub(crate) fn decode(key: &Key, bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes, "database record");
        let version = reader.u32()?;
        let fields_end = bytes.len().checked_sub(8).filter(|&end| end >= 4).ok_or_else(|| {
            Error::corrupted(format!(
                "database record: expected a checksum, got {} bytes",
                bytes.len()
            ))
        })?;
        let (fields, sum) = bytes.split_at(fields_end);
        let intact = sum == checksum(version, key, fields).to_le_bytes();
        if !intact {
            return Err(Error::corrupted("database record: checksum does not match"));
        }
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "database record: expected format version {OLDEST_VERSION} to {VERSION}, got {version}"
                ),
            ));
        }
        let mut reader = Reader::new(&fields[4..], "database record");
        let record = match key {
            Key::Store => {
                let mut record = StoreRecord {
                    seed: reader.u64()?,
                    dim: reader.u32()?,
                    next_session: reader.u64()?,
                    purge_pending: reader.flag()?,
                    embedder: reader.text()?,
                    untagged: 0,
                };
                record.untagged = if version == 1 { record.tag() } else { reader.u64()? };
                Self::Store(record)
            }
            Key::Session(_) => Self::Session(SessionRecord {
                names: reader.blob_ref()?,
                summary: reader.option_ref()?,
            }),
            Key::Turn(..) => {
                let role = reader.role()?;
                let flags = reader.u8()?;
                Self::Turn(TurnRecord {
                    role,
                    remember: flags & 1 != 0,
                    retracted: flags & 2 != 0,
                    time_ms: reader.u64()? as i64,
                    order: reader.u64()?,
                    body: reader.option_ref()?,
                    chunks: reader.option_ref()?,
                })
            }
            Key::Snapshot(_) => Self::Snapshot(SnapshotRecord {
                fingerprint: reader.array()?,
                position: reader.u64()?,
                num_window_pages: reader.u64()?,
                state: reader.blob_ref()?,
            }),
            Key::Page(..) => {
                Self::Page(PageRecord { evicted: reader.u64()?, blob: reader.blob_ref()? })
            }
        };
        reader.finish()?;
        Ok(record)
    }

    /// The blobs that the record names.
    pub(crate) fn refs(&self) -> impl Iterator<Item = &BlobRef> {
        let pair = match self {
            Self::Store(_) => [None, None],
            Self::Session(record) => [Some(&record.names), record.summary.as_ref()],
            Self::Turn(record) => [record.body.as_ref(), record.chunks.as_ref()],
            Self::Snapshot(record) => [Some(&record.state), None],
            Self::Page(record) => [Some(&record.blob), None],
        };
        pair.into_iter().flatten()
    }

    /// The same, to be pointed elsewhere.
    pub(crate) fn refs_mut(&mut self) -> impl Iterator<Item = &mut BlobRef> {
        let pair = match self {
            Self::Store(_) => [None, None],
            Self::Session(record) => [Some(&mut record.names), record.summary.as_mut()],
            Self::Turn(record) => [record.body.as_mut(), record.chunks.as_mut()],
            Self::Snapshot(record) => [Some(&mut record.state), None],
            Self::Page(record) => [Some(&mut record.blob), None],
        };
        pair.into_iter().flatten()
    }
}

/// The version of a database record that was decoded before.
pub(crate) fn record_version(bytes: &[u8]) -> u32 {
    Reader::new(bytes, "database record").u32().unwrap_or(0)
}

/// The checksum of a record with its key; that of version 1 and 2 is the same but for the version as seed.
pub(super) fn checksum(version: u32, key: &Key, fields: &[u8]) -> u64 {
    let mut bytes = key.encode();
    bytes.extend_from_slice(fields);
    xxh3_64_with_seed(&bytes, u64::from(version))
}
