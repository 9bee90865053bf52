//! Attention over pages on the device.

use super::device;
use crate::attention::{Case, Inputs, RUNS, as_part, three_parts};
use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::cuda::launches;
use mka_kernels::{
    AttentionParams, AttentionPart, AttentionRun, AttentionState, PAGE_TOKENS, ShareSums,
    merge_states, merge_states_backward, paged_attention, paged_attention_parts,
    paged_attention_runs, paged_attention_union, reference,
};

pub(super) const fn case(t: usize, heads: (usize, usize), d: usize, before: usize) -> Case {
    Case { t, h: heads.0, g: heads.1, d, before, window: None, sliding: None }
}

/// Few query rows: the pages are split. Up to 16 rows of a key/value head: 8 a tile.
const DECODE: &[Case] = &[
    case(1, (1, 1), 64, 0),
    case(1, (9, 3), 64, 700),
    case(1, (8, 1), 128, 1000),
    case(1, (4, 4), 128, 63),
    case(1, (7, 1), 96, 130),
    case(1, (8, 2), 256, 333),
    case(2, (8, 1), 128, 300),
    case(5, (3, 1), 64, 191),
    case(1, (32, 8), 128, 640),
    Case { window: Some(128), ..case(1, (4, 1), 64, 500) },
    Case { sliding: Some(50), ..case(4, (6, 2), 96, 500) },
    Case { window: Some(200), sliding: Some(170), ..case(3, (4, 1), 256, 777) },
    // Beyond the pages that travel in the launch.
    case(1, (2, 1), 64, 201 * 64 + 17),
];

/// Many query rows.
const PREFILL: &[Case] = &[
    case(17, (1, 1), 64, 0),
    case(64, (4, 4), 128, 0),
    case(77, (12, 3), 64, 200),
    case(33, (7, 1), 96, 63),
    case(40, (8, 1), 128, 129),
    case(21, (4, 1), 256, 65),
    case(130, (3, 1), 64, 1),
    Case { window: Some(100), ..case(90, (3, 1), 128, 300) },
    Case { window: Some(128), sliding: Some(50), ..case(130, (3, 1), 64, 65) },
    Case { sliding: Some(1), ..case(40, (4, 2), 256, 10) },
    Case { window: Some(64), ..case(200, (2, 2), 96, 0) },
];

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

fn rounded(x: &[f32], dtype: DType) -> Result<Vec<f32>> {
    values(&Tensor::from_slice(x, x.len(), &Device::Cpu)?.to_dtype(dtype)?)
}

/// Inputs in `dtype`, as the reference reads them (f32) and as the device does, with NaN wherever no token is.
struct OnDevice {
    host: Inputs,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
}

impl OnDevice {
    fn new(case: &Case, mut host: Inputs, dtype: DType, gpu: &Device) -> Result<Self> {
        for x in [&mut host.q, &mut host.keys, &mut host.values] {
            *x = rounded(x, dtype)?;
        }
        let mut written = vec![false; host.slots * PAGE_TOKENS];
        for page in &host.params.pages {
            written[page.slot * PAGE_TOKENS..][..page.len].fill(true);
        }
        for pool in [&mut host.keys, &mut host.values] {
            for (i, row) in pool.chunks_exact_mut(case.d).enumerate() {
                let slot = i / PAGE_TOKENS / case.g;
                if !written[slot * PAGE_TOKENS + i % PAGE_TOKENS] {
                    row.fill(f32::NAN);
                }
            }
        }
        let pool = (host.slots, case.g, PAGE_TOKENS, case.d);
        Ok(Self {
            q: Tensor::from_slice(&host.q, (case.t, case.h, case.d), gpu)?.to_dtype(dtype)?,
            keys: Tensor::from_slice(&host.keys, pool, gpu)?.to_dtype(dtype)?,
            values: Tensor::from_slice(&host.values, pool, gpu)?.to_dtype(dtype)?,
            host,
        })
    }

    fn run(&self, params: &AttentionParams) -> Result<AttentionState> {
        paged_attention(&self.q, &self.keys, &self.values, params)
    }
}

