//! The soft vote: each query head's softmax over rows, summed over the heads of a group, the most asked query counts.
//! Knows rows and queries, no page; who gives the rows is its caller's matter.
//!
//! A head has one vote to give, so that a head of large scores does not outvote the others: summing raw scores instead
//! loses most of the recall (TokenSelect, arXiv 2411.02886, table 4: 16.6 against 86.6).

use mka_kernels::rows;
use rayon::prelude::*;

/// Rows of one task: 512 rows of 64 numbers are 128 KiB, a quarter of an L2.
const BLOCK_ROWS: usize = 512;

/// Queries of one key/value head: (queries, group, d), scaled, queries of one token side by side.
pub(super) struct Queries {
    /// For each key/value head, (count · group, d).
    pub(super) heads: Vec<Vec<f32>>,
    pub(super) count: usize,
    pub(super) group: usize,
    pub(super) d: usize,
}

/// What the vote of one key/value head gave.
pub(super) struct Votes {
    /// One for each row: of the queries, the largest sum over the group's heads of their softmax.
    pub(super) rows: Vec<f32>,
    /// Of the last query, for each head of the group: the largest score, and Σ e^(score - largest).
    pub(super) last: Vec<(f32, f32)>,
}

/// Scores of one block of rows of one head, as e^(score - max) with the block's own maximum.
struct Block {
    head: usize,
    first: usize,
    len: usize,
    /// (count · group, len).
    weights: Vec<f32>,
    /// (count · group): maximum and sum.
    stats: Vec<(f32, f32)>,
}

/// Votes over `num_rows[head]` rows of each head; `fill(head, first, out)` writes rows from `first` on as f32 (n, d), every
/// number of `out`.
pub(super) fn soft_vote(
    queries: &Queries,
    num_rows: &[usize],
    fill: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Vec<Votes> {
    let d = queries.d;
    vote_by_scores(queries, num_rows, |scored, keys| {
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
    /// (count · group, d).
    pub(super) queries: &'a [f32],
    /// (count · group, len): every one is to be written.
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
pub(super) fn vote_by_scores(
    queries: &Queries,
    num_rows: &[usize],
    score: impl Fn(Scored<'_>, &mut Vec<f32>) + Sync,
) -> Vec<Votes> {
    let tasks: Vec<(usize, usize, usize)> = num_rows
        .iter()
        .enumerate()
        .flat_map(|(head, rows)| {
            (0..*rows)
                .step_by(BLOCK_ROWS)
                .map(move |first| (head, first, BLOCK_ROWS.min(rows - first)))
        })
        .collect();
    let blocks: Vec<Block> = tasks
        .into_par_iter()
        .map_init(Vec::new, |keys: &mut Vec<f32>, (head, first, len)| {
            let mut weights = vec![0f32; queries.count * queries.group * len];
            let (queries, scores) = (&*queries.heads[head], &mut *weights);
            score(Scored { head, first, len, queries, scores }, keys);
            let stats = weights
                .chunks_exact_mut(len)
                .map(|scores| {
                    let max = rows::maximum(scores);
                    (max, rows::exponentiate(scores, max))
                })
                .collect();
            Block { head, first, len, weights, stats }
        })
        .collect();
    let mut blocks = blocks.as_slice();
    let mut votes = Vec::with_capacity(num_rows.len());
    for (head, num_rows) in num_rows.iter().enumerate() {
        let (own, rest) = blocks.split_at(blocks.partition_point(|block| block.head <= head));
        blocks = rest;
        votes.push(count(queries, own, *num_rows));
    }
    votes
}

/// Brings the blocks of one head to one maximum and counts.
fn count(queries: &Queries, blocks: &[Block], num_rows: usize) -> Votes {
    let group = queries.group;
    let totals: Vec<(f32, f32)> = (0..queries.count * group)
        .map(|row| {
            let max = blocks.iter().fold(f32::NEG_INFINITY, |max, b| max.max(b.stats[row].0));
            let parts = blocks.iter().map(|b| b.stats[row].1 * (b.stats[row].0 - max).exp());
            (max, parts.sum())
        })
        .collect();
    let mut votes = vec![0f32; num_rows];
    let mut sum = [0f32; BLOCK_ROWS];
    for block in blocks {
        let counted = &mut votes[block.first..block.first + block.len];
        for query in 0..queries.count {
            let sum = &mut sum[..block.len];
            sum.fill(0.0);
            for row in query * group..(query + 1) * group {
                let factor = (block.stats[row].0 - totals[row].0).exp() / totals[row].1;
                let weights = &block.weights[row * block.len..(row + 1) * block.len];
                sum.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight * factor);
            }
            counted.iter_mut().zip(sum).for_each(|(vote, sum)| *vote = vote.max(*sum));
        }
    }
    let last = totals[totals.len().saturating_sub(group)..].to_vec();
    Votes { rows: votes, last }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_are_the_softmax_summed_over_the_group_whatever_the_blocks() {
        let (count, group, d, n) = (2, 3, 4, 1200);
        let number = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 250.0 - 2.0;
        let queries: Vec<f32> = (0..count * group * d).map(number).collect();
        let keys: Vec<f32> = (0..n * d).map(|i| number(i + 7)).collect();
        let given = Queries { heads: vec![queries.clone(), queries.clone()], count, group, d };
        let votes = soft_vote(&given, &[n, 0], |_, first, out| {
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
        for (vote, expected) in votes[0].rows.iter().zip(expected) {
            assert!((f64::from(*vote) - expected).abs() < 1e-5);
        }
    }
}
