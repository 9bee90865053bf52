//! The soft vote: each query head's softmax over rows, summed over the heads of a group, the most asked query counts.
//! Knows rows and queries, no page; who gives the rows is its caller's matter.
//!
//! A head has one vote to give, so that a head of large scores does not outvote the others: summing raw scores instead
//! loses most of the recall (TokenSelect, arXiv 2411.02886, table 4: 16.6 against 86.6).

use mka_kernels::rows;
use rayon::prelude::*;
use std::collections::VecDeque;

/// Rows of one task: 512 rows of 64 numbers are 128 KiB, a quarter of an L2.
const BLOCK_ROWS: usize = 512;
/// Queries that vote at once: the weights of more would take more memory, and a vote needs no more than the largest.
const SLICE: usize = 8;

/// Places for each token up to which votes are looked at place by place: tokens that stand further apart are few of them.
const PLACES_A_TOKEN: usize = 4;

/// Queries of one key/value head: (queries, group, d), scaled, queries of one token side by side.
pub(super) struct Queries {
    /// For each key/value head, (count · group, d).
    pub(super) heads: Vec<Vec<f32>>,
    pub(super) count: usize,
    pub(super) group: usize,
    pub(super) d: usize,
}

impl Queries {
    /// The queries of one key/value head that vote at once, (up to [`SLICE`] · group, d) each.
    pub(super) fn slices(&self, head: usize) -> std::slice::Chunks<'_, f32> {
        self.heads[head].chunks((SLICE * self.group * self.d).max(1))
    }
}

/// What the vote of one key/value head gave.
pub(super) struct Votes<'a> {
    /// One for each row: of the queries, the largest sum over the group's heads of their softmax.
    pub(super) rows: &'a [f32],
    /// Of the last query, for each head of the group: the largest score, and Σ e^(score - largest).
    pub(super) last: Vec<(f32, f32)>,
}

/// Memory of a vote, kept from one to the next: at 131,072 rows of three heads 6 MB, which would be asked of the system and
/// filled with zeros for each layer's choice.
#[derive(Default)]
pub(super) struct Ballot {
    weights: Vec<f32>,
    votes: Vec<f32>,
}

impl Ballot {
    /// Keeps what the vote of one query over `rows` rows of each of `heads` query heads needs: a prompt's block needs as much
    /// for each of its queries.
    pub(super) fn shrink(&mut self, rows: usize, heads: usize) {
        for numbers in [&mut self.weights, &mut self.votes] {
            if numbers.len() > rows * heads {
                numbers.truncate(rows * heads);
                numbers.shrink_to_fit();
            }
        }
    }
}

/// The first `count` numbers of `vector`, which grows where it must.
fn room(vector: &mut Vec<f32>, count: usize) -> &mut [f32] {
    if vector.len() < count {
        *vector = vec![0.0; count];
    }
    &mut vector[..count]
}

/// Scores of one block of rows of one head, as e^(score - max) with the block's own maximum.
struct Block<'a> {
    head: usize,
    first: usize,
    /// (count · group, len).
    weights: &'a mut [f32],
    /// (len).
    votes: &'a mut [f32],
    /// (count · group): maximum and sum.
    stats: Vec<(f32, f32)>,
}

/// The blocks of `num_rows[head]` rows of each head, scored by `per_row` queries.
fn blocks_of<'a>(
    num_rows: &[usize],
    per_row: usize,
    mut weights: &'a mut [f32],
    mut votes: &'a mut [f32],
) -> Vec<Block<'a>> {
    let mut blocks = Vec::new();
    for (head, rows) in num_rows.iter().enumerate() {
        for first in (0..*rows).step_by(BLOCK_ROWS) {
            let len = BLOCK_ROWS.min(rows - first);
            let (own_weights, behind) = weights.split_at_mut(per_row * len);
            weights = behind;
            let (own_votes, behind) = votes.split_at_mut(len);
            votes = behind;
            let stats = vec![(0.0, 0.0); per_row];
            blocks.push(Block { head, first, weights: own_weights, votes: own_votes, stats });
        }
    }
    blocks
}

/// Votes over `num_rows[head]` rows of each head; `fill(head, first, out)` writes rows from `first` on as f32 (n, d), every
/// number of `out`.
pub(super) fn soft_vote<'a>(
    queries: &Queries,
    num_rows: &[usize],
    ballot: &'a mut Ballot,
    fill: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Vec<Votes<'a>> {
    let d = queries.d;
    vote_by_scores(queries, num_rows, ballot, |scored, keys| {
        keys.resize(scored.len * d, 0.0);
        fill(scored.head, scored.first, keys);
        rows::score_rows(scored.queries, keys, d, scored.scores, scored.len);
    })
}

/// Some rows of one head, and where their scores go.
pub(super) struct Scored<'a> {
    pub(super) head: usize,
    pub(super) first: usize,
    /// Rows.
    pub(super) len: usize,
    /// Which of [`Queries::slices`] votes.
    pub(super) slice: usize,
    /// (queries of the slice · group, d).
    pub(super) queries: &'a [f32],
    /// (queries of the slice · group, len): every one is to be written.
    pub(super) scores: &'a mut [f32],
}

