//! Dot products for the last step of a search and for the graph, by the fastest instructions of the machine.
//! Knows nothing of codes; `vectors::dot` is the reference.

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::scan::Level;

/// Rotated numbers are stored as bytes of this many standard deviations each side of zero: of 384 numbers of a unit
/// vector one in 15,000 is beyond and is cut.
const BYTE_RANGE: f32 = 4.0;
/// The numbers of a query in 12 bits: the sum over 65,536 numbers of 2,047 * 127 fits i64, and over 8,192 fits i32.
const QUERY_RANGE: f32 = 2047.0;

/// The dot product of two rows of one length; sums in another order than [`dot`](super::dot).
pub(crate) fn dot_fast(a: &[f32], b: &[f32]) -> f32 {
    dot_at(Level::best(), a, b)
}

#[inline(always)]
pub(super) fn dot_at(level: Level, a: &[f32], b: &[f32]) -> f32 {
    match level {
        // SAFETY: the level is offered only where the processor has AVX2 and FMA.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { dot_avx2(a, b) },
        // SAFETY: both levels are offered only where the processor has AVX-512 F.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Popcnt => unsafe { avx512::dot(a, b) },
        _ => super::dot(a, b),
    }
}

/// What a number of a rotated unit vector is multiplied by to become a byte.
pub(crate) fn byte_scale(padded: usize) -> f32 {
    127.0 * (padded as f32).sqrt() / BYTE_RANGE
}

/// A rotated row as bytes.
pub(crate) fn to_bytes(rotated: &[f32], out: &mut [i8]) {
    let scale = byte_scale(rotated.len());
    for (value, byte) in rotated.iter().zip(out) {
        // `as` keeps what is beyond the range at its end.
        *byte = ((value * scale).round().clamp(-127.0, 127.0)) as i8;
    }
}

/// A rotated query as 12-bit numbers, and the scale that turns a dot product with bytes into one of vectors.
pub(crate) fn to_words(rotated: &[f32]) -> (Vec<i16>, f32) {
    let greatest = rotated.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let scale = if greatest > 0.0 { QUERY_RANGE / greatest } else { 0.0 };
    let words = rotated.iter().map(|value| (value * scale).round() as i16).collect();
    let unit = scale * byte_scale(rotated.len());
    (words, if unit > 0.0 { 1.0 / unit } else { 0.0 })
}

/// The dot product of a query's words with a row's bytes, both of one length: a multiple of 64.
pub(crate) fn dot_words(words: &[i16], bytes: &[i8]) -> i64 {
    dot_words_at(Level::best(), words, bytes)
}

#[inline(always)]
pub(super) fn dot_words_at(level: Level, words: &[i16], bytes: &[i8]) -> i64 {
    // Sums of at most 8,192 products fit 32 bits.
    words
        .chunks(8192)
        .zip(bytes.chunks(8192))
        .map(|(words, bytes)| i64::from(dot_part(level, words, bytes)))
        .sum()
}

#[inline(always)]
fn dot_part(level: Level, words: &[i16], bytes: &[i8]) -> i32 {
    match level {
        // SAFETY: the level is offered only where the processor has AVX2.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { dot_words_avx2(words, bytes) },
        // SAFETY: both levels are offered only where the processor has AVX-512 F and BW.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Popcnt => unsafe { avx512::dot_words(words, bytes) },
        _ => dot_words_portable(words, bytes),
    }
}

pub(super) fn dot_words_portable(words: &[i16], bytes: &[i8]) -> i32 {
    words.iter().zip(bytes).map(|(&word, &byte)| i32::from(word) * i32::from(byte)).sum()
}

/// The dot product of two rows of bytes of one length: at most 65,536 numbers, 127 * 127 each, fit 31 bits.
pub(crate) fn dot_bytes(a: &[i8], b: &[i8]) -> i32 {
    dot_bytes_at(Level::best(), a, b)
}

#[inline(always)]
pub(super) fn dot_bytes_at(level: Level, a: &[i8], b: &[i8]) -> i32 {
    match level {
        // SAFETY: the level is offered only where the processor has AVX2.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { dot_bytes_avx2(a, b) },
        // SAFETY: both levels are offered only where the processor has AVX-512 F and BW.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Popcnt => unsafe { avx512::dot_bytes(a, b) },
        _ => dot_bytes_portable(a, b),
    }
}

pub(super) fn dot_bytes_portable(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(&x, &y)| i32::from(x) * i32::from(y)).sum()
}

