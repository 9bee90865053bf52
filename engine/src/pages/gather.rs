//! From a choice of tokens to pages that attention reads: copied, rotated to their positions, laid side by side.
//! Knows which tokens were chosen, not why.

use super::copied::{Key, Memory, numbers};
use super::device::choice::Request;
use super::recalled::{Recalled, RecalledRuns, Recovered};
use super::selection::{OVER_FETCH, RowReader, Selection};
use super::store::{Held, MadeUnder, PageStore};
use super::{PagePrecision, PageRule, Prefill};
use crate::error::Result;
use candle_core::{Tensor, WithDType};
use half::{bf16, f16};
use mka_kernels::recall::{ChoiceRun, MAX_RUNS};
use mka_kernels::{PAGE_TOKENS, rows};
use rayon::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Decoded tokens that a choice serves on a card, and by rules that are compared with: of a token choosing takes 2 to 13 % there.
const SHORT_REUSE: usize = 4;
/// The same on the processor, where a choice of all layers takes as long as two decoded tokens behind 8,192 stored ones, at
/// the least.
const LONG_REUSE: usize = 16;
/// Stored tokens for each that a choice serves there, about: a choice of twice as many takes up to twice as long.
const STORED_TOKENS_A_STEP: usize = 2048;

/// What queries recall for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecallScope {
    /// Pages before this one can be recalled: those that the first query's window does not hold.
    pub(crate) before_page: u64,
    /// Positions are compact: counted over what is attended, not over the stream.
    pub(crate) compact: bool,
    /// The layer attends to near tokens alone, by training: it recalls whole pages in stream order, or nothing.
    pub(crate) sliding: bool,
    /// The queries are of a pass of several, a prompt's, though a run of them may be of one; else of a decoded token.
    pub(crate) is_prompt: bool,
}

/// What runs of queries recall together.
pub(crate) enum Together {
    /// Runs must be asked one by one.
    Apart,
    Nothing,
    Recalled(RecalledRuns),
}

/// What a run of queries recalls from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    Nothing,
    All,
    Chosen,
}

impl PageStore {
    /// Runs that recall side by side; one where the device has no pages, or another system's rule looks at something else
    /// than keys. How many of them vote at once is the device's matter.
    pub(crate) fn runs_at_once(&self) -> usize {
        let votes = matches!(self.config.rule, PageRule::Mka | PageRule::TokenSelect);
        if self.mirror.is_some() && votes { MAX_RUNS } else { 1 }
    }

    /// [`PageStore::recall`] for neighbouring runs of queries at once, where the device has the pages: each run's number
    /// of queries and scope, in the order of `q` (t, h, d).
    pub(crate) fn recall_runs(
        &mut self,
        layer: usize,
        q: &Tensor,
        runs: &[(usize, RecallScope)],
    ) -> Result<Together> {
        let budget = self.recalled_tokens();
        let of = |(_, scope): &(usize, RecallScope)| {
            (self.recalls_from(layer, *scope), self.rows_before(*scope))
        };
        let recalled: Vec<(Extent, usize)> = runs.iter().map(of).collect();
        let (Some((from, _)), Some((_, scope))) = (recalled.first().copied(), runs.first()) else {
            return Ok(Together::Nothing);
        };
        // Runs that choose among all landmarks, and those that skip that step, are not mixed.
        let is_flat = |rows: usize| rows * PAGE_TOKENS <= OVER_FETCH * budget;
        let rows = recalled.iter().map(|(_, rows)| *rows).max().unwrap_or(0);
        let alike = |(own, own_rows): &(Extent, usize)| {
            *own == from && (from != Extent::Chosen || is_flat(*own_rows) == is_flat(rows))
        };
        if !recalled.iter().all(alike) {
            return Ok(Together::Apart);
        }
        if from == Extent::Nothing {
            return Ok(Together::Nothing);
        }
        self.held[layer] = Held::default();
        let request = Request { layer, rows, budget, all: from == Extent::All, scope: *scope };
        let pairs = runs.iter().zip(&recalled);
        let runs: Vec<ChoiceRun> = pairs
            .map(|((queries, _), (_, pages))| ChoiceRun { queries: *queries, pages: *pages })
            .collect();
        let recalled = self.recall_runs_on_device(q, request, &runs)?;
        Ok(recalled.map_or(Together::Apart, Together::Recalled))
    }

