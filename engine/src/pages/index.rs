//! The landmarks of stored pages: what a query is compared with before any key is read.
//! Knows rows of one layer and head; which page a row stands for is the store's matter.

use super::LandmarkScan;
use super::codec::to_bf16;
use super::signs::{CENTRE_PAGES, CODE_BYTES, Code, Codes, Planes};
use mka_kernels::key_codes::{CENTRE_KEYS, Rotation, coded_bytes};
use mka_kernels::{PAGE_TOKENS, rows};

/// Keys that share a landmark: accuracy falls above 8 (ShadowKV, arXiv 2410.21465, section 4).
pub(super) const SPAN: usize = 8;
/// Landmarks of one page.
pub(super) const MARKS: usize = PAGE_TOKENS / SPAN;
/// Share of the landmarks whose keys agree least with their mean: each of these keys is a landmark of its own
/// (ShadowKV: 0.2 to 0.3 %).
const OUTLIERS: f64 = 0.003;

const _: () = assert!(CENTRE_KEYS == PAGE_TOKENS, "the keys of a page have one centre");

/// Landmarks of one layer and key/value head, a page after the other.
#[derive(Clone, Default)]
pub(super) struct HeadIndex {
    /// (pages · MARKS, d), bf16: means of the stored keys, before RoPE.
    landmarks: Vec<u8>,
    /// (pages · MARKS): the lowest cosine of a key with its landmark.
    agreement: Vec<f32>,
    /// Landmarks that are outliers, ascending, and their keys (outliers · SPAN, d), bf16.
    outliers: Vec<u32>,
    outlier_keys: Vec<u8>,
    /// For each outlier, whether the disk was given its keys.
    saved: Vec<bool>,
    /// (pages, 2, d), bf16: the mean key and the mean value of each page, where they are asked for.
    means: Vec<u8>,
    /// Codes of every key, a page after the other, where a scan by them is asked for.
    key_codes: Vec<u8>,
    /// (pages, d), bf16: the mean of each page's landmarks, as far as a scan in two levels asked for it.
    page_means: Vec<u8>,
    /// Of the landmarks, as far as a scan by sign codes asked for them.
    codes: Codes,
    /// Pages at the front that were let go; their rows go when they are many.
    let_go: usize,
    /// Counts the times that the outliers changed.
    named: u64,
}

impl HeadIndex {
    /// Bytes of one page: landmarks, their agreement, its part of the outliers' keys, what `scan` looks at first and, if
    /// asked for, its means.
    pub(super) fn page_bytes(d: usize, has_means: bool, scan: LandmarkScan) -> usize {
        let has_codes = scan == LandmarkScan::KeyCodes;
        let outliers = (OUTLIERS * (MARKS * SPAN * 2 * d) as f64).ceil() as usize;
        let first_look = match scan {
            LandmarkScan::Auto | LandmarkScan::Flat | LandmarkScan::KeyCodes => 0,
            LandmarkScan::TwoLevel => 2 * d,
            LandmarkScan::SignHash => MARKS * CODE_BYTES,
        };
        Self::row_bytes(d, has_means, has_codes) + outliers + first_look
    }

    /// Makes what `scan` looks at first, for the pages that have none.
    pub(super) fn prepare(&mut self, scan: LandmarkScan, planes: &Planes, d: usize) {
        match scan {
            // A stream that was taken back may be scanned flat again: means are counted only where they are read.
            LandmarkScan::Auto | LandmarkScan::Flat | LandmarkScan::KeyCodes => {
                self.page_means = Vec::new();
            }
            LandmarkScan::TwoLevel => {
                let made = self.page_means.len() / (2 * d);
                let mut marks = vec![0f32; MARKS * d];
                for page in self.landmarks.chunks_exact(MARKS * 2 * d).skip(made) {
                    rows::widen_bf16(page, &mut marks);
                    let mean = mean_of_rows(&marks, d);
                    self.page_means.extend(mean.iter().flat_map(|x| to_bf16(*x).to_le_bytes()));
                }
            }
            LandmarkScan::SignHash => {
                let (first, count) = (self.let_go, self.len().min(CENTRE_PAGES));
                let front = first * MARKS * 2 * d..(first + count) * MARKS * 2 * d;
                self.codes.need_centre(&self.landmarks[front], d);
                self.codes.extend(&self.landmarks, planes, d);
            }
        }
    }

