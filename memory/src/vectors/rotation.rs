//! A random rotation: spreads what a vector says evenly over its numbers, so that one bit of each is worth the same.
//! Knows nothing of codes or searches.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::scan::Level;

/// Rotated rows are padded to a multiple of this: whole bytes of codes, whole registers of every scan.
const PAD: usize = 64;
/// Rounds of signs, transforms and a permutation: after two every number depends on every other, and the third evens
/// out what two leave of a row that is mostly zeros.
const ROUNDS: usize = 3;

/// Seeded and orthogonal: lengths and dot products of rows stay what they are.
///
/// A round flips signs at random, applies a fast Walsh-Hadamard transform to stretches of a power of two, and permutes
/// at random: `d log d` steps instead of the `d * d` of a dense random matrix. In the place of the dense rotation of
/// RaBitQ (Gao and Long, arXiv 2405.12497, section 3.1), as its authors do in their library.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    dim: usize,
    padded: usize,
    /// `(ROUNDS, padded)`, each 1 or -1.
    signs: Vec<f32>,
    /// `(ROUNDS - 1, padded)`: where each number of a round comes from.
    orders: Vec<u32>,
}

impl Rotation {
    /// The rotation of rows of `dim` numbers under `seed`.
    pub(crate) fn new(dim: usize, seed: u64) -> Self {
        let padded = dim.next_multiple_of(PAD);
        let word = |at: usize| xxh3_64_with_seed(&(at as u64).to_le_bytes(), seed);
        let sign = |at: usize| if word(at / 64) >> (at % 64) & 1 == 0 { 1.0 } else { -1.0 };
        let order = |round: usize| {
            let mut order: Vec<u32> = (0..padded as u32).collect();
            // Words beyond those of the signs.
            order.sort_by_key(|&at| word((round + 1) * (1 << 20) + at as usize));
            order
        };
        Self {
            dim,
            padded,
            signs: (0..ROUNDS * padded).map(sign).collect(),
            orders: (0..ROUNDS - 1).flat_map(order).collect(),
        }
    }

    /// Numbers of a rotated row: `dim`, padded to a multiple of 64.
    pub(crate) fn padded(&self) -> usize {
        self.padded
    }

    /// Rotates `row: (dim)` into `out: (padded)`; bit for bit the same on every level.
    pub(crate) fn apply(&self, row: &[f32], out: &mut [f32]) {
        match Level::best() {
            // SAFETY: these levels are offered only where the processor has AVX2.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 | Level::Avx512Popcnt => unsafe {
                self.apply_avx2(row, out)
            },
            _ => self.apply_portable(row, out),
        }
    }

    /// The same code, compiled for registers of twice the width.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn apply_avx2(&self, row: &[f32], out: &mut [f32]) {
        self.apply_portable(row, out);
    }

    #[inline(always)]
    fn apply_portable(&self, row: &[f32], out: &mut [f32]) {
        debug_assert!(row.len() == self.dim && out.len() == self.padded);
        out[..self.dim].copy_from_slice(row);
        out[self.dim..].fill(0.0);
        let stretch = 1 << self.padded.trailing_zeros();
        let mut before = vec![0.0; self.padded];
        for (round, signs) in self.signs.chunks_exact(self.padded).enumerate() {
            if round > 0 {
                before.copy_from_slice(out);
                let order = &self.orders[(round - 1) * self.padded..][..self.padded];
                out.iter_mut().zip(order).for_each(|(value, &from)| *value = before[from as usize]);
            }
            out.iter_mut().zip(signs).for_each(|(value, sign)| *value *= sign);
            out.chunks_exact_mut(stretch).for_each(hadamard);
        }
    }
}

/// The orthogonal Walsh-Hadamard transform of a power of two of numbers.
#[inline(always)]
fn hadamard(values: &mut [f32]) {
    let mut half = 1;
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (values.len() as f32).sqrt();
    values.iter_mut().for_each(|value| *value *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::dot;

    #[test]
    fn dot_products_stay_what_they_are() {
        for dim in [1, 3, 63, 64, 65, 100, 384, 768, 1000] {
            let rotation = Rotation::new(dim, 7);
            let a: Vec<f32> = (0..dim).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..dim).map(|i| (i as f32 * 0.3).cos()).collect();
            let (mut x, mut y) = (vec![0.0; rotation.padded()], vec![0.0; rotation.padded()]);
            rotation.apply(&a, &mut x);
            rotation.apply(&b, &mut y);
            let tolerance = 1e-5 * dim as f32;
            assert!((dot(&a, &b) - dot(&x, &y)).abs() < tolerance, "{dim}");
            assert!((dot(&a, &a) - dot(&x, &x)).abs() < tolerance, "{dim}");
            let mut portable = vec![0.0; rotation.padded()];
            rotation.apply_portable(&a, &mut portable);
            assert_eq!(portable, x, "{dim}");
        }
    }

    #[test]
    fn a_single_coordinate_is_spread_over_all() {
        for dim in [64, 96, 384, 768] {
            let rotation = Rotation::new(dim, 7);
            let mut out = vec![0.0; rotation.padded()];
            for at in 0..dim {
                let mut row = vec![0.0; dim];
                row[at] = 1.0;
                rotation.apply(&row, &mut out);
                let greatest = out.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                // Of a random direction in 384 dimensions the greatest is about 3 / sqrt(384) = 0.15.
                assert!(greatest < 7.0 / (dim as f32).sqrt(), "{dim}, {at}: {greatest}");
            }
        }
    }

    #[test]
    fn another_seed_is_another_rotation() {
        let rotated = |seed| {
            let mut out = vec![0.0; 64];
            Rotation::new(64, seed).apply(&[1.0; 64], &mut out);
            out
        };
        assert_eq!(rotated(1), rotated(1));
        assert_ne!(rotated(1), rotated(2));
    }
}
