//! Stored pages on the model's device, as far as a byte budget goes: what is chosen there needs no copy of keys and
//! makes no layer wait for its queries.
//! Knows the store's rows; host memory and disk have every page too, and choose where the device does not.

use super::gather::RecallScope;
use super::index::HeadIndex;
use super::recalled::{Recalled, RecalledRuns, Recovered};
use super::scan::reads_every_key;
use super::selection::{OVER_FETCH, POOLED};
use super::store::PageStore;
use super::{PageConfig, PagePrecision, PageRule, codec};
use crate::cache::SINK_PAGES;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use mka_kernels::recall::{Choice, ChoiceParams, ChoiceRun, MARKS, Placement, SPAN, StoredPages};
use mka_kernels::{AttentionRun, PAGE_TOKENS, PageRef};

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
    /// The pins that were uploaded last, for which first page, and where they are.
    pins: (Vec<u64>, Option<u64>, Option<Tensor>),
}

struct Layer {
    pages: StoredPages,
    /// What the index had named as outliers when they were uploaded.
    named: u64,
}

/// What a copy of recalled tokens on the device holds, for each run of queries.
struct Copied {
    /// (runs · pages, g, PAGE_TOKENS, d), rotated.
    keys: Tensor,
    values: Tensor,
    /// Of each run.
    tokens: usize,
    recovered: Option<Tensor>,
}

/// A run of queries and what it may recall; of several runs, the one of most rows.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) layer: usize,
    pub(super) rows: usize,
    pub(super) budget: usize,
    pub(super) all: bool,
    pub(super) scope: RecallScope,
}

impl Mirror {
    /// None where nothing is chosen by landmarks alone, the kernels do not take the shape, or there is no room.
    pub(super) fn new(
        config: &PageConfig,
        (num_layers, num_kv_heads, head_dim): (usize, usize, usize),
        device: &Device,
    ) -> Option<Self> {
        let choosing = num_layers.saturating_sub(config.first_layer);
        if config.rule != PageRule::Mka || config.estimate || choosing == 0 {
            return None;
        }
        let dtype = match config.precision {
            PagePrecision::F32 => DType::F32,
            _ => DType::BF16,
        };
        let page_bytes = choosing * StoredPages::bytes(1, num_kv_heads, head_dim, dtype);
        let limit = usize::try_from(config.device_bytes).unwrap_or(usize::MAX) / page_bytes.max(1);
        let layer = |layer: usize| {
            let chooses = layer >= config.first_layer;
            let pages = || StoredPages::new(num_kv_heads, head_dim, dtype, device).ok();
            // None for a layer that should choose is no mirror.
            chooses
                .then(pages)
                .map_or(Some(None), |pages| Some(Some(Layer { pages: pages?, named: 0 })))
        };
        if limit < BATCH_PAGES {
            return None;
        }
        let layers = (0..num_layers).map(layer).collect::<Option<_>>()?;
        Some(Self { device: device.clone(), dtype, limit, layers, pins: (Vec::new(), None, None) })
    }

    /// Keeps the first `rows` pages.
    pub(super) fn truncate(&mut self, rows: usize) {
        self.layers.iter_mut().flatten().for_each(|layer| layer.pages.truncate(rows));
    }

    /// Lets the first page go.
    pub(super) fn pop_front(&mut self) {
        self.layers.iter_mut().flatten().for_each(|layer| layer.pages.pop_front());
    }
}

impl PageStore {
    /// Uploads every page that is not there, reading those back that are not in memory; the mirror goes for good where
    /// there is no room for all of them.
    pub(super) fn fill_mirror(&mut self) {
        let rows = self.order.len();
        let Some(layers) = self.mirror.as_ref().map(|mirror| mirror.layers.len()) else { return };
        // Where there is no room for all of them, none needs to be read.
        let fits = self.mirror.as_ref().is_some_and(|mirror| rows <= mirror.limit);
        let step = if fits { BATCH_PAGES } else { rows.max(1) };
        for first in (0..rows).step_by(step) {
            let end = rows.min(first + step);
            if fits {
                self.bring(&(first..end).collect::<Vec<_>>());
            }
            (0..layers).for_each(|layer| self.mirror_rows(layer, end, 1));
        }
    }

    /// Uploads what `layer` took in, once `least` pages wait; the mirror goes for good where there is no room for them
    /// or a page was sent away before.
    pub(super) fn mirror_layer(&mut self, layer: usize, least: usize) {
        self.mirror_rows(layer, usize::MAX, least);
    }

    /// [`PageStore::mirror_layer`] of the first `end` pages.
    fn mirror_rows(&mut self, layer: usize, end: usize, least: usize) {
        let Some(mut mirror) = self.mirror.take() else { return };
        match self.upload(&mut mirror, layer, end, least.max(1)) {
            Ok(true) => self.mirror = Some(mirror),
            Ok(false) => tracing::info!(
                pages = self.order.len(),
                "stored pages have no room on the device: they are chosen from in host memory"
            ),
            Err(error) => tracing::warn!(
                %error,
                "stored pages cannot be kept on the device: they are chosen from in host memory"
            ),
        }
    }

