//! A graph in use: the rows that its positions stand for, and the ways to the closest of those that a search may see.
//! Knows no row outside the graph: those are the scan's.

use std::sync::{Arc, OnceLock};

use super::bits::Bits;
use super::codes::Codes;
use super::graph::Graph;
use super::scan::Level;
use super::signs::{Planes, Signs};

/// No position: the row is not in the graph.
const NOWHERE: u32 = u32::MAX;

/// A graph, and which rows its positions are.
#[derive(Debug)]
pub(super) struct Sealed {
    pub(super) graph: Arc<Graph>,
    /// Row of each position; beyond all rows where there is none.
    pub(super) rows: Vec<u32>,
    /// Position of each row.
    positions: Vec<u32>,
    /// For each 64 rows the position of the first, where all of them stand in order.
    straight: Vec<u32>,
    /// Positions whose row is gone.
    pub(super) num_dead: usize,
    /// Codes by position, made when a filter first needs them.
    signs: OnceLock<Signs>,
}

impl Sealed {
    /// A graph whose positions are these rows, of which those below `capacity` exist.
    pub(super) fn new(graph: Arc<Graph>, rows: Vec<u32>, capacity: usize, num_dead: usize) -> Self {
        let mut positions = vec![NOWHERE; capacity];
        for (position, &row) in rows.iter().enumerate() {
            if let Some(known) = positions.get_mut(row as usize) {
                *known = position as u32;
            }
        }
        let straight = |rows: &[u32]| {
            let first = rows[0];
            let in_order = |(at, &position): (usize, &u32)| {
                position != NOWHERE && u64::from(position) == u64::from(first) + at as u64
            };
            let whole = rows.len() == 64 && rows.iter().enumerate().all(in_order);
            if whole { first } else { NOWHERE }
        };
        let straight = positions.chunks(64).map(straight).collect();
        Self { graph, rows, positions, straight, num_dead, signs: OnceLock::new() }
    }

    /// The positions of these rows, so far as they have one.
    pub(super) fn positions_of(&self, rows: &Bits) -> Bits {
        let mut positions = Bits::none(self.rows.len());
        for (at, (&word, &first)) in rows.words().iter().zip(&self.straight).enumerate() {
            if word == 0 {
                continue;
            }
            if first != NOWHERE {
                positions.insert_word(first as usize, word);
                continue;
            }
            let mut left = word;
            while left != 0 {
                let row = at * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                if let Some(&position) = self.positions.get(row).filter(|it| **it != NOWHERE) {
                    positions.insert(position as usize);
                }
            }
        }
        positions
    }

    /// About the `want` of `positions` closest to a query: the best `num_ranked` by one bit a number, ranked by bytes.
    pub(super) fn closest(
        &self,
        codes: &Codes,
        (rotated, words): (&[f32], &[i16]),
        positions: &Bits,
        (num_ranked, want): (usize, usize),
    ) -> Vec<u32> {
        let mut found = positions.to_vec();
        if found.len() > num_ranked {
            let signs = self.signs.get_or_init(|| Signs::new(codes, self.graph.padded, &self.rows));
            let best = signs.best(Level::best(), &Planes::new(rotated), &found, num_ranked);
            found = best.into_iter().map(|(_, position)| position).collect();
        }
        let closest = self.graph.closest(words, &found, want);
        closest.into_iter().map(|position| self.rows[position as usize]).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vectors::graph::Idle;

    fn graph(len: usize) -> Arc<Graph> {
        let (bytes, links) = (vec![0i8; len * 64].into(), vec![u32::MAX; len].into());
        let (upper, idle) = (Vec::new(), Idle::default());
        Arc::new(Graph { padded: 64, width: 1, entry: 0, bytes, links, upper, idle })
    }

    proptest! {
        /// Rows in order with gaps, some of them gone, a few out of order, and those of a filter.
        #[test]
        fn positions_are_those_that_the_rows_have(
            gaps in prop::collection::btree_set(0u32..700, 0..4),
            gone in prop::collection::btree_set(0usize..600, 0..3),
            swapped in prop::collection::vec((0usize..600, 0usize..600), 0..2),
            wanted in prop::collection::btree_set(0usize..900, 0..300),
            capacity in 500usize..800,
        ) {
            let mut rows: Vec<u32> = (0..700).filter(|row| !gaps.contains(row)).collect();
            swapped.iter().for_each(|&(a, b)| rows.swap(a, b));
            gone.iter().for_each(|&at| rows[at] = u32::MAX);
            let sealed = Sealed::new(graph(rows.len()), rows.clone(), capacity, 0);
            let wanted: Bits = wanted.into_iter().collect();
            let expected: Bits = rows
                .iter()
                .enumerate()
                .filter(|(_, row)| (**row as usize) < capacity && wanted.contains(**row as usize))
                .map(|(position, _)| position)
                .collect();
            let positions = sealed.positions_of(&wanted);
            prop_assert_eq!(positions.iter().collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
        }
    }
}
