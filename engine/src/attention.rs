//! The attention seam: the one way from a model's layer to a session's memory and back.
//! Knows positions, the cache and FastMKA's route; knows no weights of a model and no file.

use crate::cache::Cache;
use crate::error::Result;
use crate::models::decoder::{Linear, Loader, SummedLinear};
use crate::models::frequencies::{LayerAngles, LayerFrequencies};
use crate::pages::{PageStore, RecallScope, Recalled, Together};
use candle_core::{D, Tensor};
use mka_kernels::{
    AttentionParams, AttentionPart, AttentionRun, AttentionState, PAGE_TOKENS, PagePool,
    RotaryAngles, ShareSums, ema_advance, ema_scan, fuse_levels, merge_states, paged_attention,
    paged_attention_runs, paged_attention_union, rotate,
};
use std::sync::Arc;

/// FastMKA's gate and router of one layer (`docs/training.md`); closed for a pretrained model.
pub(crate) enum Route {
    /// The gate is 0: keys and values come from the layer's own input, bit for bit.
    Closed,
    Open {
        gate: f64,
        /// Reads the queries of all heads: where processes share the model, each has the columns of its own.
        down: SummedLinear,
        up: Linear,
    },
}

impl Route {
    /// Loads the route of `layer` from the tensors of mka.safetensors, if they are there and the gate is not 0.
    pub(crate) fn load(
        layer: usize,
        q_size: usize,
        num_rates: usize,
        loader: &Loader<'_>,
    ) -> Result<Self> {
        let weights = loader.weights;
        let name = |part: &str| format!("layers.{layer}.{part}");
        if !weights.contains(&name("gate")) {
            return Ok(Self::Closed);
        }
        let gate = f64::from(weights.values(&name("gate"), 1)?[0]);
        // Half of the queries' width, or a low rank: the file says.
        let inner = weights.rows(&name("router.down.weight")).unwrap_or(q_size / 2);
        let levels = num_rates + 1;
        let down = loader.summed(&name("router.down"), inner, q_size, true)?;
        let up = loader.linear(&name("router.up"), levels, inner, true)?;
        Ok(if gate == 0.0 { Self::Closed } else { Self::Open { gate, down, up } })
    }

    /// λ = softmax(MLP(q)) over {x, e¹, ..}: q (t, q_size) -> (t, 1 + rates).
    fn weights(down: &SummedLinear, up: &Linear, q: &Tensor) -> Result<Tensor> {
        let inner = candle_nn::ops::silu(&down.forward(q)?)?;
        Ok(candle_nn::ops::softmax(&up.forward(&inner)?, D::Minus1)?)
    }
}

/// What the seam must know of the stream's model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SeamConfig<'a> {
    pub(crate) frequencies: &'a LayerFrequencies,
    pub(crate) rates: &'a [f32],
    pub(crate) bias_correction: bool,
    /// Positions that the model was trained on.
    pub(crate) trained_tokens: u64,
    /// Positions are exact below this stream position, at most `trained_tokens`, and compact from it on.
    pub(crate) exact_tokens: u64,
}

impl SeamConfig<'_> {
    /// The same for what `cache` recalls.
    pub(crate) fn over(self, cache: &Cache) -> Self {
        Self { exact_tokens: cache.exact_tokens(self.trained_tokens), ..self }
    }

    /// Tokens that can run in one pass from `position` on: a pass is exact or compact, never both.
    pub(crate) fn block_limit(&self, position: u64, block_tokens: usize) -> usize {
        match self.exact_tokens.checked_sub(position) {
            Some(left) if left > 0 => block_tokens.min(left.min(usize::MAX as u64) as usize),
            _ => block_tokens,
        }
    }
}

/// What the queries of a run attend to behind their window.
struct Far {
    /// (t, num_heads, head_dim), rotated.
    query: Tensor,
    sinks: AttentionParams,
    /// Recalled tokens and the pages that they lie in.
    recalled: Option<(Arc<Recalled>, AttentionParams)>,
}

