//! The choice among the pages on the device and the copy of the chosen: queries go in, tokens to attend to come out.
//! Knows the mirror's layers; which rule looks at what is the rule's matter.

use super::{Layer, Mirror};
use crate::error::Result;
use crate::pages::PageRule;
use crate::pages::gather::RecallScope;
use crate::pages::recalled::{Recalled, RecalledRuns, Recovered};
use crate::pages::rivals::device::{Choosable, pooled_queries};
use crate::pages::scan::reads_every_key;
use crate::pages::selection::OVER_FETCH;
use crate::pages::store::PageStore;
use candle_core::Tensor;
use mka_kernels::recall::{Choice, ChoiceParams, ChoiceRun, Placement, SPAN};
use mka_kernels::{AttentionRun, PAGE_TOKENS, PageRef, RotaryAngles};

/// What a copy of recalled tokens on the device holds, for each run of queries.
struct Copied {
    /// (runs · pages, g, PAGE_TOKENS, d), rotated.
    keys: Tensor,
    values: Tensor,
    /// Of each run.
    tokens: usize,
    recovered: Option<Tensor>,
}

/// A run of queries and what it may recall; of several runs, the one of most rows.
#[derive(Clone, Copy)]
pub(in crate::pages) struct Request {
    pub(in crate::pages) layer: usize,
    pub(in crate::pages) rows: usize,
    pub(in crate::pages) budget: usize,
    pub(in crate::pages) all: bool,
    pub(in crate::pages) scope: RecallScope,
}

impl PageStore {
    /// What queries `q` (t, h, d), before RoPE, recall, chosen and copied on the device; None where the device has not
    /// every page.
    pub(in crate::pages) fn recall_on_device(
        &mut self,
        q: &Tensor,
        request: Request,
    ) -> Result<Option<Recalled>> {
        let Request { rows, all, .. } = request;
        let run = ChoiceRun { queries: q.dim(0)?, pages: rows };
        let Some(copied) = self.copy_on_device(q, request, &[run])? else { return Ok(None) };
        Ok(Some(Recalled {
            keys: copied.keys,
            values: copied.values,
            tokens: copied.tokens,
            starts: all.then(|| self.starts(rows)),
            recovered: match all {
                true => Recovered::Share(1.0),
                false => copied.recovered.map_or(Recovered::Unknown, Recovered::OnDevice),
            },
            left: None,
        }))
    }

    /// [`PageStore::recall_on_device`] for several runs of the queries at once.
    pub(in crate::pages) fn recall_runs_on_device(
        &mut self,
        q: &Tensor,
        request: Request,
        runs: &[ChoiceRun],
    ) -> Result<Option<RecalledRuns>> {
        let Some(copied) = self.copy_on_device(q, request, runs)? else { return Ok(None) };
        let page = |slot, start, len| PageRef { slot, start, len, bias: 0.0 };
        // Every stored page lies there once, and a run sees the first ones; or each run has chosen its own.
        let (pages, runs) = if request.all {
            let starts = self.starts(request.rows).into_iter().enumerate();
            let pages = starts.map(|(slot, start)| page(slot, start, PAGE_TOKENS)).collect();
            let of = |run: &ChoiceRun| {
                let tokens = run.pages * PAGE_TOKENS;
                (AttentionRun { queries: run.queries, pages: 0..run.pages }, tokens)
            };
            (pages, runs.iter().map(of).collect())
        } else {
            let each = copied.tokens.div_ceil(PAGE_TOKENS);
            let own = |slot: usize| {
                let start = slot % each * PAGE_TOKENS;
                page(slot, start as u64, PAGE_TOKENS.min(copied.tokens - start))
            };
            let of = |(i, run): (usize, &ChoiceRun)| {
                let pages = i * each..(i + 1) * each;
                (AttentionRun { queries: run.queries, pages }, copied.tokens)
            };
            let pages = (0..runs.len() * each).map(own).collect();
            (pages, runs.iter().enumerate().map(of).collect())
        };
        Ok(Some(RecalledRuns { keys: copied.keys, values: copied.values, pages, runs }))
    }

    /// Stream positions of the first tokens of the first `rows` pages.
    fn starts(&self, rows: usize) -> Vec<u64> {
        self.order[..rows].iter().map(|page| page * PAGE_TOKENS as u64).collect()
    }

    /// The copy of what the runs choose, or of every token; the mirror goes for good where its device has no memory left, or
    /// refuses what it is asked for.
    fn copy_on_device(
        &mut self,
        q: &Tensor,
        request: Request,
        runs: &[ChoiceRun],
    ) -> Result<Option<Copied>> {
        let Request { layer, all, .. } = request;
        self.mirror_layer(layer, 1);
        let Some(mut mirror) = self.mirror.take() else { return Ok(None) };
        let pins = match all {
            true => Ok(None),
            false => self.prepare(&mut mirror, layer),
        };
        self.mirror = Some(mirror);
        let copied = pins.and_then(|pins| self.copy_from_mirror(q, request, runs, pins.as_ref()));
        copied.or_else(|error| {
            tracing::warn!(%error, "the device cannot choose: pages are chosen from in host memory");
            self.mirror = None;
            self.bring_votes();
            Ok(None)
        })
    }

