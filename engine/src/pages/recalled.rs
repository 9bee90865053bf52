//! What queries recalled: keys and values laid out in pages, and how much of the attention they stand for.
//! Knows neither how they were chosen nor how they are attended.

use candle_core::Tensor;
use mka_kernels::{AttentionRun, PAGE_TOKENS, PageRef};

/// What one layer's queries attend to beside sinks and window.
pub(crate) struct Recalled {
    /// (pages, num_kv_heads, PAGE_TOKENS, head_dim), rotated; each head may hold other tokens. On the processor f16 where
    /// the pages hold bf16. Rows behind `tokens` hold anything.
    pub(crate) keys: Tensor,
    /// The same shape; on the processor bf16 where the pages hold them so.
    pub(crate) values: Tensor,
    /// Tokens in them.
    pub(crate) tokens: usize,
    /// Stream positions of the pages' first tokens where they are whole pages of the stream in its order.
    pub(crate) starts: Option<Vec<u64>>,
    /// Share of the attention to all stored tokens that these hold, estimated from landmarks.
    pub(crate) recovered: Recovered,
    /// For each key/value head, the tokens of each stored page that are not in them; None unless they are estimated.
    pub(crate) left: Option<Vec<Vec<u8>>>,
}

/// What several runs of queries attend to beside sinks and window.
pub(crate) struct RecalledRuns {
    /// As [`Recalled::keys`], of all runs.
    pub(crate) keys: Tensor,
    pub(crate) values: Tensor,
    /// Their pages.
    pub(crate) pages: Vec<PageRef>,
    /// Each run's pages of these, and the tokens in them.
    pub(crate) runs: Vec<(AttentionRun, usize)>,
}

/// Where an estimated share stands.
pub(crate) enum Recovered {
    /// Nowhere: it was not estimated.
    Unknown,
    Share(f32),
    /// (1), f32.
    OnDevice(Tensor),
}

impl Recalled {
    /// What the device knows of [`Recalled::recovered`].
    pub(crate) fn recovered_on_device(&self) -> Option<&Tensor> {
        match &self.recovered {
            Recovered::OnDevice(share) => Some(share),
            _ => None,
        }
    }

    /// References to its pages, each visible to every query.
    pub(crate) fn page_refs(&self) -> Vec<PageRef> {
        let len = |slot: usize| PAGE_TOKENS.min(self.tokens - slot * PAGE_TOKENS);
        let start = |slot: usize| match &self.starts {
            Some(starts) => starts[slot],
            None => (slot * PAGE_TOKENS) as u64,
        };
        let page = |slot| PageRef { slot, start: start(slot), len: len(slot), bias: 0.0 };
        (0..self.tokens.div_ceil(PAGE_TOKENS)).map(page).collect()
    }
}
