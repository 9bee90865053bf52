//! The pages that left a session's window: their keys and values within a byte budget, and the index over them.
//! Knows no attention rule and no file; what goes to the disk and comes back is `disk.rs`'s matter.

use super::device::Mirror;
use super::filling::FillMemory;
use super::index::{HeadIndex, MARKS, SPAN};
use super::message::Message;
use super::reading::PageSource;
use super::recalled::Recalled;
use super::rivals::Following;
use super::scan::settled;
use super::shares::Tally;
use super::signs::Planes;
use super::vote::Ballot;
use super::{LandmarkScan, PageConfig, PageRule, Prefill};
use crate::models::frequencies::LayerAngles;
use candle_core::{Device, Tensor};
use mka_kernels::PAGE_TOKENS;
use mka_kernels::key_codes::Rotation;
use mka_memory::PageBytes;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Part of the budget that the index leaves to pages: those that wait for the disk may take it, however much there is to
/// index.
pub(super) const WAITING_PART: u64 = 4;

/// What a stored page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageShape {
    pub(crate) num_layers: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Pages at the start of the stream that are never stored: every query sees them.
    pub(crate) sink_pages: u64,
    /// Tokens of the window, the distance at which keys are compared.
    pub(crate) window_tokens: usize,
}

/// One page of the stream.
#[derive(Clone)]
pub(super) struct Stored {
    /// For each layer keys, then values, (num_kv_heads, PAGE_TOKENS) rows each, in memory or mapped; None while only the
    /// disk or the device has them.
    /// Shared with the sessions that this one was forked into, or from.
    pub(super) bytes: Option<Arc<PageBytes>>,
    pub(super) tokens: Box<[u32; PAGE_TOKENS]>,
    /// Whether the disk has it, and whether it was ever given to the disk, which may have let it go since.
    pub(super) durable: bool,
    pub(super) given: bool,
    /// Whether the disk has its landmarks.
    pub(super) marked: bool,
    /// When it was last read, by the store's own count.
    pub(super) used: u64,
}

/// The last choice of one layer, and what it was made for.
#[derive(Default)]
pub(super) struct Held {
    pub(super) recalled: Option<Arc<Recalled>>,
    /// Queries that it still serves.
    pub(super) left: usize,
    pub(super) made_under: Option<MadeUnder>,
}

/// What a choice depends on beside its query.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct MadeUnder {
    /// Pages of the index.
    pub(super) rows: usize,
    /// The first of them.
    pub(super) first_page: Option<u64>,
    /// Whether positions are compact.
    pub(super) compact: bool,
    /// Whether every token was taken.
    pub(super) all: bool,
}

/// The pages of one session.
pub(crate) struct PageStore {
    pub(super) shape: PageShape,
    pub(super) config: PageConfig,
    pub(super) device: Device,
    pub(super) pages: BTreeMap<u64, Stored>,
    /// Page of each row of the index, ascending.
    pub(super) order: Vec<u64>,
    /// By layer and key/value head; empty for layers that choose nothing.
    pub(super) index: Vec<Vec<HeadIndex>>,
    /// The next page that each layer takes in.
    pub(super) next: Vec<u64>,
    /// Token ids of pages that have not left the window.
    pub(super) recent: BTreeMap<u64, Box<[u32; PAGE_TOKENS]>>,
    pub(super) resident_bytes: u64,
    clock: u64,
    pub(super) held: Vec<Held>,
    /// Angles of positions from 0 on, as far as they were needed.
    pub(super) angles: Option<LayerAngles>,
    /// What InfLLM's rule keeps; None for the others.
    pub(super) following: Option<Following>,
    /// What the message that is answered asks for beside what each query asks for.
    pub(crate) message: Message,
    /// Whether queries recall anything now.
    pub(crate) active: bool,
    /// What single queries recalled since [`PageStore::begin_turn`], by layer.
    pub(super) tally: Vec<Tally>,
    /// By layer (num_heads + 1), f32, once there is one: sums of shares that are noted on the device, so that no layer waits
    /// for them. Empty where the host notes them.
    pub(super) sums: Vec<Option<Tensor>>,
    /// The pages on the model's device; None where the processor chooses.
    pub(super) mirror: Option<Mirror>,
    /// What it is filled through.
    pub(super) fill_memory: Arc<FillMemory>,
    /// Of the codes by which landmarks are scanned first; none where they are not.
    pub(super) planes: Planes,
    /// Of the codes of keys; None where there are none.
    pub(super) rotation: Option<Rotation>,
    /// Memory that one vote leaves to the next.
    pub(super) ballot: Ballot,
    /// Queries (t, h, d) before RoPE with their layer, while a test asks for them.
    #[cfg(test)]
    pub(super) asked: Option<Vec<(usize, Tensor)>>,
    /// Last, for it may be the last that holds the memory store, which ends its folder's lock: pages that are mapped hold
    /// that too.
    pub(super) source: Option<Arc<dyn PageSource>>,
}

