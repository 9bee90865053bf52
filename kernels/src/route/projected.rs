//! FastMKA's route in projected space: scan, router softmax, mix, bias, norm and RoPE of keys and values in one pass.
//! Knows no projections and no router weights: it starts from what they gave.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
pub(crate) use cuda::append;

use super::{MAX_RATES, check_rates};
use crate::pages::PagePool;
use crate::rope::RotaryAngles;
use crate::storage::{aligned, contiguous_range, zeros};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use std::sync::{Arc, OnceLock};

/// The tensors that [`route`] reads. Gradients reach all of them.
#[derive(Debug, Clone, Copy)]
pub struct RouteInputs<'a> {
    /// (b, t, 2, g, d): projected keys, then values, without bias; f32, on CUDA also bf16 or f16.
    pub kv: &'a Tensor,
    /// (b, t, 1 + m), f32: the router's logits, the token itself first.
    pub logits: &'a Tensor,
    /// (b, m, 2, g, d), f32: the EMA of `kv` after the last token seen.
    pub state: &'a Tensor,
    /// (1), f32: 0 leaves keys and values as they are, 1 is the published mix.
    pub gate: &'a Tensor,
    /// (2, g, d), f32: added after the mix, since the EMA of a constant from state 0 is not that constant.
    pub bias: Option<&'a Tensor>,
    /// (d), f32: weight of an RMS norm of each head of the keys, as in Qwen3.
    pub norm: Option<&'a Tensor>,
}

/// The numbers that [`route`] reads.
#[derive(Debug, Clone, Copy)]
pub struct RouteParams<'a> {
    /// Rates of the m levels, 1 to [`MAX_RATES`] of them; constants.
    pub rates: &'a [f32],
    /// Tokens before the first.
    pub seen: u64,
    /// Whether a level is divided by 1 - b^n, n the tokens up to it.
    pub bias_correction: bool,
    /// Under the root of the norm.
    pub eps: f32,
    /// Of the t positions, the same for every stream of the batch.
    pub angles: &'a RotaryAngles,
}

/// What [`route`] returns.
#[derive(Debug, Clone)]
pub struct RouteOutputs {
    /// (b, t, g, d), in kv's type, rotated.
    pub keys: Tensor,
    /// (b, t, g, d), in kv's type.
    pub values: Tensor,
    /// (b, m, 2, g, d), f32: the EMA after the last token. Carries no gradient.
    pub state: Tensor,
}

/// What [`route_backward`] needs of [`route_forward`]: on CUDA the scan before each chunk of 32 to 128 tokens, 12 bytes a
/// channel at three rates; nothing on the CPU, which scans again.
#[derive(Debug, Clone)]
pub struct RouteCarries(Option<Tensor>);

/// Gradients of [`route`], each of its input's shape and type.
#[derive(Debug, Clone)]
pub struct RouteGradients {
    /// (b, t, 2, g, d).
    pub kv: Tensor,
    /// (b, t, 1 + m).
    pub logits: Tensor,
    /// (b, m, 2, g, d).
    pub state: Tensor,
    /// (1).
    pub gate: Tensor,
    /// (2, g, d), if there is a bias.
    pub bias: Option<Tensor>,
    /// (d), if there is a norm.
    pub norm: Option<Tensor>,
}

