//! What pages of queries see beside window and sinks, laid side by side in batches: the page that leaves their window, and
//! copies of the tokens that they chose; and gradients brought back to where those came from.
//! Knows no choice and no softmax.

use super::parts::tokens;
use super::recall::{PAGE, Run};
use candle_core::{DType, Result, Tensor};

/// A part of what the queries of a run see, a page of queries a batch or more than one.
pub(super) trait Part {
    /// Whether query i sees the first i keys alone, of one less than there are queries; else all see all.
    fn is_causal(&self) -> bool;
    /// Queries, or what is like them: (b, pages · queries, h, d) in batches.
    fn queries(&self, x: &Tensor) -> Result<Tensor>;
    /// Undoes [`Part::queries`].
    fn queries_back(&self, x: &Tensor) -> Result<Tensor>;
    /// Logs of sums, (b, h, pages · queries), in batches.
    fn lse(&self, lse: &Tensor) -> Result<Tensor>;
    /// Undoes [`Part::lse`].
    fn lse_back(&self, lse: &Tensor) -> Result<Tensor>;
    /// What is seen of keys or values (b, t, g, d), in batches.
    fn keys(&self, x: &Tensor) -> Result<Tensor>;
    /// The gradient of x from that of [`Part::keys`]: (b, n, g, d), of the tokens from the one that is named on.
    fn keys_back(&self, gradient: &Tensor) -> Result<(usize, Tensor)>;
}

/// The page that leaves the window: query i of a page of queries sees the first i tokens of it beside its window.
pub(super) struct Leaving {
    run: Run,
    /// The first token of the first page that leaves.
    start: usize,
}

impl Leaving {
    pub(super) fn new(run: &Run, sinks: usize) -> Self {
        Self { run: *run, start: sinks + run.older }
    }
}

impl Part for Leaving {
    fn is_causal(&self) -> bool {
        true
    }

    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, h, d) = x.dims4()?;
        x.reshape((b * self.run.pages, self.run.queries, h, d))
    }

    fn queries_back(&self, x: &Tensor) -> Result<Tensor> {
        let (batches, queries, h, d) = x.dims4()?;
        x.reshape((batches / self.run.pages, self.run.pages * queries, h, d))
    }

    fn lse(&self, lse: &Tensor) -> Result<Tensor> {
        self.run.by_page(lse)
    }

    fn lse_back(&self, lse: &Tensor) -> Result<Tensor> {
        self.run.in_order(lse, lse.dim(0)? / self.run.pages)
    }

    fn keys(&self, x: &Tensor) -> Result<Tensor> {
        let pages = self.queries(&tokens(x, self.start, self.run.pages * self.run.queries)?)?;
        tokens(&pages, 0, self.run.queries - 1)
    }

    fn keys_back(&self, gradient: &Tensor) -> Result<(usize, Tensor)> {
        Ok((self.start, self.queries_back(&gradient.pad_with_zeros(1, 0, 1)?)?))
    }
}

impl Run {
    /// (b, h, pages · queries) -> (b · pages, h, queries).
    fn by_page(&self, lse: &Tensor) -> Result<Tensor> {
        let (b, h, _) = lse.dims3()?;
        let lse = lse.contiguous()?.reshape((b, h, self.pages, self.queries))?;
        lse.transpose(1, 2)?.contiguous()?.reshape((b * self.pages, h, self.queries))
    }

    /// Undoes [`Run::by_page`], also where the heads of a page stand in batches of their own.
    fn in_order(&self, lse: &Tensor, b: usize) -> Result<Tensor> {
        let lse = lse.reshape((b, self.pages, (), self.queries))?.transpose(1, 2)?.contiguous()?;
        lse.reshape((b, (), self.pages * self.queries))
    }
}

/// The tokens that the pages of queries of a run chose, as rows of keys and values.
pub(super) struct Chosen {
    run: Run,
    sinks: usize,
    /// (b · pages · g, m), u32, counted from behind the sinks.
    places: Tensor,
    /// Rows of keys or values (b · t · g, d), for each of `places`, u32.
    ids: Tensor,
    kv_heads: usize,
    /// Tokens that the last page can choose from.
    older: usize,
}

