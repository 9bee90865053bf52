//! Stored pages on the device against the processor.

use super::device;
use crate::recall::{CASES, Case, PLAIN, STANDING, differing, flat, runs};
use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::PAGE_TOKENS;
use mka_kernels::recall::{Choice, ChoiceRun, Placement, note_share};

#[test]
fn a_choice_on_the_device_is_that_of_the_processor() -> Result<()> {
    let Some(gpu) = device("choice among stored pages") else { return Ok(()) };
    for (i, case) in CASES.iter().enumerate() {
        let made = case.make();
        let on_cpu = case.store(&made, &Device::Cpu)?;
        let on_gpu = case.store(&made, &gpu)?;
        let expected = case.choose(&made, &on_cpu, &Device::Cpu)?;
        let choice = case.choose(&made, &on_gpu, &gpu)?;
        let tokens = choice.tokens(case.g)?;
        // Votes a rounding apart may change places at the thresholds of landmarks and of tokens.
        let off = differing(&tokens, &expected.tokens(case.g)?);
        assert!(off <= 9 * case.g, "case {i}: {off} other tokens");
        assert_eq!(case.choose(&made, &on_gpu, &gpu)?.tokens(case.g)?, tokens, "case {i}");
        if let (Some(own), Some(expected)) = (&choice.recovered, &expected.recovered) {
            let (own, expected) = (flat(own)?[0], flat(expected)?[0]);
            assert!((own - expected).abs() < 2e-3, "case {i}: {own}, expected {expected}");
        }
        for placement in [Placement::Stream(5), Placement::Compact(64)] {
            let (keys, values) = on_gpu.gather(&choice, &made.angles, placement)?;
            let expected = case.gathered(&made, &tokens, placement);
            assert!((flat(&keys)?, flat(&values)?) == expected, "case {i}: copies");
            let all = Choice::all((case.pages - 1) * PAGE_TOKENS);
            let on_cpu = on_cpu.gather(&all, &made.angles, placement)?;
            let on_gpu = on_gpu.gather(&all, &made.angles, placement)?;
            assert!(flat(&on_gpu.0)? == flat(&on_cpu.0)?, "case {i}: all keys");
            assert!(flat(&on_gpu.1)? == flat(&on_cpu.1)?, "case {i}: all values");
        }
    }
    Ok(())
}

#[test]
fn runs_on_the_device_choose_as_on_the_processor() -> Result<()> {
    let Some(gpu) = device("choice of several runs") else { return Ok(()) };
    for (i, (case, runs)) in runs().into_iter().enumerate() {
        let made = case.make();
        let on_cpu = case.store(&made, &Device::Cpu)?;
        let on_gpu = case.store(&made, &gpu)?;
        let expected = case.choose_runs(&made, &on_cpu, &Device::Cpu, 0, &runs)?;
        let choice = case.choose_runs(&made, &on_gpu, &gpu, 0, &runs)?;
        let tokens = choice.tokens(case.g)?;
        let off = differing(&tokens, &expected.tokens(case.g)?);
        assert!(off <= 9 * case.g * runs.len(), "case {i}: {off} other tokens");
        let seen = runs.iter().flat_map(|run| std::iter::repeat_n(run.pages, case.g));
        for (tokens, pages) in tokens.iter().zip(seen) {
            assert!(tokens.iter().all(|token| (*token as usize) < pages * PAGE_TOKENS), "case {i}");
        }
        let pages = case.tokens.div_ceil(PAGE_TOKENS);
        for placement in [Placement::Stream(5), Placement::Compact(64)] {
            let (keys, values) = on_gpu.gather(&choice, &made.angles, placement)?;
            for (run, tokens) in tokens.chunks_exact(case.g).enumerate() {
                let of = |x: &Tensor| flat(&x.narrow(0, run * pages, pages)?);
                let expected = case.gathered(&made, tokens, placement);
                assert!((of(&keys)?, of(&values)?) == expected, "case {i}, run {run}: copies");
            }
        }
    }
    Ok(())
}

#[test]
fn votes_stand_on_the_device_as_on_the_processor() -> Result<()> {
    let Some(gpu) = device("standing votes") else { return Ok(()) };
    for (i, case) in STANDING.iter().enumerate() {
        let made = case.make();
        let on_cpu = case.store(&made, &Device::Cpu)?;
        let on_gpu = case.store(&made, &gpu)?;
        let (before, expected) = case.choose_last(&made, &on_cpu, &Device::Cpu)?;
        let (own_before, choice) = case.choose_last(&made, &on_gpu, &gpu)?;
        // Votes a rounding apart may change places at the thresholds of landmarks and of tokens.
        let off = differing(&own_before, &before);
        assert!(off <= 27 * case.g, "case {i}: {off} other tokens before");
        let off = differing(&choice.tokens(case.g)?, &expected.tokens(case.g)?);
        assert!(off <= 9 * case.g, "case {i}: {off} other tokens");
    }
    Ok(())
}

