//! The choice of recalled tokens by landmarks and exact scores (`docs/recall.md`), on stored keys before RoPE.
//! Knows the store's index and rows; knows nothing of how the chosen tokens are attended.

use super::device::choice::Request;
use super::index::{MARKS, SPAN};
use super::scan::{Named, Scan, Taken, scan_for, settled, span_of};
use super::store::PageStore;
use super::vote::{Ballot, Queries, Scored, Votes, vote_by_scores, within_reach};
use super::{LandmarkScan, PagePrecision, PageRule};
use crate::error::Result;
use candle_core::Tensor;
use mka_kernels::{PAGE_TOKENS, rows};
use rayon::prelude::*;
use std::borrow::Cow;

/// Tokens chosen for each key/value head, as index row · PAGE_TOKENS + offset, ascending, equally many for each.
pub(super) struct Selection {
    pub(super) heads: Vec<Vec<u32>>,
    /// Share of the attention to all stored tokens that the chosen ones hold; None where it is not estimated.
    pub(super) recovered: Option<f32>,
}

/// Tokens of landmarks that are scored one by one, for each token that is chosen.
pub(crate) const OVER_FETCH: usize = 4;
/// Tokens that are scored by their keys for each that is chosen, where their codes were scored before: what twice as many
/// would add is in `docs/recall.md`.
pub(super) const OVER_FETCH_BY_CODES: usize = 2;
/// Queries of a block whose mean stands for them: neighbours look for much the same, and a block of 64 costs as much
/// as eight queries.
pub(crate) const POOLED: usize = 8;

impl PageStore {
    /// Chooses the tokens that `request` asks for, with queries `q` (t, h, d), before RoPE.
    pub(super) fn select(&mut self, q: &Tensor, request: Request) -> Result<Selection> {
        let Request { layer, rows, budget, scope, .. } = request;
        let queries = self.queries(layer, q, self.pooled(q.dim(0)?, q.dim(1)?))?;
        match self.config.rule {
            PageRule::Mka => {
                let standing = self.standing(layer, rows, scope.is_prompt);
                Ok(self.select_by_marks(layer, &queries, (rows, budget), &standing))
            }
            rule => {
                self.bring(&(0..rows).collect::<Vec<_>>());
                let heads = self.select_by_rival(rule, layer, &queries, rows, budget);
                Ok(Selection { heads: evened(heads), recovered: None })
            }
        }
    }

    /// Queries of `layer` as if they stood a window behind the keys, each `pooled` as their mean, and scaled:
    /// q̃ = RoPE(q, window), keys unrotated (TokenSelect and InfLLM). Distances beyond the window would be ones that the
    /// model never saw.
    pub(super) fn queries(&self, layer: usize, q: &Tensor, pooled: usize) -> Result<Queries> {
        let (t, h, d) = q.dims3()?;
        let group = h / self.shape.num_kv_heads;
        let scale = self.config.rule.scale(d);
        let mut values = q.flatten_all()?.to_vec1::<f32>()?;
        if let Some((cos, sin)) = self.angles_at(layer, self.shape.window_tokens as u64) {
            values.chunks_exact_mut(d).for_each(|row| rows::rotate_row(row, cos, sin));
        }
        let mut heads = vec![Vec::new(); self.shape.num_kv_heads];
        let mut mean = vec![0f32; h * d];
        for tokens in values.chunks(pooled * h * d) {
            mean.fill(0.0);
            let factor = scale / (tokens.len() / (h * d)) as f32;
            for token in tokens.chunks_exact(h * d) {
                mean.iter_mut().zip(token).for_each(|(m, x)| *m += x * factor);
            }
            for (head, own) in mean.chunks_exact(group * d).enumerate() {
                heads[head].extend_from_slice(own);
            }
        }
        Ok(Queries { heads, count: t.div_ceil(pooled), group, d })
    }

    fn select_by_marks(
        &mut self,
        layer: usize,
        queries: &Queries,
        (rows, budget): (usize, usize),
        standing: &[Vec<(u32, f32)>],
    ) -> Selection {
        let settled = settled(self.config.scan, rows, self.rotation.is_some());
        let span = span_of(settled);
        let pinned = self.pinned(rows, span);
        let mut ballot = std::mem::take(&mut self.ballot);
        let named = Named { pinned: &pinned, standing };
        let taken = self.scan(layer, queries, settled, (rows, budget), named, &mut ballot);
        self.bring_of(&taken, rows, PAGE_TOKENS / span);
        let marks = Marks { taken: &taken, named, span };
        let (selection, votes) = self.re_rank(layer, queries, (rows, budget), &marks, &mut ballot);
        self.note_votes(layer, &selection.heads, &votes);
        ballot.shrink(rows * PAGE_TOKENS, queries.heads.len() * queries.group);
        self.ballot = ballot;
        selection
    }

