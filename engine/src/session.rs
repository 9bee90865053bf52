//! One conversation: send, feed, regenerate, context.
//! Knows neither weights nor bytes on disk; what changes the stream is in `conversation`.

#[cfg(test)]
mod tests;

use crate::appending;
use crate::conversation::{self, Conversation, LastPrompt, is_cancelled};
use crate::engine::{Model, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::feeding::{self, Before, FeedMode, FeedOptions, Taken};
use crate::generation::{self, Answer, Stop};
use crate::heap::GivesBack;
use crate::memory::{self, Context};
use crate::offload::offload;
use crate::pages::{Message, RecallPolicy};
use crate::prompt;
use crate::quote::{self, Quotation};
use crate::sampling::Sampling;
use crate::snapshot::OpenTurn;
use crate::stream::{
    Canceller, Event, Events, Feed, FeedEvent, FeedSummary, Sink, StopReason, Usage,
};
use crate::tokenizer::Joined;
use mka_memory::{Hit, NewTurn, Recall, Role, Scope, Turn, TurnId, Value};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// How one message is answered.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct SendOptions {
    /// How tokens are chosen; greedy by default.
    pub sampling: Sampling,
    /// Most tokens to generate; None: 512.
    pub max_new_tokens: Option<usize>,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
    /// Words that the answer begins with; they are part of the turn but are not streamed.
    pub answer_prefix: String,
    /// Whether the message is the prompt as it stands, without the chat template around it.
    pub completion: bool,
    /// Whether the message goes on in the message of the document fed before it, with nothing between: for a prompt
    /// of which a part was fed. Otherwise the document's message is closed first.
    pub joined: bool,
    /// Instructions that stand before the first message of a session; ignored later. Every token of the session sees them,
    /// however long it becomes, in whole pages of 64 tokens: one at least, and no more than the trained length leaves beside
    /// the window and what pages recall.
    pub system: Option<String>,
    /// How older tokens come back; None: as the engine's [`MemoryConfig`](crate::MemoryConfig) says. `Pages` and `Both` need an
    /// engine that was opened with one of them, and are `InvalidArgument` in any other: it keeps no pages.
    pub recall: Option<RecallPolicy>,
    /// Memories to look up; None: the engine's `recall_k`.
    pub recall_k: Option<usize>,
    /// Whether other sessions of the same user are searched too.
    pub across_sessions: bool,
    /// When the message was said, milliseconds since 1970; None: now.
    pub time_ms: Option<i64>,
}

impl SendOptions {
    /// At most `tokens` new tokens.
    pub fn max_new_tokens(mut self, tokens: usize) -> Self {
        self.max_new_tokens = Some(tokens);
        self
    }

    /// Chooses tokens by `sampling`.
    pub fn sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }

    /// Begins the answer with `prefix`.
    pub fn answer_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.answer_prefix = prefix.into();
        self
    }

    /// Continues the message as plain text, without the chat template.
    pub fn completion(mut self, completion: bool) -> Self {
        self.completion = completion;
        self
    }

    /// Goes on in the message of the document fed before.
    pub fn joined(mut self, joined: bool) -> Self {
        self.joined = joined;
        self
    }

    /// Looks up `k` memories; 0 recalls nothing.
    pub fn recall_k(mut self, k: usize) -> Self {
        self.recall_k = Some(k);
        self
    }

    /// Brings older tokens back by `policy`.
    pub fn recall(mut self, policy: RecallPolicy) -> Self {
        self.recall = Some(policy);
        self
    }

    /// Ends the answer before `stop`.
    pub fn stop(mut self, stop: impl Into<String>) -> Self {
        self.stop.push(stop.into());
        self
    }

    /// Opens a new session with `system` instructions.
    pub fn system(mut self, system: impl Into<String>) -> Self {
        self.system = Some(system.into());
        self
    }

    /// Searches the user's other sessions too.
    pub fn across_sessions(mut self, across: bool) -> Self {
        self.across_sessions = across;
        self
    }
}

/// One conversation in a scope; one handle at a time per id, released when it and its streams are dropped.
pub struct Session {
    live: Arc<Live>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.live.shared.closing(&self.live.scope, self.live.streams().clone());
    }
}

