//! Reading stored pages back from the disk: mapped for host memory, or read for a device.
//! Knows no file and no attention rule: pages come through [`PageSource`].

use super::PagePrecision::{self, Bf16, F32, Int4, Int8};
use super::store::{PageStore, Stored};
use crate::error::Result;
use mka_kernels::PAGE_TOKENS;
use mka_memory::PageBytes;
use rayon::prelude::*;
use std::sync::Arc;

/// Where pages lie that host memory has no room for.
pub(crate) trait PageSource: Send + Sync {
    /// The bytes of a page as `FreshPage::to_new` gave them, or as the window wrote them; None if it is gone.
    fn page(&self, page: u64) -> Result<Option<Vec<u8>>>;

    /// [`PageSource::page`] into `out`, if it is just as long; its length, and None if it is gone.
    fn page_into(&self, page: u64, out: &mut [u8]) -> Result<Option<usize>> {
        let Some(bytes) = self.page(page)? else { return Ok(None) };
        if bytes.len() == out.len() {
            out.copy_from_slice(&bytes);
        }
        Ok(Some(bytes.len()))
    }

    /// [`PageSource::page`] where it lies, if the program's memory need not hold it.
    fn page_in_place(&self, page: u64) -> Result<Option<PageBytes>> {
        Ok(self.page(page)?.map(PageBytes::from))
    }

    /// The bytes of a page's landmarks as [`PageStore::fresh_landmarks`] gave them; None if there are none.
    fn landmarks(&self, page: u64) -> Result<Option<Vec<u8>>>;
}

/// Of a page's token ids.
pub(super) const IDS_BYTES: usize = PAGE_TOKENS * 4;

/// Keys and values of a page in the store's precision, and its token ids.
type Encoded = (Vec<u8>, Box<[u32; PAGE_TOKENS]>);

impl PageStore {
    /// Says where pages are read from once the budget has sent them away.
    pub(crate) fn set_source(&mut self, source: Arc<dyn PageSource>) {
        self.source = Some(source);
    }

    /// Notes that the wanted pages of the first `rows` are read now, in one walk; false where one of them must be brought
    /// from the disk first.
    pub(super) fn touch(&mut self, is_wanted: impl Fn(usize) -> bool, rows: usize) -> bool {
        let used = self.tick();
        let mut are_there = true;
        // Rows and pages are in the same order, and every page has a row once its layers are in.
        let pages = self.pages.values_mut().take(rows).enumerate();
        for (_, stored) in pages.filter(|(row, _)| is_wanted(*row)) {
            stored.used = used;
            are_there &= stored.bytes.is_some() || !stored.durable;
        }
        are_there
    }

    /// Brings the pages of index rows `wanted` (most wanted first) back, mapped if they can be, as many as the budget has room for
    /// beside each other, and marks them as used.
    pub(super) fn bring(&mut self, wanted: &[usize]) {
        let used = self.tick();
        let pages: Vec<u64> = wanted.iter().map(|row| self.order[*row]).collect();
        let is_missing = |stored: &Stored| stored.bytes.is_none() && stored.durable;
        let mut are_there = true;
        for page in &pages {
            if let Some(stored) = self.pages.get_mut(page) {
                stored.used = used;
                are_there &= !is_missing(stored);
            }
        }
        if are_there {
            return;
        }
        // A page makes room by what is wanted less, and never by what is wanted more.
        let (mut kept, mut missing) = (Vec::with_capacity(pages.len()), Vec::new());
        for page in pages {
            // Two heads may want the same.
            let Err(at) = kept.binary_search(&page) else { continue };
            kept.insert(at, page);
            if self.pages.get(&page).is_some_and(is_missing) {
                let bytes = (missing.len() + 1) * self.page_bytes();
                if !self.make_room(bytes, 0, &kept, false) {
                    break;
                }
                missing.push(page);
            }
        }
        let read: Vec<Option<PageBytes>> =
            missing.par_iter().map(|page| self.page_in_place(*page)).collect();
        for (page, read) in missing.into_iter().zip(read) {
            let Some(stored) = self.pages.get_mut(&page) else { continue };
            match read {
                Some(bytes) => {
                    self.resident_bytes += bytes.len() as u64;
                    stored.bytes = Some(Arc::new(bytes));
                }
                // Its landmarks stay, so that rows keep their places; no token of it can be chosen.
                None => stored.durable = false,
            }
        }
    }