    /// [`PageStore::copy_on_device`] once all is there.
    fn copy_from_mirror(
        &mut self,
        q: &Tensor,
        request: Request,
        runs: &[ChoiceRun],
        pins: Option<&Tensor>,
    ) -> Result<Option<Copied>> {
        let Request { layer, rows, budget, all, scope } = request;
        let Some(mirror) = &self.mirror else { return Ok(None) };
        let (Some(own), Some(angles)) = (&mirror.layers[layer], &self.angles) else {
            return Ok(None);
        };
        let angles = angles.of(layer);
        if own.pages.len() < rows || self.shape.window_tokens >= angles.len() {
            return Ok(None);
        }
        // Places in the stream are counted from the first page on; none is missing behind it.
        let first = self.order[0];
        let counted_from = first.wrapping_sub(own.pages.gone() as u64);
        let choice = match (all, self.config.rule) {
            (true, _) => Some(Choice::all(rows * PAGE_TOKENS)),
            (false, PageRule::InfLlm | PageRule::Quest) => {
                self.choose_by_table(layer, q, own, rows, budget)?
            }
            (false, _) => {
                let asked = (request, q.dim(1)?, counted_from);
                let params = self.vote_params(asked, angles, runs, pins);
                Some(own.pages.choose(q, &params)?)
            }
        };
        let Some(mut choice) = choice else { return Ok(None) };
        let placement = match scope.compact {
            true => Placement::Compact(self.shape.sink_pages * PAGE_TOKENS as u64),
            false => Placement::Stream(first * PAGE_TOKENS as u64),
        };
        let (keys, values) = own.pages.gather(&choice, angles, placement)?;
        // Other systems' rules give no estimate, here and in host memory.
        let recovered = choice.recovered.clone().filter(|_| self.config.rule == PageRule::Mka);
        let (tokens, kept) = (choice.num_tokens(), choice.standing.take());
        if let Some(kept) = kept {
            self.message.stand(layer, counted_from, kept, self.shape.num_kv_heads)?;
        }
        Ok(Some(Copied { keys, values, tokens, recovered }))
    }

    /// What a choice of `layer` needs beside its pages: what another system's rule keeps of them, and the pinned landmarks.
    fn prepare(&self, mirror: &mut Mirror, layer: usize) -> Result<Option<Tensor>> {
        if let (Some(own), Some(first)) = (&mut mirror.layers[layer], self.order.first()) {
            let rows = own.pages.len();
            let stored = Choosable { pages: &own.pages, first: *first, rows };
            match (self.config.rule, &self.following) {
                (PageRule::Quest, _) => own.table.bound(stored)?,
                (PageRule::InfLlm, Some(following)) => {
                    let pages = *first..first + rows as u64;
                    own.table.represent(following, layer, pages, &mirror.device)?;
                }
                _ => {}
            }
        }
        self.uploaded_pins(mirror)
    }

    /// How the runs vote: by the library's own rule or by TokenSelect's.
    fn vote_params<'a>(
        &'a self,
        (request, num_heads, counted_from): (Request, usize, u64),
        angles: &'a RotaryAngles,
        runs: &'a [ChoiceRun],
        pins: Option<&'a Tensor>,
    ) -> ChoiceParams<'a> {
        let Request { layer, budget, scope, .. } = request;
        let longest = runs.iter().map(|run| run.queries).max().unwrap_or(0);
        let rows = runs.iter().map(|run| run.pages).max().unwrap_or(0);
        let heads_together = self.config.rule == PageRule::TokenSelect;
        let every = heads_together || reads_every_key(self.config.scan, rows);
        ChoiceParams {
            runs,
            tokens: budget,
            landmarks: (!every).then_some(OVER_FETCH * budget / SPAN),
            pooled: self.pooled(longest, num_heads),
            scale: self.config.rule.scale(self.shape.head_dim),
            angles,
            distance: self.shape.window_tokens,
            pins,
            reach: if heads_together { 0 } else { self.config.vote_reach },
            standing: self.message.standing_on_device(layer, counted_from, scope.is_prompt),
            keep_votes: self.message.keeps_votes(&self.config),
            heads_together,
        }
    }

    /// The choice of one run of `layer` among the first `rows` pages by InfLLM's or Quest's rule; None where the processor
    /// must choose.
    fn choose_by_table(
        &self,
        layer: usize,
        q: &Tensor,
        own: &Layer,
        rows: usize,
        budget: usize,
    ) -> Result<Option<Choice>> {
        let Some(angles) = self.angles_at(layer, self.shape.window_tokens as u64) else {
            return Ok(None);
        };
        let queries = pooled_queries(q, angles, self.config.rule.pooled(q.dim(0)?))?;
        let stored = Choosable { pages: &own.pages, first: self.order[0], rows };
        match self.config.rule {
            PageRule::Quest => own.table.by_bounds(&queries, stored, budget),
            _ => own.table.by_blocks(&queries, stored, self.shape.num_kv_heads, budget),
        }
    }

    /// The pinned landmarks on the mirror's device; None for none.
    fn uploaded_pins(&self, mirror: &mut Mirror) -> Result<Option<Tensor>> {
        // Pages go and come, with pins in them.
        let marks = self.pinned(self.order.len(), SPAN);
        let (known, uploaded) = &mirror.pins;
        if *known == marks {
            return Ok(uploaded.clone());
        }
        let uploaded = match marks.len() {
            0 => None,
            count => Some(Tensor::from_slice(&marks, count, &mirror.device)?),
        };
        mirror.pins = (marks, uploaded.clone());
        Ok(uploaded)
    }
}
