//! The bytes of an image: what recall searches of one user and agent, as it was at some moment, checked before use.
//! Knows no file: it takes bytes and gives bytes.
//!
//! ```text
//! magic "mka-img\n" 8 | version u32 | dim u32 | embedder u64 | partition u64 | capacity u64 | turns u64 | slots u64
//! | terms u64 | where the words begin u64 | length of the file u64 | hash of all that follows u64
//! | hash of all that precedes u64
//! | turn | turn | ... | slot | slot | ... | codes | factors f32 x rows | term | term | ...
//! ```
//!
//! What each of them holds is in docs/format.md. An image names the records of the log that it was made from by their
//! hashes: a turn whose records have others is read from the log.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64;

use super::fields::{Reader, put_bytes, put_u32, put_u64};
use super::vectors::IndexHead;
use super::{BlobRef, ChunkSpan};
use crate::vectors::{BLOCK, Bits, Codes};
use crate::words::Postings;
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"mka-img\n";
/// Raised where gists or words are made otherwise, too: an earlier image would then give what the log does not.
const VERSION: u32 = 2;
const HEAD_BYTES: usize = 96;
/// Slots and rows have numbers of 32 bits.
const MAX_ROWS: u64 = u32::MAX as u64;

/// A chunk of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ImageSpan {
    pub(crate) span: ChunkSpan,
    /// Whether the turn's record of chunks is the one that holds the chunk's vectors.
    pub(crate) holds: bool,
}

/// A turn of the log and its chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageTurn {
    /// Hashes of the records that hold its text and its chunks.
    pub(crate) body: u64,
    pub(crate) chunks: u64,
    pub(crate) spans: Vec<ImageSpan>,
}

impl ImageTurn {
    /// Whether it was made from these records.
    pub(crate) fn is_of(&self, body: &BlobRef, chunks: &BlobRef) -> bool {
        (self.body, self.chunks) == (body.hash, chunks.hash)
    }
}

/// A chunk, without its text and its vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageSlot {
    pub(crate) id: u128,
    /// Hash of what it says in other form, see `hygiene`; 0 if it says nothing.
    pub(crate) gist: u64,
    pub(crate) num_words: u32,
    /// The row of each of its vectors.
    pub(crate) rows: Box<[u32]>,
}

/// What an image holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Image {
    pub(crate) turns: HashMap<(u64, u64), ImageTurn>,
    /// None where a slot is free.
    pub(crate) slots: Vec<Option<ImageSlot>>,
    pub(crate) codes: Codes,
    /// Numbers of rows are below this.
    pub(crate) capacity: usize,
    pub(crate) postings: Postings,
}

impl Image {
    /// The bytes of an image. The codes of rows that no slot has are to be zeros.
    pub(crate) fn encode(
        head: &IndexHead,
        turns: &[((u64, u64), ImageTurn)],
        slots: &[Option<ImageSlot>],
        (codes, capacity): (&Codes, usize),
        postings: &Postings,
    ) -> Vec<u8> {
        let mut out = vec![0; HEAD_BYTES];
        turns.iter().for_each(|(turn, made)| put_turn(&mut out, *turn, made));
        slots.iter().for_each(|slot| put_slot(&mut out, slot.as_ref()));
        out.extend_from_slice(codes.bytes());
        codes.factors().iter().for_each(|factor| out.extend_from_slice(&factor.to_le_bytes()));
        let words_at = out.len();
        let mut terms: Vec<_> = postings.iter().collect();
        terms.sort_unstable_by_key(|(term, _)| *term);
        terms.iter().for_each(|(term, postings)| put_term(&mut out, term, postings));
        let mut fixed = Vec::with_capacity(HEAD_BYTES);
        fixed.extend_from_slice(&MAGIC);
        put_u32(&mut fixed, VERSION);
        put_u32(&mut fixed, head.dim);
        put_u64(&mut fixed, head.embedder);
        put_u64(&mut fixed, head.partition);
        let counts = [capacity, turns.len(), slots.len(), terms.len(), words_at, out.len()];
        counts.iter().for_each(|&count| put_u64(&mut fixed, count as u64));
        put_u64(&mut fixed, xxh3_64(&out[HEAD_BYTES..]));
        let own = xxh3_64(&fixed);
        put_u64(&mut fixed, own);
        out[..HEAD_BYTES].copy_from_slice(&fixed);
        out
    }

