//! Paged attention against its f64 definition, over a grid of shapes and masks.

use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::{
    AttentionParams, AttentionPart, AttentionRun, AttentionState, PAGE_TOKENS, PageRef, ShareSums,
    merge_states, merge_states_backward, paged_attention, paged_attention_parts,
    paged_attention_runs, paged_attention_union, reference,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) t: usize,
    pub(crate) h: usize,
    pub(crate) g: usize,
    pub(crate) d: usize,
    /// Tokens in the stream before the queries.
    pub(crate) before: usize,
    pub(crate) window: Option<u64>,
    pub(crate) sliding: Option<u64>,
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.5f32..1.5)).collect()
}

pub(crate) struct Inputs {
    pub(crate) q: Vec<f32>,
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
    pub(crate) slots: usize,
    pub(crate) params: AttentionParams,
}

impl Inputs {
    pub(crate) fn new(case: &Case, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let total = case.before + case.t;
        let num_pages = total.div_ceil(PAGE_TOKENS);
        let slots = num_pages + 2;
        let n = slots * case.g * PAGE_TOKENS * case.d;
        let pages = (0..num_pages)
            .map(|p| PageRef {
                bias: 0.0,
                slot: slots - 1 - p,
                start: (p * PAGE_TOKENS) as u64,
                len: (total - p * PAGE_TOKENS).min(PAGE_TOKENS),
            })
            .collect::<Vec<_>>();
        Self {
            q: random(&mut rng, case.t * case.h * case.d),
            keys: random(&mut rng, n),
            values: random(&mut rng, n),
            slots,
            params: AttentionParams {
                scale: 1.0 / (case.d as f32).sqrt(),
                query_start: case.before as u64,
                pages,
                window_tokens: case.window,
                sliding_window: case.sliding,
            },
        }
    }

    /// Gives every page a bias; some are hidden by theirs.
    pub(crate) fn bias_pages(&mut self) {
        let biases = [0.4, -0.7, 0.0, f32::NEG_INFINITY, 1.5];
        for (i, page) in self.params.pages.iter_mut().enumerate() {
            page.bias = biases[i % biases.len()];
        }
    }

    fn run(&self, case: &Case, params: &AttentionParams) -> AttentionState {
        let pool = (self.slots, case.g, PAGE_TOKENS, case.d);
        let tensor = |data: &[f32]| Tensor::from_slice(data, pool, &Device::Cpu).unwrap();
        let q = Tensor::from_slice(&self.q, (case.t, case.h, case.d), &Device::Cpu).unwrap();
        paged_attention(&q, &tensor(&self.keys), &tensor(&self.values), params).unwrap()
    }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(name: &str, got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        if e.is_infinite() {
            assert_eq!(f64::from(*g), *e, "{name}[{i}]");
        } else {
            assert!((f64::from(*g) - e).abs() < 2e-5 * (1.0 + e.abs()), "{name}[{i}]: {g}, {e}");
        }
    }
}

const GRID: &[Case] = &[
    Case { t: 1, h: 1, g: 1, d: 8, before: 0, window: None, sliding: None },
    Case { t: 1, h: 9, g: 3, d: 64, before: 700, window: None, sliding: None },
    Case { t: 1, h: 8, g: 1, d: 64, before: 130, window: Some(64), sliding: None },
    Case { t: 5, h: 7, g: 1, d: 96, before: 63, window: None, sliding: None },
    Case { t: 64, h: 4, g: 4, d: 128, before: 0, window: None, sliding: None },
    Case { t: 77, h: 12, g: 3, d: 10, before: 200, window: Some(100), sliding: None },
    Case { t: 130, h: 3, g: 1, d: 64, before: 65, window: Some(128), sliding: Some(50) },
    Case { t: 2, h: 4, g: 2, d: 256, before: 1, window: None, sliding: Some(1) },
    Case { t: 40, h: 16, g: 2, d: 16, before: 1000, window: Some(256), sliding: Some(300) },
];