/// The conversation with the claim on its id, held by the session and by streams that still work.
pub(crate) struct Live {
    shared: Arc<Shared>,
    scope: Scope,
    conversation: Mutex<Conversation>,
    /// Streams that were begun and may not be over.
    streams: Mutex<Vec<Canceller>>,
    /// Behind the conversation, for it gives back what that took.
    _memory: GivesBack,
    /// Last: whoever waits for the id wants the conversation's room, too.
    _claim: Claim,
}

/// The conversation, to its holder alone.
struct Held<'a> {
    conversation: MutexGuard<'a, Conversation>,
    _together: Together<'a>,
}

impl Deref for Held<'_> {
    type Target = Conversation;

    fn deref(&self) -> &Conversation {
        &self.conversation
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Conversation {
        &mut self.conversation
    }
}

/// Ends the group of those that share the model if its holder panics, as an error does: the others would wait for a process
/// that goes on with nothing.
struct Together<'a>(&'a Shared);

impl Drop for Together<'_> {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(group) = self.0.group()
        {
            group.end();
        }
    }
}

/// The claim on the id of a session, given up when this is dropped.
struct Claim {
    shared: Arc<Shared>,
    scope: Scope,
}

impl Claim {
    fn new(shared: &Arc<Shared>, scope: &Scope) -> Result<Self> {
        shared.claim(scope)?;
        Ok(Self { shared: shared.clone(), scope: scope.clone() })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shared.release(&self.scope);
    }
}

impl Live {
    /// The conversation, once the stream before this one is done with it. Where a turn left it half-way it is what the store
    /// holds, and so it is after something was forgotten: window and pages may have held the words.
    fn lock(&self) -> Result<Held<'_>> {
        let together = Together(&self.shared);
        let conversation = self.conversation.lock().unwrap_or_else(|poisoned| {
            self.conversation.clear_poison();
            let mut conversation = poisoned.into_inner();
            conversation.is_half_way = true;
            conversation
        });
        let mut held = Held { conversation, _together: together };
        if held.is_half_way || held.is_before_a_forget() {
            held.reopen()?;
        }
        Ok(held)
    }

    fn streams(&self) -> MutexGuard<'_, Vec<Canceller>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Live::lock`], unless a stream works that its holder wants to end by itself: it may wait to be read for ever.
    fn lock_at_rest(&self, operation: &str) -> Result<Held<'_>> {
        if self.streams().iter().any(Canceller::is_awaited) {
            return Err(Error::new(
                ErrorKind::Locked,
                format!(
                    "{operation}: a stream of session {} is open, expected it read to its end or dropped",
                    self.scope
                ),
            ));
        }
        self.lock()
    }

    /// Notes a stream that was begun.
    fn begun(&self, stream: Canceller) {
        let mut streams = self.streams();
        streams.retain(Canceller::is_awaited);
        streams.push(stream);
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("scope", &self.live.scope).finish_non_exhaustive()
    }
}

pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

impl Session {
    pub(crate) fn open(shared: Arc<Shared>, scope: Scope) -> Result<Self> {
        if scope.session_id().is_none() {
            return Err(Error::invalid(format!(
                "session: scope {scope}, expected one that names a session"
            )));
        }
        let open =
            |shared: &Arc<Shared>, scope: &Scope| Conversation::open(shared.clone(), scope.clone());
        Self::begin(shared, scope, open)
    }

    /// Claims the id of `scope` for what `conversation` makes.
    fn begin(
        shared: Arc<Shared>,
        scope: Scope,
        conversation: impl FnOnce(&Arc<Shared>, &Scope) -> Result<Conversation>,
    ) -> Result<Self> {
        let claim = Claim::new(&shared, &scope)?;
        let opened = {
            let _together = Together(&shared);
            conversation(&shared, &scope)
        };
        let conversation = opened.map_err(|error| shared.failed(error))?;
        let (conversation, streams) = (Mutex::new(conversation), Mutex::default());
        let live = Live { shared, scope, conversation, streams, _memory: GivesBack, _claim: claim };
        Ok(Self { live: Arc::new(live) })
    }

    /// User, agent and session.
    pub fn scope(&self) -> &Scope {
        &self.live.scope
    }

    /// Answers `message` with the defaults of [`SendOptions`].
    pub fn send(&mut self, message: impl Into<String>) -> Events {
        self.send_with(message, SendOptions::default())
    }

