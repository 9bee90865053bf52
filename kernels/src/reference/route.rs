//! FastMKA's scan and the fused route in plain f64 loops.
//! Knows nothing of chunks.

/// [`crate::ema_scan`] of one stream: (levels (t, m, c), state (m, c)).
///
/// Shapes: `x` (t, c), `state` (m, c).
pub fn ema_scan(
    x: &[f64],
    state: &[f64],
    rates: &[f64],
    seen: u64,
    bias_correction: bool,
) -> (Vec<f64>, Vec<f64>) {
    let c = state.len() / rates.len();
    let mut state = state.to_vec();
    let mut levels = Vec::with_capacity(x.len() * rates.len());
    for (t, row) in x.chunks_exact(c).enumerate() {
        for (rate, e) in rates.iter().zip(state.chunks_exact_mut(c)) {
            let factor = match bias_correction {
                true => 1.0 / (1.0 - rate.powf((seen + t as u64 + 1) as f64)),
                false => 1.0,
            };
            for (e, x) in e.iter_mut().zip(row) {
                *e = rate * *e + (1.0 - rate) * x;
                levels.push(*e * factor);
            }
        }
    }
    (levels, state)
}

/// What [`route`] reads beside the tokens.
#[derive(Debug, Clone)]
pub struct RouteInputs {
    /// Scale of the mix.
    pub gate: f64,
    /// (m).
    pub rates: Vec<f64>,
    /// (2, g, d), or empty.
    pub bias: Vec<f64>,
    /// (d), or empty: no norm.
    pub norm: Vec<f64>,
    /// Under the root of the norm.
    pub eps: f64,
    /// (t, d/2).
    pub cosine: Vec<f64>,
    /// (t, d/2).
    pub sine: Vec<f64>,
    /// Tokens before the first.
    pub seen: u64,
    /// Whether levels are divided by 1 - b^n.
    pub bias_correction: bool,
}

/// What [`route`] returns.
#[derive(Debug, Clone)]
pub struct RouteOutputs {
    /// (t, g, d), rotated.
    pub keys: Vec<f64>,
    /// (t, g, d), before the rotation.
    pub raw_keys: Vec<f64>,
    /// (t, g, d).
    pub values: Vec<f64>,
    /// (m, 2, g, d).
    pub state: Vec<f64>,
}

/// The fused route of one stream by its definition.
///
/// Shapes: `kv` (t, 2, g, d), `logits` (t, 1 + m), `state` (m, 2, g, d).
pub fn route(
    kv: &[f64],
    logits: &[f64],
    state: &[f64],
    (t, g, d): (usize, usize, usize),
    inputs: &RouteInputs,
) -> RouteOutputs {
    let (m, c) = (inputs.rates.len(), 2 * g * d);
    let (levels, state) = ema_scan(kv, state, &inputs.rates, inputs.seen, inputs.bias_correction);
    let mut out = RouteOutputs { keys: vec![], raw_keys: vec![], values: vec![], state };
    for i in 0..t {
        let logits = &logits[i * (m + 1)..][..m + 1];
        let max = logits.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        let mut row: Vec<f64> = kv[i * c..][..c].to_vec();
        for (j, x) in row.iter_mut().enumerate() {
            let shift: f64 = (0..m)
                .map(|l| {
                    let weight = (logits[l + 1] - max).exp() / sum;
                    weight * (levels[(i * m + l) * c + j] - *x)
                })
                .sum();
            *x += inputs.gate * shift;
            if !inputs.bias.is_empty() {
                *x += inputs.bias[j];
            }
        }
        let (keys, values) = row.split_at_mut(g * d);
        for head in keys.chunks_exact_mut(d) {
            if !inputs.norm.is_empty() {
                let mean = head.iter().map(|x| x * x).sum::<f64>() / d as f64;
                let scale = 1.0 / (mean + inputs.eps).sqrt();
                for (x, weight) in head.iter_mut().zip(&inputs.norm) {
                    *x *= scale * weight;
                }
            }
            out.raw_keys.extend_from_slice(head);
            let half = d / 2;
            let rotated = |j: usize| {
                let k = j % half;
                let (c, s) = (inputs.cosine[i * half + k], inputs.sine[i * half + k]);
                let (low, high) = (head[k], head[k + half]);
                if j < half { low * c - high * s } else { high * c + low * s }
            };
            out.keys.extend((0..d).map(rotated));
        }
        out.values.extend_from_slice(values);
    }
    out
}
