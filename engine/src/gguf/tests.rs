//! What the GGUF reader promises: exact on valid files, an error and nothing else on the rest.

use std::path::Path;

use proptest::prelude::*;

use super::writer::Writer;
use super::{Array, GgmlType, Gguf, Value};
use crate::ErrorKind;

fn parse(bytes: &[u8]) -> crate::Result<Gguf> {
    Gguf::parse(bytes, Path::new("test.gguf"))
}

fn sample() -> Writer {
    Writer::default()
        .set("general.architecture", Value::Str("llama".into()))
        .set("a.u8", Value::U8(7))
        .set("a.i8", Value::I8(-7))
        .set("a.u16", Value::U16(700))
        .set("a.i16", Value::I16(-700))
        .set("a.u32", Value::U32(70_000))
        .set("a.i32", Value::I32(-70_000))
        .set("a.f32", Value::F32(1.5))
        .set("a.bool", Value::Bool(true))
        .set("a.u64", Value::U64(1 << 40))
        .set("a.i64", Value::I64(-(1 << 40)))
        .set("a.f64", Value::F64(2.5))
        .strs("tokens", &["a", "", "Ġé"])
        .set("types", Value::Array(Array::I32(vec![1, 3, 1])))
        .set("scores", Value::Array(Array::F32(vec![0.0, -1.0])))
        .set("flags", Value::Array(Array::Bool(vec![true, false])))
        .set(
            "nested",
            Value::Array(Array::Nested(vec![
                Array::U8(vec![1, 2]),
                Array::Nested(vec![Array::Str(vec!["x".into()]), Array::U64(vec![])]),
            ])),
        )
        .tensor("embed", &[32, 3], 8, &[1; 34 * 3])
        .tensor("norm", &[5], 0, &[2; 20])
        .tensor("scalar", &[], 0, &[3; 4])
}

#[test]
fn a_written_file_reads_back_value_for_value() {
    for version in [2, 3] {
        let mut writer = sample();
        writer.version = Some(version);
        let bytes = writer.bytes();
        let gguf = parse(&bytes).unwrap();
        assert_eq!(gguf.metadata.len(), writer.metadata.len());
        for (key, value) in &writer.metadata {
            assert_eq!(&gguf.metadata[key], value, "{key}");
        }
        assert_eq!(gguf.tensors.len(), 3);
        let embed = gguf.tensor("embed").unwrap();
        assert_eq!(embed.gguf_shape, [32, 3]);
        assert_eq!(embed.shape, [3, 32]);
        assert_eq!(embed.ggml_type, GgmlType::Q8_0);
        assert_eq!(embed.range, gguf.data_offset..gguf.data_offset + 102);
        assert_eq!(&bytes[embed.range.clone()], [1; 102]);
        assert_eq!(&bytes[gguf.tensor("norm").unwrap().range.clone()], [2; 20]);
        assert_eq!(&bytes[gguf.tensor("scalar").unwrap().range.clone()], [3; 4]);
    }
}

#[test]
fn alignment_from_metadata_moves_the_data() {
    let bytes = sample().set("general.alignment", Value::U32(256)).bytes();
    let gguf = parse(&bytes).unwrap();
    assert_eq!(gguf.data_offset % 256, 0);
    assert_eq!(&bytes[gguf.tensor("norm").unwrap().range.clone()], [2; 20]);
    for bad in [0u32, 3, 1 << 21] {
        let mut bytes = sample().set("general.alignment", Value::U32(256)).bytes();
        let key = b"general.alignment";
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
        bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        let error = parse(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupted);
        assert!(error.to_string().contains("general.alignment"), "{error}");
    }
}

