//! One-bit codes of rotated vectors, 32 side by side, and the tables that a query is turned into to read them.
//! Knows nothing of files or of which rows a search may see.
//!
//! The code of a unit vector `x` (rotated) is the sign of each number. With `s` the signs as +1 and -1,
//! `<s, q> / sum |x_i|` estimates `<x, q>` for a query `q` without bias over rotations
//! (RaBitQ, Gao and Long, arXiv 2405.12497, equation 12). The divisor is kept as the row's factor.
//! Unlike there, vectors are not centred on a cluster: rows come and go, and nothing is ever trained.

/// Rows of one block: their codes are stored nibble by nibble, so that one shuffle reads 16 of them.
pub(crate) const BLOCK: usize = 32;
/// The greatest table entry: four of them fit a byte (4 * 63 = 252), so that a scan widens one sum of four. The rounding
/// to 63 steps errs by about 0.002 of a cosine of 384 numbers, where the code itself errs by up to 0.04.
const MAX_ENTRY: f32 = 63.0;
/// The sums of this many nibbles fit 16 bits: 63 * 256 = 16,128.
pub(crate) const GROUP: usize = 256;

/// Codes and factors of rows, in blocks of 32.
///
/// A block is `(padded / 4, 16)` bytes: byte `j` of nibble `m` holds four bits of row `j` in its lower half and of row
/// `j + 16` in its upper half. This is the layout of FAISS's fast scan (Andre et al., arXiv 1812.09162).
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Codes {
    padded: usize,
    bytes: Vec<u8>,
    /// What turns `<s, q>` into an estimate; padded to whole blocks with zeros.
    factors: Vec<f32>,
}

impl Codes {
    /// No rows yet, of `padded` numbers each: a multiple of 64.
    pub(crate) fn new(padded: usize) -> Self {
        Self { padded, bytes: Vec::new(), factors: Vec::new() }
    }

    /// Codes as [`bytes`](Self::bytes) and [`factors`](Self::factors) gave them; none if they do not fit each other.
    pub(crate) fn from_parts(padded: usize, bytes: Vec<u8>, factors: Vec<f32>) -> Option<Self> {
        let codes = Self { padded, bytes, factors };
        let fits = codes.factors.len().is_multiple_of(BLOCK)
            && codes.num_blocks().checked_mul(codes.block_bytes()) == Some(codes.bytes.len());
        fits.then_some(codes)
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.factors.len() / BLOCK
    }

    /// Bytes of one block.
    pub(crate) fn block_bytes(&self) -> usize {
        self.padded / 8 * BLOCK
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn factors(&self) -> &[f32] {
        &self.factors
    }

    /// Writes the code of `rotated: (padded)` at `row`, making room for it.
    pub(crate) fn set(&mut self, row: usize, rotated: &[f32]) {
        let block = row / BLOCK;
        if block >= self.num_blocks() {
            self.bytes.resize((block + 1) * self.block_bytes(), 0);
            self.factors.resize((block + 1) * BLOCK, 0.0);
        }
        let (lane, shift) = (row % 16, if row % BLOCK < 16 { 0 } else { 4 });
        let start = block * self.block_bytes();
        for (nibble, numbers) in rotated.chunks_exact(4).enumerate() {
            let bits = |at: usize| u8::from(numbers[at] >= 0.0) << at;
            let code = bits(0) | bits(1) | bits(2) | bits(3);
            let byte = &mut self.bytes[start + nibble * 16 + lane];
            *byte = *byte & !(15 << shift) | code << shift;
        }
        // Independent sums, so that the compiler keeps them in vector registers.
        let (mut lengths, mut squares) = ([0.0f32; 16], [0.0f32; 16]);
        for values in rotated.chunks_exact(16) {
            for lane in 0..16 {
                lengths[lane] += values[lane].abs();
                squares[lane] += values[lane] * values[lane];
            }
        }
        let (length, square) = (lengths.iter().sum::<f32>(), squares.iter().sum::<f32>());
        self.factors[row] = if length > 0.0 { square / length } else { 0.0 };
    }

    /// What is kept of the row: bits, four by four, and the bits of its factor.
    pub(crate) fn code(&self, row: u32) -> impl Iterator<Item = u32> + '_ {
        let row = row as usize;
        let start = row / BLOCK * self.block_bytes() + row % 16;
        let shift = if row % BLOCK < 16 { 0 } else { 4 };
        let nibbles = self.bytes.get(start..).unwrap_or_default().iter().step_by(16);
        let bits = nibbles.take(self.padded / 4).map(move |byte| u32::from(byte >> shift & 15));
        bits.chain(self.factors.get(row).map(|factor| factor.to_bits()))
    }

    /// The row's bits, 64 to a word, and after them those of its factor, into `out`; nothing if there is no such row.
    pub(crate) fn copy_row<'a>(&self, row: usize, mut out: impl Iterator<Item = &'a mut u64>) {
        let Some(factor) = self.factors.get(row) else { return };
        let start = row / BLOCK * self.block_bytes() + row % 16;
        let shift = if row % BLOCK < 16 { 0 } else { 4 };
        for nibbles in self.bytes[start - row % 16..][..self.block_bytes()].chunks_exact(256) {
            let nibbles = nibbles.iter().skip(row % 16).step_by(16);
            let word =
                nibbles.rev().fold(0, |word, byte| word << 4 | u64::from(byte >> shift & 15));
            out.by_ref().take(1).for_each(|out| *out = word);
        }
        out.take(1).for_each(|out| *out = u64::from(factor.to_bits()));
    }

    /// Leaves nothing of the code at `row`.
    pub(crate) fn clear(&mut self, row: usize) {
        let start = row / BLOCK * self.block_bytes() + row % 16;
        let kept = if row % BLOCK < 16 { 0xf0 } else { 0x0f };
        let nibbles = self.bytes.get_mut(start..).unwrap_or_default().iter_mut().step_by(16);
        nibbles.take(self.padded / 4).for_each(|byte| *byte &= kept);
        self.factors.get_mut(row).into_iter().for_each(|factor| *factor = 0.0);
    }
}