    /// Keys and values of a page where they lie on the disk, or in memory where they are not in this store's precision
    /// there; None, with a warning, where they cannot be read.
    fn page_in_place(&self, page: u64) -> Option<PageBytes> {
        let read = self.source.as_ref()?.page_in_place(page);
        self.usable(page, read, |mut bytes| {
            if bytes.len() != self.page_bytes() + IDS_BYTES {
                return self.encoded(bytes.to_vec()).map(|(bytes, _)| bytes.into());
            }
            bytes.truncate(self.page_bytes());
            Some(bytes)
        })
    }

    /// A page from the disk; None, with a warning, where it cannot be read.
    pub(super) fn read_page(&self, page: u64) -> Option<Encoded> {
        self.usable(page, self.source.as_ref()?.page(page), |bytes| self.encoded(bytes))
    }

    /// What `of` makes of what was `read` of a page; None, with a warning, where it is not there or of another shape.
    fn usable<T, U>(
        &self,
        page: u64,
        read: Result<Option<T>>,
        of: impl FnOnce(T) -> Option<U>,
    ) -> Option<U> {
        let usable = match read {
            Ok(Some(bytes)) => of(bytes).ok_or("it is of another shape".to_owned()),
            Ok(None) => Err("it is not on the disk".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let warn = |why: &String| tracing::warn!(page, %why, "a stored page cannot be read");
        usable.inspect_err(warn).ok()
    }

    /// Reads a page from the disk as it lies there into `out`, keys and values in this store's precision with the token ids
    /// behind them; false where it is of another length or cannot be read, which [`PageStore::read_page`] says.
    pub(super) fn read_page_into(&self, page: u64, out: &mut [u8]) -> bool {
        let Some(source) = &self.source else { return false };
        let len = out.len();
        len == self.page_bytes() + IDS_BYTES
            && source.page_into(page, out).is_ok_and(|read| read == Some(len))
    }

    /// Whether a page's bytes are those that the window wrote: f32 without ids.
    fn is_window(&self, bytes: &[u8]) -> bool {
        let num_rows = self.shape.num_layers * 2 * self.shape.num_kv_heads * PAGE_TOKENS;
        bytes.len() == num_rows * F32.row_bytes(self.shape.head_dim)
    }

    /// A page from the disk in this store's precision, with its token ids; None if it is of another shape.
    fn encoded(&self, mut bytes: Vec<u8>) -> Option<Encoded> {
        let d = self.shape.head_dim;
        let num_rows = self.shape.num_layers * 2 * self.shape.num_kv_heads * PAGE_TOKENS;
        let mut tokens = Box::new([u32::MAX; PAGE_TOKENS]);
        if !self.is_window(&bytes) {
            let ids = bytes.split_off(bytes.len().checked_sub(IDS_BYTES)?);
            let (ids, _) = ids.as_chunks::<4>();
            tokens.iter_mut().zip(ids).for_each(|(token, id)| *token = u32::from_le_bytes(*id));
        }
        let own = self.config.precision;
        if bytes.len() == num_rows * own.row_bytes(d) {
            bytes.shrink_to_fit();
            return Some((bytes, tokens));
        }
        let has_len = |p: &PagePrecision| bytes.len() == num_rows * p.row_bytes(d);
        let written = [F32, Bf16, Int8, Int4].into_iter().find(has_len)?;
        let mut out = vec![0; num_rows * own.row_bytes(d)];
        let mut numbers = vec![0f32; d];
        let rows = bytes.chunks_exact(written.row_bytes(d));
        for (row, out) in rows.zip(out.chunks_exact_mut(own.row_bytes(d))) {
            written.decode(row, &mut numbers);
            own.encode(&numbers, out);
        }
        Some((out, tokens))
    }
}
