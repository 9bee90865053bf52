//! RMS norm of rows, with the sum before it where there is one, forward and backward.
//! Knows no layer.

use crate::storage::aligned;
use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

/// What [`rms_norm_forward`] returns.
#[derive(Debug, Clone)]
pub struct NormOutputs {
    /// x, with `added`: what was normed.
    pub sum: Tensor,
    /// x / rms(x) · weight, of x's shape and type.
    pub out: Tensor,
    /// 1 / rms(x) of every row (n), f32: for [`rms_norm_backward`].
    pub inverse: Tensor,
}

/// Gradients of [`rms_norm_forward`].
#[derive(Debug, Clone)]
pub struct NormGradients {
    /// Of x, which is that of `added` too, in x's type.
    pub dx: Tensor,
    /// Of the weight, f32, if it was asked for: (c).
    pub dweight: Option<Tensor>,
}

/// The norm of x + added over the last dimension: y = s / √(mean(s²) + eps) · weight with s = x + added.
///
/// x and `added` (.., c), weight (c), all of one type: f32, on CUDA also bf16 and f16; computed in f32. s is rounded to
/// that type before it is normed. No gradient flows: see [`rms_norm_backward`].
///
/// Source: RMSNorm, arXiv 1910.07467, equation 4.
///
/// # Errors
/// If shapes, types or devices disagree.
pub fn rms_norm_forward(
    x: &Tensor,
    added: Option<&Tensor>,
    weight: Option<&Tensor>,
    eps: f32,
) -> Result<NormOutputs> {
    let (rows, c) = check("rms_norm", x, added, weight)?;
    let x = aligned(&x.detach())?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::forward(&x, added, weight, eps, (rows, c));
    }
    let sum = match added {
        Some(added) => (&x + added.detach())?,
        None => x,
    };
    let weights = weight.map(values).transpose()?;
    let mut out = values(&sum)?;
    let inverse: Vec<f32> = out
        .par_chunks_mut(c)
        .map(|row| {
            let squares: f32 = row.iter().map(|x| x * x).sum();
            let inverse = 1.0 / (squares / c as f32 + eps).sqrt();
            for (i, x) in row.iter_mut().enumerate() {
                *x *= inverse;
                if let Some(weights) = &weights {
                    *x *= weights[i];
                }
            }
            inverse
        })
        .collect();
    let out = Tensor::from_vec(out, sum.shape(), sum.device())?;
    let inverse = Tensor::from_vec(inverse, rows, sum.device())?;
    Ok(NormOutputs { sum, out, inverse })
}

/// Gradients of what was normed, `sum` (.., c), and of the weight if `trained`, from those of the result, `dout`.
///
/// With y = sum · inverse and g = dout · weight: dx = inverse · (g - y · mean(g y)) + added, dweight = Σ dout · y, in f32.
/// `added` (.., c) is a gradient that `sum` has from elsewhere. Equal inputs give equal bits.
///
/// # Errors
/// As [`rms_norm_forward`].
pub fn rms_norm_backward(
    (sum, inverse): (&Tensor, &Tensor),
    weight: Option<&Tensor>,
    dout: &Tensor,
    added: Option<&Tensor>,
    trained: bool,
) -> Result<NormGradients> {
    let op = "rms_norm_backward";
    let (rows, c) = check(op, sum, added, weight)?;
    if inverse.dims() != [rows] || dout.elem_count() != rows * c || dout.dtype() != sum.dtype() {
        bail!(
            "{op}: inverse {:?}, dout {:?} of {:?}, expected ({rows}) and {:?} of {:?}",
            inverse.shape(),
            dout.shape(),
            dout.dtype(),
            sum.shape(),
            sum.dtype()
        );
    }
    let (sum, dout) = (aligned(&sum.detach())?, aligned(&dout.detach())?);
    #[cfg(feature = "cuda")]
    if sum.device().is_cuda() {
        return cuda::backward((&sum, inverse), weight, &dout, added, trained, (rows, c));
    }
    let (x, inverse, dout) = (values(&sum)?, values(inverse)?, values(&dout)?);
    let weights = weight.map(values).transpose()?;
    let mut dx = match added {
        Some(added) => values(added)?,
        None => vec![0f32; rows * c],
    };
    let factor = |i: usize| weights.as_ref().map_or(1.0, |weights| weights[i]);
    dx.par_chunks_mut(c).enumerate().for_each(|(row, dx)| {
        let (x, dout, inverse) = (&x[row * c..][..c], &dout[row * c..][..c], inverse[row]);
        let along: f32 = (0..c).map(|i| dout[i] * factor(i) * x[i]).sum();
        let along = along * inverse * inverse / c as f32;
        for i in 0..c {
            dx[i] += inverse * (dout[i] * factor(i) - x[i] * along);
        }
    });
    let dweight = trained.then(|| {
        let mut total = vec![0f32; c];
        for (row, inverse) in inverse.iter().enumerate() {
            for i in 0..c {
                total[i] += dout[row * c + i] * x[row * c + i] * inverse;
            }
        }
        total
    });
    Ok(NormGradients {
        dx: Tensor::from_vec(dx, sum.shape(), sum.device())?,
        dweight: dweight.map(|total| Tensor::from_vec(total, c, sum.device())).transpose()?,
    })
}

