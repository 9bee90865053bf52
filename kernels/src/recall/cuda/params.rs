//! Parameters of the kernels of `cuda/recall.cu`, field for field.
//! Knows no rule and no launch.

use crate::recall::MAX_RUNS;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Run {
    pub(super) first: u32,
    pub(super) queries: u32,
    pub(super) pages: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct QueryParams {
    pub(super) q: u64,
    pub(super) cosine: u64,
    pub(super) sine: u64,
    pub(super) mean: u64,
    pub(super) h: u32,
    pub(super) d: u32,
    pub(super) pooled: u32,
    pub(super) scale: f32,
    pub(super) runs: [Run; MAX_RUNS],
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for QueryParams {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct VoteParams {
    pub(super) q: u64,
    pub(super) keys: u64,
    pub(super) marks: u64,
    pub(super) outlier_keys: u64,
    pub(super) outliers: u64,
    pub(super) pins: u64,
    pub(super) logits: u64,
    pub(super) stats: u64,
    pub(super) norms: u64,
    pub(super) votes: u64,
    pub(super) n: u64,
    pub(super) num_marks: u32,
    pub(super) num_outliers: u32,
    pub(super) num_pins: u32,
    pub(super) rows: u32,
    pub(super) h: u32,
    pub(super) g: u32,
    pub(super) group: u32,
    pub(super) d: u32,
    pub(super) blocks: u32,
    pub(super) pooled: u32,
    pub(super) is_joined: u32,
    pub(super) runs: [Run; MAX_RUNS],
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for VoteParams {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ReachParams {
    pub(super) votes: u64,
    pub(super) marks: u64,
    pub(super) pooled: u64,
    pub(super) n: u64,
    pub(super) num_marks: u32,
    pub(super) reach: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for ReachParams {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct StandingParams {
    pub(super) tokens: u64,
    pub(super) standing: u64,
    pub(super) marks: u64,
    pub(super) votes: u64,
    pub(super) n: u64,
    pub(super) num_marks: u32,
    pub(super) k: u32,
    pub(super) g: u32,
    pub(super) span: u32,
    pub(super) gone: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for StandingParams {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct KeptParams {
    pub(super) votes: u64,
    pub(super) marks: u64,
    pub(super) best: u64,
    pub(super) tokens: u64,
    pub(super) standing: u64,
    pub(super) n: u64,
    pub(super) num_marks: u32,
    pub(super) k: u32,
    pub(super) gone: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for KeptParams {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RecoveredParams {
    pub(super) mark_logits: u64,
    pub(super) mark_norms: u64,
    pub(super) marks: u64,
    pub(super) token_logits: u64,
    pub(super) token_norms: u64,
    pub(super) best: u64,
    pub(super) recovered: u64,
    pub(super) mark_n: u64,
    pub(super) token_n: u64,
    pub(super) num_marks: u32,
    pub(super) k: u32,
    pub(super) g: u32,
    pub(super) group: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for RecoveredParams {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ChosenParams {
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) marks: u64,
    pub(super) best: u64,
    pub(super) cosine: u64,
    pub(super) sine: u64,
    pub(super) out_keys: u64,
    pub(super) out_values: u64,
    pub(super) first: u64,
    pub(super) num_marks: u32,
    pub(super) k: u32,
    pub(super) g: u32,
    pub(super) d: u32,
    pub(super) compact: u32,
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for ChosenParams {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ShareParams {
    pub(super) lse: u64,
    pub(super) all: u64,
    pub(super) recovered: u64,
    pub(super) sums: u64,
    pub(super) h: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for ShareParams {}
