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
    /// Sums of shares from zero on; without the device's memory they are noted on the host.
    pub(super) fn zero_sums(&mut self, on_device: bool) {
        let zero = |_| Tensor::zeros(2, DType::F32, &self.device).ok();
        let sums = on_device.then(|| (0..self.shape.num_layers).map(zero).collect::<Option<_>>());
        self.sums = sums.flatten().unwrap_or_default();
    }

    /// Begins to count what a turn recalls.
    pub(crate) fn begin_turn(&mut self) {
        self.tally.fill(Tally::default());
        self.zero_sums(!self.sums.is_empty());
        self.message = Message::default();
    }

    /// Notes which share of its attention one query of `layer` gave to `recalled`: lse (1, num_heads) of these and of
    /// all.
    pub(crate) fn note_share(
        &mut self,
        layer: usize,
        recalled: &Recalled,
        lse: &Tensor,
        all: &Tensor,
    ) -> Result<()> {
        let tally = &mut self.tally[layer];
        tally.queries += 1;
        tally.tokens = recalled.tokens;
        tally.estimated += usize::from(!matches!(recalled.recovered, Recovered::Unknown));
        let on_device = match &recalled.recovered {
            Recovered::Unknown => None,
            Recovered::Share(share) => {
                tally.recovered += share;
                None
            }
            Recovered::OnDevice(share) => Some(share),
        };
        if let Some(sums) = self.sums.get(layer) {
            return Ok(recall::note_share(sums, lse, all, on_device)?);
        }
        let numbers = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let (lse, all) = (numbers(lse)?, numbers(all)?);
        let shares = lse.iter().zip(&all).map(|(own, all)| (own - all).exp());
        tally.share += shares.sum::<f32>() / lse.len().max(1) as f32;
        if let Some(share) = on_device {
            tally.recovered += numbers(share)?.iter().sum::<f32>();
        }
        Ok(())
    }

    /// What the turn recalled.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn usage(&self) -> Result<PageUsage> {
        let mut tally = self.tally.clone();
        for (tally, sums) in tally.iter_mut().zip(&self.sums) {
            if tally.queries > 0 {
                let sums = sums.to_vec1::<f32>()?;
                tally.share += sums[0];
                tally.recovered += sums[1];
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