    /// Pages of the index that `scope` can recall.
    fn rows_before(&self, scope: RecallScope) -> usize {
        self.order.partition_point(|page| *page < scope.before_page)
    }

    fn recalls_from(&self, layer: usize, scope: RecallScope) -> Extent {
        let rows = self.rows_before(scope);
        if !self.active || rows == 0 || self.config.rule == PageRule::Streaming {
            return Extent::Nothing;
        }
        let budget = self.recalled_tokens();
        let dense = self.config.prefill == Prefill::Dense && scope.is_prompt && !scope.compact;
        let all = rows * PAGE_TOKENS <= budget || dense;
        match all {
            _ if scope.sliding && (scope.compact || !all) => Extent::Nothing,
            true => Extent::All,
            false if layer < self.config.first_layer => Extent::Nothing,
            false => Extent::Chosen,
        }
    }

    /// What queries `q` (t, h, d), before RoPE, of `layer` recall; None for nothing.
    pub(crate) fn recall(
        &mut self,
        layer: usize,
        q: &Tensor,
        scope: RecallScope,
    ) -> Result<Option<Arc<Recalled>>> {
        let all = match self.recalls_from(layer, scope) {
            Extent::Nothing => return Ok(None),
            from => from == Extent::All,
        };
        let rows = self.rows_before(scope);
        let budget = self.recalled_tokens();
        let first_page = self.order.first().copied();
        let made_under = MadeUnder { rows, first_page, compact: scope.compact, all };
        if (all || !scope.is_prompt)
            && let Some(recalled) = self.reuse(layer, made_under)
        {
            return Ok(Some(recalled));
        }
        if !all && scope.is_prompt {
            // What a decoded token chose before these queries serves none after them.
            self.held[layer] = Held::default();
        }
        let request = Request { layer, rows, budget, all, scope };
        // The last choice has served: its memory is what the next one is copied to.
        let last = self.held[layer].recalled.take().and_then(Arc::into_inner);
        let recalled = match self.recall_on_device(q, request)? {
            Some(recalled) => recalled,
            None => match self.recall_on_host(q, request, last)? {
                Some(recalled) => recalled,
                None => return Ok(None),
            },
        };
        let recalled = Arc::new(recalled);
        if all || !scope.is_prompt {
            let begins = self.held[layer].made_under != Some(made_under);
            let left = self.queries_served(layer, rows, begins) - 1;
            let held = &mut self.held[layer];
            held.left = left;
            held.made_under = Some(made_under);
            held.recalled = Some(recalled.clone());
        }
        Ok(Some(recalled))
    }

    /// Queries that a choice of `layer` among `rows` pages serves, at least its own. Layers choose at different tokens, but for
    /// the first after a page left the window, so that few wait for all of them: that first choice serves fewer than others;
    /// where it is this function that says how many, more, since the next page ends the last one in any case.
    fn queries_served(&self, layer: usize, rows: usize, begins: bool) -> usize {
        let is_short = self.mirror.is_some() || self.config.rule != PageRule::Mka;
        let steps = match self.config.reuse_steps {
            Some(steps) => steps.max(1),
            None if is_short => SHORT_REUSE,
            None => {
                let by_length = rows * PAGE_TOKENS / STORED_TOKENS_A_STEP;
                // A power of two, so that the last of a page ends with it.
                let steps = by_length.next_power_of_two().clamp(LONG_REUSE, PAGE_TOKENS);
                return steps + if begins { layer % SHORT_REUSE } else { 0 };
            }
        };
        steps - if begins { layer % steps } else { 0 }
    }

    /// The layer's last choice, if it serves one more query.
    fn reuse(&mut self, layer: usize, made_under: MadeUnder) -> Option<Arc<Recalled>> {
        let held = &mut self.held[layer];
        if held.made_under != Some(made_under) || !made_under.all && held.left == 0 {
            return None;
        }
        held.left = held.left.saturating_sub(1);
        held.recalled.clone()
    }

