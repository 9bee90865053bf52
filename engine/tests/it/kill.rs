//! A process killed at any moment of `feed` and `send`: every acknowledged turn is there, and the session goes on.

use crate::{engine, finish, pages, trip, wait};
use mka::{Engine, FeedOptions, RecallPolicy, Scope, SendOptions};
use rand::{Rng, SeedableRng};
use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const CHILD: &str = "MKA_KILL_TEST_FOLDER";

/// What the child says when turn `number` is on disk.
fn acknowledge(number: u64) {
    println!("ack {number}");
    std::io::stdout().flush().unwrap();
}

/// Sends numbered messages, feeding a numbered document before every third, until it is killed.
fn work(engine: &Engine, sentences: usize) {
    let mut chat = engine.session_blocking(trip()).unwrap();
    let first = chat.num_turns().unwrap();
    for number in first.. {
        if number % 3 == 0 {
            let text = format!("document {number} says the end is near. ").repeat(sentences);
            wait(chat.feed_with(text, FeedOptions::through_model()).finish()).unwrap();
        }
        let options = SendOptions::default().max_new_tokens(3).recall_k(2);
        finish(chat.send_with(format!("message {number} here"), options)).unwrap();
        acknowledge(number);
    }
}

#[test]
fn killed_at_any_moment_of_feed_and_send_a_session_keeps_what_it_acknowledged() {
    let name = "kill::killed_at_any_moment_of_feed_and_send_a_session_keeps_what_it_acknowledged";
    kill(name, &|folder| engine(folder, 128), 60);
}

#[test]
fn killed_at_any_moment_a_session_recalls_every_page_of_what_it_acknowledged() {
    let name = "kill::killed_at_any_moment_a_session_recalls_every_page_of_what_it_acknowledged";
    let open = |folder: &Path| pages::open(folder, pages::config(RecallPolicy::Pages)).unwrap();
    let Some(folder) = kill(name, &open, 20) else { return };
    let peek = || {
        let engine = open(folder.path());
        let mut chat = engine.session_blocking(trip()).unwrap();
        wait(chat.peek_logits("and")).unwrap()
    };
    assert_eq!(peek(), peek());
    let engine = open(folder.path());
    let mut chat = engine.session_blocking(trip()).unwrap();
    let options = SendOptions::default().max_new_tokens(3);
    let (_, usage) = finish(chat.send_with("which documents", options)).unwrap();
    // Sinks, window and the page that is not full are no stored pages.
    let stored = usage.pages.as_ref().unwrap().stored_tokens as u64;
    assert!(stored > 300 && stored + 64 + 64 + 64 >= usage.stream_tokens, "{usage:?}");
}

/// Kills children that work until then, and looks at what is there after each; the folder. None in a child.
fn kill(test: &str, open: &dyn Fn(&Path) -> Engine, sentences: usize) -> Option<tempfile::TempDir> {
    if let Some(folder) = std::env::var_os(CHILD) {
        work(&open(Path::new(&folder)), sentences);
        return None;
    }
    let cycles = std::env::var("MKA_KILL_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let seed = 7;
    eprintln!("{cycles} cycles, seed {seed}");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let folder = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<u64> = Vec::new();
    for cycle in 0..cycles {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg(test)
            .env(CHILD, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, acks) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let lines = lines.map_while(Result::ok);
            let acks = lines.filter_map(|line| line.strip_prefix("ack ")?.parse().ok());
            acks.for_each(|number| sender.send(number).unwrap());
        });
        // Every second child is killed after its first turn, so that there are some on a machine that is busy, too.
        if cycle % 2 == 1 {
            acknowledged.push(acks.recv().expect("a child that acknowledges a turn"));
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(30..900)));
        child.kill().unwrap();
        child.wait().unwrap();
        reader.join().unwrap();
        acknowledged.extend(acks);

        let engine = open(folder.path());
        let mut chat = engine.session_blocking(trip()).unwrap();
        let chunks =
            wait(engine.memory().chunks(&Scope::user("ada"), 0..usize::MAX, None)).unwrap();
        let texts: HashSet<&str> = chunks.iter().map(|chunk| chunk.text.as_str()).collect();
        assert_eq!(texts.len(), chunks.len(), "a chunk is stored twice");
        for number in &acknowledged {
            let message = format!("message {number} here");
            assert!(chunks.iter().any(|chunk| chunk.text.contains(&message)), "lost {message}");
        }
        wait(chat.peek_logits("and")).unwrap();
    }
    assert!(acknowledged.len() >= cycles / 2, "{} acknowledged", acknowledged.len());
    Some(folder)
}
