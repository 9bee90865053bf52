//! The surface as a foreign caller uses it, over the tiny seeded model of the engine's tests.

mod direct;
mod open;
mod tools;

use mka_bindings::{
    Backend, EngineConfig, Event, FeedEvent, FeedMode, FeedOptions, Filter, Forget, Hygiene,
    LandmarkScan, LogLevel, LogSink, MetadataValue, MkaError, ModelSource, NativeEngine,
    NativeEvents, NativeSession, NewTurn, PageConfig, PagePrecision, PageRule, Policy, Prefill,
    RecallOptions, RecallPolicy, Role, Scope, SendOptions, Sensitive, forward_logs,
};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

fn tiny_model() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    root.join("engine/tests/data/golden/gguf/model.gguf").to_str().unwrap().to_owned()
}

fn store(folder: &Path) -> String {
    PathBuf::from(folder).join("store").to_str().unwrap().to_owned()
}

fn engine(folder: &Path) -> Arc<NativeEngine> {
    let config = EngineConfig {
        model: Some(ModelSource::Path { path: tiny_model() }),
        window_tokens: Some(128),
        block_tokens: Some(64),
        device: Some("cpu".into()),
        ..EngineConfig::default()
    };
    NativeEngine::open_blocking(store(folder), config).unwrap()
}

fn trip() -> Scope {
    Scope { user: "ada".into(), agent: None, session: Some("trip".into()) }
}

fn tokens(max_new_tokens: u64) -> SendOptions {
    SendOptions { max_new_tokens: Some(max_new_tokens), ..SendOptions::default() }
}

/// Pulls a turn to its end: the answer and whether it was done.
fn finish(events: &NativeEvents) -> Result<(String, bool), MkaError> {
    let (mut text, mut done) = (String::new(), false);
    while let Some(batch) = events.next_batch_blocking(1000)? {
        for event in batch {
            match event {
                Event::Token { text: piece } => text.push_str(&piece),
                Event::Done { .. } => done = true,
                Event::Recalled { .. } => {}
            }
        }
    }
    Ok((text, done))
}

#[test]
fn a_turn_is_pulled_in_batches_and_a_closed_engine_leaves_the_folder_free() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        let engine = engine(folder.path());
        let chat = engine.session_blocking(trip()).unwrap();
        let events = chat.send("hello there".into(), tokens(6)).unwrap();
        assert!(finish(&events).unwrap().1);
        assert!(events.next_batch_blocking(0).unwrap().is_none());
        // A stream is left running.
        let left = chat.send("and now".into(), tokens(100_000)).unwrap();
        engine.close_blocking().unwrap();
        engine.close_blocking().unwrap();
        assert!(finish(&left).is_ok());
        let error = chat.send("more".into(), tokens(1)).err().unwrap();
        assert!(matches!(error, MkaError::InvalidArgument(_)), "{error:?}");
        assert!(error.to_string().contains("closed"), "{error}");
    }
}

type Opening<'a> = Pin<Box<dyn Future<Output = Result<Arc<NativeSession>, MkaError>> + 'a>>;

