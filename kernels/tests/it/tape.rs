//! The tape and its ops against candle's own graph in f64, on the CPU; `cuda/tape.rs` runs the same checks on a device.

use std::cell::RefCell;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use mka_kernels::tape::ops::{self, Projection, RouteRest};
use mka_kernels::tape::{self, Value};
use mka_kernels::{
    DenseAttentionParams, ProductOptions, RotaryAngles, RouteInputs, RouteParams, cross_entropy,
    product, rms_norm_backward, rms_norm_forward, rotate, route,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEED: u64 = 31;

/// Normal values of variance 1 (Box and Muller), the same at every run: candle's cannot be seeded on the CPU.
fn normal(rng: &mut ChaCha8Rng, shape: &[usize]) -> Result<Tensor> {
    let values = (0..shape.iter().product()).map(|_| {
        let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
        radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
    });
    Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu)
}

/// Where a check runs, and how far its results may be off, as a share of the largest.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    pub(crate) bound: f64,
    rng: RefCell<ChaCha8Rng>,
}

impl Place {
    pub(crate) fn cpu() -> Self {
        Self::new(Device::Cpu, DType::F32, 1e-5)
    }

    pub(crate) fn new(device: Device, dtype: DType, bound: f64) -> Self {
        Self { device, dtype, bound, rng: RefCell::new(ChaCha8Rng::seed_from_u64(SEED)) }
    }

    fn random(&self, shape: &[usize]) -> Result<Tensor> {
        normal(&mut self.rng.borrow_mut(), shape)?.to_dtype(self.dtype)
    }

    fn same(&self, what: &str, found: &Tensor, expected: &Tensor) -> Result<()> {
        let wide = |x: &Tensor| -> Result<Vec<f64>> {
            x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
        };
        assert_eq!(found.dims(), expected.dims(), "{what}");
        let (found, expected) = (wide(found)?, wide(expected)?);
        let largest = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let error = (found - expected).abs();
            // NaN is no small error.
            assert!(
                error <= self.bound * (largest + 1e-2),
                "{what} in {:?}: {found} at {i}, expected {expected}",
                self.dtype
            );
        }
        Ok(())
    }

    /// What `on_tape` makes of variables of `shapes`, and their gradients, against `plain` in f64.
    fn check(
        &self,
        what: &str,
        shapes: &[&[usize]],
        on_tape: impl Fn(&[Tensor]) -> Result<Value>,
        plain: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        let (mut narrow, mut wide) = (Vec::new(), Vec::new());
        for shape in shapes {
            let x = self.random(shape)?;
            narrow.push(Var::from_tensor(&x.to_device(&self.device)?)?.as_tensor().clone());
            wide.push(Var::from_tensor(&x.to_dtype(DType::F64)?)?.as_tensor().clone());
        }
        let (found, expected) = (on_tape(&narrow)?, plain(&wide)?);
        self.same(what, found.tensor(), &expected)?;
        let gradient = self.random(expected.dims())?;
        let of = gradient.to_dtype(found.tensor().dtype())?.to_device(&self.device)?;
        let mut found = tape::backward(&found, &of)?;
        let expected = (expected * gradient.to_dtype(DType::F64)?)?.backward()?;
        for (i, (narrow, wide)) in narrow.iter().zip(&wide).enumerate() {
            let (Some(found), Some(expected)) = (found.remove(narrow), expected.get(wide)) else {
                panic!("{what}: no gradient of input {i}");
            };
            self.same(&format!("{what}: gradient of input {i}"), &found, expected)?;
        }
        Ok(())
    }
}

fn plain_silu(x: &Tensor) -> Result<Tensor> {
    x * (x.neg()?.exp()? + 1.0)?.recip()?
}

fn plain_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + 1e-5)?.sqrt()?)?.broadcast_mul(weight)
}

