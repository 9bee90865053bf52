//! The page list as the kernels read it, in a launch or in device memory.

use crate::attention::{AttentionParams, PageRef};
use crate::cuda::{PerDevice, Words};
use candle_core::{CudaDevice, Result, bail};

/// Pages that travel in the launch itself, without an upload; as in `cuda/paged.cuh`.
pub(super) const INLINE_PAGES: usize = 200;

/// An entry of the list, as in `cuda/paged.cuh`.
#[repr(C, align(16))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Page {
    slot: u32,
    start: i32,
    len: u32,
    bias: f32,
}

/// The pages that some query sees, as the kernels read them.
pub(super) fn visible_pages(params: &AttentionParams, t: usize) -> Result<Vec<Page>> {
    let from = params.first_visible(params.query_start);
    let to = params.query_start + t as u64;
    let seen = |page: &&PageRef| {
        page.len > 0
            && page.start < to
            && page.start + page.len as u64 > from
            && page.bias > f32::NEG_INFINITY
    };
    params.pages.iter().filter(seen).map(|page| encoded(page, params, t)).collect()
}

/// A page as the kernels read it, for `t` queries.
pub(super) fn encoded(page: &PageRef, params: &AttentionParams, t: usize) -> Result<Page> {
    // A page this far back must be visible to all queries alike, so that its distance need not be exact.
    const FAR: i64 = 1 << 30;
    let last = (params.query_start + t as u64).saturating_sub(1);
    let start = page.start as i64 - params.query_start as i64;
    if start <= -FAR && params.first_visible(last) > page.start {
        bail!(
            "paged_attention: {page:?} at the edge of a window, expected windows below 2^30 tokens"
        );
    }
    Ok(Page {
        slot: u32::try_from(page.slot).map_err(candle_core::Error::wrap)?,
        // Above every clamped `first_visible`, below every query where the page begins behind all of them.
        start: start.clamp(1 - FAR, FAR) as i32,
        len: page.len as u32,
        bias: page.bias * std::f32::consts::LOG2_E,
    })
}

/// The page list on `device` where a launch has no room for it.
pub(super) fn table(device: &CudaDevice, pages: &[Page]) -> Result<Option<Words>> {
    (pages.len() > INLINE_PAGES).then(|| uploaded(device, pages)).transpose()
}

/// The list as it goes with a launch, at most [`INLINE_PAGES`].
pub(super) fn inline(pages: &[Page]) -> [Page; INLINE_PAGES] {
    let mut inline = [Page::default(); INLINE_PAGES];
    inline[..pages.len()].copy_from_slice(pages);
    inline
}

/// The page list on `device`. The last one of each device is kept: the layers of a model ask for the same in turn.
fn uploaded(device: &CudaDevice, pages: &[Page]) -> Result<Words> {
    static LAST: PerDevice<Option<(Vec<Page>, Words)>> = PerDevice::new();
    LAST.with(device, |last| {
        if let Some((_, table)) = last.as_ref().filter(|(list, _)| list == pages) {
            return Ok(table.clone());
        }
        let words: Vec<u32> = pages
            .iter()
            .flat_map(|page| [page.slot, page.start as u32, page.len, page.bias.to_bits()])
            .collect();
        let table = Words::uploaded(device, &words)?;
        *last = Some((pages.to_vec(), table.clone()));
        Ok(table)
    })
}
