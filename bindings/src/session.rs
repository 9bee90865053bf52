//! One conversation as an object: its calls return at once or wait without holding it.
//! Knows no engine.

use crate::error::MkaError;
use crate::events::{NativeEvents, NativeFeed};
use crate::foreign::counted;
use crate::mirrored::count;
use crate::options::{FeedOptions, NewTurn, SendOptions};
use crate::pull::{Activity, Pull, Source};
use crate::records::{Context, Vectors};
use crate::scope::Scope;
use crate::tools::ToolResult;
use crate::wait::wait;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// One conversation; one stream of it at a time.
#[derive(uniffi::Object)]
pub struct NativeSession {
    scope: Scope,
    live: Mutex<Live>,
    /// The engine's.
    sessions: Arc<Sessions>,
}

/// The sessions of one engine that are open, and their streams.
pub(crate) struct Sessions {
    /// None once the engine is closed, which no session enters any more: nobody would close it.
    objects: Mutex<Option<Vec<Weak<NativeSession>>>>,
    /// A stream may be held longer than the object of its session.
    streams: Mutex<Vec<Weak<Activity>>>,
}

impl Default for Sessions {
    fn default() -> Self {
        Self { objects: Mutex::new(Some(Vec::new())), streams: Mutex::default() }
    }
}

impl Sessions {
    /// A session as an object that the engine closes with itself; if the engine was closed while `operation` opened it, the
    /// session is dropped, and the error says so.
    pub(crate) fn enter(
        self: &Arc<Self>,
        operation: &str,
        session: mka::Session,
    ) -> Result<Arc<NativeSession>, MkaError> {
        let scope = session.scope().into();
        let live = Mutex::new(Live { session: Some(session), activity: None });
        let session = Arc::new(NativeSession { scope, live, sessions: self.clone() });
        let mut objects = locked(&self.objects);
        let open = objects.as_mut().ok_or_else(|| MkaError::closed(operation, "engine"))?;
        note(open, &session);
        Ok(session)
    }

    /// Closes every session that is open, and cancels every stream.
    pub(crate) fn close(&self) {
        let objects = locked(&self.objects).take().unwrap_or_default();
        left(&objects).for_each(|session| session.close());
        // Behind the sessions, which begin no stream any more.
        let streams = std::mem::take(&mut *locked(&self.streams));
        left(&streams).for_each(|activity| {
            activity.cancel();
        });
    }
}

struct Live {
    /// None once it is closed.
    session: Option<mka::Session>,
    /// The stream that was started last.
    activity: Option<Arc<Activity>>,
}

impl NativeSession {
    fn live(&self) -> MutexGuard<'_, Live> {
        locked(&self.live)
    }

    /// `stream` to be pulled, as the one that was started last.
    fn begun<S: Source>(&self, live: &mut Live, stream: S) -> Pull<S> {
        let pull = Pull::new(stream);
        let activity = pull.activity();
        note(&mut locked(&self.sessions.streams), &activity);
        live.activity = Some(activity);
        pull
    }
}

impl Live {
    fn session(&mut self, operation: &str) -> Result<&mut mka::Session, MkaError> {
        self.session.as_mut().ok_or_else(|| MkaError::closed(operation, "session"))
    }

    /// The session, if no stream of it is open: a second one would wait for the first, which its holder may never read.
    fn idle(&mut self, operation: &str) -> Result<&mut mka::Session, MkaError> {
        if self.activity.as_ref().is_some_and(|activity| activity.is_busy()) {
            return Err(MkaError::Locked(format!(
                "{operation}: a stream of the session is open, expected it read to its end or closed"
            )));
        }
        self.session(operation)
    }
}

#[uniffi::export]
impl NativeSession {
    /// User, agent and session.
    pub fn scope(&self) -> Scope {
        self.scope.clone()
    }

    /// Answers `message`; the work starts at once.
    pub fn send(
        &self,
        message: String,
        options: SendOptions,
    ) -> Result<Arc<NativeEvents>, MkaError> {
        let mut live = self.live();
        let events = live.idle("send")?.send_with(message, options.into());
        Ok(Arc::new(NativeEvents::new(self.begun(&mut live, events))))
    }

    /// Gives the model what the tools that its last answer called gave back, and answers; the work starts at once. `system`,
    /// `tools`, `completion` and `joined` are ignored.
    pub fn send_tool(
        &self,
        results: Vec<ToolResult>,
        options: SendOptions,
    ) -> Result<Arc<NativeEvents>, MkaError> {
        let mut live = self.live();
        let results = results.into_iter().map(Into::into).collect();
        let events = live.idle("send_tool")?.send_tool(results, options.into());
        Ok(Arc::new(NativeEvents::new(self.begun(&mut live, events))))
    }

