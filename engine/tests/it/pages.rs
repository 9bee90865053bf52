//! Recall inside attention through the public API: policies, restarts, answering again, forgetting.

use crate::{finish, tiny_model, trip, wait};
use mka::{
    Engine, ErrorKind, FeedEvent, FeedOptions, Forget, MemoryConfig, ModelSource, NewTurn,
    PagePrecision, Recall, RecallPolicy, Role, SendOptions, Session,
};
use std::path::{Path, PathBuf};

/// The tiny model with a window of 64 tokens, which recalls 64 more.
pub(crate) fn config(recall: RecallPolicy) -> MemoryConfig {
    let mut config = MemoryConfig::with_window(64);
    config.block_tokens = 64;
    config.recall = recall;
    config.recall_k = 0;
    config.pages.tokens = 64;
    config.pages.first_layer = 0;
    config.evicted_page_bytes = 1 << 30;
    config
}

pub(crate) fn open(folder: &Path, config: MemoryConfig) -> mka::Result<Engine> {
    let model = ModelSource::path(tiny_model());
    Engine::builder(folder.join("store")).model(model).memory(config).open_blocking()
}

fn short() -> SendOptions {
    SendOptions::default().max_new_tokens(6)
}

/// Four documents, so that each is committed before the next.
fn feed(chat: &mut Session) {
    for part in 0..4 {
        let items = part * 40..(part + 1) * 40;
        let text: String = items.map(|i| format!("item {} is {}. ", i, i * i % 97)).collect();
        wait(chat.feed_with(text, FeedOptions::through_model()).finish()).unwrap();
    }
}

/// An engine with a session that was fed.
fn fed(folder: &Path, config: MemoryConfig) -> (Engine, Session) {
    let engine = open(folder, config).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    feed(&mut chat);
    (engine, chat)
}

#[test]
fn a_long_document_is_committed_beside_the_model_and_whole_at_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..2600).map(|i| format!("item {i} is {}. ", i * i % 97)).collect();
    let before = {
        let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        let mut feed = chat.feed_with(text.as_str(), FeedOptions::through_model());
        let (mut commits, mut summary) = (Vec::new(), None);
        while let Some(event) = feed.next_blocking() {
            match event.unwrap() {
                FeedEvent::Progress { committed_bytes, fed_bytes, .. } => {
                    assert!(committed_bytes <= fed_bytes);
                    commits.push(committed_bytes);
                }
                FeedEvent::Done(done) => summary = Some(done),
                _ => {}
            }
        }
        assert!(summary.unwrap().model_tokens > 2 * 8192, "{summary:?}");
        assert!(commits.is_sorted());
        assert_eq!(commits.last(), Some(&(text.len() as u64)));
        commits.dedup();
        assert!(commits.len() > 3, "none, two while the model read, and the last: {commits:?}");
        wait(chat.peek_logits("the next")).unwrap()
    };
    let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert_eq!(wait(chat.peek_logits("the next")).unwrap(), before);
}

#[test]
fn what_no_text_recall_would_find_is_read_by_the_model() {
    let text: String = (0..160).map(|i| format!("item {i} is {}. ", i * i % 97)).collect();
    for (recall, is_read) in [(RecallPolicy::Pages, true), (RecallPolicy::Both, false)] {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path(), config(recall)).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        // Far more than four windows, which text memory takes in by default.
        let fed = wait(chat.feed(text.as_str()).finish()).unwrap();
        assert_eq!(fed.model_tokens > 1000, is_read, "{recall:?}: {fed:?}");
        let long = format!("{text} And item 7?");
        let (_, usage) = finish(chat.send_with(&long, short())).unwrap();
        let stored = usage.pages.unwrap().stored_tokens;
        assert_eq!(stored > 2000, is_read, "{recall:?}: {stored} tokens are stored");
    }
}

