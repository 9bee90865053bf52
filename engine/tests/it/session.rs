//! Sessions: streams, restarts, cancelling, feeding, answering again.

use crate::{engine, finish, trip, wait};
use futures_util::StreamExt;
use mka::{
    Engine, ErrorKind, Event, FeedEvent, FeedOptions, MemoryConfig, ModelSource, Role, Sampling,
    Scope, SendOptions, Session, StopReason,
};
use std::path::{Path, PathBuf};

fn short() -> SendOptions {
    SendOptions::default().max_new_tokens(6)
}

fn next(chat: &mut Session) -> Vec<f32> {
    wait(chat.peek_logits("the next")).unwrap()
}

/// Weights of four bits carry a last digit far; another text changes the logits by several units.
fn close(left: &[f32], right: &[f32]) -> bool {
    left.iter().zip(right).map(|(l, r)| (l - r).abs()).fold(0.0, f32::max) < 0.5
}

#[test]
fn engine_session_and_streams_can_move_between_threads() {
    fn is_send<T: Send>() {}
    is_send::<mka::Engine>();
    is_send::<mka::Session>();
    is_send::<mka::Events>();
    is_send::<mka::Feed>();
}

#[test]
fn a_turn_streams_its_answer_and_says_what_it_cost() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let (first, usage) = finish(chat.send_with("hello there", short())).unwrap();
    assert!(usage.generated_tokens <= 6 && usage.reused_tokens == 0);
    assert_eq!((usage.recalled_tokens, usage.answer_turn), (0, Some(1)));
    let (_, usage) = finish(chat.send_with("and now", short())).unwrap();
    assert!(usage.reused_tokens > 0 && usage.prompt_tokens > usage.reused_tokens);
    let (_, again) = finish(chat.regenerate(short())).unwrap();
    let turns = wait(engine.memory().turns(&trip(), 0..9)).unwrap();
    for (usage, retracted) in [(usage, true), (again, false)] {
        let turn = &turns[usage.answer_turn.unwrap() as usize];
        assert_eq!((turn.role, turn.retracted), (Role::Assistant, retracted));
    }
    // The same again in another store gives the same answer: nothing depends on a clock.
    let other = tempfile::tempdir().unwrap();
    let engine = crate::engine(other.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert_eq!(finish(chat.send_with("hello there", short())).unwrap().0, first);
}

#[test]
fn a_reopened_session_continues_bit_for_bit_without_reading_again() {
    let folder = tempfile::tempdir().unwrap();
    let text = "the end and the beginning. ".repeat(40);
    let (before, stream_tokens) = {
        let engine = engine(folder.path(), 128);
        let mut chat = engine.session_blocking(trip()).unwrap();
        finish(chat.send_with("the one", short())).unwrap();
        wait(chat.feed_with(text.as_str(), FeedOptions::through_model()).finish()).unwrap();
        let (_, usage) = finish(chat.send_with("the two", short())).unwrap();
        (wait(chat.peek_logits("the next")).unwrap(), usage.stream_tokens)
    };
    let engine = engine(folder.path(), 128);
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert_eq!(wait(chat.peek_logits("the next")).unwrap(), before);
    assert!(stream_tokens > 4 * 128, "{stream_tokens}");
    let (_, usage) = finish(chat.send_with("the three", short())).unwrap();
    assert!(usage.reused_tokens >= 128, "{usage:?}");
    assert!(usage.stream_tokens > stream_tokens);
}

#[test]
fn a_session_with_another_window_or_a_lost_snapshot_refills_from_its_log() {
    let folder = tempfile::tempdir().unwrap();
    {
        let engine = engine(folder.path(), 128);
        let mut chat = engine.session_blocking(trip()).unwrap();
        for word in ["one", "two", "three", "four", "five", "six"] {
            finish(chat.send_with(format!("the {word} and the other"), short())).unwrap();
        }
    }
    let engine = engine(folder.path(), 192);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let (_, usage) = finish(chat.send_with("and then", short())).unwrap();
    assert!(usage.reused_tokens > 100, "{usage:?}");
}

#[test]
fn a_canceller_ends_the_stream_within_a_token_and_its_end_means_that_the_turn_is_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let mut events = chat.send_with("tell me", SendOptions::default().max_new_tokens(100_000));
    assert!(events.next_blocking().unwrap().is_ok());
    let canceller = events.canceller();
    canceller.cancel();
    assert!(canceller.is_cancelled());
    let chosen = canceller.generated_tokens();
    // No more than was sent already: the channel's length.
    let left = std::iter::from_fn(|| events.next_blocking()).map(Result::unwrap).count();
    assert!(left <= 65, "{left}");
    let after = canceller.generated_tokens();
    assert!(chosen > 0 && after <= chosen + 1, "{chosen} at the cancel, {after} in all");
    let turns = wait(engine.memory().turns(&trip(), 0..10)).unwrap();
    assert_eq!(turns.len(), 2);
    assert_eq!(turns[1].tokens.len(), after);
    assert_eq!(turns[0].text, "tell me");
    assert!(!turns[1].text.is_empty());
    finish(chat.send_with("go on", short())).unwrap();

    let feed = chat.feed("one two three ".repeat(10_000));
    feed.canceller().cancel();
    assert_eq!(wait(feed.finish()).unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn an_engine_that_was_closed_leaves_its_folder_free_even_while_a_stream_works() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..5 {
        let engine = engine(folder.path(), 128);
        let mut chat = engine.session_blocking(trip()).unwrap();
        let mut events = chat.send_with("tell me", SendOptions::default().max_new_tokens(100_000));
        assert!(events.next_blocking().unwrap().is_ok());
        drop((events, chat));
        engine.close_blocking();
    }
    let engine = engine(folder.path(), 128);
    let turns = wait(engine.memory().turns(&trip(), 0..100)).unwrap();
    assert_eq!(turns.iter().filter(|turn| turn.text == "tell me").count(), 5);
    wait(engine.close()).unwrap();
}

