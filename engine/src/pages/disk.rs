//! What a commit takes along of stored pages and their landmarks, and what it says of them afterwards.
//! Knows no file and no attention rule.

use super::index::MARKS;
use super::landmarks::{LandmarkShape, NewLandmarks, OutlierAt};
use super::store::{PageStore, Stored, WAITING_PART};
use mka_kernels::PAGE_TOKENS;
use mka_memory::{NewPage, PageBytes};
use std::sync::Arc;

/// A page that the disk is to get.
pub(crate) struct FreshPage {
    bytes: Arc<PageBytes>,
    tokens: Box<[u32; PAGE_TOKENS]>,
}

impl FreshPage {
    /// Keys and values, which the store of pages holds too, then token ids.
    pub(crate) fn to_new(&self) -> NewPage {
        let ids = self.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
        NewPage::new(self.bytes.clone(), ids)
    }
}

impl PageStore {
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
    pub(super) fn landmark_shape(&self) -> LandmarkShape {
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
    pub(super) fn place(&self, mark: u32) -> u64 {
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

    /// Whether so much waits for the disk that the budget would soon have no room for more: over its share, or more than half of
    /// what the index leaves.
    pub(crate) fn is_short_of_room(&self) -> bool {
        let (fresh, budget) = (self.fresh_bytes(), self.config.bytes);
        fresh > budget / WAITING_PART || self.index_bytes(self.pages.len()) + 2 * fresh > budget
    }

    /// Whether the budget holds the index and three times what the disk was not given yet: a commit of it under way, as much
    /// again that comes meanwhile, and the index over that.
    pub(crate) fn holds_a_commit(&self) -> bool {
        self.index_bytes(self.pages.len()) + 3 * self.fresh_bytes() <= self.config.bytes
    }
}
