//! The loops of [`super`] in registers of sixteen numbers: half the instructions, which is what bounds them where another
//! thread has a share of the core.

use super::loops::loops;
use super::{Kind, Number, STRIDE, Soon};
use crate::simd::{self, Level};
use std::arch::x86_64::*;

/// Numbers of a register.
const LANES: usize = 16;
/// Rows whose scores are summed up together.
const ROWS: usize = 4;

/// Whether rows of `d` numbers are whole registers and the processor has the features.
#[inline]
pub(super) fn fits(d: usize) -> bool {
    d > 0 && d.is_multiple_of(LANES) && simd::level() == Level::Avx512
}

loops!("avx512f,avx2,fma", 4: 4 3 2 1);

/// Q queries against K rows, K ≤ ROWS.
///
/// # Safety
/// AVX-512F; Q · d numbers at `queries`, K rows at `rows`, and K scores at every `stride` of `scores`, Q times.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn block<T: Number, const Q: usize, const K: usize>(
    queries: *const f32,
    rows: *const u8,
    d: usize,
    scores: *mut f32,
    stride: usize,
) {
    let size = size_of::<T>();
    let mut sums = [[_mm512_setzero_ps(); ROWS]; Q];
    for x in (0..d).step_by(LANES) {
        for k in 0..K {
            // SAFETY: LANES numbers from x on are within row k and every query.
            unsafe {
                let row = load::<T>(rows.add((k * d + x) * size));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let query = _mm512_loadu_ps(queries.add(i * d + x));
                    sums[k] = _mm512_fmadd_ps(query, row, sums[k]);
                }
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        let low = _mm512_castps_pd(sum_of_pairs(sums[0], sums[1]));
        let high = _mm512_castps_pd(sum_of_pairs(sums[2], sums[3]));
        // In each quarter one number of every row.
        let rows = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)),
        );
        let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(rows), 1));
        let half = _mm256_add_ps(_mm512_castps512_ps256(rows), upper);
        let all = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        // SAFETY: K scores are there.
        unsafe {
            match K {
                ROWS => _mm_storeu_ps(scores.add(i * stride), all),
                _ => _mm_store_ss(scores.add(i * stride), all),
            }
        }
    }
}

/// In each quarter a₀ + a₂, b₀ + b₂, a₁ + a₃, b₁ + b₃.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_of_pairs(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
}

/// LANES numbers as f32.
///
/// # Safety
/// AVX-512F; the numbers are there.
#[inline]
#[target_feature(enable = "avx512f,avx2")]
unsafe fn load<T: Number>(at: *const u8) -> __m512 {
    // SAFETY: as the caller says; no alignment is asked for.
    unsafe {
        match T::KIND {
            Kind::F32 => _mm512_loadu_ps(at.cast()),
            Kind::Bf16 => {
                let short = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32(short, 16))
            }
            Kind::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
        }
    }
}

/// N registers of columns of Q sums, with four sums sixteen, and a register each for their weights and the row, of the 32 that there are. N.
///
/// # Safety
/// AVX-512F; at `rows`, N · LANES numbers every d, n times; as many at `acc`, Q times; n weights at every `stride` of
/// `weights`, Q times.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
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
    let mut sums = [[_mm512_setzero_ps(); N]; Q];
    // SAFETY: as the caller says.
    unsafe {
        for (i, sums) in sums.iter_mut().enumerate() {
            for (k, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(acc.add(i * d + k * LANES));
            }
        }
        for j in 0..n {
            if j.is_multiple_of(STRIDE) {
                soon.ask(j, per_row);
            }
            let mut own = [_mm512_setzero_ps(); Q];
            for (i, own) in own.iter_mut().enumerate() {
                *own = _mm512_set1_ps(*weights.add(i * stride + j));
            }
            for k in 0..N {
                let row = load::<T>(rows.add((j * d + k * LANES) * size));
                for (sums, own) in sums.iter_mut().zip(&own) {
                    sums[k] = _mm512_fmadd_ps(*own, row, sums[k]);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (k, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(acc.add(i * d + k * LANES), *sum);
            }
        }
    }
    N
}
