//! The landmarks of a page as bytes: what an opening reads in the page's stead.
//! Knows rows of the index and no file; a record that was made under other settings is none.
//!
//! ```text
//! version u8 | precision u8 | extras u8 | has_codes u8 | first_layer u32 | num_layers u32 | num_kv_heads u32 | head_dim u32
//! | token id u32 x 64
//! | for each layer from first_layer on, for each head: landmark bf16 x 8·head_dim | agreement f32 x 8
//!   | mean key, mean value bf16 x 2·head_dim, if extras & 1
//!   | codes of the page's keys (`mka_kernels::key_codes`), if has_codes
//! | for each layer from first_layer on, for each head: mean representative of the page's block f32 x head_dim, if extras & 2
//! | num_outliers u32 | outlier x num_outliers
//! outlier | layer u32 | head u32 | place u64 | key bf16 x 8·head_dim
//! ```
//!
//! All numbers are little-endian. A place is a landmark's in the stream: the position of its first key over 8. Outliers are
//! of this page or of earlier ones, whichever had not been written when the record was.

use super::PagePrecision;
use super::index::{HeadIndex, SPAN};
use mka_kernels::PAGE_TOKENS;
use std::collections::HashMap;

/// Version of the bytes above.
const VERSION: u8 = 1;
const HEAD_BYTES: usize = 20;
/// Layer, head, place.
const OUTLIER_HEAD_BYTES: usize = 16;

/// What landmarks are made under: those of other settings are made anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LandmarkShape {
    /// Landmarks are of the keys as they are read back.
    pub(super) precision: PagePrecision,
    pub(super) has_means: bool,
    pub(super) has_codes: bool,
    /// InfLLM's: the queries that they were chosen by are gone once a session is closed.
    pub(super) has_representatives: bool,
    pub(super) first_layer: usize,
    pub(super) num_layers: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
}

impl LandmarkShape {
    fn head(&self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        out[0] = VERSION;
        out[1] = match self.precision {
            PagePrecision::F32 => 0,
            PagePrecision::Bf16 => 1,
            PagePrecision::Int8 => 2,
            PagePrecision::Int4 => 3,
        };
        out[2] = u8::from(self.has_means) | u8::from(self.has_representatives) << 1;
        out[3] = u8::from(self.has_codes);
        let numbers = [self.first_layer, self.num_layers, self.num_kv_heads, self.head_dim];
        for (out, number) in out[4..].chunks_exact_mut(4).zip(numbers) {
            out.copy_from_slice(&(number as u32).to_le_bytes());
        }
        out
    }

    fn row_bytes(&self) -> usize {
        HeadIndex::row_bytes(self.head_dim, self.has_means, self.has_codes)
    }

    fn num_rows(&self) -> usize {
        self.num_layers.saturating_sub(self.first_layer) * self.num_kv_heads
    }

    fn representative_bytes(&self) -> usize {
        if self.has_representatives {
            self.num_rows() * self.head_dim * size_of::<f32>()
        } else {
            0
        }
    }
}

/// An outlier's layer, head and place.
pub(super) type OutlierAt = (usize, usize, u64);

/// A record to be written.
pub(super) struct NewLandmarks(Vec<u8>);

impl NewLandmarks {
    /// `rows`: of each layer that chooses and each head, as [`HeadIndex::write_row`] gives them, side by side;
    /// `representatives`: of the same layers and heads (head_dim), where there are any.
    pub(super) fn new(
        shape: &LandmarkShape,
        tokens: &[u32; PAGE_TOKENS],
        rows: &[u8],
        representatives: &[f32],
    ) -> Self {
        let mut bytes = shape.head().to_vec();
        bytes.extend(tokens.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend_from_slice(rows);
        bytes.extend(representatives.iter().flat_map(|x| x.to_le_bytes()));
        Self(bytes)
    }

    /// The record's bytes; `outliers` with their keys (SPAN, d), bf16 as little-endian bytes.
    pub(super) fn into_bytes(self, outliers: &[(OutlierAt, &[u8])]) -> Vec<u8> {
        let mut bytes = self.0;
        bytes.extend((outliers.len() as u32).to_le_bytes());
        for ((layer, head, place), keys) in outliers {
            bytes.extend((*layer as u32).to_le_bytes());
            bytes.extend((*head as u32).to_le_bytes());
            bytes.extend(place.to_le_bytes());
            bytes.extend_from_slice(keys);
        }
        bytes
    }
}

/// A record that was read.
pub(super) struct Landmarks<'a> {
    pub(super) tokens: Box<[u32; PAGE_TOKENS]>,
    rows: &'a [u8],
    row_bytes: usize,
    representatives: &'a [u8],
    outliers: &'a [u8],
    outlier_bytes: usize,
}

impl<'a> Landmarks<'a> {
    /// None where the bytes are no record of `shape`.
    pub(super) fn read(bytes: &'a [u8], shape: &LandmarkShape) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
        // Codes and representatives that are not needed are passed over.
        let shape = &LandmarkShape {
            has_codes: shape.has_codes || head[3] == 1,
            has_representatives: shape.has_representatives || head[2] & 2 != 0,
            ..*shape
        };
        if *head != shape.head() {
            return None;
        }
        let (ids, rest) = rest.split_first_chunk::<{ PAGE_TOKENS * 4 }>()?;
        let mut tokens = Box::new([0; PAGE_TOKENS]);
        let (ids, _) = ids.as_chunks::<4>();
        tokens.iter_mut().zip(ids).for_each(|(token, id)| *token = u32::from_le_bytes(*id));
        let row_bytes = shape.row_bytes();
        let (rows, rest) = rest.split_at_checked(shape.num_rows().checked_mul(row_bytes)?)?;
        let (representatives, rest) = rest.split_at_checked(shape.representative_bytes())?;
        let (count, outliers) = rest.split_first_chunk::<4>()?;
        let outlier_bytes = OUTLIER_HEAD_BYTES + SPAN * 2 * shape.head_dim;
        let expected = (u32::from_le_bytes(*count) as usize).checked_mul(outlier_bytes)?;
        (outliers.len() == expected).then_some(Self {
            tokens,
            rows,
            row_bytes,
            representatives,
            outliers,
            outlier_bytes,
        })
    }

