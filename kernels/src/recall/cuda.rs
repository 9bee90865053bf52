//! The choice among stored pages and the copy of the chosen on a CUDA device: parameters of the kernels, their launch.
//! Knows no rule: the kernels of `cuda/recall.cu` hold them.

mod params;

use super::{
    Choice, ChoiceParams, ChoiceRun, MARKS, MAX_RUNS, Placement, SPAN, Standing, StoredPages,
};
use crate::cuda::{self, Launch};
use crate::pages::PAGE_TOKENS;
use crate::rope::RotaryAngles;
use crate::select::top_k;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use params::{
    ChosenParams, KeptParams, QueryParams, ReachParams, RecoveredParams, Run, ShareParams,
    StandingParams, VoteParams,
};

/// Keys of one block of a score; as in `cuda/recall.cuh`, like the number of threads.
const BLOCK_KEYS: usize = 256;
const THREADS: u32 = 256;
/// Rows of queries from which on tensor cores score stored keys, and blocks' statistics are joined by a launch of their own:
/// a decoded token of a group of eight has fewer.
const MANY_ROWS: usize = 9;
/// Rows that a block of `join` takes.
const JOINED_ROWS: usize = 32;
/// By 32 channels.
const SCORE_ROWS: [&str; 4] = ["score_rows_32", "score_rows_64", "score_rows_96", "score_rows_128"];
/// Bytes of logits at once: runs whose logits would take more choose one after the other.
const LOGIT_BYTES: usize = 256 << 20;

/// What a vote over keys leaves on the device.
struct Voted {
    /// (runs, g, rows, n).
    logits: Tensor,
    /// (runs, g, rows).
    norms: Tensor,
    /// (runs · g, n).
    votes: Tensor,
    n: usize,
}

impl Voted {
    /// The votes alone: the memory of the rest is free for the next.
    fn into_votes(self) -> Tensor {
        self.votes
    }
}

/// Queries of a choice, or some of its runs.
#[derive(Clone)]
struct Queries<'a> {
    /// (runs, rows / group, h, d).
    mean: Tensor,
    /// Of the longest run.
    rows: usize,
    h: usize,
    group: usize,
    pooled: usize,
    num_runs: usize,
    runs: [Run; MAX_RUNS],
    pins: Option<&'a Tensor>,
}

/// Device address of page `first` of a tensor whose rows along dimension 0 are `rows` a page.
fn address_from(tensor: &Tensor, first: usize, rows: usize) -> Result<u64> {
    let row = tensor.elem_count() / tensor.dim(0)? * tensor.dtype().size_in_bytes();
    Ok(cuda::address(tensor)? + (first * rows * row) as u64)
}

fn address_or_null(tensor: Option<&Tensor>) -> Result<u64> {
    tensor.map_or(Ok(0), cuda::address)
}

