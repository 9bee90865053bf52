//! The launches of `cuda/ema_scan.cu`.
//! Knows the kernels' chunks and names; the shapes it gets are checked.

use super::{EmaScan, EmaShape};
use crate::cuda::{
    Launch, PerDevice, Words, address, address_of, device_of, launch, output, output_tensor, suffix,
};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor};

/// Tokens of a chunk and threads of a block, as in the kernels.
const CHUNK: usize = 128;
const THREADS: usize = 128;

/// As in `cuda/ema_scan.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct EmaParams {
    x: u64,
    rates: u64,
    state: u64,
    new_state: u64,
    carries: u64,
    levels: u64,
    dlevels: u64,
    dstate: u64,
    adjoints: u64,
    dx: u64,
    dstate_in: u64,
    partial: u64,
    drates: u64,
    seen: u64,
    partials: u64,
    batch: u32,
    tokens: u32,
    channels: u32,
    rates_len: u32,
    chunks: u32,
    first_chunk: u32,
    correct: u32,
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for EmaParams {}

/// The rates on `device`, uploaded once and kept: a device has those of its models, a few numbers each.
pub(super) fn constant_rates(rates: &[f32], device: &CudaDevice) -> Result<Words> {
    static KNOWN: PerDevice<Vec<(Vec<u32>, Words)>> = PerDevice::new();
    let bits: Vec<u32> = rates.iter().map(|rate| rate.to_bits()).collect();
    KNOWN.with(device, |known| {
        if let Some((_, kept)) = known.iter().find(|(has, _)| *has == bits) {
            return Ok(kept.clone());
        }
        let kept = Words::uploaded(device, &bits)?;
        known.push((bits, kept.clone()));
        Ok(kept)
    })
}

/// Where the rates lie: those that the op has, or those of its third tensor.
fn rates_of(op: &EmaScan, tensor: impl FnOnce() -> Result<u64>) -> Result<u64> {
    match &op.constant_rates {
        Some(kept) => Ok(kept.address()),
        None => tensor(),
    }
}

struct Launcher<'a> {
    device: &'a CudaDevice,
    shape: EmaShape,
    dtype: DType,
    /// Channels of a thread.
    width: usize,
}

impl Launcher<'_> {
    fn chunks(&self) -> usize {
        self.shape.tokens.div_ceil(CHUNK)
    }

    fn params(&self, op: &EmaScan) -> Result<EmaParams> {
        let shape = self.shape;
        let small = |x: usize| {
            u32::try_from(x).map_err(|_| {
                candle_core::Error::Msg(format!("ema_scan: {shape:?}, expected sizes below 2^32"))
            })
        };
        Ok(EmaParams {
            seen: op.seen,
            batch: small(shape.batch)?,
            tokens: small(shape.tokens)?,
            channels: small(shape.channels)?,
            rates_len: small(shape.rates)?,
            chunks: small(self.chunks())?,
            correct: op.bias_correction.into(),
            ..EmaParams::default()
        })
    }

    fn blocks(&self) -> usize {
        self.shape.channels.div_ceil(THREADS * self.width)
    }

    /// A kernel over `chunks` chunks of every channel and batch, named by width and, if it reads x, type.
    fn chunked(&self, kernel: &str, typed: bool, chunks: usize, p: &EmaParams) -> Result<()> {
        let name = match typed {
            true => format!("{kernel}_{}_{}", suffix("ema_scan", self.dtype)?, self.width),
            false => format!("{kernel}_{}", self.width),
        };
        let grid = (self.blocks() as u32, chunks as u32, p.batch);
        let shape = Launch { grid, block: THREADS as u32, shared_bytes: 0 };
        launch(self.device, "ema_scan", &name, shape, p)
    }

    fn carry(&self, kernel: &str, p: &EmaParams) -> Result<()> {
        let grid = (p.channels.div_ceil(THREADS as u32), p.rates_len, p.batch);
        let shape = Launch { grid, block: THREADS as u32, shared_bytes: 0 };
        launch(self.device, "ema_scan", kernel, shape, p)
    }

    /// A state per chunk.
    fn scratch(&self) -> Result<Tensor> {
        output_tensor(self.device, DType::F32, self.chunks() * self.shape.state_len())
    }

    /// The state before every chunk, if there are several: one chunk starts from the state itself.
    fn carries_between(&self, p: &mut EmaParams) -> Result<Option<Tensor>> {
        if self.chunks() == 1 {
            return Ok(None);
        }
        let scratch = self.scratch()?;
        p.carries = address(&scratch)?;
        self.carries(p)?;
        Ok(Some(scratch))
    }

    /// The state before every chunk into `p.carries`.
    fn carries(&self, p: &EmaParams) -> Result<()> {
        self.chunked("ema_aggregate", true, self.chunks() - 1, p)?;
        self.carry("ema_carry", p)
    }
}

