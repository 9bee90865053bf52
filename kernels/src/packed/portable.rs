//! Packed rows times x for any processor: plain loops that the compiler vectorises with what the target has.
//! Knows no threads; the caller hands it a few rows of the weight.

use super::PackedType;
use super::activation::{Activations, BLOCK};
use super::block::{dequantize, half_at, scales_mins};

/// 32 weights as integers: `weight = scale[i / 16] * q[i] + min`.
struct SubBlock {
    q: [i8; BLOCK],
    scale: [f32; 2],
    min: f32,
}

/// Rows of `w` times the rounded x: `out` is `(m, num_rows)`, overwritten.
pub(super) fn integer_rows(ty: PackedType, w: &[u8], x: &Activations, out: &mut [f32]) {
    match ty {
        PackedType::Q4_0 => rows_of::<18, 1>(w, x, out, |b, _| SubBlock {
            q: std::array::from_fn(|i| nibble(&b[2..], i) as i8 - 8),
            scale: [half_at(b, 0); 2],
            min: 0.0,
        }),
        PackedType::Q4_1 => rows_of::<20, 1>(w, x, out, |b, _| SubBlock {
            q: std::array::from_fn(|i| nibble(&b[4..], i) as i8),
            scale: [half_at(b, 0); 2],
            min: half_at(b, 2),
        }),
        PackedType::Q5_0 => rows_of::<22, 1>(w, x, out, |b, _| {
            let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
            SubBlock {
                q: std::array::from_fn(|i| {
                    (nibble(&b[6..], i) | ((high >> i & 1) << 4) as u8) as i8 - 16
                }),
                scale: [half_at(b, 0); 2],
                min: 0.0,
            }
        }),
        PackedType::Q5_1 => rows_of::<24, 1>(w, x, out, |b, _| {
            let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
            SubBlock {
                q: std::array::from_fn(|i| {
                    (nibble(&b[8..], i) | ((high >> i & 1) << 4) as u8) as i8
                }),
                scale: [half_at(b, 0); 2],
                min: half_at(b, 2),
            }
        }),
        PackedType::Q8_0 => rows_of::<34, 1>(w, x, out, |b, _| SubBlock {
            q: std::array::from_fn(|i| b[2 + i] as i8),
            scale: [half_at(b, 0); 2],
            min: 0.0,
        }),
        PackedType::Q4K => rows_of::<144, 8>(w, x, out, |b, j| {
            let (scales, mins) = scales_mins(b[4..16].first_chunk().expect("12 bytes"));
            let qs: &[u8; 32] = b[16 + j / 2 * 32..].first_chunk().expect("j < 8");
            SubBlock {
                q: std::array::from_fn(|i| (qs[i] >> (4 * (j % 2)) & 15) as i8),
                scale: [half_at(b, 0) * f32::from(scales[j]); 2],
                min: -half_at(b, 2) * f32::from(mins[j]),
            }
        }),
        PackedType::Q5K => rows_of::<176, 8>(w, x, out, |b, j| {
            let (scales, mins) = scales_mins(b[4..16].first_chunk().expect("12 bytes"));
            let qs: &[u8; 32] = b[48 + j / 2 * 32..].first_chunk().expect("j < 8");
            let high: &[u8; 32] = b[16..].first_chunk().expect("160 bytes");
            SubBlock {
                q: std::array::from_fn(|i| {
                    (qs[i] >> (4 * (j % 2)) & 15 | (high[i] >> j & 1) << 4) as i8
                }),
                scale: [half_at(b, 0) * f32::from(scales[j]); 2],
                min: -half_at(b, 2) * f32::from(mins[j]),
            }
        }),
        PackedType::Q6K => rows_of::<210, 8>(w, x, out, |b, j| {
            let (half, group) = (j / 4, j % 4);
            let low: &[u8; 32] = b[half * 64 + 32 * (group % 2)..].first_chunk().expect("j < 8");
            let high: &[u8; 32] = b[128 + half * 32..].first_chunk().expect("j < 8");
            SubBlock {
                q: std::array::from_fn(|i| {
                    let low = low[i] >> (4 * (group / 2)) & 15;
                    (low | (high[i] >> (2 * group) & 3) << 4) as i8 - 32
                }),
                scale: [0, 1].map(|i| half_at(b, 208) * f32::from(b[192 + 2 * j + i] as i8)),
                min: 0.0,
            }
        }),
        // The float types and the two oldest K types have no integer form: `float_rows`.
        PackedType::F32
        | PackedType::F16
        | PackedType::BF16
        | PackedType::Q2K
        | PackedType::Q3K => {}
    }
}

/// Rows of `w` times x `(m, cols)` in f32: `out` is `(m, num_rows)`, overwritten.
pub(super) fn float_rows(ty: PackedType, w: &[u8], x: &[f32], cols: usize, out: &mut [f32]) {
    let num_rows = w.len() / (cols / ty.block_len() * ty.block_bytes());
    let mut row = vec![0.0; cols];
    for (r, w) in w.chunks_exact(w.len() / num_rows).enumerate() {
        dequantize(ty, w, &mut row);
        for (j, x) in x.chunks_exact(cols).enumerate() {
            out[j * num_rows + r] = dot(&row, x);
        }
    }
}

#[inline(always)]
fn nibble(qs: &[u8], i: usize) -> u8 {
    if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 }
}

#[inline(always)]
fn rows_of<const BYTES: usize, const SUBS: usize>(
    w: &[u8],
    x: &Activations,
    out: &mut [f32],
    unpack: impl Fn(&[u8; BYTES], usize) -> SubBlock,
) {
    let w_blocks = x.blocks / SUBS;
    let num_rows = w.len() / (w_blocks * BYTES);
    out.fill(0.0);
    for (r, row) in w.as_chunks::<BYTES>().0.chunks_exact(w_blocks).enumerate() {
        for (b, block) in row.iter().enumerate() {
            for sub in 0..SUBS {
                let weights = unpack(block, sub);
                for j in 0..x.m {
                    let at = j * x.blocks + b * SUBS + sub;
                    let [low, high] = integer_dot(&weights.q, &x.q[at]);
                    let scaled = low as f32 * weights.scale[0] + high as f32 * weights.scale[1];
                    out[j * num_rows + r] += scaled * x.scale[at] + weights.min * x.scaled_sum[at];
                }
            }
        }
    }
}

/// The products of the first and of the last 16 pairs, summed.
#[inline(always)]
fn integer_dot(a: &[i8; BLOCK], b: &[i8; BLOCK]) -> [i32; 2] {
    let half = |at: usize| {
        (at..at + 16).map(|i| i32::from(i16::from(a[i]) * i16::from(b[i]))).sum::<i32>()
    };
    [half(0), half(16)]
}

/// A dot product in 32 independent sums, so that it vectorises and its order is fixed.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 32];
    let (a_chunks, a_rest) = a.as_chunks::<32>();
    let (b_chunks, b_rest) = b.as_chunks::<32>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..32 {
            sums[i] += a[i] * b[i];
        }
    }
    let mut width = 16;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0] + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}