#[test]
fn what_is_refused_before_anything_is_read_leaves_the_stored_pages() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(RecallPolicy::Pages);
    // Nothing could bring them back.
    config.evicted_page_bytes = 0;
    let (engine, mut chat) = fed(folder.path(), config);
    let stored = |chat: &mut Session| {
        let (_, usage) = finish(chat.send_with("go on", short())).unwrap();
        usage.pages.unwrap().stored_tokens
    };
    let before = stored(&mut chat);
    wait(chat.append(Vec::new()).finish()).unwrap_err();
    wait(chat.feed("").finish()).unwrap_err();
    assert!(before > 64 && stored(&mut chat) >= before);
    // An answer that was remembered behind the last one answers no message of the stream.
    let note = vec![NewTurn::new(Role::Assistant, "a note")];
    wait(engine.memory().remember(&trip(), note)).unwrap();
    let error = finish(chat.regenerate(short())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(stored(&mut chat) >= before);
}

#[test]
fn a_shorter_answer_given_again_is_committed_with_the_pages_that_are_in_the_window_again() {
    for (recall, evicted_page_bytes) in [(RecallPolicy::Text, 0), (RecallPolicy::Pages, 1 << 30)] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(recall);
        config.evicted_page_bytes = evicted_page_bytes;
        let (before, stored) = {
            let engine = open(folder.path(), config.clone()).unwrap();
            let mut chat = engine.session_blocking(trip()).unwrap();
            feed(&mut chat);
            let long = SendOptions::default().max_new_tokens(300);
            let (_, usage) = finish(chat.send_with("go on", long)).unwrap();
            assert!(usage.generated_tokens > 128, "{usage:?}");
            let (_, usage) = finish(chat.regenerate(short())).unwrap();
            let stored = usage.pages.map(|pages| pages.stored_tokens);
            (wait(chat.peek_logits("the next")).unwrap(), stored)
        };
        let engine = open(folder.path(), config).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        assert_eq!(wait(chat.peek_logits("the next")).unwrap(), before);
        let (_, usage) = finish(chat.send_with("go on", short())).unwrap();
        assert!(usage.pages.map(|pages| pages.stored_tokens) >= stored);
    }
}

#[test]
fn a_reopened_session_recalls_the_same_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let before = {
        let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        feed(&mut chat);
        let (_, usage) = finish(chat.send_with("what is item 7", short())).unwrap();
        let pages = usage.pages.unwrap();
        assert_eq!(pages.recalled_tokens, 64);
        assert!(pages.stored_tokens > 1000, "{pages:?}");
        assert!(pages.share.iter().all(|share| (0.0..=1.0).contains(share)), "{pages:?}");
        assert!(pages.recovered.iter().all(|share| (0.0..=1.0).contains(share)), "{pages:?}");
        assert!(pages.share.iter().any(|share| *share > 0.0), "{pages:?}");
        wait(chat.peek_logits("the next")).unwrap()
    };
    let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert_eq!(wait(chat.peek_logits("the next")).unwrap(), before);
    drop((chat, engine));
    // Without pages it is another attention.
    let engine = open(folder.path(), config(RecallPolicy::Off)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert_ne!(wait(chat.peek_logits("the next")).unwrap(), before);
}

#[test]
fn a_session_whose_pages_no_disk_keeps_goes_on_with_its_window_and_keeps_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(RecallPolicy::Pages);
    config.evicted_page_bytes = 0;
    let recalled = |chat: &mut Session| {
        let (_, usage) = finish(chat.send_with("what is item 7", short())).unwrap();
        usage.pages.unwrap().recalled_tokens
    };
    {
        let (_engine, mut chat) = fed(folder.path(), config.clone());
        assert_eq!(recalled(&mut chat), 64);
    }
    let engine = open(folder.path(), config).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    wait(chat.peek_logits("the next")).unwrap();
    feed(&mut chat);
    assert_eq!(recalled(&mut chat), 64);
}