/// Keys and values as attention reads them, from their projections, the router's logits and the EMA so far.
///
/// With e_l the EMA of `kv` at rate b_l (bias-corrected or not) and λ = softmax(logits):
/// y = kv + gate Σ_l λ_l (e_l - kv) + bias; keys are then normed and rotated.
/// The EMA of a projection is the projection of the EMA, so this is the mix of the hidden states for one rate a level.
///
/// d is a multiple of 8, on CUDA at most 256. The recurrence runs token by token on the CPU; on CUDA in chunks
/// counted from the call's first token: the same bits at every run, but not for every cut of a stream.
///
/// Source: MKA, arXiv 2603.20586, algorithm 2; several rates, bias correction and the gate are ours.
///
/// # Errors
/// If shapes, types or devices disagree, or a rate is outside [0, 1).
pub fn route(inputs: &RouteInputs<'_>, params: &RouteParams<'_>) -> Result<RouteOutputs> {
    let shape = RouteShape::check("route", inputs, params)?;
    let RouteShape { b, t, g, d, .. } = shape;
    if shape.is_empty() {
        let nothing = || zeros((b, t, g, d), inputs.kv.dtype(), inputs.kv.device());
        return Ok(RouteOutputs {
            keys: nothing()?,
            values: nothing()?,
            state: inputs.state.detach(),
        });
    }
    // A custom op has at most three arguments with gradients: the small tensors travel as one.
    let mut small = vec![inputs.state.flatten_all()?];
    small.extend(inputs.bias.map(Tensor::flatten_all).transpose()?);
    small.extend(inputs.norm.cloned());
    small.push(inputs.gate.clone());
    let small = Tensor::cat(&small, 0)?;
    let kept = Arc::new(Kept::default());
    let op = Route {
        shape,
        numbers: Numbers::new(params),
        kept: kept.clone(),
        #[cfg(feature = "cuda")]
        keep_carries: inputs.kv.track_op() || inputs.logits.track_op() || small.track_op(),
    };
    let dtype = inputs.kv.dtype();
    let kv = match inputs.kv.device().is_cuda() {
        true => aligned(inputs.kv)?,
        false => inputs.kv.to_dtype(DType::F32)?.contiguous()?,
    };
    let out = kv.apply_op3(&inputs.logits.contiguous()?, &small, op)?.to_dtype(dtype)?;
    let Some(state) = kept.state.get() else {
        bail!("route: expected a state of the forward pass")
    };
    Ok(RouteOutputs { keys: out.get(0)?, values: out.get(1)?, state: state.clone() })
}

/// [`route`] without history, and what [`route_backward`] needs.
///
/// # Errors
/// As [`route`].
pub fn route_forward(
    inputs: &RouteInputs<'_>,
    params: &RouteParams<'_>,
) -> Result<(RouteOutputs, RouteCarries)> {
    #[cfg(feature = "cuda")]
    if inputs.kv.device().is_cuda() && inputs.kv.elem_count() > 0 {
        let shape = RouteShape::check("route_forward", inputs, params)?;
        let (out, state, carries) = cuda::forward(&shape, inputs, &Numbers::new(params))?;
        let outputs = RouteOutputs { keys: out.get(0)?, values: out.get(1)?, state };
        return Ok((outputs, RouteCarries(Some(carries))));
    }
    let [kv, logits, state, gate] =
        [inputs.kv, inputs.logits, inputs.state, inputs.gate].map(Tensor::detach);
    let (bias, norm) = (inputs.bias.map(Tensor::detach), inputs.norm.map(Tensor::detach));
    let inputs = RouteInputs {
        kv: &kv,
        logits: &logits,
        state: &state,
        gate: &gate,
        bias: bias.as_ref(),
        norm: norm.as_ref(),
    };
    Ok((route(&inputs, params)?, RouteCarries(None)))
}

