//! Compaction: live records of a segment are copied on, references swapped, the file removed.
//! Knows nothing of what a record means; a damaged one is carried along as damaged as it is.

use super::records::Change;
use super::{Store, Writer};
use crate::Result;
use crate::format::{BlobRef, Key, Record, SEGMENT_HEADER_BYTES, StoreRecord};

/// References swapped in one batch: bounds the memory of a compaction.
const BATCH_RECORDS: usize = 4096;

impl Store {
    /// Compacts at most one sealed segment that is less than two thirds alive: the bound on what a commit adds.
    /// The commit is durable already, so that a failure here is only noted.
    /// The database is looked at as well.
    pub(super) fn compact_one(&self, writer: &mut Writer) {
        let active = writer.appender.active();
        let candidate = {
            let state = self.read();
            if state.refs_lost {
                return;
            }
            state.segments.values().filter(|segment| Some(segment.number()) != active).find_map(
                |segment| {
                    let live = state.live_bytes.get(&segment.number()).copied().unwrap_or(0);
                    let len = segment.len().ok()?;
                    (live * 3 < len * 2).then_some(segment.number())
                },
            )
        };
        if let Some(number) = candidate
            && let Err(error) = self.compact(writer, number)
        {
            writer.appender.abandon();
            tracing::warn!(segment = number, %error, "compaction failed");
        }
        if let Err(error) = compact_records(writer) {
            tracing::warn!(%error, "compaction of the database failed");
        }
    }

    /// Gives all space back that nothing uses: segments with unused bytes and the database are written anew.
    ///
    /// Commits do it bit by bit, and bound what is unused to half of what is used (three times in the database);
    /// this leaves nothing of it.
    ///
    /// # Errors
    /// `Corrupted` if the database lost records: then no byte is known to be unused. `Storage`.
    ///
    /// # Cost
    /// Rewrites every segment that holds unused bytes, and the database. Readers go on; writers wait.
    pub fn compact_all(&self) -> Result<()> {
        let mut writer = self.writer()?;
        if self.read().refs_lost {
            return Err(crate::Error::corrupted(
                "compact: the database lost records, and any byte may be one of theirs",
            ));
        }
        self.purge(&mut writer)?;
        let compacted = writer.records.compact();
        checked(&mut writer, compacted)
    }

    /// Moves what is alive in `number` to the active segment, and removes the file.
    pub(super) fn compact(&self, writer: &mut Writer, number: u32) -> Result<()> {
        let (segment, mut records) = {
            let state = self.read();
            let Some(segment) = state.segments.get(&number).cloned() else { return Ok(()) };
            (segment, state.records_in(number))
        };
        let place = |record: &Record| {
            record.refs().find(|blob| blob.segment == number).map(|blob| blob.offset)
        };
        records.sort_by_key(|(_, record)| place(record));
        let mut rest = records.as_slice();
        while !rest.is_empty() {
            let mut len = rest.len().min(BATCH_RECORDS);
            // Sessions that share bytes do so in every state that a crash can leave.
            while len < rest.len() && place(&rest[len].1) == place(&rest[len - 1].1) {
                len += 1;
            }
            let (batch, after) = rest.split_at(len);
            let mut changes = Vec::with_capacity(batch.len());
            let mut last: Option<(BlobRef, BlobRef)> = None;
            for (key, record) in batch {
                let mut record = record.clone();
                for blob in record.refs_mut().filter(|blob| blob.segment == number) {
                    let moved = match last.filter(|(from, _)| from == blob) {
                        Some((_, moved)) => moved,
                        None => writer.appender.copy(&segment, blob)?,
                    };
                    last = Some((*blob, moved));
                    *blob = moved;
                }
                changes.push(Change::put(*key, record));
            }
            drop(self.publish(writer, &changes)?);
            rest = after;
        }
        if writer.appender.succeed(number)? {
            drop(self.publish(writer, &[])?);
        }
        {
            let mut state = self.write();
            state.segments.remove(&number);
            state.live_bytes.remove(&number);
        }
        writer.appender.remove(&segment)
    }

    /// Leaves no byte in any segment that no record refers to; returns the segments that had some, and are gone.
    /// A database that grew is compacted, too.
    pub(super) fn purge(&self, writer: &mut Writer) -> Result<Vec<u32>> {
        let mut impure = Vec::new();
        {
            let state = self.read();
            for segment in state.segments.values() {
                let live = state.live_bytes.get(&segment.number()).copied().unwrap_or(0);
                // One without records keeps its number from being given again.
                if live + SEGMENT_HEADER_BYTES < segment.len()? {
                    impure.push(segment.number());
                }
            }
        }
        if writer.appender.active().is_some_and(|active| impure.contains(&active)) {
            writer.appender.seal();
        }
        for &number in &impure {
            self.compact(writer, number)?;
        }
        self.rewrite_graphs()?;
        let store = StoreRecord { purge_pending: false, ..self.read().store.clone() };
        drop(self.publish(writer, &[Change::put(Key::Store, Record::Store(store))])?);
        if let Err(error) = compact_records(writer) {
            // No text is in it, and what was to be done is done.
            tracing::warn!(%error, "compaction of the database failed");
        }
        Ok(impure)
    }
}

/// Compacts a database that takes several times what is alive in it.
fn compact_records(writer: &mut Writer) -> Result<()> {
    let compacted = writer.records.compact_if_grown().map(|_| ());
    checked(writer, compacted)
}

/// A database that could not be compacted is as it was, and written on, unless it was closed by then.
fn checked(writer: &mut Writer, compacted: Result<()>) -> Result<()> {
    writer.broken |= compacted.is_err() && !writer.records.can_be_read();
    compacted
}
