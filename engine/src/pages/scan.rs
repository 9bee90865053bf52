//! The scan of the index: which landmarks or keys a query's heads ask for most, by all landmarks, by those that a coarser
//! look leaves, or by codes of all keys.
//! Knows the index of one layer; neither pages' bytes nor a budget.

use super::LandmarkScan;
use super::index::{HeadIndex, MARKS, SPAN};
use super::signs::{self, CENTRE_PAGES, Code, Planes};
use super::vote::{Ballot, Queries, Scored, Votes, vote_by_scores};
use mka_kernels::key_codes::{CodeScorer, Rotation};
use mka_kernels::{PAGE_TOKENS, rows};
use rayon::prelude::*;
use std::borrow::Cow;

/// Stored pages up to which every landmark is scored: 524,288 tokens. Of half as many, two levels took longer than all
/// landmarks, `docs/recall.md`.
const FLAT_PAGES: usize = (1 << 19) / PAGE_TOKENS;
/// Landmarks that a coarser look leaves to be scored, for each that is taken: what less of them lose is in
/// `docs/recall.md`.
const LEFT_BY_MEANS: usize = 16;
const LEFT_BY_CODES: usize = 4;

/// What a choice takes of one layer's marks: landmarks, or keys where they are scored by their codes.
pub(super) struct Scan<'a> {
    /// The layer's index.
    pub(super) heads: &'a [HeadIndex],
    /// Pages at its front that can be chosen.
    pub(super) pages: usize,
    /// Marks that are taken whatever is asked for, ascending.
    pub(super) pinned: &'a [u32],
    /// Marks to take.
    pub(super) wanted: usize,
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
    means: Option<Vec<u32>>,
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
        let scorer = |rows: &Vec<f32>| CodeScorer::new(&rotation.turned(rows), d);
        let scorers: Vec<CodeScorer> = queries.heads.par_iter().map(scorer).collect();
        let num_rows = vec![self.pages * PAGE_TOKENS; self.heads.len()];
        // Blocks of rows are whole pages.
        let votes = vote_by_scores(queries, &num_rows, ballot, |scored: Scored<'_>, _| {
            let (first, count) = (scored.first / PAGE_TOKENS, scored.len / PAGE_TOKENS);
            let codes = self.heads[scored.head].key_codes(first, count, d);
            scorers[scored.head].score(scored.queries, codes, scored.scores, scored.len);
        });
        let taken = votes.into_par_iter().map(|votes| {
            let mut by_key = Cow::Borrowed(votes.rows);
            self.pinned.iter().for_each(|key| by_key.to_mut()[*key as usize] = f32::INFINITY);
            self.largest(&votes, &by_key, queries, |key| key)
        });
        taken.collect()
    }

    fn all(&self) -> Vec<Looked> {
        let marks: Vec<u32> = (0..(self.pages * MARKS) as u32).collect();
        let looked = || Looked { marks: marks.clone(), means: Some(Vec::new()) };
        self.heads.iter().map(|_| looked()).collect()
    }

    /// The landmarks of the pages whose mean has most votes.
    fn by_page_means(&self, queries: &Queries, ballot: &mut Ballot) -> Vec<Looked> {
        let d = queries.d;
        let num_rows = vec![self.pages; self.heads.len()];
        let votes = vote_by_scores(queries, &num_rows, ballot, |mut scored: Scored<'_>, keys| {
            let means = self.heads[scored.head].page_means_bytes(scored.first, scored.len, d);
            scored.score_pieces(&[means], queries, keys);
        });
        let looked = votes.par_iter().zip(self.heads).map(|(votes, index)| {
            let open = rows::largest(votes.rows, LEFT_BY_MEANS * self.wanted / MARKS);
            let marks = open.iter().flat_map(|page| {
                let first = page * MARKS as u32;
                first..first + MARKS as u32
            });
            let is_shut = |page: &u32| open.binary_search(page).is_err();
            Looked {
                marks: self.with_named(index, marks.collect()),
                means: Some((0..self.pages as u32).filter(is_shut).collect()),
            }
        });
        looked.collect()
    }

    /// The landmarks of most votes where a score is what lengths and codes tell of it.
    fn by_signs(&self, queries: &Queries, ballot: &mut Ballot) -> Vec<Looked> {
        let cosines = signs::cosines();
        let coded = |own: &Vec<f32>| self.planes.coded(own, queries.d).collect();
        let asked: Vec<Vec<(Code, f32)>> = queries.heads.iter().map(coded).collect();
        let num_rows = vec![self.pages * MARKS; self.heads.len()];
        let votes = vote_by_scores(queries, &num_rows, ballot, |scored: Scored<'_>, _| {
            let (codes, lengths) = self.heads[scored.head].codes(self.pages);
            let own = scored.first..scored.first + scored.len;
            let (codes, lengths) = (&codes[own.clone()], &lengths[own]);
            let each = scored.scores.chunks_exact_mut(scored.len).zip(&asked[scored.head]);
            for (scores, (code, length)) in each {
                let told = cosines.map(|cosine| cosine * length);
                rows::score_codes(codes, lengths, *code, &told, scores);
            }
        });
        let looked = votes.par_iter().zip(self.heads).map(|(votes, index)| {
            let marks = rows::largest(votes.rows, LEFT_BY_CODES * self.wanted);
            Looked { marks: self.with_named(index, marks), means: None }
        });
        looked.collect()
    }

    /// `marks` (ascending) with the outliers and the pinned ones.
    fn with_named(&self, index: &HeadIndex, mut marks: Vec<u32>) -> Vec<u32> {
        marks.extend_from_slice(index.outliers(self.pages));
        marks.extend_from_slice(self.pinned);
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
            let runs = means(head)[shut].chunk_by(is_next);
            pieces.extend(runs.map(|run| own.page_means_bytes(run[0] as usize, run.len(), d)));
            scored.score_pieces(&pieces, queries, keys);
            for scores in scored.scores.chunks_exact_mut(scored.len) {
                scores[first_shut..].iter_mut().for_each(|score| *score += (MARKS as f32).ln());
            }
        });
        let taken = votes.into_par_iter().zip(self.heads).zip(looked);
        taken.map(|((votes, index), looked)| self.taken(&votes, index, looked, queries)).collect()
    }

    fn taken(
        &self,
        votes: &Votes<'_>,
        index: &HeadIndex,
        looked: &Looked,
        queries: &Queries,
    ) -> Taken {
        let marks = &looked.marks;
        let mut by_mark = votes.rows[..marks.len()].to_vec();
        let keys = votes.rows[marks.len()..].chunks_exact(SPAN);
        for (outlier, votes) in index.outliers(self.pages).iter().zip(keys) {
            if let Ok(at) = marks.binary_search(outlier) {
                by_mark[at] = votes.iter().copied().fold(by_mark[at], f32::max);
            }
        }
        for mark in self.pinned {
            if let Ok(at) = marks.binary_search(mark) {
                by_mark[at] = f32::INFINITY;
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    const D: usize = 16;
    const SCANS: [LandmarkScan; 2] = [LandmarkScan::TwoLevel, LandmarkScan::SignHash];

    fn number(i: usize) -> f32 {
        ((i * 2_654_435_761) % 10_007) as f32 / 2500.0 - 2.0
    }

    /// Two heads of `pages` pages; in each page keys are alike but for a part of `apart`.
    fn index(pages: usize, apart: f32) -> Vec<HeadIndex> {
        let head = |head: usize| {
            let key = |page: usize, token: usize| {
                let own = move |i| apart * number((head * pages + page) * 9000 + token * D + i);
                (0..D).map(move |i| number((head * pages + page) * 31 + i) + own(i))
            };
            let page = |page: usize| -> Vec<f32> {
                (0..PAGE_TOKENS).flat_map(|token| key(page, token)).collect()
            };
            let mut index = HeadIndex::default();
            let rotation = Rotation::new(D);
            (0..pages).for_each(|i| {
                index.push(&page(i), D);
                index.push_codes(&page(i), &rotation);
            });
            let keys = |mark: usize| {
                Some(page(mark / MARKS)[mark % MARKS * SPAN * D..][..SPAN * D].to_vec())
            };
            index.name_outliers(&index.least_agreeing(pages), D, keys);
            index
        };
        vec![head(0), head(1)]
    }

    fn queries(count: usize) -> Queries {
        let group = 2;
        let of = |head: usize| (0..count * group * D).map(|i| number(i * 7 + head) * 0.4).collect();
        Queries { heads: vec![of(0), of(1)], count, group, d: D }
    }

    fn taken(
        heads: &mut [HeadIndex],
        queries: &Queries,
        scan: LandmarkScan,
        (pages, wanted, pinned): (usize, usize, &[u32]),
    ) -> Vec<Taken> {
        let (planes, rotation) = (Planes::new(D), Rotation::new(D));
        heads.iter_mut().for_each(|head| head.prepare(scan, &planes, D));
        let rotation = Some(&rotation);
        Scan { heads, pages, pinned, wanted, planes: &planes, rotation }.take(
            scan,
            queries,
            &mut Ballot::default(),
        )
    }

    #[test]
    fn a_scan_that_leaves_every_landmark_takes_what_the_flat_one_takes() {
        let mut heads = index(70, 0.7);
        assert!(!heads[0].all_outliers().is_empty());
        for (scan, left) in
            [(LandmarkScan::TwoLevel, LEFT_BY_MEANS), (LandmarkScan::SignHash, LEFT_BY_CODES)]
        {
            for count in [1, 3] {
                let queries = queries(count);
                let asked = (70, 70 * MARKS / left, &[3u32, 200][..]);
                let flat = taken(&mut heads, &queries, LandmarkScan::Flat, asked);
                for (own, flat) in taken(&mut heads, &queries, scan, asked).iter().zip(&flat) {
                    assert_eq!(own.marks, flat.marks);
                    assert!(own.marks.contains(&(3, f32::INFINITY)));
                    match scan {
                        LandmarkScan::TwoLevel => assert_eq!(own.missed, flat.missed),
                        _ => assert!(own.missed.is_none() && flat.missed.is_some()),
                    }
                }
            }
        }
    }

    #[test]
    fn a_coarser_look_takes_as_many_landmarks_and_all_that_are_named() {
        let mut heads = index(90, 0.7);
        for (scan, count) in SCANS.into_iter().flat_map(|scan| [(scan, 1), (scan, 3)]) {
            let queries = queries(count);
            let asked = (80, 24, &[5u32, 633][..]);
            for (own, index) in taken(&mut heads, &queries, scan, asked).iter().zip(&heads) {
                assert_eq!(own.marks.len(), 24, "{scan:?}");
                assert!(own.marks.is_sorted_by(|a, b| a.0 < b.0), "{scan:?}");
                for pin in [5, 633] {
                    assert!(own.marks.contains(&(pin, f32::INFINITY)), "{scan:?}");
                }
                assert!(!index.outliers(80).is_empty());
            }
        }
    }

    #[test]
    fn codes_take_the_keys_of_most_votes_and_those_that_are_named() {
        let mut heads = index(90, 0.7);
        for count in [1, 3] {
            let queries = queries(count);
            let asked = (80, 200, &[5u32, 4633][..]);
            let taken = taken(&mut heads, &queries, LandmarkScan::KeyCodes, asked);
            for (head, own) in taken.iter().enumerate() {
                assert_eq!(own.marks.len(), 200);
                assert!(own.marks.is_sorted_by(|a, b| a.0 < b.0));
                assert!(own.marks.iter().all(|(key, _)| *key < 80 * PAGE_TOKENS as u32));
                for pin in [5, 4633] {
                    assert!(own.marks.contains(&(pin, f32::INFINITY)));
                }
                // A mark that is taken has no fewer votes than one that is not, and all votes are of one sum.
                assert_eq!(own.missed.as_ref().map(Vec::len), Some(queries.group), "{head}");
            }
        }
        // Every key of few pages.
        let all = taken_all(&mut heads);
        assert!(all.iter().all(|own| own.marks.len() == 2 * PAGE_TOKENS));
    }

    fn taken_all(heads: &mut [HeadIndex]) -> Vec<Taken> {
        taken(heads, &queries(1), LandmarkScan::KeyCodes, (2, 2 * PAGE_TOKENS, &[]))
    }

    #[test]
    fn means_of_pages_of_equal_keys_stand_for_all_that_is_not_scored() {
        let mut heads = index(90, 0.0);
        let queries = queries(1);
        let asked = (90, 24, &[][..]);
        let flat = taken(&mut heads, &queries, LandmarkScan::Flat, asked);
        let two_level = taken(&mut heads, &queries, LandmarkScan::TwoLevel, asked);
        for (own, flat) in two_level.iter().zip(&flat) {
            assert_eq!(
                own.marks.iter().map(|(mark, _)| mark).collect::<Vec<_>>(),
                flat.marks.iter().map(|(mark, _)| mark).collect::<Vec<_>>()
            );
            let pairs = own.missed.iter().flatten().zip(flat.missed.iter().flatten());
            for ((max, sum), (flat_max, flat_sum)) in pairs {
                let (own, flat) = (max + sum.ln(), flat_max + flat_sum.ln());
                assert!((own - flat).abs() < 1e-2, "{own}, expected {flat}");
            }
        }
    }

    #[test]
    fn few_pages_are_scanned_flat_and_the_default_changes_at_524288_tokens() {
        use LandmarkScan::{Auto, Flat, KeyCodes, SignHash, TwoLevel};
        for asked in [Auto, KeyCodes] {
            assert_eq!(settled(asked, 8192, false), Flat);
            assert_eq!(settled(asked, 8193, false), TwoLevel);
            assert_eq!(settled(asked, 8193, true), KeyCodes);
        }
        assert_eq!(settled(SignHash, 8193, true), SignHash);
        assert_eq!(scan_for(KeyCodes, 1, 1024), KeyCodes);
        assert!(reads_every_key(Auto, 8192) && !reads_every_key(Auto, 8193));
        assert!(reads_every_key(KeyCodes, 8193) && !reads_every_key(Flat, 1));
        // More landmarks would be left than there are.
        assert_eq!(scan_for(TwoLevel, 2048, 1024), Flat);
        assert_eq!(scan_for(TwoLevel, 2049, 1024), TwoLevel);
        assert_eq!(scan_for(SignHash, 512, 1024), Flat);
        assert_eq!(scan_for(SignHash, 513, 1024), SignHash);
        assert_eq!(scan_for(SignHash, CENTRE_PAGES - 1, 8), Flat);
        assert_eq!(scan_for(Flat, 1 << 20, 8), Flat);
    }
}
