//! The vector index alone, for vectors without text: rows in memory, numbered by the caller's order.
//! Knows no scope, text or file.

use std::ops::Range;
use std::sync::Arc;

use super::bits::Bits;
use super::build;
use super::dots::{dot_fast, prefetch};
use super::index::Index;
use super::normalize;
use crate::{Error, ErrorKind, Result};

/// Rows asked for ahead of the one that is ranked: memory answers in about the time that three dot products take.
const PREFETCH_AHEAD: usize = 3;

/// A set of rows that a search is confined to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowSet(Bits);

impl FromIterator<u32> for RowSet {
    fn from_iter<I: IntoIterator<Item = u32>>(rows: I) -> Self {
        Self(rows.into_iter().map(|row| row as usize).collect())
    }
}

/// Nearest vectors by cosine: one-bit codes scanned with SIMD, ranked exactly; a graph once there are many.
///
/// This is the index inside a [`Store`](crate::Store), for whoever has vectors and no text.
///
/// ```
/// use mka_memory::VectorIndex;
///
/// # fn main() -> mka_memory::Result<()> {
/// let mut index = VectorIndex::new(3)?;
/// index.add(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0])?; // two rows
/// let nearest = index.search(&[0.9, 0.1, 0.0], 1, None)?;
/// assert_eq!(nearest[0].0, 0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct VectorIndex {
    dim: usize,
    threads: usize,
    index: Index,
    /// `(rows, dim)`, of unit length.
    rows: Vec<f32>,
}

impl VectorIndex {
    /// An empty index of vectors of `dim` numbers.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 or more than 65,536 dimensions.
    pub fn new(dim: usize) -> Result<Self> {
        if dim == 0 || dim > super::MAX_DIM {
            return Err(Error::invalid(format!(
                "index: expected 1 to {} dimensions, got {dim}",
                super::MAX_DIM
            )));
        }
        Ok(Self { dim, threads: 1, index: Index::new(dim), rows: Vec::new() })
    }

    /// How many threads a large scan and a build may use; 1 at first.
    pub fn set_threads(&mut self, threads: usize) {
        self.threads = threads.max(1);
    }

    /// Number of rows that were added and not removed.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether nothing is left to find.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of rows that searches find by the graph.
    pub fn num_in_graph(&self) -> usize {
        self.index.num_sealed()
    }

    /// Adds `vectors: (n, dim)`, scaled to unit length; returns the numbers of their rows.
    ///
    /// # Errors
    /// `InvalidArgument` if the numbers do not make whole rows, or one is not finite.
    pub fn add(&mut self, vectors: &[f32]) -> Result<Range<u32>> {
        self.check(vectors)?;
        let first = (self.rows.len() / self.dim) as u32;
        for vector in vectors.chunks_exact(self.dim) {
            let start = self.rows.len();
            self.rows.extend_from_slice(vector);
            normalize(&mut self.rows[start..]);
            self.index.append(&self.rows[start..]);
        }
        Ok(first..(self.rows.len() / self.dim) as u32)
    }

    /// Takes a row out of all searches; its number is not given again.
    pub fn remove(&mut self, row: u32) {
        self.index.remove(row);
    }

    /// The `k` rows closest to `query: (dim)` of those in `allowed`, with their cosines, closest first.
    ///
    /// # Errors
    /// `InvalidArgument` if the query is not one row of finite numbers.
    pub fn search(
        &self,
        query: &[f32],
        k: usize,
        allowed: Option<&RowSet>,
    ) -> Result<Vec<(u32, f32)>> {
        self.check(query)?;
        if query.len() != self.dim {
            return Err(Error::invalid(format!(
                "search: expected {} numbers, got {}",
                self.dim,
                query.len()
            )));
        }
        let mut query = query.to_vec();
        normalize(&mut query);
        let allowed = allowed.map(|set| &set.0);
        let candidates = self.index.candidates(&query, k, allowed, self.threads);
        let mut found = Vec::with_capacity(candidates.len());
        for (at, &row) in candidates.iter().enumerate() {
            if let Some(&later) = candidates.get(at + PREFETCH_AHEAD) {
                prefetch(self.row(later));
            }
            found.push((row, dot_fast(&query, self.row(row))));
        }
        found.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        found.truncate(k);
        Ok(found)
    }

