//! Packed rows times x on x86-64: AVX2 with FMA and F16C, and the same with AVX-512 VNNI's byte products.
//! Knows no threads; the caller has tested the features and hands it a few rows of the weight.
//!
//! Integer types: for one 32-value part of a block, `lanes = Σ u8 weight * i8 x` in 8 lanes of 4 products, to f32, times
//! `weight scale * x scale`, summed over the row by FMA. The offset of a type without minimum (8, 16, 32, 128) is taken off
//! the lanes exactly, with the lane sums of x; a minimum is applied once a part, to the scaled sum of x.
//! Four rows share the loads of x and hide the latency of the FMA chain. Each (row, x) pair is summed in one order, whatever
//! the tile it falls in. Bound by memory for matrices beyond the L2 cache.

use core::arch::x86_64::*;

use super::PackedType;
use super::activation::Activations;
use super::block;

/// Rows of the weight in a tile.
const TILE_ROWS: usize = 4;

/// How the integer kernels read a block of `BYTES` bytes, in `PARTS` parts of 32 values.
///
/// The methods are inlined into kernels that hold the features, hence `inline(always)` without them.
///
/// # Safety of the methods
/// AVX2, FMA and F16C are present.
trait Block<const BYTES: usize, const PARTS: usize> {
    /// The bytes are signed.
    const SIGNED: bool = false;
    /// The value of a byte is the byte less `1 << OFFSET_SHIFT`; 0 for no offset.
    const OFFSET_SHIFT: i32 = 0;
    /// A part has a minimum, added to each of its values.
    const HAS_MIN: bool = false;
    /// The scales of a block.
    type Head;

    unsafe fn head(block: &[u8; BYTES]) -> Self::Head;

    /// The 32 bytes of a part, and the scale of each lane of four.
    unsafe fn part(block: &[u8; BYTES], head: &Self::Head, part: usize) -> (__m256i, __m256);

    /// The minimum of a part.
    #[inline(always)]
    unsafe fn min(_head: &Self::Head, _part: usize) -> f32 {
        0.0
    }
}