/// The op in plain f32 loops, probabilities and result rounded to `dtype`: what the kernel's error is held against.
fn plain(case: &Case, inputs: &Inputs, dtype: DType) -> Result<(Vec<f32>, Vec<f32>)> {
    let Case { t, h, g, d, .. } = *case;
    let params = &inputs.params;
    let mut out = vec![0f32; t * h * d];
    let mut lse = vec![f32::NEG_INFINITY; t * h];
    for row in 0..t * h {
        let position = params.query_start + (row / h) as u64;
        let mut first = 0;
        if let Some(window) = params.window_tokens {
            first = (position + 1).saturating_sub(window) / 64 * 64;
        }
        if let Some(window) = params.sliding_window {
            first = first.max((position + 1).saturating_sub(window));
        }
        let query = &inputs.q[row * d..(row + 1) * d];
        let (mut scores, mut at) = (Vec::new(), Vec::new());
        for page in params.pages.iter().filter(|page| page.bias > f32::NEG_INFINITY) {
            for j in 0..page.len {
                if (first..=position).contains(&(page.start + j as u64)) {
                    let key = ((page.slot * g + row % h / (h / g)) * PAGE_TOKENS + j) * d;
                    let dot: f32 =
                        query.iter().zip(&inputs.keys[key..key + d]).map(|(a, b)| a * b).sum();
                    scores.push(dot * params.scale + page.bias);
                    at.push(key);
                }
            }
        }
        if scores.is_empty() {
            continue;
        }
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|score| *score = (*score - max).exp());
        let sum: f32 = scores.iter().sum();
        lse[row] = max + sum.ln();
        let into = &mut out[row * d..(row + 1) * d];
        for (weight, key) in rounded(&scores, dtype)?.iter().zip(at) {
            let value = &inputs.values[key..key + d];
            into.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
        }
        into.iter_mut().for_each(|o| *o /= sum);
    }
    Ok((rounded(&out, dtype)?, lse))
}

/// (largest, root mean square) difference; infinities must agree.
fn error(name: &str, got: &[f32], expected: &[f64]) -> (f64, f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let (mut max, mut squares) = (0f64, 0f64);
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        if e.is_infinite() {
            assert_eq!(f64::from(*g), *e, "{name}[{i}]");
            continue;
        }
        assert!(!g.is_nan(), "{name}[{i}]: NaN, expected {e}");
        max = max.max((f64::from(*g) - e).abs());
        squares += (f64::from(*g) - e).powi(2);
    }
    (max, (squares / got.len().max(1) as f64).sqrt())
}

fn assert_as_good(name: &str, got: &[f32], plain: &[f32], expected: &[f64]) {
    assert_within(name, got, plain, expected, 0.0);
}

/// Twice the error of the plain version; `unit` more for the largest, which in it may be small by chance.
fn assert_within(name: &str, got: &[f32], plain: &[f32], expected: &[f64], unit: f64) {
    const FLOOR: f64 = 4e-6;
    let (got, plain) = (error(name, got, expected), error(name, plain, expected));
    assert!(
        got.0 <= 2.0 * plain.0 + FLOOR + unit && got.1 <= 2.0 * plain.1 + FLOOR,
        "{name}: error (max, rms) {got:?}, of the plain version {plain:?}"
    );
}

/// What rounding to `dtype` alone may cost the largest of `expected`.
fn rounding(expected: &[f64], dtype: DType) -> f64 {
    let relative = match dtype {
        DType::BF16 => 2f64.powi(-9),
        DType::F16 => 2f64.powi(-12),
        _ => 0.0,
    };
    expected.iter().fold(0.0, |max: f64, x| max.max(x.abs())) * relative
}

/// Every case in every type against f64 and the plain version, after `edit`, and twice for the same bits.
pub(super) fn check(gpu: &Device, cases: &[Case], edit: fn(&mut Inputs)) -> Result<()> {
    for (seed, case) in cases.iter().enumerate() {
        for dtype in DTYPES {
            let mut inputs = Inputs::new(case, seed as u64);
            edit(&mut inputs);
            let inputs = OnDevice::new(case, inputs, dtype, gpu)?;
            let state = inputs.run(&inputs.host.params)?;
            assert_eq!((state.out.dtype(), state.lse.dtype()), (dtype, DType::F32));
            let Inputs { q, keys, values: v, params, .. } = &inputs.host;
            let shape = (case.t, case.h, case.g, case.d);
            let (out, lse) = reference::paged_attention(q, keys, v, shape, params);
            let (plain_out, plain_lse) = plain(case, &inputs.host, dtype)?;
            let name =
                |what: &str| format!("{what} of {case:?} {dtype:?} {:?}", params.pages.first());
            let unit = rounding(&out, dtype);
            assert_within(&name("out"), &values(&state.out)?, &plain_out, &out, unit);
            assert_as_good(&name("lse"), &values(&state.lse)?, &plain_lse, &lse);
            // Twice the same bits: whichever block of a split arrives last.
            let again = inputs.run(params)?;
            assert_eq!(bits(&state)?, bits(&again)?, "{}", name("bits"));
        }
    }
    Ok(())
}

