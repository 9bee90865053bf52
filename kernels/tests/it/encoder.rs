//! The parts of a text encoder against candle's ops and the formula in f64, over odd shapes.
//! Knows the public API only.

use candle_core::{Device, Tensor};
use mka_kernels::encoder::{add_and_norm, attend_text, gelu};

fn wave(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin() * 2.0).collect()
}

fn attended(qkv: &[f32], heads: usize, d: usize) -> Vec<f64> {
    let hidden = heads * d;
    let at = |token: usize, part: usize, i: usize| {
        f64::from(qkv[token * 3 * hidden + part * hidden + i])
    };
    let t = qkv.len() / (3 * hidden);
    let mut out = Vec::new();
    for token in 0..t {
        for i in 0..hidden {
            let of_head = || i / d * d..(i / d + 1) * d;
            let score = |other| of_head().map(|i| at(token, 0, i) * at(other, 1, i)).sum::<f64>();
            let weights: Vec<f64> =
                (0..t).map(|other| (score(other) / (d as f64).sqrt()).exp()).collect();
            let mixed: f64 = weights.iter().enumerate().map(|(o, w)| w * at(o, 2, i)).sum();
            out.push(mixed / weights.iter().sum::<f64>());
        }
    }
    out
}

#[test]
fn attention_is_that_of_the_formula() {
    for (t, heads, d) in [(0, 2, 4), (1, 1, 1), (3, 2, 5), (16, 3, 8), (17, 2, 32), (40, 2, 48)] {
        let qkv = wave(t * 3 * heads * d, 0.37);
        let mut out = vec![f32::NAN; t * heads * d];
        attend_text(&qkv, heads, d, &mut out);
        for (found, exact) in out.iter().zip(attended(&qkv, heads, d)) {
            assert!(
                (f64::from(*found) - exact).abs() < 2e-5,
                "{t} {heads} {d}: {found}, not {exact}"
            );
        }
    }
}

#[test]
fn the_norm_is_that_of_the_sum() {
    for (t, c) in [(0, 3), (1, 1), (2, 7), (3, 16), (5, 100)] {
        let (x, added) = (wave(t * c, 0.7), wave(t * c, 0.31));
        let (weight, bias) = (wave(c, 1.1), wave(c, 0.2));
        let mut found = x.clone();
        add_and_norm(&mut found, &added, &weight, &bias, 1e-5);
        for row in 0..t {
            let sum: Vec<f64> =
                (0..c).map(|i| f64::from(x[row * c + i]) + f64::from(added[row * c + i])).collect();
            let mean = sum.iter().sum::<f64>() / c as f64;
            let variance = sum.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
            for i in 0..c {
                let exact = (sum[i] - mean) / (variance + 1e-5).sqrt() * f64::from(weight[i])
                    + f64::from(bias[i]);
                let found = f64::from(found[row * c + i]);
                assert!((found - exact).abs() < 2e-5, "{t} {c}: {found}, not {exact}");
            }
        }
    }
}

#[test]
fn gelu_is_that_of_the_error_function_at_every_length() {
    for len in [0usize, 1, 7, 16, 33, 40_001] {
        let values: Vec<f32> = wave(len, 0.37).iter().map(|x| x * 6.0).collect();
        let x = Tensor::from_vec(values.clone(), len, &Device::Cpu).unwrap();
        let exact = x.gelu_erf().unwrap().to_vec1::<f32>().unwrap();
        let mut found = values.clone();
        gelu(&mut found);
        for ((x, found), exact) in values.iter().zip(found).zip(exact) {
            assert!((found - exact).abs() <= 4e-7 * x.abs(), "gelu({x}) = {found}, not {exact}");
        }
    }
}