/// Asks `opening` once, as who is told of nothing.
fn asked(opening: &mut Opening<'_>) -> Poll<Result<Arc<NativeSession>, MkaError>> {
    opening.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn an_engine_closes_while_a_session_or_a_fork_of_one_is_being_opened() {
    let folder = tempfile::tempdir().unwrap();
    for fork in [false, true] {
        let engine = engine(folder.path());
        let chat = engine.session_blocking(trip()).unwrap();
        finish(&chat.send("hello".into(), tokens(2)).unwrap()).unwrap();
        // The work begins, and nobody asks what came of it before the engine is closed.
        let mut number = 0;
        let mut opening = loop {
            number += 1;
            let name = format!("{fork} {number}");
            let mut opening: Opening<'_> = match fork {
                true => Box::pin(chat.fork(name)),
                false => Box::pin(engine.session(Scope { session: Some(name), ..trip() })),
            };
            match asked(&mut opening) {
                Poll::Pending => break opening,
                // This one was fast.
                Poll::Ready(opened) => opened.unwrap().close(),
            }
        };
        let closing = engine.clone();
        let closing = std::thread::spawn(move || closing.close_blocking());
        while engine.device().is_ok() {
            std::thread::yield_now();
        }
        // A moment later its sessions are closed.
        std::thread::sleep(Duration::from_millis(100));
        let error = loop {
            match asked(&mut opening) {
                Poll::Ready(opened) => break opened.err().unwrap(),
                Poll::Pending => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        assert!(matches!(&error, MkaError::InvalidArgument(text) if text.contains("closed")));
        let until = Instant::now() + Duration::from_secs(60);
        while !closing.is_finished() {
            assert!(Instant::now() < until, "the engine does not close, fork: {fork}");
            std::thread::sleep(Duration::from_millis(1));
        }
        closing.join().unwrap().unwrap();
    }
}

#[test]
fn a_second_stream_is_refused_until_the_first_is_closed_and_closing_keeps_its_words() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let first = chat.send("one".into(), tokens(100_000)).unwrap();
    while first.next_batch_blocking(1000).unwrap().unwrap().is_empty() {}
    let error = chat.send("two".into(), tokens(2)).err().unwrap();
    assert!(matches!(error, MkaError::Locked(_)), "{error:?}");
    first.close_blocking().unwrap();
    assert!(first.next_batch_blocking(0).unwrap().is_none());
    assert_eq!(chat.num_turns().unwrap(), 2);
    assert!(finish(&chat.send("two".into(), tokens(2)).unwrap()).unwrap().1);
    drop(chat.send("three".into(), tokens(100_000)).unwrap());
    assert!(finish(&chat.send("four".into(), tokens(2)).unwrap()).unwrap().1);
}

#[test]
fn a_reader_that_waits_sees_the_end_when_another_thread_cancels() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let events = chat.send("go".into(), tokens(1_000_000)).unwrap();
    let reader = events.clone();
    let reader = std::thread::spawn(move || finish(&reader).unwrap());
    // At once: the small model ends its answer by itself within milliseconds.
    events.cancel();
    let (_, done) = reader.join().unwrap();
    assert!(!done);
}

/// Models to cancel: the tiny one, and the default one, whose token takes longer than anything else, where it is in the cache.
fn models() -> Vec<String> {
    let cache = std::env::var("MKA_CACHE")
        .unwrap_or_else(|_| format!("{}/.cache/mka", std::env::var("HOME").unwrap_or_default()));
    let default = format!("{cache}/models/SmolLM2-135M-Instruct-Q4_1.gguf");
    if Path::new(&default).exists() {
        return vec![tiny_model(), default];
    }
    println!("the default model is not in {cache}: only the tiny one is cancelled");
    vec![tiny_model()]
}

#[test]
fn after_a_cancel_the_model_chooses_at_most_one_more_token_and_the_store_is_whole() {
    for model in models() {
        let folder = tempfile::tempdir().unwrap();
        let config = EngineConfig {
            model: Some(ModelSource::Path { path: model }),
            window_tokens: Some(128),
            device: Some("cpu".into()),
            ..EngineConfig::default()
        };
        let engine = NativeEngine::open_blocking(store(folder.path()), config).unwrap();
        let chat = engine.session_blocking(trip()).unwrap();
        let story = "Tell me a very long story.".to_owned();
        let events = chat.send(story, tokens(100_000)).unwrap();
        let mut seen = 0;
        while seen < 5 {
            seen += events.next_batch_blocking(10_000).unwrap().unwrap().len();
        }
        events.cancel();
        let chosen = chat.generated_tokens();
        events.close_blocking().unwrap();
        let after = chat.generated_tokens();
        assert!(chosen >= 5 && after <= chosen + 1, "{chosen} at the cancel, {after} in all");
        let memory = engine.clone().memory();
        let turns = memory.turns_blocking(trip(), 0, 9).unwrap();
        assert_eq!(turns.len(), 2);
        assert_eq!(turns[1].num_tokens, after, "the log holds what the model chose");
        assert!(memory.doctor_blocking(false).unwrap().problems.is_empty());
        assert!(finish(&chat.send("Go on.".into(), tokens(2)).unwrap()).unwrap().1);
    }
}

