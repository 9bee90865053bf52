//! Recall in training against definitions in f64, dense attention, finite differences and the engine's own sessions.

use super::*;
use crate::pages::{LandmarkScan, PageConfig, PagePrecision, PageStore};
use crate::training::operations::attend_on_tape;
use crate::training::recall::{PAGE, Recall, RecallParts};
use candle_core::{DType, Var};
use mka_kernels::tape::{self, Value};
use mka_kernels::{RotaryAngles, rotate};

/// One call: queries and keys before rotation, and what is recalled.
struct Case {
    b: usize,
    t: usize,
    h: usize,
    g: usize,
    d: usize,
    plain: [Tensor; 2],
    /// Rotated queries, rotated keys, values.
    inputs: [Tensor; 3],
    recall: Recall,
    frequencies: Vec<f64>,
}

fn case(t: usize, (window, sinks, tokens): (usize, usize, usize), chooses: bool) -> Case {
    let (b, h, g, d) = (2, 4, 2, 8);
    let values = |heads: usize, seed: usize| {
        let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed as u64 + 1);
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..b * t * heads * d).map(|_| 1.5 * next()).collect();
        Tensor::from_vec(values, (b * t, heads, d), &Device::Cpu).unwrap()
    };
    let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.3f64.powi(i as i32)).collect();
    let positions = (0..b).flat_map(|_| 0..t as u64);
    let angles = RotaryAngles::new(positions, &frequencies, 1.0);
    let window_angles = RotaryAngles::new([window as u64], &frequencies, 1.0);
    let plain = [values(h, 1), values(g, 2)];
    let by_sequence = |x: &Tensor, heads: usize| x.reshape((b, t, heads, d)).unwrap();
    let [q, k] = plain.each_ref().map(|x| rotate(x, &angles).unwrap());
    let inputs = [by_sequence(&q, h), by_sequence(&k, g), by_sequence(&values(g, 3), g)];
    let recall = Recall { window, sinks, tokens, chooses, angles, window_angles };
    Case { b, t, h, g, d, plain, inputs, recall, frequencies }
}

