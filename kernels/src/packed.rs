//! Weight matrices in ggml's block layouts, multiplied on the CPU without a decoded copy.
//! Knows no model, tensor name or file: bytes come from the caller and may point into a mapped file.
//!
//! Two ways to `x Wᵀ`, chosen by the number of rows of x:
//! a few rows (decode) are multiplied straight from the packed blocks, with x rounded to 8-bit integers in blocks of 32
//! for the quantised types but Q2_K and Q3_K; many rows (prefill) multiply decoded f32 blocks of the weight by a f32 GEMM.
//! Instruction sets are chosen at run time; see [`SimdLevel`].

mod activation;
mod block;
#[cfg(feature = "cuda")]
mod cuda;
mod portable;
pub mod reference;
mod schedule;
mod threads;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};

use crate::storage::contiguous_range;
use crate::{Error, Result};

/// The layout of a packed matrix: ggml's type of the same name, byte for byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names are ggml's and the table in `packed.md` describes them")]
pub enum PackedType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl PackedType {
    /// Every type, in the order of the enum.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The type that a GGUF file names by `id` (`enum ggml_type`).
    ///
    /// # Errors
    /// InvalidArgument if the id is unknown or a type that is not supported.
    pub fn from_ggml_id(id: u32) -> Result<Self> {
        Self::ALL.into_iter().find(|ty| ty.ggml_id() == id).ok_or_else(|| {
            Error::invalid(format!("packed type: expected a supported ggml type id, got {id}"))
        })
    }

    /// The number of this type in `enum ggml_type`.
    pub fn ggml_id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::BF16 => 30,
        }
    }

    /// Values in one block; a row holds whole blocks.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }
}

/// Bytes that several matrices share: a vector, or a mapped file.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// The instruction sets a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SimdLevel {
    /// What the target guarantees: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (2013).
    Avx2,
    /// The same with AVX-512 F, BW, VL and VNNI (2019).
    Avx512Vnni,
}

impl SimdLevel {
    /// The fastest level of this machine.
    pub fn best() -> Self {
        [Self::Avx512Vnni, Self::Avx2]
            .into_iter()
            .find(|level| level.is_available())
            .unwrap_or(Self::Portable)
    }

    /// Every level of this machine, slowest first.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512Vnni]
            .into_iter()
            .filter(|level| level.is_available())
            .collect()
    }

    /// Whether this machine has the level.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            };
            let avx512 = || {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            };
            match self {
                Self::Portable => true,
                Self::Avx2 => avx2(),
                Self::Avx512Vnni => avx2() && avx512(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }
}

/// A weight `(rows, cols)` = `(out_features, in_features)`, row-major, in blocks along a row.
///
/// Cost: cloning copies a pointer, not the bytes.
#[derive(Clone)]
pub struct PackedMatrix {
    ty: PackedType,
    rows: usize,
    cols: usize,
    bytes: SharedBytes,
    range: Range<usize>,
    #[cfg(feature = "cuda")]
    on_device: Option<cuda::DeviceMatrix>,
}

impl PackedMatrix {
    /// A matrix over `bytes[range]`, which holds `rows * cols` values of `ty` and nothing else.
    ///
    /// # Errors
    /// InvalidArgument if `cols` is not a whole number of blocks, if the range is not inside the bytes, or if its length
    /// is not that of the matrix.
    pub fn new(
        ty: PackedType,
        rows: usize,
        cols: usize,
        bytes: SharedBytes,
        range: Range<usize>,
    ) -> Result<Self> {
        if !cols.is_multiple_of(ty.block_len()) {
            return Err(Error::invalid(format!(
                "packed matrix: expected cols in whole blocks of {} for {ty:?}, got {cols}",
                ty.block_len()
            )));
        }
        let expected = (cols / ty.block_len())
            .checked_mul(ty.block_bytes())
            .and_then(|row_bytes| row_bytes.checked_mul(rows))
            .ok_or_else(|| {
                Error::invalid(format!("packed matrix: {rows} x {cols} does not fit in memory"))
            })?;
        let matrix = Self {
            ty,
            rows,
            cols,
            bytes,
            range,
            #[cfg(feature = "cuda")]
            on_device: None,
        };
        let got = matrix.data()?.len();
        if got != expected {
            return Err(Error::invalid(format!(
                "packed matrix: expected {expected} bytes for {rows} x {cols} {ty:?}, got {got}"
            )));
        }
        Ok(matrix)
    }

