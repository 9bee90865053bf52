//! The paged key/value cache of one session: which page of the stream lies in which slot, and what leaves.
//! Knows no attention rule and no file; a page leaves it as bytes.

use crate::error::{Error, ErrorKind, Result};
use crate::models::frequencies::LayerAngles;
use crate::pages::{Number, PageShape, PageStore};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use mka_kernels::{Landing, PAGE_TOKENS, PagePool, PageRef};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a cache must hold and how large it may grow: fixed at creation, whatever the length of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CacheShape {
    pub(crate) num_layers: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) hidden_size: usize,
    pub(crate) num_rates: usize,
    /// Pages at the start of the stream that every query sees: attention sinks (arXiv 2309.17453) and instructions.
    pub(crate) sink_pages: u64,
    /// Tokens attended exactly.
    pub(crate) window_tokens: usize,
    /// Most tokens of one forward pass.
    pub(crate) block_tokens: usize,
}

impl CacheShape {
    /// Of the pages that leave the window.
    pub(crate) fn pages(&self) -> PageShape {
        PageShape {
            num_layers: self.num_layers,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            sink_pages: self.sink_pages,
            window_tokens: self.window_tokens,
        }
    }

    /// The first page that a query at `position` sees whole or in part, but for sinks.
    pub(crate) fn first_window_page(&self, position: u64) -> u64 {
        (position + 1).saturating_sub(self.window_tokens as u64) / PAGE_TOKENS as u64
    }
}

/// Pages kept beyond the window, so that the last answer can be taken back without reloading.
const SPARE_PAGES: usize = 8;
/// Bytes of keys and values, as f32, that are copied from a device at once: ten pages of the default model in one wait, and
/// no more than a landing has room for.
const DOWNLOAD_BYTES: usize = 32 << 20;
/// The same where the processor is the device: what a cache of it holds, since nothing is waited for.
const COPY_BYTES: usize = 2 << 20;

/// Keys and values of the sinks and the window, and the EMA summary, of one stream.
pub(crate) struct Cache {
    shape: CacheShape,
    device: Device,
    pools: Vec<PagePool>,
    /// Page of the stream -> slot of every pool.
    slots: BTreeMap<u64, usize>,
    free: Vec<usize>,
    position: u64,
    /// Per layer (rates, hidden), f32, on the device: the streaming EMA of each layer's normed input. Replaced, never
    /// written into.
    ema: Vec<Tensor>,
    /// What left the window and can be recalled; None where nothing is kept.
    pages: Option<PageStore>,
    /// Where pages come to from the device: who reads them changes nothing of the stream.
    landing: Mutex<Landing>,
}

/// A point that the cache can be taken back to while its pages are still there.
#[derive(Clone)]
pub(crate) struct Checkpoint {
    pub(crate) position: u64,
    ema: Vec<Tensor>,
}

impl Cache {
    /// # Errors
    /// If the device has no room.
    pub(crate) fn new(shape: CacheShape, device: &Device) -> Result<Self> {
        let pages = |tokens: usize| tokens.div_ceil(PAGE_TOKENS);
        let num_slots = shape.sink_pages as usize
            + pages(shape.window_tokens)
            + pages(shape.block_tokens)
            + 2
            + SPARE_PAGES;
        let pools = (0..shape.num_layers)
            .map(|_| PagePool::new(num_slots, shape.num_kv_heads, shape.head_dim, device))
            .collect::<candle_core::Result<_>>()
            .map_err(|source| Error::no_room(&format!("allocate {num_slots} pages"), source))?;
        let ema = Tensor::zeros((shape.num_rates, shape.hidden_size), DType::F32, device)?;
        Ok(Self {
            shape,
            device: device.clone(),
            pools,
            slots: BTreeMap::new(),
            free: (0..num_slots).rev().collect(),
            position: 0,
            ema: vec![ema; shape.num_layers],
            pages: None,
            landing: Mutex::default(),
        })
    }

