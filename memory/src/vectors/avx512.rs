//! The AVX-512 forms of the scan, of counting a row's bits and of dot products.
//! Knows nothing of when they are taken; each gives the numbers of its neighbour for AVX2, bit for bit.

use std::arch::x86_64::*;
use std::ops::Range;

use super::codes::{BLOCK, Codes, GROUP, Tables};
use super::dots::{dot_bytes_portable, dot_words_portable};
use super::scan::{Best, PREFETCH_BLOCKS, Visible};
use super::signs::{LINE_WORDS, Line, PLANES};

/// 32 rows at once: a shuffle of 64 bytes looks up four nibbles of 16 rows.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn scan(
    codes: &Codes,
    tables: &Tables,
    visible: Visible<'_>,
    blocks: Range<usize>,
    best: &mut Best,
) {
    let (scale, offset) = (_mm512_set1_ps(tables.scale), _mm512_set1_ps(tables.offset));
    let low_bits = _mm512_set1_epi8(15);
    let wanted = blocks.filter(|&block| visible.block(block) != 0);
    let mut later = wanted.clone();
    for _ in 0..PREFETCH_BLOCKS {
        later.next();
    }
    for block in wanted {
        let bytes = &codes.bytes()[block * codes.block_bytes()..][..codes.block_bytes()];
        let ahead = later.next().unwrap_or(block) * codes.block_bytes();
        let mut ahead = codes.bytes().as_ptr().wrapping_add(ahead);
        // 16 sums each, rows 0-15 and 16-31.
        let mut sums = [_mm512_setzero_si512(); 2];
        for (bytes, entries) in bytes.chunks(GROUP * 16).zip(tables.entries.chunks(GROUP * 16)) {
            // Of each 16-bit lane, `whole` sums both bytes and `upper` the upper one: the even rows' sums are what is left.
            let mut whole = [_mm512_setzero_si512(); 2];
            let mut upper = [_mm512_setzero_si512(); 2];
            // Rows are padded to 64 numbers, 16 nibbles: no sixteen of them are cut.
            for (bytes, entries) in bytes.chunks_exact(256).zip(entries.chunks_exact(256)) {
                // Four entries fit a byte.
                let mut sums = [_mm512_setzero_si512(); 2];
                for line in 0..4 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64 * line).cast());
                    // SAFETY: 64 bytes of the 256 of both slices, and the loads ask for no alignment.
                    let (bytes, table) = unsafe {
                        (
                            _mm512_loadu_si512(bytes.as_ptr().add(64 * line).cast()),
                            _mm512_loadu_si512(entries.as_ptr().add(64 * line).cast()),
                        )
                    };
                    let low = _mm512_and_si512(bytes, low_bits);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low_bits);
                    sums[0] = _mm512_add_epi8(sums[0], _mm512_shuffle_epi8(table, low));
                    sums[1] = _mm512_add_epi8(sums[1], _mm512_shuffle_epi8(table, high));
                }
                ahead = ahead.wrapping_add(256);
                for half in 0..2 {
                    whole[half] = _mm512_add_epi16(whole[half], sums[half]);
                    upper[half] = _mm512_add_epi16(upper[half], _mm512_srli_epi16::<8>(sums[half]));
                }
            }
            for half in 0..2 {
                let even = _mm512_sub_epi16(whole[half], _mm512_slli_epi16::<8>(upper[half]));
                let (even, odd) = (fold(even), fold(upper[half]));
                let rows =
                    _mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd));
                sums[half] = _mm512_add_epi32(sums[half], _mm512_cvtepu16_epi32(rows));
            }
        }
        let factors = &codes.factors()[block * BLOCK..][..BLOCK];
        let threshold = _mm512_set1_ps(best.threshold);
        let mut estimates = [0.0f32; BLOCK];
        let mut passed = 0u32;
        for half in 0..2 {
            // SAFETY: 16 numbers of the 32 of both arrays, from 16 * half on.
            let factors = unsafe { _mm512_loadu_ps(factors.as_ptr().add(16 * half)) };
            let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[half]), scale);
            let estimate = _mm512_mul_ps(factors, _mm512_add_ps(sum, offset));
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(estimate, threshold);
            passed |= u32::from(above) << (16 * half);
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(estimates.as_mut_ptr().add(16 * half), estimate) };
        }
        best.push_block(&estimates, passed & visible.block(block), block);
    }
}