#[test]
fn errors_of_the_stream_come_after_what_was_sent_before_them() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let options = SendOptions { top_p: Some(1.5), ..SendOptions::default() };
    let events = chat.send("hi".into(), options).unwrap();
    let error = finish(&events).unwrap_err();
    assert!(matches!(&error, MkaError::InvalidArgument(text) if text.contains("top_p")));
    assert!(events.next_batch_blocking(0).unwrap().is_none());
    assert!(finish(&chat.send("hi".into(), tokens(2)).unwrap()).unwrap().1);
}

#[test]
fn an_error_that_is_no_cancellation_reaches_who_cancelled_and_who_closed() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    // Nothing was answered yet.
    let failing = || chat.regenerate(tokens(2)).unwrap();
    let read = failing();
    read.cancel();
    let error = finish(&read).unwrap_err();
    assert!(matches!(&error, MkaError::NotFound(text) if text.contains("no answer")), "{error}");
    assert!(read.next_batch_blocking(0).unwrap().is_none());
    read.close_blocking().unwrap();
    let closed = failing();
    assert!(matches!(closed.close_blocking(), Err(MkaError::NotFound(_))));
    assert!(closed.next_batch_blocking(0).unwrap().is_none());
    closed.close_blocking().unwrap();
    let cancelled = chat.send("go".into(), tokens(100_000)).unwrap();
    cancelled.cancel();
    assert!(!finish(&cancelled).unwrap().1);
}

#[test]
fn eight_threads_on_one_engine_lose_no_turn() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let scope = |number| Scope { session: Some(format!("s{number}")), ..trip() };
    std::thread::scope(|threads| {
        for number in 0..8 {
            let engine = &engine;
            threads.spawn(move || {
                let chat = engine.session_blocking(scope(number)).unwrap();
                for turn in 0..3 {
                    let events = chat.send(format!("turn {turn}"), tokens(4)).unwrap();
                    assert!(finish(&events).unwrap().1);
                    let options = RecallOptions::default();
                    engine
                        .clone()
                        .memory()
                        .recall_blocking(scope(number), "turn".into(), options)
                        .unwrap();
                }
            });
        }
    });
    let sessions = engine.clone().memory().sessions_blocking(Scope { session: None, ..trip() });
    let turns: Vec<u64> = sessions.unwrap().iter().map(|info| info.num_turns).collect();
    assert!(turns.len() == 8 && turns.iter().all(|turns| *turns >= 6), "{turns:?}");
}