    /// Answers `message`: recalls what belongs to it, streams the answer, commits both, then says `Done`.
    ///
    /// A message longer than half the window is taken in as a document first, of which its last half window is read
    /// as the message. Errors are the stream's last item; after one the session stands where it stood before, or behind
    /// that document, if it was taken in.
    pub fn send_with(&mut self, message: impl Into<String>, options: SendOptions) -> Events {
        let message = message.into();
        self.answer(move |conversation, sink| send(conversation, &message, &options, sink))
    }

    /// Answers the last message again, in place of its answer, which stays in the log as retracted.
    ///
    /// The prompt stays as it was: of `options` the sampling, the limits, the time and `recall` count. Greedily, or with the
    /// same [`Sampling::seed`], the answer is the same.
    ///
    /// Errors are the stream's last item, `NotFound` where the last turn is no answer, `Cancelled` where it ended before its
    /// first token: the answer is then the one before.
    pub fn regenerate(&mut self, options: SendOptions) -> Events {
        self.answer(move |conversation, sink| regenerate(conversation, &options, sink))
    }

    /// The events of a turn, which is taken back if it fails.
    fn answer<T>(&self, turn: T) -> Events
    where
        T: FnOnce(&mut Conversation, &Sink<Event>) -> Result<Option<Usage>> + Send + 'static,
    {
        let live = self.live.clone();
        let events = Events::spawn(move |sink| {
            let mut conversation = live.lock()?;
            let (saved, turns) = (conversation.save(), conversation.num_turns()?);
            let usage = turn(&mut conversation, sink);
            let usage = usage.map_err(|error| {
                live.shared.undone(error, || conversation.undo_since(&saved, turns))
            });
            Ok(usage?.map(Event::Done))
        });
        self.live.begun(events.canceller());
        events
    }

    /// Takes every turn from `turn` on back, as if it had never been said: the next message follows what was before it.
    ///
    /// What is taken back stays in the log as retracted, keeps its number, and is not recalled; durable when this returns.
    /// With a model the window is filled from the turns before, which costs their prefill once; text recall reaches what
    /// does not fit, pages do not. Without effect where nothing follows. The future borrows nothing of the session.
    ///
    /// # Errors
    /// `NotFound` if the log does not reach to `turn`; `Locked` if a stream of the session is open: read it to its end or drop
    /// it; `Cancelled` if words of the user were forgotten meanwhile; `Storage`, `Corrupted`. The session then stands where it
    /// stood.
    pub fn rewind(&mut self, turn: TurnId) -> impl Future<Output = Result<()>> + Send + use<> {
        let live = self.live.clone();
        offload("rewind", move || {
            let result = live.lock_at_rest("rewind")?.rewind(turn);
            result.map_err(|error| live.shared.failed(error))
        })
    }

    /// Begins the session `name` of the same user and agent as this one stands now: it knows every turn, goes on with the
    /// same tokens, and from then on each goes its own way. Durable when this returns. The future borrows nothing.
    ///
    /// Keys and values are shared, on disk and in host memory; the fork has a window of its own on the device.
    /// A turn from before the fork is one turn in both: [`Forget`](crate::Forget) erases it in both.
    ///
    /// # Errors
    /// `InvalidArgument` if `name` is taken or no name of a session; `Locked` if a session of that name is open, or if a
    /// stream of this one is: read it to its end or drop it; `NotFound` if nothing was said yet; `OutOfMemory`; `Corrupted`
    /// if a turn is damaged; `Storage`. After an error there is no fork, and the session stands where it stood.
    pub fn fork(&self, name: &str) -> impl Future<Output = Result<Self>> + Send + use<> {
        let (live, name) = (self.live.clone(), name.to_owned());
        offload("fork", move || {
            let conversation = live.lock_at_rest("fork")?;
            let scope = live.scope.clone().session(&name);
            if scope == live.scope {
                return Err(Error::invalid(format!(
                    "fork: session {scope} is there already, expected a name that is not taken"
                )));
            }
            Self::begin(live.shared.clone(), scope, |_, scope| conversation.fork(scope))
        })
    }

    /// Takes in a document of any length with the defaults of [`FeedOptions`].
    pub fn feed(&mut self, text: impl Into<String>) -> Feed {
        self.feed_with(text, FeedOptions::default())
    }

    /// Takes in a document of any length at constant memory.
    pub fn feed_with(&mut self, text: impl Into<String>, options: FeedOptions) -> Feed {
        let text = text.into();
        self.take_in(move |conversation, sink| {
            let now_ms = conversation.shared.now_ms()?;
            feeding::feed(conversation, &text, &options, now_ms, sink)
        })
    }

