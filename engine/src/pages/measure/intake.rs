//! Measures what a card's session does on the host with the pages that leave its window, part by part and without a model;
//! opt-in, by `MKA_INTAKE_PAGES`, the number of pages, and on a card with `MKA_INTAKE_DEVICE=cuda`.
//! Knows the cache, its store of pages and the memory store; keys and values are made up.

use crate::cache::{Cache, CacheShape};
use crate::models::frequencies::{Frequencies, LayerFrequencies, RopeScaling};
use crate::pages::{LandmarkScan, PageConfig, PageStore};
use candle_core::{Device, Tensor};
use mka_kernels::PAGE_TOKENS;
use mka_memory::{Commit, HashedEmbedder, NewSnapshot, Scope, Store, StoreOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The default model's.
pub(super) const SHAPE: CacheShape = CacheShape {
    sink_pages: 1,
    num_layers: 30,
    num_kv_heads: 3,
    head_dim: 64,
    hidden_size: 576,
    num_rates: 0,
    window_tokens: 2048,
    block_tokens: 512,
};
/// Set in the number of a page's landmarks.
pub(super) const LANDMARKS: u64 = 1 << 39;
/// As `feeding.rs` has them.
const COMMIT_TOKENS: usize = 8192;

/// How long each part took.
#[derive(Default)]
pub(super) struct Parts(Vec<(&'static str, Duration)>);

impl Parts {
    pub(super) fn time<T>(&mut self, part: &'static str, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let out = work();
        let took = started.elapsed();
        match self.0.iter_mut().find(|(own, _)| *own == part) {
            Some((_, all)) => *all += took,
            None => self.0.push((part, took)),
        }
        out
    }

    pub(super) fn print(&self, name: &str, pages: usize) {
        let all: Duration = self.0.iter().map(|(_, took)| *took).sum();
        for (part, took) in self.0.iter().chain([&("all", all)]) {
            println!(
                "| {name} | {part} | {:.3} ms a page |",
                took.as_secs_f64() * 1e3 / pages as f64
            );
        }
    }
}

/// The processor, or the card that is asked for.
pub(super) fn device() -> Device {
    match std::env::var("MKA_INTAKE_DEVICE").as_deref() {
        // As sessions have it.
        Ok("cuda") => crate::Device::Cuda(0).open().unwrap(),
        _ => Device::Cpu,
    }
}

/// Keys and values of a block in turn, (tokens, num_kv_heads, head_dim): a part in common, as a model's keys have it, and
/// noise.
fn blocks(device: &Device) -> Vec<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let shape = (SHAPE.block_tokens, SHAPE.num_kv_heads, SHAPE.head_dim);
    let count = shape.0 * shape.1 * shape.2;
    let block = |_| {
        let numbers: Vec<f32> =
            (0..count).map(|i| (i % 64) as f32 / 32.0 + rng.random_range(-1f32..1.0)).collect();
        Tensor::from_vec(numbers, shape, device).unwrap()
    };
    (0..61).map(block).collect()
}

/// Feeds `pages` pages; with `first_layer` and a mirror as given, and commits to `store`.
pub(super) fn feed(
    pages: usize,
    first_layer: usize,
    mirrored: bool,
    store: Option<&Store>,
) -> Parts {
    let config = PageConfig {
        first_layer,
        bytes: 32 << 30,
        // A card's session has no codes of keys.
        scan: LandmarkScan::Flat,
        ..PageConfig::default()
    };
    let frequencies = Frequencies::new(1e5, SHAPE.head_dim, &RopeScaling::None);
    let frequencies = LayerFrequencies::uniform(frequencies, SHAPE.num_layers);
    let device = device();
    let mut cache = Cache::new(SHAPE, &device).unwrap();
    cache.keep_pages(PageStore::new(SHAPE.pages(), config, &device));
    if mirrored && device.is_cpu() {
        cache.pages_mut().unwrap().mirror_on_device();
    }
    let blocks = blocks(&device);
    let mut parts = Parts::default();
    let (mut uncommitted, mut dirty_from) = (0, 0);
    for block in 0..(pages * PAGE_TOKENS + SHAPE.window_tokens) / SHAPE.block_tokens {
        let start = cache.position();
        cache.reserve(SHAPE.block_tokens).unwrap();
        parts.time("taken in", || cache.absorb_ahead(SHAPE.block_tokens).unwrap());
        let angles = frequencies.angles(start..start + SHAPE.block_tokens as u64);
        let end = cache.first_window_page(start + SHAPE.block_tokens as u64 - 1);
        for layer in 0..SHAPE.num_layers {
            let numbers = |i: usize| &blocks[(block * 5 + layer * 7 + i) % blocks.len()];
            cache.write(layer, numbers(0), numbers(1), &angles).unwrap();
            parts.time("taken in", || cache.absorb(layer..layer + 1, end).unwrap());
            // A choice on a card wants every page there.
            parts.time("uploaded", || cache.pages_mut().unwrap().mirror_layer(layer, 1));
        }
        cache.advance(SHAPE.block_tokens);
        uncommitted += SHAPE.block_tokens;
        if let Some(store) = store.filter(|_| uncommitted >= COMMIT_TOKENS) {
            commit(&mut cache, store, dirty_from, &mut parts);
            (uncommitted, dirty_from) = (0, cache.position() / PAGE_TOKENS as u64);
        }
    }
    parts
}

/// The session that pages are committed to.
pub(super) fn scope() -> Scope {
    Scope::user("ada").session("long")
}

/// What `Conversation::commit` does with pages.
fn commit(cache: &mut Cache, store: &Store, dirty_from: u64, parts: &mut Parts) {
    parts.time("taken in", || cache.absorb_all().unwrap());
    let window = cache.window_pages(cache.position());
    let dirty: Vec<u64> = window.iter().copied().filter(|page| *page >= dirty_from).collect();
    let own = parts.time("window as bytes", || cache.page_bytes(&dirty).unwrap());
    let mut pages: Vec<_> = own.into_iter().map(|(page, bytes)| (page, bytes.into())).collect();
    let kept = cache.pages().unwrap();
    pages.extend(kept.fresh_pages().iter().map(|(page, fresh)| (*page, fresh.to_new())));
    let landmarks = parts.time("landmarks as bytes", || kept.fresh_landmarks());
    pages.extend(landmarks.into_iter().map(|(page, bytes)| (page | LANDMARKS, bytes.into())));
    let snapshot = NewSnapshot {
        fingerprint: [0; 16],
        position: cache.position(),
        state: Vec::new(),
        pages,
        window,
        first_page: 0,
    };
    let scope = scope();
    let commit = Commit { snapshot: Some(snapshot), ..Commit::default() };
    parts.time("committed, beside the model", || store.commit(&scope, commit).unwrap());
    parts.time("marked as stored", || {
        let keys = store.pages(&scope).unwrap();
        let of = |landmarks: u64| -> Vec<u64> {
            let own = keys.iter().filter(|key| **key & LANDMARKS == landmarks);
            own.map(|key| key & !LANDMARKS).collect()
        };
        cache.pages_mut().unwrap().hand_over();
        cache.pages_mut().unwrap().set_durable(&of(0), &of(LANDMARKS));
    });
}

#[test]
fn pages_that_leave_the_window_of_a_cards_session() {
    let Some(pages) = std::env::var("MKA_INTAKE_PAGES").ok().and_then(|n| n.parse().ok()) else {
        return;
    };
    feed(pages, SHAPE.num_layers, false, None).print("held, not indexed", pages);
    feed(pages, 3, false, None).print("with landmarks", pages);
    feed(pages, 3, true, None).print("with a device's copy", pages);
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions { evicted_page_bytes: 64 << 30, ..StoreOptions::default() };
    let store = Store::open(folder.path(), Arc::new(HashedEmbedder::new()), options).unwrap();
    feed(pages, 3, true, Some(&store)).print("committed too", pages);
}