    /// Makes room for `pages` pages more, which [`HeadIndex::push_row`] takes in.
    pub(super) fn reserve(&mut self, pages: usize, d: usize, (has_means, has_codes): (bool, bool)) {
        self.landmarks.reserve_exact(pages * MARKS * 2 * d);
        self.agreement.reserve_exact(pages * MARKS);
        self.means.reserve_exact(if has_means { pages * 4 * d } else { 0 });
        self.key_codes.reserve_exact(if has_codes { pages * coded_bytes(d) } else { 0 });
    }

    /// Pages in it.
    pub(super) fn len(&self) -> usize {
        self.agreement.len() / MARKS - self.let_go
    }

    /// Takes in a page's keys (PAGE_TOKENS, d), as they will be read back.
    pub(super) fn push(&mut self, keys: &[f32], d: usize) {
        let (mut means, mut lowest) = (vec![0f32; MARKS * d], [0f32; MARKS]);
        rows::means_of_rows(keys, SPAN, d, &mut means, &mut lowest);
        self.landmarks.extend(means.iter().flat_map(|x| to_bf16(*x).to_le_bytes()));
        self.agreement.extend(lowest);
    }

    /// Takes in the codes of a page's keys (PAGE_TOKENS, d).
    pub(super) fn push_codes(&mut self, keys: &[f32], rotation: &Rotation) {
        rotation.code(keys, &mut self.key_codes);
    }

    /// Takes in the means of a page's keys and values (PAGE_TOKENS, d).
    pub(super) fn push_means(&mut self, keys: &[f32], values: &[f32], d: usize) {
        for rows in [keys, values] {
            let mean = mean_of_rows(rows, d);
            self.means.extend(mean.iter().flat_map(|x| to_bf16(*x).to_le_bytes()));
        }
    }

    /// Whether the outliers are named anew once page `page` of the stream is in: with every page at first, then 32 to 64
    /// times while the stream doubles, so that naming costs as much as the stream is long; by the page's place alone, so
    /// that a store that is filled again has the same.
    pub(super) fn names_at(page: u64) -> bool {
        let pages = page + 1;
        pages.is_multiple_of((pages.next_power_of_two() / 64).max(1))
    }

    /// Bytes of one page as [`HeadIndex::write_row`] gives them.
    pub(super) fn row_bytes(d: usize, has_means: bool, has_codes: bool) -> usize {
        let means = if has_means { 4 * d } else { 0 };
        MARKS * (2 * d + 4) + means + if has_codes { coded_bytes(d) } else { 0 }
    }

    /// Writes the landmarks of page `row`, their agreement and, where there are any, its means and codes behind `out`.
    pub(super) fn write_row(&self, row: usize, d: usize, out: &mut Vec<u8>) {
        let row = self.let_go + row;
        out.extend_from_slice(&self.landmarks[row * MARKS * 2 * d..(row + 1) * MARKS * 2 * d]);
        let agreement = &self.agreement[row * MARKS..(row + 1) * MARKS];
        out.extend(agreement.iter().flat_map(|x| x.to_le_bytes()));
        out.extend_from_slice(self.means.get(row * 4 * d..(row + 1) * 4 * d).unwrap_or_default());
        let codes = row * coded_bytes(d)..(row + 1) * coded_bytes(d);
        out.extend_from_slice(self.key_codes.get(codes).unwrap_or_default());
    }

