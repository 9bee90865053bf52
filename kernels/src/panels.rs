//! Linear layers whose weights are laid out once for a fixed kernel: x Wᵀ + b, in f32 or in 8-bit integers.
//! Knows no model; what a layer stands for is its caller's matter.
//!
//! A panel is 16 rows of W side by side, so that one step of the kernel takes 64 bytes of it: one column in f32, four
//! columns in integers. One call is one thread's; who has more rows than one thread should take cuts them apart.
//!
//! | form | weights | x | products |
//! |---|---|---|---|
//! | [`PanelForm::F32`] | as given | as given | f32, fused where the processor can |
//! | [`PanelForm::Int8`] | 8 bits, a scale a row of W | 8 bits, a scale and a zero point a row of x | exact, in i32 |
//!
//! The integers of a product are the same on every processor, and so are the bits of its result.
//! `docs/panels.md` has the measurements.

mod activation;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::packed::SimdLevel;
use crate::{Error, Result};
use activation::{Floats, Rounded};
use std::fmt;

/// Rows of W in a panel.
const WIDTH: usize = 16;
/// Columns that one step of the integer kernel takes.
const GROUP: usize = 4;
/// Rows of x in a tile of f32: with AVX2 12 sums, 2 registers of weights and 1 of x, of 16.
const F32_ROWS: usize = 6;
/// Rows of x in a tile of integers: with AVX2 6 sums, 2 registers of weights, 1 of ones, the rest for products on their
/// way. With 4 and 6 rows it took 4 to 8 % longer (`docs/panels.md`).
const INT8_ROWS: usize = 3;
/// Most columns of a layer in integers: 255 * 128 * 32,768 is below 2^31.
const MAX_INT8_COLUMNS: usize = 32 * 1024;
/// Rows of x that go over a panel before the next one: 96 rows of 1,536 bytes are 144 KiB, inside an L2 cache of 512 KiB.
const BLOCK_ROWS: usize = 96;

/// How the numbers of a [`PanelLinear`] are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PanelForm {
    /// In f32.
    F32,
    /// In 8-bit integers.
    Int8,
}

/// A linear layer x Wᵀ + b: W `(rows, cols)` = `(out_features, in_features)`, b `(rows)`.
pub struct PanelLinear {
    rows: usize,
    cols: usize,
    /// `(panels, WIDTH)`: the bias of every row, zeros where there is none.
    bias: Vec<[f32; WIDTH]>,
    panels: Panels,
}

enum Panels {
    /// `(panels, cols, WIDTH)`.
    F32(Vec<[f32; WIDTH]>),
    Int8(Int8Panels),
}

/// W ≈ scale * q, with q in ±127 and no two neighbours of a row, `q[2 i]` and `q[2 i + 1]`, that sum to more than ±128:
/// then 255 of each stay inside 16 bits, where AVX2 sums them before it widens (255 * 128 = 32,640).
struct Int8Panels {
    /// `(panels, groups, WIDTH, GROUP)`: zeros beyond the last row and column.
    q: Vec<[[i8; GROUP]; WIDTH]>,
    /// `(panels, WIDTH)`.
    scale: Vec<[f32; WIDTH]>,
    /// `(panels, WIDTH)`: the sum of a row's q, to take off the zero point of x.
    sum: Vec<[i32; WIDTH]>,
}

impl PanelLinear {
    /// Lays `weights` `(rows, cols)` out in the form given, with `bias` `(rows)`.
    ///
    /// # Errors
    /// InvalidArgument if a length does not fit, if there is no column, or for integers more than 32,768 of them.
    pub fn new(
        form: PanelForm,
        weights: &[f32],
        bias: &[f32],
        (rows, cols): (usize, usize),
    ) -> Result<Self> {
        if cols == 0 || rows.checked_mul(cols) != Some(weights.len()) || bias.len() != rows {
            return Err(Error::invalid(format!(
                "panel linear: expected weights of {rows} x {cols} and a bias of {rows} values, got {} and {}",
                weights.len(),
                bias.len()
            )));
        }
        if form == PanelForm::Int8 && cols > MAX_INT8_COLUMNS {
            return Err(Error::invalid(format!(
                "panel linear: expected at most {MAX_INT8_COLUMNS} columns in 8-bit integers, got {cols}"
            )));
        }
        let panels = rows.div_ceil(WIDTH);
        let mut padded = vec![[0.0; WIDTH]; panels];
        padded.as_flattened_mut()[..rows].copy_from_slice(bias);
        let panels = match form {
            PanelForm::F32 => {
                let mut laid = vec![[0.0; WIDTH]; panels * cols];
                for (row, weights) in weights.chunks_exact(cols).enumerate() {
                    let panel = &mut laid[row / WIDTH * cols..][..cols];
                    for (column, &weight) in panel.iter_mut().zip(weights) {
                        column[row % WIDTH] = weight;
                    }
                }
                Panels::F32(laid)
            }
            PanelForm::Int8 => Panels::Int8(Int8Panels::new(weights, panels, cols)),
        };
        Ok(Self { rows, cols, bias: padded, panels })
    }

