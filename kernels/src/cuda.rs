//! The CUDA device under the kernels: embedded modules, launches, addresses, outputs.
//! Knows no operation: an op brings a parameter struct and names its kernel.
//!
//! Every launch goes to the device's one stream, so that launches, copies and the freeing of memory keep their order.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::CudaBlas;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError,
    LaunchConfig, PushKernelArg, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaError, CudaStorageSlice, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Error, Layout, Result, Shape, Storage, Tensor, bail,
};
use half::{bf16, f16};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

static POISON: AtomicBool = AtomicBool::new(false);

/// Fills every output with NaN before its kernel runs, so that a test sees what a kernel left unwritten.
pub fn poison_outputs(on: bool) {
    POISON.store(on, Ordering::Relaxed);
}

/// The CUDA device `ordinal` with a stream of its own, and without the two events an allocation and the waits a launch
/// that candle keeps for programs of several streams.
///
/// # Errors
/// If there is no such device or no driver.
pub fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    // SAFETY: candle and every op here use a device's tensors on its one stream alone, and refuse those of another device.
    // Who hands a tensor to another stream, as sums through NCCL do, orders the two and keeps the tensor until it is read.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    keep_memory(ordinal);
    Ok(device)
}

/// Keeps freed memory in the driver's pool for the next output.
///
/// By default the pool hands all of it back whenever the host waits for the device, which is at every token and several
/// times a training step, and mapping it anew costs more than the kernels that use it.
fn keep_memory(ordinal: usize) {
    let mut bytes = u64::MAX;
    // SAFETY: the device is one that the driver names, and the attribute is one 64-bit number.
    let kept = result::device::get(ordinal as i32).and_then(|device| unsafe {
        let pool = result::device::get_default_mem_pool(device)?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, std::ptr::from_mut(&mut bytes).cast()).result()
    });
    // A device without pools allocates without them.
    let _ = kept;
}

/// The failure of `operation`, the driver's or a library's, of which the host can tell what it was.
pub(crate) fn failed(operation: impl std::fmt::Display, error: impl Into<CudaError>) -> Error {
    let error: CudaError = error.into();
    Error::from(error).context(operation.to_string())
}

static LAUNCHES: AtomicU64 = AtomicU64::new(0);

/// Kernels of this crate launched so far by the process, on any device; candle's own are not among them.
pub fn launches() -> u64 {
    LAUNCHES.load(Ordering::Relaxed)
}

/// The shape of one launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// Blocks along x, y and z; y and z at most 65,535.
    pub(crate) grid: (u32, u32, u32),
    /// Threads of a block, along x.
    pub(crate) block: u32,
    /// Dynamic shared memory of a block; beyond 48 KiB the kernel's limit is raised.
    pub(crate) shared_bytes: u32,
}

/// Launches `kernel` of the file `cuda/{source}.cu`, whose one argument is `params` by value.
///
/// A grid with an empty dimension launches nothing.
///
/// # Errors
/// If the kernel does not exist, the card has less shared memory a block than it asks for, or the driver refuses the
/// launch.
pub(crate) fn launch<P: DeviceRepr>(
    device: &CudaDevice,
    source: &'static str,
    kernel: &str,
    launch: Launch,
    params: &P,
) -> Result<()> {
    if launch.grid.0 == 0 || launch.grid.1 == 0 || launch.grid.2 == 0 {
        return Ok(());
    }
    let function = function(device, source, kernel, launch.shared_bytes)?;
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    builder.arg(params);
    let config = LaunchConfig {
        grid_dim: launch.grid,
        block_dim: (launch.block, 1, 1),
        shared_mem_bytes: launch.shared_bytes,
    };
    // SAFETY: the op that built `params` took its addresses from live tensors of checked shapes on this device, and
    // the stream frees memory only after the work enqueued before.
    unsafe { builder.launch(config) }
        .map_err(|e| failed(format_args!("launch {source}/{kernel} with {launch:?}"), e))?;
    LAUNCHES.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// Shared memory that one block of a kernel may have on the card, in bytes: 99 KiB on sm_86, sm_89 and sm_120, 163 on
/// sm_80, 227 on sm_90.
///
/// # Errors
/// If the driver does not say.
pub(crate) fn max_shared_bytes(device: &CudaDevice) -> Result<usize> {
    let bytes = attribute(
        device,
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    )?;
    #[cfg(test)]
    let bytes = bytes.min(MOST_SHARED_BYTES.get());
    Ok(bytes)
}

#[cfg(test)]
thread_local! {
    static MOST_SHARED_BYTES: std::cell::Cell<usize> = const { std::cell::Cell::new(usize::MAX) };
}

/// Calls `work` as if no block of the card could have more than `bytes` of shared memory, for what this thread launches.
#[cfg(test)]
pub(crate) fn with_shared_bytes<R>(bytes: usize, work: impl FnOnce() -> R) -> R {
    MOST_SHARED_BYTES.set(bytes);
    let result = work();
    MOST_SHARED_BYTES.set(usize::MAX);
    result
}

/// Multiprocessors of the card.
///
/// # Errors
/// If the driver does not say.
pub(crate) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
}

