//! Places that the rare words of a message pin: where the same tokens stand in stored pages, the text around is chosen
//! whatever attention asks for.
//! Knows token ids, no text. A key that no other is like (a UUID, a name) is found by its tokens where scores of keys
//! are close together (ReAttention, arXiv 2407.15176, fails on such keys).

use super::PageRule;
use super::index::SPAN;
use super::store::PageStore;
use mka_kernels::PAGE_TOKENS;

/// A token is rare if it is at most one in so many of the stored.
const RARE: usize = 1000;
/// Tokens within which matches count together: a sentence.
const REACH: u64 = 32;
/// Tokens chosen before the first match of a place, and from it on: what a key stands for follows it.
const BEFORE: u64 = 8;
const AFTER: u64 = 56;
/// Part of the recalled tokens that pins may take, in whole places; one place in any case.
const PART: usize = 4;
/// Places of less than this share of the best one's weight are not pinned.
const FLOOR: f32 = 0.6;

impl PageStore {
    /// Pins the places where the rare tokens of `message` stand closest together.
    pub(crate) fn pin_words(&mut self, message: &[u32]) {
        self.message.pins.clear();
        if self.config.rule != PageRule::Mka {
            return;
        }
        let matches = self.rare_matches(message);
        let budget = self.config.tokens / PART / (BEFORE + AFTER) as usize;
        for first in best_places(&matches, budget.max(1)) {
            let marks =
                first.saturating_sub(BEFORE) / SPAN as u64..(first + AFTER).div_ceil(SPAN as u64);
            self.message.pins.extend(marks);
        }
        self.message.pins.sort_unstable();
        self.message.pins.dedup();
    }

    /// Stream positions of the message's rare tokens in the stored pages, ascending, with token and weight.
    fn rare_matches(&self, message: &[u32]) -> Vec<(u64, u32, f32)> {
        // By token id, up to the largest one of the message: a million tokens are looked up.
        let ids = message.iter().max().map_or(0, |largest| *largest as usize + 1);
        let mut counts = vec![0u32; ids];
        let rows = self.order.len();
        for token in self.token_ids(rows).flat_map(|(_, tokens)| tokens) {
            if let Some(count) = counts.get_mut(*token as usize) {
                *count += 1;
            }
        }
        let stored = (rows * PAGE_TOKENS) as f32;
        let limit = (rows * PAGE_TOKENS / RARE).max(8) as u32;
        // 0 for what is not rare, or no token of the message.
        let mut weights = vec![0f32; ids];
        for token in message {
            let count = counts[*token as usize];
            if (1..=limit).contains(&count) {
                weights[*token as usize] = (stored / count as f32).ln();
            }
        }
        let mut matches = Vec::new();
        for (page, tokens) in self.token_ids(rows) {
            for (position, token) in (page * PAGE_TOKENS as u64..).zip(tokens) {
                let weight = weights.get(*token as usize).copied().unwrap_or(0.0);
                if weight > 0.0 {
                    matches.push((position, *token, weight));
                }
            }
        }
        matches
    }
}

/// First positions of at most `count` places, best first, none within [`REACH`] of another: where the distinct tokens
/// among `matches` (position, token, weight; ascending) weigh most.
fn best_places(matches: &[(u64, u32, f32)], count: usize) -> Vec<u64> {
    let weight = |first: usize| {
        let start = matches[first].0;
        let near = matches[first..].iter().take_while(|(at, ..)| *at < start + REACH);
        let mut seen: Vec<u32> = Vec::new();
        near.fold(0.0, |sum, (_, token, weight)| {
            if seen.contains(token) {
                return sum;
            }
            seen.push(*token);
            sum + weight
        })
    };
    let mut places: Vec<(f32, u64)> =
        (0..matches.len()).map(|i| (weight(i), matches[i].0)).collect();
    places.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let floor = places.first().map_or(0.0, |best| best.0 * FLOOR);
    let mut best: Vec<u64> = Vec::new();
    for (weight, at) in places {
        if best.len() == count || weight < floor {
            break;
        }
        if best.iter().all(|other| other.abs_diff(at) >= REACH) {
            best.push(at);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_with_most_distinct_rare_tokens_comes_first() {
        let matches = [
            (100, 1, 2.0),
            (101, 1, 2.0),
            (500, 1, 2.0),
            (510, 2, 3.0),
            (540, 2, 3.0),
            (900, 2, 3.0),
            (931, 1, 2.0),
        ];
        assert_eq!(best_places(&matches, 9), [500, 900, 540]);
        assert_eq!(best_places(&matches, 1), [500]);
        assert!(best_places(&[], 3).is_empty());
    }
}
