//! The projected route on the device: its formula, its gradients, its pages.

use super::device;
use super::route::{double, relative_error, same_bits};
use crate::projected::{Case, gradients};
use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::{PAGE_TOKENS, PagePool, RotaryAngles, RouteInputs, route, route_into_pages};

/// (b, t, g, d) and the number of rates.
type Call = ((usize, usize, usize, usize), usize);

/// One chunk and several, padded heads, every compiled number of rates.
const SHAPES: &[Call] = &[
    ((1, 1, 1, 64), 3),
    ((1, 1, 3, 96), 1),
    ((2, 64, 2, 64), 3),
    ((2, 65, 4, 128), 3),
    ((1, 127, 1, 256), 4),
    ((3, 200, 1, 96), 2),
    ((1, 2500, 2, 128), 3),
    ((1, 1100, 8, 64), 4),
    ((2, 2060, 1, 8), 3),
];

/// The call on the device, kv in `dtype`.
pub(super) struct OnDevice {
    kv: Tensor,
    logits: Tensor,
    state: Tensor,
    gate: Tensor,
    bias: Option<Tensor>,
    norm: Option<Tensor>,
}

impl OnDevice {
    pub(super) fn new(case: &Case, dtype: DType, gpu: &Device) -> Result<Self> {
        let optional = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_device(gpu)).transpose();
        Ok(Self {
            kv: case.kv.to_dtype(dtype)?.to_device(gpu)?,
            logits: case.logits.to_device(gpu)?,
            state: case.state.to_device(gpu)?,
            gate: case.gate.to_device(gpu)?,
            bias: optional(&case.bias)?,
            norm: optional(&case.norm)?,
        })
    }

    pub(super) fn inputs(&self) -> RouteInputs<'_> {
        RouteInputs {
            kv: &self.kv,
            logits: &self.logits,
            state: &self.state,
            gate: &self.gate,
            bias: self.bias.as_ref(),
            norm: self.norm.as_ref(),
        }
    }
}

/// `expected` rounded to `dtype`: what a plain version in that type cannot do better than.
fn rounded(expected: &[f64], dtype: DType) -> Result<Vec<f64>> {
    let single: Vec<f32> = expected.iter().map(|x| *x as f32).collect();
    double(&Tensor::from_slice(&single, single.len(), &Device::Cpu)?.to_dtype(dtype)?)
}

#[test]
fn route_on_the_device_is_within_twice_the_rounding_of_its_formula() -> Result<()> {
    let Some(gpu) = device("projected route") else { return Ok(()) };
    for (shape, m) in SHAPES {
        for (dtype, options) in [
            (DType::F32, (0, true, true)),
            (DType::BF16, (10_000, true, false)),
            (DType::F16, (0, false, true)),
            (DType::BF16, (3, true, true)),
        ] {
            let name = format!("{shape:?} {m} rates {dtype:?} {options:?}");
            let case = Case::new(*shape, *m, options);
            let there = OnDevice::new(&case, dtype, &gpu)?;
            let got = route(&there.inputs(), &case.params())?;
            let again = route(&there.inputs(), &case.params())?;
            let expected = case.expected(&case.kv.to_dtype(dtype)?);
            let tensors = [(&got.keys, &again.keys), (&got.values, &again.values)];
            for ((got, again), expected) in tensors.iter().zip(&expected) {
                let plain = relative_error(&rounded(expected, dtype)?, expected);
                let error = relative_error(&double(got)?, expected);
                assert!(error <= 2.0 * plain + 2e-6, "{name}: {error}, plain {plain}");
                assert!(same_bits(got, again)?, "{name}: other bits the second time");
            }
            let error = relative_error(&double(&got.state)?, &expected[2]);
            assert!(error < 1e-5, "{name}: state {error}");
            assert!(same_bits(&got.state, &again.state)?, "{name}: another state");
        }
    }
    Ok(())
}

