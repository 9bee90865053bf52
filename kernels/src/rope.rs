//! Rotary position embedding in the half-split layout of the HuggingFace models.
//! Knows inverse frequencies and positions; which scaling made the frequencies is the model's matter.

use crate::storage::contiguous_range;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Cosines and sines of a run of positions, shared by every layer and head.
///
/// Cost: cloning copies pointers. A CUDA device gets its copy at the first rotation there.
#[derive(Debug, Clone)]
pub struct RotaryAngles {
    /// (t, d/2) each, row-major.
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    half: usize,
    #[cfg(feature = "cuda")]
    on_device: Arc<std::sync::OnceLock<(Tensor, Tensor)>>,
}

impl RotaryAngles {
    /// Angles of `positions` under `inv_freq` (d/2 frequencies), cos and sin scaled by `scale` (1.0 but for YaRN and
    /// LongRoPE). A pair of frequency 0 is neither turned nor scaled: cos 1, sin 0.
    ///
    /// Angles are reduced in f64: at position 10^7 an f32 angle is off by more than half a radian.
    pub fn new(positions: impl IntoIterator<Item = u64>, inv_freq: &[f64], scale: f64) -> Self {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for freq in inv_freq {
                let (s, c) = (position as f64 * freq).sin_cos();
                // Models that turn a part of each head scale that part alone.
                let scale = if *freq == 0.0 { 1.0 } else { scale };
                cos.push((c * scale) as f32);
                sin.push((s * scale) as f32);
            }
        }
        Self {
            cos: cos.into(),
            sin: sin.into(),
            half: inv_freq.len(),
            #[cfg(feature = "cuda")]
            on_device: Arc::default(),
        }
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Half of the head dimension that the angles turn.
    pub(crate) fn half(&self) -> usize {
        self.half
    }

    /// Cosines and sines of the position of index `i`, d/2 each.
    ///
    /// # Panics
    /// If `i` is not below [`RotaryAngles::len`].
    pub fn at(&self, i: usize) -> (&[f32], &[f32]) {
        let row = i * self.half..(i + 1) * self.half;
        (&self.cos[row.clone()], &self.sin[row])
    }

    /// Both tables on `device`, (t, d/2) each, f32; uploaded once for the first device that asks.
    #[cfg(feature = "cuda")]
    pub(crate) fn on(&self, device: &candle_core::CudaDevice) -> Result<(Tensor, Tensor)> {
        use candle_core::Device;
        let device = Device::Cuda(device.clone());
        let upload = || -> Result<(Tensor, Tensor)> {
            // One copy for both.
            let values = [&self.cos[..], &self.sin].concat();
            let tables = Tensor::from_vec(values, (2, self.len(), self.half), &device)?;
            Ok((tables.get(0)?, tables.get(1)?))
        };
        if let Some(tables) = self.on_device.get()
            && tables.0.device().same_device(&device)
        {
            return Ok(tables.clone());
        }
        let tables = upload()?;
        // Another device's tables may have come first: this one's are then used and dropped.
        let _ = self.on_device.set(tables.clone());
        Ok(tables)
    }

    /// Whether there is no position.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }
}

/// Rotates `x` (t, h, d) to the positions of `angles` (t of them): f32 on the CPU; f32, bf16 or f16 on CUDA.
///
/// `y[i] = x[i] cos θᵢ - x[i + d/2] sin θᵢ`; `y[i + d/2] = x[i + d/2] cos θᵢ + x[i] sin θᵢ`.
/// Its gradient is the inverse rotation of the result's.
///
/// # Errors
/// If the number of positions or `d` does not fit the angles.
pub fn rotate(x: &Tensor, angles: &RotaryAngles) -> Result<Tensor> {
    check("rotate", x, angles)?;
    x.contiguous()?.apply_op1(Rotate { angles: angles.clone(), inverse: false })
}

/// Undoes [`rotate`], and is the gradient of its input from that of its result: x (t, h, d). No gradient flows.
///
/// Angles that are scaled (YaRN, LongRoPE) scale once more: what comes back is scale² times what was rotated.
///
/// # Errors
/// As [`rotate`].
pub fn rotate_back(x: &Tensor, angles: &RotaryAngles) -> Result<Tensor> {
    check("rotate_back", x, angles)?;
    x.detach().contiguous()?.apply_op1_no_bwd(&Rotate { angles: angles.clone(), inverse: true })
}

fn check(op: &str, x: &Tensor, angles: &RotaryAngles) -> Result<()> {
    let (t, h, d) = x.dims3()?;
    if h == 0 || d == 0 || d != 2 * angles.half || t != angles.len() {
        candle_core::bail!(
            "{op}: x {:?}, expected {} positions of some heads of head_dim {}, above 0",
            x.shape(),
            angles.len(),
            2 * angles.half
        );
    }
    Ok(())
}

struct Rotate {
    angles: RotaryAngles,
    inverse: bool,
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (t, h, d) = layout.shape().dims3()?;
        let mut out = storage.as_slice::<f32>()?[contiguous_range("rotate", layout)?].to_vec();
        let half = self.angles.half;
        let sign = if self.inverse { -1.0 } else { 1.0 };
        if t > 0 {
            out.par_chunks_mut(h * d).with_min_len(32).enumerate().for_each(|(i, heads)| {
                let cos = &self.angles.cos[i * half..(i + 1) * half];
                let sin = &self.angles.sin[i * half..(i + 1) * half];
                for head in heads.chunks_exact_mut(d) {
                    let (low, high) = head.split_at_mut(half);
                    for j in 0..half {
                        let (a, b, s) = (low[j], high[j], sign * sin[j]);
                        low[j] = a * cos[j] - b * s;
                        high[j] = b * cos[j] + a * s;
                    }
                }
            });
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use crate::cuda;
        use candle_core::backend::BackendStorage;

        let (_, h, _) = layout.shape().dims3()?;
        let device = storage.device();
        let out = cuda::output(device, storage.dtype(), layout.shape().elem_count())?;
        let (cos, sin) = self.angles.on(device)?;
        let pairs = (layout.shape().elem_count() / 2) as u64;
        let params = RopeParams {
            x: cuda::address_of(storage, layout)?,
            cosine: cuda::address(&cos)?,
            sine: cuda::address(&sin)?,
            y: cuda::address_of(&out, &Layout::contiguous(layout.shape()))?,
            pairs,
            heads: h as u32,
            half: self.angles.half as u32,
            sign: if self.inverse { -1.0 } else { 1.0 },
        };
        let kernel = format!("rope_{}", cuda::suffix("rotate", storage.dtype())?);
        // Four pairs or more a thread; beyond 64 K blocks more.
        let blocks = pairs.div_ceil(1024).min(65_536) as u32;
        let launch = cuda::Launch { grid: (blocks, 1, 1), block: 256, shared_bytes: 0 };
        cuda::launch(device, "rope", &kernel, launch, &params)?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let inverse = Rotate { angles: self.angles.clone(), inverse: !self.inverse };
        Ok(Some(grad.contiguous()?.apply_op1(inverse)?))
    }
}

/// As in `cuda/rope.cu`.
#[cfg(feature = "cuda")]
#[repr(C)]
#[derive(Clone, Copy)]
struct RopeParams {
    x: u64,
    cosine: u64,
    sine: u64,
    y: u64,
    pairs: u64,
    heads: u32,
    half: u32,
    sign: f32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
#[cfg(feature = "cuda")]
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for RopeParams {}
