//! The attention seam: the one way from a model's layer to a session's memory and back.
//! Knows positions, the cache and FastMKA's route; knows no weights of a model and no file.

use crate::cache::{Cache, SINK_PAGES};
use crate::error::Result;
use crate::models::decoder::Linear;
use crate::models::frequencies::Frequencies;
use crate::models::weights::Weights;
use candle_core::{D, Device, Tensor};
use mka_kernels::{
    AttentionParams, PAGE_TOKENS, RotaryAngles, ema_advance, ema_scan, fuse_levels, merge_states,
    paged_attention, rotate,
};

/// FastMKA's gate and router of one layer (design 3.4); closed for a pretrained model.
pub(crate) enum Route {
    /// The gate is 0: keys and values come from the layer's own input, bit for bit.
    Closed,
    Open {
        gate: f64,
        down: Linear,
        up: Linear,
    },
}

impl Route {
    /// Loads the route of `layer` from the tensors of mka.safetensors, if they are there and the gate is not 0.
    pub(crate) fn load(
        layer: usize,
        q_size: usize,
        num_rates: usize,
        weights: &Weights,
        device: &Device,
    ) -> Result<Self> {
        let name = |part: &str| format!("layers.{layer}.{part}");
        if !weights.contains(&name("gate")) {
            return Ok(Self::Closed);
        }
        let gate = f64::from(weights.values(&name("gate"), 1)?[0]);
        // Half of the queries' width, or a low rank: the file says.
        let inner = weights.rows(&name("router.down.weight")).unwrap_or(q_size / 2);
        let levels = num_rates + 1;
        let linear = |part: &str, rows: usize, cols: usize| -> Result<Linear> {
            let weight = weights.matrix(&name(&format!("router.{part}.weight")), rows, cols)?;
            let bias = weights.vector(&name(&format!("router.{part}.bias")), rows)?;
            Linear::new(weight, Some(bias)).to_device(device)
        };
        let (down, up) = (linear("down", inner, q_size)?, linear("up", levels, inner)?);
        Ok(if gate == 0.0 { Self::Closed } else { Self::Open { gate, down, up } })
    }

    /// λ = softmax(MLP(q)) over {x, e¹, ..}: q (t, q_size) -> (t, 1 + rates).
    fn weights(down: &Linear, up: &Linear, q: &Tensor) -> Result<Tensor> {
        let inner = candle_nn::ops::silu(&down.forward(q)?)?;
        Ok(candle_nn::ops::softmax(&up.forward(&inner)?, D::Minus1)?)
    }
}

/// What the seam must know of the stream's model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SeamConfig<'a> {
    pub(crate) frequencies: &'a Frequencies,
    pub(crate) rates: &'a [f32],
    pub(crate) bias_correction: bool,
    /// Positions are exact below this stream position and compact from it on.
    pub(crate) trained_tokens: u64,
}

impl SeamConfig<'_> {
    /// Tokens that can run in one pass from `position` on: a pass is exact or compact, never both.
    pub(crate) fn block_limit(&self, position: u64, block_tokens: usize) -> usize {
        match self.trained_tokens.checked_sub(position) {
            Some(left) if left > 0 => block_tokens.min(left.min(usize::MAX as u64) as usize),
            _ => block_tokens,
        }
    }
}

/// One forward pass's handle on a session's cache: `count` tokens at the cache's position.
pub(crate) struct AttentionSeam<'a> {
    config: SeamConfig<'a>,
    cache: &'a mut Cache,
    start: u64,
    count: usize,
    angles: RotaryAngles,
    /// Angles of the queries on the compact axis, where the sinks keep positions 0..64; None in exact mode.
    compact: Option<RotaryAngles>,
}

