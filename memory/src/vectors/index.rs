//! Which rows are close to a query: a scan of codes, or a walk of the graph where there is one; with a filter the way
//! that is the shortest.
//! Knows rows by number only; whoever owns the vectors ranks what is found exactly.

use std::sync::Arc;

use super::bits::Bits;
use super::codes::{BLOCK, Codes, Tables};
use super::dots::{to_bytes, to_words};
use super::graph::Graph;
use super::rotation::Rotation;
use super::scan::{Level, Visible, scan};
use super::sealed::Sealed;

/// Seed of the rotation: any will do, as rows are not chosen by an adversary who gains by a bad estimate.
const ROTATION_SEED: u64 = 0x726f_7461_7465;
/// A graph that has lost this share of its rows is built anew.
const MAX_DEAD_SHARE: f64 = 0.2;
/// A graph that lacks this share of the rows is built anew: until then they are scanned.
const MAX_TAIL_SHARE: f64 = 0.25;
/// Candidates of a walk for each row wanted.
const WALK_CANDIDATES: usize = 4;
/// What finding rows of a filter takes, in about nanoseconds of one core of an AMD EPYC with AVX2 among 250,000 rows of
/// 384 numbers; only the ratios count. A look at one row's code:
const LOOK_NS: f64 = 100.0;
/// A scan of 32 rows side by side.
const BLOCK_NS: f64 = 160.0;
/// An exact dot product of a row that was scanned.
const RANK_NS: f64 = 400.0;
/// A walk, for each candidate that it keeps.
const WALK_NS: f64 = 6_000.0;
/// A walk among this share of the rows finds what it keeps; among fewer its steps lead past some.
const EASY_SHARE: f64 = 0.1;
/// What such a walk keeps, of the candidates of one among all rows.
const FILTERED_CANDIDATES: f64 = 0.6;

/// The rows to seal, taken out for a build that goes on beside searches and changes.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) rows: Vec<u32>,
}

/// Codes of rows, and a graph over the older of them.
#[derive(Debug)]
pub(crate) struct Index {
    rotation: Rotation,
    codes: Codes,
    live: Bits,
    num_live: usize,
    /// Rows that can be given again.
    free: Vec<u32>,
    sealed: Option<Sealed>,
    /// Rows of the graph, dead ones included.
    in_graph: Bits,
    /// Rows that live outside the graph.
    tail: Bits,
    /// A build is under way: no row number is given twice, or the graph would hold another vector for it.
    building: bool,
}

impl Index {
    /// No rows yet, of `dim` numbers each.
    pub(crate) fn new(dim: usize) -> Self {
        let rotation = Rotation::new(dim, ROTATION_SEED);
        Self {
            codes: Codes::new(rotation.padded()),
            rotation,
            live: Bits::default(),
            num_live: 0,
            free: Vec::new(),
            sealed: None,
            in_graph: Bits::default(),
            tail: Bits::default(),
            building: false,
        }
    }

    /// The rows `live` with their codes; numbers below `capacity` that do not live are free.
    pub(crate) fn restore(
        dim: usize,
        codes: Codes,
        capacity: usize,
        live: impl Iterator<Item = u32>,
    ) -> Self {
        let mut index = Self::new(dim);
        index.codes = codes;
        index.live = Bits::none(capacity);
        live.for_each(|row| index.live.insert(row as usize));
        index.num_live = index.live.count();
        index.tail = index.live.clone();
        let mut free = index.live.clone();
        free.not();
        index.free = free.iter().map(|row| row as u32).collect();
        index
    }

    /// The codes of all rows; those of numbers that do not live are zeros.
    pub(crate) fn codes(&self) -> &Codes {
        &self.codes
    }

    /// Number of rows that live.
    pub(crate) fn len(&self) -> usize {
        self.num_live
    }

    /// Numbers that rows have or had are below this.
    pub(crate) fn capacity(&self) -> usize {
        self.live.len()
    }

    /// Number of rows in the graph that live.
    pub(crate) fn num_sealed(&self) -> usize {
        self.sealed.as_ref().map_or(0, |sealed| sealed.rows.len() - sealed.num_dead)
    }

    /// Takes in a vector of unit length; returns the number of its row, which a removed one may have had.
    pub(crate) fn insert(&mut self, vector: &[f32]) -> u32 {
        let free = if self.building { None } else { self.free.pop() };
        self.put(free.unwrap_or(self.live.len() as u32), vector)
    }

