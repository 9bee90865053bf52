//! The ops of a decoder's layer on the tape: norms, gating, rotation, attention, the route; products are in `project.rs`.
//! Knows no layer and no parameter by name. Tensors that candle calls variables get gradients, in f32.

pub use super::project::{Projection, project, project_one};

use super::{Target, Value, record, record_one};
use crate::elementwise;
use crate::flash::{DenseAttentionParams, attention_backward, attention_forward};
use crate::norm::{rms_norm_backward, rms_norm_forward};
use crate::product::{ProductOptions, product};
use crate::rope::{RotaryAngles, rotate, rotate_back};
use crate::route::{RouteInputs, RouteParams, route_backward, route_forward};
use candle_core::{DType, Result, Shape, Tensor};

/// x, with `added`, and its norm over the last dimension times `weight`: (sum, normed).
///
/// The sum is what a residual connection goes on from: its gradient and the norm's are added in one pass.
///
/// # Errors
/// As [`rms_norm_forward`].
pub fn norm(
    x: &Value,
    added: Option<&Value>,
    weight: Option<&Tensor>,
    eps: f32,
) -> Result<(Value, Value)> {
    let weight_value = weight.map(Value::of);
    let out = rms_norm_forward(x.tensor(), added.map(Value::tensor), weight, eps)?;
    let targets = [Some(x), added].map(|x| x.map(Value::target));
    let weight_target = weight_value.as_ref().map(Value::target);
    let trained = weight_target.as_ref().is_some_and(Target::is_wanted);
    let inputs: Vec<&Value> =
        [Some(x), added, weight_value.as_ref()].into_iter().flatten().collect();
    let (sum, inverse) = (out.sum.clone(), out.inverse);
    let weight = weight.map(Tensor::detach);
    let mut values = record(&inputs, vec![out.sum, out.out], move |mut douts, gradients| {
        let (dout, dsum) = (douts.pop().flatten(), douts.pop().flatten());
        let dx = match (dout, dsum) {
            (Some(dout), dsum) => {
                let kept = (&sum, &inverse);
                let out = rms_norm_backward(kept, weight.as_ref(), &dout, dsum.as_ref(), trained)?;
                if let (Some(target), Some(dweight)) = (weight_target, out.dweight) {
                    gradients.give(&target, dweight)?;
                }
                out.dx
            }
            (None, Some(dsum)) => dsum,
            (None, None) => return Ok(()),
        };
        for target in targets.iter().flatten() {
            gradients.give(target, dx.clone())?;
        }
        Ok(())
    });
    let normed = values.remove(1);
    Ok((values.remove(0), normed))
}

/// a + b of one shape.
///
/// # Errors
/// If the shapes differ.
pub fn add(a: &Value, b: &Value) -> Result<Value> {
    let targets = [a.target(), b.target()];
    Ok(record_one(&[a, b], (a.tensor() + b.tensor())?, move |gradient, gradients| {
        targets.iter().try_for_each(|target| gradients.give(target, gradient.clone()))
    }))
}

/// x (n, c) + bias (c), which may be a variable.
///
/// # Errors
/// If the shapes or types do not fit.
pub fn add_bias(x: &Value, bias: &Tensor) -> Result<Value> {
    let bias = Value::of(bias);
    let targets = [x.target(), bias.target()];
    let out = x.tensor().broadcast_add(bias.tensor())?;
    Ok(record_one(&[x, &bias], out, move |gradient, gradients| {
        let [to_x, to_bias] = &targets;
        if to_bias.is_wanted() {
            gradients.give(to_bias, sum_rows(&gradient)?)?;
        }
        gradients.give(to_x, gradient)
    }))
}

/// Σ over the rows of x (n, c), f32: (c). A product with ones: in one pass, and in an order of its own at every size.
fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones((1, x.dim(0)?), x.dtype(), x.device())?;
    let options = ProductOptions { dtype: Some(DType::F32), ..ProductOptions::default() };
    product(&ones, x, options)?.squeeze(0)
}

/// silu(x + bias): x (n, c), bias (c), which may be a variable.
///
/// # Errors
/// As [`elementwise::silu_bias`].
pub fn silu_bias(x: &Value, bias: &Tensor) -> Result<Value> {
    let bias = Value::of(bias);
    let out = elementwise::silu_bias(x.tensor(), bias.tensor())?;
    let (input, offset) = (x.tensor().clone(), bias.tensor().clone());
    let targets = [x.target(), bias.target()];
    Ok(record_one(&[x, &bias], out, move |gradient, gradients| {
        let [to_x, to_bias] = &targets;
        let dx = elementwise::silu_bias_backward(&input, &offset, &gradient)?;
        if to_bias.is_wanted() {
            gradients.give(to_bias, sum_rows(&dx)?)?;
        }
        gradients.give(to_x, dx)
    }))
}

/// silu(gate) · up.
///
/// # Errors
/// As [`elementwise::silu_mul`].
pub fn silu_mul(gate: &Value, up: &Value) -> Result<Value> {
    let out = elementwise::silu_mul(gate.tensor(), up.tensor())?;
    let targets = [gate.target(), up.target()];
    let (g, u) = (gate.tensor().clone(), up.tensor().clone());
    Ok(record_one(&[gate, up], out, move |gradient, gradients| {
        let (dgate, dup) = elementwise::silu_mul_backward(&g, &u, &gradient)?;
        gradients.give(&targets[0], dgate)?;
        gradients.give(&targets[1], dup)
    }))
}

/// x in another shape.
///
/// # Errors
/// If the numbers of elements differ.
pub fn reshape(x: &Value, shape: impl Into<Shape>) -> Result<Value> {
    let (before, target) = (x.tensor().shape().clone(), x.target());
    Ok(record_one(&[x], x.tensor().reshape(shape.into())?, move |gradient, gradients| {
        gradients.give(&target, gradient.reshape(before)?)
    }))
}

