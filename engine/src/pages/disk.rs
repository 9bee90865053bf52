//! The way of stored pages to the disk and back: what a commit takes along, what an opening finds.
//! Knows no file and no attention rule; pages that the budget sends away are read back through [`PageSource`].

use super::store::{PageStore, Stored};
use crate::cache::SINK_PAGES;
use crate::error::Result;
use mka_kernels::PAGE_TOKENS;
use std::sync::Arc;

/// Where pages lie that host memory has no room for.
pub(crate) trait PageSource: Send + Sync {
    /// The bytes of a page as [`PageStore::fresh_pages`] gave them, or as the window wrote them; None if it is gone.
    fn page(&self, page: u64) -> Result<Option<Vec<u8>>>;
}

/// Keys and values of a page in the store's precision, and its token ids.
type Encoded = (Box<[u8]>, Box<[u32; PAGE_TOKENS]>);

impl PageStore {
    /// Says where pages are read from once the budget has sent them away.
    pub(crate) fn set_source(&mut self, source: Arc<dyn PageSource>) {
        self.source = Some(source);
    }

    /// Reads the pages of index rows `wanted` (most wanted first) back into memory, as many as the budget has room for
    /// beside each other, and marks them as used.
    pub(super) fn bring(&mut self, wanted: &[usize]) {
        let used = self.tick();
        let pages: Vec<u64> = wanted.iter().map(|row| self.order[*row]).collect();
        let mut missing = Vec::new();
        for page in &pages {
            if let Some(stored) = self.pages.get_mut(page) {
                stored.used = used;
                if stored.bytes.is_none() && stored.durable {
                    missing.push(*page);
                }
            }
        }
        if missing.is_empty() {
            return;
        }
        let mut kept = pages;
        kept.sort_unstable();
        for page in missing {
            if !self.make_room(self.page_bytes(), &kept, false) {
                return;
            }
            let read = self.source.as_ref().map(|source| source.page(page));
            let bytes = match read {
                Some(Ok(Some(bytes))) => self.encoded(bytes),
                Some(Err(error)) => {
                    tracing::warn!(page, %error, "a stored page cannot be read: it is recalled no more");
                    None
                }
                _ => None,
            };
            let Some(stored) = self.pages.get_mut(&page) else { continue };
            match bytes {
                Some((bytes, _)) => {
                    self.resident_bytes += bytes.len() as u64;
                    stored.bytes = Some(bytes);
                }
                // Its landmarks stay, so that rows keep their places; no token of it can be chosen.
                None => stored.durable = false,
            }
        }
    }

    /// A page from the disk in this store's precision, with its token ids; None if it is of another shape.
    fn encoded(&self, mut bytes: Vec<u8>) -> Option<Encoded> {
        use super::PagePrecision::{Bf16, F32, Int4, Int8};
        let d = self.shape.head_dim;
        let num_rows = self.shape.num_layers * 2 * self.shape.num_kv_heads * PAGE_TOKENS;
        let mut tokens = Box::new([u32::MAX; PAGE_TOKENS]);
        let ids_bytes = PAGE_TOKENS * 4;
        // The window writes f32 without ids.
        if bytes.len() != num_rows * F32.row_bytes(d) {
            let ids = bytes.split_off(bytes.len().checked_sub(ids_bytes)?);
            let (ids, _) = ids.as_chunks::<4>();
            tokens.iter_mut().zip(ids).for_each(|(token, id)| *token = u32::from_le_bytes(*id));
        }
        let own = self.config.precision;
        if bytes.len() == num_rows * own.row_bytes(d) {
            return Some((bytes.into_boxed_slice(), tokens));
        }
        let has_len = |p: &super::PagePrecision| bytes.len() == num_rows * p.row_bytes(d);
        let written = [F32, Bf16, Int8, Int4].into_iter().find(has_len)?;
        let mut out = vec![0; num_rows * own.row_bytes(d)];
        let mut numbers = vec![0f32; d];
        let rows = bytes.chunks_exact(written.row_bytes(d));
        for (row, out) in rows.zip(out.chunks_exact_mut(own.row_bytes(d))) {
            written.decode(row, &mut numbers);
            own.encode(&numbers, out);
        }
        Some((out.into_boxed_slice(), tokens))
    }

    /// Pages that the disk was not given yet, as bytes: keys and values, then token ids.
    pub(crate) fn fresh_pages(&self) -> Vec<(u64, Vec<u8>)> {
        let fresh = self.pages.iter().filter(|(_, stored)| !stored.given);
        fresh
            .filter_map(|(page, stored)| {
                let mut bytes = stored.bytes.as_ref()?.to_vec();
                bytes.extend(stored.tokens.iter().flat_map(|id| id.to_le_bytes()));
                Some((*page, bytes))
            })
            .collect()
    }

    /// Says that every page was given to the disk, which has those of `durable` (ascending) and no other.
    pub(crate) fn set_durable(&mut self, durable: &[u64]) {
        for (page, stored) in &mut self.pages {
            stored.durable = durable.binary_search(page).is_ok();
            stored.given = true;
        }
    }

    /// Bytes of pages that the disk was not given yet.
    pub(crate) fn fresh_bytes(&self) -> u64 {
        let fresh = self.pages.values().filter(|stored| !stored.given);
        fresh.filter_map(|stored| stored.bytes.as_ref()).map(|bytes| bytes.len() as u64).sum()
    }

    /// Fills an empty store from the disk with pages `stored` (ascending) below `end`, where the window begins; `noted`
    /// are the ids of the window's tokens.
    ///
    /// Pages that there is no room for keep their landmarks alone.
    pub(crate) fn restore(&mut self, stored: &[u64], end: u64, noted: &[u32]) -> Result<()> {
        self.note_tokens(end * PAGE_TOKENS as u64, noted);
        self.next.fill(end.max(SINK_PAGES));
        let Some(source) = self.source.clone() else { return Ok(()) };
        for page in stored.iter().copied().filter(|page| (SINK_PAGES..end).contains(page)) {
            let Some(bytes) = source.page(page)? else { continue };
            let Some((bytes, tokens)) = self.encoded(bytes) else { continue };
            if !self.make_room(self.page_bytes() + self.index_bytes(), &[], true) {
                break;
            }
            self.resident_bytes += bytes.len() as u64;
            let used = self.tick();
            let (bytes, durable, given) = (Some(bytes), true, true);
            self.pages.insert(page, Stored { bytes, tokens, durable, given, used });
            self.order.push(page);
            for layer in 0..self.shape.num_layers {
                self.index_page(layer, page);
            }
        }
        Ok(())
    }
}