fn bits(state: &AttentionState) -> Result<Vec<u32>> {
    let (out, lse) = (values(&state.out)?, values(&state.lse)?);
    Ok(out.iter().chain(&lse).map(|x| x.to_bits()).collect())
}

#[test]
fn decode_over_pages_equals_its_definition() -> Result<()> {
    let Some(gpu) = device("decode over pages") else { return Ok(()) };
    check(&gpu, DECODE, |_| ())?;
    check(&gpu, &DECODE[1..8], Inputs::bias_pages)
}

#[test]
fn prefill_over_pages_equals_its_definition() -> Result<()> {
    let Some(gpu) = device("prefill over pages") else { return Ok(()) };
    check(&gpu, PREFILL, |_| ())?;
    check(&gpu, &PREFILL[1..6], Inputs::bias_pages)
}

#[test]
fn runs_over_pages_of_their_own_equal_those_of_the_processor() -> Result<()> {
    let Some(gpu) = device("runs over pages") else { return Ok(()) };
    let run = |(queries, pages): &(usize, std::ops::Range<usize>)| AttentionRun {
        queries: *queries,
        pages: pages.clone(),
    };
    let runs: Vec<AttentionRun> = RUNS.iter().map(run).collect();
    for base in
        [case(130, (6, 2), 64, 400), case(130, (4, 1), 128, 400), case(130, (3, 1), 16, 400)]
    {
        for window in [None, Some(128)] {
            let case = Case { window, ..base };
            let mut host = Inputs::new(&case, 9);
            host.bias_pages();
            let cpu = OnDevice::new(&case, host, DType::F32, &Device::Cpu)?;
            let host = Inputs { params: cpu.host.params.clone(), ..Inputs::new(&case, 9) };
            let gpu = OnDevice::new(&case, host, DType::F32, &gpu)?;
            let attend = |x: &OnDevice| {
                paged_attention_runs(&x.q, &x.keys, &x.values, &x.host.params, &runs)
            };
            let (expected, got) = (attend(&cpu)?, attend(&gpu)?);
            for (a, b) in [(&got.out, &expected.out), (&got.lse, &expected.lse)] {
                let (a, b) = (values(a)?, values(b)?);
                let near = |(a, b): (&f32, &f32)| a == b || (a - b).abs() < 2e-5;
                assert!(a.iter().zip(&b).all(near), "{case:?}");
            }
            assert_eq!(bits(&attend(&gpu)?)?, bits(&got)?, "{case:?}");
        }
    }
    Ok(())
}

#[test]
fn a_union_of_parts_is_that_of_the_processor() -> Result<()> {
    let Some(gpu) = device("a union of parts") else { return Ok(()) };
    let cases = [
        Case { window: Some(128), ..case(1, (9, 3), 64, 700) },
        Case { window: Some(2048), sliding: Some(500), ..case(1, (14, 2), 64, 4000) },
        Case { window: Some(64), ..case(1, (8, 1), 96, 300) },
        Case { window: Some(192), ..case(1, (32, 8), 128, 640) },
        Case { window: Some(128), ..case(4, (4, 1), 256, 333) },
        // Rows of two tiles, of several tokens and of one.
        Case { window: Some(128), ..case(5, (6, 2), 64, 500) },
        Case { window: Some(128), ..case(1, (12, 1), 64, 500) },
        // The window sees nothing behind the sinks.
        Case { window: Some(64), ..case(1, (4, 2), 64, 20) },
        // Beyond the pages that travel in the launch.
        Case { window: Some(128), ..case(1, (2, 1), 64, 201 * 64 + 17) },
    ];
    for case in cases {
        let [(expected, sums), (got, own)] = [Device::Cpu, gpu.clone()].map(|device| {
            let attend = || -> Result<_> {
                let three = three_parts(&case, &device)?;
                let parts: Vec<AttentionPart<'_>> = three.iter().map(as_part).collect();
                let sums = Tensor::zeros(case.h + 1, DType::F32, &device)?;
                let recovered = Tensor::from_slice(&[0.25f32], 1, &device)?;
                let shares = ShareSums { part: 2, sums: &sums, recovered: Some(&recovered) };
                let shares = (case.t == 1).then_some(&shares);
                paged_attention_union(&parts, shares)?;
                // Twice the same bits: whichever block of a tile arrives last.
                let union = paged_attention_union(&parts, shares)?;
                if device.is_cuda() {
                    let again = paged_attention_union(&parts, None)?;
                    assert_eq!(bits(&union.state)?, bits(&again.state)?, "{case:?}");
                }
                Ok((union, values(&sums)?))
            };
            attend().unwrap()
        });
        let near = |name: &str, a: &[f32], b: &[f32]| {
            let near = |(a, b): (&f32, &f32)| a == b || (a - b).abs() < 2e-5;
            assert!(a.len() == b.len() && a.iter().zip(b).all(near), "{name} of {case:?}");
        };
        near("out", &values(&got.state.out)?, &values(&expected.state.out)?);
        near("lse", &values(&got.state.lse)?, &values(&expected.state.lse)?);
        for (got, expected) in got.part_lses.iter().zip(&expected.part_lses) {
            near("lse of a part", &values(got)?, &values(expected)?);
        }
        near("shares", &own, &sums);
        assert_eq!(own[case.h], if case.t == 1 { 0.5 } else { 0.0 });
    }
    Ok(())
}

