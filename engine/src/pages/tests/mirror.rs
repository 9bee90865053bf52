//! Pages on the model's device: chosen, restored and rewound as those in host memory are.

use super::*;
use crate::pages::PageUsage;

/// Logits by token, and the shares of the answer's attention.
type Answered = (Vec<Vec<f32>>, PageUsage);

/// Runs a message and an answer behind a long stream, with the pages on the model's device and without. The stream is
/// read without, so that both begin alike, and repeats nothing: of two pages with equal votes a card may choose the other.
fn with_and_without_mirror(decoder: &Decoder, config: &PageConfig, told: u32) -> [Answered; 2] {
    let stream = mixed(told + 320);
    [true, false].map(|is_mirrored| {
        let mut cache = cache(decoder, 64, Some(config.clone()));
        cache.pages_mut().unwrap().mirror = None;
        run(decoder, &mut cache, &stream[..told as usize], &[100, 37]);
        let pages = cache.pages_mut().unwrap();
        if is_mirrored {
            pages.mirror_on_device();
            assert!(pages.mirror.is_some());
        }
        pages.begin_turn();
        pages.begin_message();
        pages.pin_words(&[5, 5, 9]);
        let mut logits = run(decoder, &mut cache, &stream[told as usize..][..41], &[20, 21]);
        cache.pages_mut().unwrap().end_message();
        logits.extend(run(decoder, &mut cache, &stream[told as usize + 41..][..49], &[20, 1]));
        let usage = cache.pages().unwrap().usage().unwrap();
        // Blocks of several runs, which the mirror serves at once.
        logits.extend(run(decoder, &mut cache, &stream[told as usize + 90..], &[200, 30]));
        assert_eq!(cache.pages().unwrap().mirror.is_some(), is_mirrored);
        (logits, usage)
    })
}

fn assert_alike(
    name: &str,
    precision: PagePrecision,
    [(mirrored, shares), (plain, expected)]: [Answered; 2],
) {
    // Where pages hold bf16 the processor reads recalled keys as f16, which chooses nothing else and moves logits: ten times
    // the bound of what is f32 on both sides.
    let bound = if precision == PagePrecision::F32 { 2e-3 } else { 2e-2 };
    // Tokens whose votes are a rounding apart may change places at a threshold, and what follows with them.
    let is_off = |(x, y): &(&Vec<f32>, &Vec<f32>)| {
        difference(std::slice::from_ref(*x), std::slice::from_ref(*y)) > bound
    };
    let off = mirrored.iter().zip(&plain).filter(is_off).count();
    assert!(off * 10 <= plain.len(), "{name}: {off} of {} tokens differ", plain.len());
    assert_eq!(shares.recalled_tokens, expected.recalled_tokens, "{name}");
    assert!(expected.share.iter().all(|share| *share > 0.0), "{name}: {expected:?}");
    let pairs = shares.share.iter().zip(&expected.share);
    for (own, expected) in pairs.chain(shares.recovered.iter().zip(&expected.recovered)) {
        assert!((own - expected).abs() < 5e-3, "{name}: {own}, expected {expected}");
    }
}

/// What the choice on a device is tested with: positions exact and compact, every token recalled and some, outliers.
const MIRRORED: &[(&str, usize, PagePrecision, u32)] = &[
    ("llama3", 64, PagePrecision::F32, 170),
    ("llama3", 1 << 12, PagePrecision::F32, 700),
    ("qwen3", 128, PagePrecision::Bf16, 3000),
    ("smollm2", 64, PagePrecision::Bf16, 400),
];

/// The models of the cases in bf16 once more in f32, for its bound.
const WIDE: &[(&str, usize, PagePrecision, u32)] =
    &[("qwen3", 128, PagePrecision::F32, 3000), ("smollm2", 64, PagePrecision::F32, 400)];

#[test]
fn pages_on_the_models_device_are_chosen_as_in_host_memory() {
    for (name, tokens, precision, told) in MIRRORED.iter().chain(WIDE).copied() {
        // What the processor and a card score alike.
        let scan = LandmarkScan::Flat;
        let config =
            PageConfig { tokens, precision, scan, reuse_steps: Some(2), lexical: true, ..config() };
        assert_alike(name, precision, with_and_without_mirror(&load(name), &config, told));
    }
}

/// The rules that choose, beside the library's own.
const RIVALS: [PageRule; 3] = [PageRule::InfLlm, PageRule::Quest, PageRule::TokenSelect];

