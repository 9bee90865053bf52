//! Codes of keys, one bit a number, from which a query's scores are estimated without reading a key.
//! Knows rows of host memory, no page and no stream.
//!
//! A key is held as its centre, the signs of what it differs by once that is turned by a random rotation, and one factor
//! (RaBitQ, arXiv 2405.12497, section 3): of a residual r with signs s the estimate of q · r is (r · r / Σ|r|) (q · s), which
//! is exact for q = r and without bias over rotations. Queries are not coded.
//!
//! Shapes: `d` the length of a row, `r` queries, `n` keys.

mod levels;

use crate::simd::multiversion;
use levels::LevelTables;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Keys that share a centre.
pub const CENTRE_KEYS: usize = 64;
/// Queries that are scored side by side: the sums of one byte of a code are one load for all of them, and the tables of a
/// head of 64 take 32 KiB for 4 queries, a first-level cache.
const FEW: usize = 4;
const MANY: usize = 8;

/// Bytes of the signs of one key.
pub const fn sign_bytes(d: usize) -> usize {
    d.div_ceil(8)
}

/// Bytes of the codes of [`CENTRE_KEYS`] keys: centre (d) and factors (CENTRE_KEYS), bf16, then signs.
pub const fn coded_bytes(d: usize) -> usize {
    2 * d + CENTRE_KEYS * (2 + sign_bytes(d))
}

/// A random rotation, (d, d); the same for the same `d`.
#[derive(Debug, Clone)]
pub struct Rotation {
    rows: Vec<f32>,
    d: usize,
}

impl Rotation {
    /// Random rows, each made orthogonal to those before it and of length 1, twice, so that rounding leaves nothing.
    ///
    /// Cost: 2 d³ multiplications.
    pub fn new(d: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        // The sum of twelve uniform numbers is as good as a normal one here: only directions are read.
        let mut normal = || (0..12).map(|_| rng.random_range(-0.5f64..0.5)).sum::<f64>();
        let mut rows: Vec<Vec<f64>> = Vec::with_capacity(d);
        while rows.len() < d {
            let mut row: Vec<f64> = (0..d).map(|_| normal()).collect();
            for _ in 0..2 {
                for other in &rows {
                    let along: f64 = row.iter().zip(other).map(|(x, y)| x * y).sum();
                    row.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
                }
                let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                row.iter_mut().for_each(|x| *x /= length);
            }
            rows.push(row);
        }
        Self { rows: rows.into_iter().flatten().map(|x| x as f32).collect(), d }
    }

    /// `rows` (n, d), turned.
    ///
    /// # Panics
    /// If `rows` are no whole rows.
    pub fn turned(&self, rows: &[f32]) -> Vec<f32> {
        let mut out = vec![0f32; rows.len()];
        // A turned row's numbers are the scores of the row against the rotation's rows.
        crate::rows::score_rows(rows, &self.rows, self.d, &mut out, self.d);
        out
    }

    /// Writes the codes of `keys` (CENTRE_KEYS, d) behind `out`, [`coded_bytes`] of them; their centre is their mean.
    ///
    /// # Panics
    /// If there are more or fewer keys.
    pub fn code(&self, keys: &[f32], out: &mut Vec<u8>) {
        let d = self.d;
        assert!(keys.len() == CENTRE_KEYS * d, "{CENTRE_KEYS} keys");
        let mut centre = vec![0f32; d];
        for key in keys.chunks_exact(d) {
            centre.iter_mut().zip(key).for_each(|(c, x)| *c += x / CENTRE_KEYS as f32);
        }
        // What is subtracted is what will be read.
        centre.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
        let differences: Vec<f32> = keys
            .chunks_exact(d)
            .flat_map(|key| key.iter().zip(&centre).map(|(x, c)| x - c))
            .collect();
        let turned = self.turned(&differences);
        let narrow = |x: f32| half::bf16::from_f32(x).to_le_bytes();
        out.extend(centre.iter().flat_map(|x| narrow(*x)));
        for row in turned.chunks_exact(d) {
            let (squares, sizes) = row
                .iter()
                .fold((0f32, 0f32), |(squares, sizes), x| (squares + x * x, sizes + x.abs()));
            out.extend(narrow(if sizes > 0.0 { squares / sizes } else { 0.0 }));
        }
        for row in turned.chunks_exact(d) {
            let byte = |numbers: &[f32]| {
                let above = numbers.iter().zip(0..).filter(|(x, _)| **x > 0.0);
                above.fold(0u8, |byte, (_, bit)| byte | 1 << bit)
            };
            out.extend(row.chunks(8).map(byte));
        }
    }
}

/// Scores queries against codes of keys in the fastest way that this processor has.
#[derive(Debug, Clone)]
pub struct CodeScorer(Form);

#[derive(Debug, Clone)]
enum Form {
    Rounded(LevelTables),
    Exact(SignTables),
}

impl CodeScorer {
    /// Of `queries` (r, d) that [`Rotation::turned`] turned.
    ///
    /// With AVX2 and rows of whole 32 numbers up to 256, what four signs make of a query is rounded to one of 127 steps of the
    /// widest of them, so that a score is off by up to factor · step · d / 8; elsewhere the scores are [`SignTables`]'.
    ///
    /// # Panics
    /// If `queries` are no whole rows.
    pub fn new(queries: &[f32], d: usize) -> Self {
        assert!(d > 0 && queries.len().is_multiple_of(d), "whole queries");
        Self(match LevelTables::fits(d) {
            true => Form::Rounded(LevelTables::new(queries, d)),
            false => Form::Exact(SignTables::new(queries, d)),
        })
    }

