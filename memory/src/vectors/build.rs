//! Building a graph: hnsw_rs inserts the rows, the layers are packed, every position made reachable, the whole tested.
//! Knows nothing of files or stores; it can be told to stop.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use hnsw_rs::anndists::dist::Distance;
use hnsw_rs::hnsw::Hnsw;

use super::column::Column;
use super::dots::{byte_scale, dot_bytes};
use super::graph::{Graph, Idle, Layer, NONE};

/// Neighbours of a position in an upper layer; twice as many in the base layer. With 8, some rows of hnsw_rs's graphs
/// cannot be reached at all; 16 is the usual choice.
pub(crate) const NEIGHBOURS: usize = 16;
/// Candidates looked at for the neighbours of a new row.
pub(crate) const EF_CONSTRUCTION: usize = 128;
/// Room in each list for links that make unreachable rows reachable.
const SPARE: usize = 4;
/// Layers that hnsw_rs may use: its own limit.
const MAX_LAYERS: usize = 16;
/// Rows inserted between two looks at whether to stop.
const BATCH: usize = 256;
/// Rows that look for themselves after a build.
const SELF_TESTS: usize = 1_000;
/// The share of them that must find themselves.
const SELF_RECALL: f64 = 0.99;
/// Candidates of such a search.
const SELF_TEST_EF: usize = 64;

/// Why there is no graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotBuilt {
    /// It was told to stop.
    Stopped,
    /// hnsw_rs panicked, or too few rows found themselves.
    Failed,
}

/// What hnsw_rs keeps of a row is its position; the rows are here.
struct Rows<'a> {
    bytes: &'a [i8],
    padded: usize,
    unit: f32,
}

impl Distance<u32> for Rows<'_> {
    fn eval(&self, a: &[u32], b: &[u32]) -> f32 {
        let row = |at: &[u32]| &self.bytes[at[0] as usize * self.padded..][..self.padded];
        // Rounding may take the cosine above 1, and hnsw_rs asserts that no distance is negative.
        (1.0 - dot_bytes(row(a), row(b)) as f32 * self.unit).max(0.0)
    }
}

/// A graph over `bytes: (rows, padded)`, built on `threads` threads; `keep_going` is asked every 256 rows.
pub(crate) fn build(
    bytes: Vec<i8>,
    padded: usize,
    threads: usize,
    keep_going: &(dyn Fn() -> bool + Sync),
) -> Result<Graph, NotBuilt> {
    let packed = catch_unwind(AssertUnwindSafe(|| insert_all(&bytes, padded, threads, keep_going)));
    let (entry, links, upper) = packed.map_err(|_| NotBuilt::Failed)??;
    let bytes = Column::from(bytes);
    let width = 2 * NEIGHBOURS + SPARE;
    let links = Column::from(links);
    let mut graph = Graph { padded, width, entry, bytes, links, upper, idle: Idle::default() };
    if !graph.is_sound() {
        return Err(NotBuilt::Failed);
    }
    reach_all(&mut graph, keep_going)?;
    if self_recall(&graph) < SELF_RECALL {
        return Err(NotBuilt::Failed);
    }
    Ok(graph)
}

type Packed = (u32, Vec<u32>, Vec<Layer>);

