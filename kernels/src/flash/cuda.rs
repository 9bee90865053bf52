//! Launches of the dense attention kernels: grids and buffers.
//! Knows the kernels' names and tiles; the shapes it gets are checked.

use super::tile::{BackwardTiles, ROW_LANES, Tile};
use super::{AttentionShape, DenseAttentionParams};
use crate::cuda::{self, Launch};
use crate::storage::zeros;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape, Tensor, bail};

/// Of 16-bit queries, keys and their like up to here a large card's cache holds all that a call walks.
const CACHE_BYTES: usize = 40 << 20;

/// Fewer blocks of keys than this are about one wave of a large card, whose time is that of its longest block.
const FEW_BLOCKS: usize = 528;

/// In place of a bound that is not there.
const UNBOUNDED: i32 = 1 << 29;

/// As in `cuda/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ShapeParams {
    batch: i32,
    query_tokens: i32,
    key_tokens: i32,
    query_heads: i32,
    kv_heads: i32,
    left: i32,
    right: i32,
    scale: f32,
}

/// As in `cuda/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardParams {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    lse: u64,
    shape: ShapeParams,
    d: i32,
}

/// As in `cuda/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardParams {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    dout: u64,
    lse: u64,
    dlse: u64,
    rows: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    shape: ShapeParams,
    d: i32,
}

/// As in `cuda/attention_backward_sm80.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardSplitParams {
    all: BackwardParams,
    parts: u64,
    splits: i32,
    by_tile: i32,
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for ForwardParams {}
// SAFETY: as above.
unsafe impl DeviceRepr for BackwardParams {}
// SAFETY: as above.
unsafe impl DeviceRepr for BackwardSplitParams {}

impl ShapeParams {
    fn new(op: &str, shape: &AttentionShape, params: &DenseAttentionParams) -> Result<Self> {
        let int = |name: &str, x: usize| {
            i32::try_from(x).map_err(|_| {
                candle_core::Error::Msg(format!("{op}: {name} {x}, expected at most {}", i32::MAX))
            })
        };
        // The kernels' row strides, in elements.
        int("query heads · head_dim", shape.query_heads * shape.head_dim)?;
        let window = params.window.map(|window| window.min(UNBOUNDED as usize) as i32);
        Ok(Self {
            batch: int("batch", shape.batch)?,
            query_tokens: int("query tokens", shape.query_tokens)?,
            key_tokens: int("key tokens", shape.key_tokens)?,
            query_heads: int("query heads", shape.query_heads)?,
            kv_heads: int("key/value heads", shape.kv_heads)?,
            left: window.map_or(UNBOUNDED, |window| window - 1),
            right: if params.causal || window.is_some() { 0 } else { UNBOUNDED },
            scale: params.scale,
        })
    }
}

impl Tile {
    /// The forward kernel in 16 bits: q, k and v tiles.
    fn forward(d: usize) -> Self {
        Self {
            rows: 128,
            warps: if d == 256 { 8 } else { 4 },
            shared_bytes: (128 + 2 * 64) * d * 2,
        }
    }

    /// Any f32 kernel, with `tiles` padded tiles of 32 rows.
    fn f32(d: usize, tiles: usize) -> Self {
        Self { rows: 32, warps: 8, shared_bytes: tiles * 32 * (d + 4) * 4 }
    }

    /// One block for every `rows` of `tokens`, of `heads` heads.
    fn launch(&self, op: &str, tokens: usize, heads: usize) -> Result<Launch> {
        let blocks = tokens.div_ceil(self.rows).saturating_mul(heads);
        if blocks > i32::MAX as usize {
            bail!("{op}: {blocks} blocks, expected at most {}", i32::MAX);
        }
        Ok(Launch {
            grid: (blocks as u32, 1, 1),
            block: 32 * self.warps,
            shared_bytes: self.shared_bytes as u32,
        })
    }
}

fn check_head_dim(op: &str, dtype: DType, d: usize) -> Result<()> {
    let known = match dtype {
        DType::F32 => d.is_multiple_of(32) && d <= 256,
        _ => matches!(d, 64 | 96 | 128 | 256),
    };
    if !known {
        bail!(
            "{op}: head_dim {d} in {dtype:?} on CUDA, expected 64, 96, 128 or 256, or in f32 a multiple of 32 up to 256"
        );
    }
    Ok(())
}

