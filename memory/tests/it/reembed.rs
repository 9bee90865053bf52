//! Another embedder: refused by default, or taken over, with nothing mixed while vectors are made anew.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use mka_memory::{
    Cancel, Commit, Embedder, ErrorKind, Forget, HashedEmbedder, NewTurn, Recall, Role, Scope,
    Store, StoreOptions,
};

use crate::support::{open, prose, say, trip};

/// Vectors that share no space with those of the built-in embedder, of another length.
struct Letters(AtomicUsize);

const DIM: usize = 26;

impl Embedder for Letters {
    fn identity(&self) -> String {
        "letters-1".into()
    }
    fn dim(&self) -> usize {
        DIM
    }
    fn embed(&self, texts: &[&str]) -> mka_memory::Result<Vec<f32>> {
        self.0.fetch_add(texts.len(), Ordering::Relaxed);
        let row = |text: &&str| {
            let mut row = vec![0.01f32; DIM];
            text.bytes().filter(u8::is_ascii_alphabetic).for_each(|c| {
                row[(c.to_ascii_lowercase() - b'a') as usize] += 1.0;
            });
            let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            row.into_iter().map(move |x| x / length)
        };
        Ok(texts.iter().flat_map(row).collect())
    }
}

fn with_letters(path: &Path, reembed: bool) -> (mka_memory::Result<Store>, Arc<Letters>) {
    let embedder = Arc::new(Letters(AtomicUsize::new(0)));
    let options = StoreOptions { reembed, ..StoreOptions::default() };
    (Store::open(path, embedder.clone(), options), embedder)
}

fn fill(store: &Store) {
    let texts: Vec<String> = (0..20).map(|number| prose(number, 150)).collect();
    for text in &texts {
        say(store, &trip(), Role::Document, &[text, "The same words each time."]);
    }
    say(store, &Scope::user("bob").session("x"), Role::User, &["Bob likes the seaside."]);
}

fn answers(store: &Store) -> Vec<(String, f32, u32)> {
    let queries = ["river engine window", "Note 7 begins", "seaside"];
    let scopes = [trip(), trip(), Scope::user("bob")];
    let hits = queries.iter().zip(&scopes).flat_map(|(query, scope)| {
        store.recall(scope, query, &Recall { follow_up: false, ..Recall::default() }).unwrap()
    });
    hits.map(|hit| (hit.text, hit.why.cosine, hit.count)).collect()
}

#[test]
fn a_store_of_another_embedder_answers_by_words_at_once_and_by_vectors_in_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let fresh = tempfile::tempdir().unwrap();
    fill(&open(folder.path()));
    assert_eq!(with_letters(folder.path(), false).0.unwrap_err().kind(), ErrorKind::Incompatible);
    let expected = {
        let store = with_letters(fresh.path(), false).0.unwrap();
        fill(&store);
        answers(&store)
    };
    {
        let (store, embedder) = with_letters(folder.path(), true);
        let store = store.unwrap();
        assert_eq!(embedder.0.load(Ordering::Relaxed), 0, "opening embeds nothing");
        assert_eq!(store.stats().turns_to_embed, 22);
        assert_eq!(store.stats().embedder, "letters-1");
        let hits = store.recall(&trip(), "Note 7 begins", &Recall::default()).unwrap();
        assert!(hits[0].text.contains("Note 7 ") && hits.iter().all(|hit| hit.why.cosine <= 0.0));
        // What is said meanwhile has its vectors at once.
        say(&store, &trip(), Role::User, &["The zebra jumps."]);
        let hits = store.recall(&trip(), "zebra", &Recall::default()).unwrap();
        assert!(hits[0].why.cosine > 0.5);
        let step = store.reembed(40).unwrap();
        assert!(step.sentences > 20 && step.turns_left > 0, "{step:?}");
        store.forget(&trip(), &Forget::matching("zebra")).unwrap();
    }
    // Interrupted; the next opening goes on where it stopped.
    let (store, _) = with_letters(folder.path(), false);
    let store = store.unwrap();
    assert!((1..22).contains(&store.stats().turns_to_embed));
    let mut steps = 0;
    while store.reembed(40).unwrap().turns_left > 0 {
        steps += 1;
    }
    assert!(steps > 0, "{steps}");
    assert_eq!(answers(&store), expected);
    let checkup = store.doctor(false, &Cancel::new()).unwrap();
    assert!(checkup.problems.is_empty(), "{:?}", checkup.problems);
    drop(store);
    let (store, embedder) = with_letters(folder.path(), false);
    let store = store.unwrap();
    assert_eq!((store.stats().turns_to_embed, embedder.0.load(Ordering::Relaxed)), (0, 0));
    assert_eq!(answers(&store), expected);
    drop(store);
    let error =
        Store::open(folder.path(), Arc::new(HashedEmbedder::new()), StoreOptions::default())
            .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
}

/// [`Letters`] that count what they were given: bytes that are not white space.
#[derive(Default)]
struct Counted(AtomicUsize);

