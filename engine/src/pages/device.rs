//! Stored pages on the model's device, as far as a byte budget goes: what is chosen there needs no copy of keys and
//! makes no layer wait for its queries.
//! Knows the store's rows; host memory and disk have every page too, and choose where the device does not.

pub(super) mod choice;

use super::index::HeadIndex;
use super::rivals::device::Table;
use super::store::PageStore;
use super::{PageConfig, PagePrecision, PageRule, codec};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use mka_kernels::PAGE_TOKENS;
use mka_kernels::recall::{MARKS, Places, SPAN, StoredPages};
use rayon::prelude::*;

/// Pages that wait at most before they are uploaded together.
pub(super) const BATCH_PAGES: usize = 16;

/// The pages of the layers that choose, on one device.
pub(super) struct Mirror {
    device: Device,
    dtype: DType,
    /// Most pages that the budget has room for.
    limit: usize,
    /// None for layers that choose nothing.
    layers: Vec<Option<Layer>>,
    /// The pinned landmarks that were uploaded last, counted from the first page, and where they are.
    pins: (Vec<u32>, Option<Tensor>),
}

struct Layer {
    pages: StoredPages,
    /// What the index had named as outliers when they were uploaded.
    named: u64,
    /// What another system's rule keeps of them.
    table: Table,
}

impl Layer {
    /// Uploads the outliers of the layer's `index`, where others were named since they were uploaded.
    fn name(&mut self, index: &[HeadIndex], d: usize) -> Result<()> {
        let (named, g) = (named(index), index.len());
        if self.named == named {
            return Ok(());
        }
        self.named = named;
        let most = index.iter().map(|head| head.all_outliers().len()).max().unwrap_or(0);
        let mut marks = vec![u32::MAX; g * most];
        let mut keys = vec![0u8; most * SPAN * g * d * 2];
        for (head, index) in index.iter().enumerate() {
            for (i, mark) in index.all_outliers().iter().enumerate() {
                marks[head * most + i] = *mark;
                for key in i * SPAN..(i + 1) * SPAN {
                    let to = (key * g + head) * d * 2;
                    keys[to..to + d * 2].copy_from_slice(index.outlier_keys_bytes(key, 1, d));
                }
            }
        }
        Ok(self.pages.set_outliers(&marks, &keys)?)
    }
}

/// A number that changes with the outliers of a layer and is never 0.
fn named(index: &[HeadIndex]) -> u64 {
    index.iter().map(HeadIndex::named).sum::<u64>() + 1
}

impl Mirror {
    /// None where nothing is chosen or what is not recalled is attended to, the kernels do not take the shape, or there is
    /// no room.
    pub(super) fn new(
        config: &PageConfig,
        (num_layers, num_kv_heads, head_dim): (usize, usize, usize),
        device: &Device,
    ) -> Option<Self> {
        let choosing = num_layers.saturating_sub(config.first_layer);
        if config.rule == PageRule::Streaming || config.estimate || choosing == 0 {
            return None;
        }
        let dtype = match config.precision {
            PagePrecision::F32 => DType::F32,
            _ => DType::BF16,
        };
        let page_bytes = choosing
            * (StoredPages::bytes(1, num_kv_heads, head_dim, dtype)
                + Table::page_bytes(config.rule, num_kv_heads, head_dim));
        let limit = usize::try_from(config.device_bytes).unwrap_or(usize::MAX) / page_bytes.max(1);
        let layer = |layer: usize| {
            let chooses = layer >= config.first_layer;
            let pages = || StoredPages::new(num_kv_heads, head_dim, dtype, device).ok();
            // None for a layer that should choose is no mirror.
            let of = |pages| Layer { pages, named: 0, table: Table::default() };
            chooses.then(pages).map_or(Some(None), |pages| pages.map(of).map(Some))
        };
        if limit < BATCH_PAGES {
            return None;
        }
        let layers = (0..num_layers).map(layer).collect::<Option<_>>()?;
        Some(Self { device: device.clone(), dtype, limit, layers, pins: (Vec::new(), None) })
    }

    /// The same pages in memory of their own; what a rule keeps beside them is made anew.
    pub(super) fn copied(&self) -> Result<Self> {
        let of = |layer: &Layer| -> Result<Layer> {
            let (pages, table) = (layer.pages.copied()?, Table::default());
            Ok(Layer { pages, named: layer.named, table })
        };
        let layers = self.layers.iter().map(|layer| layer.as_ref().map(of).transpose());
        let (layers, pins) = (layers.collect::<Result<_>>()?, (Vec::new(), None));
        Ok(Self { device: self.device.clone(), dtype: self.dtype, limit: self.limit, layers, pins })
    }

    /// Pages of `layer` that were let go at the front.
    #[cfg(test)]
    pub(super) fn gone(&self, layer: usize) -> u64 {
        self.layers[layer].as_ref().map_or(0, |layer| layer.pages.gone() as u64)
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Of keys and values.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether the budget has room for `pages` pages.
    pub(super) fn has_room_for(&self, pages: usize) -> bool {
        pages <= self.limit
    }

    /// Room for `pages` pages more in every layer that chooses; None where the budget has none.
    pub(super) fn places(&mut self, pages: usize) -> Result<Option<Places<'_>>> {
        let layers: Vec<_> = self.layers.iter_mut().flatten().map(|own| &mut own.pages).collect();
        if layers.first().is_some_and(|own| own.len() + pages > self.limit) {
            return Ok(None);
        }
        Ok(Some(Places::new(layers, pages, self.limit)?))
    }

