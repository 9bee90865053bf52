//! From logits to a token: greedy or random, by parameters that are plain data.
//! Knows no model. Randomness is a function of seed and stream position, so a reopened session draws the same.

use crate::error::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen.
///
/// ```
/// use mka::{Sampling, SendOptions};
///
/// let sampling = Sampling::default().temperature(0.7).top_p(0.9).min_p(0.05).seed(7);
/// let options = SendOptions::default().sampling(sampling).max_new_tokens(256);
/// assert_eq!(options.sampling.seed, 7);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Sampling {
    /// 0 takes the most likely token; above, logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all (arXiv 1904.09751).
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one, of those that `top_k` and `top_p` keep; 0 drops none
    /// (arXiv 2407.01082).
    pub min_p: f32,
    /// Divide (multiply) positive (negative) logits of recent tokens by this; 1 changes none (arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Two runs with one seed draw the same, and so do two that leave it at 0: give another for another answer.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy: the most likely token, always.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// # Errors
    /// If a parameter is outside its range.
    pub(crate) fn check(&self) -> Result<()> {
        let range =
            |name: &str, value: f32, low: f32, high: f32| match value >= low && value <= high {
                true => Ok(()),
                false => Err(Error::invalid(format!(
                    "sampling: {name} {value}, expected between {low} and {high}"
                ))),
            };
        range("temperature", self.temperature, 0.0, 100.0)?;
        range("top_p", self.top_p, 0.0, 1.0)?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
    }

    /// Picks a token from `logits` (vocab) for stream position `position`; `recent` are the tokens to penalise.
    ///
    /// # Errors
    /// If no logit is a number: the model is damaged.
    pub(crate) fn pick(&self, logits: &mut [f32], recent: &[u32], position: u64) -> Result<u32> {
        if self.repetition_penalty != 1.0 {
            let mut penalised: Vec<u32> = recent.to_vec();
            penalised.sort_unstable();
            penalised.dedup();
            for token in penalised {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = match *logit > 0.0 {
                        true => *logit / self.repetition_penalty,
                        false => *logit * self.repetition_penalty,
                    };
                }
            }
        }
        let best = logits
            .iter()
            .enumerate()
            .filter(|(_, x)| !x.is_nan())
            .max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)))
            .filter(|(_, x)| x.is_finite())
            .map(|(i, x)| (i as u32, *x))
            .ok_or_else(|| Error::model("sampling: no logit is a finite number"))?;
        if self.temperature == 0.0 {
            return Ok(best.0);
        }
        // min_p comes after top_p, as in transformers and llama.cpp: before it, what is dropped would change which tokens
        // reach top_p. Where there is no top_p the order is all one, and fewer are sorted.
        let floor = if self.top_p < 1.0 { 0.0 } else { self.min_p };
        // (token, unnormalised probability), most likely first.
        let mut candidates: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .map(|(token, x)| (token as u32, ((x - best.1) / self.temperature).exp()))
            .filter(|(_, weight)| *weight > 0.0 && *weight >= floor)
            .collect();
        candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.top_k > 0 {
            candidates.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            let total: f32 = candidates.iter().map(|(_, weight)| weight).sum();
            let mut mass = 0.0;
            let keep = candidates
                .iter()
                .position(|(_, weight)| {
                    mass += weight;
                    mass >= self.top_p * total
                })
                .map_or(candidates.len(), |at| at + 1);
            candidates.truncate(keep);
        }
        candidates.retain(|(_, weight)| *weight >= self.min_p);
        let total: f32 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(position);
        let mut left = rng.random::<f32>() * total;
        for (token, weight) in &candidates {
            left -= weight;
            if left <= 0.0 {
                return Ok(*token);
            }
        }
        Ok(candidates.last().map_or(best.0, |(token, _)| *token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(sampling: &Sampling, logits: &[f32], position: u64) -> u32 {
        sampling.pick(&mut logits.to_vec(), &[], position).unwrap()
    }

    #[test]
    fn greedy_takes_the_first_of_equal_maxima_and_ignores_nan() {
        let greedy = Sampling::default();
        assert_eq!(pick(&greedy, &[1.0, 3.0, 3.0, f32::NAN], 0), 1);
        assert!(greedy.pick(&mut [f32::NAN; 3], &[], 0).is_err());
        assert!(greedy.pick(&mut [], &[], 0).is_err());
    }

    #[test]
    fn filters_keep_only_what_they_name() {
        let logits = [0.0, 5.0, 4.9, -2.0, 4.8];
        let hot = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let seen = |sampling: &Sampling| {
            let mut seen: Vec<u32> = (0..400).map(|i| pick(sampling, &logits, i)).collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(seen(&Sampling { top_k: 2, ..hot.clone() }), [1, 2]);
        assert_eq!(seen(&Sampling { top_p: 0.3, ..hot.clone() }), [1]);
        assert_eq!(seen(&Sampling { min_p: 0.5, ..hot.clone() }), [1, 2, 4]);
    }

    #[test]
    fn min_p_does_not_change_what_top_p_keeps() {
        let logits = [0.5f32, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05].map(f32::ln);
        let sampling =
            Sampling { temperature: 1.0, top_p: 0.7, min_p: 0.3, seed: 5, ..Sampling::default() };
        let mut seen: Vec<u32> = (0..400).map(|i| pick(&sampling, &logits, i)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [0, 1]);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let hot = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        let logits = [3f32.ln(), 1f32.ln()];
        let ones = (0..4000).filter(|i| pick(&hot, &logits, *i) == 0).count();
        // Expected 3,000; the standard deviation is 27.
        assert!((2850..3150).contains(&ones), "{ones}");
        assert_eq!(pick(&hot, &logits, 17), pick(&hot, &logits, 17));
    }

    #[test]
    fn penalty_lowers_repeated_tokens_whatever_their_sign() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(sampling.pick(&mut [4.0, 3.0], &[0], 0).unwrap(), 1);
        assert_eq!(sampling.pick(&mut [-2.0, -3.0], &[0, 9], 0).unwrap(), 1);
    }
}
