//! Rotation and its inverse.

use candle_core::{DType, Device, Tensor};
use mka_kernels::{RotaryAngles, rotate, rotate_back};

fn floats(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn rotating_back_undoes_a_rotation_but_for_the_square_of_its_scale() {
    let values: Vec<f32> = (0..5 * 3 * 8).map(|i| (i as f32 * 0.37).sin()).collect();
    let x = Tensor::from_vec(values, (5, 3, 8), &Device::Cpu).unwrap();
    for scale in [1.0, 1.3] {
        let angles = RotaryAngles::new([0, 7, 100, 8191, 12], &[1.0, 0.1, 0.01, 0.001], scale);
        let back = rotate_back(&rotate(&x, &angles).unwrap(), &angles).unwrap();
        for (found, exact) in floats(&back).iter().zip(floats(&x)) {
            let exact = exact * (scale * scale) as f32;
            assert!((found - exact).abs() < 3e-6, "{found}, expected {exact}");
        }
    }
    let few = RotaryAngles::new([0, 1], &[1.0, 0.1, 0.01, 0.001], 1.0);
    let error = rotate_back(&x, &few).unwrap_err().to_string();
    assert!(error.contains("rotate_back") && error.contains("2 positions"), "{error}");
    // No head, and heads of nothing.
    let none = RotaryAngles::new([0, 1], &[], 1.0);
    for (shape, angles) in [((2, 0, 8), &few), ((0, 1, 0), &none)] {
        let x = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let error = rotate(&x, angles).unwrap_err().to_string();
        assert!(error.contains("some heads"), "{error}");
    }
}

#[test]
fn pairs_of_frequency_0_are_neither_turned_nor_scaled() {
    let values: Vec<f32> = (0..3 * 2 * 8).map(|i| (i as f32 * 0.37).sin()).collect();
    let x = Tensor::from_vec(values, (3, 2, 8), &Device::Cpu).unwrap();
    let positions = [0, 9, 8191];
    let angles = RotaryAngles::new(positions, &[1.0, 0.0, 0.01, 0.0], 1.3);
    let rotated = rotate(&x, &angles).unwrap();
    let all = rotate(&x, &RotaryAngles::new(positions, &[1.0, 0.1, 0.01, 0.1], 1.3)).unwrap();
    for pair in 0..4 {
        for channel in [pair, pair + 4] {
            let of = |x: &Tensor| floats(&x.narrow(2, channel, 1).unwrap());
            let expected = if pair % 2 == 0 { of(&all) } else { of(&x) };
            assert_eq!(of(&rotated), expected, "channel {channel}");
        }
    }
}
