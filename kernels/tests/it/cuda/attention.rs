//! Paged attention on the device against the f64 definition, at head dimensions that no tiled kernel takes too.

use super::device;
use candle_core::{Result, Tensor};
use mka_kernels::{AttentionParams, PAGE_TOKENS, PageRef, paged_attention, reference};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Case {
    t: usize,
    h: usize,
    g: usize,
    d: usize,
    before: usize,
    window: Option<u64>,
    sliding: Option<u64>,
}

const fn case(t: usize, h: usize, g: usize, d: usize, before: usize) -> Case {
    Case { t, h, g, d, before, window: None, sliding: None }
}

const CASES: &[Case] = &[
    case(1, 1, 1, 64, 0),
    case(1, 9, 3, 64, 2111),
    case(5, 8, 2, 96, 130),
    case(70, 7, 1, 128, 1),
    case(33, 8, 1, 256, 63),
    case(17, 3, 3, 8, 40),
    case(2, 2, 1, 10, 65),
    case(1, 4, 4, 64, 20_000),
    Case { window: Some(128), ..case(90, 9, 3, 64, 500) },
    Case { window: Some(64), sliding: Some(3), ..case(40, 4, 1, 64, 200) },
    Case { sliding: Some(50), ..case(66, 6, 2, 128, 100) },
];

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.5f32..1.5)).collect()
}

fn close(got: &Tensor, expected: &[f64], what: &str) -> Result<()> {
    let got = got.flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        let same = f64::from(*got) == *expected;
        assert!(same || (f64::from(*got) - expected).abs() < 2e-5, "{what}: {got}, {expected}");
    }
    Ok(())
}

#[test]
fn paged_attention_on_the_device_equals_its_definition_in_any_order_of_slots() -> Result<()> {
    let Some(gpu) = device("paged attention") else { return Ok(()) };
    for (seed, case) in CASES.iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
        let total = case.before + case.t;
        let num_pages = total.div_ceil(PAGE_TOKENS);
        let slots = num_pages + 2;
        let n = slots * case.g * PAGE_TOKENS * case.d;
        let pages = (0..num_pages).map(|page| PageRef {
            slot: (page * 7 + 3) % slots,
            start: (page * PAGE_TOKENS) as u64,
            len: (total - page * PAGE_TOKENS).min(PAGE_TOKENS),
            bias: [0.0, -0.7, 1.3][page % 3],
        });
        // A stride of 7 meets every slot once only where 7 does not divide their number.
        let slots_differ = slots % 7 != 0;
        let pages = pages
            .map(|page| {
                if slots_differ {
                    page
                } else {
                    PageRef { slot: page.start as usize / PAGE_TOKENS, ..page }
                }
            })
            .collect();
        let params = AttentionParams {
            scale: 0.3,
            query_start: case.before as u64,
            pages,
            window_tokens: case.window,
            sliding_window: case.sliding,
        };
        let q = random(&mut rng, case.t * case.h * case.d);
        let (keys, values) = (random(&mut rng, n), random(&mut rng, n));
        let shape = (case.t, case.h, case.g, case.d);
        let (out, lse) = reference::paged_attention(&q, &keys, &values, shape, &params);
        let pool = |x: &[f32]| Tensor::from_slice(x, (slots, case.g, PAGE_TOKENS, case.d), &gpu);
        let q = Tensor::from_slice(&q, (case.t, case.h, case.d), &gpu)?;
        let got = paged_attention(&q, &pool(&keys)?, &pool(&values)?, &params)?;
        close(&got.out, &out, &format!("case {seed}, out"))?;
        close(&got.lse, &lse, &format!("case {seed}, lse"))?;
        let again = paged_attention(&q, &pool(&keys)?, &pool(&values)?, &params)?;
        let bits = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        assert_eq!(bits(&got.out)?, bits(&again.out)?, "case {seed}: equal inputs, equal bits");
    }
    Ok(())
}
