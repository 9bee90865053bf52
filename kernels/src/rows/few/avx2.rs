//! The loops of [`super`] in registers of eight numbers.

use super::{STRIDE, Soon};
use crate::simd::{self, Level};
use std::arch::x86_64::*;

/// Numbers of a register.
const LANES: usize = 8;
/// Rows of one block: with three queries twelve sums, and a register each for the queries and the row, are the sixteen
/// that there are.
const ROWS: usize = 4;

/// Whether rows of `d` numbers are whole registers and the processor has the features.
#[inline]
pub(super) fn fits(d: usize) -> bool {
    d > 0 && d.is_multiple_of(LANES) && simd::level() != Level::Portable
}

/// # Safety
/// AVX2 and FMA; `rows` reaches n · d numbers of f32, or of bf16 if `BF16`, d a multiple of LANES; `scores` has room for
/// n scores behind each whole `stride` of queries.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn dot_rows<const BF16: bool>(
    queries: &[f32],
    rows: *const u8,
    (n, d): (usize, usize),
    scores: &mut [f32],
    stride: usize,
    soon: Soon<'_>,
) {
    let per_row = soon.per_row(n);
    let row_bytes = d * if BF16 { 2 } else { 4 };
    let r = queries.len() / d;
    let blocks = n / ROWS * ROWS;
    let mut i = 0;
    while i < r {
        let count = (r - i).min(3);
        // SAFETY: `i + count` queries are there, and rows and scores as the caller says; the last rows have a block of
        // their own, of as many rows as there are.
        unsafe {
            let queries = queries.as_ptr().add(i * d);
            let scores = scores.as_mut_ptr().add(i * stride);
            for j in (0..blocks).step_by(ROWS) {
                if i == 0 {
                    soon.ask(j, per_row);
                }
                let (rows, scores) = (rows.add(j * row_bytes), scores.add(j));
                match count {
                    3 => block::<BF16, 3, ROWS>(queries, rows, d, scores, stride),
                    2 => block::<BF16, 2, ROWS>(queries, rows, d, scores, stride),
                    _ => block::<BF16, 1, ROWS>(queries, rows, d, scores, stride),
                }
            }
            for j in blocks..n {
                let (rows, scores) = (rows.add(j * row_bytes), scores.add(j));
                match count {
                    3 => block::<BF16, 3, 1>(queries, rows, d, scores, stride),
                    2 => block::<BF16, 2, 1>(queries, rows, d, scores, stride),
                    _ => block::<BF16, 1, 1>(queries, rows, d, scores, stride),
                }
            }
        }
        i += count;
    }
}

/// Q queries against K rows, K ≤ ROWS.
///
/// # Safety
/// AVX2 and FMA; Q · d numbers at `queries`, K rows at `rows`, and K scores at every `stride` of `scores`, Q times.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn block<const BF16: bool, const Q: usize, const K: usize>(
    queries: *const f32,
    rows: *const u8,
    d: usize,
    scores: *mut f32,
    stride: usize,
) {
    let size = if BF16 { 2 } else { 4 };
    let mut sums = [[_mm256_setzero_ps(); ROWS]; Q];
    for x in (0..d).step_by(LANES) {
        for k in 0..K {
            // SAFETY: LANES numbers from x on are within row k and every query.
            unsafe {
                let row = load::<BF16>(rows.add((k * d + x) * size));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let query = _mm256_loadu_ps(queries.add(i * d + x));
                    sums[k] = _mm256_fmadd_ps(query, row, sums[k]);
                }
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        let pairs =
            _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
        let halves = (_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
        let all = _mm_add_ps(halves.0, halves.1);
        // SAFETY: K scores are there.
        unsafe {
            match K {
                ROWS => _mm_storeu_ps(scores.add(i * stride), all),
                _ => _mm_store_ss(scores.add(i * stride), all),
            }
        }
    }
}

/// LANES numbers of f32, or of bf16 as f32.
///
/// # Safety
/// AVX2; the numbers are there.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn load<const BF16: bool>(at: *const u8) -> __m256 {
    // SAFETY: as the caller says; no alignment is asked for.
    unsafe {
        if BF16 {
            let short = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32(short, 16))
        } else {
            _mm256_loadu_ps(at.cast())
        }
    }
}

