//! The vectors of one turn's chunks that an opening left in the log: read whole, and checked, when one is first asked for.
//! Knows nothing of search; compaction tells it where its record went.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::segment::Segment;
use crate::format::{BlobRef, TurnChunks};
use crate::partition::Elsewhere;

/// One turn's record of chunks.
#[derive(Debug)]
pub(crate) struct HeldVectors {
    /// Where the record lies; none once it was read, so that a file that was removed is let go.
    place: Mutex<Option<(Arc<Segment>, BlobRef)>>,
    read: OnceLock<Read>,
}

/// The vectors of all chunks, one after another, and where each chunk's begin; the last number is where they end.
#[derive(Debug, Default)]
struct Read {
    numbers: Box<[f32]>,
    starts: Box<[u32]>,
}

impl HeldVectors {
    pub(crate) fn new(segment: Arc<Segment>, blob: BlobRef) -> Self {
        Self { place: Mutex::new(Some((segment, blob))), read: OnceLock::new() }
    }

    /// The turn's record lies elsewhere now. Another record than the one that was left is not taken: whoever wrote it
    /// read this one first.
    pub(crate) fn moved(&self, segment: &Arc<Segment>, blob: &BlobRef) {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, at)) = &mut *place
            && (at.kind, at.len, at.hash) == (blob.kind, blob.len, blob.hash)
        {
            (*known, *at) = (segment.clone(), *blob);
        }
    }

    fn read(&self) -> Read {
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((segment, blob)) = place else { return Read::default() };
        match segment.read(&blob).and_then(|bytes| TurnChunks::decode(blob.kind, &bytes)) {
            Ok(turn) => {
                let mut starts = vec![0];
                let mut end = 0;
                starts.extend(turn.chunks.iter().map(|chunk| {
                    end += chunk.vectors.len() as u32;
                    end
                }));
                let numbers: Vec<&[f32]> = turn.chunks.iter().map(|it| &*it.vectors).collect();
                Read { numbers: numbers.concat().into(), starts: starts.into() }
            }
            Err(error) => {
                tracing::warn!(%error, "vectors are damaged: `doctor` makes them anew");
                Read::default()
            }
        }
    }
}

impl Elsewhere for HeldVectors {
    #[inline]
    fn vectors(&self, at: u32) -> &[f32] {
        let Read { numbers, starts } = self.read.get_or_init(|| self.read());
        match starts.get(at as usize..at as usize + 2) {
            Some(&[start, end]) => numbers.get(start as usize..end as usize).unwrap_or_default(),
            _ => &[],
        }
    }

    fn is_read(&self) -> bool {
        self.read.get().is_some()
    }
}
