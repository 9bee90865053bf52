//! How a session comes back from its snapshot: its window, and beside it the pages that left the window.
//! Knows no turn's meaning and no file.

use super::{Conversation, StoredPages, page_of};
use crate::cache::Cache;
use crate::engine::Model;
use crate::error::{Error, ErrorKind, Result};
use crate::pages::PageStore;
use crate::snapshot::SessionState;
use mka_memory::{OpenSnapshot, Scope};
use std::sync::Arc;

impl Conversation {
    /// A store for the pages that leave the window, none in it yet; None where they are not recalled.
    pub(super) fn page_store(&self, model: &Model) -> Option<PageStore> {
        let config = &self.shared.config;
        let shape = self.shared.cache_shape(model).pages();
        config.recall.has_pages().then(|| {
            let mut pages = PageStore::new(shape, config.pages.clone(), model.decoder.device());
            pages.active = self.recalls_pages;
            pages
        })
    }

    /// Says that `pages` are read from the disk as `scope`'s of `stream`, if it keeps what leaves the window.
    pub(super) fn read_from_disk(&self, pages: &mut PageStore, scope: &Scope, stream: u32) {
        if self.shared.config.evicted_page_bytes > 0 {
            let (shared, scope) = (self.shared.clone(), scope.clone());
            pages.set_source(Arc::new(StoredPages { shared, scope, stream }));
        }
    }

    /// Keeps the pages that leave the window from now on, if the configuration asks for them.
    pub(super) fn keep_pages(&mut self, model: &Model) {
        let Some(mut pages) = self.page_store(model) else { return };
        self.read_from_disk(&mut pages, &self.scope, self.state.stream);
        if let Some(cache) = &mut self.cache {
            cache.keep_pages(pages);
        }
    }

    /// The cache as the store's snapshot has it, and what is recalled; None where there is none that can be used, which is
    /// said.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub(super) fn restored(&self, model: &Model) -> Result<Option<(Cache, SessionState)>> {
        let store = &self.shared.store;
        let (mut pages, mut keys) = (self.page_store(model), Vec::new());
        if let Some(pages) = pages.as_mut().filter(|_| self.shared.config.evicted_page_bytes > 0) {
            keys = store.pages(&self.scope)?;
            pages.expect(keys.len());
        }
        let pages = pages.map(|own| (own, keys));
        let snapshot = store.open_snapshot(&self.scope, model.decoder.fingerprint);
        let brought_back = |open: OpenSnapshot| self.brought_back(model, &open, pages);
        let restored = snapshot.map_err(Error::from);
        let restored = restored.and_then(|open| open.map(brought_back).transpose());
        match restored {
            Err(error) if error.kind() != ErrorKind::Storage => {
                tracing::warn!(scope = %self.scope, %error, "snapshot not usable: refilling from the log");
                Ok(None)
            }
            restored => restored,
        }
    }

    /// Window and stored pages side by side: of a long session each reads hundreds of megabytes. `pages` come with the keys
    /// of what the store holds.
    fn brought_back(
        &self,
        model: &Model,
        snapshot: &OpenSnapshot,
        pages: Option<(PageStore, Vec<u64>)>,
    ) -> Result<(Cache, SessionState)> {
        let (state, ema) = SessionState::from_bytes(&snapshot.state)?;
        let (shape, position) = (self.shared.cache_shape(model), snapshot.position);
        let window = || {
            let mut pages = snapshot.read_pages()?;
            for (key, _) in &mut pages {
                *key = page_of(*key, state.stream).unwrap_or(u64::MAX);
            }
            let (device, frequencies) = (model.decoder.device(), &model.decoder.frequencies);
            Cache::restore(shape, device, position, ema, &pages, |at| frequencies.angles(at))
        };
        let stored = || {
            let (mut pages, keys) = pages?;
            self.read_from_disk(&mut pages, &self.scope, state.stream);
            let keys = keys.iter().filter_map(|key| page_of(*key, state.stream));
            let known: Vec<u64> = keys.collect();
            pages.restore(&known, shape.first_window_page(position), &state.window_ids);
            Some(pages)
        };
        let (cache, pages) = rayon::join(window, stored);
        let mut cache = cache?;
        if let Some(pages) = pages {
            cache.keep_pages(pages);
        }
        Ok((cache, state))
    }
}