    /// As [`SignTables::score`].
    ///
    /// # Panics
    /// If lengths do not fit.
    pub fn score(&self, queries: &[f32], codes: &[u8], scores: &mut [f32], stride: usize) {
        match &self.0 {
            Form::Rounded(tables) => tables.score(queries, codes, scores, stride),
            Form::Exact(tables) => tables.score(queries, codes, scores, stride),
        }
    }
}

/// What queries make of each byte of signs: sums that a code's bytes pick. The reference of [`CodeScorer`], which rounds
/// nothing.
#[derive(Debug, Clone)]
pub struct SignTables {
    /// By group of queries: (sign_bytes, 256, FEW or MANY).
    groups: Vec<Vec<f32>>,
    lanes: usize,
    queries: usize,
    d: usize,
}

impl SignTables {
    /// Of `queries` (r, d) that [`Rotation::turned`] turned.
    ///
    /// # Panics
    /// If `queries` are no whole rows.
    pub fn new(queries: &[f32], d: usize) -> Self {
        assert!(d > 0 && queries.len().is_multiple_of(d), "whole queries");
        let count = queries.len() / d;
        let lanes = if count <= FEW { FEW } else { MANY };
        let group = |queries: &[f32]| {
            let mut table = vec![0f32; sign_bytes(d) * 256 * lanes];
            for (lane, query) in queries.chunks_exact(d).enumerate() {
                for (sums, numbers) in table.chunks_exact_mut(256 * lanes).zip(query.chunks(8)) {
                    sums[lane] = -numbers.iter().sum::<f32>();
                    // A bit that is set turns its number's sign; the other bits' sum is there already.
                    for (bit, x) in numbers.iter().enumerate() {
                        for low in 0..1 << bit {
                            sums[((1 << bit) + low) * lanes + lane] =
                                sums[low * lanes + lane] + 2.0 * x;
                        }
                    }
                }
            }
            table
        };
        let groups = queries.chunks(lanes * d).map(group).collect();
        Self { groups, lanes, queries: count, d }
    }

    /// scores[i, j] = the estimate of queries[i] · keys[j]: `queries` (r, d) as they were before they were turned, `codes`
    /// those of n keys, [`CENTRE_KEYS`] after [`CENTRE_KEYS`]; `scores` r rows of n, `stride` apart.
    ///
    /// # Panics
    /// If lengths do not fit.
    pub fn score(&self, queries: &[f32], codes: &[u8], scores: &mut [f32], stride: usize) {
        let (d, bytes) = (self.d, coded_bytes(self.d));
        let n = codes.len() / bytes * CENTRE_KEYS;
        assert!(
            codes.len().is_multiple_of(bytes) && queries.len() == self.queries * d,
            "whole codes"
        );
        assert!(crate::rows::has_room(scores, self.queries, n, stride), "room for scores");
        let mut centre = vec![0f32; d];
        let mut at_centre = vec![0f32; self.queries];
        for (codes, first) in codes.chunks_exact(bytes).zip((0..).step_by(CENTRE_KEYS)) {
            let (own, rest) = codes.split_at(2 * d);
            crate::rows::widen_bf16(own, &mut centre);
            crate::rows::score_rows(queries, &centre, d, &mut at_centre, 1);
            let (factors, signs) = rest.split_at(2 * CENTRE_KEYS);
            let parts = self.groups.iter().zip(at_centre.chunks(self.lanes));
            for ((table, at_centre), query) in parts.zip((0..).step_by(self.lanes)) {
                let scores = &mut scores[query * stride + first..];
                score_group((table, self.lanes), at_centre, factors, signs, scores, stride);
            }
        }
    }
}

/// Scores of `at_centre`'s queries, at most `L`, against the keys of one centre.
#[inline(always)]
fn score_signs<const L: usize>(
    table: &[f32],
    at_centre: &[f32],
    factors: &[u8],
    signs: &[u8],
    scores: &mut [f32],
    stride: usize,
) {
    let (sums, _) = table.as_chunks::<L>();
    let (sums, _) = sums.as_chunks::<256>();
    let (factors, _) = factors.as_chunks::<2>();
    let mut found = [[0f32; L]; CENTRE_KEYS];
    for (key, found) in signs.chunks_exact(sums.len()).zip(&mut found) {
        for (byte, sums) in key.iter().zip(sums) {
            let own = &sums[usize::from(*byte)];
            for lane in 0..L {
                found[lane] += own[lane];
            }
        }
    }
    for (lane, at_centre) in at_centre.iter().enumerate() {
        let row = &mut scores[lane * stride..][..CENTRE_KEYS];
        for ((score, found), factor) in row.iter_mut().zip(&found).zip(factors) {
            let factor = f32::from_bits(u32::from(u16::from_le_bytes(*factor)) << 16);
            *score = at_centre + factor * found[lane];
        }
    }
}

/// [`score_signs`] for as many queries side by side as the table is made for.
#[inline(always)]
fn score_group_body(
    (table, lanes): (&[f32], usize),
    at_centre: &[f32],
    factors: &[u8],
    signs: &[u8],
    scores: &mut [f32],
    stride: usize,
) {
    match lanes {
        FEW => score_signs::<FEW>(table, at_centre, factors, signs, scores, stride),
        _ => score_signs::<MANY>(table, at_centre, factors, signs, scores, stride),
    }
}

multiversion! {
    fn score_group = score_group_body(table: (&[f32], usize), at_centre: &[f32], factors: &[u8], signs: &[u8], scores: &mut [f32], stride: usize)
}