    /// Builds a graph over all rows: from then on searches walk it, and those with a filter where that is shorter.
    ///
    /// # Errors
    /// `Storage` if too few rows of the graph found themselves: the index goes on scanning.
    ///
    /// # Cost
    /// About a millisecond of one core a row.
    pub fn build_graph(&mut self) -> Result<()> {
        let Some(job) = self.index.start_build(0) else { return Ok(()) };
        let padded = self.index.padded();
        let mut bytes = vec![0; job.rows.len() * padded];
        for (&row, out) in job.rows.iter().zip(bytes.chunks_exact_mut(padded)) {
            self.index.quantize(self.row(row), out);
        }
        match build::build(bytes, padded, self.threads, &|| true) {
            Ok(graph) => {
                self.index.seal(Arc::new(graph), job.rows);
                Ok(())
            }
            Err(why) => {
                self.index.give_up();
                Err(Error::new(
                    ErrorKind::Storage,
                    format!("index: the graph was not built: {why:?}"),
                ))
            }
        }
    }

    fn row(&self, row: u32) -> &[f32] {
        &self.rows[row as usize * self.dim..][..self.dim]
    }

    fn check(&self, numbers: &[f32]) -> Result<()> {
        if !numbers.len().is_multiple_of(self.dim) {
            return Err(Error::invalid(format!(
                "index: expected whole rows of {} numbers, got {} numbers",
                self.dim,
                numbers.len()
            )));
        }
        if numbers.iter().any(|number| !number.is_finite()) {
            return Err(Error::invalid("index: expected finite numbers"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::dot;

    const DIM: usize = 96;

    /// Rows around 40 centres.
    fn rows(num: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let mut rows = Vec::with_capacity(num * DIM);
        for number in 0..num {
            let centre = |at: usize| ((number % 40 * DIM + at) as f32 * 12.9898).sin() * 0.6;
            let start = rows.len();
            rows.extend((0..DIM).map(|at| centre(at) + next() * 1.5));
            normalize(&mut rows[start..]);
        }
        rows
    }

    /// The share of the exact ten nearest that the index finds.
    fn recall(index: &VectorIndex, keep: impl Fn(u32) -> bool, allowed: Option<&RowSet>) -> f64 {
        let queries = rows(60, 77);
        let mut found = 0;
        let mut wanted = 0;
        for query in queries.chunks_exact(DIM) {
            let nearest = index.search(query, 10, allowed).unwrap();
            assert!(nearest.iter().all(|(row, _)| keep(*row)));
            assert!(nearest.windows(2).all(|pair| pair[0].1 >= pair[1].1));
            let num_rows = (index.rows.len() / DIM) as u32;
            let mut exact: Vec<u32> = (0..num_rows).filter(|&row| keep(row)).collect();
            exact.sort_by(|&a, &b| dot(index.row(b), query).total_cmp(&dot(index.row(a), query)));
            exact.truncate(10);
            wanted += exact.len();
            found +=
                exact.iter().filter(|row| nearest.iter().any(|(other, _)| other == *row)).count();
        }
        found as f64 / wanted as f64
    }

    fn at_least(least: f64, recall: f64) {
        assert!(recall >= least, "expected a recall of {least}, got {recall}");
    }

    #[test]
    fn scan_and_graph_find_the_nearest_of_what_is_left_and_allowed() {
        let mut index = VectorIndex::new(DIM).unwrap();
        index.set_threads(2);
        assert_eq!(index.add(&rows(3_000, 5)).unwrap(), 0..3_000);
        let thirds = |row: u32| row.is_multiple_of(3);
        let few = |row: u32| row.is_multiple_of(100);
        for with_graph in [false, true] {
            if with_graph {
                index.build_graph().unwrap();
                // Nothing is due any more.
                index.build_graph().unwrap();
            }
            assert_eq!(index.num_in_graph() > 0, with_graph);
            at_least(0.93, recall(&index, |_| true, None));
            let set: RowSet = (0..3_000).filter(|&row| thirds(row)).collect();
            at_least(0.93, recall(&index, thirds, Some(&set)));
            let set: RowSet = (0..3_000).filter(|&row| few(row)).collect();
            assert_eq!(recall(&index, few, Some(&set)), 1.0);
            assert!(recall(&index, |_| false, Some(&RowSet::default())).is_nan());
            // More than there is: all of it, and room for no more.
            for k in [3_000, usize::MAX / 4, usize::MAX] {
                assert_eq!(index.search(&[1.0; DIM], k, None).unwrap().len(), 3_000);
                assert_eq!(index.search(&[1.0; DIM], k, Some(&set)).unwrap().len(), 30);
            }
        }
        // Removed rows are passed over by the walk, new ones are scanned beside it.
        let gone = |row: u32| row % 10 == 7;
        (0..3_000).filter(|&row| gone(row)).for_each(|row| index.remove(row));
        index.remove(7);
        assert_eq!(index.add(&rows(300, 9)).unwrap(), 3_000..3_300);
        assert_eq!((index.len(), index.num_in_graph()), (3_000, 2_700));
        at_least(0.93, recall(&index, |row| row >= 3_000 || !gone(row), None));
        (0..600).for_each(|row| index.remove(row));
        index.build_graph().unwrap();
        assert_eq!(index.num_in_graph(), index.len());
        let left = |row: u32| row >= 3_000 || (row >= 600 && !gone(row));
        at_least(0.93, recall(&index, left, None));
    }

    #[test]
    fn a_filter_finds_the_nearest_in_a_graph_wherever_its_rows_lie() {
        let mut index = VectorIndex::new(DIM).unwrap();
        let all = rows(8_000, 5);
        index.add(&all).unwrap();
        index.build_graph().unwrap();
        // Rows that come and go beside the graph are seen as well.
        index.add(&rows(400, 21)).unwrap();
        (0..8_400).step_by(9).for_each(|row| index.remove(row));
        let is_there = |row: u32| !row.is_multiple_of(9);
        // Spread, in a row, around few of the 40 centres, around one.
        let spread = |row: u32| is_there(row) && row * 7919 % 8_009 % 10 < 3;
        let early = |row: u32| is_there(row) && row < 2_000;
        let few = |row: u32| is_there(row) && row % 40 < 8;
        let one = |row: u32| is_there(row) && row % 40 == 11;
        let late = |row: u32| is_there(row) && row >= 8_000;
        let filters: [&dyn Fn(u32) -> bool; 5] = [&spread, &early, &few, &one, &late];
        for keep in filters {
            let set: RowSet = (0..8_400).filter(|&row| keep(row)).collect();
            at_least(0.93, recall(&index, keep, Some(&set)));
        }
    }

    #[test]
    fn what_is_not_a_row_is_refused() {
        assert!(VectorIndex::new(0).is_err() && VectorIndex::new(1 << 20).is_err());
        let mut index = VectorIndex::new(3).unwrap();
        assert!(index.add(&[1.0, 2.0]).is_err() && index.add(&[f32::NAN; 3]).is_err());
        assert!(index.is_empty() && index.search(&[1.0; 3], 5, None).unwrap().is_empty());
        index.add(&[0.0; 3]).unwrap();
        assert!(index.search(&[1.0; 6], 1, None).is_err() && index.search(&[], 1, None).is_err());
        assert_eq!(index.search(&[1.0; 3], 5, None).unwrap(), [(0, 0.0)]);
        assert!(index.search(&[1.0; 3], 0, None).unwrap().is_empty());
    }
}
