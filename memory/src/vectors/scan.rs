//! The scan: every code of a range against a query's tables, the best estimates kept.
//! Knows nothing of the vectors behind the codes; one instruction set after another gives the same sums.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::bits::Bits;
use super::codes::{BLOCK, Codes, GROUP, Tables};

/// Fewer blocks than this are not worth a second thread: 131,072 rows are scanned in about 0.4 ms, and starting a
/// thread takes about 0.05 ms (2-core AMD EPYC, AVX2).
const BLOCKS_PER_THREAD: usize = 4096;

/// How many blocks ahead of the scan codes are asked for: of 384 dimensions about 0.1 microseconds of work.
#[cfg(target_arch = "x86_64")]
pub(super) const PREFETCH_BLOCKS: usize = 2;

/// The instruction sets that loops over vectors are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// Plain Rust: the reference.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F and BW.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// These and VPOPCNTDQ.
    #[cfg(target_arch = "x86_64")]
    Avx512Popcnt,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Level {
    /// The levels that this machine runs, the fastest last.
    pub(crate) fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            levels.push(Self::Avx2);
            if std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
            {
                levels.push(Self::Avx512);
                if std::arch::is_x86_feature_detected!("avx512vpopcntdq") {
                    levels.push(Self::Avx512Popcnt);
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        levels.push(Self::Neon);
        levels
    }

    /// The fastest level of this machine.
    pub(crate) fn best() -> Self {
        static BEST: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self::Portable))
    }
}

/// Which rows a scan may return.
#[derive(Clone, Copy)]
pub(crate) struct Visible<'a> {
    pub(crate) live: &'a Bits,
    /// None: all that live.
    pub(crate) allowed: Option<&'a Bits>,
}

impl Visible<'_> {
    pub(super) fn block(&self, block: usize) -> u32 {
        let live = self.live.block(block);
        self.allowed.map_or(live, |allowed| live & allowed.block(block))
    }

    #[cfg(test)]
    fn contains(&self, row: usize) -> bool {
        self.live.contains(row) && self.allowed.is_none_or(|allowed| allowed.contains(row))
    }
}

/// The greatest estimates so far.
#[derive(Debug)]
pub(crate) struct Best {
    want: usize,
    /// Estimates up to this one are not among the best.
    pub(super) threshold: f32,
    found: Vec<(f32, u32)>,
}

impl Best {
    /// Keeps the `want` greatest; `want` is at least 1.
    pub(crate) fn new(want: usize) -> Self {
        Self { want, threshold: f32::NEG_INFINITY, found: Vec::with_capacity(2 * want) }
    }

    #[inline(always)]
    pub(super) fn push(&mut self, estimate: f32, row: u32) {
        if estimate > self.threshold {
            self.found.push((estimate, row));
            if self.found.len() >= 2 * self.want {
                self.shrink();
            }
        }
    }

    /// Pushes the estimates of those rows of a block whose bit is set.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn push_block(&mut self, estimates: &[f32; BLOCK], mut rows: u32, block: usize) {
        while rows != 0 {
            let lane = rows.trailing_zeros() as usize;
            rows &= rows - 1;
            self.push(estimates[lane], (block * BLOCK + lane) as u32);
        }
    }

    #[cold]
    fn shrink(&mut self) {
        self.found.select_nth_unstable_by(self.want - 1, |a, b| b.0.total_cmp(&a.0));
        self.found.truncate(self.want);
        self.threshold = self.found[self.want - 1].0;
    }

    fn merge(&mut self, other: Self) {
        other.found.into_iter().for_each(|(estimate, row)| self.push(estimate, row));
    }

    /// At most `want` estimates and rows, the greatest first.
    pub(crate) fn into_sorted(mut self) -> Vec<(f32, u32)> {
        self.found.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.found.truncate(self.want);
        self.found
    }
}

