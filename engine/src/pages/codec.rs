//! How the keys and values of a stored page are held: f32, bf16, or whole numbers of 8 or 4 bits.
//! Knows rows alone: one token's key or value of one head.

use half::bf16;
use mka_kernels::{Staged, rows};

/// How stored keys and values are held; bytes are in `docs/recall.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PagePrecision {
    /// As computed.
    F32,
    /// Rounded to bf16.
    #[default]
    Bf16,
    /// Eight bits, a scale a row.
    Int8,
    /// Four bits, a scale and a least value for every 32 numbers.
    Int4,
}

/// Numbers that share a scale at four bits.
const GROUP: usize = 32;

impl PagePrecision {
    /// Bytes of a row of `d` numbers.
    pub(crate) fn row_bytes(self, d: usize) -> usize {
        match self {
            Self::F32 => 4 * d,
            Self::Bf16 => 2 * d,
            Self::Int8 => 4 + d,
            // Each group has a scale and a least value in bf16.
            Self::Int4 => 4 * d.div_ceil(GROUP) + d.div_ceil(2),
        }
    }

    /// Writes `row` into `out`, which is [`PagePrecision::row_bytes`] long.
    pub(crate) fn encode(self, row: &[f32], out: &mut [u8]) {
        match self {
            Self::F32 => {
                let (out, _) = out.as_chunks_mut::<4>();
                out.iter_mut().zip(row).for_each(|(out, x)| *out = x.to_le_bytes());
            }
            Self::Bf16 => rows::narrow_bf16(row, out),
            Self::Int8 => {
                let largest = row.iter().fold(0f32, |max, x| max.max(x.abs()));
                let scale = largest / 127.0;
                let (head, body) = out.split_at_mut(4);
                head.copy_from_slice(&scale.to_le_bytes());
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                for (out, x) in body.iter_mut().zip(row) {
                    *out = ((x * inverse).round() as i8) as u8;
                }
            }
            Self::Int4 => {
                let (heads, body) = out.split_at_mut(4 * row.len().div_ceil(GROUP));
                let groups = row.chunks(GROUP).zip(heads.chunks_exact_mut(4));
                for ((group, head), body) in groups.zip(body.chunks_mut(GROUP / 2)) {
                    let least = group.iter().copied().fold(f32::INFINITY, f32::min);
                    let largest = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let least = to_bf16(least);
                    let scale = to_bf16((largest - from_bf16(least)).max(0.0) / 15.0);
                    head[..2].copy_from_slice(&scale.to_le_bytes());
                    head[2..].copy_from_slice(&least.to_le_bytes());
                    let (scale, least) = (from_bf16(scale), from_bf16(least));
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    let level = |x: f32| ((x - least) * inverse).round().clamp(0.0, 15.0) as u8;
                    for (out, pair) in body.iter_mut().zip(group.chunks(2)) {
                        *out = level(pair[0]) | pair.get(1).map_or(0, |x| level(*x) << 4);
                    }
                }
            }
        }
    }

    /// Reads what [`PagePrecision::encode`] wrote.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                let (bytes, _) = bytes.as_chunks::<4>();
                out.iter_mut().zip(bytes).for_each(|(out, x)| *out = f32::from_le_bytes(*x));
            }
            Self::Bf16 => rows::widen_bf16(bytes, out),
            Self::Int8 => {
                let Some((head, body)) = bytes.split_first_chunk::<4>() else { return };
                let scale = f32::from_le_bytes(*head);
                out.iter_mut().zip(body).for_each(|(out, x)| *out = f32::from(*x as i8) * scale);
            }
            Self::Int4 => {
                let (heads, body) = bytes.split_at(4 * out.len().div_ceil(GROUP));
                let (heads, _) = heads.as_chunks::<4>();
                for ((group, head), body) in
                    out.chunks_mut(GROUP).zip(heads).zip(body.chunks(GROUP / 2))
                {
                    let scale = from_bf16(u16::from_le_bytes([head[0], head[1]]));
                    let least = from_bf16(u16::from_le_bytes([head[2], head[3]]));
                    for (pair, byte) in group.chunks_mut(2).zip(body) {
                        let levels = [byte & 15, byte >> 4];
                        for (out, level) in pair.iter_mut().zip(levels) {
                            *out = f32::from(level) * scale + least;
                        }
                    }
                }
            }
        }
    }

    /// [`PagePrecision::decode`] of rows of `d` numbers that lie side by side, as many as `out` has room for.
    pub(super) fn decode_rows(self, bytes: &[u8], d: usize, out: &mut [f32]) {
        if self == Self::Bf16 {
            // Rows of bf16 lie side by side as one run.
            return self.decode(&bytes[..2 * out.len()], out);
        }
        let rows = bytes.chunks_exact(self.row_bytes(d)).zip(out.chunks_exact_mut(d));
        rows.for_each(|(bytes, out)| self.decode(bytes, out));
    }
}