#[test]
fn named_tokens_are_copied_on_the_device_and_none_is_read_beyond_the_last() -> Result<()> {
    let Some(gpu) = device("named tokens") else { return Ok(()) };
    let case = Case { pages: 3, h: 4, g: 2, d: 16, ..PLAIN };
    let made = case.make();
    let store = case.store(&made, &gpu)?;
    let choice = store.choice_of(&Tensor::new(&[[0u32, 70, 4_000_000_000], [3, 4, 5]], &gpu)?)?;
    let tokens = choice.tokens(case.g)?;
    assert_eq!(tokens, [[0, 70, 191], [3, 4, 5]]);
    let (keys, values) = store.gather(&choice, &made.angles, Placement::Compact(64))?;
    let expected = case.gathered(&made, &tokens, Placement::Compact(64));
    assert!((flat(&keys)?, flat(&values)?) == expected);
    Ok(())
}

/// More logits than are held at once.
#[test]
fn many_runs_over_a_long_stream_choose_as_each_by_itself() -> Result<()> {
    let Some(gpu) = device("choice of many runs") else { return Ok(()) };
    let case =
        Case { pages: 2048, t: 16 * 64, h: 9, g: 3, d: 8, tokens: 2048, every: true, ..PLAIN };
    let made = case.make();
    let store = case.store(&made, &gpu)?;
    let runs: Vec<ChoiceRun> =
        (0..16).map(|i| ChoiceRun { queries: 64, pages: case.pages - 15 + i }).collect();
    let together = case.choose_runs(&made, &store, &gpu, 0, &runs)?.tokens(case.g)?;
    assert_eq!(together.len(), 16 * case.g);
    for (i, run) in runs.iter().enumerate() {
        let alone = case.choose_runs(&made, &store, &gpu, i * 64, &[*run])?;
        assert!(together[i * case.g..(i + 1) * case.g] == alone.tokens(case.g)?, "run {i}");
    }
    Ok(())
}

/// So many queries that their logits are held some at a time, in one run and beside a shorter one.
#[test]
fn queries_of_one_run_vote_in_parts_as_at_once() -> Result<()> {
    let Some(gpu) = device("choice of many queries") else { return Ok(()) };
    let case = Case {
        pages: 2048,
        t: 64,
        h: 9,
        g: 3,
        d: 8,
        tokens: 2048,
        every: true,
        pooled: 1,
        ..PLAIN
    };
    let made = case.make();
    let stores = [Device::Cpu, gpu].map(|device| (case.store(&made, &device), device));
    let run = |queries, pages| ChoiceRun { queries, pages };
    for runs in [vec![run(64, 2048)], vec![run(3, 2047), run(61, 2048)]] {
        let [expected, own] = stores.each_ref().map(|(store, device)| -> Result<_> {
            let store =
                store.as_ref().map_err(|error| candle_core::Error::msg(error.to_string()))?;
            case.choose_runs(&made, store, device, 0, &runs)?.tokens(case.g)
        });
        let off = differing(&own?, &expected?);
        assert!(off <= 20 * case.g * runs.len(), "{runs:?}: {off} other tokens");
    }
    Ok(())
}

#[test]
fn shares_add_up_on_the_device() -> Result<()> {
    let Some(gpu) = device("shares") else { return Ok(()) };
    let sums = Tensor::zeros(41, DType::F32, &gpu)?;
    let own: Vec<f32> = (0..40).map(|i| -(i as f32) / 10.0).collect();
    let lse = Tensor::from_slice(&own, (1, 40), &gpu)?;
    let all = Tensor::zeros((1, 40), DType::F32, &gpu)?;
    let recovered = Tensor::from_slice(&[0.25f32], 1, &gpu)?;
    note_share(&sums, &lse, &all, Some(&recovered))?;
    note_share(&sums, &lse, &all, None)?;
    let sums = flat(&sums)?;
    let near = |(sum, own): (&f32, &f32)| (sum - 2.0 * own.exp()).abs() < 1e-6;
    assert!(sums.iter().zip(&own).all(near) && sums[40] == 0.25, "{sums:?}");
    Ok(())
}
