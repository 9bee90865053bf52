//! How a product is cut into work: which path, which rows a task takes, how many threads.
//! Knows no block layout.

use std::ops::Range;

use super::activation::Activations;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{PackedMatrix, PackedType, SimdLevel, block, portable, threads};

/// Up to this many rows of x the packed blocks are multiplied directly, where a level has its own byte products: 12 µs a row
/// against 400 µs for 16 decoded (576 x 576 Q4_1, 2 cores of an EPYC 9004, `packed.md`).
const DIRECT_ROWS_INTEGER: usize = 16;

/// The same for float products and for the portable level.
const DIRECT_ROWS: usize = 4;

/// Decoded weights of one task: 256 KiB of f32, a quarter of a 1 MiB L2 cache.
const DECODED_VALUES: usize = 64 * 1024;

/// Below this many bytes of packed weight times rows of x a product stays on the calling thread: about 10 µs of work, what it
/// costs to wake another thread.
const SERIAL_BYTES: usize = 128 * 1024;

/// Packed bytes times rows of x of one task: about 3 µs, the longest that the caller waits at the end.
const TASK_BYTES: usize = 32 * 1024;

/// Whole blocks of `ty` to f32.
pub(super) fn dequantize(level: SimdLevel, ty: PackedType, src: &[u8], out: &mut [f32]) {
    match level {
        SimdLevel::Portable => block::dequantize(ty, src, out),
        // SAFETY: a level of this machine holds its features.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx2 => unsafe { x86::avx2::dequantize(ty, src, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512Vnni => unsafe { x86::avx512_vnni::dequantize(ty, src, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => block::dequantize(ty, src, out),
    }
}

/// `x Wᵀ`; the lengths have been checked: data `rows * row_bytes`, x `(m, cols)`, out `(m, rows)`.
pub(super) fn matmul(
    level: SimdLevel,
    w: &PackedMatrix,
    data: &[u8],
    x: &[f32],
    m: usize,
    out: &mut [f32],
) {
    if w.cols() == 0 || out.is_empty() {
        out.fill(0.0);
    } else if m <= direct_rows(level, w.ty()) {
        direct(level, w, data, x, m, out);
    } else {
        decoded(level, w, data, x, m, out);
    }
}

/// Few rows of x: dot products straight from the packed rows.
fn direct(level: SimdLevel, w: &PackedMatrix, data: &[u8], x: &[f32], m: usize, out: &mut [f32]) {
    let (ty, cols, row_bytes) = (w.ty(), w.cols(), w.row_bytes());
    let activations = has_integer_form(ty).then(|| Activations::quantize(level, x, m, cols));
    let columns = Columns { out: out.as_mut_ptr(), m, stride: w.rows() };
    let run = |rows: Range<usize>| {
        let packed = &data[rows.start * row_bytes..rows.end * row_bytes];
        let mut values = vec![0.0; m * rows.len()];
        match &activations {
            Some(x) => integer_rows(level, ty, packed, x, &mut values),
            None => float_rows(level, ty, packed, x, cols, &mut values),
        }
        // SAFETY: `in_row_ranges` gives each row to one task and `rows` is inside the stride.
        unsafe { columns.write(rows, &values) };
    };
    if data.len() * m < SERIAL_BYTES {
        run(0..w.rows());
    } else {
        let step = (TASK_BYTES / (row_bytes * m)).next_multiple_of(4).max(4);
        in_row_ranges(w.rows(), step, run);
    }
}

/// Many rows of x: each task decodes a block of rows that stays in its L2 cache and multiplies it by a f32 GEMM.
fn decoded(level: SimdLevel, w: &PackedMatrix, data: &[u8], x: &[f32], m: usize, out: &mut [f32]) {
    let (ty, cols, row_bytes) = (w.ty(), w.cols(), w.row_bytes());
    let columns = Columns { out: out.as_mut_ptr(), m, stride: w.rows() };
    let num_rows = (DECODED_VALUES / cols).next_multiple_of(16).clamp(16, 128);
    in_row_ranges(w.rows(), num_rows, |rows| {
        let mut weights = vec![0.0; rows.len() * cols];
        dequantize(level, ty, &data[rows.start * row_bytes..rows.end * row_bytes], &mut weights);
        // SAFETY: `in_row_ranges` gives each row to one task and `rows` is inside the stride; `weights` is
        // `(rows.len(), cols)` and x is `(m, cols)`, checked by `matmul`.
        unsafe { columns.write_product(rows, &weights, x, cols) };
    });
}

