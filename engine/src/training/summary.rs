//! The memory beside attention: rates, levels of projected keys and values, gate and router (`docs/training.md`).
//! Knows no attention: what the levels are mixed into is the caller's matter.

use super::cache::Cached;
use super::config::{MemoryKind, MemorySettings};
use super::layers::Pass;
use super::operations::{product, softmax};
use super::parameters::{Builder, Init};
use super::vector;
use crate::error::{Error, Result};
use crate::parallel::TensorGroup;
use candle_core::{DType, Device, Tensor};
use mka_kernels::tape::Value;
use mka_kernels::tape::ops::{self, Projection, RouteRest};
use mka_kernels::{MAX_RATES, RouteParams, ema_scan_learned};

/// Gate and router of one layer (`docs/training.md`).
pub(super) struct Summary {
    pub(super) kind: MemoryKind,
    bias_correction: bool,
    /// (1), f32.
    pub(super) gate: Tensor,
    down: (Tensor, Tensor),
    up: (Tensor, Tensor),
    pub(super) rates: Rates,
    group: TensorGroup,
    /// Tokens of the window behind which chunks are recalled into one more level; none without it.
    pub(super) recalled: Option<usize>,
}

/// The rates of the EMA, shared by all layers.
#[derive(Clone)]
pub(super) enum Rates {
    Fixed {
        /// (m), f32.
        tensor: Tensor,
        values: Vec<f32>,
    },
    /// Logits of a sigmoid.
    Learned(Tensor),
}

impl Rates {
    /// (m), f32.
    pub(super) fn values(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Fixed { tensor, .. } => tensor.clone(),
            Self::Learned(logits) => ((logits.neg()?.exp()? + 1.0)?).recip()?,
        })
    }
}

impl Summary {
    pub(super) fn new(
        builder: &mut Builder<'_>,
        layer: usize,
        q_size: usize,
        settings: &MemorySettings,
        rates: &Rates,
    ) -> Result<Self> {
        let at = |part: &str| format!("layers.{layer}.{part}");
        let rank = if settings.router_rank > 0 { settings.router_rank } else { q_size / 2 };
        let levels = settings.rates.len() + 1 + usize::from(settings.recalled_vector);
        // The levels start even, whatever the query: the last matrix is zero, so that the gate opens first.
        let spread = Init::Normal(1.0 / (q_size as f32).sqrt());
        Ok(Self {
            kind: settings.kind,
            bias_correction: settings.bias_correction,
            gate: builder.memory(&at("gate"), &[1], Init::Constant(settings.initial_gate))?,
            down: (
                builder.memory(&at("router.down.weight"), &[rank, q_size], spread)?,
                builder.memory(&at("router.down.bias"), &[rank], Init::Constant(0.0))?,
            ),
            up: (
                builder.memory(&at("router.up.weight"), &[levels, rank], Init::Constant(0.0))?,
                builder.memory(&at("router.up.bias"), &[levels], Init::Constant(0.0))?,
            ),
            rates: rates.clone(),
            group: builder.group().clone(),
            recalled: settings.recalled_vector.then_some(settings.window_tokens),
        })
    }

    /// λ = softmax(MLP(q)): (n, h · d) of this process's heads -> (n, 1 + levels), f32, of all of them.
    pub(super) fn weights(&self, q: &Tensor) -> Result<Tensor> {
        let q = q.to_dtype(DType::F32)?;
        let inner = self.group.summed_in_graph(&product(&q, &self.down.0)?)?;
        let inner = inner.broadcast_add(&self.down.1)?;
        // x · σ(x), in candle's ops: the gradient of its silu is exact.
        let inner = inner.silu()?;
        let logits = product(&inner, &self.up.0)?.broadcast_add(&self.up.1)?;
        softmax(&self.group.copied_in_graph(&logits)?)
    }

    /// Whether the kernels' one pass makes keys and values: on a card, for rates that are not learned and no recalled
    /// vector. On the processor plain operations do, which that pass is tested against.
    pub(super) fn is_fused(&self, device: &Device, head_dim: usize) -> bool {
        let Rates::Fixed { values, .. } = &self.rates else { return false };
        let known = values.len() <= MAX_RATES && head_dim.is_multiple_of(8);
        let plain = self.kind == MemoryKind::Fastmka && self.recalled.is_none();
        device.is_cuda() && known && plain
    }

