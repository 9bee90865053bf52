//! The paged layout of keys and values that every attention op reads: one pool per layer.
//! Knows no session and no eviction: which slot holds which page is its caller's table.

use crate::rope::{RotaryAngles, rotate};
use crate::staging::{Landing, Staged};
use candle_core::{DType, Device, Result, Tensor, bail};
use std::borrow::Cow;

/// Tokens of one page: the unit of eviction, transfer and storage.
pub const PAGE_TOKENS: usize = 64;

/// Keys and values of one layer, in slots of one page each.
///
/// `keys` are rotated to their positions and are what attention reads.
/// `raw_keys` are the same keys before RoPE (after q/k norm): what is evicted, stored and re-rotated.
#[derive(Debug, Clone)]
pub struct PagePool {
    /// (num_slots, num_kv_heads, PAGE_TOKENS, head_dim), f32, contiguous.
    pub keys: Tensor,
    /// (num_slots, num_kv_heads, PAGE_TOKENS, head_dim), f32, contiguous.
    pub raw_keys: Tensor,
    /// (num_slots, num_kv_heads, PAGE_TOKENS, head_dim), f32, contiguous.
    pub values: Tensor,
}

impl PagePool {
    /// An empty pool; its three tensors take `12 · num_slots · num_kv_heads · PAGE_TOKENS · head_dim` bytes.
    pub fn new(
        num_slots: usize,
        num_kv_heads: usize,
        head_dim: usize,
        device: &Device,
    ) -> Result<Self> {
        let shape = (num_slots, num_kv_heads, PAGE_TOKENS, head_dim);
        let zeros = || Tensor::zeros(shape, DType::F32, device);
        Ok(Self { keys: zeros()?, raw_keys: zeros()?, values: zeros()? })
    }