/// [`StoredPages::choose`] on `device`; shapes are checked, `q` is contiguous.
pub(super) fn choose(
    device: &CudaDevice,
    pages: &StoredPages,
    q: &Tensor,
    params: &ChoiceParams<'_>,
) -> Result<Choice> {
    let (_, h, d) = q.dims3()?;
    let g = pages.keys.dim(1)?;
    let num_runs = params.runs.len();
    let mut runs = [Run::default(); MAX_RUNS];
    let mut first = 0;
    for (to, ChoiceRun { queries, pages }) in runs.iter_mut().zip(params.runs) {
        *to = Run { first, queries: *queries as u32, pages: *pages as u32 };
        first += to.queries;
    }
    let longest = params.runs.iter().map(|run| run.queries).max().unwrap_or(0);
    let num_means = longest.div_ceil(params.pooled);
    let mean = cuda::output_tensor(device, DType::F32, (num_runs, num_means, h, d))?;
    let (cosine, sine) = params.angles.on(device)?;
    let angle = (params.distance * d / 2 * size_of::<f32>()) as u64;
    let query_params = QueryParams {
        q: cuda::address(q)?,
        cosine: cuda::address(&cosine)? + angle,
        sine: cuda::address(&sine)? + angle,
        mean: cuda::address(&mean)?,
        h: h as u32,
        d: d as u32,
        pooled: params.pooled as u32,
        scale: params.scale,
        runs,
    };
    let grid = (h as u32, num_means as u32, num_runs as u32);
    let launch = Launch { grid, block: 128, shared_bytes: 0 };
    cuda::launch(device, "recall", "mean_queries", launch, &query_params)?;
    let group = h / g;
    let queries = Queries {
        mean,
        rows: num_means * group,
        h,
        group,
        pooled: params.pooled,
        num_runs,
        runs,
        pins: params.pins,
    };

    let most_pages = params.runs.iter().map(|run| run.pages).max().unwrap_or(0);
    let scored = match params.landmarks {
        Some(landmarks) if landmarks < most_pages * MARKS => {
            (most_pages * MARKS).max(landmarks * SPAN)
        }
        _ => most_pages * PAGE_TOKENS,
    };
    let run_bytes = h * num_means * scored * size_of::<f32>();
    let together = (LOGIT_BYTES / run_bytes.max(1)).clamp(1, num_runs);
    let parts: Vec<Choice> = (0..num_runs)
        .step_by(together)
        .map(|first| choose_part(device, pages, &queries.part(first, together)?, params))
        .collect::<Result<_>>()?;
    let mut parts = parts.into_iter();
    match (parts.next(), parts.len()) {
        (Some(all), 0) => Ok(all),
        (Some(first), _) => joined(first, parts.as_slice()),
        (None, _) => bail!("choose: no run, expected one"),
    }
}

/// The choices of all runs, `first` and then `rest`.
fn joined(first: Choice, rest: &[Choice]) -> Result<Choice> {
    let cat = |of: fn(&Choice) -> Option<&Tensor>| -> Result<Option<Tensor>> {
        let rows: Vec<&Tensor> = of(&first).into_iter().chain(rest.iter().filter_map(of)).collect();
        (!rows.is_empty()).then(|| Tensor::cat(&rows, 0)).transpose()
    };
    let kept_tokens = cat(|part| part.standing.as_ref().map(|kept| &kept.tokens))?;
    let kept_votes = cat(|part| part.standing.as_ref().map(|kept| &kept.votes))?;
    let standing = kept_tokens.zip(kept_votes).map(|(tokens, votes)| Standing { tokens, votes });
    Ok(Choice {
        marks: cat(|part| part.marks.as_ref())?,
        best: cat(|part| part.best.as_ref())?,
        standing,
        runs: first.runs + rest.iter().map(|part| part.runs).sum::<usize>(),
        pages: rest.iter().map(|part| part.pages).fold(first.pages, usize::max),
        tokens: first.tokens,
        recovered: None,
    })
}