    /// A cache of its own with the same stream, whose stored pages are shared until one of the two changes them.
    ///
    /// # Errors
    /// If the device has no room for another window.
    pub(crate) fn fork(&self) -> Result<Self> {
        let pools: candle_core::Result<_> = self.pools.iter().map(PagePool::fork).collect();
        let pages = self.slots.len() + self.free.len();
        let pools = pools
            .map_err(|error| Error::no_room(&format!("fork: allocate {pages} pages"), error))?;
        Ok(Self {
            shape: self.shape,
            device: self.device.clone(),
            pools,
            slots: self.slots.clone(),
            free: self.free.clone(),
            position: self.position,
            ema: self.ema.clone(),
            pages: self.pages.as_ref().map(PageStore::fork),
            landing: Mutex::default(),
        })
    }

    /// Keeps what leaves the window from now on in `pages`, for recall inside attention.
    pub(crate) fn keep_pages(&mut self, pages: PageStore) {
        self.pages = Some(pages);
    }

    /// Stream length up to which positions are exact, of a model trained on `trained_tokens`. With compact ones from where
    /// not all is recalled: up to there the two are the same.
    pub(crate) fn exact_tokens(&self, trained_tokens: u64) -> u64 {
        let Some(pages) = self.pages.as_ref().filter(|pages| pages.is_compact()) else {
            return trained_tokens;
        };
        let sinks = self.shape.sink_pages as usize * PAGE_TOKENS;
        let attended = sinks + pages.recalled_tokens() + self.shape.window_tokens;
        trained_tokens.min(attended as u64)
    }

    /// The pages that left the window.
    pub(crate) fn pages(&self) -> Option<&PageStore> {
        self.pages.as_ref()
    }

    pub(crate) fn pages_mut(&mut self) -> Option<&mut PageStore> {
        self.pages.as_mut()
    }

    /// Hands the pages of `layers` before page `end`, which no query from here on sees in its window, to the store.
    pub(crate) fn absorb(&mut self, layers: Range<usize>, end: u64) -> Result<()> {
        let Some(mut pages) = self.pages.take() else { return Ok(()) };
        let absorbed = match pages.takes_bf16() {
            true => self.hand_over::<bf16>(&mut pages, layers, end),
            false => self.hand_over::<f32>(&mut pages, layers, end),
        };
        self.pages = Some(pages);
        absorbed
    }

    fn hand_over<T: Number>(
        &self,
        pages: &mut PageStore,
        layers: Range<usize>,
        end: u64,
    ) -> Result<()> {
        let mut landing = self.landing();
        let mut rest = layers;
        while let Some(first) = rest.next() {
            // Layers that wait for the same pages go together.
            let next = pages.next_page(first);
            let own = next..end.max(next);
            let slots = own.clone().map(|page| self.slot(page)).collect::<Result<Vec<_>>>()?;
            let most = self.layers_at_once(slots.len());
            let alike = rest.clone().take_while(|layer| pages.next_page(*layer) == next);
            let layers = first..first + 1 + alike.take(most - 1).count();
            rest.start = layers.end;
            if slots.is_empty() {
                continue;
            }
            let pools = &self.pools[layers.clone()];
            let numbers = PagePool::download::<T>(pools, &slots, &mut landing)?;
            pages.absorb(layers, own, &numbers);
        }
        Ok(())
    }

    /// Layers whose keys and values of `pages` pages are copied to the host at once.
    fn layers_at_once(&self, pages: usize) -> usize {
        let layer_bytes = pages * self.page_len_bytes(PAGE_TOKENS) / self.shape.num_layers.max(1);
        let at_once = if self.device.is_cpu() { COPY_BYTES } else { DOWNLOAD_BYTES };
        (at_once / layer_bytes.max(1)).max(1)
    }

    /// Hands over the pages of every layer that the next `count` tokens do not see in their window, as far as they are
    /// written: one copy from the device and one wait for it, where each layer would have its own.
    pub(crate) fn absorb_ahead(&mut self, count: usize) -> Result<()> {
        let last = self.position + (count as u64).saturating_sub(1);
        let written = self.position / PAGE_TOKENS as u64;
        self.absorb(0..self.shape.num_layers, self.first_window_page(last).min(written))
    }