fn doubles(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Softmax of a row, in place.
fn normalize(row: &mut [f64]) {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

impl Case {
    fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    /// The mean queries of a group, as if they stood a window behind the keys: row by row, heads of a query beside each
    /// other.
    fn mean_queries(&self, queries: &[f64], row: usize, kv_head: usize, at: &[usize]) -> Vec<f64> {
        let (t, h, d, group) = (self.t, self.h, self.d, self.h / self.g);
        let mut all = Vec::new();
        for eight in at.chunks(8) {
            for head in kv_head * group..(kv_head + 1) * group {
                let mut mean = vec![0f64; d];
                for i in eight {
                    let query = &queries[((row * t + i) * h + head) * d..][..d];
                    mean.iter_mut().zip(query).for_each(|(m, x)| *m += x / eight.len() as f64);
                }
                for (i, frequency) in self.frequencies.iter().enumerate() {
                    let (sin, cos) = (self.recall.window as f64 * frequency).sin_cos();
                    let (low, high) = (mean[i], mean[i + d / 2]);
                    (mean[i], mean[i + d / 2]) = (low * cos - high * sin, high * cos + low * sin);
                }
                all.extend(mean);
            }
        }
        all
    }

    /// The votes for `keys` (n, d) by their definition.
    fn votes(&self, means: &[f64], keys: &[f64]) -> Vec<f64> {
        let (d, group) = (self.d, self.h / self.g);
        let mut votes = vec![0f64; keys.len() / d];
        for query in means.chunks_exact(group * d) {
            let mut sum = vec![0f64; votes.len()];
            for head in query.chunks_exact(d) {
                let dot = |key: &[f64]| key.iter().zip(head).map(|(a, b)| a * b).sum::<f64>();
                let mut row: Vec<f64> =
                    keys.chunks_exact(d).map(|key| dot(key) * f64::from(self.scale())).collect();
                normalize(&mut row);
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            votes.iter_mut().zip(sum).for_each(|(vote, sum)| *vote = vote.max(sum));
        }
        votes
    }

    /// The tokens behind the sinks that the queries `at` choose among the first `older`, ascending.
    fn chosen(&self, row: usize, kv_head: usize, at: &[usize], older: usize) -> Vec<usize> {
        let (t, g, d, Recall { sinks, tokens, .. }) = (self.t, self.g, self.d, &self.recall);
        let [queries, keys] = self.plain.each_ref().map(doubles);
        let means = self.mean_queries(&queries, row, kv_head, at);
        let key = |i: usize| keys[((row * t + sinks + i) * g + kv_head) * d..][..d].to_vec();
        let mut candidates: Vec<usize> = (0..older).collect();
        if older > 4 * tokens {
            let mean = |mark: usize| -> Vec<f64> {
                let keys: Vec<Vec<f64>> = (mark * 8..(mark + 1) * 8).map(key).collect();
                (0..d).map(|x| keys.iter().map(|key| key[x]).sum::<f64>() / 8.0).collect()
            };
            let landmarks: Vec<f64> = (0..older / 8).flat_map(mean).collect();
            let marks = best(&self.votes(&means, &landmarks), tokens / 2);
            candidates = marks.iter().flat_map(|mark| mark * 8..(mark + 1) * 8).collect();
        }
        let keys: Vec<f64> = candidates.iter().flat_map(|i| key(*i)).collect();
        best(&self.votes(&means, &keys), *tokens).into_iter().map(|i| candidates[i]).collect()
    }

    /// What was chosen: by page of queries from the first that chooses, sequence and head.
    fn reported(&self, parts: &RecallParts) -> Vec<Vec<Vec<Vec<u32>>>> {
        let mut pages = Vec::new();
        for (run, chosen) in &parts.runs {
            let chosen = chosen.as_ref().unwrap();
            for page in 0..run.pages {
                let page = chosen.narrow(1, page, 1).unwrap().squeeze(1).unwrap();
                pages.push(page.to_vec3::<u32>().unwrap());
            }
        }
        pages
    }

    /// Whether query i of a sequence and head sees key j, where pages of queries chose `reported`.
    fn sees(
        &self,
        reported: &[Vec<Vec<Vec<u32>>>],
        row: usize,
        kv_head: usize,
        i: usize,
        j: usize,
    ) -> bool {
        let Recall { window, sinks, tokens, .. } = self.recall;
        if j > i {
            return false;
        }
        // The page where the query's window begins, counted from behind the sinks.
        let page = (i + 1).saturating_sub(window + sinks) / PAGE;
        if j < sinks || j >= sinks + PAGE * page {
            return true;
        }
        if PAGE * page <= tokens {
            return true;
        }
        let first = tokens / PAGE + 1;
        let chosen = reported.get(page - first).map(|page| &page[row][kv_head]);
        chosen.is_some_and(|chosen| chosen.contains(&((j - sinks) as u32)))
    }

    /// (out, dq, dk, dv) by definition, in f64.
    fn attended(&self, reported: &[Vec<Vec<Vec<u32>>>], dout: &Tensor) -> [Vec<f64>; 4] {
        let (t, h, g, d) = (self.t, self.h, self.g, self.d);
        let scale = f64::from(self.scale());
        let [q, k, v] = self.inputs.each_ref().map(doubles);
        let dout = doubles(dout);
        let [mut out, mut dq] = [vec![0f64; q.len()], vec![0f64; q.len()]];
        let [mut dk, mut dv] = [vec![0f64; k.len()], vec![0f64; k.len()]];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for at in 0..self.b * t * h {
            let (row, i, head) = (at / (t * h), at / h % t, at % h);
            let kv_head = head / (h / g);
            let seen: Vec<usize> =
                (0..t).filter(|j| self.sees(reported, row, kv_head, i, *j)).collect();
            let key = |j: usize| ((row * t + j) * g + kv_head) * d;
            let query = &q[at * d..][..d];
            let mut weights: Vec<f64> =
                seen.iter().map(|j| dot(query, &k[key(*j)..][..d]) * scale).collect();
            normalize(&mut weights);
            let dout = &dout[at * d..][..d];
            for (j, weight) in seen.iter().zip(&weights) {
                (0..d).for_each(|x| out[at * d + x] += weight * v[key(*j) + x]);
            }
            let delta = dot(&out[at * d..][..d], dout);
            for (j, weight) in seen.iter().zip(&weights) {
                let place = key(*j);
                let dscore = weight * (dot(dout, &v[place..][..d]) - delta) * scale;
                for x in 0..d {
                    dq[at * d + x] += dscore * k[place + x];
                    dk[place + x] += dscore * q[at * d + x];
                    dv[place + x] += weight * dout[x];
                }
            }
        }
        [out, dq, dk, dv]
    }

    fn dout(&self) -> Tensor {
        let size = self.b * self.t * self.h * self.d;
        let values: Vec<f32> = (0..size).map(|i| ((i * 29 + 7) as f32 * 0.43).cos()).collect();
        Tensor::from_vec(values, (self.b, self.t, self.h, self.d), &Device::Cpu).unwrap()
    }

    /// (out, dq, dk, dv) of candle's graph.
    fn in_graph(&self, reach: &Reach) -> [Tensor; 4] {
        let [q, k, v] = self.inputs.each_ref().map(|x| Var::from_tensor(x).unwrap());
        let out = attend(&q, &k, &v, reach).unwrap();
        let store = (&out * self.dout()).unwrap().backward().unwrap();
        let [dq, dk, dv] = [q, k, v].map(|x| store.get(x.as_tensor()).unwrap().clone());
        [out.detach(), dq, dk, dv]
    }
}

/// The places of the `k` largest, ascending; the votes leave no doubt which those are.
fn best(votes: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..votes.len()).collect();
    order.sort_by(|a, b| votes[*b].total_cmp(&votes[*a]));
    if k < order.len() {
        let (last, next) = (votes[order[k - 1]], votes[order[k]]);
        assert!(last - next > 2e-5 * last, "no two votes may be as near as {last} and {next}");
    }
    order.truncate(k);
    order.sort_unstable();
    order
}

#[test]
fn pages_of_queries_choose_the_tokens_of_most_votes() {
    // 64 of up to 384 tokens: all compared at first, by landmarks from 256 on; whole pages and a rest.
    let case = case(531, (20, 5, 64), true);
    let [q, k, _] = &case.inputs;
    let parts = RecallParts::new(q, k, &case.recall, case.scale()).unwrap();
    let reported = case.reported(&parts);
    let first = case.recall.first_choosing();
    assert_eq!((first, reported.len()), (20 + 5 - 1 + 128, 6));
    for (page, found) in reported.iter().enumerate() {
        let start = first + PAGE * page;
        let queries: Vec<usize> = (start..case.t.min(start + PAGE)).collect();
        for (row, kv_head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let expected = case.chosen(row, kv_head, &queries, 128 + PAGE * page);
            let found: Vec<usize> = found[row][kv_head].iter().map(|i| *i as usize).collect();
            assert_eq!(found, expected, "page {page}, sequence {row}, head {kv_head}");
        }
    }
}

/// The largest difference over the largest value.
fn off(found: &Tensor, exact: &[f64]) -> f64 {
    let largest = exact.iter().map(|x| x.abs()).fold(0.0, f64::max);
    let found = doubles(found);
    assert_eq!(found.len(), exact.len());
    found.iter().zip(exact).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max) / largest
}

#[test]
fn attention_with_recall_and_its_gradients_are_one_softmax_over_what_is_seen() {
    let mut worst = 0f64;
    for (t, sizes, chooses) in [
        (531, (20, 5, 64), true),
        (300, (33, 0, 64), true),
        (217, (1, 1, 64), true),
        (281, (24, 24, 64), false),
    ] {
        let case = case(t, sizes, chooses);
        let [q, k, _] = &case.inputs;
        let parts = RecallParts::new(q, k, &case.recall, case.scale()).unwrap();
        let reported = if chooses { case.reported(&parts) } else { Vec::new() };
        let exact = case.attended(&reported, &case.dout());
        let found = case.in_graph(&Reach::Recall(case.recall.clone()));
        for (name, (found, exact)) in ["out", "dq", "dk", "dv"].iter().zip(found.iter().zip(&exact))
        {
            let error = off(found, exact);
            worst = worst.max(error);
            assert!(error < 1e-5, "{t} tokens, {sizes:?}: {name} off by {error}");
        }
    }
    println!("off by at most {worst:e}");
}

#[test]
fn with_room_for_every_older_token_recall_is_dense_attention_bit_for_bit() {
    for (t, sizes) in [(300, (20, 5, 256)), (300, (20, 5, 1 << 20)), (15, (20, 5, 64))] {
        for chooses in [false, true] {
            let case = case(t, sizes, chooses);
            let recalled = case.in_graph(&Reach::Recall(case.recall.clone()));
            let dense = case.in_graph(&Reach::Causal);
            for (found, exact) in recalled.iter().zip(&dense) {
                assert!(doubles(found) == doubles(exact), "{t} tokens, {sizes:?}");
            }
        }
    }
    // A page less, and the last queries choose.
    let case = case(300, (20, 5, 192), true);
    let found = case.in_graph(&Reach::Recall(case.recall.clone()));
    assert!(off(&found[0], &doubles(&case.in_graph(&Reach::Causal)[0])) > 1e-3);
}

#[test]
fn the_tape_and_candles_graph_recall_alike() {
    let case = case(300, (20, 5, 64), true);
    let reach = Reach::Recall(case.recall.clone());
    let expected = case.in_graph(&reach);
    let leaves = case.inputs.each_ref().map(Value::leaf);
    let [q, k, v] = &leaves;
    let out = attend_on_tape(q, k, v, &reach).unwrap();
    let mut store = tape::backward(&out, &case.dout()).unwrap();
    let [dq, dk, dv] = case.inputs.each_ref().map(|x| store.remove(x).unwrap());
    for (found, expected) in [out.tensor().clone(), dq, dk, dv].iter().zip(&expected) {
        assert!(doubles(found) == doubles(expected));
    }
}

/// A pass of training sees what a session sees that recalls: the same pages, choices and positions.
#[test]
fn a_pass_recalls_what_a_session_does() {
    for name in ["llama3", "llama_yarn", "qwen3"] {
        let mut config = full(MemoryKind::None);
        (config.memory.window_tokens, config.memory.sink_tokens) = (64, 64);
        (config.memory.recall_tokens, config.memory.recall_first_layer) = (64, 1);
        let text = std::fs::read_to_string(golden(name).join("config.json")).unwrap();
        let decoder =
            || DecoderConfig { trained_tokens: 1024, ..DecoderConfig::from_json(&text).unwrap() };
        let weights = Weights::open_folder(&golden(name)).unwrap();
        let model =
            TrainModel::load(decoder(), Some(&weights), &config, &Device::Cpu, false).unwrap();
        // Up to 256 older tokens, all of which are compared: landmarks that stand for outliers are sessions' alone.
        let ids: Vec<u32> = (0..440u32).map(|i| (i * i * 31 + i * 7 + 3) % 128).collect();
        let batch = Batch { targets: ids.clone(), inputs: ids.clone(), sequences: 1 };
        let logits = |view| model.logits(&batch, view).unwrap().to_vec2::<f32>().unwrap();
        let (trained, windowed) = (logits(View::Trained), logits(View::Windowed));

        let decoder = Decoder::load(decoder(), &weights, &Device::Cpu).unwrap();
        let mut cache = Cache::new(decoder.cache_shape(64, 512), &Device::Cpu).unwrap();
        let mut pages = PageConfig::default();
        (pages.tokens, pages.first_layer, pages.lexical) = (64, 1, false);
        (pages.vote_reach, pages.compact) = (0, false);
        (pages.precision, pages.scan) = (PagePrecision::F32, LandmarkScan::Flat);
        let shape = decoder.cache_shape(64, 512).pages();
        cache.keep_pages(PageStore::new(shape, pages, &Device::Cpu));
        let mut session = Vec::new();
        let mut rest = &ids[..];
        while !rest.is_empty() {
            let config = decoder.seam_config().over(&cache);
            let count = config.block_limit(cache.position(), 512).min(rest.len());
            let (now, after) = rest.split_at(count);
            let position = cache.position();
            cache.pages_mut().unwrap().note_tokens(position, now);
            let mut seam = AttentionSeam::open(config, &mut cache, count).unwrap();
            let hidden = decoder.forward(now, &mut seam).unwrap();
            seam.finish();
            session.extend(decoder.logits(&hidden).unwrap().to_vec2::<f32>().unwrap());
            rest = after;
        }
        let difference = |a: &[Vec<f32>], b: &[Vec<f32>]| {
            let pairs = a.iter().flatten().zip(b.iter().flatten());
            pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
        };
        let error = difference(&trained, &session);
        let largest = trained.iter().flatten().map(|x| x.abs()).fold(1.0, f32::max);
        println!("{name}: off by {error} of {largest}");
        assert!(error <= 2e-5 * largest, "{name}: off by {error} of {largest}");
        assert!(difference(&trained, &windowed) > 1e-3 * largest, "{name}: as without recall");
    }
}

/// Two sequences whose one page of queries chooses 64 of 128 tokens that are of two words, 64 each: whichever word the
/// queries prefer, they choose all of it, however little a parameter moves.
fn two_words() -> Batch {
    let queries = [7, 7, 9, 7, 11, 7, 7, 13];
    let sequence = |older: &dyn Fn(usize) -> u32| -> Vec<u32> {
        let older = (0..128).map(older);
        let mut tokens: Vec<u32> = [1, 2].into_iter().chain(older).chain([5, 6, 7, 8]).collect();
        tokens.extend(queries.iter().cycle().take(64 + 1));
        tokens
    };
    let rows = [sequence(&|i| 3 + i as u32 % 2), sequence(&|i| if i < 64 { 4 } else { 3 })];
    let part =
        |first: usize| rows.iter().flat_map(|row| row[first..first + 198].to_vec()).collect();
    Batch { inputs: part(0), targets: part(1), sequences: 2 }
}

#[test]
fn gradients_of_a_model_that_recalls_equal_finite_differences() {
    for (case, kind) in
        [("plain", MemoryKind::None), ("fastmka", MemoryKind::Fastmka), ("mka", MemoryKind::Mka)]
    {
        let shape = ScratchSettings {
            hidden: 16,
            layers: 1,
            heads: 2,
            kv_heads: 2,
            intermediate: 24,
            latent: None,
        };
        let mut config = full(kind);
        config.seed = 5;
        config.memory.initial_gate = 0.6;
        config.memory.rates = vec![0.9];
        (config.memory.window_tokens, config.memory.sink_tokens) = (5, 2);
        (config.memory.recall_tokens, config.memory.recall_first_layer) = (64, 0);
        config.model.scratch = Some(shape.clone());
        let decoder = scratch_decoder(&shape, 32, 512);
        let model = TrainModel::load(decoder, None, &config, &Device::Cpu, false).unwrap();
        move_from_the_start(&model);
        let batch = two_words();
        let logits = |view| model.logits(&batch, view).unwrap();
        let recalled = norm(&(logits(View::Recalled) - logits(View::Windowed)).unwrap());
        assert!(recalled > 0.1, "{case}: recall changes little: {recalled}");
        assert_finite_differences(case, &model, &batch, 0.005);
    }
}
