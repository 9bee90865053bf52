//! The scan of the index: which landmarks or keys a query's heads ask for most, by all landmarks, by those that a coarser
//! look leaves, or by codes of all keys.
//! Knows the index of one layer; neither pages' bytes nor a budget.

#[cfg(test)]
mod tests;

use super::LandmarkScan;
use super::index::{HeadIndex, MARKS, SPAN};
use super::signs::{self, CENTRE_PAGES, Code, Planes};
use super::vote::{Ballot, Queries, Scored, Votes, vote_by_scores, within_reach};
use mka_kernels::key_codes::{CodeScorer, Rotation};
use mka_kernels::{PAGE_TOKENS, rows};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Stored pages up to which every landmark is scored: 524,288 tokens. Of half as many, two levels took longer than all
/// landmarks, `docs/recall.md`.
const FLAT_PAGES: usize = (1 << 19) / PAGE_TOKENS;
/// Landmarks that a coarser look leaves to be scored, for each that is taken: what less of them lose is in
/// `docs/recall.md`.
const LEFT_BY_MEANS: usize = 16;
const LEFT_BY_CODES: usize = 4;

/// What is asked for beside the queries.
#[derive(Clone, Copy)]
pub(super) struct Named<'a> {
    /// Marks that are taken in any case, ascending.
    pub(super) pinned: &'a [u32],
    /// By head, tokens that votes stand for, counted from the index's first, ascending, and these.
    pub(super) standing: &'a [Vec<(u32, f32)>],
}

/// What a choice takes of one layer's marks: landmarks, or keys where they are scored by their codes.
pub(super) struct Scan<'a> {
    /// The layer's index.
    pub(super) heads: &'a [HeadIndex],
    /// Pages at its front that can be chosen.
    pub(super) pages: usize,
    /// What is asked for beside the queries.
    pub(super) named: Named<'a>,
    /// Marks to take.
    pub(super) wanted: usize,
    /// Places around a key whose votes count for it; for a landmark, the landmarks within so many keys of it.
    pub(super) reach: usize,
    /// Of the landmarks' codes.
    pub(super) planes: &'a Planes,
    /// Of the keys' codes; None where there are none.
    pub(super) rotation: Option<&'a Rotation>,
}

/// What is taken of one head's marks.
pub(super) struct Taken {
    /// Ascending, as the mark's first key, counted from the index's first, over the keys of a mark; each with its votes.
    pub(super) marks: Vec<(u32, f32)>,
    /// For each query head of the group, the largest score and the sum of those that were not taken; empty where every
    /// mark was, None where it is not known.
    pub(super) missed: Option<Vec<(f32, f32)>>,
}

/// What is scored of one head's landmarks.
struct Looked {
    /// Landmarks, ascending, each outlier among them.
    marks: Vec<u32>,
    /// Pages whose other landmarks their mean stands for, ascending; None where nothing stands for what is not scored.
    means: Option<Vec<Shut>>,
}

/// A page of which not every landmark is scored.
#[derive(Clone, Copy)]
struct Shut {
    page: u32,
    /// The logarithm of how many its mean stands for.
    weight: f32,
}

/// Keys that a mark of `scan` stands for.
pub(super) fn span_of(scan: LandmarkScan) -> usize {
    if scan == LandmarkScan::KeyCodes { 1 } else { SPAN }
}

/// What `asked` means for a stream of so many pages, whose keys have codes or not.
pub(super) fn settled(asked: LandmarkScan, pages: usize, has_codes: bool) -> LandmarkScan {
    match asked {
        LandmarkScan::Auto | LandmarkScan::KeyCodes if has_codes => LandmarkScan::KeyCodes,
        LandmarkScan::Auto | LandmarkScan::KeyCodes if pages > FLAT_PAGES => LandmarkScan::TwoLevel,
        LandmarkScan::Auto | LandmarkScan::KeyCodes => LandmarkScan::Flat,
        asked => asked,
    }
}

/// Whether a card reads every key of so many pages before it chooses; else it scores landmarks first.
pub(super) fn reads_every_key(asked: LandmarkScan, pages: usize) -> bool {
    match asked {
        LandmarkScan::Auto => pages <= FLAT_PAGES,
        LandmarkScan::KeyCodes => true,
        LandmarkScan::Flat | LandmarkScan::TwoLevel | LandmarkScan::SignHash => false,
    }
}