    fn upload(&self, mirror: &mut Mirror, layer: usize, end: usize, least: usize) -> Result<bool> {
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        let Some(own) = &mut mirror.layers[layer] else { return Ok(true) };
        let index = self.heads(layer);
        let rows = own.pages.len()..index.first().map_or(0, HeadIndex::len).min(end);
        let named = index.iter().map(HeadIndex::named).sum::<u64>() + 1;
        // Before a choice everything must be here, a batch of pages with it or none.
        if rows.len() < least && (least > 1 || own.named == named) {
            return Ok(true);
        }
        if rows.end > mirror.limit {
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
        if own.named != named {
            own.named = named;
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
            own.pages.set_outliers(&marks, &keys)?;
        }
        Ok(true)
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

    /// What queries `q` (t, h, d), before RoPE, recall, chosen and copied on the device; None where the device has not
    /// every page.
    pub(super) fn recall_on_device(
        &mut self,
        q: &Tensor,
        request: Request,
    ) -> Result<Option<Recalled>> {
        let Request { rows, all, .. } = request;
        let run = ChoiceRun { queries: q.dim(0)?, pages: rows };
        let Some(copied) = self.copy_on_device(q, request, &[run])? else { return Ok(None) };
        Ok(Some(Recalled {
            keys: copied.keys,
            values: copied.values,
            tokens: copied.tokens,
            starts: all.then(|| self.starts(rows)),
            recovered: match all {
                true => Recovered::Share(1.0),
                false => copied.recovered.map_or(Recovered::Unknown, Recovered::OnDevice),
            },
            left: None,
        }))
    }

    /// [`PageStore::recall_on_device`] for several runs of the queries at once.
    pub(super) fn recall_runs_on_device(
        &mut self,
        q: &Tensor,
        request: Request,
        runs: &[ChoiceRun],
    ) -> Result<Option<RecalledRuns>> {
        let Some(copied) = self.copy_on_device(q, request, runs)? else { return Ok(None) };
        let page = |slot, start, len| PageRef { slot, start, len, bias: 0.0 };
        // Every stored page lies there once, and a run sees the first ones; or each run has chosen its own.
        let (pages, runs) = if request.all {
            let starts = self.starts(request.rows).into_iter().enumerate();
            let pages = starts.map(|(slot, start)| page(slot, start, PAGE_TOKENS)).collect();
            let of = |run: &ChoiceRun| {
                let tokens = run.pages * PAGE_TOKENS;
                (AttentionRun { queries: run.queries, pages: 0..run.pages }, tokens)
            };
            (pages, runs.iter().map(of).collect())
        } else {
            let each = copied.tokens.div_ceil(PAGE_TOKENS);
            let own = |slot: usize| {
                let start = slot % each * PAGE_TOKENS;
                page(slot, start as u64, PAGE_TOKENS.min(copied.tokens - start))
            };
            let of = |(i, run): (usize, &ChoiceRun)| {
                let pages = i * each..(i + 1) * each;
                (AttentionRun { queries: run.queries, pages }, copied.tokens)
            };
            let pages = (0..runs.len() * each).map(own).collect();
            (pages, runs.iter().enumerate().map(of).collect())
        };
        Ok(Some(RecalledRuns { keys: copied.keys, values: copied.values, pages, runs }))
    }

    /// Stream positions of the first tokens of the first `rows` pages.
    fn starts(&self, rows: usize) -> Vec<u64> {
        self.order[..rows].iter().map(|page| page * PAGE_TOKENS as u64).collect()
    }

    fn copy_on_device(
        &mut self,
        q: &Tensor,
        request: Request,
        runs: &[ChoiceRun],
    ) -> Result<Option<Copied>> {
        let Request { layer, rows, budget, all, scope } = request;
        self.mirror_layer(layer, 1);
        let Some(mut mirror) = self.mirror.take() else { return Ok(None) };
        let pins = match all {
            true => Ok(None),
            false => self.uploaded_pins(&mut mirror),
        };
        let mirror = &*self.mirror.insert(mirror);
        let (Some(own), Some(angles)) = (&mirror.layers[layer], &self.angles) else {
            return Ok(None);
        };
        let (first, last) = (self.order[0], self.order[rows - 1]);
        // Places in the stream are counted from the first page: a page that is missing would shift them.
        if last - first != rows as u64 - 1
            || own.pages.len() < rows
            || self.shape.window_tokens >= angles.len()
        {
            return Ok(None);
        }
        let pins = pins?;
        let choice = match all {
            true => Choice::all(rows * PAGE_TOKENS),
            false => own.pages.choose(
                q,
                &ChoiceParams {
                    runs,
                    tokens: budget,
                    landmarks: (!reads_every_key(self.config.scan, rows))
                        .then_some(OVER_FETCH * budget / SPAN),
                    pooled: POOLED,
                    scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
                    angles,
                    distance: self.shape.window_tokens,
                    pins: pins.as_ref(),
                },
            )?,
        };
        let placement = match scope.compact {
            true => Placement::Compact(SINK_PAGES * PAGE_TOKENS as u64),
            false => Placement::Stream(first * PAGE_TOKENS as u64),
        };
        let (keys, values) = own.pages.gather(&choice, angles, placement)?;
        Ok(Some(Copied { keys, values, tokens: choice.num_tokens(), recovered: choice.recovered }))
    }

    /// The pinned landmarks on the mirror's device; None for none.
    fn uploaded_pins(&self, mirror: &mut Mirror) -> Result<Option<Tensor>> {
        let (pins, first, uploaded) = &mirror.pins;
        if *pins == self.pins && *first == self.order.first().copied() {
            return Ok(uploaded.clone());
        }
        let marks = self.pinned(self.order.len(), SPAN);
        let uploaded = match marks.len() {
            0 => None,
            count => Some(Tensor::from_vec(marks, count, &mirror.device)?),
        };
        mirror.pins = (self.pins.clone(), self.order.first().copied(), uploaded.clone());
        Ok(uploaded)
    }
}
