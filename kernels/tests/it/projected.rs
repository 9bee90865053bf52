//! The projected route against its formula, its gradients against differences, and its pages against its tensors.

use crate::route::{assert_close, differences, double, flat};
use candle_core::{DType, Device, Tensor, Var};
use mka_kernels::{
    PAGE_TOKENS, PagePool, RotaryAngles, RouteInputs, RouteParams, reference, rotate, route,
    route_into_pages,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const RATES: [f32; 4] = [0.9, 0.99, 0.999, 0.0];

/// What one call gets, on the CPU in f32.
pub(crate) struct Case {
    pub(crate) shape: (usize, usize, usize, usize),
    pub(crate) rates: Vec<f32>,
    pub(crate) seen: u64,
    pub(crate) correct: bool,
    pub(crate) kv: Tensor,
    pub(crate) logits: Tensor,
    pub(crate) state: Tensor,
    pub(crate) gate: Tensor,
    pub(crate) bias: Option<Tensor>,
    pub(crate) norm: Option<Tensor>,
    pub(crate) angles: RotaryAngles,
}

pub(crate) const EPS: f32 = 1e-6;

impl Case {
    /// `extras`: bias and norm.
    pub(crate) fn new(
        (b, t, g, d): (usize, usize, usize, usize),
        m: usize,
        (seen, correct, extras): (u64, bool, bool),
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64((b * t * g * d + m) as u64);
        let mut random = |dims: Vec<usize>, low: f32, high: f32| {
            let len = dims.iter().product::<usize>();
            let data: Vec<f32> = (0..len).map(|_| rng.random_range(low..high)).collect();
            Tensor::from_vec(data, dims, &Device::Cpu).unwrap()
        };
        let frequencies: Vec<f64> =
            (0..d / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / d as f64)).collect();
        Self {
            shape: (b, t, g, d),
            rates: RATES[..m].to_vec(),
            seen,
            correct,
            kv: random(vec![b, t, 2, g, d], -1.0, 1.5),
            logits: random(vec![b, t, 1 + m], -1.0, 1.0),
            state: random(vec![b, m, 2, g, d], -1.0, 1.0),
            gate: random(vec![1], 0.3, 0.9),
            bias: extras.then(|| random(vec![2, g, d], -0.5, 0.5)),
            norm: extras.then(|| random(vec![d], 0.5, 1.5)),
            angles: RotaryAngles::new(seen..seen + t as u64, &frequencies, 1.0),
        }
    }

    pub(crate) fn inputs(&self) -> RouteInputs<'_> {
        RouteInputs {
            kv: &self.kv,
            logits: &self.logits,
            state: &self.state,
            gate: &self.gate,
            bias: self.bias.as_ref(),
            norm: self.norm.as_ref(),
        }
    }

    pub(crate) fn params(&self) -> RouteParams<'_> {
        RouteParams {
            rates: &self.rates,
            seen: self.seen,
            bias_correction: self.correct,
            eps: EPS,
            angles: &self.angles,
        }
    }

    /// cos and sin of the angles: a rotation of (1, 0) is (cos, sin).
    fn tables(&self) -> (Vec<f64>, Vec<f64>) {
        let (_, t, _, d) = self.shape;
        let row: Vec<f32> = (0..d).map(|i| f32::from(u8::from(i < d / 2))).collect();
        let x = Tensor::from_vec(row.repeat(t), (t, 1, d), &Device::Cpu).unwrap();
        let y = double(&rotate(&x, &self.angles).unwrap());
        let half = |from: usize| y.chunks(d).flat_map(move |row| row[from..from + d / 2].to_vec());
        (half(0).collect(), half(d / 2).collect())
    }

    fn reference_inputs(&self) -> reference::route::RouteInputs {
        let values = |x: &Option<Tensor>| x.as_ref().map(double).unwrap_or_default();
        let (cosine, sine) = self.tables();
        reference::route::RouteInputs {
            gate: double(&self.gate)[0],
            rates: self.rates.iter().map(|x| f64::from(*x)).collect(),
            bias: values(&self.bias),
            norm: values(&self.norm),
            eps: f64::from(EPS),
            cosine,
            sine,
            seen: self.seen,
            bias_correction: self.correct,
        }
    }

    /// Keys, values and state of every stream by the formula, from `kv` as given.
    pub(crate) fn expected(&self, kv: &Tensor) -> [Vec<f64>; 3] {
        let (b, t, g, d) = self.shape;
        let inputs = self.reference_inputs();
        let mut all = [vec![], vec![], vec![]];
        for stream in 0..b {
            let part = |x: &Tensor| double(&x.get(stream).unwrap());
            let (kv, logits, state) = (part(kv), part(&self.logits), part(&self.state));
            let out = reference::route::route(&kv, &logits, &state, (t, g, d), &inputs);
            for (all, part) in all.iter_mut().zip([out.keys, out.values, out.state]) {
                all.extend(part);
            }
        }
        all
    }
}