/// # Safety
/// AVX2 and FMA; `rows` reaches n · d numbers of f32, or of bf16 if `BF16`, d a multiple of LANES; `weights` has n
/// behind each whole `stride` of sums.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn add_rows<const BF16: bool>(
    weights: &[f32],
    stride: usize,
    rows: *const u8,
    (n, d): (usize, usize),
    acc: &mut [f32],
    soon: Soon<'_>,
) {
    let size = if BF16 { 2 } else { 4 };
    let r = acc.len() / d;
    let mut i = 0;
    while i < r {
        let count = (r - i).min(3);
        let mut x = 0;
        while x < d {
            // SAFETY: the columns from x on, as many as a branch takes, are within every row and every sum.
            unsafe {
                let rows = rows.add(x * size);
                let acc = acc.as_mut_ptr().add(i * d + x);
                let weights = weights.as_ptr().add(i * stride);
                let wide = (d - x) / LANES >= 4;
                let soon = if x == 0 && i == 0 { soon } else { Soon::default() };
                x += LANES
                    * match (count, wide) {
                        (3, true) => {
                            columns::<BF16, 3, 4>(weights, stride, rows, (n, d), acc, soon)
                        }
                        (3, false) => {
                            columns::<BF16, 3, 1>(weights, stride, rows, (n, d), acc, soon)
                        }
                        (2, true) => {
                            columns::<BF16, 2, 4>(weights, stride, rows, (n, d), acc, soon)
                        }
                        (2, false) => {
                            columns::<BF16, 2, 1>(weights, stride, rows, (n, d), acc, soon)
                        }
                        (_, true) => {
                            columns::<BF16, 1, 4>(weights, stride, rows, (n, d), acc, soon)
                        }
                        (_, false) => {
                            columns::<BF16, 1, 1>(weights, stride, rows, (n, d), acc, soon)
                        }
                    };
            }
        }
        i += count;
    }
}

/// N registers of columns of Q sums: with three sums of four, and a register each for the weights and the row, the
/// sixteen that there are. N.
///
/// # Safety
/// AVX2 and FMA; at `rows`, N · LANES numbers every d, n times; as many at `acc`, Q times; n weights at every `stride`
/// of `weights`, Q times.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn columns<const BF16: bool, const Q: usize, const N: usize>(
    weights: *const f32,
    stride: usize,
    rows: *const u8,
    (n, d): (usize, usize),
    acc: *mut f32,
    soon: Soon<'_>,
) -> usize {
    let per_row = soon.per_row(n);
    let size = if BF16 { 2 } else { 4 };
    let mut sums = [[_mm256_setzero_ps(); N]; Q];
    // SAFETY: as the caller says.
    unsafe {
        for (i, sums) in sums.iter_mut().enumerate() {
            for (k, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(acc.add(i * d + k * LANES));
            }
        }
        for j in 0..n {
            if j.is_multiple_of(STRIDE) {
                soon.ask(j, per_row);
            }
            let mut own = [_mm256_setzero_ps(); Q];
            for (i, own) in own.iter_mut().enumerate() {
                *own = _mm256_broadcast_ss(&*weights.add(i * stride + j));
            }
            for k in 0..N {
                let row = load::<BF16>(rows.add((j * d + k * LANES) * size));
                for (sums, own) in sums.iter_mut().zip(&own) {
                    sums[k] = _mm256_fmadd_ps(*own, row, sums[k]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (k, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(acc.add(i * d + k * LANES), *sum);
            }
        }
    }
    N
}
