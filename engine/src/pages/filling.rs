//! The way of every stored page to the model's device at once, when a session is opened or forked.
//! Knows no choice and no budget of host memory: pages that it does not hold are read for the device alone.

use super::PagePrecision;
use super::codec;
use super::device::Mirror;
use super::index::{HeadIndex, MARKS};
use super::reading::IDS_BYTES;
use super::store::PageStore;
use crate::error::Result;
use candle_core::{DType, Device};
use half::bf16;
use mka_kernels::recall::Places;
use mka_kernels::{PAGE_TOKENS, Staged, Staging};
use rayon::prelude::*;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ScopedJoinHandle};

/// Batches on their way at once: while one goes to the device, pages of the others are read.
const LANES: usize = 4;
/// Pages of a batch at most, and their bytes, or one page: eight of the default model's. The system takes 0.6 ms to lock a megabyte.
const BATCH_PAGES: usize = 8;
const BATCH_BYTES: usize = 12 << 20;

/// Numbers as the mirror holds them.
trait Filled: Staged {
    /// The batches of such numbers.
    fn batches(batches: Batches) -> Option<Vec<Batch<Self>>>;

    /// Batches of such numbers.
    fn any(batches: Vec<Batch<Self>>) -> Batches;

    /// What pages are held in that are these numbers, byte by byte.
    const AS_IT_IS: PagePrecision;

    /// Writes the rows of `d` numbers that lie in `bytes` in `precision`.
    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [Self]);
}

impl Filled for f32 {
    fn batches(batches: Batches) -> Option<Vec<Batch<f32>>> {
        if let Batches::F32(batches) = batches { Some(batches) } else { None }
    }

    fn any(batches: Vec<Batch<f32>>) -> Batches {
        Batches::F32(batches)
    }

    const AS_IT_IS: PagePrecision = PagePrecision::F32;

    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [f32]) {
        precision.decode_rows(bytes, d, out);
    }
}

impl Filled for bf16 {
    fn batches(batches: Batches) -> Option<Vec<Batch<bf16>>> {
        if let Batches::Bf16(batches) = batches { Some(batches) } else { None }
    }

    fn any(batches: Vec<Batch<bf16>>) -> Batches {
        Batches::Bf16(batches)
    }

    const AS_IT_IS: PagePrecision = PagePrecision::Bf16;

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

/// The shape of pages on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct BatchShape {
    layers: usize,
    /// Of them, those that choose: the last ones.
    choosing: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl BatchShape {
    /// Numbers of one page's keys or values in one layer: at least as many bytes as its token ids.
    fn half_len(&self) -> usize {
        self.num_kv_heads * PAGE_TOKENS * self.head_dim
    }

    /// Numbers that one page takes.
    fn page_len(&self) -> usize {
        (2 * self.layers + 1) * self.half_len()
    }

    /// Numbers of one page's landmarks in one layer.
    fn marks_len(&self) -> usize {
        MARKS * self.num_kv_heads * self.head_dim
    }

    /// Pages of a batch of numbers of `size` bytes.
    fn pages(&self, size: usize) -> usize {
        let page_bytes = self.page_len() * size + self.choosing * self.marks_len() * 2;
        (BATCH_BYTES / page_bytes.max(1)).clamp(1, BATCH_PAGES)
    }

    /// Batches for all lanes.
    fn batches<T: Staged>(self, device: &Device) -> Vec<Batch<T>> {
        let pages = self.pages(size_of::<T>());
        let batch = |_| Batch {
            shape: self,
            numbers: Staging::new(pages * self.page_len(), device),
            landmarks: Staging::new(pages * self.choosing * self.marks_len(), device),
        };
        (0..LANES).map(batch).collect()
    }
}

/// Memory for some pages on their way.
pub(super) struct Batch<T: Staged> {
    shape: BatchShape,
    /// (pages, 2 · layers + 1, num_kv_heads, PAGE_TOKENS, head_dim), each page as the disk has it: of each layer keys, then
    /// values, and behind them its token ids.
    numbers: Staging<T>,
    /// (pages, layers that choose, MARKS, num_kv_heads, head_dim).
    landmarks: Staging<bf16>,
}

impl<T: Staged> Batch<T> {
    /// The first `count` pages to `places` from page `at` on; the copy may be under way when this returns.
    fn put(&mut self, count: usize, places: &Places<'_>, at: usize) -> Result<()> {
        let BatchShape { layers, choosing, num_kv_heads: g, head_dim: d } = self.shape;
        let numbers = self.numbers.upload()?.narrow(0, 0, count * self.shape.page_len())?;
        let numbers = numbers.reshape((count, 2 * layers + 1, g, PAGE_TOKENS, d))?;
        let marks_len = choosing * self.shape.marks_len();
        let landmarks = self.landmarks.upload()?.narrow(0, 0, count * marks_len)?;
        let landmarks = landmarks.reshape((count, choosing, MARKS, g, d))?;
        Ok(places.put(at, &numbers, 2 * (layers - choosing), &landmarks)?)
    }
}

/// Batches of numbers of one type.
pub(super) enum Batches {
    F32(Vec<Batch<f32>>),
    Bf16(Vec<Batch<bf16>>),
}

/// The memory that pages go to a device through, from which the device reads. An engine makes it once, for the system takes
/// as long to lock it as reading half of a long session's pages does; sessions that are opened at one time each have their
/// own, of which one is kept.
#[derive(Default)]
pub(crate) struct FillMemory(Mutex<Kept>);

#[derive(Default)]
enum Kept {
    #[default]
    Nothing,
    Making(JoinHandle<Batches>),
    There(Batches),
}

impl FillMemory {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a thread make it as `make` says, where there is none.
    fn prepare(&self, make: impl FnOnce() -> Batches + Send + 'static) {
        let mut kept = self.kept();
        if matches!(*kept, Kept::Nothing)
            && let Ok(making) = thread::Builder::new().name("mka-fill".into()).spawn(make)
        {
            *kept = Kept::Making(making);
        }
    }

