//! The way of every stored page to the model's device at once, when a session is opened or forked.
//! Knows no choice and no budget of host memory: pages that it does not hold are read for the device alone.

use super::PagePrecision;
use super::codec;
use super::device::Mirror;
use super::index::{HeadIndex, MARKS};
use super::reading::IDS_BYTES;
use super::store::PageStore;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use half::bf16;
use mka_kernels::{PAGE_TOKENS, Staged, Staging};
use std::collections::VecDeque;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Pages on their way at once for each thread that reads them: one is read while the other goes to the device.
const SLOTS_A_THREAD: usize = 2;
/// Bytes on their way at once at most, or one page: the system takes 0.6 ms to lock a megabyte.
const FILL_BYTES: usize = 52 << 20;

/// Numbers as the mirror holds them.
trait Filled: Staged {
    /// The slots for such numbers.
    fn slots(slots: Slots) -> Option<Vec<Slot<Self>>>;

    /// Slots for such numbers.
    fn any(slots: Vec<Slot<Self>>) -> Slots;

    /// What pages are held in that are these numbers, byte by byte.
    const AS_IT_IS: PagePrecision;

    /// Writes the rows of `d` numbers that lie in `bytes` in `precision`.
    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [Self]);
}

impl Filled for f32 {
    fn slots(slots: Slots) -> Option<Vec<Slot<f32>>> {
        if let Slots::F32(slots) = slots { Some(slots) } else { None }
    }

    fn any(slots: Vec<Slot<f32>>) -> Slots {
        Slots::F32(slots)
    }

    const AS_IT_IS: PagePrecision = PagePrecision::F32;

    fn fill(precision: PagePrecision, bytes: &[u8], d: usize, out: &mut [f32]) {
        precision.decode_rows(bytes, d, out);
    }
}

impl Filled for bf16 {
    fn slots(slots: Slots) -> Option<Vec<Slot<bf16>>> {
        if let Slots::Bf16(slots) = slots { Some(slots) } else { None }
    }

