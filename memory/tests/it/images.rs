//! Images of the index: an opening from one is as an opening from the log, and none keeps what was forgotten.
//! Knows nothing of the crate's inside.

use std::path::{Path, PathBuf};

use mka_memory::{
    Backend, Cancel, Commit, EncryptionKey, Filter, Forget, Hit, NewTurn, Recall, Role, Scope,
    Store, StoreOptions,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{BACKENDS, files, files_with, open_with, prose, say, trip};

/// An image from the first vector on: what takes 4,096 otherwise.
pub(crate) fn imaged(path: &Path, backend: Backend) -> Store {
    let options = StoreOptions { backend, image_vectors: 1, ..StoreOptions::default() };
    open_with(path, options).unwrap()
}

fn plain(path: &Path, backend: Backend) -> Store {
    let options = StoreOptions { backend, image_vectors: usize::MAX, ..StoreOptions::default() };
    open_with(path, options).unwrap()
}

fn images(path: &Path) -> Vec<PathBuf> {
    let index = path.join("index");
    if index.exists() { files(&index) } else { Vec::new() }
}

fn ask(store: &Store, scope: &Scope, query: &str, recall: Recall) -> Vec<Hit> {
    store.recall(scope, query, &Recall { k: 20, ..recall }).unwrap()
}

/// What a store answers, in every way that an index has a part in.
fn answers(store: &Store) -> String {
    let user = Scope::user("ada");
    let mut all = format!("{:?}", store.chunks(&user, 0..9_999, None).unwrap());
    for query in
        ["what did the engine carry in winter", "note 7", "seven copper letters", "zebra-11"]
    {
        let odd = Some(Filter::eq("odd", true));
        for recall in [
            Recall::default(),
            Recall { filter: odd, ..Recall::default() },
            Recall { now_ms: Some(50), stale: true, ..Recall::default() },
        ] {
            all += &format!("\n{query}:");
            // Ranks among equals are as chance has them.
            for hit in ask(store, &user, query, recall) {
                let (why, source) = (hit.why, hit.source);
                let scores = (hit.score, hit.relevance, why.bm25, why.cosine, why.recency);
                all +=
                    &format!("\n{:?} {scores:?} {source:?} {} {}", hit.chunk, hit.count, hit.stale);
            }
        }
    }
    let stats = store.stats();
    all += &format!(
        "\n{} {} {} {} {}",
        stats.chunks, stats.vectors, stats.terms, stats.subjects, stats.duplicates
    );
    all
}

/// Says where two answers differ.
#[track_caller]
fn assert_same(found: &str, expected: &str) {
    let differs = found.bytes().zip(expected.bytes()).position(|(a, b)| a != b);
    if let Some(at) = differs.or((found.len() != expected.len()).then_some(0)) {
        let around = |text: &str| {
            String::from_utf8_lossy(
                &text.as_bytes()[at.saturating_sub(600)..text.len().min(at + 200)],
            )
            .into_owned()
        };
        panic!("at {at}: found\n{}\nexpected\n{}", around(found), around(expected));
    }
}

/// A turn of few kinds, so that texts come again, nearly again, with and without marks.
fn turn(rng: &mut ChaCha8Rng) -> NewTurn {
    let number = rng.random_range(0..40);
    let mut text = prose(number, 20 + 30 * (number as usize % 4));
    if rng.random_bool(0.3) {
        text = format!("> {}", text.to_uppercase());
    }
    if rng.random_bool(0.2) {
        text += &format!(" The badge is zebra-{number}.");
    }
    let role = [Role::User, Role::Document, Role::Recalled][rng.random_range(0..3)];
    let mut turn = NewTurn::new(role, text);
    turn.time_ms = rng.random_range(0..100);
    turn.subject = rng.random_bool(0.2).then(|| format!("subject {}", number % 3));
    turn.expires_ms = rng.random_bool(0.2).then_some(60);
    if rng.random_bool(0.5) {
        turn.metadata.insert("odd".into(), (number % 2 == 1).into());
    }
    turn
}

fn step(rng: &mut ChaCha8Rng, stores: [&Store; 2]) {
    let scope = trip().session(format!("s{}", rng.random_range(0..5)));
    let length = stores[0].num_turns(&scope).unwrap();
    let commit = |commit: Commit| {
        stores.iter().for_each(|store| drop(store.commit(&scope, commit.clone()).unwrap()));
    };
    let forget = |scope: &Scope, selector: Forget| {
        for store in stores {
            let receipt = store.forget(scope, &selector).unwrap();
            store.verify(&receipt).unwrap();
        }
    };
    match rng.random_range(0..12) {
        0 if length > 0 => {
            let retract = Some(length - rng.random_range(0..length.min(3))..length);
            let turns = vec![turn(rng)];
            commit(Commit { turns, retract, ..Commit::default() });
        }
        1 if length > 0 => forget(&scope, Forget::turn(rng.random_range(0..length))),
        2 if rng.random_bool(0.3) => {
            let text = format!("zebra-{}", rng.random_range(0..40));
            forget(&Scope::user("ada"), Forget::matching(text));
        }
        3 if rng.random_bool(0.3) => stores.iter().for_each(|store| store.compact_all().unwrap()),
        4 => stores.iter().for_each(|store| store.finish_indexing()),
        5 if length > 0 => {
            let free =
                |name: &String| stores[0].num_turns(&trip().session(name.as_str())).unwrap() == 0;
            if let Some(name) = (0..7).map(|number| format!("s{number}")).find(free) {
                stores.iter().for_each(|store| drop(store.fork(&scope, &name).unwrap()));
            }
        }
        6 if rng.random_bool(0.2) => forget(&scope, Forget::Session),
        _ => {
            let turns = (0..rng.random_range(1..5)).map(|_| turn(rng)).collect();
            commit(Commit { turns, ..Commit::default() });
        }
    }
}

#[test]
fn an_opening_from_an_image_is_as_one_from_the_log() {
    let number = |name: &str, default| {
        std::env::var(name).map_or(default, |n| n.parse::<u64>().expect("a number"))
    };
    let (operations, seed) = (number("MKA_IMAGE_OPERATIONS", 90), number("MKA_IMAGE_SEED", 3));
    println!("{operations} operations from seed {seed}");
    for backend in BACKENDS {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (mut with, mut without) =
            (imaged(folders[0].path(), backend), plain(folders[1].path(), backend));
        let mut num_unread = 0;
        for operation in 0..operations {
            step(&mut rng, [&with, &without]);
            if operation % 9 != 8 {
                continue;
            }
            if rng.random_bool(0.3) {
                // As a crash leaves it: the image that was written last is there, and the log went on.
                let image =
                    images(folders[0].path()).pop().map(|it| (std::fs::read(&it).unwrap(), it));
                drop(with);
                image.into_iter().for_each(|(bytes, path)| std::fs::write(path, bytes).unwrap());
            } else {
                drop(with);
            }
            drop(without);
            (with, without) =
                (imaged(folders[0].path(), backend), plain(folders[1].path(), backend));
            assert!(images(folders[1].path()).is_empty());
            num_unread += with.stats().vectors_unread;
            assert_eq!(without.stats().vectors_unread, 0);
            assert_same(&answers(&with), &answers(&without));
            let checkup = with.doctor(false, &Cancel::new()).unwrap();
            assert!(checkup.problems.is_empty(), "operation {operation}: {checkup:?}");
        }
        assert!(num_unread > 0, "no opening made use of an image");
    }
}

/// Says some turns in a new store, and closes it.
fn fill(path: &Path) {
    let store = imaged(path, Backend::Sled);
    for number in 0..12 {
        say(&store, &trip(), Role::Document, &[&prose(number, 80)]);
    }
}

#[test]
fn a_lost_torn_or_foreign_image_is_made_from_the_log() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let [image] = &images(folder.path())[..] else { panic!("expected one image") };
    let whole = std::fs::read(image).unwrap();
    let expected = {
        let store = imaged(folder.path(), Backend::Sled);
        let stats = store.stats();
        assert!(stats.vectors > 20 && stats.vectors_unread == stats.vectors);
        assert!(store.disk_usage().unwrap().image_bytes > 0);
        answers(&store)
    };
    // Of version 1, whose gists were others.
    let mut earlier = whole.clone();
    earlier[8..12].copy_from_slice(&1u32.to_le_bytes());
    let mut damages: Vec<Vec<u8>> =
        vec![Vec::new(), b"junk".to_vec(), whole[..95].to_vec(), earlier];
    for at in (0..whole.len()).step_by(whole.len() / 7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        damages.extend([damaged, whole[..at].to_vec()]);
    }
    for damaged in damages {
        std::fs::write(image, damaged).unwrap();
        std::fs::write(image.with_extension("image.new"), &whole[..200]).unwrap();
        let store = imaged(folder.path(), Backend::Sled);
        assert_eq!((store.stats().vectors_unread, store.stats().damaged), (0, Vec::new()));
        assert_same(&answers(&store), &expected);
        drop(store);
        assert_eq!(images(folder.path()), std::slice::from_ref(image));
        assert!(std::fs::read(image).unwrap() == whole, "the image is another than before");
    }
    // An image of another store: its seed is another, and so are the identities of its chunks.
    let other = tempfile::tempdir().unwrap();
    let options = StoreOptions { image_vectors: 1, seed: 9, ..StoreOptions::default() };
    let store = open_with(other.path(), options).unwrap();
    say(&store, &trip(), Role::User, &["Bananas are yellow."]);
    drop(store);
    std::fs::copy(images(other.path()).pop().unwrap(), image).unwrap();
    let store = imaged(folder.path(), Backend::Sled);
    assert_eq!(store.stats().vectors_unread, 0);
    assert_same(&answers(&store), &expected);
}