/// The `want` rows of `blocks` whose estimates are greatest, on up to `threads` threads.
pub(crate) fn scan(
    level: Level,
    codes: &Codes,
    tables: &Tables,
    visible: Visible<'_>,
    blocks: Range<usize>,
    want: usize,
    threads: usize,
) -> Vec<(f32, u32)> {
    let run = |blocks: Range<usize>| {
        let mut best = Best::new(want);
        match level {
            Level::Portable => portable(codes, tables, visible, blocks, &mut best),
            // SAFETY: `Level::available` offers the level only where the processor has AVX2.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2(codes, tables, visible, blocks, &mut best) },
            // SAFETY: both levels are offered only where the processor has AVX-512 F and BW.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Popcnt => unsafe {
                avx512::scan(codes, tables, visible, blocks, &mut best)
            },
            // SAFETY: every aarch64 processor has NEON.
            #[cfg(target_arch = "aarch64")]
            Level::Neon => unsafe { neon(codes, tables, visible, blocks, &mut best) },
        }
        best
    };
    let parts = (blocks.len() / BLOCKS_PER_THREAD).clamp(1, threads.max(1));
    if parts == 1 {
        return run(blocks).into_sorted();
    }
    let part = blocks.len().div_ceil(parts);
    let cut = |at: usize| {
        let start = (blocks.start + at * part).min(blocks.end);
        start..(start + part).min(blocks.end)
    };
    std::thread::scope(|scope| {
        let run = &run;
        let others: Vec<_> = (1..parts).map(|at| scope.spawn(move || run(cut(at)))).collect();
        let mut best = run(cut(0));
        for other in others {
            // A panic of the scan is a bug, and is shown where the search was called.
            best.merge(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        best.into_sorted()
    })
}

/// The sum of table entries of one row, by the layout's definition.
pub(crate) fn reference_sum(codes: &Codes, tables: &Tables, block: usize, lane: usize) -> u32 {
    let bytes = &codes.bytes()[block * codes.block_bytes()..][..codes.block_bytes()];
    let shift = if lane < BLOCK / 2 { 0 } else { 4 };
    bytes
        .chunks_exact(16)
        .zip(tables.entries.chunks_exact(16))
        .map(|(bytes, table)| u32::from(table[usize::from(bytes[lane % 16] >> shift & 15)]))
        .sum()
}

fn portable(
    codes: &Codes,
    tables: &Tables,
    visible: Visible<'_>,
    blocks: Range<usize>,
    best: &mut Best,
) {
    for block in blocks {
        let mut mask = visible.block(block);
        while mask != 0 {
            let lane = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            let sum = reference_sum(codes, tables, block, lane) as f32;
            let row = block * BLOCK + lane;
            best.push(codes.factors()[row] * (sum * tables.scale + tables.offset), row as u32);
        }
    }
}

/// 32 rows at once: a shuffle of 32 bytes looks up two nibbles of 16 rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2(
    codes: &Codes,
    tables: &Tables,
    visible: Visible<'_>,
    blocks: Range<usize>,
    best: &mut Best,
) {
    use std::arch::x86_64::*;
    let (scale, offset) = (_mm256_set1_ps(tables.scale), _mm256_set1_ps(tables.offset));
    let low_bits = _mm256_set1_epi8(15);
    let wanted = blocks.filter(|&block| visible.block(block) != 0);
    let mut later = wanted.clone().skip(PREFETCH_BLOCKS);
    for block in wanted {
        let mask = visible.block(block);
        let bytes = &codes.bytes()[block * codes.block_bytes()..][..codes.block_bytes()];
        // The processor's own prefetching stops at each page of 4 KB, and knows nothing of blocks that are left out:
        // more than half of the time went into waiting.
        let ahead = later.next().unwrap_or(block) * codes.block_bytes();
        let mut ahead = codes.bytes().as_ptr().wrapping_add(ahead);
        // 8 sums each, rows 0-7, 8-15, 16-23 and 24-31.
        let mut sums = [_mm256_setzero_si256(); 4];
        for (bytes, entries) in bytes.chunks(GROUP * 16).zip(tables.entries.chunks(GROUP * 16)) {
            // Of each 16-bit lane, `whole` sums both bytes and `upper` the upper one: the even rows' sums are what is left.
            let mut whole = [_mm256_setzero_si256(); 2];
            let mut upper = [_mm256_setzero_si256(); 2];
            // Rows are padded to 64 numbers, 16 nibbles: no eight of them are cut.
            for (bytes, entries) in bytes.chunks_exact(128).zip(entries.chunks_exact(128)) {
                for line in 0..2 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64 * line).cast());
                }
                ahead = ahead.wrapping_add(128);
                // Four entries fit a byte.
                let mut sums = [_mm256_setzero_si256(); 2];
                for pair in 0..4 {
                    // SAFETY: 32 bytes of the 128 of both slices, and the loads ask for no alignment.
                    let (bytes, table) = unsafe {
                        (
                            _mm256_loadu_si256(bytes.as_ptr().add(32 * pair).cast()),
                            _mm256_loadu_si256(entries.as_ptr().add(32 * pair).cast()),
                        )
                    };
                    let low = _mm256_and_si256(bytes, low_bits);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low_bits);
                    sums[0] = _mm256_add_epi8(sums[0], _mm256_shuffle_epi8(table, low));
                    sums[1] = _mm256_add_epi8(sums[1], _mm256_shuffle_epi8(table, high));
                }
                for half in 0..2 {
                    whole[half] = _mm256_add_epi16(whole[half], sums[half]);
                    upper[half] = _mm256_add_epi16(upper[half], _mm256_srli_epi16::<8>(sums[half]));
                }
            }
            for half in 0..2 {
                let even = _mm256_sub_epi16(whole[half], _mm256_slli_epi16::<8>(upper[half]));
                // The lower 128 bits sum the first nibble of each pair, the upper ones the second.
                let fold = |both: __m256i| {
                    _mm_add_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both))
                };
                let (even, odd) = (fold(even), fold(upper[half]));
                let first = _mm256_cvtepu16_epi32(_mm_unpacklo_epi16(even, odd));
                let second = _mm256_cvtepu16_epi32(_mm_unpackhi_epi16(even, odd));
                sums[2 * half] = _mm256_add_epi32(sums[2 * half], first);
                sums[2 * half + 1] = _mm256_add_epi32(sums[2 * half + 1], second);
            }
        }
        let factors = &codes.factors()[block * BLOCK..][..BLOCK];
        let threshold = _mm256_set1_ps(best.threshold);
        let mut estimates = [0.0f32; BLOCK];
        let mut passed = 0u32;
        for part in 0..4 {
            // SAFETY: 8 numbers of the 32 of both arrays, from 8 * part on.
            let factors = unsafe { _mm256_loadu_ps(factors.as_ptr().add(8 * part)) };
            let sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[part]), scale);
            let estimate = _mm256_mul_ps(factors, _mm256_add_ps(sum, offset));
            let above = _mm256_cmp_ps::<_CMP_GT_OQ>(estimate, threshold);
            passed |= (_mm256_movemask_ps(above) as u32) << (8 * part);
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(estimates.as_mut_ptr().add(8 * part), estimate) };
        }
        best.push_block(&estimates, passed & mask, block);
    }
}

