//! Measures what a card's session with pages does when it is opened again, part by part and without a model; opt-in, by
//! `MKA_OPENING_PAGES`, the number of pages, and on a card with `MKA_INTAKE_DEVICE=cuda`; `MKA_OPENING_FOLDER` keeps the store.
//! Knows the store of pages and the memory store; keys and values are made up.

use super::intake::{LANDMARKS, Parts, SHAPE, device, feed, scope};
use crate::error::Result;
use crate::pages::{LandmarkScan, PageConfig, PageSource, PageStore};
use mka_kernels::PAGE_TOKENS;
use mka_memory::{HashedEmbedder, Store, StoreOptions};
use std::path::Path;
use std::sync::Arc;

/// As the session's store has them.
struct Disk(Arc<Store>);

impl PageSource for Disk {
    fn page(&self, page: u64) -> Result<Option<Vec<u8>>> {
        Ok(self.0.page(&scope(), page)?)
    }

    fn page_into(&self, page: u64, out: &mut [u8]) -> Result<Option<usize>> {
        Ok(self.0.page_into(&scope(), page, out)?)
    }

    fn landmarks(&self, page: u64) -> Result<Option<Vec<u8>>> {
        Ok(self.0.page(&scope(), page | LANDMARKS)?)
    }
}

fn open(folder: &Path) -> Store {
    let options = StoreOptions { evicted_page_bytes: 64 << 30, ..StoreOptions::default() };
    Store::open(folder, Arc::new(HashedEmbedder::new()), options).unwrap()
}

#[test]
fn a_cards_session_that_is_opened_again() {
    let Some(pages) = std::env::var("MKA_OPENING_PAGES").ok().and_then(|n| n.parse().ok()) else {
        return;
    };
    let own;
    let folder = match std::env::var_os("MKA_OPENING_FOLDER") {
        Some(folder) => Path::new(&folder).to_owned(),
        None => {
            own = tempfile::tempdir().unwrap();
            own.path().to_owned()
        }
    };
    if !folder.join("segments").exists() {
        feed(pages, 3, false, Some(&open(&folder))).print("fed", pages);
    }
    for round in 0..3 {
        let mut parts = Parts::default();
        let store = Arc::new(parts.time("store opened", || open(&folder)));
        let keys = store.pages(&scope()).unwrap();
        let known: Vec<u64> = keys.iter().copied().filter(|key| key & LANDMARKS == 0).collect();
        let (first_layer, bytes, scan) = (3, 32 << 30, LandmarkScan::Flat);
        let config = PageConfig { first_layer, bytes, scan, ..PageConfig::default() };
        let mut restored = PageStore::new(SHAPE.pages(), config, &device());
        restored.mirror = None;
        restored.set_source(Arc::new(Disk(store)));
        let end = known.last().unwrap() + 1 - (SHAPE.window_tokens / PAGE_TOKENS) as u64;
        parts.time("landmarks taken in", || restored.restore(&known, end, &[]));
        parts.time("pages read and laid out, no device", || restored.read_all());
        restored.mirror_on_device();
        let rows = restored.order.len();
        parts.time("room made on the device", || {
            let mirror = restored.mirror.as_mut().unwrap();
            assert!(mirror.places(rows).unwrap().is_some());
            mirror.device().synchronize().unwrap();
        });
        parts.time("memory to read into", || restored.stage());
        parts.time("device filled", || {
            restored.fill_mirror();
            device().synchronize().unwrap();
        });
        assert!(restored.mirror.is_some());
        parts.print(&format!("round {round}"), restored.order.len());
    }
}