/// (rows, c).
fn check(
    op: &str,
    x: &Tensor,
    added: Option<&Tensor>,
    weight: Option<&Tensor>,
) -> Result<(usize, usize)> {
    let c = x.dims().last().copied().unwrap_or(0);
    let fits = |other: Option<&Tensor>, shape: &[usize]| {
        other.is_none_or(|other| {
            other.dims() == shape
                && other.dtype() == x.dtype()
                && other.device().same_device(x.device())
        })
    };
    let type_known = x.device().is_cuda() || x.dtype() == DType::F32;
    if c == 0 || !type_known || !fits(added, x.dims()) || !fits(weight, &[c]) {
        bail!(
            "{op}: x {:?} of {:?}, added {:?}, weight {:?}, expected (.., c), the same and (c) of one type and device, f32 on the CPU",
            x.shape(),
            x.dtype(),
            added.map(Tensor::shape),
            weight.map(|weight| (weight.shape(), weight.dtype()))
        );
    }
    Ok((x.elem_count() / c, c))
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::{NormGradients, NormOutputs, aligned};
    use crate::cuda::{Launch, address, device_of, launch, output_tensor, suffix};
    use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
    use candle_core::{DType, Result, Tensor, bail};

    const THREADS: u32 = 256;
    /// Up to here a row is a warp's; beyond, a block's.
    const NARROW: usize = 1024;
    /// Parts whose sums make the gradient of the weight.
    const PARTS: usize = 64;

    /// As in `cuda/rms_norm.cu`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Forward {
        x: u64,
        added: u64,
        weight: u64,
        sum: u64,
        out: u64,
        inverse: u64,
        rows: u32,
        c: u32,
        eps: f32,
    }

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Backward {
        x: u64,
        weight: u64,
        inverse: u64,
        dout: u64,
        added: u64,
        dx: u64,
        rows: u32,
        c: u32,
    }

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Weight {
        x: u64,
        inverse: u64,
        dout: u64,
        partial: u64,
        dweight: u64,
        rows: u32,
        c: u32,
        rows_of_part: u32,
        parts: u32,
        lanes: u32,
    }

    // SAFETY: plain numbers in C layout, as the kernels declare them.
    unsafe impl DeviceRepr for Forward {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for Backward {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for Weight {}

    fn by_rows(name: &str, x: &Tensor, (rows, c): (usize, usize)) -> Result<(String, Launch)> {
        if rows > i32::MAX as usize || c > i32::MAX as usize {
            bail!("rms_norm: {rows} rows of {c}, expected at most {} of each", i32::MAX);
        }
        let (wide, blocks) = match c <= NARROW {
            true => ("", rows.div_ceil(THREADS as usize / 32)),
            false => ("wide_", rows),
        };
        let kernel = format!("{name}_{wide}{}", suffix("rms_norm", x.dtype())?);
        Ok((kernel, Launch { grid: (blocks as u32, 1, 1), block: THREADS, shared_bytes: 0 }))
    }

    fn optional(x: Option<&Tensor>) -> Result<(Option<Tensor>, u64)> {
        let x = x.map(|x| aligned(&x.detach())).transpose()?;
        let address = x.as_ref().map(address).transpose()?.unwrap_or(0);
        Ok((x, address))
    }

    pub(super) fn forward(
        x: &Tensor,
        added: Option<&Tensor>,
        weight: Option<&Tensor>,
        eps: f32,
        (rows, c): (usize, usize),
    ) -> Result<NormOutputs> {
        let device = device_of("rms_norm", x)?;
        let like = || output_tensor(&device, x.dtype(), x.shape());
        let (added, added_address) = optional(added)?;
        let (_weight, weight) = optional(weight)?;
        let sum = if added.is_some() { like()? } else { x.clone() };
        let (out, inverse) = (like()?, output_tensor(&device, DType::F32, rows)?);
        let params = Forward {
            x: address(x)?,
            added: added_address,
            weight,
            sum: address(&sum)?,
            out: address(&out)?,
            inverse: address(&inverse)?,
            rows: rows as u32,
            c: c as u32,
            eps,
        };
        let (kernel, shape) = by_rows("rms_norm", x, (rows, c))?;
        launch(&device, "rms_norm", &kernel, shape, &params)?;
        Ok(NormOutputs { sum, out, inverse })
    }

    pub(super) fn backward(
        (x, inverse): (&Tensor, &Tensor),
        weight: Option<&Tensor>,
        dout: &Tensor,
        added: Option<&Tensor>,
        trained: bool,
        (rows, c): (usize, usize),
    ) -> Result<NormGradients> {
        let device = device_of("rms_norm_backward", x)?;
        let (_added, added) = optional(added)?;
        let (_weight, weight) = optional(weight)?;
        let dx = output_tensor(&device, x.dtype(), x.shape())?;
        let params = Backward {
            x: address(x)?,
            weight,
            inverse: address(inverse)?,
            dout: address(dout)?,
            added,
            dx: address(&dx)?,
            rows: rows as u32,
            c: c as u32,
        };
        let (kernel, shape) = by_rows("rms_norm_backward", x, (rows, c))?;
        launch(&device, "rms_norm", &kernel, shape, &params)?;
        if !trained {
            return Ok(NormGradients { dx, dweight: None });
        }
        let lanes = c.next_power_of_two().clamp(32, THREADS as usize);
        let rows_of_part = rows.div_ceil(PARTS).max(THREADS as usize / lanes).max(1);
        let parts = rows.div_ceil(rows_of_part);
        let partial = output_tensor(&device, DType::F32, (parts, c))?;
        let dweight = output_tensor(&device, DType::F32, c)?;
        let params = Weight {
            x: params.x,
            inverse: params.inverse,
            dout: params.dout,
            partial: address(&partial)?,
            dweight: address(&dweight)?,
            rows: rows as u32,
            c: c as u32,
            rows_of_part: rows_of_part as u32,
            parts: parts as u32,
            lanes: lanes as u32,
        };
        let kernel = format!("rms_norm_weight_parts_{}", suffix("rms_norm", x.dtype())?);
        let columns = c.div_ceil(lanes) as u32;
        let shape = Launch { grid: (columns, parts as u32, 1), block: THREADS, shared_bytes: 0 };
        launch(&device, "rms_norm", &kernel, shape, &params)?;
        let columns = c.div_ceil(THREADS as usize) as u32;
        let shape = Launch { grid: (columns, 1, 1), block: THREADS, shared_bytes: 0 };
        launch(&device, "rms_norm", "rms_norm_weight", shape, &params)?;
        Ok(NormGradients { dx, dweight: Some(dweight) })
    }
}