    /// Fused keys and values as attention reads them, in the kernels' one pass, on the tape.
    ///
    /// q (n, h · d); kv (b, t, 2, g, d) without bias; bias (2, g, d) and norm (d) of the keys, f32 -> (b, t, g, d) each.
    pub(super) fn fused(
        &self,
        q: &Value,
        kv: &Value,
        (bias, norm): (Option<&Value>, Option<&Value>),
        eps: f64,
        pass: &Pass,
    ) -> Result<(Value, Value)> {
        let Rates::Fixed { values, .. } = &self.rates else {
            return Err(Error::model(
                "memory: learned rates, expected fixed ones in the fused pass",
            ));
        };
        let (b, t, two, g, d) = kv.tensor().dims5()?;
        let m = values.len();
        // Products of bf16 queries may round their f32 weights as far.
        let tf32 = q.tensor().dtype() != DType::F32;
        let product =
            |x: &Value, weight| ops::project_one(x, Projection { weight, adapter: None, tf32 });
        let inner = self.group.summed(&product(&ops::cast(q, DType::F32)?, &self.down.0)?)?;
        let inner = ops::silu_bias(&inner, &self.down.1)?;
        let logits = ops::add_bias(&product(&inner, &self.up.0)?, &self.up.1)?;
        let logits = self.group.copied(&logits);
        let state = Tensor::zeros((b, m, two, g, d), DType::F32, kv.tensor().device())?;
        let rest = RouteRest { state: &state, gate: &self.gate, bias, norm };
        let params = RouteParams {
            rates: values,
            seen: 0,
            bias_correction: self.bias_correction,
            eps: eps as f32,
            angles: &pass.row_angles,
        };
        Ok(ops::route(kv, &ops::reshape(&logits, (b, t, 1 + m))?, rest, &params)?)
    }

    /// The levels of projected keys and values: q (n, h · d), kv (n, c) -> (n, levels, c), f32.
    ///
    /// # Errors
    /// `InvalidArgument` for a recalled vector of a stream that goes on from a cache, which keeps no chunks.
    pub(super) fn levels(
        &self,
        q: &Tensor,
        kv: &Tensor,
        head_dim: usize,
        pass: &Pass,
        cached: Option<&mut Cached<'_>>,
    ) -> Result<Tensor> {
        let Some(window) = self.recalled else { return self.averages(kv, pass, cached) };
        if cached.is_some() {
            return Err(Error::invalid(
                "decode: memory.recalled_vector true, expected false: a stream keeps no chunks",
            ));
        }
        let recalled = vector::recalled(q, kv, pass.b, window, head_dim)?;
        Ok(Tensor::cat(&[&self.averages(kv, pass, None)?, &recalled], 1)?)
    }

    /// The EMA of projected keys and values at each rate: kv (n, c) -> (n, m, c), f32.
    ///
    /// A rate that is one number commutes with the projections, and the projections are narrower than the hidden state.
    fn averages(
        &self,
        kv: &Tensor,
        pass: &Pass,
        cached: Option<&mut Cached<'_>>,
    ) -> Result<Tensor> {
        let c = kv.dim(1)?;
        let rates = self.rates.values()?;
        let m = rates.dim(0)?;
        let kv = kv.reshape((pass.b, pass.t, c))?;
        let levels = match cached {
            None => {
                let state = Tensor::zeros((pass.b, m, c), DType::F32, kv.device())?;
                ema_scan_learned(&kv, &state, &rates, 0, self.bias_correction)?.0
            }
            Some(Cached { cache, seen }) => {
                let state = match &cache.ema {
                    Some(state) => state.clone(),
                    None => Tensor::zeros((pass.b, m, c), DType::F32, kv.device())?,
                };
                let seen = *seen as u64;
                let (levels, state) =
                    ema_scan_learned(&kv, &state, &rates, seen, self.bias_correction)?;
                cache.ema = Some(state.detach());
                levels
            }
        };
        Ok(levels.reshape((pass.b * pass.t, m, c))?)
    }
}