    /// Reads the bytes of an image.
    ///
    /// # Errors
    /// `Corrupted` if a byte is not what was written, a number points nowhere, or the image is of another version, store,
    /// partition or embedder.
    pub(crate) fn decode(bytes: &[u8], expected: &IndexHead) -> Result<Self> {
        let mut reader = Reader::new(bytes, "image");
        if reader.array()? != MAGIC || reader.u32()? != VERSION {
            return Err(refused("expected its magic and version, got other bytes"));
        }
        let dim = reader.u32()?;
        let head = IndexHead { dim, embedder: reader.u64()?, partition: reader.u64()? };
        let [capacity, num_turns, num_slots, num_terms, words_at, len] = numbers(&mut reader)?;
        let body_hash = reader.u64()?;
        if reader.u64()? != xxh3_64(&bytes[..HEAD_BYTES - 8]) {
            return Err(refused("checksum of the head does not match"));
        }
        if len != bytes.len() as u64 || xxh3_64(&bytes[HEAD_BYTES..]) != body_hash {
            return Err(refused("checksum does not match"));
        }
        if head != *expected {
            return Err(refused("it is of other vectors"));
        }
        if capacity > MAX_ROWS || num_slots > MAX_ROWS {
            return Err(refused("more slots or rows than there are numbers"));
        }
        let words_at = usize::try_from(words_at).ok().filter(|at| *at >= HEAD_BYTES);
        let words = words_at.and_then(|at| Some((bytes.get(HEAD_BYTES..at)?, bytes.get(at..)?)));
        let (body, words) = words.ok_or_else(|| refused("its words begin outside of it"))?;
        let mut reader = Reader::new(body, "image");
        let mut image = Self { capacity: capacity as usize, ..Self::default() };
        for _ in 0..num_turns {
            let (turn, made) = turn(&mut reader)?;
            image.turns.insert(turn, made);
        }
        let mut is_taken = Bits::none(0);
        for _ in 0..num_slots {
            let slot = slot(&mut reader)?;
            for &row in slot.iter().flat_map(|slot| slot.rows.iter()) {
                let row = row as usize;
                // The codes, read next, show whether there are as many rows as that.
                if row >= image.capacity || row / 8 > bytes.len() || is_taken.contains(row) {
                    return Err(refused("a row is none, or another slot's"));
                }
                is_taken.grow(row + 1);
                is_taken.insert(row);
            }
            image.slots.push(slot);
        }
        let padded = (dim as usize).next_multiple_of(64);
        let num_rows = image.capacity.next_multiple_of(BLOCK);
        let codes = reader.take((padded / 8).saturating_mul(num_rows))?.to_vec();
        let factors = reader.numbers(num_rows, f32::from_le_bytes)?;
        image.codes = Codes::from_parts(padded, codes, factors)
            .ok_or_else(|| refused("codes of another size"))?;
        reader.finish()?;
        let used = image.slots.iter().enumerate().filter(|(_, slot)| slot.is_some());
        let mut used: Bits = used.map(|(number, _)| number).collect();
        used.grow(image.slots.len());
        image.postings = postings(words, num_terms, &used)?;
        Ok(image)
    }
}

fn refused(why: &str) -> Error {
    Error::corrupted(format!("image: {why}"))
}

fn numbers<const N: usize>(reader: &mut Reader<'_>) -> Result<[u64; N]> {
    let mut numbers = [0; N];
    for number in &mut numbers {
        *number = reader.u64()?;
    }
    Ok(numbers)
}

fn put_turn(out: &mut Vec<u8>, (session, turn): (u64, u64), made: &ImageTurn) {
    [session, turn, made.body, made.chunks].iter().for_each(|&number| put_u64(out, number));
    put_u32(out, made.spans.len() as u32);
    for ImageSpan { span, holds } in &made.spans {
        out.extend_from_slice(&span.id.to_le_bytes());
        put_u64(out, span.start);
        put_u64(out, span.end);
        out.extend([u8::from(span.near), u8::from(*holds)]);
    }
}

