//! Copies of whole pages out of a pool, and the gradient of that copy.
//! Knows no scores.

use crate::pages::PAGE_TOKENS;
use crate::storage::{contiguous_range, zeros};
#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

/// The pages of `pool` in `slots`, in that order, copied.
///
/// Shapes: `pool` (s, g, PAGE_TOKENS, d), contiguous; the result is (n, g, PAGE_TOKENS, d) for n slots.
/// Types: f32, bf16 or f16. Its gradient is [`gather_pages_backward`]: slots must then be distinct.
///
/// # Errors
/// If the pool is not one of pages, or a slot lies outside it.
pub fn gather_pages(pool: &Tensor, slots: &[u32]) -> Result<Tensor> {
    let (s, _, page_tokens, _) = pool.dims4()?;
    if page_tokens != PAGE_TOKENS {
        bail!("gather_pages: pool {:?}, expected (s, g, {PAGE_TOKENS}, d)", pool.shape());
    }
    if let Some(slot) = slots.iter().find(|slot| **slot as usize >= s) {
        bail!("gather_pages: slot {slot}, expected one below {s}");
    }
    pool.apply_op1(Gather { slots: slots.to_vec() })
}

/// The gradient of [`gather_pages`]: `dpages` (n, g, PAGE_TOKENS, d) in their slots of a pool of `num_slots`, 0 elsewhere.
///
/// # Errors
/// If there is not one page for each slot, a slot lies outside the pool, or two are the same.
pub fn gather_pages_backward(dpages: &Tensor, slots: &[u32], num_slots: usize) -> Result<Tensor> {
    let (n, g, page_tokens, d) = dpages.dims4()?;
    if page_tokens != PAGE_TOKENS || n != slots.len() {
        bail!(
            "gather_pages_backward: gradient {:?}, expected ({}, g, {PAGE_TOKENS}, d)",
            dpages.shape(),
            slots.len()
        );
    }
    let mut taken = vec![false; num_slots];
    for slot in slots {
        match taken.get_mut(*slot as usize) {
            Some(taken) if !*taken => *taken = true,
            _ => bail!(
                "gather_pages_backward: slot {slot}, expected distinct ones below {num_slots}"
            ),
        }
    }
    let dpages = dpages.contiguous()?;
    let into = zeros((num_slots, g, PAGE_TOKENS, d), dpages.dtype(), dpages.device())?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = dpages.device() {
        super::cuda::scatter_pages(device, &dpages, slots, &into)?;
        return Ok(into);
    }
    for (i, slot) in slots.iter().enumerate() {
        into.slice_set(&dpages.narrow(0, i, 1)?.contiguous()?, 0, *slot as usize)?;
    }
    Ok(into)
}

struct Gather {
    slots: Vec<u32>,
}

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        "gather_pages"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, g, p, d) = layout.shape().dims4()?;
        let range = contiguous_range("gather_pages", layout)?;
        let shape = Shape::from((self.slots.len(), g, p, d));
        fn copy<T: Copy>(pool: &[T], page: usize, slots: &[u32]) -> Vec<T> {
            let mut out = Vec::with_capacity(slots.len() * page);
            for slot in slots {
                out.extend_from_slice(&pool[*slot as usize * page..][..page]);
            }
            out
        }
        let page = g * p * d;
        let out = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(copy(&x[range], page, &self.slots)),
            CpuStorage::BF16(x) => CpuStorage::BF16(copy(&x[range], page, &self.slots)),
            CpuStorage::F16(x) => CpuStorage::F16(copy(&x[range], page, &self.slots)),
            _ => bail!("gather_pages: an element type other than f32, bf16 and f16"),
        };
        Ok((out, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (_, g, p, d) = layout.shape().dims4()?;
        let dtype = storage.dtype();
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
            bail!("gather_pages: {dtype:?}, expected f32, bf16 or f16");
        }
        let shape = Shape::from((self.slots.len(), g, p, d));
        let out = crate::cuda::output(storage.device(), dtype, shape.elem_count())?;
        let from = crate::cuda::address_of(storage, layout)?;
        let to = crate::cuda::address_of(&out, &Layout::contiguous(&shape))?;
        let page_bytes = g * p * d * dtype.size_in_bytes();
        super::cuda::copy_pages(
            storage.device(),
            "gather_pages",
            from,
            to,
            &self.slots,
            page_bytes,
        )?;
        Ok((out, shape))
    }

    fn bwd(&self, pool: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(gather_pages_backward(grad, &self.slots, pool.dim(0)?)?))
    }
}
