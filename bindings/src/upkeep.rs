//! What looking after a store says: counts, checks, copies.
//! Knows no call: each record is made from its twin in the engine.

use crate::records::all;

/// What a store holds.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Stats {
    /// Sessions of all users.
    pub sessions: u64,
    /// Turns, retracted and forgotten ones included.
    pub turns: u64,
    /// Distinct chunks that can be recalled.
    pub chunks: u64,
    /// Their sentence vectors.
    pub vectors: u64,
    /// Those of them that an opening left on the disk, and that no recall has looked at since.
    pub vectors_unread: u64,
    /// Those of them that recalls without a filter find by a graph.
    pub vectors_in_graphs: u64,
    /// Distinct words.
    pub terms: u64,
    /// Turns that are found by words alone until they are embedded again.
    pub turns_to_embed: u64,
    /// Subjects that something is known about.
    pub subjects: u64,
    /// Turns that a newer turn of the same subject superseded.
    pub superseded: u64,
    /// Places of chunks beyond their first.
    pub duplicates: u64,
    /// Identity of the embedder that makes the vectors.
    pub embedder: String,
    /// Whether what is written is encrypted.
    pub encrypted: bool,
    /// Stored key/value pages.
    pub pages: u64,
    /// Segment files.
    pub segments: u64,
    /// Bytes in use in them.
    pub live_bytes: u64,
    /// Bytes that compaction will give back.
    pub dead_bytes: u64,
    /// What was found damaged when the store was opened, in words.
    pub damaged: Vec<String>,
}

impl From<mka::Stats> for Stats {
    fn from(from: mka::Stats) -> Self {
        Self {
            sessions: from.sessions as u64,
            turns: from.turns,
            chunks: from.chunks as u64,
            vectors: from.vectors as u64,
            vectors_unread: from.vectors_unread as u64,
            vectors_in_graphs: from.vectors_in_graphs as u64,
            terms: from.terms as u64,
            turns_to_embed: from.turns_to_embed as u64,
            subjects: from.subjects as u64,
            superseded: from.superseded as u64,
            duplicates: from.duplicates as u64,
            embedder: from.embedder,
            encrypted: from.encrypted,
            pages: from.pages as u64,
            segments: from.segments as u64,
            live_bytes: from.live_bytes,
            dead_bytes: from.dead_bytes,
            damaged: from.damaged,
        }
    }
}

/// What a store takes on the disk.
#[derive(Debug, Clone, uniffi::Record)]
pub struct DiskUsage {
    /// Bytes of the segment files.
    pub segment_bytes: u64,
    /// Bytes of the database's files.
    pub database_bytes: u64,
    /// Bytes of the graphs' files, which can be made anew.
    pub graph_bytes: u64,
    /// Bytes of the images of the index, which can be made anew.
    pub image_bytes: u64,
    /// Bytes in use in segments and database.
    pub live_bytes: u64,
}

impl From<mka::DiskUsage> for DiskUsage {
    fn from(from: mka::DiskUsage) -> Self {
        Self {
            segment_bytes: from.segment_bytes,
            database_bytes: from.database_bytes,
            graph_bytes: from.graph_bytes,
            image_bytes: from.image_bytes,
            live_bytes: from.live_bytes,
        }
    }
}

/// What an export wrote.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Exported {
    /// Sessions.
    pub sessions: u64,
    /// Turns, one line each.
    pub turns: u64,
    /// Turns that are damaged, in words: they are written as forgotten ones.
    pub lost: Vec<String>,
}

impl From<mka::Exported> for Exported {
    fn from(from: mka::Exported) -> Self {
        Self { sessions: from.sessions as u64, turns: from.turns, lost: from.lost }
    }
}

/// What an import took in.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Imported {
    /// Turns appended.
    pub turns: u64,
    /// Turns that the store held already.
    pub skipped: u64,
    /// Chunks that were new.
    pub chunks_added: u64,
}

impl From<mka::Imported> for Imported {
    fn from(from: mka::Imported) -> Self {
        Self { turns: from.turns, skipped: from.skipped, chunks_added: from.chunks_added as u64 }
    }
}

/// What a backup copied.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Backup {
    /// Segment files.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Records of the database.
    pub records: u64,
}

impl From<mka::Backup> for Backup {
    fn from(from: mka::Backup) -> Self {
        Self { segments: from.segments as u64, bytes: from.bytes, records: from.records as u64 }
    }
}

/// What became, or can become, of something damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, uniffi::Enum)]
pub enum Repair {
    /// It can be derived from what is intact: a check that repairs does it.
    Possible,
    /// It was derived anew.
    Done,
    /// It cannot be derived.
    Lost,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Problem {
    /// What it is, and where.
    pub what: String,
    /// What became of it.
    pub repair: Repair,
}

impl From<mka::Problem> for Problem {
    fn from(from: mka::Problem) -> Self {
        Self {
            what: from.what,
            repair: match from.repair {
                mka::Repair::Possible => Repair::Possible,
                mka::Repair::Done => Repair::Done,
                _ => Repair::Lost,
            },
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Checkup {
    /// Records of the database that were read.
    pub records: u64,
    /// Records of segments that they refer to.
    pub blobs: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Chunks in the indexes that were compared with the log.
    pub chunks: u64,
    /// What is not as it should be; empty for a store that is whole.
    pub problems: Vec<Problem>,
}

impl From<mka::Checkup> for Checkup {
    fn from(from: mka::Checkup) -> Self {
        Self {
            records: from.records as u64,
            blobs: from.blobs as u64,
            bytes: from.bytes,
            chunks: from.chunks as u64,
            problems: all(from.problems),
        }
    }
}
