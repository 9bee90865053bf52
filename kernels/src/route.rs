//! FastMKA's levels: the multi-rate EMA scan and the mix that stands before the K/V projections.
//! Knows no router weights and no projections.

#[cfg(feature = "cuda")]
mod cuda;
mod projected;

#[cfg(feature = "cuda")]
pub(crate) use projected::append;
pub use projected::{
    RouteCarries, RouteGradients, RouteInputs, RouteOutputs, RouteParams, route, route_backward,
    route_forward, route_into_pages,
};

use crate::storage::{contiguous_range, zeros};
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

/// Most rates that [`route`] takes, and on CUDA every op here; on the CPU [`ema_scan`] and [`ema_advance`] take any number.
pub const MAX_RATES: usize = 4;

/// Streams `x` through the EMA of every rate: (levels, state after the last token), both f32.
///
/// e_t = b e_{t-1} + (1 - b) x_t per rate b; with `bias_correction` the level is e_t / (1 - b^(n+1)),
/// n = `seen` + t the tokens before it. `state` is e after the last token seen so far.
///
/// Shapes: `x` (t, c) or (b, t, c), f32, bf16 or f16; `state` (m, c) or (b, m, c), f32; levels (.., t, m, c).
/// On the CPU the recurrence runs token by token: any chunking of a stream gives the same bits. On CUDA it runs in
/// chunks of 128 tokens from the call's first: the same bits at every run, but not for every chunking.
/// Gradients reach `x` and `state`; [`ema_scan_learned`] adds the rates.
///
/// Source: MKA, arXiv 2603.20586, session memory; bias correction and several rates are ours.
///
/// # Errors
/// If the shapes disagree, a rate is outside [0, 1), or on CUDA there are more than [`MAX_RATES`].
pub fn ema_scan(
    x: &Tensor,
    state: &Tensor,
    rates: &[f32],
    seen: u64,
    bias_correction: bool,
) -> Result<(Tensor, Tensor)> {
    check_rates("ema_scan", rates)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = x.device() {
        let shape = EmaShape::of("ema_scan", x, state, rates.len())?;
        let constant_rates = Some(cuda::constant_rates(rates, device)?);
        let op = EmaScan { shape, seen, bias_correction, constant_rates };
        // The op has its rates, and its third tensor is not looked at.
        return scanned(x, state, &state.detach(), op);
    }
    let rates = Tensor::from_slice(rates, rates.len(), x.device())?;
    ema_scan_learned(x, state, &rates, seen, bias_correction)
}

/// [`ema_scan`] with the rates as a tensor (m), f32, to which gradients flow too. The caller keeps them inside [0, 1).
///
/// # Errors
/// As [`ema_scan`]; the rates are not looked at.
pub fn ema_scan_learned(
    x: &Tensor,
    state: &Tensor,
    rates: &Tensor,
    seen: u64,
    bias_correction: bool,
) -> Result<(Tensor, Tensor)> {
    let shape = EmaShape::of("ema_scan", x, state, rates.dims1()?)?;
    if rates.dtype() != DType::F32 {
        bail!("ema_scan: rates of {:?}, expected f32", rates.dtype());
    }
    let op = EmaScan {
        shape,
        seen,
        bias_correction,
        #[cfg(feature = "cuda")]
        constant_rates: None,
    };
    scanned(x, state, rates, op)
}

/// Levels and the new state by `op`, whose inputs are checked.
fn scanned(x: &Tensor, state: &Tensor, rates: &Tensor, op: EmaScan) -> Result<(Tensor, Tensor)> {
    let shape = op.shape;
    let EmaShape { batch, tokens, channels, rates: m } = shape;
    let mut level_shape = x.dims().to_vec();
    level_shape.insert(level_shape.len() - 1, m);
    if tokens == 0 || shape.state_len() == 0 {
        return Ok((zeros(level_shape, DType::F32, x.device())?, state.clone()));
    }
    let x = readable(x)?.reshape((batch, tokens, channels))?;
    let packed = x.apply_op3(&state.contiguous()?, &rates.contiguous()?, op)?;
    let levels = packed.narrow(0, 0, shape.levels_len())?.reshape(level_shape)?;
    // A copy: the state outlives the levels, whose memory it would hold.
    let new_state = packed.narrow(0, shape.levels_len(), shape.state_len())?.force_contiguous()?;
    Ok((levels, new_state.reshape(state.shape())?))
}