/// (out, lse) of the contiguous q, k and v at these addresses, multiples of 16.
pub(super) fn forward(
    device: &CudaDevice,
    dtype: DType,
    [q, k, v]: [u64; 3],
    shape: &AttentionShape,
    params: &DenseAttentionParams,
) -> Result<(CudaStorage, Tensor)> {
    let op = "attention_forward";
    let d = shape.head_dim;
    check_head_dim(op, dtype, d)?;
    let out_shape = Shape::from(shape.out());
    let out = cuda::output(device, dtype, out_shape.elem_count())?;
    let lse = cuda::output_tensor(device, DType::F32, shape.lse())?;
    if shape.has_no_query() {
        return Ok((out, lse));
    }
    let kernel_params = ForwardParams {
        q,
        k,
        v,
        out: cuda::address_of(&out, &candle_core::Layout::contiguous(&out_shape))?,
        lse: cuda::address(&lse)?,
        shape: ShapeParams::new(op, shape, params)?,
        d: d as i32,
    };
    let (source, kernel, tile) = match dtype {
        DType::F32 => {
            ("attention_forward_f32", "attention_forward_f32".to_owned(), Tile::f32(d, 3))
        }
        _ => {
            let kernel = format!("attention_forward_{}_{d}", cuda::suffix(op, dtype)?);
            ("attention_forward_sm80", kernel, Tile::forward(d))
        }
    };
    let launch = tile.launch(op, shape.query_tokens, shape.batch * shape.query_heads)?;
    cuda::launch(device, source, &kernel, launch, &kernel_params)?;
    Ok((out, lse))
}

/// (dq, dk, dv); `inputs` are q, k, v, out and dout, contiguous at multiples of 16 bytes, as are `lse` and `dlse`.
pub(super) fn backward(
    device: &CudaDevice,
    inputs: &[Tensor; 5],
    lse: &Tensor,
    dlse: Option<&Tensor>,
    shape: &AttentionShape,
    params: &DenseAttentionParams,
) -> Result<(Tensor, Tensor, Tensor)> {
    let op = "attention_backward";
    let [q, k, v, out, dout] = inputs;
    let (d, dtype) = (shape.head_dim, q.dtype());
    check_head_dim(op, dtype, d)?;
    if shape.has_no_query() || shape.key_tokens == 0 {
        let zeros = |x: &Tensor| zeros(x.shape(), dtype, x.device());
        return Ok((zeros(q)?, zeros(k)?, zeros(v)?));
    }
    let dq = cuda::output_tensor(device, dtype, shape.out())?;
    let dk = cuda::output_tensor(device, dtype, shape.keys())?;
    let dv = cuda::output_tensor(device, dtype, shape.keys())?;
    let (batch, h, tq) = shape.lse();
    let rows = cuda::output_tensor(device, DType::F32, (batch, h, tq, 2))?;
    let tiles = match dtype {
        DType::F32 => {
            BackwardTiles { kv_kernels: &["kv"], kv: Tile::f32(d, 4), q: Tile::f32(d, 4) }
        }
        _ => BackwardTiles::new(d, cuda::max_shared_bytes(device)?),
    };
    let kv_blocks = shape.key_tokens.div_ceil(tiles.kv.rows) * batch * shape.kv_heads;
    let splits = match dtype {
        DType::F32 => 1,
        _ if kv_blocks < FEW_BLOCKS => shape.group(),
        _ => 1,
    };
    let parts = match splits {
        1 => None,
        _ => Some(cuda::output_tensor(device, DType::F32, (2, splits, dk.elem_count()))?),
    };
    let kernel_params = BackwardParams {
        q: cuda::address(q)?,
        k: cuda::address(k)?,
        v: cuda::address(v)?,
        out: cuda::address(out)?,
        dout: cuda::address(dout)?,
        lse: cuda::address(lse)?,
        dlse: dlse.map(cuda::address).transpose()?.unwrap_or(0),
        rows: cuda::address(&rows)?,
        dq: cuda::address(&dq)?,
        dk: cuda::address(&dk)?,
        dv: cuda::address(&dv)?,
        shape: ShapeParams::new(op, shape, params)?,
        d: d as i32,
    };
    let split_params = BackwardSplitParams {
        all: kernel_params,
        parts: parts.as_ref().map(cuda::address).transpose()?.unwrap_or(0),
        splits: splits as i32,
        by_tile: i32::from(shape.walked_bytes() <= CACHE_BYTES),
    };
    let suffix = cuda::suffix(op, dtype)?;
    let (source, size) = match dtype {
        DType::F32 => ("attention_backward_f32", String::new()),
        _ => ("attention_backward_sm80", format!("_{d}")),
    };
    let run = |name: &str, launch: Launch| {
        let kernel = format!("attention_backward_{name}");
        match dtype {
            DType::F32 => cuda::launch(device, source, &kernel, launch, &kernel_params),
            _ => cuda::launch(device, source, &kernel, launch, &split_params),
        }
    };
    let per_row = Tile { rows: 256 / ROW_LANES, warps: 8, shared_bytes: 0 };
    run(&format!("rows_{suffix}"), per_row.launch(op, batch * h * tq, 1)?)?;
    for kernel in tiles.kv_kernels {
        let launch = tiles.kv.launch(op, shape.key_tokens, batch * shape.kv_heads * splits)?;
        run(&format!("{kernel}_{suffix}{size}"), launch)?;
    }
    if splits > 1 {
        // Four values a thread, of dk and of dv.
        let blocks = dk.elem_count().div_ceil(4 * 256);
        let launch = Launch { grid: (blocks as u32, 2, 1), block: 256, shared_bytes: 0 };
        run(&format!("sum_{suffix}"), launch)?;
    }
    run(&format!("q_{suffix}{size}"), tiles.q.launch(op, tq, batch * h)?)?;
    Ok((dq, dk, dv))
}
