//! Sums of levels on x86-64: AVX-512 with byte permutations and byte products, or AVX2.
//! Knows the layout of codes and tables; who has tested features and lengths is the caller.
//!
//! AVX-512: one word of 16 keys is a register; with its place in the word put above the four bits, a byte picks its level out
//! of the 64 of a table register, and a product with ones adds the four levels of a word. For 64 keys of 64 numbers and
//! three queries: 16 registers of indices, 48 permutations, 48 products.
//! AVX2: the words of 32 keys are turned round to registers of one byte of each, so that a table is the same for all lanes.

use super::super::{CENTRE_KEYS, coded_bytes, sign_bytes};
use super::{LevelTables, MAX_WORDS, WORD};
use std::arch::x86_64::*;

/// The instructions that are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    Avx2,
    Avx512,
}

/// What this processor has; the standard library caches the detection.
pub(super) fn path() -> Option<Path> {
    let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let has_avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni");
    match (has_avx2, has_avx512) {
        (true, true) => Some(Path::Avx512),
        (true, false) => Some(Path::Avx2),
        (false, _) => None,
    }
}

/// The parts of the codes of one centre's keys.
struct Page<'a> {
    centre: &'a [u8],
    factors: &'a [u8],
    signs: &'a [u8],
}

impl<'a> Page<'a> {
    fn new(codes: &'a [u8], d: usize) -> Self {
        let (centre, rest) = codes.split_at(2 * d);
        let (factors, signs) = rest.split_at(2 * CENTRE_KEYS);
        assert_eq!(signs.len(), CENTRE_KEYS * sign_bytes(d));
        Self { centre, factors, signs }
    }
}

/// As [`LevelTables::score`].
///
/// # Safety
/// AVX2, FMA, AVX-512 F, BW, VBMI and VNNI; codes are whole, queries those of the tables, and `scores` has room.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni,avx2,fma")]
pub(super) unsafe fn score_512(
    tables: &LevelTables,
    queries: &[f32],
    codes: &[u8],
    scores: &mut [f32],
    stride: usize,
) {
    let d = tables.d;
    for (at, codes) in codes.chunks_exact(coded_bytes(d)).enumerate() {
        let page = Page::new(codes, d);
        // SAFETY: each query has CENTRE_KEYS scores from here on.
        unsafe {
            let scores = scores.as_mut_ptr().add(at * CENTRE_KEYS);
            match d / WORD {
                1 => page_512::<1>(tables, queries, &page, scores, stride),
                2 => page_512::<2>(tables, queries, &page, scores, stride),
                3 => page_512::<3>(tables, queries, &page, scores, stride),
                4 => page_512::<4>(tables, queries, &page, scores, stride),
                _ => page_512::<MAX_WORDS>(tables, queries, &page, scores, stride),
            }
        }
    }
}

/// Keys of a register of sums.
const KEYS_512: usize = 16;

/// The keys of one centre, of up to `W` words.
///
/// # Safety
/// As [`score_512`]; `scores` has CENTRE_KEYS at every `stride`, once for each query.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni,avx2,fma")]
unsafe fn page_512<const W: usize>(
    tables: &LevelTables,
    queries: &[f32],
    page: &Page<'_>,
    scores: *mut f32,
    stride: usize,
) {
    const GROUPS: usize = CENTRE_KEYS / KEYS_512;
    let d = tables.d;
    let words = if W < MAX_WORDS { W } else { d / WORD };
    let (low_bits, ones) = (_mm512_set1_epi8(15), _mm512_set1_epi8(1));
    let places = _mm512_set1_epi32(0x3020_1000);
    // SAFETY: offsets are within the page, the tables and the scores, as the caller says.
    unsafe {
        let mut index = [[[_mm512_setzero_si512(); 2]; W]; GROUPS];
        for (group, index) in index.iter_mut().enumerate() {
            let signs = page.signs.as_ptr().add(group * KEYS_512 * 4 * words);
            for (word, index) in index[..words].iter_mut().enumerate() {
                let own = word_512(signs, words, word);
                // (bits & 15) | place, in one instruction.
                *index = [own, _mm512_srli_epi32::<4>(own)]
                    .map(|bits| _mm512_ternarylogic_epi32::<0xea>(bits, low_bits, places));
            }
        }
        for (query, (step, least)) in tables.scales.iter().enumerate() {
            let mut sums = [_mm512_setzero_si512(); GROUPS];
            for word in 0..words {
                for half in 0..2 {
                    let at = query * 4 * d + (word * 2 + half) * 64;
                    let table = _mm512_loadu_si512(tables.levels.as_ptr().add(at).cast());
                    for (sum, index) in sums.iter_mut().zip(&index) {
                        let levels = _mm512_permutexvar_epi8(index[word][half], table);
                        *sum = _mm512_dpbusd_epi32(*sum, levels, ones);
                    }
                }
            }
            let own = &queries[query * d..(query + 1) * d];
            let mut centre = _mm512_setzero_ps();
            for x in (0..d).step_by(KEYS_512) {
                let query = _mm512_loadu_ps(own.as_ptr().add(x));
                let own = widened_512(page.centre.as_ptr().add(2 * x));
                centre = _mm512_fmadd_ps(query, own, centre);
            }
            let centre = _mm512_set1_ps(_mm512_reduce_add_ps(centre));
            let (step, least) = (_mm512_set1_ps(*step), _mm512_set1_ps(*least));
            for (group, sum) in sums.iter().enumerate() {
                let found = _mm512_fmadd_ps(step, _mm512_cvtepi32_ps(*sum), least);
                let factors = widened_512(page.factors.as_ptr().add(group * 2 * KEYS_512));
                let score = _mm512_fmadd_ps(factors, found, centre);
                _mm512_storeu_ps(scores.add(query * stride + group * KEYS_512), score);
            }
        }
    }
}

