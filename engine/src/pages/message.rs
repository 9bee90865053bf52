//! What a message asks for beside what each query of its answer asks for: places that its rare words pin, and the votes of
//! its own queries, which stand until the next message.
//! Knows tokens by their place in the stream; how votes are made and taken is the choice's matter.
//!
//! A decoded token's query asks for what comes next, which of a place that the question named is a part; once the
//! question's own votes are gone, most of such a place is. SnapKV (arXiv 2404.14469) chooses for a whole answer by its
//! prompt's last queries alone.

use super::store::PageStore;
use super::{PageConfig, PageRule};
use crate::error::Result;
use mka_kernels::PAGE_TOKENS;
use mka_kernels::recall::Standing;
use std::collections::BTreeMap;

/// Rows of queries of one run and key/value head that a card takes.
const MAX_ROWS: usize = 512;

/// Tokens of one layer and head whose votes stand in host memory at most, for each that is recalled. As many as are recalled
/// would do if no page of theirs were let go.
const KEPT: usize = 4;

/// Of a message, from its beginning to the next one's.
#[derive(Clone, Default)]
pub(crate) struct Message {
    /// Landmarks that its words pin, by their place in the stream (position / SPAN), ascending.
    pub(super) pins: Vec<u64>,
    /// Whether its tokens are read now.
    is_being_read: bool,
    /// By layer, votes on a device with the page that their tokens are counted from.
    on_device: BTreeMap<usize, (u64, Standing)>,
    /// By layer and key/value head, positions of the tokens of most votes, ascending, and these.
    on_host: BTreeMap<usize, Vec<Vec<(u64, f32)>>>,
}

impl Message {
    /// Whether votes are to stand.
    pub(super) fn keeps_votes(&self, config: &PageConfig) -> bool {
        self.is_being_read && config.keep_votes && config.rule == PageRule::Mka
    }

    /// Whether votes stand beside those of queries: beside a decoded token's, not a prompt's.
    fn stands_beside(&self, is_prompt: bool) -> bool {
        !self.is_being_read && !is_prompt
    }

    /// Votes that stand beside those of queries, a prompt's or not, for tokens of `layer`'s pages on the device, counted
    /// from page `counted_from` on.
    pub(super) fn standing_on_device(
        &self,
        layer: usize,
        counted_from: u64,
        is_prompt: bool,
    ) -> Option<&Standing> {
        let (from, votes) = self.on_device.get(&layer)?;
        (*from == counted_from && self.stands_beside(is_prompt)).then_some(votes)
    }

    /// Has votes stand beside those of `layer` before.
    pub(super) fn stand(
        &mut self,
        layer: usize,
        counted_from: u64,
        votes: Standing,
        num_kv_heads: usize,
    ) -> Result<()> {
        let before = self.on_device.get(&layer).filter(|(from, _)| *from == counted_from);
        let votes = votes.after(before.map(|(_, votes)| votes), num_kv_heads)?;
        self.on_device.insert(layer, (counted_from, votes));
        Ok(())
    }
}

impl PageStore {
    /// From now on a message is read.
    pub(crate) fn begin_message(&mut self) {
        self.message = Message { is_being_read: true, ..Message::default() };
        self.forget_choices();
    }

    /// The message has been read: from now on what it asked for stands, beside choices made for its answer alone.
    pub(crate) fn end_message(&mut self) {
        self.message.is_being_read = false;
        self.forget_choices();
    }

    /// Neighbouring queries, of `count` with `num_heads` heads, whose mean stands for them. Each query of a message votes: in
    /// a mean the few that name what they want are lost.
    pub(super) fn pooled(&self, count: usize, num_heads: usize) -> usize {
        match self.config.rule {
            PageRule::Mka if self.message.is_being_read => {
                let group = num_heads / self.shape.num_kv_heads;
                count.div_ceil((MAX_ROWS / group.max(1)).max(1)).max(1)
            }
            rule => rule.pooled(count),
        }
    }

    /// By head, tokens of `layer` that votes stand for beside those of queries, a prompt's or not, as index row · PAGE_TOKENS +
    /// offset among the first `rows` pages, ascending, and these votes.
    pub(super) fn standing(
        &self,
        layer: usize,
        rows: usize,
        is_prompt: bool,
    ) -> Vec<Vec<(u32, f32)>> {
        let tokens = PAGE_TOKENS as u64;
        let order = &self.order[..rows];
        let place = |(position, vote): &(u64, f32)| {
            let page = position / tokens;
            // Mostly no page is missing, and thousands of positions are looked up for each choice.
            let row = page.checked_sub(*order.first()?)? as usize;
            let row = match order.get(row) == Some(&page) {
                true => row,
                false => order.binary_search(&page).ok()?,
            };
            Some(((row * PAGE_TOKENS) as u32 + (position % tokens) as u32, *vote))
        };
        match self.message.on_host.get(&layer).filter(|_| self.message.stands_beside(is_prompt)) {
            Some(heads) => {
                heads.iter().map(|head| head.iter().filter_map(place).collect()).collect()
            }
            None => vec![Vec::new(); self.shape.num_kv_heads],
        }
    }

    /// Has the `votes` of the chosen tokens of `layer` stand, while a message is read.
    pub(super) fn note_votes(&mut self, layer: usize, heads: &[Vec<u32>], votes: &[Vec<f32>]) {
        if !self.message.keeps_votes(&self.config) {
            return;
        }
        let position = |token: &u32| {
            let (row, offset) = (*token as usize / PAGE_TOKENS, *token as usize % PAGE_TOKENS);
            self.order[row] * PAGE_TOKENS as u64 + offset as u64
        };
        let placed = |(tokens, votes): (&Vec<u32>, &Vec<f32>)| -> Vec<(u64, f32)> {
            tokens.iter().map(position).zip(votes.iter().copied()).collect()
        };
        let heads: Vec<Vec<(u64, f32)>> = heads.iter().zip(votes).map(placed).collect();
        self.add_votes(layer, &heads);
    }