    /// Rows that the last layer's table has room for.
    #[cfg(test)]
    pub(super) fn table_capacity(&self) -> usize {
        self.layers.iter().flatten().last().map_or(0, |layer| layer.table.capacity())
    }

    /// Keeps the first `rows` pages, those before page `end`, and what `rule` keeps of them.
    pub(super) fn truncate(&mut self, rows: usize, end: u64, rule: PageRule) {
        for layer in self.layers.iter_mut().flatten() {
            layer.pages.truncate(rows);
            layer.table.truncate(rule, end);
        }
    }

    /// Lets the first page go.
    pub(super) fn pop_front(&mut self) {
        self.layers.iter_mut().flatten().for_each(|layer| layer.pages.pop_front());
    }
}

impl PageStore {
    /// Uploads what `layer` took in, once `least` pages wait; the mirror goes for good where there is no room for them, a
    /// page was sent away before, or one is missing between others.
    pub(super) fn mirror_layer(&mut self, layer: usize, least: usize) {
        let Some(mut mirror) = self.mirror.take() else { return };
        let uploaded = self.upload(&mut mirror, layer, least.max(1));
        self.keep_mirror(mirror, uploaded);
    }

    /// Lets the pages on the device go for good; whether there were any.
    pub(crate) fn leave(&mut self) -> bool {
        let was_there = self.mirror.take().is_some();
        self.bring_votes();
        was_there
    }

    /// Keeps the mirror if everything was `uploaded`, or says why it goes.
    pub(super) fn keep_mirror(&mut self, mirror: Mirror, uploaded: Result<bool>) {
        match uploaded {
            Ok(true) => {
                self.mirror = Some(mirror);
                return;
            }
            Ok(false) => tracing::info!(
                pages = self.order.len(),
                is_whole = self.is_whole(),
                "the device cannot have every stored page: they are chosen from in host memory"
            ),
            Err(error) => tracing::warn!(
                %error,
                "stored pages cannot be kept on the device: they are chosen from in host memory"
            ),
        }
        drop(mirror);
        self.bring_votes();
    }

    fn upload(&self, mirror: &mut Mirror, layer: usize, least: usize) -> Result<bool> {
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        let Some(own) = &mut mirror.layers[layer] else { return Ok(true) };
        let index = self.heads(layer);
        let rows = own.pages.len()..index.first().map_or(0, HeadIndex::len);
        let named = named(index);
        // Before a choice everything must be here, a batch of pages with it or none.
        if rows.len() < least && (least > 1 || own.named == named) {
            return Ok(true);
        }
        if rows.end > mirror.limit || !self.is_whole() {
            return Ok(false);
        }
        let row_bytes = g * d * mirror.dtype.size_in_bytes();
        let room = |bytes: usize| Vec::with_capacity(rows.len() * bytes);
        let (mut keys, mut values) = (room(PAGE_TOKENS * row_bytes), room(PAGE_TOKENS * row_bytes));
        let mut landmarks = room(MARKS * g * d * 2);
        for row in rows {
            for (kind, out) in [&mut keys, &mut values].into_iter().enumerate() {
                if !self.read_bytes(self.order[row], (layer, kind), mirror.dtype, out) {
                    return Ok(false);
                }
            }
            for mark in 0..MARKS {
                for head in index {
                    landmarks.extend_from_slice(head.landmarks_bytes(row * MARKS + mark, 1, d));
                }
            }
        }
        own.pages.push(&keys, &values, &landmarks, mirror.limit)?;
        own.name(index, d)?;
        Ok(true)
    }

    /// Whether no page is missing between the first and the last one. On a device places in the stream are counted from the
    /// first: one that is missing would shift those behind it.
    pub(super) fn is_whole(&self) -> bool {
        let ends = self.order.first().zip(self.order.last());
        ends.is_none_or(|(first, last)| last - first < self.order.len() as u64)
    }

    /// Uploads the outliers of every layer that were named since they were uploaded.
    pub(super) fn upload_outliers(&self, mirror: &mut Mirror) -> Result<()> {
        let layers = mirror.layers.par_iter_mut().zip(&self.index);
        layers
            .filter_map(|(own, index)| Some((own.as_mut()?, index)))
            .try_for_each(|(own, index)| own.name(index, self.shape.head_dim))
    }

    /// All heads' keys or values of a page in the type of the mirror, as bytes behind `out`; false where they are not in
    /// memory.
    fn read_bytes(
        &self,
        page: u64,
        (layer, kind): (usize, usize),
        dtype: DType,
        out: &mut Vec<u8>,
    ) -> bool {
        let Some(stored) = self.stored_rows(page, layer, kind) else { return false };
        let (precision, d) = (self.config.precision, self.shape.head_dim);
        if matches!(precision, PagePrecision::F32 | PagePrecision::Bf16) {
            // The mirror's own type.
            out.extend_from_slice(stored);
            return true;
        }
        let mut row = vec![0f32; d];
        for bytes in stored.chunks_exact(precision.row_bytes(d)) {
            precision.decode(bytes, &mut row);
            match dtype {
                DType::F32 => out.extend(row.iter().flat_map(|x| x.to_le_bytes())),
                _ => out.extend(row.iter().flat_map(|x| codec::to_bf16(*x).to_le_bytes())),
            }
        }
        true
    }
}
