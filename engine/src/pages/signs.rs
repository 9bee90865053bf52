//! Sign codes of landmarks: on which side of random planes through their centre they lie.
//! Knows rows of one head, no page; codes say which landmarks are scored, never how they score.
//!
//! Two vectors lie on different sides of a random plane with a probability of their angle over π (Charikar, "Similarity
//! estimation techniques from rounding algorithms", 2002). Keys of a model have a large part in common, which tells none
//! of them from another and would fill the codes: they are taken from the centre. A query's scores shift with it by one
//! number for all keys, so it is not.

use super::index::mean_of_rows;
use mka_kernels::rows;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Bits of a code: one machine register; half of them lose more of the attention (`docs/recall.md`).
const BITS: usize = 128;
/// Bytes of a landmark's code and length.
pub(super) const CODE_BYTES: usize = BITS / 8 + 4;
/// Pages at the front of the stream whose landmarks' mean is the centre.
pub(super) const CENTRE_PAGES: usize = 64;
/// Landmarks that are coded at once: their sides take half a MiB.
const AT_ONCE: usize = 1024;

/// Which side of each plane a vector lies on.
pub(super) type Code = u128;

/// By the bits in which two codes differ, the cosine of the angle that they tell of.
pub(super) fn cosines() -> [f32; BITS + 1] {
    std::array::from_fn(|bits| (std::f32::consts::PI * bits as f32 / BITS as f32).cos())
}

/// Normals of the planes, (BITS, d): the same for every head and session.
#[derive(Default)]
pub(super) struct Planes(Vec<f32>);

impl Planes {
    pub(super) fn new(d: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        // The sum of twelve uniform numbers is as good as a normal one here: only signs of sums are read.
        let mut normal = || (0..12).map(|_| rng.random_range(-0.5f32..0.5)).sum::<f32>();
        Self((0..BITS * d).map(|_| normal()).collect())
    }

    /// Code and length of each of `rows` (n, d).
    pub(super) fn coded(&self, rows: &[f32], d: usize) -> impl Iterator<Item = (Code, f32)> {
        let mut sides = vec![0f32; rows.len() / d * BITS];
        rows::score_rows(rows, &self.0, d, &mut sides, BITS);
        // A row's scores are those of one query against every plane.
        let codes: Vec<Code> = sides
            .chunks_exact(BITS)
            .map(|sides| {
                let above = sides.iter().zip(0..).filter(|(side, _)| **side > 0.0);
                above.fold(0, |code, (_, bit)| code | 1 << bit)
            })
            .collect();
        let length = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
        codes.into_iter().zip(rows.chunks_exact(d).map(length))
    }
}

/// Codes of a head's landmarks, as far as they were asked for.
#[derive(Clone, Default)]
pub(super) struct Codes {
    /// (d); empty before there are codes.
    centre: Vec<f32>,
    codes: Vec<Code>,
    /// Distances from the centre.
    lengths: Vec<f32>,
}

impl Codes {
    /// Takes the mean of `landmarks` (n, d), bf16, as the centre, if there is none.
    pub(super) fn need_centre(&mut self, landmarks: &[u8], d: usize) {
        if self.centre.is_empty() {
            let mut keys = vec![0f32; landmarks.len() / 2];
            rows::widen_bf16(landmarks, &mut keys);
            self.centre = mean_of_rows(&keys, d);
        }
    }

    /// Adds the codes of those of `landmarks` (n, d), bf16, behind the ones that have them.
    pub(super) fn extend(&mut self, landmarks: &[u8], planes: &Planes, d: usize) {
        for some in landmarks[self.codes.len() * 2 * d..].chunks(AT_ONCE * 2 * d) {
            let mut keys = vec![0f32; some.len() / 2];
            rows::widen_bf16(some, &mut keys);
            for key in keys.chunks_exact_mut(d) {
                key.iter_mut().zip(&self.centre).for_each(|(x, centre)| *x -= centre);
            }
            for (code, length) in planes.coded(&keys, d) {
                self.codes.push(code);
                self.lengths.push(length);
            }
        }
    }

    /// Codes and lengths.
    pub(super) fn all(&self) -> (&[Code], &[f32]) {
        (&self.codes, &self.lengths)
    }

    /// Keeps the first `count`; with none the centre goes too.
    pub(super) fn truncate(&mut self, count: usize) {
        self.codes.truncate(count);
        self.lengths.truncate(count);
        if count == 0 {
            self.centre.clear();
        }
    }

    /// Lets the first `count` go.
    pub(super) fn drain(&mut self, count: usize) {
        let count = count.min(self.codes.len());
        self.codes.drain(..count);
        self.lengths.drain(..count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_angle_is_told_by_fewer_bits() {
        let d = 16;
        let planes = Planes::new(d);
        let row = |by: f32| -> Vec<f32> {
            (0..d).map(|i| ((i * i) as f32).sin() + by * (i as f32).cos()).collect()
        };
        let opposite = row(0.0).iter().map(|x| -2.0 * x).collect();
        let rows = [row(0.0), row(0.1), row(1.0), opposite].concat();
        let coded: Vec<(Code, f32)> = planes.coded(&rows, d).collect();
        let differing = |a: usize, b: usize| (coded[a].0 ^ coded[b].0).count_ones() as usize;
        assert!(differing(0, 1) < differing(0, 2), "{} {}", differing(0, 1), differing(0, 2));
        assert_eq!(differing(0, 3), BITS);
        assert!((coded[3].1 / coded[0].1 - 2.0).abs() < 1e-6);
        let cosines = cosines();
        assert!((cosines[0] - 1.0).abs() < 1e-6 && (cosines[BITS] + 1.0).abs() < 1e-6);
        // The angle that the bits tell of is the rows' own, but for the planes' chance: 0.09 of a half turn at most here.
        let (a, b) = (row(0.0), row(1.0));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
        let angle = (dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()).acos();
        let told = differing(0, 2) as f32 / BITS as f32 * std::f32::consts::PI;
        assert!((told - angle).abs() < 0.09 * std::f32::consts::PI, "{told}, expected {angle}");
    }
}
