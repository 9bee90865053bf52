//! Votes that outlive the queries that gave them: what a message asked for is asked for while it is answered.
//! Knows tokens by their place among the stored ones; when votes stand and when they go is their owner's matter.

use candle_core::{Device, Result, Tensor, bail};

/// Choices that stand side by side at most; beyond, the oldest go. Of 2,048 tokens and three heads each takes 48 KiB a layer.
const MAX_LISTS: usize = 16;

/// Tokens with votes, as choices for each head left them.
///
/// Tokens are counted from the first that was ever stored, so that they stay what they are when pages are let go at the
/// front; one that is not stored any more is passed over. Of all tokens a choice keeps those that it chose: a token that was
/// not among the most asked for then would not become one by the same votes later.
#[derive(Debug, Clone)]
pub struct Standing {
    /// (lists · g, k), u32.
    pub(super) tokens: Tensor,
    /// (lists · g, k), f32.
    pub(super) votes: Tensor,
}

impl Standing {
    /// These votes and, where they are given, those that stood `before`, for choices of `num_heads` heads. The latest 16
    /// choices stand; choices of another number of tokens do not stand beside these.
    ///
    /// # Errors
    /// If the device fails.
    pub fn after(self, before: Option<&Self>, num_heads: usize) -> Result<Self> {
        let is_alike = |before: &&Self| before.tokens.dim(1).ok() == self.tokens.dim(1).ok();
        let Some(before) = before.filter(is_alike) else { return Ok(self) };
        let latest = |before: &Tensor, own: &Tensor| {
            let all = Tensor::cat(&[before, own], 0)?;
            let rows = all.dim(0)?;
            let kept = rows.min(MAX_LISTS * num_heads);
            all.narrow(0, rows - kept, kept)?.contiguous()
        };
        Ok(Self {
            tokens: latest(&before.tokens, &self.tokens)?,
            votes: latest(&before.votes, &self.votes)?,
        })
    }

    /// The tokens of each of `num_heads` heads and their votes, choice by choice: a token that several of them took is there
    /// as often; downloads them.
    ///
    /// # Errors
    /// If these are no choices of so many heads, or the device fails.
    pub fn by_head(&self, num_heads: usize) -> Result<Vec<Vec<(u32, f32)>>> {
        if !self.tokens.dim(0)?.is_multiple_of(num_heads) {
            bail!("votes {:?}, expected choices of {num_heads} heads", self.tokens);
        }
        let mut heads = vec![Vec::new(); num_heads];
        let lists = self.tokens.to_vec2::<u32>()?.into_iter().zip(self.votes.to_vec2::<f32>()?);
        for (row, (tokens, votes)) in lists.enumerate() {
            heads[row % num_heads].extend(tokens.into_iter().zip(votes));
        }
        Ok(heads)
    }

    /// Refuses what cannot stand beside the votes of so many heads and runs.
    pub(super) fn check(&self, heads: usize, runs: usize, device: &Device) -> Result<()> {
        if runs != 1
            || !self.tokens.dim(0)?.is_multiple_of(heads)
            || !self.tokens.device().same_device(device)
        {
            bail!(
                "choose: standing votes {:?} for {runs} runs of {heads} heads, expected (lists · heads, tokens) and one run",
                self.tokens
            );
        }
        Ok(())
    }
}
