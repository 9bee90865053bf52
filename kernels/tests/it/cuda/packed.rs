//! Products with packed weights on the device against those of the CPU.

use super::device;
use crate::packed::candle_type;
use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Tensor};
use mka_kernels::{PackedMatrix, PackedType, linear};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Random blocks whose scales are small finite numbers.
fn random_matrix(ty: PackedType, rows: usize, cols: usize) -> PackedMatrix {
    let mut rng = ChaCha8Rng::seed_from_u64(ty.ggml_id().into());
    let values: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-0.5f32..0.5)).collect();
    let plain = Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap();
    let packed = QTensor::quantize(&plain, candle_type(ty)).unwrap();
    let bytes = packed.data().unwrap().into_owned();
    let range = 0..bytes.len();
    PackedMatrix::new(ty, rows, cols, Arc::new(bytes), range).unwrap()
}

#[test]
fn products_with_packed_weights_agree_with_the_cpu() -> Result<()> {
    let Some(gpu) = device("packed linear") else { return Ok(()) };
    let mut worst = 0f32;
    for ty in PackedType::ALL {
        // 576 is no multiple of 256: the width of a small model that only the types of 32 fit.
        let cols = if ty.block_len() == 256 { 1024 } else { 576 };
        let cpu = random_matrix(ty, 48, cols);
        let matrix = cpu.to_device(&gpu)?;
        for m in [1, 2, 8, 9, 65] {
            let x = Tensor::randn(0f32, 1.0, (m, cols), &Device::Cpu)?;
            let expected = linear(&x, &cpu)?.flatten_all()?.to_vec1::<f32>()?;
            let got = linear(&x.to_device(&gpu)?, &matrix)?.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(expected.len(), got.len());
            let error = expected.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            // Rounding x to 8 bits (steps of 1/42 at most) adds 0.05 to a row of 576 products, on either side: six times
            // that is allowed. Prompts are multiplied in f32 on both sides.
            let tolerance = if m > 16 { 1e-3 } else { 0.4 };
            println!("{ty:?}, {m} rows: off by {error}");
            worst = worst.max(error / tolerance);
        }
    }
    assert!(worst < 1.0, "{worst} times the tolerance");
    Ok(())
}