impl Scored<'_> {
    /// Scores rows of bf16, little-endian bytes that are whole rows, from row `at` of these on; how many rows they were.
    pub(super) fn score_bf16(&mut self, at: usize, bytes: &[u8], d: usize) -> usize {
        rows::score_bf16_rows(self.queries, bytes, d, &mut self.scores[at..], self.len);
        bytes.len() / (2 * d)
    }

    /// Scores rows of bf16 that lie in pieces, every one of these rows in their order: for a few queries as they lie, for
    /// others widened into `keys`.
    pub(super) fn score_pieces(
        &mut self,
        pieces: &[&[u8]],
        queries: &Queries,
        keys: &mut Vec<f32>,
    ) {
        let d = queries.d;
        if queries.count == 1 {
            let mut at = 0;
            for piece in pieces {
                at += self.score_bf16(at, piece, d);
            }
            return;
        }
        keys.resize(self.len * d, 0.0);
        let mut rest = &mut keys[..];
        for piece in pieces {
            let (own, behind) = rest.split_at_mut(piece.len() / 2);
            rows::widen_bf16(piece, own);
            rest = behind;
        }
        rows::score_rows(self.queries, keys, d, self.scores, self.len);
    }
}

/// [`soft_vote`] by scores instead of rows; `score` gets the same vector again and again, for rows that it must widen.
pub(super) fn vote_by_scores<'a>(
    queries: &Queries,
    num_rows: &[usize],
    ballot: &'a mut Ballot,
    score: impl Fn(Scored<'_>, &mut Vec<f32>) + Sync,
) -> Vec<Votes<'a>> {
    let all: usize = num_rows.iter().sum();
    let weights = room(&mut ballot.weights, all * queries.count.min(SLICE) * queries.group);
    let votes = room(&mut ballot.votes, all);
    votes.fill(0.0);
    let mut totals = vec![Vec::new(); num_rows.len()];
    for (slice, first_query) in (0..queries.count).step_by(SLICE).enumerate() {
        let per_row = SLICE.min(queries.count - first_query) * queries.group;
        let mut blocks = blocks_of(num_rows, per_row, weights, votes);
        blocks.par_iter_mut().for_each_init(Vec::new, |keys: &mut Vec<f32>, block| {
            let (head, first, len) = (block.head, block.first, block.votes.len());
            let own = slice * SLICE * queries.group * queries.d;
            let own = &queries.heads[head][own..own + per_row * queries.d];
            let scores = &mut *block.weights;
            score(Scored { head, first, len, slice, queries: own, scores }, keys);
            for (scores, stats) in block.weights.chunks_exact_mut(len).zip(&mut block.stats) {
                let max = rows::maximum(scores);
                *stats = (max, rows::exponentiate(scores, max));
            }
        });
        let of_head = |head: usize| -> Vec<(f32, f32)> {
            let from = blocks.partition_point(|block| block.head < head);
            let to = blocks.partition_point(|block| block.head <= head);
            (0..per_row).map(|row| total(&blocks[from..to], row)).collect()
        };
        totals = (0..num_rows.len()).into_par_iter().map(of_head).collect();
        blocks.par_iter_mut().for_each_init(Vec::new, |sum: &mut Vec<f32>, block| {
            count(queries.group, block, &totals[block.head], sum);
        });
    }
    let mut rest = &ballot.votes[..all];
    let mut votes = Vec::with_capacity(num_rows.len());
    for (num_rows, totals) in num_rows.iter().zip(totals) {
        let (rows, behind) = rest.split_at(*num_rows);
        rest = behind;
        let last = totals[totals.len().saturating_sub(queries.group)..].to_vec();
        votes.push(Votes { rows, last });
    }
    votes
}

