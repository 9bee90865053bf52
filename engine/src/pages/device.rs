//! Stored pages on the model's device, as far as a byte budget goes: what is chosen there needs no copy of keys and
//! makes no layer wait for its queries.
//! Knows the store's rows; host memory and disk have every page too, and choose where the device does not.

use super::gather::RecallScope;
use super::index::HeadIndex;
use super::recalled::{Recalled, RecalledRuns, Recovered};
use super::rivals::device::{Stored, Table, pooled_queries};
use super::scan::reads_every_key;
use super::selection::OVER_FETCH;
use super::store::PageStore;
use super::{PageConfig, PagePrecision, PageRule, codec};
use crate::cache::SINK_PAGES;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use mka_kernels::recall::{Choice, ChoiceParams, ChoiceRun, MARKS, Placement, SPAN, StoredPages};
use mka_kernels::{AttentionRun, PAGE_TOKENS, PageRef, RotaryAngles};

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
    /// What another system's rule keeps of them.
    table: Table,
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
        Some(Self { device: device.clone(), dtype, limit, layers, pins: (Vec::new(), None, None) })
    }

    /// Rows of the last layer's table.
    #[cfg(test)]
    pub(super) fn table_len(&self) -> usize {
        self.layers.iter().flatten().last().map_or(0, |layer| layer.table.len())
    }

    /// Keeps the first `rows` pages.
    pub(super) fn truncate(&mut self, rows: usize) {
        for layer in self.layers.iter_mut().flatten() {
            layer.pages.truncate(rows);
            layer.table.clear();
        }
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
            false => self.prepare(&mut mirror, layer),
        };
        self.mirror = Some(mirror);
        let Some(mirror) = &self.mirror else { return Ok(None) };
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
        let choice = match (all, self.config.rule) {
            (true, _) => Some(Choice::all(rows * PAGE_TOKENS)),
            (false, PageRule::InfLlm | PageRule::Quest) => {
                self.choose_by_table(q, own, rows, budget)?
            }
            (false, _) => {
                let params = self.vote_params(angles, budget, runs, pins.as_ref());
                Some(own.pages.choose(q, &params)?)
            }
        };
        let Some(choice) = choice else { return Ok(None) };
        let placement = match scope.compact {
            true => Placement::Compact(SINK_PAGES * PAGE_TOKENS as u64),
            false => Placement::Stream(first * PAGE_TOKENS as u64),
        };
        let (keys, values) = own.pages.gather(&choice, angles, placement)?;
        // Other systems' rules give no estimate, here and in host memory.
        let recovered = choice.recovered.clone().filter(|_| self.config.rule == PageRule::Mka);
        Ok(Some(Copied { keys, values, tokens: choice.num_tokens(), recovered }))
    }

    /// What a choice of `layer` needs beside its pages: what another system's rule keeps of them, and the pinned landmarks.
    fn prepare(&self, mirror: &mut Mirror, layer: usize) -> Result<Option<Tensor>> {
        if let (Some(own), Some(first)) = (&mut mirror.layers[layer], self.order.first()) {
            let rows = own.pages.len();
            let stored = Stored { pages: &own.pages, first: *first, rows };
            match (self.config.rule, &self.following) {
                (PageRule::Quest, _) => own.table.bound(stored)?,
                (PageRule::InfLlm, Some(following)) => {
                    own.table.represent(
                        following,
                        layer,
                        (*first, first + rows as u64),
                        &mirror.device,
                    )?;
                }
                _ => {}
            }
        }
        self.uploaded_pins(mirror)
    }

    /// How the runs vote: by the library's own rule or by TokenSelect's.
    fn vote_params<'a>(
        &self,
        angles: &'a RotaryAngles,
        budget: usize,
        runs: &'a [ChoiceRun],
        pins: Option<&'a Tensor>,
    ) -> ChoiceParams<'a> {
        let longest = runs.iter().map(|run| run.queries).max().unwrap_or(0);
        let rows = runs.iter().map(|run| run.pages).max().unwrap_or(0);
        let together = self.config.rule == PageRule::TokenSelect;
        let every = together || reads_every_key(self.config.scan, rows);
        ChoiceParams {
            runs,
            tokens: budget,
            landmarks: (!every).then_some(OVER_FETCH * budget / SPAN),
            pooled: self.config.rule.pooled(longest),
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            angles,
            distance: self.shape.window_tokens,
            pins,
            together,
        }
    }

    /// The choice of one run among the first `rows` pages by InfLLM's or Quest's rule; None where the processor must
    /// choose.
    fn choose_by_table(
        &self,
        q: &Tensor,
        own: &Layer,
        rows: usize,
        budget: usize,
    ) -> Result<Option<Choice>> {
        let Some(angles) = self.angles_at(self.shape.window_tokens as u64) else {
            return Ok(None);
        };
        let queries = pooled_queries(q, angles, self.config.rule.pooled(q.dim(0)?))?;
        let stored = Stored { pages: &own.pages, first: self.order[0], rows };
        match self.config.rule {
            PageRule::Quest => own.table.by_bounds(&queries, stored, budget),
            _ => own.table.by_blocks(&queries, stored, self.shape.num_kv_heads, budget),
        }
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