impl Far {
    fn recalled(&self) -> Option<&Recalled> {
        self.recalled.as_ref().map(|(recalled, _)| recalled.as_ref())
    }

    /// The sinks in `pool` and, where there are any, the recalled tokens.
    fn parts<'a>(&'a self, pool: &'a PagePool) -> Vec<AttentionPart<'a>> {
        let mut parts = vec![part(&self.query, pool, &self.sinks)];
        parts.extend(self.recalled.as_ref().map(|(recalled, params)| AttentionPart {
            q: &self.query,
            keys: &recalled.keys,
            values: &recalled.values,
            params,
        }));
        parts
    }
}

/// Pages of `pool` that rotated queries attend to.
fn part<'a>(q: &'a Tensor, pool: &'a PagePool, params: &'a AttentionParams) -> AttentionPart<'a> {
    let (keys, values) = (&pool.keys, &pool.values);
    AttentionPart { q, keys, values, params }
}

/// Angles of neighbouring queries on the compact axis.
struct CompactAngles {
    query_start: u64,
    /// Run by run, how many queries there are and how many tokens are recalled before them.
    runs: Vec<(usize, usize)>,
    angles: LayerAngles,
}

/// One forward pass's handle on a session's cache: `count` tokens at the cache's position.
pub(crate) struct AttentionSeam<'a> {
    config: SeamConfig<'a>,
    cache: &'a mut Cache,
    start: u64,
    count: usize,
    angles: LayerAngles,
    /// Positions are compact: what a query attends to lies, in stream order, at 0..n - 1, itself last
    /// (StreamingLLM, section 3.2).
    compact: bool,
    compact_angles: Vec<CompactAngles>,
}

impl<'a> AttentionSeam<'a> {
    /// Reserves room for `count` tokens, and hands over what leaves the window before the last of them.
    pub(crate) fn open(config: SeamConfig<'a>, cache: &'a mut Cache, count: usize) -> Result<Self> {
        cache.reserve(count)?;
        cache.absorb_ahead(count)?;
        let start = cache.position();
        let angles = config.frequencies.angles(start..start + count as u64);
        let compact = start >= config.exact_tokens;
        if let Some(pages) = cache.pages_mut() {
            let end = (start + count as u64).min(config.exact_tokens);
            pages.need_angles(end, |positions| config.frequencies.angles(positions));
        }
        Ok(Self { config, cache, start, count, angles, compact, compact_angles: Vec::new() })
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
        match route {
            Route::Closed => {
                let advanced = ema_advance(x, state, self.config.rates)?;
                self.cache.set_ema(layer, advanced);
                Ok(x.clone())
            }
            Route::Open { gate, down, up } => {
                let correction = self.config.bias_correction;
                let (levels, advanced) =
                    ema_scan(x, state, self.config.rates, self.start, correction)?;
                self.cache.set_ema(layer, advanced);
                let weights = Route::weights(down, up, q)?;
                Ok(fuse_levels(x, &levels, &weights, *gate)?)
            }
        }
    }

