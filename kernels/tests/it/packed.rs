//! Packed matrices against the obvious form, against candle's own quantised types, and against bad input.
//! Knows the public API only.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use mka_kernels::ErrorKind;
use mka_kernels::packed::{PackedMatrix, PackedType, SimdLevel, linear, reference};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEED: u64 = 20;

pub(crate) fn candle_type(ty: PackedType) -> GgmlDType {
    match ty {
        PackedType::F32 => GgmlDType::F32,
        PackedType::F16 => GgmlDType::F16,
        PackedType::BF16 => GgmlDType::BF16,
        PackedType::Q4_0 => GgmlDType::Q4_0,
        PackedType::Q4_1 => GgmlDType::Q4_1,
        PackedType::Q5_0 => GgmlDType::Q5_0,
        PackedType::Q5_1 => GgmlDType::Q5_1,
        PackedType::Q8_0 => GgmlDType::Q8_0,
        PackedType::Q2K => GgmlDType::Q2K,
        PackedType::Q3K => GgmlDType::Q3K,
        PackedType::Q4K => GgmlDType::Q4K,
        PackedType::Q5K => GgmlDType::Q5K,
        PackedType::Q6K => GgmlDType::Q6K,
        other => panic!("no candle type for {other:?}"),
    }
}

fn normal(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    // A sum of uniform values is close enough to a normal one and stays bounded.
    (0..len).map(|_| (0..6).map(|_| rng.random_range(-0.5f32..0.5)).sum()).collect()
}

/// A random weight, as ours and as candle's.
fn weight(
    ty: PackedType,
    rows: usize,
    cols: usize,
    rng: &mut ChaCha8Rng,
) -> (PackedMatrix, Arc<QTensor>) {
    let values = Tensor::from_vec(normal(rng, rows * cols), (rows, cols), &Device::Cpu).unwrap();
    let candle = QTensor::quantize(&values, candle_type(ty)).unwrap();
    // Off by one byte from any alignment, as a tensor in a mapped file may be.
    let mut bytes = vec![0xff];
    bytes.extend_from_slice(&candle.data().unwrap());
    let range = 1..bytes.len();
    (PackedMatrix::new(ty, rows, cols, Arc::new(bytes), range).unwrap(), Arc::new(candle))
}

fn has_integer_form(ty: PackedType) -> bool {
    !matches!(
        ty,
        PackedType::F32 | PackedType::F16 | PackedType::BF16 | PackedType::Q2K | PackedType::Q3K
    )
}

/// Root mean square of the difference.
fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - b).powi(2)).sum();
    (sum / a.len().max(1) as f64).sqrt()
}

fn doubles(a: &[f32]) -> Vec<f64> {
    a.iter().copied().map(f64::from).collect()
}

fn size(a: &[f64]) -> f64 {
    (a.iter().map(|a| a * a).sum::<f64>() / a.len().max(1) as f64).sqrt()
}

#[test]
fn dequantised_values_equal_candle_and_the_reference_exactly() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for ty in PackedType::ALL {
        for (rows, cols) in [(1, 256), (3, 512), (5, 768)] {
            let (w, candle) = weight(ty, rows, cols, &mut rng);
            let expected = candle.dequantize(&Device::Cpu).unwrap();
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
            let mut got = vec![f32::NAN; rows * cols];
            w.dequantize_rows(0..rows, &mut got).unwrap();
            assert_eq!(got, expected, "{ty:?} {rows} x {cols}");
            assert_eq!(reference::dequantize_rows(&w, 0..rows).unwrap(), expected, "{ty:?}");

            let mut last = vec![f32::NAN; cols];
            w.dequantize_rows(rows - 1..rows, &mut last).unwrap();
            assert_eq!(last, expected[(rows - 1) * cols..], "{ty:?} last row");
        }
    }
}