    /// The matrix with a copy on `device`, where [`linear`] then multiplies it; on the CPU the matrix as it is.
    /// Rows can still be decoded on the CPU.
    ///
    /// Cost: the bytes of the matrix on the device; f16 and bf16 are held in f32 there.
    ///
    /// # Errors
    /// If the device has no room, or this build has no kernels for it.
    pub fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        match device {
            Device::Cpu => Ok(self.clone()),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                let on_device = Some(cuda::DeviceMatrix::new(self, device)?);
                Ok(Self { on_device, ..self.clone() })
            }
            other => candle_core::bail!("packed matrix: no kernels for {:?}", other.location()),
        }
    }

    /// Number of rows: out_features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: in_features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The layout.
    pub fn ty(&self) -> PackedType {
        self.ty
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.cols / self.ty.block_len() * self.ty.block_bytes()
    }

    /// The bytes of the whole matrix, row after row.
    ///
    /// # Errors
    /// InvalidArgument if the shared bytes have become shorter since [`PackedMatrix::new`].
    pub fn data(&self) -> Result<&[u8]> {
        let bytes = (*self.bytes).as_ref();
        bytes.get(self.range.clone()).ok_or_else(|| {
            Error::invalid(format!(
                "packed matrix: expected bytes {:?} inside the buffer, got a buffer of {}",
                self.range,
                bytes.len()
            ))
        })
    }

    /// The bytes of one row.
    ///
    /// # Errors
    /// InvalidArgument if there is no such row; as [`PackedMatrix::data`].
    pub fn row(&self, row: usize) -> Result<&[u8]> {
        self.check_rows(&(row..row.saturating_add(1)))?;
        Ok(&self.data()?[row * self.row_bytes()..][..self.row_bytes()])
    }

    /// Decodes rows: `out` is `(rows.len(), cols)`, row-major. Also the lookup of an embedding.
    ///
    /// # Errors
    /// InvalidArgument if a row does not exist or `out` has another length.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.check_rows(&rows)?;
        let expected = rows.len() * self.cols;
        if out.len() != expected {
            return Err(Error::invalid(format!(
                "dequantize rows: expected an output of {expected} values, got {}",
                out.len()
            )));
        }
        let row_bytes = self.row_bytes();
        let src = &self.data()?[rows.start * row_bytes..rows.end * row_bytes];
        schedule::dequantize(SimdLevel::best(), self.ty, src, out);
        Ok(())
    }

    /// `x Wᵀ`: x `(m, cols)`, out `(m, rows)`, both row-major f32. The same inputs give the same bits on one machine,
    /// whatever the number of threads.
    ///
    /// Accuracy: for a quantised type but Q2_K and Q3_K and few rows (up to 16, on a processor without AVX2 4) x is rounded to 8-bit integers in blocks of 32, as ggml does;
    /// otherwise the products are f32.
    ///
    /// # Errors
    /// InvalidArgument if `x` or `out` has another length.
    pub fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) -> Result<()> {
        self.matmul_at(SimdLevel::best(), x, m, out)
    }

    /// As [`PackedMatrix::matmul`] with a level other than the best: to compare levels, not for speed.
    ///
    /// # Errors
    /// As [`PackedMatrix::matmul`], and InvalidArgument if this machine lacks the level.
    pub fn matmul_at(&self, level: SimdLevel, x: &[f32], m: usize, out: &mut [f32]) -> Result<()> {
        if !level.is_available() {
            return Err(Error::invalid(format!(
                "packed matmul: expected a level of this machine, got {level:?}"
            )));
        }
        for (name, got, width) in [("x", x.len(), self.cols), ("out", out.len(), self.rows)] {
            if m.checked_mul(width) != Some(got) {
                return Err(Error::invalid(format!(
                    "packed matmul: expected {name} of {m} x {width} values, got {got}"
                )));
            }
        }
        schedule::matmul(level, self, self.data()?, x, m, out);
        Ok(())
    }

    /// A new matrix whose row `i` is this one's row `order[i]`, copied: GGUF files of Llama models hold the rows of q and k
    /// in another order than HuggingFace's.
    ///
    /// # Errors
    /// InvalidArgument if a row does not exist; rows may repeat or be left out.
    pub fn permute_rows(&self, order: &[usize]) -> Result<Self> {
        let (data, row_bytes) = (self.data()?, self.row_bytes());
        let mut bytes = Vec::with_capacity(order.len() * row_bytes);
        for &row in order {
            self.check_rows(&(row..row.saturating_add(1)))?;
            bytes.extend_from_slice(&data[row * row_bytes..][..row_bytes]);
        }
        let range = 0..bytes.len();
        Self::new(self.ty, order.len(), self.cols, Arc::new(bytes), range)
    }

    /// The rows `rows`, over the same bytes.
    ///
    /// # Errors
    /// InvalidArgument if a row does not exist.
    pub fn select_rows(&self, rows: Range<usize>) -> Result<Self> {
        self.check_rows(&rows)?;
        let at = |row: usize| self.range.start + row * self.row_bytes();
        let range = at(rows.start)..at(rows.end);
        Self::new(self.ty, rows.len(), self.cols, self.bytes.clone(), range)
    }

    /// The columns `columns` of every row, copied: as they are stored where the range is of whole blocks, else as f32.
    ///
    /// # Errors
    /// InvalidArgument if a column does not exist.
    pub fn select_columns(&self, columns: Range<usize>) -> Result<Self> {
        if columns.start > columns.end || columns.end > self.cols {
            return Err(Error::invalid(format!(
                "packed matrix: expected columns inside 0..{}, got {columns:?}",
                self.cols
            )));
        }
        let (data, block) = (self.data()?, self.ty.block_len());
        let is_whole = [columns.start, columns.end].iter().all(|at| at.is_multiple_of(block));
        let (ty, bytes): (_, Vec<u8>) = match is_whole {
            true => {
                let at = |column: usize| column / block * self.ty.block_bytes();
                let part = at(columns.start)..at(columns.end);
                let rows = data.chunks_exact(self.row_bytes().max(1)).take(self.rows);
                (self.ty, rows.flat_map(|row| &row[part.clone()]).copied().collect())
            }
            false => {
                let mut values = vec![0f32; self.cols];
                let mut bytes = Vec::with_capacity(self.rows * columns.len() * 4);
                for row in 0..self.rows {
                    self.dequantize_rows(row..row + 1, &mut values)?;
                    bytes.extend(values[columns.clone()].iter().flat_map(|x| x.to_le_bytes()));
                }
                (PackedType::F32, bytes)
            }
        };
        let range = 0..bytes.len();
        Self::new(ty, self.rows, columns.len(), Arc::new(bytes), range)
    }

    fn check_rows(&self, rows: &Range<usize>) -> Result<()> {
        if rows.start > rows.end || rows.end > self.rows {
            return Err(Error::invalid(format!(
                "packed matrix: expected rows inside 0..{}, got {rows:?}",
                self.rows
            )));
        }
        Ok(())
    }
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedMatrix({} x {} {:?})", self.rows, self.cols, self.ty)
    }
}

/// `x Wᵀ` as a tensor: x `(.., in_features)`, f32; result `(.., out_features)` on x's device. No gradient flows through it.
///
/// Cost: an x that is not contiguous is copied first.
///
/// # Errors
/// If x is not f32, if its last dimension is not the matrix's number of columns, or if the matrix is not on x's device.
pub fn linear(x: &Tensor, w: &PackedMatrix) -> candle_core::Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(_), Some(on_device)) = (x.device(), &w.on_device) {
        return on_device.forward(&x.contiguous()?);
    }
    x.contiguous()?.apply_op1_no_bwd(&Linear(w))
}

struct Linear<'a>(&'a PackedMatrix);

impl CustomOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let w = self.0;
        let mut dims = layout.dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == w.cols => *last = w.rows,
            _ => candle_core::bail!(
                "packed linear: expected x (.., {}), got {:?}",
                w.cols,
                layout.shape()
            ),
        }
        let x = &storage.as_slice::<f32>()?[contiguous_range("packed linear", layout)?];
        let m = dims[..dims.len() - 1].iter().product();
        let mut out = vec![0.0; m * w.rows];
        w.matmul(x, m, &mut out).map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }
}