#[test]
fn what_is_forgotten_is_in_no_image() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let secret = "xanthophyll";
    let store = imaged(folder.path(), Backend::Sled);
    say(&store, &trip(), Role::User, &[&format!("The {secret} is in the safe.")]);
    let bob = Scope::user("bob").session("home");
    say(&store, &bob, Role::User, &["Bob likes trains."]);
    drop(store);
    let with_word = |word| {
        let found = files_with(folder.path(), word);
        found.iter().filter(|file| file.extension().is_some_and(|it| it == "image")).count()
    };
    assert_eq!(
        (images(folder.path()).len(), with_word("xanthophyl"), with_word("train")),
        (2, 1, 1)
    );
    let store = imaged(folder.path(), Backend::Sled);
    let receipt = store.forget(&Scope::user("ada"), &Forget::matching(secret)).unwrap();
    // The stem is what an image holds of a word.
    assert!(files_with(folder.path(), "xanthophyl").is_empty());
    store.verify(&receipt).unwrap();
    store.finish_indexing();
    assert_eq!((images(folder.path()).len(), with_word("train")), (2, 1));
    drop(store);
    assert!(files_with(folder.path(), "xanthophyl").is_empty());
    let store = imaged(folder.path(), Backend::Sled);
    store.verify(&receipt).unwrap();
    assert!(store.stats().vectors_unread > 20);
}