#[test]
fn products_are_as_close_as_candle_at_every_level_and_shape() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 1);
    for ty in PackedType::ALL {
        let block = ty.block_len().max(8);
        for (rows, cols) in [(1, block), (7, 2 * block), (3, 3 * block), (33, 512), (130, 1024)] {
            let (w, candle) = weight(ty, rows, cols, &mut rng);
            for m in [0, 1, 2, 3, 4, 5, 8, 9, 17, 64, 130] {
                if rows > 100 && m > 5 && m != 17 {
                    continue;
                }
                let x = normal(&mut rng, m * cols);
                let exact = reference::matmul(&w, &x, m).unwrap();
                // candle asserts an even number of blocks in debug builds: then the rounding of x, 0.5 %, bounds the error.
                let weights = reference::dequantize_rows(&w, 0..rows).unwrap();
                let typical = size(&doubles(&x)) * size(&doubles(&weights)) * (cols as f64).sqrt();
                let candle_error = if m == 0 || cols / block % 2 == 1 {
                    5e-3 * typical
                } else {
                    let x = Tensor::from_slice(&x, (m, cols), &Device::Cpu).unwrap();
                    let out = QMatMul::QTensor(candle.clone()).forward(&x).unwrap();
                    distance(&out.flatten_all().unwrap().to_vec1().unwrap(), &exact)
                };
                for level in SimdLevel::available() {
                    let mut out = vec![f32::NAN; m * rows];
                    w.matmul_at(level, &x, m, &mut out).unwrap();
                    let error = distance(&out, &exact);
                    let float_bound = 1e-5 * typical;
                    let bound = if has_integer_form(ty) && m <= 64 {
                        // Of a handful of products one may round luckily: allow 1 % of the result.
                        let few = if m * rows < 16 { 1e-2 * typical } else { 0.0 };
                        (2.0 * candle_error).max(float_bound).max(few)
                    } else {
                        float_bound
                    };
                    assert!(
                        error <= bound,
                        "{ty:?} {level:?} {rows} x {cols}, m {m}: error {error:e}, bound {bound:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn levels_agree_on_the_same_input() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 2);
    for ty in PackedType::ALL {
        let (w, _) = weight(ty, 37, 1024, &mut rng);
        for m in [1, 2, 3, 4, 5, 33] {
            let x = normal(&mut rng, m * w.cols());
            let mut portable = vec![0.0; m * w.rows()];
            w.matmul_at(SimdLevel::Portable, &x, m, &mut portable).unwrap();
            let portable = doubles(&portable);
            for level in SimdLevel::available() {
                let mut out = vec![0.0; m * w.rows()];
                w.matmul_at(level, &x, m, &mut out).unwrap();
                // The crossover between integers and floats may differ between levels; one per cent covers the rounding of x.
                let bound = if has_integer_form(ty) { 1e-2 } else { 1e-5 } * size(&portable);
                assert!(distance(&out, &portable) <= bound, "{ty:?} {level:?} m {m}");
            }
        }
    }
}

#[test]
fn a_row_of_x_gives_the_same_bits_alone_and_among_few() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 3);
    for ty in PackedType::ALL {
        let (w, _) = weight(ty, 29, 768, &mut rng);
        for level in SimdLevel::available() {
            for m in [2, 3, 4, 7, 16] {
                if m > 4 && (level == SimdLevel::Portable || !has_integer_form(ty)) {
                    continue;
                }
                let x = normal(&mut rng, m * w.cols());
                let mut together = vec![0.0; m * w.rows()];
                w.matmul_at(level, &x, m, &mut together).unwrap();
                for (x, together) in x.chunks(w.cols()).zip(together.chunks(w.rows())) {
                    let mut alone = vec![0.0; w.rows()];
                    w.matmul_at(level, x, 1, &mut alone).unwrap();
                    assert_eq!(alone, together, "{ty:?} {level:?} m {m}");
                }
            }
        }
    }
}

#[test]
fn repeated_products_give_the_same_bits_on_any_number_of_threads() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 4);
    for ty in [PackedType::Q4_1, PackedType::Q6K, PackedType::F16] {
        let (w, _) = weight(ty, 1030, 512, &mut rng);
        for m in [1, 3, 40] {
            let x = normal(&mut rng, m * w.cols());
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0.0; m * w.rows()];
                pool.install(|| w.matmul(&x, m, &mut out).unwrap());
                out
            };
            let once = run(1);
            for threads in [1, 2, 3] {
                assert_eq!(run(threads), once, "{ty:?} m {m}, {threads} threads");
            }
        }
    }
}

