//! Selection of pages on the device.

use super::device;
use crate::select::{assert_close, random, vote_rows};
use candle_core::{DType, Device, Result, Tensor, Var};
use mka_kernels::{
    PAGE_TOKENS, gather_pages, gather_pages_backward, landmarks, reference, score_landmarks, top_k,
};

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Half the last place of `dtype` at 1, and what f32 sums cost.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2e-6,
    }
}

#[test]
fn landmarks_on_the_device_are_means() -> Result<()> {
    let Some(gpu) = device("landmarks") else { return Ok(()) };
    for dtype in DTYPES {
        for (s, g, d, span) in [(1, 1, 64, 8), (7, 3, 96, 16), (5, 2, 256, 8)] {
            let lens: Vec<usize> = (0..s).map(|i| [64, 0, 13, 8, 57][i % 5]).collect();
            let keys = Tensor::from_vec(random(1, s * g * 64 * d), (s, g, 64, d), &Device::Cpu)?;
            let keys = keys.to_dtype(dtype)?;
            let expected = reference::landmarks(&values(&keys)?, (s, g, d), span, &lens);
            let got = landmarks(&keys.to_device(&gpu)?, span, &lens)?;
            assert_eq!(got.dims(), [s, g, 64 / span, d]);
            assert_close("landmarks", &values(&got)?, &expected, tolerance(dtype));
        }
    }
    Ok(())
}

#[test]
fn votes_on_the_device_equal_their_definition() -> Result<()> {
    let Some(gpu) = device("votes") else { return Ok(()) };
    for dtype in DTYPES {
        for (t, h, g, d, n) in [
            (1, 1, 1, 64, 1),
            (1, 8, 2, 128, 3000),
            (3, 9, 3, 96, 257),
            (2, 7, 1, 64, 1025),
            (1, 8, 8, 256, 256),
            (5, 4, 1, 8, 100),
        ] {
            let q = Tensor::from_vec(random(1, t * h * d), (t, h, d), &Device::Cpu)?;
            let marks = Tensor::from_vec(random(2, n * g * d), (n, g, d), &Device::Cpu)?;
            let (q, marks) = (q.to_dtype(dtype)?, marks.to_dtype(dtype)?);
            let expected =
                reference::score_landmarks(&values(&q)?, &values(&marks)?, (t, h, g, d), 0.3);
            let (q, marks) = (q.to_device(&gpu)?, marks.to_device(&gpu)?);
            let votes = score_landmarks(&q, &marks, 0.3)?;
            assert_eq!((votes.dims(), votes.dtype()), (&[g, n][..], DType::F32));
            assert_close("votes", &values(&votes)?, &expected, 4e-6);
            let again = score_landmarks(&q, &marks, 0.3)?;
            assert_eq!(values(&votes)?, values(&again)?);
        }
    }
    Ok(())
}

#[test]
fn top_k_on_the_device_equals_a_full_sort() -> Result<()> {
    let Some(gpu) = device("top k") else { return Ok(()) };
    for n in [1, 2, 31, 33, 1000, 5000, 16_384, 16_385, 131_072, 300_007] {
        let rows = vote_rows(n);
        let flat: Vec<f32> = rows.iter().flatten().copied().collect();
        let votes = Tensor::from_slice(&flat, (rows.len(), n), &gpu)?;
        for k in [0, 1, n.min(2048), n / 2, n] {
            let got = top_k(&votes, k)?.to_vec2::<u32>()?;
            for (i, (row, got)) in rows.iter().zip(&got).enumerate() {
                assert!(*got == reference::top_k(row, k), "n {n} k {k} row {i}");
            }
        }
    }
    Ok(())
}

#[test]
fn gathered_pages_on_the_device_are_copies_with_a_gradient() -> Result<()> {
    let Some(gpu) = device("gather of pages") else { return Ok(()) };
    for dtype in DTYPES {
        for (s, g, d) in [(1, 1, 8), (9, 3, 96), (6, 2, 128)] {
            let pool = Tensor::from_vec(random(1, s * g * 64 * d), (s, g, 64, d), &Device::Cpu)?;
            let pool = pool.to_dtype(dtype)?;
            let slots: Vec<u32> = (0..s as u32).rev().step_by(2).collect();
            let expected = gather_pages(&pool, &slots)?;
            let on_gpu = Var::from_tensor(&pool.to_device(&gpu)?)?;
            let pages = gather_pages(on_gpu.as_tensor(), &slots)?;
            assert_eq!(values(&pages)?, values(&expected)?);
            let gradients = pages.sum_all()?.backward()?;
            let got = gradients.get(on_gpu.as_tensor()).expect("the pool is a variable");
            let ones = Tensor::ones((slots.len(), g, PAGE_TOKENS, d), dtype, &Device::Cpu)?;
            assert_eq!(values(got)?, values(&gather_pages_backward(&ones, &slots, s)?)?);
        }
    }
    let pool = Tensor::zeros((2, 1, 64, 8), DType::F32, &gpu)?;
    assert_eq!(gather_pages(&pool, &[])?.dims(), [0, 1, 64, 8]);
    let twice = gather_pages(&pool, &[1, 1])?;
    assert!(gather_pages_backward(&twice, &[1, 1], 2).is_err());
    Ok(())
}
