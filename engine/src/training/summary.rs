//! The memory beside attention: rates, levels of projected keys and values, gate and router (design 3.4).
//! Knows no attention: what the levels are mixed into is the caller's matter.

use super::cache::Cached;
use super::config::{MemoryKind, MemorySettings};
use super::layers::Pass;
use super::operations::{product, softmax};
use super::parameters::{Builder, Init};
use crate::error::Result;
use candle_core::{DType, Tensor};
use mka_kernels::ema_scan_learned;

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
    Fixed(Tensor),
    /// Logits of a sigmoid.
    Learned(Tensor),
}

impl Rates {
    /// (m), f32.
    pub(super) fn values(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Fixed(rates) => rates.clone(),
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
        let q = q.to_dtype(DType::F32)?;
        let inner = product(&q, &self.down.0)?.broadcast_add(&self.down.1)?;
        // x · σ(x), in candle's ops: the gradient of its silu is exact.
        let inner = inner.silu()?;
        softmax(&product(&inner, &self.up.0)?.broadcast_add(&self.up.1)?)
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