/// The choice of `queries`, some runs of all: landmarks are read where they pass over some of the most pages' tokens.
fn choose_part(
    device: &CudaDevice,
    pages: &StoredPages,
    queries: &Queries<'_>,
    params: &ChoiceParams<'_>,
) -> Result<Choice> {
    let g = pages.keys.dim(1)?;
    let most_pages = queries.runs[..queries.num_runs].iter().map(|run| run.pages).max();
    let most_pages = most_pages.unwrap_or(0) as usize;
    let num_marks = most_pages * MARKS;
    let landmarks = params.landmarks.map_or(num_marks, |landmarks| landmarks.min(num_marks));
    let gone = (pages.gone * PAGE_TOKENS) as u32;
    let (mut marks, mut by_mark) = (None, None);
    if landmarks < num_marks {
        let mut voted = vote(device, pages, queries, None, num_marks)?;
        if params.reach > 0 {
            // Behind the landmarks are votes of outliers' keys, which are below every vote by now and reach nothing.
            voted.votes = reaching(device, &voted.votes, None, params.reach.div_ceil(SPAN))?;
        }
        if let Some(standing) = params.standing {
            raise(device, &voted.votes, (standing, gone), None, SPAN)?;
        }
        marks = Some(top_k(&voted.votes, landmarks)?);
        by_mark = Some(voted);
    }
    let mut voted = vote(device, pages, queries, Some(marks.as_ref()), landmarks)?;
    if params.reach > 0 {
        voted.votes = reaching(device, &voted.votes, marks.as_ref(), params.reach)?;
    }
    if let Some(standing) = params.standing {
        raise(device, &voted.votes, (standing, gone), marks.as_ref(), 1)?;
    }
    let tokens = params.tokens.min(landmarks * SPAN);
    let best = match params.heads_together {
        true => top_of_all_heads(&voted.votes, (queries.num_runs, g), tokens)?,
        false => top_k(&voted.votes, tokens)?,
    };
    let group = queries.group;
    let is_one = queries.num_runs == 1 && queries.runs[0].queries == 1;
    let recovered = is_one
        .then(|| recovered(device, (g, group), by_mark.as_ref(), marks.as_ref(), &voted, &best))
        .transpose()?;
    let standing = params
        .keep_votes
        .then(|| kept(device, &voted.votes, marks.as_ref(), (&best, gone)))
        .transpose()?;
    let (best, runs, pages) = (Some(best), queries.num_runs, most_pages);
    Ok(Choice { marks, best, runs, pages, tokens, recovered, standing })
}

/// Of `votes` (runs · g, n) the `count` largest of each run, summed over its heads, for every head: (runs · g, count).
fn top_of_all_heads(votes: &Tensor, (runs, g): (usize, usize), count: usize) -> Result<Tensor> {
    let best = top_k(&votes.reshape((runs, g, ()))?.sum(1)?, count)?;
    best.unsqueeze(1)?.broadcast_as((runs, g, count))?.contiguous()?.reshape((runs * g, count))
}

impl Queries<'_> {
    /// `count` runs from `first` on, or as many as there are.
    fn part(&self, first: usize, count: usize) -> Result<Self> {
        let count = count.min(self.num_runs - first);
        let mut runs = [Run::default(); MAX_RUNS];
        runs[..count].copy_from_slice(&self.runs[first..first + count]);
        let mean = self.mean.narrow(0, first, count)?.contiguous()?;
        Ok(Self { mean, runs, num_runs: count, ..self.clone() })
    }

    /// `count` of the means of a single run, from `first` on, each for itself.
    fn means(&self, first: usize, count: usize) -> Result<Self> {
        let mut runs = [Run::default(); MAX_RUNS];
        runs[0] = Run { queries: count as u32, ..self.runs[0] };
        let mean = self.mean.narrow(1, first, count)?.contiguous()?;
        Ok(Self { mean, rows: count * self.group, pooled: 1, runs, ..self.clone() })
    }
}

/// [`vote_at_once`] by as many queries at a time as have room for their logits: the largest of their votes, and what the
/// last of them leave beside.
fn vote(
    device: &CudaDevice,
    pages: &StoredPages,
    queries: &Queries<'_>,
    tokens: Option<Option<&Tensor>>,
    num_marks: usize,
) -> Result<Voted> {
    if queries.num_runs > 1 {
        return vote_at_once(device, pages, queries, tokens, num_marks);
    }
    // Of one run its own queries: there is room for those of the longest, which are not there.
    let num_means = queries.runs[0].queries.div_ceil(queries.pooled as u32) as usize;
    let keys = if tokens.is_some() { num_marks * SPAN } else { num_marks };
    let mean_bytes = queries.h * keys * size_of::<f32>();
    let at_once = (LOGIT_BYTES / mean_bytes.max(1)).max(1);
    if num_means * queries.group == queries.rows && num_means <= at_once {
        return vote_at_once(device, pages, queries, tokens, num_marks);
    }
    let first = queries.means(0, at_once.min(num_means))?;
    let mut voted = vote_at_once(device, pages, &first, tokens, num_marks)?;
    for first in (at_once..num_means).step_by(at_once) {
        let own = queries.means(first, at_once.min(num_means - first))?;
        let before = voted.into_votes();
        voted = vote_at_once(device, pages, &own, tokens, num_marks)?;
        voted.votes = before.maximum(&voted.votes)?;
    }
    Ok(voted)
}