pub(crate) fn projections(place: &Place) -> Result<()> {
    // Not of single elements: a gradient that is one sum can be small by chance, and its bound is a share of itself.
    for (n, inner, first, rank) in [(1, 8, 3, 1), (3, 8, 5, 2), (70, 64, 48, 16), (300, 136, 40, 4)]
    {
        let second = first / 2 + 1;
        let all = first + second;
        place.check(
            &format!("projections {n} {inner} {first} {rank}"),
            &[
                &[n, inner],
                &[all, inner],
                &[first, inner],
                &[second, inner],
                &[rank, inner],
                &[all, rank],
            ],
            |x| {
                let one =
                    Projection { adapter: Some((&x[4], &x[5], 0.5)), ..Projection::plain(&x[1]) };
                let two = [Projection::plain(&x[2]), Projection::plain(&x[3])];
                let out = ops::project(&Value::of(&x[0]), &[&[one], &two])?;
                ops::silu_mul(&out[0], &out[1])
            },
            |x| {
                let low = x[0].matmul(&x[4].t()?)?.matmul(&x[5].t()?)?;
                let one = (x[0].matmul(&x[1].t()?)? + (low * 0.5)?)?;
                let two = Tensor::cat(&[x[0].matmul(&x[2].t()?)?, x[0].matmul(&x[3].t()?)?], 1)?;
                plain_silu(&one)? * two
            },
        )?;
        // Adapters in a group, and a projection that is used twice.
        place.check(
            &format!("adapters side by side {n} {inner} {first} {rank}"),
            &[&[n, inner], &[first, inner], &[rank, inner], &[first, rank]],
            |x| {
                let part =
                    Projection { adapter: Some((&x[2], &x[3], -1.5)), ..Projection::plain(&x[1]) };
                Ok(ops::project(&Value::of(&x[0]), &[&[part, part]])?.remove(0))
            },
            |x| {
                let low = x[0].matmul(&x[2].t()?)?.matmul(&x[3].t()?)?;
                let one = (x[0].matmul(&x[1].t()?)? + (low * -1.5)?)?;
                Tensor::cat(&[&one, &one], 1)
            },
        )?;
    }
    Ok(())
}

pub(crate) fn norms(place: &Place) -> Result<()> {
    for (n, c) in
        [(1, 5), (5, 7), (3, 64), (300, 576), (2, 1024), (70, 1028), (9, 2050), (65, 3584)]
    {
        place.check(
            &format!("norm after a sum {n} {c}"),
            &[&[n, c], &[n, c], &[c]],
            |x| {
                let (a, b) = (Value::of(&x[0]), Value::of(&x[1]));
                let (sum, normed) = ops::norm(&a, Some(&b), Some(&x[2]), 1e-5)?;
                ops::add(&sum, &normed)
            },
            |x| {
                let sum = (&x[0] + &x[1])?;
                plain_norm(&sum, &x[2])? + sum
            },
        )?;
        let ones = Tensor::ones(c, DType::F64, &Device::Cpu)?;
        place.check(
            &format!("norm alone {n} {c}"),
            &[&[n, c]],
            |x| Ok(ops::norm(&Value::of(&x[0]), None, None, 1e-5)?.1),
            |x| plain_norm(&x[0], &ones),
        )?;
    }
    Ok(())
}

pub(crate) fn gates_and_biases(place: &Place) -> Result<()> {
    for (n, c) in [(1, 1), (3, 7), (5, 33), (70, 64), (129, 1537)] {
        let what = |name: &str| format!("{name} {n} {c}");
        place.check(
            &what("silu_mul"),
            &[&[n, c], &[n, c]],
            |x| ops::silu_mul(&Value::of(&x[0]), &Value::of(&x[1])),
            |x| plain_silu(&x[0])? * &x[1],
        )?;
        place.check(
            &what("silu_bias"),
            &[&[n, c], &[c]],
            |x| ops::silu_bias(&Value::of(&x[0]), &x[1]),
            |x| plain_silu(&x[0].broadcast_add(&x[1])?),
        )?;
        place.check(
            &what("add_bias, reshape, cast, concat"),
            &[&[n, c], &[c]],
            |x| {
                let (a, b) = (Value::of(&x[0]), Value::of(&x[1]));
                let sum = ops::cast(&ops::add_bias(&a, &x[1])?, DType::F32)?;
                ops::concat(&[&ops::reshape(&sum, n * c)?, &ops::cast(&b, DType::F32)?])
            },
            |x| Tensor::cat(&[&x[0].broadcast_add(&x[1])?.flatten_all()?, &x[1]], 0),
        )?;
    }
    Ok(())
}