/// The sums of the four 128-bit parts, 16 bits each: each part sums one nibble of four.
#[inline]
#[target_feature(enable = "avx512f")]
fn fold(parts: __m512i) -> __m128i {
    let (low, high) = (_mm512_castsi512_si256(parts), _mm512_extracti64x4_epi64::<1>(parts));
    let two = _mm256_add_epi16(low, high);
    _mm_add_epi16(_mm256_castsi256_si128(two), _mm256_extracti128_si256::<1>(two))
}

/// A query's planes, eight words of one side by side, zeros after the last word.
pub(super) fn plane_lines(words: &[[u64; PLANES]]) -> Vec<[Line; PLANES]> {
    let mut lines = vec![[Line::default(); PLANES]; words.len().div_ceil(LINE_WORDS)];
    for (words, lines) in words.chunks(LINE_WORDS).zip(&mut lines) {
        for (at, planes) in words.iter().enumerate() {
            planes.iter().zip(&mut *lines).for_each(|(plane, line)| line.0[at] = *plane);
        }
    }
    lines
}

/// How many of the first `num_words` words' bits are set, and the sum of the planes' units where they are.
#[inline]
#[target_feature(enable = "avx512f,avx512vpopcntdq")]
pub(super) fn count(row: &[Line], num_words: usize, planes: &[[Line; PLANES]]) -> (u32, u32) {
    // Of each lane the upper half counts bits and the lower one sums units: those of 65,536 numbers, 63 each, fit.
    let mut both = _mm512_setzero_si512();
    for (at, (line, planes)) in row.iter().zip(planes).enumerate() {
        let load = |line: &Line| {
            // SAFETY: a line is 64 bytes, aligned to as many.
            unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
        };
        let word = load(line);
        // What follows the code is not counted: its planes are zeros, and the mask leaves it out here.
        let num_left = (num_words - LINE_WORDS * at).min(LINE_WORDS);
        let within = (0xff_u16 >> (LINE_WORDS - num_left)) as __mmask8;
        let num_set = _mm512_maskz_popcnt_epi64(within, word);
        // Each plane's units are worth twice those of the one below.
        let mut units = _mm512_setzero_si512();
        for plane in planes.iter().rev() {
            let met = _mm512_popcnt_epi64(_mm512_and_si512(word, load(plane)));
            units = _mm512_add_epi64(_mm512_add_epi64(units, units), met);
        }
        both = _mm512_add_epi64(both, _mm512_add_epi64(_mm512_slli_epi64::<32>(num_set), units));
    }
    let both = _mm512_reduce_add_epi64(both) as u64;
    ((both >> 32) as u32, both as u32)
}

/// The dot product of two rows of one length, added in the order of AVX2's.
#[target_feature(enable = "avx512f")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [_mm512_setzero_ps(); 2];
    let (a_lanes, b_lanes) = (a.chunks_exact(32), b.chunks_exact(32));
    let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_lanes.zip(b_lanes) {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 16 of the 32 numbers of both slices, from 16 * part on; the loads ask for no alignment.
            let (x, y) = unsafe {
                (
                    _mm512_loadu_ps(x.as_ptr().add(16 * part)),
                    _mm512_loadu_ps(y.as_ptr().add(16 * part)),
                )
            };
            *sum = _mm512_fmadd_ps(x, y, *sum);
        }
    }
    // AVX2 keeps four sums of 8: these two are its first and second, and its third and fourth.
    let [first, second] = sums.map(|sum| {
        let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sum));
        _mm256_add_ps(_mm512_castps512_ps256(sum), _mm256_castpd_ps(high))
    });
    let mut lanes = [0.0f32; 8];
    // SAFETY: 8 numbers into an array of 8.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), _mm256_add_ps(first, second)) };
    lanes.iter().sum::<f32>() + tail
}

/// The dot product of at most 8,192 words with as many bytes.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn dot_words(words: &[i16], bytes: &[i8]) -> i32 {
    let mut sums = [_mm512_setzero_si512(); 2];
    let (word_lanes, byte_lanes) = (words.chunks_exact(64), bytes.chunks_exact(64));
    let tail = dot_words_portable(word_lanes.remainder(), byte_lanes.remainder());
    for (words, bytes) in word_lanes.zip(byte_lanes) {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 32 of the 64 numbers of both slices, from 32 * part on; the loads ask for no alignment.
            let (words, bytes) = unsafe {
                (
                    _mm512_loadu_si512(words.as_ptr().add(32 * part).cast()),
                    _mm256_loadu_si256(bytes.as_ptr().add(32 * part).cast()),
                )
            };
            *sum = _mm512_add_epi32(*sum, _mm512_madd_epi16(words, _mm512_cvtepi8_epi16(bytes)));
        }
    }
    _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1])) + tail
}

