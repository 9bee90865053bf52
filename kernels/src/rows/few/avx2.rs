//! The loops of [`super`] in registers of eight numbers.

use super::loops::loops;
use super::{Kind, Number, STRIDE, Soon};
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

loops!("avx2,fma,f16c", 3: 3 2 1);

/// Q queries against K rows, K ≤ ROWS.
///
/// # Safety
/// AVX2, FMA and F16C; Q · d numbers at `queries`, K rows at `rows`, and K scores at every `stride` of `scores`, Q times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block<T: Number, const Q: usize, const K: usize>(
    queries: *const f32,
    rows: *const u8,
    d: usize,
    scores: *mut f32,
    stride: usize,
) {
    let size = size_of::<T>();
    let mut sums = [[_mm256_setzero_ps(); ROWS]; Q];
    for x in (0..d).step_by(LANES) {
        for k in 0..K {
            // SAFETY: LANES numbers from x on are within row k and every query.
            unsafe {
                let row = load::<T>(rows.add((k * d + x) * size));
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

/// LANES numbers as f32.
///
/// # Safety
/// AVX2 and F16C; the numbers are there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load<T: Number>(at: *const u8) -> __m256 {
    // SAFETY: as the caller says; no alignment is asked for.
    unsafe {
        match T::KIND {
            Kind::F32 => _mm256_loadu_ps(at.cast()),
            Kind::Bf16 => {
                let short = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32(short, 16))
            }
            Kind::F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
        }
    }
}

/// N registers of columns of Q sums: with three sums of four, and a register each for the weights and the row, the
/// sixteen that there are. N.
///
/// # Safety
/// AVX2, FMA and F16C; at `rows`, N · LANES numbers every d, n times; as many at `acc`, Q times; n weights at every `stride`
/// of `weights`, Q times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn columns<T: Number, const Q: usize, const N: usize>(
    weights: *const f32,
    stride: usize,
    rows: *const u8,
    (n, d): (usize, usize),
    acc: *mut f32,
    soon: Soon<'_>,
) -> usize {
    let per_row = soon.per_row(n);
    let size = size_of::<T>();
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
                let row = load::<T>(rows.add((j * d + k * LANES) * size));
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