    /// The same; the number is the next that no row ever had.
    pub(crate) fn append(&mut self, vector: &[f32]) -> u32 {
        self.put(self.live.len() as u32, vector)
    }

    fn put(&mut self, row: u32, vector: &[f32]) -> u32 {
        let mut rotated = vec![0.0; self.rotation.padded()];
        self.rotation.apply(vector, &mut rotated);
        let row = row as usize;
        self.codes.set(row, &rotated);
        for bits in [&mut self.live, &mut self.tail] {
            bits.grow(row + 1);
            bits.insert(row);
        }
        self.num_live += 1;
        row as u32
    }

    /// Takes a row out; its number may be given again.
    pub(crate) fn remove(&mut self, row: u32) {
        let at = row as usize;
        if !self.live.contains(at) {
            return;
        }
        self.live.remove(at);
        self.tail.remove(at);
        self.codes.clear(at);
        self.num_live -= 1;
        match &mut self.sealed {
            Some(sealed) if self.in_graph.contains(at) => sealed.num_dead += 1,
            _ if self.building => {}
            _ => self.free.push(row),
        }
    }

    /// The rows to rank exactly for the `want` closest to `query`, of those in `allowed`, in no order.
    pub(crate) fn candidates(
        &self,
        query: &[f32],
        want: usize,
        allowed: Option<&Bits>,
        threads: usize,
    ) -> Vec<u32> {
        let kept = allowed.map(|allowed| {
            let mut kept = self.live.clone();
            kept.and(allowed);
            kept
        });
        let kept = kept.as_ref().unwrap_or(&self.live);
        let num_kept = if allowed.is_some() { kept.count() } else { self.num_live };
        if want == 0 || num_kept == 0 {
            return Vec::new();
        }
        if num_kept <= want {
            return kept.to_vec();
        }
        let num_ranked = num_ranked(want, self.num_live, self.rotation.padded());
        if num_kept <= num_ranked && self.sealed.is_none() {
            return kept.to_vec();
        }
        let mut rotated = vec![0.0; self.rotation.padded()];
        self.rotation.apply(query, &mut rotated);
        let scanned = |live: &Bits| {
            let tables = Tables::new(&rotated);
            let visible = Visible { live, allowed };
            let blocks = 0..live.len().div_ceil(BLOCK).min(self.codes.num_blocks());
            let found =
                scan(Level::best(), &self.codes, &tables, visible, blocks, num_ranked, threads);
            found.into_iter().map(|(_, row)| row)
        };
        let Some(sealed) = &self.sealed else { return scanned(&self.live).collect() };
        let (words, _) = to_words(&rotated);
        let num_near = want * WALK_CANDIDATES;
        let dead = sealed.num_dead as f64 / sealed.rows.len() as f64;
        let mut rows = if allowed.is_none() || num_kept == self.num_live {
            let ef = num_walked(want, sealed.rows.len()) / (1.0 - dead).max(0.1);
            let found = sealed.graph.search(&words, ef.ceil() as usize);
            let found = found.into_iter().map(|(_, position)| sealed.rows[position as usize]);
            let living = found.filter(|&row| self.live.contains(row as usize));
            living.take(num_near).collect()
        } else {
            let positions = sealed.positions_of(kept);
            let num_in_graph = positions.count();
            let looks = num_in_graph as f64 * LOOK_NS;
            let scans = kept.num_blocks() as f64 * BLOCK_NS + num_ranked as f64 * RANK_NS;
            let share = num_in_graph as f64 / sealed.rows.len() as f64;
            let ef = num_walked(want, sealed.rows.len())
                * FILTERED_CANDIDATES
                * (EASY_SHARE / share).max(1.0);
            let ef = ef.max(num_near as f64);
            let walked = (looks.min(scans) > ef * WALK_NS)
                .then(|| sealed.graph.search_among(&words, ef.ceil() as usize, &positions));
            match walked.flatten() {
                Some(found) => {
                    let found = found.into_iter().map(|position| sealed.rows[position as usize]);
                    found.take(num_near).collect()
                }
                // The scan sees the rows outside the graph, too.
                None if scans < looks => return scanned(&self.live).collect(),
                None => sealed.closest(
                    &self.codes,
                    (&rotated, &words),
                    &positions,
                    (num_ranked, num_near),
                ),
            }
        };
        if self.num_live > self.num_sealed() {
            rows.extend(scanned(&self.tail));
        }
        rows
    }