    /// Appends keys and values and attends to sinks, recalled tokens and window with one softmax.
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
        self.cache.write(layer, k, v, &self.angles)?;
        let end = self.start + self.count as u64;
        let last_page = end.div_ceil(PAGE_TOKENS as u64);
        let first_page = self.cache.first_window_page(self.start);
        let last_first_page = self.cache.first_window_page(end.saturating_sub(1));
        // What `open` could not hand over: pages that this pass itself has written.
        self.cache.absorb(layer..layer + 1, last_first_page)?;
        let rotated = rotate(q, self.angles.of(layer))?;
        if let Some(pages) = self.cache.pages_mut() {
            pages.note_queries(layer, self.start, q)?;
        }
        if last_first_page == 0 && !self.compact {
            let pages = (0..last_page).collect();
            return Ok(self.attend_stream(layer, &rotated, pages, None, sliding_window)?.out);
        }
        let window_pages: Vec<u64> = (first_page.max(self.cache.sink_pages())..last_page).collect();
        if self.count == 1 {
            return self.attend_token(layer, sliding_window, window_pages, q, rotated);
        }
        let window = Some(self.cache.window_tokens());
        let recent = self.attend_stream(layer, &rotated, window_pages, window, sliding_window)?;
        let mut far = Vec::new();
        let runs = self.runs();
        let at_once = self.cache.pages().map_or(1, PageStore::runs_at_once);
        for runs in runs.chunks(at_once) {
            if let Some(state) = self.attend_runs(layer, sliding_window, runs, q, &rotated)? {
                far.push(state);
                continue;
            }
            for (first, count) in runs.iter().copied() {
                let q = q.narrow(0, first, count)?.contiguous()?;
                let rotated = rotated.narrow(0, first, count)?.contiguous()?;
                far.push(self.attend_far(layer, sliding_window, first, &q, rotated)?);
            }
        }
        Ok(merge_states(&joined(far)?, &recent)?.out)
    }

    /// [`AttentionSeam::attend`] for a pass of one token whose window is `window_pages`: all that it attends to is worked on
    /// at once.
    fn attend_token(
        &mut self,
        layer: usize,
        sliding_window: Option<u64>,
        window_pages: Vec<u64>,
        q: &Tensor,
        rotated: Tensor,
    ) -> Result<Tensor> {
        let far = self.far(layer, sliding_window, 0, q, rotated.clone())?;
        let window = Some(self.cache.window_tokens());
        let near = self.stream_params(&rotated, window_pages, window, sliding_window)?;
        let recalled = far.recalled();
        let sums = match (recalled, self.cache.pages_mut()) {
            (Some(_), Some(pages)) => pages.share_sums(layer, q.dim(1)?)?,
            _ => None,
        };
        let mut parts = vec![part(&rotated, self.cache.pool(layer), &near)];
        parts.extend(far.parts(self.cache.pool(layer)));
        // What is recalled is the last part.
        let counted = parts.len() - 1;
        let recovered = recalled.and_then(Recalled::recovered_on_device);
        let shares = sums.as_ref().map(|sums| ShareSums { part: counted, sums, recovered });
        let union = paged_attention_union(&parts, shares.as_ref())?;
        let state = self.with_estimate(layer, q, recalled, union.state)?;
        if let (Some(recalled), Some(pages)) = (recalled, self.cache.pages_mut()) {
            pages.note_share(layer, recalled, &union.part_lses[counted], &state.lse)?;
        }
        Ok(state.out)
    }

    /// Attention of rotated queries to `pages` of the stream in the device's pool.
    fn attend_stream(
        &self,
        layer: usize,
        q: &Tensor,
        pages: Vec<u64>,
        window_tokens: Option<u64>,
        sliding_window: Option<u64>,
    ) -> Result<AttentionState> {
        let pool = self.cache.pool(layer);
        let params = self.stream_params(q, pages, window_tokens, sliding_window)?;
        Ok(paged_attention(q, &pool.keys, &pool.values, &params)?)
    }

    fn stream_params(
        &self,
        q: &Tensor,
        pages: Vec<u64>,
        window_tokens: Option<u64>,
        sliding_window: Option<u64>,
    ) -> Result<AttentionParams> {
        Ok(AttentionParams {
            scale: scale(q)?,
            query_start: self.start,
            pages: self.cache.page_refs(pages, self.start + self.count as u64)?,
            window_tokens,
            sliding_window,
        })
    }

    /// The pass cut where the window moves on by a page: (first query, count). Queries of one run have the same tokens
    /// behind their window, and choose among them together. One run where nothing is recalled.
    fn runs(&self) -> Vec<(usize, usize)> {
        if self.cache.pages().is_none_or(|pages| !pages.active) {
            return vec![(0, self.count)];
        }
        let mut runs = Vec::new();
        let mut first = 0;
        while first < self.count {
            let page = |i: usize| self.cache.first_window_page(self.start + i as u64);
            let more = (first..self.count).take_while(|i| page(*i) == page(first)).count();
            // Before the window first moves a run would be as long as the window.
            let count = more.min(PAGE_TOKENS);
            runs.push((first, count));
            first += count;
        }
        runs
    }

    /// Attention of one run's queries to the sinks and to what they recall.
    ///
    /// Shapes: `q`, `rotated` (t, num_heads, head_dim), `first` the run's first query in the pass.
    fn attend_far(
        &mut self,
        layer: usize,
        sliding_window: Option<u64>,
        first: usize,
        q: &Tensor,
        rotated: Tensor,
    ) -> Result<AttentionState> {
        let far = self.far(layer, sliding_window, first, q, rotated)?;
        let union = paged_attention_union(&far.parts(self.cache.pool(layer)), None)?;
        let recalled = far.recalled();
        self.with_estimate(layer, q, recalled, union.state)
    }

    /// What one run's queries attend to behind their window, chosen now.
    fn far(
        &mut self,
        layer: usize,
        sliding_window: Option<u64>,
        first: usize,
        q: &Tensor,
        rotated: Tensor,
    ) -> Result<Far> {
        let query_start = self.start + first as u64;
        let scope = self.scope(first, sliding_window);
        let recalled = match self.cache.pages_mut() {
            Some(pages) => pages.recall(layer, q, scope)?,
            None => None,
        };
        let num_recalled = recalled.as_ref().map_or(0, |recalled| recalled.tokens);
        let query = match self.compact {
            true => {
                let runs = vec![(q.dim(0)?, num_recalled)];
                rotate(q, &self.compact_angles(layer, query_start, runs))?
            }
            false => rotated,
        };
        let sinks = self.sink_params(&query, query_start, sliding_window)?;
        let recalled = recalled.map(|recalled| {
            let params = AttentionParams { pages: recalled.page_refs(), ..sinks };
            (recalled, params)
        });
        Ok(Far { query, sinks, recalled })
    }

    /// `state` and, where what was not recalled is estimated, that.
    fn with_estimate(
        &self,
        layer: usize,
        q: &Tensor,
        recalled: Option<&Recalled>,
        state: AttentionState,
    ) -> Result<AttentionState> {
        let (Some(recalled), Some(pages)) = (recalled, self.cache.pages()) else {
            return Ok(state);
        };
        match pages.estimate(layer, q, recalled)? {
            Some(rest) => Ok(merge_states(&state, &rest)?),
            None => Ok(state),
        }
    }

    /// What queries from `query_start` on attend to behind their window, with the sinks for its pages.
    fn sink_params(
        &self,
        query: &Tensor,
        query_start: u64,
        sliding_window: Option<u64>,
    ) -> Result<AttentionParams> {
        let end = self.start + self.count as u64;
        let sink_pages = 0..self.cache.sink_pages().min(end.div_ceil(PAGE_TOKENS as u64));
        Ok(AttentionParams {
            scale: scale(query)?,
            query_start,
            pages: self.cache.page_refs(sink_pages, end)?,
            window_tokens: None,
            // Beyond what the model was trained on the sinks stand right before the window: a layer whose own window is longer
            // than the session's sees them there, any other's own hides them.
            sliding_window: sliding_window.filter(|own| {
                self.start < self.config.trained_tokens || *own <= self.cache.window_tokens()
            }),
        })
    }

    /// What the run whose first query is the pass's query `first` recalls for.
    fn scope(&self, first: usize, sliding_window: Option<u64>) -> RecallScope {
        RecallScope {
            before_page: self.cache.first_window_page(self.start + first as u64),
            compact: self.compact,
            sliding: sliding_window.is_some(),
            is_prompt: self.count > 1,
        }
    }

    /// [`AttentionSeam::attend_far`] for neighbouring runs (first query, count) at once; None where each must be asked by
    /// itself. Shapes: `q`, `rotated` (t, num_heads, head_dim) are the whole pass's.
    fn attend_runs(
        &mut self,
        layer: usize,
        sliding_window: Option<u64>,
        runs: &[(usize, usize)],
        q: &Tensor,
        rotated: &Tensor,
    ) -> Result<Option<AttentionState>> {
        let [(first, _), _, ..] = *runs else { return Ok(None) };
        let count = runs.iter().map(|(_, count)| count).sum();
        let scope = |(first, count): &(usize, usize)| (*count, self.scope(*first, sliding_window));
        let scopes: Vec<_> = runs.iter().map(scope).collect();
        let Some(pages) = self.cache.pages_mut() else { return Ok(None) };
        let q = q.narrow(0, first, count)?.contiguous()?;
        let recalled = match pages.recall_runs(layer, &q, &scopes)? {
            Together::Apart => return Ok(None),
            Together::Nothing => None,
            Together::Recalled(recalled) => Some(recalled),
        };
        let query_start = self.start + first as u64;
        let query = match (self.compact, &recalled) {
            (false, _) => rotated.narrow(0, first, count)?.contiguous()?,
            (true, recalled) => {
                let parts = match recalled {
                    Some(recalled) => {
                        recalled.runs.iter().map(|(run, tokens)| (run.queries, *tokens)).collect()
                    }
                    None => vec![(count, 0)],
                };
                rotate(&q, &self.compact_angles(layer, query_start, parts))?
            }
        };
        let mut params = self.sink_params(&query, query_start, sliding_window)?;
        let pool = self.cache.pool(layer);
        let sinks = paged_attention(&query, &pool.keys, &pool.values, &params)?;
        let Some(recalled) = recalled else { return Ok(Some(sinks)) };
        let runs: Vec<AttentionRun> = recalled.runs.into_iter().map(|(run, _)| run).collect();
        params.pages = recalled.pages;
        let far = paged_attention_runs(&query, &recalled.keys, &recalled.values, &params, &runs)?;
        Ok(Some(merge_states(&sinks, &far)?))
    }

    /// Angles of queries of `layer` from `query_start` on, on the axis of what they attend to: of each run how many there
    /// are, and how many tokens they recall.
    fn compact_angles(
        &mut self,
        layer: usize,
        query_start: u64,
        runs: Vec<(usize, usize)>,
    ) -> RotaryAngles {
        let is_it = |own: &&CompactAngles| own.query_start == query_start && own.runs == runs;
        if let Some(known) = self.compact_angles.iter().find(is_it) {
            return known.angles.of(layer).clone();
        }
        let sinks = self.cache.sink_pages() * PAGE_TOKENS as u64;
        let recalled =
            runs.iter().flat_map(|(count, recalled)| std::iter::repeat_n(*recalled, *count));
        let compact = |(t, recalled): (u64, usize)| {
            let window = (self.cache.first_window_page(t) * PAGE_TOKENS as u64).max(sinks);
            (t - window.min(t)) + sinks.min(t) + recalled as u64
        };
        let positions: Vec<u64> = (query_start..).zip(recalled).map(compact).collect();
        let angles = self.config.frequencies.angles(positions.iter().copied());
        let of_layer = angles.of(layer).clone();
        self.compact_angles.push(CompactAngles { query_start, runs, angles });
        of_layer
    }

    /// Ends the pass: its tokens are part of the stream now.
    pub(crate) fn finish(self) {
        self.cache.advance(self.count);
    }
}

/// 1/√d for q (t, h, d).
fn scale(q: &Tensor) -> Result<f32> {
    Ok(1.0 / (q.dim(2)? as f32).sqrt())
}

/// States of successive queries as one.
fn joined(states: Vec<AttentionState>) -> Result<AttentionState> {
    match <[AttentionState; 1]>::try_from(states) {
        Ok([state]) => Ok(state),
        Err(states) => {
            let outs: Vec<&Tensor> = states.iter().map(|state| &state.out).collect();
            let lses: Vec<&Tensor> = states.iter().map(|state| &state.lse).collect();
            Ok(AttentionState { out: Tensor::cat(&outs, 0)?, lse: Tensor::cat(&lses, 0)? })
        }
    }
}