#[test]
fn a_cancelled_stream_that_nobody_reads_does_not_hold_its_session() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    // One event a block: within this time there are more than may wait to be read.
    let feed = chat.feed_with("one two three ".repeat(30_000), FeedOptions::through_model());
    let canceller = feed.canceller();
    std::thread::sleep(std::time::Duration::from_secs(1));
    canceller.cancel();
    drop(chat);
    engine.close_blocking();
    drop(feed);
}

#[test]
fn dropping_the_stream_cancels_and_the_session_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let mut events = chat.send_with("tell me", SendOptions::default().max_new_tokens(100_000));
    let first = events.next_blocking().unwrap().unwrap();
    assert!(matches!(first, Event::Token(_)));
    drop(events);
    // The next turn waits for the cancelled one, whose words are kept.
    finish(chat.send_with("go on", short())).unwrap();
    assert_eq!(chat.num_turns().unwrap(), 4);
    drop(chat);
    let chat = engine.session_blocking(trip()).unwrap();
    assert_eq!(chat.num_turns().unwrap(), 4);
}

#[test]
fn events_are_a_futures_stream() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let events = wait(StreamExt::collect::<Vec<_>>(chat.send_with("hello", short())));
    assert!(matches!(events.last(), Some(Ok(Event::Done(_)))));
}

#[test]
fn regenerate_replaces_the_answer_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let random = |seed: u64| {
        let mut sampling = Sampling::default();
        (sampling.temperature, sampling.seed) = (5.0, seed);
        short().sampling(sampling)
    };
    let first = {
        let engine = engine(folder.path(), 256);
        let mut chat = engine.session_blocking(trip()).unwrap();
        let (first, _) = finish(chat.send_with("hello", random(1))).unwrap();
        let (same, _) = finish(chat.regenerate(random(1))).unwrap();
        assert_eq!(first, same);
        let (other, _) = finish(chat.regenerate(random(2))).unwrap();
        assert_ne!(first, other);
        first
    };
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let (again, _) = finish(chat.regenerate(random(1))).unwrap();
    assert_eq!(again, first);
    finish(chat.send_with("next", short())).unwrap();
}

#[test]
fn an_answer_that_was_cancelled_before_its_first_token_leaves_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    finish(chat.send_with("hello", short())).unwrap();
    for _ in 0..5 {
        drop(chat.regenerate(short()));
        wait(chat.rewind(99)).unwrap_err();
        let turns = wait(engine.memory().turns(&trip(), 0..99)).unwrap();
        let live: Vec<_> = turns.iter().filter(|turn| !turn.retracted).collect();
        assert_eq!(live.len(), 2, "{turns:?}");
        assert!(!live[1].text.is_empty() && !live[1].tokens.is_empty(), "{turns:?}");
    }
    finish(chat.regenerate(short())).unwrap();
}

#[test]
fn a_stream_that_is_held_keeps_its_session_and_nobody_waits_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let long = || SendOptions::default().max_new_tokens(100_000);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let events = chat.send_with("tell me", long());
    // A second one waits for the first, whatever becomes of it.
    drop(chat.send_with("and then", short()));
    for error in [wait(chat.rewind(0)).unwrap_err(), wait(chat.peek_logits("the")).unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("a stream of session"), "{error}");
    }
    drop(chat);
    let error = engine.session_blocking(trip()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains("a stream of it is open"), "{error}");
    drop(events);
    let mut chat = engine.session_blocking(trip()).unwrap();
    finish(chat.send_with("go on", short())).unwrap();
}

#[test]
fn what_is_forgotten_while_a_turn_runs_is_not_written_again_by_its_commit() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    finish(chat.send_with("the key is 7654321", short())).unwrap();
    let mut other = engine.session_blocking(Scope::user("bob").session("trip")).unwrap();
    let long = || SendOptions::default().max_new_tokens(200);
    let forget =
        |words: &str| wait(engine.memory().forget(&trip(), mka::Forget::matching(words))).unwrap();
    // More events than may wait to be read: no turn is over before they are. One beside which nothing is erased goes on.
    let mut events = chat.send_with("and then", long());
    assert!(events.next_blocking().unwrap().is_ok());
    assert_eq!(forget("nobody said this").turns, 0);
    let last = std::iter::from_fn(|| events.next_blocking()).last().unwrap();
    assert!(matches!(last, Ok(Event::Done(_))), "{last:?}");
    let (mut events, mut others) =
        (chat.send_with("go on", long()), other.send_with("hello", long()));
    assert!(events.next_blocking().unwrap().is_ok());
    let receipt = forget("7654321");
    let last = std::iter::from_fn(|| events.next_blocking()).last().unwrap();
    assert_eq!(last.unwrap_err().kind(), ErrorKind::Cancelled);
    let turns = wait(engine.memory().turns(&trip(), 0..99)).unwrap();
    assert!(turns.iter().all(|turn| turn.text != "go on"), "{turns:?}");
    // Of another user nothing was forgotten.
    let last = std::iter::from_fn(|| others.next_blocking()).last().unwrap();
    assert!(matches!(last, Ok(Event::Done(_))), "{last:?}");
    let mut feed = chat.feed_with("one two three ".repeat(30_000), FeedOptions::through_model());
    assert!(feed.next_blocking().unwrap().is_ok());
    assert!(forget("and then").turns > 0);
    let last = std::iter::from_fn(|| feed.next_blocking()).last().unwrap();
    assert_eq!(last.unwrap_err().kind(), ErrorKind::Cancelled);
    finish(chat.send_with("go on", short())).unwrap();
    wait(engine.memory().verify(receipt)).unwrap();
}