    /// Takes in a page as [`HeadIndex::write_row`] wrote it, codes only where they are asked for.
    pub(super) fn push_row(
        &mut self,
        bytes: &[u8],
        d: usize,
        (has_means, has_codes): (bool, bool),
    ) {
        let (landmarks, rest) = bytes.split_at(MARKS * 2 * d);
        let (agreement, rest) = rest.split_at(MARKS * 4);
        let (means, codes) = rest.split_at(if has_means { 4 * d } else { 0 });
        self.key_codes.extend_from_slice(if has_codes { codes } else { &[] });
        self.landmarks.extend_from_slice(landmarks);
        let (agreement, _) = agreement.as_chunks::<4>();
        self.agreement.extend(agreement.iter().map(|x| f32::from_le_bytes(*x)));
        self.means.extend_from_slice(means);
    }

    /// The landmarks among the first `pages` pages whose keys agree least, as many as are outliers; ascending.
    pub(super) fn least_agreeing(&self, pages: usize) -> Vec<u32> {
        let live = &self.agreement[self.let_go * MARKS..][..pages.min(self.len()) * MARKS];
        // The largest of the negated agreement are the lowest.
        let negated: Vec<f32> = live.iter().map(|x| -x).collect();
        let count = (OUTLIERS * live.len() as f64) as usize;
        rows::largest(&negated, count)
    }

    /// Names `outliers` (ascending) in the place of those before; `keys_of` gives the keys (SPAN, d) of a landmark that was
    /// none, None where they are not at hand.
    pub(super) fn name_outliers(
        &mut self,
        outliers: &[u32],
        d: usize,
        keys_of: impl Fn(usize) -> Option<Vec<f32>>,
    ) {
        if outliers == self.outliers {
            return;
        }
        self.named += 1;
        let known = std::mem::take(&mut self.outliers);
        let known_keys = std::mem::take(&mut self.outlier_keys);
        let known_saved = std::mem::take(&mut self.saved);
        for outlier in outliers {
            if let Ok(at) = known.binary_search(outlier) {
                let bytes = at * SPAN * 2 * d..(at + 1) * SPAN * 2 * d;
                self.outlier_keys.extend_from_slice(&known_keys[bytes]);
                self.saved.push(known_saved[at]);
            } else if let Some(keys) = keys_of(*outlier as usize) {
                self.outlier_keys.extend(keys.iter().flat_map(|x| to_bf16(*x).to_le_bytes()));
                self.saved.push(false);
            } else {
                continue;
            }
            self.outliers.push(*outlier);
        }
    }

    /// Outliers whose keys the disk was not given, with their keys (SPAN, d), bf16 as little-endian bytes.
    pub(super) fn unsaved(&self, d: usize) -> impl Iterator<Item = (u32, &[u8])> {
        let keys = self.outlier_keys.chunks_exact(SPAN * 2 * d);
        let all = self.outliers.iter().zip(keys).zip(&self.saved);
        all.filter(|(_, saved)| !**saved).map(|((outlier, keys), _)| (*outlier, keys))
    }

    /// Says of which outliers the disk has the keys.
    pub(super) fn set_saved(&mut self, is_saved: impl Fn(u32) -> bool) {
        let outliers = self.outliers.iter().zip(&mut self.saved);
        outliers.for_each(|(outlier, saved)| *saved |= is_saved(*outlier));
    }

    /// Says that the disk may have no outlier's keys.
    pub(super) fn forget_saved(&mut self) {
        self.saved.fill(false);
    }

    /// Keeps the first `pages` pages.
    pub(super) fn truncate(&mut self, pages: usize, d: usize) {
        let marks = (self.let_go + pages.min(self.len())) * MARKS;
        self.agreement.truncate(marks);
        self.landmarks.truncate(marks * 2 * d);
        self.means.truncate(marks / MARKS * 4 * d);
        self.key_codes.truncate(marks / MARKS * coded_bytes(d));
        self.page_means.truncate(marks / MARKS * 2 * d);
        // What the centre is of must be there.
        self.codes.truncate(if self.len() < CENTRE_PAGES { 0 } else { marks });
        let live = (pages * MARKS) as u32;
        let before = self.outliers.len();
        self.outliers.retain(|outlier| *outlier < live);
        self.named += u64::from(self.outliers.len() != before);
        self.outlier_keys.truncate(self.outliers.len() * SPAN * 2 * d);
        self.saved.truncate(self.outliers.len());
    }

