//! The launches of `cuda/route_forward.cu` and `cuda/route_backward.cu`, and the append of keys and values to pages.
//! Knows the kernels' tiles and names; the shapes it gets are checked.

use super::{Numbers, RouteGradients, RouteInputs, RouteShape};
use crate::cuda::{self, Launch, address, address_of};
use crate::pages::PagePool;
use crate::rope::RotaryAngles;
use crate::route::cuda::constant_rates;
use crate::storage::aligned;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Tensor, bail};

/// As in `cuda/route.cuh`, like all numbers here.
const THREADS: usize = 256;
/// Tokens of a thread.
const RUN: usize = 8;
/// Pages that travel in the launch.
const MAX_SLOTS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct KernelParams {
    keys: u64,
    values: u64,
    logits: u64,
    state: u64,
    gate: u64,
    rates: u64,
    bias: u64,
    norm: u64,
    cosine: u64,
    sine: u64,
    out_keys: u64,
    out_raw: u64,
    out_values: u64,
    new_state: u64,
    carries: u64,
    dkeys: u64,
    dvalues: u64,
    dkv: u64,
    dstate: u64,
    dweights: u64,
    dbias: u64,
    dnorm: u64,
    dlogits: u64,
    dgate: u64,
    sums: u64,
    prefixes: u64,
    flags: u64,
    seen: u64,
    row_stride: u64,
    batch: u32,
    tokens: u32,
    heads: u32,
    d: u32,
    m: u32,
    chunks: u32,
    slices: u32,
    lanes: u32,
    carry_rows: u32,
    correct: u32,
    paged: u32,
    offset: u32,
    eps: f32,
    slots: [u32; MAX_SLOTS],
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for KernelParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ColumnParams {
    from: u64,
    to: u64,
    rows: u64,
    columns: u32,
}

// SAFETY: as above.
unsafe impl DeviceRepr for ColumnParams {}

/// How the blocks of one direction divide the work: a head and `rows` tokens each.
struct Tiles {
    /// Channels of a thread in each half of a head.
    quarter: usize,
    /// Threads that share a run of tokens.
    lanes: usize,
    rows: usize,
    chunks: usize,
}

impl Tiles {
    fn new(quarter: usize, t: usize, d: usize) -> Self {
        let lanes = d.div_ceil(2 * quarter).next_power_of_two().max(8);
        let rows = THREADS / lanes * RUN;
        Self { quarter, lanes, rows, chunks: t.div_ceil(rows) }
    }

    fn forward(t: usize, d: usize) -> Self {
        Self::new(4, t, d)
    }

    fn backward(t: usize, d: usize) -> Self {
        // A head is at most the 32 lanes of a warp.
        Self::new(if d > 128 { 4 } else { 2 }, t, d)
    }

    fn params(&self, b: usize, t: usize, g: usize, d: usize) -> Result<KernelParams> {
        let blocks = b.saturating_mul(2 * g).saturating_mul(self.chunks);
        if t > i32::MAX as usize || blocks > i32::MAX as usize || 2 * g * d > i32::MAX as usize {
            bail!("route: ({b}, {t}, 2, {g}, {d}), expected fewer than 2^31 blocks");
        }
        Ok(KernelParams {
            keys: 0,
            values: 0,
            logits: 0,
            state: 0,
            gate: 0,
            rates: 0,
            bias: 0,
            norm: 0,
            cosine: 0,
            sine: 0,
            out_keys: 0,
            out_raw: 0,
            out_values: 0,
            new_state: 0,
            carries: 0,
            dkeys: 0,
            dvalues: 0,
            dkv: 0,
            dstate: 0,
            dweights: 0,
            dbias: 0,
            dnorm: 0,
            dlogits: 0,
            dgate: 0,
            sums: 0,
            prefixes: 0,
            flags: 0,
            seen: 0,
            row_stride: 0,
            batch: b as u32,
            tokens: t as u32,
            heads: g as u32,
            d: d as u32,
            m: 0,
            chunks: self.chunks as u32,
            slices: 2 * g as u32,
            lanes: self.lanes as u32,
            carry_rows: Self::backward(t, d).rows as u32,
            correct: 0,
            paged: 0,
            offset: 0,
            eps: 0.0,
            slots: [0; MAX_SLOTS],
        })
    }

    fn launch(
        &self,
        device: &CudaDevice,
        file: &'static str,
        name: &str,
        p: &KernelParams,
    ) -> Result<()> {
        let grid = (p.slices * p.batch * p.chunks, 1, 1);
        cuda::launch(device, file, name, Launch { grid, block: THREADS as u32, shared_bytes: 0 }, p)
    }

    /// Room for the look-back, its addresses in `p`; none where one chunk is all.
    fn look_back(
        &self,
        device: &CudaDevice,
        m: usize,
        p: &mut KernelParams,
    ) -> Result<Option<[Tensor; 3]>> {
        if self.chunks == 1 {
            return Ok(None);
        }
        let streams = p.batch as usize * p.slices as usize;
        let part = m * 2 * self.quarter * self.lanes;
        let room = || cuda::output_tensor(device, DType::F32, streams * self.chunks * part);
        let flags =
            Tensor::zeros(streams * self.chunks, DType::U32, &Device::Cuda(device.clone()))?;
        let kept = [room()?, room()?, flags];
        let [sums, prefixes, flags] = &kept;
        p.sums = address(sums)?;
        p.prefixes = address(prefixes)?;
        p.flags = address(flags)?;
        Ok(Some(kept))
    }
}

/// Rates that a kernel is compiled for: with fewer, the others are 0 and have no weight.
fn compiled_rates(m: usize) -> usize {
    if m <= 3 { 3 } else { 4 }
}

/// Where the inputs begin on the device; 0 for a bias or norm that is not there.
pub(super) struct Addresses {
    pub(super) kv: u64,
    pub(super) logits: u64,
    pub(super) state: u64,
    pub(super) gate: u64,
    pub(super) bias: u64,
    pub(super) norm: u64,
}

/// The inputs as the kernels read them; kept until after the launch.
struct Ready {
    tensors: [Tensor; 4],
    bias: Option<Tensor>,
    norm: Option<Tensor>,
}

impl Ready {
    fn new(inputs: &RouteInputs<'_>) -> Result<Self> {
        let contiguous = |x: Option<&Tensor>| x.map(Tensor::contiguous).transpose();
        Ok(Self {
            tensors: [
                aligned(inputs.kv)?,
                inputs.logits.contiguous()?,
                inputs.state.contiguous()?,
                inputs.gate.contiguous()?,
            ],
            bias: contiguous(inputs.bias)?,
            norm: contiguous(inputs.norm)?,
        })
    }

    fn addresses(&self) -> Result<Addresses> {
        let [kv, logits, state, gate] = &self.tensors;
        Ok(Addresses {
            kv: address(kv)?,
            logits: address(logits)?,
            state: address(state)?,
            gate: address(gate)?,
            bias: self.bias.as_ref().map_or(Ok(0), address)?,
            norm: self.norm.as_ref().map_or(Ok(0), address)?,
        })
    }
}

/// What a launch of either direction reads beside its own outputs; the tensors are kept until after it.
fn set_inputs(
    p: &mut KernelParams,
    device: &CudaDevice,
    dtype: DType,
    shape: &RouteShape,
    inputs: &Addresses,
    numbers: &Numbers,
) -> Result<[Tensor; 3]> {
    let rates = constant_rates(&numbers.rates, &Device::Cuda(device.clone()))?;
    let (cosine, sine) = numbers.angles.on(device)?;
    p.keys = inputs.kv;
    p.values = inputs.kv + (shape.g * shape.d * dtype.size_in_bytes()) as u64;
    p.row_stride = shape.channels() as u64;
    p.logits = inputs.logits;
    p.state = inputs.state;
    p.gate = inputs.gate;
    p.bias = inputs.bias;
    p.norm = inputs.norm;
    p.rates = address(&rates)?;
    p.cosine = address(&cosine)?;
    p.sine = address(&sine)?;
    p.seen = numbers.seen;
    p.correct = numbers.bias_correction.into();
    p.eps = numbers.eps;
    p.m = shape.m as u32;
    Ok([rates, cosine, sine])
}

/// Keys and values (2, b, t, g, d), the state after the last token and, if asked for, the carries.
pub(super) fn forward_at(
    device: &CudaDevice,
    dtype: DType,
    shape: &RouteShape,
    inputs: &Addresses,
    numbers: &Numbers,
    keep_carries: bool,
) -> Result<(CudaStorage, Tensor, Option<Tensor>)> {
    let RouteShape { b, t, g, d, m, .. } = *shape;
    let tiles = Tiles::forward(t, d);
    let out = cuda::output(device, dtype, shape.out().elem_count())?;
    let state = cuda::output_tensor(device, DType::F32, (b, m, 2, g, d))?;
    let mut p = tiles.params(b, t, g, d)?;
    let _read = set_inputs(&mut p, device, dtype, shape, inputs, numbers)?;
    p.out_keys = address_of(&out, &Layout::contiguous(shape.out()))?;
    p.out_values = p.out_keys + (b * t * g * d * dtype.size_in_bytes()) as u64;
    p.new_state = address(&state)?;
    let carries = match keep_carries {
        true => {
            let count = Tiles::backward(t, d).chunks * shape.state_len();
            Some(cuda::output_tensor(device, DType::F32, count)?)
        }
        false => None,
    };
    p.carries = carries.as_ref().map_or(Ok(0), address)?;
    let compiled = compiled_rates(m);
    let _look_back = tiles.look_back(device, compiled, &mut p)?;
    let name = format!("route_forward_{}_{compiled}", cuda::suffix("route", dtype)?);
    tiles.launch(device, "route_forward", &name, &p)?;
    Ok((out, state, carries))
}

/// [`forward_at`] of tensors, the carries kept.
pub(super) fn forward(
    shape: &RouteShape,
    inputs: &RouteInputs<'_>,
    numbers: &Numbers,
) -> Result<(Tensor, Tensor, Tensor)> {
    let device = cuda::device_of("route_forward", inputs.kv)?;
    let ready = Ready::new(inputs)?;
    let at = ready.addresses()?;
    match forward_at(&device, inputs.kv.dtype(), shape, &at, numbers, true)? {
        (out, state, Some(carries)) => Ok((cuda::tensor(out, shape.out()), state, carries)),
        (_, _, None) => bail!("route_forward: expected carries of a launch that keeps them"),
    }
}

/// [`super::route_into_pages`]: the state after the last token.
pub(super) fn into_pages(
    shape: &RouteShape,
    inputs: &RouteInputs<'_>,
    numbers: &Numbers,
    pool: &PagePool,
    slots: &[usize],
    offset: usize,
) -> Result<Tensor> {
    let device = cuda::device_of("route_into_pages", inputs.kv)?;
    let dtype = inputs.kv.dtype();
    let RouteShape { b, t, g, d, m, .. } = *shape;
    let tiles = Tiles::forward(t, d);
    let ready = Ready::new(inputs)?;
    let new_state = cuda::output_tensor(&device, DType::F32, (b, m, 2, g, d))?;
    let mut p = tiles.params(b, t, g, d)?;
    let _read = set_inputs(&mut p, &device, dtype, shape, &ready.addresses()?, numbers)?;
    p.new_state = address(&new_state)?;
    set_pages(&mut p, dtype, pool, slots, offset)?;
    let compiled = compiled_rates(m);
    let _look_back = tiles.look_back(&device, compiled, &mut p)?;
    let name = format!("route_forward_{}_{compiled}", cuda::suffix("route", dtype)?);
    tiles.launch(&device, "route_forward", &name, &p)?;
    Ok(new_state)
}

fn set_pages(
    p: &mut KernelParams,
    dtype: DType,
    pool: &PagePool,
    slots: &[usize],
    offset: usize,
) -> Result<()> {
    if pool.keys.dtype() != dtype {
        bail!("pages: a pool of {:?}, expected {dtype:?}", pool.keys.dtype());
    }
    if slots.len() > MAX_SLOTS {
        bail!("pages: {} at once, expected at most {MAX_SLOTS} on CUDA", slots.len());
    }
    p.out_keys = address(&pool.keys)?;
    p.out_raw = address(&pool.raw_keys)?;
    p.out_values = address(&pool.values)?;
    p.paged = 1;
    p.offset = offset as u32;
    for (to, slot) in p.slots.iter_mut().zip(slots) {
        *to = u32::try_from(*slot).map_err(candle_core::Error::wrap)?;
    }
    Ok(())
}

/// [`PagePool::append`] in one launch: `keys`, `values` (t, g, d), checked.
pub(crate) fn append(
    pool: &PagePool,
    slots: &[usize],
    offset: usize,
    keys: &Tensor,
    values: &Tensor,
    angles: &RotaryAngles,
) -> Result<()> {
    let device = cuda::device_of("append", keys)?;
    let (t, g, d) = keys.dims3()?;
    let (keys, values) = (aligned(keys)?, aligned(values)?);
    let tiles = Tiles::forward(t, d);
    let mut p = tiles.params(1, t, g, d)?;
    let (cosine, sine) = angles.on(&device)?;
    p.cosine = address(&cosine)?;
    p.sine = address(&sine)?;
    p.keys = address(&keys)?;
    p.values = address(&values)?;
    p.row_stride = (g * d) as u64;
    set_pages(&mut p, keys.dtype(), pool, slots, offset)?;
    let name = format!("route_forward_{}_0", cuda::suffix("append", keys.dtype())?);
    tiles.launch(&device, "route_forward", &name, &p)
}

/// Gradients from `dkeys` and `dvalues` (b, t, g, d), aligned.
pub(super) fn backward(
    shape: &RouteShape,
    inputs: &RouteInputs<'_>,
    numbers: &Numbers,
    carries: &Tensor,
    dkeys: &Tensor,
    dvalues: &Tensor,
) -> Result<RouteGradients> {
    let device = cuda::device_of("route_backward", inputs.kv)?;
    let dtype = inputs.kv.dtype();
    let RouteShape { b, t, g, d, m, .. } = *shape;
    let tiles = Tiles::backward(t, d);
    if carries.elem_count() != tiles.chunks * shape.state_len() {
        bail!("route_backward: carries {:?}, expected those of its forward", carries.shape());
    }
    let ready = Ready::new(inputs)?;
    let room = |len: usize| cuda::output_tensor(&device, DType::F32, len);
    let dkv = cuda::output_tensor(&device, dtype, inputs.kv.shape())?;
    let dlogits = cuda::output_tensor(&device, DType::F32, inputs.logits.shape())?;
    let dstate = cuda::output_tensor(&device, DType::F32, inputs.state.shape())?;
    let dweights = room(2 * g * b * t * (1 + m))?;
    let shares = b * tiles.chunks;
    let share = |wanted: bool| wanted.then(|| room(shares * shape.channels())).transpose();
    let (bias_shares, norm_shares) = (share(shape.has_bias)?, share(shape.has_norm)?);
    let logit_blocks = (b * t).div_ceil(THREADS);
    let gate_shares = room(logit_blocks)?;

    let mut p = tiles.params(b, t, g, d)?;
    let _read = set_inputs(&mut p, &device, dtype, shape, &ready.addresses()?, numbers)?;
    p.carries = address(carries)?;
    p.dkeys = address(dkeys)?;
    p.dvalues = address(dvalues)?;
    p.dkv = address(&dkv)?;
    p.dstate = address(&dstate)?;
    p.dweights = address(&dweights)?;
    p.dbias = bias_shares.as_ref().map_or(Ok(0), address)?;
    p.dnorm = norm_shares.as_ref().map_or(Ok(0), address)?;
    p.dlogits = address(&dlogits)?;
    p.dgate = address(&gate_shares)?;
    let compiled = compiled_rates(m);
    let _look_back = tiles.look_back(&device, compiled, &mut p)?;
    let name =
        format!("route_backward_{}_{compiled}_{}", cuda::suffix("route", dtype)?, tiles.quarter);
    tiles.launch(&device, "route_backward", &name, &p)?;
    let grid = (logit_blocks as u32, 1, 1);
    let launch = Launch { grid, block: THREADS as u32, shared_bytes: 0 };
    cuda::launch(&device, "route_backward", "route_logits", launch, &p)?;

    let bias = bias_shares.map(|x| columns(&device, &x, shares, shape.channels())).transpose()?;
    let norm = norm_shares
        .map(|x| {
            // By head first; those of the values are zero.
            let by_head = columns(&device, &x, shares, shape.channels())?;
            columns(&device, &by_head, 2 * g, d)
        })
        .transpose()?;
    Ok(RouteGradients {
        kv: dkv,
        logits: dlogits,
        state: dstate,
        gate: columns(&device, &gate_shares, logit_blocks, 1)?,
        bias: bias.map(|x| x.reshape((2, g, d))).transpose()?,
        norm,
    })
}

/// The sum of `shares` (rows, columns) over the rows.
fn columns(device: &CudaDevice, shares: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
    let sum = cuda::output_tensor(device, DType::F32, columns)?;
    let p = ColumnParams {
        from: address(shares)?,
        to: address(&sum)?,
        rows: rows as u64,
        columns: columns as u32,
    };
    let grid = (columns.div_ceil(32) as u32, 1, 1);
    let launch = Launch { grid, block: THREADS as u32, shared_bytes: 0 };
    cuda::launch(device, "route_backward", "route_columns", launch, &p)?;
    Ok(sum)
}
