//! The way of every stored page to the model's device at once, when a session is opened or forked.
//! Knows no choice and no budget of host memory: pages that it does not hold are read for the device alone.

use super::PagePrecision;
use super::codec;
use super::device::Mirror;
use super::index::{HeadIndex, MARKS};
use super::reading::IDS_BYTES;
use super::store::PageStore;
use crate::error::{Error, ErrorKind, Result};
use candle_core::{DType, Device};
use half::bf16;
use mka_kernels::{PAGE_TOKENS, Staged, Staging};
use rayon::prelude::*;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

/// Pages that go together at most, 25 MB of the default model's: while some are uploaded the next are read, on as many
/// threads as there are. Twice as many would cost as much in locking as they save.
pub(super) const FILL_PAGES: usize = 16;
/// Fewer go together where they are larger: as many as take no more than this, or one.
const FILL_BYTES: usize = 26 << 20;

/// Numbers as the mirror holds them.
trait Filled: Staged {
    /// The memory that was made for such numbers.
    fn made(room: Room) -> Option<[Making<Self>; 2]>;

    /// What pages are held in that are these numbers, byte by byte.
    const AS_IT_IS: PagePrecision;

    /// Writes the rows of `d` numbers that lie in `bytes` in `precision`.
    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [Self]);
}

impl Filled for f32 {
    fn made(room: Room) -> Option<[Making<f32>; 2]> {
        if let Room::F32(made) = room { Some(made) } else { None }
    }

    const AS_IT_IS: PagePrecision = PagePrecision::F32;

    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [f32]) {
        precision.decode_rows(bytes, d, out);
    }
}

impl Filled for bf16 {
    fn made(room: Room) -> Option<[Making<bf16>; 2]> {
        if let Room::Bf16(made) = room { Some(made) } else { None }
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

/// Pages on their way.
pub(super) struct Batch<T: Staged> {
    pages: usize,
    /// Pages that there is room for.
    room: usize,
    /// (pages, 2 · layers + 1, num_kv_heads, PAGE_TOKENS, head_dim), each page as the disk has it: of each layer keys, then
    /// values, and behind them its token ids; room for more behind them.
    numbers: Staging<T>,
    /// (layers that choose, pages, MARKS, num_kv_heads, head_dim), and room.
    landmarks: Staging<bf16>,
}

/// A batch that is made on a thread of its own.
pub(super) type Making<T> = JoinHandle<Batch<T>>;

/// Two batches on their way, of the mirror's numbers: the system takes as long to lock their memory for a card as reading
/// half of a long session's pages does.
pub(super) enum Room {
    F32([Making<f32>; 2]),
    Bf16([Making<bf16>; 2]),
}

/// The shape of a batch's pages.
#[derive(Clone, Copy)]
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

    /// [`BatchShape::batch`] for as many of `pages` as go together, begun on a thread for each of two.
    fn make<T: Filled>(self, pages: usize, device: &Device) -> Option<[Making<T>; 2]> {
        let pages = pages.min(self.fill_pages(size_of::<T>()));
        let make = || {
            let (thread, device) = (thread::Builder::new().name("mka-fill".into()), device.clone());
            thread.spawn(move || self.batch::<T>(pages, &device)).ok()
        };
        Some([make()?, make()?])
    }

    /// Pages that go together in numbers of `size` bytes: as many for each thread that reads them, if there is room for one.
    fn fill_pages(&self, size: usize) -> usize {
        let page_bytes = self.page_len() * size + self.choosing * self.marks_len() * 2;
        let pages = (FILL_BYTES / page_bytes.max(1)).clamp(1, FILL_PAGES);
        let threads = rayon::current_num_threads().max(1);
        if pages > threads { pages - pages % threads } else { pages }
    }

    /// No page yet, with room for `pages`.
    fn batch<T: Staged>(&self, pages: usize, device: &Device) -> Batch<T> {
        let numbers = Staging::new(pages * self.page_len(), device);
        let landmarks = Staging::new(self.choosing * pages * self.marks_len(), device);
        Batch { pages: 0, room: pages, numbers, landmarks }
    }
}

impl PageStore {
    /// Says that about `pages` pages are to be restored soon: where a device gets them all, memory for that is made
    /// meanwhile.
    pub(crate) fn expect(&mut self, pages: usize) {
        let Some(mirror) = &self.mirror else { return };
        if pages == 0 || !mirror.has_room_for(pages) {
            return;
        }
        let (shape, device) = (self.batch_shape(), mirror.device());
        self.room = match mirror.dtype() {
            DType::F32 => shape.make(pages, device).map(Room::F32),
            _ => shape.make(pages, device).map(Room::Bf16),
        };
    }