/// The vote over the first `num_marks` landmarks, those of the run of most pages, or, with `tokens`, over the tokens of
/// those landmarks (None: of all).
fn vote_at_once(
    device: &CudaDevice,
    pages: &StoredPages,
    queries: &Queries<'_>,
    tokens: Option<Option<&Tensor>>,
    num_marks: usize,
) -> Result<Voted> {
    let (_, g, _, d) = pages.keys.dims4()?;
    let outliers = pages.outliers.as_ref().filter(|_| tokens.is_none());
    let num_outliers = outliers.map_or(Ok(0), |(marks, _)| marks.dim(1))?;
    let n = match tokens {
        Some(_) => num_marks * SPAN,
        None => num_marks + num_outliers * SPAN,
    };
    let blocks = n.div_ceil(BLOCK_KEYS);
    let (rows, own) = (queries.rows, queries.num_runs * g);
    let logits = cuda::output_tensor(device, DType::F32, (own, rows, n))?;
    let stats = cuda::output_tensor(device, DType::F32, (own, blocks, rows, 2))?;
    let norms = cuda::output_tensor(device, DType::F32, (own, rows))?;
    let votes = cuda::output_tensor(device, DType::F32, (own, n))?;
    let keys = match tokens {
        Some(_) => address_from(&pages.keys, pages.first, 1)?,
        None => address_from(&pages.landmarks, pages.first, MARKS)?,
    };
    let params = VoteParams {
        q: cuda::address(&queries.mean)?,
        keys,
        marks: address_or_null(tokens.flatten())?,
        outlier_keys: address_or_null(outliers.map(|(_, keys)| keys))?,
        outliers: address_or_null(outliers.map(|(marks, _)| marks))?,
        pins: address_or_null(queries.pins)?,
        logits: cuda::address(&logits)?,
        stats: cuda::address(&stats)?,
        norms: cuda::address(&norms)?,
        votes: cuda::address(&votes)?,
        n: n as u64,
        num_marks: num_marks as u32,
        num_outliers: num_outliers as u32,
        num_pins: queries.pins.map_or(0, Tensor::elem_count) as u32,
        rows: rows as u32,
        h: queries.h as u32,
        g: g as u32,
        group: queries.group as u32,
        d: d as u32,
        blocks: blocks as u32,
        pooled: queries.pooled as u32,
        is_joined: u32::from(rows >= MANY_ROWS),
        runs: queries.runs,
    };
    let vote = if tokens.is_some() { "vote_tokens" } else { "vote_landmarks" };
    let (source, score) = match (tokens.is_some(), pages.keys.dtype()) {
        (false, _) => ("recall", "score_landmarks"),
        (true, DType::F32) => ("recall", "score_tokens_f32"),
        (true, _) if rows < MANY_ROWS || d > 128 => ("recall", "score_tokens_bf16"),
        (true, _) => ("score_rows_sm80", SCORE_ROWS[d.div_ceil(32) - 1]),
    };
    let num_runs = queries.num_runs as u32;
    let grid = (blocks as u32, g as u32, num_runs);
    let launch = Launch { grid, block: THREADS, shared_bytes: 0 };
    cuda::launch(device, source, score, launch, &params)?;
    if rows >= MANY_ROWS {
        let grid = (rows.div_ceil(JOINED_ROWS) as u32, g as u32, num_runs);
        cuda::launch(device, "recall", "join", Launch { grid, ..launch }, &params)?;
    }
    // Below `MANY_ROWS` each block joins the statistics of all: 1,024 votes a block keep that a small share.
    let grid = (n.div_ceil(1024) as u32, g as u32, num_runs);
    cuda::launch(device, "recall", vote, Launch { grid, ..launch }, &params)?;
    if num_outliers > 0 {
        let grid = (num_outliers.div_ceil(THREADS as usize) as u32, g as u32, num_runs);
        cuda::launch(device, "recall", "raise_votes", Launch { grid, ..launch }, &params)?;
    }
    Ok(Voted { logits, norms, votes, n })
}

