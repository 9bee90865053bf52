//! Projections on the tape: products with weights and low-rank adapters, and nothing but products in their gradients.
//! Knows no layer and no parameter by name.

use super::{Target, Value, record};
use crate::product::{ProductOptions, product};
use candle_core::{DType, Result, Tensor, bail};

/// One projection x Wᵀ, with a low-rank adapter: y = x Wᵀ + scale · (x Aᵀ) Bᵀ.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// (out, in).
    pub weight: &'a Tensor,
    /// A (rank, in), B (out, rank) and the scale.
    pub adapter: Option<(&'a Tensor, &'a Tensor, f32)>,
    /// See [`ProductOptions::tf32`].
    pub tf32: bool,
}

impl<'a> Projection<'a> {
    /// Without adapter.
    pub fn plain(weight: &'a Tensor) -> Self {
        Self { weight, adapter: None, tf32: false }
    }
}

/// What the gradients of one projection need.
struct Kept {
    weight: Tensor,
    weight_target: Target,
    adapter: Option<KeptAdapter>,
    tf32: bool,
    /// Columns of its group's result.
    start: usize,
    width: usize,
}

struct KeptAdapter {
    a: Tensor,
    b: Tensor,
    targets: [Target; 2],
    scale: f32,
    /// x Aᵀ.
    inner: Tensor,
}

/// Projections of one input: x (n, in) -> for each group (n, Σ out) of its projections side by side.
///
/// Nothing but products runs, forward and backward: factors, sums and transposes are theirs.
///
/// # Errors
/// If shapes, types or devices disagree.
pub fn project(x: &Value, groups: &[&[Projection<'_>]]) -> Result<Vec<Value>> {
    let input = x.tensor().contiguous()?;
    let (mut outputs, mut kept) = (Vec::new(), Vec::new());
    for group in groups {
        let (out, group) = project_group(&input, group)?;
        outputs.push(out);
        kept.push(group);
    }
    let target = x.target();
    let leaves: Vec<Value> =
        groups.iter().flat_map(|group| group.iter()).flat_map(leaves_of).collect();
    let mut inputs = vec![x];
    inputs.extend(&leaves);
    Ok(record(&inputs, outputs, move |douts, gradients| {
        let options = |onto, tf32| ProductOptions { onto, tf32, ..ProductOptions::default() };
        let single = |alpha, tf32| ProductOptions {
            alpha,
            tf32,
            dtype: Some(DType::F32),
            ..ProductOptions::default()
        };
        let mut dx: Option<Tensor> = None;
        for (group, dout) in kept.into_iter().zip(douts) {
            let Some(dout) = dout else { continue };
            for part in group {
                let dy = dout.narrow(1, part.start, part.width)?;
                if part.weight_target.is_wanted() {
                    let dweight = product(&dy.t()?, &input, single(1.0, part.tf32))?;
                    gradients.give(&part.weight_target, dweight)?;
                }
                if target.is_wanted() {
                    dx = Some(product(&dy, &part.weight, options(dx, part.tf32))?);
                }
                let Some(adapter) = part.adapter else { continue };
                let KeptAdapter { a, b, targets: [to_a, to_b], scale, inner } = adapter;
                if to_b.is_wanted() {
                    let db = product(&dy.t()?, &inner, single(scale, part.tf32))?;
                    gradients.give(&to_b, db)?;
                }
                let alpha = ProductOptions { alpha: scale, ..options(None, part.tf32) };
                let dinner = product(&dy, &b, alpha)?;
                if to_a.is_wanted() {
                    let da = product(&dinner.t()?, &input, single(1.0, part.tf32))?;
                    gradients.give(&to_a, da)?;
                }
                if target.is_wanted() {
                    dx = Some(product(&dinner, &a, options(dx, part.tf32))?);
                }
            }
        }
        match dx {
            Some(dx) => gradients.give(&target, dx),
            None => Ok(()),
        }
    }))
}

fn leaves_of(part: &Projection<'_>) -> Vec<Value> {
    let adapter = part.adapter.map(|(a, b, _)| [Value::of(a), Value::of(b)]);
    std::iter::once(Value::of(part.weight)).chain(adapter.into_iter().flatten()).collect()
}

fn project_group(x: &Tensor, group: &[Projection<'_>]) -> Result<(Tensor, Vec<Kept>)> {
    let mut kept = Vec::with_capacity(group.len());
    let mut start = 0;
    for part in group {
        let (width, inner) = part.weight.dims2()?;
        if inner != x.dim(1)? {
            bail!("project: x {:?}, expected (n, {inner})", x.shape());
        }
        let tf32 = ProductOptions { tf32: part.tf32, ..ProductOptions::default() };
        let adapter = part
            .adapter
            .map(|(a, b, scale)| {
                let inner = product(x, &a.detach().t()?, tf32)?;
                let targets = [Value::of(a).target(), Value::of(b).target()];
                Ok::<_, candle_core::Error>(KeptAdapter {
                    a: a.detach(),
                    b: b.detach(),
                    targets,
                    scale,
                    inner,
                })
            })
            .transpose()?;
        let weight_target = Value::of(part.weight).target();
        let weight = part.weight.detach();
        kept.push(Kept { weight, weight_target, adapter, tf32: part.tf32, start, width });
        start += width;
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && group.len() > 1 {
        let device = crate::cuda::device_of("project", x)?;
        let all = crate::cuda::output_tensor(&device, x.dtype(), (x.dim(0)?, start))?;
        for part in &kept {
            if part.weight.dtype() != x.dtype() {
                bail!("project: weight of {:?}, expected {:?}", part.weight.dtype(), x.dtype());
            }
            let columns = all.narrow(1, part.start, part.width)?;
            crate::product::gemm(x, &part.weight.t()?, (1.0, part.tf32), false, &columns)?;
            if let Some(KeptAdapter { b, scale, inner, .. }) = &part.adapter {
                crate::product::gemm(inner, &b.t()?, (*scale, part.tf32), true, &columns)?;
            }
        }
        return Ok((all, kept));
    }
    let mut outputs = Vec::with_capacity(kept.len());
    for part in &kept {
        let tf32 = ProductOptions { tf32: part.tf32, ..ProductOptions::default() };
        let mut y = product(x, &part.weight.t()?, tf32)?;
        if let Some(KeptAdapter { b, scale, inner, .. }) = &part.adapter {
            let options = ProductOptions {
                alpha: *scale,
                onto: Some(y),
                tf32: part.tf32,
                ..ProductOptions::default()
            };
            y = product(inner, &b.t()?, options)?;
        }
        outputs.push(y);
    }
    let out = match outputs.len() {
        1 => outputs.remove(0),
        _ => Tensor::cat(&outputs, 1)?,
    };
    Ok((out, kept))
}

/// One projection of x: (n, in) -> (n, out).
///
/// # Errors
/// As [`project`].
pub fn project_one(x: &Value, part: Projection<'_>) -> Result<Value> {
    Ok(project(x, &[&[part]])?.remove(0))
}
