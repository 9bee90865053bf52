//! The merge of two states of attention on a CUDA device, and its backward: `cuda/merge_states.cu`.

use crate::attention::{AttentionState, MergeGradients};
use crate::cuda::{self, Launch};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, DType, Result, Tensor};

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeParams {
    a: u64,
    b: u64,
    a_lse: u64,
    b_lse: u64,
    out: u64,
    lse: u64,
    rows: u64,
    d: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for MergeParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeBackwardParams {
    a: u64,
    b: u64,
    dout: u64,
    a_lse: u64,
    b_lse: u64,
    dlse: u64,
    da: u64,
    db: u64,
    da_lse: u64,
    db_lse: u64,
    rows: u64,
    d: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for MergeBackwardParams {}

/// One warp a row, eight rows a block of 256 threads.
fn row_launch(rows: usize) -> Launch {
    Launch { grid: (rows.div_ceil(8).min(65_536) as u32, 1, 1), block: 256, shared_bytes: 0 }
}

/// [`crate::merge_states`] on `device`; shapes and types are checked.
pub(in crate::attention) fn merge_states(
    device: &CudaDevice,
    a: &AttentionState,
    b: &AttentionState,
) -> Result<AttentionState> {
    let (t, h, d) = a.out.dims3()?;
    let dtype = a.out.dtype();
    let (a_out, b_out) = (a.out.contiguous()?, b.out.contiguous()?);
    let (a_lse, b_lse) = (a.lse.contiguous()?, b.lse.contiguous()?);
    let out = cuda::output_tensor(device, dtype, (t, h, d))?;
    let lse = cuda::output_tensor(device, DType::F32, (t, h))?;
    let params = MergeParams {
        a: cuda::address(&a_out)?,
        b: cuda::address(&b_out)?,
        a_lse: cuda::address(&a_lse)?,
        b_lse: cuda::address(&b_lse)?,
        out: cuda::address(&out)?,
        lse: cuda::address(&lse)?,
        rows: (t * h) as u64,
        d: d as u32,
    };
    let kernel = format!("merge_states_{}", cuda::suffix("merge_states", dtype)?);
    cuda::launch(device, "merge_states", &kernel, row_launch(t * h), &params)?;
    Ok(AttentionState { out, lse })
}

/// [`crate::merge_states_backward`] on `device`; shapes and types are checked.
pub(in crate::attention) fn merge_states_backward(
    device: &CudaDevice,
    a: &AttentionState,
    b: &AttentionState,
    dout: &Tensor,
    dlse: Option<&Tensor>,
) -> Result<MergeGradients> {
    let (t, h, d) = a.out.dims3()?;
    let dtype = a.out.dtype();
    let (a_out, b_out, dout) = (a.out.contiguous()?, b.out.contiguous()?, dout.contiguous()?);
    let (a_lse, b_lse) = (a.lse.contiguous()?, b.lse.contiguous()?);
    let dlse = dlse.map(Tensor::contiguous).transpose()?;
    let gradients = MergeGradients {
        a_out: cuda::output_tensor(device, dtype, (t, h, d))?,
        a_lse: cuda::output_tensor(device, DType::F32, (t, h))?,
        b_out: cuda::output_tensor(device, dtype, (t, h, d))?,
        b_lse: cuda::output_tensor(device, DType::F32, (t, h))?,
    };
    let params = MergeBackwardParams {
        a: cuda::address(&a_out)?,
        b: cuda::address(&b_out)?,
        dout: cuda::address(&dout)?,
        a_lse: cuda::address(&a_lse)?,
        b_lse: cuda::address(&b_lse)?,
        dlse: dlse.as_ref().map_or(Ok(0), cuda::address)?,
        da: cuda::address(&gradients.a_out)?,
        db: cuda::address(&gradients.b_out)?,
        da_lse: cuda::address(&gradients.a_lse)?,
        db_lse: cuda::address(&gradients.b_lse)?,
        rows: (t * h) as u64,
        d: d as u32,
    };
    let kernel = format!("merge_states_backward_{}", cuda::suffix("merge_states_backward", dtype)?);
    cuda::launch(device, "merge_states", &kernel, row_launch(t * h), &params)?;
    Ok(gradients)
}