/// One level: the kernels compiled with `$features`, with `$dot` as the byte product.
macro_rules! level {
    ($level:ident, $features:literal, $wide:literal, $dot:item) => {
        pub(super) mod $level {
            use super::*;

            /// Whether `dot` takes any unsigned byte; if not, only up to 128.
            const WIDE: bool = $wide;

            /// Adds to `lanes` the products of unsigned bytes `a` and signed bytes `b`, four to a lane.
            #[inline]
            #[target_feature(enable = $features)]
            $dot

            /// Whole blocks of `ty` to f32.
            #[target_feature(enable = $features)]
            pub(in crate::packed) fn dequantize(ty: PackedType, src: &[u8], out: &mut [f32]) {
                block::dequantize(ty, src, out);
            }

            /// Rounds x `(m, cols)`.
            #[target_feature(enable = $features)]
            pub(in crate::packed) fn quantize(activations: &mut Activations, x: &[f32]) {
                activations.fill(x);
            }

            /// Rows of `w` times the rounded x: `out` is `(m, num_rows)`, overwritten.
            #[target_feature(enable = $features)]
            pub(in crate::packed) fn integer_rows(
                ty: PackedType,
                w: &[u8],
                x: &Activations,
                out: &mut [f32],
            ) {
                match ty {
                    PackedType::Q4_0 => tiles::<18, 1, Q4_0>(w, x, out),
                    PackedType::Q4_1 => tiles::<20, 1, Q4_1>(w, x, out),
                    PackedType::Q5_0 => tiles::<22, 1, Q5_0>(w, x, out),
                    PackedType::Q5_1 => tiles::<24, 1, Q5_1>(w, x, out),
                    PackedType::Q8_0 => tiles::<34, 1, Q8_0>(w, x, out),
                    PackedType::Q4K => tiles::<144, 8, Q4K>(w, x, out),
                    PackedType::Q5K => tiles::<176, 8, Q5K>(w, x, out),
                    PackedType::Q6K => tiles::<210, 8, Q6K>(w, x, out),
                    // No integer form: `float_rows`.
                    PackedType::F32
                    | PackedType::F16
                    | PackedType::BF16
                    | PackedType::Q2K
                    | PackedType::Q3K => {}
                }
            }

            /// Walks the rows in tiles of [`TILE_ROWS`], then one by one, and x one or two rows at a time.
            #[inline]
            #[target_feature(enable = $features)]
            fn tiles<const BYTES: usize, const PARTS: usize, B: Block<BYTES, PARTS>>(
                w: &[u8],
                x: &Activations,
                out: &mut [f32],
            ) {
                let row_blocks = x.blocks / PARTS;
                let blocks = w.as_chunks::<BYTES>().0;
                let num_rows = blocks.len() / row_blocks;
                let row = |r: usize| &blocks[r * row_blocks..][..row_blocks];
                let mut j = 0;
                while j < x.m {
                    let pair = j + 2 <= x.m;
                    let mut r = 0;
                    while r < num_rows {
                        let wide = r + TILE_ROWS <= num_rows;
                        match (wide, pair) {
                            (true, true) => {
                                let rows = std::array::from_fn::<_, TILE_ROWS, _>(|i| row(r + i));
                                let sums = tile::<BYTES, PARTS, B, TILE_ROWS, 2>(rows, x, j);
                                for (i, sums) in sums.iter().enumerate() {
                                    out[(j + i) * num_rows + r..][..TILE_ROWS]
                                        .copy_from_slice(sums);
                                }
                            }
                            (true, false) => {
                                let rows = std::array::from_fn::<_, TILE_ROWS, _>(|i| row(r + i));
                                let [sums] = tile::<BYTES, PARTS, B, TILE_ROWS, 1>(rows, x, j);
                                out[j * num_rows + r..][..TILE_ROWS].copy_from_slice(&sums);
                            }
                            (false, _) => {
                                for j in j..j + 1 + usize::from(pair) {
                                    let [[sum]] = tile::<BYTES, PARTS, B, 1, 1>([row(r)], x, j);
                                    out[j * num_rows + r] = sum;
                                }
                            }
                        }
                        r += if wide { TILE_ROWS } else { 1 };
                    }
                    j += 1 + usize::from(pair);
                }
            }

            /// `R` rows of the weight times rows `j..j + M` of x.
            #[inline]
            #[target_feature(enable = $features)]
            fn tile<
                const BYTES: usize,
                const PARTS: usize,
                B: Block<BYTES, PARTS>,
                const R: usize,
                const M: usize,
            >(
                rows: [&[[u8; BYTES]]; R],
                x: &Activations,
                j: usize,
            ) -> [[f32; R]; M] {
                let row_blocks = rows[0].len();
                let rows = rows.map(|row| &row[..row_blocks]);
                let num_parts = row_blocks * PARTS;
                let of_x = |i: usize| (j + i) * x.blocks..(j + i) * x.blocks + num_parts;
                let q: [_; M] = std::array::from_fn(|i| &x.q[of_x(i)]);
                let negative_sums: [_; M] = std::array::from_fn(|i| &x.negative_sums[of_x(i)]);
                let scale: [_; M] = std::array::from_fn(|i| &x.scale[of_x(i)]);
                let scaled_sum: [_; M] = std::array::from_fn(|i| &x.scaled_sum[of_x(i)]);
                let mut sums = [[_mm256_setzero_ps(); M]; R];
                let mut min_sums = [[0.0f32; M]; R];
                for b in 0..row_blocks {
                    for r in 0..R {
                        let block = &rows[r][b];
                        // Four short streams are too many for the processor to foresee: ask for the same place two tiles on.
                        let ahead = block.as_ptr().wrapping_add(2 * R * row_blocks * BYTES);
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                        // SAFETY: the features of this level hold, as this function needs them too.
                        let head = unsafe { B::head(block) };
                        for part in 0..PARTS {
                            // SAFETY: as above.
                            let (bytes, factor) = unsafe { B::part(block, &head, part) };
                            for i in 0..M {
                                let at = b * PARTS + part;
                                let x_bytes = load_i8(&q[i][at]);
                                let lanes = if B::SIGNED && !WIDE {
                                    let magnitude = _mm256_sign_epi8(bytes, bytes);
                                    let signed = _mm256_sign_epi8(x_bytes, bytes);
                                    dot(_mm256_setzero_si256(), magnitude, signed)
                                } else {
                                    // A signed byte with its top bit flipped is unsigned with an offset of 2^7.
                                    let (bytes, shift) = if B::SIGNED {
                                        (_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), 7)
                                    } else {
                                        (bytes, B::OFFSET_SHIFT)
                                    };
                                    let start = if shift == 0 {
                                        _mm256_setzero_si256()
                                    } else {
                                        let sums = load_i32(&negative_sums[i][at]);
                                        _mm256_sll_epi32(sums, _mm_cvtsi32_si128(shift))
                                    };
                                    dot(start, bytes, x_bytes)
                                };
                                let factor = _mm256_mul_ps(factor, _mm256_set1_ps(scale[i][at]));
                                sums[r][i] =
                                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(lanes), factor, sums[r][i]);
                                if B::HAS_MIN {
                                    // SAFETY: as above.
                                    let min = unsafe { B::min(&head, part) };
                                    min_sums[r][i] = min.mul_add(scaled_sum[i][at], min_sums[r][i]);
                                }
                            }
                        }
                    }
                }
                std::array::from_fn(|i| {
                    std::array::from_fn(|r| horizontal_sum(sums[r][i]) + min_sums[r][i])
                })
            }

            /// Rows of `w` times x `(m, cols)` in f32: `out` is `(m, num_rows)`, overwritten.
            #[target_feature(enable = $features)]
            pub(in crate::packed) fn float_rows(
                ty: PackedType,
                w: &[u8],
                x: &[f32],
                cols: usize,
                out: &mut [f32],
            ) {
                let row_bytes = cols / ty.block_len() * ty.block_bytes();
                let num_rows = w.len() / row_bytes;
                let mut decoded = vec![0.0f32; cols];
                for (r, row) in w.chunks_exact(row_bytes).enumerate() {
                    if !matches!(ty, PackedType::F32 | PackedType::F16 | PackedType::BF16) {
                        block::dequantize(ty, row, &mut decoded);
                    }
                    for (j, x) in x.chunks_exact(cols).enumerate() {
                        out[j * num_rows + r] = match ty {
                            PackedType::F32 => float_dot::<4>(row, x, |b| load_f32(b)),
                            PackedType::F16 => float_dot::<2>(row, x, |b| load_f16(b)),
                            PackedType::BF16 => float_dot::<2>(row, x, |b| load_bf16(b)),
                            _ => decoded_dot(&decoded, x),
                        };
                    }
                }
            }

            /// A packed float row times a row of x: 8 values at a time from `load`, in four sums.
            #[inline]
            #[target_feature(enable = $features)]
            fn float_dot<const BYTES: usize>(
                row: &[u8],
                x: &[f32],
                load: impl Fn(&[[u8; BYTES]; 8]) -> __m256,
            ) -> f32 {
                let (values, rest) = row.as_chunks::<BYTES>().0.as_chunks::<8>();
                let (x, x_rest) = x.as_chunks::<8>();
                let mut sums = [_mm256_setzero_ps(); 4];
                let (fours, last) = values.as_chunks::<4>();
                let (x_fours, x_last) = x.as_chunks::<4>();
                for (values, x) in fours.iter().zip(x_fours) {
                    for i in 0..4 {
                        sums[i] = _mm256_fmadd_ps(load(&values[i]), load_x(&x[i]), sums[i]);
                    }
                }
                for (values, x) in last.iter().zip(x_last) {
                    sums[0] = _mm256_fmadd_ps(load(values), load_x(x), sums[0]);
                }
                let mut tail = [[0; BYTES]; 8];
                let mut x_tail = [0.0; 8];
                tail[..rest.len()].copy_from_slice(rest);
                x_tail[..x_rest.len()].copy_from_slice(x_rest);
                sums[1] = _mm256_fmadd_ps(load(&tail), load_x(&x_tail), sums[1]);
                let low = _mm256_add_ps(sums[0], sums[1]);
                horizontal_sum(_mm256_add_ps(low, _mm256_add_ps(sums[2], sums[3])))
            }

            /// A decoded row times a row of x; both hold whole blocks of 256.
            #[inline]
            #[target_feature(enable = $features)]
            fn decoded_dot(row: &[f32], x: &[f32]) -> f32 {
                let mut sums = [_mm256_setzero_ps(); 4];
                let (row, x) = (row.as_chunks::<8>().0, x.as_chunks::<8>().0);
                for (row, x) in row.as_chunks::<4>().0.iter().zip(x.as_chunks::<4>().0) {
                    for i in 0..4 {
                        sums[i] = _mm256_fmadd_ps(load_x(&row[i]), load_x(&x[i]), sums[i]);
                    }
                }
                let low = _mm256_add_ps(sums[0], sums[1]);
                horizontal_sum(_mm256_add_ps(low, _mm256_add_ps(sums[2], sums[3])))
            }
        }
    };
}