/// A number as the device gives it to the host.
pub(crate) trait Number: Staged {
    /// Writes rows of `d` numbers side by side into `out`, in `precision`, which is bf16 where the numbers are.
    fn encode_rows(precision: PagePrecision, rows: &[Self], d: usize, out: &mut [u8]);
}

impl Number for f32 {
    fn encode_rows(precision: PagePrecision, rows: &[Self], d: usize, out: &mut [u8]) {
        if precision == PagePrecision::Bf16 {
            // Rows of bf16 lie side by side as one run.
            return precision.encode(rows, out);
        }
        let out = out.chunks_exact_mut(precision.row_bytes(d));
        rows.chunks_exact(d).zip(out).for_each(|(row, out)| precision.encode(row, out));
    }
}

impl Number for bf16 {
    fn encode_rows(_: PagePrecision, rows: &[Self], _: usize, out: &mut [u8]) {
        let (out, _) = out.as_chunks_mut::<2>();
        out.iter_mut().zip(rows).for_each(|(out, x)| *out = x.to_le_bytes());
    }
}

/// The nearest bf16, ties to even.
pub(super) fn to_bf16(x: f32) -> u16 {
    bf16::from_f32(x).to_bits()
}

pub(super) fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [(PagePrecision, f32); 4] = [
        (PagePrecision::F32, 0.0),
        // Half a step of the last of 8 bits of mantissa.
        (PagePrecision::Bf16, 1.0 / 256.0),
        (PagePrecision::Int8, 0.51 / 127.0),
        // Half a step of the range of twice the largest number, and the rounding of scale and least value.
        (PagePrecision::Int4, 1.3 / 15.0),
    ];

    proptest! {
        #[test]
        fn a_row_comes_back_within_half_a_step(
            row in prop::collection::vec(-100f32..100.0, 1..130),
        ) {
            let largest = row.iter().fold(0f32, |max, x| max.max(x.abs()));
            for (precision, loss) in ALL {
                let mut bytes = vec![0; precision.row_bytes(row.len())];
                precision.encode(&row, &mut bytes);
                let mut back = vec![0f32; row.len()];
                precision.decode(&bytes, &mut back);
                for (x, y) in row.iter().zip(&back) {
                    prop_assert!((x - y).abs() <= loss * largest, "{precision:?}: {x} became {y}");
                }
                // Written again, what was read gives the same bytes: a page may be held anew without a second loss.
                if matches!(precision, PagePrecision::F32 | PagePrecision::Bf16) {
                    let mut again = vec![0; bytes.len()];
                    precision.encode(&back, &mut again);
                    prop_assert_eq!(&again, &bytes);
                }
            }
        }
    }

    #[test]
    fn rows_of_equal_numbers_and_of_zeros_are_held() {
        for (precision, _) in ALL {
            for value in [0f32, 3.0] {
                let mut bytes = vec![0; precision.row_bytes(64)];
                precision.encode(&[value; 64], &mut bytes);
                let mut back = [9f32; 64];
                precision.decode(&bytes, &mut back);
                assert!(back.iter().all(|x| (x - value).abs() < 1e-6), "{precision:?}");
            }
        }
    }
}
