//! Rows of f32, and which of them are close to a query: exact arithmetic here, the indexes in the folder beside.
//! Knows nothing of text, scopes or storage.

mod among;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bits;
mod build;
mod codes;
mod column;
mod dots;
mod graph;
mod index;
mod rotation;
mod scan;
mod sealed;
mod signs;
mod table;

pub(crate) use bits::Bits;
pub(crate) use build::{NotBuilt, build};
pub(crate) use codes::{BLOCK, Codes};
pub(crate) use column::{Column, Held, Plain};
pub(crate) use dots::dot_fast;
pub(crate) use graph::{Graph, Idle, Layer};
pub(crate) use index::{Index, Job};
pub use table::{RowSet, VectorIndex};

/// The most numbers per vector.
pub(crate) const MAX_DIM: usize = 1 << 16;

/// Independent sums, so that the compiler keeps them in vector registers: 16 f32 fill two AVX2 or four NEON registers.
const LANES: usize = 16;

/// The dot product of two rows of one length.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_lanes.zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// The greatest dot product of `query: (dim)` with `rows: (n, dim)`; -1 if there is no row.
pub(crate) fn best(query: &[f32], rows: &[f32]) -> f32 {
    rows.chunks_exact(query.len()).map(|row| dot(query, row)).fold(-1.0, f32::max)
}

/// Scales a row to unit length; a row of zeros stays as it is.
pub(crate) fn normalize(row: &mut [f32]) {
    let length = dot(row, row).sqrt();
    if length > 0.0 {
        row.iter_mut().for_each(|value| *value /= length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_agrees_with_the_plain_sum_at_every_length() {
        for len in 0..70 {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..len).map(|i| (i as f32 * 0.3).cos()).collect();
            let plain: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            assert!((f64::from(dot(&a, &b)) - plain).abs() < 1e-5);
        }
    }

    #[test]
    fn best_takes_the_closest_row() {
        assert_eq!(best(&[1.0, 0.0], &[0.0, 1.0, 0.6, 0.8]), 0.6);
        assert_eq!(best(&[1.0, 0.0], &[]), -1.0);
    }

    #[test]
    fn normalize_leaves_zeros_alone() {
        let mut row = [0.0, 0.0];
        normalize(&mut row);
        assert_eq!(row, [0.0, 0.0]);
        let mut row = [3.0, 4.0];
        normalize(&mut row);
        assert_eq!(row, [0.6, 0.8]);
    }
}
