//! Dense attention and its gradients against their f64 definitions, over a grid of shapes and masks.

use candle_core::{DType, Device, Result, Tensor, Var};
use half::{bf16, f16};
use mka_kernels::{
    DenseAttentionParams, attention, attention_backward, attention_forward, reference,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Shape [b, tq, tk, h, g, d] and mask of one call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) shape: [usize; 6],
    pub(crate) causal: bool,
    pub(crate) window: Option<usize>,
}

/// Every mask, group size and alignment of queries to keys that a kernel must tell apart, for head_dim `d`s in turn.
pub(crate) const CASES: &[Case] = &[
    full([1, 1, 1, 1, 1, 64]),
    causal([2, 77, 77, 3, 1, 64]),
    causal([1, 200, 200, 4, 1, 128]),
    full([1, 129, 129, 7, 1, 64]),
    causal([1, 1, 77, 8, 1, 128]),
    full([3, 1, 77, 4, 4, 96]),
    causal([2, 33, 130, 4, 4, 96]),
    full([1, 33, 130, 3, 3, 256]),
    causal([1, 260, 260, 2, 1, 256]),
    causal([1, 100, 140, 2, 2, 128]),
    // Queries before the first key: their rows see nothing.
    causal([1, 130, 33, 2, 2, 64]),
    causal([1, 70, 33, 2, 1, 256]),
    full([1, 150, 33, 2, 1, 128]),
    // Windows smaller than a tile, of several tiles, larger than the sequence, and empty.
    windowed([1, 300, 300, 2, 1, 64], 17),
    windowed([1, 300, 300, 2, 1, 128], 100),
    windowed([1, 190, 300, 2, 1, 64], 129),
    windowed([1, 200, 200, 2, 2, 96], 1000),
    windowed([1, 150, 150, 2, 1, 256], 40),
    windowed([1, 9, 9, 1, 1, 64], 0),
    // No query, no key, no batch.
    causal([1, 0, 5, 2, 1, 64]),
    causal([1, 5, 0, 2, 1, 64]),
    causal([0, 5, 5, 2, 1, 128]),
];

const fn full(shape: [usize; 6]) -> Case {
    Case { shape, causal: false, window: None }
}

const fn causal(shape: [usize; 6]) -> Case {
    Case { shape, causal: true, window: None }
}

const fn windowed(shape: [usize; 6], window: usize) -> Case {
    Case { shape, causal: true, window: Some(window) }
}

/// `x` rounded to `dtype` and back.
pub(crate) fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Inputs of a case, exact in `dtype`.
pub(crate) struct Inputs {
    pub(crate) params: DenseAttentionParams,
    shape: [usize; 6],
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    pub(crate) dout: Vec<f32>,
    pub(crate) dlse: Vec<f32>,
}

impl Inputs {
    pub(crate) fn new(case: &Case, dtype: DType) -> Self {
        let [b, tq, tk, h, g, d] = case.shape;
        let mut rng = ChaCha8Rng::seed_from_u64((tq * 1000 + tk + d) as u64);
        let mut random =
            |n| (0..n).map(|_| rounded(rng.random_range(-1.5f32..1.5), dtype)).collect::<Vec<_>>();
        Self {
            params: DenseAttentionParams {
                // Twice the usual scale: sharper rows, so that a wrong mask or maximum shows.
                scale: 2.0 / (d as f32).sqrt(),
                causal: case.causal,
                window: case.window,
            },
            shape: case.shape,
            q: random(b * tq * h * d),
            k: random(b * tk * g * d),
            v: random(b * tk * g * d),
            dout: random(b * tq * h * d),
            dlse: random(b * h * tq),
        }
    }

