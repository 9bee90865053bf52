//! The way of every stored page to the model's device at once, when a session is opened or forked.
//! Knows no choice and no budget of host memory: pages that it does not hold are read for the device alone.

use super::PagePrecision;
use super::codec;
use super::device::Mirror;
use super::index::{HeadIndex, MARKS};
use super::store::PageStore;
use crate::error::Result;
use candle_core::{DType, Device};
use half::bf16;
use mka_kernels::{PAGE_TOKENS, Staged, Staging};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Pages that go together at most, 42 MB of the default model's: while some are uploaded the next are read, on as many
/// threads as there are, and each has as much memory again.
pub(super) const FILL_PAGES: usize = 32;
/// Fewer go together where they are larger: as many as take no more than this, or one.
const FILL_BYTES: usize = 48 << 20;

/// Numbers as the mirror holds them.
trait Filled: Staged {
    /// Writes the rows of `d` numbers that lie in `bytes` in `precision`.
    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [Self]);
}

impl Filled for f32 {
    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [f32]) {
        precision.decode_rows(bytes, d, out);
    }
}

impl Filled for bf16 {
    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [bf16]) {
        if precision == PagePrecision::Bf16 {
            return copy_bf16(bytes, out);
        }
        let mut row = vec![0f32; d];
        for (bytes, out) in bytes.chunks_exact(precision.row_bytes(d)).zip(out.chunks_exact_mut(d))
        {
            precision.decode(bytes, &mut row);
            let rounded = row.iter().map(|x| bf16::from_bits(codec::to_bf16(*x)));
            out.iter_mut().zip(rounded).for_each(|(out, x)| *out = x);
        }
    }
}

fn copy_bf16(bytes: &[u8], out: &mut [bf16]) {
    let (numbers, _) = bytes.as_chunks::<2>();
    out.iter_mut().zip(numbers).for_each(|(out, x)| *out = bf16::from_le_bytes(*x));
}

/// Pages on their way, of the layers that choose.
struct Batch<T: Staged> {
    pages: usize,
    /// (layers, 2, pages, num_kv_heads, PAGE_TOKENS, head_dim): keys, then values; room for more behind them.
    numbers: Staging<T>,
    /// (layers, pages, MARKS, num_kv_heads, head_dim), and room.
    landmarks: Staging<bf16>,
}

/// Where one page of a batch goes: its numbers by layer and kind, its landmarks by layer.
struct Part<'a, T> {
    numbers: Vec<&'a mut [T]>,
    landmarks: Vec<&'a mut [bf16]>,
}

impl<T> Default for Part<'_, T> {
    fn default() -> Self {
        Self { numbers: Vec::new(), landmarks: Vec::new() }
    }
}

/// The shape of a batch's pages.
#[derive(Clone, Copy)]
struct BatchShape {
    layers: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl BatchShape {
    /// Numbers of one page's keys or values in one layer.
    fn page_len(&self) -> usize {
        self.num_kv_heads * PAGE_TOKENS * self.head_dim
    }

    /// Numbers of one page's landmarks in one layer.
    fn marks_len(&self) -> usize {
        MARKS * self.num_kv_heads * self.head_dim
    }

    /// Pages that go together in numbers of `size` bytes.
    fn fill_pages(&self, size: usize) -> usize {
        let page_bytes = self.layers * (2 * self.page_len() * size + self.marks_len() * 2);
        (FILL_BYTES / page_bytes.max(1)).clamp(1, FILL_PAGES)
    }

    /// No page yet, with room for `pages`.
    fn batch<T: Staged>(&self, pages: usize, device: &Device) -> Batch<T> {
        let numbers = Staging::new(self.layers * 2 * pages * self.page_len(), device);
        let landmarks = Staging::new(self.layers * pages * self.marks_len(), device);
        Batch { pages: 0, numbers, landmarks }
    }
}

impl PageStore {
    /// Uploads every page, those that memory does not hold from the disk; the mirror goes for good where there is no room
    /// for all of them or one cannot be read.
    pub(super) fn fill_mirror(&mut self) {
        let Some(mut mirror) = self.mirror.take() else { return };
        mirror.truncate(0, 0, self.config.rule);
        let mut lost = Vec::new();
        let filled = match mirror.dtype() {
            DType::F32 => self.fill::<f32>(&mut mirror, &mut lost),
            _ => self.fill::<bf16>(&mut mirror, &mut lost),
        };
        if lost.is_empty() {
            return self.keep_mirror(mirror, filled);
        }
        tracing::warn!(
            pages = lost.len(),
            "stored pages that cannot be read are on no device either: all are chosen from in host memory"
        );
        for page in lost {
            if let Some(stored) = self.pages.get_mut(&page) {
                stored.durable = false;
            }
        }
    }

    /// Whether all pages are on the device now; adds those that cannot be read to `lost`.
    fn fill<T: Filled>(&self, mirror: &mut Mirror, lost: &mut Vec<u64>) -> Result<bool> {
        let rows = self.order.len();
        if rows == 0 {
            return Ok(true);
        }
        if !mirror.reserve(rows)? {
            return Ok(false);
        }
        let (shape, device) = (self.batch_shape(), mirror.device().clone());
        let step = shape.fill_pages(size_of::<T>());
        let batches = (0..rows).step_by(step);
        let mut batches = batches.map(|first| first..rows.min(first + step));
        let batch = || shape.batch::<T>(rows.min(step), &device);
        let (mut ready, mut next) = (batch(), batch());
        let buffers = Mutex::new(Vec::new());
        loop {
            let coming = batches.next();
            let is_last = coming.is_none();
            let (uploaded, read) = rayon::join(
                || upload(mirror, &mut ready, shape),
                || self.read_batch(coming.unwrap_or_default(), &mut next, &buffers),
            );
            uploaded?;
            lost.extend(read?);
            if !lost.is_empty() {
                return Ok(false);
            }
            if is_last {
                break;
            }
            std::mem::swap(&mut ready, &mut next);
        }
        self.upload_outliers(mirror)?;
        Ok(true)
    }

