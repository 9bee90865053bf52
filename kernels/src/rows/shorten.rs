//! Numbers of f32 as f16, eight at a time.
//! Knows no row's meaning.

#[cfg(target_arch = "x86_64")]
use crate::simd::{self, Level};
use half::f16;

/// Writes `row` as f16, rounded to the nearest, ties to even; false if a number is NaN or larger than f16 holds, in whose
/// place stands NaN, infinity or the largest.
///
/// # Panics
/// If the lengths differ.
pub fn shorten_row(row: &[f32], out: &mut [f16]) -> bool {
    assert_eq!(row.len(), out.len(), "a place for each number");
    #[cfg(target_arch = "x86_64")]
    if simd::level() != Level::Portable {
        // SAFETY: the level says that the processor has the features.
        return unsafe { eights(row, out) };
    }
    plain(row, out)
}

fn plain(row: &[f32], out: &mut [f16]) -> bool {
    out.iter_mut().zip(row).for_each(|(out, x)| *out = f16::from_f32(*x));
    row.iter().all(|x| x.abs() <= f16::MAX.to_f32())
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn eights(row: &[f32], out: &mut [f16]) -> bool {
    use std::arch::x86_64::*;
    let (eights, rest) = row.as_chunks::<8>();
    let (out_eights, out_rest) = out.as_chunks_mut::<8>();
    let largest = _mm256_set1_ps(f16::MAX.to_f32());
    let sign = _mm256_set1_ps(-0.0);
    let mut fits = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    for (x, out) in eights.iter().zip(out_eights) {
        // SAFETY: eight numbers are there to read, and eight of 16 bits to write.
        unsafe {
            let x = _mm256_loadu_ps(x.as_ptr());
            let short = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm_storeu_si128(out.as_mut_ptr().cast(), short);
            let own = _mm256_cmp_ps::<_CMP_LE_OQ>(_mm256_andnot_ps(sign, x), largest);
            fits = _mm256_and_ps(fits, own);
        }
    }
    let rest = plain(rest, out_rest);
    rest && _mm256_movemask_ps(fits) == 0xff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_comes_back_and_what_lies_between_is_rounded_as_one_by_one() {
        let finite = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite());
        let exact: Vec<f32> = finite.map(f16::to_f32).collect();
        let between = exact.iter().map(|x| x * 1.000_3 + 1e-9).filter(|x| x.abs() <= 65_504.0);
        let between: Vec<f32> = between.collect();
        let shortened = |row: &[f32]| {
            let mut own = vec![f16::NAN; row.len()];
            assert!(shorten_row(row, &mut own), "{row:?}");
            own
        };
        // In registers, and behind them.
        for length in [exact.len(), 8, 7] {
            for row in exact.chunks(length) {
                assert_eq!(shortened(row).into_iter().map(f16::to_f32).collect::<Vec<_>>(), row);
            }
            for row in between.chunks(length) {
                let mut expected = vec![f16::NAN; row.len()];
                assert!(plain(row, &mut expected));
                assert_eq!(shortened(row), expected, "{row:?}");
            }
        }
    }

    #[test]
    fn what_f16_does_not_hold_is_said() {
        for large in [65_505.0, -70_000.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            for at in 0..11 {
                let mut row = [1.0; 11];
                row[at] = large;
                assert!(!shorten_row(&row, &mut [f16::ZERO; 11]), "{large} at {at}");
            }
        }
        assert!(shorten_row(&[65_504.0, -65_504.0, 0.0, -0.0], &mut [f16::ZERO; 4]));
        assert!(shorten_row(&[], &mut []));
    }
}