pub(crate) fn attention_and_rotation(place: &Place) -> Result<()> {
    let (b, t, h, g, d) = (2, 70, 4, 2, 64);
    let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.7f64.powi(i as i32)).collect();
    let angles = RotaryAngles::new((0..b).flat_map(|_| 0..t as u64), &frequencies, 1.0);
    let params = DenseAttentionParams { scale: 0.125, causal: true, window: None };
    let rotation = |x: &Tensor| -> Result<Tensor> {
        let angle = |of: fn(f64) -> f64| {
            let all: Vec<f64> = (0..b * t)
                .flat_map(|i| frequencies.iter().map(move |f| of((i % t) as f64 * f)))
                .collect();
            Tensor::from_vec(all, (b * t, 1, d / 2), &Device::Cpu)
        };
        let (cos, sin) = (angle(f64::cos)?, angle(f64::sin)?);
        let (low, high) = (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?);
        let turned = |x: &Tensor, y: &Tensor| x.broadcast_mul(&cos)? + y.broadcast_mul(&sin)?;
        Tensor::cat(&[turned(&low, &high.neg()?)?, turned(&high, &low)?], 2)
    };
    let mask: Vec<f64> = (0..t)
        .flat_map(|i| (0..t).map(move |j| if j > i { f64::NEG_INFINITY } else { 0.0 }))
        .collect();
    let mask = Tensor::from_vec(mask, (1, t, t), &Device::Cpu)?;
    place.check(
        "rotation and attention",
        &[&[b * t, h, d], &[b * t, g, d], &[b * t, g, d]],
        |x| {
            let q = ops::reshape(&ops::rotated(&Value::of(&x[0]), &angles)?, (b, t, h, d))?;
            let k = ops::reshape(&ops::rotated(&Value::of(&x[1]), &angles)?, (b, t, g, d))?;
            let v = ops::reshape(&Value::of(&x[2]), (b, t, g, d))?;
            ops::attention(&q, &k, &v, &params)
        },
        |x| {
            let heads = |x: Tensor, each: usize| -> Result<Tensor> {
                // (b·t, g, d) -> (b·h, t, d), every head of keys for its queries.
                let x =
                    x.reshape((b, t, h / each, 1, d))?.broadcast_as((b, t, h / each, each, d))?;
                x.reshape((b, t, h, d))?.transpose(1, 2)?.reshape((b * h, t, d))
            };
            let q = heads(rotation(&x[0])?, 1)?;
            let (k, v) = (heads(rotation(&x[1])?, h / g)?, heads(x[2].clone(), h / g)?);
            let scores = (q.matmul(&k.t()?)? * 0.125)?.broadcast_add(&mask)?.exp()?;
            let weights = scores.broadcast_div(&scores.sum_keepdim(2)?)?;
            weights.matmul(&v)?.reshape((b, h, t, d))?.transpose(1, 2)?.contiguous()
        },
    )
}

pub(crate) fn losses(place: &Place) -> Result<()> {
    for (n, words) in [(1, 1), (3, 7), (5, 512), (2, 4099), (3, 49_152)] {
        let logits = (place.random(&[n, words])? * 3.0)?;
        let ids: Vec<u32> = (0..n).map(|i| ((i * 977 + words - 1) % words) as u32).collect();
        let wide = Var::from_tensor(&logits.to_dtype(DType::F64)?)?;
        let lse = wide.as_tensor().exp()?.sum_keepdim(1)?.log()?;
        let column = Tensor::from_slice(&ids, (n, 1), &Device::Cpu)?;
        let exact = (lse - wide.as_tensor().gather(&column, 1)?)?.squeeze(1)?;
        let slope = (exact.sum_all()? * 0.25)?.backward()?;
        let (logits, ids) =
            (logits.to_device(&place.device)?, Tensor::from_slice(&ids, n, &place.device)?);
        let (found, gradient) = cross_entropy(&logits, &ids, Some(0.25))?;
        let what = format!("cross-entropy {n} {words}");
        place.same(&what, &found, &exact)?;
        let (Some(gradient), Some(slope)) = (gradient, slope.get(wide.as_tensor())) else {
            panic!("{what}: no gradient");
        };
        place.same(&format!("{what}: gradient"), &gradient, slope)?;
        let (alone, nothing) = cross_entropy(&logits, &ids, None)?;
        assert!(nothing.is_none());
        assert_eq!(alone.to_vec1::<f32>()?, found.to_vec1::<f32>()?, "{what}");
    }
    Ok(())
}