    /// The rows to seal, if there are `graph_rows` of them and the graph is missing or no longer good.
    /// From now on until [`seal`](Self::seal) or [`give_up`](Self::give_up) a build is under way.
    pub(crate) fn start_build(&mut self, graph_rows: usize) -> Option<Job> {
        if !self.is_build_due(graph_rows) {
            return None;
        }
        self.building = true;
        Some(Job { rows: self.live.iter().map(|row| row as u32).collect() })
    }

    /// Whether [`start_build`](Self::start_build) would start one.
    pub(crate) fn is_build_due(&self, graph_rows: usize) -> bool {
        if self.building || self.num_live < graph_rows.max(1) {
            return false;
        }
        let Some(sealed) = &self.sealed else { return true };
        let num_sealed = sealed.rows.len();
        sealed.num_dead as f64 > MAX_DEAD_SHARE * num_sealed as f64
            || (self.num_live - self.num_sealed()) as f64 > MAX_TAIL_SHARE * num_sealed as f64
    }

    /// A row's vector as the graph keeps it, into `out: (padded)`.
    pub(crate) fn quantize(&self, vector: &[f32], out: &mut [i8]) {
        let mut rotated = vec![0.0; self.rotation.padded()];
        self.rotation.apply(vector, &mut rotated);
        to_bytes(&rotated, out);
    }

    /// Bytes of a quantised row.
    pub(crate) fn padded(&self) -> usize {
        self.rotation.padded()
    }

    /// Searches go through `graph` from now on; `rows` are its positions' rows, [`u32::MAX`] where there is none.
    /// Rows that died since they were taken out are dead in it.
    pub(crate) fn seal(&mut self, graph: Arc<Graph>, mut rows: Vec<u32>) {
        self.give_up();
        let capacity = self.live.len();
        self.in_graph = Bits::none(capacity);
        let mut num_dead = 0;
        for row in &mut rows {
            let at = *row as usize;
            // A position without a row points beyond all rows, where nothing lives.
            if at < capacity {
                self.in_graph.insert(at);
            }
            num_dead += usize::from(!self.live.contains(at));
        }
        self.sealed = Some(Sealed::new(graph, rows, capacity, num_dead));
        self.tail = self.live.clone();
        let mut outside = self.in_graph.clone();
        outside.not();
        self.tail.and(&outside);
        // Numbers that neither live nor stand in the graph are free.
        let mut used = self.live.clone();
        used.or(&self.in_graph);
        used.not();
        self.free = used.iter().map(|row| row as u32).collect();
    }

    /// The graph and the row of each of its positions.
    pub(crate) fn sealed(&self) -> Option<(&Arc<Graph>, &[u32])> {
        self.sealed.as_ref().map(|sealed| (&sealed.graph, &*sealed.rows))
    }

    /// Whether a build is under way.
    pub(crate) fn is_building(&self) -> bool {
        self.building
    }

    /// A build has ended without a graph.
    pub(crate) fn give_up(&mut self) {
        self.building = false;
    }
}

/// Candidates that a walk keeps for `want` of `num_rows` rows: 110 of 100,000 and 348 of a million find 0.96 and 0.97 of
/// the ten closest (vectors of MiniLM, `docs/index.md`), so they grow with the root of the rows.
fn num_walked(want: usize, num_rows: usize) -> f64 {
    let fewest = 110.0 * (num_rows as f64 / 100_000.0).sqrt();
    fewest.max(64.0).max((want * WALK_CANDIDATES) as f64)
}

/// How many rows a scan ranks exactly for `want` of them among `num_rows`: for ten of 1,000 rows 5 for each, and a little
/// more than twice as many with every tenfold of rows: 10, 21 and 43. On vectors of MiniLM recall_at_10 is 0.96 to 0.98
/// then at every size. With fewer bits than their 384 the estimate errs more, and so many more rows come between.
fn num_ranked(want: usize, num_rows: usize, bits: usize) -> usize {
    let decades = (num_rows.max(1_000) as f64 / 1_000.0).log10();
    let error = (384.0 / bits as f64).max(1.0);
    let beyond = (5.0 * 2.05f64.powf(decades) - 1.0) * error;
    // The more rows are wanted, the smaller the share of them that lies so close to the border as to be missed.
    let crowd = (10.0 / want as f64).sqrt().min(1.0);
    (want as f64 * (1.0 + beyond * crowd)).ceil() as usize
}