#[test]
fn a_union_is_one_launch_and_takes_parts_that_see_nothing() -> Result<()> {
    let Some(gpu) = device("a union with empty parts") else { return Ok(()) };
    let case = Case { window: Some(128), ..case(1, (6, 2), 64, 500) };
    let mut three = three_parts(&case, &gpu)?;
    three.iter_mut().for_each(|(_, params)| {
        params
            .pages
            .iter_mut()
            .enumerate()
            .for_each(|(i, page)| page.bias = [0.4, -0.7, 0.0][i % 3]);
    });
    let nothing = AttentionParams { pages: Vec::new(), ..three[1].1.clone() };
    let near = |a: &[f32], b: &[f32]| {
        let near = |(a, b): (&f32, &f32)| a == b || (a - b).abs() < 2e-5;
        assert!(a.len() == b.len() && a.iter().zip(b).all(near), "{a:?}, expected {b:?}");
    };
    // Which of the three see something: all, none in the middle, none at the end, which is counted, and none at all.
    for seeing in [[true; 3], [true, false, true], [true, true, false], [false; 3]] {
        let of = |(own, seeing): (_, bool)| -> AttentionPart<'_> {
            let part: AttentionPart<'_> = as_part(own);
            AttentionPart { params: if seeing { part.params } else { &nothing }, ..part }
        };
        let parts: Vec<AttentionPart<'_>> = three.iter().zip(seeing).map(of).collect();
        let sums = Tensor::zeros(7, DType::F32, &gpu)?;
        let shares = ShareSums { part: 2, sums: &sums, recovered: None };
        let union = paged_attention_union(&parts, Some(&shares))?;
        let states = paged_attention_parts(&parts)?;
        let merged = merge_states(&merge_states(&states[0], &states[1])?, &states[2])?;
        near(&values(&union.state.out)?, &values(&merged.out)?);
        near(&values(&union.state.lse)?, &values(&merged.lse)?);
        let pairs = values(&states[2].lse)?.into_iter().zip(values(&merged.lse)?);
        let share = |(own, all): (f32, f32)| if all.is_finite() { (own - all).exp() } else { 0.0 };
        near(&values(&sums)?, &pairs.map(share).chain([0.0]).collect::<Vec<_>>());
    }
    // The least of some: other tests may launch meanwhile.
    let parts: Vec<AttentionPart<'_>> = three.iter().map(as_part).collect();
    let launched = || {
        let before = launches();
        paged_attention_union(&parts, None).map(|_| launches() - before)
    };
    let counts = (0..50).map(|_| launched()).collect::<Result<Vec<_>>>()?;
    assert_eq!(counts.iter().min(), Some(&1), "{counts:?}");
    Ok(())
}

