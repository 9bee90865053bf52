//! Processes that share one model: the answers of one process, and what becomes of a group whose processes part.

use crate::{finish, pages, tiny_model, training, trip, wait};
use mka::parallel::{Collective, TcpCollective};
use mka::training::Trainer;
use mka::{
    Engine, ErrorKind, Event, FeedOptions, MemoryConfig, ModelSource, PageRule, RecallPolicy,
    SendOptions, Session,
};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Where a child works, and what it does.
const FOLDER: &str = "MKA_PARALLEL_TEST_FOLDER";
const SCRIPT: &str = "MKA_PARALLEL_TEST_SCRIPT";
const PROCESSES: usize = 2;

fn config() -> MemoryConfig {
    let mut config = pages::config(RecallPolicy::Both);
    config.recall_k = 2;
    config
}

/// A folder with a model in f32 whose gates are open: what a run from the tiny model writes.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = training::config(folder.path());
    config.memory.initial_gate = 0.5;
    config.train.steps = 2;
    Trainer::open(config).unwrap().run(&mut |_| ()).unwrap();
    folder
}

/// An engine over `folder`, alone or with the processes that the environment names.
fn open(folder: &Path) -> Engine {
    let builder = Engine::builder(folder.join("store"))
        .model(ModelSource::path(folder.join("run/model")))
        .memory(config());
    let builder = match TcpCollective::from_env().unwrap() {
        Some(group) => builder.tensor_parallel(Box::new(group)),
        None => builder,
    };
    builder.open_blocking().unwrap()
}

fn ask(chat: &mut Session, message: &str) {
    let options = SendOptions::default().max_new_tokens(6);
    match finish(chat.send_with(message, options)) {
        Ok((text, usage)) => println!("said: answer {text:?} {}", usage.stream_tokens),
        Err(error) => println!("said: error {:?}", error.kind()),
    }
}

fn regenerate(chat: &mut Session) {
    let options = SendOptions::default().max_new_tokens(8);
    let (text, usage) = finish(chat.regenerate(options)).unwrap();
    println!("said: again {text:?} {}", usage.stream_tokens);
}

fn peek(chat: &mut Session) {
    let logits = wait(chat.peek_logits("and")).unwrap();
    let logits: Vec<String> = logits.iter().map(f32::to_string).collect();
    println!("said: logits {}", logits.join(" "));
}

fn feed(chat: &mut Session) {
    for part in 0..3 {
        let items = part * 40..(part + 1) * 40;
        let text: String = items.map(|i| format!("item {i} is {}. ", i * i % 97)).collect();
        let summary = wait(chat.feed_with(text, FeedOptions::through_model()).finish()).unwrap();
        println!("said: fed {}", summary.model_tokens);
    }
}

/// What each script does in a session of its own process.
fn run(script: &str, folder: &Path) {
    let engine = open(folder);
    let rank = std::env::var("RANK").map_or(0, |rank| rank.parse().unwrap());
    let mut chat = match engine.session_blocking(trip()) {
        Ok(chat) => chat,
        Err(error) => return println!("said: error {:?} {error}", error.kind()),
    };
    match script {
        "talk" => {
            feed(&mut chat);
            peek(&mut chat);
            ask(&mut chat, "what is item 3");
            ask(&mut chat, "and item 77");
            peek(&mut chat);
            regenerate(&mut chat);
            // Back to the documents.
            wait(chat.rewind(3)).unwrap();
            ask(&mut chat, "what is item 61");
        }
        "regenerate" => regenerate(&mut chat),
        // The second process's caller wants no more of a document.
        "cancel" => {
            let text = "item 7 is 49. ".repeat(3000);
            let mut feed = chat.feed_with(text, FeedOptions::through_model());
            while let Some(event) = feed.next_blocking() {
                match event {
                    Ok(_) if rank == 1 => feed.canceller().cancel(),
                    Ok(_) => {}
                    Err(error) => println!("said: error {:?}", error.kind()),
                }
            }
            ask(&mut chat, "and item 5");
            peek(&mut chat);
        }
        // Opens the session again and goes on.
        "again" => {
            peek(&mut chat);
            ask(&mut chat, "and item 100");
        }
        // The second process's caller leaves after the first token.
        "leave" => {
            let options = SendOptions::default().max_new_tokens(200);
            let mut events = chat.send_with("tell me all", options);
            let mut is_done = false;
            while let Some(event) = events.next_blocking() {
                match event.unwrap() {
                    Event::Token(_) if rank == 1 => break,
                    Event::Done(_) => is_done = true,
                    _ => {}
                }
            }
            drop(events);
            println!("said: done {is_done}");
            ask(&mut chat, "and item 5");
            peek(&mut chat);
        }
        // The processes ask for different things, and then for the same.
        "part" => {
            ask(&mut chat, ["what is item 3", "what is item 4"][rank]);
            ask(&mut chat, "what is item 5");
        }
        // The second process ends in the middle of an answer.
        "die" => {
            let options = SendOptions::default().max_new_tokens(200);
            let mut events = chat.send_with("tell me all", options);
            while let Some(event) = events.next_blocking() {
                match event {
                    Ok(Event::Token(_)) if rank == 1 => std::process::exit(0),
                    Err(error) => println!("said: error {:?}", error.kind()),
                    _ => {}
                }
            }
        }
        other => panic!("script {other}"),
    }
}