/// By blocks of two pages nothing smaller can be chosen.
fn of_rule(rule: PageRule, recalled: usize, precision: PagePrecision) -> PageConfig {
    let recalled = if rule == PageRule::InfLlm { recalled.max(2 * PAGE_TOKENS) } else { recalled };
    PageConfig { rule, tokens: recalled, precision, reuse_steps: Some(2), ..config() }
}

#[test]
fn other_systems_rules_answer_on_the_models_device_as_in_host_memory() {
    for (name, recalled, precision, told) in MIRRORED.iter().copied() {
        for rule in RIVALS {
            let config = of_rule(rule, recalled, precision);
            let alike = with_and_without_mirror(&load(name), &config, told);
            assert_alike(&format!("{name} by {rule:?}"), precision, alike);
        }
    }
}

/// Tokens of which no two pages are alike, so that no two votes are.
fn mixed(count: u32) -> Vec<u32> {
    (0..count).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) % 128).collect()
}

/// That the device and the processor choose the same tokens of the last layer for `count` queries.
fn assert_same_choice(store: &mut PageStore, rows: usize, count: usize, case: &str) {
    let q = queries(store, count);
    let (layer, budget) = (store.shape.num_layers - 1, store.config.tokens);
    let request = request(layer, rows, budget, count);
    let own = store.recall_on_device(&q, request).unwrap();
    let own = own.unwrap_or_else(|| panic!("{case}: the device chose nothing"));
    let expected = store.recall_on_host(&q, request, None).unwrap().unwrap();
    assert_eq!(own.tokens, expected.tokens, "{case}");
    for (own, expected) in [(own.keys, expected.keys), (own.values, expected.values)] {
        let flat = |x: Tensor| {
            let x = x.to_dtype(candle_core::DType::F32).unwrap();
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert!(difference(&[flat(own)], &[flat(expected)]) < 1e-5, "{case}");
    }
}

#[test]
fn other_systems_rules_choose_the_same_tokens_on_the_models_device() {
    let decoder = load("llama3");
    for rule in RIVALS {
        let mut cache = cache(&decoder, 64, Some(of_rule(rule, 256, PagePrecision::F32)));
        cache.pages_mut().unwrap().mirror_on_device();
        run(&decoder, &mut cache, &mixed(1500), &[100]);
        let checkpoint = cache.checkpoint();
        let stored = cache.pages().unwrap().order.len();
        // Fewer pages than are stored, as a prompt's earlier runs see them, and one page more or less than whole blocks.
        for (rows, count) in [(stored, 1), (stored - 1, 1), (9, 20), (stored - 4, 64)] {
            let case = format!("{rule:?}, {rows} pages, {count} queries");
            assert_same_choice(cache.pages_mut().unwrap(), rows, count, &case);
        }
        // What the tables had of pages that are taken back is not what comes in their place.
        let other: Vec<u32> = mixed(900).iter().map(|token| (token + 40) % 128).collect();
        run(&decoder, &mut cache, &mixed(600), &[100]);
        assert_same_choice(cache.pages_mut().unwrap(), stored + 5, 3, "before the rewind");
        assert!(cache.rewind(&checkpoint), "{rule:?}");
        run(&decoder, &mut cache, &other, &[90]);
        let rows = cache.pages().unwrap().order.len();
        assert_same_choice(cache.pages_mut().unwrap(), rows, 3, &format!("{rule:?} rewound"));
    }
}

#[test]
fn what_a_message_asked_for_stands_on_the_models_device_as_in_host_memory() {
    let decoder = load("llama3");
    // What the processor and a card score alike.
    let config = PageConfig { tokens: 128, scan: LandmarkScan::Flat, lexical: true, ..config() };
    let page = cache(&decoder, 64, Some(config.clone())).pages().unwrap().page_bytes() as u64;
    // Room for some twenty pages, so that the oldest go.
    let config = PageConfig { bytes: 26 * page, ..config };
    let mut cache = cache(&decoder, 64, Some(config));
    cache.pages_mut().unwrap().mirror_on_device();
    run(&decoder, &mut cache, &mixed(2300), &[100]);
    let store = cache.pages_mut().unwrap();
    let (rows, first) = (store.order.len(), store.order[0]);
    assert!(first > 1 && rows > 8, "{rows} pages from {first}");
    let layer = store.shape.num_layers - 1;
    store.begin_message();
    store.pin_words(&[5, 5, 9]);
    // A run that sees less, then two more.
    for (rows, count) in [(rows - 1, 12), (rows, 3), (rows, 20)] {
        assert_same_choice(store, rows, count, &format!("{count} queries of a message"));
    }
    store.end_message();
    let counted_from = first - store.mirror.as_ref().unwrap().gone(layer);
    assert!(store.message.standing_on_device(layer, counted_from, false).is_some());
    let standing = store.standing(layer, rows, false);
    assert_eq!(standing.iter().filter(|head| !head.is_empty()).count(), 2);
    assert_same_choice(store, rows, 1, "its answer");
    // Pages leave the window and the oldest go, while votes stand for the rest.
    run(&decoder, &mut cache, &mixed(200), &[1]);
    let store = cache.pages_mut().unwrap();
    assert!(store.order[0] > first + 1);
    let rows = store.order.len();
    assert!(store.message.standing_on_device(layer, counted_from, false).is_some());
    let message = store.message.clone();
    store.begin_turn();
    assert_same_choice(store, rows, 1, "nothing stands, once pages went");
    store.message = message;
    assert_same_choice(store, rows, 1, "its answer, once pages went");
}

#[test]
fn pins_reach_pages_that_are_stored_later_on_the_models_device_too() {
    let decoder = load("llama3");
    // What the processor and a card score alike.
    let config = PageConfig { tokens: 128, scan: LandmarkScan::Flat, ..config() };
    let mut cache = cache(&decoder, 64, Some(config));
    cache.pages_mut().unwrap().mirror_on_device();
    run(&decoder, &mut cache, &mixed(1500), &[100]);
    let store = cache.pages_mut().unwrap();
    let rows = store.order.len();
    let next = store.order[rows - 1] + 1;
    let mark = next * mka_kernels::recall::MARKS as u64;
    store.message.pins = vec![mark - 1, mark, mark + 3];
    assert_same_choice(store, rows, 1, "before its page is stored");
    run(&decoder, &mut cache, &mixed(130), &[65]);
    let store = cache.pages_mut().unwrap();
    assert!(store.order.contains(&next));
    assert_same_choice(store, store.order.len(), 1, "once its page is stored");
}

/// More rows of queries for a key/value head than a card takes.
fn too_many_rows(store: &PageStore) -> Tensor {
    let (heads, d) = (600 * store.shape.num_kv_heads, store.shape.head_dim);
    let numbers: Vec<f32> = (0..heads * d).map(|i| (i as f32 * 0.7).sin()).collect();
    Tensor::from_vec(numbers, (1, heads, d), &Device::Cpu).unwrap()
}

/// Takes in a page behind one that is missing.
fn take_in_behind_a_gap(store: &mut PageStore) {
    let PageShape { num_layers, num_kv_heads, head_dim, .. } = store.shape;
    let page = store.order.last().unwrap() + 2;
    let count = num_layers * 2 * num_kv_heads * PAGE_TOKENS * head_dim;
    let numbers: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin()).collect();
    store.absorb(0..num_layers, page..page + 1, &numbers);
}

