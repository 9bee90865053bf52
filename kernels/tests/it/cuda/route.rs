//! The EMA scan on the device.

use super::device;
use candle_core::{DType, Device, Result, Tensor, Var};
use mka_kernels::{ema_advance, ema_scan, ema_scan_learned, fuse_levels, reference};

const RATES: [f32; 4] = [0.9, 0.99, 0.999, 0.0];

fn single(x: &Tensor) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
}

pub(super) fn double(x: &Tensor) -> Result<Vec<f64>> {
    Ok(single(x)?.into_iter().map(f64::from).collect())
}

pub(super) fn same_bits(a: &Tensor, b: &Tensor) -> Result<bool> {
    let bits =
        |x: &Tensor| -> Result<Vec<u32>> { Ok(single(x)?.into_iter().map(f32::to_bits).collect()) };
    Ok(bits(a)? == bits(b)?)
}

/// Largest difference, in units of the largest value expected; NaN counts as infinite.
pub(super) fn relative_error(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(1e-6f64, |a, b| a.max(b.abs()));
    let error = |(a, b): (&f64, &f64)| if a.is_nan() { f64::INFINITY } else { (a - b).abs() };
    got.iter().zip(expected).map(error).fold(0.0, f64::max) / scale
}

#[test]
fn scan_on_the_device_is_within_1e_5_of_the_formula() -> Result<()> {
    let Some(gpu) = device("scan") else { return Ok(()) };
    let shapes = [(1, 1, 1), (1, 1, 8), (2, 127, 12), (1, 128, 4), (3, 129, 7), (1, 3000, 520)];
    for (b, t, c) in shapes {
        for (dtype, m) in [(DType::F32, 3), (DType::BF16, 4), (DType::F16, 1)] {
            for (seen, correct) in [(0, true), (10_000, true), (0, false)] {
                let name = format!("({b}, {t}, {c}) {dtype:?} {m} rates, {seen} seen, {correct}");
                let rates = &RATES[..m];
                let x = Tensor::randn(0.5f32, 1.0, (b, t, c), &gpu)?.to_dtype(dtype)?;
                let state = Tensor::randn(0f32, 1.0, (b, m, c), &gpu)?;
                let (levels, last) = ema_scan(&x, &state, rates, seen, correct)?;
                let again = ema_scan(&x, &state, rates, seen, correct)?;
                assert!(same_bits(&levels, &again.0)? && same_bits(&last, &again.1)?, "{name}");
                assert!(same_bits(&last, &ema_advance(&x, &state, rates)?)?, "{name}: advance");
                for stream in 0..b {
                    let exact: Vec<f64> = rates.iter().map(|x| f64::from(*x)).collect();
                    let (expected, expected_last) = reference::route::ema_scan(
                        &double(&x.get(stream)?)?,
                        &double(&state.get(stream)?)?,
                        &exact,
                        seen,
                        correct,
                    );
                    let error = relative_error(&double(&levels.get(stream)?)?, &expected);
                    assert!(error < 1e-5, "{name}: levels {error}");
                    let error = relative_error(&double(&last.get(stream)?)?, &expected_last);
                    assert!(error < 1e-5, "{name}: state {error}");
                }
            }
        }
    }
    let nothing = Tensor::zeros((1, 8), DType::F32, &gpu)?.narrow(0, 0, 0)?;
    let state = Tensor::ones((3, 8), DType::F32, &gpu)?;
    let (levels, last) = ema_scan(&nothing, &state, &RATES[..3], 0, true)?;
    assert_eq!(levels.dims(), [0, 3, 8]);
    assert!(same_bits(&last, &state)?);
    Ok(())
}

#[test]
fn gradients_of_the_scan_on_the_device_are_those_of_the_cpu() -> Result<()> {
    let Some(gpu) = device("gradients of the scan") else { return Ok(()) };
    for (b, t, c) in [(1, 1, 4), (2, 130, 6), (1, 400, 20)] {
        for (dtype, correct) in [(DType::F32, true), (DType::F32, false), (DType::BF16, true)] {
            let x = Tensor::randn(0f32, 1.0, (b, t, c), &Device::Cpu)?.to_dtype(dtype)?;
            let state = Tensor::randn(0f32, 1.0, (b, 3, c), &Device::Cpu)?;
            let dlevels = Tensor::randn(0f32, 1.0, (b, t, 3, c), &Device::Cpu)?;
            let dstate = Tensor::randn(0f32, 1.0, (b, 3, c), &Device::Cpu)?;
            let gradients = |device: &Device| -> Result<[Vec<f64>; 3]> {
                let x = Var::from_tensor(&x.to_device(device)?)?;
                let state = Var::from_tensor(&state.to_device(device)?)?;
                let rates = Var::from_slice(&RATES[..3], 3, device)?;
                let (levels, last) = ema_scan_learned(&x, &state, &rates, 0, correct)?;
                let loss = (levels * dlevels.to_device(device)?)?.sum_all()?;
                let loss = (loss + (last * dstate.to_device(device)?)?.sum_all()?)?;
                let grads = loss.backward()?;
                let grad = |x: &Var| double(grads.get(x).expect("a variable of the loss"));
                Ok([grad(&x)?, grad(&state)?, grad(&rates)?])
            };
            let (expected, got) = (gradients(&Device::Cpu)?, gradients(&gpu)?);
            // dx is rounded to its type on both sides.
            let tolerance = [if dtype == DType::F32 { 1e-5 } else { 1e-2 }, 1e-5, 1e-4];
            for i in 0..3 {
                let error = relative_error(&got[i], &expected[i]);
                assert!(error < tolerance[i], "({b}, {t}, {c}) {dtype:?} {correct} {i}: {error}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_mix_of_levels_has_gradients_on_the_device() -> Result<()> {
    let Some(gpu) = device("mix of levels") else { return Ok(()) };
    let x = Tensor::randn(0f32, 1.0, (9, 8), &Device::Cpu)?;
    let weights = Tensor::rand(0f32, 1.0, (9, 4), &Device::Cpu)?;
    let gradient = |device: &Device| -> Result<Vec<f64>> {
        let x = Var::from_tensor(&x.to_device(device)?)?;
        let state = Tensor::zeros((3, 8), DType::F32, device)?;
        let (levels, _) = ema_scan(&x, &state, &RATES[..3], 0, true)?;
        let fused = fuse_levels(&x, &levels, &weights.to_device(device)?, 0.7)?;
        double(fused.sqr()?.sum_all()?.backward()?.get(&x).expect("a variable of the loss"))
    };
    let error = relative_error(&gradient(&gpu)?, &gradient(&Device::Cpu)?);
    assert!(error < 1e-5, "{error}");
    Ok(())
}
