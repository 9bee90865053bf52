//! Scores of queries against codes of keys by whole numbers: four signs pick one of 16 levels, a register full at once.
//! Knows the layout of codes, no key.
//!
//! For four numbers x of a turned query and the signs of a key, what the signs make of them is -Σ|x| + 2 Σ|x| over those whose
//! signs agree. The second sum is held in [`LEVELS`] steps, each the same for all fours of a query, so that the levels of a
//! key are added as whole numbers: their sum is exact, whatever the registers, and what is lost is a rounding of half a step
//! for every four numbers.
//!
//! Source: tables in registers as in "FAISS fast scan" (André et al., arXiv 1704.07355, section 4), over codes in the order of
//! their keys.

#[cfg(target_arch = "x86_64")]
mod x86;

use super::coded_bytes;
use crate::rows::has_room;

/// Numbers that pick a level together, and the steps of the widest: two levels add up to a byte.
const FOUR: usize = 4;
const LEVELS: f32 = 127.0;
/// Numbers whose signs are one word of a code, and words of the longest keys that the loops are made for.
const WORD: usize = 32;
const MAX_WORDS: usize = 8;

/// What queries make of every four signs.
#[derive(Debug, Clone)]
pub(super) struct LevelTables {
    /// By query and word of a code, for the low and then the high four bits of each of its bytes: (r, d / WORD, 2, 4, 16).
    levels: Vec<u8>,
    /// By query: a step, and what a key has whose every sign differs.
    scales: Vec<(f32, f32)>,
    d: usize,
}

impl LevelTables {
    /// Whether this processor has the instructions, and keys of `d` numbers fill words.
    pub(super) fn fits(d: usize) -> bool {
        #[cfg(target_arch = "x86_64")]
        let has_path = x86::path().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        let has_path = false;
        has_path && d > 0 && d.is_multiple_of(WORD) && d <= MAX_WORDS * WORD
    }

    /// Of `queries` (r, d) that the rotation turned, d a multiple of [`WORD`].
    pub(super) fn new(queries: &[f32], d: usize) -> Self {
        let mut levels = Vec::with_capacity(4 * queries.len());
        let mut scales = Vec::with_capacity(queries.len() / d);
        for query in queries.chunks_exact(d) {
            let size = |numbers: &[f32]| numbers.iter().map(|x| x.abs()).sum::<f32>();
            let widest = 2.0 * query.chunks_exact(FOUR).map(size).fold(0f32, f32::max);
            let inverse = if widest > 0.0 { LEVELS / widest } else { 0.0 };
            for word in query.chunks_exact(WORD) {
                for half in [0, FOUR] {
                    for byte in word.chunks_exact(2 * FOUR) {
                        levels.extend(levels_of(&byte[half..half + FOUR], inverse));
                    }
                }
            }
            scales.push((widest / LEVELS, -size(query)));
        }
        Self { levels, scales, d }
    }

