//! Scores of a few queries against many rows, and weighted sums of rows: what a decoded token does with keys and values.
//! Knows no page and no stream; rows lie side by side, as f32, bf16 or f16.
//!
//! With AVX2, FMA and F16C, or AVX-512, the loops are written out: of a dot product whose partial sums are an array the compiler
//! makes pieces of two lanes, and of a weighted sum one that loads and stores the sum for every row.

use crate::simd::{self, multiversion};
use half::slice::HalfFloatSliceExt;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod loops;

/// Rows that are read after those that are worked on, in memory that the processor would only begin to fetch then: a stream of
/// a few pages is too short for it to run ahead of.
#[derive(Clone, Copy, Default)]
pub(crate) struct Soon<'a>(&'a [u8]);

impl<'a> Soon<'a> {
    pub(crate) fn of<T: Number>(rows: &'a [T]) -> Self {
        // SAFETY: the bytes of the slice, for as long as it is borrowed; numbers have no padding.
        Self(unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), size_of_val(rows)) })
    }

    /// Bytes that are asked for with each of `n` rows, a whole number of lines for every [`STRIDE`] of them.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn per_row(self, n: usize) -> usize {
        if self.0.is_empty() {
            return 0;
        }
        self.0.len().div_ceil(n.max(1)).next_multiple_of(64 / STRIDE)
    }

    /// Asks for the part that belongs to the [`STRIDE`] rows from `j` on.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn ask(self, j: usize, per_row: usize) {
        if per_row == 0 {
            return;
        }
        let end = self.0.len();
        super::prefetch(&self.0[(j * per_row).min(end)..((j + STRIDE) * per_row).min(end)]);
    }
}

/// Rows with which a part of what comes soon is asked for.
#[cfg(target_arch = "x86_64")]
const STRIDE: usize = 4;

/// A type in which rows are held; scores and sums of them are f32.
pub(crate) trait Number: Copy + Sync {
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "read by the loops of x86-64")
    )]
    const KIND: Kind;

    /// `rows` as f32, in `room` where they are not.
    fn wide<'a>(rows: &'a [Self], room: &'a mut Vec<f32>) -> &'a [f32];
}

/// Which [`Number`] it is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "read by the loops of x86-64"))]
pub(crate) enum Kind {
    F32,
    Bf16,
    F16,
}

impl Number for f32 {
    const KIND: Kind = Kind::F32;

    fn wide<'a>(rows: &'a [Self], _: &'a mut Vec<f32>) -> &'a [f32] {
        rows
    }
}

impl Number for half::bf16 {
    const KIND: Kind = Kind::Bf16;

    fn wide<'a>(rows: &'a [Self], room: &'a mut Vec<f32>) -> &'a [f32] {
        room.resize(rows.len(), 0.0);
        widen_halves(rows, room);
        room
    }
}

impl Number for half::f16 {
    const KIND: Kind = Kind::F16;

    fn wide<'a>(rows: &'a [Self], room: &'a mut Vec<f32>) -> &'a [f32] {
        room.resize(rows.len(), 0.0);
        rows.convert_to_f32_slice(room);
        room
    }
}

/// scores[i, j] = queries[i] · rows[j]: `queries` (r, d), `rows` (n, d), `scores` r rows of n, `stride` apart.
///
/// A score does not depend on the rows and queries beside it, and is that of the same numbers in f32. Bounds are the
/// caller's: whole rows, `stride` ≥ n, and room for the last score.
pub(crate) fn dot_rows<T: Number>(
    queries: &[f32],
    rows: &[T],
    d: usize,
    scores: &mut [f32],
    stride: usize,
    soon: Soon<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    if avx2::fits(d) {
        let n = rows.len() / d;
        assert!(queries.len().is_multiple_of(d) && rows.len() == n * d);
        check_scores(queries.len() / d, n, scores, stride);
        // SAFETY: `fits` says that the processor has the features; the asserts bound rows, queries and scores.
        unsafe {
            let rows = rows.as_ptr().cast();
            match avx512::fits(d) {
                true => avx512::dot_rows::<T>(queries, rows, (n, d), scores, stride, soon),
                false => avx2::dot_rows::<T>(queries, rows, (n, d), scores, stride, soon),
            }
        }
        return;
    }
    super::prefetch(soon.0);
    plain_dot_rows(queries, T::wide(rows, &mut Vec::new()), d, scores, stride);
}