    /// What queries `q` recall, chosen and copied by the processor, into the memory of `last`, which nobody else holds, where
    /// it is of the same size; None for nothing.
    pub(super) fn recall_on_host(
        &mut self,
        q: &Tensor,
        request: Request,
        last: Option<Recalled>,
    ) -> Result<Option<Recalled>> {
        let Request { layer, rows, all, scope, .. } = request;
        let selection = match all {
            true => {
                self.bring(&(0..rows).collect::<Vec<_>>());
                let bytes = self.bytes_by_row(rows);
                let there = (0..rows as u32).filter(|row| bytes[*row as usize].is_some());
                let tokens = there.flat_map(|row| row * 64..(row + 1) * 64).collect();
                Selection { heads: vec![tokens; self.shape.num_kv_heads], recovered: Some(1.0) }
            }
            false => self.select(q, request)?,
        };
        if selection.heads.first().is_none_or(Vec::is_empty) {
            return Ok(None);
        }
        let mut recalled = self.gather(layer, &selection, all, scope.compact, last)?;
        if self.config.estimate && !all {
            recalled.left = Some(left_out(&selection, rows));
        }
        Ok(Some(recalled))
    }

    /// Copies and rotates the chosen tokens.
    fn gather(
        &self,
        layer: usize,
        selection: &Selection,
        all: bool,
        compact: bool,
        last: Option<Recalled>,
    ) -> Result<Recalled> {
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        let num_tokens = selection.heads[0].len();
        let shape = (num_tokens.div_ceil(PAGE_TOKENS), g, PAGE_TOKENS, d);
        let placed = Placed { layer, selection, compact, shape };
        let short = self.config.precision == PagePrecision::Bf16 && self.device().is_cpu();
        // Half the bytes to attend to: values as they are stored, keys rounded by an eighth of what storing rounds them by.
        let of_short = |short: bool, last| -> Result<_> {
            match short {
                true => self.gathered::<f16, bf16>(&placed, RowReader::read_bf16, last),
                false => self.gathered::<f32, f32>(&placed, RowReader::read, last),
            }
        };
        let (fits, both) = of_short(short, last)?;
        let (keys, values) = if fits { both } else { of_short(false, None)?.1 };
        let starts = all.then(|| {
            let firsts = selection.heads[0].iter().step_by(PAGE_TOKENS);
            firsts.map(|token| self.order[*token as usize / 64] * PAGE_TOKENS as u64).collect()
        });
        Ok(Recalled {
            keys,
            values,
            tokens: num_tokens,
            starts,
            recovered: selection.recovered.map_or(Recovered::Unknown, Recovered::Share),
            left: None,
        })
    }

    /// The chosen keys, rotated, and what `read` makes of their values; whether every key is within its type.
    fn gathered<K: Key + WithDType, V: Memory + WithDType + Send>(
        &self,
        placed: &Placed<'_>,
        read: impl Fn(&RowReader, &[u8], usize, &mut [V]) + Sync,
        last: Option<Recalled>,
    ) -> Result<(bool, (Tensor, Tensor))> {
        let Placed { layer, selection, compact, shape } = *placed;
        let (pages, g, _, d) = shape;
        let count = pages * g * PAGE_TOKENS * d;
        let (last_keys, last_values) = last.map(|last| (last.keys, last.values)).unzip();
        let (mut keys, mut values): (Vec<K>, Vec<V>) =
            (numbers(count, last_keys), numbers(count, last_values));
        let num_tokens = selection.heads[0].len();
        let sinks = self.shape.sink_pages * PAGE_TOKENS as u64;
        let there = self.bytes_by_row(self.order.len());
        let fits = AtomicBool::new(true);
        keys.par_chunks_mut(PAGE_TOKENS * d)
            .zip(values.par_chunks_mut(PAGE_TOKENS * d))
            .enumerate()
            .for_each(|(at, (keys, values))| {
                let (first, head) = (at / g * PAGE_TOKENS, at % g);
                let [key_reader, value_reader] = [0, 1].map(|kind| self.reader(layer, kind, head));
                let chosen = &selection.heads[head][first..num_tokens.min(first + PAGE_TOKENS)];
                // Each token lies elsewhere in memory.
                for token in chosen {
                    let (row, offset) =
                        (*token as usize / PAGE_TOKENS, *token as usize % PAGE_TOKENS);
                    for reader in [&key_reader, &value_reader] {
                        let bytes = reader.bytes(there[row].unwrap_or_default(), offset, 1);
                        rows::prefetch(bytes.unwrap_or_default());
                    }
                }
                let mut rotated = vec![0f32; d];
                let rows = keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d));
                for (i, (token, (key, value))) in chosen.iter().zip(rows).enumerate() {
                    let (row, offset) =
                        (*token as usize / PAGE_TOKENS, *token as usize % PAGE_TOKENS);
                    let bytes = there[row].unwrap_or_default();
                    key_reader.read(bytes, offset, &mut rotated);
                    read(&value_reader, bytes, offset, value);
                    let position = match compact {
                        true => sinks + (first + i) as u64,
                        false => self.order[row] * PAGE_TOKENS as u64 + offset as u64,
                    };
                    if let Some((cos, sin)) = self.angles_at(layer, position) {
                        rows::rotate_row(&mut rotated, cos, sin);
                    }
                    if !K::write(&rotated, key) {
                        fits.store(false, Ordering::Relaxed);
                    }
                }
            });
        let keys = Tensor::from_vec(keys, shape, self.device())?;
        let values = Tensor::from_vec(values, shape, self.device())?;
        Ok((fits.into_inner(), (keys, values)))
    }
}