impl<'a> AttentionSeam<'a> {
    /// Reserves room for `count` tokens.
    pub(crate) fn open(config: SeamConfig<'a>, cache: &'a mut Cache, count: usize) -> Result<Self> {
        cache.reserve(count)?;
        let start = cache.position();
        let frequencies = config.frequencies;
        let positions = start..start + count as u64;
        let angles = frequencies.angles(positions.clone());
        let compact = (start >= config.trained_tokens).then(|| {
            // What a query attends to lies, in stream order, at 0..n - 1, itself last (StreamingLLM, section 3.2).
            let sinks = SINK_PAGES * PAGE_TOKENS as u64;
            let compact = |t: u64| {
                let window_start = (cache.first_window_page(t) * PAGE_TOKENS as u64).max(sinks);
                (t - window_start.min(t)) + sinks.min(t)
            };
            frequencies.angles(positions.map(compact))
        });
        Ok(Self { config, cache, start, count, angles, compact })
    }

    /// FastMKA's mix before the key and value projections: x (t, hidden), q (t, q_size) -> (t, hidden).
    ///
    /// The EMA runs from the first token on, gate open or not, so that a session can be continued by a trained gate.
    pub(crate) fn fuse(
        &mut self,
        layer: usize,
        route: &Route,
        x: &Tensor,
        q: &Tensor,
    ) -> Result<Tensor> {
        let state = self.cache.ema(layer);
        // The summary runs on the processor, whatever the device.
        let inputs = x.to_device(&Device::Cpu)?;
        match route {
            Route::Closed => {
                let advanced = ema_advance(&inputs, state, self.config.rates)?;
                self.cache.set_ema(layer, advanced);
                Ok(x.clone())
            }
            Route::Open { gate, down, up } => {
                let correction = self.config.bias_correction;
                let (levels, advanced) =
                    ema_scan(&inputs, state, self.config.rates, self.start, correction)?;
                self.cache.set_ema(layer, advanced);
                let levels = levels.to_device(x.device())?;
                let weights = Route::weights(down, up, q)?;
                Ok(fuse_levels(x, &levels, &weights, *gate)?)
            }
        }
    }

    /// Appends keys and values and attends to sinks and window with one softmax.
    ///
    /// Shapes: `q` (t, num_heads, head_dim), `k`, `v` (t, num_kv_heads, head_dim), before RoPE and after q/k norm;
    /// the result is (t, num_heads, head_dim). `sliding_window`: the layer's own token-exact window.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        sliding_window: Option<u64>,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        self.cache.write(layer, &rotate(k, &self.angles)?, k, v)?;
        let end = self.start + self.count as u64;
        let last_page = end.div_ceil(PAGE_TOKENS as u64);
        let first_page = self.cache.first_window_page(self.start);
        let pool = self.cache.pool(layer);
        let rotated = rotate(q, &self.angles)?;
        let scale = 1.0 / (q.dim(2)? as f32).sqrt();
        let attend = |q: &Tensor, pages, window_tokens, sliding_window| -> Result<_> {
            let pages = self.cache.page_refs(pages, end)?;
            let params = AttentionParams {
                scale,
                query_start: self.start,
                pages,
                window_tokens,
                sliding_window,
            };
            Ok(paged_attention(q, &pool.keys, &pool.values, &params)?)
        };
        let window = Some(self.cache.window_tokens());
        if self.cache.first_window_page(end.saturating_sub(1)) == 0 && self.compact.is_none() {
            return Ok(
                attend(&rotated, (0..last_page).collect::<Vec<_>>(), None, sliding_window)?.out
            );
        }
        let window_pages: Vec<u64> = (first_page.max(SINK_PAGES)..last_page).collect();
        let recent = attend(&rotated, window_pages, window, sliding_window)?;
        let sink_pages: Vec<u64> = (0..SINK_PAGES.min(last_page)).collect();
        let sinks = match &self.compact {
            Some(compact) => attend(&rotate(q, compact)?, sink_pages, None, None)?,
            None => attend(&rotated, sink_pages, None, sliding_window)?,
        };
        Ok(merge_states(&sinks, &recent)?.out)
    }

    /// Ends the pass: its tokens are part of the stream now.
    pub(crate) fn finish(self) {
        self.cache.advance(self.count);
    }
}