/// The largest score of one query head over `blocks`, and the sum that its softmax divides by.
fn total(blocks: &[Block<'_>], row: usize) -> (f32, f32) {
    let max = blocks.iter().fold(f32::NEG_INFINITY, |max, b| max.max(b.stats[row].0));
    let parts = blocks.iter().map(|b| b.stats[row].1 * (b.stats[row].0 - max).exp());
    (max, parts.sum())
}

/// Brings a block's weights to the `totals` of its head and counts.
fn count(group: usize, block: &mut Block<'_>, totals: &[(f32, f32)], sum: &mut Vec<f32>) {
    let (group, len) = (group.max(1), block.votes.len());
    let factor = |((max, _), (top, total)): (&(f32, f32), &(f32, f32))| (max - top).exp() / total;
    let factors: Vec<f32> = block.stats.iter().zip(totals).map(factor).collect();
    sum.resize(len, 0.0);
    for (weights, factors) in
        block.weights.chunks_exact(group * len).zip(factors.chunks_exact(group))
    {
        // A score that is no number has no vote.
        rows::sum_scaled(weights, factors, sum);
        block.votes.iter_mut().zip(&*sum).for_each(|(vote, sum)| *vote = vote.max(*sum));
    }
}

/// The largest of the `votes` of `tokens` (ascending) that stand within `reach` of each.
pub(super) fn within_reach(votes: &[f32], tokens: &[u32], reach: usize) -> Vec<f32> {
    let [Some(first), Some(last)] = [tokens.first(), tokens.last()] else { return Vec::new() };
    let extent = (last - first) as usize + 1;
    if extent <= PLACES_A_TOKEN * tokens.len() {
        // Votes at their places, nothing between them: no branch to guess.
        let mut placed = vec![0f32; extent];
        tokens.iter().zip(votes).for_each(|(token, vote)| placed[(token - first) as usize] = *vote);
        let mut largest = vec![0f32; extent];
        rows::maximum_within(&placed, reach, &mut largest);
        return tokens.iter().map(|token| largest[(token - first) as usize]).collect();
    }
    let mut pooled = Vec::with_capacity(votes.len());
    // Those within reach that no later one exceeds, largest first: the first is the answer.
    let mut best: VecDeque<usize> = VecDeque::new();
    let mut next = 0;
    for own in tokens {
        while tokens.get(next).is_some_and(|token| (token - own.min(token)) as usize <= reach) {
            while best.back().is_some_and(|last| votes[*last] <= votes[next]) {
                best.pop_back();
            }
            best.push_back(next);
            next += 1;
        }
        while best.front().is_some_and(|first| (own - tokens[*first].min(*own)) as usize > reach) {
            best.pop_front();
        }
        pooled.push(best.front().map_or(0.0, |first| votes[*first]));
    }
    pooled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vote_reaches_neighbours_in_the_stream_not_in_the_list() {
        let number = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 1009.0;
        // Side by side, and so far apart that they are looked at one by one.
        let near = (5..300).filter(|i| number(*i as usize) < 0.4).collect::<Vec<u32>>();
        let far = near.iter().map(|i| i + i / 40 * 9000).collect::<Vec<u32>>();
        for (tokens, reach) in [near, far].iter().flat_map(|it| [0, 1, 3, 16, 400].map(|r| (it, r)))
        {
            let votes: Vec<f32> = (0..tokens.len()).map(|i| number(i + 77)).collect();
            let near = |own: &u32| {
                let others = tokens.iter().zip(&votes);
                let within = others.filter(|(token, _)| token.abs_diff(*own) as usize <= reach);
                within.map(|(_, vote)| *vote).fold(0.0, f32::max)
            };
            let expected: Vec<f32> = tokens.iter().map(near).collect();
            assert_eq!(within_reach(&votes, tokens, reach), expected, "{reach}");
        }
        assert!(within_reach(&[], &[], 3).is_empty());
    }

    #[test]
    fn votes_are_the_softmax_summed_over_the_group_whatever_the_blocks() {
        // More queries than vote at once.
        let (count, group, d, n) = (SLICE + 2, 3, 4, 1200);
        let number = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 250.0 - 2.0;
        let queries: Vec<f32> = (0..count * group * d).map(number).collect();
        let keys: Vec<f32> = (0..n * d).map(|i| number(i + 7)).collect();
        let given = Queries { heads: vec![queries.clone(), queries.clone()], count, group, d };
        let mut ballot = Ballot::default();
        let votes = soft_vote(&given, &[n, 0], &mut ballot, |_, first, out| {
            out.copy_from_slice(&keys[first * d..first * d + out.len()]);
        });
        assert!(votes[1].rows.is_empty());
        let mut expected = vec![0f64; n];
        for query in 0..count {
            let mut sum = vec![0f64; n];
            for row in query * group..(query + 1) * group {
                let score = |j: usize| -> f64 {
                    (0..d)
                        .map(|x| f64::from(queries[row * d + x]) * f64::from(keys[j * d + x]))
                        .sum()
                };
                let total: f64 = (0..n).map(|j| score(j).exp()).sum();
                (0..n).for_each(|j| sum[j] += score(j).exp() / total);
            }
            expected.iter_mut().zip(sum).for_each(|(e, s)| *e = e.max(s));
        }
        for (vote, expected) in votes[0].rows.iter().zip(&expected) {
            assert!((f64::from(*vote) - expected).abs() < 1e-5);
        }
        // What a vote before left in the ballot is not in the next one.
        let few = soft_vote(&given, &[5, 700], &mut ballot, |_, first, out| {
            out.copy_from_slice(&keys[first * d..first * d + out.len()]);
        });
        let few: Vec<Vec<f32>> = few.iter().map(|votes| votes.rows.to_vec()).collect();
        let mut fresh = Ballot::default();
        let again = soft_vote(&given, &[5, 700], &mut fresh, |_, first, out| {
            out.copy_from_slice(&keys[first * d..first * d + out.len()]);
        });
        assert!(again.iter().zip(few).all(|(again, few)| again.rows == few));
    }
}