impl Chosen {
    /// `chosen` (b, pages, g, m) of sequences of `t` tokens.
    pub(super) fn new(run: &Run, chosen: &Tensor, t: usize, sinks: usize) -> Result<Self> {
        let (b, pages, g, m) = chosen.dims4()?;
        // Row of the first token behind the sinks, of each sequence and head.
        let first = |i: usize, head: usize| ((i * t + sinks) * g + head) as u32;
        let firsts: Vec<u32> =
            (0..b).flat_map(|i| (0..g).map(move |head| first(i, head))).collect();
        let firsts = Tensor::from_vec(firsts, (b, 1, g, 1), chosen.device())?;
        let stride = Tensor::new(g as u32, chosen.device())?;
        let ids = chosen.broadcast_mul(&stride)?.broadcast_add(&firsts)?.flatten_all()?;
        let places = chosen.reshape((b * pages * g, m))?;
        let older = run.older + PAGE * (pages - 1);
        Ok(Self { run: *run, sinks, places, ids, kv_heads: g, older })
    }
}

/// A page and a key/value head a batch: each head has tokens of its own.
impl Part for Chosen {
    fn is_causal(&self) -> bool {
        false
    }

    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, h, d) = x.dims4()?;
        let (g, batches) = (self.kv_heads, b * self.run.pages);
        let x = x.reshape((batches, self.run.queries, g, h / g * d))?.transpose(1, 2)?;
        x.contiguous()?.reshape((batches * g, self.run.queries, h / g, d))
    }

    fn queries_back(&self, x: &Tensor) -> Result<Tensor> {
        let (batches, queries, group, d) = x.dims4()?;
        let (g, pages) = (self.kv_heads, self.run.pages);
        let x = x.reshape((batches / g, g, queries, group * d))?.transpose(1, 2)?.contiguous()?;
        x.reshape((batches / (g * pages), pages * queries, g * group, d))
    }

    fn lse(&self, lse: &Tensor) -> Result<Tensor> {
        let by_page = self.run.by_page(lse)?;
        let (batches, h, queries) = by_page.dims3()?;
        by_page.reshape((batches * self.kv_heads, h / self.kv_heads, queries))
    }

    fn lse_back(&self, lse: &Tensor) -> Result<Tensor> {
        self.run.in_order(lse, lse.dim(0)? / (self.run.pages * self.kv_heads))
    }

    fn keys(&self, x: &Tensor) -> Result<Tensor> {
        let (batches, m) = self.places.dims2()?;
        let d = x.dim(3)?;
        x.reshape(((), d))?.index_select(&self.ids, 0)?.reshape((batches, m, 1, d))
    }

    /// A page's tokens are distinct: in a row of zeros for each page no two meet, and equal inputs give equal bits.
    fn keys_back(&self, gradient: &Tensor) -> Result<(usize, Tensor)> {
        let (batches, m) = self.places.dims2()?;
        let (g, d, pages) = (self.kv_heads, gradient.dim(3)?, self.run.pages);
        let gradient = gradient.to_dtype(DType::F32)?.reshape((batches, m, d))?;
        let places = self.places.unsqueeze(2)?.broadcast_as((batches, m, d))?.contiguous()?;
        let zeros = Tensor::zeros((batches, self.older, d), DType::F32, gradient.device())?;
        let apart = zeros.scatter_add(&places, &gradient.contiguous()?, 1)?;
        let sum = apart.reshape((batches / (pages * g), pages, g, self.older * d))?.sum(1)?;
        let sum = sum.reshape(((), g, self.older, d))?.transpose(1, 2)?.contiguous()?;
        Ok((self.sinks, sum))
    }
}

/// Gradients of keys and values on the way to their sum.
pub(super) struct KeyGradients {
    /// Tokens of the sequence.
    t: usize,
    /// (b, t, g, d) each, f32.
    sum: Option<[Tensor; 2]>,
}

impl KeyGradients {
    pub(super) fn new(t: usize) -> Self {
        Self { t, sum: None }
    }

    /// Adds gradients of keys and of values, (b, n, g, d) each, of the tokens from the one that is named on.
    pub(super) fn add(&mut self, parts: [(usize, Tensor); 2]) -> Result<()> {
        let [dk, dv] = parts.map(|(start, x)| {
            let rest = self.t - start - x.dim(1)?;
            x.to_dtype(DType::F32)?.pad_with_zeros(1, start, rest)
        });
        let (dk, dv) = (dk?, dv?);
        self.sum = Some(match self.sum.take() {
            Some([keys, values]) => [(keys + dk)?, (values + dv)?],
            None => [dk, dv],
        });
        Ok(())
    }

    /// The sums, in `dtype`.
    pub(super) fn finish(self, dtype: DType) -> Result<[Tensor; 2]> {
        let Some([keys, values]) = self.sum else {
            candle_core::bail!("recall: no gradient of a key, expected one")
        };
        Ok([keys.to_dtype(dtype)?, values.to_dtype(dtype)?])
    }
}
