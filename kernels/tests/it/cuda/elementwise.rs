//! Gated products on the device.

use super::device;
use candle_core::{DType, Device, Result, Tensor, Var};
use mka_kernels::{gelu_mul, silu_mul};

#[test]
fn gated_product_on_the_device_is_within_rounding_of_f64() -> Result<()> {
    let Some(gpu) = device("silu_mul") else { return Ok(()) };
    for shape in [(1, 1), (3, 1537)] {
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 1e-2), (DType::F16, 2e-3)] {
            let [gate, up] = [0, 1].map(|_| {
                Tensor::randn(0f32, 4.0, shape, &Device::Cpu).and_then(|x| x.to_dtype(dtype))
            });
            let (gate, up) = (gate?, up?);
            let wide = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
            let got = silu_mul(&gate.to_device(&gpu)?, &up.to_device(&gpu)?)?;
            let got = wide(&got.to_device(&Device::Cpu)?)?;
            for ((g, u), got) in wide(&gate)?.into_iter().zip(wide(&up)?).zip(got) {
                let expected = g / (1.0 + (-g).exp()) * u;
                let error = (got - expected).abs();
                assert!(error <= tolerance * (1.0 + expected.abs()), "{dtype:?} {g} {u}: {got}");
            }
        }
    }
    Ok(())
}

#[test]
fn product_gated_by_gelu_on_the_device_is_within_rounding_of_f64() -> Result<()> {
    let Some(gpu) = device("gelu_mul") else { return Ok(()) };
    let gelu = |g: f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
        0.5 * g * (1.0 + inner.tanh())
    };
    for shape in [(1, 1), (3, 1537)] {
        let [gate, up] = [0, 1].map(|_| Tensor::randn(0f32, 4.0, shape, &Device::Cpu));
        let (gate, up) = (gate?, up?);
        let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let got = gelu_mul(&gate.to_device(&gpu)?, &up.to_device(&gpu)?)?;
        assert_eq!((got.dims(), got.dtype()), (gate.dims(), DType::F32));
        let got = values(&got.to_device(&Device::Cpu)?)?;
        for ((g, u), got) in values(&gate)?.into_iter().zip(values(&up)?).zip(got) {
            let expected = gelu(f64::from(g)) * f64::from(u);
            let error = (f64::from(got) - expected).abs();
            // 1 + tanh is off by a rounding of 1, however small it is.
            assert!(error <= 1e-6 * (1.0 + f64::from(g * u).abs()), "{g} {u}: {got}");
        }
    }
    Ok(())
}

#[test]
fn gradient_of_the_gated_product_equals_that_of_plain_operations() -> Result<()> {
    let Some(gpu) = device("gradient of silu_mul") else { return Ok(()) };
    let [gate, up] =
        [0, 1].map(|_| Tensor::randn(0f32, 2.0, (5, 33), &gpu).and_then(|x| Var::from_tensor(&x)));
    let (gate, up) = (gate?, up?);
    let ours = silu_mul(gate.as_tensor(), up.as_tensor())?.sqr()?.sum_all()?.backward()?;
    let plain = (gate.as_tensor().silu()? * up.as_tensor())?.sqr()?.sum_all()?.backward()?;
    for variable in [gate.as_tensor(), up.as_tensor()] {
        let pair = (ours.get(variable), plain.get(variable));
        let (Some(ours), Some(plain)) = pair else { panic!("a gradient is missing") };
        let error = (ours - plain)?.abs()?.max_all()?.to_scalar::<f32>()?;
        let size = plain.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(error <= 1e-5 * size, "{error} of {size}");
    }
    Ok(())
}
