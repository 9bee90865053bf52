//! Recall: what it finds, what it leaves out, and what a hit says.

use mka_memory::{Commit, NewTurn, Recall, Role, Scope, Store, Trust};
use serde_json::{json, to_value};

use crate::support::{open, prose, say, trip};

fn top(store: &Store, scope: &Scope, query: &str, options: &Recall) -> Vec<String> {
    store.recall(scope, query, options).unwrap().into_iter().map(|hit| hit.text).collect()
}

#[test]
fn a_needle_among_many_chunks_is_found_by_words_and_by_spelling() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let hay: Vec<String> = (0..60).map(|number| prose(number, 120)).collect();
    let hay: Vec<&str> = hay.iter().map(String::as_str).collect();
    say(&store, &trip(), Role::Document, &hay[..30]);
    say(
        &store,
        &trip(),
        Role::User,
        &["My sister's flight number is QX-4417, she lands in Osaka."],
    );
    say(&store, &trip(), Role::Document, &hay[30..]);
    for query in
        ["which flight does my sister take?", "QX-4417", "landing at osaka", "sisters flihgt numbr"]
    {
        for follow_up in [false, true] {
            let options = Recall { follow_up, ..Recall::default() };
            let hits = store.recall(&trip(), query, &options).unwrap();
            assert!(hits[0].text.contains("QX-4417"), "{query}, {follow_up}: {:?}", hits[0].text);
        }
    }
}

#[test]
fn a_hit_says_where_its_bytes_are_and_why_it_was_found() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let scope = Scope::user("ada").agent("planner").session("trip");
    let mut turn =
        NewTurn::new(Role::Document, format!("{}\n\nThe ferry leaves at nine.", prose(1, 200)));
    (turn.source, turn.time_ms) = (Some("ferry.txt".into()), 42);
    store.commit(&scope, Commit { turns: vec![turn.clone()], ..Commit::default() }).unwrap();
    let hits = store.recall(&scope, "when does the ferry leave?", &Recall::default()).unwrap();
    let hit = &hits[0];
    let bytes = hit.source.bytes.start as usize..hit.source.bytes.end as usize;
    assert_eq!(&turn.text[bytes], hit.text);
    assert!(hit.text.contains("ferry"));
    assert_eq!((hit.source.user.as_str(), hit.source.agent.as_deref()), ("ada", Some("planner")));
    assert_eq!((hit.source.session.as_str(), hit.source.turn, hit.source.time_ms), ("trip", 0, 42));
    assert_eq!(hit.source.name.as_deref(), Some("ferry.txt"));
    assert_eq!((hit.trust, hit.count), (Trust::Document, 1));
    assert_eq!((hit.why.bm25_rank, hit.why.cosine_rank), (Some(1), 1));
    let score = 0.5 + 0.5 * hit.why.cosine + hit.why.recency;
    assert!((hit.score - score).abs() < 1e-6);
}

#[test]
fn what_memory_answers_is_written_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let text = "The ferry leaves at nine.";
    let turn = NewTurn::new(Role::User, text).at(42).source("ferry.txt").metadata("kind", "fact");
    let commit = Commit { turns: vec![turn], ..Commit::default() };
    let committed = to_value(store.commit(&trip(), commit).unwrap()).unwrap();
    assert_eq!((&committed["turns"], &committed["chunks_added"]), (&json!([0]), &json!(1)));
    let hit = store.recall(&trip(), "ferry", &Recall::default()).unwrap().remove(0);
    let written = to_value(&hit).unwrap();
    let source = json!({
        "user": "ada",
        "agent": null,
        "session": "trip",
        "turn": 0,
        "role": "User",
        "bytes": { "start": 0, "end": text.len() },
        "time_ms": 42,
        "name": "ferry.txt",
        "subject": null,
        "expires_ms": null,
        "metadata": { "kind": "fact" },
    });
    assert_eq!((&written["text"], &written["source"]), (&json!(text), &source));
    assert_eq!((&written["trust"], &written["why"]["bm25_rank"]), (&json!("User"), &json!(1)));
    let id = written["chunk"].as_str().unwrap();
    assert_eq!((id.len(), id), (32, hit.chunk.to_string().as_str()));

    let sessions = to_value(store.sessions(&Scope::user("ada")).unwrap()).unwrap();
    let scope = json!({ "user": "ada", "agent": null, "session": "trip" });
    assert_eq!((&sessions[0]["scope"], &sessions[0]["num_turns"]), (&scope, &json!(1)));
    let chunks = to_value(store.chunks(&trip(), 0..1, None).unwrap()).unwrap();
    assert_eq!((&chunks[0]["id"], &chunks[0]["latest"]), (&json!(id), &source));
    let turns = to_value(store.turns(&trip(), 0..1).unwrap()).unwrap();
    assert_eq!((&turns[0]["text"], &turns[0]["forgotten"]), (&json!(text), &json!(false)));
    assert_eq!(to_value(store.stats()).unwrap()["chunks"], 1);
    assert!(to_value(store.disk_usage().unwrap()).unwrap()["live_bytes"].is_u64());
}