    /// Uploads every page, those that memory does not hold from the disk; the mirror goes for good where there is no room
    /// for all of them or one cannot be read.
    pub(super) fn fill_mirror(&mut self) {
        let Some(mut mirror) = self.mirror.take() else { return };
        mirror.truncate(0, 0, self.config.rule);
        let (mut lost, room) = (Vec::new(), self.room.take());
        let filled = match mirror.dtype() {
            DType::F32 => self.fill::<f32>(&mut mirror, room, &mut lost),
            _ => self.fill::<bf16>(&mut mirror, room, &mut lost),
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
    fn fill<T: Filled>(
        &self,
        mirror: &mut Mirror,
        room: Option<Room>,
        lost: &mut Vec<u64>,
    ) -> Result<bool> {
        let rows = self.order.len();
        if rows == 0 {
            return Ok(true);
        }
        if !mirror.reserve(rows)? {
            return Ok(false);
        }
        let (shape, device) = (self.batch_shape(), mirror.device().clone());
        let step = shape.fill_pages(size_of::<T>());
        let batch = |making: Option<Making<T>>| {
            let made = making.and_then(|making| making.join().ok());
            let has_room = |batch: &Batch<T>| batch.room >= rows.min(step);
            made.filter(has_room).unwrap_or_else(|| shape.batch(rows.min(step), &device))
        };
        let made = room.and_then(T::made).map_or([None, None], |made| made.map(Some));
        // A batch is read on every thread of the pool while the one before is on its way, which a thread of its own sees to
        // that wants none of the pool's: this one waits for it.
        let (ready, to_upload) = mpsc::channel::<Batch<T>>();
        let (done, free) = mpsc::channel();
        made.into_iter().for_each(|made| {
            let _ = done.send(batch(made));
        });
        let uploaded = thread::scope(|scope| {
            let thread = thread::Builder::new().name("mka-upload".into());
            let uploads = thread.spawn_scoped(scope, || {
                let done = done;
                to_upload.into_iter().try_for_each(|mut batch| -> Result<()> {
                    upload(mirror, &mut batch, shape)?;
                    // Nobody waits for the last two.
                    let _ = done.send(batch);
                    Ok(())
                })
            });
            let uploads = uploads.map_err(|source| {
                let what = format!("open: start a thread that uploads: {source}");
                Error::new(ErrorKind::OutOfMemory, what).with_source(source)
            })?;
            for first in (0..rows).step_by(step) {
                // Nothing comes back any more where an upload failed, which its own result says.
                let Ok(mut batch) = free.recv() else { break };
                lost.extend(self.read_batch(first..rows.min(first + step), &mut batch)?);
                if !lost.is_empty() || ready.send(batch).is_err() {
                    break;
                }
            }
            drop(ready);
            uploads.join().unwrap_or_else(|panic| resume_unwind(panic))
        });
        uploaded?;
        if !lost.is_empty() {
            return Ok(false);
        }
        // Unlocking takes as long as reading a tenth of the pages.
        rayon::spawn(move || drop(free));
        self.upload_outliers(mirror)?;
        Ok(true)
    }

    /// Reads the pages of `rows` and their landmarks, page by page side by side; those that cannot be read.
    fn read_batch<T: Filled>(&self, rows: Range<usize>, batch: &mut Batch<T>) -> Result<Vec<u64>> {
        let (shape, count) = (self.batch_shape(), rows.len());
        batch.pages = count;
        let numbers = batch.numbers.numbers()?.par_chunks_exact_mut(shape.page_len());
        let mut marks: Vec<Vec<&mut [bf16]>> = (0..count).map(|_| Vec::new()).collect();
        let landmarks = batch.landmarks.numbers()?.chunks_exact_mut(shape.marks_len());
        let landmarks = landmarks.take(shape.choosing * count).enumerate();
        landmarks.for_each(|(at, out)| marks[at % count].push(out));
        let pages = rows.into_par_iter().zip(numbers).zip(marks).with_max_len(1);
        let lost = pages.filter_map(|((row, numbers), marks)| {
            for (layer, out) in self.choosing().zip(marks) {
                fill_landmarks(self.heads(layer), row, shape.head_dim, out);
            }
            let page = self.order[row];
            (!self.fill_page(page, numbers)).then_some(page)
        });
        Ok(lost.collect())
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
        let shape = self.batch_shape();
        let batch = || shape.batch::<bf16>(shape.fill_pages(2), &self.device);
        drop((batch(), batch()));
    }

    /// Reads every page as [`PageStore::fill_mirror`] does, for no device.
    #[cfg(test)]
    pub(super) fn read_all(&self) {
        let mut batch = self.batch_shape().batch::<bf16>(FILL_PAGES, &Device::Cpu);
        let rows = self.order.len();
        for first in (0..rows).step_by(FILL_PAGES) {
            let rows = first..rows.min(first + FILL_PAGES);
            assert!(self.read_batch(rows, &mut batch).unwrap().is_empty());
        }
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

/// Appends a batch to the pages of each layer: one copy to the device for all of them, laid out by layer there.
fn upload<T: Filled>(mirror: &mut Mirror, batch: &mut Batch<T>, shape: BatchShape) -> Result<()> {
    let BatchShape { num_kv_heads: g, head_dim: d, layers, choosing } = shape;
    let count = batch.pages;
    if count == 0 {
        return Ok(());
    }
    let numbers = batch.numbers.upload()?.narrow(0, 0, count * shape.page_len())?;
    let numbers = numbers.reshape((count, 2 * layers + 1, shape.half_len()))?;
    let numbers = numbers.narrow(1, 2 * (layers - choosing), 2 * choosing)?;
    let numbers = numbers.transpose(0, 1)?.contiguous()?;
    let numbers = numbers.reshape((2 * choosing * count, g, PAGE_TOKENS, d))?;
    let landmarks = batch.landmarks.upload()?.narrow(0, 0, choosing * count * shape.marks_len())?;
    let landmarks = landmarks.reshape((choosing * count * MARKS, g, d))?;
    mirror.append(|layer, pages, limit| {
        let keys = numbers.narrow(0, 2 * layer * count, count)?;
        let values = numbers.narrow(0, (2 * layer + 1) * count, count)?;
        let landmarks = landmarks.narrow(0, layer * count * MARKS, count * MARKS)?;
        pages.append(&keys, &values, &landmarks, limit)
    })
}