    /// (q, k, v, dout, dlse) as tensors: dlse in f32, the others in `dtype`.
    pub(crate) fn tensors(&self, dtype: DType, device: &Device) -> Result<[Tensor; 5]> {
        let [b, tq, tk, h, g, d] = self.shape;
        let tensor = |values: &[f32], shape: (usize, usize, usize, usize)| {
            Tensor::from_slice(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
        };
        Ok([
            tensor(&self.q, (b, tq, h, d))?,
            tensor(&self.k, (b, tk, g, d))?,
            tensor(&self.v, (b, tk, g, d))?,
            tensor(&self.dout, (b, tq, h, d))?,
            Tensor::from_slice(&self.dlse, (b, h, tq), &Device::Cpu)?.to_device(device)?,
        ])
    }

    /// The f64 results on these inputs: [out, lse, dq, dk, dv].
    pub(crate) fn expected(&self) -> [Vec<f64>; 5] {
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let (q, k, v) = (wide(&self.q), wide(&self.k), wide(&self.v));
        let (out, lse) = reference::attention(&q, &k, &v, self.shape, &self.params);
        let (dq, dk, dv) = reference::attention_backward(
            [&q, &k, &v],
            &wide(&self.dout),
            Some(&wide(&self.dlse)),
            self.shape,
            &self.params,
        );
        [out, lse, dq, dk, dv]
    }

    /// The same in f32, with the probabilities, dS and the results rounded to `dtype`: what low precision costs at least.
    pub(crate) fn plain(&self, dtype: DType) -> [Vec<f64>; 5] {
        let [b, tq, tk, h, g, d] = self.shape;
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
        let (scale, window) = (self.params.scale, self.params.window);
        let mut out = vec![0f32; self.q.len()];
        let mut lse = vec![f32::NEG_INFINITY; b * h * tq];
        let mut dq = vec![0f32; self.q.len()];
        let (mut dk, mut dv) = (vec![0f32; self.k.len()], vec![0f32; self.k.len()]);
        for (batch, i, head) in (0..b * tq * h).map(|at| (at / (tq * h), at / h % tq, at % h)) {
            let (at, stat) = (((batch * tq + i) * h + head) * d, (batch * h + head) * tq + i);
            let (query, dout) = (&self.q[at..at + d], &self.dout[at..at + d]);
            let position = (i + tk) as i64 - tq as i64;
            let sees = |j: usize| {
                let after = j as i64 - position;
                !(self.params.causal && after > 0) && window.is_none_or(|w| after > -(w as i64))
            };
            let keys: Vec<(usize, f32)> = (0..tk)
                .filter(|j| sees(*j))
                .map(|j| ((batch * tk + j) * g + head / (h / g)) * d)
                .map(|key| (key, dot(query, &self.k[key..key + d]) * scale))
                .collect();
            if keys.is_empty() {
                continue;
            }
            let max = keys.iter().fold(f32::NEG_INFINITY, |max, (_, s)| max.max(*s));
            let sum: f32 = keys.iter().map(|(_, s)| (s - max).exp()).sum();
            lse[stat] = max + sum.ln();
            for (key, score) in &keys {
                let weight = rounded((score - max).exp() / sum, dtype);
                for x in 0..d {
                    out[at + x] += weight * self.v[key + x];
                }
            }
            out[at..at + d].iter_mut().for_each(|x| *x = rounded(*x, dtype));
            let delta = dot(&out[at..at + d], dout) - self.dlse[stat];
            for (key, score) in keys {
                let weight = (score - lse[stat]).exp();
                let dscore = weight * (dot(dout, &self.v[key..key + d]) - delta);
                let (weight, dscore) = (rounded(weight, dtype), rounded(dscore, dtype) * scale);
                for x in 0..d {
                    dv[key + x] += weight * dout[x];
                    dk[key + x] += dscore * query[x];
                    dq[at + x] += dscore * self.k[key + x];
                }
            }
        }
        let round = |x: Vec<f32>| x.iter().map(|x| f64::from(rounded(*x, dtype))).collect();
        let lse = lse.into_iter().map(f64::from).collect();
        [round(out), lse, round(dq), round(dk), round(dv)]
    }
}

/// Largest and root-mean-square difference; equal infinities differ by 0.
pub(crate) fn errors(got: &[f64], expected: &[f64]) -> (f64, f64) {
    assert_eq!(got.len(), expected.len());
    let (mut max, mut squares) = (0f64, 0f64);
    for (a, b) in got.iter().zip(expected) {
        let difference = if a == b { 0.0 } else { (a - b).abs() };
        // A NaN stays: the comparison with it fails.
        max = if difference <= max { max } else { difference };
        squares += difference * difference;
    }
    (max, (squares / got.len().max(1) as f64).sqrt())
}

/// The elements of `x`, whatever its type and device.
pub(crate) fn elements(x: &Tensor) -> Result<Vec<f64>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()
}