    /// Brings the pages of `taken` marks, the most wanted first for a budget that cannot hold them all.
    fn bring_of(&mut self, taken: &[Taken], rows: usize, marks_per_page: usize) {
        let (row_of, _) = places(marks_per_page);
        let mut votes_by_row = vec![0f32; rows];
        for head in taken {
            for (mark, vote) in &head.marks {
                let row = &mut votes_by_row[row_of(*mark)];
                *row = row.max(*vote);
            }
        }
        if self.touch(|row| votes_by_row[row] > 0.0, rows) {
            return;
        }
        let mut wanted: Vec<usize> = (0..rows).filter(|row| votes_by_row[*row] > 0.0).collect();
        wanted.sort_by(|a, b| votes_by_row[*b].total_cmp(&votes_by_row[*a]).then(a.cmp(b)));
        self.bring(&wanted);
    }

    /// Of the tokens of the marks that were taken, the `budget` of most votes by their exact scores, and their votes.
    fn re_rank(
        &self,
        layer: usize,
        queries: &Queries,
        (rows, budget): (usize, usize),
        marks: &Marks<'_>,
        ballot: &mut Ballot,
    ) -> (Selection, Vec<Vec<f32>>) {
        let span = marks.span;
        let per_page = PAGE_TOKENS / span;
        // A page has 64 marks or 8, so that the mark's page and its place there are some of its bits.
        let (row_of, place_of) = places(per_page);
        let there = self.bytes_by_row(rows);
        let candidates: Vec<Vec<u32>> = marks
            .taken
            .iter()
            .map(|head| {
                let marks = head.marks.iter().map(|(mark, _)| *mark);
                marks.filter(|mark| there[row_of(*mark)].is_some()).collect()
            })
            .collect();
        let num_rows: Vec<usize> = candidates.iter().map(|marks| marks.len() * span).collect();
        let votes = vote_by_scores(queries, &num_rows, ballot, |mut scored: Scored<'_>, keys| {
            let reader = self.reader(layer, 0, scored.head);
            let marks = &candidates[scored.head][scored.first / span..][..scored.len / span];
            // Marks side by side in a page are one run of its rows: (bytes, first row, rows).
            let is_next = |a: &u32, b: &u32| a + 1 == *b && place_of(*b) > 0;
            let of_run = |run: &[u32]| {
                let bytes = there[row_of(run[0])].unwrap_or_default();
                (bytes, place_of(run[0]) * span, run.len() * span)
            };
            let runs: Vec<_> = marks.chunk_by(is_next).map(of_run).collect();
            // Each run lies elsewhere in memory.
            let bytes_of = |(bytes, first, count)| reader.bytes(bytes, first, count).unwrap_or(&[]);
            runs.iter().for_each(|run| rows::prefetch(bytes_of(*run)));
            // Few queries score keys as they are stored.
            if queries.count == 1 && self.config.precision == PagePrecision::Bf16 {
                let mut own = Vec::with_capacity(scored.len * 2 * queries.d);
                runs.iter().for_each(|run| own.extend_from_slice(bytes_of(*run)));
                scored.score_bf16(0, &own, queries.d);
                return;
            }
            keys.resize(scored.len * queries.d, 0.0);
            let mut rest = &mut keys[..];
            for (bytes, first, count) in runs {
                let (out, behind) = rest.split_at_mut(count * queries.d);
                reader.read(bytes, first, out);
                rest = behind;
            }
            rows::score_rows(scored.queries, keys, queries.d, scored.scores, scored.len);
        });
        let mut recovered = Vec::new();
        let reach = self.config.vote_reach;
        let heads = candidates
            .par_iter()
            .zip(&votes)
            .zip(marks.named.standing)
            .map(|((candidates, votes), standing)| {
                let named = Named { standing: std::slice::from_ref(standing), ..marks.named };
                let token_votes = asked_for(votes.rows, (candidates, span), named, reach);
                let best = rows::largest(&token_votes, budget);
                let token =
                    |i: &u32| candidates[*i as usize / span] * span as u32 + i % span as u32;
                let held: f32 = best.iter().map(|i| votes.rows[*i as usize]).sum();
                let own_votes = best.iter().map(|i| token_votes[*i as usize]).collect::<Vec<f32>>();
                (best.iter().map(token).collect::<Vec<u32>>(), held, own_votes)
            })
            .collect::<Vec<_>>();
        if queries.count == 1 {
            for ((_, held, _), (votes, taken)) in heads.iter().zip(votes.iter().zip(marks.taken)) {
                let share = |missed: &Vec<_>| recovered_share(*held, votes, missed, span);
                recovered.extend(taken.missed.as_ref().map(share));
            }
        }
        let mean = recovered.iter().sum::<f32>() / recovered.len().max(1) as f32;
        let (tokens, votes) = heads.into_iter().map(|(tokens, _, votes)| (tokens, votes)).unzip();
        let recovered = (!recovered.is_empty()).then_some(mean);
        (Selection { heads: evened(tokens), recovered }, evened(votes))
    }

    /// The marks of most votes of each head for a choice of `budget` tokens among the first `rows` pages, by the scan
    /// `settled` where it passes over some.
    fn scan(
        &mut self,
        layer: usize,
        queries: &Queries,
        settled: LandmarkScan,
        (rows, budget): (usize, usize),
        named: Named<'_>,
        ballot: &mut Ballot,
    ) -> Vec<Taken> {
        let wanted = match settled {
            LandmarkScan::KeyCodes => OVER_FETCH_BY_CODES * budget,
            _ => OVER_FETCH * budget / SPAN,
        };
        let scan = scan_for(settled, rows, wanted);
        for head in &mut self.index[layer] {
            head.prepare(scan, &self.planes, queries.d);
        }
        let (heads, rotation) = (&self.index[layer][..], self.rotation.as_ref());
        let planes = &self.planes;
        let reach = self.config.vote_reach;
        Scan { heads, pages: rows, named, wanted, reach, planes, rotation }
            .take(scan, queries, ballot)
    }

    /// Pinned marks of `span` keys among the first `rows` pages, as the index row's first mark and the mark in the page,
    /// ascending.
    pub(super) fn pinned(&self, rows: usize, span: usize) -> Vec<u32> {
        let place = |pin: &u64| {
            let row = self.order[..rows].binary_search(&(pin / MARKS as u64)).ok()?;
            let first = (row * PAGE_TOKENS + (pin % MARKS as u64) as usize * SPAN) / span;
            Some(first as u32..(first + SPAN / span) as u32)
        };
        self.message.pins.iter().filter_map(place).flatten().collect()
    }

    /// A reader of one head's keys (`kind` 0) or values (1) out of pages' bytes.
    pub(super) fn reader(&self, layer: usize, kind: usize, head: usize) -> RowReader {
        let (precision, d) = (self.config.precision, self.shape.head_dim);
        let row_bytes = precision.row_bytes(d);
        let first = (2 * layer + kind) * self.shape.num_kv_heads + head;
        RowReader { precision, d, row_bytes, at: first * PAGE_TOKENS * row_bytes }
    }
}