    /// Reads the pages of `rows` and their landmarks, page by page side by side; those that cannot be read.
    fn read_batch<T: Filled>(
        &self,
        rows: Range<usize>,
        batch: &mut Batch<T>,
        buffers: &Mutex<Vec<Vec<u8>>>,
    ) -> Result<Vec<u64>> {
        let (shape, count) = (self.batch_shape(), rows.len());
        batch.pages = count;
        let mut parts: Vec<Part<'_, T>> = (0..count).map(|_| Part::default()).collect();
        let numbers = batch.numbers.numbers()?.chunks_exact_mut(shape.page_len());
        let numbers = numbers.take(shape.layers * 2 * count).enumerate();
        numbers.for_each(|(at, out)| parts[at % count].numbers.push(out));
        let landmarks = batch.landmarks.numbers()?.chunks_exact_mut(shape.marks_len());
        let landmarks = landmarks.take(shape.layers * count).enumerate();
        landmarks.for_each(|(at, out)| parts[at % count].landmarks.push(out));
        let pages = rows.into_par_iter().zip(parts);
        let lost = pages.filter_map(|(row, Part { numbers, landmarks })| {
            for (layer, out) in self.choosing().zip(landmarks) {
                fill_landmarks(self.heads(layer), row, shape.head_dim, out);
            }
            let page = self.order[row];
            let held = self.pages.get(&page).and_then(|stored| stored.bytes.as_deref());
            let is_filled = match held {
                Some(bytes) => {
                    self.fill_numbers(bytes, numbers);
                    true
                }
                None => self.with_page(page, buffers, |bytes| self.fill_numbers(bytes, numbers)),
            };
            (!is_filled).then_some(page)
        });
        Ok(lost.collect())
    }

    /// Writes keys and values of each layer that chooses, out of a page's `bytes`, into `out`.
    fn fill_numbers<T: Filled>(&self, bytes: &[u8], out: Vec<&mut [T]>) {
        let kinds = self.choosing().flat_map(|layer| [(layer, 0), (layer, 1)]);
        for ((layer, kind), out) in kinds.zip(out) {
            let rows = self.rows_in(bytes, layer, kind);
            T::fill(self.config.precision, rows, self.shape.head_dim, out);
        }
    }

    /// Calls `with` with a page from the disk in this store's precision, in memory of `buffers`; false, with a warning,
    /// where it cannot be read.
    fn with_page(
        &self,
        page: u64,
        buffers: &Mutex<Vec<Vec<u8>>>,
        with: impl FnOnce(&[u8]),
    ) -> bool {
        let own = || buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = own().pop().unwrap_or_default();
        let is_read = self.read_page_into(page, &mut buffer);
        if is_read {
            with(&buffer);
        }
        own().push(buffer);
        is_read
    }

    /// Reads every page as [`PageStore::fill_mirror`] does, for no device.
    #[cfg(test)]
    pub(super) fn read_all(&self) {
        let mut batch = self.batch_shape().batch::<bf16>(FILL_PAGES, &Device::Cpu);
        let (rows, buffers) = (self.order.len(), Mutex::new(Vec::new()));
        for first in (0..rows).step_by(FILL_PAGES) {
            let rows = first..rows.min(first + FILL_PAGES);
            assert!(self.read_batch(rows, &mut batch, &buffers).unwrap().is_empty());
        }
    }

    fn batch_shape(&self) -> BatchShape {
        let (num_kv_heads, head_dim) = (self.shape.num_kv_heads, self.shape.head_dim);
        BatchShape { layers: self.choosing().len(), num_kv_heads, head_dim }
    }

    /// Layers that choose.
    fn choosing(&self) -> Range<usize> {
        self.config.first_layer.min(self.shape.num_layers)..self.shape.num_layers
    }
}

/// The landmarks of a page of one layer, (MARKS, heads, d).
fn fill_landmarks(heads: &[HeadIndex], row: usize, d: usize, out: &mut [bf16]) {
    for (at, out) in out.chunks_exact_mut(d).enumerate() {
        let (mark, head) = (at / heads.len(), at % heads.len());
        copy_bf16(heads[head].landmarks_bytes(row * MARKS + mark, 1, d), out);
    }
}

/// Appends a batch to the pages of each layer: one copy to the device for all of them, and copies there.
fn upload<T: Filled>(mirror: &mut Mirror, batch: &mut Batch<T>, shape: BatchShape) -> Result<()> {
    let BatchShape { num_kv_heads: g, head_dim: d, layers } = shape;
    let count = batch.pages;
    if count == 0 {
        return Ok(());
    }
    let numbers = batch.numbers.upload()?.narrow(0, 0, layers * 2 * count * shape.page_len())?;
    let numbers = numbers.reshape((layers * 2 * count, g, PAGE_TOKENS, d))?;
    let landmarks = batch.landmarks.upload()?.narrow(0, 0, layers * count * shape.marks_len())?;
    let landmarks = landmarks.reshape((layers * count * MARKS, g, d))?;
    mirror.append(|layer, pages, limit| {
        let keys = numbers.narrow(0, 2 * layer * count, count)?;
        let values = numbers.narrow(0, (2 * layer + 1) * count, count)?;
        let landmarks = landmarks.narrow(0, layer * count * MARKS, count * MARKS)?;
        pages.append(&keys, &values, &landmarks, limit)
    })
}
