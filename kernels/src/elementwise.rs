//! Element-wise ops whose unfused form costs a visible share of a prompt on the CPU.
//! Knows no layer.

use crate::simd::{self, multiversion};
use crate::storage::{aligned, contiguous_range};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Values that one task takes: 16 K floats are 64 KiB, large enough that a task outweighs its dispatch.
const BLOCK: usize = 16 * 1024;

/// silu(gate) · up, both (.., f) contiguous, f32 (on CUDA also bf16 and f16): the gated half of a Llama MLP in one
/// pass over memory.
///
/// # Errors
/// If the shapes differ.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check_gated("silu_mul", gate, up)?;
    aligned(gate)?.apply_op2(&aligned(up)?, SiluMul)
}

/// gelu(gate) · up, both (.., f) contiguous, f32, with the GELU that tanh approximates: the gated half of Gemma's MLP in
/// one pass over memory; on CUDA two ops of candle. No gradient flows through it.
///
/// # Errors
/// If the shapes differ.
pub fn gelu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check_gated("gelu_mul", gate, up)?;
    if !gate.device().is_cpu() {
        return gate.gelu()? * up;
    }
    aligned(gate)?.apply_op2_no_bwd(&aligned(up)?, &GeluMul)
}

fn check_gated(op: &str, gate: &Tensor, up: &Tensor) -> Result<()> {
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        bail!(
            "{op}: gate {:?} of {:?}, expected up's {:?} of {:?}",
            gate.shape(),
            gate.dtype(),
            up.shape(),
            up.dtype()
        );
    }
    Ok(())
}

/// `block` over both, block by block, on the processor.
fn gated(
    op: &str,
    gate: (&CpuStorage, &Layout),
    up: (&CpuStorage, &Layout),
    block: fn(&mut [f32], &[f32]),
) -> Result<(CpuStorage, Shape)> {
    let mut out = gate.0.as_slice::<f32>()?[contiguous_range(op, gate.1)?].to_vec();
    let up = &up.0.as_slice::<f32>()?[contiguous_range(op, up.1)?];
    out.par_chunks_mut(BLOCK).zip(up.par_chunks(BLOCK)).for_each(|(gate, up)| block(gate, up));
    Ok((CpuStorage::F32(out), gate.1.shape().clone()))
}

struct SiluMul;

impl CustomOp2 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        gated("silu_mul", (gate, gate_layout), (up, up_layout), silu_mul_block)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gate: &candle_core::CudaStorage,
        gate_layout: &Layout,
        up: &candle_core::CudaStorage,
        up_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use crate::cuda;
        use candle_core::backend::BackendStorage;

        let (device, dtype) = (gate.device(), gate.dtype());
        let len = gate_layout.shape().elem_count();
        let out = cuda::output(device, dtype, len)?;
        let params = SiluMulParams {
            gate: cuda::address_of(gate, gate_layout)?,
            up: cuda::address_of(up, up_layout)?,
            out: cuda::address_of(&out, &Layout::contiguous(gate_layout.shape()))?,
            len: len as u64,
        };
        let kernel = format!("silu_mul_{}", cuda::suffix("silu_mul", dtype)?);
        cuda::launch(device, "silu_mul", &kernel, self::cuda::fours(len), &params)?;
        Ok((out, gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dgate, dup) = silu_mul_backward(gate, up, grad)?;
        Ok((Some(dgate), Some(dup)))
    }
}

struct GeluMul;

impl CustomOp2 for GeluMul {
    fn name(&self) -> &'static str {
        "gelu-mul"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        gated("gelu_mul", (gate, gate_layout), (up, up_layout), gelu_mul_block)
    }
}

/// Gradients of [`silu_mul`] for gate and up, from that of its result, all of one shape and type.
///
/// # Errors
/// As [`silu_mul`].
pub fn silu_mul_backward(gate: &Tensor, up: &Tensor, dout: &Tensor) -> Result<(Tensor, Tensor)> {
    for (name, x) in [("up", up), ("dout", dout)] {
        if x.shape() != gate.shape() || x.dtype() != gate.dtype() {
            bail!(
                "silu_mul_backward: {name} {:?} of {:?}, expected gate's {:?} of {:?}",
                x.shape(),
                x.dtype(),
                gate.shape(),
                gate.dtype()
            );
        }
    }
    let inputs = [gate, up, dout].map(|x| aligned(&x.detach()));
    let [gate, up, dout] = inputs;
    let (gate, up, dout) = (gate?, up?, dout?);
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        return cuda::silu_mul_backward(&gate, &up, &dout);
    }
    let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
    let (mut dgate, mut dup) = (values(&gate)?, values(&dout)?);
    for ((gate, dup), up) in dgate.iter_mut().zip(&mut dup).zip(values(&up)?) {
        let (g, d, s) = (*gate, *dup, sigmoid(*gate));
        *gate = d * up * s * (1.0 + g * (1.0 - s));
        *dup = d * g * s;
    }
    let like = |values| Tensor::from_vec(values, gate.shape(), gate.device());
    Ok((like(dgate)?, like(dup)?))
}

/// silu(x + bias): x (n, c), bias (c), of one type, f32 on the CPU. No gradient flows.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn silu_bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    silu_bias_or_gradient(x, bias, None)
}

/// The gradient of x in [`silu_bias`] from that of its result; the bias has its sum over rows.
///
/// # Errors
/// As [`silu_bias`].
pub fn silu_bias_backward(x: &Tensor, bias: &Tensor, dout: &Tensor) -> Result<Tensor> {
    silu_bias_or_gradient(x, bias, Some(dout))
}

