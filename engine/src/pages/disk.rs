//! The way of stored pages to the disk and back: what a commit takes along, what an opening finds.
//! Knows no file and no attention rule; pages that the budget sends away are read back through [`PageSource`].

use super::index::{HeadIndex, MARKS, SPAN};
use super::landmarks::{LandmarkShape, Landmarks, NewLandmarks, OutlierAt};
use super::store::{PageStore, Stored};
use crate::cache::SINK_PAGES;
use crate::error::Result;
use mka_kernels::{PAGE_TOKENS, rows};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

/// Pages whose landmarks are read side by side: 23 MB of the default model's.
const READ_PAGES: usize = 256;

/// Where pages lie that host memory has no room for.
pub(crate) trait PageSource: Send + Sync {
    /// The bytes of a page as [`FreshPage::to_bytes`] gave them, or as the window wrote them; None if it is gone.
    fn page(&self, page: u64) -> Result<Option<Vec<u8>>>;

    /// [`PageSource::page`] in the memory of `out`; false if it is gone.
    fn page_into(&self, page: u64, out: &mut Vec<u8>) -> Result<bool> {
        let read = self.page(page)?;
        Ok(read.map(|bytes| *out = bytes).is_some())
    }

    /// The bytes of a page's landmarks as [`PageStore::fresh_landmarks`] gave them; None if there are none.
    fn landmarks(&self, page: u64) -> Result<Option<Vec<u8>>>;
}

/// A page that the disk is to get.
pub(crate) struct FreshPage {
    bytes: Arc<Vec<u8>>,
    tokens: Box<[u32; PAGE_TOKENS]>,
}