#[test]
fn route_is_its_formula() {
    for (shape, m) in
        [((1, 1, 1, 8), 1), ((2, 65, 2, 16), 3), ((1, 130, 3, 24), 4), ((3, 7, 1, 64), 2)]
    {
        for options in [(0, true, true), (9, true, false), (3, false, true), (0, false, false)] {
            let case = Case::new(shape, m, options);
            let got = route(&case.inputs(), &case.params()).unwrap();
            let [keys, values, state] = case.expected(&case.kv);
            assert_close("keys", &got.keys, &keys);
            assert_close("values", &got.values, &values);
            assert_close("state", &got.state, &state);
        }
    }
}

#[test]
fn route_of_nothing_keeps_the_state() {
    let case = Case::new((1, 0, 2, 8), 3, (4, true, true));
    let got = route(&case.inputs(), &case.params()).unwrap();
    assert_eq!(got.keys.dims(), [1, 0, 2, 8]);
    assert_eq!(flat(&got.state), flat(&case.state));
}

#[test]
fn a_closed_gate_rotates_the_keys_and_leaves_the_values() {
    let mut case = Case::new((1, 9, 2, 16), 3, (5, true, false));
    case.gate = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    let got = route(&case.inputs(), &case.params()).unwrap();
    let part = |i: usize| case.kv.get(0).unwrap().narrow(1, i, 1).unwrap().squeeze(1).unwrap();
    assert_eq!(flat(&got.values), flat(&part(1)));
    assert_eq!(
        flat(&got.keys),
        flat(&rotate(&part(0).contiguous().unwrap(), &case.angles).unwrap())
    );
}

#[test]
fn a_stream_in_two_calls_is_the_stream_in_one() {
    let case = Case::new((1, 50, 2, 8), 3, (0, true, true));
    let whole = route(&case.inputs(), &case.params()).unwrap();
    let frequencies: Vec<f64> = (0..4).map(|i| 10_000f64.powf(-2.0 * i as f64 / 8.0)).collect();
    let part = |from: usize, count: usize, state: &Tensor| {
        let angles = RotaryAngles::new(from as u64..(from + count) as u64, &frequencies, 1.0);
        let (kv, logits) =
            (case.kv.narrow(1, from, count).unwrap(), case.logits.narrow(1, from, count).unwrap());
        let inputs = RouteInputs { kv: &kv, logits: &logits, state, ..case.inputs() };
        let params = RouteParams { seen: from as u64, angles: &angles, ..case.params() };
        route(&inputs, &params).unwrap()
    };
    let head = part(0, 17, &case.state);
    let tail = part(17, 33, &head.state);
    let joined = |a: &Tensor, b: &Tensor| flat(&Tensor::cat(&[a, b], 1).unwrap());
    assert_eq!(joined(&head.keys, &tail.keys), flat(&whole.keys));
    assert_eq!(joined(&head.values, &tail.values), flat(&whole.values));
    assert_eq!(flat(&tail.state), flat(&whole.state));
}

#[test]
fn pages_hold_what_the_tensors_hold() {
    let (t, g, d) = (100, 2, 16);
    let case = Case::new((1, t, g, d), 3, (40, true, true));
    let got = route(&case.inputs(), &case.params()).unwrap();
    let pool = PagePool::new(5, g, d, &Device::Cpu).unwrap();
    let (slots, offset) = ([4, 0, 2], 40);
    let state = route_into_pages(&case.inputs(), &case.params(), &pool, &slots, offset).unwrap();
    assert_eq!(flat(&state), flat(&got.state));
    let appended = PagePool::new(5, g, d, &Device::Cpu).unwrap();
    let by_token = |pool: &Tensor| {
        let rows: Vec<f32> = (offset..offset + t)
            .flat_map(|i| {
                let page = pool.get(slots[i / PAGE_TOKENS]).unwrap();
                flat(&page.narrow(1, i % PAGE_TOKENS, 1).unwrap())
            })
            .collect();
        Tensor::from_vec(rows, (t, g, d), &Device::Cpu).unwrap()
    };
    let raw = by_token(&pool.raw_keys);
    appended.append(&slots, offset, &raw, &got.values.get(0).unwrap(), &case.angles).unwrap();
    for pool in [&pool, &appended] {
        assert_eq!(flat(&by_token(&pool.keys)), flat(&got.keys));
        assert_eq!(flat(&by_token(&pool.values)), flat(&got.values));
        assert_eq!(flat(&by_token(&pool.raw_keys)), flat(&raw));
    }
    let error = pool.append(&slots[..2], offset, &raw, &raw, &case.angles).unwrap_err();
    assert!(error.to_string().contains("of 2 pages, expected 3"), "{error}");
}

