//! What tokens are chosen by and what a choice is, and the choice and the copy of the chosen as the device makes them.
//! Knows no kernel: each device's own file has them.

#[cfg(feature = "cuda")]
use super::cuda;
use super::{MARKS, MAX_RUNS, SPAN, Standing, StoredPages, portable};
use crate::pages::PAGE_TOKENS;
use crate::rope::RotaryAngles;
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{DType, Result, Tensor, bail};

/// Neighbouring queries that choose together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChoiceRun {
    /// Query tokens.
    pub queries: usize,
    /// Pages from the first on that they can choose from.
    pub pages: usize,
}

/// What a choice is made by.
#[derive(Debug, Clone, Copy)]
pub struct ChoiceParams<'a> {
    /// The queries, cut into runs of which each chooses for itself; at most [`MAX_RUNS`].
    pub runs: &'a [ChoiceRun],
    /// Tokens chosen for each head; several runs choose as many, of at least as many stored ones.
    pub tokens: usize,
    /// Landmarks whose tokens are compared one by one: all where there are no more, for all runs or for none. None: every
    /// token is compared, and landmarks are not read.
    pub landmarks: Option<usize>,
    /// Neighbouring queries whose mean stands for them.
    pub pooled: usize,
    /// Factor on q·k.
    pub scale: f32,
    /// Queries are rotated to position `distance` of `angles`, keys are not.
    pub angles: &'a RotaryAngles,
    /// See `angles`.
    pub distance: usize,
    /// Landmarks that are chosen whatever they are asked for: (n), u32, ascending.
    pub pins: Option<&'a Tensor>,
    /// A token is asked for as much as the most asked of the compared tokens that stand at most so many places before or
    /// behind it, a landmark as the most asked of those that so many tokens reach; pinned ones ask for no other. 0: by
    /// itself.
    pub reach: usize,
    /// Votes that an earlier choice among the same pages kept: a token has the larger of its own and these. Of one run alone.
    pub standing: Option<&'a Standing>,
    /// Whether [`Choice::standing`] is wanted; not of heads that choose together.
    pub keep_votes: bool,
    /// All heads of a run choose the same tokens, those whose votes, summed over the heads, are most; only where every
    /// token is compared.
    pub heads_together: bool,
}

/// Tokens chosen for each head of each run.
#[derive(Debug, Clone)]
pub struct Choice {
    /// (runs · g, m), u32: the landmarks whose tokens were compared; None for all.
    pub(super) marks: Option<Tensor>,
    /// (runs · g, tokens), u32: places among the tokens that were compared; None for all.
    pub(super) best: Option<Tensor>,
    pub(super) runs: usize,
    /// Stored pages that they were chosen among, from the first on.
    pub(super) pages: usize,
    pub(super) tokens: usize,
    /// (1), f32: the share of the attention to all stored tokens that the chosen ones hold, as their landmarks estimate
    /// it; None for more than one query.
    pub recovered: Option<Tensor>,
    /// The chosen tokens and their votes, where they were to be kept.
    pub standing: Option<Standing>,
}

impl Choice {
    /// The first `tokens` stored tokens, for one run.
    pub fn all(tokens: usize) -> Self {
        let pages = tokens.div_ceil(PAGE_TOKENS);
        Self { marks: None, best: None, runs: 1, pages, tokens, recovered: None, standing: None }
    }

    /// Tokens of each head.
    pub fn num_tokens(&self) -> usize {
        self.tokens
    }

    /// The tokens of each of `num_heads` heads, ascending, counted from the first that is stored, run by run; downloads
    /// them.
    ///
    /// # Errors
    /// If the device fails.
    pub fn tokens(&self, num_heads: usize) -> Result<Vec<Vec<u32>>> {
        let rows = |x: &Option<Tensor>| x.as_ref().map(Tensor::to_vec2::<u32>).transpose();
        let (marks, best) = (rows(&self.marks)?, rows(&self.best)?);
        let of_head = |head: usize| {
            let token = |i: u32| match &marks {
                Some(marks) => marks[head][i as usize / SPAN] * SPAN as u32 + i % SPAN as u32,
                None => i,
            };
            match &best {
                Some(best) => best[head].iter().map(|i| token(*i)).collect(),
                None => (0..self.tokens as u32).map(token).collect(),
            }
        };
        Ok((0..self.runs * num_heads).map(of_head).collect())
    }
}

/// Where gathered keys are rotated to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// To their places in the stream, of which the first stored token has this one.
    Stream(u64),
    /// Side by side from this position on.
    Compact(u64),
}