/// The state after `x`, without forming the levels: what a layer with a closed gate needs. No gradient flows.
///
/// Shapes and bits are those of the state that [`ema_scan`] returns.
///
/// # Errors
/// As [`ema_scan`].
pub fn ema_advance(x: &Tensor, state: &Tensor, rates: &[f32]) -> Result<Tensor> {
    check_rates("ema_advance", rates)?;
    let shape = EmaShape::of("ema_advance", x, state, rates.len())?;
    if shape.tokens == 0 || shape.state_len() == 0 {
        return Ok(state.detach());
    }
    let x = readable(&x.detach())?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = x.device() {
        let op = EmaScan { shape, seen: 0, bias_correction: false, constant_rates: None };
        let rates = cuda::constant_rates(rates, device)?;
        return cuda::advance(&op, &x, &state.detach().contiguous()?, &rates);
    }
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    let mut advanced = state.flatten_all()?.to_vec1::<f32>()?;
    let per_batch = rates.len() * shape.channels;
    for (x, state) in
        values.chunks_exact(shape.tokens * shape.channels).zip(advanced.chunks_exact_mut(per_batch))
    {
        for row in x.chunks_exact(shape.channels) {
            advance(row, state, rates);
        }
    }
    Tensor::from_vec(advanced, state.shape(), state.device())
}

/// xf = x + gate · Σ_l λ_l (L_l - x): (t, c).
///
/// Shapes: `x` (t, c), `levels` (t, m, c), `weights` (t, 1 + m): the router's softmax, x itself first.
/// gate = 0 is x exactly; gate = 1 is the published FastMKA, since the weights sum to one.
///
/// # Errors
/// If the shapes disagree.
pub fn fuse_levels(x: &Tensor, levels: &Tensor, weights: &Tensor, gate: f64) -> Result<Tensor> {
    x + (level_shift("fuse_levels", x, levels, weights)? * gate)?
}

/// Σ_l λ_l (L_l - x), what the gate scales: (t, c).
pub(crate) fn level_shift(
    op: &str,
    x: &Tensor,
    levels: &Tensor,
    weights: &Tensor,
) -> Result<Tensor> {
    let (t, m, c) = levels.dims3()?;
    if x.dims2()? != (t, c) || weights.dims2()? != (t, m + 1) {
        bail!(
            "{op}: x {:?}, weights {:?}, expected ({t}, {c}) and ({t}, {})",
            x.shape(),
            weights.shape(),
            m + 1
        );
    }
    let difference = levels.broadcast_sub(&x.unsqueeze(1)?)?; // (t, m, c)
    let memory_weights = weights.narrow(1, 1, m)?.unsqueeze(2)?; // (t, m, 1)
    difference.broadcast_mul(&memory_weights)?.sum(1)
}

/// Sizes of one scan.
#[derive(Debug, Clone, Copy)]
struct EmaShape {
    batch: usize,
    tokens: usize,
    channels: usize,
    rates: usize,
}

impl EmaShape {
    /// Of a scan with `m` rates.
    fn of(op: &str, x: &Tensor, state: &Tensor, m: usize) -> Result<Self> {
        let (shape, expected) = match *x.dims() {
            [t, c] => (Self { batch: 1, tokens: t, channels: c, rates: m }, vec![m, c]),
            [b, t, c] => (Self { batch: b, tokens: t, channels: c, rates: m }, vec![b, m, c]),
            _ => bail!("{op}: x {:?}, expected (t, c) or (b, t, c)", x.shape()),
        };
        if state.dims() != expected {
            bail!("{op}: state {:?}, expected {expected:?}", state.shape());
        }
        if state.dtype() != DType::F32 {
            bail!("{op}: state of {:?}, expected f32", state.dtype());
        }
        if x.device().is_cuda() && m > MAX_RATES {
            bail!("{op}: {m} rates, expected at most {MAX_RATES} on CUDA");
        }
        Ok(shape)
    }

    fn levels_len(&self) -> usize {
        self.batch * self.tokens * self.rates * self.channels
    }

    fn state_len(&self) -> usize {
        self.batch * self.rates * self.channels
    }
}

fn check_rates(op: &str, rates: &[f32]) -> Result<()> {
    match rates.iter().find(|rate| !(0.0..1.0).contains(*rate)) {
        Some(rate) => bail!("{op}: a rate of {rate}, expected one in [0, 1)"),
        None => Ok(()),
    }
}

/// `x` as the scan of its device reads it: contiguous, and f32 on the CPU.
fn readable(x: &Tensor) -> Result<Tensor> {
    let x = if x.device().is_cuda() { x.clone() } else { x.to_dtype(DType::F32)? };
    x.contiguous()
}

fn advance(row: &[f32], state: &mut [f32], rates: &[f32]) {
    for (rate, e) in rates.iter().zip(state.chunks_exact_mut(row.len())) {
        let new = 1.0 - rate;
        for (e, x) in e.iter_mut().zip(row) {
            *e = rate * *e + new * x;
        }
    }
}

/// 1 / (1 - b^n), n = `tokens` seen and this one.
fn correction(rate: f32, tokens: u64) -> f64 {
    1.0 / (1.0 - f64::from(rate).powi(tokens.min(i32::MAX as u64) as i32))
}

