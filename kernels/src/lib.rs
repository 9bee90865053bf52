//! The attention core of mka: pure functions on tensors.
//! Knows no session, chunk, tokenizer, model or file.
//!
//! Shapes use one alphabet: `b` batch, `t` query tokens (`tq` queries and `tk` keys
//! where both are given), `s` page slots, `p` = [`PAGE_TOKENS`], `h` query heads,
//! `g` key/value heads, `d` head dimension, `c` hidden size, `m` EMA rates.
//!
//! | op | formula | shapes | source |
//! |---|---|---|---|
//! | [`paged_attention`] | softmax(q kᵀ · scale) v over a list of pages | q (t, h, d); pools (s, g, p, d) | FlashAttention-2, arXiv 2307.08691, alg. 1 |
//! | [`paged_attention_union`] | the same over several pools with one softmax | q of each (t, h, d); its pool | FlashInfer, arXiv 2501.01005, sec. 2.2 |
//! | [`attention`] | softmax(q kᵀ · scale) v, with gradients | q (b, tq, h, d); k, v (b, tk, g, d) | FlashAttention-2, arXiv 2307.08691, alg. 1 and 2 |
//! | [`merge_states`] | log-sum-exp merge of two attentions | out (t, h, d), lse (t, h) | FlashInfer, arXiv 2501.01005, sec. 2.2 |
//! | [`landmarks`], [`score_landmarks`] | means of keys; Σ over heads of softmax(q landmarkᵀ · scale) | pool (s, g, p, d); landmarks (n, g, d) | `reference` |
//! | [`top_k`], [`gather_pages`] | exact k largest; copy of pages | votes (g, n); pool (s, g, p, d) | `reference` |
//! | [`recall`] | landmarks, votes, re-rank and copy of stored tokens, one call each | q (t, h, d); pages (s, g, p, d) | `recall` |
//! | [`rows`] | scores, softmax and the largest over rows of host memory | queries (r, d), rows (n, d) | `rows` |
//! | [`key_codes`] | q · centre + factor · (q · signs), from one bit a number of a key | queries (r, d), codes of n keys | RaBitQ, arXiv 2405.12497 |
//! | [`rotate`], [`rotate_back`] | rotary position embedding, half-split layout | x (t, h, d) | RoFormer, arXiv 2104.09864, eq. 34 |
//! | [`ema_scan`], [`fuse_levels`] | multi-rate EMA and the FastMKA mix | x (.., t, c), state (.., m, c) | MKA, arXiv 2603.20586, alg. 2 |
//! | [`route()`], [`route_into_pages`] | scan, router softmax, mix, bias, key norm, RoPE, page write in one pass | kv (b, t, 2, g, d), logits (b, t, 1 + m) | MKA, alg. 2, on projected keys and values |
//! | [`linear`] | x Wᵀ, W in its ggml layout | x (.., in), W (out, in) | ggml, `docs/packed.md` |
//! | [`PanelLinear`] | x Wᵀ + b, W in panels of f32 or 8-bit integers | x (m, in), W (out, in), b (out) | `docs/panels.md` |
//! | [`encoder`] | attention, layer norm and GELU of a text encoder on rows of f32 | qkv (t, 3, h, d), x (t, c) | BERT, arXiv 1810.04805 |
//! | [`silu_mul`], [`gelu_mul`] | silu(gate) · up, gelu(gate) · up | (t, f) | GLU variants, arXiv 2002.05202 |
//! | [`rms_norm_forward`] | x / √(mean x² + eps) · w, forward and backward | x (.., c), w (c) | RMSNorm, arXiv 1910.07467 |
//! | [`cross_entropy`] | log Σ e^logits - logit of the target, and its gradient | logits (n, words) | `cross_entropy` |
//! | [`tape`] | the ops of a layer with gradients, without candle's graph | - | `tape` |

#[cfg(feature = "cuda")]
mod adamw;
mod attention;
mod cross_entropy;
#[cfg(feature = "cuda")]
pub mod cuda;
mod elementwise;
pub mod encoder;
mod error;
mod flash;
pub mod key_codes;
mod norm;
pub mod packed;
mod pages;
mod panels;
mod pool;
mod product;
pub mod recall;
pub mod reference;
mod rope;
mod route;
pub mod rows;
mod select;
mod simd;
mod staging;
mod storage;
pub mod tape;

#[cfg(feature = "cuda")]
pub use adamw::{AdamWStep, adamw, square_sum};
pub use attention::{
    AttentionParams, AttentionPart, AttentionRun, AttentionState, AttentionUnion, MergeGradients,
    PageRef, ShareSums, merge_states, merge_states_backward, paged_attention,
    paged_attention_parts, paged_attention_runs, paged_attention_union,
};
pub use cross_entropy::cross_entropy;
pub use elementwise::{gelu_mul, silu_bias, silu_bias_backward, silu_mul, silu_mul_backward};
pub use error::{Error, ErrorKind, Result};
pub use flash::{DenseAttentionParams, attention, attention_backward, attention_forward};
pub use norm::{NormGradients, NormOutputs, rms_norm_backward, rms_norm_forward};
pub use packed::{PackedMatrix, PackedType, linear};
pub use pages::{PAGE_TOKENS, PagePool};
pub use panels::{PanelForm, PanelLinear};
pub use pool::on_pool;
pub use product::{ProductOptions, product};
pub use rope::{RotaryAngles, rotate, rotate_back};
pub use route::{
    MAX_RATES, RouteCarries, RouteGradients, RouteInputs, RouteOutputs, RouteParams, ema_advance,
    ema_scan, ema_scan_learned, fuse_levels, route, route_backward, route_forward,
    route_into_pages,
};
pub use select::{gather_pages, gather_pages_backward, landmarks, score_landmarks, top_k};
pub use staging::{Landing, Staged, Staging};