#[test]
fn gradients_of_the_route_on_the_device_are_those_of_the_cpu() -> Result<()> {
    let Some(gpu) = device("gradients of the projected route") else { return Ok(()) };
    for (shape, m) in SHAPES {
        for (dtype, options) in [
            (DType::F32, (0, true, true)),
            (DType::F32, (7, false, false)),
            (DType::BF16, (3, true, true)),
            (DType::BF16, (3, true, false)),
        ] {
            let name = format!("{shape:?} {m} rates {dtype:?} {options:?}");
            let mut case = Case::new(*shape, *m, options);
            // The CPU computes in f32 from the same rounded inputs.
            case.kv = case.kv.to_dtype(dtype)?.to_dtype(DType::F32)?;
            let (b, t, g, d) = *shape;
            let weight = || {
                Tensor::randn(0f32, 1.0, (b, t, g, d), &Device::Cpu)?
                    .to_dtype(dtype)?
                    .to_dtype(DType::F32)
            };
            let weights = [weight()?, weight()?];
            let weights = [&weights[0], &weights[1]];
            let expected = gradients(&case, weights, DType::F32, &Device::Cpu);
            let got = gradients(&case, weights, dtype, &gpu);
            let again = gradients(&case, weights, dtype, &gpu);
            let names = ["kv", "logits", "state", "gate", "bias", "norm"];
            for (i, part) in names.iter().enumerate() {
                let (Some(got), Some(expected)) = (&got[i], &expected[i]) else {
                    assert_eq!(got[i].is_some(), expected[i].is_some(), "{name}: {part}");
                    continue;
                };
                let expected = double(expected)?;
                let plain = match *part {
                    "kv" => relative_error(&rounded(&expected, dtype)?, &expected),
                    _ => 0.0,
                };
                let error = relative_error(&double(got)?, &expected);
                // Sums over tokens in another order than the CPU's; the gate's is one number that may nearly cancel.
                let sums = if *part == "gate" { 1e-3 } else { 1e-4 };
                assert!(error <= 2.0 * plain + sums, "{name}: {part} {error}, plain {plain}");
                let again = again[i].as_ref().expect("as the first time");
                assert!(same_bits(got, again)?, "{name}: {part}, other bits the second time");
            }
        }
    }
    Ok(())
}

#[test]
fn pages_on_the_device_hold_what_the_tensors_hold() -> Result<()> {
    let Some(gpu) = device("projected route into pages") else { return Ok(()) };
    for (t, g, d, offset) in [(1, 3, 64, 63), (200, 2, 128, 40), (130, 1, 96, 0), (70, 4, 16, 5)] {
        let case = Case::new((1, t, g, d), 3, (offset as u64, true, true));
        let there = OnDevice::new(&case, DType::F32, &gpu)?;
        let got = route(&there.inputs(), &case.params())?;
        let count = (offset + t).div_ceil(PAGE_TOKENS);
        let slots: Vec<usize> = (0..count).map(|i| (i * 5 + 3) % 7).collect();
        let (pool, appended) = (PagePool::new(7, g, d, &gpu)?, PagePool::new(7, g, d, &gpu)?);
        let on_cpu = PagePool::new(7, g, d, &Device::Cpu)?;
        let state = route_into_pages(&there.inputs(), &case.params(), &pool, &slots, offset)?;
        assert!(same_bits(&state, &got.state)?);
        let by_token = |pool: &Tensor| -> Result<Tensor> {
            let rows: Result<Vec<Tensor>> = (offset..offset + t)
                .map(|i| pool.get(slots[i / PAGE_TOKENS])?.narrow(1, i % PAGE_TOKENS, 1))
                .collect();
            Tensor::cat(&rows?, 1)?.transpose(0, 1)?.contiguous()
        };
        let (keys, values) = (got.keys.get(0)?, got.values.get(0)?);
        assert!(same_bits(&by_token(&pool.keys)?, &keys)?, "{t} {g} {d}: keys");
        assert!(same_bits(&by_token(&pool.values)?, &values)?, "{t} {g} {d}: values");
        let raw = by_token(&pool.raw_keys)?;
        appended.append(&slots, offset, &raw, &values, &case.angles)?;
        on_cpu.append(
            &slots,
            offset,
            &raw.to_device(&Device::Cpu)?,
            &values.to_device(&Device::Cpu)?,
            &case.angles,
        )?;
        for (pool, expected) in [
            (&appended.keys, &on_cpu.keys),
            (&appended.raw_keys, &on_cpu.raw_keys),
            (&appended.values, &on_cpu.values),
        ] {
            assert!(same_bits(pool, expected)?, "{t} {g} {d}: append");
        }
    }
    Ok(())
}

#[test]
fn more_pages_than_a_launch_takes_are_appended_to() -> Result<()> {
    let Some(gpu) = device("append to many pages") else { return Ok(()) };
    let (t, d, offset) = (257 * PAGE_TOKENS + 5, 64, 3);
    let numbers: Vec<f32> = (0..2 * t * d).map(|i| ((i % 100_003) as f32 * 0.37).sin()).collect();
    let both = Tensor::from_vec(numbers, (2, t, 1, d), &Device::Cpu)?;
    let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.8f64.powi(i as i32)).collect();
    let angles = RotaryAngles::new(offset as u64..(offset + t) as u64, &frequencies, 1.0);
    let slots: Vec<usize> = (0..(offset + t).div_ceil(PAGE_TOKENS)).map(|i| i * 7 % 300).collect();
    let appended = |device: &Device| -> Result<PagePool> {
        let pool = PagePool::new(300, 1, d, device)?;
        let both = both.to_device(device)?;
        pool.append(&slots, offset, &both.get(0)?, &both.get(1)?, &angles)?;
        Ok(pool)
    };
    let (own, expected) = (appended(&gpu)?, appended(&Device::Cpu)?);
    assert!(same_bits(&own.keys, &expected.keys)?, "keys");
    assert!(same_bits(&own.raw_keys, &expected.raw_keys)?, "raw keys");
    assert!(same_bits(&own.values, &expected.values)?, "values");
    Ok(())
}