fn direct_rows(level: SimdLevel, ty: PackedType) -> usize {
    if level == SimdLevel::Portable || !has_integer_form(ty) {
        DIRECT_ROWS
    } else {
        DIRECT_ROWS_INTEGER
    }
}

/// Packed rows times the rounded x: out is `(m, num_rows)`.
fn integer_rows(level: SimdLevel, ty: PackedType, w: &[u8], x: &Activations, out: &mut [f32]) {
    match level {
        // SAFETY: a level of this machine holds its features.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx2 => unsafe { x86::avx2::integer_rows(ty, w, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512Vnni => unsafe { x86::avx512_vnni::integer_rows(ty, w, x, out) },
        _ => portable::integer_rows(ty, w, x, out),
    }
}

/// Packed rows times x `(m, cols)` in f32: out is `(m, num_rows)`.
fn float_rows(level: SimdLevel, ty: PackedType, w: &[u8], x: &[f32], cols: usize, out: &mut [f32]) {
    match level {
        // SAFETY: a level of this machine holds its features.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx2 => unsafe { x86::avx2::float_rows(ty, w, x, cols, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        SimdLevel::Avx512Vnni => unsafe { x86::avx512_vnni::float_rows(ty, w, x, cols, out) },
        _ => portable::float_rows(ty, w, x, cols, out),
    }
}

fn has_integer_form(ty: PackedType) -> bool {
    !matches!(
        ty,
        PackedType::F32 | PackedType::F16 | PackedType::BF16 | PackedType::Q2K | PackedType::Q3K
    )
}

/// Runs `f` over `0..rows` in ranges of at most `step` rows, on the threads of the current rayon pool.
fn in_row_ranges(rows: usize, step: usize, f: impl Fn(Range<usize>) + Sync) {
    threads::run(rows.div_ceil(step), &|task| f(task * step..rows.min((task + 1) * step)));
}

/// An output `(m, stride)` whose columns are written by different tasks.
struct Columns {
    out: *mut f32,
    m: usize,
    stride: usize,
}

// SAFETY: the methods write only the columns they are given, which their callers keep apart.
unsafe impl Sync for Columns {}

impl Columns {
    /// Writes `values` `(m, columns.len())`.
    ///
    /// # Safety
    /// `columns` is inside the stride, no other task writes it, and the output `(m, stride)` is alive.
    unsafe fn write(&self, columns: Range<usize>, values: &[f32]) {
        for (j, values) in values.chunks_exact(columns.len()).take(self.m).enumerate() {
            // SAFETY: row `j < m` of the output has `stride` values and holds `columns`, by the caller's word.
            unsafe {
                let to = self.out.add(j * self.stride + columns.start);
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, columns.len());
            }
        }
    }

    /// Writes `x weightsᵀ`: weights `(columns.len(), cols)`, x `(m, cols)`.
    ///
    /// # Safety
    /// As [`Columns::write`], and both matrices have the shape said.
    unsafe fn write_product(&self, columns: Range<usize>, weights: &[f32], x: &[f32], cols: usize) {
        let (cols_stride, out_stride) = (cols as isize, self.stride as isize);
        // SAFETY: column-major view: out (columns, m), weights (columns, cols) and x (cols, m), all inside their slices
        // by the caller's word.
        unsafe {
            gemm::gemm(
                columns.len(),
                self.m,
                cols,
                self.out.add(columns.start),
                out_stride,
                1,
                false,
                weights.as_ptr(),
                1,
                cols_stride,
                x.as_ptr(),
                cols_stride,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}