#[test]
fn parts_side_by_side_are_each_part_by_itself() {
    let cases: Vec<(&Case, Inputs)> =
        GRID.iter().map(|case| (case, Inputs::new(case, case.before as u64))).collect();
    let tensors: Vec<[Tensor; 3]> = cases
        .iter()
        .map(|(case, inputs)| {
            let pool = (inputs.slots, case.g, PAGE_TOKENS, case.d);
            let tensor = |data: &[f32]| Tensor::from_slice(data, pool, &Device::Cpu).unwrap();
            let q = Tensor::from_slice(&inputs.q, (case.t, case.h, case.d), &Device::Cpu).unwrap();
            [q, tensor(&inputs.keys), tensor(&inputs.values)]
        })
        .collect();
    let parts: Vec<AttentionPart<'_>> = tensors
        .iter()
        .zip(&cases)
        .map(|([q, keys, values], (_, inputs))| AttentionPart {
            q,
            keys,
            values,
            params: &inputs.params,
        })
        .collect();
    let states = paged_attention_parts(&parts).unwrap();
    assert_eq!(states.len(), GRID.len());
    for (part, state) in parts.iter().zip(&states) {
        let alone = paged_attention(part.q, part.keys, part.values, part.params).unwrap();
        assert_eq!(values(&state.out), values(&alone.out));
        assert_eq!(values(&state.lse), values(&alone.lse));
    }
    assert!(paged_attention_parts(&[]).unwrap().is_empty());
    // Parts that ask or see nothing between others, and values of bf16.
    let (own, nothing) = (parts[1], AttentionParams::default());
    let none = own.q.narrow(0, 0, 0).unwrap();
    let short = own.values.to_dtype(DType::BF16).unwrap();
    let odd = [
        AttentionPart { q: &none, ..own },
        AttentionPart { params: &nothing, ..own },
        AttentionPart { values: &short, ..own },
        own,
    ];
    let states = paged_attention_parts(&odd).unwrap();
    assert_eq!((states[0].out.dims(), states[0].lse.dims()), (&[0, 9, 64][..], &[0, 9][..]));
    assert!(values(&states[1].lse).iter().all(|lse| *lse == f32::NEG_INFINITY));
    for (part, state) in odd.iter().zip(&states) {
        let alone = paged_attention(part.q, part.keys, part.values, part.params).unwrap();
        assert_eq!(values(&state.out), values(&alone.out));
    }
    let wrong = AttentionPart { q: parts[3].q, ..parts[1] };
    let error = paged_attention_parts(&[parts[0], wrong]).unwrap_err().to_string();
    assert!(error.contains("paged_attention: "), "{error}");
}

#[test]
fn pools_of_16_bits_are_attended_to_as_the_same_numbers_of_f32() -> Result<()> {
    // Few rows, and enough for matrix products.
    for case in [GRID[1], GRID[4]] {
        let inputs = Inputs::new(&case, 11);
        let pool = (inputs.slots, case.g, PAGE_TOKENS, case.d);
        let tensor = |data: &[f32]| Tensor::from_slice(data, pool, &Device::Cpu);
        let q = Tensor::from_slice(&inputs.q, (case.t, case.h, case.d), &Device::Cpu)?;
        let (keys, of_values) = (tensor(&inputs.keys)?, tensor(&inputs.values)?);
        let full = paged_attention(&q, &keys, &of_values, &inputs.params)?;
        for (key_type, value_type) in
            [(DType::F16, DType::BF16), (DType::BF16, DType::F16), (DType::F16, DType::F32)]
        {
            let (keys, short) = (keys.to_dtype(key_type)?, of_values.to_dtype(value_type)?);
            let own = paged_attention(&q, &keys, &short, &inputs.params)?;
            let [keys, short] = [keys, short].map(|x| x.to_dtype(DType::F32));
            let expected = paged_attention(&q, &keys?, &short?, &inputs.params)?;
            assert_eq!(values(&own.out), values(&expected.out), "{case:?} {key_type:?}");
            assert_eq!(values(&own.lse), values(&expected.lse), "{case:?} {key_type:?}");
            assert_ne!(values(&own.lse), values(&full.lse), "{case:?} {key_type:?}");
        }
    }
    Ok(())
}