level!(
    avx2,
    "avx2,fma,f16c",
    false,
    // The pair sums stay inside i16: at most 2 * 63 * 127 for packed bytes, 2 * 128 * 127 for magnitudes.
    fn dot(lanes: __m256i, a: __m256i, b: __m256i) -> __m256i {
        let pairs = _mm256_maddubs_epi16(a, b);
        _mm256_add_epi32(lanes, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
);

level!(
    avx512_vnni,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni",
    true,
    fn dot(lanes: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_dpbusd_epi32(lanes, a, b)
    }
);

struct Q4_0;
impl Block<18, 1> for Q4_0 {
    const OFFSET_SHIFT: i32 = 3;
    type Head = __m256;

    #[inline(always)]
    unsafe fn head(block: &[u8; 18]) -> __m256 {
        // SAFETY: the trait's condition.
        unsafe { half_in_all_lanes([block[0], block[1]]) }
    }

    #[inline(always)]
    unsafe fn part(block: &[u8; 18], head: &__m256, _part: usize) -> (__m256i, __m256) {
        // SAFETY: the trait's condition.
        (unsafe { nibbles(tail(block)) }, *head)
    }
}

struct Q4_1;
impl Block<20, 1> for Q4_1 {
    const HAS_MIN: bool = true;
    type Head = (__m256, f32);

    #[inline(always)]
    unsafe fn head(block: &[u8; 20]) -> (__m256, f32) {
        // SAFETY: the trait's condition.
        unsafe { scale_and_min([block[0], block[1], block[2], block[3]]) }
    }

    #[inline(always)]
    unsafe fn part(block: &[u8; 20], head: &(__m256, f32), _part: usize) -> (__m256i, __m256) {
        // SAFETY: the trait's condition.
        (unsafe { nibbles(tail(block)) }, head.0)
    }

    #[inline(always)]
    unsafe fn min(head: &(__m256, f32), _part: usize) -> f32 {
        head.1
    }
}

struct Q5_0;
impl Block<22, 1> for Q5_0 {
    const OFFSET_SHIFT: i32 = 4;
    type Head = __m256;

    #[inline(always)]
    unsafe fn head(block: &[u8; 22]) -> __m256 {
        // SAFETY: the trait's condition.
        unsafe { half_in_all_lanes([block[0], block[1]]) }
    }

    #[inline(always)]
    unsafe fn part(block: &[u8; 22], head: &__m256, _part: usize) -> (__m256i, __m256) {
        let high = [block[2], block[3], block[4], block[5]];
        // SAFETY: the trait's condition.
        (unsafe { five_bits(tail(block), high) }, *head)
    }
}

struct Q5_1;
impl Block<24, 1> for Q5_1 {
    const HAS_MIN: bool = true;
    type Head = (__m256, f32);

    #[inline(always)]
    unsafe fn head(block: &[u8; 24]) -> (__m256, f32) {
        // SAFETY: the trait's condition.
        unsafe { scale_and_min([block[0], block[1], block[2], block[3]]) }
    }

    #[inline(always)]
    unsafe fn part(block: &[u8; 24], head: &(__m256, f32), _part: usize) -> (__m256i, __m256) {
        let high = [block[4], block[5], block[6], block[7]];
        // SAFETY: the trait's condition.
        (unsafe { five_bits(tail(block), high) }, head.0)
    }

    #[inline(always)]
    unsafe fn min(head: &(__m256, f32), _part: usize) -> f32 {
        head.1
    }
}

struct Q8_0;
impl Block<34, 1> for Q8_0 {
    const SIGNED: bool = true;
    type Head = __m256;

    #[inline(always)]
    unsafe fn head(block: &[u8; 34]) -> __m256 {
        // SAFETY: the trait's condition.
        unsafe { half_in_all_lanes([block[0], block[1]]) }
    }

    #[inline(always)]
    unsafe fn part(block: &[u8; 34], head: &__m256, _part: usize) -> (__m256i, __m256) {
        // SAFETY: the trait's condition.
        (unsafe { load_u8(tail(block)) }, *head)
    }
}

struct Q4K;
impl Block<144, 8> for Q4K {
    const HAS_MIN: bool = true;
    type Head = ([f32; 8], [f32; 8]);

    #[inline(always)]
    unsafe fn head(block: &[u8; 144]) -> Self::Head {
        // SAFETY: the trait's condition.
        unsafe { scales_and_mins(block[..16].first_chunk().expect("144 bytes")) }
    }

    #[inline(always)]
    unsafe fn part(block: &[u8; 144], head: &Self::Head, part: usize) -> (__m256i, __m256) {
        let bytes = block[16 + part / 2 * 32..].first_chunk().expect("part < 8");
        // SAFETY: the trait's condition.
        unsafe { (shifted(bytes, 4 * (part % 2), 15), _mm256_set1_ps(head.0[part])) }
    }

    #[inline(always)]
    unsafe fn min(head: &Self::Head, part: usize) -> f32 {
        head.1[part]
    }
}

struct Q5K;
impl Block<176, 8> for Q5K {
    const HAS_MIN: bool = true;
    type Head = ([f32; 8], [f32; 8]);

    #[inline(always)]
    unsafe fn head(block: &[u8; 176]) -> Self::Head {
        // SAFETY: the trait's condition.
        unsafe { scales_and_mins(block[..16].first_chunk().expect("176 bytes")) }
    }

    #[inline(always)]
    unsafe fn part(block: &[u8; 176], head: &Self::Head, part: usize) -> (__m256i, __m256) {
        let low = block[48 + part / 2 * 32..].first_chunk().expect("part < 8");
        let high = block[16..].first_chunk().expect("176 bytes");
        // SAFETY: the trait's condition.
        unsafe {
            let low = shifted(low, 4 * (part % 2), 15);
            let high = _mm256_slli_epi16::<4>(shifted(high, part, 1));
            (_mm256_or_si256(low, high), _mm256_set1_ps(head.0[part]))
        }
    }

    #[inline(always)]
    unsafe fn min(head: &Self::Head, part: usize) -> f32 {
        head.1[part]
    }
}

struct Q6K;
impl Block<210, 8> for Q6K {
    const OFFSET_SHIFT: i32 = 5;
    type Head = [f32; 16];

    #[inline(always)]
    unsafe fn head(block: &[u8; 210]) -> [f32; 16] {
        let scales: &[u8; 16] = block[192..].first_chunk().expect("210 bytes");
        // SAFETY: the trait's condition.
        let d = unsafe { _mm256_cvtss_f32(half_in_all_lanes([block[208], block[209]])) };
        scales.map(|scale| d * f32::from(scale as i8))
    }

    #[inline(always)]
    unsafe fn part(block: &[u8; 210], head: &[f32; 16], part: usize) -> (__m256i, __m256) {
        let (half, group) = (part / 4, part % 4);
        let low = block[half * 64 + 32 * (group % 2)..].first_chunk().expect("part < 8");
        let high = block[128 + half * 32..].first_chunk().expect("part < 8");
        // SAFETY: the trait's condition.
        unsafe {
            let low = shifted(low, 4 * (group / 2), 15);
            let high = _mm256_slli_epi16::<4>(shifted(high, 2 * group, 3));
            let scales = [head[2 * part], head[2 * part + 1]].map(|scale| _mm_set1_ps(scale));
            (_mm256_or_si256(low, high), _mm256_set_m128(scales[1], scales[0]))
        }
    }
}

/// The last bytes of a block.
#[inline(always)]
fn tail<const BYTES: usize, const LEN: usize>(block: &[u8; BYTES]) -> &[u8; LEN] {
    block.last_chunk().expect("a block is longer than its values")
}

/// Unsigned 4-bit values: low nibbles first, then high.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: 16 readable bytes; the load needs no alignment.
    let low = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(low), low);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// Unsigned 5-bit values: nibbles, and bit `i` of `high` for value `i`.
#[inline]
#[target_feature(enable = "avx2")]
fn five_bits(low: &[u8; 16], high: [u8; 4]) -> __m256i {
    let spread =
        _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(high)), spread);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
    let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    _mm256_or_si256(nibbles(low), _mm256_and_si256(is_set, _mm256_set1_epi8(16)))
}

