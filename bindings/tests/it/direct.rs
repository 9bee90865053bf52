//! The plain C functions against the calls through uniffi: the same events, errors for everything else.

use crate::{engine, store, tiny_model, tokens, trip};
use mka_bindings::{
    Caller, EngineConfig, Event, FeedEvent, FeedMode, FeedOptions, Hit, MetadataValue, ModelSource,
    NativeEngine, NewTurn, PageUsage, Reply, Role, Scope, Source, StopReason, Trust, Usage, Why,
    mka_direct_free, mka_direct_poll_for,
};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What a call gave: bytes, the end, or an error as `kind\0text`.
#[derive(Debug, PartialEq)]
enum Given {
    Bytes(Vec<u8>),
    End,
    Failed(String),
}

impl Given {
    fn kind(&self) -> &str {
        match self {
            Self::Failed(text) => text.split('\0').next().unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

fn given(call: impl FnOnce(*mut Reply)) -> Given {
    let mut reply = Reply { data: std::ptr::null_mut(), len: 0, code: 9 };
    call(&mut reply);
    let bytes = match reply.data.is_null() {
        true => Vec::new(),
        // SAFETY: a reply's bytes are valid until they are given back, below.
        false => unsafe { std::slice::from_raw_parts(reply.data, reply.len) }.to_vec(),
    };
    // SAFETY: of one reply, once.
    unsafe { mka_direct_free(reply.data, reply.len) };
    match reply.code {
        0 => Given::Bytes(bytes),
        1 => Given::End,
        2 => Given::Failed(String::from_utf8(bytes).unwrap()),
        code => panic!("code {code}"),
    }
}

/// A reader that sleeps until it is told.
struct Sleeper {
    thread: std::thread::Thread,
    woken: AtomicBool,
}

extern "C" fn wake(sleeper: *mut c_void) {
    // SAFETY: `caller` gave a reference of it away that was not taken back yet.
    let sleeper = unsafe { &*sleeper.cast::<Sleeper>() };
    sleeper.woken.store(true, Ordering::SeqCst);
    sleeper.thread.unpark();
}

extern "C" fn release(sleeper: *mut c_void) {
    // SAFETY: `caller` made it from an `Arc`, and it is released once.
    drop(unsafe { Arc::from_raw(sleeper.cast::<Sleeper>()) });
}

impl Sleeper {
    fn new() -> Arc<Self> {
        Arc::new(Self { thread: std::thread::current(), woken: AtomicBool::new(false) })
    }

    /// What is ready in a stream; bytes without one if nothing is.
    fn poll(self: &Arc<Self>, stream: u64) -> Given {
        let context = Arc::into_raw(self.clone()).cast_mut().cast();
        // SAFETY: `given` passes a reply; both functions may be called from any thread.
        given(|reply| unsafe {
            mka_direct_poll_for(stream, Caller { context, wake, release }, reply);
        })
    }

    fn wait(&self) {
        while !self.woken.swap(false, Ordering::SeqCst) {
            std::thread::park();
        }
    }

    /// The next bytes of a stream, or what came instead of them.
    fn next(self: &Arc<Self>, stream: u64) -> Given {
        loop {
            match self.poll(stream) {
                Given::Bytes(bytes) if bytes.is_empty() => self.wait(),
                given => return given,
            }
        }
    }
}

/// Reads what `packed` wrote, field by field.
struct Reading<'a>(&'a [u8]);

/// Reads a turn's metadata as `packed` wrote it.
fn metadata(marks: &str) -> HashMap<String, MetadataValue> {
    let mut rest = marks.chars().peekable();
    let mut part = || -> Option<String> {
        let length: String = rest.by_ref().take_while(|it| *it != ':').collect();
        let length = length.parse().ok()?;
        Some(rest.by_ref().take(length).collect())
    };
    let mut values = HashMap::new();
    while let Some(key) = part() {
        let (kind, value) = (part().unwrap(), part().unwrap());
        let value = match kind.as_str() {
            "f" => MetadataValue::Flag { flag: value == "1" },
            "n" => MetadataValue::Number { number: value.parse().unwrap() },
            "t" => MetadataValue::Text { text: value },
            other => panic!("{other}"),
        };
        values.insert(key, value);
    }
    values
}

impl Reading<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (taken, rest) = self.0.split_first_chunk().unwrap();
        self.0 = rest;
        *taken
    }

    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn f32(&mut self) -> f32 {
        f32::from_le_bytes(self.take())
    }

