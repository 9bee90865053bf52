//! The bytes of a graph's file: head, names, rows, links; checked whole before anything in it is believed.
//! Knows no file: it takes bytes and gives bytes.
//!
//! ```text
//! magic "mka-gra\n" 8 | version u32 | dim u32 | embedder u64 | partition u64 | padded u32 | width u32 | entry u32
//! | layers u32 | positions u64 | members u64 of each layer | length of the file u64 | hash of all that follows u64
//! | hash of all that precedes u64
//! ```
//!
//! Then, each from the next multiple of 64 bytes on, so that a mapped file can be used where it lies:
//! names `(positions, id u128, which u32)`, rows `(positions, padded) i8`, links `(positions, width) u32`,
//! and for each layer its members `u32` and links `(members, width) u32`.

use std::io;

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use super::fields::{Reader, put_u32, put_u64};
use crate::partition::VectorName;
use crate::vectors::{Column, Graph, Held, Idle, Layer};
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"mka-gra\n";
const VERSION: u32 = 1;
/// Every section starts at a multiple of this: a cache line.
const ALIGN: usize = 64;
/// Fields before the members of layers, and after them.
const FIXED_BYTES: usize = 56;
const HASHES_BYTES: usize = 24;
/// hnsw_rs has no more.
const MAX_LAYERS: usize = 16;
const NAME_BYTES: usize = 20;

/// What must be the same for a file of the index to be of use: whose vectors, by what embedder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IndexHead {
    pub(super) dim: u32,
    pub(super) embedder: u64,
    /// Names the file, too.
    pub(crate) partition: u64,
}

impl IndexHead {
    pub(crate) fn new(
        seed: u64,
        embedder: &str,
        dim: u32,
        user: &str,
        agent: Option<&str>,
    ) -> Self {
        let mut names = user.as_bytes().to_vec();
        // No name has this byte: it is not UTF-8.
        names.push(0xff);
        names.extend(agent.iter().flat_map(|agent| agent.bytes().chain([0xff])));
        Self {
            dim,
            embedder: xxh3_64_with_seed(embedder.as_bytes(), seed),
            partition: xxh3_64_with_seed(&names, seed),
        }
    }
}

/// A graph read back.
#[derive(Debug)]
pub(crate) struct GraphFile {
    pub(crate) graph: Graph,
    /// The chunk and the number of its vector at each position; none where the row was gone.
    pub(crate) names: Vec<VectorName>,
}

impl GraphFile {
    /// Gives the bytes of a file to `out`, piece by piece. Positions without a name leave no byte of their row.
    pub(crate) fn write(
        head: &IndexHead,
        graph: &Graph,
        names: &[VectorName],
        out: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut hash = Xxh3::new();
        let mut len = 0u64;
        sections(graph, names, &mut |bytes| {
            hash.update(bytes);
            len += bytes.len() as u64;
            Ok(())
        })?;
        let mut fixed = Vec::new();
        fixed.extend_from_slice(&MAGIC);
        put_u32(&mut fixed, VERSION);
        put_u32(&mut fixed, head.dim);
        put_u64(&mut fixed, head.embedder);
        put_u64(&mut fixed, head.partition);
        put_u32(&mut fixed, graph.padded as u32);
        put_u32(&mut fixed, graph.width as u32);
        put_u32(&mut fixed, graph.entry);
        put_u32(&mut fixed, graph.upper.len() as u32);
        put_u64(&mut fixed, graph.len() as u64);
        graph.upper.iter().for_each(|layer| put_u64(&mut fixed, layer.members.len() as u64));
        let head_len = (fixed.len() + HASHES_BYTES).next_multiple_of(ALIGN);
        put_u64(&mut fixed, head_len as u64 + len);
        put_u64(&mut fixed, hash.digest());
        let own = xxh3_64(&fixed);
        put_u64(&mut fixed, own);
        fixed.resize(head_len, 0);
        out(&fixed)?;
        sections(graph, names, out)
    }

