//! Packed blocks to f32: plain loops over whole blocks, written so that the compiler vectorises them.
//! Knows no rows, threads or instruction sets: callers compile it again under the features they hold.

use super::PackedType;

/// A little-endian half at `at`, exactly, without the feature test that `half` makes on each call.
#[inline(always)]
pub(super) fn half_at(b: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([b[at], b[at + 1]]))
}

/// IEEE half to f32, branch-free: shifting the exponent by a multiplication also scales subnormals.
#[inline(always)]
pub(super) fn half_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // 2^112 moves the exponent bias from 15 to 127.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let infinite = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | infinite | u32::from(bits & 0x8000) << 16)
}

/// The eight 6-bit scales and eight 6-bit minimums of a Q4_K or Q5_K block.
#[inline(always)]
pub(super) fn scales_mins(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let word = |at: usize| {
        u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]])
    };
    let (low, mid, high) = (word(0), word(4), word(8));
    let scales = [low & 0x3f3f_3f3f, (high & 0x0f0f_0f0f) | (low >> 6 & 0x0303_0303) << 4];
    let mins = [mid & 0x3f3f_3f3f, (high >> 4 & 0x0f0f_0f0f) | (mid >> 6 & 0x0303_0303) << 4];
    let bytes = |words: [u32; 2]| (u64::from(words[0]) | u64::from(words[1]) << 32).to_le_bytes();
    (bytes(scales), bytes(mins))
}

/// The sixteen scales of a Q3_K block, less their offset of 32.
#[inline(always)]
fn scales_q3k(packed: &[u8]) -> [i8; 16] {
    std::array::from_fn(|i| {
        let low = packed[i % 8] >> (4 * (i / 8)) & 15;
        let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
        (low | high << 4) as i8 - 32
    })
}