fn child() -> bool {
    let Some(folder) = std::env::var_os(FOLDER) else { return false };
    run(&std::env::var(SCRIPT).unwrap(), Path::new(&folder));
    true
}

/// What `processes` of them print.
fn together(test: &str, folder: &Path, script: &str, processes: usize) -> Vec<Vec<String>> {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let start = |rank: usize| -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", test])
            .env(FOLDER, folder)
            .env(SCRIPT, script)
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", processes.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap()
    };
    let children: Vec<Child> = (0..processes).map(start).collect();
    let said = children.into_iter().map(|child| {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{script}: {}", output.status);
        let text = String::from_utf8(output.stdout).unwrap();
        // The runner's own words may stand before the first.
        let line = |line: &str| Some(line.split_once("said: ")?.1.to_owned());
        text.lines().filter_map(line).collect()
    });
    said.collect()
}

/// What each of two processes prints, which is the same for both.
fn shared(test: &str, folder: &Path, script: &str) -> Vec<String> {
    let mut said = together(test, folder, script, PROCESSES);
    assert_eq!(said[0], said[1], "{script}");
    said.swap_remove(0)
}

/// Lines of logits are near each other, all others are the same.
fn assert_alike(one: &[String], other: &[String]) {
    assert_eq!(one.len(), other.len(), "{one:?} {other:?}");
    for (a, b) in one.iter().zip(other) {
        let numbers = |line: &str| -> Option<Vec<f32>> {
            let rest = line.strip_prefix("logits ")?;
            Some(rest.split(' ').map(|x| x.parse().unwrap()).collect())
        };
        match (numbers(a), numbers(b)) {
            (Some(a), Some(b)) => {
                let off = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                println!("logits off by {off}");
                assert!(a.len() == b.len() && off <= 1e-3, "logits off by {off}");
            }
            _ => assert_eq!(a, b),
        }
    }
}

#[test]
fn processes_that_share_a_model_answer_as_one_does_and_go_on_after_a_restart() {
    let name =
        "parallel::processes_that_share_a_model_answer_as_one_does_and_go_on_after_a_restart";
    if child() {
        return;
    }
    let folders = [folder(), folder()];
    for script in ["talk", "again", "again"] {
        let alone = together(name, folders[0].path(), script, 1);
        assert!(alone[0].len() >= 2, "{alone:?}");
        // Among themselves they have the same bits.
        assert_alike(&alone[0], &shared(name, folders[1].path(), script));
    }
}

/// Puts a copy of `from` in the place of `to`.
fn copy(folder: &Path, from: &str, to: &str) {
    let (from, to) = (folder.join(from), folder.join(to));
    let _ = std::fs::remove_dir_all(&to);
    let copied = Command::new("cp").arg("-r").args([&from, &to]).status().unwrap();
    assert!(copied.success());
}