    /// Reads the bytes of a file where they lie.
    ///
    /// # Errors
    /// `Corrupted` if a byte is not what was written, or the file is of another version, store, partition or embedder.
    pub(crate) fn read(held: &Held, expected: &IndexHead) -> Result<Self> {
        let bytes = held.as_ref().as_ref();
        let mut reader = Reader::new(bytes, "graph");
        if reader.array()? != MAGIC || reader.u32()? != VERSION {
            return Err(Error::corrupted("graph: expected its magic and version, got other bytes"));
        }
        let dim = reader.u32()?;
        let head = IndexHead { dim, embedder: reader.u64()?, partition: reader.u64()? };
        let (padded, width) = (reader.u32()? as usize, reader.u32()? as usize);
        let (entry, num_layers) = (reader.u32()?, reader.u32()? as usize);
        let num_rows = reader.u64()?;
        if num_layers > MAX_LAYERS {
            return Err(Error::corrupted(format!(
                "graph: expected at most 16 layers, got {num_layers}"
            )));
        }
        let members: Vec<u64> = (0..num_layers).map(|_| reader.u64()).collect::<Result<_>>()?;
        let fixed = FIXED_BYTES + 8 * num_layers;
        let (len, body_hash) = (reader.u64()?, reader.u64()?);
        if xxh3_64(&bytes[..fixed + 16]) != reader.u64()? {
            return Err(Error::corrupted("graph: checksum of the head does not match"));
        }
        let start = (fixed + HASHES_BYTES).next_multiple_of(ALIGN);
        let is_whole = len == bytes.len() as u64
            && bytes.len() >= start
            && bytes[fixed + HASHES_BYTES..start].iter().all(|&byte| byte == 0);
        if !is_whole || xxh3_64(&bytes[start..]) != body_hash {
            return Err(Error::corrupted("graph: checksum does not match"));
        }
        if head != *expected || padded != (dim as usize).next_multiple_of(64) {
            return Err(Error::corrupted("graph: it is over other vectors"));
        }
        let mut sections = Sections { held, at: start };
        let num_rows = usize::try_from(num_rows).unwrap_or(usize::MAX);
        let names: Column<i8> = sections.next(num_rows, NAME_BYTES)?;
        let rows = sections.next(num_rows, padded)?;
        let links = sections.next(num_rows, width)?;
        let mut upper = Vec::with_capacity(num_layers);
        for num_members in members {
            let num_members = usize::try_from(num_members).unwrap_or(usize::MAX);
            let members = sections.next(num_members, 1)?;
            upper.push(Layer { members, links: sections.next(num_members, width)? });
        }
        let graph =
            Graph { padded, width, entry, bytes: rows, links, upper, idle: Idle::default() };
        if !graph.is_sound() {
            return Err(Error::corrupted("graph: a link points nowhere"));
        }
        Ok(Self { graph, names: names.chunks_exact(NAME_BYTES).map(name).collect() })
    }
}

/// A name of 20 bytes; none if all are zero, which no chunk's identity is in practice, and if one is, only its row is lost.
fn name(bytes: &[i8]) -> VectorName {
    let byte = |at: usize| bytes[at] as u8;
    let id = u128::from_le_bytes(std::array::from_fn(byte));
    let which = u32::from_le_bytes(std::array::from_fn(|at| byte(16 + at)));
    (id != 0).then_some((id, which))
}

/// Walks the sections of a file that is known to be whole.
struct Sections<'a> {
    held: &'a Held,
    at: usize,
}

impl Sections<'_> {
    fn next<T: crate::vectors::Plain>(&mut self, rows: usize, each: usize) -> Result<Column<T>> {
        let ends = || Error::corrupted("graph: it ends before its sections do");
        let len = rows.checked_mul(each).ok_or_else(ends)?;
        let column = Column::within(self.held, self.at, len).ok_or_else(ends)?;
        self.at = (self.at + len * size_of::<T>()).next_multiple_of(ALIGN);
        Ok(column)
    }
}

/// Gives every section, padded, to `out`.
fn sections(
    graph: &Graph,
    names: &[VectorName],
    out: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer: Vec<u8> = Vec::new();
    for batch in names.chunks(4096) {
        buffer.clear();
        for name in batch {
            let (id, which) = name.unwrap_or_default();
            buffer.extend_from_slice(&id.to_le_bytes());
            put_u32(&mut buffer, which);
        }
        out(&buffer)?;
    }
    pad(names.len() * NAME_BYTES, out)?;
    for (at, name) in names.iter().enumerate() {
        buffer.clear();
        match name {
            Some(_) => buffer.extend(graph.row(at as u32).iter().map(|&byte| byte as u8)),
            None => buffer.resize(graph.padded, 0),
        }
        out(&buffer)?;
    }
    pad(names.len() * graph.padded, out)?;
    let mut numbers = |numbers: &[u32]| -> io::Result<()> {
        for batch in numbers.chunks(4096) {
            buffer.clear();
            batch.iter().for_each(|&number| put_u32(&mut buffer, number));
            out(&buffer)?;
        }
        pad(numbers.len() * 4, out)
    };
    numbers(&graph.links)?;
    for layer in &graph.upper {
        numbers(&layer.members)?;
        numbers(&layer.links)?;
    }
    Ok(())
}