/// Gradients of keys and values of [`route_forward`], from `dkeys` and `dvalues` (b, t, g, d) in kv's type.
///
/// Sums are made in a fixed order: equal inputs give equal bits.
///
/// # Errors
/// As [`route`], and if the carries are not those of a forward pass on the same device.
pub fn route_backward(
    inputs: &RouteInputs<'_>,
    params: &RouteParams<'_>,
    carries: &RouteCarries,
    dkeys: &Tensor,
    dvalues: &Tensor,
) -> Result<RouteGradients> {
    let op = "route_backward";
    let shape = RouteShape::check(op, inputs, params)?;
    let RouteShape { b, t, g, d, .. } = shape;
    for (name, x) in [("dkeys", dkeys), ("dvalues", dvalues)] {
        if x.dims() != [b, t, g, d] || x.dtype() != inputs.kv.dtype() {
            bail!(
                "{op}: {name} {:?} of {:?}, expected ({b}, {t}, {g}, {d}) of {:?}",
                x.shape(),
                x.dtype(),
                inputs.kv.dtype()
            );
        }
    }
    if shape.is_empty() {
        let nothing = |x: &Tensor| zeros(x.shape(), x.dtype(), x.device());
        return Ok(RouteGradients {
            kv: nothing(inputs.kv)?,
            logits: nothing(inputs.logits)?,
            state: nothing(inputs.state)?,
            gate: nothing(inputs.gate)?,
            bias: inputs.bias.map(nothing).transpose()?,
            norm: inputs.norm.map(nothing).transpose()?,
        });
    }
    #[cfg(feature = "cuda")]
    if inputs.kv.device().is_cuda() {
        let RouteCarries(Some(carries)) = carries else {
            bail!("{op}: no carries, expected those of the forward pass on CUDA")
        };
        return cuda::backward(
            &shape,
            inputs,
            &Numbers::new(params),
            carries,
            &aligned(dkeys)?,
            &aligned(dvalues)?,
        );
    }
    if carries.0.is_some() {
        bail!("{op}: carries of CUDA, expected those of a forward pass on the CPU");
    }
    let numbers = Numbers::new(params);
    let mut dout = values(dkeys)?;
    dout.extend(values(dvalues)?);
    let state = values(inputs.state)?;
    let [bias, norm] = [inputs.bias, inputs.norm].map(|x| x.map(values).transpose());
    let (bias, norm) = (bias?.unwrap_or_default(), norm?.unwrap_or_default());
    let gradients = numbers.problem(shape, values(inputs.gate)?[0], &bias, &norm).backward(
        &values(inputs.kv)?,
        &values(inputs.logits)?,
        &state,
        &dout,
    );
    let like = |values: &[f32], x: &Tensor| {
        Tensor::from_slice(values, x.shape(), x.device())?.to_dtype(x.dtype())
    };
    let [state, bias, norm, gate] = shape.small().map(|range| &gradients.small[range]);
    Ok(RouteGradients {
        kv: like(&gradients.kv, inputs.kv)?,
        logits: like(&gradients.logits, inputs.logits)?,
        state: like(state, inputs.state)?,
        gate: like(gate, inputs.gate)?,
        bias: inputs.bias.map(|x| like(bias, x)).transpose()?,
        norm: inputs.norm.map(|x| like(norm, x)).transpose()?,
    })
}

/// [`route`] of one stream straight into the pages `slots` of a pool, from token `offset` of the first on: the state
/// after the last token. No gradient flows.
///
/// # Errors
/// As [`route`], and if b is not 1, the slots are not as many as the tokens fill, or on CUDA there are more than 256 of
/// them: a scan is one launch.
pub fn route_into_pages(
    inputs: &RouteInputs<'_>,
    params: &RouteParams<'_>,
    pool: &PagePool,
    slots: &[usize],
    offset: usize,
) -> Result<Tensor> {
    let op = "route_into_pages";
    let shape = RouteShape::check(op, inputs, params)?;
    let RouteShape { b, t, g, d, .. } = shape;
    if b != 1 {
        bail!("{op}: a batch of {b}, expected 1");
    }
    pool.check_room(op, slots, offset, (t, g, d))?;
    if shape.is_empty() {
        return Ok(inputs.state.detach());
    }
    #[cfg(feature = "cuda")]
    if inputs.kv.device().is_cuda() {
        return cuda::into_pages(&shape, inputs, &Numbers::new(params), pool, slots, offset);
    }
    let numbers = Numbers::new(params);
    let [bias, norm] = [inputs.bias, inputs.norm].map(|x| x.map(values).transpose());
    let (bias, norm) = (bias?.unwrap_or_default(), norm?.unwrap_or_default());
    let problem = numbers.problem(shape, values(inputs.gate)?[0], &bias, &norm);
    let mut raw = vec![0f32; t * g * d];
    let (kv, logits, state) = (values(inputs.kv)?, values(inputs.logits)?, values(inputs.state)?);
    let (out, state) = problem.forward(&kv, &logits, &state, Some(&mut raw));
    let by_head = |x: &[f32]| {
        Tensor::from_slice(x, (t, g, d), inputs.kv.device())?.transpose(0, 1)?.contiguous()
    };
    let (keys, heads) = out.split_at(t * g * d);
    pool.write_pages(slots, offset, &by_head(keys)?, &by_head(&raw)?, &by_head(heads)?)?;
    Tensor::from_vec(state, inputs.state.shape(), inputs.kv.device())
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy)]
struct RouteShape {
    b: usize,
    t: usize,
    g: usize,
    d: usize,
    m: usize,
    has_bias: bool,
    has_norm: bool,
}

