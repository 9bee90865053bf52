//! Rotation on the device.

use super::device;
use candle_core::{DType, Device, Result, Tensor, Var};
use mka_kernels::{RotaryAngles, rotate};

fn angles(t: usize, d: usize) -> RotaryAngles {
    let frequencies: Vec<f64> =
        (0..d / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / d as f64)).collect();
    RotaryAngles::new(5_000_000..5_000_000 + t as u64, &frequencies, 1.0)
}

#[test]
fn rotation_on_the_device_has_the_bits_of_the_cpu() -> Result<()> {
    let Some(gpu) = device("rotation") else { return Ok(()) };
    for (t, h, d) in [(1, 1, 64), (7, 9, 96), (130, 4, 128), (3, 2, 256), (5, 3, 10)] {
        let x = Tensor::randn(0f32, 1.0, (t, h, d), &Device::Cpu)?;
        let angles = angles(t, d);
        let expected = rotate(&x, &angles)?.flatten_all()?.to_vec1::<f32>()?;
        let got = rotate(&x.to_device(&gpu)?, &angles)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(expected, got, "({t}, {h}, {d})");
        for dtype in [DType::BF16, DType::F16] {
            let rounded = x.to_dtype(dtype)?.to_dtype(DType::F32)?;
            let expected = rotate(&rounded, &angles)?.to_dtype(dtype)?.to_dtype(DType::F32)?;
            let got = rotate(&x.to_dtype(dtype)?.to_device(&gpu)?, &angles)?;
            let got = got.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            assert_eq!(
                expected.flatten_all()?.to_vec1::<f32>()?,
                got.flatten_all()?.to_vec1::<f32>()?,
                "({t}, {h}, {d}) {dtype:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn rotation_of_no_token_on_the_device_is_empty() -> Result<()> {
    let Some(gpu) = device("rotation of no token") else { return Ok(()) };
    let x = Tensor::zeros((1, 3, 64), DType::F32, &gpu)?.narrow(0, 0, 0)?;
    assert_eq!(rotate(&x, &angles(0, 64))?.dims(), [0, 3, 64]);
    Ok(())
}

#[test]
fn gradient_of_a_rotation_on_the_device_is_the_inverse_rotation() -> Result<()> {
    let Some(gpu) = device("gradient of a rotation") else { return Ok(()) };
    let x = Var::from_tensor(&Tensor::randn(0f32, 1.0, (9, 2, 64), &gpu)?)?;
    let angles = angles(9, 64);
    // The gradient of |R x|² / 2 is Rᵀ R x = x.
    let loss = (rotate(x.as_tensor(), &angles)?.sqr()?.sum_all()? * 0.5)?;
    let grad = loss.backward()?.get(x.as_tensor()).cloned().expect("x is a variable of the loss");
    let error = (grad - x.as_tensor())?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(error < 1e-5, "{error}");
    Ok(())
}