    fn any(slots: Vec<Slot<bf16>>) -> Slots {
        Slots::Bf16(slots)
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

/// The shape of a page on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SlotShape {
    layers: usize,
    /// Of them, those that choose: the last ones.
    choosing: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl SlotShape {
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

    /// How many `pages` pages of numbers of `size` bytes are on their way at once.
    fn num_slots(&self, pages: usize, size: usize) -> usize {
        let page_bytes = self.page_len() * size + self.choosing * self.marks_len() * 2;
        let most = SLOTS_A_THREAD * rayon::current_num_threads().max(1);
        (FILL_BYTES / page_bytes.max(1)).clamp(1, most).min(pages)
    }

    fn slot<T: Staged>(self, device: &Device) -> Slot<T> {
        let numbers = Staging::new(self.page_len(), device);
        let landmarks = Staging::new(self.choosing * self.marks_len(), device);
        Slot { shape: self, numbers, landmarks }
    }
}

/// Memory for one page on its way.
pub(super) struct Slot<T: Staged> {
    shape: SlotShape,
    /// (2 · layers + 1, num_kv_heads, PAGE_TOKENS, head_dim), as the disk has a page: of each layer keys, then values, and
    /// behind them its token ids.
    numbers: Staging<T>,
    /// (layers that choose, MARKS, num_kv_heads, head_dim).
    landmarks: Staging<bf16>,
}

impl<T: Staged> Slot<T> {
    /// What the layers that choose get, on the device; the copies may be under way when this returns.
    fn upload(&mut self) -> Result<(Tensor, Tensor)> {
        let SlotShape { layers, choosing, num_kv_heads: g, head_dim: d } = self.shape;
        let half = self.shape.half_len();
        let numbers = self.numbers.upload()?;
        let numbers = numbers.narrow(0, 2 * (layers - choosing) * half, 2 * choosing * half)?;
        let numbers = numbers.reshape((2 * choosing, g, PAGE_TOKENS, d))?;
        let landmarks = self.landmarks.upload()?.reshape((choosing, MARKS, g, d))?;
        Ok((numbers, landmarks))
    }
}

/// Slots for numbers of one type.
pub(super) enum Slots {
    F32(Vec<Slot<f32>>),
    Bf16(Vec<Slot<bf16>>),
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
    Making(JoinHandle<Slots>),
    There(Slots),
}

impl FillMemory {
    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a thread make it as `make` says, where there is none.
    fn prepare(&self, make: impl FnOnce() -> Slots + Send + 'static) {
        let mut kept = self.kept();
        if matches!(*kept, Kept::Nothing)
            && let Ok(making) = thread::Builder::new().name("mka-fill".into()).spawn(make)
        {
            *kept = Kept::Making(making);
        }
    }

    /// What there is of `shape`, for the caller alone.
    fn take<T: Filled>(&self, shape: SlotShape) -> Vec<Slot<T>> {
        let kept = std::mem::take(&mut *self.kept());
        let slots = match kept {
            Kept::Nothing => None,
            Kept::Making(making) => making.join().ok(),
            Kept::There(slots) => Some(slots),
        };
        let mut slots = slots.and_then(T::slots).unwrap_or_default();
        slots.retain(|slot| slot.shape == shape);
        slots
    }

    /// Keeps `slots` for the next, where there are no others.
    fn keep<T: Filled>(&self, slots: Vec<Slot<T>>) {
        let mut kept = self.kept();
        if matches!(*kept, Kept::Nothing) {
            *kept = Kept::There(T::any(slots));
            return;
        }
        drop(kept);
        // Unlocking takes as long as reading a tenth of the pages.
        rayon::spawn(move || drop(slots));
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
        let (shape, device, dtype) = (self.slot_shape(), mirror.device().clone(), mirror.dtype());
        self.fill_memory.prepare(move || match dtype {
            DType::F32 => f32::any(made(shape, &device)),
            _ => bf16::any(made(shape, &device)),
        });
    }

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
        let device = mirror.device().clone();
        let Some(places) = mirror.places(rows)? else { return Ok(false) };
        let shape = self.slot_shape();
        let mut slots = self.fill_memory.take::<T>(shape);
        let wanted = shape.num_slots(rows, size_of::<T>());
        slots.resize_with(wanted.max(slots.len()), || shape.slot(&device));
        let put = |row: usize, slot: &mut Slot<T>| -> Result<()> {
            let (numbers, landmarks) = slot.upload()?;
            Ok(places.put(row, &numbers, &landmarks)?)
        };
        let filled = self.each_row(&mut slots, lost, &put);
        self.fill_memory.keep(slots);
        filled?;
        if !lost.is_empty() {
            return Ok(false);
        }
        places.finish();
        self.upload_outliers(mirror)?;
        Ok(true)
    }

    /// Reads every page into one of `slots` and has `put` take it from there, on as many threads as there are slots for;
    /// adds those that cannot be read to `lost`, and ends at the first.
    ///
    /// Threads of its own: the pool's may be the ones that wait for this.
    fn each_row<T: Filled>(
        &self,
        slots: &mut Vec<Slot<T>>,
        lost: &mut Vec<u64>,
        put: &(impl Fn(usize, &mut Slot<T>) -> Result<()> + Sync),
    ) -> Result<()> {
        let (next, rows) = (AtomicUsize::new(0), self.order.len());
        let threads = slots.len().min(rayon::current_num_threads()).max(1);
        // The one that went to the device first is taken first: its copy is done, or nearly.
        let free = Mutex::new(VecDeque::from(std::mem::take(slots)));
        let missing = Mutex::new(Vec::new());
        let free_slots = || free.lock().unwrap_or_else(PoisonError::into_inner);
        let work = || -> Result<()> {
            loop {
                let row = next.fetch_add(1, Ordering::Relaxed);
                if row >= rows {
                    return Ok(());
                }
                let Some(mut slot) = free_slots().pop_front() else { return Ok(()) };
                let done = match self.read_row(row, &mut slot) {
                    Ok(true) => put(row, &mut slot),
                    Ok(false) => {
                        let mut missing = missing.lock().unwrap_or_else(PoisonError::into_inner);
                        missing.push(self.order[row]);
                        next.store(rows, Ordering::Relaxed);
                        Ok(())
                    }
                    Err(error) => Err(error),
                };
                free_slots().push_back(slot);
                if done.is_err() {
                    next.store(rows, Ordering::Relaxed);
                    return done;
                }
            }
        };
        let done = thread::scope(|scope| {
            let spawn =
                |_| thread::Builder::new().name("mka-fill".into()).spawn_scoped(scope, work);
            // Where the system gives fewer threads, fewer read.
            let others: Vec<_> = (1..threads).map_while(|i| spawn(i).ok()).collect();
            let own = work();
            let join = |done: Result<()>, other: thread::ScopedJoinHandle<'_, Result<()>>| {
                done.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)))
            };
            others.into_iter().fold(own, join)
        });
        *slots = free.into_inner().unwrap_or_else(PoisonError::into_inner).into();
        *lost = missing.into_inner().unwrap_or_else(PoisonError::into_inner);
        done
    }

    /// Reads a page and its landmarks; false where it cannot be read.
    fn read_row<T: Filled>(&self, row: usize, slot: &mut Slot<T>) -> Result<bool> {
        let marks_len = slot.shape.marks_len();
        let landmarks = slot.landmarks.numbers()?.chunks_exact_mut(marks_len);
        for (layer, out) in self.choosing().zip(landmarks) {
            fill_landmarks(self.heads(layer), row, slot.shape.head_dim, out);
        }
        Ok(self.fill_page(self.order[row], slot.numbers.numbers()?))
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
        drop(made::<bf16>(self.slot_shape(), &self.device));
    }

    /// Reads every page as [`PageStore::fill_mirror`] does, for no device.
    #[cfg(test)]
    pub(super) fn read_all(&self) {
        let (mut slots, mut lost) = (made::<bf16>(self.slot_shape(), &Device::Cpu), Vec::new());
        self.each_row(&mut slots, &mut lost, &|_, _| Ok(())).unwrap();
        assert!(lost.is_empty());
    }

    fn slot_shape(&self) -> SlotShape {
        let (num_kv_heads, head_dim) = (self.shape.num_kv_heads, self.shape.head_dim);
        let (layers, choosing) = (self.shape.num_layers, self.choosing().len());
        SlotShape { layers, choosing, num_kv_heads, head_dim }
    }

    /// Layers that choose.
    fn choosing(&self) -> Range<usize> {
        self.config.first_layer.min(self.shape.num_layers)..self.shape.num_layers
    }
}

/// Slots for as many pages as may be on their way at once.
fn made<T: Staged>(shape: SlotShape, device: &Device) -> Vec<Slot<T>> {
    (0..shape.num_slots(usize::MAX, size_of::<T>())).map(|_| shape.slot(device)).collect()
}

/// The landmarks of a page of one layer, (MARKS, heads, d).
fn fill_landmarks(heads: &[HeadIndex], row: usize, d: usize, out: &mut [bf16]) {
    for (at, out) in out.chunks_exact_mut(d).enumerate() {
        let (mark, head) = (at / heads.len(), at % heads.len());
        copy_bf16(heads[head].landmarks_bytes(row * MARKS + mark, 1, d), out);
    }
}