#[test]
fn an_engine_that_was_closed_leaves_its_folder_free_of_the_pages_that_it_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, chat) = fed(folder.path(), config(RecallPolicy::Pages));
    drop(chat);
    engine.close_blocking();
    for _ in 0..3 {
        let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        let mut events = chat.send_with("what is item 7", short().max_new_tokens(100_000));
        assert!(events.next_blocking().unwrap().is_ok());
        drop((events, chat));
        engine.close_blocking();
    }
}

#[test]
fn a_session_whose_pages_the_budget_sent_away_recalls_them_from_disk() {
    let usage = |bytes: u64| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(RecallPolicy::Pages);
        config.pages.bytes = bytes;
        let engine = open(folder.path(), config).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        feed(&mut chat);
        finish(chat.send_with("what is item 7", short())).unwrap().1.pages.unwrap()
    };
    let (roomy, tight) = (usage(1 << 30), usage(360 << 10));
    assert_eq!(roomy.recalled_tokens, tight.recalled_tokens);
    assert_eq!(roomy.stored_tokens, tight.stored_tokens);
}

#[test]
fn a_document_read_with_the_window_alone_is_recalled_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..160).map(|i| format!("item {i} is {}. ", i * i % 97)).collect();
    let fed_with = |name: &str, kept: RecallPolicy, options: FeedOptions| {
        let engine = open(&folder.path().join(name), config(kept)).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        wait(chat.feed_with(text.as_str(), options).finish()).unwrap();
        let peek = wait(chat.peek_logits("the next")).unwrap();
        let asked = finish(chat.send_with("what is item 7", short())).unwrap();
        (peek, asked.1.pages)
    };
    let options = FeedOptions::through_model;
    let (windowed, pages) =
        fed_with("off", RecallPolicy::Pages, options().recall(RecallPolicy::Off));
    let pages = pages.unwrap();
    assert!(pages.stored_tokens > 1000 && pages.recalled_tokens == 64, "{pages:?}");
    assert!(pages.share.iter().any(|share| *share > 0.0), "{pages:?}");
    let (recalling, _) = fed_with("pages", RecallPolicy::Pages, options());
    let (none, _) = fed_with("none", RecallPolicy::Off, options());
    assert_ne!(windowed, recalling, "what was read was read with another attention");
    assert_ne!(windowed, none, "what comes after it recalls");
    let engine = open(&folder.path().join("none"), config(RecallPolicy::Off)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    let refused = chat.feed_with("a b", options().recall(RecallPolicy::Pages));
    let error = wait(refused.finish()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("feed: recall Pages"), "{error}");
}

#[test]
fn a_turn_may_recall_less_than_the_engine_keeps_and_not_more() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, mut chat) = fed(folder.path(), config(RecallPolicy::Pages));
    let off = finish(chat.send_with("what is item 7", short().recall(RecallPolicy::Off))).unwrap();
    assert!(off.1.pages.is_none());
    let on = finish(chat.send_with("what is item 7", short())).unwrap();
    assert!(on.1.pages.is_some());
    drop((chat, engine));
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path(), config(RecallPolicy::Text)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    let refused = finish(chat.send_with("hello", short().recall(RecallPolicy::Pages)));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn a_long_message_is_read_whole_though_its_own_turn_recalls_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    let long: String = (0..40).map(|i| format!("item {i} is {}. ", i * i % 97)).collect();
    let (_, usage) = finish(chat.send_with(&long, short().recall(RecallPolicy::Off))).unwrap();
    assert!(usage.stream_tokens as usize > engine.count_tokens(&long).unwrap(), "{usage:?}");
    // The turns after it recall what no text would bring back.
    let (_, usage) = finish(chat.send_with("what is item 7", short())).unwrap();
    assert!(usage.pages.unwrap().stored_tokens > 0);
}

