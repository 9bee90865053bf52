//! Attention behind a window with recalled tokens in the same softmax: sinks, window, the page that leaves it, and what
//! each page of queries recalls of everything older.
//! Knows no layer; which tokens are recalled is `choice.rs`.
//!
//! Pages of 64 tokens are counted from behind the sinks. A page leaves the window when no query sees it whole any more;
//! until then the queries see all of it, as in a session. So the first query whose window begins with page m is
//! window + sinks - 1 + 64 m, it and the 63 behind it choose among the m pages before, and:
//!
//! - queries whose m pages are no more than what is recalled see everything before them: one dense triangle;
//! - later ones see the sinks, their window, of page m what their window has left already, and the chosen tokens.

use super::choice::Candidates;
use super::parts::{Backward, merge, tokens};
use super::seen::{Chosen, KeyGradients, Leaving, Part};
use candle_core::{DType, Result, Tensor};
use mka_kernels::{
    DenseAttentionParams, PAGE_TOKENS, RotaryAngles, attention_backward, attention_forward,
};

/// Tokens that leave the window together.
pub(super) const PAGE: usize = PAGE_TOKENS;
/// Pages of queries that are chosen for and attended at once: bounds what is copied for them.
const PAGES_AT_ONCE: usize = 16;

/// What a layer's queries see where it recalls.
#[derive(Debug, Clone)]
pub(super) struct Recall {
    /// The last tokens, the query itself included; above 0.
    pub(super) window: usize,
    /// First tokens, which all later ones see; at most `window`.
    pub(super) sinks: usize,
    /// Tokens recalled by each key/value head; whole pages.
    pub(super) tokens: usize,
    /// Whether the layer chooses among more tokens than that; else it then recalls none.
    pub(super) chooses: bool,
    /// Of every row of q and k.
    pub(super) angles: RotaryAngles,
    /// Of position `window` alone.
    pub(super) window_angles: RotaryAngles,
}

impl Recall {
    /// The first query that does not see everything before it.
    pub(super) fn first_choosing(&self) -> usize {
        self.window + self.sinks - 1 + self.tokens + PAGE
    }

    /// Square of the scale of the angles, 1 but for YaRN: what is rotated and rotated back has grown by it.
    pub(super) fn growth(&self) -> f32 {
        let (cos, sin) = self.window_angles.at(0);
        cos.first().zip(sin.first()).map_or(1.0, |(cos, sin)| cos * cos + sin * sin)
    }

    /// Neighbouring pages of queries of a sequence of `t` tokens that choose, as many at once as are computed together.
    pub(super) fn runs(&self, t: usize) -> Vec<Run> {
        let start = self.first_choosing();
        let (whole, rest) = (t.saturating_sub(start) / PAGE, t.saturating_sub(start) % PAGE);
        let run = |page: usize, pages: usize, queries: usize| Run {
            first: start + PAGE * page,
            older: self.tokens + PAGE * (page + 1),
            pages,
            queries,
        };
        let whole_runs = (0..whole)
            .step_by(PAGES_AT_ONCE)
            .map(|page| run(page, PAGES_AT_ONCE.min(whole - page), PAGE));
        whole_runs.chain((rest > 0).then(|| run(whole, 1, rest))).collect()
    }
}

/// Neighbouring pages of queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first query.
    pub(super) first: usize,
    /// Tokens between the sinks and the first page that is not behind the window of the first page's queries; a page
    /// more for each page of queries.
    pub(super) older: usize,
    /// Pages of queries.
    pub(super) pages: usize,
    /// Queries of each: a page, or fewer at the end of the sequence.
    pub(super) queries: usize,
}

/// Attention with recall over rotated q (b, t, h, d), k and v (b, t, g, d) without history: the result, and what gives
/// the gradients. There is a query that chooses.
pub(super) fn attend(
    [q, k, v]: [Tensor; 3],
    recall: &Recall,
    scale: f32,
) -> Result<(Tensor, Backward)> {
    let parts = RecallParts::new(&q, &k, recall, scale)?;
    let (out, lse) = parts.forward(&q, &k, &v)?;
    let saved = out.clone();
    let backward = move |grad: &Tensor| parts.backward([&q, &k, &v], &saved, &lse, grad);
    Ok((out, Box::new(backward)))
}

/// Neighbouring queries that see neighbouring keys: the first of each and their number.
struct Range {
    queries: (usize, usize),
    keys: (usize, usize),
    params: DenseAttentionParams,
}

/// The parts of one call, with what was chosen.
pub(super) struct RecallParts {
    window: usize,
    sinks: usize,
    scale: f32,
    /// First query that does not see everything before it.
    first: usize,
    /// Each with its tokens by page and key/value head, (b, pages, g, tokens), u32, counted from behind the sinks; none
    /// for a layer that chooses nothing.
    pub(super) runs: Vec<(Run, Option<Tensor>)>,
}

impl RecallParts {
    pub(super) fn new(q: &Tensor, k: &Tensor, recall: &Recall, scale: f32) -> Result<Self> {
        let runs = recall.runs(q.dim(1)?);
        let candidates =
            recall.chooses.then(|| Candidates::new(q, k, recall, &runs)).transpose()?;
        let chosen =
            |run: &Run| candidates.as_ref().map(|from| from.choose(run, scale)).transpose();
        let runs = runs.iter().map(|run| Ok((*run, chosen(run)?))).collect::<Result<_>>()?;
        let Recall { window, sinks, .. } = *recall;
        Ok(Self { window, sinks, scale, first: recall.first_choosing(), runs })
    }

