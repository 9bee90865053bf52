//! One-bit codes row after row, each in cache lines of its own, for looking at rows that lie far apart.
//! Knows nothing of which rows a search may see. The blocks of `codes` are for rows side by side: one row of a block is
//! spread over all of its lines.

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::codes::Codes;
use super::dots::prefetch;
use super::scan::{Best, Level};

/// Bits of each number of a query: what they leave out adds a hundredth to the error that one bit a number of a row has.
pub(super) const PLANES: usize = 6;
/// Rows asked for ahead of the one that is looked at.
const PREFETCH_AHEAD: usize = 16;
/// Words of a cache line.
pub(super) const LINE_WORDS: usize = 8;

/// A cache line.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Line(pub(super) [u64; LINE_WORDS]);

/// Codes and factors of rows in an order of their own.
#[derive(Debug)]
pub(crate) struct Signs {
    /// Words of a row's code.
    num_words: usize,
    /// Lines of a row: its code, then the bits of its factor.
    num_lines: usize,
    lines: Vec<Line>,
}

impl Signs {
    /// The codes of `rows`, of `padded` numbers each; zeros where `codes` has no such row.
    pub(crate) fn new(codes: &Codes, padded: usize, rows: &[u32]) -> Self {
        let num_words = padded / 64;
        let num_lines = (num_words + 1).div_ceil(LINE_WORDS);
        let mut lines = vec![Line::default(); rows.len() * num_lines];
        for (&row, lines) in rows.iter().zip(lines.chunks_exact_mut(num_lines)) {
            let words = lines.iter_mut().flat_map(|line| &mut line.0);
            codes.copy_row(row as usize, words);
        }
        Self { num_words, num_lines, lines }
    }

    #[inline(always)]
    fn lines(&self, at: usize) -> &[Line] {
        &self.lines[at * self.num_lines..][..self.num_lines]
    }

    /// The words of a row.
    #[inline(always)]
    fn row(&self, at: usize) -> &[u64] {
        let lines = self.lines(at);
        // SAFETY: a line is its 8 words, without padding.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * LINE_WORDS) }
    }

    /// How many bits of a row are set, and the sum of the query's numbers, in units, where they are.
    #[inline(always)]
    fn count(&self, planes: &Planes, at: usize) -> (u32, u32) {
        let (mut num_set, mut sums) = (0, [0u32; PLANES]);
        for (&word, planes) in self.row(at)[..self.num_words].iter().zip(&planes.words) {
            num_set += word.count_ones();
            for (sum, plane) in sums.iter_mut().zip(planes) {
                *sum += (word & plane).count_ones();
            }
        }
        (num_set, sums.iter().enumerate().map(|(plane, sum)| sum << plane).sum())
    }

    /// About the dot product of a row with the query, by its counts.
    #[inline(always)]
    fn estimate(&self, planes: &Planes, at: usize, (num_set, sum): (u32, u32)) -> f32 {
        let factor = f32::from_bits(self.row(at)[self.num_words] as u32);
        factor * (num_set as f32 * planes.base + sum as f32 * planes.scale + planes.offset)
    }