    /// Batches of `shape` for the caller alone, those that are kept or new ones.
    fn take<T: Filled>(&self, shape: BatchShape, device: &Device) -> Vec<Batch<T>> {
        let kept = std::mem::take(&mut *self.kept());
        let batches = match kept {
            Kept::Nothing => None,
            Kept::Making(making) => making.join().ok(),
            Kept::There(batches) => Some(batches),
        };
        let is_own = |batches: &Vec<Batch<T>>| batches.iter().all(|own| own.shape == shape);
        let batches = batches.and_then(T::batches).filter(is_own);
        batches.unwrap_or_else(|| shape.batches(device))
    }

    /// Keeps `batches` for the next, where there are no others.
    fn keep<T: Filled>(&self, batches: Vec<Batch<T>>) {
        let mut kept = self.kept();
        if matches!(*kept, Kept::Nothing) {
            *kept = Kept::There(T::any(batches));
            return;
        }
        drop(kept);
        // Unlocking takes as long as reading a tenth of the pages.
        rayon::spawn(move || drop(batches));
    }
}

impl PageStore {
    /// Takes the memory that pages go to the device through from `memory`, and leaves it there for others.
    pub(crate) fn set_fill_memory(&mut self, memory: Arc<FillMemory>) {
        self.fill_memory = memory;
    }

    /// Says that about `pages` pages are to be restored soon: where a device gets them all, memory for that is made
    /// meanwhile.
    pub(crate) fn expect(&self, pages: usize) {
        let Some(mirror) = &self.mirror else { return };
        if pages == 0 || !mirror.has_room_for(pages) {
            return;
        }
        let (shape, device, dtype) = (self.batch_shape(), mirror.device().clone(), mirror.dtype());
        self.fill_memory.prepare(move || match dtype {
            DType::F32 => f32::any(shape.batches(&device)),
            _ => bf16::any(shape.batches(&device)),
        });
    }

    /// Uploads every page, those that memory does not hold from the disk; the mirror goes for good where there is no room
    /// for all of them, one is missing between others, or one cannot be read.
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
        if !self.is_whole() {
            return Ok(false);
        }
        let (device, shape) = (mirror.device().clone(), self.batch_shape());
        let Some(places) = mirror.places(rows)? else { return Ok(false) };
        let mut batches = self.fill_memory.take::<T>(shape, &device);
        let filled = self.each_batch(&mut batches, lost, &|at, count, batch: &mut Batch<T>| {
            batch.put(count, &places, at)
        });
        self.fill_memory.keep(batches);
        filled?;
        if !lost.is_empty() {
            return Ok(false);
        }
        places.finish();
        self.upload_outliers(mirror)?;
        Ok(true)
    }

