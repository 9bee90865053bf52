//! The memory beside attention: rates, levels of projected keys and values, gate and router (design 3.4).
//! Knows no attention: what the levels are mixed into is the caller's matter.

use super::cache::Cached;
use super::config::{MemoryKind, MemorySettings};
use super::layers::Pass;
use super::operations::{product, softmax};
use super::parameters::{Builder, Init};
use crate::error::Result;
use candle_core::{DType, Tensor};
use mka_kernels::{MAX_RATES, RouteInputs, RouteParams, ema_scan_learned, route};

/// Gate and router of one layer (design 3.4).
pub(super) struct Summary {
    pub(super) kind: MemoryKind,
    bias_correction: bool,
    /// (1), f32.
    pub(super) gate: Tensor,
    down: (Tensor, Tensor),
    up: (Tensor, Tensor),
    pub(super) rates: Rates,
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
        let levels = settings.rates.len() + 1;
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
        })
    }

    /// λ = softmax(MLP(q)): (n, h · d) -> (n, 1 + m), f32.
    pub(super) fn weights(&self, q: &Tensor) -> Result<Tensor> {
        softmax(&self.logits(q)?)
    }

    /// MLP(q): (n, h · d) -> (n, 1 + m), f32.
    fn logits(&self, q: &Tensor) -> Result<Tensor> {
        let q = q.to_dtype(DType::F32)?;
        let inner = product(&q, &self.down.0)?.broadcast_add(&self.down.1)?;
        // x · σ(x), in candle's ops: the gradient of its silu is exact.
        let inner = inner.silu()?;
        Ok(product(&inner, &self.up.0)?.broadcast_add(&self.up.1)?)
    }

    /// Fused keys and values as attention reads them, in the kernels' one pass; none where they have none: on the
    /// processor, whose plain operations are what that pass is tested against, and for rates that are learned.
    ///
    /// q (n, h · d); kv (n, 2 · g · d) without bias; bias (2, g, d) and norm (d) of the keys, f32 -> (b, t, g, d) each.
    pub(super) fn fused(
        &self,
        (q, kv): (&Tensor, &Tensor),
        (kv_heads, head_dim): (usize, usize),
        (bias, norm): (Option<&Tensor>, Option<&Tensor>),
        eps: f64,
        pass: &Pass,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let (Rates::Fixed { values, .. }, MemoryKind::Fastmka) = (&self.rates, self.kind) else {
            return Ok(None);
        };
        if !kv.device().is_cuda() || values.len() > MAX_RATES || !head_dim.is_multiple_of(8) {
            return Ok(None);
        }
        let (b, t, m) = (pass.b, pass.t, values.len());
        let inputs = RouteInputs {
            kv: &kv.reshape((b, t, 2, kv_heads, head_dim))?,
            logits: &self.logits(q)?.reshape((b, t, 1 + m))?,
            state: &Tensor::zeros((b, m, 2, kv_heads, head_dim), DType::F32, kv.device())?,
            gate: &self.gate,
            bias,
            norm,
        };
        let params = RouteParams {
            rates: values,
            seen: 0,
            bias_correction: self.bias_correction,
            eps: eps as f32,
            angles: &pass.row_angles,
        };
        let out = route(&inputs, &params)?;
        Ok(Some((out.keys, out.values)))
    }

    /// The levels of projected keys and values: kv (n, c) -> (n, m, c), f32.
    ///
    /// A rate that is one number commutes with the projections, and the projections are narrower than the hidden state.
    pub(super) fn levels(
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