/// What a scan left to be re-ranked, each mark `span` keys.
struct Marks<'a> {
    taken: &'a [Taken],
    named: Named<'a>,
    span: usize,
}

/// Reads keys or values of one layer and head out of a page's bytes.
pub(super) struct RowReader {
    precision: PagePrecision,
    d: usize,
    row_bytes: usize,
    at: usize,
}

impl RowReader {
    /// `count` rows from `first` on as they are stored; None where the page is not there.
    pub(super) fn bytes<'a>(
        &self,
        bytes: &'a [u8],
        first: usize,
        count: usize,
    ) -> Option<&'a [u8]> {
        let at = self.at + first * self.row_bytes;
        bytes.get(at..at + count * self.row_bytes)
    }

    /// Rows of bf16 from `first` on as they are stored: out (n, d); zeros where the page is not there.
    pub(super) fn read_bf16(&self, bytes: &[u8], first: usize, out: &mut [half::bf16]) {
        let Some(bytes) = self.bytes(bytes, first, out.len() / self.d) else {
            return out.fill(half::bf16::ZERO);
        };
        let (numbers, _) = bytes.as_chunks::<2>();
        out.iter_mut().zip(numbers).for_each(|(out, x)| *out = half::bf16::from_le_bytes(*x));
    }

    /// Rows from `first` on as f32: out (n, d); zeros where the page is not there.
    pub(super) fn read(&self, bytes: &[u8], first: usize, out: &mut [f32]) {
        let bytes = self.bytes(bytes, first, out.len() / self.d);
        match bytes {
            Some(bytes) => self.precision.decode_rows(bytes, self.d, out),
            None => out.fill(0.0),
        }
    }
}

