//! Panels against the obvious form, in f64 for f32 weights and in whole numbers for integers, over odd shapes.
//! Knows the public API only.

use mka_kernels::packed::SimdLevel;
use mka_kernels::{ErrorKind, PanelForm, PanelLinear};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEED: u64 = 31;
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (3, 2), (16, 4), (17, 5), (15, 33), (32, 64), (50, 127), (130, 7), (48, 1536)];
const ROWS: [usize; 9] = [0, 1, 2, 3, 5, 7, 13, 96, 101];

fn values(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1f32..1.0)).collect()
}

/// A layer as numbers: weights (rows, cols), bias (rows), x (m, cols).
struct Case {
    weights: Vec<f32>,
    bias: Vec<f32>,
    x: Vec<f32>,
    shape: (usize, usize),
}

impl Case {
    fn new(rng: &mut ChaCha8Rng, shape: (usize, usize), m: usize) -> Self {
        // Rows of one sign are what sums of neighbours are largest in.
        let mut weights = values(rng, shape.0 * shape.1);
        weights.chunks_mut(shape.1).step_by(2).for_each(|row| {
            row.iter_mut().for_each(|weight| *weight = 0.9 + 0.1 * weight.abs());
        });
        let x = values(rng, m * shape.1).iter().map(|x| x + 0.3).collect();
        Self { weights, bias: values(rng, shape.0), x, shape }
    }

    fn apply(&self, form: PanelForm, level: SimdLevel) -> Vec<f32> {
        let layer = PanelLinear::new(form, &self.weights, &self.bias, self.shape).unwrap();
        assert_eq!((layer.rows(), layer.cols()), self.shape);
        let mut out = vec![f32::NAN; self.x.len() / self.shape.1 * self.shape.0];
        layer.apply_at(level, &self.x, &mut out);
        out
    }

    /// The products in f64, from weights and x that `weight` and `x` have changed row by row.
    fn exact(&self, weight: fn(&[f32]) -> Vec<f64>, x: fn(&[f32]) -> Vec<f64>) -> Vec<f64> {
        let weights: Vec<Vec<f64>> = self.weights.chunks(self.shape.1).map(weight).collect();
        let product = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
        let rows = self.x.chunks(self.shape.1).map(x);
        rows.flat_map(|x| {
            let row = weights.iter().zip(&self.bias);
            row.map(|(w, &bias)| product(&x, w) + f64::from(bias)).collect::<Vec<_>>()
        })
        .collect()
    }
}

fn as_given(row: &[f32]) -> Vec<f64> {
    row.iter().copied().map(f64::from).collect()
}

/// A row of weights as `docs/panels.md` rounds it.
fn rounded_weights(row: &[f32]) -> Vec<f64> {
    let sums = row.chunks(2).map(|pair| pair.iter().sum::<f32>().abs());
    let largest = row.iter().map(|w| w.abs()).chain(sums).fold(0.0, f32::max);
    let scale = largest / 127.0;
    let q: Vec<f32> = row.iter().map(|w| (w / scale).round_ties_even()).collect();
    assert!(q.chunks(2).all(|pair| pair.iter().sum::<f32>().abs() <= 128.0), "{q:?}");
    q.iter().map(|&q| f64::from(q) * f64::from(scale)).collect()
}

/// A row of x as `docs/panels.md` rounds it.
fn rounded_x(row: &[f32]) -> Vec<f64> {
    let low = row.iter().copied().fold(0.0, f32::min);
    let high = row.iter().copied().fold(0.0, f32::max);
    let scale = high / 255.0 - low / 255.0;
    let inverse = 1.0 / scale;
    let zero = (-low * inverse).round_ties_even();
    let q = row.iter().map(|x| ((x * inverse).round_ties_even() + zero).clamp(0.0, 255.0) - zero);
    q.map(|q| f64::from(q) * f64::from(scale)).collect()
}