    #[inline(always)]
    fn best_by(
        &self,
        planes: &Planes,
        rows: &[u32],
        want: usize,
        count: impl Fn(usize) -> (u32, u32),
    ) -> Vec<(f32, u32)> {
        let mut best = Best::new(want);
        for (at, &row) in rows.iter().enumerate() {
            if let Some(&later) = rows.get(at + PREFETCH_AHEAD) {
                prefetch(self.row(later as usize));
            }
            best.push(self.estimate(planes, row as usize, count(row as usize)), row);
        }
        best.into_sorted()
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,popcnt")]
    fn best_avx2(&self, planes: &Planes, rows: &[u32], want: usize) -> Vec<(f32, u32)> {
        self.best_by(planes, rows, want, |at| self.count(planes, at))
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vpopcntdq")]
    fn best_avx512(&self, planes: &Planes, rows: &[u32], want: usize) -> Vec<(f32, u32)> {
        let lines = avx512::plane_lines(&planes.words);
        self.best_by(planes, rows, want, |at| avx512::count(self.lines(at), self.num_words, &lines))
    }

    /// The `want` of `rows` whose estimates are greatest, the greatest first; the same on every level.
    pub(crate) fn best(
        &self,
        level: Level,
        planes: &Planes,
        rows: &[u32],
        want: usize,
    ) -> Vec<(f32, u32)> {
        match level {
            // SAFETY: the levels are offered only where the processor has AVX2, and each that has it has POPCNT.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => unsafe { self.best_avx2(planes, rows, want) },
            // SAFETY: the level is offered only where the processor has AVX-512 F and VPOPCNTDQ.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Popcnt => unsafe { self.best_avx512(planes, rows, want) },
            _ => self.best_by(planes, rows, want, |at| self.count(planes, at)),
        }
    }
}

/// A query as bit planes: bit `i` of plane `j` is bit `j` of the `i`-th number.
#[derive(Debug)]
pub(crate) struct Planes {
    words: Vec<[u64; PLANES]>,
    /// What each bit of a code that is set adds, what each unit of the planes' sum adds, and the rest.
    base: f32,
    scale: f32,
    offset: f32,
}

impl Planes {
    /// The planes of a rotated query `(padded)`.
    pub(crate) fn new(rotated: &[f32]) -> Self {
        let (least, greatest) = rotated
            .iter()
            .fold((f32::MAX, f32::MIN), |(least, most), &x| (least.min(x), most.max(x)));
        let range = greatest - least;
        let step = if range > 0.0 { range / ((1 << PLANES) - 1) as f32 } else { 1.0 };
        let mut words = vec![[0; PLANES]; rotated.len() / 64];
        for (numbers, planes) in rotated.chunks_exact(64).zip(&mut words) {
            for (at, &number) in numbers.iter().enumerate() {
                let units = ((number - least) / step).round() as u64;
                for (bit, plane) in planes.iter_mut().enumerate() {
                    *plane |= (units >> bit & 1) << at;
                }
            }
        }
        // The signed sum is twice the sum of the numbers whose bit is set, less the sum of all.
        let all: f32 = rotated.iter().sum();
        Self { words, base: 2.0 * least, scale: 2.0 * step, offset: -all }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::codes::{BLOCK, Tables};
    use crate::vectors::scan::reference_sum;

    fn row(number: usize, padded: usize) -> Vec<f32> {
        let value =
            |at: usize| ((number * 131 + at * 17) as f32 * 0.731).sin() / (padded as f32).sqrt();
        (0..padded).map(value).collect()
    }

    #[test]
    fn estimates_are_those_of_the_scan_at_every_length_and_level() {
        for padded in [64, 128, 384, 448, 512, 576, 1024, 4160] {
            let mut codes = Codes::new(padded);
            (0..70).for_each(|number| codes.set(number, &row(number, padded)));
            // In another order, and one that there is not.
            let rows: Vec<u32> = (0..70).rev().chain([5_000]).collect();
            let signs = Signs::new(&codes, padded, &rows);
            let query = row(1_000, padded);
            let (planes, tables) = (Planes::new(&query), Tables::new(&query));
            for (at, &row) in rows[..70].iter().enumerate() {
                let row = row as usize;
                let sum = reference_sum(&codes, &tables, row / BLOCK, row % BLOCK) as f32;
                let expected = codes.factors()[row] * (sum * tables.scale + tables.offset);
                let got = signs.estimate(&planes, at, signs.count(&planes, at));
                assert!((got - expected).abs() < 0.02, "{padded}: {got}, expected {expected}");
            }
            assert_eq!(signs.estimate(&planes, 70, signs.count(&planes, 70)), 0.0);
            let all: Vec<u32> = (0..71).collect();
            for level in Level::available() {
                for want in [9, 100] {
                    let expected = signs.best(Level::Portable, &planes, &all, want);
                    assert_eq!(expected.len(), want.min(71));
                    let got = signs.best(level, &planes, &all, want);
                    assert_eq!(got, expected, "{level:?}, {padded}");
                }
            }
        }
    }

    #[test]
    fn a_query_of_zeros_estimates_zero() {
        let mut codes = Codes::new(64);
        codes.set(0, &row(3, 64));
        let signs = Signs::new(&codes, 64, &[0]);
        let planes = Planes::new(&[0.0; 64]);
        for level in Level::available() {
            assert_eq!(signs.best(level, &planes, &[0], 1), [(0.0, 0)], "{level:?}");
        }
    }
}
