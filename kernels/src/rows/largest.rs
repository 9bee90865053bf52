//! The indices of the largest numbers.
//! Knows no row; what a number stands for is its caller's matter.

use crate::simd::{self, multiversion};
use rayon::prelude::*;

/// Indices of the `k` largest of `values`, ascending by index; of equal values those of lower index.
///
/// Numbers are ordered as by [`f32::total_cmp`]. Cost: of a few among many, one pass and a selection among those that a
/// sample tells to be large; else a selection among all. Many values are looked through by all threads.
pub fn largest(values: &[f32], k: usize) -> Vec<u32> {
    if k >= values.len() {
        return (0..values.len() as u32).collect();
    }
    if k == 0 {
        return Vec::new();
    }
    let mut found = all_reaching(values, sampled_floor(values, k));
    if found.len() < k {
        found = all_reaching(values, 0);
    }
    let (threshold, mut ties) = threshold_of(&found, k);
    // Written whether it is taken or not, and counted where it is: no branch to guess.
    let (mut indices, mut count) = (vec![0; k + 1], 0);
    for (key, index) in found {
        let tie = key == threshold && ties > 0;
        ties -= usize::from(tie);
        indices[count] = index;
        count += usize::from(tie || key > threshold);
    }
    indices.truncate(k);
    indices
}

/// Leading bits of a number by which the threshold is looked for first: its sign, its exponent and two more.
const BIN_BITS: u32 = 11;

/// The k-th largest of the numbers in `found`, 0 < k ≤ their count, and how many of those that equal it are among the k.
fn threshold_of(found: &[(u32, u32)], k: usize) -> (u32, usize) {
    let mut bins = [0u32; 1 << BIN_BITS];
    let bin_of = |key: u32| (key >> (32 - BIN_BITS)) as usize;
    found.iter().for_each(|(key, _)| bins[bin_of(*key)] += 1);
    let (mut bin, mut above) = (bins.len() - 1, 0);
    while above + (bins[bin] as usize) < k {
        above += bins[bin] as usize;
        bin -= 1;
    }
    let in_bin = found.iter().map(|(key, _)| *key).filter(|key| bin_of(*key) == bin);
    let mut keys: Vec<u32> = in_bin.collect();
    let (larger, threshold, _) = keys.select_nth_unstable_by(k - above - 1, |a, b| b.cmp(a));
    let threshold = *threshold;
    let larger = larger.iter().filter(|key| **key > threshold).count();
    (threshold, k - above - larger)
}

/// Values for each that is looked at to guess how large the largest are.
const SAMPLED: usize = 64;

/// What somewhat more than `k` of `values` are likely to reach, as [`ordered`] has it; 0 where a sample tells too little.
fn sampled_floor(values: &[f32], k: usize) -> u32 {
    // A third and sixteen more than are wanted: of 64 in the sample eight are one deviation.
    let rank = k * 4 / (3 * SAMPLED) + 16;
    if rank * SAMPLED * 4 > values.len() {
        return 0;
    }
    let mut sample: Vec<u32> = values.iter().step_by(SAMPLED).map(|x| ordered(*x)).collect();
    *sample.select_nth_unstable_by(rank, |a, b| b.cmp(a)).1
}

/// The number as an integer that is ordered alike.
#[inline(always)]
fn ordered(value: f32) -> u32 {
    let bits = value.to_bits();
    // All bits of a negative number turn round, and the sign of a positive one.
    bits ^ (((bits as i32) >> 31) as u32 | 1 << 31)
}

/// Values of one task.
const TASK: usize = 1 << 14;

/// Of the values that reach `floor`, each as [`ordered`] has it and its index, ascending by index.
fn all_reaching(values: &[f32], floor: u32) -> Vec<(u32, u32)> {
    let part = |(values, first): (&[f32], u32)| {
        let mut found = Vec::new();
        reaching(values, first, floor, &mut found);
        found
    };
    if values.len() <= TASK {
        return part((values, 0));
    }
    let parts: Vec<(&[f32], u32)> = values.chunks(TASK).zip((0..).step_by(TASK)).collect();
    parts.into_par_iter().map(part).collect::<Vec<_>>().concat()
}

#[inline(always)]
fn reaching_body(values: &[f32], start: u32, floor: u32, found: &mut Vec<(u32, u32)>) {
    for (values, first) in values.chunks(simd::LANES).zip((start..).step_by(simd::LANES)) {
        let largest = values.iter().map(|value| ordered(*value)).fold(0, u32::max);
        if largest < floor {
            continue;
        }
        // Written whether it reaches or not, and counted where it does: no branch to guess.
        let (mut own, mut count) = ([(0, 0); simd::LANES], 0);
        for (value, index) in values.iter().zip(first..) {
            own[count] = (ordered(*value), index);
            count += usize::from(ordered(*value) >= floor);
        }
        found.extend_from_slice(&own[..count]);
    }
}

multiversion! {
    fn reaching = reaching_body(values: &[f32], start: u32, floor: u32, found: &mut Vec<(u32, u32)>)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use proptest::prelude::*;

    #[test]
    fn the_largest_of_as_many_as_several_tasks_take_are_those_of_a_full_sort() {
        let value = |i: u32| (i.wrapping_mul(2_654_435_761) >> 7) as f32 % 5_003.0;
        let values: Vec<f32> = (0..3 * TASK as u32 + 77).map(value).collect();
        for k in [1, 100, 4096, values.len() - 1] {
            assert_eq!(largest(&values, k), reference::top_k(&values, k));
        }
    }

    proptest! {
        #[test]
        fn the_largest_are_those_of_a_full_sort(values in prop::collection::vec(-3i8..3, 0..60), k in 0usize..70) {
            let values: Vec<f32> = values.into_iter().map(f32::from).collect();
            prop_assert_eq!(largest(&values, k), reference::top_k(&values, k));
        }

        /// Few of many, as a sample tells them: in any order, equal ones among them, and in an order that deceives it.
        #[test]
        fn a_few_of_many_are_those_of_a_full_sort(
            seed: u32,
            n in 8_000u32..20_000,
            kinds in 1u32..3_000,
            k in 0usize..300,
            is_periodic: bool,
        ) {
            let value = |i: u32| match is_periodic {
                true => (i % SAMPLED as u32) as f32,
                false => (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) as f32 % kinds as f32,
            };
            let values: Vec<f32> = (0..n).map(value).collect();
            prop_assert_eq!(largest(&values, k), reference::top_k(&values, k));
        }

        /// Any bits: numbers far apart and side by side, infinities, both zeros and no numbers.
        #[test]
        fn the_largest_of_any_numbers_are_those_of_a_full_sort(
            values in prop::collection::vec(any::<u32>(), 0..60),
            near in prop::collection::vec(0u32..9, 0..60),
            k in 0usize..130,
        ) {
            let near = near.into_iter().map(|by| 0x3f80_0000 - 4 + by);
            let values: Vec<f32> = values.into_iter().chain(near).map(f32::from_bits).collect();
            let mut expected: Vec<u32> = (0..values.len() as u32).collect();
            expected.sort_by(|a, b| values[*b as usize].total_cmp(&values[*a as usize]).then(a.cmp(b)));
            expected.truncate(k);
            expected.sort_unstable();
            prop_assert_eq!(largest(&values, k), expected);
        }
    }
}
