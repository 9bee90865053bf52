//! Which older tokens a page of queries recalls: landmarks, votes and exact scores, as sessions choose for what they are fed
//! (docs/recall.md), but that a vote reaches no neighbour.
//! Knows no attention, and no gradient flows through it.

use super::recall::{PAGE, Recall, Run};
use crate::pages::{OVER_FETCH, POOLED};
use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::recall::SPAN;
use mka_kernels::{rotate, rotate_back, top_k};

/// On the score of what a query does not choose from: its e^score is 0 beside any other.
const HIDDEN: f64 = -1e30;

/// What the pages of queries of one layer choose among.
pub(super) struct Candidates<'a> {
    recall: &'a Recall,
    /// Queries without rotation, f32: (b, t, h, d).
    queries: Tensor,
    /// Keys without rotation behind the sinks, f32: (b · g, n, d), n whole pages.
    keys: Tensor,
    /// Means of every [`SPAN`] of them: (b · g, n / SPAN, d).
    landmarks: Tensor,
    kv_heads: usize,
}

impl<'a> Candidates<'a> {
    /// Of rotated queries (b, t, h, d) and keys (b, t, g, d); the last of `runs` chooses among all tokens that are kept.
    pub(super) fn new(q: &Tensor, k: &Tensor, recall: &'a Recall, runs: &[Run]) -> Result<Self> {
        let (b, t, h, d) = q.dims4()?;
        let g = k.dim(2)?;
        let plain = |x: &Tensor, heads: usize| {
            let rows = x.to_dtype(DType::F32)?.reshape((b * t, heads, d))?;
            rotate_back(&rows, &recall.angles)?.reshape((b, t, heads, d))
        };
        let n = runs.last().map_or(0, |run| run.older + PAGE * (run.pages - 1));
        let keys = plain(k, g)?.narrow(1, recall.sinks, n)?.transpose(1, 2)?;
        let keys = keys.reshape((b * g, n, d))?;
        let landmarks = keys.reshape((b * g, n / SPAN, SPAN, d))?.mean(2)?;
        Ok(Self { recall, queries: plain(q, h)?, keys, landmarks, kv_heads: g })
    }

    /// The tokens of most votes for each page of `run` and each key/value head, ascending, counted from the first behind
    /// the sinks: (b, pages, g, tokens), u32.
    ///
    /// `scale` is the factor on q·k.
    pub(super) fn choose(&self, run: &Run, scale: f32) -> Result<Tensor> {
        let (rows, n, d) = self.keys.dims3()?; // rows: b · g
        let (pages, g, wanted) = (run.pages, self.kv_heads, self.recall.tokens);
        let queries = self.mean_queries(run, scale)?; // (b · g, pages, queries, group · d)
        let pooled = queries.dim(2)?;
        let by_page = queries.reshape((rows * pages, (), d))?;
        let by_head = queries.reshape((rows, (), d))?;
        let device = self.keys.device();
        let older = run.older + PAGE * (pages - 1);
        let marks = older / SPAN;
        let (tokens, votes) = if marks * SPAN <= OVER_FETCH * wanted {
            let hidden = hidden(run, older, 1, device)?;
            let scores = by_head.matmul(&self.keys.narrow(1, 0, older)?.contiguous()?.t()?)?;
            (
                None,
                votes(&scores.reshape((rows, pages, (), older))?, &hidden.unsqueeze(0)?, pooled)?,
            )
        } else {
            let by_mark = hidden(run, marks, SPAN, device)?; // (pages, marks)
            let landmarks = self.landmarks.narrow(1, 0, marks)?.contiguous()?;
            let scores = by_head.matmul(&landmarks.t()?)?.reshape((rows, pages, (), marks))?;
            let votes_of_marks = votes(&scores, &by_mark.unsqueeze(0)?, pooled)?;
            let best = top_k(&votes_of_marks, OVER_FETCH * wanted / SPAN)?; // (rows · pages, best)
            let tokens = spread(&best, device)?;
            let count = tokens.dim(1)?;
            let first = Tensor::arange(0, rows as u32, device)?.unsqueeze(1)?;
            let first = first.broadcast_mul(&Tensor::new(n as u32, device)?)?;
            let ids = tokens.reshape((rows, pages * count))?.broadcast_add(&first)?;
            let all = self.keys.reshape((rows * n, d))?;
            let keys = all.index_select(&ids.flatten_all()?, 0)?;
            let scores = by_page.matmul(&keys.reshape((rows * pages, count, d))?.t()?)?;
            let hidden = by_mark.broadcast_as((rows, pages, marks))?.contiguous()?;
            let hidden = hidden.reshape((rows * pages, marks))?.gather(&best, 1)?;
            let hidden = hidden.unsqueeze(2)?.broadcast_as((rows * pages, count / SPAN, SPAN))?;
            let hidden = hidden.contiguous()?.reshape((rows * pages, 1, count))?;
            (Some(tokens), votes(&scores.unsqueeze(1)?, &hidden, pooled)?)
        };
        let best = top_k(&votes, wanted)?;
        let chosen = match tokens {
            Some(tokens) => tokens.gather(&best, 1)?,
            None => best,
        };
        chosen.reshape((rows / g, g, pages, wanted))?.transpose(1, 2)?.contiguous()
    }