    /// Reads every page into one of `batches` and has `put` take them from there: the first row and how many; adds those
    /// that cannot be read to `lost`, and ends with them.
    fn each_batch<T: Filled>(
        &self,
        batches: &mut [Batch<T>],
        lost: &mut Vec<u64>,
        put: &(impl Fn(usize, usize, &mut Batch<T>) -> Result<()> + Sync),
    ) -> Result<()> {
        let rows = self.order.len();
        let (next, missing) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let step = self.batch_shape().pages(size_of::<T>());
        let work = |batch: &mut Batch<T>| -> Result<()> {
            loop {
                let first = next.fetch_add(step, Ordering::Relaxed);
                if first >= rows {
                    return Ok(());
                }
                let end = rows.min(first + step);
                let done = self.read_batch(first..end, batch).and_then(|unread| {
                    if unread.is_empty() {
                        return put(first, end - first, batch);
                    }
                    next.store(rows, Ordering::Relaxed);
                    missing.lock().unwrap_or_else(PoisonError::into_inner).extend(unread);
                    Ok(())
                });
                if done.is_err() {
                    next.store(rows, Ordering::Relaxed);
                    return done;
                }
            }
        };
        let Some((own, others)) = batches.split_first_mut() else { return Ok(()) };
        let done = thread::scope(|scope| {
            // Threads that are not the pool's, which reads: one of those reads alone, for the others would wait for it.
            let others = if rayon::current_thread_index().is_some() { &mut [] } else { others };
            let spawn = |batch| {
                let thread = thread::Builder::new().name("mka-fill".into());
                thread.spawn_scoped(scope, || work(batch))
            };
            // Where the system gives none, fewer are on their way.
            let others: Vec<_> = others.iter_mut().map_while(|batch| spawn(batch).ok()).collect();
            let own = work(own);
            let join = |done: Result<()>, other: ScopedJoinHandle<'_, Result<()>>| {
                done.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)))
            };
            others.into_iter().fold(own, join)
        });
        lost.extend(missing.into_inner().unwrap_or_else(PoisonError::into_inner));
        done
    }

    /// Reads the pages of `rows` and their landmarks, page by page side by side; those that cannot be read.
    fn read_batch<T: Filled>(&self, rows: Range<usize>, batch: &mut Batch<T>) -> Result<Vec<u64>> {
        let shape = batch.shape;
        let numbers = batch.numbers.numbers()?.par_chunks_exact_mut(shape.page_len());
        let marks_len = shape.choosing * shape.marks_len();
        let landmarks = batch.landmarks.numbers()?.par_chunks_exact_mut(marks_len);
        let pages = rows.into_par_iter().zip(numbers).zip(landmarks).with_max_len(1);
        let unread = pages.filter_map(|((row, numbers), landmarks)| {
            let layers = self.choosing().zip(landmarks.chunks_exact_mut(shape.marks_len()));
            for (layer, out) in layers {
                fill_landmarks(self.heads(layer), row, shape.head_dim, out);
            }
            let page = self.order[row];
            (!self.fill_page(page, numbers)).then_some(page)
        });
        Ok(unread.collect())
    }

    /// Writes keys and values of a page, from memory or from the disk, to the front of `out`; false, with a warning, where
    /// they cannot be read.
    fn fill_page<T: Filled>(&self, page: u64, out: &mut [T]) -> bool {
        let (precision, d) = (self.config.precision, self.shape.head_dim);
        let len = self.page_bytes() / precision.row_bytes(d) * d;
        let held = self.pages.get(&page).and_then(|stored| stored.bytes.as_deref());
        if let Some(bytes) = held {
            T::fill(precision, bytes, d, &mut out[..len]);
            return true;
        }
        if precision == T::AS_IT_IS && cfg!(target_endian = "little") {
            let out: &mut [u8] = bytemuck::cast_slice_mut(out);
            if self.read_page_into(page, &mut out[..self.page_bytes() + IDS_BYTES]) {
                return true;
            }
        }
        let read = self.read_page(page);
        read.map(|(bytes, _)| T::fill(precision, &bytes, d, &mut out[..len])).is_some()
    }

    /// Makes the memory that pages are read into for a device.
    #[cfg(test)]
    pub(super) fn stage(&self) {
        drop(self.batch_shape().batches::<bf16>(&self.device));
    }

    /// Reads every page as [`PageStore::fill_mirror`] does, for no device.
    #[cfg(test)]
    pub(super) fn read_all(&self) {
        let mut batches = self.batch_shape().batches::<bf16>(&Device::Cpu);
        let mut lost = Vec::new();
        self.each_batch(&mut batches, &mut lost, &|_, _, _: &mut Batch<bf16>| Ok(())).unwrap();
        assert!(lost.is_empty());
    }

    fn batch_shape(&self) -> BatchShape {
        let (num_kv_heads, head_dim) = (self.shape.num_kv_heads, self.shape.head_dim);
        let (layers, choosing) = (self.shape.num_layers, self.choosing().len());
        BatchShape { layers, choosing, num_kv_heads, head_dim }
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
