//! Objects by their numbers: streams that are polled, recalls that are begun, and the bell that both ring.

use crate::{engine, finish, tokens, trip};
use mka::{Event, Recall};
use mka_bindings::open::{self, Batch};
use mka_bindings::{MkaError, NativeBell, Recalling};
use std::time::{Duration, Instant};

/// Waits until `number` has rung.
fn rung(bell: &NativeBell, number: u64) {
    let start = Instant::now();
    let mut readable =
        libc::pollfd { fd: bell.descriptor().unwrap(), events: libc::POLLIN, revents: 0 };
    while start.elapsed() < Duration::from_secs(60) {
        // SAFETY: one descriptor, whose bell is borrowed.
        assert!(unsafe { libc::poll(&mut readable, 1, 1000) } >= 0);
        if bell.take().contains(&number) {
            return;
        }
    }
    panic!("{number} has not rung");
}

fn is_unknown<T>(result: Result<T, MkaError>) -> bool {
    matches!(result, Err(MkaError::InvalidArgument(text)) if text.contains("number is unknown"))
}

#[test]
fn a_bell_tells_when_a_stream_and_a_recall_are_to_be_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let bell_number = NativeBell::new().unwrap().number();
    assert!(is_unknown(open::bell(bell_number)), "nobody holds it");
    let bell = NativeBell::new().unwrap();
    let bell = open::bell(bell.clone().number()).unwrap();

    let chat = engine.session_blocking(trip()).unwrap();
    let turn = chat.send("hello there".into(), tokens(20)).unwrap();
    let number = turn.clone().number();
    let stream = open::stream(number).unwrap();
    let (mut answer, mut waits) = (Vec::new(), 0);
    while let Some(batch) = stream.poll(&bell.clone().waker(number)).unwrap() {
        match batch {
            Batch::Turn(events) if events.is_empty() => {
                waits += 1;
                rung(&bell, number);
            }
            Batch::Turn(events) => answer.extend(events),
            Batch::Feed(_) => panic!("a turn is no feed"),
        }
    }
    assert!(matches!(answer.last(), Some(Event::Done(_))) && waits > 0, "{answer:?} {waits}");
    drop((stream, turn));
    assert!(is_unknown(open::stream(number)));

    let memory = engine.clone().memory();
    let opened = open::memory(memory.clone().number()).unwrap();
    let begin = || {
        let memory = opened.handle("recall").unwrap();
        let (scope, options) = (mka::Scope::user("ada"), Recall::default());
        Recalling::begin(memory, scope, "hello".into(), options, bell.clone())
    };
    let recalling = begin();
    rung(&bell, recalling.number());
    let hits = recalling.hits().unwrap().unwrap();
    assert!(hits.iter().any(|hit| hit.text.contains("hello there")), "{hits:?}");
    assert!(matches!(recalling.hits(), Err(MkaError::InvalidArgument(_))), "given before");
    drop(begin());
    engine.close_blocking().unwrap();
    assert!(matches!(opened.handle("recall"), Err(MkaError::InvalidArgument(_))));
}

#[test]
fn a_stream_is_waited_for_within_a_limit() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path());
    let chat = engine.session_blocking(trip()).unwrap();
    let failed = chat.regenerate(tokens(2)).unwrap();
    let stream = open::stream(failed.clone().number()).unwrap();
    assert!(matches!(stream.wait(Duration::from_secs(60)), Err(MkaError::NotFound(_))));
    let failed = chat.regenerate(tokens(2)).unwrap();
    assert!(matches!(finish(&failed), Err(MkaError::NotFound(_))));
    let turn = chat.send("hello".into(), tokens(3)).unwrap();
    let stream = open::stream(turn.clone().number()).unwrap();
    let (mut events, start) = (0, Instant::now());
    while let Some(batch) = stream.wait(Duration::from_millis(1)).unwrap() {
        let Batch::Turn(batch) = batch else { panic!("a turn is no feed") };
        events += batch.len();
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    assert!(events > 0);
}

#[test]
fn a_panic_is_an_error_of_the_library() {
    let error = open::without_panic(|| -> Result<(), MkaError> { panic!("on purpose") });
    assert!(matches!(error, Err(MkaError::Internal(_))));
}
