//! The way of pages from the window into the store: room, bytes, landmarks, the device's copy.
//! Knows no pool and no disk; keys and values come as the device gives them.

use super::index::HeadIndex;
use super::rivals::first_of_block;
use super::store::{PageStore, Stored};
use super::{Number, PageConfig, PagePrecision};
use mka_kernels::PAGE_TOKENS;
use mka_kernels::key_codes::Rotation;
use mka_memory::PageBytes;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

impl PageStore {
    /// Whether pages are taken in as bf16: rounded on the device they are half as many bytes for the host to fetch.
    pub(crate) fn takes_bf16(&self) -> bool {
        self.config.precision == PagePrecision::Bf16 && !self.device.is_cpu()
    }

    /// Takes in `pages`, which left the window, of `layers`: for each layer the keys before RoPE, then the values, (pages,
    /// num_kv_heads, PAGE_TOKENS, d) each.
    ///
    /// With the first layer room is made: what the budget has no room for goes, least used or oldest first, or is not taken in.
    pub(crate) fn absorb<T: Number>(
        &mut self,
        layers: Range<usize>,
        pages: Range<u64>,
        numbers: &[T],
    ) {
        self.next[layers.clone()].fill(pages.end);
        if layers.start == 0 {
            pages.clone().for_each(|page| self.begin_page(page));
        }
        self.fill_pages(layers.clone(), pages.clone(), numbers);
        let there: Vec<u64> = self.pages.range(pages).map(|(page, _)| *page).collect();
        let naming = there.iter().filter(|page| HeadIndex::names_at(**page));
        let rows: Vec<usize> =
            naming.map(|page| self.order.partition_point(|own| own <= page)).collect();
        let named = |layer| rows.iter().map(|rows| self.least_agreeing(layer, *rows)).collect();
        let named: Vec<Vec<_>> = layers.clone().into_par_iter().map(named).collect();
        for (layer, named) in layers.zip(named) {
            there.iter().for_each(|page| self.follow(layer, *page));
            named.iter().for_each(|named| self.set_outliers(layer, named));
            // A choice would upload them, and wait for what the device does by then.
            let least = if self.active { 1 } else { super::device::BATCH_PAGES };
            self.mirror_layer(layer, least);
        }
    }

    /// Makes room for a page and adds it, still without numbers, if there is room.
    fn begin_page(&mut self, page: u64) {
        let tokens = self.recent.remove(&page).unwrap_or_else(|| Box::new([u32::MAX; 64]));
        self.keep_index_share(1);
        if !self.make_room(self.page_bytes(), 1, &[], true) {
            return;
        }
        let bytes = vec![0; self.page_bytes()];
        self.resident_bytes += bytes.len() as u64;
        let used = self.tick();
        let bytes = Some(Arc::new(PageBytes::from(bytes)));
        let (durable, given, marked) = (false, false, false);
        self.pages.insert(page, Stored { bytes, tokens, durable, given, marked, used });
        self.order.push(page);
    }

    /// Writes the numbers of [`PageStore::absorb`] into the pages and adds their landmarks; layers side by side, for none
    /// looks at another's.
    fn fill_pages<T: Number>(&mut self, layers: Range<usize>, pages: Range<u64>, numbers: &[T]) {
        let (precision, d) = (self.config.precision, self.shape.head_dim);
        let (count, num_layers) = ((pages.end - pages.start) as usize, layers.len());
        let page_len = self.shape.num_kv_heads * PAGE_TOKENS * d;
        let layer_bytes = self.layer_bytes();
        let rules = IndexRules::new(&self.config, d, &self.rotation);
        let mut parts: Vec<Vec<(usize, &mut [u8])>> = (0..num_layers).map(|_| Vec::new()).collect();
        for (page, stored) in self.pages.range_mut(pages.clone()) {
            let Some(bytes) = &mut stored.bytes else { continue };
            let own =
                Arc::make_mut(bytes).to_mut().chunks_exact_mut(layer_bytes).skip(layers.start);
            let at = (page - pages.start) as usize;
            parts.iter_mut().zip(own).for_each(|(parts, bytes)| parts.push((at, bytes)));
        }
        let numbers = numbers.par_chunks_exact((2 * count * page_len).max(1));
        let layers = parts.into_par_iter().zip(&mut self.index[layers]).zip(numbers);
        layers.for_each(|((parts, index), numbers)| {
            for (at, bytes) in parts {
                for (kind, half) in bytes.chunks_exact_mut(layer_bytes / 2).enumerate() {
                    let numbers = &numbers[(kind * count + at) * page_len..][..page_len];
                    T::encode_rows(precision, numbers, d, half);
                }
                rules.add(index, bytes);
            }
        });
    }

