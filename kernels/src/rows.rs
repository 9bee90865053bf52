//! Arithmetic on rows of host memory: scores of a few queries, softmax, the largest, widening and rotation.
//! Knows no tensor and no stream; what a row stands for is its caller's matter.
//!
//! Recall scans keys that lie in host memory in a stored type, most of which no device ever sees: these are the loops
//! of that scan. Shapes: `d` the length of a row, `r` queries, `n` rows.

mod few;
mod largest;
mod shorten;

pub(crate) use few::{Number, Soon, add_rows, dot_rows, has_room};
pub use largest::largest;
pub use shorten::shorten_row;

use crate::attention::matmul;
use crate::simd::{self, multiversion};

/// From this many queries on, rows are scored by a matrix product.
const GEMM_QUERIES: usize = 8;

/// scores[i, j] = queries[i] · rows[j]: `queries` (r, d), `rows` (n, d), `scores` r rows of n, `stride` apart.
///
/// # Panics
/// If `d` is 0, a length is no multiple of it, or `scores` is too short.
pub fn score_rows(queries: &[f32], rows: &[f32], d: usize, scores: &mut [f32], stride: usize) {
    let (r, n) = (queries.len() / d, rows.len() / d);
    assert!(queries.len() == r * d && rows.len() == n * d && stride >= n, "whole rows");
    if r == 0 || n == 0 {
        return;
    }
    if r >= GEMM_QUERIES {
        matmul(scores, stride, queries, (d, 1), rows, (1, d), (r, n, d), 0.0);
    } else {
        dot_rows(queries, rows, d, scores, stride, Soon::default());
    }
}

/// [`score_rows`] against rows of bf16, little-endian, for a few queries: nothing is widened first.
///
/// # Panics
/// If `d` is 0, a length is no multiple of it, or `scores` is too short.
pub fn score_bf16_rows(queries: &[f32], rows: &[u8], d: usize, scores: &mut [f32], stride: usize) {
    let (r, n) = (queries.len() / d, rows.len() / (2 * d));
    assert!(queries.len() == r * d && rows.len() == n * d * 2 && stride >= n, "whole rows");
    few::dot_bf16_rows(queries, rows, d, scores, stride);
}

/// The mean of every `span` rows, and the lowest cosine of one of them with it: `rows` (n · span, d), `means` (n, d),
/// `lowest` (n).
///
/// # Panics
/// If `span` or `d` is 0, or the lengths do not fit.
pub fn means_of_rows(rows: &[f32], span: usize, d: usize, means: &mut [f32], lowest: &mut [f32]) {
    let n = lowest.len();
    assert!(span > 0 && rows.len() == n * span * d && means.len() == n * d, "whole spans");
    span_means(rows, span, d, means, lowest);
}

/// scores[j] = lengths[j] · cosines[bits in which codes[j] and `query` differ]: of n codes, `lengths` and `scores` (n),
/// `cosines` (129).
///
/// # Panics
/// If the lengths do not fit.
pub fn score_codes(
    codes: &[u128],
    lengths: &[f32],
    query: u128,
    cosines: &[f32; 129],
    scores: &mut [f32],
) {
    assert!(codes.len() == lengths.len() && codes.len() == scores.len(), "a score for each code");
    score_each_code(codes, lengths, query, cosines, scores);
}

/// Replaces scores by e^(score - max), where `max` is the largest of them or above it; returns their sum.
pub fn exponentiate(scores: &mut [f32], max: f32) -> f32 {
    let mut sum = 0.0;
    exponentiate_below(scores, max, &mut sum);
    sum
}

/// The largest of `values`, no numbers among them passed over; negative infinity where there is none.
pub fn maximum(values: &[f32]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    maximum_of(values, &mut max);
    max
}

/// out[i] = max over |j - i| ≤ `reach` of values[j]; `out` is as long as `values`.
///
/// # Panics
/// If the lengths do not fit.
pub fn maximum_within(values: &[f32], reach: usize, out: &mut [f32]) {
    assert!(values.len() == out.len(), "as many numbers out as in");
    let n = values.len();
    // Nothing is further away.
    let reach = reach.min(n);
    // ahead[i] is the largest of `width` numbers from i on; the width doubles.
    let (mut ahead, mut width) = (values.to_vec(), 1);
    while width <= 2 * reach {
        let step = width.min(2 * reach + 1 - width);
        let both = n.saturating_sub(step);
        let pairs = ahead.iter().zip(&ahead[n - both..]);
        out.iter_mut().zip(pairs).for_each(|(out, (a, b))| *out = if b > a { *b } else { *a });
        ahead[..both].copy_from_slice(&out[..both]);
        width += step;
    }
    out[reach..].copy_from_slice(&ahead[..n - reach]);
    let mut top = maximum(&values[..reach]);
    for (i, out) in out[..reach].iter_mut().enumerate() {
        top = values.get(i + reach).map_or(top, |x| top.max(*x));
        *out = top;
    }
}

