//! The way of every stored page to the model's device at once, when a session is opened or forked.
//! Knows no choice and no budget of host memory: pages that it does not hold are read for the device alone.

mod memory;

pub(crate) use memory::FillMemory;

use super::device::Mirror;
use super::index::{HeadIndex, MARKS};
use super::reading::IDS_BYTES;
use super::store::PageStore;
use crate::error::Result;
use candle_core::DType;
use half::bf16;
use memory::{Batch, BatchShape, Filled, copy_bf16};
use rayon::prelude::*;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};

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
        let mut batches = self.batch_shape().batches::<bf16>(&candle_core::Device::Cpu);
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