    /// Lets the first page go.
    pub(super) fn pop_front(&mut self, d: usize) {
        self.let_go += 1;
        let gone = self.outliers.iter().take_while(|outlier| **outlier < MARKS as u32).count();
        self.named += u64::from(!self.outliers.is_empty());
        self.outliers.drain(..gone);
        self.saved.drain(..gone);
        self.outlier_keys.drain(..gone * SPAN * 2 * d);
        self.outliers.iter_mut().for_each(|outlier| *outlier -= MARKS as u32);
        // A sixteenth more than is counted, so that a page copies sixteen rows and not all of them.
        if self.let_go * 16 > self.len() {
            let marks = self.let_go * MARKS;
            self.agreement.drain(..marks);
            self.landmarks.drain(..marks * 2 * d);
            self.means.drain(..self.means.len().min(marks / MARKS * 4 * d));
            self.key_codes.drain(..self.key_codes.len().min(marks / MARKS * coded_bytes(d)));
            self.page_means.drain(..self.page_means.len().min(marks / MARKS * 2 * d));
            self.codes.drain(marks);
            self.let_go = 0;
        }
    }

    /// Every outlier, ascending.
    pub(super) fn all_outliers(&self) -> &[u32] {
        &self.outliers
    }

    /// A number that changes with the outliers.
    pub(super) fn named(&self) -> u64 {
        self.named
    }

    /// Outliers among the first `pages` pages.
    pub(super) fn outliers(&self, pages: usize) -> &[u32] {
        let live = (pages * MARKS) as u32;
        &self.outliers[..self.outliers.partition_point(|outlier| *outlier < live)]
    }

    /// `count` landmarks from `first` on, bf16 as little-endian bytes.
    pub(super) fn landmarks_bytes(&self, first: usize, count: usize, d: usize) -> &[u8] {
        let at = (self.let_go * MARKS + first) * 2 * d;
        &self.landmarks[at..at + count * 2 * d]
    }

    /// Means of the landmarks of `count` pages from `first` on, bf16 as little-endian bytes, where they were made.
    pub(super) fn page_means_bytes(&self, first: usize, count: usize, d: usize) -> &[u8] {
        let at = (self.let_go + first) * 2 * d;
        &self.page_means[at..at + count * 2 * d]
    }

    /// Codes of the keys of `count` pages from `first` on, where they were made.
    pub(super) fn key_codes(&self, first: usize, count: usize, d: usize) -> &[u8] {
        let at = (self.let_go + first) * coded_bytes(d);
        &self.key_codes[at..at + count * coded_bytes(d)]
    }

    #[cfg(test)]
    pub(super) fn key_codes_len(&self) -> usize {
        self.key_codes.len()
    }

    /// Codes and lengths of the landmarks of the first `pages` pages, where they were made.
    pub(super) fn codes(&self, pages: usize) -> (&[Code], &[f32]) {
        let (codes, lengths) = self.codes.all();
        let live = self.let_go * MARKS..(self.let_go + pages) * MARKS;
        (&codes[live.clone()], &lengths[live])
    }

    /// `count` of the outliers' keys from `first` on, bf16 as little-endian bytes.
    pub(super) fn outlier_keys_bytes(&self, first: usize, count: usize, d: usize) -> &[u8] {
        &self.outlier_keys[first * 2 * d..(first + count) * 2 * d]
    }