#[test]
fn bad_shapes_are_errors_that_name_them() {
    let bytes: Arc<Vec<u8>> = Arc::new(vec![0; 180]);
    let new =
        |rows, cols, range| PackedMatrix::new(PackedType::Q4_0, rows, cols, bytes.clone(), range);
    for (result, text) in [
        (new(1, 33, 0..18), "whole blocks of 32"),
        (new(10, 32, 0..179), "expected 180 bytes"),
        (new(10, 32, 1..181), "a buffer of 180"),
        (new(usize::MAX, 64, 0..18), "does not fit"),
        #[allow(clippy::reversed_empty_ranges)]
        (new(1, 32, 18..0), "a buffer of 180"),
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(text), "{error}");
    }
    let w = new(10, 32, 0..180).unwrap();
    assert!(w.matmul(&[0.0; 31], 1, &mut [0.0; 10]).is_err());
    assert!(w.matmul(&[0.0; 32], 1, &mut [0.0; 9]).is_err());
    assert!(w.matmul(&[0.0; 32], usize::MAX, &mut [0.0; 10]).is_err());
    assert!(w.dequantize_rows(9..11, &mut [0.0; 64]).is_err());
    assert!(w.dequantize_rows(0..1, &mut [0.0; 31]).is_err());
    assert!(w.permute_rows(&[0, 10]).is_err());
    assert!(w.row(usize::MAX).is_err());
    assert!(PackedType::from_ggml_id(9).is_err());
}

#[test]
fn empty_matrices_give_empty_or_zero_results() {
    let none: Arc<Vec<u8>> = Arc::new(Vec::new());
    let no_rows = PackedMatrix::new(PackedType::Q4K, 0, 256, none.clone(), 0..0).unwrap();
    no_rows.matmul(&[1.0; 512], 2, &mut []).unwrap();
    let no_cols = PackedMatrix::new(PackedType::Q4K, 3, 0, none, 0..0).unwrap();
    let mut out = [f32::NAN; 6];
    no_cols.matmul(&[], 2, &mut out).unwrap();
    assert_eq!(out, [0.0; 6]);
}

#[test]
fn permuted_rows_come_in_the_order_asked() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 5);
    let (w, _) = weight(PackedType::Q5_0, 6, 64, &mut rng);
    let order = [5, 0, 0, 3];
    let permuted = w.permute_rows(&order).unwrap();
    assert_eq!(permuted.rows(), order.len());
    for (to, &from) in order.iter().enumerate() {
        assert_eq!(permuted.row(to).unwrap(), w.row(from).unwrap());
    }
}

#[test]
fn selected_rows_and_columns_decode_to_those_of_the_whole() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 9);
    let (rows, cols) = (5, 768);
    for ty in PackedType::ALL {
        let (w, _) = weight(ty, rows, cols, &mut rng);
        let mut whole = vec![0f32; rows * cols];
        w.dequantize_rows(0..rows, &mut whole).unwrap();
        let some = w.select_rows(1..4).unwrap();
        let mut decoded = vec![0f32; 3 * cols];
        some.dequantize_rows(0..3, &mut decoded).unwrap();
        assert_eq!(decoded, whole[cols..4 * cols], "{ty:?}");
        // Of whole blocks of every type, of whole blocks of some, and of none.
        for columns in [256..768, 0..256, 32..480, 1..66, 700..768, 5..5] {
            let part = w.select_columns(columns.clone()).unwrap();
            let is_whole = columns.start.is_multiple_of(ty.block_len())
                && columns.end.is_multiple_of(ty.block_len());
            assert_eq!(part.ty(), if is_whole { ty } else { PackedType::F32 });
            let mut decoded = vec![0f32; rows * columns.len()];
            part.dequantize_rows(0..rows, &mut decoded).unwrap();
            let expected: Vec<f32> =
                whole.chunks(cols).flat_map(|row| row[columns.clone()].to_vec()).collect();
            assert_eq!(decoded, expected, "{ty:?} {columns:?}");
        }
        // A part of a part, whose bytes begin inside the whole's.
        let row = some.select_rows(2..3).unwrap();
        assert_eq!(row.row(0).unwrap(), w.row(3).unwrap());
        assert!(w.select_rows(4..6).is_err());
        assert!(w.select_columns(700..769).is_err());
    }
}

