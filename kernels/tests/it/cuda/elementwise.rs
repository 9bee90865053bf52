//! silu(gate) · up on the device.

use super::device;
use candle_core::{DType, Device, Result, Tensor, Var};
use mka_kernels::silu_mul;

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