#[test]
fn what_was_quoted_is_forgotten_to_its_last_token_and_the_message_stays() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let other = Scope::user("ada").session("other");
    // Of a text of several sentences one is quoted.
    let fact = "the code of the fuzzy badger is 7654321. we stayed inside all day. it rained.";
    let fact = mka::NewTurn::new(Role::User, fact);
    wait(engine.memory().remember(&other, vec![fact])).unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    let options = short().across_sessions(true).system("You count sheep. Be brief.");
    let (_, usage) = finish(chat.send_with("what is the code of the badger?", options)).unwrap();
    assert!(usage.recalled_tokens > 8, "{usage:?}");
    let quoted_tokens = usage.recalled_tokens;
    finish(chat.send_with("go on", short())).unwrap();
    let turns = || wait(engine.memory().turns(&trip(), 0..99)).unwrap();
    let before = turns();
    let quoted = before.iter().find(|turn| turn.role == Role::Recalled).unwrap().clone();
    assert!(!quoted.text.contains("rained"), "{quoted:?}");
    assert_eq!(quoted.tokens.len(), quoted_tokens);
    let last = &quoted.tokens[quoted.tokens.len() - 8..];
    let has = |turns: &[mka::Turn]| {
        turns.iter().any(|turn| turn.tokens.windows(8).any(|tokens| tokens == last))
    };
    assert!(has(&before));
    // A stream that is filled again has the quotation in its place.
    let here = wait(chat.peek_logits("the next")).unwrap();
    let num_turns = chat.num_turns().unwrap();
    finish(chat.send_with("and then", short())).unwrap();
    wait(chat.rewind(num_turns)).unwrap();
    // Weights of four bits carry a last digit far; another text changes the logits by several units.
    let apart =
        |logits: &[f32]| here.iter().zip(logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let again = apart(&wait(chat.peek_logits("the next")).unwrap());
    assert!(again < 1.0, "{again}");

    // Taken back with its message, of which it is a part; words of the log's own are in no text.
    let asked = turns().iter().find(|turn| turn.role == Role::User).unwrap().id;
    let mut fork = wait(chat.fork("taken back")).unwrap();
    wait(fork.rewind(asked)).unwrap();
    let forked = wait(engine.memory().turns(fork.scope(), 0..99)).unwrap();
    assert!(forked.iter().all(|turn| turn.retracted), "{forked:?}");
    // A quotation that was taken back is quoted nowhere.
    let fork = fork.scope().clone();
    let forgotten = wait(engine.memory().forget(&fork, mka::Forget::Session)).unwrap();
    assert!(has(&turns()), "{forgotten:?}");
    let words = mka::Forget::matching("tokens_before");
    assert_eq!(wait(engine.memory().forget(&trip(), words)).unwrap().turns, 0);

    wait(engine.memory().forget(&other, mka::Forget::Turn(0))).unwrap();
    assert!(!has(&turns()));
    let without = apart(&wait(chat.peek_logits("the next")).unwrap());
    assert!(without > 2.0, "{without}");
    let left: usize = before.iter().map(|turn| turn.tokens.len()).sum::<usize>() - quoted_tokens;
    let (_, usage) = finish(chat.send_with("and then", short())).unwrap();
    assert_eq!(usage.reused_tokens, left);
}

#[test]
fn a_long_message_has_the_options_of_a_short_one_and_leaves_log_and_stream_alike() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let part = "the hall was cold and the king was old. ";
    let counted = |text: &str| engine.count_tokens(text).unwrap();
    // Of one the model reads what is more than half a window too, of the other it is more than the window has room for.
    let read = (1..).map(|n| part.repeat(n)).find(|text| counted(text) > 160).unwrap();
    let long = part.repeat(60);
    assert!(counted(&read) < 190 && long.len() > 2048 && counted(&long) > 320);
    for (name, text) in [("read", &read), ("long", &long)] {
        let logits = |own: &str, document: &str, options: SendOptions| {
            let scope = Scope::user("ada").session(format!("{name} {own}"));
            let mut chat = engine.session_blocking(scope).unwrap();
            if !document.is_empty() {
                let feed = chat.feed_with(document, FeedOptions::through_model());
                wait(feed.finish()).unwrap();
            }
            finish(chat.send_with(text.as_str(), options)).unwrap();
            wait(chat.peek_logits("the next")).unwrap()
        };
        let plain = logits("plain", "", short());
        assert_eq!(plain, logits("the same", "", short()));
        assert_ne!(plain, logits("system", "", short().system("You count sheep.")));
        assert_ne!(plain, logits("completion", "", short().completion(true)));
        let behind = |own: &str, joined: bool| logits(own, "the sea. ", short().joined(joined));
        assert_ne!(behind("apart", false), behind("joined", true), "{name}");
    }

    let mut chat = engine.session_blocking(trip()).unwrap();
    let events = chat.send_with(long.as_str(), short());
    while chat.num_turns().unwrap() == 0 {
        std::thread::yield_now();
    }
    drop(events);
    let here = wait(chat.peek_logits("the next")).unwrap();
    drop(chat);
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert_eq!(wait(chat.peek_logits("the next")).unwrap(), here);
}