pub(crate) fn products(place: &Place) -> Result<()> {
    for (m, k, n) in [(1, 1, 1), (2, 3, 5), (33, 64, 8), (70, 129, 40)] {
        let [a, b, c] = [[m, k], [k, n], [m, n]].map(|shape| place.random(&shape));
        let (a, b, c) = (a?, b?, c?);
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        let exact = ((wide(&a)?.matmul(&wide(&b)?)? * 0.5)? + wide(&c)?)?;
        let here = |x: &Tensor| x.to_device(&place.device);
        // As they are; transposed; as columns of a wider matrix; with steps on both sides.
        let turned = |x: &Tensor| here(&x.t()?.contiguous()?)?.t();
        let inside =
            |x: &Tensor| here(&Tensor::cat(&[x, x, x], 1)?)?.narrow(1, x.dim(1)?, x.dim(1)?);
        let spread = |x: &Tensor| {
            let twice = here(&Tensor::stack(&[x, x], 2)?)?;
            twice.narrow(2, 1, 1)?.squeeze(2)
        };
        type Laid<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;
        let ways: [Laid<'_>; 4] = [&here, &turned, &inside, &spread];
        for (i, left) in ways.iter().enumerate() {
            for (j, right) in ways.iter().enumerate() {
                for dtype in [place.dtype, DType::F32] {
                    let options = ProductOptions {
                        alpha: 0.5,
                        onto: Some(here(&c)?.to_dtype(dtype)?.copy()?),
                        dtype: Some(dtype),
                        tf32: false,
                    };
                    let found = product(&left(&a)?, &right(&b)?, options)?;
                    place.same(&format!("product {m} {k} {n}, {i} {j}"), &found, &exact)?;
                }
            }
        }
    }
    Ok(())
}

/// The route on the tape gives the bits of its op in candle's graph.
pub(crate) fn routes(place: &Place) -> Result<()> {
    let (b, t, g, d, m) = (2, 37, 2, 64, 2);
    let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.8f64.powi(i as i32)).collect();
    let angles = RotaryAngles::new(0..t as u64, &frequencies, 1.0);
    let params = RouteParams {
        rates: &[0.9, 0.99],
        seen: 0,
        bias_correction: true,
        eps: 1e-5,
        angles: &angles,
    };
    let variable = |shape: &[usize], dtype: DType| {
        let x = place.random(shape)?.to_dtype(dtype)?.to_device(&place.device)?;
        Ok::<_, candle_core::Error>(Var::from_tensor(&x)?.as_tensor().clone())
    };
    let kv = variable(&[b, t, 2, g, d], place.dtype)?;
    let single = |shape: &[usize]| variable(shape, DType::F32);
    let (logits, gate) = (single(&[b, t, 1 + m])?, single(&[1])?);
    let (bias, norm) = (single(&[2, g, d])?, single(&[d])?);
    let state = Tensor::zeros((b, m, 2, g, d), DType::F32, &place.device)?;
    let [dkeys, dvalues] =
        [0, 1].map(|_| place.random(&[b, t, g, d]).and_then(|x| x.to_device(&place.device)));
    let (dkeys, dvalues) = (dkeys?, dvalues?);
    let inputs = RouteInputs {
        kv: &kv,
        logits: &logits,
        state: &state,
        gate: &gate,
        bias: Some(&bias),
        norm: Some(&norm),
    };
    let plain = route(&inputs, &params)?;
    let sums =
        [(&plain.keys, &dkeys), (&plain.values, &dvalues)].map(|(x, dx)| (x * dx)?.sum_all());
    let [keys, values] = sums;
    let expected = (keys? + values?)?.backward()?;
    let (bias_value, norm_value) = (Value::of(&bias), Value::of(&norm));
    let rest =
        RouteRest { state: &state, gate: &gate, bias: Some(&bias_value), norm: Some(&norm_value) };
    let (keys, values) = ops::route(&Value::of(&kv), &Value::of(&logits), rest, &params)?;
    place.same("route: keys", keys.tensor(), &plain.keys)?;
    place.same("route: values", values.tensor(), &plain.values)?;
    // Both gradients through one value.
    let both = ops::concat(&[
        &ops::reshape(&keys, b * t * g * d)?,
        &ops::reshape(&values, b * t * g * d)?,
    ])?;
    let gradient = Tensor::cat(&[dkeys.flatten_all()?, dvalues.flatten_all()?], 0)?;
    let mut found = tape::backward(&both, &gradient)?;
    for (name, x) in
        [("kv", &kv), ("logits", &logits), ("gate", &gate), ("bias", &bias), ("norm", &norm)]
    {
        let (Some(found), Some(expected)) = (found.remove(x), expected.get(x)) else {
            panic!("route: no gradient of {name}");
        };
        place.same(&format!("route: gradient of {name}"), &found, expected)?;
    }
    Ok(())
}

