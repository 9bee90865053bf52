//! The rows of x rounded to 8-bit integers in blocks of 32, with the sums that the packed types need.
//! Knows no weight.

use super::SimdLevel;
#[cfg(target_arch = "x86_64")]
use super::x86;

/// Values in one block of x.
pub(super) const BLOCK: usize = 32;

/// x `(m, cols)` as integers and scales: `x ≈ scale * q`.
pub(super) struct Activations {
    /// Rows of x.
    pub(super) m: usize,
    /// Blocks in a row.
    pub(super) blocks: usize,
    /// `(m, blocks)`: 32 integers in -127..=127.
    pub(super) q: Vec<[i8; BLOCK]>,
    /// `(m, blocks)`: lane `l` is minus the sum of `q[4 l .. 4 l + 4]`, to take off the offset of a weight.
    pub(super) negative_sums: Vec<[i32; 8]>,
    /// `(m, blocks)`: largest magnitude of the block / 127.
    pub(super) scale: Vec<f32>,
    /// `(m, blocks)`: `scale * sum(q)`, to apply the minimum of a weight.
    pub(super) scaled_sum: Vec<f32>,
}

impl Activations {
    /// Rounds x `(m, cols)`; `cols` is a multiple of [`BLOCK`]. A block with a value that is not finite gets a scale that is
    /// not finite, so that the result shows it.
    pub(super) fn quantize(level: SimdLevel, x: &[f32], m: usize, cols: usize) -> Self {
        let blocks = cols / BLOCK;
        let mut activations = Self {
            m,
            blocks,
            q: vec![[0; BLOCK]; m * blocks],
            negative_sums: vec![[0; 8]; m * blocks],
            scale: vec![0.0; m * blocks],
            scaled_sum: vec![0.0; m * blocks],
        };
        match level {
            SimdLevel::Portable => activations.fill(x),
            // SAFETY: a level of this machine holds its features.
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2 => unsafe { x86::avx2::quantize(&mut activations, x) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512Vnni => unsafe { x86::avx512_vnni::quantize(&mut activations, x) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => activations.fill(x),
        }
        activations
    }

    /// [`Activations::quantize`] under the features of the caller.
    #[inline(always)]
    pub(super) fn fill(&mut self, x: &[f32]) {
        for (b, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
            let (scale, inverse) = scale(x);
            let q = &mut self.q[b];
            for (q, x) in q.iter_mut().zip(x) {
                *q = round(x * inverse) as i8;
            }
            let mut sum = 0;
            for (lane, q) in self.negative_sums[b].iter_mut().zip(q.as_chunks::<4>().0) {
                *lane = -q.iter().map(|&q| i32::from(q)).sum::<i32>();
                sum -= *lane;
            }
            self.scale[b] = scale;
            self.scaled_sum[b] = scale * sum as f32;
        }
    }
}

/// The scale of a block and its inverse; the inverse is 0 where it would overflow.
#[inline(always)]
fn scale(x: &[f32; BLOCK]) -> (f32, f32) {
    // As integers magnitudes keep their order and NaN comes after infinity.
    let largest = x.iter().map(|x| (x.to_bits() & 0x7fff_ffff) as i32).fold(0, i32::max);
    let scale = f32::from_bits(largest as u32) / 127.0;
    (scale, if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 })
}

/// The nearest integer of a value in ±127, ties to even, without a call into the math library.
#[inline(always)]
fn round(value: f32) -> i32 {
    // 1.5 * 2^23: at this magnitude one unit in the last place is 1.
    const MAGIC: f32 = 12_582_912.0;
    ((value + MAGIC).to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32)
}
