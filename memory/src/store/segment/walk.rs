//! The walk over a segment's records, referred to or not.
//! Knows nothing of what a record means.

use super::Segment;
use crate::Result;
use crate::format::{
    BlobRef, Kind, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, parse_record_header, payload_hash,
};

/// Bytes read at once where a record is no longer: a page's header costs as much as a few hundred small records.
const AHEAD_BYTES: usize = 64 << 10;

impl Segment {
    /// Calls `each` with every intact record from `start` on, referred to or not, and skips damaged bytes.
    /// It gets where the record lies, and the payload.
    pub(crate) fn walk(&self, start: u64, each: impl FnMut(BlobRef, &[u8])) -> Result<()> {
        self.walk_of(start, |_| true, each)
    }

    /// [`Segment::walk`] of the records of the kinds that `is_wanted`; a payload of another kind is not read where its
    /// header leads to the next one, or to the end of the file.
    ///
    /// No checksum covers a header. A length that is damaged so that it leads to a later header passes over what lies
    /// between, which [`Segment::walk`] finds: a repair asks that one.
    pub(crate) fn walk_of(
        &self,
        start: u64,
        is_wanted: impl Fn(Kind) -> bool,
        mut each: impl FnMut(BlobRef, &[u8]),
    ) -> Result<()> {
        let mut ahead = Ahead { segment: self, end: self.len()?, first: 0, bytes: Vec::new() };
        let mut offset = start.max(SEGMENT_HEADER_BYTES);
        while let Some(header) = ahead.bytes_at(offset, RECORD_HEADER_BYTES as usize)? {
            let Ok((kind, len, hash)) = parse_record_header(header) else {
                offset += 1;
                continue;
            };
            let payload_at = offset + RECORD_HEADER_BYTES;
            let next = payload_at + u64::from(len);
            let is_wanted = is_wanted(kind);
            let is_passed = !is_wanted && ahead.leads_on(next)?;
            let payload =
                if is_passed { None } else { ahead.bytes_at(payload_at, len as usize)? };
            let payload = payload.filter(|payload| payload_hash(kind, payload) == hash);
            if let Some(payload) = payload.filter(|_| is_wanted) {
                let blob = BlobRef { segment: self.number, offset, len, hash, kind };
                match &self.cipher {
                    None => each(blob, payload),
                    Some(cipher) => {
                        if let Ok(payload) = cipher.open(&[kind.code()], payload) {
                            each(blob, &payload);
                        }
                    }
                }
            }
            offset = if is_passed || payload.is_some() { next } else { offset + 1 };
        }
        Ok(())
    }
}

/// Bytes of a segment, a piece of it in memory.
struct Ahead<'a> {
    segment: &'a Segment,
    /// Of the file.
    end: u64,
    /// Where `bytes` begin.
    first: u64,
    bytes: Vec<u8>,
}

impl Ahead<'_> {
    /// `len` bytes from `offset` on; None where the file has not as many.
    fn bytes_at(&mut self, offset: u64, len: usize) -> Result<Option<&[u8]>> {
        let left = self.end.saturating_sub(offset);
        if left < len as u64 {
            return Ok(None);
        }
        if offset < self.first || offset + len as u64 > self.first + self.bytes.len() as u64 {
            let most = len.max(AHEAD_BYTES).min(usize::try_from(left).unwrap_or(usize::MAX));
            (self.first, self.bytes) = (offset, self.segment.read_raw(offset, most)?);
        }
        let at = (offset - self.first) as usize;
        Ok(self.bytes.get(at..at + len))
    }

    /// Whether a record begins at `offset`, or the file ends there.
    fn leads_on(&mut self, offset: u64) -> Result<bool> {
        let is_end = offset == self.end;
        let header = self.bytes_at(offset, RECORD_HEADER_BYTES as usize)?;
        Ok(header.map_or(is_end, |header| parse_record_header(header).is_ok()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Appender;
    use super::*;
    use std::os::unix::fs::FileExt;

    /// Kinds and lengths of the records of the file that is walked, pages longer than what is read at once.
    const RECORDS: [(Kind, usize); 7] = [
        (Kind::Page, 150_000),
        (Kind::Body, 40),
        (Kind::Page, 90_000),
        (Kind::State, 10),
        (Kind::Body, 70_000),
        (Kind::Body, 0),
        (Kind::Page, 66_000),
    ];

    fn written(folder: &std::path::Path) -> (Segment, Vec<BlobRef>) {
        let (mut appender, _) = Appender::open(folder, None).unwrap();
        let payload = |len: usize| (0..len).map(|i| (i * 7 + len) as u8).collect::<Vec<_>>();
        let append = |(kind, len)| appender.append(kind, &payload(len)).unwrap();
        let blobs = RECORDS.map(append).to_vec();
        appender.finish().unwrap();
        (Segment::open(folder, blobs[0].segment, None).unwrap(), blobs)
    }

    fn found(segment: &Segment, is_wanted: impl Fn(Kind) -> bool) -> Vec<BlobRef> {
        let mut found = Vec::new();
        segment
            .walk_of(0, is_wanted, |blob, payload| {
                assert_eq!(payload_hash(blob.kind, payload), blob.hash);
                found.push(blob);
            })
            .unwrap();
        found
    }

    #[test]
    fn a_walk_of_one_kind_finds_what_the_whole_walk_finds_of_it_after_a_flip_or_a_cut() {
        let folder = tempfile::tempdir().unwrap();
        let (segment, blobs) = written(folder.path());
        assert_eq!(found(&segment, |_| true), blobs);
        // A byte of every field of every header, of payloads, and the end of the file.
        let near = |blob: &BlobRef| [0, 4, 5, 8, 11, 12, 19, 20, 60].map(|at| blob.offset + at);
        let end = segment.len().unwrap();
        for at in blobs.iter().flat_map(near).filter(|at| *at < end) {
            let was = segment.read_raw(at, 1).unwrap();
            for flip in [1, 2, 0x80] {
                segment.file.write_all_at(&[was[0] ^ flip], at).unwrap();
                let is_body = |kind: Kind| kind == Kind::Body;
                let all = found(&segment, |_| true);
                let bodies: Vec<BlobRef> =
                    all.into_iter().filter(|blob| is_body(blob.kind)).collect();
                assert_eq!(found(&segment, is_body), bodies, "byte {at} flipped by {flip}");
                assert!(bodies.len() >= 2);
            }
            segment.file.write_all_at(&was, at).unwrap();
        }
        for cut in [1, 66_000, 66_010, 66_020, 66_021] {
            segment.file.set_len(end - cut).unwrap();
            let bodies = found(&segment, |kind| kind == Kind::Body);
            assert_eq!(bodies.len(), if cut > 66_020 { 2 } else { 3 }, "{cut} bytes fewer");
        }
    }
}