    /// As [`super::SignTables::score`], where [`LevelTables::fits`].
    pub(super) fn score(&self, queries: &[f32], codes: &[u8], scores: &mut [f32], stride: usize) {
        let (d, bytes) = (self.d, coded_bytes(self.d));
        let n = codes.len() / bytes * super::CENTRE_KEYS;
        let r = self.scales.len();
        assert!(codes.len().is_multiple_of(bytes) && queries.len() == r * d, "whole codes");
        assert!(has_room(scores, r, n, stride), "room for scores");
        if r == 0 {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        match x86::path() {
            // SAFETY: `path` says that the processor has the features; the asserts bound what is read and written.
            Some(x86::Path::Avx512) => unsafe {
                x86::score_512(self, queries, codes, scores, stride)
            },
            // SAFETY: as above.
            Some(x86::Path::Avx2) => unsafe {
                x86::score_256(self, queries, codes, scores, stride)
            },
            None => {}
        }
    }
}

/// The levels of each of the 16 ways in which four signs can lie, the first the lowest bit.
fn levels_of(numbers: &[f32], inverse: f32) -> [u8; 16] {
    std::array::from_fn(|signs| {
        let agrees = |(bit, x): &(usize, &f32)| (signs >> bit & 1 == 1) == (**x > 0.0);
        let agreeing: f32 = numbers.iter().enumerate().filter(agrees).map(|(_, x)| x.abs()).sum();
        (2.0 * agreeing * inverse).round().min(LEVELS) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::super::{CENTRE_KEYS, Rotation, SignTables, sign_bytes};
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(seed: u64, n: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n).map(|_| rng.random_range(-1f32..1.0)).collect()
    }

    /// Query · centre as the registers sum it: sixteen sums, halved until one is left.
    fn at_centre(query: &[f32], centre: &[u8]) -> f32 {
        let mut sums = [0f32; 16];
        for (i, (x, c)) in query.iter().zip(centre.chunks_exact(2)).enumerate() {
            let c = f32::from_bits(u32::from(u16::from_le_bytes([c[0], c[1]])) << 16);
            sums[i % 16] = x.mul_add(c, sums[i % 16]);
        }
        for width in [8, 4, 2, 1] {
            (0..width).for_each(|lane| sums[lane] += sums[lane + width]);
        }
        sums[0]
    }

    /// The score of one key, sign by sign.
    fn plain(tables: &LevelTables, queries: &[f32], codes: &[u8], query: usize, key: usize) -> f32 {
        let d = tables.d;
        let page = &codes[key / CENTRE_KEYS * coded_bytes(d)..][..coded_bytes(d)];
        let key = key % CENTRE_KEYS;
        let factor = &page[2 * d + 2 * key..];
        let factor = f32::from_bits(u32::from(u16::from_le_bytes([factor[0], factor[1]])) << 16);
        let signs = &page[2 * d + 2 * CENTRE_KEYS + key * sign_bytes(d)..][..sign_bytes(d)];
        let levels = &tables.levels[query * 4 * d..(query + 1) * 4 * d];
        let mut sum = 0u32;
        for (at, byte) in signs.iter().enumerate() {
            let (word, byte_in_word) = (at / 4, at % 4);
            for (half, four) in [byte & 15, byte >> 4].into_iter().enumerate() {
                let table = (word * 2 + half) * 4 + byte_in_word;
                sum += u32::from(levels[table * 16 + usize::from(four)]);
            }
        }
        let (step, least) = tables.scales[query];
        let centre = at_centre(&queries[query * d..(query + 1) * d], page);
        factor.mul_add(step.mul_add(sum as f32, least), centre)
    }

    /// Of each shape: d, queries, centres.
    fn shapes() -> impl Iterator<Item = (usize, usize, usize)> {
        let queries = [0, 1, 2, 3, 4, 5, 8, 17];
        let shapes = [(32, 1), (64, 3), (96, 2), (128, 2), (192, 1), (256, 1), (64, 0)];
        shapes.into_iter().flat_map(move |(d, n)| queries.map(|r| (d, r, n)))
    }

    type Scorer = fn(&LevelTables, &[f32], &[u8], &mut [f32], usize);

    /// Checks one path against the sum sign by sign, bit by bit, and against the tables that round nothing.
    fn check(score: Scorer) {
        let mut closest = f32::INFINITY;
        for (d, r, n) in shapes() {
            let rotation = Rotation::new(d);
            let mut codes = Vec::new();
            let keys = random(1, n * CENTRE_KEYS * d);
            keys.chunks_exact(CENTRE_KEYS * d).for_each(|keys| rotation.code(keys, &mut codes));
            let queries = random(2, r * d);
            let turned = rotation.turned(&queries);
            let tables = LevelTables::new(&turned, d);
            let stride = n * CENTRE_KEYS + 5;
            let (mut scores, mut exact) = (vec![7f32; r * stride], vec![7f32; r * stride]);
            score(&tables, &queries, &codes, &mut scores, stride);
            SignTables::new(&turned, d).score(&queries, &codes, &mut exact, stride);
            for query in 0..r {
                let row = query * stride..query * stride + n * CENTRE_KEYS;
                for (key, (score, exact)) in scores[row.clone()].iter().zip(&exact[row]).enumerate()
                {
                    assert_eq!(*score, plain(&tables, &queries, &codes, query, key));
                    let page = &codes[key / CENTRE_KEYS * coded_bytes(d)..];
                    let factor = &page[2 * d + 2 * (key % CENTRE_KEYS)..];
                    let factor = half::bf16::from_le_bytes([factor[0], factor[1]]).to_f32();
                    // Half a step for every four numbers, and what f32 rounds.
                    let bound = factor * tables.scales[query].0 * (d / FOUR) as f32 / 2.0 + 1e-4;
                    closest = closest.min(bound / (score - exact).abs().max(1e-9));
                }
                assert!(scores[(query + 1) * stride - 5..][..5].iter().all(|score| *score == 7.0));
            }
        }
        println!("the bound is {closest} times the largest error");
        assert!(closest >= 1.0);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn scores_are_the_sums_of_levels_and_within_half_a_step_of_each_four() {
        if matches!(x86::path(), Some(x86::Path::Avx512)) {
            // SAFETY: the features are there; lengths are whole.
            check(|t, q, c, s, stride| unsafe { x86::score_512(t, q, c, s, stride) });
        } else {
            println!("skipped: no AVX-512 with VBMI and VNNI");
        }
        if x86::path().is_some() {
            // SAFETY: as above.
            check(|t, q, c, s, stride| unsafe { x86::score_256(t, q, c, s, stride) });
        } else {
            println!("skipped: no AVX2");
        }
    }

    #[test]
    fn queries_of_zeros_and_of_no_numbers_have_tables() {
        let d = 64;
        for query in [0f32, f32::NAN, f32::INFINITY] {
            let tables = LevelTables::new(&vec![query; d], d);
            assert_eq!((tables.levels.len(), tables.scales.len()), (4 * d, 1));
        }
    }
}