fn pad(len: usize, out: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    out(&[0; ALIGN][..len.next_multiple_of(ALIGN) - len])
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::vectors::build;

    pub(crate) fn sample() -> (IndexHead, Vec<u8>) {
        let rows: Vec<i8> = (0..200 * 64).map(|at: i32| ((at * at) % 251 - 125) as i8).collect();
        let graph = build(rows, 64, 1, &|| true).unwrap();
        let names: Vec<VectorName> =
            (0..200).map(|at| (at % 7 != 0).then_some((at + 1, at as u32))).collect();
        let head = IndexHead::new(7, "test", 50, "ada", None);
        let mut bytes = Vec::new();
        GraphFile::write(&head, &graph, &names, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })
        .unwrap();
        let read = GraphFile::read(&(Arc::new(bytes.clone()) as Held), &head).unwrap();
        assert_eq!(read.names, names);
        assert_eq!((&read.graph.links[..], read.graph.entry), (&graph.links[..], graph.entry));
        assert_eq!(read.graph.row(1), graph.row(1));
        assert!(read.graph.row(7).iter().all(|&byte| byte == 0), "a row without a name is written");
        assert_eq!(read.graph.upper.len(), graph.upper.len());
        (head, bytes)
    }

    /// Makes the length and the checksums right again, whatever the numbers between them say.
    pub(crate) fn reseal(bytes: &mut [u8]) {
        let Some(num_layers) = bytes.get(44..48) else { return };
        let num_layers = u32::from_le_bytes(num_layers.try_into().unwrap()) as usize;
        let end = FIXED_BYTES + 8 * num_layers.min(MAX_LAYERS) + 16;
        let start = (end + 8).next_multiple_of(ALIGN);
        if bytes.len() < start {
            return;
        }
        let len = (bytes.len() as u64).to_le_bytes();
        bytes[end - 16..end - 8].copy_from_slice(&len);
        let body = xxh3_64(&bytes[start..]).to_le_bytes();
        bytes[end - 8..end].copy_from_slice(&body);
        let head = xxh3_64(&bytes[..end]).to_le_bytes();
        bytes[end..end + 8].copy_from_slice(&head);
        bytes[end + 8..start].fill(0);
    }

    #[test]
    fn a_graph_reads_back_and_every_damaged_byte_is_refused() {
        let (head, bytes) = sample();
        let refused = |bytes: Vec<u8>| {
            let held: Held = Arc::new(bytes);
            assert!(GraphFile::read(&held, &head).is_err());
        };
        for at in (0..bytes.len()).step_by(97).chain(0..160) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            refused(damaged);
        }
        for len in (0..bytes.len()).step_by(501) {
            refused(bytes[..len].to_vec());
        }
        let mut longer = bytes.clone();
        longer.push(0);
        refused(longer);
        let held: Held = Arc::new(bytes);
        for other in [
            IndexHead::new(7, "test", 50, "ada", Some("bot")),
            IndexHead::new(7, "other", 50, "ada", None),
            IndexHead::new(8, "test", 50, "ada", None),
            IndexHead::new(7, "test", 51, "ada", None),
        ] {
            assert!(GraphFile::read(&held, &other).is_err());
        }
    }

    proptest! {
        #[test]
        fn reading_any_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400), magic in any::<bool>()) {
            let head = IndexHead::new(7, "test", 50, "ada", None);
            let mut all = if magic { MAGIC.iter().copied().chain(VERSION.to_le_bytes()).collect() } else { Vec::new() };
            all.extend(bytes);
            let held: Held = Arc::new(all);
            prop_assert!(GraphFile::read(&held, &head).is_err());
        }
    }

    #[test]
    fn a_file_with_right_checksums_and_wrong_numbers_is_refused() {
        let (head, bytes) = sample();
        // The entry and the width, with checksums made good again: what a careless writer would leave.
        for (at, value) in [(36usize, 0u32), (36, 5_000), (40, 200), (48, 1 << 30)] {
            let mut changed = bytes.clone();
            changed[at..at + 4].copy_from_slice(&value.to_le_bytes());
            reseal(&mut changed);
            let held: Held = Arc::new(changed);
            assert!(GraphFile::read(&held, &head).is_err(), "{at} {value}");
        }
    }
}