/// Runs a case forward and backward and holds every result against twice the error of the plain version.
pub(crate) fn check(case: &Case, dtype: DType, device: &Device) -> Result<()> {
    let inputs = Inputs::new(case, dtype);
    let [q, k, v, dout, dlse] = inputs.tensors(dtype, device)?;
    let (out, lse) = attention_forward(&q, &k, &v, &inputs.params)?;
    assert_eq!((out.dtype(), lse.dtype()), (dtype, DType::F32));
    let (dq, dk, dv) =
        attention_backward(&q, &k, &v, &out, &lse, &dout, Some(&dlse), &inputs.params)?;
    assert_eq!((dq.shape(), dk.shape(), dv.shape()), (q.shape(), k.shape(), v.shape()));
    let (expected, plain) = (inputs.expected(), inputs.plain(dtype));
    let names = ["out", "lse", "dq", "dk", "dv"];
    for (i, got) in [&out, &lse, &dq, &dk, &dv].into_iter().enumerate() {
        let (max, rms) = errors(&elements(got)?, &expected[i]);
        let (plain_max, plain_rms) = errors(&plain[i], &expected[i]);
        // Of f32 sums in another order, and of the exponent unit, relative to the largest element.
        let size = expected[i].iter().filter(|x| x.is_finite()).fold(1f64, |m, x| m.max(x.abs()));
        let floor = 4e-6 * size;
        assert!(
            max <= 2.0 * plain_max + floor && rms <= 2.0 * plain_rms + floor,
            "{case:?} {dtype:?}: {}: max {max:.3e}, rms {rms:.3e}, expected twice {plain_max:.3e}, {plain_rms:.3e}",
            names[i]
        );
    }
    Ok(())
}

#[test]
fn dense_attention_and_its_gradients_equal_their_definition() -> Result<()> {
    for case in CASES {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            check(case, dtype, &Device::Cpu)?;
        }
    }
    Ok(())
}

#[test]
fn reference_gradients_of_dense_attention_are_finite_differences() {
    for case in [
        causal([2, 3, 4, 2, 1, 3]),
        full([1, 3, 2, 2, 2, 2]),
        windowed([1, 5, 5, 4, 2, 3], 2),
        causal([1, 4, 2, 1, 1, 3]),
    ] {
        let inputs = Inputs::new(&case, DType::F32);
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let (dout, dlse) = (wide(&inputs.dout), wide(&inputs.dlse));
        let loss = |x: &[Vec<f64>; 3]| {
            let (out, lse) = reference::attention(&x[0], &x[1], &x[2], case.shape, &inputs.params);
            let of_out: f64 = out.iter().zip(&dout).map(|(a, b)| a * b).sum();
            let seen = lse.iter().zip(&dlse).filter(|(lse, _)| lse.is_finite());
            of_out + seen.map(|(a, b)| a * b).sum::<f64>()
        };
        let x = [wide(&inputs.q), wide(&inputs.k), wide(&inputs.v)];
        let (dq, dk, dv) = reference::attention_backward(
            [&x[0], &x[1], &x[2]],
            &dout,
            Some(&dlse),
            case.shape,
            &inputs.params,
        );
        for (which, gradient) in [dq, dk, dv].iter().enumerate() {
            for at in 0..gradient.len() {
                let moved = |step: f64| {
                    let mut x = x.clone();
                    x[which][at] += step;
                    loss(&x)
                };
                let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                let error = (gradient[at] - expected).abs();
                assert!(error < 1e-7, "{case:?}: input {which} at {at}: {error:e}");
            }
        }
    }
}