#[test]
fn heads_of_tiny_models_work_in_f32() -> Result<()> {
    let Some(gpu) = device("tiny heads") else { return Ok(()) };
    for (seed, case) in [case(1, (4, 2), 16, 100), case(50, (4, 1), 32, 70), case(3, (3, 1), 16, 0)]
        .iter()
        .enumerate()
    {
        let inputs = OnDevice::new(case, Inputs::new(case, seed as u64), DType::F32, &gpu)?;
        let state = inputs.run(&inputs.host.params)?;
        let Inputs { q, keys, values: v, params, .. } = &inputs.host;
        let shape = (case.t, case.h, case.g, case.d);
        let (out, lse) = reference::paged_attention(q, keys, v, shape, params);
        let (plain_out, plain_lse) = plain(case, &inputs.host, DType::F32)?;
        assert_as_good("out", &values(&state.out)?, &plain_out, &out);
        assert_as_good("lse", &values(&state.lse)?, &plain_lse, &lse);
    }
    Ok(())
}

#[test]
fn the_slots_of_pages_do_not_change_a_bit() -> Result<()> {
    let Some(gpu) = device("slots of pages") else { return Ok(()) };
    for case in [DECODE[1], DECODE[2], PREFILL[2], PREFILL[4]] {
        for dtype in [DType::F32, DType::BF16] {
            let inputs = OnDevice::new(&case, Inputs::new(&case, 9), dtype, &gpu)?;
            let expected = bits(&inputs.run(&inputs.host.params)?)?;
            let slots = inputs.host.slots;
            for turn in 1..3 {
                // The page of slot s moves to slot (s + turn) mod slots.
                let from: Vec<u32> =
                    (0..slots).map(|s| ((s + slots - turn) % slots) as u32).collect();
                let from = Tensor::from_slice(&from, slots, &gpu)?;
                let moved = |pool: &Tensor| pool.index_select(&from, 0);
                let mut params = inputs.host.params.clone();
                params.pages.iter_mut().for_each(|page| page.slot = (page.slot + turn) % slots);
                let (keys, values) = (moved(&inputs.keys)?, moved(&inputs.values)?);
                let state = paged_attention(&inputs.q, &keys, &values, &params)?;
                assert_eq!(expected, bits(&state)?, "{case:?} {dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn sinks_beside_a_window_and_rows_that_see_nothing() -> Result<()> {
    let Some(gpu) = device("sinks beside a window") else { return Ok(()) };
    for case in [case(1, (4, 1), 128, 900), case(30, (4, 1), 128, 900), case(30, (2, 1), 64, 900)] {
        for dtype in DTYPES {
            // Page 0, a gap, then the last pages; with a sliding window some rows see no page of the list at all.
            for sliding in [None, Some(40)] {
                let mut host = Inputs::new(&case, 4);
                host.params.pages.drain(1..10);
                if sliding.is_some() {
                    host.params.pages.truncate(4);
                }
                host.params.sliding_window = sliding;
                let inputs = OnDevice::new(&case, host, dtype, &gpu)?;
                let state = inputs.run(&inputs.host.params)?;
                let Inputs { q, keys, values: v, params, .. } = &inputs.host;
                let shape = (case.t, case.h, case.g, case.d);
                let (out, lse) = reference::paged_attention(q, keys, v, shape, params);
                let (plain_out, plain_lse) = plain(&case, &inputs.host, dtype)?;
                let name = format!("{case:?} {dtype:?} sliding {sliding:?}");
                assert_as_good(&name, &values(&state.out)?, &plain_out, &out);
                assert_as_good(&name, &values(&state.lse)?, &plain_lse, &lse);
            }
        }
    }
    Ok(())
}

#[test]
fn nothing_to_attend_or_to_ask_gives_the_neutral_state() -> Result<()> {
    let Some(gpu) = device("nothing to attend") else { return Ok(()) };
    let case = case(3, (2, 1), 64, 5);
    let inputs = OnDevice::new(&case, Inputs::new(&case, 1), DType::BF16, &gpu)?;
    let state = inputs.run(&AttentionParams { pages: Vec::new(), ..inputs.host.params.clone() })?;
    assert!(values(&state.out)?.iter().all(|x| *x == 0.0));
    assert!(values(&state.lse)?.iter().all(|x| *x == f32::NEG_INFINITY));
    let none = inputs.q.narrow(0, 0, 0)?;
    let state = paged_attention(&none, &inputs.keys, &inputs.values, &inputs.host.params)?;
    assert_eq!((state.out.dims(), state.lse.dims()), (&[0, 2, 64][..], &[0, 2][..]));
    let other = inputs.keys.to_dtype(DType::F16)?;
    let error = paged_attention(&inputs.q, &other, &inputs.values, &inputs.host.params);
    assert!(error.unwrap_err().to_string().contains("expected"));
    Ok(())
}

#[test]
fn merging_any_split_on_the_device_equals_the_unsplit_result() -> Result<()> {
    let Some(gpu) = device("merge of splits") else { return Ok(()) };
    for case in [DECODE[1], DECODE[9], PREFILL[2], PREFILL[8]] {
        let inputs = OnDevice::new(&case, Inputs::new(&case, 2), DType::F32, &gpu)?;
        let Inputs { q, keys, values: v, params, .. } = &inputs.host;
        let shape = (case.t, case.h, case.g, case.d);
        let (out, lse) = reference::paged_attention(q, keys, v, shape, params);
        let (plain_out, plain_lse) = plain(&case, &inputs.host, DType::F32)?;
        for cut in 0..=params.pages.len() {
            let part = |pages: &[mka_kernels::PageRef]| {
                inputs.run(&AttentionParams { pages: pages.to_vec(), ..params.clone() })
            };
            let (left, right) = params.pages.split_at(cut);
            let merged = merge_states(&part(left)?, &part(right)?)?;
            let name = format!("{case:?} cut at {cut}");
            assert_as_good(&name, &values(&merged.out)?, &plain_out, &out);
            assert_as_good(&name, &values(&merged.lse)?, &plain_lse, &lse);
        }
    }
    Ok(())
}

#[test]
fn merge_and_its_gradient_on_the_device_equal_their_definition() -> Result<()> {
    let Some(gpu) = device("gradient of a merge") else { return Ok(()) };
    let (t, h, d) = (5, 3, 96);
    let rows = t * h;
    for dtype in DTYPES {
        let random = |seed, n| rounded(&crate::select::random(seed, n), dtype);
        let (a_out, b_out, dout) =
            (random(1, rows * d)?, random(2, rows * d)?, random(3, rows * d)?);
        let mut a_lse = crate::select::random(4, rows);
        let mut b_lse = crate::select::random(5, rows);
        let dlse = crate::select::random(6, rows);
        a_lse[0] = f32::NEG_INFINITY;
        b_lse[1] = f32::NEG_INFINITY;
        (a_lse[2], b_lse[2]) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        let state = |out: &[f32], lse: &[f32]| -> Result<AttentionState> {
            Ok(AttentionState {
                out: Tensor::from_slice(out, (t, h, d), &gpu)?.to_dtype(dtype)?,
                lse: Tensor::from_slice(lse, (t, h), &gpu)?,
            })
        };
        let (a, b, up) = (state(&a_out, &a_lse)?, state(&b_out, &b_lse)?, state(&dout, &dlse)?);
        let merged = merge_states(&a, &b)?;
        let got = merge_states_backward(&a, &b, &up.out, Some(&up.lse))?;
        let mut expected: [Vec<f64>; 6] = Default::default();
        for row in 0..rows {
            let of = |x: &[f32]| -> Vec<f64> {
                x[row * d..(row + 1) * d].iter().map(|x| f64::from(*x)).collect()
            };
            let (x, y, g) = (of(&a_out), of(&b_out), of(&dout));
            let (la, lb) = (f64::from(a_lse[row]), f64::from(b_lse[row]));
            let (out, lse) = reference::merge_states((&x, la), (&y, lb));
            let outer = f64::from(dlse[row]);
            let (da, dla, db, dlb) =
                reference::merge_states_backward((&x, la), (&y, lb), &g, outer);
            for (all, row) in
                expected.iter_mut().zip([out, vec![lse], da, vec![dla], db, vec![dlb]])
            {
                all.extend(row);
            }
        }
        let tensors = [&merged.out, &merged.lse, &got.a_out, &got.a_lse, &got.b_out, &got.b_lse];
        for (i, (tensor, expected)) in tensors.into_iter().zip(&expected).enumerate() {
            // The best that the type can hold.
            let best: Vec<f32> = expected.iter().map(|x| *x as f32).collect();
            let best = rounded(&best, tensor.dtype())?;
            assert_as_good(&format!("{dtype:?} result {i}"), &values(tensor)?, &best, expected);
        }
        let without = merge_states_backward(&a, &b, &up.out, None)?;
        assert_eq!(values(&without.b_out)?, values(&got.b_out)?);
    }
    Ok(())
}