impl PageStore {
    pub(crate) fn new(shape: PageShape, config: PageConfig, device: &Device) -> Self {
        let head = |layer: usize| match layer < config.first_layer {
            true => Vec::new(),
            false => (0..shape.num_kv_heads).map(|_| HeadIndex::default()).collect(),
        };
        Self {
            shape,
            device: device.clone(),
            source: None,
            pages: BTreeMap::new(),
            order: Vec::new(),
            index: (0..shape.num_layers).map(head).collect(),
            next: vec![shape.sink_pages; shape.num_layers],
            recent: BTreeMap::new(),
            resident_bytes: 0,
            clock: 0,
            held: (0..shape.num_layers).map(|_| Held::default()).collect(),
            angles: None,
            following: (config.rule == PageRule::InfLlm).then(|| Following::new(shape)),
            message: Message::default(),
            active: true,
            tally: vec![Tally::default(); shape.num_layers],
            sums: Vec::new(),
            mirror: None,
            fill_memory: Arc::default(),
            planes: match config.scan {
                LandmarkScan::SignHash => Planes::new(shape.head_dim),
                _ => Planes::default(),
            },
            rotation: has_codes(&config, device).then(|| Rotation::new(shape.head_dim)),
            ballot: Ballot::default(),
            #[cfg(test)]
            asked: None,
            config,
        }
        .on_its_device()
    }

    /// A store of its own with the same pages: their bytes are shared, the index over them is copied, and so are the pages
    /// on a CUDA device, of which neither host memory nor the disk may have every one. Pages that memory does not hold are
    /// read where this one reads them.
    pub(crate) fn fork(&self) -> Self {
        let mut fork = Self::new(self.shape, self.config.clone(), &self.device);
        fork.source.clone_from(&self.source);
        fork.fill_memory.clone_from(&self.fill_memory);
        fork.pages.clone_from(&self.pages);
        fork.order.clone_from(&self.order);
        fork.index.clone_from(&self.index);
        fork.next.clone_from(&self.next);
        fork.recent.clone_from(&self.recent);
        (fork.resident_bytes, fork.clock) = (self.resident_bytes, self.clock);
        fork.following.clone_from(&self.following);
        fork.active = self.active;
        match self.mirror.as_ref().map(Mirror::copied) {
            Some(Ok(mirror)) => {
                fork.mirror = Some(mirror);
                fork.zero_sums(true);
            }
            Some(Err(error)) => {
                fork.mirror = None;
                tracing::warn!(
                    %error,
                    "stored pages of a fork cannot be kept on the device: they are chosen from in host memory"
                );
            }
            None => fork.fill_mirror(),
        }
        fork
    }

    /// On a CUDA device keeps the pages there too.
    fn on_its_device(mut self) -> Self {
        if self.device.is_cuda() {
            self.mirror_on_device();
        }
        self
    }

    /// Keeps the pages on the device too, and notes shares there.
    pub(super) fn mirror_on_device(&mut self) {
        let shape = (self.shape.num_layers, self.shape.num_kv_heads, self.shape.head_dim);
        self.mirror = Mirror::new(&self.config, shape, &self.device);
        self.zero_sums(true);
    }

    /// Bytes of one page's keys and values in every layer.
    pub(crate) fn page_bytes(&self) -> usize {
        let rows = self.shape.num_layers * 2 * self.shape.num_kv_heads * PAGE_TOKENS;
        rows * self.config.precision.row_bytes(self.shape.head_dim)
    }