/// Sixteen numbers of bf16.
///
/// # Safety
/// AVX-512 F; the numbers are there.
#[inline]
#[target_feature(enable = "avx512f,avx2")]
unsafe fn widened_512(at: *const u8) -> __m512 {
    // SAFETY: as the caller says; no alignment is asked for.
    let short = unsafe { _mm256_loadu_si256(at.cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(short)))
}

/// One of the `words` words of each of 16 keys.
///
/// # Safety
/// AVX-512 F; the keys are there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn word_512(signs: *const u8, words: usize, word: usize) -> __m512i {
    // SAFETY: 64 · words bytes are there, as the caller says.
    unsafe {
        let register = |at: usize| _mm512_loadu_si512(signs.add(64 * at).cast());
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        match words {
            1 => register(0),
            2 => {
                let lanes = _mm512_add_epi32(lanes, lanes);
                let own = _mm512_add_epi32(lanes, _mm512_set1_epi32(word as i32));
                _mm512_permutex2var_epi32(register(0), own, register(1))
            }
            _ => {
                let own = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(words as i32));
                _mm512_i32gather_epi32::<4>(own, signs.add(4 * word).cast())
            }
        }
    }
}

/// As [`LevelTables::score`].
///
/// # Safety
/// AVX2 and FMA; codes are whole, queries those of the tables, and `scores` has room.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn score_256(
    tables: &LevelTables,
    queries: &[f32],
    codes: &[u8],
    scores: &mut [f32],
    stride: usize,
) {
    let d = tables.d;
    for (at, codes) in codes.chunks_exact(coded_bytes(d)).enumerate() {
        let page = Page::new(codes, d);
        for half in 0..CENTRE_KEYS / KEYS_256 {
            // SAFETY: each query has KEYS_256 scores from here on.
            unsafe {
                let scores = scores.as_mut_ptr().add(at * CENTRE_KEYS + half * KEYS_256);
                match d / WORD {
                    1 => keys_256::<1>(tables, queries, (&page, half), scores, stride),
                    2 => keys_256::<2>(tables, queries, (&page, half), scores, stride),
                    3 => keys_256::<3>(tables, queries, (&page, half), scores, stride),
                    4 => keys_256::<4>(tables, queries, (&page, half), scores, stride),
                    _ => keys_256::<MAX_WORDS>(tables, queries, (&page, half), scores, stride),
                }
            }
        }
    }
}

/// Keys of a register of one byte of each, and numbers of a register of f32.
const KEYS_256: usize = 32;
const LANES: usize = 8;