/// What tells the page of a mark, and its place there, where each page has `per_page` of them, a power of two: a division
/// for each of thousands would take longer than their scores.
fn places(per_page: usize) -> (impl Fn(u32) -> usize + Copy, impl Fn(u32) -> usize + Copy) {
    let (bits, last) = (per_page.trailing_zeros(), per_page as u32 - 1);
    (move |mark| (mark >> bits) as usize, move |mark| (mark & last) as usize)
}

/// By how much each token of `marks` (each `span` of them) of one head is asked for: its neighbours' `votes` within `reach`,
/// those that stand for it, and whether it is pinned, which asks for no neighbour.
fn asked_for<'a>(
    votes: &'a [f32],
    (marks, span): (&[u32], usize),
    named: Named<'_>,
    reach: usize,
) -> Cow<'a, [f32]> {
    let pin = |votes: &mut [f32], vote: f32| {
        for mark in named.pinned {
            if let Ok(at) = marks.binary_search(mark) {
                votes[at * span..(at + 1) * span].fill(vote);
            }
        }
    };
    let (mut votes, has_pins) = (Cow::Borrowed(votes), !named.pinned.is_empty());
    if reach > 0 {
        if has_pins {
            pin(votes.to_mut(), 0.0);
        }
        votes = within_reach(&votes, &tokens_of(marks, span), reach).into();
    }
    for standing in named.standing.iter().filter(|standing| !standing.is_empty()) {
        raise(votes.to_mut(), &tokens_of(marks, span), standing);
    }
    if has_pins {
        pin(votes.to_mut(), f32::INFINITY);
    }
    votes
}

/// The tokens of `marks`, each `span` of them.
fn tokens_of(marks: &[u32], span: usize) -> Vec<u32> {
    let span = span as u32;
    marks.iter().flat_map(|mark| mark * span..(mark + 1) * span).collect()
}

/// Raises the `votes` of `tokens` to those that stand for them; both ascending.
fn raise(votes: &mut [f32], tokens: &[u32], standing: &[(u32, f32)]) {
    let mut own = tokens.iter().zip(votes).peekable();
    for (token, vote) in standing {
        while own.next_if(|(own, _)| *own < token).is_some() {}
        if let Some((_, own)) = own.next_if(|(own, _)| *own == token) {
            *own = own.max(*vote);
        }
    }
}

/// Heads share positions and page lengths, so each takes as many tokens as the poorest has.
fn evened<T>(mut heads: Vec<Vec<T>>) -> Vec<Vec<T>> {
    let shortest = heads.iter().map(Vec::len).min().unwrap_or(0);
    heads.iter_mut().for_each(|tokens| {
        // The oldest go: a shorter list is one whose pages could not be read.
        tokens.drain(..tokens.len() - shortest);
    });
    heads
}

/// Of the attention of one head's group to all stored tokens, the share that the chosen ones hold: their votes by the
/// exact scores, less what stands behind the marks that were not taken, each for `span` tokens.
fn recovered_share(held: f32, votes: &Votes<'_>, missed: &[(f32, f32)], span: usize) -> f32 {
    let group = votes.last.len();
    let held = (held / group as f32).min(1.0);
    if missed.is_empty() {
        return held;
    }
    let share = |((max, sum), (other, rest)): (&(f32, f32), &(f32, f32))| {
        let top = max.max(*other);
        let own = sum * (max - top).exp();
        let rest = span as f32 * rest * (other - top).exp();
        own / (own + rest)
    };
    let shares = votes.last.iter().zip(missed).map(share).sum::<f32>();
    held * shares / group as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_token_asks_for_no_neighbour_and_others_are_asked_for_by_what_stands() {
        let standing = [vec![(4, 5.0), (6, 0.1)]];
        let named = Named { pinned: &[5, 9], standing: &standing };
        let asked = asked_for(&[1.0, 0.5, 9.0, 2.0], (&[3, 4, 5, 7], 1), named, 1);
        assert_eq!(*asked, [1.0, 5.0, f32::INFINITY, 2.0]);
        let nothing = Named { pinned: &[], standing: &[] };
        assert!(matches!(asked_for(&[1.0], (&[3], 1), nothing, 0), Cow::Borrowed([1.0])));
    }

    #[test]
    fn votes_stand_for_the_tokens_that_are_there() {
        let mut votes = [1.0, 2.0, 3.0, 4.0];
        let standing = [(0, 9.0), (3, 8.0), (5, 9.0), (7, 3.5), (9, 5.0), (12, 9.0)];
        raise(&mut votes, &[1, 3, 7, 9], &standing);
        assert_eq!(votes, [1.0, 8.0, 3.5, 5.0]);
    }
}