/// Whether the card runs the code of sm_90a, and so the files that [`launch`] knows by the ending `_sm90`: those of
/// compute capability 9.0.
///
/// # Errors
/// If the driver does not say.
pub(crate) fn is_sm90(device: &CudaDevice) -> Result<bool> {
    let major = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    let minor = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
    Ok(attribute(device, major)? == 9 && attribute(device, minor)? == 0)
}

fn attribute(device: &CudaDevice, attribute: sys::CUdevice_attribute) -> Result<usize> {
    let value = device.cuda_stream().context().attribute(attribute);
    let value =
        value.map_err(|e| failed(format_args!("cuda: ask the card for {attribute:?}"), e))?;
    Ok(value as usize)
}

/// What is kept for each device that is open. A process may open many one after the other: what a device that was dropped
/// left goes as soon as another one asks.
///
/// Nothing of it may hold a device, as a tensor does: the device would stay open for as long, with the handles of its
/// libraries and their memory, some 60 MB. [`Words`] hold none.
pub(crate) struct PerDevice<T>(Mutex<Vec<Own<T>>>);

struct Own<T> {
    device: DeviceId,
    /// Held by the device and its copies alone.
    open: Weak<CudaBlas>,
    kept: T,
}

impl<T: Default> PerDevice<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Calls `work` with what is kept for `device`: the default where that is nothing.
    pub(crate) fn with<R>(&self, device: &CudaDevice, work: impl FnOnce(&mut T) -> R) -> R {
        let mut devices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = match devices.iter().position(|own| own.device == device.id()) {
            Some(at) => at,
            None => {
                devices.retain(|own| own.open.strong_count() > 0);
                let open = Arc::downgrade(&device.cublas_handle());
                devices.push(Own { device: device.id(), open, kept: T::default() });
                devices.len() - 1
            }
        };
        work(&mut devices[at].kept)
    }
}

/// Words in device memory that hold the stream of their device and nothing else of it. They are freed behind what was
/// launched before the last copy went.
#[derive(Clone)]
pub(crate) struct Words(Arc<CudaSlice<u32>>);

impl Words {
    /// # Errors
    /// If the device has no room.
    pub(crate) fn zeros(device: &CudaDevice, count: usize) -> Result<Self> {
        // The driver refuses an allocation of nothing.
        Ok(Self(Arc::new(device.alloc_zeros::<u32>(count.max(1))?)))
    }

    /// # Errors
    /// If the device has no room.
    pub(crate) fn uploaded(device: &CudaDevice, words: &[u32]) -> Result<Self> {
        if words.is_empty() {
            return Self::zeros(device, 1);
        }
        Ok(Self(Arc::new(device.clone_htod(words)?)))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Device address of the first one. The caller keeps the words until after the launch.
    pub(crate) fn address(&self) -> u64 {
        self.0.device_ptr(self.0.stream()).0
    }
}

/// A loaded file and what was asked of it so far.
struct Loaded {
    module: Arc<CudaModule>,
    /// By name, with the dynamic shared memory that the kernel may have.
    functions: HashMap<String, (CudaFunction, u32)>,
}

/// The kernel of `cuda/{source}.cu`, allowed `shared_bytes`. Modules are loaded once per device and kept until the
/// process ends.
fn function(
    device: &CudaDevice,
    source: &'static str,
    kernel: &str,
    shared_bytes: u32,
) -> Result<CudaFunction> {
    /// By ordinal of the device and name of the file.
    type Modules = HashMap<(usize, &'static str), Loaded>;
    /// What every kernel may have.
    const PLAIN_SHARED_BYTES: u32 = 48 * 1024;
    static LOADED: Mutex<Option<Modules>> = Mutex::new(None);
    let failed = |e: DriverError| failed(format_args!("cuda: load {source}/{kernel}"), e);
    let context = device.cuda_stream().context().clone();
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_with(HashMap::new);
    let key = (context.ordinal(), source);
    let file = match loaded.entry(key) {
        Entry::Occupied(file) => file.into_mut(),
        Entry::Vacant(place) => {
            let Some((_, fatbin)) = FATBINS.iter().find(|(name, _)| *name == source) else {
                bail!("cuda: no file {source}.cu was compiled")
            };
            let module = context.load_module(Ptx::from_binary(fatbin.to_vec())).map_err(failed)?;
            place.insert(Loaded { module, functions: HashMap::new() })
        }
    };
    let (function, allowed) = match file.functions.get(kernel) {
        Some((function, allowed)) if *allowed >= shared_bytes => return Ok(function.clone()),
        Some(known) => known.clone(),
        None => (file.module.load_function(kernel).map_err(failed)?, PLAIN_SHARED_BYTES),
    };
    if shared_bytes > allowed {
        let card_bytes = max_shared_bytes(device)?;
        if shared_bytes as usize > card_bytes {
            bail!(
                "cuda: {source}/{kernel}: {shared_bytes} bytes of shared memory a block, expected at most this card's {card_bytes}"
            );
        }
        let limit = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(limit, shared_bytes as i32).map_err(failed)?;
    }
    let entry = (function.clone(), allowed.max(shared_bytes));
    file.functions.insert(kernel.to_owned(), entry);
    Ok(function)
}

/// The CUDA device of `tensor`, or an error that names `op`.
pub(crate) fn device_of(op: &str, tensor: &Tensor) -> Result<CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device.clone()),
        other => bail!("{op}: a tensor on {:?}, expected one on a CUDA device", other.location()),
    }
}