    fn part(&mut self) -> Reading<'_> {
        let length = self.u32() as usize;
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        Reading(taken)
    }

    fn text(&mut self) -> String {
        String::from_utf8(self.part().0.to_vec()).unwrap()
    }

    fn shares(&mut self) -> Vec<f32> {
        (0..self.u32()).map(|_| self.f32()).collect()
    }

    fn hits(&mut self) -> Vec<Hit> {
        let count = self.u32() as usize;
        let (fixed, text) = self.0.split_at(count * 113);
        let mut text = std::str::from_utf8(text).unwrap().chars();
        let mut fixed = Reading(fixed);
        let hits = (0..count).map(|_| fixed.hit(&mut text)).collect();
        assert!(fixed.0.is_empty() && text.next().is_none());
        hits
    }

    fn hit(&mut self, text: &mut std::str::Chars<'_>) -> Hit {
        let chunk = text.take(32).collect();
        let said = self.u32() as usize;
        let said = text.take(said).collect();
        let behind = self.u32() as usize;
        let (score, relevance) = (self.f32(), self.f32());
        let trust = [Trust::Host, Trust::User, Trust::Model, Trust::Document][self.u8() as usize];
        let (count, stale) = (self.u32(), self.u8() != 0);
        let mut cut = || match self.u32() {
            u32::MAX => None,
            length => Some(text.take(length as usize).collect::<String>()),
        };
        let whose = [cut(), cut(), cut(), cut(), cut(), cut()];
        assert_eq!(whose.iter().flatten().map(|part| part.chars().count()).sum::<usize>(), behind);
        let [user, agent, session, name, subject, marks] = whose;
        let why = Why {
            bm25: self.f32(),
            coverage: self.f32(),
            bm25_rank: Some(self.u32()).filter(|rank| *rank > 0),
            cosine: self.f32(),
            cosine_rank: self.u32(),
            recency: self.f32(),
            follow_up: self.u8() != 0,
        };
        let source = Source {
            user: user.unwrap(),
            agent,
            session: session.unwrap(),
            turn: self.u64(),
            role: [
                Role::System,
                Role::User,
                Role::Assistant,
                Role::Document,
                Role::Recalled,
                Role::Tool,
            ][self.u8() as usize],
            start: self.u64(),
            end: self.u64(),
            time_ms: self.u64() as i64,
            name,
            subject,
            expires_ms: match (self.u8(), self.u64()) {
                (0, _) => None,
                (_, time_ms) => Some(time_ms as i64),
            },
            metadata: metadata(&marks.unwrap()),
        };
        Hit { chunk, text: said, score, relevance, why, source, trust, count, stale }
    }

    fn usage(&mut self) -> Usage {
        let stop = [StopReason::EndOfTurn, StopReason::MaxTokens, StopReason::StopString]
            [self.u8() as usize];
        Usage {
            prompt_tokens: self.u64(),
            reused_tokens: self.u64(),
            recalled_tokens: self.u64(),
            generated_tokens: self.u64(),
            stream_tokens: self.u64(),
            stop,
            answer_turn: match (self.u8(), self.u64()) {
                (0, _) => None,
                (_, turn) => Some(turn),
            },
            pages: (self.u8() != 0).then(|| PageUsage {
                stored_tokens: self.u64(),
                recalled_tokens: self.u64(),
                share: self.shares(),
                recovered: self.shares(),
            }),
        }
    }
}

fn events(bytes: &[u8]) -> Vec<Event> {
    let mut from = Reading(bytes);
    let mut events = Vec::new();
    while !from.0.is_empty() {
        events.push(match from.u8() {
            1 => Event::Token { text: from.text() },
            2 => Event::Recalled { hits: from.part().hits() },
            3 => Event::Done { usage: from.usage() },
            kind => panic!("kind {kind}"),
        });
    }
    events
}