/// The scan by which `settled` chooses among so many pages, of which `wanted` landmarks are taken: flat where a coarser
/// look would pass over none of them.
pub(super) fn scan_for(settled: LandmarkScan, pages: usize, wanted: usize) -> LandmarkScan {
    let passes_some = |left: usize| left * wanted < pages * MARKS;
    match settled {
        LandmarkScan::KeyCodes => LandmarkScan::KeyCodes,
        LandmarkScan::TwoLevel if passes_some(LEFT_BY_MEANS) => LandmarkScan::TwoLevel,
        LandmarkScan::SignHash if passes_some(LEFT_BY_CODES) && pages >= CENTRE_PAGES => {
            LandmarkScan::SignHash
        }
        _ => LandmarkScan::Flat,
    }
}

impl<'a> Scan<'a> {
    /// Of the first `pages` pages, without anything that is named or stands beside the votes.
    #[cfg(test)]
    pub(super) fn plain(
        heads: &'a [HeadIndex],
        (pages, wanted): (usize, usize),
        planes: &'a Planes,
        rotation: Option<&'a Rotation>,
    ) -> Self {
        const NONE: &[Vec<(u32, f32)>] = &[const { Vec::new() }; 8];
        let named = Named { pinned: &[], standing: &NONE[..heads.len()] };
        Self { heads, pages, named, wanted, reach: 0, planes, rotation }
    }
}