fn turn(reader: &mut Reader<'_>) -> Result<((u64, u64), ImageTurn)> {
    let [session, turn, body, chunks] = numbers(reader)?;
    let num_spans = reader.u32()?;
    let mut spans = Vec::new();
    for _ in 0..num_spans {
        let span = ChunkSpan {
            id: u128::from_le_bytes(reader.array()?),
            start: reader.u64()?,
            end: reader.u64()?,
            near: reader.flag()?,
        };
        spans.push(ImageSpan { span, holds: reader.flag()? });
    }
    Ok(((session, turn), ImageTurn { body, chunks, spans }))
}

fn put_slot(out: &mut Vec<u8>, slot: Option<&ImageSlot>) {
    out.push(u8::from(slot.is_some()));
    let Some(slot) = slot else { return };
    out.extend_from_slice(&slot.id.to_le_bytes());
    put_u64(out, slot.gist);
    put_u32(out, slot.num_words);
    put_u32(out, slot.rows.len() as u32);
    slot.rows.iter().for_each(|&row| put_u32(out, row));
}

fn slot(reader: &mut Reader<'_>) -> Result<Option<ImageSlot>> {
    if !reader.flag()? {
        return Ok(None);
    }
    let id = u128::from_le_bytes(reader.array()?);
    let gist = reader.u64()?;
    let (num_words, num_rows) = (reader.u32()?, reader.u32()? as usize);
    let rows = reader.numbers(num_rows, u32::from_le_bytes)?.into();
    Ok(Some(ImageSlot { id, gist, num_words, rows }))
}

/// A term: its text, how many slots hold it, and for each the gap to the one before it. The lowest bit of a gap says
/// that the term stands there more than once, and then how often follows, less two.
fn put_term(out: &mut Vec<u8>, term: &str, postings: &[(u32, u32)]) {
    put_bytes(out, term.as_bytes());
    put_u32(out, postings.len() as u32);
    let mut sorted;
    let mut ascending = postings;
    // Slots that are given again come out of order.
    if !postings.is_sorted() {
        sorted = postings.to_vec();
        sorted.sort_unstable();
        ascending = &sorted;
    }
    let mut last = 0;
    for &(slot, count) in ascending {
        put_varint(out, u64::from(slot - last) << 1 | u64::from(count > 1));
        if count > 1 {
            put_varint(out, u64::from(count - 2));
        }
        last = slot;
    }
}