/// [`dot_rows`] against rows of bf16 as bytes, little-endian, of any alignment.
pub(crate) fn dot_bf16_rows(
    queries: &[f32],
    rows: &[u8],
    d: usize,
    scores: &mut [f32],
    stride: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if avx2::fits(d) {
        let n = rows.len() / (2 * d);
        assert!(queries.len().is_multiple_of(d) && rows.len() == n * d * 2);
        check_scores(queries.len() / d, n, scores, stride);
        let (rows, soon) = (rows.as_ptr(), Soon::default());
        // SAFETY: as in `dot_rows`; two bytes for each number.
        unsafe {
            match avx512::fits(d) {
                true => avx512::dot_rows::<half::bf16>(queries, rows, (n, d), scores, stride, soon),
                false => avx2::dot_rows::<half::bf16>(queries, rows, (n, d), scores, stride, soon),
            }
        }
        return;
    }
    let mut wide = vec![0f32; rows.len() / 2];
    super::widen_bf16(rows, &mut wide);
    plain_dot_rows(queries, &wide, d, scores, stride);
}

/// acc[i] += Σ weights[i, j] · rows[j]: `weights` r rows of n, `stride` apart, `rows` (n, d), `acc` (r, d).
///
/// A sum does not depend on the others, and is that of the same numbers in f32. Bounds are the caller's: whole rows,
/// `stride` ≥ n.
pub(crate) fn add_rows<T: Number>(
    weights: &[f32],
    stride: usize,
    rows: &[T],
    d: usize,
    acc: &mut [f32],
    soon: Soon<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    if avx2::fits(d) {
        let n = rows.len() / d;
        assert!(acc.len().is_multiple_of(d) && rows.len() == n * d);
        check_scores(acc.len() / d, n, weights, stride);
        // SAFETY: `fits` says that the processor has the features; the asserts bound rows, weights and sums.
        unsafe {
            let rows = rows.as_ptr().cast();
            match avx512::fits(d) {
                true => avx512::add_rows::<T>(weights, stride, rows, (n, d), acc, soon),
                false => avx2::add_rows::<T>(weights, stride, rows, (n, d), acc, soon),
            }
        }
        return;
    }
    super::prefetch(soon.0);
    plain_add_rows(weights, stride, T::wide(rows, &mut Vec::new()), d, acc);
}

#[inline(always)]
fn widen_halves_body(numbers: &[half::bf16], out: &mut [f32]) {
    for (number, out) in numbers.iter().zip(out) {
        *out = f32::from_bits(u32::from(number.to_bits()) << 16);
    }
}

multiversion! {
    fn widen_halves = widen_halves_body(numbers: &[half::bf16], out: &mut [f32])
}

/// Whether `scores` has room for `r` rows of `n`, `stride` apart.
pub(crate) fn has_room(scores: &[f32], r: usize, n: usize, stride: usize) -> bool {
    let needed = |rows: usize| rows.checked_mul(stride)?.checked_add(n);
    stride >= n && (r == 0 || needed(r - 1).is_some_and(|needed| scores.len() >= needed))
}

#[cfg(target_arch = "x86_64")]
fn check_scores(r: usize, n: usize, scores: &[f32], stride: usize) {
    assert!(has_room(scores, r, n, stride), "room for all scores");
}