/// Asks for a row before it is needed.
#[inline(always)]
pub(crate) fn prefetch<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..size_of_val(row)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address is within the slice, and a prefetch reads nothing that the program sees.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().add(at)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_ps(); 4];
    let (a_lanes, b_lanes) = (a.chunks_exact(32), b.chunks_exact(32));
    let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_lanes.zip(b_lanes) {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 8 of the 32 numbers of both slices, from 8 * part on; the loads ask for no alignment.
            let (x, y) = unsafe {
                (
                    _mm256_loadu_ps(x.as_ptr().add(8 * part)),
                    _mm256_loadu_ps(y.as_ptr().add(8 * part)),
                )
            };
            *sum = _mm256_fmadd_ps(x, y, *sum);
        }
    }
    let sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    let mut lanes = [0.0f32; 8];
    // SAFETY: 8 numbers into an array of 8.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
    lanes.iter().sum::<f32>() + tail
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn dot_words_avx2(words: &[i16], bytes: &[i8]) -> i32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_si256(); 2];
    let (word_lanes, byte_lanes) = (words.chunks_exact(32), bytes.chunks_exact(32));
    let tail = dot_words_portable(word_lanes.remainder(), byte_lanes.remainder());
    for (words, bytes) in word_lanes.zip(byte_lanes) {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 16 of the 32 numbers of both slices, from 16 * part on; the loads ask for no alignment.
            let (words, bytes) = unsafe {
                (
                    _mm256_loadu_si256(words.as_ptr().add(16 * part).cast()),
                    _mm_loadu_si128(bytes.as_ptr().add(16 * part).cast()),
                )
            };
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(words, _mm256_cvtepi8_epi16(bytes)));
        }
    }
    let sum = _mm256_add_epi32(sums[0], sums[1]);
    let mut lanes = [0i32; 8];
    // SAFETY: 8 numbers into an array of 8.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
    lanes.iter().sum::<i32>() + tail
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn dot_bytes_avx2(a: &[i8], b: &[i8]) -> i32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_si256(); 2];
    let (a_lanes, b_lanes) = (a.chunks_exact(32), b.chunks_exact(32));
    let tail = dot_bytes_portable(a_lanes.remainder(), b_lanes.remainder());
    for (x, y) in a_lanes.zip(b_lanes) {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 16 of the 32 bytes of both slices, from 16 * part on; the loads ask for no alignment.
            let (x, y) = unsafe {
                (
                    _mm_loadu_si128(x.as_ptr().add(16 * part).cast()),
                    _mm_loadu_si128(y.as_ptr().add(16 * part).cast()),
                )
            };
            let products = _mm256_madd_epi16(_mm256_cvtepi8_epi16(x), _mm256_cvtepi8_epi16(y));
            *sum = _mm256_add_epi32(*sum, products);
        }
    }
    let sum = _mm256_add_epi32(sums[0], sums[1]);
    let mut lanes = [0i32; 8];
    // SAFETY: 8 numbers into an array of 8.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
    lanes.iter().sum::<i32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::{dot, normalize};

    #[test]
    fn the_fast_dot_product_is_the_plain_one_at_every_length_and_level() {
        for len in 0..140 {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..len).map(|i| (i as f32 * 0.3).cos()).collect();
            for level in Level::available() {
                let got = dot_at(level, &a, &b);
                assert!((got - dot(&a, &b)).abs() < 1e-4, "{level:?}, {len}");
                // Past AVX2 a level adds in the same order: what is stored and found does not change with it.
                #[cfg(target_arch = "x86_64")]
                if !matches!(level, Level::Portable | Level::Avx2) {
                    let expected = dot_at(Level::Avx2, &a, &b);
                    assert_eq!(got.to_bits(), expected.to_bits(), "{level:?}, {len}");
                }
            }
            assert_eq!(dot_fast(&a, &b).to_bits(), dot_at(Level::best(), &a, &b).to_bits());
        }
    }

    #[test]
    fn the_dot_product_of_bytes_is_exact_at_every_length_extreme_and_level() {
        for len in (0..140).chain([8192, 8193, 20_000]) {
            let words: Vec<i16> = (0..len).map(|i| if i % 3 == 0 { -2047 } else { 2047 }).collect();
            let bytes: Vec<i8> = (0..len).map(|i| if i % 3 == 0 { -127 } else { 127 }).collect();
            // Numbers that differ from place to place: none is read twice or left out.
            let mixed: Vec<i8> = (0..len).map(|i| (i * 37 % 255 - 127) as i8).collect();
            for level in Level::available() {
                let words_dot = |bytes| dot_words_at(level, &words, bytes);
                let bytes_dot = |other| dot_bytes_at(level, &bytes, other);
                assert_eq!(words_dot(&bytes), 2047 * 127 * i64::from(len), "{level:?}, {len}");
                assert_eq!(bytes_dot(&bytes), 127 * 127 * len, "{level:?}, {len}");
                let expected = i64::from(dot_words_portable(&words, &mixed));
                assert_eq!(words_dot(&mixed), expected, "{level:?}, {len}");
                assert_eq!(
                    bytes_dot(&mixed),
                    dot_bytes_portable(&bytes, &mixed),
                    "{level:?}, {len}"
                );
            }
            assert_eq!(dot_words(&words, &mixed), dot_words_at(Level::best(), &words, &mixed));
            assert_eq!(dot_bytes(&bytes, &mixed), dot_bytes_at(Level::best(), &bytes, &mixed));
        }
    }

    #[test]
    fn bytes_and_words_give_the_cosine_to_two_digits() {
        let dim = 384;
        let mut a: Vec<f32> = (0..dim).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut b: Vec<f32> = (0..dim).map(|i| (i as f32 * 0.71).sin()).collect();
        normalize(&mut a);
        normalize(&mut b);
        let mut bytes = vec![0; dim];
        to_bytes(&a, &mut bytes);
        let (words, scale) = to_words(&b);
        assert!((dot_words(&words, &bytes) as f32 * scale - dot(&a, &b)).abs() < 0.005);
        assert_eq!(to_words(&[0.0; 64]).1, 0.0);
    }
}
