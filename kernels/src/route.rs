//! FastMKA's levels: the multi-rate EMA scan and the mix that stands before the K/V projections.
//! Knows no router weights and no projections.

use candle_core::{Result, Tensor};

/// Streams `x` (t, c) through the EMA of every rate and returns the levels, (t, m, c), f32.
///
/// e_t = b e_{t-1} + (1 - b) x_t per rate b; with `bias_correction` the level is e_t / (1 - b^(n+1)),
/// n = `seen` + t the tokens before it. `state` (m, c) is e after the last token seen so far and is advanced.
/// The recurrence runs token by token in f32: any chunking of a stream gives the same bits.
///
/// Source: MKA, arXiv 2603.20586, session memory; bias correction and several rates are ours.
///
/// # Errors
/// If `state` is not (rates, c).
pub fn ema_scan(
    x: &Tensor,
    state: &mut [f32],
    rates: &[f32],
    seen: u64,
    bias_correction: bool,
) -> Result<Tensor> {
    let (t, c) = x.dims2()?;
    check_state(state, rates, c)?;
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    let mut levels = vec![0f32; t * rates.len() * c];
    for (i, row) in values.chunks_exact(c.max(1)).enumerate() {
        advance(row, state, rates);
        for (m, rate) in rates.iter().enumerate() {
            let correction = if bias_correction {
                let n = (seen + i as u64 + 1).min(i32::MAX as u64) as i32;
                (1.0 / (1.0 - f64::from(*rate).powi(n))) as f32
            } else {
                1.0
            };
            let level = &mut levels[(i * rates.len() + m) * c..][..c];
            for (out, e) in level.iter_mut().zip(&state[m * c..(m + 1) * c]) {
                *out = e * correction;
            }
        }
    }
    Tensor::from_vec(levels, (t, rates.len(), c), x.device())
}

/// Advances `state` (m, c) over `x` (t, c) without forming the levels: what a layer with a closed gate needs.
///
/// Bit-identical to the state that [`ema_scan`] leaves.
///
/// # Errors
/// If `state` is not (rates, c).
pub fn ema_advance(x: &Tensor, state: &mut [f32], rates: &[f32]) -> Result<()> {
    let (_, c) = x.dims2()?;
    check_state(state, rates, c)?;
    for row in x.flatten_all()?.to_vec1::<f32>()?.chunks_exact(c.max(1)) {
        advance(row, state, rates);
    }
    Ok(())
}

/// xf = x + gate · Σ_l λ_l (L_l - x): (t, c).
///
/// Shapes: `x` (t, c), `levels` (t, m, c), `weights` (t, 1 + m): the router's softmax, x itself first.
/// gate = 0 is x exactly; gate = 1 is the published FastMKA, since the weights sum to one.
///
/// # Errors
/// If the shapes disagree.
pub fn fuse_levels(x: &Tensor, levels: &Tensor, weights: &Tensor, gate: f64) -> Result<Tensor> {
    let (t, m, c) = levels.dims3()?;
    if x.dims2()? != (t, c) || weights.dims2()? != (t, m + 1) {
        candle_core::bail!(
            "fuse_levels: x {:?}, weights {:?}, expected ({t}, {c}) and ({t}, {})",
            x.shape(),
            weights.shape(),
            m + 1
        );
    }
    let difference = levels.broadcast_sub(&x.unsqueeze(1)?)?; // (t, m, c)
    let memory_weights = weights.narrow(1, 1, m)?.unsqueeze(2)?; // (t, m, 1)
    let shift = difference.broadcast_mul(&memory_weights)?.sum(1)?; // (t, c)
    x + (shift * gate)?
}

fn check_state(state: &[f32], rates: &[f32], c: usize) -> Result<()> {
    if state.len() != rates.len() * c {
        candle_core::bail!(
            "ema: state of {} values, expected {} rates of {c}",
            state.len(),
            rates.len()
        );
    }
    Ok(())
}

fn advance(row: &[f32], state: &mut [f32], rates: &[f32]) {
    for (rate, e) in rates.iter().zip(state.chunks_exact_mut(row.len())) {
        let new = 1.0 - rate;
        for (e, x) in e.iter_mut().zip(row) {
            *e = rate * *e + new * x;
        }
    }
}
