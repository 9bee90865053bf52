//! The live state of one session: its cache, its place in the chat template, what of the log the model still sees.
//! Knows no stream of events and no wire format; it changes only through whole operations that can be taken back.

mod align;
mod batch;
mod commit;
mod opening;
#[cfg(test)]
mod tests;

pub(crate) use batch::note_batch;
pub(crate) use commit::Pending;
pub(crate) use opening::note_opening;

use crate::attention::AttentionSeam;
use crate::cache::{Cache, Checkpoint};
use crate::engine::{Model, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::forgets::Seen;
use crate::pages::{Message, PageSource, PageStore, PageUsage, RecallPolicy};
use crate::snapshot::{OpenTurn, SessionState};
use candle_core::Tensor;
use mka_kernels::{PAGE_TOKENS, on_pool};
use mka_memory::{PageBytes, Role, Scope, Turn, TurnId, Value};
use std::sync::Arc;

/// Metadata of a quotation in the log: tokens of the message that stand before it.
pub(crate) const TOKENS_BEFORE: &str = "tokens_before";
/// Tokens that the repetition penalty looks back on.
const RECENT_TOKENS: usize = 256;

pub(crate) struct Conversation {
    pub(crate) shared: Arc<Shared>,
    pub(crate) scope: Scope,
    /// None without a model.
    cache: Option<Cache>,
    pub(crate) state: SessionState,
    /// Pages from this one on differ from what the store holds.
    dirty_from: u64,
    /// The first page of the window that the store holds, beside the sinks.
    stored_from: u64,
    /// Where the last answer began, for `regenerate`; None after a reopening.
    pub(crate) last_prompt: Option<LastPrompt>,
    /// Whether queries recall pages now.
    recalls_pages: bool,
    /// What had been forgotten before the store was read.
    forgets: Seen,
    /// Whether something that failed left it in between: it is to be what the store holds.
    pub(crate) is_half_way: bool,
}

/// What is needed to answer the last message again.
#[derive(Clone)]
pub(crate) struct LastPrompt {
    /// The turn of its answer: behind another one it is not the last message.
    pub(crate) answer: TurnId,
    /// Before the prompt's last token, whose logits choose the first token of the answer.
    pub(crate) before_last: Saved,
    pub(crate) last_token: u32,
    pub(crate) answer_prefix: String,
    /// Whether the answer goes on in the message's text.
    pub(crate) completion: bool,
    /// What the message asked of the stored pages.
    pub(crate) message: Message,
}

/// A point that the conversation can be taken back to.
#[derive(Clone)]
pub(crate) struct Saved {
    checkpoint: Option<Checkpoint>,
    state: SessionState,
}

impl Saved {
    /// Notes where turns from `first` on, which were committed since, begin in the stream: `starts[i]` is for those that lie in
    /// it as a whole.
    pub(crate) fn note_starts(&mut self, first: TurnId, starts: Vec<Option<u64>>) {
        let placed = (first..).zip(starts).filter_map(|(turn, start)| Some((turn, start?)));
        self.state.turn_starts.extend(placed);
    }
}

impl Conversation {
    /// Opens the session of `scope`: new, restored from its snapshot, or refilled from its log.
    pub(crate) fn open(shared: Arc<Shared>, scope: Scope) -> Result<Self> {
        Self::open_with(shared, scope, 1)
    }

    /// [`Conversation::open`]; without a snapshot every token sees the first `sink_pages` pages, if the log says nothing else.
    fn open_with(shared: Arc<Shared>, scope: Scope, sink_pages: u64) -> Result<Self> {
        let forgets = shared.forgets.seen(&scope);
        let num_turns = shared.store.num_turns(&scope)?;
        let mut conversation = Self {
            forgets,
            cache: None,
            state: SessionState { sink_pages: sink_pages as u32, ..SessionState::default() },
            dirty_from: 0,
            stored_from: 0,
            is_half_way: false,
            last_prompt: None,
            recalls_pages: shared.config.recall.has_pages(),
            shared: shared.clone(),
            scope,
        };
        let Some(model) = &shared.model else {
            return Ok(conversation);
        };
        let restored = conversation.restored(model)?;
        if let Some(group) = shared.group() {
            let sink_pages = u64::from(conversation.state.sink_pages);
            conversation.state.sink_pages = group.first(sink_pages)? as u32;
            let position = restored.as_ref().map_or(u64::MAX, |(cache, _)| cache.position());
            if let Some(end) = conversation.common_end(position)? {
                // Before another cache takes its room.
                drop(restored);
                conversation.refill(end, false)?;
                conversation.commit(Vec::new(), &[], Some(end..num_turns.max(end)))?;
                return Ok(conversation);
            }
        }
        if let Some((cache, state)) = restored {
            conversation.dirty_from = cache.position() / PAGE_TOKENS as u64;
            conversation.stored_from = cache.first_window_page(cache.position());
            conversation.cache = Some(cache);
            conversation.state = state;
            return Ok(conversation);
        }
        if num_turns > 0 {
            conversation.refill(num_turns, false)?;
        } else {
            conversation.begin(model)?;
        }
        Ok(conversation)
    }

    /// Begins an empty stream of as many sinks as the state says.
    ///
    /// # Errors
    /// If the device has no room: there is none then.
    fn begin(&mut self, model: &Model) -> Result<()> {
        // The new one wants its room.
        self.cache = None;
        let shape = self.shared.cache_shape(model, self.state.sinks());
        self.cache = Some(Cache::new(shape, model.decoder.device())?);
        self.keep_pages(model);
        Ok(())
    }

    /// Pages at the start of a stream that every token may see: as many as the trained length leaves beside the window and
    /// what is recalled, and one at least.
    fn most_sink_pages(&self, model: &Model) -> u64 {
        let config = &self.shared.config;
        let recalled = match config.recall.has_pages() {
            true => config.pages.tokens.next_multiple_of(PAGE_TOKENS),
            false => 0,
        };
        // The window begins with a whole page.
        let others = config.window_tokens + PAGE_TOKENS + recalled;
        let beside = model.decoder.config.trained_tokens.saturating_sub(others);
        (beside / PAGE_TOKENS).max(1) as u64
    }

    /// Pages at the start of a stream that keep its first `tokens` tokens in sight, as far as may be.
    fn sink_pages_of(&self, model: &Model, tokens: usize) -> u64 {
        (tokens.div_ceil(PAGE_TOKENS) as u64).clamp(1, self.most_sink_pages(model))
    }

    /// Keeps the first `tokens` tokens of a stream, what stands before its first message, in sight of all that follow, in
    /// whole pages, as far as may be. Without effect on a stream that has begun.
    ///
    /// # Errors
    /// If the device has no room.
    pub(crate) fn keep_opening(&mut self, tokens: usize) -> Result<()> {
        let shared = self.shared.clone();
        let Some(model) = &shared.model else { return Ok(()) };
        let sink_pages = self.sink_pages_of(model, tokens);
        let is_so = |cache: &Cache| cache.position() > 0 || cache.sink_pages() == sink_pages;
        if self.cache.as_ref().is_some_and(is_so) {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.state.sink_pages, sink_pages as u32);
        self.is_half_way = true;
        // A stream that is opened again has the sinks that there was room for.
        self.begin(model).inspect_err(|_| self.state.sink_pages = before)?;
        self.is_half_way = false;
        if let Some(pages) = self.cache.as_mut().and_then(Cache::pages_mut) {
            pages.begin_turn();
        }
        Ok(())
    }

    /// The same conversation as the session `scope`, which is made: what it holds now in memory and on the disk, and
    /// nothing of what comes.
    pub(crate) fn fork(&self, scope: &Scope) -> Result<Self> {
        let (shared, stream) = (self.shared.clone(), self.state.stream);
        // First, for the device may have no room, and what is stored stays.
        let mut cache = self.cache.as_ref().map(Cache::fork).transpose()?;
        shared.store.fork(&self.scope, scope.session_id().unwrap_or_default())?;
        if let Some(pages) = cache.as_mut().and_then(Cache::pages_mut) {
            self.read_from_disk(pages, scope, stream);
        }
        Ok(Self {
            shared,
            scope: scope.clone(),
            cache,
            state: self.state.clone(),
            dirty_from: self.dirty_from,
            stored_from: self.stored_from,
            is_half_way: self.is_half_way,
            last_prompt: self.last_prompt.clone(),
            recalls_pages: self.recalls_pages,
            forgets: self.forgets.clone(),
        })
    }

    /// Says by what the next queries of `operation` recall.
    ///
    /// # Errors
    /// `InvalidArgument` if `policy` asks for pages and the engine keeps none.
    pub(crate) fn set_policy(&mut self, operation: &str, policy: RecallPolicy) -> Result<()> {
        if policy.has_pages() && !self.shared.config.recall.has_pages() {
            return Err(Error::invalid(format!(
                "{operation}: recall {policy:?}, expected an engine opened with MemoryConfig::recall Pages or Both"
            )));
        }
        self.recalls_pages = policy.has_pages();
        if let Some(pages) = self.cache.as_mut().and_then(Cache::pages_mut) {
            pages.active = self.recalls_pages;
            pages.begin_turn();
        }
        Ok(())
    }

    /// Reads a message's prompt, of which `message` are its own tokens: [`Conversation::prefill`], and what it asks of the
    /// stored pages stands for its answer. The places of its rare words are pinned, if the configuration asks for it.
    ///
    /// # Errors
    /// As [`Conversation::prefill`].
    pub(crate) fn prefill_message(
        &mut self,
        message: &[u32],
        prompt: &[u32],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let pins_words = self.recalls_pages && self.shared.config.pages.lexical;
        if let Some(pages) = self.cache.as_mut().and_then(Cache::pages_mut) {
            pages.begin_message();
            if pins_words {
                pages.pin_words(message);
            }
        }
        let read = self.prefill(prompt, go_on);
        if let Some(pages) = self.cache.as_mut().and_then(Cache::pages_mut) {
            pages.end_message();
        }
        read.map(|_| ())
    }

    /// What the message that was read last asks of the stored pages.
    pub(crate) fn message(&self) -> Message {
        self.pages().map_or_else(Message::default, |pages| pages.message.clone())
    }

    /// Asks again what a message asked.
    pub(crate) fn set_message(&mut self, message: &Message) {
        if let Some(pages) = self.cache.as_mut().and_then(Cache::pages_mut) {
            pages.message = message.clone();
        }
    }

    /// What the turn recalled inside attention; None where its policy recalls no pages.
    pub(crate) fn page_usage(&self) -> Result<Option<PageUsage>> {
        let Some(pages) = self.pages().filter(|pages| pages.active) else { return Ok(None) };
        let usage = pages.usage()?;
        tracing::debug!(
            stored = usage.stored_tokens,
            recalled = usage.recalled_tokens,
            share = ?usage.share,
            recovered = ?usage.recovered,
            "recalled inside attention"
        );
        Ok(Some(usage))
    }

    fn pages(&self) -> Option<&PageStore> {
        self.cache.as_ref().and_then(Cache::pages)
    }

    /// Whether so many pages wait to be committed that the budget would soon lose one.
    pub(crate) fn pages_wait(&self) -> bool {
        self.shared.config.evicted_page_bytes > 0
            && self.pages().is_some_and(PageStore::is_short_of_room)
    }

    /// Whether the model may go on while a commit is written: no page would be let go before the disk has it.
    pub(crate) fn may_go_on(&self) -> bool {
        self.shared.config.evicted_page_bytes == 0
            || self.pages().is_none_or(PageStore::holds_a_commit)
    }

    /// Fills the cache anew from the log's tokens before turn `end`: the first pages of the stream that every token sees,
    /// whatever turns lie in them, and its last window. A stream that is no longer than both is filled in whole; of another,
    /// what lies between is left out.
    ///
    /// With `hold_last` the last token of a message to be answered is left out and returned, for an answer to begin from it.
    pub(crate) fn refill(&mut self, end: TurnId, hold_last: bool) -> Result<Option<u32>> {
        let shared = self.shared.clone();
        let model = shared.model("refill")?;
        let window = shared.config.window_tokens;
        let sink_pages = self.sink_pages_before(model, end)?;
        let head_tokens = sink_pages as usize * PAGE_TOKENS;
        let is_held = hold_last && self.ends_asked(end)?;
        let (mut newest, mut newest_tokens, mut from) = (Vec::new(), 0, end);
        while from > 0 && newest_tokens < window + usize::from(hold_last) {
            from -= 1;
            if let Some(turn) = self.turn_in_stream(from)? {
                newest_tokens += turn.tokens.len();
                newest.push(turn);
            }
        }
        let (mut turns, mut oldest_tokens, mut next) = (Vec::new(), 0, 0);
        while next < from && oldest_tokens < head_tokens {
            if let Some(turn) = self.turn_in_stream(next)? {
                oldest_tokens += turn.tokens.len();
                turns.push(turn);
            }
            next += 1;
        }
        let gap = (next < from).then_some(turns.len());
        turns.extend(newest.into_iter().rev());
        batch::mend(model, &mut turns, gap)?;
        let held = turns.last_mut().filter(|_| is_held).and_then(|turn| turn.tokens.pop());
        let tokens: usize = turns.iter().map(|turn| turn.tokens.len()).sum();
        // By the tokens of `turns`; turns that were not read lie between the two as well.
        let window_start = tokens.saturating_sub(window);
        let left_out = head_tokens.min(window_start)..window_start;
        self.dirty_from = 0;
        self.last_prompt = None;
        // The stream is counted from 0 again: what the store holds of the one before is no page of this one.
        let last = shared.store.pages(&self.scope)?.last().map_or(0, |key| key >> STREAM_SHIFT);
        let stream = self.state.stream.max(last as u32) + 1;
        self.state = SessionState {
            stream,
            open: match turns.last().map(|turn| turn.role) {
                None => OpenTurn::Start,
                Some(Role::Document) => OpenTurn::User,
                // A message ends where its answer begins: one that has none is an answer without a word.
                Some(_) => OpenTurn::Answered { closed_by: None },
            },
            sink_pages: sink_pages as u32,
            ..SessionState::default()
        };
        self.begin(model)?;
        let mut first = 0;
        for Turn { id, tokens, .. } in &turns {
            let within = |at: usize| at.saturating_sub(first).min(tokens.len());
            let (head, tail) = (within(left_out.start), within(left_out.end));
            let start = self.position();
            self.prefill(&tokens[..head], &mut || true)?;
            self.prefill(&tokens[tail..], &mut || true)?;
            if head == tail {
                self.state.turn_starts.push((*id, start));
            }
            first += tokens.len();
        }
        Ok(held)
    }

    /// Whether the stream of the turns before `end` ends with a message to be answered. One that was forgotten is none, and
    /// neither is what is left of one whose end was.
    pub(crate) fn ends_asked(&self, end: TurnId) -> Result<bool> {
        let is_gone = |turn: Turn| turn.forgotten && is_asked(turn.role);
        for id in (0..end).rev() {
            if let Some(turn) = self.turn_in_stream(id)? {
                return Ok(is_asked(turn.role));
            }
            if self.live_turn(id)?.is_some_and(is_gone) {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Turn `id` with all that the model read for it, if it did and the turn was not taken back; the quotation in a message is
    /// a turn of its own in the log. What was remembered as text alone stands in no stream.
    fn turn_in_stream(&self, id: TurnId) -> Result<Option<Turn>> {
        let is_read = |turn: &Turn| turn.role != Role::Recalled && !turn.tokens.is_empty();
        let Some(mut own) = self.live_turn(id)?.filter(is_read) else { return Ok(None) };
        if is_asked(own.role)
            && let Some(quoted) = self.live_turn_before(id)?
            && quoted.role == Role::Recalled
            && let Some(Value::Number(before)) = quoted.metadata.get(TOKENS_BEFORE)
        {
            let at = (*before as usize).min(own.tokens.len());
            own.tokens.splice(at..at, quoted.tokens);
        }
        Ok(Some(own))
    }

    /// Who said the newest turn of the stream that was not taken back. An answer of no token is one too: its words, if it has
    /// any, are those that it was begun with, at the end of its message. What was remembered beside the stream is none.
    pub(crate) fn last_role(&self) -> Result<Option<Role>> {
        let tokenizer = &self.shared.model("append")?.tokenizer;
        let is_said = |turn: &Turn| turn.role != Role::Recalled && !turn.forgotten;
        for id in (0..self.num_turns()?).rev() {
            let Some(own) = self.live_turn(id)?.filter(is_said) else { continue };
            if !own.tokens.is_empty() {
                return Ok(Some(own.role));
            }
            if own.role == Role::Assistant
                && let Some(message) = self.live_turn_before(id)?.filter(is_said)
                && is_asked(message.role)
            {
                // Behind the template's text, behind a blank of it, or as a text by itself.
                let words = [
                    tokenizer.encode_inside(&own.text, false)?,
                    tokenizer.encode_inside(&format!(" {}", own.text), false)?,
                    tokenizer.encode(&own.text, false)?,
                ];
                if words.iter().any(|words| message.tokens.ends_with(words)) {
                    return Ok(Some(own.role));
                }
            }
        }
        Ok(None)
    }

    /// The newest words of the user that the model read, if they were neither taken back nor forgotten.
    pub(crate) fn last_words(&self) -> Result<Option<Turn>> {
        let is_said = |turn: &Turn| {
            turn.role == Role::User && !turn.text.is_empty() && !turn.tokens.is_empty()
        };
        for id in (0..self.num_turns()?).rev() {
            let asked = self.live_turn(id)?.filter(is_said);
            if asked.is_some() {
                return Ok(asked);
            }
        }
        Ok(None)
    }

    /// The newest turn of the log that was not taken back.
    pub(crate) fn last_turn(&self) -> Result<Option<Turn>> {
        for id in (0..self.num_turns()?).rev() {
            if let Some(found) = self.live_turn(id)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Turn `id`, if it was not taken back.
    fn live_turn(&self, id: TurnId) -> Result<Option<Turn>> {
        let turn = self.shared.store.turns(&self.scope, id..id + 1)?.pop();
        Ok(turn.filter(|turn| !turn.retracted))
    }

    fn live_turn_before(&self, id: TurnId) -> Result<Option<Turn>> {
        id.checked_sub(1).map_or(Ok(None), |id| self.live_turn(id))
    }

    /// Takes every turn from `turn` on back, as if it had never been said; the window is filled from the turns before it.
    /// Results that were given together are one message: of those all are taken back.
    ///
    /// # Errors
    /// `NotFound` if the log does not reach to `turn`. After an error the session stands where it stood.
    pub(crate) fn rewind(&mut self, turn: TurnId) -> Result<()> {
        let num_turns = self.shared.store.num_turns(&self.scope)?;
        self.check_turn(turn, num_turns)?;
        if turn > num_turns {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("rewind: turn {turn}, expected at most {num_turns}, the length of the log"),
            ));
        }
        if self.last_turn()?.is_none_or(|last| last.id < turn) {
            return Ok(());
        }
        let turn = self.first_of_batch(turn);
        // What a message quotes goes with it; where either cannot be read it stays.
        let pair = turn.saturating_sub(1)..turn + 1;
        let pair = self.shared.store.turns(&self.scope, pair).unwrap_or_default();
        let quotes = matches!(&pair[..], [quoted, asked]
            if quoted.role == Role::Recalled && !quoted.retracted && is_asked(asked.role));
        let turn = turn - TurnId::from(quotes);
        let filled = match self.shared.model {
            Some(_) => self.refill(turn, false).map(drop),
            None => Ok(()),
        };
        let retract = Some(turn..num_turns);
        let done = filled.and_then(|()| self.commit(Vec::new(), &[], retract).map(drop));
        let shared = self.shared.clone();
        done.map_err(|error| shared.undone(error, || self.reopen()))
    }

    /// Whether anything of the user was forgotten since the store was read; waits for what is being forgotten.
    pub(crate) fn is_before_a_forget(&self) -> bool {
        self.forgets.hold().is_none()
    }

    /// Number of turns in the session's log.
    pub(crate) fn num_turns(&self) -> Result<TurnId> {
        Ok(self.shared.store.num_turns(&self.scope)?)
    }

    /// Goes back to what the store holds.
    pub(crate) fn reopen(&mut self) -> Result<()> {
        self.is_half_way = true;
        let sink_pages = self.cache.as_ref().map_or(self.state.sinks(), Cache::sink_pages);
        // The new window and its pages want the room of the old ones, which nothing reads any more. Where there is none for
        // them either, the next opening has the sinks from the state.
        self.state.sink_pages = sink_pages as u32;
        (self.cache, self.last_prompt) = (None, None);
        let opened = Self::open_with(self.shared.clone(), self.scope.clone(), sink_pages);
        *self = opened.map_err(|error| self.shared.failed(error))?;
        Ok(())
    }

    /// The newest token of the stream; `None` where it holds none.
    pub(crate) fn last_token(&self) -> Option<u32> {
        self.state.recent_tokens.last().copied()
    }

    /// Tokens in the stream.
    pub(crate) fn position(&self) -> u64 {
        self.cache.as_ref().map_or(0, Cache::position)
    }

    /// Tokens that the next query would attend to.
    pub(crate) fn attended_tokens(&self) -> usize {
        let Some(cache) = &self.cache else { return 0 };
        let position = cache.position();
        let start = cache.first_window_page(position) * PAGE_TOKENS as u64;
        let sinks = (cache.sink_pages() * PAGE_TOKENS as u64).min(start);
        (position - start + sinks) as usize
    }

    /// Runs `tokens` through the model in blocks; `go_on` is asked between blocks. The last token's hidden state.
    ///
    /// # Errors
    /// `Cancelled` when `go_on` says no; the caller takes the conversation back.
    pub(crate) fn prefill(
        &mut self,
        tokens: &[u32],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Tensor>> {
        let shared = self.shared.clone();
        let model = shared.model("prefill")?;
        let cache = self.cache.as_mut().ok_or_else(|| Error::model("prefill: no cache"))?;
        let config = model.decoder.seam_config().over(cache);
        let mut last = None;
        let mut rest = tokens;
        while !rest.is_empty() {
            let count = config.block_limit(cache.position(), cache.block_tokens()).min(rest.len());
            let (block, after) = rest.split_at(count);
            let position = cache.position();
            if !model.decoder.group.all(go_on(), || align::place(position, block))? {
                return Err(Error::cancelled("prefill"));
            }
            if let Some(pages) = cache.pages_mut() {
                pages.note_tokens(position, block);
            }
            let mut seam = AttentionSeam::open(config, cache, count)?;
            let hidden = on_pool(|| model.decoder.forward(block, &mut seam))?;
            seam.finish();
            last = Some(hidden.narrow(0, count - 1, 1)?);
            rest = after;
        }
        let recent = &mut self.state.recent_tokens;
        recent.extend_from_slice(&tokens[tokens.len().saturating_sub(RECENT_TOKENS)..]);
        let excess = recent.len().saturating_sub(RECENT_TOKENS);
        recent.drain(..excess);
        Ok(last)
    }

    /// Logits (vocab) of a hidden state that [`Conversation::prefill`] gave.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        let model = self.shared.model("logits")?;
        Ok(on_pool(|| model.decoder.logits(hidden))?.flatten_all()?.to_vec1()?)
    }

    /// The point reached now.
    pub(crate) fn save(&self) -> Saved {
        Saved { checkpoint: self.cache.as_ref().map(Cache::checkpoint), state: self.state.clone() }
    }

    /// Takes the conversation back to `saved`; where its pages are gone, back to what the store holds.
    pub(crate) fn take_back(&mut self, saved: &Saved) -> Result<()> {
        if self.cache.is_none() {
            self.state = saved.state.clone();
            return Ok(());
        }
        match self.try_take_back(saved) {
            true => Ok(()),
            false => self.reopen(),
        }
    }

    /// Undoes what failed since `saved`, when the log had `turns` turns. What was committed stays, and the stream is what
    /// belongs to it.
    pub(crate) fn undo_since(&mut self, saved: &Saved, turns: TurnId) -> Result<()> {
        match self.is_half_way || self.num_turns()? != turns {
            true => self.reopen(),
            false => self.take_back(saved),
        }
    }

    /// Like [`Conversation::take_back`], but false where the pages are gone.
    pub(crate) fn try_take_back(&mut self, saved: &Saved) -> bool {
        let (Some(cache), Some(checkpoint)) = (&mut self.cache, &saved.checkpoint) else {
            return false;
        };
        if !cache.rewind(checkpoint) {
            return false;
        }
        self.dirty_from = self.dirty_from.min(checkpoint.position / PAGE_TOKENS as u64);
        self.state = saved.state.clone();
        true
    }

    /// The turns that lie in the window as a whole once `coming` more tokens are in it: their text need not be recalled.
    pub(crate) fn turns_in_window(&self, coming: usize) -> Vec<TurnId> {
        let Some(cache) = &self.cache else { return Vec::new() };
        let position = cache.position() + coming as u64;
        let start = cache.first_window_page(position) * PAGE_TOKENS as u64;
        let turns = self.state.turn_starts.iter().filter(|(_, at)| *at >= start);
        turns.map(|(turn, _)| *turn).collect()
    }
}

/// Whether turns of `role` are read to be answered: they may have a quotation in them, and an answer goes on behind them.
pub(crate) fn is_asked(role: Role) -> bool {
    matches!(role, Role::User | Role::Tool)
}

/// Whether an error is what the caller asked for, and no news.
pub(crate) fn is_cancelled(error: &Error) -> bool {
    error.kind() == ErrorKind::Cancelled
}

/// A store's page index names the stream above this bit and the page below it.
const STREAM_SHIFT: u32 = 40;
/// Set in the index of what is no page of the stream but the landmarks of one.
const LANDMARKS: u64 = 1 << (STREAM_SHIFT - 1);

fn key_of(page: u64, stream: u32) -> u64 {
    u64::from(stream) << STREAM_SHIFT | page
}

fn landmarks_key(page: u64, stream: u32) -> u64 {
    key_of(page | LANDMARKS, stream)
}

fn page_of(key: u64, stream: u32) -> Option<u64> {
    let is_page = key >> STREAM_SHIFT == u64::from(stream) && key & LANDMARKS == 0;
    is_page.then_some(key & (LANDMARKS - 1))
}

fn landmarks_of(key: u64, stream: u32) -> Option<u64> {
    page_of(key & !LANDMARKS, stream).filter(|_| key & LANDMARKS != 0)
}

/// The pages of one stream as the store holds them.
struct StoredPages {
    shared: Arc<Shared>,
    scope: Scope,
    stream: u32,
}

impl PageSource for StoredPages {
    fn page(&self, page: u64) -> Result<Option<Vec<u8>>> {
        Ok(self.shared.store.page(&self.scope, key_of(page, self.stream))?)
    }

    fn page_into(&self, page: u64, out: &mut [u8]) -> Result<Option<usize>> {
        Ok(self.shared.store.page_into(&self.scope, key_of(page, self.stream), out)?)
    }

    fn page_in_place(&self, page: u64) -> Result<Option<PageBytes>> {
        Ok(self.shared.store.map_page(&self.scope, key_of(page, self.stream))?)
    }

    fn landmarks(&self, page: u64) -> Result<Option<Vec<u8>>> {
        Ok(self.shared.store.page(&self.scope, landmarks_key(page, self.stream))?)
    }
}