    /// Takes in what was said elsewhere as if it had been said here: the model reads `turns` behind what it knows, each in its
    /// place in the chat template, and answers nothing. For a conversation that began in another place, and for an answer
    /// that something else gave: it stands behind the message, or the document, that waits for one.
    ///
    /// A turn's `tokens` are replaced by the model's own; one of time 0, as [`NewTurn::new`] makes it, was said now. Before a
    /// new session's first message may stand a turn of [`Role::System`]: its instructions, which the log does not keep. An
    /// answer that nothing waits for answers an empty message, a turn of its own. A text longer than the window is a
    /// document: feed it.
    ///
    /// Errors are the stream's last item: `InvalidArgument` for another role, an empty text, no message, what the store refuses
    /// of a turn, or an engine without a model; `Cancelled`. What was committed by then stays, some 8,192 tokens at a time.
    pub fn append(&mut self, turns: Vec<NewTurn>) -> Feed {
        self.take_in(move |conversation, sink| appending::append(conversation, turns, sink))
    }

    /// The progress of what `take` takes in: what it committed stays where it fails.
    fn take_in<T>(&self, take: T) -> Feed
    where
        T: FnOnce(&mut Conversation, &Sink<FeedEvent>) -> Result<FeedSummary> + Send + 'static,
    {
        let live = self.live.clone();
        let feed = Feed::spawn(move |sink| {
            let mut conversation = live.lock()?;
            let (saved, turns) = (conversation.save(), conversation.num_turns()?);
            match take(&mut conversation, sink) {
                Ok(summary) => Ok(Some(FeedEvent::Done(summary))),
                Err(error) => {
                    if !is_cancelled(&error) {
                        tracing::warn!(%error, "taking in stopped");
                    }
                    let undo = || conversation.undo_since(&saved, turns);
                    Err(live.shared.undone(error, undo))
                }
            }
        });
        self.live.begun(feed.canceller());
        feed
    }

    /// What memory holds on `query`, laid out for another model within `budget_tokens`, headers included: out of every session
    /// of the user, or of the user's agent where the scope names one.
    ///
    /// Counted with the model's own tokenizer; an engine without one counts a token for every two bytes.
    /// The future borrows nothing of the session.
    ///
    /// # Errors
    /// `Storage`, `Corrupted`.
    pub fn context(
        &self,
        query: &str,
        budget_tokens: usize,
    ) -> impl Future<Output = Result<Context>> + Send + use<> {
        memory::context(self.live.shared.clone(), self.live.scope.clone(), query, budget_tokens)
    }

    /// Number of turns in the session's log.
    ///
    /// # Errors
    /// `Storage`, `Corrupted`.
    pub fn num_turns(&self) -> Result<TurnId> {
        Ok(self.live.shared.store.num_turns(&self.live.scope)?)
    }

    /// Logits of the next token after `text` is appended to the stream, without changing the session: for tests and
    /// tools that compare sessions. The future borrows nothing of the session.
    ///
    /// # Errors
    /// `InvalidArgument` without a model or with an empty text; `Locked` if a stream of the session is open.
    pub fn peek_logits(
        &mut self,
        text: &str,
    ) -> impl Future<Output = Result<Vec<f32>>> + Send + use<> {
        let (live, text) = (self.live.clone(), text.to_owned());
        offload("peek_logits", move || {
            let mut conversation = live.lock_at_rest("peek_logits")?;
            let tokenizer = &live.shared.model("peek_logits")?.tokenizer;
            let tokens = tokenizer.encode_behind(conversation.last_token(), &text, false)?;
            conversation.set_policy("peek_logits", live.shared.config.recall)?;
            let saved = conversation.save();
            let hidden = conversation.prefill(&tokens, &mut || true);
            let logits = hidden.and_then(|hidden| match hidden {
                Some(hidden) => conversation.logits(&hidden),
                None => Err(Error::invalid("peek_logits: text is empty, expected a token")),
            });
            let logits = logits.map_err(|error| live.shared.failed(error));
            conversation.take_back(&saved)?;
            logits
        })
    }
}

/// Metadata of an answer in the log that was begun with words of the caller's, or goes on in text: how long those are.
const PREFIX_BYTES: &str = "answer_prefix_bytes";
/// Metadata of the same: whether the message has no chat template around it.
const COMPLETION: &str = "answer_completion";