#[test]
fn options_bound_what_is_returned() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for number in 0..6 {
        let role = if number % 2 == 0 { Role::User } else { Role::Assistant };
        let mut turn = NewTurn::new(role, format!("Apple variety number {number}."));
        turn.time_ms = number * 10;
        store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).unwrap();
    }
    let recall = |options: Recall| store.recall(&trip(), "apple variety", &options).unwrap();
    assert!(recall(Recall { k: 0, ..Recall::default() }).is_empty());
    assert_eq!(recall(Recall { k: 2, ..Recall::default() }).len(), 2);
    assert_eq!(recall(Recall::default()).len(), 6);
    let all = Recall { k: usize::MAX, half_life_ms: Some(u64::MAX), ..Recall::default() };
    assert_eq!(recall(all).len(), 6);
    let early = recall(Recall { before_turn: Some(3), ..Recall::default() });
    assert!(early.len() == 3 && early.iter().all(|hit| hit.source.turn < 3));
    let except = recall(Recall { except_turns: vec![4, 1, 9, 4], ..Recall::default() });
    assert!(except.len() == 4 && except.iter().all(|hit| ![1, 4].contains(&hit.source.turn)));
    let both = Recall { before_turn: Some(3), except_turns: vec![1, 4], ..Recall::default() };
    assert_eq!(recall(both).len(), 2);
    let other = Scope::user("ada").session("other");
    let across = Recall { across_sessions: true, except_turns: vec![1], ..Recall::default() };
    assert_eq!(store.recall(&other, "apple variety", &across).unwrap().len(), 6);
    let spoken = recall(Recall { roles: vec![Role::Assistant], ..Recall::default() });
    assert!(spoken.len() == 3 && spoken.iter().all(|hit| hit.trust == Trust::Model));
    let window = recall(Recall { since_ms: Some(20), until_ms: Some(40), ..Recall::default() });
    let turns: Vec<u64> = window.iter().map(|hit| hit.source.turn).collect();
    assert!(turns.len() == 2 && turns.contains(&2) && turns.contains(&3), "{turns:?}");
    assert!(recall(Recall { min_score: 1.1, ..Recall::default() }).is_empty());
    assert!(store.recall(&trip(), "  ", &Recall::default()).unwrap().is_empty());
    assert!(
        store.recall(&trip(), "x", &Recall { min_score: f32::NAN, ..Recall::default() }).is_err()
    );
}

#[test]
fn of_equal_texts_the_newer_comes_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["The meeting is on Monday.", "The meeting is on Friday."]);
    assert_eq!(top(&store, &trip(), "meeting", &Recall::default())[0], "The meeting is on Friday.");
}

#[test]
fn a_session_sees_itself_and_others_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (home, bot) =
        (Scope::user("ada").session("home"), Scope::user("ada").agent("bot").session("trip"));
    say(&store, &trip(), Role::User, &["Kyoto in spring."]);
    say(&store, &home, Role::User, &["Kyoto at home."]);
    say(&store, &bot, Role::User, &["Kyoto for bots."]);
    say(&store, &Scope::user("bob").session("trip"), Role::User, &["Kyoto of Bob."]);
    let here = Recall::default();
    let across = Recall { across_sessions: true, ..Recall::default() };
    let num = |scope: &Scope, options: &Recall| top(&store, scope, "Kyoto", options).len();
    assert_eq!(top(&store, &trip(), "Kyoto", &here), ["Kyoto in spring."]);
    assert_eq!((num(&trip(), &across), num(&bot, &across)), (3, 1));
    assert_eq!(
        (num(&Scope::user("ada"), &here), num(&Scope::user("ada").agent("bot"), &here)),
        (3, 1)
    );
    assert_eq!(num(&Scope::user("ada").session("new"), &here), 0);
    assert_eq!(num(&Scope::user("ada").session("new"), &across), 3);
}