/// Each byte shifted right by `shift` and masked; the mask also drops what came from the next byte.
#[inline]
#[target_feature(enable = "avx2")]
fn shifted(bytes: &[u8; 32], shift: usize, mask: i8) -> __m256i {
    let bytes = _mm256_srl_epi16(load_u8(bytes), _mm_cvtsi32_si128(shift as i32));
    _mm256_and_si256(bytes, _mm256_set1_epi8(mask))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn half_in_all_lanes(bytes: [u8; 2]) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(bytes)))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scale_and_min(bytes: [u8; 4]) -> (__m256, f32) {
    let both = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from_le_bytes(bytes)));
    (_mm256_broadcastss_ps(both), _mm_cvtss_f32(_mm_movehdup_ps(both)))
}

/// The scales and negated minimums of a Q4_K or Q5_K block, from its first 16 bytes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_and_mins(head: &[u8; 16]) -> ([f32; 8], [f32; 8]) {
    let (d, dmin) = scale_and_min([head[0], head[1], head[2], head[3]]);
    let (scales, mins) = block::scales_mins(tail(head));
    let d = _mm256_cvtss_f32(d);
    (scales.map(|scale| d * f32::from(scale)), mins.map(|min| -dmin * f32::from(min)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_u8(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_i8(bytes: &[i8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_i32(values: &[i32; 8]) -> __m256i {
    // SAFETY: 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_x(values: &[f32; 8]) -> __m256 {
    // SAFETY: 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(bytes: &[[u8; 4]; 8]) -> __m256 {
    // SAFETY: 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_ps(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_f16(bytes: &[[u8; 2]; 8]) -> __m256 {
    // SAFETY: 16 readable bytes; the load needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_bf16(bytes: &[[u8; 2]; 8]) -> __m256 {
    // SAFETY: 16 readable bytes; the load needs no alignment.
    let halves = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn horizontal_sum(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