    /// Bytes of the index over `pages` pages: landmarks of every layer that chooses, and token ids.
    pub(super) fn index_bytes(&self, pages: usize) -> u64 {
        let scan = settled(self.config.scan, pages, self.rotation.is_some());
        let layers = self.index.iter().filter(|heads| !heads.is_empty()).count();
        let head = HeadIndex::page_bytes(self.shape.head_dim, self.config.estimate, scan);
        let ids = PAGE_TOKENS * 4 + size_of::<Stored>() + 16;
        (pages * (layers * self.shape.num_kv_heads * head + ids)) as u64
    }

    /// Bytes of host memory that pages and index take with `bytes` and `pages` in the index more: never above
    /// `PageConfig::bytes`.
    pub(super) fn bytes_with(&self, bytes: usize, pages: usize) -> u64 {
        self.resident_bytes + bytes as u64 + self.index_bytes(self.pages.len() + pages)
    }

    /// Whether positions are compact as soon as not every stored token is recalled: not where a prompt attends to all of them.
    pub(crate) fn is_compact(&self) -> bool {
        self.config.compact && self.config.prefill == Prefill::Selected
    }

    /// Tokens that each key/value head recalls, whole pages.
    pub(crate) fn recalled_tokens(&self) -> usize {
        self.config.tokens.next_multiple_of(PAGE_TOKENS)
    }

    /// Stored tokens that can be chosen.
    pub(crate) fn stored_tokens(&self) -> usize {
        self.order.len() * PAGE_TOKENS
    }

    /// The next page that `layer` has to take in.
    pub(crate) fn next_page(&self, layer: usize) -> u64 {
        self.next[layer]
    }

    /// Notes the ids of `tokens`, which begin at `position` of the stream.
    pub(crate) fn note_tokens(&mut self, position: u64, tokens: &[u32]) {
        for (position, token) in (position..).zip(tokens) {
            let page = position / PAGE_TOKENS as u64;
            let ids = self.recent.entry(page).or_insert_with(|| Box::new([u32::MAX; PAGE_TOKENS]));
            ids[(position % PAGE_TOKENS as u64) as usize] = *token;
        }
    }

    /// Ids of the tokens from page `first` on that were noted and have not been taken in, in stream order.
    pub(crate) fn noted_tokens(&self, first: u64, end: u64) -> Vec<u32> {
        (first * PAGE_TOKENS as u64..end)
            .map(|position| {
                let ids = self.recent.get(&(position / PAGE_TOKENS as u64));
                ids.map_or(u32::MAX, |ids| ids[(position % PAGE_TOKENS as u64) as usize])
            })
            .collect()
    }

    /// Names the outliers of `layer` among the first `rows` pages anew.
    pub(super) fn name_outliers(&mut self, layer: usize, rows: usize) {
        self.set_outliers(layer, &self.least_agreeing(layer, rows));
    }

    /// For each head of `layer` the outliers among the first `rows` pages.
    pub(super) fn least_agreeing(&self, layer: usize, rows: usize) -> Vec<Vec<u32>> {
        self.index[layer].iter().map(|own| own.least_agreeing(rows)).collect()
    }

    /// Makes `named` the outliers of the heads of `layer`; pages that their keys lie in are read back.
    pub(super) fn set_outliers(&mut self, layer: usize, named: &[Vec<u32>]) {
        let fresh = named.iter().zip(&self.index[layer]).flat_map(|(outliers, own)| {
            let known = own.all_outliers();
            outliers.iter().filter(|outlier| known.binary_search(outlier).is_err())
        });
        let wanted: Vec<usize> = fresh.map(|outlier| *outlier as usize / MARKS).collect();
        self.bring(&wanted);
        let mut index = std::mem::take(&mut self.index[layer]);
        for (head, (own, outliers)) in index.iter_mut().zip(named).enumerate() {
            own.name_outliers(outliers, self.shape.head_dim, self.keys_of(layer, head));
        }
        self.index[layer] = index;
    }

    /// Pages at the front of the index that were there when outliers were last named.
    pub(super) fn named_rows(&self) -> usize {
        let is_named = |page: &u64| HeadIndex::names_at(*page);
        self.order.iter().rposition(is_named).map_or(0, |row| row + 1)
    }

