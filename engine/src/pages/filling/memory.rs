//! The memory that pages go to a device through, and the numbers that they become in it.
//! Knows no store of pages and no disk: who fills it reads them.

use crate::error::Result;
use crate::pages::index::MARKS;
use crate::pages::{PagePrecision, codec};
use candle_core::Device;
use half::bf16;
use mka_kernels::recall::Places;
use mka_kernels::{PAGE_TOKENS, Staged, Staging};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Batches on their way at once: while one goes to the device, pages of the others are read.
const LANES: usize = 4;
/// Pages of a batch at most, and their bytes, or one page: eight of the default model's. The system takes 0.6 ms to lock a
/// megabyte.
const BATCH_PAGES: usize = 8;
const BATCH_BYTES: usize = 12 << 20;

/// Numbers as the mirror holds them.
pub(super) trait Filled: Staged {
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

/// Copies numbers that lie in `bytes` as little-endian bf16.
pub(super) fn copy_bf16(bytes: &[u8], out: &mut [bf16]) {
    let (numbers, _) = bytes.as_chunks::<2>();
    out.iter_mut().zip(numbers).for_each(|(out, x)| *out = bf16::from_le_bytes(*x));
}

/// The shape of pages on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatchShape {
    pub(super) layers: usize,
    /// Of them, those that choose: the last ones.
    pub(super) choosing: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
}

impl BatchShape {
    /// Numbers of one page's keys or values in one layer: at least as many bytes as its token ids.
    fn half_len(&self) -> usize {
        self.num_kv_heads * PAGE_TOKENS * self.head_dim
    }

    /// Numbers that one page takes.
    pub(super) fn page_len(&self) -> usize {
        (2 * self.layers + 1) * self.half_len()
    }

    /// Numbers of one page's landmarks in one layer.
    pub(super) fn marks_len(&self) -> usize {
        MARKS * self.num_kv_heads * self.head_dim
    }

    /// Pages of a batch of numbers of `size` bytes.
    pub(super) fn pages(&self, size: usize) -> usize {
        let page_bytes = self.page_len() * size + self.choosing * self.marks_len() * 2;
        (BATCH_BYTES / page_bytes.max(1)).clamp(1, BATCH_PAGES)
    }

    /// Batches for all lanes.
    pub(super) fn batches<T: Staged>(self, device: &Device) -> Vec<Batch<T>> {
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
    pub(super) shape: BatchShape,
    /// (pages, 2 · layers + 1, num_kv_heads, PAGE_TOKENS, head_dim), each page as the disk has it: of each layer keys, then
    /// values, and behind them its token ids.
    pub(super) numbers: Staging<T>,
    /// (pages, layers that choose, MARKS, num_kv_heads, head_dim).
    pub(super) landmarks: Staging<bf16>,
}

impl<T: Staged> Batch<T> {
    /// The first `count` pages to `places` from page `at` on; the copy may be under way when this returns.
    pub(super) fn put(&mut self, count: usize, places: &Places<'_>, at: usize) -> Result<()> {
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
    pub(super) fn prepare(&self, make: impl FnOnce() -> Batches + Send + 'static) {
        let mut kept = self.kept();
        if matches!(*kept, Kept::Nothing)
            && let Ok(making) = thread::Builder::new().name("mka-fill".into()).spawn(make)
        {
            *kept = Kept::Making(making);
        }
    }

    /// Batches of `shape` for the caller alone, those that are kept or new ones.
    pub(super) fn take<T: Filled>(&self, shape: BatchShape, device: &Device) -> Vec<Batch<T>> {
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
    pub(super) fn keep<T: Filled>(&self, batches: Vec<Batch<T>>) {
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
