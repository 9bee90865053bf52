//! The CUDA side of every op against its f64 reference. Skipped, with the reason printed, where there is no device.

mod attention;
mod decode;
mod elementwise;
mod flash;
mod packed;
mod paged;
mod projected;
mod recall;
mod rope;
mod route;
mod select;
mod tape;

use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::{
    AttentionParams, PAGE_TOKENS, PageRef, RotaryAngles, ema_advance, ema_scan, paged_attention,
    rotate,
};
use std::sync::Arc;

/// The device, its outputs poisoned; None, with a line that says so, where there is none.
fn device(test: &str) -> Option<Device> {
    mka_kernels::cuda::poison_outputs(true);
    match mka_kernels::cuda::open(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("{test}: skipped: no CUDA device: {error}");
            None
        }
    }
}

/// What keeps numbers from launch to launch: counters of arrivals, flags of a look-back, page lists and rates.
fn used(gpu: &Device) -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, gpu);
    let page = |i: usize| PageRef {
        slot: i % 2,
        start: (i * PAGE_TOKENS) as u64,
        len: PAGE_TOKENS,
        bias: 0.0,
    };
    let params = AttentionParams {
        scale: 0.125,
        query_start: 300 * PAGE_TOKENS as u64,
        pages: (0..300).map(page).collect(),
        ..AttentionParams::default()
    };
    let pool = zeros(&[2, 1, PAGE_TOKENS, 64])?;
    let state = paged_attention(&zeros(&[1, 2, 64])?, &pool, &pool, &params)?;
    assert_eq!(state.out.flatten_all()?.to_vec1::<f32>()?, [0.0; 128]);
    let (x, state) = (zeros(&[5, 8])?, zeros(&[2, 8])?);
    ema_scan(&x, &state, &[0.5, 0.9], 0, true)?;
    ema_advance(&x, &state, &[0.5, 0.9])?;
    let case = crate::projected::Case::new((1, 2500, 2, 64), 3, (0, true, true));
    let there = projected::OnDevice::new(&case, DType::F32, gpu)?;
    mka_kernels::route(&there.inputs(), &case.params())?;
    let angles = RotaryAngles::new(0..5, &[1.0, 0.1, 0.01, 0.001], 1.0);
    rotate(&zeros(&[5, 1, 8])?, &angles)?;
    Ok(())
}

#[test]
fn nothing_keeps_a_device_open_that_was_used_and_dropped() -> Result<()> {
    for _ in 0..2 {
        let Some(gpu) = device("dropped devices") else { return Ok(()) };
        let other = device("dropped devices").expect("a second one on the card");
        used(&gpu)?;
        used(&other)?;
        let held = Arc::downgrade(&gpu.as_cuda_device()?.cublas_handle());
        drop(gpu);
        assert_eq!(held.strong_count(), 0);
        // The other one goes on, with what is its own.
        used(&other)?;
    }
    Ok(())
}