    /// Bytes of one page's keys and values in one layer.
    fn layer_bytes(&self) -> usize {
        let rows = 2 * self.shape.num_kv_heads * PAGE_TOKENS;
        rows * self.config.precision.row_bytes(self.shape.head_dim)
    }

    /// Adds the landmarks of a page whose bytes are there.
    pub(super) fn index_page(&mut self, layer: usize, page: u64) {
        let mut index = std::mem::take(&mut self.index[layer]);
        let layer_bytes = self.layer_bytes();
        let bytes = self.pages.get(&page).and_then(|stored| stored.bytes.as_ref());
        if let Some(bytes) = bytes {
            let rules = IndexRules::new(&self.config, self.shape.head_dim, &self.rotation);
            rules.add(&mut index, &bytes[layer * layer_bytes..][..layer_bytes]);
        }
        self.index[layer] = index;
        self.follow(layer, page);
    }

    /// Tells InfLLM's rule that a page has left the window.
    fn follow(&mut self, layer: usize, page: u64) {
        if self.following.is_none() || self.index[layer].is_empty() {
            return;
        }
        // Of a session that was opened again the block's first page may be on disk alone.
        let first = first_of_block(page);
        if let Some(row) = (first < page).then(|| self.order.binary_search(&first).ok()).flatten() {
            self.bring(&[row]);
        }
        let Some(mut following) = self.following.take() else { return };
        if let Err(error) = following.sum_waiting(layer) {
            tracing::warn!(%error, layer, "queries that follow a block cannot be fetched");
        }
        following.choose(layer, page, &|page, head, keys: &mut [f32]| {
            self.read_rows(page, layer, 0, head, 0, keys)
        });
        self.following = Some(following);
    }
}

/// What is kept of a page's rows in the index.
struct IndexRules<'a> {
    precision: PagePrecision,
    d: usize,
    rotation: Option<&'a Rotation>,
    has_means: bool,
}

impl<'a> IndexRules<'a> {
    fn new(config: &PageConfig, d: usize, rotation: &'a Option<Rotation>) -> Self {
        let (precision, has_means) = (config.precision, config.estimate);
        Self { precision, d, rotation: rotation.as_ref(), has_means }
    }

    /// Adds the landmarks of one layer of a page to those of its heads, made of what will be read back: `bytes` are keys,
    /// then values, (heads, PAGE_TOKENS) rows each. Nothing for a layer that chooses nothing.
    fn add(&self, heads: &mut [HeadIndex], bytes: &[u8]) {
        let d = self.d;
        let head_bytes = PAGE_TOKENS * self.precision.row_bytes(d);
        let (keys, values) = bytes.split_at(bytes.len() / 2);
        let rows = keys.chunks_exact(head_bytes).zip(values.chunks_exact(head_bytes));
        let (mut keys, mut values) = (vec![0f32; PAGE_TOKENS * d], Vec::new());
        for (own, (key_bytes, value_bytes)) in heads.iter_mut().zip(rows) {
            self.precision.decode_rows(key_bytes, d, &mut keys);
            own.push(&keys, d);
            if let Some(rotation) = self.rotation {
                own.push_codes(&keys, rotation);
            }
            if self.has_means {
                values.resize(PAGE_TOKENS * d, 0.0);
                self.precision.decode_rows(value_bytes, d, &mut values);
                own.push_means(&keys, &values, d);
            }
        }
    }
}
