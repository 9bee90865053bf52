//! Every op in plain f64 loops: the oracle that the fast versions are tested against.
//! Knows nothing of speed.

mod flash;
mod merge;
pub mod route;
mod select;

pub use flash::{attention, attention_backward};
pub use merge::{RowGradients, merge_states, merge_states_backward};
pub use select::{landmarks, score_landmarks, top_k};

use crate::{AttentionParams, PAGE_TOKENS};

/// [`crate::paged_attention`] by its definition: (out, lse) of shapes (t, h, d) and (t, h).
///
/// Shapes: `q` (t, h, d); `keys`, `values` (s, g, PAGE_TOKENS, d), row-major.
pub fn paged_attention(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    (t, h, g, d): (usize, usize, usize, usize),
    params: &AttentionParams,
) -> (Vec<f64>, Vec<f64>) {
    let mut out = vec![0f64; t * h * d];
    let mut lse = vec![f64::NEG_INFINITY; t * h];
    for i in 0..t {
        let position = params.query_start + i as u64;
        let page_floor = |x: u64| x / PAGE_TOKENS as u64 * PAGE_TOKENS as u64;
        let mut first = 0;
        if let Some(window) = params.window_tokens {
            first = first.max(page_floor((position + 1).saturating_sub(window)));
        }
        if let Some(window) = params.sliding_window {
            first = first.max((position + 1).saturating_sub(window));
        }
        for head in 0..h {
            let query = &q[(i * h + head) * d..][..d];
            let mut seen = Vec::new();
            for page in &params.pages {
                for j in 0..page.len {
                    let key_position = page.start + j as u64;
                    if key_position >= first && key_position <= position {
                        let at = ((page.slot * g + head / (h / g)) * PAGE_TOKENS + j) * d;
                        let score: f64 = (0..d)
                            .map(|x| f64::from(query[x]) * f64::from(keys[at + x]))
                            .sum::<f64>()
                            * f64::from(params.scale)
                            + f64::from(page.bias);
                        // NaN is seen.
                        if score != f64::NEG_INFINITY {
                            seen.push((score, at));
                        }
                    }
                }
            }
            let max = seen.iter().fold(f64::NEG_INFINITY, |max, (s, _)| max.max(*s));
            let sum: f64 = seen.iter().map(|(s, _)| (s - max).exp()).sum();
            for (score, at) in &seen {
                let weight = (score - max).exp() / sum;
                for x in 0..d {
                    out[(i * h + head) * d + x] += weight * f64::from(values[at + x]);
                }
            }
            if !seen.is_empty() {
                lse[i * h + head] = max + sum.ln();
            }
        }
    }
    (out, lse)
}
