//! Stored pages of one layer on one device, the choice among their tokens for a few queries, and the copy of the chosen.
//! Knows no session and no budget; on CUDA nothing waits for the host from the queries to the copied tokens.

#[cfg(feature = "cuda")]
mod cuda;
mod portable;
mod standing;

pub use standing::Standing;

use crate::pages::PAGE_TOKENS;
use crate::rope::RotaryAngles;
use candle_core::{DType, Device, Result, Tensor, bail};
use half::bf16;

/// Keys that share a landmark.
pub const SPAN: usize = 8;
/// Landmarks of a page.
pub const MARKS: usize = PAGE_TOKENS / SPAN;
/// Runs of queries that choose side by side at most.
pub const MAX_RUNS: usize = 16;
/// Pages that there is room for at first.
const FIRST_PAGES: usize = 16;

/// Keys before RoPE, values and landmarks of the stored pages of one layer, in stream order.
#[derive(Debug)]
pub struct StoredPages {
    /// (capacity, g, PAGE_TOKENS, d), f32 or bf16.
    keys: Tensor,
    /// (capacity, g, PAGE_TOKENS, d), as the keys.
    values: Tensor,
    /// (capacity · MARKS, g, d), bf16.
    landmarks: Tensor,
    /// Landmarks whose keys are landmarks of their own (g, m), u32, and these keys (m · SPAN, g, d), bf16.
    outliers: Option<(Tensor, Tensor)>,
    /// Pages at the front that were let go and still take room.
    first: usize,
    len: usize,
    /// Pages that were let go ever.
    gone: usize,
}

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
    /// behind it; pinned ones ask for no other. 0: by itself.
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
    marks: Option<Tensor>,
    /// (runs · g, tokens), u32: places among the tokens that were compared; None for all.
    best: Option<Tensor>,
    runs: usize,
    tokens: usize,
    /// (1), f32: the share of the attention to all stored tokens that the chosen ones hold, as their landmarks estimate
    /// it; None for more than one query.
    pub recovered: Option<Tensor>,
    /// The chosen tokens and their votes, where they were to be kept.
    pub standing: Option<Standing>,
}

impl Choice {
    /// The first `tokens` stored tokens, for one run.
    pub fn all(tokens: usize) -> Self {
        Self { marks: None, best: None, runs: 1, tokens, recovered: None, standing: None }
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
    /// No page yet, of `num_kv_heads` heads of `head_dim`, keys and values in `dtype` (f32 or bf16).
    ///
    /// # Errors
    /// If the device has no room, or no kernel takes the shape: `head_dim` is a multiple of 8 up to 256.
    pub fn new(
        num_kv_heads: usize,
        head_dim: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::BF16)
            || !head_dim.is_multiple_of(8)
            || !(8..=256).contains(&head_dim)
            || num_kv_heads == 0
        {
            bail!(
                "stored pages: {num_kv_heads} heads of {head_dim} in {dtype:?}, expected f32 or bf16, a multiple of 8 up to 256"
            );
        }
        let (keys, values, landmarks) = room(FIRST_PAGES, num_kv_heads, head_dim, dtype, device)?;
        Ok(Self { keys, values, landmarks, outliers: None, first: 0, len: 0, gone: 0 })
    }