/// Device address of the first element of a contiguous tensor. The caller keeps the tensor until after the launch.
///
/// # Errors
/// As [`address_of`], and if the tensor is not on a CUDA device.
pub(crate) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => address_of(storage, layout),
        _ => bail!("cuda: tensor on {:?}, expected a CUDA device", tensor.device().location()),
    }
}

/// Device address of the first element that `layout` names, for the `cuda_fwd` of a custom op.
///
/// # Errors
/// If the layout is not contiguous or no kernel reads the element type.
pub(crate) fn address_of(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    if !layout.is_contiguous() {
        bail!("cuda: layout {layout:?}, expected a contiguous one");
    }
    start_of(storage, layout)
}

/// [`address`] of a matrix whose lines the caller knows to lie apart.
///
/// # Errors
/// As [`address`], but for the layout.
pub(crate) fn address_of_matrix(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => start_of(storage, layout),
        _ => bail!("cuda: tensor on {:?}, expected a CUDA device", tensor.device().location()),
    }
}

fn start_of(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    fn start<T>(slice: &CudaSlice<T>, stream: &Arc<CudaStream>) -> (u64, usize) {
        (slice.device_ptr(stream).0, size_of::<T>())
    }
    let (base, size) = match &storage.slice {
        CudaStorageSlice::U8(x) => start(x, &stream),
        CudaStorageSlice::U32(x) => start(x, &stream),
        CudaStorageSlice::I64(x) => start(x, &stream),
        CudaStorageSlice::BF16(x) => start(x, &stream),
        CudaStorageSlice::F16(x) => start(x, &stream),
        CudaStorageSlice::F32(x) => start(x, &stream),
        _ => bail!("cuda: {:?}, expected u8, u32, i64, bf16, f16 or f32", storage.dtype()),
    };
    Ok(base + (layout.start_offset() * size) as u64)
}

/// Memory for a kernel to write, `len` elements: uninitialised, or NaN while [`poison_outputs`] is on.
///
/// # Errors
/// If the device has no room, or for a type that no kernel writes.
pub(crate) fn output(device: &CudaDevice, dtype: DType, len: usize) -> Result<CudaStorage> {
    // The driver refuses an allocation of nothing.
    let len = len.max(1);
    fn uninit<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: the kernel that gets this output writes every element that is read later.
        let slice = unsafe { device.alloc::<T>(len) }?;
        if POISON.load(Ordering::Relaxed) {
            let stream = device.cuda_stream();
            let start = slice.device_ptr(&stream).0;
            // SAFETY: `start` is the beginning of an allocation of exactly this many bytes on this stream.
            unsafe {
                result::memset_d8_async(start, 0xff, len * size_of::<T>(), stream.cu_stream())
            }
            .map_err(|e| failed("cuda: poison an output", e))?;
        }
        Ok(slice)
    }
    Ok(match dtype {
        DType::U8 => CudaStorage::wrap_cuda_slice(uninit::<u8>(device, len)?, device.clone()),
        DType::U32 => CudaStorage::wrap_cuda_slice(uninit::<u32>(device, len)?, device.clone()),
        DType::BF16 => CudaStorage::wrap_cuda_slice(uninit::<bf16>(device, len)?, device.clone()),
        DType::F16 => CudaStorage::wrap_cuda_slice(uninit::<f16>(device, len)?, device.clone()),
        DType::F32 => CudaStorage::wrap_cuda_slice(uninit::<f32>(device, len)?, device.clone()),
        other => bail!("cuda: output of {other:?}, expected u8, u32, bf16, f16 or f32"),
    })
}

/// [`output`] as a tensor without history.
///
/// # Errors
/// As [`output`].
pub(crate) fn output_tensor(
    device: &CudaDevice,
    dtype: DType,
    shape: impl Into<Shape>,
) -> Result<Tensor> {
    let shape = shape.into();
    Ok(tensor(output(device, dtype, shape.elem_count())?, shape))
}

/// A tensor without history over what a kernel wrote.
pub(crate) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// The suffix of a kernel's name for an element type: `f32`, `bf16` or `f16`.
pub(crate) fn suffix(op: &str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        other => bail!("{op}: elements of {other:?}, expected f32, bf16 or f16"),
    }
}