impl RouteShape {
    fn check(op: &str, inputs: &RouteInputs<'_>, params: &RouteParams<'_>) -> Result<Self> {
        check_rates(op, params.rates)?;
        let (m, kv) = (params.rates.len(), inputs.kv);
        let [b, t, 2, g, d] = *kv.dims() else {
            bail!("{op}: kv {:?}, expected (b, t, 2, g, d)", kv.shape())
        };
        if !(1..=MAX_RATES).contains(&m) {
            bail!("{op}: {m} rates, expected 1 to {MAX_RATES}");
        }
        if d == 0 || !d.is_multiple_of(8) || (kv.device().is_cuda() && d > 256) {
            bail!("{op}: head_dim {d}, expected a multiple of 8, on CUDA at most 256");
        }
        if params.angles.len() != t || params.angles.half() != d / 2 {
            bail!(
                "{op}: angles of {} positions and head_dim {}, expected {t} and {d}",
                params.angles.len(),
                2 * params.angles.half()
            );
        }
        let mut expected = vec![
            ("logits", inputs.logits, vec![b, t, 1 + m]),
            ("state", inputs.state, vec![b, m, 2, g, d]),
            ("gate", inputs.gate, vec![1]),
        ];
        expected.extend(inputs.bias.map(|bias| ("bias", bias, vec![2, g, d])));
        expected.extend(inputs.norm.map(|norm| ("norm", norm, vec![d])));
        for (name, tensor, dims) in expected {
            if tensor.dims() != dims
                || tensor.dtype() != DType::F32
                || !tensor.device().same_device(kv.device())
            {
                bail!(
                    "{op}: {name} {:?} of {:?}, expected {dims:?} of F32 on kv's device",
                    tensor.shape(),
                    tensor.dtype()
                );
            }
        }
        if !matches!(kv.dtype(), DType::F32 | DType::BF16 | DType::F16) {
            bail!("{op}: kv of {:?}, expected f32, bf16 or f16", kv.dtype());
        }
        let (has_bias, has_norm) = (inputs.bias.is_some(), inputs.norm.is_some());
        Ok(Self { b, t, g, d, m, has_bias, has_norm })
    }

    fn is_empty(&self) -> bool {
        self.b * self.t * self.g == 0
    }

    /// Channels of a token.
    fn channels(&self) -> usize {
        2 * self.g * self.d
    }

    /// (2, b, t, g, d).
    fn out(&self) -> Shape {
        Shape::from(vec![2, self.b, self.t, self.g, self.d])
    }

    fn state_len(&self) -> usize {
        self.b * self.m * self.channels()
    }

    /// Where state, bias, norm and gate begin and end in the vector of small tensors.
    fn small(&self) -> [std::ops::Range<usize>; 4] {
        let bias = self.state_len();
        let norm = bias + if self.has_bias { self.channels() } else { 0 };
        let gate = norm + if self.has_norm { self.d } else { 0 };
        [0..bias, bias..norm, norm..gate, gate..gate + 1]
    }
}

/// [`RouteParams`] that an op keeps.
struct Numbers {
    rates: Vec<f32>,
    seen: u64,
    bias_correction: bool,
    eps: f32,
    angles: RotaryAngles,
}

impl Numbers {
    fn new(params: &RouteParams<'_>) -> Self {
        Self {
            rates: params.rates.to_vec(),
            seen: params.seen,
            bias_correction: params.bias_correction,
            eps: params.eps,
            angles: params.angles.clone(),
        }
    }

    fn problem<'a>(
        &'a self,
        shape: RouteShape,
        gate: f32,
        bias: &'a [f32],
        norm: &'a [f32],
    ) -> cpu::Problem<'a> {
        cpu::Problem { shape, numbers: self, gate, bias, norm }
    }
}

/// What the forward pass leaves beside its result.
#[derive(Default)]
struct Kept {
    state: OnceLock<Tensor>,
    /// (b, chunks, m, 2, g, d): the scan before each chunk.
    #[cfg(feature = "cuda")]
    carries: OnceLock<Tensor>,
}

/// (kv, logits, small) -> keys and values (2, b, t, g, d).
struct Route {
    shape: RouteShape,
    numbers: Numbers,
    kept: Arc<Kept>,
    /// A gradient will be asked for.
    #[cfg(feature = "cuda")]
    keep_carries: bool,
}