fn insert_all(
    bytes: &[i8],
    padded: usize,
    threads: usize,
    keep_going: &(dyn Fn() -> bool + Sync),
) -> Result<Packed, NotBuilt> {
    let num_rows = bytes.len() / padded;
    let scale = byte_scale(padded);
    let rows = Rows { bytes, padded, unit: 1.0 / (scale * scale) };
    let hnsw = Hnsw::<u32, Rows<'_>>::new(NEIGHBOURS, num_rows, MAX_LAYERS, EF_CONSTRUCTION, rows);
    // The first rows go in one after another: rows that go in at once do not see each other.
    let alone = num_rows.min(4 * BATCH);
    let next = AtomicUsize::new(alone);
    let insert = |position: usize| hnsw.insert_slice((&[position as u32], position));
    (0..alone).for_each(insert);
    std::thread::scope(|scope| {
        let work = || {
            loop {
                let start = next.fetch_add(BATCH, Ordering::Relaxed);
                if start >= num_rows || !keep_going() {
                    return;
                }
                (start..(start + BATCH).min(num_rows)).for_each(insert);
            }
        };
        let others: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
        work();
        // A panic in another thread is one of hnsw_rs: the caller catches it.
        others.into_iter().for_each(|other| {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    });
    if num_rows == 0 || !keep_going() {
        return Err(NotBuilt::Stopped);
    }
    Ok(pack(&hnsw, num_rows))
}

/// The layers as flat lists of positions.
fn pack(hnsw: &Hnsw<'_, u32, Rows<'_>>, num_rows: usize) -> Packed {
    let width = 2 * NEIGHBOURS + SPARE;
    let points = hnsw.get_point_indexation();
    let mut links = vec![NONE; num_rows * width];
    let mut upper: Vec<Vec<(u32, Vec<u32>)>> = Vec::new();
    let mut entry = (0, 0);
    for top in 0..MAX_LAYERS {
        if points.get_layer_nb_point(top) == 0 {
            continue;
        }
        for point in points.get_layer_iterator(top) {
            let position = point.get_origin_id() as u32;
            entry = entry.max((top, position));
            let layers = point.get_neighborhood_id();
            // hnsw_rs keeps lists above a point's own layer, too, as aids of building.
            for (layer, neighbours) in layers.iter().enumerate().take(top + 1) {
                let neighbours = neighbours.iter().map(|neighbour| neighbour.d_id as u32);
                let neighbours = neighbours.filter(|&other| other != position);
                if layer == 0 {
                    let list = &mut links[position as usize * width..][..2 * NEIGHBOURS];
                    list.iter_mut().zip(neighbours).for_each(|(link, other)| *link = other);
                } else {
                    upper.resize_with(upper.len().max(layer), Vec::new);
                    upper[layer - 1].push((position, neighbours.take(width).collect()));
                }
            }
        }
    }
    let layer = |mut members: Vec<(u32, Vec<u32>)>| {
        members.sort_unstable();
        let mut links = Vec::with_capacity(members.len() * width);
        for (_, neighbours) in &members {
            links.extend_from_slice(neighbours);
            links.resize(links.len().next_multiple_of(width), NONE);
            if neighbours.is_empty() {
                links.resize(links.len() + width, NONE);
            }
        }
        let members: Vec<u32> = members.into_iter().map(|(position, _)| position).collect();
        Layer { members: members.into(), links: links.into() }
    };
    (entry.1, links, upper.into_iter().map(layer).collect())
}

/// Links every position that no walk from the entry comes to from the closest position that one does come to.
/// hnsw_rs drops the farthest neighbour of a full list, whatever hangs on it.
fn reach_all(graph: &mut Graph, keep_going: &dyn Fn() -> bool) -> Result<(), NotBuilt> {
    let mut reached = vec![false; graph.len()];
    flood(graph, graph.entry, &mut reached);
    for position in 0..graph.len() as u32 {
        if reached[position as usize] {
            continue;
        }
        if !keep_going() {
            return Err(NotBuilt::Stopped);
        }
        let words: Vec<i16> = graph.row(position).iter().map(|&byte| i16::from(byte)).collect();
        let near = graph.search(&words, SELF_TEST_EF);
        let width = graph.width;
        let Column::Owned(links) = &mut graph.links else { return Err(NotBuilt::Failed) };
        for (_, other) in near {
            let list = &mut links[other as usize * width..][..width];
            if let Some(free) = list.iter_mut().find(|link| **link == NONE) {
                *free = position;
                flood(graph, position, &mut reached);
                break;
            }
        }
    }
    Ok(())
}

/// Marks what can be reached from `start`.
fn flood(graph: &Graph, start: u32, reached: &mut [bool]) {
    let mut open = vec![start];
    reached[start as usize] = true;
    while let Some(position) = open.pop() {
        for &next in &graph.links[position as usize * graph.width..][..graph.width] {
            if next != NONE && !std::mem::replace(&mut reached[next as usize], true) {
                open.push(next);
            }
        }
    }
}

/// The share of rows, evenly picked, whose search for themselves finds them or an equal row.
fn self_recall(graph: &Graph) -> f64 {
    let num_tests = graph.len().min(SELF_TESTS);
    let found = (0..num_tests).filter(|test| {
        let position = (test * graph.len() / num_tests) as u32;
        let row = graph.row(position);
        let words: Vec<i16> = row.iter().map(|&byte| i16::from(byte)).collect();
        let near = graph.search(&words, SELF_TEST_EF);
        near.iter().any(|&(_, other)| other == position || graph.row(other) == row)
    });
    found.count() as f64 / num_tests.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::Bits;
    use crate::vectors::dots::{dot_words, to_bytes, to_words};
    use crate::vectors::rotation::Rotation;
    use crate::vectors::{dot, normalize};

    /// Rows around centres, as sentence vectors lie.
    fn clustered(num_rows: usize, dim: usize, seed: u64) -> Vec<Vec<f32>> {
        let mut state = seed | 1;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let centres: Vec<Vec<f32>> = (0..20).map(|_| (0..dim).map(|_| next()).collect()).collect();
        let row = |number: usize| {
            let mut row: Vec<f32> = centres[number % 20].iter().map(|x| x + next() * 1.2).collect();
            normalize(&mut row);
            row
        };
        (0..num_rows).map(row).collect()
    }

    fn bytes_of(rows: &[Vec<f32>]) -> (Rotation, Vec<i8>) {
        let rotation = Rotation::new(rows[0].len(), 1);
        let mut bytes = vec![0; rows.len() * rotation.padded()];
        let mut rotated = vec![0.0; rotation.padded()];
        for (row, out) in rows.iter().zip(bytes.chunks_exact_mut(rotation.padded())) {
            rotation.apply(row, &mut rotated);
            to_bytes(&rotated, out);
        }
        (rotation, bytes)
    }

    #[test]
    fn a_walk_finds_the_nearest_rows() {
        let rows = clustered(3_000, 64, 3);
        let (rotation, bytes) = bytes_of(&rows);
        for threads in [1, 2] {
            let graph = build(bytes.clone(), rotation.padded(), threads, &|| true).unwrap();
            assert_eq!((graph.len(), graph.is_sound()), (3_000, true));
            let mut rotated = vec![0.0; rotation.padded()];
            let mut hits = 0;
            for query in clustered(50, 64, 99).iter().chain(&rows[..50]) {
                rotation.apply(query, &mut rotated);
                let (words, _) = to_words(&rotated);
                let found = graph.search(&words, 80);
                assert!(found.windows(2).all(|pair| pair[0].0 >= pair[1].0));
                let mut exact: Vec<usize> = (0..rows.len()).collect();
                exact.sort_by(|&a, &b| dot(&rows[b], query).total_cmp(&dot(&rows[a], query)));
                let near =
                    |at: &&usize| found.iter().any(|(_, position)| *position as usize == **at);
                hits += exact[..10].iter().filter(near).count();
            }
            assert!(hits >= 970, "{hits} of 1000, {threads} threads");
        }
    }

    #[test]
    fn a_walk_among_some_rows_finds_the_nearest_of_them_or_says_that_it_cannot() {
        let rows = clustered(6_000, 64, 3);
        let (rotation, bytes) = bytes_of(&rows);
        let graph = build(bytes, rotation.padded(), 2, &|| true).unwrap();
        let mut rotated = vec![0.0; rotation.padded()];
        let tenths: Bits = (0..rows.len()).filter(|row| row * 7919 % 6_007 % 10 == 0).collect();
        let halves: Bits = (0..rows.len()).filter(|row| row * 7919 % 6_007 % 2 == 0).collect();
        // Rows 0, 20, 40 and so on are around one centre: those of half of all centres, and those of one.
        let topics: Bits = (0..rows.len()).filter(|row| row % 20 < 10).collect();
        let topic: Bits = (0..rows.len()).filter(|row| row % 20 == 3).collect();
        for (among, is_certain) in
            [(&tenths, true), (&halves, true), (&topics, false), (&topic, false)]
        {
            let (mut hits, mut wanted) = (0, 0);
            for query in &clustered(40, 64, 99) {
                rotation.apply(query, &mut rotated);
                let (words, _) = to_words(&rotated);
                let Some(found) = graph.search_among(&words, 120, among) else {
                    assert!(!is_certain);
                    continue;
                };
                assert!(found.iter().all(|&position| among.contains(position as usize)));
                let mut exact: Vec<usize> = among.iter().collect();
                exact.sort_by(|&a, &b| dot(&rows[b], query).total_cmp(&dot(&rows[a], query)));
                wanted += 10;
                hits += exact[..10].iter().filter(|&&at| found.contains(&(at as u32))).count();
            }
            assert!(hits * 100 >= wanted * 95, "{hits} of {wanted}");
        }
        let (words, _) = to_words(&rotated);
        assert_eq!(graph.search_among(&words, 80, &Bits::none(rows.len())), None);
        let few: Vec<u32> = vec![7, 11, 4_000];
        let closest = graph.closest(&words, &few, 2);
        let mut exact = few;
        let dots = |at: &u32| dot_words(&words, graph.row(*at));
        exact.sort_by_key(|at| std::cmp::Reverse(dots(at)));
        assert_eq!(closest, exact[..2]);
    }

    #[test]
    fn every_row_can_be_reached_even_among_copies() {
        let mut rows = clustered(600, 64, 5);
        let copy = rows[0].clone();
        rows.extend(std::iter::repeat_n(copy, 300));
        let (rotation, bytes) = bytes_of(&rows);
        let graph = build(bytes, rotation.padded(), 1, &|| true).unwrap();
        let mut reached = vec![false; graph.len()];
        flood(&graph, graph.entry, &mut reached);
        let lost = reached.iter().filter(|reached| !**reached).count();
        assert!(lost <= 9, "{lost} of 900 rows lost");
    }

    #[test]
    fn one_row_and_none_are_no_trouble_and_stopping_stops() {
        let (rotation, bytes) = bytes_of(&clustered(1, 64, 5));
        let graph = build(bytes, rotation.padded(), 1, &|| true).unwrap();
        assert_eq!(graph.search(&vec![1; rotation.padded()], 5).len(), 1);
        assert_eq!(build(Vec::new(), 64, 1, &|| true).err(), Some(NotBuilt::Stopped));
        let (rotation, bytes) = bytes_of(&clustered(3_000, 64, 5));
        assert_eq!(build(bytes, rotation.padded(), 2, &|| false).err(), Some(NotBuilt::Stopped));
    }
}