/// A window, sinks and recalled tokens, which lie in other pools: (q, keys, values) and what is seen of each.
pub(crate) fn three_parts(
    case: &Case,
    device: &Device,
) -> Result<Vec<([Tensor; 3], AttentionParams)>> {
    let of = |part: u64| {
        let mut inputs = Inputs::new(case, part.min(1));
        let params = &mut inputs.params;
        match part {
            0 => drop(params.pages.drain(..1)),
            1 => params.pages.truncate(1),
            _ => {}
        }
        if part > 0 {
            (params.window_tokens, params.sliding_window) = (None, None);
        }
        let pool = (inputs.slots, case.g, PAGE_TOKENS, case.d);
        let q = Inputs::new(case, part).q;
        let q = Tensor::from_slice(&q, (case.t, case.h, case.d), device)?;
        let keys = Tensor::from_slice(&inputs.keys, pool, device)?;
        Ok(([q, keys, Tensor::from_slice(&inputs.values, pool, device)?], inputs.params))
    };
    (0..3).map(of).collect()
}

pub(crate) fn as_part<'a>(
    ([q, keys, values], params): &'a ([Tensor; 3], AttentionParams),
) -> AttentionPart<'a> {
    AttentionPart { q, keys, values, params }
}

#[test]
fn a_union_is_the_merge_of_its_parts() -> Result<()> {
    let case = Case { t: 1, h: 6, g: 2, d: 32, before: 500, window: Some(128), sliding: None };
    let three = three_parts(&case, &Device::Cpu)?;
    let parts: Vec<AttentionPart<'_>> = three.iter().map(as_part).collect();
    let sums = Tensor::zeros(7, DType::F32, &Device::Cpu)?;
    let recovered = Tensor::new(&[0.5f32], &Device::Cpu)?;
    let shares = ShareSums { part: 2, sums: &sums, recovered: Some(&recovered) };
    let union = paged_attention_union(&parts, Some(&shares))?;
    let states = paged_attention_parts(&parts)?;
    let merged = merge_states(&merge_states(&states[0], &states[1])?, &states[2])?;
    assert_eq!(values(&union.state.out), values(&merged.out));
    assert_eq!(values(&union.state.lse), values(&merged.lse));
    for (own, state) in union.part_lses.iter().zip(&states) {
        assert_eq!(values(own), values(&state.lse));
    }
    let shares_of = values(&states[2].lse).into_iter().zip(values(&merged.lse));
    let expected: Vec<f32> = shares_of.map(|(own, all)| (own - all).exp()).chain([0.5]).collect();
    assert_eq!(values(&sums), expected);
    assert!(expected[..6].iter().all(|share| (0.0..1.0).contains(share)), "{expected:?}");
    // One part alone, none at all, and what does not go together.
    let alone = paged_attention_union(&parts[..1], None)?;
    assert_eq!(values(&alone.state.out), values(&states[0].out));
    let other = three_parts(&Case { t: 2, ..case }, &Device::Cpu)?;
    let short = Tensor::zeros(6, DType::F32, &Device::Cpu)?;
    let wrong: [(&[AttentionPart<'_>], Option<ShareSums<'_>>); 5] = [
        (&[], None),
        (&[parts[0], as_part(&other[1])], None),
        (&parts, Some(ShareSums { part: 3, ..shares })),
        (&parts, Some(ShareSums { sums: &short, ..shares })),
        (&[as_part(&other[0])], Some(ShareSums { part: 0, ..shares })),
    ];
    for (parts, shares) in wrong {
        let error = paged_attention_union(parts, shares.as_ref()).unwrap_err().to_string();
        assert!(error.starts_with("paged_attention_union: "), "{error}");
    }
    assert_eq!(values(&sums), expected);
    Ok(())
}

#[test]
fn paged_attention_equals_its_definition_over_the_grid() {
    for (seed, case) in GRID.iter().enumerate() {
        let inputs = Inputs::new(case, seed as u64);
        let shape = (case.t, case.h, case.g, case.d);
        let (out, lse) = reference::paged_attention(
            &inputs.q,
            &inputs.keys,
            &inputs.values,
            shape,
            &inputs.params,
        );
        let got = inputs.run(case, &inputs.params);
        assert_close(&format!("out of case {seed}"), &values(&got.out), &out);
        assert_close(&format!("lse of case {seed}"), &values(&got.lse), &lse);
    }
}

#[test]
fn a_bias_of_a_page_is_added_to_its_scores() {
    for (seed, case) in GRID.iter().enumerate() {
        let mut inputs = Inputs::new(case, seed as u64);
        inputs.bias_pages();
        let shape = (case.t, case.h, case.g, case.d);
        let Inputs { q, keys, values: v, params, .. } = &inputs;
        let (out, lse) = reference::paged_attention(q, keys, v, shape, params);
        let got = inputs.run(case, params);
        assert_close(&format!("out of case {seed}"), &values(&got.out), &out);
        assert_close(&format!("lse of case {seed}"), &values(&got.lse), &lse);
    }
}

#[test]
fn a_gap_in_the_list_of_pages_is_not_attended() {
    let case = Case { t: 3, h: 4, g: 2, d: 16, before: 500, window: None, sliding: None };
    let mut inputs = Inputs::new(&case, 5);
    inputs.params.pages.drain(1..5);
    let shape = (case.t, case.h, case.g, case.d);
    let Inputs { q, keys, values: v, params, .. } = &inputs;
    let (out, _) = reference::paged_attention(q, keys, v, shape, params);
    assert_close("out", &values(&inputs.run(&case, params).out), &out);
}

#[test]
fn gradient_of_a_merge_is_that_of_its_definition() {
    let (t, h, d) = (3, 2, 5);
    let rows = t * h;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let [a_out, b_out, dout] = [(); 3].map(|()| random(&mut rng, rows * d));
    let [mut a_lse, mut b_lse, dlse] = [(); 3].map(|()| random(&mut rng, rows));
    // One empty, the other empty, both empty.
    for (row, a_empty, b_empty) in [(0, true, false), (1, false, true), (2, true, true)] {
        a_lse[row] = if a_empty { f32::NEG_INFINITY } else { a_lse[row] };
        b_lse[row] = if b_empty { f32::NEG_INFINITY } else { b_lse[row] };
    }
    let state = |out: &[f32], lse: &[f32]| AttentionState {
        out: Tensor::from_slice(out, (t, h, d), &Device::Cpu).unwrap(),
        lse: Tensor::from_slice(lse, (t, h), &Device::Cpu).unwrap(),
    };
    let (a, b) = (state(&a_out, &a_lse), state(&b_out, &b_lse));
    let upstream = state(&dout, &dlse);
    let got = merge_states_backward(&a, &b, &upstream.out, Some(&upstream.lse)).unwrap();
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    for row in 0..rows {
        let of = |x: &[f32]| wide(&x[row * d..(row + 1) * d]);
        let (a_row, b_row, dout_row) = (of(&a_out), of(&b_out), of(&dout));
        let (la, lb) = (f64::from(a_lse[row]), f64::from(b_lse[row]));
        let outer = f64::from(dlse[row]);
        let (da, dla, db, dlb) =
            reference::merge_states_backward((&a_row, la), (&b_row, lb), &dout_row, outer);
        let part = |x: &Tensor| values(x)[row * d..(row + 1) * d].to_vec();
        assert_close("da", &part(&got.a_out), &da);
        assert_close("db", &part(&got.b_out), &db);
        assert_close("dlse a", &values(&got.a_lse)[row..=row], &[dla]);
        assert_close("dlse b", &values(&got.b_lse)[row..=row], &[dlb]);
        if la.is_finite() && lb.is_finite() {
            let loss = |la: f64, lb: f64| -> f64 {
                let (out, lse) = reference::merge_states((&a_row, la), (&b_row, lb));
                out.iter().zip(&dout_row).map(|(o, g)| o * g).sum::<f64>() + lse * outer
            };
            let step = 1e-5;
            let by_a = (loss(la + step, lb) - loss(la - step, lb)) / (2.0 * step);
            let by_b = (loss(la, lb + step) - loss(la, lb - step)) / (2.0 * step);
            assert!((by_a - dla).abs() < 1e-8 && (by_b - dlb).abs() < 1e-8, "row {row}");
        }
    }
    let without = merge_states_backward(&a, &b, &upstream.out, None).unwrap();
    assert_eq!(values(&without.a_out), values(&got.a_out));
}

#[test]
fn merging_any_split_of_the_pages_equals_the_unsplit_result() {
    for (seed, case) in GRID.iter().enumerate() {
        let inputs = Inputs::new(case, seed as u64);
        let whole = inputs.run(case, &inputs.params);
        for cut in 0..=inputs.params.pages.len() {
            let part = |pages: &[PageRef]| AttentionParams {
                pages: pages.to_vec(),
                ..inputs.params.clone()
            };
            let (left, right) = inputs.params.pages.split_at(cut);
            let merged =
                merge_states(&inputs.run(case, &part(left)), &inputs.run(case, &part(right)))
                    .unwrap();
            for (got, expected) in [(&merged.out, &whole.out), (&merged.lse, &whole.lse)] {
                let expected: Vec<f64> = values(expected).into_iter().map(f64::from).collect();
                assert_close(&format!("case {seed} cut at {cut}"), &values(got), &expected);
            }
        }
    }
}

#[test]
fn no_page_and_no_query_give_the_neutral_state() {
    let case = Case { t: 3, h: 2, g: 1, d: 8, before: 5, window: None, sliding: None };
    let inputs = Inputs::new(&case, 1);
    let nothing = AttentionParams { pages: Vec::new(), ..inputs.params.clone() };
    let state = inputs.run(&case, &nothing);
    assert!(values(&state.out).iter().all(|x| *x == 0.0));
    assert!(values(&state.lse).iter().all(|x| *x == f32::NEG_INFINITY));
    let pool =
        Tensor::zeros((1, 1, PAGE_TOKENS, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
    let q = Tensor::zeros((0, 2, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
    let empty = paged_attention(&q, &pool, &pool, &AttentionParams::default()).unwrap();
    assert_eq!(empty.out.dims(), [0, 2, 8]);
}

#[test]
fn wrong_shapes_are_errors() {
    let zeros =
        |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let params = AttentionParams {
        pages: vec![PageRef { slot: 3, start: 0, len: 1, bias: 0.0 }],
        ..AttentionParams::default()
    };
    let pool = zeros(&[2, 2, PAGE_TOKENS, 8]);
    let open = AttentionParams::default();
    for (q, keys, params) in [
        (zeros(&[1, 3, 8]), &pool, &open),
        (zeros(&[1, 4, 16]), &pool, &open),
        (zeros(&[1, 4, 8]), &pool, &params),
        (zeros(&[1, 4, 8]), &zeros(&[2, 2, 32, 8]), &open),
        (zeros(&[1, 0, 8]), &pool, &open),
        (zeros(&[1, 4, 0]), &zeros(&[2, 2, PAGE_TOKENS, 0]), &open),
    ] {
        let error = paged_attention(&q, keys, keys, params).unwrap_err().to_string();
        assert!(error.contains("expected"), "{error}");
    }
}

#[test]
fn a_query_that_is_no_number_gives_nan_and_leaves_the_others() {
    // Few rows and many, one split and several.
    for (t, before) in [(1, 0), (1, 1300), (3, 70), (40, 200)] {
        let case = Case { t, h: 4, g: 2, d: 16, before, window: None, sliding: None };
        let mut inputs = Inputs::new(&case, 5);
        let plain = inputs.run(&case, &inputs.params);
        let row = (t - 1) * case.h + 1;
        inputs.q[row * case.d] = f32::NAN;
        let state = inputs.run(&case, &inputs.params);
        let shape = (case.t, case.h, case.g, case.d);
        let (out, lse) = reference::paged_attention(
            &inputs.q,
            &inputs.keys,
            &inputs.values,
            shape,
            &inputs.params,
        );
        for (own, plain, exact, width) in
            [(&state.out, &plain.out, out, case.d), (&state.lse, &plain.lse, lse, 1)]
        {
            let pairs = values(own).into_iter().zip(values(plain));
            for (i, ((own, plain), exact)) in pairs.zip(exact).enumerate() {
                if i / width == row {
                    assert!(own.is_nan() && exact.is_nan(), "{t} behind {before}: {own}, {exact}");
                } else {
                    assert!(own == plain && !exact.is_nan(), "{t} behind {before}: {own}, {exact}");
                }
            }
        }
    }
}

/// Queries cut into runs over pages of their own: (queries, pages) of each.
pub(crate) const RUNS: &[(usize, std::ops::Range<usize>)] =
    &[(30, 0..3), (64, 3..7), (1, 0..0), (35, 2..7)];

#[test]
fn runs_attend_to_their_own_pages() {
    let case = Case { t: 130, h: 6, g: 2, d: 64, before: 400, window: None, sliding: None };
    let mut inputs = Inputs::new(&case, 9);
    inputs.bias_pages();
    let pool = (inputs.slots, case.g, PAGE_TOKENS, case.d);
    let tensor = |data: &[f32]| Tensor::from_slice(data, pool, &Device::Cpu).unwrap();
    let (keys, values) = (tensor(&inputs.keys), tensor(&inputs.values));
    let q = Tensor::from_slice(&inputs.q, (case.t, case.h, case.d), &Device::Cpu).unwrap();
    let run = |(queries, pages): &(usize, std::ops::Range<usize>)| AttentionRun {
        queries: *queries,
        pages: pages.clone(),
    };
    let runs: Vec<AttentionRun> = RUNS.iter().map(run).collect();
    let state = paged_attention_runs(&q, &keys, &values, &inputs.params, &runs).unwrap();
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (out, lse) = (flat(&state.out), flat(&state.lse));
    let mut first = 0;
    for run in &runs {
        let params = AttentionParams {
            query_start: inputs.params.query_start + first as u64,
            pages: inputs.params.pages[run.pages.clone()].to_vec(),
            ..inputs.params
        };
        let rows = first * case.h..(first + run.queries) * case.h;
        let own = &inputs.q[rows.start * case.d..rows.end * case.d];
        let shape = (run.queries, case.h, case.g, case.d);
        let (expected, expected_lse) =
            reference::paged_attention(own, &inputs.keys, &inputs.values, shape, &params);
        let near = |a: &[f32], b: &[f64]| {
            a.iter().zip(b).all(|(a, b)| f64::from(*a) == *b || (f64::from(*a) - b).abs() < 1e-5)
        };
        assert!(near(&out[rows.start * case.d..rows.end * case.d], &expected), "{run:?}");
        assert!(near(&lse[rows], &expected_lse), "{run:?}");
        first += run.queries;
    }
    // Runs of fewer queries than there are, or of pages that are not listed.
    let bad = [
        vec![AttentionRun { queries: 129, pages: 0..1 }],
        vec![AttentionRun { queries: 130, pages: 0..10 }],
    ];
    for runs in bad {
        assert!(paged_attention_runs(&q, &keys, &values, &inputs.params, &runs).is_err());
    }
    // No query in no run, and in runs of none.
    let (none, run) = (q.narrow(0, 0, 0).unwrap(), AttentionRun { queries: 0, pages: 0..2 });
    for runs in [vec![], vec![run.clone()], vec![run.clone(), run]] {
        let state = paged_attention_runs(&none, &keys, &values, &inputs.params, &runs).unwrap();
        assert_eq!((state.out.dims(), state.lse.dims()), (&[0, 6, 64][..], &[0, 6][..]));
    }
}