/// Memories below this share of the best one's score stay out of the prompt.
///
/// Where one passage answers, the others score a quarter of it, and a small model is led astray by them; where several
/// answer, their scores are close.
const RECALL_FLOOR: f32 = 0.5;

/// What is recalled for a message, as text and hits.
fn recall(
    conversation: &Conversation,
    message: &str,
    options: &SendOptions,
    coming_tokens: usize,
    now_ms: i64,
) -> Result<(String, Vec<Hit>)> {
    let shared = &conversation.shared;
    let k = options.recall_k.unwrap_or(shared.config.recall_k);
    // Recalled text may take half the window at most, so that the message and an answer fit beside it.
    let budget = shared.config.recall_tokens.min(shared.config.window_tokens / 2);
    let has_text = options.recall.unwrap_or(shared.config.recall).has_text();
    if !has_text || k == 0 || budget == 0 {
        return Ok((String::new(), Vec::new()));
    }
    let query = Recall {
        k,
        across_sessions: options.across_sessions,
        except_turns: conversation.turns_in_window(coming_tokens + budget),
        now_ms: Some(now_ms),
        ..Recall::default()
    };
    let mut hits = shared.store.recall(&conversation.scope, message, &query)?;
    let floor = hits.first().map_or(0.0, |best| best.score * RECALL_FLOOR);
    hits.retain(|hit| hit.score >= floor);
    let quotations = Quotation::of(&hits, message, shared.config.quote);
    let (text, chosen) = quote::assemble(&quotations, budget, |text| shared.count_tokens(text))?;
    // An index that is built in the background may find other hits in another process: the prompt is one.
    let text = shared.model("recall")?.decoder.group.first_text(text)?;
    Ok((text, chosen.into_iter().map(|i| hits[i].clone()).collect()))
}