    /// A pool of its own with the same pages: what is written into one of the two is not in the other.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn fork(&self) -> Result<Self> {
        let copy = |pool: &Tensor| pool.copy();
        Ok(Self {
            keys: copy(&self.keys)?,
            raw_keys: copy(&self.raw_keys)?,
            values: copy(&self.values)?,
        })
    }

    /// Writes `n` tokens into `slot` from token `offset` on, in place.
    ///
    /// Shapes: `keys`, `raw_keys`, `values`: (num_kv_heads, n, head_dim).
    pub fn write(
        &self,
        slot: usize,
        offset: usize,
        keys: &Tensor,
        raw_keys: &Tensor,
        values: &Tensor,
    ) -> Result<()> {
        for (pool, new) in [(&self.keys, keys), (&self.raw_keys, raw_keys), (&self.values, values)]
        {
            pool.get(slot)?.slice_set(&new.contiguous()?, 1, offset)?;
        }
        Ok(())
    }

    /// Appends tokens to the pages `slots`, from token `offset` of the first on: rotates the keys to `angles` and writes
    /// them, themselves and the values, in place; on CUDA in one launch for each 256 pages.
    ///
    /// Shapes: `keys` (after the norm, before RoPE), `values`: (t, num_kv_heads, head_dim).
    ///
    /// # Errors
    /// If the shapes are not those of the pool and the angles, or the slots are not as many as the tokens fill.
    pub fn append(
        &self,
        slots: &[usize],
        offset: usize,
        keys: &Tensor,
        values: &Tensor,
        angles: &RotaryAngles,
    ) -> Result<()> {
        let (t, g, d) = keys.dims3()?;
        if values.dims() != keys.dims() || angles.len() != t || 2 * angles.half() != d {
            bail!(
                "append: keys {:?}, values {:?}, expected two of ({}, g, {})",
                keys.shape(),
                values.shape(),
                angles.len(),
                2 * angles.half()
            );
        }
        self.check_room("append", slots, offset, (t, g, d))?;
        if t == 0 {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if keys.device().is_cuda() && d.is_multiple_of(8) && d <= 256 {
            return crate::route::append(self, slots, offset, keys, values, angles);
        }
        let by_head = |x: &Tensor| x.transpose(0, 1)?.contiguous();
        let rotated = rotate(keys, angles)?;
        self.write_pages(slots, offset, &by_head(&rotated)?, &by_head(keys)?, &by_head(values)?)
    }

    /// [`PagePool::write`] over several pages. Shapes: (num_kv_heads, t, head_dim).
    pub(crate) fn write_pages(
        &self,
        slots: &[usize],
        offset: usize,
        keys: &Tensor,
        raw_keys: &Tensor,
        values: &Tensor,
    ) -> Result<()> {
        let t = keys.dim(1)?;
        let mut done = 0;
        while done < t {
            let at = offset + done;
            let count = (PAGE_TOKENS - at % PAGE_TOKENS).min(t - done);
            let part = |x: &Tensor| x.narrow(1, done, count);
            let (slot, first) = (slots[at / PAGE_TOKENS], at % PAGE_TOKENS);
            self.write(slot, first, &part(keys)?, &part(raw_keys)?, &part(values)?)?;
            done += count;
        }
        Ok(())
    }

    /// Whether `t` tokens from `offset` on fill `slots` and are of this pool's shape.
    pub(crate) fn check_room(
        &self,
        op: &str,
        slots: &[usize],
        offset: usize,
        (t, g, d): (usize, usize, usize),
    ) -> Result<()> {
        let (num_slots, heads, _, head_dim) = self.keys.dims4()?;
        if (g, d) != (heads, head_dim) {
            bail!("{op}: {g} heads of {d}, expected the pool's {heads} of {head_dim}");
        }
        let pages = if t == 0 { slots.len() } else { (offset + t).div_ceil(PAGE_TOKENS) };
        if offset >= PAGE_TOKENS || slots.len() != pages {
            bail!(
                "{op}: {t} tokens from token {offset} of {} pages, expected {pages}",
                slots.len()
            );
        }
        match slots.iter().find(|slot| **slot >= num_slots) {
            Some(slot) => bail!("{op}: slot {slot}, expected one below {num_slots}"),
            None => Ok(()),
        }
    }

    /// Whole pages in host memory, `landing`'s or some of their own, in one copy from the device: for each of `pools` the raw
    /// keys, then the values, (slots, num_kv_heads, PAGE_TOKENS, head_dim) each; rounded on the device, ties to even, where
    /// `T` is bf16.
    ///
    /// # Errors
    /// If a slot is not there, or the device fails.
    pub fn download<'a, T: Staged>(
        pools: &[Self],
        slots: &[usize],
        landing: &'a mut Landing,
    ) -> Result<Cow<'a, [T]>> {
        if slots.is_empty() || pools.is_empty() {
            return Ok(Cow::Borrowed(&[]));
        }
        // Slots that lie side by side are copied as one.
        let runs: Vec<&[usize]> = slots.chunk_by(|a, b| a + 1 == *b).collect();
        let tensors = pools.iter().flat_map(|pool| [&pool.raw_keys, &pool.values]);
        let parts =
            tensors.flat_map(|pool| runs.iter().map(|run| pool.narrow(0, run[0], run.len())));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        landing.fetch(&Tensor::cat(&parts, 0)?.to_dtype(T::DTYPE)?)
    }

    /// The first `len` tokens of `slot`: (raw keys, values), each (num_kv_heads, len, head_dim), copied.
    pub fn read(&self, slot: usize, len: usize) -> Result<(Tensor, Tensor)> {
        let copy = |pool: &Tensor| pool.get(slot)?.narrow(1, 0, len)?.force_contiguous();
        Ok((copy(&self.raw_keys)?, copy(&self.values)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_into_a_pool_is_not_in_its_fork() -> Result<()> {
        let device = Device::Cpu;
        let page = |x: f32| Tensor::full(x, (2, PAGE_TOKENS, 4), &device);
        let pool = PagePool::new(3, 2, 4, &device)?;
        pool.write(1, 0, &page(1.0)?, &page(2.0)?, &page(3.0)?)?;
        let fork = pool.fork()?;
        let read = |pool: &PagePool| -> Result<Vec<f32>> {
            let (raw_keys, values) = pool.read(1, 1)?;
            let parts = [pool.keys.get(1)?.narrow(1, 0, 1)?, raw_keys, values];
            parts.iter().map(|part| part.flatten_all()?.max(0)?.to_scalar()).collect()
        };
        assert_eq!(read(&fork)?, [1.0, 2.0, 3.0]);
        pool.write(1, 0, &page(4.0)?, &page(5.0)?, &page(6.0)?)?;
        fork.write(1, 0, &page(7.0)?, &page(8.0)?, &page(9.0)?)?;
        assert_eq!((read(&pool)?, read(&fork)?), (vec![4.0, 5.0, 6.0], vec![7.0, 8.0, 9.0]));
        Ok(())
    }
}
