//! What a turn recalled, counted query by query: shares of the attention by layer.
//! Knows no page; on a device the sums are kept there, so that no layer waits for them.

use super::recalled::{Recalled, Recovered};
use super::store::PageStore;
use super::{Message, PageUsage};
use crate::error::Result;
use candle_core::{DType, Tensor};
use mka_kernels::recall;

/// Sums over single queries of one layer.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    queries: usize,
    tokens: usize,
    share: f32,
    estimated: usize,
    recovered: f32,
}

impl PageStore {
    /// Sums of shares from zero on, on the device or on the host.
    pub(super) fn zero_sums(&mut self, on_device: bool) {
        self.sums = if on_device { vec![None; self.shape.num_layers] } else { Vec::new() };
    }

    /// Begins to count what a turn recalls.
    pub(crate) fn begin_turn(&mut self) {
        self.tally.fill(Tally::default());
        self.zero_sums(!self.sums.is_empty());
        self.message = Message::default();
    }

    /// Where the device sums, as it attends, which share of the attention of each of `num_heads` heads of `layer` goes to
    /// what is recalled; None where they are noted afterwards.
    ///
    /// # Errors
    /// If the device has no memory for them.
    pub(crate) fn share_sums(&mut self, layer: usize, num_heads: usize) -> Result<Option<Tensor>> {
        // An estimate of the rest comes behind the attention.
        if self.config.estimate { Ok(None) } else { self.sums_of(layer, num_heads) }
    }

    /// The layer's sums on the device; None where the host has them.
    fn sums_of(&mut self, layer: usize, num_heads: usize) -> Result<Option<Tensor>> {
        let Some(sums) = self.sums.get_mut(layer) else { return Ok(None) };
        if sums.is_none() {
            // The last one is that of shares recovered.
            *sums = Some(Tensor::zeros(num_heads + 1, DType::F32, &self.device)?);
        }
        Ok(sums.clone())
    }

    /// Notes that one query of `layer` attended to `recalled`, and where [`PageStore::share_sums`] sums nothing which share
    /// of its attention went there: lse (1, num_heads) of these and of all.
    pub(crate) fn note_share(
        &mut self,
        layer: usize,
        recalled: &Recalled,
        lse: &Tensor,
        all: &Tensor,
    ) -> Result<()> {
        let mut tally = self.tally[layer];
        tally.queries += 1;
        tally.tokens = recalled.tokens;
        tally.estimated += usize::from(!matches!(recalled.recovered, Recovered::Unknown));
        if let Recovered::Share(share) = recalled.recovered {
            tally.recovered += share;
        }
        if self.sums.is_empty() {
            let numbers = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
            let shares = numbers(lse)?.into_iter().zip(numbers(all)?);
            let shares = shares.map(|(own, all)| (own - all).exp());
            tally.share += shares.sum::<f32>() / lse.elem_count().max(1) as f32;
            if let Some(share) = recalled.recovered_on_device() {
                tally.recovered += numbers(share)?.iter().sum::<f32>();
            }
        } else if self.config.estimate
            && let Some(sums) = self.sums_of(layer, lse.dim(1)?)?
        {
            recall::note_share(&sums, lse, all, recalled.recovered_on_device())?;
        }
        self.tally[layer] = tally;
        Ok(())
    }

    /// What the turn recalled.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn usage(&self) -> Result<PageUsage> {
        let mut tally = self.tally.clone();
        for (tally, sums) in tally.iter_mut().zip(&self.sums) {
            if let Some(sums) = sums {
                let sums = sums.to_vec1::<f32>()?;
                if let Some((recovered, heads)) = sums.split_last() {
                    tally.share += heads.iter().sum::<f32>() / heads.len().max(1) as f32;
                    tally.recovered += recovered;
                }
            }
        }
        let mean = |sum: f32, count: usize| if count == 0 { 0.0 } else { sum / count as f32 };
        Ok(PageUsage {
            stored_tokens: self.stored_tokens(),
            recalled_tokens: tally.iter().map(|tally| tally.tokens).max().unwrap_or(0),
            share: tally.iter().map(|t| mean(t.share, t.queries)).collect(),
            recovered: tally.iter().map(|t| mean(t.recovered, t.estimated)).collect(),
        })
    }
}