    /// Number of rows of W: out_features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns of W: in_features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// x Wᵀ + b, on the calling thread: x `(m, cols)`, out `(m, rows)`, both row-major and overwritten.
    ///
    /// Accuracy: in integers x is rounded to 8 bits between the least and the largest value of each row. A row with a
    /// value that is not finite gives a row of NaN, a row of W with one a column of NaN.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn apply(&self, x: &[f32], out: &mut [f32]) {
        self.apply_at(SimdLevel::best(), x, out);
    }

    /// As [`PanelLinear::apply`] with a level other than the best: to compare levels, not for speed.
    ///
    /// # Panics
    /// As [`PanelLinear::apply`], and if this machine lacks the level.
    pub fn apply_at(&self, level: SimdLevel, x: &[f32], out: &mut [f32]) {
        let (rows, cols) = (self.rows, self.cols);
        let m = x.len() / cols;
        assert!(level.is_available(), "a level of this machine");
        assert!(x.len() == m * cols && out.len() == m * rows, "whole rows of x and out");
        if rows == 0 {
            return;
        }
        let blocks = x.chunks(BLOCK_ROWS * cols).zip(out.chunks_mut(BLOCK_ROWS * rows));
        match &self.panels {
            Panels::F32(panels) => {
                let mut tiles = Floats::new(cols);
                for (x, out) in blocks {
                    if level != SimdLevel::Portable {
                        tiles.take(x);
                    }
                    for (p, panel) in panels.chunks_exact(cols).enumerate() {
                        let columns = Columns::new(out, rows, p * WIDTH);
                        match level {
                            // SAFETY: a level of this machine holds its features.
                            #[cfg(target_arch = "x86_64")]
                            SimdLevel::Avx2 | SimdLevel::Avx512Vnni => unsafe {
                                x86::f32_panel(panel, &tiles, &self.bias[p], columns);
                            },
                            _ => portable::f32_panel(panel, x, &self.bias[p], columns),
                        }
                    }
                }
            }
            Panels::Int8(panels) => {
                let groups = cols.div_ceil(GROUP);
                let mut tiles = Rounded::new(cols);
                for (x, out) in blocks {
                    tiles.take(x);
                    for (p, panel) in panels.q.chunks_exact(groups).enumerate() {
                        let of_rows = RowNumbers {
                            scale: &panels.scale[p],
                            sum: &panels.sum[p],
                            bias: &self.bias[p],
                        };
                        let columns = Columns::new(out, rows, p * WIDTH);
                        int8_panel(level, panel, &tiles, of_rows, columns);
                    }
                }
            }
        }
    }
}

impl fmt::Debug for PanelLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = match self.panels {
            Panels::F32(_) => PanelForm::F32,
            Panels::Int8(_) => PanelForm::Int8,
        };
        write!(f, "PanelLinear({} x {} {form:?})", self.rows, self.cols)
    }
}

impl Int8Panels {
    fn new(weights: &[f32], panels: usize, cols: usize) -> Self {
        let groups = cols.div_ceil(GROUP);
        let mut q = vec![[[0; GROUP]; WIDTH]; panels * groups];
        let (mut scale, mut sum) = (vec![[0.0; WIDTH]; panels], vec![[0; WIDTH]; panels]);
        for (row, weights) in weights.chunks_exact(cols).enumerate() {
            let (panel, lane) = (row / WIDTH, row % WIDTH);
            let of_row = weight_scale(weights);
            for (column, weight) in weights.iter().enumerate() {
                // 0 / 0 of a row of zeros is NaN, which becomes 0, as all do under a scale of NaN.
                let rounded = (weight / of_row).round_ties_even() as i8;
                q[panel * groups + column / GROUP][lane][column % GROUP] = rounded;
                sum[panel][lane] += i32::from(rounded);
            }
            scale[panel][lane] = of_row;
        }
        Self { q, scale, sum }
    }
}

/// The scale that brings every weight and every sum of two neighbours within ±127, NaN where a weight is not finite.
/// Rounding moves a sum by 1 at most.
fn weight_scale(weights: &[f32]) -> f32 {
    let largest = |pair: &[f32]| {
        let alone = pair.iter().map(|weight| weight.abs()).fold(0.0, f32::max);
        alone.max(pair.iter().sum::<f32>().abs())
    };
    // 0 but for weights that are not finite, which a maximum passes over.
    let finite: f32 = weights.iter().map(|weight| weight * 0.0).sum();
    weights.chunks(2).map(largest).fold(0.0, f32::max) / 127.0 + finite
}

/// What turns the integers of a panel's rows into the result.
#[derive(Clone, Copy)]
struct RowNumbers<'a> {
    scale: &'a [f32; WIDTH],
    sum: &'a [i32; WIDTH],
    bias: &'a [f32; WIDTH],
}

/// The columns of an output `(m, stride)` that a panel makes: [`WIDTH`] from `start` on, or fewer at the end.
struct Columns<'a> {
    out: &'a mut [f32],
    stride: usize,
    start: usize,
    len: usize,
}

impl<'a> Columns<'a> {
    fn new(out: &'a mut [f32], stride: usize, start: usize) -> Self {
        Self { out, stride, start, len: WIDTH.min(stride - start) }
    }

    #[inline(always)]
    fn write(&mut self, row: usize, values: &[f32; WIDTH]) {
        let to = &mut self.out[row * self.stride + self.start..][..self.len];
        match to.as_mut_array::<WIDTH>() {
            Some(to) => *to = *values,
            None => to.copy_from_slice(&values[..self.len]),
        }
    }
}

fn int8_panel(
    level: SimdLevel,
    panel: &[[[i8; GROUP]; WIDTH]],
    x: &Rounded,
    of_rows: RowNumbers<'_>,
    out: Columns<'_>,
) {
    match level {
        // SAFETY: a level of this machine holds its features.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx2 => unsafe { x86::avx2::int8_panel(panel, x, of_rows, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512Vnni => unsafe { x86::avx512_vnni::int8_panel(panel, x, of_rows, out) },
        _ => portable::int8_panel(panel, x, of_rows, out),
    }
}