    /// Has what a message asked for on the device stand in host memory: all choices are made there from now on.
    pub(super) fn bring_votes(&mut self) {
        for (layer, (counted_from, votes)) in std::mem::take(&mut self.message.on_device) {
            let heads = match votes.by_head(self.shape.num_kv_heads) {
                Ok(heads) => heads,
                Err(error) => {
                    tracing::warn!(%error, "what the message asked for on the device is lost");
                    return;
                }
            };
            let first = counted_from.wrapping_mul(PAGE_TOKENS as u64);
            let placed = |head: Vec<(u32, f32)>| {
                let place = |(token, vote): (u32, f32)| (first.wrapping_add(token.into()), vote);
                let mut head: Vec<(u64, f32)> = head.into_iter().map(place).collect();
                head.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
                // Of those that several choices took the largest vote is the first.
                head.dedup_by_key(|(position, _)| *position);
                head
            };
            let heads: Vec<Vec<(u64, f32)>> = heads.into_iter().map(placed).collect();
            self.add_votes(layer, &heads);
        }
    }

    /// Has the votes of each head, by position, ascending, stand beside those of `layer` before.
    fn add_votes(&mut self, layer: usize, heads: &[Vec<(u64, f32)>]) {
        let most = KEPT * self.recalled_tokens();
        let standing = self.message.on_host.entry(layer).or_default();
        standing.resize(heads.len(), Vec::new());
        for (standing, own) in standing.iter_mut().zip(heads) {
            let mut all = merged(standing, own.iter().copied());
            if all.len() > most {
                all.select_nth_unstable_by(most, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                all.truncate(most);
                all.sort_unstable_by_key(|(position, _)| *position);
            }
            *standing = all;
        }
    }
}

/// The positions of both, ascending as they are, each with its larger vote.
fn merged(before: &[(u64, f32)], own: impl Iterator<Item = (u64, f32)>) -> Vec<(u64, f32)> {
    let mut before = before.iter().copied().peekable();
    let mut all = Vec::new();
    for (position, vote) in own {
        while let Some(earlier) = before.next_if(|(other, _)| *other < position) {
            all.push(earlier);
        }
        let same = before.next_if(|(other, _)| *other == position);
        all.push((position, same.map_or(vote, |(_, other)| vote.max(other))));
    }
    all.extend(before);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::tests::{cache, config, load, queries, request, run, tokens};

    /// What `count` queries from the `first` on choose of the last layer in host memory.
    fn chosen(store: &mut PageStore, first: usize, count: usize) -> Vec<Vec<u32>> {
        let q = queries(store, first + count).narrow(0, first, count).unwrap();
        let (layer, rows) = (store.shape.num_layers - 1, store.order.len());
        store.select(&q, request(layer, rows, store.config.tokens, count)).unwrap().heads
    }

    #[test]
    fn what_a_message_asked_for_stays_asked_for_until_the_next_one() {
        let decoder = load("llama3");
        let config = PageConfig { tokens: 128, ..config() };
        let mut cache = cache(&decoder, 64, Some(config.clone()));
        run(&decoder, &mut cache, &tokens(1500), &[100]);
        let store = cache.pages_mut().unwrap();
        let alone = chosen(store, 40, 1);
        store.begin_message();
        let message = [chosen(store, 0, 12), chosen(store, 12, 3)];
        store.end_message();
        let beside = chosen(store, 40, 1);
        for (head, (alone, beside)) in alone.iter().zip(&beside).enumerate() {
            assert_eq!(beside.len(), 128);
            let is_new = |token: &&u32| alone.binary_search(token).is_err();
            let new: Vec<&u32> = beside.iter().filter(is_new).collect();
            let was_asked = |token: &u32| message.iter().any(|own| own[head].contains(token));
            assert!(!new.is_empty() && new.iter().all(|token| was_asked(token)), "head {head}");
        }
        // Nothing stands while another message is read, nor once it is over.
        store.begin_message();
        let again = [chosen(store, 0, 12), chosen(store, 12, 3)];
        assert_eq!(again, message);
        store.begin_turn();
        assert_eq!(chosen(store, 40, 1), alone);
        store.config.keep_votes = false;
        store.begin_message();
        chosen(store, 0, 12);
        store.end_message();
        assert_eq!(chosen(store, 40, 1), alone);
    }

    #[test]
    fn each_query_of_a_message_votes_as_far_as_a_card_takes_them() {
        let decoder = load("llama3");
        let mut cache = cache(&decoder, 64, Some(config()));
        let store = cache.pages_mut().unwrap();
        let heads = store.shape.num_kv_heads;
        assert_eq!(store.pooled(64, 3 * heads), 8);
        store.begin_message();
        assert_eq!([3, 8, 16].map(|group| store.pooled(64, group * heads)), [1, 1, 2]);
        for (count, group) in [(64usize, 24), (64, 48), (51, 20), (64, 71), (64, 600)] {
            let rows = count.div_ceil(store.pooled(count, group * heads)) * group;
            assert!(rows <= MAX_ROWS.max(group), "{group} heads a group: {rows} rows");
        }
        store.end_message();
        assert_eq!(store.pooled(64, 3 * heads), 8);
    }
}