#[test]
fn what_was_said_elsewhere_is_read_as_if_it_had_been_said_here() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let session = |name: &str| engine.session_blocking(Scope::user("ada").session(name)).unwrap();
    let turns = |name: &str| {
        let scope = Scope::user("ada").session(name);
        wait(engine.memory().turns(&scope, 0..999)).unwrap()
    };
    let said = |role, text: &str| mka::NewTurn::new(role, text);
    let mut chat = session("here");
    let options = short().system("Be brief.");
    let (answer, _) = finish(chat.send_with("hello there", options)).unwrap();
    finish(chat.send_with("and now", short())).unwrap();
    let mut copy = session("elsewhere");
    let elsewhere = vec![
        said(Role::System, "Be brief."),
        said(Role::User, "hello there"),
        said(Role::Assistant, &answer),
    ];
    let summary = wait(copy.append(elsewhere).finish()).unwrap();
    assert_eq!(summary.bytes as usize, "Be brief.hello there".len() + answer.len());
    // The user said both before.
    assert!(summary.model_tokens > 20 && summary.chunks_deduplicated == 2, "{summary:?}");
    finish(copy.send_with("and now", short())).unwrap();
    let (own, copied) = (turns("here"), turns("elsewhere"));
    for at in [0, 2] {
        assert_eq!(own[at].tokens, copied[at].tokens, "turn {at}");
    }
    let told = |turns: &[mka::Turn]| -> Vec<(Role, String)> {
        turns.iter().take(3).map(|turn| (turn.role, turn.text.clone())).collect()
    };
    assert_eq!(told(&own), told(&copied));

    // Behind the window, in any order of roles, in words that are found, and after a restart the same.
    let mut long = vec![said(Role::Assistant, "the key is under the stone.")];
    for i in 0..40 {
        long.push(said(Role::User, &format!("what is item {i}?")));
        long.push(said(Role::User, "tell me."));
        long.push(said(Role::Assistant, &format!("item {i} is {}.", i * i % 97)));
        long.push(said(Role::Assistant, "and no more."));
    }
    let count = long.len();
    wait(copy.append(long).finish()).unwrap();
    // An answer behind an answer has a message without a word before it.
    assert_eq!(turns("elsewhere").len(), 4 + count + 41);
    let here = wait(copy.peek_logits("the next")).unwrap();
    drop(copy);
    let mut copy = session("elsewhere");
    assert_eq!(wait(copy.peek_logits("the next")).unwrap(), here);
    finish(copy.regenerate(short())).unwrap();
    let (_, usage) = finish(copy.send_with("where is the key", short())).unwrap();
    assert!(usage.recalled_tokens > 0, "{usage:?}");

    // In one call or in many: an answer stands behind the message, or the document, that waits for it.
    let all = || {
        let both = [(Role::User, "how far is it?"), (Role::Assistant, "a mile.")];
        both.into_iter().map(|(role, text)| said(role, text))
    };
    wait(session("at once").append(all().collect()).finish()).unwrap();
    for turn in all() {
        wait(session("one by one").append(vec![turn]).finish()).unwrap();
    }
    let tokens = |name: &str| turns(name).into_iter().map(|turn| turn.tokens).collect::<Vec<_>>();
    assert_eq!(tokens("at once"), tokens("one by one"));
    let mut fed = session("fed");
    wait(fed.feed_with("the sea was calm.", FeedOptions::through_model()).finish()).unwrap();
    wait(fed.append(vec![said(Role::Assistant, "it was.")]).finish()).unwrap();
    let to_answer = tokens("at once")[0].len() - tokens("fed")[1].len();
    assert!(tokens("at once")[0].ends_with(&tokens("fed")[1]) && to_answer > 10);
    // What was remembered beside the stream answers nothing; an answer of the words that it was begun with is one.
    let mut begun = session("begun");
    wait(begun.append(vec![said(Role::User, "how far is it?")]).finish()).unwrap();
    let scope = begun.scope().clone();
    wait(engine.memory().remember(&scope, vec![said(Role::Assistant, "a note")])).unwrap();
    wait(begun.append(vec![said(Role::Assistant, "a mile.")]).finish()).unwrap();
    assert_eq!(turns("begun").len(), 3);
    let options = SendOptions::default().max_new_tokens(0).answer_prefix("Sure").recall_k(0);
    finish(begun.send_with("is it far?", options)).unwrap();
    wait(begun.append(vec![said(Role::Assistant, "it is.")]).finish()).unwrap();
    assert_eq!(turns("begun").len(), 7);
    let mut greeted = session("greeted");
    wait(greeted.append(vec![said(Role::Assistant, "hello, I am here.")]).finish()).unwrap();
    finish(greeted.regenerate(short())).unwrap();

    for (turns, expected) in [
        (vec![], "no message"),
        (vec![said(Role::System, "Be brief.")], "no message"),
        (vec![said(Role::User, "a"), said(Role::System, "b")], "turn 1 has role System"),
        (vec![said(Role::System, "b"), said(Role::User, "a")], "turn 0 has role System"),
        (vec![said(Role::Document, "a")], "turn 0 has role Document, expected one of user"),
        (vec![said(Role::User, "a"), said(Role::Assistant, "")], "turn 1 is empty"),
    ] {
        let error = wait(copy.append(turns).finish()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(expected), "{error}");
    }
    let feed = copy.append(vec![said(Role::User, &"one two three ".repeat(10_000))]);
    feed.canceller().cancel();
    assert_eq!(wait(feed.finish()).unwrap_err().kind(), ErrorKind::Cancelled);
    finish(copy.send_with("go on", short())).unwrap();
}

