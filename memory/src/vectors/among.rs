//! The closest of some of a graph's positions: each of them looked at, or a walk that passes through the others.
//! Knows nothing of rows or filters; the positions are a set of bits.

use super::bits::Bits;
use super::dots::{dot_words, prefetch};
use super::graph::{Front, Graph};
use super::scan::Best;

/// Positions asked for ahead of the one that is looked at.
const PREFETCH_AHEAD: usize = 4;
/// New positions that a walk asks for at each step: with 32 it took half as long again and found no more.
const ENOUGH: usize = 16;
/// The share of positions around a query that a walk needs: among fewer it loses its way, and where there are none at all
/// the closest lie elsewhere, on all sides.
const LEAST_SHARE: f64 = 0.03;

impl Graph {
    /// About the `want` of `positions` closest to a query, by a look at each.
    pub(crate) fn closest(&self, words: &[i16], positions: &[u32], want: usize) -> Vec<u32> {
        let mut best = Best::new(want);
        for (at, &position) in positions.iter().enumerate() {
            if let Some(&later) = positions.get(at + PREFETCH_AHEAD) {
                prefetch(self.row(later));
            }
            best.push(dot_words(words, self.row(position)) as f32, position);
        }
        best.into_sorted().into_iter().map(|(_, position)| position).collect()
    }

    /// About the `ef` positions of `among` closest to a query, closest first; none if those around the query are too few
    /// for the walk to be sure of them.
    ///
    /// The walk keeps and goes on from positions of `among` alone. In place of a neighbour that is not one of them it
    /// looks at that one's neighbours, until there are enough (ACORN-1, Patel et al., arXiv 2403.04871, section 5.3).
    pub(crate) fn search_among(&self, words: &[i16], ef: usize, among: &Bits) -> Option<Vec<u32>> {
        let ef = ef.min(self.len());
        let start = self.descend(words);
        if self.share_around(start, among) < LEAST_SHARE {
            return None;
        }
        let mut visited = self.idle.take(self.len());
        let mut front = Front::new(ef);
        let first = (dot_words(words, self.row(start)), start);
        visited.enter(start);
        if among.contains(start as usize) {
            front.offer(first);
        } else {
            front.visit(first);
        }
        let (mut fresh, mut others) =
            (Vec::with_capacity(2 * ENOUGH), Vec::with_capacity(self.width));
        while let Some(position) = front.next() {
            fresh.clear();
            others.clear();
            for next in self.neighbours(&self.links, position as usize) {
                if !among.contains(next as usize) {
                    prefetch(self.list(next));
                    others.push(next);
                    continue;
                }
                if visited.enter(next) {
                    prefetch(self.row(next));
                    fresh.push(next);
                }
            }
            for &other in &others {
                if fresh.len() >= ENOUGH {
                    break;
                }
                // A list is not read twice.
                if !visited.enter(other) {
                    continue;
                }
                for next in self.neighbours(&self.links, other as usize) {
                    if !among.contains(next as usize) {
                        continue;
                    }
                    if visited.enter(next) {
                        prefetch(self.row(next));
                        fresh.push(next);
                    }
                }
            }
            for &next in &fresh {
                front.offer((dot_words(words, self.row(next)), next));
            }
        }
        self.idle.give(visited);
        let found = front.into_sorted();
        // A walk that found no more than this has not come to where the others are.
        let is_sure = found.len() >= ef;
        is_sure.then(|| found.into_iter().map(|(_, position)| position).collect())
    }

    /// The share of `among` in the neighbours of a position's neighbours.
    fn share_around(&self, position: u32, among: &Bits) -> f64 {
        let (mut num_seen, mut num_among) = (0usize, 0usize);
        for near in self.neighbours(&self.links, position as usize) {
            for next in self.neighbours(&self.links, near as usize) {
                num_seen += 1;
                num_among += usize::from(among.contains(next as usize));
            }
        }
        num_among as f64 / num_seen.max(1) as f64
    }
}
