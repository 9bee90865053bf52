//! A packed matrix on a CUDA device, multiplied by candle's quantised kernels or by a f32 product of its decoded values.
//! Knows no file: bytes are copied to the device once.

use super::{PackedMatrix, PackedType};
use crate::storage::zeros;
use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor};
use std::borrow::Cow;
use std::sync::Arc;

/// Rows of x up to which a product reads the packed blocks with x rounded to 8-bit integers, as on the CPU.
const PACKED_ROWS: usize = 8;

/// The device's copy of the weight.
#[derive(Clone)]
pub(super) enum DeviceMatrix {
    /// (rows, cols) in blocks.
    Quantized(Arc<QTensor>),
    /// (rows, cols), f32. f16 and bf16 weights are held in f32 too: products stay those of the CPU.
    Dense(Tensor),
}

impl DeviceMatrix {
    pub(super) fn new(matrix: &PackedMatrix, device: &Device) -> Result<Self> {
        let shape = (matrix.rows, matrix.cols);
        let data = matrix.data().map_err(candle_core::Error::wrap)?;
        let Some(dtype) = ggml_type(matrix.ty) else {
            let mut values = vec![0f32; matrix.rows * matrix.cols];
            matrix
                .dequantize_rows(0..matrix.rows, &mut values)
                .map_err(candle_core::Error::wrap)?;
            return Ok(Self::Dense(Tensor::from_vec(values, shape, device)?));
        };
        let storage = QStorage::from_data(Cow::Borrowed(data), device, dtype)?;
        Ok(Self::Quantized(Arc::new(QTensor::new(storage, shape)?)))
    }

    /// x (.., cols) -> (.., rows), f32.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let cols = match self {
            Self::Quantized(weight) => weight.shape().dims2()?.1,
            Self::Dense(weight) => weight.dim(1)?,
        };
        let mut dims = x.dims().to_vec();
        let last = dims.pop();
        if last != Some(cols) || x.dtype() != DType::F32 {
            candle_core::bail!(
                "packed linear: expected x (.., {cols}) of f32, got {:?} of {:?}",
                x.shape(),
                x.dtype()
            );
        }
        let m: usize = dims.iter().product();
        if m == 0 {
            let rows = match self {
                Self::Quantized(weight) => weight.shape().dims2()?.0,
                Self::Dense(weight) => weight.dim(0)?,
            };
            dims.push(rows);
            return zeros(dims, DType::F32, x.device());
        }
        let x = x.reshape((m, cols))?;
        let y = match self {
            Self::Quantized(weight) if m <= PACKED_ROWS => {
                QMatMul::QTensor(weight.clone()).forward(&x)?
            }
            // A prompt: decoding a matrix once costs less than the product, and the product is exact in f32.
            Self::Quantized(weight) => x.matmul(&weight.dequantize(x.device())?.t()?)?,
            Self::Dense(weight) => x.matmul(&weight.t()?)?,
        };
        dims.push(y.dim(1)?);
        y.reshape(dims)
    }
}

/// The type under candle's name; None for the plain floating-point types.
fn ggml_type(ty: PackedType) -> Option<GgmlDType> {
    Some(match ty {
        PackedType::F32 | PackedType::F16 | PackedType::BF16 => return None,
        PackedType::Q4_0 => GgmlDType::Q4_0,
        PackedType::Q4_1 => GgmlDType::Q4_1,
        PackedType::Q5_0 => GgmlDType::Q5_0,
        PackedType::Q5_1 => GgmlDType::Q5_1,
        PackedType::Q8_0 => GgmlDType::Q8_0,
        PackedType::Q2K => GgmlDType::Q2K,
        PackedType::Q3K => GgmlDType::Q3K,
        PackedType::Q4K => GgmlDType::Q4K,
        PackedType::Q5K => GgmlDType::Q5K,
        PackedType::Q6K => GgmlDType::Q6K,
    })
}
