//! Dense attention and its gradients by their definitions.
//! Knows nothing of tiles, types or devices.

use crate::DenseAttentionParams;

/// [`crate::attention_forward`]: (out, lse) of shapes (b, tq, h, d) and (b, h, tq).
///
/// Shapes, row-major: `q` (b, tq, h, d); `k`, `v` (b, tk, g, d); the last argument but one is [b, tq, tk, h, g, d].
pub fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    shape: [usize; 6],
    params: &DenseAttentionParams,
) -> (Vec<f64>, Vec<f64>) {
    let [b, tq, tk, h, g, d] = shape;
    let mut out = vec![0f64; b * tq * h * d];
    let mut lse = vec![f64::NEG_INFINITY; b * h * tq];
    for row in rows(b, tq, h) {
        let query = &q[row.at(tq, h) * d..][..d];
        let keys: Vec<usize> = (0..tk).filter(|j| sees(row.i, *j, tq, tk, params)).collect();
        let score = |j: &usize| dot(query, &k[row.key(*j, tk, h, g) * d..][..d], params);
        let scores: Vec<f64> = keys.iter().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        for (j, score) in keys.iter().zip(&scores) {
            let weight = (score - max).exp() / sum;
            for x in 0..d {
                out[row.at(tq, h) * d + x] += weight * v[row.key(*j, tk, h, g) * d + x];
            }
        }
        if !keys.is_empty() {
            lse[row.lse(tq, h)] = max + sum.ln();
        }
    }
    (out, lse)
}

/// [`crate::attention_backward`]: (dq, dk, dv) of the shapes of q, k and v.
///
/// Shapes as in [`attention`]; `dout` (b, tq, h, d), `dlse` (b, h, tq).
pub fn attention_backward(
    [q, k, v]: [&[f64]; 3],
    dout: &[f64],
    dlse: Option<&[f64]>,
    shape: [usize; 6],
    params: &DenseAttentionParams,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let [b, tq, tk, h, g, d] = shape;
    let (out, lse) = attention(q, k, v, shape, params);
    let (mut dq, mut dk, mut dv) = (vec![0f64; q.len()], vec![0f64; k.len()], vec![0f64; v.len()]);
    for row in rows(b, tq, h) {
        let at = row.at(tq, h) * d;
        let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let delta = product(&out[at..at + d], &dout[at..at + d])
            - dlse.map_or(0.0, |dlse| dlse[row.lse(tq, h)]);
        for j in (0..tk).filter(|j| sees(row.i, *j, tq, tk, params)) {
            let key = row.key(j, tk, h, g) * d;
            let score = dot(&q[at..at + d], &k[key..key + d], params);
            let weight = (score - lse[row.lse(tq, h)]).exp();
            let dscore = weight * (product(&dout[at..at + d], &v[key..key + d]) - delta);
            for x in 0..d {
                dv[key + x] += weight * dout[at + x];
                dk[key + x] += dscore * f64::from(params.scale) * q[at + x];
                dq[at + x] += dscore * f64::from(params.scale) * k[key + x];
            }
        }
    }
    (dq, dk, dv)
}

/// One query row: batch, token, head.
struct Row {
    batch: usize,
    i: usize,
    head: usize,
}

impl Row {
    /// Index of the row in (b, tq, h).
    fn at(&self, tq: usize, h: usize) -> usize {
        (self.batch * tq + self.i) * h + self.head
    }

    /// Index of the row in (b, h, tq).
    fn lse(&self, tq: usize, h: usize) -> usize {
        (self.batch * h + self.head) * tq + self.i
    }

    /// Index in (b, tk, g) of key `j` for this row's head.
    fn key(&self, j: usize, tk: usize, h: usize, g: usize) -> usize {
        (self.batch * tk + j) * g + self.head / (h / g)
    }
}

fn rows(b: usize, tq: usize, h: usize) -> impl Iterator<Item = Row> {
    (0..b * tq * h).map(move |at| Row { batch: at / (tq * h), i: at / h % tq, head: at % h })
}

fn sees(i: usize, j: usize, tq: usize, tk: usize, params: &DenseAttentionParams) -> bool {
    let (position, key) = ((i + tk) as i64 - tq as i64, j as i64);
    let causal = params.causal || params.window.is_some();
    (!causal || key <= position)
        && params.window.is_none_or(|w| key > position - w.min(1 << 40) as i64)
}

fn dot(query: &[f64], key: &[f64], params: &DenseAttentionParams) -> f64 {
    query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * f64::from(params.scale)
}
