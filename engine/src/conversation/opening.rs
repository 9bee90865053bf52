//! How a session comes back from its snapshot: its window, and beside it the pages that left the window; and how much of its
//! beginning stays in sight where it comes back from its log alone.
//! Knows no file.

use super::{Conversation, StoredPages, page_of};
use crate::cache::Cache;
use crate::engine::Model;
use crate::error::ErrorKind::{Corrupted, Incompatible};
use crate::error::{Error, Result};
use crate::pages::{PageShape, PageStore};
use crate::prompt::without_last_blank;
use crate::snapshot::SessionState;
use mka_memory::{MAX_METADATA_ENTRIES, NewTurn, OpenSnapshot, Scope, TurnId, Value};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;

/// Metadata of the turn in the log that a session with instructions begins with: how many of its tokens stand before its
/// first message, the instructions and the tools that the model may call.
const OPENING_TOKENS: &str = "mka.opening_tokens";

/// Notes that the first `tokens` tokens of `turn` are the instructions of its session. A turn that is marked as often as may
/// be goes without.
pub(crate) fn note_opening(turn: &mut NewTurn, tokens: usize) {
    if turn.metadata.len() < MAX_METADATA_ENTRIES {
        turn.metadata.insert(OPENING_TOKENS.to_owned(), Value::from(tokens as f64));
    }
}

impl Conversation {
    /// Pages at the start of a stream of the turns before `end` that every token is to see: those of its instructions, as the
    /// log says, or as many as there are now. Where the turn that began with them was forgotten, one.
    pub(super) fn sink_pages_before(&self, model: &Model, end: TurnId) -> Result<u64> {
        let first = match &model.scaffold.system {
            Some((before, _)) if !model.scaffold.opening.is_empty() => {
                model.tokenizer.encode_with_specials(without_last_blank(before))?
            }
            _ => model.tokenizer.prefix().to_vec(),
        };
        for id in 0..end {
            let Some(turn) = self.turn_in_stream(id)? else { continue };
            if let Some(Value::Number(tokens)) = turn.metadata.get(OPENING_TOKENS) {
                return Ok(self.sink_pages_of(model, *tokens as usize));
            }
            if !turn.tokens.starts_with(&first) {
                return Ok(1);
            }
            break;
        }
        Ok(match &self.cache {
            Some(cache) => cache.sink_pages(),
            None => u64::from(self.state.sink_pages).clamp(1, self.most_sink_pages(model)),
        })
    }

    /// [`Shared::page_store`] of this conversation.
    pub(super) fn page_store(&self, shape: PageShape, model: &Model) -> Option<PageStore> {
        let mut pages = self.shared.page_store(model, shape)?;
        pages.active = self.recalls_pages;
        Some(pages)
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
        let Some(shape) = self.cache.as_ref().map(|cache| cache.shape().pages()) else { return };
        let Some(mut pages) = self.page_store(shape, model) else { return };
        self.read_from_disk(&mut pages, &self.scope, self.state.stream);
        if let Some(cache) = &mut self.cache {
            cache.keep_pages(pages);
        }
    }

    /// Cache and state as the store's snapshot has them; None where there is none that can be used, which is said.
    ///
    /// # Errors
    /// If the store cannot be read, or the device fails or has no room: what is stored stays.
    pub(super) fn restored(&mut self, model: &Model) -> Result<Option<(Cache, SessionState)>> {
        let snapshot = self.shared.store.open_snapshot(&self.scope, model.decoder.fingerprint);
        let snapshot = snapshot.map_err(Error::from);
        // Also of a stream that is filled anew.
        if let Ok(Some(open)) = &snapshot
            && let Ok((state, _)) = SessionState::from_bytes(&open.state)
        {
            self.state.sink_pages = state.sink_pages;
        }
        let restored =
            snapshot.and_then(|open| open.map(|open| self.brought_back(model, &open)).transpose());
        match restored {
            Err(error) if is_damaged(&error) => {
                tracing::warn!(scope = %self.scope, %error, "snapshot not usable: refilling from the log");
                Ok(None)
            }
            restored => restored,
        }
    }

    /// Window and stored pages side by side: of a long session each reads hundreds of megabytes.
    fn brought_back(
        &self,
        model: &Model,
        snapshot: &OpenSnapshot,
    ) -> Result<(Cache, SessionState)> {
        let (state, ema) = SessionState::from_bytes(&snapshot.state)?;
        let most = self.most_sink_pages(model);
        if u64::from(state.sink_pages) > most {
            let what =
                format!("restore: instructions of {} pages, expected {most}", state.sink_pages);
            return Err(Error::new(Incompatible, what));
        }
        let shape = self.shared.cache_shape(model, state.sinks());
        let position = snapshot.position;
        let end = shape.first_window_page(position);
        let (mut pages, mut known) = (self.page_store(shape.pages(), model), Vec::new());
        if let Some(pages) = pages.as_mut().filter(|_| self.shared.config.evicted_page_bytes > 0) {
            self.read_from_disk(pages, &self.scope, state.stream);
            let keys = self.shared.store.pages(&self.scope)?;
            let keys = keys.iter().filter_map(|key| page_of(*key, state.stream));
            known = keys.filter(|page| *page < end).collect();
            pages.expect(known.len());
        }
        let device = model.decoder.device();
        // Before the stored pages take what room there is on the device.
        let cache = Cache::new(shape, device)?;
        let window = |cache: Cache| {
            let mut pages = snapshot.read_pages()?;
            for (key, _) in &mut pages {
                *key = page_of(*key, state.stream).unwrap_or(u64::MAX);
            }
            cache.restored(position, ema, &pages, |at| model.decoder.frequencies.angles(at))
        };
        let mut restore = || {
            if let Some(pages) = &mut pages {
                pages.restore(&known, end, &state.window_ids);
            }
        };
        // On a thread of its own: one of the pool's might take it up in the middle of another session's token. Who is one
        // of the pool's does both itself, for that thread would wait for the pool.
        let (cache, is_restored) = match rayon::current_thread_index() {
            Some(_) => (window(cache), false),
            None => thread::scope(|scope| {
                let thread = thread::Builder::new().name("mka-open".into());
                let restoring = thread.spawn_scoped(scope, &mut restore);
                let cache = window(cache);
                let is_restored = restoring.is_ok();
                if let Ok(thread) = restoring {
                    thread.join().unwrap_or_else(|panic| resume_unwind(panic));
                }
                (cache, is_restored)
            }),
        };
        if !is_restored {
            restore();
        }
        let mut cache = match cache {
            // Beside the stored pages there may be no room for what restoring the window takes.
            Err(error) if !is_damaged(&error) && pages.as_mut().is_some_and(PageStore::leave) => {
                tracing::warn!(%error, "stored pages leave the device: they are chosen from in host memory");
                window(Cache::new(shape, device)?)?
            }
            cache => cache?,
        };
        if let Some(pages) = pages {
            cache.keep_pages(pages);
        }
        Ok((cache, state))
    }
}

/// Whether what is stored can be used no more, so that a session goes on from its log.
fn is_damaged(error: &Error) -> bool {
    matches!(error.kind(), Corrupted | Incompatible)
}