#[test]
fn instructions_stay_in_sight_however_long_the_session_becomes() {
    let folder = tempfile::tempdir().unwrap();
    let sea = "the sea ";
    let engine = engine(folder.path(), 64);
    let counted = |text: &str| engine.count_tokens(text).unwrap();
    let of = |tokens: usize, last: &str| {
        (1..).map(|n| sea.repeat(n)).find(|text| counted(text) > tokens).unwrap() + last
    };
    assert_eq!(counted(&of(70, "Say red.")), counted(&of(70, "Say bed.")));
    assert!((64..100).contains(&counted(&of(70, "Say red."))));
    // Behind so many tokens nothing of the beginning is left in the window, whatever it has read.
    let far = "the hall was cold and the king was old. ".repeat(120);
    let mut said = Vec::new();
    for (name, system) in [
        ("red", of(70, "Say red.")),
        ("bed", of(70, "Say bed.")),
        // Of more than the model was trained to see beside the window the beginning.
        ("long red", of(200, "Say red.")),
        ("long bed", of(200, "Say bed.")),
    ] {
        let mut chat = engine.session_blocking(Scope::user("ada").session(name)).unwrap();
        let options = SendOptions::default().max_new_tokens(0).system(system);
        finish(chat.send_with("hello", options)).unwrap();
        wait(chat.feed_with(far.as_str(), FeedOptions::through_model()).finish()).unwrap();
        said.push(wait(chat.peek_logits("the next")).unwrap());
    }
    assert_ne!(said[0], said[1]);
    assert_eq!(said[2], said[3]);
    // Opened again, and filled again from the log, of which the window sees the same.
    let scope = || Scope::user("ada").session("red");
    let mut chat = engine.session_blocking(scope()).unwrap();
    assert_eq!(wait(chat.peek_logits("the next")).unwrap(), said[0]);
    let (_, usage) = finish(chat.send_with("go on", short())).unwrap();
    let turns = chat.num_turns().unwrap();
    finish(chat.send_with("and then", short())).unwrap();
    wait(chat.rewind(turns)).unwrap();
    let (_, again) = finish(chat.send_with("and then", short())).unwrap();
    let beside = |usage: &mka::Usage| usage.reused_tokens - 64;
    assert!(beside(&usage) >= 128 && beside(&again) >= 128, "{usage:?}, {again:?}");
}

#[test]
fn a_document_that_begins_a_session_has_the_instructions_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let open = |name: &str| engine.session_blocking(Scope::user("ada").session(name)).unwrap();
    let turns = |chat: &Session| wait(engine.memory().turns(chat.scope(), 0..9)).unwrap();
    let system = "Say red.";
    let feed = |system: Option<&str>| {
        let mut options = FeedOptions::through_model();
        options.system = system.map(str::to_owned);
        options
    };
    let mut sent = open("sent");
    finish(sent.send_with("the sea", short().system(system))).unwrap();
    let mut fed = open("fed");
    wait(fed.feed_with("the sea", feed(Some(system))).finish()).unwrap();
    let mut plain = open("plain");
    wait(plain.feed_with("the sea", feed(None)).finish()).unwrap();
    let first = |chat: &Session| turns(chat)[0].tokens.clone();
    assert!(first(&sent).starts_with(&first(&fed)) && first(&fed).len() > first(&plain).len());
    // Later they are ignored, in a feed as in a message; and where nothing was read none are there yet.
    for chat in [&mut fed, &mut plain] {
        wait(chat.feed_with(" was calm", feed(Some("Say blue."))).finish()).unwrap();
    }
    assert_eq!(turns(&fed)[1].tokens, turns(&plain)[1].tokens);
    let mut text = open("text");
    let mut options = feed(Some(system));
    options.mode = mka::FeedMode::Text;
    let far = "the hall was cold and the king was old. ".repeat(60);
    assert_eq!(wait(text.feed_with(far, options).finish()).unwrap().model_tokens, 0);
    let options = short().system(system).recall_k(0);
    finish(text.send_with("the sea", options)).unwrap();
    let asked = turns(&text).into_iter().find(|turn| turn.role == Role::User).unwrap();
    assert_eq!(asked.tokens, first(&sent));
}

#[test]
fn a_session_is_taken_back_to_an_earlier_turn_and_goes_on_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let (empty, at_two) = {
        let engine = engine(folder.path(), 256);
        let mut chat = engine.session_blocking(trip()).unwrap();
        let empty = next(&mut chat);
        finish(chat.send_with("the cat is red", short())).unwrap();
        let at_two = next(&mut chat);
        finish(chat.send_with("the dog is blue", short())).unwrap();
        assert!(!close(&next(&mut chat), &at_two));
        assert_eq!(chat.num_turns().unwrap(), 4);
        // Nothing follows the last turn.
        let all = next(&mut chat);
        wait(chat.rewind(4)).unwrap();
        assert_eq!(next(&mut chat), all);
        let error = wait(chat.rewind(5)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("turn 5, expected at most 4"), "{error}");
        wait(chat.rewind(2)).unwrap();
        assert!(close(&next(&mut chat), &at_two));
        (empty, at_two)
    };
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert!(close(&next(&mut chat), &at_two));
    let turns = wait(engine.memory().turns(&trip(), 0..9)).unwrap();
    let retracted: Vec<bool> = turns.iter().map(|turn| turn.retracted).collect();
    assert_eq!(retracted, [false, false, true, true]);
    let recalled = |query| {
        let hits = wait(engine.memory().recall(&trip(), query, mka::Recall::default())).unwrap();
        hits.into_iter().map(|hit| hit.text).collect::<Vec<_>>().join(" ")
    };
    assert!(recalled("which cat is red").contains("cat"));
    assert!(!recalled("which dog is blue").contains("dog"));
    // The answer that is last now can be given again, and numbers go on behind what was taken back.
    finish(chat.regenerate(short())).unwrap();
    finish(chat.send_with("the dog is blue", short())).unwrap();
    let turns = wait(engine.memory().turns(&trip(), 0..9)).unwrap();
    let live: Vec<u64> = turns.iter().filter(|turn| !turn.retracted).map(|turn| turn.id).collect();
    assert_eq!(live, [0, 4, 5, 6]);
    // Between a question and its answer, then to the beginning.
    wait(chat.rewind(6)).unwrap();
    assert_eq!(finish(chat.regenerate(short())).unwrap_err().kind(), ErrorKind::NotFound);
    wait(chat.rewind(0)).unwrap();
    assert!(close(&next(&mut chat), &empty));
    finish(chat.send_with("the cat is red", short())).unwrap();
    assert!(close(&next(&mut chat), &at_two));
}