/// How a mirror goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Going {
    Never,
    Refused,
    WithoutRoom,
    Missing,
    Left,
}

#[test]
fn what_a_message_asked_for_is_asked_for_in_host_memory_once_the_mirror_is_gone() {
    let decoder = load("llama3");
    // What the processor and a card score alike.
    let config = PageConfig { tokens: 128, scan: LandmarkScan::Flat, ..config() };
    let chosen = |going: Going| {
        let mut cache = cache(&decoder, 64, Some(config.clone()));
        run(&decoder, &mut cache, &mixed(1500), &[100]);
        let store = cache.pages_mut().unwrap();
        if going != Going::Never {
            store.mirror_on_device();
        }
        let (layer, rows) = (store.shape.num_layers - 1, store.order.len());
        let scope = |is_prompt| RecallScope { is_prompt, ..request(layer, rows, 0, 1).scope };
        let last = queries(store, 41).narrow(0, 40, 1).unwrap();
        let tokens = |store: &mut PageStore| {
            store.select(&last, request(layer, rows, store.config.tokens, 1)).unwrap().heads
        };
        let alone = tokens(store);
        store.begin_message();
        let message = queries(store, 12);
        store.recall(layer, &message, scope(true)).unwrap().expect("a choice");
        store.end_message();
        assert_eq!(store.mirror.is_some(), going != Going::Never);
        match going {
            Going::Never => {}
            Going::Refused => {
                let many = too_many_rows(store);
                store.recall(layer, &many, scope(false)).unwrap().expect("a choice");
            }
            Going::WithoutRoom => {
                let mirror = store.mirror.take().unwrap();
                store.keep_mirror(mirror, Ok(false));
            }
            Going::Missing => take_in_behind_a_gap(store),
            Going::Left => assert!(store.leave()),
        }
        assert!(store.mirror.is_none());
        let beside = tokens(store);
        assert_ne!(beside, alone, "{going:?}");
        beside
    };
    let expected = chosen(Going::Never);
    for going in [Going::Refused, Going::WithoutRoom, Going::Missing, Going::Left] {
        assert_eq!(chosen(going), expected, "{going:?}");
    }
}