fn postings(bytes: &[u8], num_terms: u64, used: &Bits) -> Result<Postings> {
    let mut reader = Reader::new(bytes, "words of an image");
    let mut all = Postings::default();
    for _ in 0..num_terms {
        let term = reader.text()?;
        let num = reader.u32()? as usize;
        // A posting takes a byte at least.
        if num == 0 || num > reader.left() {
            return Err(refused("a term with more slots than there are bytes, or none"));
        }
        let mut postings = Vec::with_capacity(num);
        let mut last = 0u64;
        for at in 0..num {
            let number = reader.varint()?;
            let gap = number >> 1;
            last = last.saturating_add(gap);
            if !used.contains(last as usize) || (gap == 0 && at > 0) {
                return Err(refused("a term stands in a slot that is none"));
            }
            let count = if number & 1 == 1 { reader.varint()?.saturating_add(2) } else { 1 };
            let count = u32::try_from(count).map_err(|_| refused("a count beyond all numbers"))?;
            postings.push((last as u32, count));
        }
        if all.insert(term.into(), postings).is_some() {
            return Err(refused("a term stands there twice"));
        }
    }
    reader.finish()?;
    Ok(all)
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn sample() -> (IndexHead, Vec<u8>) {
        let head = IndexHead::new(7, "test", 50, "ada", None);
        let image = image();
        (head, bytes(&head, &image))
    }

    fn bytes(head: &IndexHead, image: &Image) -> Vec<u8> {
        let mut turns: Vec<_> = image.turns.clone().into_iter().collect();
        turns.sort_by_key(|(turn, _)| *turn);
        let codes = (&image.codes, image.capacity);
        Image::encode(head, &turns, &image.slots, codes, &image.postings)
    }

    fn image() -> Image {
        let slot =
            |id, rows: &[u32]| Some(ImageSlot { id, gist: 9, num_words: 12, rows: rows.into() });
        let span = |id, near| {
            let span = ChunkSpan { id, start: 3, end: 90, near };
            ImageSpan { span, holds: !near }
        };
        let turn = |spans| ImageTurn { body: 11, chunks: 12, spans };
        let turns = [
            ((1, 0), turn(vec![span(5, false), span(6, true)])),
            ((1, 1), turn(vec![])),
            ((2, 7), turn(vec![span(u128::MAX, false)])),
        ];
        let mut codes = Codes::new(64);
        for row in [0, 1, 2, 33] {
            codes.set(row, &[0.125; 64]);
        }
        let postings = [
            ("badger", vec![(0, 1), (2, 3)]),
            ("honey", vec![(300, 1)]),
            ("x", vec![(0, 200), (2, 1), (300, 2)]),
        ];
        let mut slots = vec![None; 301];
        slots[0] = slot(5, &[1, 0]);
        slots[2] = slot(u128::MAX, &[33]);
        slots[300] = slot(7, &[]);
        Image {
            turns: turns.into(),
            slots,
            codes,
            capacity: 35,
            postings: postings.map(|(term, slots)| (term.into(), slots)).into_iter().collect(),
        }
    }

    /// Makes the length and the checksums right again, whatever the numbers between them say.
    pub(crate) fn reseal(bytes: &mut [u8]) {
        if bytes.len() < HEAD_BYTES {
            return;
        }
        let len = (bytes.len() as u64).to_le_bytes();
        bytes[HEAD_BYTES - 24..HEAD_BYTES - 16].copy_from_slice(&len);
        let body = xxh3_64(&bytes[HEAD_BYTES..]).to_le_bytes();
        bytes[HEAD_BYTES - 16..HEAD_BYTES - 8].copy_from_slice(&body);
        let head = xxh3_64(&bytes[..HEAD_BYTES - 8]).to_le_bytes();
        bytes[HEAD_BYTES - 8..HEAD_BYTES].copy_from_slice(&head);
    }

    #[test]
    fn an_image_reads_back_and_every_damaged_byte_is_refused() {
        let (head, bytes) = sample();
        assert_eq!(Image::decode(&bytes, &head).unwrap(), image());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(Image::decode(&damaged, &head).is_err(), "{at}");
            assert!(Image::decode(&bytes[..at], &head).is_err(), "{at}");
        }
        let mut earlier = bytes.clone();
        earlier[MAGIC.len()..][..4].copy_from_slice(&(VERSION - 1).to_le_bytes());
        reseal(&mut earlier);
        assert!(Image::decode(&earlier, &head).is_err());
        for other in [
            IndexHead::new(7, "test", 50, "ada", Some("bot")),
            IndexHead::new(7, "other", 50, "ada", None),
            IndexHead::new(8, "test", 50, "ada", None),
            IndexHead::new(7, "test", 51, "ada", None),
        ] {
            assert!(Image::decode(&bytes, &other).is_err());
        }
    }

    #[test]
    fn an_image_whose_numbers_point_nowhere_is_refused_behind_right_checksums() {
        let head = IndexHead::new(7, "test", 50, "ada", None);
        let refused = |change: fn(&mut Image)| {
            let mut image = image();
            change(&mut image);
            assert!(Image::decode(&bytes(&head, &image), &head).is_err());
        };
        refused(|image| image.slots[0].iter_mut().for_each(|slot| slot.rows = [1, 33].into()));
        refused(|image| image.slots[0].iter_mut().for_each(|slot| slot.rows = [1, 1].into()));
        refused(|image| image.slots[0].iter_mut().for_each(|slot| slot.rows = [35].into()));
        refused(|image| image.slots[2] = None);
        refused(|image| image.slots.truncate(300));
        refused(|image| image.capacity = 65);
        refused(|image| image.codes = Codes::new(64));
        refused(|image| drop(image.postings.insert("y".into(), vec![])));
        refused(|image| drop(image.postings.insert("y".into(), vec![(0, 1), (0, 1)])));
    }

    proptest! {
        #[test]
        fn postings_read_back_in_any_order(
            slots in prop::collection::btree_map(0u32..100_000, 1u32..5_000, 1..60),
            rotate in 0usize..60,
        ) {
            let mut held: Vec<(u32, u32)> = slots.into_iter().collect();
            let used: Bits = held.iter().map(|(slot, _)| *slot as usize).collect();
            let expected = held.clone();
            let by = rotate % held.len();
            held.rotate_left(by);
            let mut out = Vec::new();
            put_term(&mut out, "term", &held);
            let read = postings(&out, 1, &used).unwrap();
            prop_assert_eq!(&read["term"], &expected);
        }
    }
}
