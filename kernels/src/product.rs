//! Products of matrices with a factor, added to what is there: what linear layers and their gradients are made of.
//! Knows no layer. Transposed operands and columns of a wider matrix are read where they lie.

use candle_core::{DType, Result, Tensor, bail};

/// What [`product`] does beside multiplying.
#[derive(Debug, Clone)]
pub struct ProductOptions {
    /// Factor on the product.
    pub alpha: f32,
    /// What the product is added to, the caller's alone: on CUDA it is overwritten.
    pub onto: Option<Tensor>,
    /// Type of the result: f32, or that of the operands; None: that of the operands.
    pub dtype: Option<DType>,
    /// On CUDA, f32 operands are rounded to 11 bits before they are multiplied, several times as fast.
    pub tf32: bool,
}

impl Default for ProductOptions {
    fn default() -> Self {
        Self { alpha: 1.0, onto: None, dtype: None, tf32: false }
    }
}

/// alpha · a b, added to what `options` gives: a (m, k), b (k, n) -> (m, n).
///
/// Operands are read in place if the steps between rows or between columns are 1; others are copied first.
/// f32, bf16 and f16 on CUDA, summed in f32; on the CPU as candle multiplies. No gradient flows.
///
/// # Errors
/// If shapes, types or devices disagree.
pub fn product(a: &Tensor, b: &Tensor, options: ProductOptions) -> Result<Tensor> {
    let ((m, inner), (k, n)) = (a.dims2()?, b.dims2()?);
    let dtype = options.dtype.unwrap_or(a.dtype());
    let onto = options.onto;
    let agrees = onto.as_ref().is_none_or(|c| c.dims() == [m, n] && c.dtype() == dtype);
    let known = dtype == a.dtype() || dtype == DType::F32;
    if inner != k || a.dtype() != b.dtype() || !agrees || !known {
        bail!(
            "product: a {:?} of {:?}, b {:?} of {:?}, result of {dtype:?} onto {:?}, expected (m, k) and (k, n) of one type, (m, n) of that type or f32",
            a.shape(),
            a.dtype(),
            b.shape(),
            b.dtype(),
            onto.as_ref().map(Tensor::shape)
        );
    }
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        let device = crate::cuda::device_of("product", a)?;
        let c = match &onto {
            Some(c) => c.clone(),
            None => crate::cuda::output_tensor(&device, dtype, (m, n))?,
        };
        cuda::gemm(a, b, (options.alpha, options.tf32), onto.is_some(), &c)?;
        return Ok(c);
    }
    let mut c = a.detach().matmul(&b.detach())?.to_dtype(dtype)?;
    if options.alpha != 1.0 {
        c = (c * f64::from(options.alpha))?;
    }
    match onto {
        Some(onto) => onto + c,
        None => Ok(c),
    }
}

#[cfg(feature = "cuda")]
pub(crate) use cuda::gemm;

#[cfg(feature = "cuda")]
mod cuda {
    use crate::cuda::{address_of_matrix, device_of, failed};
    use candle_core::cuda_backend::cudarc::cublas::{result, sys};
    use candle_core::{DType, Result, Tensor, bail};
    use std::ffi::c_int;
    use sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};

    fn type_of(dtype: DType) -> Result<sys::cudaDataType> {
        match dtype {
            DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
            DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
            DType::F16 => Ok(sys::cudaDataType_t::CUDA_R_16F),
            other => bail!("product: elements of {other:?}, expected f32, bf16 or f16"),
        }
    }

    /// A matrix that cuBLAS reads: step between its lines, and whether the lines are its columns.
    fn lines(x: &Tensor) -> Option<(usize, bool)> {
        let (rows, columns) = x.dims2().ok()?;
        match *x.stride() {
            [step, 1] if step >= columns || rows == 1 => Some((step.max(columns), false)),
            [1, step] if step >= rows || columns == 1 => Some((step.max(rows), true)),
            // The step along a dimension of one is never taken.
            [step, _] if columns == 1 => Some((step.max(1), false)),
            [_, step] if rows == 1 => Some((step.max(1), true)),
            _ => None,
        }
    }

    /// c = alpha · a b, or with `adds` that more: `c` in rows that may be part of longer ones.
    pub(crate) fn gemm(
        a: &Tensor,
        b: &Tensor,
        (alpha, tf32): (f32, bool),
        adds: bool,
        c: &Tensor,
    ) -> Result<()> {
        let ((m, k), n) = (a.dims2()?, b.dim(1)?);
        if m == 0 || n == 0 {
            return Ok(());
        }
        if k == 0 {
            bail!("product: a ({m}, 0), expected at least one column");
        }
        let readable = |x: &Tensor| match lines(x) {
            Some(_) => Ok(x.clone()),
            None => x.force_contiguous(),
        };
        let (a, b) = (readable(a)?, readable(b)?);
        let (Some((a_step, a_turned)), Some((b_step, b_turned)), Some((c_step, false))) =
            (lines(&a), lines(&b), lines(c))
        else {
            bail!("product: result {:?}, expected rows of neighbouring elements", c.layout());
        };
        for x in [m, n, k, a_step, b_step, c_step] {
            if x > c_int::MAX as usize {
                bail!("product: a size of {x}, expected at most {}", c_int::MAX);
            }
        }
        // cuBLAS counts columns first: cᵀ = bᵀ aᵀ.
        let turned = |turned| if turned { CUBLAS_OP_T } else { CUBLAS_OP_N };
        let beta = if adds { 1f32 } else { 0f32 };
        let compute = match tf32 && a.dtype() == DType::F32 {
            true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let device = device_of("product", c)?;
        let handle = device.cublas_handle();
        // SAFETY: the three matrices are live tensors on this device of the sizes and steps given; the handle works on
        // the device's one stream.
        unsafe {
            result::gemm_ex(
                *handle.handle(),
                turned(b_turned),
                turned(a_turned),
                n as c_int,
                m as c_int,
                k as c_int,
                std::ptr::from_ref(&alpha).cast(),
                address_of_matrix(&b)? as *const _,
                type_of(b.dtype())?,
                b_step as c_int,
                address_of_matrix(&a)? as *const _,
                type_of(a.dtype())?,
                a_step as c_int,
                std::ptr::from_ref(&beta).cast(),
                address_of_matrix(c)? as *mut _,
                type_of(c.dtype())?,
                c_step as c_int,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .map_err(|e| failed(format_args!("product: ({m}, {k}) and ({k}, {n})"), e))
    }
}