#[test]
fn ops_and_their_gradients_equal_plain_operations_in_f64() -> Result<()> {
    let place = Place::cpu();
    projections(&place)?;
    norms(&place)?;
    gates_and_biases(&place)?;
    attention_and_rotation(&place)?;
    losses(&place)?;
    products(&place)?;
    routes(&place)
}

/// Central differences of every input of a norm, whose backward is the least obvious.
#[test]
fn gradients_of_the_norm_equal_finite_differences() -> Result<()> {
    let (n, c, step) = (3, 11, 1e-2);
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut make = |shape: &[usize]| normal(&mut rng, shape);
    let (x, weight, dout) = (make(&[n, c])?, make(&[c])?, make(&[n, c])?);
    let loss = |x: &Tensor, weight: &Tensor| -> Result<f64> {
        let out = rms_norm_forward(x, None, Some(weight), 1e-5)?.out;
        (out * &dout)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()
    };
    let out = rms_norm_forward(&x, None, Some(&weight), 1e-5)?;
    let found = rms_norm_backward((&out.sum, &out.inverse), Some(&weight), &dout, None, true)?;
    let dweight = found.dweight.expect("asked for");
    for (name, at, gradient) in [("x", &x, &found.dx), ("weight", &weight, &dweight)] {
        let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
        let values = at.flatten_all()?.to_vec1::<f32>()?;
        for i in 0..values.len() {
            let moved = |by: f32| -> Result<f64> {
                let mut values = values.clone();
                values[i] += by;
                let at = Tensor::from_vec(values, at.shape(), &Device::Cpu)?;
                if name == "x" { loss(&at, &weight) } else { loss(&x, &at) }
            };
            let slope = (moved(step)? - moved(-step)?) / (2.0 * f64::from(step));
            let error = (slope - f64::from(gradient[i])).abs();
            assert!(error < 2e-3 * (1.0 + slope.abs()), "{name} {i}: {slope}, {}", gradient[i]);
        }
    }
    Ok(())
}

#[test]
fn a_value_used_twice_adds_its_gradients_and_constants_get_none() -> Result<()> {
    let x = Tensor::new(&[1f32, -2.0, 3.0], &Device::Cpu)?;
    let constant = Tensor::new(&[5f32, 6.0, 7.0], &Device::Cpu)?;
    let leaf = Value::leaf(&x);
    let twice = ops::add(&leaf, &leaf)?;
    let out = ops::add(&ops::add(&twice, &Value::of(&constant))?, &twice)?;
    let gradient = Tensor::new(&[1f32, 10.0, 100.0], &Device::Cpu)?;
    let mut found = tape::backward(&out, &gradient)?;
    assert_eq!(found.remove(&x).expect("a leaf").to_vec1::<f32>()?, [4.0, 40.0, 400.0]);
    assert!(found.remove(&constant).is_none());
    // Nothing is kept where no gradient is wanted.
    let idle = ops::add(&Value::of(&constant), &Value::constant(&x))?;
    assert!(!idle.target().is_wanted());
    Ok(())
}

