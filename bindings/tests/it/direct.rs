//! The plain C functions against the calls through uniffi: the same hits, the same events, errors for everything else.

use crate::{engine, finish, store, tiny_model, tokens, trip};
use mka_bindings::{
    Caller, EngineConfig, Event, FeedEvent, FeedMode, FeedOptions, Filter, Hit, MetadataValue,
    MkaError, ModelSource, NativeBell, NativeEngine, NewTurn, PageUsage, RecallOptions, Reply,
    Role, Scope, Source, StopReason, Trust, Usage, Why, mka_direct_begin_recall, mka_direct_drop,
    mka_direct_free, mka_direct_next, mka_direct_poll, mka_direct_poll_for, mka_direct_recall,
    mka_direct_recalled, mka_direct_rung,
};
use proptest::prelude::*;
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
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

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

fn next(stream: u64) -> Given {
    // SAFETY: `given` passes a reply.
    given(|reply| unsafe { mka_direct_next(stream, 1000, reply) })
}

fn recall(memory: u64, request: &[u8]) -> Given {
    // SAFETY: `given` passes a reply; the request outlives the call.
    given(|reply| unsafe { mka_direct_recall(memory, request.as_ptr(), request.len(), reply) })
}

/// Reads what `packed` wrote, field by field.
struct Reading<'a>(&'a [u8]);

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
        let (fixed, text) = self.0.split_at(count * 96);
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
        let whose = [cut(), cut(), cut(), cut()];
        assert_eq!(whose.iter().flatten().map(|part| part.chars().count()).sum::<usize>(), behind);
        let [user, agent, session, name] = whose;
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
            role: [Role::System, Role::User, Role::Assistant, Role::Document, Role::Recalled]
                [self.u8() as usize],
            start: self.u64(),
            end: self.u64(),
            time_ms: self.u64() as i64,
            name,
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

/// The request of a recall, packed.
fn request(scope: &Scope, query: &str, options: &RecallOptions, filter: Option<&str>) -> Vec<u8> {
    let given = [
        (options.across_sessions, 0),
        (options.stale, 1),
        (options.follow_up == Some(true), 2),
        (options.follow_up.is_some(), 3),
        (options.k.is_some(), 4),
        (options.before_turn.is_some(), 5),
        (options.since_ms.is_some(), 6),
        (options.until_ms.is_some(), 7),
        (options.as_of_ms.is_some(), 8),
        (options.now_ms.is_some(), 9),
        (options.half_life_ms.is_some(), 10),
        (options.min_score.is_some(), 11),
        (options.min_relevance.is_some(), 12),
    ];
    let bits: u32 = given.iter().map(|(given, bit)| u32::from(*given) << bit).sum();
    let mut out = bits.to_le_bytes().to_vec();
    out.push(options.roles.iter().fold(0, |roles, role| roles | 1 << *role as u8));
    let texts = [
        Some(scope.user.as_str()),
        scope.agent.as_deref(),
        scope.session.as_deref(),
        Some(query),
        filter,
    ];
    for text in texts {
        out.extend(text.map_or(u32::MAX, |text| text.len() as u32).to_le_bytes());
    }
    for number in [options.k, options.before_turn] {
        out.extend(number.unwrap_or(0).to_le_bytes());
    }
    for time in [options.since_ms, options.until_ms, options.as_of_ms, options.now_ms] {
        out.extend(time.unwrap_or(0).to_le_bytes());
    }
    out.extend(options.half_life_ms.unwrap_or(0).to_le_bytes());
    out.extend(options.min_score.unwrap_or(0.0).to_le_bytes());
    out.extend(options.min_relevance.unwrap_or(0.0).to_le_bytes());
    out.extend(texts.iter().flatten().flat_map(|text| text.bytes()));
    out
}

fn words() -> impl Strategy<Value = String> {
    proptest::collection::vec("(hotel|Kyoto|train|märz|宿|🐑|ada|the|at nine)", 1..12)
        .prop_map(|words| words.join(" "))
}

fn a_turn() -> impl Strategy<Value = NewTurn> {
    let role = prop_oneof![Just(Role::User), Just(Role::Assistant), Just(Role::Document)];
    (role, words(), 0..50_i64, proptest::option::of("[a-zé🐑]{1,9}"), 0..3_u8).prop_map(
        |(role, text, time_ms, source, kind)| NewTurn {
            role,
            text,
            time_ms,
            source,
            remember: None,
            subject: None,
            expires_ms: (kind == 2).then_some(time_ms + 10),
            metadata: [("kind".to_owned(), MetadataValue::Number { number: kind.into() })].into(),
        },
    )
}

