//! The kernels of a processor without AVX2: a general f32 product, and integers in plain Rust, which AVX2 and AVX-512
//! are compared with.
//! Knows no instruction set.

use super::activation::Rounded;
use super::{Columns, GROUP, RowNumbers, WIDTH};
use crate::attention::matmul;

/// A panel `(cols, WIDTH)` times x `(m, cols)`.
pub(super) fn f32_panel(panel: &[[f32; WIDTH]], x: &[f32], bias: &[f32; WIDTH], out: Columns<'_>) {
    let Columns { out, stride, start, len } = out;
    let cols = panel.len();
    let (shape, panel) = ((x.len() / cols, len, cols), panel.as_flattened());
    matmul(&mut out[start..], stride, x, (cols, 1), panel, (WIDTH, 1), shape, 0.0);
    for row in out.chunks_exact_mut(stride) {
        row[start..][..len].iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
    }
}

/// A panel `(groups, WIDTH, GROUP)` times the rounded rows.
pub(super) fn int8_panel(
    panel: &[[[i8; GROUP]; WIDTH]],
    x: &Rounded,
    of_rows: RowNumbers<'_>,
    mut out: Columns<'_>,
) {
    let RowNumbers { scale, sum, bias } = of_rows;
    for (first, num_rows, tile) in x.tiles.iter() {
        for r in 0..num_rows {
            let mut sums = [0i32; WIDTH];
            for (weights, x) in panel.iter().zip(tile.chunks_exact(num_rows)) {
                let x = x[r].map(i16::from);
                for lane in 0..WIDTH {
                    let weights = weights[lane].map(i16::from);
                    let product = |i: usize| i32::from(weights[i]) * i32::from(x[i]);
                    let four = product(0) + product(1) + product(2) + product(3);
                    // No sum comes near the end of i32 (`MAX_INT8_COLUMNS`); a check would keep this from vector code.
                    sums[lane] = sums[lane].wrapping_add(four);
                }
            }
            let of_x = x.rows[first + r];
            let value = |lane: usize| {
                let product = (sums[lane] - of_x.zero * sum[lane]) as f32;
                product * (of_x.scale * scale[lane]) + bias[lane]
            };
            out.write(first + r, &std::array::from_fn(value));
        }
    }
}