    /// [`Cache::absorb`] of every layer, up to what the next token's window does not hold: before a snapshot.
    pub(crate) fn absorb_all(&mut self) -> Result<()> {
        self.absorb_ahead(1)
    }

    /// Tokens in the stream so far.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    pub(crate) fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Pages at the start of the stream that every query sees.
    pub(crate) fn sink_pages(&self) -> u64 {
        self.shape.sink_pages
    }

    pub(crate) fn window_tokens(&self) -> u64 {
        self.shape.window_tokens as u64
    }

    pub(crate) fn block_tokens(&self) -> usize {
        self.shape.block_tokens
    }

    /// The first page that a query at `position` sees beside the sinks: whole pages, by position alone, so that what a
    /// token attends to never depends on how the stream was cut into blocks.
    pub(crate) fn first_window_page(&self, position: u64) -> u64 {
        self.shape.first_window_page(position)
    }

    /// Makes room for `count` tokens after the current position, evicting pages that none of them will see.
    pub(crate) fn reserve(&mut self, count: usize) -> Result<()> {
        let page = PAGE_TOKENS as u64;
        let (keep_from, sinks) = (self.first_window_page(self.position), self.shape.sink_pages);
        let last = (self.position + count as u64).div_ceil(page);
        for index in self.position / page..last {
            if self.slots.contains_key(&index) {
                continue;
            }
            if self.free.is_empty() {
                let oldest = self.slots.keys().copied().find(|p| *p >= sinks && *p < keep_from);
                let slot = oldest.and_then(|oldest| self.slots.remove(&oldest));
                self.free.extend(slot);
            }
            let slot = self.free.pop().ok_or_else(|| {
                Error::invalid(format!(
                    "forward: {count} tokens at once, expected at most {}",
                    self.shape.block_tokens
                ))
            })?;
            self.slots.insert(index, slot);
        }
        Ok(())
    }

    /// Writes keys and values of the reserved tokens into one layer, keys rotated to its `angles`.
    ///
    /// Shapes: `keys` (before RoPE), `values` (t, num_kv_heads, head_dim).
    pub(crate) fn write(
        &self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        angles: &LayerAngles,
    ) -> Result<()> {
        let page = PAGE_TOKENS as u64;
        let pages = self.position / page..(self.position + keys.dim(0)? as u64).div_ceil(page);
        let slots: Vec<usize> = pages.map(|page| self.slot(page)).collect::<Result<_>>()?;
        let offset = (self.position % page) as usize;
        Ok(self.pools[layer].append(&slots, offset, keys, values, angles.of(layer))?)
    }

    fn slot(&self, page: u64) -> Result<usize> {
        self.slots.get(&page).copied().ok_or_else(|| {
            Error::model(format!("cache: page {page} of the stream is not on the device"))
        })
    }

    /// Moves the position over `count` written tokens.
    pub(crate) fn advance(&mut self, count: usize) {
        self.position += count as u64;
    }

    /// References to `pages` of the stream, of which `end` tokens are written.
    pub(crate) fn page_refs(
        &self,
        pages: impl IntoIterator<Item = u64>,
        end: u64,
    ) -> Result<Vec<PageRef>> {
        let page = PAGE_TOKENS as u64;
        pages
            .into_iter()
            .map(|index| {
                let start = index * page;
                let len = end.saturating_sub(start).min(page) as usize;
                Ok(PageRef { slot: self.slot(index)?, start, len, bias: 0.0 })
            })
            .collect()
    }

    pub(crate) fn pool(&self, layer: usize) -> &PagePool {
        &self.pools[layer]
    }

    pub(crate) fn ema(&self, layer: usize) -> &Tensor {
        &self.ema[layer]
    }

    pub(crate) fn set_ema(&mut self, layer: usize, ema: Tensor) {
        self.ema[layer] = ema;
    }