#[test]
fn memory_without_a_model_remembers_recalls_forgets_and_verifies() {
    let folder = tempfile::tempdir().unwrap();
    let engine =
        NativeEngine::open_blocking(store(folder.path()), EngineConfig::default()).unwrap();
    let memory = engine.clone().memory();
    let turn = |text: &str| NewTurn {
        role: Role::User,
        text: text.into(),
        time_ms: 1_000,
        source: None,
        remember: None,
        subject: None,
        expires_ms: None,
        metadata: HashMap::new(),
    };
    let turns = vec![turn("the hotel is in Kyoto"), turn("the passport is X1234567")];
    assert_eq!(memory.remember_blocking(trip(), turns).unwrap().turns, [0, 1]);
    let recall = |query: &str| {
        memory.recall_blocking(trip(), query.into(), RecallOptions::default()).unwrap()
    };
    let hits = recall("hotel");
    assert_eq!(hits[0].text, "the hotel is in Kyoto");
    assert_eq!((hits[0].source.turn, hits[0].source.time_ms), (0, 1_000));
    let chat = engine.session_blocking(trip()).unwrap();
    assert!(chat.context_blocking("hotel".into(), 100).unwrap().tokens <= 100);
    let receipt =
        memory.forget_blocking(trip(), Forget::Matching { text: "passport".into() }).unwrap();
    memory.verify_blocking(receipt.record).unwrap();
    assert!(recall("passport").iter().all(|hit| !hit.text.contains("X1234567")));
    let error = memory.verify_blocking("{}".into()).unwrap_err();
    assert!(matches!(error, MkaError::InvalidArgument(_)));
    let turns = memory.turns_blocking(trip(), 0, 9).unwrap();
    assert_eq!(turns.iter().map(|turn| turn.forgotten).collect::<Vec<_>>(), [false, true]);
    let replaced = memory.replace_blocking(trip(), 0, turn("the hotel is in Nara")).unwrap();
    assert_eq!((replaced.turns, recall("hotel")[0].source.turn), (vec![2], 2));
    let both = Forget::Turns { turns: vec![1, 2] };
    assert_eq!(memory.forget_blocking(trip(), both).unwrap().turns, 1);
    let marked = NewTurn {
        metadata: HashMap::from([("kind".into(), MetadataValue::Flag { flag: true })]),
        ..turn("the train is late")
    };
    memory.remember_blocking(trip(), vec![marked]).unwrap();
    let filter = Some(Filter::Has { key: "kind".into() });
    let chunks = memory.chunks_blocking(trip(), 0, 9, filter).unwrap();
    assert_eq!(chunks.iter().map(|it| it.text.as_str()).collect::<Vec<_>>(), ["the train is late"]);
    assert_eq!(memory.users().unwrap(), ["ada"]);
    let late = RecallOptions { since_ms: Some(2_000), ..RecallOptions::default() };
    let texts = [RecallOptions::default(), late].map(|options| {
        memory.context_blocking(trip(), "the train".into(), 100, options).unwrap().text
    });
    assert!(texts[0].contains("the train is late") && texts[1].is_empty(), "{texts:?}");
    let vectors = memory.embed_blocking(vec!["a cat".into()]).unwrap();
    assert_eq!(vectors.data.len() as u64, 4 * vectors.dim);
    let error = chat.send("hi".into(), SendOptions::default()).unwrap();
    assert!(finish(&error).unwrap_err().to_string().contains("no model"));
}

#[test]
fn a_document_is_fed_with_progress() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let text = "The sheep and the goats went up the hill. ".repeat(2000);
    let feed = chat.feed(text.clone(), FeedOptions::default()).unwrap();
    let (mut summary, mut before) = (None, 0);
    while let Some(batch) = feed.next_batch_blocking(1000).unwrap() {
        for event in batch {
            match event {
                FeedEvent::Progress { fed_bytes, total_bytes, .. } => {
                    assert!(fed_bytes >= before && total_bytes == text.len() as u64);
                    before = fed_bytes;
                }
                FeedEvent::Done { summary: done } => summary = Some(done),
            }
        }
    }
    assert_eq!(summary.unwrap().bytes, text.len() as u64);
}

#[derive(Default)]
struct Kept(Mutex<Vec<(LogLevel, String, String)>>);

impl LogSink for Kept {
    fn log(&self, level: LogLevel, target: String, message: String) {
        self.0.lock().unwrap().push((level, target, message));
    }
}

