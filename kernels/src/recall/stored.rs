//! Keys, values and landmarks of the stored pages of one layer on one device: taken in, let go, grown.
//! Knows no query.

use super::{FIRST_PAGES, MARKS, SPAN};
use crate::pages::PAGE_TOKENS;
use candle_core::{DType, Device, Result, Tensor, bail};
use half::bf16;

/// Keys before RoPE, values and landmarks of the stored pages of one layer, in stream order.
#[derive(Debug)]
pub struct StoredPages {
    /// (capacity, g, PAGE_TOKENS, d), f32 or bf16.
    pub(super) keys: Tensor,
    /// (capacity, g, PAGE_TOKENS, d), as the keys.
    pub(super) values: Tensor,
    /// (capacity · MARKS, g, d), bf16.
    pub(super) landmarks: Tensor,
    /// Landmarks whose keys are landmarks of their own (g, m), u32, and these keys (m · SPAN, g, d), bf16.
    pub(super) outliers: Option<(Tensor, Tensor)>,
    /// Pages at the front that were let go and still take room.
    pub(super) first: usize,
    pub(super) len: usize,
    /// Pages that were let go ever.
    pub(super) gone: usize,
}

impl StoredPages {
    /// No page yet, of `num_kv_heads` heads of `head_dim`, keys and values in `dtype` (f32 or bf16).
    ///
    /// # Errors
    /// If the device has no room, or no kernel takes the shape: `head_dim` is a multiple of 8 up to 256.
    pub fn new(
        num_kv_heads: usize,
        head_dim: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::BF16)
            || !head_dim.is_multiple_of(8)
            || !(8..=256).contains(&head_dim)
            || num_kv_heads == 0
        {
            bail!(
                "stored pages: {num_kv_heads} heads of {head_dim} in {dtype:?}, expected f32 or bf16, a multiple of 8 up to 256"
            );
        }
        let (keys, values, landmarks) = room(FIRST_PAGES, num_kv_heads, head_dim, dtype, device)?;
        Ok(Self { keys, values, landmarks, outliers: None, first: 0, len: 0, gone: 0 })
    }

    /// The same pages in memory of their own.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn copied(&self) -> Result<Self> {
        let (keys, values) = (self.keys.copy()?, self.values.copy()?);
        let (landmarks, outliers) = (self.landmarks.copy()?, self.outliers.clone());
        let (first, len, gone) = (self.first, self.len, self.gone);
        Ok(Self { keys, values, landmarks, outliers, first, len, gone })
    }

    /// Bytes that `pages` pages take on the device; there is room for twice as many at most.
    pub fn bytes(pages: usize, num_kv_heads: usize, head_dim: usize, dtype: DType) -> usize {
        let rows = num_kv_heads * head_dim;
        pages * rows * (2 * PAGE_TOKENS * dtype.size_in_bytes() + MARKS * 2)
    }

    /// Pages stored.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is stored.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pages that were let go at the front.
    pub fn gone(&self) -> usize {
        self.gone
    }

    /// Keys before RoPE of the stored pages, in their order: a view (n, g, PAGE_TOKENS, d), f32 or bf16.
    ///
    /// # Errors
    /// If the device fails.
    pub fn keys(&self) -> Result<Tensor> {
        self.keys.narrow(0, self.first, self.len)
    }

    /// Pages that there is room for without growing.
    pub fn capacity(&self) -> usize {
        self.keys.dims()[0]
    }

    /// Appends pages, of which there are never more than `limit` at once.
    ///
    /// Shapes: `keys`, `values` (n, g, PAGE_TOKENS, d) in the type of the pages, `landmarks` (n · MARKS, g, d) in bf16,
    /// all as little-endian bytes.
    ///
    /// # Errors
    /// If the lengths do not fit, or the device has no room: the pages are then as they were.
    pub fn push(
        &mut self,
        keys: &[u8],
        values: &[u8],
        landmarks: &[u8],
        limit: usize,
    ) -> Result<()> {
        let (_, g, _, d) = self.keys.dims4()?;
        let page = g * PAGE_TOKENS * d * self.keys.dtype().size_in_bytes();
        let n = keys.len() / page;
        if keys.len() != n * page
            || values.len() != keys.len()
            || landmarks.len() != n * MARKS * g * d * 2
            || self.len + n > limit
        {
            bail!(
                "stored pages: {} bytes of keys, {} of values, {} of landmarks beside {} pages, expected whole pages and at most {limit}",
                keys.len(),
                values.len(),
                landmarks.len(),
                self.len
            );
        }
        if n == 0 {
            return Ok(());
        }
        let (device, dtype) = (self.keys.device(), self.keys.dtype());
        let shape = (n, g, PAGE_TOKENS, d);
        let keys = uploaded(keys, dtype, shape, device)?;
        let values = uploaded(values, dtype, shape, device)?;
        let landmarks = uploaded(landmarks, DType::BF16, (n * MARKS, g, d), device)?;
        self.append(&keys, &values, &landmarks, limit)
    }

    /// [`StoredPages::push`] of pages that are on the device, such as parts of one upload for many layers.
    ///
    /// Shapes: `keys`, `values` (n, g, PAGE_TOKENS, d) in the type of the pages, `landmarks` (n · MARKS, g, d), bf16, all
    /// contiguous.
    ///
    /// # Errors
    /// If shapes, types or devices disagree, or the device has no room: the pages are then as they were.
    pub fn append(
        &mut self,
        keys: &Tensor,
        values: &Tensor,
        landmarks: &Tensor,
        limit: usize,
    ) -> Result<()> {
        let (_, g, _, d) = self.keys.dims4()?;
        let (n, ..) = keys.dims4()?;
        if keys.dims() != [n, g, PAGE_TOKENS, d]
            || values.dims() != keys.dims()
            || landmarks.dims() != [n * MARKS, g, d]
            || self.len + n > limit
        {
            bail!(
                "stored pages: keys {:?}, values {:?}, landmarks {:?} beside {} pages, expected pages of {g} heads of {d} and at most {limit}",
                keys.shape(),
                values.shape(),
                landmarks.shape(),
                self.len
            );
        }
        self.make_room(n, limit)?;
        let at = self.first + self.len;
        self.keys.slice_set(keys, 0, at)?;
        self.values.slice_set(values, 0, at)?;
        self.landmarks.slice_set(landmarks, 0, at * MARKS)?;
        self.len += n;
        Ok(())
    }

    /// Makes room for `pages` pages in all, of which there are never more than `limit`: as much as pushing them one by one
    /// would make, without the copies.
    ///
    /// # Errors
    /// If `pages` is more than `limit`, or the device has no room: the pages are then as they were.
    pub fn reserve(&mut self, pages: usize, limit: usize) -> Result<()> {
        if pages > limit {
            bail!("stored pages: room for {pages} pages, expected at most {limit}");
        }
        self.make_room(pages.saturating_sub(self.len), limit)
    }

    /// Names the landmarks whose keys are landmarks of their own: `marks` (g, m), counted from the first page, a number
    /// beyond all for none; `keys` (m · SPAN, g, d), bf16 as little-endian bytes.
    ///
    /// # Errors
    /// If the lengths do not fit.
    pub fn set_outliers(&mut self, marks: &[u32], keys: &[u8]) -> Result<()> {
        let (_, g, _, d) = self.keys.dims4()?;
        let m = marks.len() / g;
        if marks.len() != m * g || keys.len() != m * SPAN * g * d * 2 {
            bail!(
                "stored pages: {} outliers with {} bytes of keys, expected them of {g} heads of {d}",
                marks.len(),
                keys.len()
            );
        }
        self.outliers = match m {
            0 => None,
            _ => {
                let device = self.keys.device();
                let marks = Tensor::from_slice(marks, (g, m), device)?;
                Some((marks, uploaded(keys, DType::BF16, (m * SPAN, g, d), device)?))
            }
        };
        Ok(())
    }

    /// Keeps the first `pages` pages.
    pub fn truncate(&mut self, pages: usize) {
        self.len = self.len.min(pages);
    }

    /// Lets the first page go; outliers are to be named anew.
    pub fn pop_front(&mut self) {
        let gone = self.len.min(1);
        self.first += gone;
        self.len -= gone;
        self.gone += gone;
    }

    /// Room for `n` pages more: twice as much as before, up to `limit`.
    fn make_room(&mut self, n: usize, limit: usize) -> Result<()> {
        let (capacity, g, _, d) = self.keys.dims4()?;
        if self.first + self.len + n <= capacity {
            return Ok(());
        }
        let capacity = (self.len + n).next_power_of_two().max(FIRST_PAGES).min(limit.max(1));
        let (keys, values, landmarks) =
            room(capacity, g, d, self.keys.dtype(), self.keys.device())?;
        if self.len > 0 {
            let live = |x: &Tensor, rows: usize| {
                x.narrow(0, self.first * rows, self.len * rows)?.force_contiguous()
            };
            keys.slice_set(&live(&self.keys, 1)?, 0, 0)?;
            values.slice_set(&live(&self.values, 1)?, 0, 0)?;
            landmarks.slice_set(&live(&self.landmarks, MARKS)?, 0, 0)?;
        }
        (self.keys, self.values, self.landmarks, self.first) = (keys, values, landmarks, 0);
        Ok(())
    }
}

/// Keys, values and landmarks for `pages` pages, zero.
fn room(
    pages: usize,
    g: usize,
    d: usize,
    dtype: DType,
    device: &Device,
) -> Result<(Tensor, Tensor, Tensor)> {
    let zeros = || Tensor::zeros((pages, g, PAGE_TOKENS, d), dtype, device);
    Ok((zeros()?, zeros()?, Tensor::zeros((pages * MARKS, g, d), DType::BF16, device)?))
}

/// Little-endian numbers of `dtype` as a tensor on `device`.
fn uploaded(
    bytes: &[u8],
    dtype: DType,
    shape: impl candle_core::shape::ShapeWithOneHole,
    device: &Device,
) -> Result<Tensor> {
    match dtype {
        DType::F32 => {
            let (numbers, _) = bytes.as_chunks::<4>();
            let numbers: Vec<f32> = numbers.iter().map(|x| f32::from_le_bytes(*x)).collect();
            Tensor::from_vec(numbers, shape, device)
        }
        _ => {
            let (numbers, _) = bytes.as_chunks::<2>();
            let numbers: Vec<bf16> = numbers.iter().map(|x| bf16::from_le_bytes(*x)).collect();
            Tensor::from_vec(numbers, shape, device)
        }
    }
}
