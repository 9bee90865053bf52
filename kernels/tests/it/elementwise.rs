//! Gated products on the processor against f64.

use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::{gelu_mul, silu_mul};

#[test]
fn gated_products_are_within_rounding_of_f64() -> Result<()> {
    let silu = |g: f64| g / (1.0 + (-g).exp());
    let gelu = |g: f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
        0.5 * g * (1.0 + inner.tanh())
    };
    // No value, one, an odd number, and more than one task takes.
    for (rows, cols) in [(0, 5), (1, 1), (3, 1537), (2, 20_000)] {
        let values = |frequency: f32| -> Vec<f32> {
            (0..rows * cols).map(|i| 12.0 * (i as f32 * frequency).sin()).collect()
        };
        let (gate, up) = (values(0.37), values(0.11));
        let tensor = |values: &[f32]| Tensor::from_slice(values, (rows, cols), &Device::Cpu);
        let (g, u) = (tensor(&gate)?, tensor(&up)?);
        let cases = [("silu_mul", silu_mul(&g, &u)?), ("gelu_mul", gelu_mul(&g, &u)?)];
        for (op, found) in cases {
            let exact = |x| if op == "silu_mul" { silu(x) } else { gelu(x) };
            let found = found.flatten_all()?.to_vec1::<f32>()?;
            for ((g, u), found) in gate.iter().zip(&up).zip(found) {
                let expected = exact(f64::from(*g)) * f64::from(*u);
                let error = (f64::from(found) - expected).abs();
                assert!(error <= 2e-6 * (1.0 + expected.abs()), "{op} of {g} and {u}: {found}");
            }
        }
    }
    let [two, three] = [2usize, 3].map(|len| Tensor::zeros(len, DType::F32, &Device::Cpu));
    let error = gelu_mul(&two?, &three?).unwrap_err().to_string();
    assert!(error.contains("gelu_mul") && error.contains("[3]"), "{error}");
    Ok(())
}