#[test]
fn messages_reach_the_sink_with_their_fields_until_it_is_taken_away() {
    let kept = Arc::new(Kept::default());
    forward_logs(LogLevel::Info, Some(kept.clone())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let opened = engine(folder.path());
    forward_logs(LogLevel::Info, None).unwrap();
    // A message of another test may be on its way.
    std::thread::sleep(Duration::from_millis(50));
    let said = kept.0.lock().unwrap().len();
    assert!(kept.0.lock().unwrap().iter().any(|(level, target, message)| *level == LogLevel::Info
        && target.starts_with("mka")
        && message == "open model device=cpu"));
    drop(opened);
    drop(engine(folder.path()));
    assert_eq!(kept.0.lock().unwrap().len(), said);
}

#[test]
fn a_store_is_exported_imported_backed_up_checked_and_compacted() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let config = || EngineConfig {
        encryption_key: Some(vec![7; 32]),
        backend: Some(Backend::Redb),
        hygiene: Some(Hygiene { secrets: Some(Policy::Withhold), ..Hygiene::default() }),
        ..EngineConfig::default()
    };
    let engine = NativeEngine::open_blocking(path("a"), config()).unwrap();
    let memory = engine.clone().memory();
    let turn = |text: &str, time_ms, expires_ms: Option<i64>| NewTurn {
        role: Role::User,
        text: text.into(),
        time_ms,
        source: None,
        remember: None,
        subject: expires_ms.is_none().then(|| "home".into()),
        expires_ms,
        metadata: HashMap::new(),
    };
    let turns = vec![
        turn("I live in Osaka.", 1, None),
        turn("I live in Kyoto.", 2, None),
        turn("The code word is password: hunter2hunter2", 3, Some(10)),
    ];
    let committed = memory.remember_blocking(trip(), turns).unwrap();
    assert_eq!(committed.findings.len(), 1, "{committed:?}");
    assert_eq!(committed.findings[0].kind, Sensitive::Password);
    let recall = |options: RecallOptions| {
        let hits = memory.recall_blocking(trip(), "where do I live".into(), options).unwrap();
        hits.into_iter().map(|hit| (hit.text, hit.stale)).collect::<Vec<_>>()
    };
    assert_eq!(recall(RecallOptions::default()), [("I live in Kyoto.".to_owned(), false)]);
    let past = RecallOptions { as_of_ms: Some(1), ..RecallOptions::default() };
    assert_eq!(recall(past), [("I live in Osaka.".to_owned(), false)]);
    let all = RecallOptions { stale: true, ..RecallOptions::default() };
    assert!(recall(all).contains(&("I live in Osaka.".into(), true)));
    let rest = RecallOptions { except_turns: vec![1], ..RecallOptions::default() };
    assert!(!recall(rest).contains(&("I live in Kyoto.".into(), false)));
    let expired = memory.forget_blocking(trip(), Forget::Expired { time_ms: 20 }).unwrap();
    assert_eq!(expired.turns, 1);
    memory.compact_blocking().unwrap();
    assert!(memory.doctor_blocking(false).unwrap().problems.is_empty());
    let usage = memory.disk_usage_blocking().unwrap();
    // An encrypted store has neither graphs nor images on the disk.
    assert!(usage.live_bytes > 0 && usage.graph_bytes == 0 && usage.image_bytes == 0, "{usage:?}");
    assert!(memory.backup_blocking(path("copy")).unwrap().records > 0);
    assert_eq!(memory.export_blocking(Some(trip()), path("log.jsonl")).unwrap().turns, 3);
    let stats = memory.stats().unwrap();
    assert!(stats.encrypted && stats.subjects == 1 && stats.superseded == 1, "{stats:?}");
    assert!(stats.vectors_unread == 0 && stats.vectors_in_graphs == 0, "{stats:?}");
    assert_eq!(memory.sessions_blocking(trip()).unwrap()[0].num_pages, 0);
    assert!(memory.turns_blocking(trip(), 0, 1).unwrap()[0].remember);
    let other = NativeEngine::open_blocking(path("b"), EngineConfig::default()).unwrap();
    let imported = other.clone().memory().import_log_blocking(path("log.jsonl")).unwrap();
    assert_eq!(imported.turns, 3);
    engine.close_blocking().unwrap();
    NativeEngine::open_blocking(path("copy"), config()).unwrap();
    let short = EngineConfig { encryption_key: Some(vec![1; 5]), ..EngineConfig::default() };
    let error = NativeEngine::open_blocking(path("c"), short).err().unwrap();
    assert!(matches!(&error, MkaError::InvalidArgument(text) if text.contains("5 bytes")));
}