/// x in another type.
///
/// # Errors
/// If candle does not convert it.
pub fn cast(x: &Value, dtype: DType) -> Result<Value> {
    if x.tensor().dtype() == dtype {
        return Ok(x.clone());
    }
    let (before, target) = (x.tensor().dtype(), x.target());
    Ok(record_one(&[x], x.tensor().to_dtype(dtype)?, move |gradient, gradients| {
        gradients.give(&target, gradient.to_dtype(before)?)
    }))
}

/// Vectors end to end.
///
/// # Errors
/// If a value is no vector.
pub fn concat(parts: &[&Value]) -> Result<Value> {
    let tensors: Vec<&Tensor> = parts.iter().map(|part| part.tensor()).collect();
    let targets: Vec<(Target, usize)> = parts
        .iter()
        .map(|part| Ok((part.target(), part.tensor().dims1()?)))
        .collect::<Result<_>>()?;
    Ok(record_one(parts, Tensor::cat(&tensors, 0)?, move |gradient, gradients| {
        let mut start = 0;
        for (target, len) in targets {
            gradients.give(&target, gradient.narrow(0, start, len)?)?;
            start += len;
        }
        Ok(())
    }))
}

/// x (t, h, d) rotated to the positions of `angles`.
///
/// # Errors
/// As [`rotate`].
pub fn rotated(x: &Value, angles: &RotaryAngles) -> Result<Value> {
    let (target, angles_back) = (x.target(), angles.clone());
    Ok(record_one(&[x], rotate(x.tensor(), angles)?, move |gradient, gradients| {
        gradients.give(&target, rotate_back(&gradient, &angles_back)?)
    }))
}

/// Attention with gradients for q, k and v.
///
/// # Errors
/// As [`attention_forward`].
pub fn attention(q: &Value, k: &Value, v: &Value, params: &DenseAttentionParams) -> Result<Value> {
    let [q_in, k_in, v_in] = [q, k, v].map(|x| x.tensor().clone());
    let (out, lse) = attention_forward(&q_in, &k_in, &v_in, params)?;
    let (kept, params) = (out.clone(), *params);
    let targets = [q, k, v].map(Value::target);
    Ok(record_one(&[q, k, v], out, move |dout, gradients| {
        let (dq, dk, dv) =
            attention_backward(&q_in, &k_in, &v_in, &kept, &lse, &dout, None, &params)?;
        for (target, gradient) in targets.iter().zip([dq, dk, dv]) {
            gradients.give(target, gradient)?;
        }
        Ok(())
    }))
}

/// What [`route`] reads beside kv and logits; each may be a variable but the state.
#[derive(Debug, Clone, Copy)]
pub struct RouteRest<'a> {
    /// (b, m, 2, g, d), f32.
    pub state: &'a Tensor,
    /// (1), f32.
    pub gate: &'a Tensor,
    /// (2, g, d), f32.
    pub bias: Option<&'a Value>,
    /// (d), f32.
    pub norm: Option<&'a Value>,
}

/// FastMKA's keys and values of projected ones: kv (b, t, 2, g, d), logits (b, t, 1 + m) -> (b, t, g, d) each.
///
/// # Errors
/// As [`route_forward`].
pub fn route(
    kv: &Value,
    logits: &Value,
    rest: RouteRest<'_>,
    params: &RouteParams<'_>,
) -> Result<(Value, Value)> {
    let gate = Value::of(rest.gate);
    let tensors = [kv.tensor(), logits.tensor(), rest.state, gate.tensor()].map(Tensor::detach);
    let small = [rest.bias, rest.norm].map(|x| x.map(|x| x.tensor().clone()));
    let (outputs, carries) = route_forward(&route_inputs(&tensors, &small), params)?;
    let inputs: Vec<&Value> =
        [Some(kv), Some(logits), Some(&gate), rest.bias, rest.norm].into_iter().flatten().collect();
    let targets = [kv.target(), logits.target(), gate.target()];
    let small_targets = [rest.bias, rest.norm].map(|x| x.map(Value::target));
    let (rates, seen) = (params.rates.to_vec(), params.seen);
    let (bias_correction, eps, angles) =
        (params.bias_correction, params.eps, params.angles.clone());
    let results = vec![outputs.keys.clone(), outputs.values.clone()];
    let mut values = record(&inputs, results, move |mut douts, gradients| {
        let like = |gradient: Option<Tensor>, x: &Tensor| match gradient {
            Some(gradient) => Ok(gradient),
            None => x.zeros_like(),
        };
        let dvalues = like(douts.pop().flatten(), &outputs.values)?;
        let dkeys = like(douts.pop().flatten(), &outputs.keys)?;
        let params = RouteParams { rates: &rates, seen, bias_correction, eps, angles: &angles };
        let out =
            route_backward(&route_inputs(&tensors, &small), &params, &carries, &dkeys, &dvalues)?;
        for (target, gradient) in targets.iter().zip([out.kv, out.logits, out.gate]) {
            gradients.give(target, gradient)?;
        }
        for (target, gradient) in small_targets.iter().zip([out.bias, out.norm]) {
            if let (Some(target), Some(gradient)) = (target, gradient) {
                gradients.give(target, gradient)?;
            }
        }
        Ok(())
    });
    let second = values.remove(1);
    Ok((values.remove(0), second))
}

fn route_inputs<'a>(
    [kv, logits, state, gate]: &'a [Tensor; 4],
    [bias, norm]: &'a [Option<Tensor>; 2],
) -> RouteInputs<'a> {
    RouteInputs { kv, logits, state, gate, bias: bias.as_ref(), norm: norm.as_ref() }
}
