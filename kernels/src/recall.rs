//! Stored pages of one layer on one device, the choice among their tokens for a few queries, and the copy of the chosen.
//! Knows no session and no budget; on CUDA nothing waits for the host from the queries to the copied tokens.

mod choice;
#[cfg(feature = "cuda")]
mod cuda;
mod places;
mod portable;
mod standing;
mod stored;

pub use choice::{Choice, ChoiceParams, ChoiceRun, Placement};
pub use places::Places;
pub use standing::Standing;
pub use stored::StoredPages;

use crate::pages::PAGE_TOKENS;
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{DType, Result, Tensor, bail};

/// Keys that share a landmark.
pub const SPAN: usize = 8;
/// Landmarks of a page.
pub const MARKS: usize = PAGE_TOKENS / SPAN;
/// Runs of queries that choose side by side at most.
pub const MAX_RUNS: usize = 16;
/// Pages that there is room for at first.
const FIRST_PAGES: usize = 16;

/// Adds to `sums` (h + 1), f32, in place, e^(lse - all) of each head, 0 where nothing was seen, and `recovered` (1) to the last
/// where it is given: which share of a query's attention went to some of its keys.
///
/// Shapes: `lse`, `all` (1, h), f32.
///
/// # Errors
/// If shapes, types or devices disagree.
pub fn note_share(
    sums: &Tensor,
    lse: &Tensor,
    all: &Tensor,
    recovered: Option<&Tensor>,
) -> Result<()> {
    let (t, h) = lse.dims2()?;
    let fits = |x: &Tensor| x.dtype() == DType::F32 && x.device().same_device(lse.device());
    if t != 1
        || h == 0
        || all.dims() != lse.dims()
        || sums.dims() != [h + 1]
        || recovered.is_some_and(|x| x.dims() != [1])
        || ![Some(lse), Some(all), Some(sums), recovered].into_iter().flatten().all(fits)
    {
        bail!(
            "note_share: lse {lse:?} of {all:?} and {recovered:?} into {sums:?}, expected (1, h) and (1) into (h + 1), f32 of one device"
        );
    }
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = sums.device() {
        return cuda::note_share(device, sums, &lse.contiguous()?, &all.contiguous()?, recovered);
    }
    portable::note_share(sums, lse, all, recovered)
}