#[test]
fn what_the_device_refuses_is_chosen_by_the_processor_and_the_mirror_goes() {
    let decoder = load("llama3");
    let config = PageConfig { tokens: 128, scan: LandmarkScan::Flat, ..config() };
    let mut cache = cache(&decoder, 64, Some(config));
    cache.pages_mut().unwrap().mirror_on_device();
    run(&decoder, &mut cache, &mixed(1500), &[100]);
    let store = cache.pages_mut().unwrap();
    assert!(store.mirror.is_some());
    store.forget_choices();
    let q = too_many_rows(store);
    let (layer, rows) = (store.shape.num_layers - 1, store.order.len());
    let request = request(layer, rows, store.recalled_tokens(), 1);
    let expected = store.recall_on_host(&q, request, None).unwrap().unwrap();
    let own = store.recall(layer, &q, request.scope).unwrap().expect("a choice");
    assert!(store.mirror.is_none());
    assert_eq!(own.tokens, expected.tokens);
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(flat(&own.keys) == flat(&expected.keys), "keys");
    assert!(flat(&own.values) == flat(&expected.values), "values");
}

#[test]
fn tables_of_a_stream_that_lets_pages_go_stay_as_small_as_it() {
    let decoder = load("llama3");
    for rule in [PageRule::InfLlm, PageRule::Quest] {
        let config = of_rule(rule, 128, PagePrecision::F32);
        let page = cache(&decoder, 64, Some(config.clone())).pages().unwrap().page_bytes() as u64;
        // Room for some twenty pages, so that the oldest go.
        let config = PageConfig { bytes: 26 * page, ..config };
        let mut cache = cache(&decoder, 64, Some(config));
        cache.pages_mut().unwrap().mirror_on_device();
        run(&decoder, &mut cache, &mixed(9000), &[100]);
        let store = cache.pages_mut().unwrap();
        assert!(store.order[0] > 90 && store.order.len() < 30, "{rule:?}: {:?}", store.order);
        assert_same_choice(store, store.order.len(), 5, &format!("{rule:?}"));
        // Some twenty pages of four rows each in Quest, half as many blocks in InfLLM: a power of two at or above.
        let capacity = store.mirror.as_ref().unwrap().table_capacity();
        assert!((1..=256).contains(&capacity), "{rule:?}: {capacity}");
    }
}

#[test]
fn fewer_tokens_than_a_block_recall_no_block() {
    let decoder = load("llama3");
    let config = PageConfig { tokens: 64, ..of_rule(PageRule::InfLlm, 64, PagePrecision::F32) };
    let mut cache = cache(&decoder, 64, Some(config));
    cache.pages_mut().unwrap().mirror_on_device();
    let logits = run(&decoder, &mut cache, &tokens(500), &[64, 1]);
    assert!(logits.iter().flatten().all(|x| x.is_finite()));
}