    /// Answers the last message again, in place of its answer. The prompt stays as it was: `system`, `tools`, `recall_k`,
    /// `recall_filter`, `across_sessions`, `answer_prefix`, `completion`, `joined` and `metadata` are ignored.
    pub fn regenerate(&self, options: SendOptions) -> Result<Arc<NativeEvents>, MkaError> {
        let mut live = self.live();
        let events = live.idle("regenerate")?.regenerate(options.into());
        Ok(Arc::new(NativeEvents::new(self.begun(&mut live, events))))
    }

    /// Takes every turn from `turn` on back, as if it had never been said.
    pub async fn rewind(&self, turn: u64) -> Result<(), MkaError> {
        let rewound = self.live().idle("rewind")?.rewind(turn);
        Ok(counted(rewound).await?)
    }

    /// `rewind`, blocking the thread.
    pub fn rewind_blocking(&self, turn: u64) -> Result<(), MkaError> {
        wait(self.rewind(turn))
    }

    /// Begins the session `name` of the same user and agent as this one stands now.
    pub async fn fork(&self, name: String) -> Result<Arc<NativeSession>, MkaError> {
        let fork = self.live().idle("fork")?.fork(&name);
        self.sessions.enter("fork", counted(fork).await?)
    }

    /// `fork`, blocking the thread.
    pub fn fork_blocking(&self, name: String) -> Result<Arc<NativeSession>, MkaError> {
        wait(self.fork(name))
    }

    /// Takes in a document; the work starts at once.
    pub fn feed(&self, text: String, options: FeedOptions) -> Result<Arc<NativeFeed>, MkaError> {
        let mut live = self.live();
        let feed = live.idle("feed")?.feed_with(text, options.into());
        Ok(Arc::new(NativeFeed::new(self.begun(&mut live, feed))))
    }

    /// Takes in turns that were said elsewhere; the work starts at once.
    pub fn append(&self, turns: Vec<NewTurn>) -> Result<Arc<NativeFeed>, MkaError> {
        let mut live = self.live();
        let turns = turns.into_iter().map(Into::into).collect();
        let feed = live.idle("append")?.append(turns);
        Ok(Arc::new(NativeFeed::new(self.begun(&mut live, feed))))
    }

    /// What memory holds on `query`, laid out for another model within `budget_tokens`: out of every session of the user, or of
    /// the agent if the session has one, the 32 best memories at most.
    pub async fn context(&self, query: String, budget_tokens: u64) -> Result<Context, MkaError> {
        let context = self.live().session("context")?.context(&query, count(budget_tokens));
        Ok(counted(context).await?.into())
    }

    /// `context`, blocking the thread.
    pub fn context_blocking(&self, query: String, budget_tokens: u64) -> Result<Context, MkaError> {
        wait(self.context(query, budget_tokens))
    }

    /// Number of turns in the session's log.
    pub fn num_turns(&self) -> Result<u64, MkaError> {
        Ok(self.live().session("num_turns")?.num_turns()?)
    }

    /// Tokens that the model has chosen for the answer that was begun last, those that wait to be read included.
    pub fn generated_tokens(&self) -> u64 {
        self.live().activity.as_ref().map_or(0, |activity| activity.generated_tokens())
    }

    /// Logits of the next token after `text` is appended to the stream, without changing the session: one row.
    pub async fn peek_logits(&self, text: String) -> Result<Vectors, MkaError> {
        let logits = self.live().idle("peek_logits")?.peek_logits(&text);
        let logits = counted(logits).await?;
        Ok(Vectors::new(&logits, logits.len()))
    }

    /// `peek_logits`, blocking the thread.
    pub fn peek_logits_blocking(&self, text: String) -> Result<Vectors, MkaError> {
        wait(self.peek_logits(text))
    }

    /// Closes the session and cancels its stream; opening it again waits until that has ended. Without effect the
    /// second time.
    pub fn close(&self) {
        let mut live = self.live();
        if let Some(activity) = live.activity.take() {
            activity.cancel();
        }
        live.session = None;
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds `item` to `list`, and takes out what is gone.
fn note<T>(list: &mut Vec<Weak<T>>, item: &Arc<T>) {
    list.retain(|other| other.strong_count() > 0);
    list.push(Arc::downgrade(item));
}

/// What of `list` is not gone.
fn left<T>(list: &[Weak<T>]) -> impl Iterator<Item = Arc<T>> {
    list.iter().filter_map(Weak::upgrade)
}
