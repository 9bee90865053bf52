//! Selection by its definition: landmarks, votes, the k best.
//! Knows nothing of speed.

use crate::PAGE_TOKENS;

/// [`crate::landmarks`]: (s, g, PAGE_TOKENS / span, d). Shapes: `keys` (s, g, PAGE_TOKENS, d), row-major; `lens` (s).
pub fn landmarks(
    keys: &[f32],
    (s, g, d): (usize, usize, usize),
    span: usize,
    lens: &[usize],
) -> Vec<f64> {
    let marks = PAGE_TOKENS / span;
    let mut means = Vec::with_capacity(s * g * marks * d);
    for slot in 0..s {
        for head in 0..g {
            for mark in 0..marks {
                let tokens: Vec<usize> =
                    (mark * span..(mark + 1) * span).filter(|token| *token < lens[slot]).collect();
                for x in 0..d {
                    let at = |token: usize| ((slot * g + head) * PAGE_TOKENS + token) * d + x;
                    let sum: f64 = tokens.iter().map(|token| f64::from(keys[at(*token)])).sum();
                    means.push(sum / tokens.len().max(1) as f64);
                }
            }
        }
    }
    means
}

/// [`crate::score_landmarks`]: (g, n). Shapes: `q` (t, h, d), `landmarks` (n, g, d), row-major.
pub fn score_landmarks(
    q: &[f32],
    landmarks: &[f32],
    (t, h, g, d): (usize, usize, usize, usize),
    scale: f32,
) -> Vec<f64> {
    let n = landmarks.len() / (g * d);
    let mut votes = vec![0f64; g * n];
    for row in 0..t * h {
        let head = row % h / (h / g);
        let score = |i: usize| -> f64 {
            let dot: f64 = (0..d)
                .map(|x| f64::from(q[row * d + x]) * f64::from(landmarks[(i * g + head) * d + x]))
                .sum();
            dot * f64::from(scale)
        };
        let scores: Vec<f64> = (0..n).map(score).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |max, s| max.max(*s));
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        for (i, s) in scores.iter().enumerate() {
            votes[head * n + i] += (s - max).exp() / sum;
        }
    }
    votes
}

/// [`crate::top_k`] of one row: a full sort.
pub fn top_k(votes: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..votes.len() as u32).collect();
    order.sort_by(|a, b| votes[*b as usize].total_cmp(&votes[*a as usize]).then(a.cmp(b)));
    order.truncate(k);
    order.sort_unstable();
    order
}