#[test]
fn the_long_work_of_a_memorys_twin_is_cancelled_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let engine = NativeEngine::open_blocking(path("a"), EngineConfig::default()).unwrap();
    let memory = engine.clone().memory();
    let turn = NewTurn {
        role: Role::User,
        text: "The hotel is in Kyoto.".into(),
        time_ms: 1,
        source: None,
        remember: None,
        subject: None,
        expires_ms: None,
        metadata: HashMap::new(),
    };
    memory.remember_blocking(trip(), vec![turn]).unwrap();
    memory.export_blocking(None, path("log.jsonl")).unwrap();
    let twin = memory.twin();
    let mut context = Context::from_waker(Waker::noop());
    let mut begun = Box::pin(twin.doctor(false));
    let is_under_way = begun.as_mut().poll(&mut context).is_pending();
    twin.cancel();
    if is_under_way {
        let ended = begun.as_mut().poll(&mut context);
        assert!(matches!(ended, Poll::Ready(Err(MkaError::Cancelled(_)))), "{ended:?}");
    }
    drop(begun);
    let later = [
        twin.export_blocking(None, path("b")).err(),
        twin.import_log_blocking(path("log.jsonl")).err(),
        twin.backup_blocking(path("c")).err(),
        twin.doctor_blocking(false).err(),
    ];
    for error in later {
        assert!(matches!(error, Some(MkaError::Cancelled(_))), "{error:?}");
    }
    assert!(!Path::new(&path("b")).exists() && !Path::new(&path("c")).exists());
    assert!(memory.doctor_blocking(false).unwrap().problems.is_empty());
    engine.close_blocking().unwrap();
}

#[test]
fn recall_inside_attention_is_chosen_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let pages = PageConfig {
        tokens: Some(64),
        precision: Some(PagePrecision::Int8),
        rule: Some(PageRule::Mka),
        scan: Some(LandmarkScan::TwoLevel),
        prefill: Some(Prefill::Selected),
        first_layer: Some(0),
        vote_reach: Some(4),
        keep_votes: Some(false),
        ..PageConfig::default()
    };
    let config = EngineConfig {
        model: Some(ModelSource::Path { path: tiny_model() }),
        window_tokens: Some(64),
        block_tokens: Some(64),
        recall: Some(RecallPolicy::Pages),
        pages: Some(pages),
        device: Some("cpu".into()),
        ..EngineConfig::default()
    };
    let engine = NativeEngine::open_blocking(store(folder.path()), config).unwrap();
    assert!(engine.kv_bytes_per_token().unwrap().is_some());
    let chat = engine.session_blocking(trip()).unwrap();
    let text = "The sheep and the goats went up the hill. ".repeat(12);
    let options = FeedOptions { mode: Some(FeedMode::Model), ..FeedOptions::default() };
    let feed = chat.feed(text, options).unwrap();
    while feed.next_batch_blocking(1000).unwrap().is_some() {}
    let events = chat.send("and then?".into(), tokens(4)).unwrap();
    let mut usage = None;
    while let Some(batch) = events.next_batch_blocking(1000).unwrap() {
        for event in batch {
            if let Event::Done { usage: done } = event {
                usage = done.pages;
            }
        }
    }
    let usage = usage.expect("the policy recalls pages");
    assert!(usage.stored_tokens > 0 && !usage.share.is_empty(), "{usage:?}");
    let text = SendOptions { recall: Some(RecallPolicy::Off), ..tokens(2) };
    assert!(finish(&chat.send("and then?".into(), text).unwrap()).unwrap().1);
}