/// The dot product of two rows of bytes of one length, at most 65,536.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn dot_bytes(a: &[i8], b: &[i8]) -> i32 {
    let mut sums = [_mm512_setzero_si512(); 2];
    let (a_lanes, b_lanes) = (a.chunks_exact(64), b.chunks_exact(64));
    let tail = dot_bytes_portable(a_lanes.remainder(), b_lanes.remainder());
    for (x, y) in a_lanes.zip(b_lanes) {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 32 of the 64 bytes of both slices, from 32 * part on; the loads ask for no alignment.
            let (x, y) = unsafe {
                (
                    _mm256_loadu_si256(x.as_ptr().add(32 * part).cast()),
                    _mm256_loadu_si256(y.as_ptr().add(32 * part).cast()),
                )
            };
            let products = _mm512_madd_epi16(_mm512_cvtepi8_epi16(x), _mm512_cvtepi8_epi16(y));
            *sum = _mm512_add_epi32(*sum, products);
        }
    }
    _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1])) + tail
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::time::Instant;

    use crate::vectors::bits::Bits;
    use crate::vectors::codes::{BLOCK, Codes, Tables};
    use crate::vectors::dots::{dot_at, dot_bytes_at, dot_words_at};
    use crate::vectors::scan::{Level, Visible, scan};
    use crate::vectors::signs::{Planes, Signs};

    const PADDED: usize = 384;

    /// The fastest of 30 runs over `num_rows` rows, in nanoseconds a row.
    fn fastest(num_rows: usize, mut run: impl FnMut()) -> f64 {
        let run = |_| {
            let start = Instant::now();
            run();
            start.elapsed()
        };
        (0..30).map(run).min().map_or(0.0, |least| least.as_nanos() as f64) / num_rows as f64
    }

    #[test]
    #[ignore = "prints how long each level takes"]
    fn every_level_timed() {
        let num_rows = 1 << 17;
        let mut state = 7u64;
        let mut number = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let mut row = || -> Vec<f32> { (0..PADDED).map(|_| number()).collect() };
        let mut codes = Codes::new(PADDED);
        (0..num_rows).for_each(|at| codes.set(at, &row()));
        let rows: Vec<u32> = (0..num_rows as u32).collect();
        let signs = Signs::new(&codes, PADDED, &rows);
        let query = row();
        let (tables, planes) = (Tables::new(&query), Planes::new(&query));
        let words: Vec<i16> = query.iter().map(|value| (value * 4000.0) as i16).collect();
        let floats: Vec<f32> = (0..1000).flat_map(|_| row()).collect();
        let bytes: Vec<i8> = floats.iter().map(|value| (value * 250.0) as i8).collect();
        let live = Bits::all(num_rows);
        let visible = Visible { live: &live, allowed: None };
        println!(
            "ns a row of {PADDED}: scan, bits of single rows, dot of f32, of 12 and 8 bits, of 8 bits"
        );
        for level in Level::available() {
            let scanned = fastest(num_rows, || {
                black_box(scan(level, &codes, &tables, visible, 0..num_rows / BLOCK, 430, 1));
            });
            let looked = fastest(num_rows, || {
                black_box(signs.best(level, &planes, &rows, 430));
            });
            let dots = fastest(1000, || {
                let rows = floats.chunks_exact(PADDED);
                black_box(rows.map(|row| dot_at(level, &query, row)).sum::<f32>());
            });
            let of_words = fastest(1000, || {
                let rows = bytes.chunks_exact(PADDED);
                black_box(rows.map(|row| dot_words_at(level, &words, row)).sum::<i64>());
            });
            let of_bytes = fastest(1000, || {
                let rows = bytes.chunks_exact(PADDED);
                black_box(rows.map(|row| dot_bytes_at(level, row, &bytes[..PADDED])).sum::<i32>());
            });
            println!(
                "{:13} {scanned:6.2} {looked:6.2} {dots:6.2} {of_words:6.2} {of_bytes:6.2}",
                format!("{level:?}")
            );
        }
    }
}