/// Chosen tokens of a layer, whether their positions are compact, and what they fill: (pages, num_kv_heads, PAGE_TOKENS,
/// head_dim).
struct Placed<'a> {
    layer: usize,
    selection: &'a Selection,
    compact: bool,
    shape: (usize, usize, usize, usize),
}

/// For each head, how many tokens of each of the first `rows` pages were not chosen.
fn left_out(selection: &Selection, rows: usize) -> Vec<Vec<u8>> {
    let of_head = |tokens: &Vec<u32>| {
        let mut left = vec![PAGE_TOKENS as u8; rows];
        tokens.iter().for_each(|token| left[*token as usize / PAGE_TOKENS] -= 1);
        left
    };
    selection.heads.iter().map(of_head).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PageConfig;
    use crate::pages::store::PageShape;
    use candle_core::{CpuStorage, DType, Device, Storage};

    /// A store of one layer with two pages, the largest key of which is `largest`.
    fn store(precision: PagePrecision, largest: f32) -> PageStore {
        let shape = PageShape {
            num_layers: 1,
            num_kv_heads: 2,
            head_dim: 8,
            sink_pages: 1,
            window_tokens: 64,
        };
        let config = PageConfig { precision, first_layer: 0, tokens: 256, ..PageConfig::default() };
        let mut store = PageStore::new(shape, config, &Device::Cpu);
        let mut numbers: Vec<f32> =
            (0..2 * 2 * 2 * PAGE_TOKENS * 8).map(|i| (i as f32 * 0.37).sin()).collect();
        numbers[5] = largest;
        store.absorb(0..1, 0..2, &numbers);
        store
    }

    /// What the first `tokens` of each head are copied to.
    fn copied(store: &PageStore, tokens: u32, last: Option<Recalled>) -> Recalled {
        let selection = Selection { heads: vec![(0..tokens).collect(); 2], recovered: None };
        store.gather(0, &selection, false, true, last).unwrap()
    }

    fn recalled(precision: PagePrecision, largest: f32) -> Recalled {
        copied(&store(precision, largest), 128, None)
    }

    fn flat(x: &Tensor) -> Vec<f32> {
        x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    }

    fn both(recalled: &Recalled) -> [Vec<f32>; 2] {
        [&recalled.keys, &recalled.values].map(flat)
    }

    /// Where a tensor of the processor lies.
    fn place(x: &Tensor) -> *const u8 {
        let (storage, _) = x.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(numbers)) => numbers.as_ptr().cast(),
            Storage::Cpu(CpuStorage::BF16(numbers)) => numbers.as_ptr().cast(),
            Storage::Cpu(CpuStorage::F16(numbers)) => numbers.as_ptr().cast(),
            _ => panic!("{x:?}"),
        }
    }

    #[test]
    fn a_choice_is_copied_into_the_memory_of_the_last_one() {
        for precision in [PagePrecision::F32, PagePrecision::Bf16] {
            let store = store(precision, 1.0);
            let first = copied(&store, 128, None);
            let expected = both(&first);
            let places = [place(&first.keys), place(&first.values)];
            // Fewer tokens of as many pages: what lies behind them is anything.
            let fewer = copied(&store, 100, Some(first));
            assert_eq!([place(&fewer.keys), place(&fewer.values)], places);
            assert_eq!(both(&fewer)[0][..PAGE_TOKENS * 2 * 8], expected[0][..PAGE_TOKENS * 2 * 8]);
            let again = copied(&store, 128, Some(fewer));
            assert_eq!([place(&again.keys), place(&again.values)], places);
            assert_eq!(both(&again), expected);
            // Of another size, or another type, it is not that memory, or is by chance.
            let half = copied(&store, 64, Some(again));
            assert_eq!(both(&half)[0], expected[0][..PAGE_TOKENS * 2 * 8]);
            let other = match precision {
                PagePrecision::F32 => recalled(PagePrecision::Bf16, 1.0),
                _ => recalled(PagePrecision::F32, 1.0),
            };
            assert_eq!(both(&copied(&store, 128, Some(other))), expected);
        }
    }

    #[test]
    fn of_a_page_that_is_not_there_nothing_is_left_of_the_last_choice() {
        let mut store = store(PagePrecision::Bf16, 1.0);
        let last = copied(&store, 128, None);
        assert!(flat(&last.values)[..PAGE_TOKENS * 8].iter().any(|x| *x != 0.0));
        store.pages.get_mut(&0).unwrap().bytes = None;
        for numbers in both(&copied(&store, 128, Some(last))) {
            let (gone, there) = numbers.split_at(PAGE_TOKENS * 2 * 8);
            assert!(gone.iter().all(|x| *x == 0.0) && there.iter().any(|x| *x != 0.0));
        }
    }

    #[test]
    fn keys_are_short_where_they_are_stored_so_and_fit() {
        let types = |recalled: &Recalled| (recalled.keys.dtype(), recalled.values.dtype());
        let full = recalled(PagePrecision::F32, 60_000.0);
        assert_eq!(types(&full), (DType::F32, DType::F32));
        let short = recalled(PagePrecision::Bf16, 60_000.0);
        assert_eq!(types(&short), (DType::F16, DType::BF16));
        for (own, full) in [(&short.keys, &full.keys), (&short.values, &full.values)] {
            for (own, full) in flat(own).iter().zip(flat(full)) {
                assert!((own - full).abs() <= full.abs() * 0.005, "{own}, expected {full}");
            }
        }
        // Beyond what f16 holds nothing is lost.
        for largest in [70_000.0, -1e30] {
            let wide = recalled(PagePrecision::Bf16, largest);
            assert_eq!(types(&wide), (DType::F32, DType::F32));
            let keys = flat(&wide.keys);
            assert!(keys.iter().any(|key| (key / largest - 1.0).abs() < 0.005), "{largest}");
        }
    }

    #[test]
    fn a_choice_serves_as_many_tokens_as_it_costs() {
        let shape = PageShape {
            num_layers: 9,
            num_kv_heads: 1,
            head_dim: 8,
            sink_pages: 1,
            window_tokens: 64,
        };
        let store = |config| PageStore::new(shape, config, &Device::Cpu);
        let served = |store: &PageStore, rows| {
            [(0, false), (6, false), (0, true), (6, true)]
                .map(|(layer, begins)| store.queries_served(layer, rows, begins))
        };
        let mut own = store(PageConfig::default());
        assert_eq!(served(&own, 96), [16, 16, 16, 18]);
        assert_eq!(served(&own, 512), [16, 16, 16, 18]);
        assert_eq!(served(&own, 1024), [32, 32, 32, 34]);
        assert_eq!(served(&own, 2015), [64, 64, 64, 66]);
        assert_eq!(served(&own, 1 << 14), [64, 64, 64, 66]);
        own.mirror_on_device();
        assert_eq!(served(&own, 1 << 14), [4, 4, 4, 2]);
        let rival = PageConfig { rule: PageRule::Quest, ..PageConfig::default() };
        assert_eq!(served(&store(rival), 96), [4, 4, 4, 2]);
        for (steps, expected) in [
            (0, [1, 1, 1, 1]),
            (1, [1, 1, 1, 1]),
            (3, [3, 3, 3, 3]),
            (8, [8, 8, 8, 2]),
            (usize::MAX, [usize::MAX, usize::MAX, usize::MAX, usize::MAX - 6]),
        ] {
            let config = PageConfig { reuse_steps: Some(steps), ..PageConfig::default() };
            assert_eq!(served(&store(config), 96), expected, "{steps}");
        }
    }
}
