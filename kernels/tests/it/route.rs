//! The EMA scan, the level mix and the rotation against their formulas.

use candle_core::{Device, Tensor};
use mka_kernels::{RotaryAngles, ema_advance, ema_scan, fuse_levels, rotate};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(shape: (usize, usize), seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let data: Vec<f32> = (0..shape.0 * shape.1).map(|_| rng.random_range(-1f32..1.0)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

const RATES: [f32; 3] = [0.9, 0.99, 0.999];

#[test]
fn any_chunking_of_a_stream_gives_the_same_bits() {
    let x = random((50, 6), 3);
    let mut whole_state = vec![0f32; 18];
    let whole = ema_scan(&x, &mut whole_state, &RATES, 0, true).unwrap();
    for cut in [1, 7, 49] {
        let mut state = vec![0f32; 18];
        let head = ema_scan(&x.narrow(0, 0, cut).unwrap(), &mut state, &RATES, 0, true).unwrap();
        let rest = x.narrow(0, cut, 50 - cut).unwrap();
        let mut advanced = state.clone();
        let tail = ema_scan(&rest, &mut state, &RATES, cut as u64, true).unwrap();
        ema_advance(&rest, &mut advanced, &RATES).unwrap();
        let joined = Tensor::cat(&[head, tail], 0).unwrap();
        assert_eq!(
            joined.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            whole.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
        assert_eq!(state, whole_state);
        assert_eq!(advanced, whole_state);
    }
}

#[test]
fn scan_equals_the_closed_form() {
    let x = random((20, 4), 5);
    let rows = x.to_vec2::<f32>().unwrap();
    let levels = ema_scan(&x, &mut [0f32; 4], &[0.9], 0, true).unwrap();
    for t in 0..20 {
        for c in 0..4 {
            let weighted: f64 =
                (0..=t).map(|i| 0.1 * 0.9f64.powi((t - i) as i32) * f64::from(rows[i][c])).sum();
            let expected = weighted / (1.0 - 0.9f64.powi(t as i32 + 1));
            let got = levels.to_vec3::<f32>().unwrap()[t][0][c];
            assert!((f64::from(got) - expected).abs() < 1e-5, "{got} {expected}");
        }
    }
}

#[test]
fn gate_zero_is_the_input_and_gate_one_is_the_weighted_mean() {
    let x = random((5, 4), 8);
    let levels = ema_scan(&x, &mut [0f32; 12], &RATES, 0, true).unwrap();
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