#[test]
fn an_answer_is_given_again_with_the_same_pages() {
    let folder = tempfile::tempdir().unwrap();
    let (_engine, mut chat) = fed(folder.path(), config(RecallPolicy::Pages));
    let (first, usage) = finish(chat.send_with("what is item 7", short())).unwrap();
    let (again, usage_again) = finish(chat.regenerate(short())).unwrap();
    assert_eq!(first, again);
    assert_eq!(usage.pages, usage_again.pages);
}

#[test]
fn a_stream_that_is_filled_again_from_the_log_leaves_no_page_of_the_one_before_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let stored = {
        let (engine, mut chat) = fed(folder.path(), config(RecallPolicy::Pages));
        finish(chat.send_with("what is item 7", short())).unwrap();
        engine.memory().stats().pages
    };
    assert!(stored > 40, "{stored}");
    let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    let (_, usage) = finish(chat.regenerate(short())).unwrap();
    assert!(usage.pages.as_ref().unwrap().stored_tokens <= 128, "{usage:?}");
    let left = engine.memory().stats().pages;
    assert!(left < stored / 2, "{left} of {stored}");
    let next = wait(chat.peek_logits("the next")).unwrap();
    drop((chat, engine));
    let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert_eq!(wait(chat.peek_logits("the next")).unwrap(), next);
}

#[test]
fn what_is_remembered_while_an_answer_is_given_again_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, mut chat) = fed(folder.path(), config(RecallPolicy::Text));
    finish(chat.send_with("go on", short())).unwrap();
    let before = chat.num_turns().unwrap();
    // Longer than a stream runs ahead of its reader: it is not committed yet.
    let mut events = chat.regenerate(SendOptions::default().max_new_tokens(300));
    events.next_blocking().unwrap().unwrap();
    let note = "The ferry leaves at nine.";
    wait(engine.memory().remember(&trip(), vec![NewTurn::new(Role::User, note)])).unwrap();
    let (_, usage) = finish(events).unwrap();
    assert_eq!(usage.answer_turn, Some(before + 1), "{usage:?}");
    let turns = wait(engine.memory().turns(&trip(), before - 1..before + 9)).unwrap();
    let said: Vec<(Role, bool)> = turns.iter().map(|turn| (turn.role, turn.retracted)).collect();
    assert_eq!(said, [(Role::Assistant, true), (Role::User, false), (Role::Assistant, false)]);
    let query = "when does the ferry leave";
    let hits = wait(engine.memory().recall(&trip(), query, Recall::default())).unwrap();
    assert_eq!(hits[0].text, note);
    // The answer behind it is the last message's: it is given once more.
    let (_, usage) = finish(chat.regenerate(short())).unwrap();
    assert_eq!(usage.answer_turn, Some(before + 2));
}

#[test]
fn a_forgotten_session_has_no_page_left_and_its_bytes_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, chat) = fed(folder.path(), config(RecallPolicy::Pages));
    drop(chat);
    assert!(engine.memory().stats().pages > 20);
    let receipt = wait(engine.memory().forget(&trip(), Forget::Session)).unwrap();
    wait(engine.memory().verify(receipt)).unwrap();
    assert_eq!(engine.memory().stats().pages, 0);
}

/// Records of landmarks in the segment files: file, place of the payload, payload.
fn landmarks(folder: &Path) -> Vec<(PathBuf, usize, Vec<u8>)> {
    // Version, bf16, no means, codes; from layer 0 of 2 on: src/pages/landmarks.rs.
    const HEAD: [u8; 12] = [1, 1, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0];
    let mut found = Vec::new();
    for file in std::fs::read_dir(folder.join("store/segments")).unwrap() {
        let path = file.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len().saturating_sub(32) {
            // Magic and kind of a page; length and hash stand before the payload: memory/docs/format.md.
            if bytes[at..].starts_with(b"mkaR\x04") && bytes[at + 20..].starts_with(&HEAD) {
                let len = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
                found.push((path.clone(), at + 20, bytes[at + 20..at + 20 + len].to_vec()));
            }
        }
    }
    found
}