    fn params(&self, causal: bool, window: Option<usize>) -> DenseAttentionParams {
        DenseAttentionParams { scale: self.scale, causal, window }
    }

    /// What sequences of `t` tokens see in ranges. The first of these is all that the queries before the first run see.
    fn ranges(&self, t: usize) -> Vec<Range> {
        let (first, far) = (self.first, (self.first, t - self.first));
        let in_window = (first + 1 - self.window, far.1 + self.window - 1);
        let range = |queries, keys, params| Range { queries, keys, params };
        let mut ranges = vec![
            range((0, first), (0, first), self.params(true, None)),
            range(far, in_window, self.params(true, Some(self.window))),
        ];
        if self.sinks > 0 {
            ranges.push(range(far, (0, self.sinks), self.params(false, None)));
        }
        ranges
    }

    /// What the queries of a run see besides, in sequences of `t` tokens.
    fn besides(&self, run: &Run, chosen: Option<&Tensor>, t: usize) -> Result<Vec<Box<dyn Part>>> {
        let mut parts: Vec<Box<dyn Part>> = Vec::new();
        if run.queries > 1 {
            parts.push(Box::new(Leaving::new(run, self.sinks)));
        }
        if let Some(chosen) = chosen {
            parts.push(Box::new(Chosen::new(run, chosen, t, self.sinks)?));
        }
        Ok(parts)
    }

    /// (out (b, t, h, d), lse (b, h, t)) of the one softmax over all parts.
    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let t = q.dim(1)?;
        let attended = self.ranges(t).into_iter().map(|Range { queries, keys, params }| {
            let (k, v) = (tokens(k, keys.0, keys.1)?, tokens(v, keys.0, keys.1)?);
            attention_forward(&tokens(q, queries.0, queries.1)?, &k, &v, &params)
        });
        let mut ranges = attended.collect::<Result<Vec<_>>>()?.into_iter();
        let (near, far) = (ranges.next(), ranges.next());
        let Some(((near, near_lse), far)) = near.zip(far) else {
            candle_core::bail!("recall: no query, expected some")
        };
        let (far, far_lse) = ranges.try_fold(far, merge)?;
        let (mut outs, mut lses) = (vec![near], vec![near_lse]);
        for (run, chosen) in &self.runs {
            let rows = run.pages * run.queries;
            let at = run.first - self.first;
            let mut own = (far.narrow(1, at, rows)?, far_lse.narrow(2, at, rows)?);
            let q = tokens(q, run.first, rows)?;
            for part in self.besides(run, chosen.as_ref(), t)? {
                let params = self.params(part.is_causal(), None);
                let (k, v) = (part.keys(k)?, part.keys(v)?);
                let (out, lse) = attention_forward(&part.queries(&q)?, &k, &v, &params)?;
                own = merge(own, (part.queries_back(&out)?, part.lse_back(&lse)?))?;
            }
            outs.push(own.0.to_dtype(q.dtype())?);
            lses.push(own.1);
        }
        Ok((Tensor::cat(&outs, 1)?, Tensor::cat(&lses, 2)?.contiguous()?))
    }

    /// (dq, dk, dv), summed in f32; `out` and `lse` are what [`RecallParts::forward`] gave.
    fn backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        out: &Tensor,
        lse: &Tensor,
        grad: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let t = q.dim(1)?;
        let mut keys = KeyGradients::new(t);
        // Of the queries before the first run, and of the others.
        let (mut near, mut far): (Option<Tensor>, Option<Tensor>) = (None, None);
        for Range { queries, keys: seen, params } in self.ranges(t) {
            let of_queries = |x: &Tensor| tokens(x, queries.0, queries.1);
            let (dq, dk, dv) = attention_backward(
                &of_queries(q)?,
                &tokens(k, seen.0, seen.1)?,
                &tokens(v, seen.0, seen.1)?,
                &of_queries(out)?,
                &lse.narrow(2, queries.0, queries.1)?.contiguous()?,
                &of_queries(grad)?,
                None,
                &params,
            )?;
            keys.add([(seen.0, dk), (seen.0, dv)])?;
            let sum = if queries.0 == 0 { &mut near } else { &mut far };
            let dq = dq.to_dtype(DType::F32)?;
            *sum = Some(match sum.take() {
                Some(sum) => (sum + dq)?,
                None => dq,
            });
        }
        let Some((near, far)) = near.zip(far) else {
            candle_core::bail!("recall: no gradient of a query, expected one")
        };
        let mut dqs = vec![near];
        for (run, chosen) in &self.runs {
            let rows = run.pages * run.queries;
            let mut own = far.narrow(1, run.first - self.first, rows)?;
            let of_run = |x: &Tensor| tokens(x, run.first, rows);
            let (q, out, grad) = (of_run(q)?, of_run(out)?, of_run(grad)?);
            let lse = lse.narrow(2, run.first, rows)?;
            for part in self.besides(run, chosen.as_ref(), t)? {
                let (dq, dk, dv) = attention_backward(
                    &part.queries(&q)?,
                    &part.keys(k)?,
                    &part.keys(v)?,
                    &part.queries(&out)?,
                    &part.lse(&lse)?,
                    &part.queries(&grad)?,
                    None,
                    &self.params(part.is_causal(), None),
                )?;
                own = (own + part.queries_back(&dq)?.to_dtype(DType::F32)?)?;
                keys.add([part.keys_back(&dk)?, part.keys_back(&dv)?])?;
            }
            dqs.push(own);
        }
        let [dk, dv] = keys.finish(k.dtype())?;
        Ok([Tensor::cat(&dqs, 1)?.to_dtype(q.dtype())?, dk, dv])
    }
}