#[test]
fn an_image_that_knows_an_erased_turn_does_not_pass_verification() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let image = images(folder.path()).pop().unwrap();
    let before = std::fs::read(&image).unwrap();
    let store = imaged(folder.path(), Backend::Sled);
    let receipt = store.forget(&trip(), &Forget::turn(3)).unwrap();
    store.verify(&receipt).unwrap();
    store.finish_indexing();
    std::fs::write(&image, before).unwrap();
    let error = store.verify(&receipt).unwrap_err().to_string();
    assert!(error.contains("erased records"), "{error}");
}

#[test]
fn vectors_that_are_damaged_on_the_disk_are_noticed_when_they_are_read_and_mended() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let expected = answers(&imaged(folder.path(), Backend::Sled));
    let segment = files(&folder.path().join("segments")).remove(0);
    let mut bytes = std::fs::read(&segment).unwrap();
    let text = prose(5, 80);
    let at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    // The chunks of a turn follow its text in the segment.
    bytes[at + text.len() + 300] ^= 4;
    std::fs::write(&segment, bytes).unwrap();
    let store = imaged(folder.path(), Backend::Sled);
    assert_eq!(store.stats().vectors_unread, store.stats().vectors);
    let words = ask(&store, &trip(), &text, Recall::default());
    assert!(words.iter().any(|hit| hit.source.turn == 5 && hit.why.cosine < 0.0));
    let problems = store.doctor(false, &Cancel::new()).unwrap().problems;
    assert_eq!(problems.len(), 2, "{problems:?}");
    store.doctor(true, &Cancel::new()).unwrap();
    assert_same(&answers(&store), &expected);
    drop(store);
    let store = imaged(folder.path(), Backend::Sled);
    assert_eq!(store.stats().vectors_unread, store.stats().vectors);
    assert_same(&answers(&store), &expected);
}

#[test]
fn a_damaged_image_is_a_problem_that_a_repair_solves() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let image = images(folder.path()).pop().unwrap();
    let store = imaged(folder.path(), Backend::Sled);
    let mut bytes = std::fs::read(&image).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(&image, bytes).unwrap();
    let problems = store.doctor(false, &Cancel::new()).unwrap().problems;
    assert!(problems.len() == 1 && problems[0].what.contains("image of ada/*"), "{problems:?}");
    store.doctor(true, &Cancel::new()).unwrap();
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
}

#[test]
fn an_encrypted_store_keeps_no_image() {
    let folder = tempfile::tempdir().unwrap();
    let key = Some(EncryptionKey::new([3; 32]));
    let options = StoreOptions { image_vectors: 1, key, ..StoreOptions::default() };
    let store = open_with(folder.path(), options).unwrap();
    say(&store, &trip(), Role::Document, &[&prose(1, 80)]);
    store.finish_indexing();
    drop(store);
    assert!(images(folder.path()).is_empty());
}
