//! The launches of `cuda/route_*.cu`, and the append of keys and values to pages.
//! Knows the kernels' tiles and names; the shapes it gets are checked.

use super::{Numbers, RouteGradients, RouteInputs, RouteShape};
use crate::cuda::{self, Launch, PerDevice, Words, address, address_of};
use crate::pages::{PAGE_TOKENS, PagePool};
use crate::rope::RotaryAngles;
use crate::route::MAX_RATES;
use crate::storage::aligned;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor, bail};

/// As in `cuda/route.cuh`, like all numbers here: pages that travel in the launch.
const MAX_SLOTS: usize = 256;
/// Shared memory of the look-back, with what aligns it.
const LOOK_BACK_BYTES: usize = 16;
/// Threads of the kernels that add shares.
const SUM_THREADS: usize = 256;
/// Tokens of a block of `route_logits`.
const LOGIT_TOKENS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Divisor {
    by: u32,
    mul: u32,
    shift: u32,
}

impl Divisor {
    /// Of numbers below 2^31.
    fn new(by: usize) -> Self {
        let shift = by.next_power_of_two().trailing_zeros();
        let mul = (1u64 << (31 + shift)).div_ceil(by as u64);
        Self { by: by as u32, mul: mul as u32, shift }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct KernelParams {
    keys: u64,
    values: u64,
    logits: u64,
    state: u64,
    gate: u64,
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
    gate_shares: u64,
    sums: u64,
    prefixes: u64,
    epoch: u64,
    flags: u64,
    seen: u64,
    row_stride: u64,
    batch: u32,
    tokens: u32,
    heads: u32,
    d: u32,
    m: u32,
    chunks: u32,
    streams: Divisor,
    groups: Divisor,
    carry_rows: u32,
    correct: u32,
    paged: u32,
    offset: u32,
    eps: f32,
    rate: [f32; MAX_RATES],
    log_rate: [f32; MAX_RATES],
    run_power: [f32; MAX_RATES],
    chunk_power: [f32; MAX_RATES],
    powers: [[f32; 17]; MAX_RATES],
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Keys and values to pages, without a scan.
    Append,
    Forward,
    Backward,
}

/// How the blocks of one pass divide the work: a few heads and `rows` tokens each.
struct Tiles {
    file: &'static str,
    kernel: String,
    threads: usize,
    /// Rates that the kernel is compiled for: with fewer, the others are 0 and have no weight.
    rates: usize,
    /// Heads of a block, all of keys or all of values.
    heads: usize,
    /// Channels of a block, those that pad a head with them.
    channels: usize,
    /// Tokens that one thread scans.
    run: usize,
    rows: usize,
    chunks: usize,
    shared_bytes: usize,
}

impl Tiles {
    fn new(pass: Pass, dtype: DType, shape: &RouteShape) -> Result<Self> {
        let RouteShape { t, d, m, has_norm, .. } = *shape;
        let (name, size) = (cuda::suffix("route", dtype)?, dtype.size_in_bytes());
        // Four channels of each half of a head to a thread.
        let lanes = d.div_ceil(8).next_power_of_two().max(8);
        let common = dtype != DType::F32 && m <= 3 && !has_norm && lanes <= 16;
        let (rates, (threads, run, heads)) = match (pass, common) {
            (Pass::Append, _) => (0, (128, 8, 1)),
            (Pass::Forward, true) => (3, (256, 16, 2)),
            (Pass::Backward, true) => (3, (128, 8, 1)),
            (_, false) => (MAX_RATES, (128, 8, 1)),
        };
        let (runs, channels) = (threads / (lanes * heads), 8 * lanes * heads);
        let (file, tensors) = match pass {
            Pass::Backward => ("route_backward", 2),
            _ => ("route_forward", 1),
        };
        // Of a token: its weights, four floats or eight, and backward four more.
        let weights = if rates == MAX_RATES { 32 } else { 16 } + 16 * (tensors - 1);
        let scan = match rates {
            0 => 0,
            _ => runs * (run + 1) * weights + runs * rates * channels * 4 + LOOK_BACK_BYTES,
        };
        Ok(Self {
            file,
            kernel: format!("{file}_{name}_{rates}_{lanes}"),
            threads,
            rates,
            heads,
            channels,
            run,
            rows: runs * run,
            chunks: t.div_ceil(runs * run),
            shared_bytes: tensors * runs * (run * channels * size + 4 * lanes * size % 128) + scan,
        })
    }

    /// Blocks that have all heads of keys and of values.
    fn groups(&self, g: usize) -> usize {
        2 * g.div_ceil(self.heads)
    }

    fn params(&self, shape: &RouteShape) -> Result<KernelParams> {
        let RouteShape { b, t, g, d, .. } = *shape;
        let blocks = b.saturating_mul(self.groups(g)).saturating_mul(self.chunks);
        if t > i32::MAX as usize || blocks > i32::MAX as usize || 2 * g * d > i32::MAX as usize {
            bail!("route: ({b}, {t}, 2, {g}, {d}), expected fewer than 2^31 blocks");
        }
        Ok(KernelParams {
            keys: 0,
            values: 0,
            logits: 0,
            state: 0,
            gate: 0,
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
            gate_shares: 0,
            sums: 0,
            prefixes: 0,
            epoch: 0,
            flags: 0,
            seen: 0,
            row_stride: 0,
            batch: b as u32,
            tokens: t as u32,
            heads: g as u32,
            d: d as u32,
            m: 0,
            chunks: self.chunks as u32,
            streams: Divisor::new(b * self.groups(g)),
            groups: Divisor::new(self.groups(g)),
            carry_rows: self.rows as u32,
            correct: 0,
            paged: 0,
            offset: 0,
            eps: 0.0,
            rate: [0.0; MAX_RATES],
            log_rate: [0.0; MAX_RATES],
            run_power: [0.0; MAX_RATES],
            chunk_power: [0.0; MAX_RATES],
            powers: [[0.0; 17]; MAX_RATES],
            slots: [0; MAX_SLOTS],
        })
    }

    fn launch(&self, device: &CudaDevice, p: &KernelParams) -> Result<()> {
        let launch = Launch {
            grid: (p.streams.by * p.chunks, 1, 1),
            block: self.threads as u32,
            shared_bytes: self.shared_bytes as u32,
        };
        cuda::launch(device, self.file, &self.kernel, launch, p)
    }

    /// Room for the look-back, its addresses in `p`.
    fn look_back(&self, device: &CudaDevice, p: &mut KernelParams) -> Result<([Tensor; 2], Words)> {
        let blocks = p.streams.by as usize * self.chunks;
        // Where one chunk is all, nobody looks back.
        let columns = if self.chunks == 1 { 0 } else { self.rates * self.channels };
        let room = || cuda::output_tensor(device, DType::F32, (blocks * columns).max(1));
        let (rooms, flags) = ([room()?, room()?], flags(device, blocks)?);
        let [sums, prefixes] = &rooms;
        p.sums = address(sums)?;
        p.prefixes = address(prefixes)?;
        p.epoch = flags.address();
        p.flags = p.epoch + 8;
        Ok((rooms, flags))
    }
}

/// The epoch of the launches on `device` and the flags of at least `count` chunks: zeros at first, and kept from launch to
/// launch, since a flag of an earlier epoch counts for nothing.
fn flags(device: &CudaDevice, count: usize) -> Result<Words> {
    static FLAGS: PerDevice<Option<Words>> = PerDevice::new();
    FLAGS.with(device, |flags| match flags {
        Some(flags) if flags.len() >= 2 + count => Ok(flags.clone()),
        _ => {
            let count = (2 + count).next_power_of_two().max(1 << 14);
            Ok(flags.insert(Words::zeros(device, count)?).clone())
        }
    })
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
    tiles: &Tiles,
    device: &CudaDevice,
    dtype: DType,
    shape: &RouteShape,
    inputs: &Addresses,
    numbers: &Numbers,
) -> Result<[Tensor; 2]> {
    let (cosine, sine) = numbers.angles.on(device)?;
    p.keys = inputs.kv;
    p.values = inputs.kv + (shape.g * shape.d * dtype.size_in_bytes()) as u64;
    p.row_stride = shape.channels() as u64;
    p.logits = inputs.logits;
    p.state = inputs.state;
    p.gate = inputs.gate;
    p.bias = inputs.bias;
    p.norm = inputs.norm;
    p.cosine = address(&cosine)?;
    p.sine = address(&sine)?;
    p.seen = numbers.seen;
    p.correct = numbers.bias_correction.into();
    p.eps = numbers.eps;
    p.m = shape.m as u32;
    p.carry_rows = Tiles::new(Pass::Backward, dtype, shape)?.rows as u32;
    for l in 0..MAX_RATES {
        p.rate[l] = numbers.rates.get(l).copied().unwrap_or(0.0);
        let rate = f64::from(p.rate[l]);
        let power = |n: usize| rate.powi(n as i32) as f32;
        p.run_power[l] = power(tiles.run);
        p.chunk_power[l] = power(tiles.rows);
        p.powers[l] = std::array::from_fn(power);
        p.log_rate[l] = rate.ln() as f32;
    }
    Ok([cosine, sine])
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
    let tiles = Tiles::new(Pass::Forward, dtype, shape)?;
    let out = cuda::output(device, dtype, shape.out().elem_count())?;
    let state = cuda::output_tensor(device, DType::F32, (b, m, 2, g, d))?;
    let mut p = tiles.params(shape)?;
    let _read = set_inputs(&mut p, &tiles, device, dtype, shape, inputs, numbers)?;
    p.out_keys = address_of(&out, &Layout::contiguous(shape.out()))?;
    p.out_values = p.out_keys + (b * t * g * d * dtype.size_in_bytes()) as u64;
    p.new_state = address(&state)?;
    let carries = match keep_carries {
        true => {
            let count = t.div_ceil(p.carry_rows as usize) * shape.state_len();
            Some(cuda::output_tensor(device, DType::F32, count)?)
        }
        false => None,
    };
    p.carries = carries.as_ref().map_or(Ok(0), address)?;
    let _look_back = tiles.look_back(device, &mut p)?;
    tiles.launch(device, &p)?;
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
    let RouteShape { b, g, d, m, .. } = *shape;
    let tiles = Tiles::new(Pass::Forward, dtype, shape)?;
    let ready = Ready::new(inputs)?;
    let new_state = cuda::output_tensor(&device, DType::F32, (b, m, 2, g, d))?;
    let mut p = tiles.params(shape)?;
    let _read = set_inputs(&mut p, &tiles, &device, dtype, shape, &ready.addresses()?, numbers)?;
    p.new_state = address(&new_state)?;
    set_pages(&mut p, dtype, pool, slots, offset)?;
    let _look_back = tiles.look_back(&device, &mut p)?;
    tiles.launch(&device, &p)?;
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

/// [`PagePool::append`] in one launch for each [`MAX_SLOTS`] pages: `keys`, `values` (t, g, d), checked.
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
    let (cosine, sine) = angles.on(&device)?;
    let mut done = 0;
    // Nothing is scanned: a cut changes no bit.
    while done < t {
        let at = offset + done;
        let first = at % PAGE_TOKENS;
        let count = (MAX_SLOTS * PAGE_TOKENS - first).min(t - done);
        let slots = &slots[at / PAGE_TOKENS..(at + count).div_ceil(PAGE_TOKENS)];
        let shape = RouteShape { b: 1, t: count, g, d, m: 0, has_bias: false, has_norm: false };
        let tiles = Tiles::new(Pass::Append, keys.dtype(), &shape)?;
        let mut p = tiles.params(&shape)?;
        let angle = (done * (d / 2) * size_of::<f32>()) as u64;
        p.cosine = address(&cosine)? + angle;
        p.sine = address(&sine)? + angle;
        p.keys = address(&keys.narrow(0, done, count)?)?;
        p.values = address(&values.narrow(0, done, count)?)?;
        p.row_stride = (g * d) as u64;
        set_pages(&mut p, keys.dtype(), pool, slots, first)?;
        tiles.launch(&device, &p)?;
        done += count;
    }
    Ok(())
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
    let tiles = Tiles::new(Pass::Backward, dtype, shape)?;
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
    let logit_blocks = (b * t).div_ceil(LOGIT_TOKENS);
    let (dgate, gate_shares) = (room(1)?, room(logit_blocks)?);

    let mut p = tiles.params(shape)?;
    let _read = set_inputs(&mut p, &tiles, &device, dtype, shape, &ready.addresses()?, numbers)?;
    p.carries = address(carries)?;
    p.dkeys = address(dkeys)?;
    p.dvalues = address(dvalues)?;
    p.dkv = address(&dkv)?;
    p.dstate = address(&dstate)?;
    p.dweights = address(&dweights)?;
    p.dbias = bias_shares.as_ref().map_or(Ok(0), address)?;
    p.dnorm = norm_shares.as_ref().map_or(Ok(0), address)?;
    p.dlogits = address(&dlogits)?;
    p.dgate = address(&dgate)?;
    p.gate_shares = address(&gate_shares)?;
    let _look_back = tiles.look_back(&device, &mut p)?;
    tiles.launch(&device, &p)?;
    let grid = (logit_blocks as u32, 1, 1);
    let launch = Launch { grid, block: SUM_THREADS as u32, shared_bytes: 0 };
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
        gate: dgate,
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
    let launch = Launch { grid, block: SUM_THREADS as u32, shared_bytes: 0 };
    cuda::launch(device, "route_backward", "route_columns", launch, &p)?;
    Ok(sum)
}
