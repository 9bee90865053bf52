//! Element-wise ops whose unfused form costs a visible share of a prompt on the CPU.
//! Knows no layer.

use crate::simd::{self, multiversion};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// silu(gate) · up, both (t, f), f32: the gated half of a Llama MLP in one pass over memory.
///
/// # Errors
/// If the shapes differ.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        candle_core::bail!("silu_mul: gate {:?}, expected the shape of up {:?}", gate, up);
    }
    let mut out = gate.flatten_all()?.to_vec1::<f32>()?;
    let up_values = up.flatten_all()?.to_vec1::<f32>()?;
    // 16 K floats are 64 KiB: large enough that a task outweighs its dispatch.
    const BLOCK: usize = 16 * 1024;
    out.par_chunks_mut(BLOCK)
        .zip(up_values.par_chunks(BLOCK))
        .for_each(|(gate, up)| silu_mul_block(gate, up));
    Tensor::from_vec(out, gate.shape(), gate.device())
}

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