/// A query as tables: for each nibble, what each of its 16 values adds to the sum.
#[derive(Debug, Clone)]
pub(crate) struct Tables {
    /// `(padded / 4, 16)`.
    pub(crate) entries: Vec<u8>,
    /// A sum of entries times `scale` plus `offset` is `<s, q>`, but for the rounding of entries.
    pub(crate) scale: f32,
    pub(crate) offset: f32,
}

impl Tables {
    /// The tables of a rotated query `(padded)`.
    pub(crate) fn new(rotated: &[f32]) -> Self {
        let num_nibbles = rotated.len() / 4;
        let mut sums = vec![0.0f32; num_nibbles * 16];
        let mut base = 0.0;
        let mut range = 0.0f32;
        for (numbers, sums) in rotated.chunks_exact(4).zip(sums.chunks_exact_mut(16)) {
            for (value, sum) in sums.iter_mut().enumerate() {
                *sum = (0..4).map(|at| if value >> at & 1 == 1 { numbers[at] } else { 0.0 }).sum();
            }
            // The least and greatest sums take the negative and the positive numbers alone.
            let least: f32 = numbers.iter().map(|value| value.min(0.0)).sum();
            let greatest: f32 = numbers.iter().map(|value| value.max(0.0)).sum();
            sums.iter_mut().for_each(|sum| *sum -= least);
            base += least;
            range = range.max(greatest - least);
        }
        let step = if range > 0.0 { range / MAX_ENTRY } else { 1.0 };
        let entries = sums.iter().map(|sum| (sum / step).round() as u8).collect();
        // The signed sum is twice the sum of the numbers whose bit is set, less the sum of all.
        let all: f32 = rotated.iter().sum();
        Self { entries, scale: 2.0 * step, offset: 2.0 * base - all }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::rotation::Rotation;
    use crate::vectors::{dot, normalize};

    pub(crate) fn row(seed: u64, dim: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let mut row: Vec<f32> = (0..dim).map(|_| next() + next() + next()).collect();
        normalize(&mut row);
        row
    }

    #[test]
    fn the_estimate_is_unbiased_and_as_close_as_published() {
        let dim = 384;
        let query = row(1, dim);
        // Rows at every angle to the query.
        let rows: Vec<Vec<f32>> = (0..200u64)
            .map(|number| {
                let share = number as f32 / 200.0;
                let mut mixed = row(number + 10, dim);
                mixed.iter_mut().zip(&query).for_each(|(x, q)| *x = *x * (1.0 - share) + q * share);
                normalize(&mut mixed);
                mixed
            })
            .collect();
        let mut errors = Vec::new();
        // Over rotations: under a single one the errors of rows that share a direction lean one way.
        for seed in 0..30 {
            let rotation = Rotation::new(dim, seed);
            let mut codes = Codes::new(rotation.padded());
            let mut rotated = vec![0.0; rotation.padded()];
            for (number, row) in rows.iter().enumerate() {
                rotation.apply(row, &mut rotated);
                codes.set(number, &rotated);
            }
            rotation.apply(&query, &mut rotated);
            let tables = Tables::new(&rotated);
            for (number, row) in rows.iter().enumerate() {
                let (block, lane) = (number / BLOCK, number % BLOCK);
                let sum = crate::vectors::scan::reference_sum(&codes, &tables, block, lane);
                let estimate =
                    codes.factors()[number] * (sum as f32 * tables.scale + tables.offset);
                errors.push(estimate - dot(row, &query));
            }
        }
        let mean = errors.iter().sum::<f32>() / errors.len() as f32;
        let spread = (errors.iter().map(|e| e * e).sum::<f32>() / errors.len() as f32).sqrt();
        // The published bound is about sqrt((pi / 2 - 1) / d) = 0.039 for orthogonal rows, less for close ones.
        assert!(mean.abs() < 0.004 && spread < 0.045, "mean {mean}, spread {spread}");
    }

    #[test]
    fn a_row_can_be_written_over_and_leaves_its_neighbours_alone() {
        let mut codes = Codes::new(64);
        for number in 0..40 {
            codes.set(number, &row(number as u64, 64));
        }
        let before = codes.clone();
        codes.set(20, &row(99, 64));
        assert_ne!(codes, before);
        codes.set(20, &row(20, 64));
        assert_eq!(codes, before);
        let kept = Codes::from_parts(64, before.bytes().to_vec(), before.factors().to_vec());
        assert_eq!(kept, Some(before));
        assert_eq!(Codes::from_parts(64, vec![0; 255], vec![0.0; 32]), None);
    }

    #[test]
    fn a_row_that_is_cleared_is_as_if_never_written() {
        for gone in [0, 7, 16, 31, 32, 39] {
            let (mut codes, mut without) = (Codes::new(64), Codes::new(64));
            for number in 0..40 {
                codes.set(number, &row(number as u64, 64));
                if number != gone {
                    without.set(number, &row(number as u64, 64));
                }
            }
            codes.clear(gone);
            codes.clear(4_000);
            assert_eq!(codes, without);
        }
    }

    #[test]
    fn a_row_of_zeros_has_no_factor() {
        let mut codes = Codes::new(64);
        codes.set(0, &[0.0; 64]);
        assert_eq!(codes.factors()[0], 0.0);
        assert_eq!(Tables::new(&[0.0; 64]).offset, 0.0);
    }
}
