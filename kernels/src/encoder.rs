//! What a layer of a text encoder does beside its linear layers, on rows of f32: attention both ways, norm, GELU.
//! Knows no weight file and no tensor. Each call is one thread's: an encoder takes several texts at once instead.

use crate::simd::{self, LANES, multiversion};

/// Queries that go over the keys together: with their 16 sums each, 8 AVX2 registers.
const QUERIES: usize = 4;

/// softmax(q kᵀ / √d) v over one text, every token attending to all: qkv (t, 3, h, d), out (t, h, d), overwritten.
///
/// # Panics
/// If a length does not fit, or `heads` is 0.
pub fn attend_text(qkv: &[f32], heads: usize, head_dim: usize, out: &mut [f32]) {
    let hidden = heads * head_dim;
    assert!(heads > 0 && qkv.len() == 3 * out.len(), "queries, keys and values of every token");
    if out.is_empty() {
        return;
    }
    let t = out.len() / hidden;
    assert!(out.len() == t * hidden, "whole tokens");
    let (token_blocks, dim_blocks) = (t.div_ceil(LANES), head_dim.div_ceil(LANES));
    let mut room = HeadRoom {
        keys: vec![[0.0; LANES]; token_blocks * head_dim],
        values: vec![[0.0; LANES]; dim_blocks * t],
        queries: vec![[0.0; QUERIES]; head_dim],
        scores: vec![[0.0; LANES]; QUERIES * token_blocks],
        weights: vec![[0.0; QUERIES]; t],
    };
    for head in 0..heads {
        attend_head(qkv, (hidden, head * head_dim, head_dim), &mut room, out);
    }
}

/// What one head's attention is worked out in. Blocks are of [`LANES`], zeros beyond the last token or value.
pub(crate) struct HeadRoom {
    /// (blocks of tokens, d).
    keys: Vec<[f32; LANES]>,
    /// (blocks of d, t).
    values: Vec<[f32; LANES]>,
    /// (d).
    queries: Vec<[f32; QUERIES]>,
    /// (QUERIES, blocks of tokens).
    scores: Vec<[f32; LANES]>,
    /// (t).
    weights: Vec<[f32; QUERIES]>,
}

#[inline(always)]
fn attend_head_body(
    qkv: &[f32],
    (hidden, start, head_dim): (usize, usize, usize),
    room: &mut HeadRoom,
    out: &mut [f32],
) {
    let HeadRoom { keys, values, queries, scores, weights } = room;
    let (t, token_blocks) = (weights.len(), scores.len() / QUERIES);
    let scale = (head_dim as f32).powf(-0.5);
    let of_head = |token, part| &qkv[(3 * token + part) * hidden + start..][..head_dim];
    for token in 0..t {
        let block = &mut keys[token / LANES * head_dim..][..head_dim];
        for (keys, key) in block.iter_mut().zip(of_head(token, 1)) {
            keys[token % LANES] = *key;
        }
        for (block, own) in of_head(token, 2).chunks(LANES).enumerate() {
            values[block * t + token][..own.len()].copy_from_slice(own);
        }
    }
    for first in (0..t).step_by(QUERIES) {
        // The last query stands in where there are fewer.
        for r in 0..QUERIES {
            for (queries, query) in queries.iter_mut().zip(of_head((first + r).min(t - 1), 0)) {
                queries[r] = query * scale;
            }
        }
        for (block, keys) in keys.chunks_exact(head_dim).enumerate() {
            for (r, products) in products(queries, keys).into_iter().enumerate() {
                scores[r * token_blocks + block] = products;
            }
        }
        for (r, scores) in scores.chunks_exact_mut(token_blocks).enumerate() {
            softmax(scores, t);
            for (weights, score) in weights.iter_mut().zip(scores.as_flattened()) {
                weights[r] = *score;
            }
        }
        for (block, values) in values.chunks_exact(t).enumerate() {
            let from = block * LANES;
            let len = LANES.min(head_dim - from);
            let mixed = products(weights, values);
            for (r, mixed) in mixed.iter().enumerate().take(t - first) {
                out[(first + r) * hidden + start + from..][..len].copy_from_slice(&mixed[..len]);
            }
        }
    }
}