impl Embedder for Counted {
    fn identity(&self) -> String {
        "counted-1".into()
    }
    fn dim(&self) -> usize {
        DIM
    }
    fn embed(&self, texts: &[&str]) -> mka_memory::Result<Vec<f32>> {
        let bytes = |text: &&str| text.bytes().filter(|c| !c.is_ascii_whitespace()).count();
        self.0.fetch_add(texts.iter().map(bytes).sum(), Ordering::Relaxed);
        Letters(AtomicUsize::new(0)).embed(texts)
    }
}

#[test]
fn every_word_gets_a_vector_where_a_text_was_cut_by_other_rules() {
    for (before, after) in [(20, 128), (128, 20), (33, 50)] {
        let folder = tempfile::tempdir().unwrap();
        let text = prose(3, 900);
        let options = StoreOptions { chunk_words: before, ..StoreOptions::default() };
        let store = Store::open(folder.path(), Arc::new(HashedEmbedder::new()), options).unwrap();
        say(&store, &trip(), Role::Document, &[&text]);
        drop(store);
        let embedder = Arc::new(Counted::default());
        let options = StoreOptions { chunk_words: after, reembed: true, ..StoreOptions::default() };
        let store = Store::open(folder.path(), embedder.clone(), options).unwrap();
        while store.reembed(100).unwrap().turns_left > 0 {}
        let all = text.bytes().filter(|c| !c.is_ascii_whitespace()).count();
        assert_eq!(embedder.0.load(Ordering::Relaxed), all, "{before} words, then {after}");
    }
}

#[test]
fn everything_is_embedded_at_once_where_there_is_no_limit() {
    let folder = tempfile::tempdir().unwrap();
    fill(&open(folder.path()));
    let store = with_letters(folder.path(), true).0.unwrap();
    assert_eq!(store.reembed(usize::MAX).unwrap().turns_left, 0);
}

#[test]
fn chunks_that_go_or_move_while_they_wait_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    fill(&open(folder.path()));
    let store = with_letters(folder.path(), true).0.unwrap();
    // The vectors of the text that every turn repeats would be in the first turn that has it.
    store.forget(&trip(), &Forget::turn(1)).unwrap();
    store.commit(&trip(), Commit { retract: Some(38..40), ..Commit::default() }).unwrap();
    say(&store, &trip(), Role::User, &["The same words each time."]);
    std::thread::scope(|threads| {
        threads.spawn(|| while store.reembed(30).unwrap().turns_left > 0 {});
        threads.spawn(|| {
            for turn in [4, 7, 10] {
                store.forget(&trip(), &Forget::turn(turn)).unwrap();
                let turns = vec![NewTurn::new(Role::User, format!("Number {turn} went."))];
                store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
            }
        });
    });
    assert_eq!(store.reembed(1000).unwrap().turns_left, 0);
    let hits = store.recall(
        &trip(),
        "the same words each time",
        &Recall { k: 99, follow_up: false, ..Recall::default() },
    );
    let hits = hits.unwrap();
    assert!(hits.iter().all(|hit| hit.why.cosine > 0.0));
    let repeated = hits.iter().find(|hit| hit.text == "The same words each time.").unwrap();
    assert!(repeated.why.cosine > 0.99, "{repeated:?}");
    let checkup = store.doctor(false, &Cancel::new()).unwrap();
    assert!(checkup.problems.is_empty(), "{:?}", checkup.problems);
}

/// [`Letters`] that do something else before they embed, once.
struct Interrupted {
    letters: Letters,
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Embedder for Interrupted {
    fn identity(&self) -> String {
        self.letters.identity()
    }
    fn dim(&self) -> usize {
        DIM
    }
    fn embed(&self, texts: &[&str]) -> mka_memory::Result<Vec<f32>> {
        let meanwhile = self.meanwhile.lock().unwrap().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        self.letters.embed(texts)
    }
}

#[test]
fn a_turn_that_takes_a_chunk_over_while_it_is_embedded_goes_on_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let shared = "The same words are said again each time here.";
    let both = format!("Herons nest by the northern lake in early spring.\n\n{shared}");
    // A paragraph is a chunk.
    let options = StoreOptions { chunk_words: 10, ..StoreOptions::default() };
    let hashed = Arc::new(HashedEmbedder::new());
    let store = Store::open(folder.path(), hashed, options.clone()).unwrap();
    say(&store, &trip(), Role::User, &[shared, &both]);
    assert_eq!(store.stats().chunks, 2);
    drop(store);
    let letters = Letters(AtomicUsize::new(0));
    let embedder = Arc::new(Interrupted { letters, meanwhile: Mutex::new(None) });
    let options = StoreOptions { reembed: true, ..options };
    let store = Arc::new(Store::open(folder.path(), embedder.clone(), options).unwrap());
    assert_eq!(store.stats().turns_to_embed, 2);
    let other = store.clone();
    let forget = move || drop(other.forget(&trip(), &Forget::turn(0)).unwrap());
    *embedder.meanwhile.lock().unwrap() = Some(Box::new(forget));
    assert_eq!(store.reembed(1000).unwrap().turns_left, 1);
    assert_eq!(store.reembed(1000).unwrap().turns_left, 0);
    let options = Recall { follow_up: false, ..Recall::default() };
    let hits = store.recall(&trip(), shared, &options).unwrap();
    assert_eq!(hits[0].text, shared);
    assert!(hits[0].why.cosine > 0.99, "{hits:?}");
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
}