#[test]
fn misshapen_inputs_are_refused() {
    let case = Case::new((1, 3, 2, 8), 2, (0, true, false));
    let logits = case.logits.narrow(2, 0, 2).unwrap();
    let inputs = RouteInputs { logits: &logits, ..case.inputs() };
    let error = route(&inputs, &case.params()).unwrap_err().to_string();
    assert!(error.contains("logits [1, 3, 2] of F32, expected [1, 3, 3]"), "{error}");
    let params = RouteParams { rates: &[0.5, 1.0], ..case.params() };
    let error = route(&case.inputs(), &params).unwrap_err().to_string();
    assert!(error.contains("a rate of 1, expected one in [0, 1)"), "{error}");
}

/// The inputs of `case` as variables and the gradients of Σ keys · w + Σ values · v, in the order kv, logits, state,
/// gate, bias, norm.
pub(crate) fn gradients(
    case: &Case,
    weights: [&Tensor; 2],
    dtype: DType,
    device: &Device,
) -> Vec<Option<Tensor>> {
    let var = |x: &Tensor| Var::from_tensor(&x.to_device(device).unwrap()).unwrap();
    let kv =
        Var::from_tensor(&case.kv.to_dtype(dtype).unwrap().to_device(device).unwrap()).unwrap();
    let (logits, state, gate) = (var(&case.logits), var(&case.state), var(&case.gate));
    let (bias, norm) = (case.bias.as_ref().map(var), case.norm.as_ref().map(var));
    let inputs = RouteInputs {
        kv: &kv,
        logits: &logits,
        state: &state,
        gate: &gate,
        bias: bias.as_deref(),
        norm: norm.as_deref(),
    };
    let out = route(&inputs, &case.params()).unwrap();
    let term = |x: &Tensor, w: &Tensor| {
        let w = w.to_dtype(dtype).unwrap().to_device(device).unwrap();
        (x * w).unwrap().to_dtype(DType::F32).unwrap().sum_all().unwrap()
    };
    let loss = (term(&out.keys, weights[0]) + term(&out.values, weights[1])).unwrap();
    let grads = loss.backward().unwrap();
    let wanted =
        [Some(&kv), Some(&logits), Some(&state), Some(&gate), bias.as_ref(), norm.as_ref()];
    wanted.map(|x| x.and_then(|x| grads.get(x)).cloned()).into_iter().collect()
}

#[test]
fn gradients_of_the_route_are_its_differences() {
    for (shape, m, options) in [
        ((1, 5, 1, 8), 2, (0, true, true)),
        ((2, 4, 2, 8), 3, (6, true, false)),
        ((1, 6, 1, 8), 4, (0, false, true)),
    ] {
        let case = Case::new(shape, m, options);
        let (b, t, g, d) = shape;
        let other = Case::new((b, t, g, d), m, (1, true, false));
        let weight = |i: usize| other.kv.narrow(2, i, 1).unwrap().squeeze(2).unwrap();
        let weights = [weight(0), weight(1)];
        let got = gradients(&case, [&weights[0], &weights[1]], DType::F32, &Device::Cpu);
        let exact = [double(&weights[0]), double(&weights[1])];
        let inputs = case.reference_inputs();
        let loss =
            |kv: &[f64], logits: &[f64], state: &[f64], inputs: &reference::route::RouteInputs| {
                let (c, keys) = (2 * g * d, t * g * d);
                (0..b)
                    .map(|i| {
                        let out = reference::route::route(
                            &kv[i * t * c..][..t * c],
                            &logits[i * t * (m + 1)..][..t * (m + 1)],
                            &state[i * m * c..][..m * c],
                            (t, g, d),
                            inputs,
                        );
                        let dot =
                            |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                        dot(&out.keys, &exact[0][i * keys..][..keys])
                            + dot(&out.values, &exact[1][i * keys..][..keys])
                    })
                    .sum::<f64>()
            };
        let (kv, logits, state) = (double(&case.kv), double(&case.logits), double(&case.state));
        let grad = |i: usize| got[i].clone().expect("a gradient");
        assert_close("kv", &grad(0), &differences(&kv, |x| loss(x, &logits, &state, &inputs)));
        assert_close("logits", &grad(1), &differences(&logits, |x| loss(&kv, x, &state, &inputs)));
        assert_close("state", &grad(2), &differences(&state, |x| loss(&kv, &logits, x, &inputs)));
        let with = |change: &dyn Fn(&mut reference::route::RouteInputs)| {
            let mut inputs = inputs.clone();
            change(&mut inputs);
            loss(&kv, &logits, &state, &inputs)
        };
        let gate = differences(&[inputs.gate], |x| with(&|inputs| inputs.gate = x[0]));
        assert_close("gate", &grad(3), &gate);
        if case.bias.is_some() {
            let bias = differences(&inputs.bias, |x| with(&|inputs| inputs.bias = x.to_vec()));
            assert_close("bias", &grad(4), &bias);
            let norm = differences(&inputs.norm, |x| with(&|inputs| inputs.norm = x.to_vec()));
            assert_close("norm", &grad(5), &norm);
        }
    }
}
