//! A navigable graph over rows of bytes: the layers that hnsw_rs built, packed flat, and the walk through them.
//! Knows nothing of files; positions are the order in which rows were sealed.
//!
//! Walking the packed form instead of hnsw_rs's own (an allocation and two locks a neighbour) is what makes the graph
//! as fast as the C++ libraries; and what is written to disk is this form, whose every number is checked, so that no
//! damaged file ever reaches hnsw_rs's loader, which aborts the process on some.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Mutex, PoisonError};

use super::column::Column;
use super::dots::{dot_words, prefetch};

/// No neighbour: the rest of a list is empty.
pub(crate) const NONE: u32 = u32::MAX;

/// Base layer, upper layers, and the rows that distances are computed from.
#[derive(Debug)]
pub(crate) struct Graph {
    pub(crate) padded: usize,
    /// Neighbours that a list has room for.
    pub(crate) width: usize,
    /// Where every walk starts: a position of the topmost layer.
    pub(crate) entry: u32,
    /// `(positions, padded)`.
    pub(crate) bytes: Column<i8>,
    /// `(positions, width)`, ended by [`NONE`].
    pub(crate) links: Column<u32>,
    /// From the second layer up.
    pub(crate) upper: Vec<Layer>,
    /// Buffers of finished walks, for the next.
    pub(crate) idle: Idle,
}

/// A sparse layer above the base.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Positions in this layer, ascending.
    pub(crate) members: Column<u32>,
    /// `(members, width)`, ended by [`NONE`].
    pub(crate) links: Column<u32>,
}

/// Buffers at rest.
#[derive(Debug, Default)]
pub(crate) struct Idle(Mutex<Vec<Visited>>);

impl Idle {
    /// Buffers for a walk among `len` positions.
    pub(super) fn take(&self, len: usize) -> Visited {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut visited = idle.unwrap_or_default();
        visited.words.resize(len.div_ceil(64), 0);
        visited
    }

    /// The walk has ended.
    pub(super) fn give(&self, mut visited: Visited) {
        visited.clear();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(visited);
    }
}

/// Positions that a walk has seen.
#[derive(Debug, Default)]
pub(super) struct Visited {
    words: Vec<u64>,
    seen: Vec<u32>,
}

impl Visited {
    /// Whether the position is new; from now on it is not.
    #[inline(always)]
    pub(super) fn enter(&mut self, position: u32) -> bool {
        let (word, bit) = (position as usize / 64, 1u64 << (position % 64));
        let is_new = self.words[word] & bit == 0;
        if is_new {
            self.words[word] |= bit;
            self.seen.push(position);
        }
        is_new
    }

    fn clear(&mut self) {
        for position in self.seen.drain(..) {
            self.words[position as usize / 64] = 0;
        }
    }
}

impl Graph {
    /// Number of positions.
    pub(crate) fn len(&self) -> usize {
        self.links.len() / self.width.max(1)
    }

    /// Whether every number is in range: what [`search`](Self::search) relies on.
    pub(crate) fn is_sound(&self) -> bool {
        let len = self.len();
        let in_range =
            |links: &[u32]| links.iter().all(|&link| link == NONE || (link as usize) < len);
        self.width > 0
            && (self.entry as usize) < len
            && self.links.len() == len * self.width
            && self.bytes.len() == len * self.padded
            && in_range(&self.links)
            && self.upper.iter().all(|layer| {
                layer.links.len() == layer.members.len() * self.width
                    && layer.members.windows(2).all(|pair| pair[0] < pair[1])
                    && layer.members.last().is_none_or(|&last| (last as usize) < len)
                    && in_range(&layer.links)
            })
    }

    pub(crate) fn row(&self, position: u32) -> &[i8] {
        &self.bytes[position as usize * self.padded..][..self.padded]
    }

    /// The list of a position in the base layer.
    pub(super) fn list(&self, position: u32) -> &[u32] {
        &self.links[position as usize * self.width..][..self.width]
    }

    pub(super) fn neighbours<'a>(
        &self,
        links: &'a [u32],
        at: usize,
    ) -> impl Iterator<Item = u32> + 'a {
        links[at * self.width..][..self.width].iter().copied().take_while(|&link| link != NONE)
    }

    /// About the `ef` positions closest to a query, as its [words](super::dots::to_words), closest first.
    pub(crate) fn search(&self, words: &[i16], ef: usize) -> Vec<(i64, u32)> {
        self.search_from(words, ef, self.descend(words))
    }

    /// Walks down the upper layers, each to a position that no neighbour is closer than.
    pub(super) fn descend(&self, words: &[i16]) -> u32 {
        let mut at = self.entry;
        let mut closest = dot_words(words, self.row(at));
        for layer in self.upper.iter().rev() {
            while let Ok(member) = layer.members.binary_search(&at) {
                let before = at;
                for next in self.neighbours(&layer.links, member) {
                    let dot = dot_words(words, self.row(next));
                    if dot > closest {
                        (at, closest) = (next, dot);
                    }
                }
                if at == before {
                    break;
                }
            }
        }
        at
    }

    /// The best-first walk of the base layer (Malkov and Yashunin, arXiv 1603.09320, algorithm 2).
    fn search_from(&self, words: &[i16], ef: usize, start: u32) -> Vec<(i64, u32)> {
        let mut visited = self.idle.take(self.len());
        let mut front = Front::new(ef.min(self.len()));
        visited.enter(start);
        front.offer((dot_words(words, self.row(start)), start));
        let mut fresh = Vec::with_capacity(self.width);
        while let Some(position) = front.next() {
            fresh.clear();
            for next in self.neighbours(&self.links, position as usize) {
                if visited.enter(next) {
                    prefetch(self.row(next));
                    fresh.push(next);
                }
            }
            for &next in &fresh {
                front.offer((dot_words(words, self.row(next)), next));
            }
        }
        self.idle.give(visited);
        front.into_sorted()
    }
}

/// The positions that a walk has found, and those that it has yet to go on from.
pub(super) struct Front {
    ef: usize,
    found: BinaryHeap<Reverse<(i64, u32)>>,
    open: BinaryHeap<(i64, u32)>,
}

impl Front {
    /// Keeps the `ef` closest; `ef` is at least 1.
    pub(super) fn new(ef: usize) -> Self {
        let (found, open) = (BinaryHeap::with_capacity(ef + 1), BinaryHeap::with_capacity(ef + 1));
        Self { ef, found, open }
    }

    /// Takes a position in, with its closeness, if it is among the closest so far.
    #[inline(always)]
    pub(super) fn offer(&mut self, position: (i64, u32)) {
        let is_full = self.found.len() >= self.ef;
        if !is_full || self.found.peek().is_some_and(|worst| position.0 > worst.0.0) {
            self.open.push(position);
            self.found.push(Reverse(position));
            if is_full {
                self.found.pop();
            }
        }
    }

    /// Goes on from a position that is not to be found.
    pub(super) fn visit(&mut self, position: (i64, u32)) {
        self.open.push(position);
    }

    /// The position to go on from: the closest; none once all that are found are closer.
    pub(super) fn next(&mut self) -> Option<u32> {
        let (dot, position) = self.open.pop()?;
        let is_far =
            self.found.len() >= self.ef && self.found.peek().is_some_and(|worst| dot < worst.0.0);
        (!is_far).then_some(position)
    }

    /// What was found, closest first.
    pub(super) fn into_sorted(self) -> Vec<(i64, u32)> {
        let mut found: Vec<(i64, u32)> =
            self.found.into_iter().map(|Reverse(entry)| entry).collect();
        found.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        found
    }
}
