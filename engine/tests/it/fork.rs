//! Forks: they go on as their original does, and then each its own way.

use crate::pages::{config, open};
use crate::{engine, finish, trip, wait};
use mka::{
    Engine, ErrorKind, FeedOptions, Forget, NewTurn, Recall, RecallPolicy, Role, Scope,
    SendOptions, Session,
};
use std::path::Path;

fn short() -> SendOptions {
    SendOptions::default().max_new_tokens(6)
}

fn next(chat: &mut Session) -> Vec<f32> {
    wait(chat.peek_logits("the next")).unwrap()
}

fn other() -> Scope {
    Scope::user("ada").session("other")
}

/// Four documents and a message, so that most pages have left the window.
fn talk(chat: &mut Session) {
    for part in 0..4 {
        let items = part * 40..(part + 1) * 40;
        let text: String = items.map(|i| format!("item {} is {}. ", i, i * i % 97)).collect();
        wait(chat.feed_with(text, FeedOptions::through_model()).finish()).unwrap();
    }
    finish(chat.send_with("what is item 7", short())).unwrap();
}

fn recalled(engine: &Engine, scope: &Scope, query: &str) -> String {
    let hits = wait(engine.memory().recall(scope, query, Recall::default())).unwrap();
    hits.into_iter().map(|hit| hit.text).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_fork_goes_on_as_its_original_and_then_each_its_own_way() {
    let folder = tempfile::tempdir().unwrap();
    let (left, right) = {
        let engine = engine(folder.path(), 256);
        let mut chat = engine.session_blocking(trip()).unwrap();
        finish(chat.send_with("the key is under the stone", short())).unwrap();
        talk(&mut chat);
        let before = next(&mut chat);
        let mut fork = wait(chat.fork("other")).unwrap();
        assert_eq!(fork.scope(), &other());
        assert_eq!(next(&mut fork), before);
        assert_eq!(fork.num_turns().unwrap(), chat.num_turns().unwrap());
        // Greedy, and what was said long before the fork is found by its words on both sides.
        let (answer, usage) = finish(chat.send_with("where is the key", short())).unwrap();
        assert!(usage.recalled_tokens > 0, "{usage:?}");
        let (same, same_usage) = finish(fork.send_with("where is the key", short())).unwrap();
        assert_eq!((&same, same_usage.recalled_tokens), (&answer, usage.recalled_tokens));
        assert_eq!(same_usage.stream_tokens, usage.stream_tokens);
        assert_eq!(next(&mut fork), next(&mut chat));
        // Both know their last prompt.
        assert_eq!(finish(fork.regenerate(short())).unwrap().0, answer);
        finish(chat.send_with("the walnuts are red", short())).unwrap();
        finish(fork.send_with("the plums are blue", short())).unwrap();
        assert_ne!(next(&mut fork), next(&mut chat));
        (next(&mut chat), next(&mut fork))
    };
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let mut fork = engine.session_blocking(other()).unwrap();
    assert_eq!((next(&mut chat), next(&mut fork)), (left, right));
    assert!(recalled(&engine, &trip(), "which walnuts").contains("walnuts"));
    assert!(!recalled(&engine, &other(), "which walnuts").contains("walnuts"));
    assert!(recalled(&engine, &other(), "which plums").contains("plums"));
    assert!(recalled(&engine, &other(), "where is the key").contains("stone"));
    // Taken back, the fork is where its original was, and the original stays.
    let turns = wait(engine.memory().turns(&trip(), 0..99)).unwrap();
    wait(fork.rewind(2)).unwrap();
    assert_eq!(wait(engine.memory().turns(&trip(), 0..99)).unwrap(), turns);
}

/// A fork of a session whose pages left the window, with these bytes for them on the disk.
fn pages_are_shared(folder: &Path, disk_bytes: u64) {
    let mut config = config(RecallPolicy::Pages);
    config.evicted_page_bytes = disk_bytes;
    let (before, of_fork) = {
        let engine = open(folder, config.clone()).unwrap();
        let mut chat = engine.session_blocking(trip()).unwrap();
        talk(&mut chat);
        let before = next(&mut chat);
        let stats = engine.memory().stats();
        let mut fork = wait(chat.fork("other")).unwrap();
        let shared = engine.memory().stats();
        let added = shared.live_bytes - stats.live_bytes;
        assert!(added < stats.live_bytes / 5, "{added} bytes of {}", stats.live_bytes);
        assert_eq!(shared.pages, 2 * stats.pages);
        assert_eq!(next(&mut fork), before);
        assert_eq!(next(&mut chat), before);
        let (answer, usage) = finish(fork.send_with("what is item 9", short())).unwrap();
        assert!(usage.pages.as_ref().unwrap().stored_tokens > 500, "{usage:?}");
        talk(&mut fork);
        // What the fork stored and let go of changed nothing here.
        assert_eq!(next(&mut chat), before);
        let (same, same_usage) = finish(chat.send_with("what is item 9", short())).unwrap();
        assert_eq!((same, same_usage.pages), (answer, usage.pages));
        (next(&mut chat), next(&mut fork))
    };
    if disk_bytes == 0 {
        return;
    }
    let engine = open(folder, config).unwrap();
    let mut fork = engine.session_blocking(other()).unwrap();
    assert_eq!(next(&mut fork), of_fork);
    drop(fork);
    wait(engine.memory().forget(&other(), Forget::Session)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert_eq!(next(&mut chat), before);
    let report = wait(engine.memory().doctor(false)).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

#[test]
fn a_fork_recalls_inside_attention_what_its_original_recalls() {
    let folder = tempfile::tempdir().unwrap();
    pages_are_shared(folder.path(), 1 << 30);
}

#[test]
fn a_fork_of_a_session_whose_pages_the_budget_sent_away_recalls_them_from_disk() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(RecallPolicy::Pages);
    config.pages.bytes = 300 << 10;
    let engine = open(folder.path(), config).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    talk(&mut chat);
    let mut fork = wait(chat.fork("other")).unwrap();
    let pages = |chat: &mut Session| {
        let (_, usage) = finish(chat.send_with("what is item 9", short())).unwrap();
        let pages = usage.pages.unwrap();
        (pages.stored_tokens, pages.recalled_tokens)
    };
    let (stored, recalled) = pages(&mut chat);
    assert!(stored > 500 && recalled > 0, "{stored} stored, {recalled} recalled");
    assert_eq!(pages(&mut fork), (stored, recalled));
    // Its pages are its own to read, whatever the original lets go of.
    wait(chat.rewind(1)).unwrap();
    let (still, recalled) = pages(&mut fork);
    assert!(still >= stored && recalled > 0, "{still} stored, {recalled} recalled");
}

#[test]
fn a_fork_has_the_pages_that_are_in_memory_alone() {
    let folder = tempfile::tempdir().unwrap();
    pages_are_shared(folder.path(), 0);
}

#[test]
fn what_is_forgotten_of_before_the_fork_is_forgotten_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path(), config(RecallPolicy::Both)).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    finish(chat.send_with("the code is 4711", short())).unwrap();
    talk(&mut chat);
    let mut fork = wait(chat.fork("other")).unwrap();
    finish(fork.send_with("the plums are blue", short())).unwrap();
    let before = next(&mut fork);
    let receipt = wait(engine.memory().forget(&trip(), Forget::Turn(0))).unwrap();
    wait(engine.memory().verify(receipt)).unwrap();
    assert_eq!(engine.memory().stats().pages, 0);
    for (chat, scope) in [(&mut chat, trip()), (&mut fork, other())] {
        assert_ne!(next(chat), before);
        let (_, usage) = finish(chat.send_with("and then", short())).unwrap();
        assert!(usage.pages.unwrap().stored_tokens < 500);
        assert!(wait(engine.memory().turns(&scope, 0..1)).unwrap()[0].forgotten);
        assert!(!recalled(&engine, &scope, "what is the code").contains("4711"));
    }
    assert!(recalled(&engine, &other(), "which plums").contains("plums"));
}

