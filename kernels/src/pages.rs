//! The paged layout of keys and values that every attention op reads: one pool per layer.
//! Knows no session and no eviction: which slot holds which page is its caller's table.

use candle_core::{DType, Device, Result, Tensor};

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

    /// The first `len` tokens of `slot`: (raw keys, values), each (num_kv_heads, len, head_dim), copied.
    pub fn read(&self, slot: usize, len: usize) -> Result<(Tensor, Tensor)> {
        let copy = |pool: &Tensor| pool.get(slot)?.narrow(1, 0, len)?.force_contiguous();
        Ok((copy(&self.raw_keys)?, copy(&self.values)?))
    }
}
