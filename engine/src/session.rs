//! One conversation: send, feed, regenerate, context.
//! Knows neither weights nor bytes on disk; what changes the stream is in `conversation`.

#[cfg(test)]
mod tests;

use crate::answering;
use crate::appending;
use crate::conversation::{Conversation, is_cancelled};
use crate::engine::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::feeding::{self, FeedOptions};
use crate::grammar::Grammar;
use crate::heap::GivesBack;
use crate::memory::{self, Context};
use crate::offload::offload;
use crate::pages::RecallPolicy;
use crate::sampling::Sampling;
use crate::stream::{Canceller, Event, Events, Feed, FeedEvent, FeedSummary, Sink, Usage};
use crate::tools::ToolResult;
use mka_memory::{Filter, Metadata, NewTurn, Scope, TurnId};
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
    /// Words that the answer begins with; they are part of the turn but are not streamed. How many bytes they are stands in
    /// the turn's metadata (`mka.answer_prefix_bytes`), for the answer to be given again.
    pub answer_prefix: String,
    /// Whether the message is the prompt as it stands, without the chat template around it; the answer's metadata says so
    /// (`mka.answer_completion`).
    pub completion: bool,
    /// Whether the message goes on in the message of the document fed before it, with nothing between: for a prompt
    /// of which a part was fed. Otherwise the document's message is closed first.
    pub joined: bool,
    /// Instructions that stand before the first message of a session; ignored later. Every token of the session sees them,
    /// however long it becomes, in whole pages of 64 tokens: one at least, and no more than the trained length leaves beside
    /// the window and what pages recall. A chat template that takes none makes the message `InvalidArgument`.
    pub system: Option<String>,
    /// How older tokens come back; None: as the engine's [`MemoryConfig`](crate::MemoryConfig) says. `Pages` and `Both` need an
    /// engine that was opened with one of them, and are `InvalidArgument` in any other: it keeps no pages.
    pub recall: Option<RecallPolicy>,
    /// Memories to look up; None: the engine's `recall_k`.
    pub recall_k: Option<usize>,
    /// Whether other sessions of the same user, or of the agent if the session has one, are searched too.
    pub across_sessions: bool,
    /// The memories that are looked up are of turns whose metadata this accepts; None: of all. Of what comes back inside
    /// attention it says nothing.
    pub recall_filter: Option<Filter>,
    /// When the message was said, milliseconds since 1970; None: now.
    pub time_ms: Option<i64>,
    /// What the turns of the message and of its answer are marked with, for a filter of [`Recall`](crate::Recall) or
    /// [`Forget`](crate::Forget) to ask for: as [`NewTurn::metadata`], but at most 254 keys, none of which begins with `mka.`.
    pub metadata: Metadata,
    /// Tools that the model may call, each the JSON of a function as OpenAI and transformers write it, `{"type": "function",
    /// "function": {"name": .., "description": .., "parameters": ..}}`, or what stands under `function` there. The model's own
    /// chat template lists them before the first message of a session. Ignored later, also where the session was begun by
    /// [`Session::feed`] or [`Session::append`], which offer none. They stay in sight as [`SendOptions::system`] does, and are
    /// gone once that first message was forgotten. [`tool_calls`](crate::tool_calls) reads what the model calls from the text
    /// of its answer, [`Session::send_tool`] gives it the results.
    ///
    /// `InvalidArgument` for what is no function, for text in it that is a control token of the model, and where the template
    /// lists no tools, or `completion` leaves it out.
    pub tools: Vec<String>,
    /// What the answer is held to; None: nothing. Every token is one that the grammar allows, from the first behind
    /// `answer_prefix` on: thoughts between `<think>` tags and calls of tools stand in an answer only where the grammar has them.
    /// The model ends its turn only where the text is complete, and the answer ends where nothing may follow. The message, its
    /// prompt and what is recalled are as without. An answer that `max_new_tokens` or a stop string ends may be a part of what
    /// the grammar allows, which its [`StopReason`](crate::StopReason) tells.
    ///
    /// The first such answer of a model has a trie made of its tokens, which is kept. A grammar is compiled for each answer, and
    /// looked at for each token.
    ///
    /// `InvalidArgument`, before anything is stored, for a grammar that does not compile, one of more than 256 KiB, and one whose
    /// beginning the model has no token for. Where it has none later on, or what follows takes more work than a grammar may, the
    /// answer is `InvalidArgument`, too, and taken back.
    pub grammar: Option<Grammar>,
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
        self.answer(move |conversation, sink| {
            answering::send(conversation, &message, &options, sink)
        })
    }

    /// Gives the model `results`, of the tools that its last answer called, and answers: [`Session::send_with`] in the place
    /// that the chat template has for them, behind that answer, which stays as the model wrote it. A template without such a
    /// place shows them in a message of the user's, a blank line between two.
    ///
    /// Each result is a turn of [`Role::Tool`](crate::Role::Tool), remembered as a document is, its name beside it. What is
    /// recalled for them stands in the first. They may be of any length. Longer than half the window together, they are read
    /// and committed in sections first, each a turn, up to a tail: the last of them that fit, or the end of the last one. What
    /// is recalled for the user's last message and the tail, and that message, if it left the window, then stand directly
    /// before the tail: where text is looked up, and the message is no longer than an eighth of the window. Of `options`
    /// `system`, `tools`, `completion` and `joined` are ignored.
    ///
    /// Errors are the stream's last item, `InvalidArgument` without a result, and where nothing was said yet. After one the
    /// session stands where it stood before, or behind the sections that were committed.
    pub fn send_tool(&mut self, results: Vec<ToolResult>, options: SendOptions) -> Events {
        self.answer(move |conversation, sink| {
            answering::send_results(conversation, &results, &options, sink)
        })
    }

    /// Answers the last message again, in place of its answer, which stays in the log as retracted.
    ///
    /// The prompt stays as it was, and so does what the answer begins with: of `options` the sampling, the limits, the grammar,
    /// the time and `recall` count; `system`, `tools`, `recall_k`, `recall_filter`, `across_sessions`, `answer_prefix`, `completion`,
    /// `joined` and `metadata` are ignored. Greedily, or with the same [`Sampling::seed`], the answer is the same. It is marked
    /// as the one in whose place it stands.
    ///
    /// The stream goes back to where the answer began, as far as eight pages of 64 tokens. Where that is further, and in a
    /// session that was opened again since, the window is filled from the log as for [`Session::rewind`]: text recall reaches
    /// what does not fit, pages do not, and those that were stored are removed.
    ///
    /// Errors are the stream's last item, `NotFound` where the last turn is no answer, or the end of its message was forgotten,
    /// `Cancelled` where it ended before its first token: the answer is then the one before.
    pub fn regenerate(&mut self, options: SendOptions) -> Events {
        self.answer(move |conversation, sink| answering::regenerate(conversation, &options, sink))
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
    /// Results that were given by one [`Session::send_tool`] are one message: from one of them on means from the first.
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
    /// of the user, or of the user's agent where the scope names one; the 32 best memories at most.
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