#[test]
fn a_window_that_is_filled_again_follows_the_first_page_of_the_stream() {
    const WINDOW: usize = 128;
    const PAGE: usize = 64;
    // Tokens of each turn: the window begins in the first page, behind it, between two turns or with the stream.
    for turns in
        [&[60, 60, 40][..], &[300, 60], &[64, 70, 64, 64], &[64, 64, 64], &[30, 60, 70], &[40, 40]]
    {
        let folder = tempfile::tempdir().unwrap();
        let engine = engine(folder.path(), WINDOW);
        let mut chat = engine.session_blocking(trip()).unwrap();
        let feed = |chat: &mut Session, text: String| {
            let options = FeedOptions::through_model().completion(true);
            wait(chat.feed_with(text, options).finish()).unwrap();
        };
        let letters = "abcdef".chars();
        turns.iter().zip(letters).for_each(|(len, letter)| {
            feed(&mut chat, letter.to_string().repeat(*len));
        });
        let before = next(&mut chat);
        let log = wait(engine.memory().turns(&trip(), 0..99)).unwrap();
        assert_eq!(log.len(), turns.len());
        let told: usize = log.iter().map(|turn| turn.tokens.len()).sum();
        feed(&mut chat, "taken back".into());
        wait(chat.rewind(log.len() as u64)).unwrap();
        if told <= PAGE + WINDOW {
            assert!(close(&next(&mut chat), &before), "{turns:?}");
        }
        let options = SendOptions::default().max_new_tokens(0).recall_k(0).completion(true);
        let (_, usage) = finish(chat.send_with("z", options)).unwrap();
        let expected = told.min(PAGE + WINDOW) + engine.count_tokens("z").unwrap();
        assert_eq!(usage.stream_tokens, expected as u64, "{turns:?}");
    }
}

#[test]
fn what_follows_a_message_whose_answer_was_taken_back_begins_as_it_does_behind_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let tokens = |is_fed: bool, is_taken_back: bool| {
        let scope = Scope::user("ada").session(format!("{is_fed} {is_taken_back}"));
        let mut chat = engine.session_blocking(scope.clone()).unwrap();
        // An answer that the limit ends: no token of the model's own closes it.
        let options = SendOptions::default().max_new_tokens(0).recall_k(0);
        finish(chat.send_with("the one", options.clone())).unwrap();
        if is_taken_back {
            wait(chat.rewind(1)).unwrap();
        }
        match is_fed {
            true => {
                let feed = chat.feed_with("the two", FeedOptions::through_model());
                wait(feed.finish()).unwrap();
            }
            false => {
                finish(chat.send_with("the two", options)).unwrap();
            }
        }
        let turns = wait(engine.memory().turns(&scope, 0..9)).unwrap();
        turns.into_iter().find(|turn| turn.text == "the two").unwrap().tokens
    };
    for is_fed in [false, true] {
        let behind_a_message = tokens(is_fed, true);
        assert_eq!(behind_a_message, tokens(is_fed, false));
        assert!(behind_a_message.len() > engine.count_tokens("the two").unwrap());
    }
}

#[test]
fn what_an_engine_without_a_model_takes_back_is_attended_to_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let at_two = {
        let engine = engine(folder.path(), 256);
        let mut chat = engine.session_blocking(trip()).unwrap();
        finish(chat.send_with("the cat is red", short())).unwrap();
        let at_two = next(&mut chat);
        finish(chat.send_with("the dog is blue", short())).unwrap();
        at_two
    };
    {
        let engine = Engine::builder(folder.path().join("store")).open_blocking().unwrap();
        wait(engine.session_blocking(trip()).unwrap().rewind(2)).unwrap();
    }
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    assert!(close(&next(&mut chat), &at_two));
}

#[test]
fn an_answer_that_was_forgotten_can_be_given_again() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    finish(chat.send_with("the cat is red", short())).unwrap();
    wait(engine.memory().forget(&trip(), mka::Forget::Turn(1))).unwrap();
    finish(chat.regenerate(short())).unwrap();
    let turns = wait(engine.memory().turns(&trip(), 0..9)).unwrap();
    let live: Vec<u64> = turns.iter().filter(|turn| !turn.retracted).map(|turn| turn.id).collect();
    assert_eq!(live, [0, 2]);
}

#[test]
fn an_answer_that_was_remembered_behind_the_last_one_is_none_to_give_again() {
    let folder = tempfile::tempdir().unwrap();
    let is_refused = |engine: &Engine, chat: &mut Session| {
        let error = finish(chat.regenerate(short())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        let turns = wait(engine.memory().turns(&trip(), 0..9)).unwrap();
        let live = turns.iter().filter(|turn| !turn.retracted).map(|turn| turn.id);
        assert_eq!(live.collect::<Vec<u64>>(), [0, 1, 2]);
    };
    {
        let engine = engine(folder.path(), 256);
        let mut chat = engine.session_blocking(trip()).unwrap();
        finish(chat.send_with("hello", short())).unwrap();
        let note = vec![mka::NewTurn::new(Role::Assistant, "a note")];
        wait(engine.memory().remember(&trip(), note)).unwrap();
        is_refused(&engine, &mut chat);
    }
    // As after a restart.
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    is_refused(&engine, &mut chat);
}

#[test]
fn what_is_taken_back_far_behind_the_window_is_found_by_its_words() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    finish(chat.send_with("the key is under the stone", short())).unwrap();
    for text in ["the hall was cold and the king was old. ", "the sea was calm for days on end. "] {
        wait(chat.feed_with(text.repeat(20), FeedOptions::through_model()).finish()).unwrap();
    }
    let turns = wait(engine.memory().turns(&trip(), 0..99)).unwrap();
    let sea = turns.iter().find(|turn| turn.text.contains("sea")).unwrap().id;
    wait(chat.rewind(sea)).unwrap();
    let hits = |query: &str| {
        let hits = wait(engine.memory().recall(&trip(), query, mka::Recall::default())).unwrap();
        hits.iter().map(|hit| hit.text.clone()).collect::<Vec<_>>().join(" ")
    };
    assert!(hits("where is the key").contains("under the stone"));
    assert!(!hits("how was the sea").contains("sea"));
    let (_, usage) = finish(chat.send_with("where is the key", short())).unwrap();
    assert!(usage.recalled_tokens > 0, "{usage:?}");
}