fn send(
    conversation: &mut Conversation,
    message: &str,
    options: &SendOptions,
    sink: &Sink<Event>,
) -> Result<Option<Usage>> {
    if message.is_empty() {
        return Err(Error::invalid("send: message is empty, expected text"));
    }
    options.sampling.check()?;
    let shared = conversation.shared.clone();
    let model = shared.model("send")?;
    let now_ms = shared.now_ms()?;
    let time_ms = options.time_ms.unwrap_or(now_ms);

    let policy = options.recall.unwrap_or(shared.config.recall);
    conversation.set_policy("send", policy)?;
    // As the template would show it; of a message that goes on in a document the beginning stands there.
    let said = message;
    let goes_on = options.joined && conversation.state.open == OpenTurn::User;
    let shown = if goes_on { said.trim_end() } else { said.trim() };
    let trims = model.scaffold.trims.user && !options.completion && !shown.is_empty();
    let message = if trims { shown } else { said };
    let longest = shared.config.window_tokens / 2;
    let (document, message) = feeding::split_long(model, message, longest)?;
    let said = if document.is_empty() { said } else { message };
    // What was cut off a long message is its beginning.
    let mut joined = options.joined;
    if !document.is_empty() {
        // What is not looked up must be read to be recalled: by this message, or by those after it.
        let is_read = [policy, shared.config.recall].contains(&RecallPolicy::Pages);
        let mode = if is_read { FeedMode::Model } else { FeedMode::Text };
        let feed = FeedOptions { mode, ..FeedOptions::default() }.completion(options.completion);
        let before = Before { system: options.system.as_deref(), joined: options.joined };
        let go_on = &mut |_: &Taken| !sink.is_cancelled();
        let taken = feeding::take_in(conversation, document, &feed, time_ms, before, go_on)?;
        joined |= taken.model_tokens > 0;
    }

    let message_tokens = model.tokenizer.count(message)?;
    let (recalled, hits) = recall(conversation, message, options, message_tokens, now_ms)?;
    if !hits.is_empty() {
        // A caller who is gone is noticed before the first block.
        sink.send(Event::Recalled(hits));
    }

    // The prompt: scaffold, quoted memories, message, scaffold. Contents are encoded so that no text in them can
    // become a control token.
    let open = conversation.state.open;
    let mut written = Joined::behind(&model.tokenizer, conversation.last_token());
    match options.completion {
        true => generation::bare_opening(&mut written, open),
        false => {
            let system = options.system.as_deref();
            generation::opening(&mut written, model, open, system, joined)?;
        }
    }
    conversation.keep_opening(written.num_tokens())?;
    if written.num_tokens() == 0 && open == OpenTurn::User && !recalled.is_empty() {
        written.content("\n\n")?;
    }
    let quotation_start = written.num_tokens();
    written.content(&recalled)?;
    let quotation = quotation_start..written.num_tokens();
    match recalled.is_empty() {
        true => written.content(message)?,
        false => written.content(&format!("\n{message}"))?,
    }
    if !options.completion {
        written.scaffold(&model.scaffold.to_answer)?;
        if !options.answer_prefix.is_empty() {
            written.scaffold(&model.scaffold.answer_lead)?;
        }
    }
    written.content(&options.answer_prefix)?;
    let prompt = written.take()?;
    let recalled_tokens = prompt[quotation.clone()].to_vec();
    let own_tokens = model.tokenizer.encode(message, false)?;

    let start = conversation.position();
    let reused = conversation.attended_tokens();
    let Some((last_token, head)) = prompt.split_last() else {
        return Err(Error::invalid("send: message gives no token, expected at least one"));
    };
    let mut go_on = || !sink.is_cancelled();
    conversation.prefill_message(&own_tokens, head, &mut go_on)?;
    let (before_last, asked) = (conversation.save(), conversation.message());
    let prompt_tokens = conversation.attended_tokens() + 1;
    let answer = generation::generate(conversation, *last_token, options, sink)?;

    let mut turns = Vec::new();
    let mut starts = Vec::new();
    if !recalled.is_empty() {
        // A turn of its own, which is forgotten with what it quotes, to the last token: the message stands without it.
        let mut quoted = turn(Role::Recalled, recalled, time_ms, recalled_tokens.clone());
        let before = Value::from(quotation.start as f64);
        quoted.metadata.insert(conversation::TOKENS_BEFORE.to_owned(), before);
        turns.push(quoted);
        starts.push(None);
    }
    let own = [&prompt[..quotation.start], &prompt[quotation.end..]].concat();
    turns.push(turn(Role::User, said.to_owned(), time_ms, own));
    starts.push(Some(start));
    turns.push(turn_of(&answer, options, time_ms));
    starts.push(Some(start + prompt.len() as u64));
    let (answer_turn, usage) = finish(
        conversation,
        (turns, starts, None),
        &answer.stop,
        Usage {
            prompt_tokens,
            reused_tokens: reused.min(prompt_tokens),
            recalled_tokens: recalled_tokens.len(),
            generated_tokens: answer.tokens.len(),
            stream_tokens: conversation.position(),
            stop: StopReason::MaxTokens,
            pages: conversation.page_usage()?,
        },
    )?;
    conversation.last_prompt = answer_turn.map(|answer| LastPrompt {
        answer,
        before_last,
        last_token: *last_token,
        answer_prefix: options.answer_prefix.clone(),
        completion: options.completion,
        message: asked,
    });
    Ok(usage)
}

/// The turn of an answer that was generated. Text and tokens do not tell how it was begun, where a stop string cut it.
fn turn_of(answer: &Answer, options: &SendOptions, time_ms: i64) -> NewTurn {
    let prefix = options.answer_prefix.as_str();
    let text = format!("{prefix}{}", answer.text);
    let mut turn = turn(Role::Assistant, text, time_ms, answer.tokens.clone());
    if options.completion || !prefix.is_empty() {
        turn.metadata.insert(PREFIX_BYTES.to_owned(), Value::from(prefix.len() as f64));
        turn.metadata.insert(COMPLETION.to_owned(), Value::from(options.completion));
    }
    turn
}

/// The words that an answer in the log was begun with, and whether it goes on in text: a blank that its tokens begin with is
/// then there. Of an answer that does not say so, as none did once, the words are its text less what its tokens say.
fn begun(shared: &Shared, turn: &Turn) -> Result<(String, bool)> {
    if let Some(Value::Number(bytes)) = turn.metadata.get(PREFIX_BYTES)
        && let Some(Value::Flag(completion)) = turn.metadata.get(COMPLETION)
    {
        let prefix = turn.text.get(..*bytes as usize).unwrap_or_default();
        return Ok((prefix.to_owned(), *completion));
    }
    let Model { tokenizer, scaffold, .. } = shared.model("regenerate")?;
    let inside = tokenizer.decode_inside(&turn.tokens);
    let alone = tokenizer.decode(&turn.tokens, true)?;
    let goes_on = inside != alone && turn.text.ends_with(&inside);
    let generated = if goes_on { inside } else { alone };
    if prompt::shown(&turn.text, scaffold.trims.answer) == generated {
        // White space that the template cuts off an answer that was appended began nothing.
        return Ok((String::new(), goes_on));
    }
    let prefix = turn.text.strip_suffix(generated.as_str()).unwrap_or_default();
    Ok((prefix.to_owned(), goes_on))
}