#[inline(always)]
fn plain_dot_rows_body(queries: &[f32], rows: &[f32], d: usize, scores: &mut [f32], stride: usize) {
    for (j, row) in rows.chunks_exact(d).enumerate() {
        for (i, query) in queries.chunks_exact(d).enumerate() {
            scores[i * stride + j] = simd::dot(query, row);
        }
    }
}

multiversion! {
    fn plain_dot_rows = plain_dot_rows_body(queries: &[f32], rows: &[f32], d: usize, scores: &mut [f32], stride: usize)
}

#[inline(always)]
fn plain_add_rows_body(weights: &[f32], stride: usize, rows: &[f32], d: usize, acc: &mut [f32]) {
    for (acc, weights) in acc.chunks_exact_mut(d).zip(weights.chunks(stride.max(1))) {
        for (weight, row) in weights.iter().zip(rows.chunks_exact(d)) {
            acc.iter_mut().zip(row).for_each(|(a, x)| *a += weight * x);
        }
    }
}

multiversion! {
    fn plain_add_rows = plain_add_rows_body(weights: &[f32], stride: usize, rows: &[f32], d: usize, acc: &mut [f32])
}

#[cfg(test)]
mod tests {
    use super::super::tests::numbers;
    use super::*;

    #[test]
    fn scores_are_those_of_the_plain_loop_for_any_shape() {
        for d in [1, 7, 8, 16, 24, 64, 96, 128] {
            for r in [0, 1, 2, 3, 4, 7] {
                for n in [0, 1, 3, 4, 9, 64] {
                    let (queries, rows) = (numbers(1, r * d), numbers(2, n * d));
                    let stride = n + 2;
                    let (mut scores, mut plain) = (vec![7f32; r * stride], vec![7f32; r * stride]);
                    dot_rows(&queries, &rows, d, &mut scores, stride, Soon::of(&rows));
                    plain_dot_rows(&queries, &rows, d, &mut plain, stride);
                    for (score, plain) in scores.iter().zip(&plain) {
                        assert!((score - plain).abs() <= 2e-5, "d {d}, r {r}, n {n}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_score_does_not_depend_on_what_is_beside_it() {
        let (d, n) = (64, 11);
        let (queries, rows) = (numbers(3, 5 * d), numbers(4, n * d));
        let mut all = vec![0f32; 5 * n];
        dot_rows(&queries, &rows, d, &mut all, n, Soon::default());
        for (i, query) in queries.chunks_exact(d).enumerate() {
            for (j, row) in rows.chunks_exact(d).enumerate() {
                let mut alone = [0f32];
                dot_rows(query, row, d, &mut alone, 1, Soon::default());
                assert_eq!(alone[0].to_bits(), all[i * n + j].to_bits());
            }
        }
    }

    /// Scores and weighted sums of `short` are those of the same numbers in f32.
    fn assert_as_wide<T: Number>((d, r, n): (usize, usize, usize), short: &[T]) {
        let mut wide = Vec::new();
        let wide = T::wide(short, &mut wide);
        let (queries, none) = (numbers(5, r * d), Soon::default());
        let (mut scores, mut expected) = (vec![0f32; r * n], vec![0f32; r * n]);
        dot_rows(&queries, short, d, &mut scores, n, Soon::of(short));
        dot_rows(&queries, wide, d, &mut expected, n, none);
        assert_eq!(scores, expected, "d {d}, r {r}, n {n}");
        let (mut sums, mut expected) = (queries.clone(), queries);
        add_rows(&scores, n, short, d, &mut sums, Soon::of(short));
        add_rows(&scores, n, wide, d, &mut expected, none);
        assert_eq!(sums, expected, "d {d}, r {r}, n {n}");
    }

    #[test]
    fn rows_of_16_bits_are_taken_as_the_same_numbers_of_f32() {
        for (d, r, n) in [(64, 3, 8), (128, 7, 5), (24, 1, 4), (5, 2, 3), (64, 2, 0), (16, 4, 64)] {
            // Large ones, small ones, and those that f16 has with fewer digits.
            let rows = || (0..).zip(numbers(6, n * d)).map(|(i, x)| x * [1.0, 1e3, 1e-6][i % 3]);
            assert_as_wide((d, r, n), &rows().map(half::f16::from_f32).collect::<Vec<_>>());
            let short: Vec<half::bf16> = rows().map(half::bf16::from_f32).collect();
            assert_as_wide((d, r, n), &short);
            let bytes: Vec<u8> = short.iter().flat_map(|x| x.to_le_bytes()).collect();
            let queries = numbers(5, r * d);
            let (mut scores, mut expected) = (vec![0f32; r * n], vec![0f32; r * n]);
            dot_bf16_rows(&queries, &bytes, d, &mut scores, n);
            dot_rows(&queries, &short, d, &mut expected, n, Soon::default());
            assert_eq!(scores, expected, "d {d}, r {r}, n {n}");
        }
    }

    /// A processor that has the wider registers takes the others for few shapes.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn registers_of_eight_and_of_sixteen_numbers_agree() {
        for (d, r, n) in [(16, 1, 3), (64, 3, 64), (64, 5, 9), (96, 2, 7), (128, 4, 33)] {
            if !avx512::fits(d) || !avx2::fits(d) {
                return;
            }
            let (queries, rows, stride) = (numbers(1, r * d), numbers(2, n * d), n + 1);
            let (mut wide, mut narrow) = (vec![7f32; r * stride], vec![7f32; r * stride]);
            let (mut wide_sums, mut narrow_sums) = (numbers(3, r * d), numbers(3, r * d));
            let (shape, none, bytes) = ((n, d), Soon::default(), rows.as_ptr().cast());
            // SAFETY: `fits` says that the processor has the features; n rows, r queries and as many scores are there.
            unsafe {
                avx512::dot_rows::<f32>(&queries, bytes, shape, &mut wide, stride, none);
                avx2::dot_rows::<f32>(&queries, bytes, shape, &mut narrow, stride, none);
                avx512::add_rows::<f32>(&wide, stride, bytes, shape, &mut wide_sums, none);
                avx2::add_rows::<f32>(&wide, stride, bytes, shape, &mut narrow_sums, none);
            }
            for (wide, narrow) in wide.iter().zip(&narrow) {
                assert!((wide - narrow).abs() <= 2e-5, "d {d}, r {r}, n {n}: {wide}, {narrow}");
            }
            assert_eq!(wide_sums, narrow_sums, "d {d}, r {r}, n {n}");
        }
    }

    #[test]
    fn weighted_sums_are_those_of_the_plain_loop_for_any_shape() {
        for d in [1, 7, 8, 16, 24, 40, 64, 96, 120, 128, 200] {
            for (r, n) in [(0, 3), (1, 0), (1, 5), (2, 64), (3, 7), (4, 64), (7, 9)] {
                let stride = n + 3;
                let (weights, rows) = (numbers(7, r * stride), numbers(8, n * d));
                let (mut acc, mut plain) = (numbers(9, r * d), numbers(9, r * d));
                add_rows(&weights, stride, &rows, d, &mut acc, Soon::of(&weights));
                for (weights, plain) in weights.chunks(stride).zip(plain.chunks_exact_mut(d)) {
                    plain_add_rows(&weights[..n], n, &rows, d, plain);
                }
                for (x, y) in acc.iter().zip(&plain) {
                    assert!((x - y).abs() <= 2e-5, "d {d}, r {r}, n {n}: {x}, {y}");
                }
                // Alone, a sum has the same bits.
                for (i, acc) in acc.chunks_exact(d).enumerate() {
                    let mut alone = numbers(9, r * d)[i * d..(i + 1) * d].to_vec();
                    add_rows(&weights[i * stride..], stride, &rows, d, &mut alone, Soon::default());
                    assert_eq!(alone, acc);
                }
            }
        }
    }
}