#[test]
fn runs_of_a_prompt_recall_together_what_each_recalls_alone() {
    // Some tokens of more pages than landmarks choose among, of fewer, and every token.
    for (tokens_recalled, told, prefill) in [
        (64, 3000, Prefill::Selected),
        (128, 700, Prefill::Selected),
        (64, 700, Prefill::Dense),
        (1 << 12, 700, Prefill::Selected),
    ] {
        let decoder = load("llama3");
        let config = PageConfig { tokens: tokens_recalled, prefill, ..config() };
        let mut cache = cache(&decoder, 64, Some(config));
        cache.pages_mut().unwrap().mirror_on_device();
        run(&decoder, &mut cache, &tokens(told), &[100]);
        let next = cache.position() / PAGE_TOKENS as u64;
        let pages = cache.pages_mut().unwrap();
        let shape = pages.shape;
        let (layer, heads) = (shape.num_layers - 1, 2 * shape.num_kv_heads);
        // The stream of 3,000 tokens is longer than the model was trained for.
        let compact = told > 1024;
        let scope =
            |before_page| RecallScope { before_page, compact, sliding: false, is_prompt: true };
        let runs = [(30, scope(next - 5)), (64, scope(next - 4)), (17, scope(next - 2))];
        let count: usize = runs.iter().map(|(count, _)| count).sum();
        let q =
            Tensor::arange(0f32, (count * heads * shape.head_dim) as f32, &Device::Cpu).unwrap();
        let q = (q * 0.7).unwrap().sin().unwrap();
        let q = q.reshape((count, heads, shape.head_dim)).unwrap();
        let Together::Recalled(together) = pages.recall_runs(layer, &q, &runs).unwrap() else {
            panic!("{tokens_recalled} of {told}: apart");
        };
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut first = 0;
        for ((run, recalled), (count, scope)) in together.runs.iter().zip(runs) {
            let q = q.narrow(0, first, count).unwrap();
            first += count;
            let alone = pages.recall(layer, &q, scope).unwrap().unwrap();
            assert_eq!((run.queries, *recalled), (count, alone.tokens));
            let own = &together.pages[run.pages.clone()];
            let starts = |pages: &[PageRef]| -> Vec<(u64, usize)> {
                pages.iter().map(|page| (page.start, page.len)).collect()
            };
            assert_eq!(starts(own), starts(&alone.page_refs()));
            for (all, alone) in [(&together.keys, &alone.keys), (&together.values, &alone.values)] {
                for (page, mine) in own.iter().zip(0..) {
                    let all = all.narrow(0, page.slot, 1).unwrap();
                    let alone = alone.narrow(0, mine, 1).unwrap();
                    assert_eq!(flat(&all), flat(&alone), "{tokens_recalled} of {told}");
                }
            }
        }
    }
}

#[test]
fn a_device_without_room_leaves_the_choice_to_the_processor() {
    let decoder = load("llama3");
    let page_bytes = cache(&decoder, 64, Some(config())).pages().unwrap().page_bytes() as u64;
    // Landmarks take a sixteenth beside keys and values of f32, so there is room for 37 pages, and none for 62.
    for (pages, told, has_mirror) in [(40, 2000, true), (40, 4000, false), (10, 200, false)] {
        let device_bytes = pages * page_bytes;
        let mut cache =
            cache(&decoder, 64, Some(PageConfig { tokens: 64, device_bytes, ..config() }));
        cache.pages_mut().unwrap().mirror_on_device();
        let logits = run(&decoder, &mut cache, &tokens(told), &[100, 1]);
        assert_eq!(cache.pages().unwrap().mirror.is_some(), has_mirror, "{told} tokens");
        assert!(logits.iter().flatten().all(|x| x.is_finite()));
    }
}

#[test]
fn a_rewound_mirror_recalls_as_if_nothing_had_followed() {
    let decoder = load("fastmka");
    let mut cache = cache(&decoder, 128, Some(PageConfig { tokens: 128, ..config() }));
    cache.pages_mut().unwrap().mirror_on_device();
    run(&decoder, &mut cache, &tokens(2900), &[64]);
    cache.pages_mut().unwrap().forget_choices();
    let checkpoint = cache.checkpoint();
    let next = tokens(130);
    let first = run(&decoder, &mut cache, &next, &[40, 1]);
    assert!(cache.rewind(&checkpoint));
    assert_eq!(run(&decoder, &mut cache, &next, &[40, 1]), first);
    assert!(cache.pages().unwrap().mirror.is_some());
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;

    #[test]
    fn pages_on_a_cuda_device_are_chosen_as_in_host_memory() {
        let device = match mka_kernels::cuda::open(0) {
            Ok(device) => device,
            Err(error) => {
                println!("recall on the device: skipped: no CUDA device: {error}");
                return;
            }
        };
        for (name, tokens, precision, told) in MIRRORED.iter().chain(WIDE).copied() {
            let scan = LandmarkScan::Flat;
            // A choice serves as many tokens by whoever makes it.
            let reuse_steps = Some(2);
            let config =
                PageConfig { tokens, precision, scan, reuse_steps, lexical: true, ..config() };
            assert_alike(
                name,
                precision,
                with_and_without_mirror(&load_on(name, &device), &config, told),
            );
        }
        for (name, tokens, precision, told) in MIRRORED.iter().copied() {
            for rule in RIVALS {
                let config = of_rule(rule, tokens, precision);
                let alike = with_and_without_mirror(&load_on(name, &device), &config, told);
                assert_alike(&format!("{name} by {rule:?}"), precision, alike);
            }
        }
    }
}