    /// Of the head `at`, counted over the layers that choose, what [`HeadIndex::push_row`] takes.
    pub(super) fn row(&self, at: usize) -> &'a [u8] {
        &self.rows[at * self.row_bytes..(at + 1) * self.row_bytes]
    }

    /// Mean representatives of each layer that chooses, all heads side by side; none where they were not asked for.
    pub(super) fn representatives(&self) -> Vec<f32> {
        let (numbers, _) = self.representatives.as_chunks::<4>();
        numbers.iter().map(|x| f32::from_le_bytes(*x)).collect()
    }

    /// Adds its outliers to `known`.
    pub(super) fn outliers(&self, known: &mut HashMap<OutlierAt, Box<[u8]>>) {
        for outlier in self.outliers.chunks_exact(self.outlier_bytes) {
            let number = |at: usize| {
                let bytes = [outlier[at], outlier[at + 1], outlier[at + 2], outlier[at + 3]];
                u32::from_le_bytes(bytes)
            };
            let place = u64::from(number(8)) | u64::from(number(12)) << 32;
            let at = (number(0) as usize, number(4) as usize, place);
            known.insert(at, outlier[OUTLIER_HEAD_BYTES..].into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: LandmarkShape = LandmarkShape {
        precision: PagePrecision::Bf16,
        has_means: true,
        has_codes: true,
        has_representatives: true,
        first_layer: 1,
        num_layers: 3,
        num_kv_heads: 2,
        head_dim: 6,
    };

    fn sample(outliers: usize) -> (Vec<u8>, Vec<u8>) {
        let rows: Vec<u8> = (0..4 * SHAPE.row_bytes()).map(|i| (i * 7) as u8).collect();
        let tokens = std::array::from_fn(|i| (i * 1000) as u32);
        let keys: Vec<u8> = (0..SPAN * 12).map(|i| i as u8).collect();
        let outliers: Vec<(OutlierAt, &[u8])> =
            (0..outliers).map(|i| ((1 + i % 2, i % 2, i as u64 | 7 << 40), &keys[..])).collect();
        let means: Vec<f32> = (0..24).map(|i| i as f32).collect();
        (NewLandmarks::new(&SHAPE, &tokens, &rows, &means).into_bytes(&outliers), rows)
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        for count in [0, 3] {
            let (bytes, rows) = sample(count);
            let read = Landmarks::read(&bytes, &SHAPE).unwrap();
            assert_eq!(read.tokens[63], 63_000);
            assert_eq!((0..4).flat_map(|at| read.row(at)).copied().collect::<Vec<u8>>(), rows);
            assert_eq!((read.representatives().len(), read.representatives()[23]), (24, 23.0));
            let mut known = HashMap::new();
            read.outliers(&mut known);
            assert_eq!(known.len(), count);
            if count > 0 {
                assert_eq!(known[&(2, 1, 1 | 7 << 40)][..3], [0, 1, 2]);
            }
        }
    }

    #[test]
    fn a_record_of_other_settings_is_none() {
        let (bytes, _) = sample(1);
        for shape in [
            LandmarkShape { precision: PagePrecision::Int8, ..SHAPE },
            LandmarkShape { has_means: false, ..SHAPE },
            LandmarkShape { first_layer: 0, ..SHAPE },
            LandmarkShape { num_layers: 4, ..SHAPE },
            LandmarkShape { num_kv_heads: 1, ..SHAPE },
            LandmarkShape { head_dim: 8, ..SHAPE },
        ] {
            assert!(Landmarks::read(&bytes, &shape).is_none(), "{shape:?}");
        }
        // One with codes serves where none are asked for, and not the other way round.
        let plain = LandmarkShape { has_codes: false, ..SHAPE };
        assert!(Landmarks::read(&bytes, &plain).is_some());
        let plain = LandmarkShape { has_representatives: false, ..SHAPE };
        assert!(Landmarks::read(&bytes, &plain).is_some());
        let mut later = bytes;
        later[2] = 1;
        assert!(Landmarks::read(&later, &SHAPE).is_none());
        later[2] = 3;
        later[3] = 0;
        assert!(Landmarks::read(&later, &SHAPE).is_none());
        later[3] = 1;
        later[0] = VERSION + 1;
        assert!(Landmarks::read(&later, &SHAPE).is_none());
    }

    proptest! {
        /// Flipped bytes, cut ends and edges of numbers: a record is read whole or not at all.
        #[test]
        fn any_bytes_give_a_record_or_none(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            end in any::<prop::sample::Index>(),
            is_cut: bool,
            tail in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let (mut bytes, rows) = sample(2);
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if is_cut {
                bytes.truncate(end.index(bytes.len()));
                bytes.extend(tail);
            }
            if let Some(read) = Landmarks::read(&bytes, &SHAPE) {
                prop_assert_eq!((0..4).map(|at| read.row(at).len()).sum::<usize>(), rows.len());
                prop_assert_eq!(read.representatives().len(), 24);
                read.outliers(&mut HashMap::new());
            }
        }

        #[test]
        fn bytes_that_are_no_record_are_none(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Landmarks::read(&bytes, &SHAPE).is_none());
        }
    }
}