#[test]
fn linear_takes_any_leading_dimensions_and_strides() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 6);
    let (w, _) = weight(PackedType::Q8_0, 5, 64, &mut rng);
    let x = Tensor::from_vec(normal(&mut rng, 64 * 6), (2, 64, 3), &Device::Cpu).unwrap();
    let x = x.transpose(1, 2).unwrap();
    let out = linear(&x, &w).unwrap();
    assert_eq!(out.dims(), [2, 3, 5]);
    let flat: Vec<f32> = x.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let mut expected = vec![0.0; 30];
    w.matmul(&flat, 6, &mut expected).unwrap();
    assert_eq!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected);

    let narrow = x.narrow(2, 0, 32).unwrap();
    assert!(linear(&narrow, &w).is_err());
    assert!(linear(&Tensor::new(1f32, &Device::Cpu).unwrap(), &w).is_err());
    assert!(linear(&x.to_dtype(candle_core::DType::F64).unwrap(), &w).is_err());
}

#[test]
fn values_that_are_not_finite_are_not_hidden() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 7);
    for ty in PackedType::ALL {
        let (w, _) = weight(ty, 8, 512, &mut rng);
        for level in SimdLevel::available() {
            for bad in [f32::NAN, f32::INFINITY] {
                for m in [1, 20] {
                    let mut x = normal(&mut rng, m * w.cols());
                    x[300] = bad;
                    let mut out = vec![0.0; m * w.rows()];
                    w.matmul_at(level, &x, m, &mut out).unwrap();
                    let first = &out[..w.rows()];
                    assert!(first.iter().any(|v| !v.is_finite()), "{ty:?} {level:?} m {m} {bad}");
                    assert!(out[w.rows()..].iter().all(|v| v.is_finite()), "{ty:?} {level:?}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Blocks from a file hold any bytes: decoding equals the reference bit for bit and products do not panic.
    #[test]
    fn any_bytes_decode_as_the_reference_says(
        type_idx in 0..PackedType::ALL.len(),
        rows in 1usize..4,
        blocks in 1usize..4,
        seed in any::<u64>(),
    ) {
        let ty = PackedType::ALL[type_idx];
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let bytes: Vec<u8> = (0..rows * blocks * ty.block_bytes()).map(|_| rng.random()).collect();
        let range = 0..bytes.len();
        let cols = blocks * ty.block_len();
        let w = PackedMatrix::new(ty, rows, cols, Arc::new(bytes), range).unwrap();
        let mut got = vec![0.0; rows * cols];
        w.dequantize_rows(0..rows, &mut got).unwrap();
        let expected = reference::dequantize_rows(&w, 0..rows).unwrap();
        for (got, expected) in got.iter().zip(&expected) {
            prop_assert!(got == expected || got.is_nan() && expected.is_nan(), "{ty:?}: {got} {expected}");
        }
        for level in SimdLevel::available() {
            for m in [1, 3, 9] {
                let x = normal(&mut rng, m * cols);
                w.matmul_at(level, &x, m, &mut vec![0.0; m * rows]).unwrap();
            }
        }
    }
}