/// The tiny model with another template: `part` of its own is replaced by one of the same length, so that the rest of the
/// file stays in its place.
fn model_with(folder: &Path, part: &str, other: &str) -> PathBuf {
    assert_eq!(part.len(), other.len());
    let mut bytes = std::fs::read(crate::tiny_model()).unwrap();
    let at = bytes.windows(part.len()).position(|window| window == part.as_bytes()).unwrap();
    bytes[at..at + other.len()].copy_from_slice(other.as_bytes());
    let path = folder.join("other.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The tiny model with a template that cuts white space off every content.
fn model_that_trims(folder: &Path) -> PathBuf {
    model_with(folder, " + message['content'] + ", "+ message.content|trim+ ")
}

#[test]
fn instructions_that_a_template_has_no_place_for_are_refused_before_anything_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let (part, other) = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + ",
        "{% for m in messages if m.role != 'system' %}{{'<|im_start|>' + m.role + '\n' + m.content +   ",
    );
    let engine = Engine::builder(folder.path().join("store"))
        .model(ModelSource::path(model_with(folder.path(), part, other)))
        .memory(MemoryConfig::with_window(256))
        .open_blocking()
        .unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    let long = "the hall was cold and the king was old. ".repeat(60);
    for message in ["hello", long.as_str()] {
        let error = finish(chat.send_with(message, short().system("Be brief."))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("takes no system message"), "{error}");
    }
    // More sections than one commit stores, and a last one that fits the window.
    let text = "x".repeat(2048 * 257) + "the end of it";
    for mode in [mka::FeedMode::Model, mka::FeedMode::Text] {
        let mut options = FeedOptions::through_model();
        (options.mode, options.system) = (mode, Some("Be brief.".to_owned()));
        let error = wait(chat.feed_with(text.as_str(), options).finish()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    assert_eq!(chat.num_turns().unwrap(), 0);
    // Where nothing is written there is nothing to refuse.
    let told = short().recall_k(0).system("Be brief.");
    finish(chat.send_with("hello", told.clone().completion(true))).unwrap();
    finish(chat.send_with("hello", told)).unwrap();
    assert_eq!(chat.num_turns().unwrap(), 4);
}

#[test]
fn white_space_that_the_template_cuts_off_a_message_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let trims = Engine::builder(folder.path().join("trims"))
        .model(ModelSource::path(model_that_trims(folder.path())))
        .memory(MemoryConfig::with_window(256))
        .open_blocking()
        .unwrap();
    let keeps = engine(folder.path(), 256);
    let tokens = |engine: &Engine, session: &str, message: &str| {
        let mut chat = engine.session_blocking(Scope::user("ada").session(session)).unwrap();
        let options = short().recall_k(0).system(message);
        finish(chat.send_with(message, options)).unwrap().1.prompt_tokens
    };
    let bare = tokens(&keeps, "bare", "hello there");
    assert!(tokens(&keeps, "blanks", "\n hello there \t") > bare);
    assert_eq!(tokens(&trims, "bare", "hello there"), bare);
    assert_eq!(tokens(&trims, "blanks", "\n hello there \t"), bare);
    let appended = |session: &str, text: &str| {
        let mut chat = trims.session_blocking(Scope::user("ada").session(session)).unwrap();
        wait(chat.append(vec![mka::NewTurn::new(Role::User, text)]).finish()).unwrap().model_tokens
    };
    assert_eq!(appended("append blanks", "\n hello there \t"), appended("append", "hello there"));
}

#[test]
fn white_space_of_an_appended_answer_does_not_begin_the_one_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::builder(folder.path().join("trims"))
        .model(ModelSource::path(model_that_trims(folder.path())))
        .memory(MemoryConfig::with_window(256))
        .open_blocking()
        .unwrap();
    let mut chat = engine.session_blocking(trip()).unwrap();
    let said = [(Role::User, "hello there"), (Role::Assistant, "\n\nHi")];
    let said = said.map(|(role, text)| mka::NewTurn::new(role, text));
    wait(chat.append(said.into()).finish()).unwrap();
    let (answer, _) = finish(chat.regenerate(short())).unwrap();
    let turns = wait(engine.memory().turns(&trip(), 0..9)).unwrap();
    assert_eq!(turns.last().map(|turn| turn.text.as_str()), Some(answer.as_str()));
}

#[test]
fn an_answer_that_a_stop_string_ended_is_begun_again_as_it_was_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let scope = |name: &str| Scope::user("ada").session(name);
    for (name, completion) in [("template", false), ("completion", true)] {
        let begun = SendOptions::default().max_new_tokens(30).answer_prefix("Sure").recall_k(0);
        let begun = begun.completion(completion);
        let mut whole = engine.session_blocking(scope(&format!("whole {name}"))).unwrap();
        let (long, _) = finish(whole.send_with("hello", begun.clone())).unwrap();
        let stop: String = long.chars().skip(3).take(2).collect();
        let mut chat = engine.session_blocking(scope(name)).unwrap();
        let (_, usage) = finish(chat.send_with("hello", begun.stop(stop.as_str()))).unwrap();
        assert_eq!(usage.stop, StopReason::StopString);
        drop(chat);
        let mut chat = engine.session_blocking(scope(name)).unwrap();
        let options = SendOptions::default().max_new_tokens(30);
        let (again, _) = finish(chat.regenerate(options)).unwrap();
        assert_eq!(again, long);
        let turns = wait(engine.memory().turns(&scope(name), 0..9)).unwrap();
        assert_eq!(turns.last().map(|turn| &turn.text), Some(&format!("Sure{long}")));
    }
}