    /// Reads the keys (SPAN, d) of a landmark of one head; None where they are not in memory.
    pub(super) fn keys_of(&self, layer: usize, head: usize) -> impl Fn(usize) -> Option<Vec<f32>> {
        move |mark| {
            let mut keys = vec![0f32; SPAN * self.shape.head_dim];
            let page = self.order.get(mark / MARKS)?;
            let first = mark % MARKS * SPAN;
            self.read_rows(*page, layer, 0, head, first, &mut keys).then_some(keys)
        }
    }

    /// Makes room for `bytes` more and for `pages` more in the index: the bytes of the least used pages that the disk has go, but
    /// of none of `kept`. With `let_go`, once there are no such bytes, the oldest pages go with their landmarks, if the disk does
    /// not have them or the index takes more than its share ([`PageStore::lets_go`]). False where there is no room still.
    pub(super) fn make_room(
        &mut self,
        bytes: usize,
        pages: usize,
        kept: &[u64],
        let_go: bool,
    ) -> bool {
        while self.bytes_with(bytes, pages) > self.config.bytes {
            let is_spare = |(page, stored): &(&u64, &mut Stored)| {
                stored.durable && stored.bytes.is_some() && kept.binary_search(page).is_err()
            };
            let spare = self.pages.iter_mut().filter(is_spare).min_by_key(|(_, s)| s.used);
            if let Some((_, stored)) = spare {
                let freed = stored.bytes.take().map_or(0, |bytes| bytes.len() as u64);
                self.resident_bytes -= freed;
            } else if !let_go || !self.lets_go(bytes, pages) || !self.let_go_oldest() {
                return false;
            }
        }
        true
    }

    /// Whether the oldest page is let go for `bytes` more and `pages` more in the index. One that is safe on the disk gives no
    /// more than its landmarks, a fifteenth of a page's bytes: many old ones would be lost for each that waits for the disk.
    /// It stays while the index leaves a share of the budget to what waits, or `bytes` where that is more.
    fn lets_go(&self, bytes: usize, pages: usize) -> bool {
        let Some((_, oldest)) = self.pages.first_key_value() else { return false };
        let waiting = (self.config.bytes / WAITING_PART).max(bytes as u64);
        let index = self.index_bytes(self.pages.len() + pages);
        !oldest.durable || index.saturating_add(waiting) > self.config.bytes
    }

    /// Lets the oldest pages go that were given to the disk, while the index with `pages` more takes more than its share
    /// of the budget, however much could be spared: the rest is for pages, those that wait for the disk and those that are
    /// read.
    pub(super) fn keep_index_share(&mut self, pages: usize) {
        let share = self.config.bytes - self.config.bytes / WAITING_PART;
        while self.index_bytes(self.pages.len() + pages) > share
            && self.pages.first_key_value().is_some_and(|(_, oldest)| oldest.given)
        {
            self.let_go_oldest();
        }
    }

    fn let_go_oldest(&mut self) -> bool {
        let Some((_, stored)) = self.pages.pop_first() else { return false };
        self.resident_bytes -= stored.bytes.map_or(0, |bytes| bytes.len() as u64);
        self.order.remove(0);
        // A layer that has not taken the page in yet will not.
        for head in self.index.iter_mut().flatten().filter(|head| head.len() > 0) {
            head.pop_front(self.shape.head_dim);
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.pop_front();
        }
        true
    }

    pub(super) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Rows of one head of a page as f32 from token `first` on: `kind` 0 for keys, 1 for values; `out` (n, d).
    /// False, and nothing written, where the page is not in memory.
    pub(super) fn read_rows(
        &self,
        page: u64,
        layer: usize,
        kind: usize,
        head: usize,
        first: usize,
        out: &mut [f32],
    ) -> bool {
        let (precision, d) = (self.config.precision, self.shape.head_dim);
        let Some(bytes) = self.pages.get(&page).and_then(|stored| stored.bytes.as_ref()) else {
            return false;
        };
        let row_bytes = precision.row_bytes(d);
        let row = ((2 * layer + kind) * self.shape.num_kv_heads + head) * PAGE_TOKENS + first;
        precision.decode_rows(&bytes[row * row_bytes..], d, out);
        true
    }