#[test]
fn landmarks_that_were_damaged_on_disk_are_made_anew_from_their_pages() {
    let folder = tempfile::tempdir().unwrap();
    let before = {
        let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        feed(&mut chat);
        wait(chat.peek_logits("the next")).unwrap()
    };
    let written = landmarks(folder.path());
    assert!(written.len() > 10, "{} records", written.len());
    for (path, at, payload) in &written {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at + payload.len() / 2] ^= 0x10;
        std::fs::write(path, bytes).unwrap();
    }
    let reopened = || {
        let engine = open(folder.path(), config(RecallPolicy::Pages)).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        (wait(chat.peek_logits("the next")).unwrap(), engine, chat)
    };
    let (logits, engine, mut chat) = reopened();
    assert_eq!(logits, before);
    // A commit writes what was made anew.
    finish(chat.send_with("what is item 7", short())).unwrap();
    let after = wait(chat.peek_logits("the next")).unwrap();
    drop((engine, chat));
    let anew = landmarks(folder.path());
    let is_anew = |it: &&(PathBuf, usize, Vec<u8>)| anew.iter().any(|(_, _, new)| *new == it.2);
    assert_eq!(written.iter().filter(is_anew).count(), written.len());
    assert_eq!(reopened().0, after);
}

#[test]
fn a_forgotten_sessions_landmarks_are_in_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, chat) = fed(folder.path(), config(RecallPolicy::Pages));
    drop(chat);
    let written = landmarks(folder.path());
    assert!(written.len() > 10, "{} records", written.len());
    wait(engine.memory().forget(&trip(), Forget::Session)).unwrap();
    let mut folders = vec![folder.path().join("store")];
    while let Some(inner) = folders.pop() {
        for file in std::fs::read_dir(inner).unwrap() {
            let path = file.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            for (_, _, payload) in &written {
                // Landmarks of the first head, behind settings and token ids.
                let part = &payload[276..308];
                let is_there = bytes.windows(part.len()).any(|window| window == part);
                assert!(!is_there, "{} holds landmarks", path.display());
            }
        }
    }
}

#[test]
fn a_session_that_is_open_recalls_nothing_that_was_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let (engine, mut chat) = fed(folder.path(), config(RecallPolicy::Pages));
    let (_, usage) = finish(chat.send_with("what is item 3", short())).unwrap();
    assert!(usage.pages.unwrap().stored_tokens > 1000);
    wait(engine.memory().forget(&trip(), Forget::Session)).unwrap();
    let (_, usage) = finish(chat.send_with("what is item 3", short())).unwrap();
    assert!(usage.stream_tokens < 200, "{usage:?}");
    assert_eq!(usage.pages.unwrap().stored_tokens, 0);
}

#[test]
fn pages_that_no_model_could_attend_to_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for tokens in [0, 65, 1 << 20, usize::MAX] {
        let mut config = config(RecallPolicy::Pages);
        config.pages.tokens = tokens;
        let error = open(folder.path(), config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("pages.tokens"), "{error}");
    }
}

#[test]
fn a_session_may_change_the_precision_of_its_pages() {
    let folder = tempfile::tempdir().unwrap();
    for precision in
        [PagePrecision::F32, PagePrecision::Int4, PagePrecision::Int8, PagePrecision::Bf16]
    {
        let mut config = config(RecallPolicy::Both);
        config.pages.precision = precision;
        let engine = open(folder.path(), config).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        feed(&mut chat);
        let (_, usage) = finish(chat.send_with("what is item 7", short())).unwrap();
        let pages = usage.pages.unwrap();
        let stream = usage.stream_tokens as usize;
        assert!(pages.stored_tokens + 256 > stream, "{precision:?}: {pages:?} of {stream}");
    }
}