impl Route {
    fn problem<'a>(&'a self, small: &'a [f32]) -> cpu::Problem<'a> {
        let [_, bias, norm, gate] = self.shape.small();
        self.numbers.problem(self.shape, small[gate.start], &small[bias], &small[norm])
    }
}

impl CustomOp3 for Route {
    fn name(&self) -> &'static str {
        "route"
    }

    fn cpu_fwd(
        &self,
        kv: &CpuStorage,
        kv_layout: &Layout,
        logits: &CpuStorage,
        logits_layout: &Layout,
        small: &CpuStorage,
        small_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
            Ok(&storage.as_slice::<f32>()?[contiguous_range("route", layout)?])
        }
        let small = slice(small, small_layout)?;
        let state = &small[self.shape.small()[0].clone()];
        let (kv, logits) = (slice(kv, kv_layout)?, slice(logits, logits_layout)?);
        let (out, state) = self.problem(small).forward(kv, logits, state, None);
        let RouteShape { b, m, g, d, .. } = self.shape;
        let state = Tensor::from_vec(state, (b, m, 2, g, d), &candle_core::Device::Cpu)?;
        let _ = self.kept.state.set(state);
        Ok((CpuStorage::F32(out), self.shape.out()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        kv: &candle_core::CudaStorage,
        kv_layout: &Layout,
        logits: &candle_core::CudaStorage,
        logits_layout: &Layout,
        small: &candle_core::CudaStorage,
        small_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;

        let device = kv.device();
        let small = crate::cuda::address_of(small, small_layout)?;
        let [state, bias, norm, gate] =
            self.shape.small().map(|range| small + 4 * range.start as u64);
        let inputs = cuda::Addresses {
            kv: crate::cuda::address_of(kv, kv_layout)?,
            logits: crate::cuda::address_of(logits, logits_layout)?,
            state,
            gate,
            bias: if self.shape.has_bias { bias } else { 0 },
            norm: if self.shape.has_norm { norm } else { 0 },
        };
        let (out, state, carries) = cuda::forward_at(
            device,
            kv.dtype(),
            &self.shape,
            &inputs,
            &self.numbers,
            self.keep_carries,
        )?;
        let _ = self.kept.state.set(state);
        if let Some(carries) = carries {
            let _ = self.kept.carries.set(carries);
        }
        Ok((out, self.shape.out()))
    }

    fn bwd(
        &self,
        kv: &Tensor,
        logits: &Tensor,
        small: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dout = aligned(&dout.detach())?;
        #[cfg(feature = "cuda")]
        if kv.device().is_cuda() {
            let Some(carries) = self.kept.carries.get() else {
                bail!("route: backward without its forward, expected the carries of it")
            };
            let RouteShape { b, m, g, d, .. } = self.shape;
            let [state, bias, norm, gate] =
                self.shape.small().map(|range| small.narrow(0, range.start, range.len()));
            let (bias, norm) = (bias?, norm?);
            let inputs = RouteInputs {
                kv,
                logits,
                state: &state?.reshape((b, m, 2, g, d))?,
                gate: &gate?,
                bias: self.shape.has_bias.then_some(&bias),
                norm: self.shape.has_norm.then_some(&norm),
            };
            let (dkeys, dvalues) = (dout.get(0)?, dout.get(1)?);
            let grads = cuda::backward(
                &self.shape,
                &inputs,
                &self.numbers,
                carries,
                &aligned(&dkeys)?,
                &aligned(&dvalues)?,
            )?;
            let mut dsmall = vec![grads.state.flatten_all()?];
            dsmall.extend(grads.bias.map(|x| x.flatten_all()).transpose()?);
            dsmall.extend(grads.norm);
            dsmall.push(grads.gate);
            return Ok((Some(grads.kv), Some(grads.logits), Some(Tensor::cat(&dsmall, 0)?)));
        }
        let small_values = values(small)?;
        let state = &small_values[self.shape.small()[0].clone()];
        let gradients = self.problem(&small_values).backward(
            &values(kv)?,
            &values(logits)?,
            state,
            &values(&dout)?,
        );
        let like = |values: Vec<f32>, x: &Tensor| Tensor::from_vec(values, x.shape(), x.device());
        Ok((
            Some(like(gradients.kv, kv)?),
            Some(like(gradients.logits, logits)?),
            Some(like(gradients.small, small)?),
        ))
    }
}