    /// Mean keys and mean values of the first `pages` pages as f32: (pages, d) each.
    pub(super) fn means(&self, pages: usize, d: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut keys, mut values) = (vec![0f32; pages * d], vec![0f32; pages * d]);
        let own = self.means[self.let_go * 4 * d..].chunks_exact(4 * d);
        let out = keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d));
        for (bytes, (key, value)) in own.zip(out) {
            rows::widen_bf16(&bytes[..2 * d], key);
            rows::widen_bf16(&bytes[2 * d..], value);
        }
        (keys, values)
    }
}

/// The mean of `rows` (n, d).
pub(super) fn mean_of_rows(rows: &[f32], d: usize) -> Vec<f32> {
    let count = (rows.len() / d) as f32;
    let mut mean = vec![0f32; d];
    for row in rows.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / count);
    }
    mean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_scan_looks_at_first_follows_the_pages_and_stays_within_what_is_counted() {
        let d = 8;
        let (planes, rotation) = (Planes::new(d), Rotation::new(d));
        let page = |i: usize| -> Vec<f32> {
            (0..PAGE_TOKENS * d).map(|x| ((i * 997 + x * 31) % 101) as f32 / 50.0 - 1.0).collect()
        };
        let made = |pages: std::ops::Range<usize>| {
            let mut index = HeadIndex::default();
            pages.for_each(|i| {
                index.push(&page(i), d);
                index.push_codes(&page(i), &rotation);
            });
            index
        };
        for scan in [LandmarkScan::TwoLevel, LandmarkScan::SignHash] {
            let bytes =
                |index: &HeadIndex| index.page_means.len() + index.codes.all().0.len() * CODE_BYTES;
            let counted = |scan| HeadIndex::page_bytes(d, false, scan);
            let mut index = made(0..100);
            index.prepare(scan, &planes, d);
            assert_eq!(bytes(&index), 100 * (counted(scan) - counted(LandmarkScan::Flat)));
            // Pages that go at the end and come again, and pages that go at the front.
            index.truncate(80, d);
            (80..130).for_each(|i| {
                index.push(&page(i), d);
                index.push_codes(&page(i), &rotation);
            });
            index.prepare(scan, &planes, d);
            (0..70).for_each(|_| index.pop_front(d));
            index.prepare(scan, &planes, d);
            let mut fresh = made(0..130);
            fresh.prepare(scan, &planes, d);
            assert_eq!(index.key_codes(0, 60, d), fresh.key_codes(70, 60, d));
            let codes = counted(LandmarkScan::KeyCodes) - counted(LandmarkScan::Flat);
            assert_eq!(fresh.key_codes.len(), 130 * codes);
            match scan {
                LandmarkScan::TwoLevel => {
                    assert_eq!(index.page_means_bytes(0, 60, d), fresh.page_means_bytes(70, 60, d))
                }
                _ => {
                    let (codes, lengths) = fresh.codes(130);
                    let live = 70 * MARKS..;
                    assert_eq!(index.codes(60), (&codes[live.clone()], &lengths[live]));
                }
            }
        }
    }

    #[test]
    fn a_centre_goes_with_the_pages_that_it_is_of() {
        let d = 8;
        let planes = Planes::new(d);
        let mut index = HeadIndex::default();
        let push = |index: &mut HeadIndex, by: usize| {
            let keys: Vec<f32> = (0..PAGE_TOKENS * d).map(|x| (x * by % 17) as f32).collect();
            index.push(&keys, d);
        };
        (0..70).for_each(|_| push(&mut index, 3));
        index.prepare(LandmarkScan::SignHash, &planes, d);
        index.truncate(10, d);
        let mut fresh = HeadIndex::default();
        (0..10).for_each(|_| push(&mut fresh, 3));
        for own in [&mut index, &mut fresh] {
            (0..90).for_each(|_| push(own, 5));
            own.prepare(LandmarkScan::SignHash, &planes, d);
        }
        assert_eq!(index.codes(100), fresh.codes(100));
    }
}
