//! How a conversation becomes durable: what of it a commit stores, at once or beside the model.
//! Knows no turn's meaning and no file.

use super::{Conversation, key_of, landmarks_key, landmarks_of, page_of};
use crate::cache::Cache;
use crate::engine::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::forgets::Seen;
use crate::pages::FreshPage;
use crate::snapshot::SessionState;
use mka_kernels::PAGE_TOKENS;
use mka_memory::{Commit, Committed, NewPage, NewSnapshot, NewTurn, Scope, TurnId};
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

impl Conversation {
    /// Makes `turns` and, with a model, the whole cache durable. `starts[i]` is where turn i begins in the stream, for
    /// turns that lie in it as a whole. The turns `retract` are taken back, and none that was remembered since they were read.
    pub(crate) fn commit(
        &mut self,
        turns: Vec<NewTurn>,
        starts: &[Option<u64>],
        retract: Option<Range<TurnId>>,
    ) -> Result<Committed> {
        let (prepared, undo) = self.prepare(turns, starts, retract)?;
        let done = prepared.store();
        self.committed(done, undo)
    }

    /// [`Conversation::commit`] on a thread of its own, while the model goes on: the disk is written where it would
    /// otherwise be waited for. It is to be ended before the next one begins, and before the conversation is taken back.
    pub(crate) fn begin_commit(
        &mut self,
        turns: Vec<NewTurn>,
        starts: &[Option<u64>],
    ) -> Result<Pending> {
        let (prepared, undo) = self.prepare(turns, starts, None)?;
        let thread = std::thread::Builder::new().name("mka-commit".into());
        match thread.spawn(move || prepared.store()) {
            Ok(work) => Ok(Pending { work: Work(Some(work)), undo }),
            Err(source) => {
                let what = format!("commit: start a thread: {source}");
                self.undo(undo);
                Err(Error::new(ErrorKind::OutOfMemory, what).with_source(source))
            }
        }
    }

    /// Waits for a commit that was begun.
    pub(crate) fn end_commit(&mut self, pending: Pending) -> Result<Committed> {
        self.committed(pending.work.join(), pending.undo)
    }

    /// What a commit stores, and what is undone if it fails. What is recalled next depends on no choice before it, so that
    /// a session that is opened again recalls the same.
    fn prepare(
        &mut self,
        turns: Vec<NewTurn>,
        starts: &[Option<u64>],
        retract: Option<Range<TurnId>>,
    ) -> Result<(Prepared, Undo)> {
        let next = self.shared.store.num_turns(&self.scope)?;
        let before = self.state.clone();
        if let Some(taken_back) = &retract {
            self.state.turn_starts.retain(|(turn, _)| !taken_back.contains(turn));
        }
        for (i, start) in starts.iter().enumerate() {
            if let Some(start) = start {
                self.state.turn_starts.push((next + i as u64, *start));
            }
        }
        let (snapshot, fresh) = match self.new_snapshot() {
            Ok(snapshot) => snapshot,
            Err(error) => {
                self.state = before;
                return Err(error);
            }
        };
        let (dirty_from, stored_from) = (self.dirty_from, self.stored_from);
        let mut undo =
            Undo { state: before, dirty_from, stored_from, next, handed_over: Vec::new() };
        self.dirty_from = self.position() / PAGE_TOKENS as u64;
        self.stored_from =
            self.cache.as_ref().map_or(0, |cache| cache.first_window_page(cache.position()));
        if let Some(pages) = self.cache.as_mut().and_then(Cache::pages_mut) {
            pages.forget_choices();
            if self.shared.config.evicted_page_bytes > 0 {
                undo.handed_over = pages.hand_over();
            }
        }
        let commit = Commit { turns, snapshot, retract };
        let (shared, scope, forgets) =
            (self.shared.clone(), self.scope.clone(), self.forgets.clone());
        Ok((Prepared { shared, scope, forgets, commit, fresh }, undo))
    }

    /// Notes what the store holds of the stream's pages after a commit, or that it got nothing.
    fn committed(&mut self, done: Result<Committed>, undo: Undo) -> Result<Committed> {
        let committed = match done {
            Ok(committed) => committed,
            Err(error) => {
                self.undo(undo);
                return Err(error);
            }
        };
        // What was remembered in this session meanwhile has taken numbers.
        let taken = committed.turns.first().map_or(0, |first| first.saturating_sub(undo.next));
        let numbers = self.state.turn_starts.iter_mut().map(|(turn, _)| turn);
        numbers.filter(|turn| **turn >= undo.next).for_each(|turn| *turn += taken);
        let stream = self.state.stream;
        let is_kept = self.shared.config.evicted_page_bytes > 0;
        let pages = self.cache.as_mut().and_then(Cache::pages_mut).filter(|_| is_kept);
        if let Some(pages) = pages {
            let keys = self.shared.store.pages(&self.scope)?;
            let of = |page: fn(u64, u32) -> Option<u64>| -> Vec<u64> {
                keys.iter().filter_map(|key| page(*key, stream)).collect()
            };
            pages.set_durable(&of(page_of), &of(landmarks_of));
        }
        Ok(committed)
    }