/// Gradients of Σ out ∘ dout through candle's graph against those of the plain function.
pub(crate) fn check_graph(dtype: DType, device: &Device) -> Result<()> {
    let inputs = Inputs::new(&causal([2, 33, 70, 4, 2, 64]), dtype);
    let [q, k, v, dout, _] = inputs.tensors(dtype, device)?;
    let (q, k, v) = (Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?);
    let out = attention(&q, &k, &v, &inputs.params)?;
    let loss = (out.to_dtype(DType::F32)? * dout.to_dtype(DType::F32)?)?.sum_all()?;
    let grads = loss.backward()?;
    let (out, lse) = attention_forward(&q, &k, &v, &inputs.params)?;
    let (dq, dk, dv) = attention_backward(&q, &k, &v, &out, &lse, &dout, None, &inputs.params)?;
    for (name, var, expected) in [("dq", &q, dq), ("dk", &k, dk), ("dv", &v, dv)] {
        let got = grads.get(var).expect("a variable of the loss");
        let (max, _) = errors(&elements(got)?, &elements(&expected)?);
        // dq by atomics may round the other way.
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
        assert!(max <= tolerance, "{name} in {dtype:?}: {max}");
    }
    Ok(())
}

#[test]
fn gradients_through_the_graph_are_those_of_the_function() -> Result<()> {
    check_graph(DType::F32, &Device::Cpu)?;
    check_graph(DType::BF16, &Device::Cpu)
}

#[test]
fn strided_inputs_are_read_as_they_look() -> Result<()> {
    let inputs = Inputs::new(&causal([2, 9, 9, 2, 2, 64]), DType::F32);
    let [q, k, v, ..] = inputs.tensors(DType::F32, &Device::Cpu)?;
    let (expected, _) = attention_forward(&q, &k, &v, &inputs.params)?;
    let strided = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    let (got, _) = attention_forward(&strided(&q)?, &strided(&k)?, &strided(&v)?, &inputs.params)?;
    assert_eq!(elements(&expected)?, elements(&got)?);
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_refused_with_what_was_expected() -> Result<()> {
    let zeros = |h: usize, d: usize| Tensor::zeros((1, 4, h, d), DType::F32, &Device::Cpu);
    let params = DenseAttentionParams { scale: 0.1, causal: true, window: None };
    let refusal = |q: &Tensor, k: &Tensor, v: &Tensor, params: &DenseAttentionParams| {
        attention_forward(q, k, v, params).map(drop).expect_err("refused").to_string()
    };
    let (q, k) = (zeros(3, 64)?, zeros(2, 64)?);
    assert!(refusal(&q, &k, &k, &params).contains("expected a multiple"));
    assert!(refusal(&q, &q, &k, &params).contains("expected two of"));
    assert!(refusal(&q, &zeros(3, 32)?, &zeros(3, 32)?, &params).contains("expected two of"));
    let narrow = q.to_dtype(DType::BF16)?;
    assert!(refusal(&q, &narrow, &narrow, &params).contains("expected q's"));
    for scale in [0.0, -1.0, f32::NAN] {
        assert!(refusal(&q, &q, &q, &DenseAttentionParams { scale, ..params }).contains("scale"));
    }
    let lse = Tensor::zeros((1, 3, 5), DType::F32, &Device::Cpu)?;
    let wrong = attention_backward(&q, &q, &q, &q, &lse, &q, None, &params);
    assert!(wrong.map(drop).expect_err("refused").to_string().contains("lse"));
    Ok(())
}