fn silu_bias_or_gradient(x: &Tensor, bias: &Tensor, dout: Option<&Tensor>) -> Result<Tensor> {
    let c = x.dim(1)?;
    let fits = dout.is_none_or(|dout| dout.shape() == x.shape() && dout.dtype() == x.dtype());
    if bias.dims() != [c] || bias.dtype() != x.dtype() || !fits {
        bail!(
            "silu_bias: x {:?} of {:?}, bias {:?} of {:?}, dout {:?}, expected (n, c), (c) and (n, c) of one type",
            x.shape(),
            x.dtype(),
            bias.shape(),
            bias.dtype(),
            dout.map(Tensor::shape)
        );
    }
    let (x, bias) = (x.detach().contiguous()?, bias.detach().contiguous()?);
    let dout = dout.map(|dout| dout.detach().contiguous()).transpose()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::silu_bias(&x, &bias, dout.as_ref());
    }
    let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
    let (mut out, bias) = (values(&x)?, values(&bias)?);
    let dout = dout.as_ref().map(values).transpose()?;
    for (i, x) in out.iter_mut().enumerate() {
        let g = *x + bias[i % c];
        let s = sigmoid(g);
        *x = match &dout {
            Some(dout) => dout[i] * s * (1.0 + g * (1.0 - s)),
            None => g * s,
        };
    }
    Tensor::from_vec(out, x.shape(), x.device())
}

/// 1 / (1 + e^-g) without overflow on either side.
fn sigmoid(g: f32) -> f32 {
    let e = (-g.abs()).exp();
    if g >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

#[cfg(feature = "cuda")]
mod cuda {
    use crate::cuda::{Launch, address, device_of, launch, output_tensor, suffix};
    use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
    use candle_core::{Result, Tensor};

    /// As in `cuda/silu_mul.cu`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct SiluMulBackward {
        gate: u64,
        up: u64,
        dout: u64,
        dgate: u64,
        dup: u64,
        len: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct SiluBias {
        x: u64,
        bias: u64,
        dout: u64,
        out: u64,
        len: u64,
        c: u32,
    }

    // SAFETY: plain numbers in C layout, as the kernels declare them.
    unsafe impl DeviceRepr for SiluMulBackward {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for SiluBias {}

    /// 256 threads a block, four values a thread; beyond 64 K blocks more.
    pub(super) fn fours(len: usize) -> Launch {
        let blocks = len.div_ceil(1024).min(65_536) as u32;
        Launch { grid: (blocks, 1, 1), block: 256, shared_bytes: 0 }
    }

    pub(super) fn silu_mul_backward(
        gate: &Tensor,
        up: &Tensor,
        dout: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let device = device_of("silu_mul_backward", gate)?;
        let like = || output_tensor(&device, gate.dtype(), gate.shape());
        let (dgate, dup, len) = (like()?, like()?, gate.elem_count());
        let params = SiluMulBackward {
            gate: address(gate)?,
            up: address(up)?,
            dout: address(dout)?,
            dgate: address(&dgate)?,
            dup: address(&dup)?,
            len: len as u64,
        };
        let kernel = format!("silu_mul_backward_{}", suffix("silu_mul_backward", gate.dtype())?);
        launch(&device, "silu_mul", &kernel, fours(len), &params)?;
        Ok((dgate, dup))
    }

    pub(super) fn silu_bias(x: &Tensor, bias: &Tensor, dout: Option<&Tensor>) -> Result<Tensor> {
        let device = device_of("silu_bias", x)?;
        let (out, len) = (output_tensor(&device, x.dtype(), x.shape())?, x.elem_count());
        let params = SiluBias {
            x: address(x)?,
            bias: address(bias)?,
            dout: dout.map(address).transpose()?.unwrap_or(0),
            out: address(&out)?,
            len: len as u64,
            c: x.dim(1)? as u32,
        };
        let kernel = format!("silu_bias_{}", suffix("silu_bias", x.dtype())?);
        launch(&device, "silu_mul", &kernel, fours(len), &params)?;
        Ok(out)
    }
}

/// As in `cuda/silu_mul.cu`.
#[cfg(feature = "cuda")]
#[repr(C)]
#[derive(Clone, Copy)]
struct SiluMulParams {
    gate: u64,
    up: u64,
    out: u64,
    len: u64,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
#[cfg(feature = "cuda")]
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for SiluMulParams {}

#[inline(always)]
fn silu_mul_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        // With e = exp(-|g|): sigmoid(g) is 1 / (1 + e) for g ≥ 0 and e / (1 + e) below: no overflow either side.
        let e = simd::exp(-g.abs());
        let numerator = if *g >= 0.0 { 1.0 } else { e };
        *g = *g * numerator / (1.0 + e) * u;
    }
}

multiversion! {
    fn silu_mul_block = silu_mul_body(gate: &mut [f32], up: &[f32])
}

#[inline(always)]
fn gelu_mul_body(gate: &mut [f32], up: &[f32]) {
    /// 2 √(2/π).
    const TWICE: f32 = 1.595_769_2;
    for (g, u) in gate.iter_mut().zip(up) {
        // (1 + tanh z) / 2 is sigmoid(2z), taken as in `silu_mul_body`.
        let z = TWICE * (*g + 0.044_715 * *g * *g * *g);
        let e = simd::exp(-z.abs());
        let numerator = if z >= 0.0 { 1.0 } else { e };
        *g = *g * numerator / (1.0 + e) * u;
    }
}

multiversion! {
    fn gelu_mul_block = gelu_mul_body(gate: &mut [f32], up: &[f32])
}