/// (x, state, rates) -> levels and the new state, one after the other in one f32 vector.
struct EmaScan {
    shape: EmaShape,
    seen: u64,
    bias_correction: bool,
    /// Rates that no gradient asks for, in the place of the third tensor's.
    #[cfg(feature = "cuda")]
    constant_rates: Option<crate::cuda::Words>,
}

impl EmaScan {
    fn factor(&self, rate: f32, t: usize) -> f64 {
        if self.bias_correction { correction(rate, self.seen + t as u64 + 1) } else { 1.0 }
    }

    /// Gradients of x (b, t, c), f32, of the state and of the rates, from those of the levels and of the new state.
    fn backward_cpu(
        &self,
        x: &[f32],
        state: &[f32],
        rates: &[f32],
        (dlevels, dstate): (&[f32], &[f32]),
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let EmaShape { batch, tokens, channels, rates: m } = self.shape;
        let mut dx = vec![0f64; x.len()];
        let mut dstate_in = vec![0f32; state.len()];
        let mut drates = vec![0f64; m];
        let mut e = vec![0f64; tokens + 1];
        for (b, rate_idx, c) in (0..batch)
            .flat_map(|b| (0..m).flat_map(move |rate| (0..channels).map(move |c| (b, rate, c))))
        {
            let rate = f64::from(rates[rate_idx]);
            let at = |t: usize| (b * tokens + t) * channels + c;
            let state_at = (b * m + rate_idx) * channels + c;
            e[0] = f64::from(state[state_at]);
            for t in 0..tokens {
                e[t + 1] = rate * e[t] + (1.0 - rate) * f64::from(x[at(t)]);
            }
            let mut g = f64::from(dstate[state_at]);
            for t in (0..tokens).rev() {
                let d = f64::from(dlevels[((b * tokens + t) * m + rate_idx) * channels + c]);
                let factor = self.factor(rates[rate_idx], t);
                g += d * factor;
                drates[rate_idx] += g * (e[t] - f64::from(x[at(t)]));
                if self.bias_correction {
                    let n = (self.seen + t as u64 + 1).min(i32::MAX as u64) as i32;
                    drates[rate_idx] +=
                        d * e[t + 1] * f64::from(n) * rate.powi(n - 1) * factor * factor;
                }
                dx[at(t)] += (1.0 - rate) * g;
                g *= rate;
            }
            dstate_in[state_at] = g as f32;
        }
        let single = |values: Vec<f64>| values.into_iter().map(|x| x as f32).collect();
        (single(dx), dstate_in, single(drates))
    }
}

fn slice_of<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[contiguous_range("ema_scan", layout)?])
}

impl CustomOp3 for EmaScan {
    fn name(&self) -> &'static str {
        "ema_scan"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        state: &CpuStorage,
        state_layout: &Layout,
        rates: &CpuStorage,
        rates_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let EmaShape { tokens, channels, rates: m, .. } = self.shape;
        let (x, rates) = (slice_of(x, x_layout)?, slice_of(rates, rates_layout)?);
        let len = self.shape.levels_len() + self.shape.state_len();
        let mut packed = Vec::with_capacity(len);
        let mut state = slice_of(state, state_layout)?.to_vec();
        for (x, state) in
            x.chunks_exact(tokens * channels).zip(state.chunks_exact_mut(m * channels))
        {
            for (t, row) in x.chunks_exact(channels).enumerate() {
                advance(row, state, rates);
                for (rate, e) in rates.iter().zip(state.chunks_exact(channels)) {
                    let factor = self.factor(*rate, t) as f32;
                    packed.extend(e.iter().map(|e| e * factor));
                }
            }
        }
        packed.extend_from_slice(&state);
        Ok((CpuStorage::F32(packed), Shape::from(len)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        state: &candle_core::CudaStorage,
        state_layout: &Layout,
        rates: &candle_core::CudaStorage,
        rates_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        cuda::scan(self, (x, x_layout), (state, state_layout), (rates, rates_layout))
    }

    fn bwd(
        &self,
        x: &Tensor,
        state: &Tensor,
        rates: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (dx, dstate, drates) = cuda::backward(self, x, state, rates, &grad)?;
            let drates = self.constant_rates.is_none().then_some(drates);
            return Ok((Some(dx), Some(dstate), drates));
        }
        let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let grad = values(&grad)?;
        let grads = grad.split_at(self.shape.levels_len());
        let (dx, dstate, drates) =
            self.backward_cpu(&values(x)?, &values(state)?, &values(rates)?, grads);
        let like = |values: Vec<f32>, x: &Tensor| Tensor::from_vec(values, x.shape(), x.device());
        Ok((Some(like(dx, x)?), Some(like(dstate, state)?), Some(like(drates, rates)?)))
    }
}