#[test]
fn a_turn_that_one_process_did_not_commit_is_taken_back_in_all() {
    let name = "parallel::a_turn_that_one_process_did_not_commit_is_taken_back_in_all";
    if child() {
        return;
    }
    for script in ["again", "regenerate"] {
        let folder = folder();
        together(name, folder.path(), "talk", PROCESSES);
        // The second process ends between the first one's commit and its own.
        copy(folder.path(), "store.1", "kept");
        together(name, folder.path(), script, PROCESSES);
        copy(folder.path(), "kept", "store.1");
        // And stays so: nothing is taken back twice.
        let mut lengths = Vec::new();
        for _ in 0..2 {
            let after = shared(name, folder.path(), "again");
            assert!(after.len() == 2 && after[1].starts_with("answer "), "{script}: {after:?}");
            let (_, length) = after[1].rsplit_once(' ').unwrap();
            lengths.push(length.parse::<u64>().unwrap());
        }
        assert!(lengths[1] > lengths[0], "{script}: {lengths:?}");
    }
}

#[test]
fn a_folder_that_lacks_the_session_is_refused_and_nothing_is_taken_back() {
    let name = "parallel::a_folder_that_lacks_the_session_is_refused_and_nothing_is_taken_back";
    if child() {
        return;
    }
    let folder = folder();
    together(name, folder.path(), "talk", 1);
    copy(folder.path(), "store", "kept");
    let refused = together(name, folder.path(), "again", PROCESSES);
    for said in &refused {
        assert!(said.len() == 1 && said[0].starts_with("error Incompatible"), "{refused:?}");
        assert!(said[0].contains("the same 0 turns of 0 to"), "{refused:?}");
    }
    let after = together(name, folder.path(), "again", 1);
    copy(folder.path(), "kept", "store");
    assert_eq!(after, together(name, folder.path(), "again", 1));
    // With a copy of the folder the log goes on in two.
    copy(folder.path(), "store", "store.1");
    let said = shared(name, folder.path(), "again");
    assert!(said[1].starts_with("answer "), "{said:?}");
}

#[test]
fn a_document_that_one_caller_cancels_is_cancelled_in_all() {
    let name = "parallel::a_document_that_one_caller_cancels_is_cancelled_in_all";
    if child() {
        return;
    }
    let folder = folder();
    let said = shared(name, folder.path(), "cancel");
    assert_eq!(said[0], "error Cancelled");
    assert!(said[1].starts_with("answer "), "{said:?}");
}

#[test]
fn a_caller_who_leaves_one_process_ends_the_turn_in_all() {
    let name = "parallel::a_caller_who_leaves_one_process_ends_the_turn_in_all";
    if child() {
        return;
    }
    let folder = folder();
    let said = shared(name, folder.path(), "leave");
    assert_eq!(said.len(), 3, "{said:?}");
    assert_eq!(said[0], "done false");
    assert!(said[1].starts_with("answer "), "{said:?}");
}

#[test]
fn processes_that_part_are_told_so_and_can_go_on() {
    let name = "parallel::processes_that_part_are_told_so_and_can_go_on";
    if child() {
        return;
    }
    let folder = folder();
    let said = shared(name, folder.path(), "part");
    assert_eq!(said[0], "error Incompatible");
    assert!(said[1].starts_with("answer "), "{said:?}");
}

#[test]
fn a_process_that_dies_ends_the_turn_of_the_others_with_an_error() {
    let name = "parallel::a_process_that_dies_ends_the_turn_of_the_others_with_an_error";
    if child() {
        return;
    }
    let folder = folder();
    let start = Instant::now();
    let said = together(name, folder.path(), "die", PROCESSES);
    assert_eq!(said, [vec!["error Device".to_owned()], Vec::new()]);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

/// A group that nothing is asked of.
struct Pair;

impl Collective for Pair {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        2
    }

    fn all_reduce_sum(&mut self, _: &mut [f32]) -> mka::Result<()> {
        panic!("expected a refusal before the first sum")
    }
}

#[test]
fn what_processes_cannot_do_alike_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let builder = || Engine::builder(&path).tensor_parallel(Box::new(Pair));
    let model = || ModelSource::path(tiny_model());
    let mut one_choice = config();
    one_choice.pages.rule = PageRule::InfLlm;
    for (builder, expected) in [
        (builder(), "expected an engine with a model"),
        (builder().model(model()).reembed(0.5), "no embedding in the background"),
        (builder().model(model()).memory(one_choice), "got InfLlm"),
    ] {
        let error = builder.open_blocking().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!path.exists());
    }
}