    /// All heads' keys or values of a page as they are stored, (num_kv_heads, PAGE_TOKENS) rows; None where the page is
    /// not in memory.
    pub(super) fn stored_rows(&self, page: u64, layer: usize, kind: usize) -> Option<&[u8]> {
        let bytes = self.pages.get(&page)?.bytes.as_ref()?;
        Some(self.rows_in(bytes, layer, kind))
    }

    /// All heads' keys or values of one layer in the bytes of a page.
    pub(super) fn rows_in<'a>(&self, bytes: &'a [u8], layer: usize, kind: usize) -> &'a [u8] {
        let row_bytes = self.config.precision.row_bytes(self.shape.head_dim);
        let half = self.shape.num_kv_heads * PAGE_TOKENS * row_bytes;
        &bytes[(2 * layer + kind) * half..(2 * layer + kind + 1) * half]
    }

    /// Bytes of stored pages by index row, for loops that read many: None where a page is not in memory.
    pub(super) fn bytes_by_row(&self, rows: usize) -> Vec<Option<&[u8]>> {
        // Rows and pages are in the same order, and every page has a row once its layers are in.
        let pages = self.pages.values().take(rows);
        pages.map(|stored| stored.bytes.as_ref().map(|bytes| &***bytes)).collect()
    }

    pub(super) fn heads(&self, layer: usize) -> &[HeadIndex] {
        &self.index[layer]
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Token ids of the first `rows` pages.
    pub(super) fn token_ids(
        &self,
        rows: usize,
    ) -> impl Iterator<Item = (u64, &[u32; PAGE_TOKENS])> {
        self.pages.iter().take(rows).map(|(page, stored)| (*page, &*stored.tokens))
    }

    /// Takes back every page from `end` on, which the window holds again, for a stream that ends at `position`.
    pub(crate) fn truncate(&mut self, end: u64, position: u64) {
        for next in &mut self.next {
            *next = (*next).min(end.max(self.shape.sink_pages));
        }
        for (page, stored) in self.pages.split_off(&end) {
            self.resident_bytes -= stored.bytes.map_or(0, |bytes| bytes.len() as u64);
            self.recent.insert(page, stored.tokens);
        }
        let rows = self.order.partition_point(|page| *page < end);
        self.order.truncate(rows);
        if let Some(mirror) = &mut self.mirror {
            mirror.truncate(rows, end, self.config.rule);
        }
        for head in self.index.iter_mut().flatten() {
            head.truncate(rows, self.shape.head_dim);
        }
        // The outliers are those that were named when the stream was this long.
        let named = self.named_rows();
        (0..self.shape.num_layers).for_each(|layer| self.name_outliers(layer, named));
        if let Some(following) = &mut self.following {
            following.truncate(end, position);
        }
        self.forget_choices();
    }

    /// Ends the reuse of choices: what is recalled next depends on nothing before it.
    pub(crate) fn forget_choices(&mut self) {
        self.held.iter_mut().for_each(|held| *held = Held::default());
    }

    /// Makes sure that angles of positions below `end` are there.
    pub(crate) fn need_angles(&mut self, end: u64, angles: impl Fn(Range<u64>) -> LayerAngles) {
        let have = self.angles.as_ref().map_or(0, LayerAngles::len) as u64;
        if have < end {
            self.angles = Some(angles(0..end.next_power_of_two().max(1024)));
        }
    }

    /// Cosines and sines by which `layer` rotates to a position that [`PageStore::need_angles`] covered.
    pub(super) fn angles_at(&self, layer: usize, position: u64) -> Option<(&[f32], &[f32])> {
        let angles = self.angles.as_ref()?.of(layer);
        (position < angles.len() as u64).then(|| angles.at(position as usize))
    }
}

/// Whether keys are coded: where the processor chooses, and chooses by them.
fn has_codes(config: &PageConfig, device: &Device) -> bool {
    let asked = matches!(config.scan, LandmarkScan::Auto | LandmarkScan::KeyCodes);
    asked && config.rule == PageRule::Mka && !device.is_cuda()
}