impl FreshPage {
    /// Keys and values, then token ids.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes.len() + PAGE_TOKENS * 4);
        bytes.extend_from_slice(&self.bytes);
        bytes.extend(self.tokens.iter().flat_map(|id| id.to_le_bytes()));
        bytes
    }
}

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
        let mut room = 0;
        while room < missing.len()
            && self.make_room((room + 1) * self.page_bytes(), 0, &kept, false)
        {
            room += 1;
        }
        missing.truncate(room);
        let read: Vec<Option<Encoded>> =
            missing.par_iter().map(|page| self.read_page(*page)).collect();
        for (page, read) in missing.into_iter().zip(read) {
            let Some(stored) = self.pages.get_mut(&page) else { continue };
            match read {
                Some((bytes, _)) => {
                    self.resident_bytes += bytes.len() as u64;
                    stored.bytes = Some(Arc::new(bytes));
                }
                // Its landmarks stay, so that rows keep their places; no token of it can be chosen.
                None => stored.durable = false,
            }
        }
    }

    /// A page from the disk; None, with a warning, where it cannot be read.
    fn read_page(&self, page: u64) -> Option<Encoded> {
        match self.source.as_ref()?.page(page) {
            Ok(bytes) => self.encoded(bytes?),
            Err(error) => {
                not_read(page, &error);
                None
            }
        }
    }

    /// Reads the numbers of a page from the disk into `out`, in this store's precision; false, with a warning, where it
    /// cannot be read.
    pub(super) fn read_page_into(&self, page: u64, out: &mut Vec<u8>) -> bool {
        let Some(source) = &self.source else { return false };
        match source.page_into(page, out) {
            Ok(false) => {
                not_read(page, &"it is not on the disk");
                false
            }
            Ok(true)
                if out.len() == self.page_bytes() + PAGE_TOKENS * 4 && !self.is_window(out) =>
            {
                out.truncate(self.page_bytes());
                true
            }
            Ok(true) => {
                let encoded = self.encoded(std::mem::take(out));
                if encoded.is_none() {
                    not_read(page, &"it is of another shape");
                }
                encoded.map(|(bytes, _)| *out = bytes).is_some()
            }
            Err(error) => {
                not_read(page, &error);
                false
            }
        }
    }

    /// Whether a page's bytes are those that the window wrote: f32 without ids.
    fn is_window(&self, bytes: &[u8]) -> bool {
        let num_rows = self.shape.num_layers * 2 * self.shape.num_kv_heads * PAGE_TOKENS;
        bytes.len() == num_rows * super::PagePrecision::F32.row_bytes(self.shape.head_dim)
    }

    /// A page from the disk in this store's precision, with its token ids; None if it is of another shape.
    fn encoded(&self, mut bytes: Vec<u8>) -> Option<Encoded> {
        use super::PagePrecision::{Bf16, F32, Int4, Int8};
        let d = self.shape.head_dim;
        let num_rows = self.shape.num_layers * 2 * self.shape.num_kv_heads * PAGE_TOKENS;
        let mut tokens = Box::new([u32::MAX; PAGE_TOKENS]);
        let ids_bytes = PAGE_TOKENS * 4;
        if !self.is_window(&bytes) {
            let ids = bytes.split_off(bytes.len().checked_sub(ids_bytes)?);
            let (ids, _) = ids.as_chunks::<4>();
            tokens.iter_mut().zip(ids).for_each(|(token, id)| *token = u32::from_le_bytes(*id));
        }
        let own = self.config.precision;
        if bytes.len() == num_rows * own.row_bytes(d) {
            bytes.shrink_to_fit();
            return Some((bytes, tokens));
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
        Some((out, tokens))
    }

    /// Pages that the disk was not given yet; their bytes are shared, not copied.
    pub(crate) fn fresh_pages(&self) -> Vec<(u64, FreshPage)> {
        let fresh = self.pages.iter().filter(|(_, stored)| !stored.given);
        fresh
            .filter_map(|(page, stored)| {
                let bytes = stored.bytes.clone()?;
                Some((*page, FreshPage { bytes, tokens: stored.tokens.clone() }))
            })
            .collect()
    }

    /// What landmarks are made under.
    fn landmark_shape(&self) -> LandmarkShape {
        LandmarkShape {
            precision: self.config.precision,
            has_means: self.config.estimate,
            has_codes: self.rotation.is_some(),
            has_representatives: self.following.is_some(),
            first_layer: self.config.first_layer.min(self.shape.num_layers),
            num_layers: self.shape.num_layers,
            num_kv_heads: self.shape.num_kv_heads,
            head_dim: self.shape.head_dim,
        }
    }

    /// Index rows and numbers of the pages whose landmarks the disk is to get.
    fn unmarked(&self) -> impl Iterator<Item = (usize, u64)> {
        let is_unmarked = |page: &u64| {
            let stored = self.pages.get(page);
            stored.is_some_and(|stored| !stored.marked && (stored.durable || !stored.given))
        };
        self.order.iter().copied().enumerate().filter(move |(_, page)| is_unmarked(page))
    }

    /// Landmarks that the disk was not given yet, as bytes by page; the last of them has the keys of the outliers that it
    /// was not given.
    pub(crate) fn fresh_landmarks(&self) -> Vec<(u64, Vec<u8>)> {
        let shape = self.landmark_shape();
        let d = self.shape.head_dim;
        let mut records = Vec::new();
        for (row, page) in self.unmarked() {
            let mut rows = Vec::new();
            self.index.iter().flatten().for_each(|head| head.write_row(row, d, &mut rows));
            let following = self.following.as_ref();
            let means = following.map(|own| own.means_of(page, shape.first_layer));
            let tokens = &self.pages[&page].tokens;
            records
                .push((page, NewLandmarks::new(&shape, tokens, &rows, &means.unwrap_or_default())));
        }
        let mut outliers: Vec<(OutlierAt, &[u8])> = Vec::new();
        for (layer, heads) in self.index.iter().enumerate() {
            for (head, own) in heads.iter().enumerate() {
                let place = |mark: u32| self.place(mark);
                outliers
                    .extend(own.unsaved(d).map(|(mark, keys)| ((layer, head, place(mark)), keys)));
            }
        }
        let last = records.len().saturating_sub(1);
        let records = records.into_iter().enumerate();
        records
            .map(|(i, (page, record))| {
                (page, record.into_bytes(if i == last { &outliers } else { &[] }))
            })
            .collect()
    }

    /// Where a landmark of the index stands in the stream: the position of its first key over SPAN.
    fn place(&self, mark: u32) -> u64 {
        let (row, mark) = (mark as usize / MARKS, mark as usize % MARKS);
        self.order[row] * MARKS as u64 + mark as u64
    }

    /// Says that every page and all landmarks are given to the disk; what it has of them, [`PageStore::set_durable`] says.
    /// The pages that it was not given before.
    pub(crate) fn hand_over(&mut self) -> Vec<u64> {
        if self.unmarked().next().is_some() {
            self.index.iter_mut().flatten().for_each(|head| head.set_saved(|_| true));
        }
        let fresh = self.pages.iter_mut().filter(|(_, stored)| !stored.given);
        let give = |(page, stored): (&u64, &mut Stored)| {
            stored.given = true;
            *page
        };
        fresh.map(give).collect()
    }

    /// Says that the disk did not get `pages`, as [`PageStore::hand_over`] gave them, nor any landmarks. Keys of outliers
    /// that it had before are written twice.
    pub(crate) fn not_handed_over(&mut self, pages: &[u64]) {
        self.index.iter_mut().flatten().for_each(|head| head.forget_saved());
        for page in pages {
            if let Some(stored) = self.pages.get_mut(page) {
                stored.given = false;
            }
        }
    }

    /// Says that of the pages that it was given the disk has those of `durable` (ascending) and no other, and the landmarks
    /// of those of `marked` (ascending).
    pub(crate) fn set_durable(&mut self, durable: &[u64], marked: &[u64]) {
        for (page, stored) in self.pages.iter_mut().filter(|(_, stored)| stored.given) {
            stored.durable = durable.binary_search(page).is_ok();
            stored.marked = marked.binary_search(page).is_ok();
        }
    }

    /// Bytes of pages that the disk was not given yet.
    pub(crate) fn fresh_bytes(&self) -> u64 {
        let fresh = self.pages.values().filter(|stored| !stored.given);
        fresh.filter_map(|stored| stored.bytes.as_ref()).map(|bytes| bytes.len() as u64).sum()
    }

    /// Whether the budget holds the index and three times what the disk was not given yet: a commit of it under way, as much
    /// again that comes meanwhile, and the index over that.
    pub(crate) fn holds_a_commit(&self) -> bool {
        self.index_bytes(self.pages.len()) + 3 * self.fresh_bytes() <= self.config.bytes
    }

    /// Fills an empty store from the disk with pages `stored` (ascending) below `end`, where the window begins; `noted`
    /// are the ids of the window's tokens.
    ///
    /// Landmarks are read, and pages only where they have none; the others are read once they are wanted.
    pub(crate) fn restore(&mut self, stored: &[u64], end: u64, noted: &[u32]) {
        self.note_tokens(end * PAGE_TOKENS as u64, noted);
        self.next.fill(end.max(SINK_PAGES));
        let Some(source) = self.source.clone() else { return };
        let (mut known, mut remade) = (HashMap::new(), 0);
        let is_outside = |page: &u64| (SINK_PAGES..end).contains(page);
        let pages: Vec<u64> = stored.iter().copied().filter(is_outside).collect();
        if self.bytes_with(0, pages.len()) <= self.config.bytes {
            let (d, asked) = (self.shape.head_dim, self.asked_of_rows());
            self.index.iter_mut().flatten().for_each(|head| head.reserve(pages.len(), d, asked));
        }
        'pages: for pages in pages.chunks(READ_PAGES) {
            let landmarks: Vec<_> =
                pages.par_iter().map(|page| read_landmarks(&*source, *page)).collect();
            let shape = self.landmark_shape();
            let read = landmarks.iter().map(|it| Landmarks::read(it.as_deref()?, &shape));
            let read: Vec<Option<Landmarks<'_>>> = read.collect();
            if let Some(all) = self.whole(&read) {
                self.take_in_together(pages, &all, &mut known);
                continue;
            }
            for (page, read) in pages.iter().zip(read) {
                let has_room = match read {
                    Some(landmarks) => self.take_in(*page, &landmarks, &mut known),
                    None => {
                        remade += 1;
                        self.remake(*page)
                    }
                };
                if !has_room {
                    break 'pages;
                }
            }
        }
        if self.following.is_some() && remade > 0 {
            tracing::warn!(
                pages = remade,
                "stored without InfLLM's representatives: all keys of a block stand for it"
            );
        }
        self.name_restored(&known);
        self.fill_mirror();
    }

    /// The landmarks of a run of pages if each has some and there is room for all of them.
    fn whole<'a, 'b>(&self, read: &'a [Option<Landmarks<'b>>]) -> Option<Vec<&'a Landmarks<'b>>> {
        let has_room = self.bytes_with(0, read.len()) <= self.config.bytes;
        read.iter().map(Option::as_ref).collect::<Option<_>>().filter(|_| has_room)
    }

    /// Takes in a page by its landmarks; false where there is no room. Outliers are added to `known`.
    fn take_in(
        &mut self,
        page: u64,
        landmarks: &Landmarks<'_>,
        known: &mut HashMap<OutlierAt, Box<[u8]>>,
    ) -> bool {
        if !self.make_room(0, 1, &[], true) {
            return false;
        }
        self.take_in_together(&[page], &[landmarks], known);
        true
    }

    /// Takes in pages that there is room for by their landmarks, heads side by side.
    fn take_in_together(
        &mut self,
        pages: &[u64],
        landmarks: &[&Landmarks<'_>],
        known: &mut HashMap<OutlierAt, Box<[u8]>>,
    ) {
        for (page, landmarks) in pages.iter().zip(landmarks) {
            let (tokens, used) = (landmarks.tokens.clone(), self.tick());
            let (durable, given, marked) = (true, true, true);
            self.pages.insert(*page, Stored { bytes: None, tokens, durable, given, marked, used });
            self.order.push(*page);
            if let Some(following) = &mut self.following {
                following.restore(*page, &landmarks.representatives());
            }
            landmarks.outliers(known);
        }
        let (d, asked) = (self.shape.head_dim, self.asked_of_rows());
        let heads: Vec<_> = self.index.iter_mut().flatten().enumerate().collect();
        heads.into_par_iter().for_each(|(at, head)| {
            landmarks.iter().for_each(|landmarks| head.push_row(landmarks.row(at), d, asked));
        });
    }

    /// Whether rows have means, and whether codes are taken in with them.
    fn asked_of_rows(&self) -> (bool, bool) {
        (self.config.estimate, self.rotation.is_some())
    }

    /// Takes in a page whose landmarks are to be made from it; false where there is no room. A page that cannot be read is
    /// passed over.
    fn remake(&mut self, page: u64) -> bool {
        let Some((bytes, tokens)) = self.read_page(page) else { return true };
        if !self.make_room(self.page_bytes(), 1, &[], true) {
            return false;
        }
        self.resident_bytes += bytes.len() as u64;
        let used = self.tick();
        let (bytes, durable, given, marked) = (Some(Arc::new(bytes)), true, true, false);
        self.pages.insert(page, Stored { bytes, tokens, durable, given, marked, used });
        self.order.push(page);
        (0..self.shape.num_layers).for_each(|layer| self.index_page(layer, page));
        true
    }

    /// Names the outliers as they were named last, with their keys from `known` or else from their pages.
    fn name_restored(&mut self, known: &HashMap<OutlierAt, Box<[u8]>>) {
        let (d, pages) = (self.shape.head_dim, self.named_rows());
        let mut index = std::mem::take(&mut self.index);
        let name = |(layer, heads): (usize, &mut Vec<_>)| -> Vec<Vec<u32>> {
            let heads = heads.iter_mut().enumerate();
            let name = |(head, own): (usize, &mut HeadIndex)| {
                let keys_of = |mark: usize| {
                    let keys = known.get(&(layer, head, self.place(mark as u32)))?;
                    let mut out = vec![0f32; SPAN * d];
                    rows::widen_bf16(keys, &mut out);
                    Some(out)
                };
                let named = own.least_agreeing(pages);
                own.name_outliers(&named, d, keys_of);
                own.set_saved(|_| true);
                named
            };
            heads.map(name).collect()
        };
        let named: Vec<_> = index.par_iter_mut().enumerate().map(name).collect();
        self.index = index;
        // Those that no record had.
        for (layer, named) in named.iter().enumerate() {
            self.set_outliers(layer, named);
        }
    }
}

fn not_read(page: u64, error: &dyn std::fmt::Display) {
    tracing::warn!(page, %error, "a stored page cannot be read: it is recalled no more");
}

/// A page's landmarks as the disk has them; None, with a warning where they are damaged, if they must be made anew.
fn read_landmarks(source: &dyn PageSource, page: u64) -> Option<Vec<u8>> {
    source.landmarks(page).unwrap_or_else(|error| {
        tracing::warn!(page, %error, "landmarks of a stored page are made anew");
        None
    })
}
