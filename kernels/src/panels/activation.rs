//! Rows of x as a kernel reads them: a few rows side by side, in f32 or rounded to unsigned 8-bit integers.
//! Knows no weight.

use super::{F32_ROWS, GROUP, INT8_ROWS};
use crate::simd::{LANES, multiversion};

/// Rows of x in tiles of at most `R`: a tile is (steps, rows of it), one after another.
pub(super) struct Tiles<T, const R: usize> {
    steps: usize,
    m: usize,
    values: Vec<T>,
}

impl<T: Copy + Default, const R: usize> Tiles<T, R> {
    /// Room for rows of `steps` values.
    fn new(steps: usize) -> Self {
        Self { steps, m: 0, values: Vec::new() }
    }

    /// Makes room for `m` rows; what was there goes.
    fn resize(&mut self, m: usize) {
        self.m = m;
        self.values.resize(m * self.steps, T::default());
    }

    /// Puts a row where it belongs.
    fn place(&mut self, row: usize, values: &[T]) {
        let start = row / R * R;
        let num_rows = R.min(self.m - start);
        let tile = &mut self.values[start * self.steps..][..num_rows * self.steps];
        for (to, value) in tile.chunks_exact_mut(num_rows).zip(values) {
            to[row - start] = *value;
        }
    }

    /// First row, number of rows and values of each tile.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, usize, &[T])> {
        let tiles = self.values.chunks(R * self.steps).enumerate();
        tiles.map(|(i, tile)| (i * R, tile.len() / self.steps, tile))
    }
}

/// Rows of x as they are.
pub(super) struct Floats {
    pub(super) tiles: Tiles<f32, F32_ROWS>,
}

impl Floats {
    /// Room for rows of `cols` values.
    pub(super) fn new(cols: usize) -> Self {
        Self { tiles: Tiles::new(cols) }
    }

    /// Takes x `(m, cols)`.
    pub(super) fn take(&mut self, x: &[f32]) {
        self.tiles.resize(x.len() / self.tiles.steps);
        for (row, x) in x.chunks_exact(self.tiles.steps).enumerate() {
            self.tiles.place(row, x);
        }
    }
}

/// Rows of x rounded, x ≈ scale * (q - zero).
pub(super) struct Rounded {
    cols: usize,
    /// Steps of [`GROUP`] columns: zeros beyond the last column, where the weights are zero too.
    pub(super) tiles: Tiles<[u8; GROUP], INT8_ROWS>,
    /// `(m)`.
    pub(super) rows: Vec<Row>,
    /// One row on its way.
    row: Vec<[u8; GROUP]>,
}

/// How the integers of a row are read.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Row {
    /// One step; NaN if a value of the row is not finite.
    pub(super) scale: f32,
    /// The integer of 0.
    pub(super) zero: i32,
}

impl Rounded {
    /// Room for rows of `cols` values.
    pub(super) fn new(cols: usize) -> Self {
        let groups = cols.div_ceil(GROUP);
        let row = vec![[0; GROUP]; groups];
        Self { cols, tiles: Tiles::new(groups), rows: Vec::new(), row }
    }

    /// Takes x `(m, cols)`.
    pub(super) fn take(&mut self, x: &[f32]) {
        self.rows.clear();
        self.tiles.resize(x.len() / self.cols);
        for (row, x) in x.chunks_exact(self.cols).enumerate() {
            let mut read = Row { scale: 0.0, zero: 0 };
            round_row(x, &mut self.row.as_flattened_mut()[..self.cols], &mut read);
            self.rows.push(read);
            self.tiles.place(row, &self.row);
        }
    }
}

#[inline(always)]
fn round_row_body(x: &[f32], q: &mut [u8], row: &mut Row) {
    // 1.5 * 2^23: at this magnitude one unit in the last place is 1, so that adding it rounds, ties to even.
    const MAGIC: f32 = 12_582_912.0;
    let (blocks, rest) = x.as_chunks::<LANES>();
    let (mut low, mut high, mut finite) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for block in blocks {
        for lane in 0..LANES {
            let x = block[lane];
            low[lane] = if x < low[lane] { x } else { low[lane] };
            high[lane] = if x > high[lane] { x } else { high[lane] };
            finite[lane] += x * 0.0;
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        low[lane] = low[lane].min(x);
        high[lane] = high[lane].max(x);
        finite[lane] += x * 0.0;
    }
    let least = low.into_iter().fold(0.0, f32::min);
    let largest = high.into_iter().fold(0.0, f32::max);
    // Divided first: the difference of two large numbers would overflow.
    let scale = (largest / 255.0 - least / 255.0) + finite.into_iter().sum::<f32>();
    let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
    let bits = |value: f32| ((value + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let zero = bits(-least * inverse).clamp(0, 255);
    for (q, x) in q.iter_mut().zip(x) {
        *q = bits(x * inverse).wrapping_add(zero).clamp(0, 255) as u8;
    }
    *row = Row { scale, zero };
}

multiversion! {
    fn round_row = round_row_body(x: &[f32], q: &mut [u8], row: &mut Row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_within_half_a_step_and_every_row_is_in_its_tile() {
        for cols in [1usize, 3, 4, 16, 17, 50] {
            for shift in [-3.0f32, 0.0, 0.4, 9.0] {
                for m in [0usize, 1, 2, 3, 4, 8] {
                    let x: Vec<f32> =
                        (0..m * cols).map(|i| (i as f32 * 1.7).sin() + shift).collect();
                    let mut rounded = Rounded::new(cols);
                    rounded.take(&[shift; 50][..cols]);
                    rounded.take(&x);
                    let mut seen = 0;
                    for (first, num_rows, tile) in rounded.tiles.iter() {
                        for r in 0..num_rows {
                            let row = rounded.rows[first + r];
                            assert!((0..=255).contains(&row.zero), "zero {}", row.zero);
                            for (i, x) in x[(first + r) * cols..][..cols].iter().enumerate() {
                                let q = tile[i / GROUP * num_rows + r][i % GROUP];
                                let back = row.scale * (i32::from(q) - row.zero) as f32;
                                assert!((back - x).abs() <= 0.51 * row.scale, "{x}: {back}");
                            }
                            seen += 1;
                        }
                    }
                    assert_eq!((seen, rounded.rows.len()), (m, m));
                }
            }
        }
    }

    #[test]
    fn a_row_of_zeros_is_zero_and_one_that_is_not_finite_shows_it() {
        let mut rounded = Rounded::new(2);
        rounded.take(&[0.0, 0.0, 1.0, f32::NAN, f32::NEG_INFINITY, 1.0, 3e38, -3e38]);
        assert_eq!(rounded.rows[0], Row { scale: 0.0, zero: 0 });
        assert!(rounded.rows[1].scale.is_nan() && rounded.rows[2].scale.is_nan());
        assert!(rounded.rows[3].scale.is_finite());
    }
}