#[test]
fn f32_panels_are_the_product_at_every_level_and_shape() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for shape in SHAPES {
        for m in ROWS {
            let case = Case::new(&mut rng, shape, m);
            let exact = case.exact(as_given, as_given);
            for level in SimdLevel::available() {
                let found = case.apply(PanelForm::F32, level);
                assert_eq!(found.len(), exact.len());
                for (found, exact) in found.iter().zip(&exact) {
                    // Sums of up to 1,536 terms of size 1, each rounded to 2^-24 of a sum below 512.
                    let bound = 1e-6 * (shape.1 as f64 + 1.0);
                    assert!(
                        (f64::from(*found) - exact).abs() < bound,
                        "{shape:?} m {m} {level:?}: {found}, not {exact}"
                    );
                }
            }
        }
    }
}

#[test]
fn integer_panels_are_those_of_the_rounded_numbers_with_the_same_bits_at_every_level() {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 1);
    for shape in SHAPES {
        for m in ROWS {
            let case = Case::new(&mut rng, shape, m);
            let exact = case.exact(rounded_weights, rounded_x);
            let portable = case.apply(PanelForm::Int8, SimdLevel::Portable);
            assert_eq!(portable.len(), exact.len());
            for (found, exact) in portable.iter().zip(&exact) {
                let bound = 1e-6 * (exact.abs() + 1.0);
                assert!(
                    (f64::from(*found) - exact).abs() < bound,
                    "{shape:?} m {m}: {found}, not {exact}"
                );
            }
            for level in SimdLevel::available() {
                let found = case.apply(PanelForm::Int8, level);
                assert!(
                    found.iter().zip(&portable).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{shape:?} m {m} {level:?}"
                );
            }
        }
    }
}

#[test]
fn the_largest_products_of_two_neighbours_do_not_saturate() {
    for sign in [1.0f32, -1.0] {
        for pair in [[1.0f32, 1.0], [0.51, 0.49], [1.0, 0.0078], [1.0, -1.0]] {
            let weights: Vec<f32> = pair.map(|weight| weight * sign).repeat(768);
            let case = Case { weights, bias: vec![0.0], x: vec![1.0; 1536], shape: (1, 1536) };
            let exact = case.exact(rounded_weights, rounded_x)[0];
            for level in SimdLevel::available() {
                let found = f64::from(case.apply(PanelForm::Int8, level)[0]);
                assert!((found - exact).abs() <= 1e-5 * exact.abs().max(1.0), "{pair:?} {level:?}");
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_gives_nan_and_leaves_the_others() {
    let case = Case {
        weights: vec![1.0; 4],
        bias: vec![0.5],
        x: [vec![1.0; 4], vec![1.0, f32::INFINITY, 0.0, 0.0], vec![0.0; 4]].concat(),
        shape: (1, 4),
    };
    for level in SimdLevel::available() {
        let found = case.apply(PanelForm::Int8, level);
        assert!((found[0] - 4.5).abs() < 0.1 && found[1].is_nan() && found[2] == 0.5, "{found:?}");
    }
}

#[test]
fn a_weight_that_is_not_finite_gives_nan_and_leaves_the_other_rows() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let case = Case {
            weights: [vec![1.0, bad, 1.0, 1.0], vec![1.0; 4]].concat(),
            bias: vec![0.5; 2],
            x: vec![1.0; 8],
            shape: (2, 4),
        };
        for level in SimdLevel::available() {
            let found = case.apply(PanelForm::Int8, level);
            for row in found.chunks_exact(2) {
                assert!(row[0].is_nan() && (row[1] - 4.5).abs() < 0.1, "{bad} {level:?} {row:?}");
            }
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let refused = |form, weights: usize, bias: usize, shape| {
        let made = PanelLinear::new(form, &vec![0.0; weights], &vec![0.0; bias], shape);
        made.is_err_and(|error| error.kind() == ErrorKind::InvalidArgument)
    };
    assert!(refused(PanelForm::F32, 5, 2, (2, 3)));
    assert!(refused(PanelForm::F32, 6, 3, (2, 3)));
    assert!(refused(PanelForm::F32, 0, 2, (2, 0)));
    assert!(refused(PanelForm::Int8, 40_000, 1, (1, 40_000)));
    let none = PanelLinear::new(PanelForm::Int8, &[], &[], (0, 3)).unwrap();
    none.apply(&[1.0; 6], &mut []);
    assert!(format!("{none:?}").contains("Int8"));
}