impl Scan<'_> {
    /// The marks of most votes of each head by `scan`, whose coarser look or codes the index must have.
    pub(super) fn take(
        &self,
        scan: LandmarkScan,
        queries: &Queries,
        ballot: &mut Ballot,
    ) -> Vec<Taken> {
        let num_marks = self.pages * PAGE_TOKENS / span_of(scan);
        if self.wanted >= num_marks {
            let marks: Vec<(u32, f32)> = (0..num_marks as u32).map(|mark| (mark, 1.0)).collect();
            let all = || Taken { marks: marks.clone(), missed: Some(Vec::new()) };
            return self.heads.iter().map(|_| all()).collect();
        }
        let looked = match (scan, self.rotation) {
            (LandmarkScan::KeyCodes, Some(rotation)) => {
                return self.by_key_codes(queries, rotation, ballot);
            }
            (LandmarkScan::TwoLevel, _) => self.by_page_means(queries, ballot),
            (LandmarkScan::SignHash, _) => self.by_signs(queries, ballot),
            _ => self.all(),
        };
        self.best(queries, &looked, ballot)
    }

    /// The keys of most votes where a score is what their codes tell of it.
    fn by_key_codes(
        &self,
        queries: &Queries,
        rotation: &Rotation,
        ballot: &mut Ballot,
    ) -> Vec<Taken> {
        let d = queries.d;
        let scorer = |rows| CodeScorer::new(&rotation.turned(rows), d);
        let scorers: Vec<Vec<CodeScorer>> = (0..self.heads.len())
            .into_par_iter()
            .map(|head| queries.slices(head).map(scorer).collect())
            .collect();
        let num_rows = vec![self.pages * PAGE_TOKENS; self.heads.len()];
        // Blocks of rows are whole pages.
        let votes = vote_by_scores(queries, &num_rows, ballot, |scored: Scored<'_>, _| {
            let (first, count) = (scored.first / PAGE_TOKENS, scored.len / PAGE_TOKENS);
            let codes = self.heads[scored.head].key_codes(first, count, d);
            let scorer = &scorers[scored.head][scored.slice];
            scorer.score(scored.queries, codes, scored.scores, scored.len);
        });
        let taken = votes.into_par_iter().zip(self.named.standing).map(|(votes, standing)| {
            let mut by_key = Cow::Borrowed(votes.rows);
            if self.reach > 0 {
                // A pinned key asks for no other.
                self.named.pinned.iter().for_each(|key| by_key.to_mut()[*key as usize] = 0.0);
                let mut pooled = vec![0.0; by_key.len()];
                rows::maximum_within(&by_key, self.reach, &mut pooled);
                by_key = pooled.into();
            }
            for (token, vote) in standing {
                let own = &mut by_key.to_mut()[*token as usize];
                *own = own.max(*vote);
            }
            self.named.pinned.iter().for_each(|key| by_key.to_mut()[*key as usize] = f32::INFINITY);
            self.largest(&votes, &by_key, queries, |key| key)
        });
        taken.collect()
    }

    fn all(&self) -> Vec<Looked> {
        let marks: Vec<u32> = (0..(self.pages * MARKS) as u32).collect();
        let looked = || Looked { marks: marks.clone(), means: Some(Vec::new()) };
        self.heads.iter().map(|_| looked()).collect()
    }

    /// Landmarks to either side of one that lie within reach of its keys.
    fn marks_within_reach(&self) -> usize {
        self.reach.div_ceil(SPAN)
    }

    /// `marks` and those within reach to either side.
    fn with_near(&self, marks: Range<u32>) -> Range<u32> {
        let near = self.marks_within_reach() as u32;
        marks.start.saturating_sub(near)..(marks.end + near).min((self.pages * MARKS) as u32)
    }

    /// The landmarks of the pages whose mean has most votes, and those within reach of them.
    fn by_page_means(&self, queries: &Queries, ballot: &mut Ballot) -> Vec<Looked> {
        let d = queries.d;
        let num_rows = vec![self.pages; self.heads.len()];
        let votes = vote_by_scores(queries, &num_rows, ballot, |mut scored: Scored<'_>, keys| {
            let means = self.heads[scored.head].page_means_bytes(scored.first, scored.len, d);
            scored.score_pieces(&[means], queries, keys);
        });
        let looked = votes.par_iter().enumerate().map(|(head, votes)| {
            let open = rows::largest(votes.rows, LEFT_BY_MEANS * self.wanted / MARKS);
            let marks = open.iter().flat_map(|page| {
                let first = page * MARKS as u32;
                self.with_near(first..first + MARKS as u32)
            });
            let marks = self.with_named(head, marks.collect());
            let mut left = vec![MARKS; self.pages];
            marks.iter().for_each(|mark| left[*mark as usize / MARKS] -= 1);
            let shut = (0..).zip(left).filter(|(_, left)| *left > 0);
            let means = shut.map(|(page, left)| Shut { page, weight: (left as f32).ln() });
            Looked { means: Some(means.collect()), marks }
        });
        looked.collect()
    }

    /// The landmarks of most votes where a score is what lengths and codes tell of it, and those within reach of them.
    fn by_signs(&self, queries: &Queries, ballot: &mut Ballot) -> Vec<Looked> {
        let cosines = signs::cosines();
        let coded =
            |own: &[f32]| -> Vec<(Code, f32)> { self.planes.coded(own, queries.d).collect() };
        let asked: Vec<Vec<Vec<(Code, f32)>>> =
            (0..self.heads.len()).map(|head| queries.slices(head).map(coded).collect()).collect();
        let num_rows = vec![self.pages * MARKS; self.heads.len()];
        let votes = vote_by_scores(queries, &num_rows, ballot, |scored: Scored<'_>, _| {
            let (codes, lengths) = self.heads[scored.head].codes(self.pages);
            let own = scored.first..scored.first + scored.len;
            let (codes, lengths) = (&codes[own.clone()], &lengths[own]);
            let asked = &asked[scored.head][scored.slice];
            let each = scored.scores.chunks_exact_mut(scored.len).zip(asked);
            for (scores, (code, length)) in each {
                let told = cosines.map(|cosine| cosine * length);
                rows::score_codes(codes, lengths, *code, &told, scores);
            }
        });
        let looked = votes.par_iter().enumerate().map(|(head, votes)| {
            let marks = rows::largest(votes.rows, LEFT_BY_CODES * self.wanted);
            let marks = marks.iter().flat_map(|mark| self.with_near(*mark..mark + 1));
            Looked { marks: self.with_named(head, marks.collect()), means: None }
        });
        looked.collect()
    }

    /// `marks` (ascending) of a head with the outliers, the pinned ones and those that votes stand for.
    fn with_named(&self, head: usize, mut marks: Vec<u32>) -> Vec<u32> {
        marks.extend_from_slice(self.heads[head].outliers(self.pages));
        marks.extend_from_slice(self.named.pinned);
        marks.extend(self.named.standing[head].iter().map(|(token, _)| token / SPAN as u32));
        marks.sort_unstable();
        marks.dedup();
        marks
    }

    /// Of the landmarks that are `looked` at, those of most votes: the landmarks, behind them the keys of outliers, and
    /// behind these the means of pages for all that they stand for, in one vote.
    fn best(&self, queries: &Queries, looked: &[Looked], ballot: &mut Ballot) -> Vec<Taken> {
        let d = queries.d;
        let num_keys: Vec<usize> =
            self.heads.iter().map(|head| head.outliers(self.pages).len() * SPAN).collect();
        let means = |head: usize| looked[head].means.as_deref().unwrap_or_default();
        let num_rows: Vec<usize> = (0..self.heads.len())
            .map(|head| looked[head].marks.len() + num_keys[head] + means(head).len())
            .collect();
        let votes = vote_by_scores(queries, &num_rows, ballot, |mut scored: Scored<'_>, keys| {
            let (head, end) = (scored.head, scored.first + scored.len);
            let own = &self.heads[head];
            let (first_key, first_mean) =
                (looked[head].marks.len(), looked[head].marks.len() + num_keys[head]);
            let part = |from: usize, to: usize| {
                scored.first.clamp(from, to) - from..end.clamp(from, to) - from
            };
            let marks = part(0, first_key);
            let outlier_keys = part(first_key, first_mean);
            let shut = part(first_mean, num_rows[head]);
            let first_shut = marks.len() + outlier_keys.len();
            let is_next = |a: &u32, b: &u32| a + 1 == *b;
            let mut pieces: Vec<&[u8]> = Vec::new();
            let runs = looked[head].marks[marks].chunk_by(is_next);
            pieces.extend(runs.map(|run| own.landmarks_bytes(run[0] as usize, run.len(), d)));
            pieces.push(own.outlier_keys_bytes(outlier_keys.start, outlier_keys.len(), d));
            let shut = &means(head)[shut];
            let runs = shut.chunk_by(|a, b| a.page + 1 == b.page);
            let mean_of = |run: &[Shut]| own.page_means_bytes(run[0].page as usize, run.len(), d);
            pieces.extend(runs.map(mean_of));
            scored.score_pieces(&pieces, queries, keys);
            for scores in scored.scores.chunks_exact_mut(scored.len) {
                let scores = scores[first_shut..].iter_mut();
                scores.zip(shut).for_each(|(score, shut)| *score += shut.weight);
            }
        });
        let taken = votes.into_par_iter().zip(looked).enumerate();
        taken.map(|(head, (votes, looked))| self.taken(&votes, head, looked, queries)).collect()
    }

    fn taken(&self, votes: &Votes<'_>, head: usize, looked: &Looked, queries: &Queries) -> Taken {
        let (marks, index) = (&looked.marks, &self.heads[head]);
        let mut by_mark = votes.rows[..marks.len()].to_vec();
        let keys = votes.rows[marks.len()..].chunks_exact(SPAN);
        for (outlier, votes) in index.outliers(self.pages).iter().zip(keys) {
            if let Ok(at) = marks.binary_search(outlier) {
                by_mark[at] = votes.iter().copied().fold(by_mark[at], f32::max);
            }
        }
        let pin = |by_mark: &mut [f32], vote: f32| {
            for mark in self.named.pinned {
                if let Ok(at) = marks.binary_search(mark) {
                    by_mark[at] = vote;
                }
            }
        };
        if self.reach > 0 {
            // A pinned landmark asks for no other.
            pin(&mut by_mark, 0.0);
            by_mark = within_reach(&by_mark, marks, self.marks_within_reach());
        }
        for (token, vote) in &self.named.standing[head] {
            if let Ok(at) = marks.binary_search(&(token / SPAN as u32)) {
                by_mark[at] = by_mark[at].max(*vote);
            }
        }
        pin(&mut by_mark, f32::INFINITY);
        let taken = self.largest(votes, &by_mark, queries, |at| marks[at as usize]);
        Taken { missed: taken.missed.filter(|_| looked.means.is_some()), ..taken }
    }

    /// Those that `votes_for` has most for, each by its name, and what the rest of the votes' sum is.
    fn largest(
        &self,
        votes: &Votes<'_>,
        votes_for: &[f32],
        queries: &Queries,
        name: impl Fn(u32) -> u32,
    ) -> Taken {
        let best = rows::largest(votes_for, self.wanted);
        // The votes of the last query are all there is to tell how much of each head's sum was taken.
        let held: f32 = best.iter().map(|at| votes.rows[*at as usize]).sum();
        let left = 1.0 - (held / queries.group as f32).min(1.0);
        Taken {
            marks: best.iter().map(|at| (name(*at), votes_for[*at as usize])).collect(),
            missed: Some(votes.last.iter().map(|(max, sum)| (*max, sum * left)).collect()),
        }
    }
}