#[test]
fn gradients_of_two_types_add_up_in_f32() -> Result<()> {
    let x = Tensor::new(&[1f32, 2.0], &Device::Cpu)?.to_dtype(DType::BF16)?;
    let leaf = Value::leaf(&x);
    let target = leaf.target();
    let out = tape::record_one(&[&leaf], x.clone(), move |gradient, gradients| {
        gradients.give(&target, gradient.clone())?;
        gradients.give(&target, gradient.to_dtype(DType::F32)?)
    });
    let gradient = Tensor::new(&[1f32, 3.0], &Device::Cpu)?.to_dtype(DType::BF16)?;
    let found = tape::backward(&out, &gradient)?.remove(&x).expect("a leaf");
    assert_eq!(found.to_vec1::<f32>()?, [2.0, 6.0]);
    Ok(())
}

#[test]
fn a_second_walk_and_a_gradient_of_another_shape_are_refused() -> Result<()> {
    let x = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
    let out = ops::add(&Value::leaf(&x), &Value::constant(&x))?;
    let wrong = tape::backward(&out, &Tensor::ones(3, DType::F32, &Device::Cpu)?);
    assert!(wrong.unwrap_err().to_string().contains("expected [2]"));
    let ones = Tensor::ones(2, DType::F32, &Device::Cpu)?;
    tape::backward(&out, &ones)?;
    let again = tape::backward(&out, &ones);
    assert!(again.unwrap_err().to_string().contains("walked before"));
    Ok(())
}

#[test]
fn a_segment_of_candles_graph_gives_gradients_to_its_input_and_its_variables() -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let x = normal(&mut rng, &[3, 4])?;
    let weight = Var::from_tensor(&normal(&mut rng, &[4, 2])?)?;
    let run = |x: &Tensor| x.matmul(weight.as_tensor())?.sqr();
    let out = tape::segment::<candle_core::Error>(&Value::leaf(&x), run)?;
    let gradient = normal(&mut rng, &[3, 2])?;
    let mut found = tape::backward(&out, &gradient)?;
    let input = Var::from_tensor(&x)?;
    let expected = (run(input.as_tensor())? * &gradient)?.backward()?;
    for (leaf, variable) in [(&x, input.as_tensor()), (weight.as_tensor(), weight.as_tensor())] {
        let found = found.remove(leaf).expect("a gradient").to_vec2::<f32>()?;
        assert_eq!(found, expected.get(variable).expect("a gradient").to_vec2::<f32>()?);
    }
    // Of a constant nothing is recorded, variables or not.
    let out = tape::segment::<candle_core::Error>(&Value::constant(&x), run)?;
    assert!(!out.target().is_wanted());
    assert!(tape::backward(&out, &gradient)?.remove(weight.as_tensor()).is_none());
    Ok(())
}

#[test]
fn bad_shapes_are_refused_by_name() -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let refused = |result: Result<()>, name: &str| {
        let error = result.expect_err(name).to_string();
        assert!(error.contains(name) && error.contains("expected"), "{error}");
    };
    let options = ProductOptions::default;
    refused(product(&zeros(&[2, 3])?, &zeros(&[2, 3])?, options()).map(drop), "product");
    let narrow = ProductOptions { dtype: Some(DType::BF16), ..options() };
    refused(product(&zeros(&[2, 3])?, &zeros(&[3, 2])?, narrow).map(drop), "product");
    let norm = rms_norm_forward(&zeros(&[2, 3])?, Some(&zeros(&[3, 2])?), None, 1e-5);
    refused(norm.map(drop), "rms_norm");
    let ids = Tensor::new(&[0u32], &Device::Cpu)?;
    refused(cross_entropy(&zeros(&[2, 3])?, &ids, None).map(drop), "cross_entropy");
    let beyond = Tensor::new(&[0u32, 3], &Device::Cpu)?;
    refused(cross_entropy(&zeros(&[2, 3])?, &beyond, Some(1.0)).map(drop), "cross_entropy");
    let x = Value::constant(&zeros(&[2, 3])?);
    refused(ops::silu_bias(&x, &zeros(&[2])?).map(drop), "silu_bias");
    let wide = zeros(&[4, 5])?;
    refused(ops::project_one(&x, Projection::plain(&wide)).map(drop), "project");
    let angles = RotaryAngles::new(0..1, &[1.0], 1.0);
    assert!(rotate(&zeros(&[2, 1, 2])?, &angles).is_err());
    Ok(())
}