    /// Of every [`POOLED`] queries of a page their mean, scaled, as if it stood a window behind the keys: RoPE(q, window)
    /// against keys without rotation. (b · g, pages, queries, group · d), f32.
    fn mean_queries(&self, run: &Run, scale: f32) -> Result<Tensor> {
        let (b, _, h, d) = self.queries.dims4()?;
        let (g, pages) = (self.kv_heads, run.pages);
        let queries = self.queries.narrow(1, run.first, pages * run.queries)?;
        let queries = queries.contiguous()?.reshape((b, pages, run.queries, h * d))?;
        let whole = run.queries / POOLED * POOLED;
        let mut means = Vec::new();
        if whole > 0 {
            let of_eight = queries.narrow(2, 0, whole)?.contiguous()?;
            means.push(of_eight.reshape((b, pages, whole / POOLED, POOLED, h * d))?.mean(3)?);
        }
        if run.queries > whole {
            means.push(queries.narrow(2, whole, run.queries - whole)?.mean_keepdim(2)?);
        }
        let means = Tensor::cat(&means, 2)?;
        let pooled = means.dim(2)?;
        // One position for all: rows of heads beside each other.
        let rotated = rotate(&means.reshape((1, (), d))?, &self.recall.window_angles)?;
        let growth = self.recall.growth(); // once in the queries, once in the keys
        let scaled = (rotated * f64::from(scale / (growth * growth)))?;
        let by_head = scaled.reshape((b, pages * pooled, g, h / g * d))?.transpose(1, 2)?;
        by_head.contiguous()?.reshape((b * g, pages, pooled, h / g * d))
    }
}

/// The vote for each key: of the mean queries, the largest sum over the group's heads of their softmax.
///
/// scores (r, pages, queries · group, n), hidden (r or 1, pages, n) -> (r · pages, n). What is hidden is below every
/// vote.
fn votes(scores: &Tensor, hidden: &Tensor, pooled: usize) -> Result<Tensor> {
    let (r, pages, rows, n) = scores.dims4()?;
    let scores = scores.broadcast_add(&hidden.unsqueeze(2)?)?;
    let shares = candle_nn::ops::softmax_last_dim(&scores)?;
    let sums = shares.reshape((r * pages, pooled, rows / pooled, n))?.sum(2)?;
    let votes = sums.max(1)?.reshape((r, pages, n))?.broadcast_add(hidden)?;
    votes.reshape((r * pages, n))
}

/// What to add to scores of `n` units of `span` tokens: 0, or [`HIDDEN`] where a page cannot choose them. (pages, n).
fn hidden(run: &Run, n: usize, span: usize, device: &Device) -> Result<Tensor> {
    let ends: Vec<u32> = (0..run.pages).map(|i| ((run.older + PAGE * i) / span) as u32).collect();
    let ends = Tensor::from_vec(ends, (run.pages, 1), device)?;
    let places = Tensor::arange(0, n as u32, device)?.unsqueeze(0)?;
    places.broadcast_ge(&ends)?.to_dtype(DType::F32)? * HIDDEN
}

/// The tokens of landmarks (r, m) -> (r, m · SPAN), u32.
fn spread(marks: &Tensor, device: &Device) -> Result<Tensor> {
    let (r, m) = marks.dims2()?;
    let first = marks.unsqueeze(2)?.broadcast_mul(&Tensor::new(SPAN as u32, device)?)?;
    let within = Tensor::arange(0, SPAN as u32, device)?;
    first.broadcast_add(&within)?.reshape((r, m * SPAN))
}