    /// Where the stream stands now.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        Checkpoint { position: self.position, ema: self.ema.clone() }
    }

    /// Takes the stream back to `checkpoint`; false, and nothing changed, if a page that it needs was evicted since.
    pub(crate) fn rewind(&mut self, checkpoint: &Checkpoint) -> bool {
        let needed = self.window_pages(checkpoint.position);
        if checkpoint.position > self.position
            || needed.iter().any(|page| !self.slots.contains_key(page))
        {
            return false;
        }
        let keep = checkpoint.position.div_ceil(PAGE_TOKENS as u64);
        while let Some((page, slot)) = self.slots.pop_last() {
            if page < keep {
                self.slots.insert(page, slot);
                break;
            }
            self.free.push(slot);
        }
        self.position = checkpoint.position;
        self.ema.clone_from(&checkpoint.ema);
        let window = self.first_window_page(checkpoint.position);
        if let Some(pages) = &mut self.pages {
            pages.truncate(window, checkpoint.position);
        }
        true
    }

    /// Pages that a stream of `position` tokens needs to go on: sinks and window.
    pub(crate) fn window_pages(&self, position: u64) -> Vec<u64> {
        let end = position.div_ceil(PAGE_TOKENS as u64);
        let sinks = self.shape.sink_pages;
        let from = self.first_window_page(position).max(sinks);
        (0..sinks.min(end)).chain(from..end).collect()
    }

    /// Pages of every layer as bytes: for each layer the raw keys, then the values, (num_kv_heads, len, head_dim) each,
    /// f32 little-endian, `len` being the tokens of the page written so far.
    pub(crate) fn page_bytes(&self, pages: &[u64]) -> Result<Vec<(u64, Vec<u8>)>> {
        let slots = pages.iter().map(|page| self.slot(*page)).collect::<Result<Vec<_>>>()?;
        let room = |page: &u64| (*page, vec![0; self.page_len_bytes(self.written(*page))]);
        let mut out: Vec<(u64, Vec<u8>)> = pages.iter().map(room).collect();
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        let most = self.layers_at_once(slots.len());
        let mut landing = self.landing();
        for (i, pools) in self.pools.chunks(most).enumerate() {
            let numbers = PagePool::download::<f32>(pools, &slots, &mut landing)?;
            out.par_iter_mut().enumerate().for_each(|(at, (page, bytes))| {
                let row_len = self.written(*page) * d;
                // Heads of the layers before, keys and values.
                let (_, bytes) = bytes.split_at_mut(i * most * 2 * g * row_len * 4);
                let halves = numbers.chunks_exact(slots.len() * g * PAGE_TOKENS * d);
                let heads = halves.flat_map(|half| {
                    half[at * g * PAGE_TOKENS * d..][..g * PAGE_TOKENS * d]
                        .chunks_exact(PAGE_TOKENS * d)
                });
                for (out, head) in bytes.chunks_exact_mut((row_len * 4).max(1)).zip(heads) {
                    let (out, _) = out.as_chunks_mut::<4>();
                    out.iter_mut().zip(head).for_each(|(out, x)| *out = x.to_le_bytes());
                }
            });
        }
        Ok(out)
    }

    fn landing(&self) -> MutexGuard<'_, Landing> {
        self.landing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self, page: u64) -> usize {
        let page_tokens = PAGE_TOKENS as u64;
        self.position.saturating_sub(page * page_tokens).min(page_tokens) as usize
    }

    fn page_len_bytes(&self, len: usize) -> usize {
        self.shape.num_layers * 2 * self.shape.num_kv_heads * len * self.shape.head_dim * 4
    }

    /// The EMA of every layer, layer by layer, f32 little-endian.
    pub(crate) fn ema_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for layer in &self.ema {
            for x in layer.flatten_all()?.to_vec1::<f32>()? {
                bytes.extend_from_slice(&x.to_le_bytes());
            }
        }
        Ok(bytes)
    }

    /// This cache, still empty, at `position` with what [`Cache::page_bytes`] and [`Cache::ema_bytes`] wrote, keys rotated as
    /// they were rotated when they were first written.
    ///
    /// # Errors
    /// `Corrupted` if pages are missing or of another size: the caller then fills a cache from the tokens.
    pub(crate) fn restored(
        mut self,
        position: u64,
        ema: &[u8],
        pages: &[(u64, Vec<u8>)],
        angles: impl Fn(Range<u64>) -> LayerAngles,
    ) -> Result<Self> {
        let (shape, device) = (self.shape, self.device.clone());
        self.position = position;
        let damaged = |what: String| Error::new(ErrorKind::Corrupted, format!("restore: {what}"));
        let layer_len = shape.num_rates * shape.hidden_size;
        let expected = shape.num_layers * layer_len * 4;
        if ema.len() != expected {
            return Err(damaged(format!("summary of {} bytes, expected {expected}", ema.len())));
        }
        let (values, _) = ema.as_chunks::<4>();
        for (layer, bytes) in self.ema.iter_mut().zip(values.chunks_exact(layer_len.max(1))) {
            let values: Vec<f32> = bytes.iter().map(|x| f32::from_le_bytes(*x)).collect();
            *layer = Tensor::from_vec(values, layer.shape(), &device)?;
        }
        let mut found = Vec::new();
        for page in self.window_pages(position) {
            let bytes = pages.iter().find_map(|(index, bytes)| (*index == page).then_some(bytes));
            let bytes = bytes.ok_or_else(|| damaged(format!("page {page}, found none")))?;
            let expected = self.page_len_bytes(self.written(page));
            if bytes.len() != expected {
                let got = bytes.len();
                return Err(damaged(format!("page {page} of {got} bytes, expected {expected}")));
            }
            let slot = self.free.pop().ok_or_else(|| Error::model("restore: no free page"))?;
            self.slots.insert(page, slot);
            found.push((page, bytes.as_slice()));
        }
        for run in found.chunk_by(|(left, _), (right, _)| left + 1 == *right) {
            self.restore_run(run, &angles)?;
        }
        Ok(self)
    }

    /// Writes pages that follow each other, each with its bytes, into their slots: all tokens of a layer at once.
    fn restore_run(
        &self,
        run: &[(u64, &[u8])],
        angles: impl Fn(Range<u64>) -> LayerAngles,
    ) -> Result<()> {
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        // The last page may have no token yet.
        let written = run.iter().filter(|(page, _)| self.written(*page) > 0);
        let slots: Vec<usize> = written.map(|(page, _)| self.slot(*page)).collect::<Result<_>>()?;
        if slots.is_empty() {
            return Ok(());
        }
        let tokens: usize = run.iter().map(|(page, _)| self.written(*page)).sum();
        let start = run.first().map_or(0, |(page, _)| page * PAGE_TOKENS as u64);
        let angles = angles(start..start + tokens as u64);
        // (tokens, heads, head_dim) of one layer's keys or values.
        let numbers = |layer: usize, kind: usize| -> Vec<f32> {
            let mut out = vec![0f32; tokens * g * d];
            for ((page, bytes), out) in run.iter().zip(out.chunks_mut(PAGE_TOKENS * g * d)) {
                let len = self.written(*page);
                let rows = bytes.chunks_exact(d * 4).skip((2 * layer + kind) * g * len);
                for (at, row) in rows.take(g * len).enumerate() {
                    let (head, token) = (at / len, at % len);
                    let (row, _) = row.as_chunks::<4>();
                    let out = &mut out[(token * g + head) * d..][..d];
                    out.iter_mut().zip(row).for_each(|(out, x)| *out = f32::from_le_bytes(*x));
                }
            }
            out
        };
        let layers: Vec<usize> = (0..self.shape.num_layers).collect();
        // As many layers at once as there are threads to lay them out.
        for layers in layers.chunks(rayon::current_num_threads().max(1)) {
            let laid_out = layers.par_iter().map(|layer| (numbers(*layer, 0), numbers(*layer, 1)));
            let laid_out: Vec<(Vec<f32>, Vec<f32>)> = laid_out.collect();
            for (layer, (keys, values)) in layers.iter().zip(laid_out) {
                let tensor = |numbers| Tensor::from_vec(numbers, (tokens, g, d), &self.device);
                let (keys, values) = (tensor(keys)?, tensor(values)?);
                self.pools[*layer].append(&slots, 0, &keys, &values, angles.of(*layer))?;
            }
        }
        Ok(())
    }
}
