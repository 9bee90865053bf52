//! Fuzzing of every record on the disk: valid ones are mutated, and must be refused or read, never panic.
//! Runs a moment by default; `MKA_FUZZ_SECONDS` is the time for each target, `MKA_FUZZ_SEED` the start of every choice.

use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::tests::{HEAD, samples};
use super::*;
use crate::{NewTurn, Role};

/// Mutates `seeds` until the time is over, and gives each result to `target`.
fn fuzz(name: &str, seeds: &[Vec<u8>], mut target: impl FnMut(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let time = number("MKA_FUZZ_SECONDS").map_or(Duration::from_millis(60), Duration::from_secs);
    let seed = number("MKA_FUZZ_SEED").unwrap_or(7);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (started, mut runs) = (Instant::now(), 0u64);
    seeds.iter().for_each(|bytes| target(bytes));
    while started.elapsed() < time {
        for _ in 0..100 {
            let mut bytes = seeds[rng.random_range(0..seeds.len())].clone();
            for _ in 0..rng.random_range(1..6) {
                mutate(&mut rng, &mut bytes, seeds);
            }
            target(&bytes);
            runs += 1;
        }
    }
    println!("{name}: {runs} inputs from seed {seed} in {:.1} s", started.elapsed().as_secs_f64());
}

fn mutate(rng: &mut ChaCha8Rng, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    const EDGES: [u64; 8] = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];
    let at = rng.random_range(0..=bytes.len());
    let left = bytes.len() - at;
    match rng.random_range(0..7) {
        0 if left > 0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 if left > 0 => bytes[at] = rng.random(),
        2 => bytes.insert(at, rng.random()),
        3 => drop(bytes.drain(at..at + rng.random_range(0..=left.min(16)))),
        4 => {
            // Numbers at their edges, where a length or a count may be.
            let edge = EDGES[rng.random_range(0..EDGES.len())].to_le_bytes();
            let len = [1, 4, 8][rng.random_range(0..3)].min(left);
            bytes[at..at + len].copy_from_slice(&edge[..len]);
        }
        5 => bytes.truncate(at),
        _ => {
            let other = &seeds[rng.random_range(0..seeds.len())];
            let from = rng.random_range(0..=other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
    }
}

#[test]
fn fuzz_keys() {
    let seeds: Vec<Vec<u8>> = samples().iter().map(|(key, _)| key.encode()).collect();
    fuzz("keys", &seeds, |bytes| {
        if let Ok(key) = Key::decode(bytes) {
            assert_eq!(key.encode(), bytes);
        }
    });
}

#[test]
fn fuzz_database_records() {
    for (key, record) in samples() {
        let fields_end = record.encode(&key).len() - 8;
        let seeds = [record.encode(&key)];
        fuzz(&format!("{key:?}"), &seeds, |bytes| {
            if Record::decode(&key, bytes).is_ok() {
                assert_eq!(bytes, seeds[0], "a changed record passed its checksum");
            }
            // Behind a checksum that is right the fields are read, whatever they are.
            let mut bytes =
                bytes.get(..bytes.len().min(fields_end * 2)).unwrap_or_default().to_vec();
            for version in OLDEST_VERSION..=VERSION {
                if bytes.len() >= 4 {
                    bytes[..4].copy_from_slice(&version.to_le_bytes());
                }
                let sum = checksum(version, &key, &bytes).to_le_bytes();
                let _ = Record::decode(&key, &[&bytes[..], &sum].concat());
            }
        });
    }
}

#[test]
fn fuzz_runs() {
    let key = RunKey { session: 1, first_turn: 2, num_turns: 3 };
    let (turn, record) =
        samples().into_iter().find(|(key, _)| matches!(key, Key::Turn(..))).unwrap();
    let record = record.encode(&turn);
    let seeds = [encode_run(&[Some(record.clone()), None, Some(record)]), key.encode()];
    fuzz("runs", &seeds, |bytes| {
        if let Some(key) = RunKey::decode(bytes) {
            assert_eq!(key.encode(), bytes);
        }
        if let Ok(records) = decode_run(&key, bytes) {
            assert_eq!(encode_run(&records), bytes);
            for (key, record) in key.keys().zip(records) {
                let _ = record.map(|record| Record::decode(&key, &record));
            }
        }
    });
}

#[test]
fn fuzz_turns() {
    let mut turn = NewTurn::new(Role::User, "Kyoto 京都");
    let plain = Body::encode(&HEAD, &turn);
    (turn.source, turn.tokens) = (Some("guide.md".into()), vec![1, 70_000]);
    (turn.subject, turn.expires_ms) = (Some("city".into()), Some(-1));
    let timed = Body::encode(&HEAD, &turn);
    turn.metadata = [("kind", "note".into()), ("open", true.into()), ("year", 2025.into())]
        .map(|(key, value): (&str, crate::Value)| (key.to_owned(), value))
        .into();
    let seeds = [plain, timed, Body::encode(&HEAD, &turn)];
    fuzz("turns", &seeds, |bytes| {
        let _ = Body::decode(Kind::BodyV1, bytes);
        if let Ok(body) = Body::decode(Kind::Body, bytes) {
            let mut turn = NewTurn::new(body.head.role, body.text);
            (turn.source, turn.tokens) = (body.source, body.tokens);
            (turn.subject, turn.expires_ms) = (body.subject, body.expires_ms);
            turn.metadata = body.metadata;
            assert_eq!(Body::encode(&body.head, &turn), bytes);
        }
    });
}

#[test]
fn fuzz_chunks() {
    let span = |id, near| ChunkSpan { id, start: 3, end: 9, near };
    let vectors = [0.5f32, -0.25, f32::NAN];
    let rows = [(span(1, false), &vectors[..]), (span(u128::MAX, true), &[][..])];
    let seeds = [TurnChunks::encode(1, 2, 3, rows.into_iter())];
    fuzz("chunks", &seeds, |bytes| {
        let _ = TurnChunks::decode(Kind::ChunksV1, bytes);
        if let Ok(turn) = TurnChunks::decode(Kind::Chunks, bytes) {
            let rows = turn.chunks.iter().map(|chunk| {
                let TurnChunk { id, start, end, near, ref vectors } = *chunk;
                (ChunkSpan { id, start, end, near }, &vectors[..])
            });
            let tag = turn.embedder.unwrap();
            assert_eq!(TurnChunks::encode(turn.session, turn.turn, tag, rows), bytes);
        }
    });
}

#[test]
fn fuzz_names() {
    let seeds = [encode_names(1, "ada", None, "trip"), encode_names(2, "bob", Some("bot"), "x")];
    fuzz("names", &seeds, |bytes| {
        let _ = decode_names(Kind::NamesV1, bytes);
        if let Ok(names) = decode_names(Kind::Names, bytes) {
            let id = names.id.unwrap();
            assert_eq!(
                encode_names(id, &names.user, names.agent.as_deref(), &names.session),
                bytes
            );
        }
    });
}

#[test]
fn fuzz_summaries() {
    let seeds = [encode_summary(7, 3, &[vec![0.5, 1.0], vec![], vec![f32::INFINITY]])];
    fuzz("summaries", &seeds, |bytes| {
        let _ = decode_summary(Kind::SummaryV1, bytes);
        if let Ok((tag, count, means)) = decode_summary(Kind::Summary, bytes) {
            assert_eq!(encode_summary(tag.unwrap(), count, &means), bytes);
        }
    });
}

#[test]
fn fuzz_headers() {
    let record = record_header(Kind::Page, 77, 0xdead_beef);
    let seeds = [record.to_vec(), segment_header(3).to_vec()];
    fuzz("headers", &seeds, |bytes| {
        if let Ok((kind, len, hash)) = parse_record_header(bytes) {
            assert_eq!(record_header(kind, len, hash), bytes);
        }
        if is_segment_header(3, bytes) {
            assert_eq!(bytes[12..], 3u32.to_le_bytes());
        }
    });
}

#[test]
fn fuzz_graphs() {
    use std::sync::Arc;

    use super::vectors::GraphFile;
    use super::vectors::tests::{reseal, sample};
    use crate::vectors::Held;

    let (head, bytes) = sample();
    let seeds = [bytes];
    fuzz("graphs", &seeds, |bytes| {
        let held: Held = Arc::new(bytes.to_vec());
        assert_eq!(GraphFile::read(&held, &head).is_ok(), bytes == seeds[0]);
        // Behind checksums that are right every number is looked at before it is followed.
        let mut bytes = bytes.to_vec();
        reseal(&mut bytes);
        let held: Held = Arc::new(bytes);
        if let Ok(file) = GraphFile::read(&held, &head) {
            assert!(file.graph.search(&[1; 64], 20).len() <= 20);
        }
    });
}

#[test]
fn fuzz_images() {
    use super::image::Image;
    use super::image::tests::{reseal, sample};

    let (head, bytes) = sample();
    let seeds = [bytes];
    fuzz("images", &seeds, |bytes| {
        assert_eq!(Image::decode(bytes, &head).is_ok(), bytes == seeds[0]);
        // Behind checksums that are right every number is looked at before it is followed.
        let mut bytes = bytes.to_vec();
        reseal(&mut bytes);
        if let Ok(image) = Image::decode(&bytes, &head) {
            let num_slots = image.slots.len() as u32;
            assert!(image.postings.values().flatten().all(|(slot, _)| *slot < num_slots));
            crate::partition::Partition::new(50).restore(image, Vec::new());
        }
    });
}

#[test]
fn fuzz_sealed_records() {
    use crate::EncryptionKey;
    use crate::cipher::Cipher;

    let cipher = Cipher::new(&EncryptionKey::new([7; 32]));
    let seeds =
        [cipher.seal(b"key", b"a record").unwrap(), encode_cipher(&cipher.check().unwrap())];
    fuzz("sealed records", &seeds, |bytes| {
        if cipher.open(b"key", bytes).is_ok() {
            assert_eq!(bytes, seeds[0], "a changed record passed its tag");
        }
        if let Ok(check) = decode_cipher(bytes)
            && cipher.matches(&check)
        {
            assert!(seeds[1].ends_with(&check));
        }
    });
}