/// A session behind 3,000 tokens, committed, and the same one as it is opened again, its pages on the device.
fn opened_with_mirror(precision: PagePrecision, lost: Option<u64>) -> (Decoder, [Cache; 2], usize) {
    let decoder = load("qwen3");
    // The first layer chooses nothing: its numbers are read and are not the device's.
    let config = PageConfig { tokens: 128, precision, first_layer: 1, ..config() };
    let elsewhere = Arc::new(Elsewhere::default());
    let mut straight = cache(&decoder, 64, Some(config.clone()));
    straight.pages_mut().unwrap().mirror_on_device();
    for part in tokens(3000).chunks(500) {
        run(&decoder, &mut straight, part, &[64]);
        commit(&mut straight, &elsewhere);
    }
    let mut restored = reopened(&decoder, &straight, &config, &elsewhere);
    if let Some(page) = lost {
        elsewhere.pages.lock().unwrap().remove(&page);
    }
    let store = restored.pages_mut().unwrap();
    store.mirror_on_device();
    store.fill_mirror();
    let num_read = elsewhere.num_read.load(Ordering::Relaxed);
    (decoder, [straight, restored], num_read)
}

#[test]
fn a_restored_mirror_is_filled_from_pages_that_memory_need_not_hold() {
    for precision in [PagePrecision::F32, PagePrecision::Bf16, PagePrecision::Int8] {
        let (decoder, [mut straight, mut restored], num_read) = opened_with_mirror(precision, None);
        let store = restored.pages().unwrap();
        assert!(store.mirror.is_some());
        // More than are on their way at once on the two cores of a small machine.
        assert!(store.order.len() > 40);
        assert_eq!(num_read, store.order.len());
        assert!(store.pages.values().all(|stored| stored.bytes.is_none()), "{precision:?}");
        let asked = tokens(90);
        let went_on = run(&decoder, &mut straight, &asked, &[50, 1]);
        assert_eq!(run(&decoder, &mut restored, &asked, &[50, 1]), went_on, "{precision:?}");
        assert!(restored.pages().unwrap().mirror.is_some());
    }
}

#[test]
fn a_page_that_cannot_be_read_leaves_the_choice_to_the_processor() {
    let (decoder, [_, mut restored], _) = opened_with_mirror(PagePrecision::Bf16, Some(20));
    assert!(restored.pages().unwrap().mirror.is_none());
    assert!(!restored.pages().unwrap().pages[&20].durable);
    let logits = run(&decoder, &mut restored, &tokens(90), &[50, 1]);
    assert!(logits.iter().flatten().all(|x| x.is_finite()));
}

#[test]
fn a_session_that_is_opened_behind_a_missing_page_leaves_the_choice_to_the_processor() {
    let decoder = load("qwen3");
    let config = PageConfig { tokens: 128, ..config() };
    let elsewhere = Arc::new(Elsewhere::default());
    let mut straight = cache(&decoder, 64, Some(config.clone()));
    run(&decoder, &mut straight, &tokens(900), &[64]);
    commit(&mut straight, &elsewhere);
    for (lost, has_mirror) in [(1, true), (5, false)] {
        elsewhere.pages.lock().unwrap().remove(&lost);
        let mut restored = reopened(&decoder, &straight, &config, &elsewhere);
        let store = restored.pages_mut().unwrap();
        assert!(store.order.len() > 6 && !store.order.contains(&lost), "{:?}", store.order);
        store.mirror_on_device();
        store.fill_mirror();
        assert_eq!(store.mirror.is_some(), has_mirror, "without page {lost}");
        let logits = run(&decoder, &mut restored, &tokens(90), &[50, 1]);
        assert!(logits.iter().flatten().all(|x| x.is_finite()));
    }
}

#[test]
fn a_fork_has_the_pages_of_the_device_that_nothing_else_holds() {
    let (decoder, [_, mut restored], _) = opened_with_mirror(PagePrecision::Bf16, None);
    let pages = restored.pages_mut().unwrap();
    pages.set_source(Arc::new(Elsewhere::default()));
    assert!(pages.pages.values().all(|stored| stored.bytes.is_none()));
    let mut fork = restored.fork().unwrap();
    assert!(fork.pages().unwrap().mirror.is_some());
    let asked = tokens(90);
    let went_on = run(&decoder, &mut restored, &asked, &[50, 1]);
    assert_eq!(run(&decoder, &mut fork, &asked, &[50, 1]), went_on);
    assert!(fork.pages().unwrap().mirror.is_some());
}