    /// The same pages in memory of their own.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn copied(&self) -> Result<Self> {
        let (keys, values) = (self.keys.copy()?, self.values.copy()?);
        let (landmarks, outliers) = (self.landmarks.copy()?, self.outliers.clone());
        let (first, len, gone) = (self.first, self.len, self.gone);
        Ok(Self { keys, values, landmarks, outliers, first, len, gone })
    }

    /// Bytes that `pages` pages take on the device; there is room for twice as many at most.
    pub fn bytes(pages: usize, num_kv_heads: usize, head_dim: usize, dtype: DType) -> usize {
        let rows = num_kv_heads * head_dim;
        pages * rows * (2 * PAGE_TOKENS * dtype.size_in_bytes() + MARKS * 2)
    }

    /// Pages stored.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is stored.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pages that were let go at the front.
    pub fn gone(&self) -> usize {
        self.gone
    }

    /// Keys before RoPE of the stored pages, in their order: a view (n, g, PAGE_TOKENS, d), f32 or bf16.
    ///
    /// # Errors
    /// If the device fails.
    pub fn keys(&self) -> Result<Tensor> {
        self.keys.narrow(0, self.first, self.len)
    }

    /// Pages that there is room for without growing.
    pub fn capacity(&self) -> usize {
        self.keys.dims()[0]
    }

    /// Appends pages, of which there are never more than `limit` at once.
    ///
    /// Shapes: `keys`, `values` (n, g, PAGE_TOKENS, d) in the type of the pages, `landmarks` (n · MARKS, g, d) in bf16,
    /// all as little-endian bytes.
    ///
    /// # Errors
    /// If the lengths do not fit, or the device has no room: the pages are then as they were.
    pub fn push(
        &mut self,
        keys: &[u8],
        values: &[u8],
        landmarks: &[u8],
        limit: usize,
    ) -> Result<()> {
        let (_, g, _, d) = self.keys.dims4()?;
        let page = g * PAGE_TOKENS * d * self.keys.dtype().size_in_bytes();
        let n = keys.len() / page;
        if keys.len() != n * page
            || values.len() != keys.len()
            || landmarks.len() != n * MARKS * g * d * 2
            || self.len + n > limit
        {
            bail!(
                "stored pages: {} bytes of keys, {} of values, {} of landmarks beside {} pages, expected whole pages and at most {limit}",
                keys.len(),
                values.len(),
                landmarks.len(),
                self.len
            );
        }
        if n == 0 {
            return Ok(());
        }
        let (device, dtype) = (self.keys.device(), self.keys.dtype());
        let shape = (n, g, PAGE_TOKENS, d);
        let keys = uploaded(keys, dtype, shape, device)?;
        let values = uploaded(values, dtype, shape, device)?;
        let landmarks = uploaded(landmarks, DType::BF16, (n * MARKS, g, d), device)?;
        self.append(&keys, &values, &landmarks, limit)
    }

    /// [`StoredPages::push`] of pages that are on the device, such as parts of one upload for many layers.
    ///
    /// Shapes: `keys`, `values` (n, g, PAGE_TOKENS, d) in the type of the pages, `landmarks` (n · MARKS, g, d), bf16, all
    /// contiguous.
    ///
    /// # Errors
    /// If shapes, types or devices disagree, or the device has no room: the pages are then as they were.
    pub fn append(
        &mut self,
        keys: &Tensor,
        values: &Tensor,
        landmarks: &Tensor,
        limit: usize,
    ) -> Result<()> {
        let (_, g, _, d) = self.keys.dims4()?;
        let (n, ..) = keys.dims4()?;
        if keys.dims() != [n, g, PAGE_TOKENS, d]
            || values.dims() != keys.dims()
            || landmarks.dims() != [n * MARKS, g, d]
            || self.len + n > limit
        {
            bail!(
                "stored pages: keys {:?}, values {:?}, landmarks {:?} beside {} pages, expected pages of {g} heads of {d} and at most {limit}",
                keys.shape(),
                values.shape(),
                landmarks.shape(),
                self.len
            );
        }
        self.make_room(n, limit)?;
        let at = self.first + self.len;
        self.keys.slice_set(keys, 0, at)?;
        self.values.slice_set(values, 0, at)?;
        self.landmarks.slice_set(landmarks, 0, at * MARKS)?;
        self.len += n;
        Ok(())
    }

    /// Makes room for `pages` pages in all, of which there are never more than `limit`: as much as pushing them one by one
    /// would make, without the copies.
    ///
    /// # Errors
    /// If `pages` is more than `limit`, or the device has no room: the pages are then as they were.
    pub fn reserve(&mut self, pages: usize, limit: usize) -> Result<()> {
        if pages > limit {
            bail!("stored pages: room for {pages} pages, expected at most {limit}");
        }
        self.make_room(pages.saturating_sub(self.len), limit)
    }

    /// Names the landmarks whose keys are landmarks of their own: `marks` (g, m), counted from the first page, a number
    /// beyond all for none; `keys` (m · SPAN, g, d), bf16 as little-endian bytes.
    ///
    /// # Errors
    /// If the lengths do not fit.
    pub fn set_outliers(&mut self, marks: &[u32], keys: &[u8]) -> Result<()> {
        let (_, g, _, d) = self.keys.dims4()?;
        let m = marks.len() / g;
        if marks.len() != m * g || keys.len() != m * SPAN * g * d * 2 {
            bail!(
                "stored pages: {} outliers with {} bytes of keys, expected them of {g} heads of {d}",
                marks.len(),
                keys.len()
            );
        }
        self.outliers = match m {
            0 => None,
            _ => {
                let device = self.keys.device();
                let marks = Tensor::from_slice(marks, (g, m), device)?;
                Some((marks, uploaded(keys, DType::BF16, (m * SPAN, g, d), device)?))
            }
        };
        Ok(())
    }

    /// Keeps the first `pages` pages.
    pub fn truncate(&mut self, pages: usize) {
        self.len = self.len.min(pages);
    }

    /// Lets the first page go; outliers are to be named anew.
    pub fn pop_front(&mut self) {
        let gone = self.len.min(1);
        self.first += gone;
        self.len -= gone;
        self.gone += gone;
    }

    /// Room for `n` pages more: twice as much as before, up to `limit`.
    fn make_room(&mut self, n: usize, limit: usize) -> Result<()> {
        let (capacity, g, _, d) = self.keys.dims4()?;
        if self.first + self.len + n <= capacity {
            return Ok(());
        }
        let capacity = (self.len + n).next_power_of_two().max(FIRST_PAGES).min(limit.max(1));
        let (keys, values, landmarks) =
            room(capacity, g, d, self.keys.dtype(), self.keys.device())?;
        if self.len > 0 {
            let live = |x: &Tensor, rows: usize| {
                x.narrow(0, self.first * rows, self.len * rows)?.force_contiguous()
            };
            keys.slice_set(&live(&self.keys, 1)?, 0, 0)?;
            values.slice_set(&live(&self.values, 1)?, 0, 0)?;
            landmarks.slice_set(&live(&self.landmarks, MARKS)?, 0, 0)?;
        }
        (self.keys, self.values, self.landmarks, self.first) = (keys, values, landmarks, 0);
        Ok(())
    }

    /// Chooses tokens for queries `q` (t, h, d), f32, before RoPE: h a multiple of g, and of a run ⌈queries / pooled⌉ ·
    /// h / g at most 512.
    ///
    /// Each run chooses as if it were alone. Its queries are rotated to one distance, pooled and scaled; votes are, of the queries, the largest sum over a group's
    /// heads of the softmax over all landmarks and the keys of outliers; the tokens of the landmarks of most votes, or all
    /// tokens, are compared in the same way, each takes the largest vote within its reach and not less than the one that
    /// stands for it (its landmark too), and those of most votes are chosen, ascending. Heads that choose together sum their
    /// votes of tokens first.
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
        Ok(Choice { best, ..Choice::all(count) })
    }

    /// The tokens of `choice`, keys rotated: two tensors (runs · ⌈tokens / PAGE_TOKENS⌉, g, PAGE_TOKENS, d), f32, 0
    /// behind the last token of a run.
    ///
    /// # Errors
    /// If `angles` has not every position, from 0 on.
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
            || choice.tokens > self.len * PAGE_TOKENS
            || choice.tokens == 0
        {
            bail!(
                "gather: {} tokens of {} pages up to position {end}, expected some, and angles up to there, found {}",
                choice.tokens,
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

/// Adds to `sums` (2), f32, in place, the mean over the heads of e^(lse - all), and `recovered` (1) where it is given:
/// which share of a query's attention went to some of its keys.
///
/// Shapes: `lse`, `all` (1, h), f32.
///
/// # Errors
/// If shapes or devices disagree.
pub fn note_share(
    sums: &Tensor,
    lse: &Tensor,
    all: &Tensor,
    recovered: Option<&Tensor>,
) -> Result<()> {
    let (t, h) = lse.dims2()?;
    if t != 1
        || h == 0
        || all.dims() != lse.dims()
        || sums.dims() != [2]
        || recovered.is_some_and(|x| x.dims() != [1])
    {
        bail!("note_share: lse {lse:?} of {all:?} into {sums:?}, expected (1, h) into (2)");
    }
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = sums.device() {
        return cuda::note_share(device, sums, &lse.contiguous()?, &all.contiguous()?, recovered);
    }
    portable::note_share(sums, lse, all, recovered)
}

/// Keys, values and landmarks for `pages` pages, zero.
fn room(
    pages: usize,
    g: usize,
    d: usize,
    dtype: DType,
    device: &Device,
) -> Result<(Tensor, Tensor, Tensor)> {
    let zeros = || Tensor::zeros((pages, g, PAGE_TOKENS, d), dtype, device);
    Ok((zeros()?, zeros()?, Tensor::zeros((pages * MARKS, g, d), DType::BF16, device)?))
}

/// Little-endian numbers of `dtype` as a tensor on `device`.
fn uploaded(
    bytes: &[u8],
    dtype: DType,
    shape: impl candle_core::shape::ShapeWithOneHole,
    device: &Device,
) -> Result<Tensor> {
    match dtype {
        DType::F32 => {
            let (numbers, _) = bytes.as_chunks::<4>();
            let numbers: Vec<f32> = numbers.iter().map(|x| f32::from_le_bytes(*x)).collect();
            Tensor::from_vec(numbers, shape, device)
        }
        _ => {
            let (numbers, _) = bytes.as_chunks::<2>();
            let numbers: Vec<bf16> = numbers.iter().map(|x| bf16::from_le_bytes(*x)).collect();
            Tensor::from_vec(numbers, shape, device)
        }
    }
}
