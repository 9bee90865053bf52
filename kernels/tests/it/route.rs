//! The EMA scan, the level mix and the rotation against their formulas.

use candle_core::{DType, Device, Tensor, Var};
use mka_kernels::{
    RotaryAngles, ema_advance, ema_scan, ema_scan_learned, fuse_levels, reference, rotate,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(shape: (usize, usize), seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let data: Vec<f32> = (0..shape.0 * shape.1).map(|_| rng.random_range(-1f32..1.0)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

const RATES: [f32; 3] = [0.9, 0.99, 0.999];

fn zeros(m: usize, c: usize) -> Tensor {
    Tensor::zeros((m, c), DType::F32, &Device::Cpu).unwrap()
}

pub(crate) fn flat(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn any_chunking_of_a_stream_gives_the_same_bits() {
    let x = random((50, 6), 3);
    let (whole, whole_state) = ema_scan(&x, &zeros(3, 6), &RATES, 0, true).unwrap();
    for cut in [1, 7, 49] {
        let first = x.narrow(0, 0, cut).unwrap();
        let (head, state) = ema_scan(&first, &zeros(3, 6), &RATES, 0, true).unwrap();
        let rest = x.narrow(0, cut, 50 - cut).unwrap();
        let (tail, last) = ema_scan(&rest, &state, &RATES, cut as u64, true).unwrap();
        let advanced = ema_advance(&rest, &state, &RATES).unwrap();
        assert_eq!(flat(&Tensor::cat(&[head, tail], 0).unwrap()), flat(&whole));
        assert_eq!(flat(&last), flat(&whole_state));
        assert_eq!(flat(&advanced), flat(&whole_state));
    }
}

#[test]
fn a_batch_is_its_streams_one_by_one() {
    let x = random((14, 5), 9).reshape((2, 7, 5)).unwrap();
    let state = random((6, 5), 10).reshape((2, 3, 5)).unwrap();
    let (levels, last) = ema_scan(&x, &state, &RATES, 3, true).unwrap();
    let advanced = ema_advance(&x, &state, &RATES).unwrap();
    for b in 0..2 {
        let (x, state) = (x.get(b).unwrap(), state.get(b).unwrap());
        let (expected, expected_last) = ema_scan(&x, &state, &RATES, 3, true).unwrap();
        assert_eq!(flat(&levels.get(b).unwrap()), flat(&expected));
        assert_eq!(flat(&last.get(b).unwrap()), flat(&expected_last));
        assert_eq!(flat(&advanced.get(b).unwrap()), flat(&expected_last));
    }
}

#[test]
fn a_scan_of_nothing_keeps_the_state() {
    let state = random((3, 4), 2);
    let (levels, last) = ema_scan(&random((0, 4), 1), &state, &RATES, 9, true).unwrap();
    assert_eq!(levels.dims(), [0, 3, 4]);
    assert_eq!(flat(&last), flat(&state));
}

#[test]
fn a_rate_of_one_and_a_misshapen_state_are_refused() {
    let x = random((2, 4), 1);
    let error = ema_scan(&x, &zeros(1, 4), &[1.0], 0, false).unwrap_err().to_string();
    assert!(error.contains("a rate of 1, expected one in [0, 1)"), "{error}");
    let error = ema_scan(&x, &zeros(1, 3), &[0.5], 0, false).unwrap_err().to_string();
    assert!(error.contains("state [1, 3], expected [1, 4]"), "{error}");
}

#[test]
fn scan_equals_the_closed_form() {
    let x = random((20, 4), 5);
    let rows = x.to_vec2::<f32>().unwrap();
    let (levels, _) = ema_scan(&x, &zeros(1, 4), &[0.9], 0, true).unwrap();
    let levels = levels.to_vec3::<f32>().unwrap();
    for t in 0..20 {
        for c in 0..4 {
            let weighted: f64 =
                (0..=t).map(|i| 0.1 * 0.9f64.powi((t - i) as i32) * f64::from(rows[i][c])).sum();
            let expected = weighted / (1.0 - 0.9f64.powi(t as i32 + 1));
            let got = levels[t][0][c];
            assert!((f64::from(got) - expected).abs() < 1e-5, "{got} {expected}");
        }
    }
}

/// Central differences of `loss` at every element of `at`.
pub(crate) fn differences(at: &[f64], mut loss: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let mut x = at.to_vec();
    (0..at.len())
        .map(|i| {
            let step = 1e-6;
            x[i] = at[i] + step;
            let above = loss(&x);
            x[i] = at[i] - step;
            let below = loss(&x);
            x[i] = at[i];
            (above - below) / (2.0 * step)
        })
        .collect()
}

pub(crate) fn double(x: &Tensor) -> Vec<f64> {
    flat(x).into_iter().map(f64::from).collect()
}

pub(crate) fn assert_close(name: &str, got: &Tensor, expected: &[f64]) {
    let got = double(got);
    assert_eq!(got.len(), expected.len(), "{name}");
    let scale = expected.iter().fold(1e-3f64, |a, b| a.max(b.abs()));
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() < 1e-4 * scale, "{name}[{i}]: {a}, expected {b}");
    }
}

#[test]
fn gradients_of_the_scan_are_its_differences() {
    for (seen, correct) in [(0, true), (5, true), (0, false)] {
        let x = Var::from_tensor(&random((6, 3), 1)).unwrap();
        let state = Var::from_tensor(&random((2, 3), 2)).unwrap();
        let rates = Var::from_slice(&[0.7f32, 0.95], 2, &Device::Cpu).unwrap();
        let level_weights = random((12, 3), 3).reshape((6, 2, 3)).unwrap();
        let state_weights = random((2, 3), 4);
        let (levels, last) = ema_scan_learned(&x, &state, &rates, seen, correct).unwrap();
        let loss = (levels * &level_weights).unwrap().sum_all().unwrap();
        let loss = (loss + (last * &state_weights).unwrap().sum_all().unwrap()).unwrap();
        let grads = loss.backward().unwrap();
        let loss = |x: &[f64], state: &[f64], rates: &[f64]| {
            let (levels, last) = reference::route::ema_scan(x, state, rates, seen, correct);
            let dot =
                |a: &[f64], b: &Tensor| a.iter().zip(double(b)).map(|(a, b)| a * b).sum::<f64>();
            dot(&levels, &level_weights) + dot(&last, &state_weights)
        };
        let (xs, states, rate_values) = (double(&x), double(&state), double(&rates));
        let grad = |x: &Var| grads.get(x).expect("a variable of the loss").clone();
        assert_close("x", &grad(&x), &differences(&xs, |x| loss(x, &states, &rate_values)));
        assert_close("state", &grad(&state), &differences(&states, |s| loss(&xs, s, &rate_values)));
        assert_close("rates", &grad(&rates), &differences(&rate_values, |r| loss(&xs, &states, r)));
    }
}

#[test]
fn gate_zero_is_the_input_and_gate_one_is_the_weighted_mean() {
    let x = random((5, 4), 8);
    let (levels, _) = ema_scan(&x, &zeros(3, 4), &RATES, 0, true).unwrap();
    let weights =
        Tensor::from_vec([0.4f32, 0.3, 0.2, 0.1].repeat(5), (5, 4), &Device::Cpu).unwrap();
    let closed = fuse_levels(&x, &levels, &weights, 0.0).unwrap();
    assert_eq!(closed.to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
    let open = fuse_levels(&x, &levels, &weights, 1.0).unwrap().to_vec2::<f32>().unwrap();
    let (rows, levels) = (x.to_vec2::<f32>().unwrap(), levels.to_vec3::<f32>().unwrap());
    for t in 0..5 {
        for c in 0..4 {
            let mean = 0.4 * rows[t][c]
                + 0.3 * levels[t][0][c]
                + 0.2 * levels[t][1][c]
                + 0.1 * levels[t][2][c];
            assert!((open[t][c] - mean).abs() < 1e-6);
        }
    }
}

#[test]
fn rotation_keeps_relative_angles_at_large_positions() {
    let inv_freq: Vec<f64> = (0..4).map(|i| 10_000f64.powf(-f64::from(i) / 4.0)).collect();
    let x = random((2, 8), 11).reshape((2, 1, 8)).unwrap();
    let dot_at = |positions: [u64; 2]| {
        let y = rotate(&x, &RotaryAngles::new(positions, &inv_freq, 1.0)).unwrap();
        let rows = y.squeeze(1).unwrap().to_vec2::<f32>().unwrap();
        rows[0].iter().zip(&rows[1]).map(|(a, b)| a * b).sum::<f32>()
    };
    let near = dot_at([3, 40]);
    let far = dot_at([10_000_003, 10_000_040]);
    assert!((near - far).abs() < 1e-5, "{near} {far}");
}