/// Twelve topics, each told in its own session turn; the question names nothing of its topic.
#[test]
fn a_short_follow_up_leans_on_the_latest_turns() {
    let topics = [
        ("greenhouse tomatoes", "watering every evening"),
        ("sailboat rigging", "replacing the forestay"),
        ("violin lessons", "practising scales daily"),
        ("mortgage papers", "signing before June"),
        ("marathon training", "running uphill weekly"),
        ("kitchen renovation", "choosing granite counters"),
        ("chess tournament", "studying rook endgames"),
        ("beekeeping course", "inspecting hives monthly"),
        ("telescope mirror", "polishing with cerium"),
        ("passport renewal", "bringing two photographs"),
        ("pottery studio", "glazing with cobalt"),
        ("sourdough starter", "feeding rye flour"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut found = (0, 0);
    for (number, (topic, advice)) in topics.iter().enumerate() {
        let facts = Scope::user("ada").session("facts");
        let fact = format!("Advice about {topic}: {advice} is what matters most, said the expert.");
        say(&store, &facts, Role::Document, &[&fact]);
        let chat = Scope::user("ada").session(format!("chat-{number}"));
        say(&store, &chat, Role::User, &[&format!("I keep thinking about my {topic}.")]);
    }
    for (number, (_, advice)) in topics.iter().enumerate() {
        let chat = Scope::user("ada").session(format!("chat-{number}"));
        let ask = |follow_up: bool| {
            let options = Recall {
                k: 1,
                across_sessions: true,
                before_turn: Some(0),
                follow_up,
                ..Recall::default()
            };
            let hits = store.recall(&chat, "what was the advice?", &options).unwrap();
            usize::from(hits[0].text.contains(advice))
        };
        found.0 += ask(false);
        found.1 += ask(true);
    }
    println!("follow-ups answered: {} without, {} with the session's summary", found.0, found.1);
    assert!(found.1 >= 11 && found.0 <= 3, "{found:?}");
}

#[test]
fn a_long_question_ignores_the_session_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(
        &store,
        &trip(),
        Role::User,
        &["The ferry leaves at nine.", "My violin teacher lives in Porto."],
    );
    let query = "which harbor ferry company sells morning tickets cheaply online";
    let ask = |follow_up: bool| {
        store.recall(&trip(), query, &Recall { follow_up, ..Recall::default() }).unwrap()
    };
    assert_eq!(ask(true), ask(false));
    assert!(!ask(true)[0].why.follow_up);
}

/// Counts what it embeds.
#[derive(Default)]
struct Counting(std::sync::atomic::AtomicUsize);

impl mka_memory::Embedder for Counting {
    fn identity(&self) -> String {
        "counting".into()
    }

    fn dim(&self) -> usize {
        384
    }

    fn embed(&self, texts: &[&str]) -> mka_memory::Result<Vec<f32>> {
        self.0.fetch_add(texts.len(), std::sync::atomic::Ordering::Relaxed);
        mka_memory::HashedEmbedder::new().embed(texts)
    }
}

#[test]
fn a_question_that_is_asked_again_is_not_embedded_again() {
    let folder = tempfile::tempdir().unwrap();
    let embedder = std::sync::Arc::new(Counting::default());
    let store =
        Store::open(folder.path(), embedder.clone(), mka_memory::StoreOptions::default()).unwrap();
    say(&store, &trip(), Role::User, &["The ferry leaves at nine."]);
    let count = || embedder.0.load(std::sync::atomic::Ordering::Relaxed);
    let before = count();
    let first = store.recall(&trip(), "when does the ferry leave", &Recall::default()).unwrap();
    assert_eq!(count(), before + 1);
    for number in 0..200 {
        store.recall(&trip(), &format!("ferry {}", number % 50), &Recall::default()).unwrap();
    }
    assert_eq!(count(), before + 51);
    let again = store.recall(&trip(), "when does the ferry leave", &Recall::default()).unwrap();
    assert_eq!((first, count()), (again, before + 51));
}

#[test]
fn a_question_that_nothing_answers_can_get_no_hits() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let texts: Vec<String> = (0..40).map(|number| prose(number, 60)).collect();
    say(&store, &trip(), Role::Document, &texts.iter().map(String::as_str).collect::<Vec<_>>());
    say(&store, &trip(), Role::User, &["My passport is in the blue drawer of the desk."]);
    let options = Recall { min_relevance: 0.5, ..Recall::default() };
    let hits = store.recall(&trip(), "in which drawer is my passport?", &options).unwrap();
    assert!(hits[0].text.contains("passport") && hits[0].relevance > 0.5);
    assert!(hits[0].why.coverage > 0.5 && hits.len() == 1);
    for nothing in ["how tall is the Eiffel tower?", "which shoes did Lena buy on Tuesday?"] {
        assert!(store.recall(&trip(), nothing, &options).unwrap().is_empty(), "{nothing}");
        assert!(!store.recall(&trip(), nothing, &Recall::default()).unwrap().is_empty());
    }
    let wrong = Recall { min_relevance: f32::NAN, ..Recall::default() };
    assert!(store.recall(&trip(), "x", &wrong).is_err());
}