/// Whole blocks of `ty` to f32.
///
/// `src` and `out` hold the same number of blocks; a remainder of either is left alone.
#[inline(always)]
pub(super) fn dequantize(ty: PackedType, src: &[u8], out: &mut [f32]) {
    match ty {
        PackedType::F32 => each::<4, 1>(src, out, |b, y| y[0] = f32::from_le_bytes(*b)),
        PackedType::F16 => {
            each::<2, 1>(src, out, |b, y| y[0] = half_to_f32(u16::from_le_bytes(*b)));
        }
        PackedType::BF16 => each::<2, 1>(src, out, |b, y| {
            y[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }),
        PackedType::Q4_0 => each::<18, 32>(src, out, |b, y| {
            let d = half_at(b, 0);
            for j in 0..16 {
                y[j] = (i32::from(b[2 + j] & 15) - 8) as f32 * d;
                y[j + 16] = (i32::from(b[2 + j] >> 4) - 8) as f32 * d;
            }
        }),
        PackedType::Q4_1 => each::<20, 32>(src, out, |b, y| {
            let (d, min) = (half_at(b, 0), half_at(b, 2));
            for j in 0..16 {
                y[j] = i32::from(b[4 + j] & 15) as f32 * d + min;
                y[j + 16] = i32::from(b[4 + j] >> 4) as f32 * d + min;
            }
        }),
        PackedType::Q5_0 => each::<22, 32>(src, out, |b, y| {
            let d = half_at(b, 0);
            let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
            for j in 0..16 {
                let q0 = u32::from(b[6 + j] & 15) | (high >> j & 1) << 4;
                let q1 = u32::from(b[6 + j] >> 4) | (high >> (j + 16) & 1) << 4;
                y[j] = (q0 as i32 - 16) as f32 * d;
                y[j + 16] = (q1 as i32 - 16) as f32 * d;
            }
        }),
        PackedType::Q5_1 => each::<24, 32>(src, out, |b, y| {
            let (d, min) = (half_at(b, 0), half_at(b, 2));
            let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
            for j in 0..16 {
                let q0 = u32::from(b[8 + j] & 15) | (high >> j & 1) << 4;
                let q1 = u32::from(b[8 + j] >> 4) | (high >> (j + 16) & 1) << 4;
                y[j] = q0 as i32 as f32 * d + min;
                y[j + 16] = q1 as i32 as f32 * d + min;
            }
        }),
        PackedType::Q8_0 => each::<34, 32>(src, out, |b, y| {
            let d = half_at(b, 0);
            for j in 0..32 {
                y[j] = f32::from(b[2 + j] as i8) * d;
            }
        }),
        PackedType::Q2K => each::<84, 256>(src, out, |b, y| {
            let (d, dmin) = (half_at(b, 80), half_at(b, 82));
            for (is, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let (half, group, side) = (is / 8, is % 8 / 2, is % 2);
                let (scale, min) = (d * f32::from(b[is] & 15), dmin * f32::from(b[is] >> 4));
                let qs = &b[16 + half * 32 + side * 16..][..16];
                for (y, q) in y.iter_mut().zip(qs) {
                    *y = scale * f32::from(q >> (2 * group) & 3) - min;
                }
            }
        }),
        PackedType::Q3K => each::<110, 256>(src, out, |b, y| {
            let d = half_at(b, 108);
            let scales = scales_q3k(&b[96..108]);
            for (is, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let (half, group, side) = (is / 8, is % 8 / 2, is % 2);
                let scale = d * f32::from(scales[is]);
                let qs = &b[32 + half * 32 + side * 16..][..16];
                let high = &b[side * 16..][..16];
                for ((y, q), high) in y.iter_mut().zip(qs).zip(high) {
                    let q = (q >> (2 * group) & 3) | (high >> (half * 4 + group) & 1) << 2;
                    *y = scale * (f32::from(q) - 4.0);
                }
            }
        }),
        PackedType::Q4K => each::<144, 256>(src, out, |b, y| {
            let (d, dmin) = (half_at(b, 0), half_at(b, 2));
            let (scales, mins) = scales_mins(b[4..16].first_chunk().expect("12 bytes"));
            for (j, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (scale, min) = (d * f32::from(scales[j]), dmin * f32::from(mins[j]));
                let qs = &b[16 + j / 2 * 32..][..32];
                for (y, q) in y.iter_mut().zip(qs) {
                    *y = scale * f32::from(q >> (4 * (j % 2)) & 15) - min;
                }
            }
        }),
        PackedType::Q5K => each::<176, 256>(src, out, |b, y| {
            let (d, dmin) = (half_at(b, 0), half_at(b, 2));
            let (scales, mins) = scales_mins(b[4..16].first_chunk().expect("12 bytes"));
            for (j, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (scale, min) = (d * f32::from(scales[j]), dmin * f32::from(mins[j]));
                let qs = &b[48 + j / 2 * 32..][..32];
                for ((y, q), high) in y.iter_mut().zip(qs).zip(&b[16..48]) {
                    let q = (q >> (4 * (j % 2)) & 15) | (high >> j & 1) << 4;
                    *y = scale * f32::from(q) - min;
                }
            }
        }),
        PackedType::Q6K => each::<210, 256>(src, out, |b, y| {
            let d = half_at(b, 208);
            for (is, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let (half, group, side) = (is / 8, is % 8 / 2, is % 2);
                let scale = d * f32::from(b[192 + is] as i8);
                let low = &b[half * 64 + 32 * (group % 2) + side * 16..][..16];
                let high = &b[128 + half * 32 + side * 16..][..16];
                for ((y, low), high) in y.iter_mut().zip(low).zip(high) {
                    let q = (low >> (4 * (group / 2)) & 15) | (high >> (2 * group) & 3) << 4;
                    *y = scale * (f32::from(q) - 32.0);
                }
            }
        }),
    }
}

/// Runs `f` over the blocks of `BYTES` bytes and their `LEN` values.
#[inline(always)]
fn each<const BYTES: usize, const LEN: usize>(
    src: &[u8],
    out: &mut [f32],
    f: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, values) in src.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        f(block, values);
    }
}