#[test]
fn getters_say_the_key_what_was_expected_and_what_was_found() {
    let gguf = parse(&sample().bytes()).unwrap();
    assert_eq!(gguf.u32("a.u32").unwrap(), 70_000);
    assert_eq!(gguf.u32("a.u8").unwrap(), 7);
    assert_eq!(gguf.f32("a.f64").unwrap(), 2.5);
    assert!(gguf.bool("a.bool").unwrap());
    assert_eq!(gguf.str("general.architecture").unwrap(), "llama");
    assert_eq!(gguf.strs("tokens").unwrap(), ["a", "", "Ġé"]);
    assert_eq!(gguf.i32s("types").unwrap(), [1, 3, 1]);
    assert_eq!(gguf.f32s("scores").unwrap(), [0.0, -1.0]);
    assert!(gguf.contains("flags") && !gguf.contains("absent"));
    let cases = [
        (gguf.u32("absent").unwrap_err(), "\"absent\": expected u32, got nothing"),
        (gguf.u32("a.i32").unwrap_err(), "\"a.i32\": expected u32, got i32 I32(-70000)"),
        (gguf.u32("a.u64").unwrap_err(), "expected u32, got u64"),
        (gguf.str("tokens").unwrap_err(), "expected string, got array of string"),
        (gguf.f32("a.u8").unwrap_err(), "expected f32, got u8"),
        (gguf.tensor("lost").unwrap_err(), "tensor \"lost\" is missing among 3 tensors"),
    ];
    for (error, text) in cases {
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn files_of_another_kind_are_refused_by_name() {
    let mut old = sample();
    old.version = Some(1);
    let mut swapped = sample();
    swapped.version = Some(3u32.swap_bytes());
    let cases: Vec<(Vec<u8>, ErrorKind, &str)> = vec![
        (b"PK\x03\x04 and so on".to_vec(), ErrorKind::Model, "not a GGUF file"),
        (old.bytes(), ErrorKind::Model, "version 1, expected 2 or 3"),
        (swapped.bytes(), ErrorKind::Model, "big-endian"),
        (Vec::new(), ErrorKind::Corrupted, "expected 4 bytes, 0 are left"),
        (sample().tensor("q", &[256], 23, &[0; 136]).bytes(), ErrorKind::Model, "IQ4_XS"),
        (
            sample().tensor("q", &[256], 77, &[0; 136]).bytes(),
            ErrorKind::Corrupted,
            "unknown storage type 77",
        ),
        (
            sample().tensor("q", &[33, 2], 8, &[0; 68]).bytes(),
            ErrorKind::Corrupted,
            "rows of 33 elements, expected a multiple of 32",
        ),
        (
            sample().tensor("q", &[1 << 40, 1 << 40], 0, &[]).bytes(),
            ErrorKind::Corrupted,
            "overflows",
        ),
        (
            sample().tensor("q", &[1 << 40], 0, &[0; 4]).bytes(),
            ErrorKind::Corrupted,
            "the file is cut short",
        ),
        (sample().tensor("q", &[4, 0], 0, &[]).bytes(), ErrorKind::Corrupted, "empty dimension"),
        (
            sample().tensor("q", &[1, 1, 1, 1, 1], 0, &[0; 4]).bytes(),
            ErrorKind::Corrupted,
            "5 dimensions, expected at most 4",
        ),
        (
            sample().tensor("norm", &[1], 0, &[0; 4]).bytes(),
            ErrorKind::Corrupted,
            "tensor \"norm\" appears twice",
        ),
        (
            sample().set("a.u8", Value::U8(1)).bytes(),
            ErrorKind::Corrupted,
            "key \"a.u8\" appears twice",
        ),
    ];
    for (bytes, kind, text) in cases {
        let error = parse(&bytes).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert!(error.to_string().contains("test.gguf"), "{error}");
    }
}

#[test]
fn huge_counts_are_refused_before_anything_is_allocated() {
    // Tensor count, metadata count, key length, array length: each 2^63 in a file of few bytes.
    let valid = Writer::default().strs("t", &["abc"]).bytes();
    for at in [8, 16, 24, 24 + 8 + 1 + 4 + 4, 24 + 8 + 1 + 4 + 4 + 8] {
        for huge in [1u64 << 63, u64::MAX, 1 << 33] {
            let mut bytes = valid.clone();
            bytes[at..at + 8].copy_from_slice(&huge.to_le_bytes());
            let error = parse(&bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupted, "{error}");
            assert!(error.to_string().contains("left"), "{error}");
        }
    }
}

#[test]
fn arrays_nested_without_end_are_refused() {
    let mut array = Array::U8(vec![1]);
    for _ in 0..100 {
        array = Array::Nested(vec![array]);
    }
    let error = parse(&Writer::default().set("deep", Value::Array(array)).bytes()).unwrap_err();
    assert!(error.to_string().contains("nest deeper than 4"), "{error}");
}

#[test]
fn every_cut_of_a_valid_file_is_an_error() {
    let bytes = sample().bytes();
    for length in 0..bytes.len() {
        let error = parse(&bytes[..length]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupted, "cut at {length}: {error}");
    }
}

/// Whatever was accepted must lie inside the bytes.
fn check_in_bounds(bytes: &[u8]) {
    if let Ok(gguf) = parse(bytes) {
        for (name, tensor) in &gguf.tensors {
            assert!(tensor.range.start <= tensor.range.end, "{name}");
            assert!(tensor.range.end <= bytes.len(), "{name}");
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        check_in_bounds(&bytes);
    }

    #[test]
    fn random_bytes_after_a_valid_start_never_panic(
        version in 2u32..4, counts in (0u64..4, 0u64..4),
        rest in proptest::collection::vec(any::<u8>(), 0..512),
    ) {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(counts.0.to_le_bytes());
        bytes.extend(counts.1.to_le_bytes());
        bytes.extend(rest);
        check_in_bounds(&bytes);
    }

    #[test]
    fn flipped_bytes_of_a_valid_file_never_panic(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..6),
    ) {
        let mut bytes = sample().bytes();
        for (at, mask) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= mask;
        }
        check_in_bounds(&bytes);
    }

    #[test]
    fn swapped_stretches_of_a_valid_file_never_panic(
        from in any::<prop::sample::Index>(), to in any::<prop::sample::Index>(),
        length in 1usize..16,
    ) {
        let mut bytes = sample().bytes();
        let (from, to) = (from.index(bytes.len() - 16), to.index(bytes.len() - 16));
        let stretch = bytes[from..from + length].to_vec();
        bytes[to..to + length].copy_from_slice(&stretch);
        check_in_bounds(&bytes);
    }
}