/// out[j] = Σ factors[i] · rows[i, j], added row by row: `rows` (factors, out).
///
/// # Panics
/// If the lengths do not fit.
pub fn sum_scaled(rows: &[f32], factors: &[f32], out: &mut [f32]) {
    assert!(rows.len() == factors.len() * out.len(), "a row for each factor");
    scaled_sum(rows, factors, out);
}

/// Asks for bytes that will be read soon, so that reading many places waits for memory once and not for each.
#[inline]
pub fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 has the instruction, which reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

#[inline(always)]
fn scaled_sum_body(rows: &[f32], factors: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (row, factor) in rows.chunks_exact(out.len().max(1)).zip(factors) {
        out.iter_mut().zip(row).for_each(|(out, x)| *out += x * factor);
    }
}

multiversion! {
    fn scaled_sum = scaled_sum_body(rows: &[f32], factors: &[f32], out: &mut [f32])
}

/// Numbers of type bf16, little-endian, as f32.
///
/// # Panics
/// If `bytes` holds another number of them than `out`.
pub fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
    let (numbers, rest) = bytes.as_chunks::<2>();
    assert!(rest.is_empty() && numbers.len() == out.len(), "two bytes for each number");
    widen(numbers, out);
}

/// Numbers rounded to the nearest bf16, ties to even, as little-endian bytes; what is no number stays none.
///
/// # Panics
/// If `out` has room for another number of them than `numbers`.
pub fn narrow_bf16(numbers: &[f32], out: &mut [u8]) {
    let (out, rest) = out.as_chunks_mut::<2>();
    assert!(rest.is_empty() && numbers.len() == out.len(), "two bytes for each number");
    narrow(numbers, out);
}

/// Rotates one row in the half-split layout: `cos`, `sin` (d/2), as [`crate::rotate`] does.
///
/// # Panics
/// If the lengths do not fit.
pub fn rotate_row(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    assert!(row.len() == 2 * cos.len() && sin.len() == cos.len(), "half a row of angles");
    rotate_half(row, cos, sin);
}

#[inline(always)]
fn rotate_half_body(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = row.split_at_mut(cos.len());
    for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}

multiversion! {
    fn rotate_half = rotate_half_body(row: &mut [f32], cos: &[f32], sin: &[f32])
}

#[inline(always)]
fn span_means_body(rows: &[f32], span: usize, d: usize, means: &mut [f32], lowest: &mut [f32]) {
    let spans = rows.chunks_exact(span * d).zip(means.chunks_exact_mut(d));
    for ((rows, mean), lowest) in spans.zip(lowest) {
        mean.fill(0.0);
        for row in rows.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / span as f32);
        }
        let length = simd::dot(mean, mean).sqrt();
        *lowest = f32::INFINITY;
        for row in rows.chunks_exact(d) {
            let both = length * simd::dot(row, row).sqrt() + 1e-20;
            *lowest = lowest.min(simd::dot(row, mean) / both);
        }
    }
}

multiversion! {
    fn span_means = span_means_body(rows: &[f32], span: usize, d: usize, means: &mut [f32], lowest: &mut [f32])
}

#[inline(always)]
fn maximum_of_body(values: &[f32], max: &mut f32) {
    let mut lanes = [f32::NEG_INFINITY; simd::LANES];
    let (chunks, rest) = values.as_chunks::<{ simd::LANES }>();
    for chunk in chunks {
        for lane in 0..simd::LANES {
            // A comparison that a NaN fails keeps what there was, and is one instruction.
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    for value in lanes.iter().chain(rest) {
        *max = if *value > *max { *value } else { *max };
    }
}

multiversion! {
    fn maximum_of = maximum_of_body(values: &[f32], max: &mut f32)
}

#[inline(always)]
fn exponentiate_below_by<const FUSED: bool>(scores: &mut [f32], max: f32, sum: &mut f32) {
    let mut sums = [0f32; simd::LANES];
    let (chunks, rest) = scores.as_chunks_mut::<{ simd::LANES }>();
    for chunk in chunks {
        for lane in 0..simd::LANES {
            chunk[lane] = simd::exp_by::<FUSED>(chunk[lane] - max);
            sums[lane] += chunk[lane];
        }
    }
    for score in rest {
        *score = simd::exp_by::<FUSED>(*score - max);
        *sum += *score;
    }
    *sum += sums.iter().sum::<f32>();
}

#[inline(always)]
fn exponentiate_below_body(scores: &mut [f32], max: f32, sum: &mut f32) {
    exponentiate_below_by::<false>(scores, max, sum);
}

#[inline(always)]
fn exponentiate_below_fused(scores: &mut [f32], max: f32, sum: &mut f32) {
    exponentiate_below_by::<true>(scores, max, sum);
}

multiversion! {
    fn exponentiate_below = exponentiate_below_body | exponentiate_below_fused(scores: &mut [f32], max: f32, sum: &mut f32)
}

#[inline(always)]
fn widen_body(numbers: &[[u8; 2]], out: &mut [f32]) {
    for (number, out) in numbers.iter().zip(out) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*number)) << 16);
    }
}