/// 32 rows at once: a table look-up of 16 bytes reads one nibble of 16 rows.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(
    codes: &Codes,
    tables: &Tables,
    visible: Visible<'_>,
    blocks: Range<usize>,
    best: &mut Best,
) {
    use std::arch::aarch64::*;
    // SAFETY: every load and store below stays within a slice or array whose length is stated beside it; the rest of
    // the intrinsics touch registers alone.
    unsafe {
        let low_bits = vdupq_n_u8(15);
        for block in blocks {
            let mask = visible.block(block);
            if mask == 0 {
                continue;
            }
            let bytes = &codes.bytes()[block * codes.block_bytes()..][..codes.block_bytes()];
            let mut sums = [0u32; BLOCK];
            for (bytes, entries) in bytes.chunks(GROUP * 16).zip(tables.entries.chunks(GROUP * 16))
            {
                // 8 sums each, rows 0-7, 8-15, 16-23 and 24-31.
                let mut parts = [vdupq_n_u16(0); 4];
                for (bytes, entries) in bytes.chunks_exact(16).zip(entries.chunks_exact(16)) {
                    // 16 bytes each.
                    let (bytes, table) = (vld1q_u8(bytes.as_ptr()), vld1q_u8(entries.as_ptr()));
                    let low = vqtbl1q_u8(table, vandq_u8(bytes, low_bits));
                    let high = vqtbl1q_u8(table, vshrq_n_u8::<4>(bytes));
                    parts[0] = vaddw_u8(parts[0], vget_low_u8(low));
                    parts[1] = vaddw_u8(parts[1], vget_high_u8(low));
                    parts[2] = vaddw_u8(parts[2], vget_low_u8(high));
                    parts[3] = vaddw_u8(parts[3], vget_high_u8(high));
                }
                let mut group = [0u16; BLOCK];
                // 8 numbers of the 32 each.
                for (part, sums) in parts.into_iter().zip(group.chunks_exact_mut(8)) {
                    vst1q_u16(sums.as_mut_ptr(), part);
                }
                sums.iter_mut().zip(group).for_each(|(sum, more)| *sum += u32::from(more));
            }
            let factors = &codes.factors()[block * BLOCK..][..BLOCK];
            let mut left = mask;
            while left != 0 {
                let lane = left.trailing_zeros() as usize;
                left &= left - 1;
                let estimate = factors[lane] * (sums[lane] as f32 * tables.scale + tables.offset);
                best.push(estimate, (block * BLOCK + lane) as u32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes and tables of any bits: what a scan does with them needs no vectors.
    fn random(num_rows: usize, padded: usize, seed: u64) -> (Codes, Tables) {
        let mut state = seed | 1;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut codes = Codes::new(padded);
        let mut row = vec![0.0; padded];
        for number in 0..num_rows {
            row.iter_mut().for_each(|value| *value = (next() >> 40) as f32 / 1e7 - 0.8);
            codes.set(number, &row);
        }
        row.iter_mut().for_each(|value| *value = (next() >> 40) as f32 / 1e7 - 0.8);
        (codes, Tables::new(&row))
    }

    #[test]
    fn every_level_finds_what_the_portable_scan_finds() {
        // 2,048 and 4,160 numbers take two and five groups of nibbles.
        for (num_rows, padded) in [
            (1, 64),
            (31, 128),
            (32, 384),
            (33, 384),
            (1_000, 384),
            (100, 1024),
            (70, 2048),
            (70, 4160),
        ] {
            let (codes, tables) = random(num_rows, padded, padded as u64);
            let live = Bits::all(num_rows);
            let thirds: Bits = (0..num_rows).filter(|row| row % 3 == 0).collect();
            for allowed in [None, Some(&thirds), Some(&Bits::none(num_rows))] {
                for want in [1, 10, 2_000] {
                    let visible = Visible { live: &live, allowed };
                    let run = |level| {
                        scan(level, &codes, &tables, visible, 0..codes.num_blocks(), want, 1)
                    };
                    let expected = run(Level::Portable);
                    let num_visible = (0..num_rows).filter(|&row| visible.contains(row)).count();
                    assert_eq!(expected.len(), want.min(num_visible));
                    for level in Level::available() {
                        assert_eq!(run(level), expected, "{level:?}, {num_rows} rows of {padded}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_greatest_entries_do_not_overflow() {
        // Every number of query and rows is positive: all entries add up.
        let mut codes = Codes::new(1024);
        (0..32).for_each(|row| codes.set(row, &[1.0; 1024]));
        let tables = Tables::new(&[1.0; 1024]);
        for level in Level::available() {
            let live = Bits::all(32);
            let visible = Visible { live: &live, allowed: None };
            let found = scan(level, &codes, &tables, visible, 0..1, 32, 1);
            assert!(found.iter().all(|(estimate, _)| (estimate - 1024.0).abs() < 0.5), "{found:?}");
        }
    }

    #[test]
    fn several_threads_find_what_one_finds() {
        let num_rows = 3 * BLOCKS_PER_THREAD * BLOCK + 5;
        let mut codes = Codes::new(64);
        let (pattern, tables) = random(997, 64, 5);
        for row in 0..num_rows {
            // Only codes matter: rows are made from a short cycle, and differ by their sign.
            let sign = if row % 2 == 0 { 1.0 } else { -1.0 };
            let value = pattern.factors()[row % 997] * sign;
            codes.set(
                row,
                &std::array::from_fn::<f32, 64, _>(|at| {
                    value * ((row >> (at % 16)) as f32 % 3.0 - 1.0)
                }),
            );
        }
        let live = Bits::all(num_rows);
        let visible = Visible { live: &live, allowed: None };
        let run = |threads| {
            let found =
                scan(Level::best(), &codes, &tables, visible, 0..codes.num_blocks(), 50, threads);
            found.into_iter().map(|(estimate, _)| estimate).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(3));
        assert_eq!(run(1), run(64));
    }
}
