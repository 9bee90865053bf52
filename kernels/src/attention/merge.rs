//! The merge of attention over two disjoint sets of keys, and its gradient.
//! Knows no pages.

use super::AttentionState;
use candle_core::{DType, Result, Tensor};

/// Joins attention over two disjoint sets of keys into attention over their union.
///
/// lse = ln(e^lse₁ + e^lse₂), out = Σ e^(lseᵢ - lse) outᵢ: associative and commutative up to rounding, with the
/// state that saw no key (lse = -inf) as its neutral element.
///
/// Source: FlashInfer (arXiv 2501.01005) section 2.2.
///
/// # Errors
/// If shapes, types or devices differ.
pub fn merge_states(a: &AttentionState, b: &AttentionState) -> Result<AttentionState> {
    let (t, h, d) = check("merge_states", a, b)?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = a.out.device() {
        return super::cuda::merge_states(device, a, b);
    }
    let mut out = values(&a.out)?;
    let mut lse = values(&a.lse)?;
    let (other_out, other_lse) = (values(&b.out)?, values(&b.lse)?);
    for (row, (lse, other)) in lse.iter_mut().zip(&other_lse).enumerate() {
        let max = lse.max(*other);
        if max == f32::NEG_INFINITY {
            continue;
        }
        let (wa, wb) = ((*lse - max).exp(), (other - max).exp());
        let sum = wa + wb;
        let range = row * d..(row + 1) * d;
        for (x, y) in out[range.clone()].iter_mut().zip(&other_out[range]) {
            *x = (*x * wa + y * wb) / sum;
        }
        *lse = max + sum.ln();
    }
    let device = a.out.device();
    Ok(AttentionState {
        out: Tensor::from_vec(out, (t, h, d), device)?,
        lse: Tensor::from_vec(lse, (t, h), device)?,
    })
}

/// Gradients of [`merge_states`] with respect to its two states.
#[derive(Debug, Clone)]
pub struct MergeGradients {
    /// (t, h, d), in the type of `a.out`.
    pub a_out: Tensor,
    /// (t, h), f32.
    pub a_lse: Tensor,
    /// (t, h, d), in the type of `b.out`.
    pub b_out: Tensor,
    /// (t, h), f32.
    pub b_lse: Tensor,
}

/// The gradient of [`merge_states`], from `dout` (t, h, d) and, if the merged lse was used, `dlse` (t, h), f32.
///
/// With wᵢ = e^(lseᵢ - lse): doutᵢ = wᵢ dout, dlse₁ = w₁ w₂ dout·(out₁ - out₂) + w₁ dlse, dlse₂ with the sign turned.
/// An empty state has w = 0 and gets no gradient.
///
/// # Errors
/// If shapes, types or devices differ.
pub fn merge_states_backward(
    a: &AttentionState,
    b: &AttentionState,
    dout: &Tensor,
    dlse: Option<&Tensor>,
) -> Result<MergeGradients> {
    let (t, h, d) = check("merge_states_backward", a, b)?;
    if dout.dims() != [t, h, d]
        || dout.dtype() != a.out.dtype()
        || !dout.device().same_device(a.out.device())
    {
        candle_core::bail!("merge_states_backward: dout {dout:?}, expected it like {:?}", a.out);
    }
    if let Some(dlse) = dlse
        && (dlse.dims() != [t, h]
            || dlse.dtype() != DType::F32
            || !dlse.device().same_device(a.out.device()))
    {
        candle_core::bail!("merge_states_backward: dlse {dlse:?}, expected it like {:?}", a.lse);
    }
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = a.out.device() {
        return super::cuda::merge_states_backward(device, a, b, dout, dlse);
    }
    let mut da = values(dout)?;
    let mut db = da.clone();
    let (a_out, b_out) = (values(&a.out)?, values(&b.out)?);
    let (mut a_lse, mut b_lse) = (values(&a.lse)?, values(&b.lse)?);
    let dlse = dlse.map(values).transpose()?;
    for (row, (la, lb)) in a_lse.iter_mut().zip(&mut b_lse).enumerate() {
        let max = la.max(*lb);
        let (wa, wb) = if max == f32::NEG_INFINITY {
            (0.0, 0.0)
        } else {
            let (wa, wb) = ((*la - max).exp(), (*lb - max).exp());
            (wa / (wa + wb), wb / (wa + wb))
        };
        let mut dot = 0f32;
        for i in row * d..(row + 1) * d {
            dot += da[i] * (a_out[i] - b_out[i]);
            da[i] *= wa;
            db[i] *= wb;
        }
        let outer = dlse.as_ref().map_or(0.0, |dlse| dlse[row]);
        (*la, *lb) = (wa * wb * dot + wa * outer, -wa * wb * dot + wb * outer);
    }
    let device = a.out.device();
    Ok(MergeGradients {
        a_out: Tensor::from_vec(da, (t, h, d), device)?,
        a_lse: Tensor::from_vec(a_lse, (t, h), device)?,
        b_out: Tensor::from_vec(db, (t, h, d), device)?,
        b_lse: Tensor::from_vec(b_lse, (t, h), device)?,
    })
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1::<f32>()
}

fn check(op: &str, a: &AttentionState, b: &AttentionState) -> Result<(usize, usize, usize)> {
    let (t, h, d) = a.out.dims3()?;
    let device = a.out.device();
    let fits = |state: &AttentionState| {
        state.out.dims() == [t, h, d]
            && state.lse.dims() == [t, h]
            && state.out.dtype() == a.out.dtype()
            && state.lse.dtype() == DType::F32
            && state.out.device().same_device(device)
            && state.lse.device().same_device(device)
    };
    if !fits(a) || !fits(b) {
        candle_core::bail!(
            "{op}: out {:?} and {:?}, lse {:?} and {:?}, expected both of one shape, type and device",
            a.out,
            b.out,
            a.lse,
            b.lse
        );
    }
    Ok((t, h, d))
}