impl StoredPages {
    /// Chooses tokens for queries `q` (t, h, d), f32, before RoPE: h a multiple of g, and of a run ⌈queries / pooled⌉ ·
    /// h / g at most 512.
    ///
    /// Each run chooses as if it were alone. Its queries are rotated to one distance, pooled and scaled; votes are, of the
    /// queries, the largest sum over a group's heads of the softmax over all landmarks and the keys of outliers; the tokens
    /// of the landmarks of most votes, or all tokens, are compared in the same way. Landmarks and tokens take the largest
    /// vote within their reach, and not less than the one that stands for them; the tokens of most votes are chosen,
    /// ascending. Heads that choose together sum their votes of tokens first.
    ///
    /// Source: landmarks and outliers are ShadowKV's (arXiv 2410.21465), the vote is TokenSelect's (arXiv 2411.02886), votes
    /// pooled over neighbours are SnapKV's (arXiv 2404.14469, section 4.2).
    ///
    /// # Errors
    /// If shapes, types or devices disagree, or there are fewer pages.
    pub fn choose(&self, q: &Tensor, params: &ChoiceParams<'_>) -> Result<Choice> {
        let (t, h, d) = q.dims3()?;
        let (_, g, _, head_dim) = self.keys.dims4()?;
        let longest = params.runs.iter().map(|run| run.queries).max().unwrap_or(0);
        let rows = longest.div_ceil(params.pooled.max(1)) * h.checked_div(g).unwrap_or(0);
        if d != head_dim
            || h == 0
            || h % g != 0
            || !(1..=512).contains(&rows)
            || q.dtype() != DType::F32
            || !q.device().same_device(self.keys.device())
        {
            bail!("choose: q {q:?}, expected (t, h, {d}), f32, with the {g} heads of the pages");
        }
        let is_flat = |run: &ChoiceRun| params.landmarks.is_none_or(|n| run.pages * MARKS <= n);
        let flat = params.runs.iter().filter(|run| is_flat(run)).count();
        if params.runs.len() > MAX_RUNS
            || params.runs.iter().map(|run| run.queries).sum::<usize>() != t
            || params
                .runs
                .iter()
                .any(|run| run.queries == 0 || !(1..=self.len).contains(&run.pages))
            || params.runs.len() > 1
                && ((flat != 0 && flat != params.runs.len())
                    || params.runs.iter().any(|run| run.pages * PAGE_TOKENS < params.tokens))
        {
            bail!(
                "choose: {t} queries as {:?} for {} tokens of {:?} landmarks, expected at most {MAX_RUNS} runs of all of them among {} pages, with so many tokens if there are several",
                params.runs,
                params.tokens,
                params.landmarks,
                self.len
            );
        }
        if params.landmarks == Some(0) {
            bail!("choose: 0 landmarks, expected some, or None for every token");
        }
        if params.heads_together && params.landmarks.is_some() {
            bail!("choose: heads together among landmarks, expected every token compared");
        }
        if params.heads_together && params.keep_votes {
            bail!("choose: votes of heads together are to be kept, expected those of each head");
        }
        if let Some(standing) = params.standing {
            standing.check(g, params.runs.len(), q.device())?;
        }
        if params.pooled == 0
            || params.distance >= params.angles.len()
            || 2 * params.angles.half() != d
        {
            bail!(
                "choose: distance {} of {} angles, {} pooled, expected them there",
                params.distance,
                params.angles.len(),
                params.pooled
            );
        }
        let q = q.contiguous()?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = q.device() {
            return cuda::choose(device, self, &q, params);
        }
        portable::choose(self, &q, params)
    }

    /// The choice of `tokens` (g, n), u32, ascending for each head, for one run of queries; a token behind the last stored
    /// one stands for that one.
    ///
    /// # Errors
    /// If type, shape or device is another, or nothing is stored.
    pub fn choice_of(&self, tokens: &Tensor) -> Result<Choice> {
        let (heads, count) = tokens.dims2()?;
        let g = self.keys.dim(1)?;
        if heads != g
            || tokens.dtype() != DType::U32
            || self.len == 0
            || !tokens.device().same_device(self.keys.device())
        {
            bail!("choice: tokens {tokens:?} of {} pages, expected ({g}, n), u32", self.len);
        }
        let last = Tensor::new((self.len * PAGE_TOKENS - 1) as u32, tokens.device())?;
        let best = Some(tokens.broadcast_minimum(&last)?.contiguous()?);
        Ok(Choice { best, pages: self.len, ..Choice::all(count) })
    }

    /// The tokens of `choice`, keys rotated: two tensors (runs · ⌈tokens / PAGE_TOKENS⌉, g, PAGE_TOKENS, d), f32, 0
    /// behind the last token of a run.
    ///
    /// # Errors
    /// If `angles` has not every position, from 0 on, or fewer pages are stored than were chosen among.
    pub fn gather(
        &self,
        choice: &Choice,
        angles: &RotaryAngles,
        placement: Placement,
    ) -> Result<(Tensor, Tensor)> {
        let (_, _, _, d) = self.keys.dims4()?;
        let end = match placement {
            Placement::Stream(first) => first + (self.len * PAGE_TOKENS) as u64,
            Placement::Compact(first) => first + choice.tokens as u64,
        };
        if end > angles.len() as u64
            || 2 * angles.half() != d
            || choice.pages > self.len
            || choice.tokens > self.len * PAGE_TOKENS
            || choice.tokens == 0
        {
            bail!(
                "gather: {} tokens of {} pages, of which {} are stored, up to position {end}, expected some of stored ones, and angles up to there, found {}",
                choice.tokens,
                choice.pages,
                self.len,
                angles.len()
            );
        }
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = self.keys.device() {
            return cuda::gather(device, self, choice, angles, placement);
        }
        portable::gather(self, choice, angles, placement)
    }
}