multiversion! {
    fn widen = widen_body(numbers: &[[u8; 2]], out: &mut [f32])
}

#[inline(always)]
fn narrow_body(numbers: &[f32], out: &mut [[u8; 2]]) {
    for (number, out) in numbers.iter().zip(out) {
        let bits = number.to_bits();
        let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // Rounding could carry a number that is none over to infinity.
        let none = bits >> 16 | 0x40;
        let is_none = bits & 0x7fff_ffff > 0x7f80_0000;
        *out = (if is_none { none } else { nearest } as u16).to_le_bytes();
    }
}

multiversion! {
    fn narrow = narrow_body(numbers: &[f32], out: &mut [[u8; 2]])
}

#[inline(always)]
fn score_each_code_body(
    codes: &[u128],
    lengths: &[f32],
    query: u128,
    cosines: &[f32; 129],
    scores: &mut [f32],
) {
    for ((score, code), length) in scores.iter_mut().zip(codes).zip(lengths) {
        *score = length * cosines[(code ^ query).count_ones() as usize];
    }
}

multiversion! {
    fn score_each_code = score_each_code_body(
        codes: &[u128],
        lengths: &[f32],
        query: u128,
        cosines: &[f32; 129],
        scores: &mut [f32],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use proptest::prelude::*;

    pub(super) fn numbers(seed: u32, count: usize) -> Vec<f32> {
        let next = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32;
        (0..count as u32).map(|i| next(i) / (1 << 23) as f32 - 1.0).collect()
    }

    #[test]
    fn the_largest_within_reach_is_that_of_each_window() {
        let number = |i: usize| ((i * 2_654_435_761) % 1009) as f32 - 500.0;
        for n in [0, 1, 2, 5, 16, 33, 100] {
            let values: Vec<f32> = (0..n).map(number).collect();
            for reach in [0, 1, 2, 3, 4, 7, 16, 31, 64, 200, usize::MAX] {
                let mut out = vec![0.0; n];
                maximum_within(&values, reach, &mut out);
                let end = |i: usize| i.saturating_add(reach).saturating_add(1).min(n);
                let window = |i: usize| &values[i.saturating_sub(reach)..end(i)];
                let expected: Vec<f32> = (0..n).map(|i| maximum(window(i))).collect();
                assert_eq!(out, expected, "{n} numbers, reach {reach}");
            }
        }
    }

    #[test]
    fn scores_are_dot_products_for_any_number_of_queries() {
        for (r, n, d) in [(1, 5, 64), (3, 65, 64), (8, 3, 16), (24, 130, 96), (2, 0, 8)] {
            let (queries, rows) = (numbers(1, r * d), numbers(2, n * d));
            let stride = n + 3;
            let mut scores = vec![7f32; r * stride];
            score_rows(&queries, &rows, d, &mut scores, stride);
            for i in 0..r {
                for j in 0..n {
                    let exact: f64 = (0..d)
                        .map(|x| f64::from(queries[i * d + x]) * f64::from(rows[j * d + x]))
                        .sum();
                    assert!((f64::from(scores[i * stride + j]) - exact).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn narrowed_numbers_are_the_nearest_with_ties_to_even() {
        let edges =
            [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-42];
        let ties = [0x3f80_8000, 0x3f81_8000, 0x7f7f_8000, 0x7f80_0001, 0xffc0_1234, 0x7fff_ffff];
        let mut all: Vec<f32> = numbers(9, 1000);
        all.extend(edges.into_iter().chain(ties.map(f32::from_bits)));
        let mut bytes = vec![0; 2 * all.len()];
        narrow_bf16(&all, &mut bytes);
        for (x, bytes) in all.iter().zip(bytes.as_chunks::<2>().0) {
            assert_eq!(
                half::bf16::from_le_bytes(*bytes).to_bits(),
                half::bf16::from_f32(*x).to_bits()
            );
        }
    }

    #[test]
    fn a_code_scores_by_the_bits_in_which_it_differs() {
        let codes = [0u128, u128::MAX, 1 << 127 | 1, 0xff << 60];
        let cosines = std::array::from_fn(|bits| bits as f32);
        let mut scores = [0f32; 4];
        score_codes(&codes, &[1.0, 2.0, 3.0, 4.0], 1, &cosines, &mut scores);
        assert_eq!(scores, [1.0, 254.0, 3.0, 36.0]);
    }

    #[test]
    fn exponentials_sum_to_what_a_softmax_divides_by() {
        let mut scores = numbers(3, 77);
        let exact: Vec<f64> = scores.iter().map(|x| f64::from(*x).exp()).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum = exponentiate(&mut scores, max);
        let total: f64 = exact.iter().sum();
        assert!((f64::from(sum) * f64::from(max).exp() / total - 1.0).abs() < 1e-5);
        for (weight, exact) in scores.iter().zip(exact) {
            assert!((f64::from(weight / sum) - exact / total).abs() < 1e-6);
        }
        assert_eq!(exponentiate(&mut [], 0.0), 0.0);
        let mut unseen = [f32::NEG_INFINITY; 3];
        assert_eq!((exponentiate(&mut unseen, 0.0), unseen), (0.0, [0.0; 3]));
    }

    #[test]
    fn a_scaled_sum_adds_row_by_row() {
        for (n, len) in [(3, 100), (1, 7), (0, 5), (2, 0)] {
            let (rows, factors) = (numbers(7, n * len), numbers(8, n));
            let mut out = vec![7f32; len];
            sum_scaled(&rows, &factors, &mut out);
            for (j, sum) in out.iter().enumerate() {
                let plain = (0..n).fold(0f32, |sum, i| sum + rows[i * len + j] * factors[i]);
                assert_eq!(*sum, plain);
            }
        }
    }

    #[test]
    fn means_and_the_lowest_cosine_are_those_of_their_definition() {
        for (n, span, d) in [(8, 8, 64), (3, 5, 30), (2, 1, 7), (0, 8, 16)] {
            let rows = numbers(5, n * span * d);
            let (mut means, mut lowest) = (vec![7f32; n * d], vec![7f32; n]);
            means_of_rows(&rows, span, d, &mut means, &mut lowest);
            let spans = rows.chunks_exact(span * d).zip(means.chunks_exact(d)).zip(&lowest);
            for ((rows, means), lowest) in spans {
                let number = |row: usize, x: usize| f64::from(rows[row * d + x]);
                let mean = |x| (0..span).map(|row| number(row, x)).sum::<f64>() / span as f64;
                let length = (0..d).map(|x| mean(x).powi(2)).sum::<f64>().sqrt();
                let cosine = |row| {
                    let dot: f64 = (0..d).map(|x| number(row, x) * mean(x)).sum();
                    dot / (length * (0..d).map(|x| number(row, x).powi(2)).sum::<f64>().sqrt())
                };
                let exact = (0..span).map(cosine).fold(f64::INFINITY, f64::min);
                assert!((f64::from(*lowest) - exact).abs() < 1e-5, "{lowest}, {exact}");
                assert!((0..d).all(|x| (f64::from(means[x]) - mean(x)).abs() < 1e-6));
            }
        }
    }

    #[test]
    fn a_row_is_rotated_as_a_tensor_is() {
        let angles = crate::RotaryAngles::new([5, 900], &[1.0, 0.3, 0.01, 0.002], 1.1);
        let x = numbers(4, 16);
        let tensor = Tensor::from_vec(x.clone(), (2, 1, 8), &Device::Cpu).unwrap();
        let expected = crate::rotate(&tensor, &angles).unwrap().flatten_all().unwrap();
        let mut rows = x;
        for (i, row) in rows.chunks_exact_mut(8).enumerate() {
            let (cos, sin) = angles.at(i);
            rotate_row(row, cos, sin);
        }
        assert_eq!(rows, expected.to_vec1::<f32>().unwrap());
    }

    proptest! {
        #[test]
        fn the_maximum_is_that_of_a_fold(values in prop::collection::vec(any::<f32>(), 0..60)) {
            let expected = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(maximum(&values), expected);
        }

        #[test]
        fn widened_numbers_are_those_that_were_written(values in prop::collection::vec(any::<f32>(), 0..40)) {
            let short: Vec<half::bf16> = values.iter().map(|x| half::bf16::from_f32(*x)).collect();
            let bytes: Vec<u8> = short.iter().flat_map(|x| x.to_le_bytes()).collect();
            let mut out = vec![0f32; short.len()];
            widen_bf16(&bytes, &mut out);
            let expected: Vec<u32> = short.iter().map(|x| x.to_f32().to_bits()).collect();
            prop_assert_eq!(out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected);
        }
    }
}
