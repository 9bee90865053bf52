//! The projected route on the CPU, in f32, token by token: a thread a stream of the batch.
//! Knows no tensors.

use super::{Numbers, RouteShape};
use rayon::prelude::*;

/// The numbers of one call.
pub(super) struct Problem<'a> {
    pub(super) shape: RouteShape,
    pub(super) numbers: &'a Numbers,
    pub(super) gate: f32,
    /// (2, g, d), or empty.
    pub(super) bias: &'a [f32],
    /// (d), or empty.
    pub(super) norm: &'a [f32],
}

/// Gradients in the layouts of the inputs; `small` is state, bias, norm and gate, as far as they are there.
pub(super) struct Gradients {
    pub(super) kv: Vec<f32>,
    pub(super) logits: Vec<f32>,
    pub(super) small: Vec<f32>,
}

/// Gradients of one stream.
struct StreamGradients {
    state: Vec<f32>,
    bias: Vec<f32>,
    norm: Vec<f32>,
    gate: f32,
}

/// One token's share of each level: λ, and the factor that the bias correction puts on the EMA.
struct Weights {
    lambda: Vec<f32>,
    factor: Vec<f32>,
}

impl Problem<'_> {
    fn weights(&self, logits: &[f32], t: usize) -> Weights {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut lambda: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
        let sum: f32 = lambda.iter().sum();
        lambda.iter_mut().for_each(|x| *x /= sum);
        let factor = |rate: &f32| match self.numbers.bias_correction {
            true => super::super::correction(*rate, self.numbers.seen + t as u64 + 1) as f32,
            false => 1.0,
        };
        Weights { lambda, factor: self.numbers.rates.iter().map(factor).collect() }
    }

    /// y = x + gate Σ λ_l (factor_l e_l - x) + bias, a token's row.
    fn mix(&self, x: &[f32], e: &[f32], weights: &Weights, y: &mut [f32]) {
        let c = x.len();
        let moved: f32 = weights.lambda[1..].iter().sum();
        let own = 1.0 - self.gate * moved;
        match self.bias.is_empty() {
            true => y.fill(0.0),
            false => y.copy_from_slice(self.bias),
        }
        y.iter_mut().zip(x).for_each(|(y, x)| *y += own * x);
        for (l, e) in e.chunks_exact(c).enumerate() {
            let weight = self.gate * weights.lambda[l + 1] * weights.factor[l];
            y.iter_mut().zip(e).for_each(|(y, e)| *y += weight * e);
        }
    }

    /// 1 / rms of a head.
    fn inverse_rms(&self, head: &[f32]) -> f32 {
        let mean = head.iter().map(|x| x * x).sum::<f32>() / head.len() as f32;
        1.0 / (mean + self.numbers.eps).sqrt()
    }

    /// Turns the heads of a token by its angles; backwards for `sign` -1.
    fn rotate(&self, t: usize, heads: &mut [f32], sign: f32) {
        let half = self.numbers.angles.half();
        let (cos, sin) = self.numbers.angles.at(t);
        for head in heads.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for j in 0..half {
                let (a, b, s) = (low[j], high[j], sign * sin[j]);
                low[j] = a * cos[j] - b * s;
                high[j] = b * cos[j] + a * s;
            }
        }
    }

    /// Keys and values (2, b, t, g, d) and the state after the last token; with `raw`, (b, t, g, d), also the keys
    /// before the rotation.
    pub(super) fn forward(
        &self,
        kv: &[f32],
        logits: &[f32],
        state: &[f32],
        raw: Option<&mut [f32]>,
    ) -> (Vec<f32>, Vec<f32>) {
        let RouteShape { t, g, d, m, .. } = self.shape;
        let (c, keys_len) = (self.shape.channels(), g * d);
        let mut out = vec![0f32; kv.len()];
        let mut state = state.to_vec();
        let (keys, values) = out.split_at_mut(kv.len() / 2);
        let mut no_raw = Vec::new();
        let raw = match raw {
            Some(raw) => raw,
            None => {
                no_raw.resize(keys.len(), 0.0);
                &mut no_raw[..]
            }
        };
        keys.par_chunks_mut(t * keys_len)
            .zip(values.par_chunks_mut(t * keys_len))
            .zip(raw.par_chunks_mut(t * keys_len))
            .zip(state.par_chunks_mut(m * c))
            .enumerate()
            .for_each(|(b, (((keys, values), raw), e))| {
                let mut y = vec![0f32; c];
                for i in 0..t {
                    let token = b * t + i;
                    let x = &kv[token * c..][..c];
                    super::super::advance(x, e, &self.numbers.rates);
                    let weights = self.weights(&logits[token * (m + 1)..][..m + 1], i);
                    self.mix(x, e, &weights, &mut y);
                    if !self.norm.is_empty() {
                        for head in y[..keys_len].chunks_exact_mut(d) {
                            let scale = self.inverse_rms(head);
                            head.iter_mut().zip(self.norm).for_each(|(x, w)| *x *= scale * w);
                        }
                    }
                    let at = i * keys_len..(i + 1) * keys_len;
                    raw[at.clone()].copy_from_slice(&y[..keys_len]);
                    values[at.clone()].copy_from_slice(&y[keys_len..]);
                    keys[at.clone()].copy_from_slice(&y[..keys_len]);
                    self.rotate(i, &mut keys[at], 1.0);
                }
            });
        (out, state)
    }

    /// Gradients from `dout` (2, b, t, g, d).
    pub(super) fn backward(
        &self,
        kv: &[f32],
        logits: &[f32],
        state: &[f32],
        dout: &[f32],
    ) -> Gradients {
        let RouteShape { t, m, .. } = self.shape;
        let c = self.shape.channels();
        let mut dkv = vec![0f32; kv.len()];
        let mut dlogits = vec![0f32; logits.len()];
        let streams: Vec<StreamGradients> = dkv
            .par_chunks_mut(t * c)
            .zip(dlogits.par_chunks_mut(t * (m + 1)))
            .enumerate()
            .map(|(b, (dkv, dlogits))| {
                let inputs = (
                    &kv[b * t * c..][..t * c],
                    &logits[b * t * (m + 1)..][..t * (m + 1)],
                    &state[b * m * c..][..m * c],
                );
                let half = t * c / 2;
                let dkeys = &dout[b * half..][..half];
                let dvalues = &dout[dout.len() / 2 + b * half..][..half];
                self.backward_stream(inputs, (dkeys, dvalues), dkv, dlogits)
            })
            .collect();
        let mut small: Vec<f32> = streams.iter().flat_map(|s| s.state.iter().copied()).collect();
        let mut add = |part: fn(&StreamGradients) -> &[f32]| {
            let mut sum = vec![0f32; streams.first().map_or(0, |stream| part(stream).len())];
            for stream in &streams {
                sum.iter_mut().zip(part(stream)).for_each(|(a, b)| *a += b);
            }
            small.extend(sum);
        };
        add(|s| &s.bias);
        add(|s| &s.norm);
        add(|s| std::slice::from_ref(&s.gate));
        Gradients { kv: dkv, logits: dlogits, small }
    }

    fn backward_stream(
        &self,
        (kv, logits, state): (&[f32], &[f32], &[f32]),
        (dkeys, dvalues): (&[f32], &[f32]),
        dkv: &mut [f32],
        dlogits: &mut [f32],
    ) -> StreamGradients {
        let RouteShape { t, g, d, m, .. } = self.shape;
        let (c, keys_len) = (self.shape.channels(), g * d);
        // The EMA after every token: (t, m, c).
        let mut history = Vec::with_capacity(t * m * c);
        let mut e = state.to_vec();
        for x in kv.chunks_exact(c) {
            super::super::advance(x, &mut e, &self.numbers.rates);
            history.extend_from_slice(&e);
        }
        let mut gradients = StreamGradients {
            state: vec![0f32; m * c],
            bias: vec![0f32; self.bias.len()],
            norm: vec![0f32; self.norm.len()],
            gate: 0.0,
        };
        // What reaches the EMA of the token at hand from the tokens after it: (m, c).
        let a = &mut gradients.state;
        let (mut y, mut dy) = (vec![0f32; c], vec![0f32; c]);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        for i in (0..t).rev() {
            let (x, e) = (&kv[i * c..][..c], &history[i * m * c..][..m * c]);
            let weights = self.weights(&logits[i * (m + 1)..][..m + 1], i);
            dy[..keys_len].copy_from_slice(&dkeys[i * keys_len..][..keys_len]);
            dy[keys_len..].copy_from_slice(&dvalues[i * keys_len..][..keys_len]);
            self.rotate(i, &mut dy[..keys_len], -1.0);
            if !self.norm.is_empty() {
                self.mix(x, e, &weights, &mut y);
                for (y, dy) in y[..keys_len].chunks_exact(d).zip(dy.chunks_exact_mut(d)) {
                    let scale = self.inverse_rms(y);
                    for ((norm, y), dy) in gradients.norm.iter_mut().zip(y).zip(dy.iter_mut()) {
                        *norm += *dy * scale * y;
                    }
                    dy.iter_mut().zip(self.norm).for_each(|(dy, w)| *dy *= w);
                    let mean = dot(dy, y) * scale * scale / d as f32;
                    dy.iter_mut().zip(y).for_each(|(dy, y)| *dy = scale * (*dy - mean * y));
                }
            }
            gradients.bias.iter_mut().zip(&dy).for_each(|(sum, dy)| *sum += dy);

            let (lambda, dlogits) = (&weights.lambda, &mut dlogits[i * (m + 1)..][..m + 1]);
            let own = dot(x, &dy);
            let dx = &mut dkv[i * c..][..c];
            let kept = 1.0 - self.gate * lambda[1..].iter().sum::<f32>();
            dx.iter_mut().zip(&dy).for_each(|(dx, dy)| *dx = kept * dy);
            for l in 0..m {
                let slope = weights.factor[l] * dot(&e[l * c..][..c], &dy) - own;
                gradients.gate += lambda[l + 1] * slope;
                dlogits[l + 1] = self.gate * slope;
                let (rate, weight) =
                    (self.numbers.rates[l], self.gate * lambda[l + 1] * weights.factor[l]);
                for ((a, dy), dx) in a[l * c..][..c].iter_mut().zip(&dy).zip(dx.iter_mut()) {
                    let reached = *a + weight * dy;
                    *dx += (1.0 - rate) * reached;
                    *a = rate * reached;
                }
            }
            let mean = dot(lambda, dlogits);
            dlogits.iter_mut().zip(lambda).for_each(|(dl, lambda)| *dl = lambda * (*dl - mean));
        }
        gradients
    }
}