#[test]
fn a_fork_that_cannot_be_is_refused_and_leaves_no_session() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let refused = |chat: &Session, name: &str| {
        let error = wait(chat.fork(name)).unwrap_err();
        (error.kind(), error.to_string())
    };
    let (kind, text) = refused(&chat, "other");
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains("holds nothing yet, expected"), "{text}");
    finish(chat.send_with("hello", short())).unwrap();
    // While an answer streams; one that was dropped is waited for.
    let mut events = chat.send_with("tell me", SendOptions::default().max_new_tokens(100_000));
    assert!(events.next_blocking().unwrap().is_ok());
    let (kind, text) = refused(&chat, "other");
    assert_eq!(kind, ErrorKind::Locked);
    assert!(text.contains("a stream of session ada/*/trip is open, expected"), "{text}");
    drop(events);
    let fork = wait(chat.fork("other")).unwrap();
    assert_eq!(fork.num_turns().unwrap(), 4);
    assert_eq!(refused(&chat, "other").0, ErrorKind::Locked);
    drop(fork);
    let (kind, text) = refused(&chat, "other");
    assert_eq!(kind, ErrorKind::InvalidArgument);
    assert!(text.contains("ada/*/other is there already, expected a name"), "{text}");
    assert_eq!(refused(&chat, "trip").0, ErrorKind::InvalidArgument);
    assert_eq!(refused(&chat, "").0, ErrorKind::InvalidArgument);
    // The name that was refused is free, and the session goes on.
    let empty = engine.session_blocking(Scope::user("ada").session("new")).unwrap();
    assert_eq!(refused(&chat, "new").0, ErrorKind::Locked);
    drop(empty);
    assert_eq!(wait(engine.memory().sessions(&Scope::user("ada"))).unwrap().len(), 2);
    finish(chat.send_with("go on", short())).unwrap();
    wait(chat.fork("new")).unwrap();
}

#[test]
fn a_session_is_forked_without_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::builder(folder.path().join("store")).open_blocking().unwrap();
    let tell = |scope: &Scope, text: &str| {
        wait(engine.memory().remember(scope, vec![NewTurn::new(Role::User, text)])).unwrap();
    };
    tell(&trip(), "The heron nests by the lake.");
    let chat = engine.session_blocking(trip()).unwrap();
    let fork = wait(chat.fork("other")).unwrap();
    tell(fork.scope(), "The bridge is closed.");
    assert!(recalled(&engine, &other(), "where does the heron nest").contains("lake"));
    assert!(!recalled(&engine, &trip(), "which bridge is closed").contains("bridge"));
    let context = wait(fork.context("is the bridge closed", 200)).unwrap();
    assert!(context.text.contains("The bridge is closed."));
}