#[test]
fn stop_strings_and_limits_end_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let (long, usage) =
        finish(chat.send_with("hello", SendOptions::default().max_new_tokens(30))).unwrap();
    assert_eq!((usage.generated_tokens, usage.stop), (30, StopReason::MaxTokens));
    let stop: String = long.chars().skip(3).take(2).collect();
    let mut other = engine.session_blocking(Scope::user("ada").session("other")).unwrap();
    let options = SendOptions::default().max_new_tokens(30).stop(stop.as_str());
    let (cut, usage) = finish(other.send_with("hello", options)).unwrap();
    assert_eq!(usage.stop, StopReason::StopString);
    assert!(long.starts_with(&cut) && !cut.contains(&stop));
    let (nothing, usage) =
        finish(other.send_with("hello", SendOptions::default().max_new_tokens(0))).unwrap();
    assert_eq!((nothing.as_str(), usage.generated_tokens), ("", 0));
}

#[test]
fn a_document_is_fed_both_ways_with_progress() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 128);
    let text = "In the hall the king and the queen spoke of the harvest. ".repeat(200);
    for (session, options) in
        [("model", FeedOptions::through_model()), ("text", FeedOptions::text().name("hall.txt"))]
    {
        let mut chat = engine.session_blocking(Scope::user("ada").session(session)).unwrap();
        let mut feed = chat.feed_with(text.as_str(), options);
        let (mut fed, mut done) = (0, None);
        while let Some(event) = feed.next_blocking() {
            match event.unwrap() {
                FeedEvent::Progress { fed_bytes, committed_bytes, total_bytes } => {
                    assert!(fed <= fed_bytes && committed_bytes <= fed_bytes);
                    assert_eq!(total_bytes, text.len() as u64);
                    fed = fed_bytes;
                }
                FeedEvent::Done(summary) => done = Some(summary),
                _ => {}
            }
        }
        let done = done.unwrap();
        assert_eq!((done.bytes, fed), (text.len() as u64, text.len() as u64));
        let read_all = done.model_tokens > 2000;
        assert_eq!(read_all, session == "model", "{done:?}");
        finish(chat.send_with("who spoke?", short())).unwrap();
    }
}

#[test]
fn a_cancelled_feed_keeps_what_was_committed_and_the_session_works() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 128);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let text = "word after word. ".repeat(20_000);
    let mut feed = chat.feed_with(text.as_str(), FeedOptions::through_model());
    while let Some(event) = feed.next_blocking() {
        if let FeedEvent::Progress { committed_bytes, .. } = event.unwrap()
            && committed_bytes > 0
        {
            break;
        }
    }
    drop(feed);
    finish(chat.send_with("hello", short())).unwrap();
    let turns = chat.num_turns().unwrap();
    assert!(turns > 2 && turns < 166, "{turns}");
}

#[test]
fn a_completion_has_no_template_around_it() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let text = "one two three";
    let length = engine.count_tokens(text).unwrap();
    let prompt_tokens = |session: &str, completion| -> usize {
        let mut chat = engine.session_blocking(Scope::user("ada").session(session)).unwrap();
        let options = SendOptions::default().max_new_tokens(1).completion(completion);
        finish(chat.send_with(text, options)).unwrap().1.prompt_tokens
    };
    // At most the token that every text begins with.
    assert!((length..=length + 1).contains(&prompt_tokens("plain", true)));
    assert!(prompt_tokens("chat", false) > length + 1);

    // Fed in part, it is the same prompt.
    let mut chat = engine.session_blocking(Scope::user("ada").session("fed")).unwrap();
    let feed = FeedOptions::through_model().completion(true);
    wait(chat.feed_with("one two", feed).finish()).unwrap();
    let options = SendOptions::default().max_new_tokens(1).recall_k(0).completion(true);
    let usage = finish(chat.send_with(" three", options)).unwrap().1;
    assert_eq!(usage.prompt_tokens, prompt_tokens("whole", true));
}

#[test]
fn a_question_after_a_document_stands_in_a_message_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let mut chat = engine.session_blocking(trip()).unwrap();
    let fed = wait(chat.feed_with("a b c", FeedOptions::through_model()).finish()).unwrap();
    let more = wait(chat.feed_with("d e f", FeedOptions::through_model()).finish()).unwrap();
    // A second document goes on in the same message.
    assert!(more.model_tokens < fed.model_tokens);
    let options = SendOptions::default().max_new_tokens(1).recall_k(0);
    let (_, usage) = finish(chat.send_with("why?", options)).unwrap();
    let said = engine.count_tokens("I have read it.").unwrap();
    let question = engine.count_tokens("why?").unwrap();
    let fed = (fed.model_tokens + more.model_tokens) as usize;
    assert!(usage.prompt_tokens > fed + said + question, "{usage:?}");
}

#[test]
fn a_joined_message_goes_on_where_the_document_ends() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), 256);
    let answer = |session: &str, fed: &str, message: &str| {
        let mut chat = engine.session_blocking(Scope::user("ada").session(session)).unwrap();
        if !fed.is_empty() {
            wait(chat.feed_with(fed, FeedOptions::through_model()).finish()).unwrap();
        }
        // One token: packed weights give each cut of a prompt its own rounding, which longer answers show.
        let options = SendOptions::default().max_new_tokens(1).recall_k(0).joined(true);
        let (text, usage) = finish(chat.send_with(message, options)).unwrap();
        (text, usage.prompt_tokens)
    };
    assert_eq!(answer("parts", "one two\n", "why?"), answer("whole", "", "one two\nwhy?"));
}