fn turn(role: Role, text: String, time_ms: i64, tokens: Vec<u32>) -> NewTurn {
    let mut turn = NewTurn::new(role, text);
    turn.time_ms = time_ms;
    turn.tokens = tokens;
    turn
}

/// Commits a finished or cancelled answer, the last of `turns`: its number, and what to tell the caller, if there is one.
fn finish(
    conversation: &mut Conversation,
    (turns, starts, retract): (Vec<NewTurn>, Vec<Option<u64>>, Option<TurnId>),
    stop: &Stop,
    usage: Usage,
) -> Result<(Option<TurnId>, Option<Usage>)> {
    conversation.state.open = OpenTurn::Answered { closed_by: stop.closed_by() };
    let committed = conversation.commit(turns, &starts, retract)?;
    Ok((committed.turns.last().copied(), stop.reason().map(|stop| Usage { stop, ..usage })))
}

fn no_answer() -> Error {
    Error::new(ErrorKind::NotFound, "regenerate: no answer, expected one as the last turn")
}

fn regenerate(
    conversation: &mut Conversation,
    options: &SendOptions,
    sink: &Sink<Event>,
) -> Result<Option<Usage>> {
    options.sampling.check()?;
    let shared = conversation.shared.clone();
    shared.model("regenerate")?;
    let time_ms = options.time_ms.map_or_else(|| shared.now_ms(), Ok)?;
    conversation.set_policy("regenerate", options.recall.unwrap_or(shared.config.recall))?;
    let last = conversation.last_turn()?.filter(|turn| turn.role == Role::Assistant);
    let before = last.ok_or_else(no_answer)?;
    let answered = answer_again(conversation, options, sink, (&before, time_ms));
    // The stream stood before the old answer's end: no point behind it can be gone back to.
    conversation.is_half_way = answered.is_err();
    answered
}

/// Answers the message whose answer was the turn `before`, in place of it.
fn answer_again(
    conversation: &mut Conversation,
    options: &SendOptions,
    sink: &Sink<Event>,
    (before, time_ms): (&Turn, i64),
) -> Result<Option<Usage>> {
    let shared = conversation.shared.clone();
    let answer_turn = before.id;
    // Behind the answer there may stand one that was remembered, which answers nothing that the stream holds.
    let kept = conversation.last_prompt.clone().filter(|last| last.answer == answer_turn);
    let here = kept.filter(|last| conversation.try_take_back(&last.before_last));
    let last = match here {
        Some(last) => last,
        None => {
            // The prompt's pages are gone: fill the window again from the log, up to the prompt's last token.
            let last_token = conversation.refill(answer_turn, true)?.ok_or_else(no_answer)?;
            let (answer_prefix, completion) = begun(&shared, before)?;
            LastPrompt {
                answer: answer_turn,
                before_last: conversation.save(),
                last_token,
                answer_prefix,
                completion,
                message: Message::default(),
            }
        }
    };
    conversation.set_message(&last.message);
    let reused = conversation.attended_tokens();
    let start = conversation.position() + 1;
    let options = SendOptions {
        answer_prefix: last.answer_prefix.clone(),
        completion: last.completion,
        ..options.clone()
    };
    let answer = generation::generate(conversation, last.last_token, &options, sink)?;
    if answer.tokens.is_empty() && matches!(answer.stop, Stop::Cancelled) {
        // There is nothing that could stand in its place.
        return Err(Error::cancelled("regenerate"));
    }
    let turns = vec![turn_of(&answer, &options, time_ms)];
    let (answer_turn, usage) = finish(
        conversation,
        (turns, vec![Some(start)], Some(answer_turn)),
        &answer.stop,
        Usage {
            prompt_tokens: reused + 1,
            reused_tokens: reused,
            recalled_tokens: 0,
            generated_tokens: answer.tokens.len(),
            stream_tokens: conversation.position(),
            stop: StopReason::MaxTokens,
            pages: conversation.page_usage()?,
        },
    )?;
    conversation.last_prompt = answer_turn.map(|answer| LastPrompt { answer, ..last });
    Ok(usage)
}