/// `KEYS_256` of the keys of one centre, of up to `W` words.
///
/// # Safety
/// As [`score_256`]; `scores` has KEYS_256 at every `stride`, once for each query.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn keys_256<const W: usize>(
    tables: &LevelTables,
    queries: &[f32],
    (page, part): (&Page<'_>, usize),
    scores: *mut f32,
    stride: usize,
) {
    let d = tables.d;
    let words = if W < MAX_WORDS { W } else { d / WORD };
    let low_bits = _mm256_set1_epi8(15);
    // SAFETY: offsets are within the page, the tables and the scores, as the caller says.
    unsafe {
        let signs = page.signs.as_ptr().add(part * KEYS_256 * 4 * words);
        let mut fours = [[[_mm256_setzero_si256(); 2]; 4]; W];
        for (word, fours) in fours[..words].iter_mut().enumerate() {
            for (fours, byte) in fours.iter_mut().zip(bytes_256(signs, words, word)) {
                let high = _mm256_srli_epi16::<4>(byte);
                *fours = [_mm256_and_si256(byte, low_bits), _mm256_and_si256(high, low_bits)];
            }
        }
        for (query, (step, least)) in tables.scales.iter().enumerate() {
            // Sums of all bytes as pairs, the even byte's spilling over into the odd one's; and those of the odd ones.
            let (mut both, mut odd) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for (word, fours) in fours[..words].iter().enumerate() {
                for (byte, fours) in fours.iter().enumerate() {
                    let levels = |half: usize| {
                        let at = query * 4 * d + ((word * 2 + half) * 4 + byte) * 16;
                        let table = _mm_loadu_si128(tables.levels.as_ptr().add(at).cast());
                        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), fours[half])
                    };
                    let sum = _mm256_add_epi8(levels(0), levels(1));
                    both = _mm256_add_epi16(both, sum);
                    odd = _mm256_add_epi16(odd, _mm256_srli_epi16::<8>(sum));
                }
            }
            let even = _mm256_sub_epi16(both, _mm256_slli_epi16::<8>(odd));
            let own = &queries[query * d..(query + 1) * d];
            let centre = _mm256_set1_ps(dot_256(own, page.centre.as_ptr()));
            let (step, least) = (_mm256_set1_ps(*step), _mm256_set1_ps(*least));
            let pairs = [_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)];
            for (eight, sums) in [
                _mm256_castsi256_si128(pairs[0]),
                _mm256_castsi256_si128(pairs[1]),
                _mm256_extracti128_si256::<1>(pairs[0]),
                _mm256_extracti128_si256::<1>(pairs[1]),
            ]
            .into_iter()
            .enumerate()
            {
                let sums = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(sums));
                let found = _mm256_fmadd_ps(step, sums, least);
                let at = 2 * (part * KEYS_256 + eight * LANES);
                let factors = widened_256(page.factors.as_ptr().add(at));
                let score = _mm256_fmadd_ps(factors, found, centre);
                _mm256_storeu_ps(scores.add(query * stride + eight * LANES), score);
            }
        }
    }
}

/// query · centre, sixteen sums side by side, as a register of AVX-512 sums them.
///
/// # Safety
/// AVX2 and FMA; `centre` has as many numbers of bf16 as the query, which are whole pairs of registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot_256(query: &[f32], centre: *const u8) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 2];
    for x in (0..query.len()).step_by(2 * LANES) {
        for (half, sum) in sums.iter_mut().enumerate() {
            let at = x + half * LANES;
            // SAFETY: as the caller says.
            unsafe {
                let own = _mm256_loadu_ps(query.as_ptr().add(at));
                *sum = _mm256_fmadd_ps(own, widened_256(centre.add(2 * at)), *sum);
            }
        }
    }
    let eight = _mm256_add_ps(sums[0], sums[1]);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// Eight numbers of bf16.
///
/// # Safety
/// AVX2; the numbers are there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widened_256(at: *const u8) -> __m256 {
    // SAFETY: as the caller says; no alignment is asked for.
    let short = unsafe { _mm_loadu_si128(at.cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(short)))
}

/// Of one of the `words` words of each of 32 keys, its four bytes, keys in their order.
///
/// # Safety
/// AVX2; the keys are there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn bytes_256(signs: *const u8, words: usize, word: usize) -> [__m256i; 4] {
    // In each half of a register, byte by byte what lay key by key.
    let by_byte = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
    ));
    let four_of = |first: usize| {
        // Four keys in the lower half, those sixteen behind them in the upper one.
        // SAFETY: 32 keys of `words` words are there, as the caller says.
        let own = unsafe {
            let half = |first: usize| _mm_loadu_si128(signs.add(4 * words * first).cast());
            let both = |first: usize| _mm256_set_m128i(half(first + 16), half(first));
            match words {
                1 => both(first),
                2 => {
                    let (a, b) = (_mm256_castsi256_ps(both(first)), both(first + 2));
                    let b = _mm256_castsi256_ps(b);
                    _mm256_castps_si256(match word {
                        0 => _mm256_shuffle_ps::<0x88>(a, b),
                        _ => _mm256_shuffle_ps::<0xdd>(a, b),
                    })
                }
                _ => {
                    let keys = _mm256_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19);
                    let at = _mm256_mullo_epi32(keys, _mm256_set1_epi32(words as i32));
                    let from = signs.add(4 * (words * first + word));
                    _mm256_i32gather_epi32::<4>(from.cast(), at)
                }
            }
        };
        _mm256_shuffle_epi8(own, by_byte)
    };
    let [a, b, c, e] = [four_of(0), four_of(4), four_of(8), four_of(12)];
    let (ab, ce) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, e));
    let (ab_high, ce_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, e));
    [
        _mm256_unpacklo_epi64(ab, ce),
        _mm256_unpackhi_epi64(ab, ce),
        _mm256_unpacklo_epi64(ab_high, ce_high),
        _mm256_unpackhi_epi64(ab_high, ce_high),
    ]
}
