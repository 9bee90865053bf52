//! The largest haystack that fits a length, found with few counts of the whole text.
//! Knows neither text nor tokenizer: a size goes in, tokens come out.

use crate::job::Result;
use std::ops::RangeInclusive;

/// A size that fits and the tokens it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fit {
    pub(super) units: usize,
    pub(super) tokens: usize,
}

/// Tokens that the smallest size takes, more than the length has.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLarge(pub(super) usize);

/// Tokens of `length` that may stay empty, where a unit is smaller than that.
pub(super) fn slack(length: usize) -> usize {
    length / 100
}

/// Units of the first guess, cheap beside any length.
const PROBE: usize = 16;

/// A guess is at most this many times the largest size counted, so that a bad slope costs little: the count before the
/// last one reads a 64th of the text in the worst case.
const LARGEST_STEP: usize = 64;

/// Guesses by slope before halving takes over, which ends even where tokens grow unevenly.
const GUESSES: usize = 10;

/// A size out of `units` whose tokens are at most `length`, and at most [`slack`] or one unit less.
///
/// # Cost
/// Tokens grow almost linearly with units: two counts of small texts and two or three of whole ones.
pub(super) fn largest(
    length: usize,
    units: RangeInclusive<usize>,
    measure: &mut dyn FnMut(usize) -> Result<usize>,
) -> Result<Result<Fit, TooLarge>> {
    let (min, max) = units.into_inner();
    let mut fits = Fit { units: min, tokens: measure(min)? };
    if fits.tokens > length {
        return Ok(Err(TooLarge(fits.tokens)));
    }
    // The smallest size known not to fit, and the size counted before the largest one that fits.
    let mut over: Option<Fit> = None;
    let mut before: Option<Fit> = None;
    for guess in 0.. {
        let largest = over.map_or(max, |over| over.units - 1);
        if fits.units >= largest || length - fits.tokens <= slack(length) {
            break;
        }
        let slope = over.or(before).map(|other| {
            let units = other.units as f64 - fits.units as f64;
            (other.tokens as f64 - fits.tokens as f64) / units
        });
        let next = match slope {
            None => fits.units + PROBE,
            Some(_) if guess >= GUESSES && over.is_some() => fits.units.midpoint(largest),
            Some(slope) if slope > 0.0 => {
                let room = (length - fits.tokens - slack(length) / 2) as f64;
                // The cast saturates: a guess beyond every size is cut to the largest step.
                fits.units.saturating_add((room / slope) as usize)
            }
            Some(_) => fits.units.saturating_mul(2),
        };
        let step = fits.units.max(PROBE).saturating_mul(LARGEST_STEP);
        let next = next.min(step).clamp(fits.units + 1, largest);
        let counted = Fit { units: next, tokens: measure(next)? };
        if counted.tokens <= length {
            before = Some(fits);
            fits = counted;
        } else {
            over = Some(counted);
        }
    }
    Ok(Ok(fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fit, and the sizes that were counted.
    fn run(
        length: usize,
        units: RangeInclusive<usize>,
        tokens: impl Fn(usize) -> usize,
    ) -> (Result<Fit, TooLarge>, Vec<usize>) {
        let mut counted = Vec::new();
        let fit = largest(length, units, &mut |units| {
            counted.push(units);
            Ok(tokens(units))
        });
        (fit.expect("the count cannot fail"), counted)
    }

    #[test]
    fn the_fit_is_tight_for_even_and_uneven_growth() {
        let growths: [fn(usize) -> usize; 4] = [
            |n| 100 + n,
            |n| 100 + 24 * n,
            |n| 80 + n * 3 / 2 + n / 1000 * 7,
            |n| 50 + n * (1 + n.ilog10() as usize),
        ];
        for growth in growths {
            for length in [1_000, 4_096, 131_072, 1 << 20] {
                let (fit, counted) = run(length, 1..=usize::MAX, growth);
                let fit = fit.expect("it fits");
                assert!(fit.tokens <= length);
                assert!(length - fit.tokens <= slack(length) || growth(fit.units + 1) > length);
                let read: usize = counted.iter().map(|&units| growth(units)).sum();
                assert!(read <= 5 * length, "{length}: {counted:?}");
            }
        }
    }

    #[test]
    fn large_units_fill_up_to_the_last_one() {
        let (fit, _) = run(4_096, 1..=usize::MAX, |n| 700 * n + 30);
        assert_eq!(fit.expect("it fits"), Fit { units: 5, tokens: 3_530 });
    }

    #[test]
    fn the_range_bounds_the_fit() {
        let (fit, _) = run(1_000, 3..=40, |n| 10 * n);
        assert_eq!(fit.expect("it fits").units, 40);
        let (fit, counted) = run(1_000, 3..=40, |n| 1_001 + n);
        assert_eq!(fit, Err(TooLarge(1_004)));
        assert_eq!(counted, [3]);
    }

    #[test]
    fn growth_in_leaps_ends() {
        let (fit, counted) = run(1 << 20, 1..=usize::MAX, |n| if n < 7_919 { n } else { 1 << 21 });
        assert_eq!(fit.expect("it fits").units, 7_918);
        assert!(counted.len() < 40, "{counted:?}");
    }
}