fn some_options() -> impl Strategy<Value = RecallOptions> {
    let time = || proptest::option::of(0..60_i64);
    let numbers = (0..12_u64, proptest::option::of(0..9_u64), proptest::option::of(1..99_u64));
    let scores = (proptest::option::of(0.0..0.5_f32), proptest::option::of(0.0..0.5_f32));
    let times = (time(), time(), time(), time());
    let flags = (any::<bool>(), any::<bool>(), any::<Option<bool>>(), any::<bool>());
    (numbers, scores, times, flags).prop_map(|(numbers, scores, times, flags)| RecallOptions {
        k: Some(numbers.0),
        before_turn: numbers.1,
        half_life_ms: numbers.2,
        min_score: scores.0,
        min_relevance: scores.1,
        since_ms: times.0,
        until_ms: times.1,
        as_of_ms: times.2,
        now_ms: times.3,
        across_sessions: flags.0,
        stale: flags.1,
        follow_up: flags.2,
        roles: if flags.3 { vec![Role::User, Role::Document] } else { Vec::new() },
        filter: None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn packed_hits_are_those_of_the_plain_call(
        turns in proptest::collection::vec((a_turn(), any::<bool>(), any::<bool>()), 1..12),
        asked in proptest::collection::vec((words(), some_options(), any::<bool>()), 1..6),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let engine =
            NativeEngine::open_blocking(store(folder.path()), EngineConfig::default()).unwrap();
        let memory = engine.memory();
        let agent = |is_one: bool| is_one.then(|| "planer·é".to_owned());
        for (turn, with_agent, elsewhere) in turns {
            let session = Some(if elsewhere { "宿" } else { "trip" }.to_owned());
            let scope = Scope { agent: agent(with_agent), session, ..trip() };
            memory.remember_blocking(scope, vec![turn]).unwrap();
        }
        for (query, options, whole) in asked {
            let scope = match whole {
                true => Scope { session: None, ..trip() },
                false => trip(),
            };
            let kind = MetadataValue::Number { number: 1.0 };
            let filter = Filter::OneOf { key: "kind".into(), values: vec![kind] };
            let json = r#"{"In":["kind",[1]]}"#;
            for (filter, json) in [(None, None), (Some(filter), Some(json))] {
                let plain = RecallOptions { filter, ..options.clone() };
                let plain = memory.recall_blocking(scope.clone(), query.clone(), plain).unwrap();
                let request = request(&scope, &query, &options, json);
                let bytes = recall(memory.clone().number(), &request).bytes();
                let packed = Reading(&bytes).hits();
                prop_assert_eq!(format!("{packed:?}"), format!("{plain:?}"));
            }
        }
    }

    #[test]
    fn no_bytes_are_a_request_that_does_harm(
        cut in 0..200_usize,
        at in 0..90_usize,
        byte in any::<u8>(),
        noise in proptest::collection::vec(any::<u8>(), 0..120),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let engine =
            NativeEngine::open_blocking(store(folder.path()), EngineConfig::default()).unwrap();
        let memory = engine.memory().number();
        let mut whole = request(&trip(), "hotel", &RecallOptions::default(), Some("{}"));
        let error = recall(memory, &whole);
        prop_assert_eq!(error.kind(), "InvalidArgument", "an empty filter");
        let error = recall(memory, &noise);
        prop_assert_eq!(error.kind(), "InvalidArgument");
        whole.truncate(cut);
        if let Some(there) = whole.get_mut(at) {
            *there = byte;
        }
        match recall(memory, &whole) {
            Given::Bytes(_) => {}
            error => prop_assert_eq!(error.kind(), "InvalidArgument"),
        }
    }
}

#[test]
fn packed_events_are_those_of_the_plain_call() {
    let mut seen = Vec::new();
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
        let fact = NewTurn {
            role: Role::User,
            text: "The sheep are on the hill.".into(),
            time_ms: 6,
            source: Some("märz".into()),
            remember: None,
            subject: None,
            expires_ms: None,
            metadata: Default::default(),
        };
        let elsewhere = Scope { session: Some("facts".into()), ..trip() };
        engine.clone().memory().remember_blocking(elsewhere, vec![fact]).unwrap();
        let mut options = tokens(12);
        options.time_ms = Some(7);
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
        assert!(matches!(answer[0], Event::Recalled { .. }), "{answer:?}");
        // The hits' identities are seeded by each store.
        let answer = format!("{answer:?}");
        let pieces = answer.split("chunk: \"").map(|part| part.get(32..).unwrap_or(part));
        seen.push((said, pieces.collect::<Vec<_>>().join("")));
    }
    assert_eq!(seen[0], seen[1]);
}

/// Waits until `number` has rung.
fn rung(bell: &NativeBell, bell_number: u64, number: u64) {
    let start = Instant::now();
    let mut readable =
        libc::pollfd { fd: bell.descriptor().unwrap(), events: libc::POLLIN, revents: 0 };
    while start.elapsed() < Duration::from_secs(60) {
        // SAFETY: one descriptor, whose bell is borrowed.
        assert!(unsafe { libc::poll(&mut readable, 1, 1000) } >= 0);
        // SAFETY: `given` passes a reply.
        let bytes = given(|reply| unsafe { mka_direct_rung(bell_number, reply) }).bytes();
        if bytes.chunks(8).any(|each| each == number.to_le_bytes()) {
            return;
        }
    }
    panic!("{number} has not rung");
}

#[test]
fn a_bell_tells_when_a_stream_and_a_recall_are_to_be_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let bell = NativeBell::new().unwrap();
    let bell_number = bell.clone().number();
    let chat = engine.session_blocking(trip()).unwrap();
    let turn = chat.send("hello there".into(), tokens(20)).unwrap();
    let number = turn.clone().number();
    let (mut answer, mut waits) = (Vec::new(), 0);
    loop {
        // SAFETY: `given` passes a reply.
        match given(|reply| unsafe { mka_direct_poll(number, bell_number, reply) }) {
            Given::Bytes(bytes) if bytes.is_empty() => {
                waits += 1;
                rung(&bell, bell_number, number);
            }
            Given::Bytes(bytes) => answer.extend(events(&bytes)),
            Given::End => break,
            Given::Failed(error) => panic!("{error}"),
        }
    }
    assert!(matches!(answer.last(), Some(Event::Done { .. })) && waits > 0, "{answer:?} {waits}");

    let (memory, request) = (
        engine.clone().memory(),
        request(&Scope { session: None, ..trip() }, "hello", &RecallOptions::default(), None),
    );
    let begin = || {
        let (at, len) = (request.as_ptr(), request.len());
        let memory = memory.clone().number();
        // SAFETY: `given` passes a reply; the request outlives the call.
        let number = given(|reply| unsafe {
            mka_direct_begin_recall(memory, at, len, bell_number, reply);
        });
        u64::from_le_bytes(number.bytes().try_into().unwrap())
    };
    // SAFETY: `given` passes a reply.
    let take = |number| given(|reply| unsafe { mka_direct_recalled(number, bell_number, reply) });
    let number = begin();
    rung(&bell, bell_number, number);
    assert!(!take(number).bytes().is_empty());
    assert_eq!(take(number).kind(), "InvalidArgument");
    let left = begin();
    mka_direct_drop(left);
    mka_direct_drop(left);
    assert_eq!(take(left).kind(), "InvalidArgument");
    engine.close_blocking().unwrap();
    assert_eq!(recall(memory.number(), &request).kind(), "InvalidArgument");
    drop(bell);
    // SAFETY: `given` passes a reply.
    let error = given(|reply| unsafe { mka_direct_poll(number, bell_number, reply) });
    assert_eq!(error.kind(), "InvalidArgument");
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

#[test]
fn a_caller_is_told_when_a_stream_is_to_be_asked_again_and_let_go_of_in_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let turn = chat.send("hello there".into(), tokens(20)).unwrap();
    let number = turn.clone().number();
    let sleeper =
        Arc::new(Sleeper { thread: std::thread::current(), woken: AtomicBool::new(false) });
    let poll = || {
        let context = Arc::into_raw(sleeper.clone()).cast_mut().cast();
        // SAFETY: `given` passes a reply; both functions may be called from any thread.
        given(|reply| unsafe {
            mka_direct_poll_for(number, Caller { context, wake, release }, reply);
        })
    };
    let (mut read, mut waits) = (Vec::new(), 0);
    loop {
        match poll() {
            Given::Bytes(bytes) if bytes.is_empty() => {
                waits += 1;
                while !sleeper.woken.swap(false, Ordering::SeqCst) {
                    std::thread::park();
                }
            }
            Given::Bytes(bytes) => read.extend(events(&bytes)),
            Given::End => break,
            Given::Failed(error) => panic!("{error}"),
        }
    }
    assert!(matches!(read.last(), Some(Event::Done { .. })) && waits > 0, "{read:?} {waits}");
    drop(turn);
    assert_eq!(poll().kind(), "InvalidArgument");
    engine.close_blocking().unwrap();
    assert_eq!(Arc::strong_count(&sleeper), 1);
}

#[test]
fn errors_come_with_their_kind() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let failed = chat.regenerate(tokens(2)).unwrap();
    let error = next(failed.clone().number());
    assert_eq!(error.kind(), "NotFound");
    assert!(matches!(&error, Given::Failed(text) if text.contains("no answer")));
    let failed = chat.regenerate(tokens(2)).unwrap();
    assert!(matches!(finish(&failed), Err(MkaError::NotFound(_))));
}
