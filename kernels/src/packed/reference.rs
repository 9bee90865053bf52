//! The obvious form of every packed type: one element at a time, products in f64.
//! Knows nothing of blocks as a unit of work, SIMD or threads; the fast paths are tested against it.

use std::ops::Range;

use half::{bf16, f16};

use super::{PackedMatrix, PackedType};
use crate::Result;

/// Element `index` of a row of packed bytes, in the order of float operations that ggml uses.
///
/// `row` holds whole blocks and `index` is inside them.
///
/// # Panics
/// If `index` is outside `row`.
///
/// Source: the layouts in ggml's `ggml-common.h`, the formulas of `dequantize_row_*` in `ggml-quants.c`.
pub fn element(ty: PackedType, row: &[u8], index: usize) -> f32 {
    let start = index / ty.block_len() * ty.block_bytes();
    let b = &row[start..start + ty.block_bytes()];
    let i = index % ty.block_len();
    let half_at = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    // Blocks of 32: the low nibbles hold elements 0..16, the high nibbles 16..32.
    let nibble = |qs: usize| if i < 16 { b[qs + i] & 15 } else { b[qs + i - 16] >> 4 };
    let fifth_bit = |qh: usize| (b[qh + i / 8] >> (i % 8) & 1) << 4;
    match ty {
        PackedType::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        PackedType::F16 => half_at(0),
        PackedType::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        PackedType::Q4_0 => (f32::from(nibble(2)) - 8.0) * half_at(0),
        PackedType::Q4_1 => f32::from(nibble(4)) * half_at(0) + half_at(2),
        PackedType::Q5_0 => (f32::from(nibble(6) | fifth_bit(2)) - 16.0) * half_at(0),
        PackedType::Q5_1 => f32::from(nibble(8) | fifth_bit(4)) * half_at(0) + half_at(2),
        PackedType::Q8_0 => f32::from(b[2 + i] as i8) * half_at(0),
        PackedType::Q2K => {
            let (half, group, l) = (i / 128, i % 128 / 32, i % 32);
            let scale = b[half * 8 + group * 2 + l / 16];
            let q = b[16 + half * 32 + l] >> (2 * group) & 3;
            half_at(80) * f32::from(scale & 15) * f32::from(q) - half_at(82) * f32::from(scale >> 4)
        }
        PackedType::Q3K => {
            let (half, group, l) = (i / 128, i % 128 / 32, i % 32);
            let is = half * 8 + group * 2 + l / 16;
            let low = if is < 8 { b[96 + is] & 15 } else { b[96 + is - 8] >> 4 };
            let high = b[104 + is % 4] >> (2 * (is / 4)) & 3;
            let scale = f32::from(low | high << 4) - 32.0;
            let high_bit = b[l] >> (half * 4 + group) & 1;
            let q = f32::from(b[32 + half * 32 + l] >> (2 * group) & 3 | high_bit << 2) - 4.0;
            half_at(108) * scale * q
        }
        PackedType::Q4K | PackedType::Q5K => {
            let (chunk, high, l) = (i / 64, i % 64 / 32, i % 32);
            let (scale, min) = scale_min(&b[4..16], i / 32);
            let qs = if ty == PackedType::Q4K { 16 } else { 48 };
            let mut q = b[qs + chunk * 32 + l] >> (4 * high) & 15;
            if ty == PackedType::Q5K {
                q |= (b[16 + l] >> (i / 32) & 1) << 4;
            }
            half_at(0) * f32::from(scale) * f32::from(q) - half_at(2) * f32::from(min)
        }
        PackedType::Q6K => {
            let (half, group, l) = (i / 128, i % 128 / 32, i % 32);
            let low = b[half * 64 + 32 * (group % 2) + l] >> (4 * (group / 2)) & 15;
            let high = b[128 + half * 32 + l] >> (2 * group) & 3;
            let scale = b[192 + half * 8 + group * 2 + l / 16] as i8;
            half_at(208) * f32::from(scale) * (f32::from(low | high << 4) - 32.0)
        }
    }
}

/// The 6-bit scale and minimum of sub-block `j` (of 8) of a Q4_K or Q5_K block.
fn scale_min(scales: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        (scales[j + 4] & 15 | scales[j - 4] >> 6 << 4, scales[j + 4] >> 4 | scales[j] >> 6 << 4)
    }
}

/// Rows of `w` as f32: `(rows.len(), cols)`, row-major.
///
/// # Errors
/// As [`PackedMatrix::dequantize_rows`].
pub fn dequantize_rows(w: &PackedMatrix, rows: Range<usize>) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    for row in rows {
        let bytes = w.row(row)?;
        values.extend((0..w.cols()).map(|index| element(w.ty(), bytes, index)));
    }
    Ok(values)
}

/// `x Wᵀ` of the dequantised weights in f64: x `(m, cols)`, result `(m, rows)`, both row-major.
///
/// # Errors
/// As [`PackedMatrix::dequantize_rows`].
pub fn matmul(w: &PackedMatrix, x: &[f32], m: usize) -> Result<Vec<f64>> {
    let weights = dequantize_rows(w, 0..w.rows())?;
    let mut out = Vec::with_capacity(m * w.rows());
    for x in x.chunks_exact(w.cols()).take(m) {
        for row in weights.chunks_exact(w.cols()) {
            out.push(row.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum());
        }
    }
    Ok(out)
}