    /// Takes back what [`Conversation::prepare`] noted of a commit that the store did not get.
    fn undo(&mut self, undo: Undo) {
        if let Some(pages) = self.cache.as_mut().and_then(Cache::pages_mut) {
            pages.not_handed_over(&undo.handed_over);
        }
        (self.state, self.dirty_from) = (undo.state, undo.dirty_from);
        self.stored_from = undo.stored_from;
    }

    /// The snapshot, and the pages that it lacks: those that left the window since the last.
    fn new_snapshot(&mut self) -> Result<(Option<NewSnapshot>, Evicted)> {
        let Some(cache) = &mut self.cache else { return Ok((None, Evicted::new())) };
        let model = self.shared.model("commit")?;
        let stream = self.state.stream;
        cache.absorb_all()?;
        let position = cache.position();
        self.state.sink_pages = cache.sink_pages() as u32;
        let window = cache.window_pages(position);
        let first_page = cache.first_window_page(position);
        let window_start = first_page * PAGE_TOKENS as u64;
        self.state.turn_starts.retain(|(_, start)| *start >= window_start);
        // A stream that was taken back has pages in its window that had left the one that the store holds.
        let left = cache.sink_pages()..self.stored_from;
        let is_dirty = |page: &u64| *page >= self.dirty_from || left.contains(page);
        let dirty = window.iter().copied().filter(is_dirty);
        let pages = cache.page_bytes(&dirty.collect::<Vec<_>>())?;
        let new = |(page, bytes): (u64, Vec<u8>)| (key_of(page, stream), bytes.into());
        let mut pages: Vec<(u64, NewPage)> = pages.into_iter().map(new).collect();
        let mut evicted = Evicted::new();
        if let Some(kept) = cache.pages() {
            self.state.window_ids = kept.noted_tokens(first_page, position);
            if self.shared.config.evicted_page_bytes > 0 {
                evicted = kept.fresh_pages();
                evicted.iter_mut().for_each(|(page, _)| *page = key_of(*page, stream));
                let fresh = kept.fresh_landmarks().into_iter();
                pages
                    .extend(fresh.map(|(page, bytes)| (landmarks_key(page, stream), bytes.into())));
            }
        }
        let window = window.into_iter().map(|page| key_of(page, stream)).collect();
        let snapshot = NewSnapshot {
            fingerprint: model.decoder.fingerprint,
            position,
            state: self.state.to_bytes(&cache.ema_bytes()?)?,
            pages,
            window,
            // Nothing reads pages of the streams before this one any more.
            first_page: key_of(0, stream),
        };
        Ok((Some(snapshot), evicted))
    }
}

/// Pages that left the window since the commit before, by the store's index.
type Evicted = Vec<(u64, FreshPage)>;

/// A commit that needs nothing of its conversation any more.
struct Prepared {
    shared: Arc<Shared>,
    scope: Scope,
    forgets: Seen,
    commit: Commit,
    /// Pages of the snapshot whose bytes the conversation holds too.
    fresh: Evicted,
}

impl Prepared {
    fn store(mut self) -> Result<Committed> {
        if let Some(snapshot) = &mut self.commit.snapshot {
            snapshot.pages.extend(self.fresh.iter().map(|(key, page)| (*key, page.to_new())));
        }
        // What the model has read since may be what was erased. Processes that share it would not all see it at once.
        let held = self.forgets.hold();
        if held.is_none() && self.shared.group().is_none() {
            return Err(Error::new(
                ErrorKind::Cancelled,
                format!(
                    "commit: words of user {} were forgotten meanwhile, expected none",
                    self.scope.user_id()
                ),
            ));
        }
        Ok(self.shared.store.commit(&self.scope, self.commit)?)
    }
}

/// What a commit that fails leaves as it was.
struct Undo {
    state: SessionState,
    dirty_from: u64,
    stored_from: u64,
    /// The number that the first of the turns was to have.
    next: TurnId,
    /// Pages that the store was given for the first time.
    handed_over: Vec<u64>,
}

/// A commit under way: [`Conversation::end_commit`] waits for it.
pub(crate) struct Pending {
    work: Work,
    undo: Undo,
}

impl Pending {
    /// Whether there is nothing to wait for.
    pub(crate) fn is_done(&self) -> bool {
        self.work.0.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

/// The thread of a commit, which is never left behind: what it writes late would follow what the session did since.
struct Work(Option<JoinHandle<Result<Committed>>>);

impl Work {
    fn join(mut self) -> Result<Committed> {
        let Some(thread) = self.0.take() else { return Err(Error::cancelled("commit")) };
        thread.join().unwrap_or_else(|payload| Err(Error::panicked("commit", &*payload)))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // Whatever comes of it, nobody is left to hear.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_commits_thread_is_a_fault_of_the_library() {
        let work = Work(Some(std::thread::spawn(|| panic!("as the test wants"))));
        let error = work.join().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert_eq!(error.to_string(), "commit: the library panicked: as the test wants");
    }
}
