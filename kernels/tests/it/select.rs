//! Selection of pages against its f64 definition.

use candle_core::{Device, Result, Tensor, Var};
use mka_kernels::{
    PAGE_TOKENS, gather_pages, gather_pages_backward, landmarks, reference, score_landmarks, top_k,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.5f32..1.5)).collect()
}

pub(crate) fn assert_close(name: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*g) - e).abs() <= tolerance * (1.0 + e.abs()), "{name}[{i}]: {g}, {e}");
    }
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

#[test]
fn landmarks_are_the_means_of_the_keys_that_are_there() -> Result<()> {
    for (s, g, d, span) in [(1, 1, 8, 8), (3, 2, 16, 16), (5, 3, 64, 8)] {
        let lens: Vec<usize> = (0..s).map(|i| [64, 0, 13, 8, 57][i % 5]).collect();
        let keys = random(s as u64, s * g * PAGE_TOKENS * d);
        let pool = Tensor::from_slice(&keys, (s, g, PAGE_TOKENS, d), &Device::Cpu)?;
        let expected = reference::landmarks(&keys, (s, g, d), span, &lens);
        assert_close("landmarks", &values(&landmarks(&pool, span, &lens)?)?, &expected, 1e-6);
        assert!(landmarks(&pool, 7, &lens).is_err());
        assert!(landmarks(&pool, span, &[]).is_err());
    }
    Ok(())
}

#[test]
fn each_head_has_one_vote() -> Result<()> {
    for (t, h, g, d, n) in
        [(1, 1, 1, 8, 1), (1, 8, 2, 64, 300), (3, 9, 3, 16, 77), (2, 7, 1, 10, 40)]
    {
        let (q, marks) = (random(1, t * h * d), random(2, n * g * d));
        let expected = reference::score_landmarks(&q, &marks, (t, h, g, d), 0.3);
        let q = Tensor::from_slice(&q, (t, h, d), &Device::Cpu)?;
        let marks = Tensor::from_slice(&marks, (n, g, d), &Device::Cpu)?;
        let votes = score_landmarks(&q, &marks, 0.3)?;
        assert_eq!(votes.dims(), [g, n]);
        assert_close("votes", &values(&votes)?, &expected, 1e-6);
        let total = values(&votes)?.iter().sum::<f32>();
        assert!((total - (t * h) as f32).abs() < 1e-3, "{total}");
    }
    let q = Tensor::zeros((1, 2, 8), candle_core::DType::F32, &Device::Cpu)?;
    let none = Tensor::zeros((0, 2, 8), candle_core::DType::F32, &Device::Cpu)?;
    assert_eq!(score_landmarks(&q, &none, 1.0)?.dims(), [2, 0]);
    Ok(())
}

/// Rows of votes with ties, signs and equal values, and how many to take.
pub(crate) fn vote_rows(n: usize) -> Vec<Vec<f32>> {
    let spread = random(7, n);
    vec![
        spread.clone(),
        spread.iter().map(|x| (x * 3.0).round()).collect(),
        vec![0.25; n],
        spread.iter().map(|x| (x * 20.0).exp()).collect(),
        (0..n).map(|i| if i % 3 == 0 { -0.0 } else { 0.0 }).collect(),
    ]
}

#[test]
fn top_k_equals_a_full_sort() -> Result<()> {
    for n in [1, 2, 33, 1000] {
        let rows = vote_rows(n);
        let flat: Vec<f32> = rows.iter().flatten().copied().collect();
        let votes = Tensor::from_slice(&flat, (rows.len(), n), &Device::Cpu)?;
        for k in [0, 1, n / 2, n] {
            let got = top_k(&votes, k)?.to_vec2::<u32>()?;
            for (row, got) in rows.iter().zip(&got) {
                assert_eq!(*got, reference::top_k(row, k), "n {n} k {k}");
            }
        }
        assert!(top_k(&votes, n + 1).is_err());
    }
    Ok(())
}

#[test]
fn gathered_pages_carry_their_gradient_back_to_their_slots() -> Result<()> {
    let (s, g, d) = (5, 2, 4);
    let pool = random(3, s * g * PAGE_TOKENS * d);
    let pool = Var::from_tensor(&Tensor::from_vec(pool, (s, g, PAGE_TOKENS, d), &Device::Cpu)?)?;
    let slots = [4u32, 0, 3];
    let pages = gather_pages(pool.as_tensor(), &slots)?;
    for (i, slot) in slots.iter().enumerate() {
        assert_eq!(values(&pages.get(i)?)?, values(&pool.get(*slot as usize)?)?);
    }
    let gradients = pages.sqr()?.sum_all()?.backward()?;
    let got = gradients.get(pool.as_tensor()).expect("the pool is a variable of the loss");
    for slot in 0..s {
        let factor = if slots.contains(&(slot as u32)) { 2.0 } else { 0.0 };
        assert_eq!(values(&got.get(slot)?)?, values(&(pool.get(slot)? * factor)?)?);
    }
    assert_eq!(gather_pages(pool.as_tensor(), &[])?.dims(), [0, g, PAGE_TOKENS, d]);
    assert!(gather_pages(pool.as_tensor(), &[5]).is_err());
    assert!(gather_pages_backward(&pages.detach(), &[1, 2, 1], s).is_err());
    Ok(())
}