/// Σ over i of left[i][r] · right[i][lane].
#[inline(always)]
fn products(left: &[[f32; QUERIES]], right: &[[f32; LANES]]) -> [[f32; LANES]; QUERIES] {
    let mut sums = [[0.0f32; LANES]; QUERIES];
    for (left, right) in left.iter().zip(right) {
        for r in 0..QUERIES {
            for lane in 0..LANES {
                sums[r][lane] += left[r] * right[lane];
            }
        }
    }
    sums
}

/// Softmax over the first `t` values; those beyond become 0.
#[inline(always)]
fn softmax(scores: &mut [[f32; LANES]], t: usize) {
    scores.as_flattened_mut()[t..].fill(f32::NEG_INFINITY);
    let mut largest = [f32::NEG_INFINITY; LANES];
    for scores in scores.iter() {
        for lane in 0..LANES {
            let score = scores[lane];
            largest[lane] = if score > largest[lane] { score } else { largest[lane] };
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0f32; LANES];
    for scores in scores.iter_mut() {
        for lane in 0..LANES {
            scores[lane] = simd::exp(scores[lane] - largest);
            sums[lane] += scores[lane];
        }
    }
    let inverse = 1.0 / sums.into_iter().sum::<f32>();
    for score in scores.as_flattened_mut() {
        *score *= inverse;
    }
}

multiversion! {
    fn attend_head = attend_head_body(
        qkv: &[f32],
        at: (usize, usize, usize),
        room: &mut HeadRoom,
        out: &mut [f32],
    )
}

/// x becomes the layer norm of x + added: x and added (t, c), weight and bias (c).
///
/// # Panics
/// If a length does not fit, or `c` is 0.
pub fn add_and_norm(x: &mut [f32], added: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
    let c = weight.len();
    assert!(c > 0 && bias.len() == c && x.len().is_multiple_of(c), "whole rows of x");
    assert!(added.len() == x.len(), "as many values added as x has");
    norm_rows(x, added, weight, bias, eps);
}

#[inline(always)]
fn norm_rows_body(x: &mut [f32], added: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
    let c = weight.len();
    for (x, added) in x.chunks_exact_mut(c).zip(added.chunks_exact(c)) {
        for (x, added) in x.iter_mut().zip(added) {
            *x += added;
        }
        let mean = sum(x) / c as f32;
        for x in x.iter_mut() {
            *x -= mean;
        }
        let inverse = (simd::dot(x, x) / c as f32 + eps).sqrt().recip();
        for ((x, weight), bias) in x.iter_mut().zip(weight).zip(bias) {
            *x = *x * inverse * weight + bias;
        }
    }
}

multiversion! {
    fn norm_rows = norm_rows_body(x: &mut [f32], added: &[f32], weight: &[f32], bias: &[f32], eps: f32)
}

/// The sum in [`LANES`] parts, so that the loop becomes vector code.
#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let (blocks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for block in blocks {
        for lane in 0..LANES {
            sums[lane] += block[lane];
        }
    }
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// x becomes x · Φ(x) with the normal distribution's Φ, not its tanh approximation, within 2e-7 · |x| of exact.
pub fn gelu(x: &mut [f32]) {
    gelu_values(x);
}

#[inline(always)]
fn gelu_values_body(x: &mut [f32]) {
    for x in x {
        // Abramowitz and Stegun 7.1.26: erfc(z) = t · poly(t) · exp(-z²) for z ≥ 0, within 1.5e-7.
        let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = 1.0 / (1.0 + 0.327_591_1 * z);
        let mut poly = 1.061_405_4f32;
        poly = poly * t - 1.453_152;
        poly = poly * t + 1.421_413_7;
        poly = poly * t - 0.284_496_72;
        poly = poly * t + 0.254_829_6;
        let tail = 0.5 * t * poly * simd::exp(-z * z);
        *x *= if *x >= 0.0 { 1.0 - tail } else { tail };
    }
}

multiversion! {
    fn gelu_values = gelu_values_body(x: &mut [f32])
}
