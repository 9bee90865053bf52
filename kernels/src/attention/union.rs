//! Attention over the union of several sets of keys with one softmax.
//! Knows no stream: which sets, and which of them is counted, are arguments.

#[cfg(feature = "cuda")]
use super::cuda;
use super::{AttentionPart, AttentionState, check, merge_states, paged_attention_parts};
use crate::recall::note_share;
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{DType, Result, Tensor, bail};

/// The result of attending to several sets of keys at once.
#[derive(Debug, Clone)]
pub struct AttentionUnion {
    /// Over all keys.
    pub state: AttentionState,
    /// (t, h), f32, of each part: log of the sum of e^score over its keys; -inf for a query that saw none of them, or gave
    /// them less than f32 tells from 0 beside the rest.
    pub part_lses: Vec<Tensor>,
}

/// Where the share of attention that goes to one of several parts is summed, as [`note_share`] does.
#[derive(Debug, Clone, Copy)]
pub struct ShareSums<'a> {
    /// Which part is counted.
    pub part: usize,
    /// (h + 1), f32; added to in place.
    pub sums: &'a Tensor,
    /// (1), f32; added to the last of `sums`.
    pub recovered: Option<&'a Tensor>,
}

/// Attention of one query token, or a few, to the union of what `parts` name: the merge of their states.
///
/// Shapes: those of [`paged_attention_parts`], `q` of all parts (t, h, d), each rotated in its own way; with `shares` t is 1.
/// On CUDA up to 16 query rows of a key/value head, f32, of two to four parts and a head_dim of 64, 96, 128 or 256 are one
/// launch; the softmax is then taken over all at once, and differs from [`merge_states`] by rounding.
///
/// Source: FlashInfer (arXiv 2501.01005) section 2.2; splits of one launch as in Flash-Decoding.
///
/// # Errors
/// As [`paged_attention_parts`], and if there is no part, queries differ in shape, or what `shares` names does not fit.
pub fn paged_attention_union(
    parts: &[AttentionPart<'_>],
    shares: Option<&ShareSums<'_>>,
) -> Result<AttentionUnion> {
    let Some(first) = parts.first() else { bail!("paged_attention_union: no part, expected one") };
    for part in parts {
        check(part.q, part.keys, part.values, part.params)?;
        if part.q.dims() != first.q.dims() || !part.q.device().same_device(first.q.device()) {
            bail!("paged_attention_union: q {:?}, expected it like {:?}", part.q, first.q);
        }
    }
    if let Some(shares) = shares {
        let (t, h, _) = first.q.dims3()?;
        let fits = |x: &Tensor, count: usize| {
            x.dims() == [count]
                && x.dtype() == DType::F32
                && x.device().same_device(first.q.device())
        };
        if t != 1
            || shares.part >= parts.len()
            || !fits(shares.sums, h + 1)
            || shares.recovered.is_some_and(|x| !fits(x, 1))
        {
            bail!(
                "paged_attention_union: part {} of {} and {:?} into {:?} for {t} queries, expected one query, (1) and ({}), f32 as q",
                shares.part,
                parts.len(),
                shares.recovered,
                shares.sums,
                h + 1
            );
        }
    }
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = first.q.device()
        && let Some(union) = cuda::paged_attention_union(device, parts, shares)?
    {
        return Ok(union);
    }
    let states = paged_attention_parts(parts)?;
    let part_lses: Vec<Tensor> = states.iter().map(|state| state.lse.clone()).collect();
    let mut states = states.into_iter();
    let first = states.next().ok_or_else(|| candle_core::Error::msg("paged_attention_union"))?;
    let state = states.try_fold(first, |all, state| merge_states(&all, &state))?;
    if let Some(ShareSums { part, sums, recovered }) = shares {
        note_share(sums, &part_lses[*part], &state.lse, *recovered)?;
    }
    Ok(AttentionUnion { state, part_lses })
}
