//! The format reads back what it wrote, and refuses everything else without a panic.
//! Knows no file.

use proptest::prelude::*;

use super::*;
use crate::{Metadata, NewTurn, Role, Value};

fn blob(kind: Kind) -> BlobRef {
    BlobRef { segment: 3, offset: 77, len: 5, hash: 0xdead_beef, kind }
}

pub(super) const HEAD: TurnHead = TurnHead {
    session: 1,
    turn: 2,
    commit: 3,
    order: 4,
    time_ms: -5,
    role: Role::User,
    remember: true,
};

pub(super) fn samples() -> Vec<(Key, Record)> {
    vec![
        (
            Key::Store,
            Record::Store(StoreRecord {
                seed: 7,
                dim: 384,
                embedder: "hashed".into(),
                next_session: 9,
                purge_pending: true,
                untagged: 5,
            }),
        ),
        (
            Key::Session(1),
            Record::Session(SessionRecord {
                names: blob(Kind::Names),
                summary: Some(blob(Kind::Summary)),
            }),
        ),
        (
            Key::Turn(1, 2),
            Record::Turn(TurnRecord {
                role: Role::Assistant,
                time_ms: -5,
                order: 11,
                remember: true,
                retracted: false,
                body: Some(blob(Kind::Body)),
                chunks: None,
            }),
        ),
        (
            Key::Snapshot(1),
            Record::Snapshot(SnapshotRecord {
                fingerprint: [9; 16],
                position: 1_000_000,
                num_window_pages: 3,
                state: blob(Kind::State),
            }),
        ),
        (Key::Page(1, 4), Record::Page(PageRecord { blob: blob(Kind::Page), evicted: 2 })),
    ]
}

#[test]
fn every_record_reads_back_as_written() {
    for (key, record) in samples() {
        assert_eq!(Key::decode(&key.encode()).unwrap(), key);
        assert_eq!(Record::decode(&key, &record.encode(&key)).unwrap(), record);
    }
}

#[test]
fn a_payload_of_another_kind_is_refused() {
    let names = encode_names(1, "ada", None, "trip");
    assert!(decode_names(Kind::Body, &names).is_err());
    assert_eq!(
        KINDS.map(|(kind, code)| (Kind::from_code(code), kind.code())),
        KINDS.map(|(kind, code)| (Some(kind), code))
    );
}

#[test]
fn a_record_under_another_key_is_refused() {
    let (key, record) = samples().remove(4);
    let error = Record::decode(&Key::Page(1, 5), &record.encode(&key)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupted);
}

proptest! {
    #[test]
    fn any_flipped_bit_of_a_record_is_refused(which in 0usize..5, at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (key, record) = samples().remove(which);
        let mut bytes = record.encode(&key);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(Record::decode(&key, &bytes).is_err());
    }

    #[test]
    fn decoding_any_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for (key, _) in samples() {
            let _ = Record::decode(&key, &bytes);
        }
        let _ = Key::decode(&bytes);
        for (kind, _) in KINDS {
            let _ = Body::decode(kind, &bytes);
            let _ = TurnChunks::decode(kind, &bytes);
            let _ = decode_names(kind, &bytes);
            let _ = decode_summary(kind, &bytes);
        }
        let _ = decode_cipher(&bytes);
        let _ = parse_record_header(&bytes);
    }

    #[test]
    fn a_body_reads_back_as_written(source in prop::option::of(".{0,20}"), text in ".{0,200}", tokens in prop::collection::vec(any::<u32>(), 0..40), subject in prop::option::of(".{0,20}"), expires_ms in any::<Option<i64>>(), number in -1e9f64..1e9) {
        let marks = [("kind", Value::from(text.as_str())), ("flag", true.into()), ("number", number.into())];
        let marks = marks.map(|(key, value)| (key.to_owned(), value));
        for metadata in [Metadata::new(), marks.into()] {
            let mut turn = NewTurn::new(HEAD.role, text.clone());
            (turn.source, turn.tokens) = (source.clone(), tokens.clone());
            (turn.subject, turn.expires_ms, turn.metadata) = (subject.clone(), expires_ms, metadata);
            let bytes = Body::encode(&HEAD, &turn);
            let NewTurn { source, text, tokens, subject, expires_ms, metadata, .. } = turn;
            let body = Body { head: HEAD, source, text, tokens, subject, expires_ms, metadata };
            prop_assert_eq!(Body::decode(Kind::Body, &bytes).unwrap(), body);
        }
    }

    #[test]
    fn a_cut_payload_is_refused(text in ".{1,50}", cut in any::<prop::sample::Index>()) {
        let mut turn = NewTurn::new(HEAD.role, text);
        (turn.source, turn.tokens, turn.expires_ms) = (Some("a".into()), vec![1, 2], Some(3));
        let body = Body::encode(&HEAD, &turn);
        prop_assert!(Body::decode(Kind::Body, &body[..cut.index(body.len())]).is_err());
        let vectors = [0.5f32, -1.0];
        let span = ChunkSpan { id: 7, start: 0, end: 3, near: true };
        let chunks = TurnChunks::encode(1, 2, 3, [(span, &vectors[..])].into_iter());
        prop_assert!(TurnChunks::decode(Kind::Chunks, &chunks[..cut.index(chunks.len())]).is_err());
        let names = encode_names(1, "ada", None, "trip");
        prop_assert!(decode_names(Kind::Names, &names[..cut.index(names.len())]).is_err());
        let summary = encode_summary(1, 2, &[vec![0.5]]);
        prop_assert!(decode_summary(Kind::Summary, &summary[..cut.index(summary.len())]).is_err());
        let cipher = encode_cipher(&[1; 40]);
        prop_assert!(decode_cipher(&cipher[..cut.index(cipher.len())]).is_err());
    }
}