#[test]
fn packed_events_are_those_of_the_plain_call() {
    let mut seen = Vec::new();
    let sleeper = Sleeper::new();
    let next = |stream| sleeper.next(stream);
    for packed in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        // Half the window may be quoted: in less there is no room for a memory and its header.
        let config = EngineConfig {
            model: Some(ModelSource::Path { path: tiny_model() }),
            window_tokens: Some(256),
            device: Some("cpu".into()),
            ..EngineConfig::default()
        };
        let engine = NativeEngine::open_blocking(store(folder.path()), config).unwrap();
        let chat = engine.session_blocking(trip()).unwrap();
        let text = "The sheep went up the hill in märz. ".repeat(200);
        let options = FeedOptions { mode: Some(FeedMode::Text), ..FeedOptions::default() };
        let feed = chat.feed(text, FeedOptions { time_ms: Some(5), ..options }).unwrap();
        let mut said = Vec::new();
        if packed {
            let number = feed.clone().number();
            while let Given::Bytes(bytes) = next(number) {
                let mut from = Reading(&bytes);
                while !from.0.is_empty() {
                    said.push(match from.u8() {
                        4 => format!("{} {} {}", from.u64(), from.u64(), from.u64()),
                        5 => {
                            format!("{} {} {} {}", from.u64(), from.u64(), from.u64(), from.u64())
                        }
                        kind => panic!("kind {kind}"),
                    });
                }
            }
        } else {
            while let Some(batch) = feed.next_batch_blocking(1000).unwrap() {
                said.extend(batch.into_iter().map(|event| match event {
                    FeedEvent::Progress { fed_bytes, committed_bytes, total_bytes } => {
                        format!("{fed_bytes} {committed_bytes} {total_bytes}")
                    }
                    FeedEvent::Done { summary } => format!(
                        "{} {} {} {}",
                        summary.bytes,
                        summary.model_tokens,
                        summary.chunks_added,
                        summary.chunks_deduplicated
                    ),
                }));
            }
        }
        // With and without agent and name, in words of one to four bytes a letter.
        let facts = [
            ("The sheep are on the hill.", Some("planer·é"), Some("märz")),
            ("🐑 sheep in 宿", None, Some("宿 🐑")),
            ("Where are the sheep?", Some("planer"), None),
            ("The sheep, the märz.", None, None),
        ];
        for (time_ms, (text, agent, name)) in (6..).zip(facts) {
            let marks = [
                ("年:1", MetadataValue::Text { text: "5:märz".into() }),
                ("n", MetadataValue::Number { number: -0.125e-7 }),
                ("is it", MetadataValue::Flag { flag: true }),
                ("leer", MetadataValue::Text { text: String::new() }),
            ];
            let fact = NewTurn {
                role: Role::User,
                text: text.into(),
                time_ms,
                source: name.map(Into::into),
                remember: None,
                subject: name.map(|name| format!("{name}, {time_ms}")),
                expires_ms: name.map(|_| i64::MAX - time_ms),
                metadata: marks
                    .into_iter()
                    .skip(time_ms as usize % 5)
                    .map(|(key, value)| (key.to_owned(), value))
                    .collect(),
            };
            let session = Some("facts 宿".into());
            let scope = Scope { agent: agent.map(Into::into), session, ..trip() };
            engine.clone().memory().remember_blocking(scope, vec![fact]).unwrap();
        }
        let mut options = tokens(12);
        options.time_ms = Some(70);
        options.across_sessions = true;
        let turn = chat.send("where are the sheep".into(), options).unwrap();
        let mut answer = Vec::new();
        if packed {
            let number = turn.clone().number();
            while let Given::Bytes(bytes) = next(number) {
                answer.extend(events(&bytes));
            }
            assert_eq!(next(number), Given::End);
            drop((turn, feed));
            assert_eq!(next(number).kind(), "InvalidArgument");
        } else {
            while let Some(batch) = turn.next_batch_blocking(1000).unwrap() {
                answer.extend(batch);
            }
        }
        assert!(matches!(&answer[0], Event::Recalled { hits } if hits.len() > 1), "{answer:?}");
        // The hits' identities are seeded by each store.
        let answer = format!("{answer:?}");
        let pieces = answer.split("chunk: \"").map(|part| part.get(32..).unwrap_or(part));
        seen.push((said, pieces.collect::<Vec<_>>().join("")));
    }
    assert_eq!(seen[0], seen[1]);
}

#[test]
fn a_caller_is_told_when_a_stream_is_to_be_asked_again_and_let_go_of_in_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let turn = chat.send("hello there".into(), tokens(20)).unwrap();
    let number = turn.clone().number();
    let sleeper = Sleeper::new();
    let (mut read, mut waits) = (Vec::new(), 0);
    loop {
        match sleeper.poll(number) {
            Given::Bytes(bytes) if bytes.is_empty() => {
                waits += 1;
                sleeper.wait();
            }
            Given::Bytes(bytes) => read.extend(events(&bytes)),
            Given::End => break,
            Given::Failed(error) => panic!("{error}"),
        }
    }
    assert!(matches!(read.last(), Some(Event::Done { .. })) && waits > 0, "{read:?} {waits}");
    drop(turn);
    assert_eq!(sleeper.poll(number).kind(), "InvalidArgument");
    engine.close_blocking().unwrap();
    // A thread that has woken the caller lets go of it a moment later.
    let until = Instant::now() + Duration::from_secs(10);
    while Arc::strong_count(&sleeper) > 1 && Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!(Arc::strong_count(&sleeper), 1);
}

#[test]
fn a_caller_is_told_of_the_first_cancel_alone() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    for already in [false, true] {
        let turn = chat.send("hello".into(), tokens(4)).unwrap();
        let number = turn.clone().number();
        if already {
            turn.cancel();
        }
        let reader = Sleeper::new();
        while let Given::Bytes(_) = reader.next(number) {}
        // Nothing but a cancel can tell this one: the stream has ended.
        let late = Sleeper::new();
        assert_eq!(late.poll(number), Given::End);
        turn.cancel();
        assert_eq!(late.woken.load(Ordering::SeqCst), !already);
    }
}

#[test]
fn errors_come_with_their_kind() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let failed = chat.regenerate(tokens(2)).unwrap();
    let error = Sleeper::new().next(failed.clone().number());
    assert_eq!(error.kind(), "NotFound");
    assert!(matches!(&error, Given::Failed(text) if text.contains("no answer")));
}