/// Of `votes` (runs · g, n), by the tokens of `marks` (None: by their own places), the largest within `reach` of each.
fn reaching(
    device: &CudaDevice,
    votes: &Tensor,
    marks: Option<&Tensor>,
    reach: usize,
) -> Result<Tensor> {
    let (own, n) = votes.dims2()?;
    let pooled = cuda::output_tensor(device, DType::F32, (own, n))?;
    let params = ReachParams {
        votes: cuda::address(votes)?,
        marks: address_or_null(marks)?,
        pooled: cuda::address(&pooled)?,
        n: n as u64,
        num_marks: (n / SPAN) as u32,
        reach: u32::try_from(reach).unwrap_or(u32::MAX),
    };
    let grid = (n.div_ceil(1024) as u32, own as u32, 1);
    let launch = Launch { grid, block: THREADS, shared_bytes: 0 };
    cuda::launch(device, "recall", "reach", launch, &params)?;
    Ok(pooled)
}

/// Raises `votes` (g, n) to those that stand for their tokens: of tokens, `span` 1, of the landmarks `marks` (None: of
/// all); of landmarks, `span` [`SPAN`].
fn raise(
    device: &CudaDevice,
    votes: &Tensor,
    (standing, gone): (&Standing, u32),
    marks: Option<&Tensor>,
    span: usize,
) -> Result<()> {
    let ((g, n), (lists, k)) = (votes.dims2()?, standing.tokens.dims2()?);
    let params = StandingParams {
        tokens: cuda::address(&standing.tokens)?,
        standing: cuda::address(&standing.votes)?,
        marks: address_or_null(marks)?,
        votes: cuda::address(votes)?,
        n: n as u64,
        num_marks: marks.map_or(Ok(0), |marks| marks.dim(1))? as u32,
        k: k as u32,
        g: g as u32,
        span: span as u32,
        gone,
    };
    let grid = (k.div_ceil(THREADS as usize) as u32, lists as u32, 1);
    let launch = Launch { grid, block: THREADS, shared_bytes: 0 };
    cuda::launch(device, "recall", "raise_standing", launch, &params)
}

/// The tokens that `best` of `votes` (runs · g, n) are, counted from `gone` on, with these votes.
fn kept(
    device: &CudaDevice,
    votes: &Tensor,
    marks: Option<&Tensor>,
    (best, gone): (&Tensor, u32),
) -> Result<Standing> {
    let ((own, n), (_, k)) = (votes.dims2()?, best.dims2()?);
    let tokens = cuda::output_tensor(device, DType::U32, (own, k))?;
    let standing = cuda::output_tensor(device, DType::F32, (own, k))?;
    let params = KeptParams {
        votes: cuda::address(votes)?,
        marks: address_or_null(marks)?,
        best: cuda::address(best)?,
        tokens: cuda::address(&tokens)?,
        standing: cuda::address(&standing)?,
        n: n as u64,
        num_marks: marks.map_or(Ok(0), |marks| marks.dim(1))? as u32,
        k: k as u32,
        gone,
    };
    let grid = (k.div_ceil(THREADS as usize) as u32, own as u32, 1);
    let launch = Launch { grid, block: THREADS, shared_bytes: 0 };
    cuda::launch(device, "recall", "keep_votes", launch, &params)?;
    Ok(Standing { tokens, votes: standing })
}