fn launcher<'a>(
    op: &EmaScan,
    device: &'a CudaDevice,
    dtype: DType,
    addresses: &[u64],
) -> Launcher<'a> {
    // Four channels are one load of 16 bytes at most.
    let aligned = addresses.iter().all(|address| address % 16 == 0);
    let width = if op.shape.channels.is_multiple_of(4) && aligned { 4 } else { 1 };
    Launcher { device, shape: op.shape, dtype, width }
}

/// Levels and new state in one vector.
pub(super) fn scan(
    op: &EmaScan,
    (x, x_layout): (&CudaStorage, &Layout),
    (state, state_layout): (&CudaStorage, &Layout),
    (rates, rates_layout): (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let device = x.device();
    let len = op.shape.levels_len() + op.shape.state_len();
    let out = output(device, DType::F32, len)?;
    let shape = Shape::from(len);
    let levels = address_of(&out, &Layout::contiguous(&shape))?;
    let (x_address, state) = (address_of(x, x_layout)?, address_of(state, state_layout)?);
    let launcher = launcher(op, device, x.dtype(), &[x_address, state]);
    let mut p = EmaParams {
        x: x_address,
        state,
        rates: rates_of(op, || address_of(rates, rates_layout))?,
        levels,
        new_state: levels + 4 * op.shape.levels_len() as u64,
        ..launcher.params(op)?
    };
    let _carries = launcher.carries_between(&mut p)?;
    launcher.chunked("ema_levels", true, launcher.chunks(), &p)?;
    Ok((out, shape))
}

/// The new state alone.
pub(super) fn advance(op: &EmaScan, x: &Tensor, state: &Tensor, rates: &Words) -> Result<Tensor> {
    let device = device_of("ema_advance", x)?;
    let out = output_tensor(&device, DType::F32, state.shape())?;
    let (x_address, state) = (address(x)?, address(state)?);
    let launcher = launcher(op, &device, x.dtype(), &[x_address, state]);
    let mut p = EmaParams {
        x: x_address,
        state,
        rates: rates.address(),
        new_state: address(&out)?,
        first_chunk: (launcher.chunks() - 1) as u32,
        ..launcher.params(op)?
    };
    let _carries = launcher.carries_between(&mut p)?;
    launcher.chunked("ema_levels", true, 1, &p)?;
    Ok(out)
}

/// Gradients of x, state and rates from that of the packed result.
pub(super) fn backward(
    op: &EmaScan,
    x: &Tensor,
    state: &Tensor,
    rates: &Tensor,
    grad: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let device = device_of("ema_scan", x)?;
    let dx = output_tensor(&device, x.dtype(), x.shape())?;
    let dstate = output_tensor(&device, DType::F32, state.shape())?;
    let drates = output_tensor(&device, DType::F32, op.shape.rates)?;
    let (x_address, state, grad) = (address(x)?, address(state)?, address(grad)?);
    let launcher = launcher(op, &device, x.dtype(), &[x_address, state, grad]);
    let (carries, adjoints) = (launcher.scratch()?, launcher.scratch()?);
    let partials = op.shape.batch * launcher.chunks() * launcher.blocks();
    let partial = output_tensor(&device, DType::F32, partials * op.shape.rates)?;
    let p = EmaParams {
        x: x_address,
        state,
        rates: rates_of(op, || address(rates))?,
        carries: address(&carries)?,
        adjoints: address(&adjoints)?,
        dlevels: grad,
        dstate: grad + 4 * op.shape.levels_len() as u64,
        dx: address(&dx)?,
        dstate_in: address(&dstate)?,
        partial: address(&partial)?,
        drates: address(&drates)?,
        partials: partials as u64,
        ..launcher.params(op)?
    };
    launcher.carries(&p)?;
    launcher.chunked("ema_backward_aggregate", false, launcher.chunks() - 1, &p)?;
    launcher.carry("ema_backward_carry", &p)?;
    launcher.chunked("ema_backward", true, launcher.chunks(), &p)?;
    let shape = Launch { grid: (p.rates_len, 1, 1), block: THREADS as u32, shared_bytes: 0 };
    launch(&device, "ema_scan", "ema_sum_rates", shape, &p)?;
    Ok((dx, dstate, drates))
}
