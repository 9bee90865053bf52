//! Rotary position embedding in the half-split layout of the HuggingFace models.
//! Knows inverse frequencies and positions; which scaling made the frequencies is the model's matter.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Cosines and sines of a run of positions, shared by every layer and head.
#[derive(Debug, Clone)]
pub struct RotaryAngles {
    /// (t, d/2) each, row-major.
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RotaryAngles {
    /// Angles of `positions` under `inv_freq` (d/2 frequencies), cos and sin scaled by `scale` (1.0 but for YaRN).
    ///
    /// Angles are reduced in f64: at position 10^7 an f32 angle is off by more than half a radian.
    pub fn new(positions: impl IntoIterator<Item = u64>, inv_freq: &[f64], scale: f64) -> Self {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for freq in inv_freq {
                let (s, c) = (position as f64 * freq).sin_cos();
                cos.push((c * scale) as f32);
                sin.push((s * scale) as f32);
            }
        }
        Self { cos, sin, half: inv_freq.len() }
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Whether there is no position.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }
}

/// Rotates `x` (t, h, d), f32 on the CPU, to the positions of `angles` (t of them).
///
/// y[i] = x[i] cos θᵢ - x[i + d/2] sin θᵢ ; y[i + d/2] = x[i + d/2] cos θᵢ + x[i] sin θᵢ.
///
/// # Errors
/// If the number of positions or `d` does not fit the angles.
pub fn rotate(x: &Tensor, angles: &RotaryAngles) -> Result<Tensor> {
    let (t, h, d) = x.dims3()?;
    let half = angles.half;
    if d != 2 * half || t != angles.len() {
        candle_core::bail!(
            "rotate: x is ({t}, {h}, {d}), expected {} positions of head_dim {}",
            angles.len(),
            2 * half
        );
    }
    let mut out = x.flatten_all()?.to_vec1::<f32>()?;
    if t > 0 {
        out.par_chunks_mut(h * d).with_min_len(32).enumerate().for_each(|(i, heads)| {
            let cos = &angles.cos[i * half..(i + 1) * half];
            let sin = &angles.sin[i * half..(i + 1) * half];
            for head in heads.chunks_exact_mut(d) {
                let (low, high) = head.split_at_mut(half);
                for j in 0..half {
                    let (a, b) = (low[j], high[j]);
                    low[j] = a * cos[j] - b * sin[j];
                    high[j] = b * cos[j] + a * sin[j];
                }
            }
        });
    }
    Tensor::from_vec(out, (t, h, d), x.device())
}
