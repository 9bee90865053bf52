//! The kernels in AVX2 and FMA, and for integers in AVX-512 VNNI.
//! Knows no layout but that of a panel.
//!
//! A tile is a few rows of x times the 16 rows of W in a panel; its sums stay in registers over all columns. Bound by
//! multiplication: with AVX2 32 integer products a cycle, two multiplications for each 32, or 16 products in f32.

use super::activation::{Floats, Rounded, Row};
use super::{Columns, GROUP, RowNumbers, WIDTH};
use std::arch::x86_64::*;

/// A panel `(cols, WIDTH)` times the rows of x.
#[target_feature(enable = "avx2,fma")]
pub(super) fn f32_panel(
    panel: &[[f32; WIDTH]],
    x: &Floats,
    bias: &[f32; WIDTH],
    mut out: Columns<'_>,
) {
    for (first, num_rows, tile) in x.tiles.iter() {
        match num_rows {
            1 => f32_tile::<1>(panel, tile, bias, first, &mut out),
            2 => f32_tile::<2>(panel, tile, bias, first, &mut out),
            3 => f32_tile::<3>(panel, tile, bias, first, &mut out),
            4 => f32_tile::<4>(panel, tile, bias, first, &mut out),
            5 => f32_tile::<5>(panel, tile, bias, first, &mut out),
            _ => f32_tile::<6>(panel, tile, bias, first, &mut out),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn f32_tile<const R: usize>(
    panel: &[[f32; WIDTH]],
    x: &[f32],
    bias: &[f32; WIDTH],
    first: usize,
    out: &mut Columns<'_>,
) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for (weights, x) in panel.iter().zip(x.as_chunks::<R>().0) {
        let weights = load_f32(weights);
        for r in 0..R {
            let x = _mm256_set1_ps(x[r]);
            sums[r][0] = _mm256_fmadd_ps(x, weights[0], sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(x, weights[1], sums[r][1]);
        }
    }
    let bias = load_f32(bias);
    for r in 0..R {
        let values = [_mm256_add_ps(sums[r][0], bias[0]), _mm256_add_ps(sums[r][1], bias[1])];
        out.write(first + r, &store_f32(values));
    }
}

/// The integer kernel under one set of features: `$dot` adds the products of 32 unsigned and 32 signed bytes, in fours.
macro_rules! level {
    ($name:ident, $features:literal, fn dot($sums:ident, $x:ident, $weights:ident) $dot:block) => {
        pub(super) mod $name {
            use super::*;

            /// A panel `(groups, WIDTH, GROUP)` times the rounded rows.
            #[target_feature(enable = $features)]
            pub(in crate::panels) fn int8_panel(
                panel: &[[[i8; GROUP]; WIDTH]],
                x: &Rounded,
                of_rows: RowNumbers<'_>,
                mut out: Columns<'_>,
            ) {
                for (first, num_rows, tile) in x.tiles.iter() {
                    let rows = &x.rows[first..];
                    match num_rows {
                        1 => int8_tile::<1>(panel, tile, rows, of_rows, first, &mut out),
                        2 => int8_tile::<2>(panel, tile, rows, of_rows, first, &mut out),
                        _ => int8_tile::<3>(panel, tile, rows, of_rows, first, &mut out),
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn int8_tile<const R: usize>(
                panel: &[[[i8; GROUP]; WIDTH]],
                x: &[[u8; GROUP]],
                rows: &[Row],
                of_rows: RowNumbers<'_>,
                first: usize,
                out: &mut Columns<'_>,
            ) {
                let mut sums = [[_mm256_setzero_si256(); 2]; R];
                for (weights, x) in panel.iter().zip(x.as_chunks::<R>().0) {
                    let weights = load_i8(weights);
                    for r in 0..R {
                        let x = _mm256_set1_epi32(i32::from_le_bytes(x[r]));
                        sums[r][0] = dot(sums[r][0], x, weights[0]);
                        sums[r][1] = dot(sums[r][1], x, weights[1]);
                    }
                }
                let (scale, bias) = (load_f32(of_rows.scale), load_f32(of_rows.bias));
                let sum = load_i32(of_rows.sum);
                for r in 0..R {
                    let (zero, step) =
                        (_mm256_set1_epi32(rows[r].zero), _mm256_set1_ps(rows[r].scale));
                    let mut values = [_mm256_setzero_ps(); 2];
                    for half in 0..2 {
                        let offset = _mm256_mullo_epi32(zero, sum[half]);
                        let product = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[r][half], offset));
                        let product = _mm256_mul_ps(product, _mm256_mul_ps(step, scale[half]));
                        values[half] = _mm256_add_ps(product, bias[half]);
                    }
                    out.write(first + r, &store_f32(values));
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn dot($sums: __m256i, $x: __m256i, $weights: __m256i) -> __m256i {
                $dot
            }
        }
    };
}

level!(
    avx2,
    "avx2",
    // Two products sum to at most 255 * 128 in magnitude, inside i16: `Int8Panels` says why.
    fn dot(sums, x, weights) {
        let pairs = _mm256_maddubs_epi16(x, weights);
        _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
);

level!(
    avx512_vnni,
    "avx2,avx512f,avx512vl,avx512vnni",
    fn dot(sums, x, weights) {
        _mm256_dpbusd_epi32(sums, x, weights)
    }
);

// Copies of bits instead of loads by pointer: those check their pointer in a build with debug assertions, in the
// innermost loop.

#[inline(always)]
fn load_i8(values: &[[i8; GROUP]; WIDTH]) -> [__m256i; 2] {
    // SAFETY: 64 bytes become 64 bytes, and any bits are numbers.
    unsafe { std::mem::transmute(*values) }
}

#[inline(always)]
fn load_i32(values: &[i32; WIDTH]) -> [__m256i; 2] {
    // SAFETY: as above.
    unsafe { std::mem::transmute(*values) }
}

#[inline(always)]
fn load_f32(values: &[f32; WIDTH]) -> [__m256; 2] {
    // SAFETY: as above.
    unsafe { std::mem::transmute(*values) }
}

#[inline(always)]
fn store_f32(values: [__m256; 2]) -> [f32; WIDTH] {
    // SAFETY: as above.
    unsafe { std::mem::transmute(values) }
}
