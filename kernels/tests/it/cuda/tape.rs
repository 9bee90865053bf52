//! The tape's ops on the device against f64, and the update of AdamW.

use super::device;
use crate::tape::{self as checks, Place};
use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::{AdamWStep, ProductOptions, adamw, product, square_sum};

/// f32, bf16 and f16 on the device, with what their rounding allows.
fn places(device: &Device) -> Vec<Place> {
    [(DType::F32, 1e-5), (DType::BF16, 3e-2), (DType::F16, 4e-3)]
        .map(|(dtype, bound)| Place::new(device.clone(), dtype, bound))
        .into()
}

#[test]
fn projections_on_the_device_equal_f64() -> Result<()> {
    let Some(gpu) = device("projections") else { return Ok(()) };
    places(&gpu).iter().try_for_each(checks::projections)
}

#[test]
fn products_on_the_device_equal_f64_however_the_operands_lie() -> Result<()> {
    let Some(gpu) = device("products") else { return Ok(()) };
    places(&gpu).iter().try_for_each(checks::products)
}

#[test]
fn norms_on_the_device_equal_f64() -> Result<()> {
    let Some(gpu) = device("norms") else { return Ok(()) };
    places(&gpu).iter().try_for_each(checks::norms)
}

#[test]
fn gates_and_biases_on_the_device_equal_f64() -> Result<()> {
    let Some(gpu) = device("gates") else { return Ok(()) };
    places(&gpu).iter().try_for_each(checks::gates_and_biases)
}

#[test]
fn attention_on_the_tape_on_the_device_equals_f64() -> Result<()> {
    let Some(gpu) = device("attention on the tape") else { return Ok(()) };
    places(&gpu).iter().try_for_each(checks::attention_and_rotation)
}

#[test]
fn cross_entropy_on_the_device_equals_f64() -> Result<()> {
    let Some(gpu) = device("cross-entropy") else { return Ok(()) };
    places(&gpu).iter().try_for_each(checks::losses)
}

#[test]
fn the_route_on_the_tape_on_the_device_equals_its_op() -> Result<()> {
    let Some(gpu) = device("route on the tape") else { return Ok(()) };
    places(&gpu).iter().try_for_each(checks::routes)
}

#[test]
fn products_in_tf32_are_within_its_rounding() -> Result<()> {
    let Some(gpu) = device("tf32") else { return Ok(()) };
    let [a, b] = [(40, 300), (300, 24)].map(|shape| Tensor::randn(0f32, 1.0, shape, &Device::Cpu));
    let (a, b) = (a?, b?);
    let exact = a.to_dtype(DType::F64)?.matmul(&b.to_dtype(DType::F64)?)?;
    let options = ProductOptions { tf32: true, ..ProductOptions::default() };
    let found = product(&a.to_device(&gpu)?, &b.to_device(&gpu)?, options)?;
    let found = found.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let error = (found - &exact)?.abs()?.max_all()?.to_scalar::<f64>()?;
    let largest = exact.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(error < 2e-3 * largest, "{error} of {largest}");
    Ok(())
}

#[test]
fn an_update_on_the_device_equals_its_formula() -> Result<()> {
    let Some(gpu) = device("adamw") else { return Ok(()) };
    let wide = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>();
    for len in [1, 1000, 70_001] {
        let random = || Tensor::randn(0f32, 1.0, len, &gpu);
        let (master, gradient) = (random()?, random()?);
        let value = master.to_dtype(DType::BF16)?;
        let zeros = || Tensor::zeros(len, DType::F32, &gpu);
        let (first, second) = (zeros()?, zeros()?);
        let mut expected = (wide(&master)?, vec![0f64; len], vec![0f64; len]);
        let g = wide(&gradient)?;
        for step in 1..4 {
            let (b1, b2) = (0.9f64, 0.999f64);
            let (c1, c2) = (1.0 - b1.powi(step), 1.0 - b2.powi(step));
            let numbers = AdamWStep {
                scale: 0.5,
                betas: (b1 as f32, b2 as f32),
                corrections: (c1 as f32, c2 as f32),
                eps: 1e-8,
                weight_decay: 0.1,
                rate: 0.01,
            };
            // The last step has no gradient.
            let given = (step < 3).then_some(&gradient);
            adamw(given, &master, Some(&value), (&first, &second), &numbers)?;
            let (p, m, v) = (&mut expected.0, &mut expected.1, &mut expected.2);
            for i in 0..len {
                let g = if step < 3 { 0.5 * g[i] } else { 0.0 };
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                p[i] -= 0.01 * (m[i] / c1 / ((v[i] / c2).sqrt() + 1e-8) + 0.1 * p[i]);
            }
        }
        for (found, expected) in wide(&master)?.into_iter().zip(&expected.0) {
            assert!(
                (found - expected).abs() < 1e-5 * (1.0 + expected.abs()),
                "{found}, {expected}"
            );
        }
        let rounded = master.to_dtype(DType::BF16)?;
        assert_eq!(wide(&value)?, wide(&rounded)?);
        let both = [gradient.clone(), master.clone()];
        let exact: f64 = both
            .iter()
            .map(|x| Ok(wide(x)?.iter().map(|x| x * x).sum::<f64>()))
            .sum::<Result<f64>>()?;
        let found = square_sum(&both)?;
        assert!((found - exact).abs() < 1e-5 * exact, "{found}, {exact}");
        assert_eq!(square_sum(&both)?.to_bits(), found.to_bits());
    }
    assert_eq!(square_sum(&[])?, 0.0);
    Ok(())
}