fn recovered(
    device: &CudaDevice,
    (g, group): (usize, usize),
    by_mark: Option<&Voted>,
    marks: Option<&Tensor>,
    by_token: &Voted,
    best: &Tensor,
) -> Result<Tensor> {
    let recovered = cuda::output_tensor(device, DType::F32, 1)?;
    let params = RecoveredParams {
        mark_logits: address_or_null(by_mark.map(|voted| &voted.logits))?,
        mark_norms: address_or_null(by_mark.map(|voted| &voted.norms))?,
        marks: address_or_null(marks)?,
        token_logits: cuda::address(&by_token.logits)?,
        token_norms: cuda::address(&by_token.norms)?,
        best: cuda::address(best)?,
        recovered: cuda::address(&recovered)?,
        mark_n: by_mark.map_or(0, |voted| voted.n) as u64,
        token_n: by_token.n as u64,
        num_marks: marks.map_or(Ok(0), |marks| marks.dim(1))? as u32,
        k: best.dim(1)? as u32,
        g: g as u32,
        group: group as u32,
    };
    let launch = Launch { grid: (1, 1, 1), block: THREADS, shared_bytes: 0 };
    cuda::launch(device, "recall", "recovered", launch, &params)?;
    Ok(recovered)
}

/// [`StoredPages::gather`] on `device`; positions are checked.
pub(super) fn gather(
    device: &CudaDevice,
    pages: &StoredPages,
    choice: &Choice,
    angles: &RotaryAngles,
    placement: Placement,
) -> Result<(Tensor, Tensor)> {
    let (_, g, _, d) = pages.keys.dims4()?;
    let num_pages = choice.tokens.div_ceil(PAGE_TOKENS);
    let shape = (choice.runs * num_pages, g, PAGE_TOKENS, d);
    let keys = cuda::output_tensor(device, DType::F32, shape)?;
    let values = cuda::output_tensor(device, DType::F32, shape)?;
    let (cosine, sine) = angles.on(device)?;
    let (first, compact) = match placement {
        Placement::Stream(first) => (first, 0),
        Placement::Compact(first) => (first, 1),
    };
    let params = ChosenParams {
        keys: address_from(&pages.keys, pages.first, 1)?,
        values: address_from(&pages.values, pages.first, 1)?,
        marks: address_or_null(choice.marks.as_ref())?,
        best: address_or_null(choice.best.as_ref())?,
        cosine: cuda::address(&cosine)?,
        sine: cuda::address(&sine)?,
        out_keys: cuda::address(&keys)?,
        out_values: cuda::address(&values)?,
        first,
        num_marks: choice.marks.as_ref().map_or(Ok(0), |marks| marks.dim(1))? as u32,
        k: choice.tokens as u32,
        g: g as u32,
        d: d as u32,
        compact,
    };
    let kernel = format!("gather_{}", cuda::suffix("gather", pages.keys.dtype())?);
    let grid = (num_pages as u32, g as u32, choice.runs as u32);
    let launch = Launch { grid, block: THREADS, shared_bytes: 0 };
    cuda::launch(device, "recall", &kernel, launch, &params)?;
    Ok((keys, values))
}

/// [`super::note_share`] on `device`; shapes are checked.
pub(super) fn note_share(
    device: &CudaDevice,
    sums: &Tensor,
    lse: &Tensor,
    all: &Tensor,
    recovered: Option<&Tensor>,
) -> Result<()> {
    let params = ShareParams {
        lse: cuda::address(lse)?,
        all: cuda::address(all)?,
        recovered: address_or_null(recovered)?,
        sums: cuda::address(sums)?,
        h: lse.dim(1)? as u32,
    };
    let launch = Launch { grid: (1, 1, 1), block: 32, shared_bytes: 0 };
    cuda::launch(device, "recall", "note_share", launch, &params)
}
