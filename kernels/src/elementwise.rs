//! Element-wise ops whose unfused form costs a visible share of a prompt on the CPU.
//! Knows no layer.

use crate::simd::{self, multiversion};
use crate::storage::contiguous_range;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Values that one task takes: 16 K floats are 64 KiB, large enough that a task outweighs its dispatch.
const BLOCK: usize = 16 * 1024;

/// silu(gate) · up, both (.., f) contiguous, f32 (on CUDA also bf16 and f16): the gated half of a Llama MLP in one
/// pass over memory.
///
/// # Errors
/// If the shapes differ.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        candle_core::bail!(
            "silu_mul: gate {:?} of {:?}, expected up's {:?} of {:?}",
            gate.shape(),
            gate.dtype(),
            up.shape(),
            up.dtype()
        );
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, SiluMul)
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
        let values = |storage, layout| -> Result<&[f32]> {
            Ok(&CpuStorage::as_slice(storage)?[contiguous_range("silu_mul", layout)?])
        };
        let (mut out, up) = (values(gate, gate_layout)?.to_vec(), values(up, up_layout)?);
        out.par_chunks_mut(BLOCK)
            .zip(up.par_chunks(BLOCK))
            .for_each(|(gate, up)| silu_mul_block(gate, up));
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
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
        // Beyond 64 K blocks of 256 a thread takes several values.
        let blocks = len.div_ceil(256).min(65_536) as u32;
        let launch = cuda::Launch { grid: (blocks, 1, 1), block: 256, shared_bytes: 0 };
        cuda::launch(device, "silu_mul", &kernel, launch, &params)?;
        Ok((out, gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // σ = 1 / (1 + e^-g); silu' = σ (1 + g (1 - σ)).
        let sigmoid = ((gate.neg()?.exp()? + 1.0)?).recip()?;
        let silu = (gate * &sigmoid)?;
        let slope = (&sigmoid * ((gate * (1.0 - &sigmoid)?)? + 1.0)?)?;
        Ok((Some(((grad * up)? * slope)?), Some((grad * silu)?)))
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

/// x · Φ(x) with the normal distribution's Φ, not its tanh approximation: x (..) contiguous, f32 on the CPU.
/// Within 2e-7 · |x| of exact. Has no gradient.
///
/// # Errors
/// If x is not f32 on the CPU.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&Gelu)
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = CpuStorage::as_slice(x)?[contiguous_range("gelu", layout)?].to_vec();
        out.par_chunks_mut(BLOCK).for_each(gelu_block);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

#[inline(always)]
fn gelu_body(x: &mut [f32]) {
    for x in x {
        // Abramowitz and Stegun 7.1.26: erfc(z) = t · poly(t) · exp(-z²) for z ≥ 0, within 1.5e-7.
        let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = 1.0 / (1.0 + 0.327_591_1 * z);
        let mut poly = 1.061_405_4f32;
        poly = poly * t - 1.453_152;
        poly = poly * t + 1.421_413_7;
        poly = poly * t - 0.284_496_72;
        poly = poly * t + 0.254_829_6;
        let tail = 0.5 * t * poly * simd::exp(-z * z);
        *x *= if *x >= 0.0 { 1.0 - tail } else { tail };
    }
}

multiversion! {
    fn gelu_block = gelu_body(x: &mut [f32])
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn gelu_is_that_of_the_error_function_at_every_length() -> Result<()> {
        for len in [0usize, 1, 7, 16, 33, 40_001] {
            let values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin() * 12.0).collect();
            let x = Tensor::from_vec(values.clone(), len, &Device::Cpu)?;
            let (found, exact) = (gelu(&x)?.to_vec1::<f32>()?, x.gelu_erf()?.to_vec1::<f32>()?);
            for ((x, found), exact) in values.iter().zip(found).zip(exact) {
                assert!(
                    (found - exact).abs() <= 4e-7 * x.abs(),
                    "gelu({x}) = {found}, not {exact}"
                );
            }
        }
        let text = gelu(&Tensor::zeros(3, candle_core::DType::U32, &Device::Cpu)?).err();
        assert!(text.is_some());
        Ok(())
    }
}
