//! Plain C functions for the calls that a caller makes for every token and every recall: numbers and bytes, no conversion.
//! Knows no foreign language; what the bytes mean is in `packed`, and everything that is not hot goes through uniffi.
//!
//! An object is named by the number that its `number` method gives. No panic leaves a function.

use crate::bell::NativeBell;
use crate::caller::Caller;
use crate::error::MkaError;
use crate::memory::NativeMemory;
use crate::numbered::Numbered;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// A stream whose events can be had as bytes.
pub(crate) trait Packed: Send + Sync {
    /// What is ready within `limit`, perhaps nothing; None at the end.
    fn wait_packed(&self, limit: Duration) -> Result<Option<Vec<u8>>, MkaError>;

    /// What is ready; nothing, and then `waker` is woken; None at the end.
    fn poll_packed(&self, waker: &Waker) -> Result<Option<Vec<u8>>, MkaError>;
}

pub(crate) static STREAMS: Numbered<Weak<dyn Packed>> = Numbered::new();
pub(crate) static MEMORIES: Numbered<Weak<NativeMemory>> = Numbered::new();
static RECALLS: Numbered<Arc<Pending>> = Numbered::new();

/// What a call gives back; given to [`mka_direct_free`] once it is read.
#[repr(C)]
#[derive(Debug)]
pub struct Reply {
    /// Bytes of the answer, or of an error: its kind, a zero byte, its text. Null if there are none.
    pub data: *mut u8,
    /// Their number.
    pub len: usize,
    /// 0: an answer; without bytes there is none yet. 1: the end, nothing follows. 2: an error.
    pub code: u32,
}

/// # Safety
/// `reply` may be written to.
unsafe fn answer(reply: *mut Reply, work: impl FnOnce() -> Result<Option<Vec<u8>>, MkaError>) {
    let result = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(MkaError::Internal("a call of the library panicked".into())));
    let (code, bytes) = match result {
        Ok(Some(bytes)) => (0, bytes),
        Ok(None) => (1, Vec::new()),
        Err(error) => (2, format!("{}\0{error}", error.kind()).into_bytes()),
    };
    let (len, data) = match bytes.len() {
        0 => (0, std::ptr::null_mut()),
        len => (len, Box::into_raw(bytes.into_boxed_slice()).cast()),
    };
    // SAFETY: the caller's own promise.
    unsafe { reply.write(Reply { data, len, code }) }
}

fn gone(what: &str) -> MkaError {
    MkaError::InvalidArgument(format!("{what}: its number is unknown, expected one that is open"))
}

fn open_stream(number: u64) -> Result<Arc<dyn Packed>, MkaError> {
    STREAMS.get(number).and_then(|stream| stream.upgrade()).ok_or_else(|| gone("stream"))
}

/// The events of stream `stream` that are ready within `limit_ms`, perhaps none. Blocks the thread.
///
/// # Safety
/// `reply` points to a [`Reply`] that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_next(stream: u64, limit_ms: u32, reply: *mut Reply) {
    let work = || open_stream(stream)?.wait_packed(Duration::from_millis(limit_ms.into()));
    // SAFETY: the caller's own promise.
    unsafe { answer(reply, work) }
}

/// The events of stream `stream` that are ready; if there are none yet, or behind what there was, the stream rings `bell`
/// with its own number when it is to be asked again. Returns at once.
///
/// # Safety
/// `reply` points to a [`Reply`] that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_poll(stream: u64, bell: u64, reply: *mut Reply) {
    let work = || {
        let bell = NativeBell::by_number(bell).ok_or_else(|| gone("bell"))?;
        open_stream(stream)?.poll_packed(&bell.waker(stream))
    };
    // SAFETY: the caller's own promise.
    unsafe { answer(reply, work) }
}

/// The events of stream `stream` that are ready; if there are none yet, or behind what there was, the stream tells `caller`
/// when it is to be asked again, and lets go of it at the latest when the stream does. Returns at once.
///
/// # Safety
/// `caller` holds what its fields ask for; `reply` points to a [`Reply`] that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_poll_for(stream: u64, caller: Caller, reply: *mut Reply) {
    let waker = caller.waker();
    let work = || open_stream(stream)?.poll_packed(&waker);
    // SAFETY: the caller's own promise.
    unsafe { answer(reply, work) }
}

/// The numbers that have rung `bell` since the last call, 8 bytes each. Returns at once.
///
/// # Safety
/// `reply` points to a [`Reply`] that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_rung(bell: u64, reply: *mut Reply) {
    let work = || {
        let bell = NativeBell::by_number(bell).ok_or_else(|| gone("bell"))?;
        Ok(Some(bell.take().into_iter().flat_map(u64::to_le_bytes).collect()))
    };
    // SAFETY: the caller's own promise.
    unsafe { answer(reply, work) }
}

/// # Safety
/// `request` points to `len` bytes, or `len` is 0.
unsafe fn request<'a>(request: *const u8, len: usize) -> &'a [u8] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's own promise.
    unsafe { std::slice::from_raw_parts(request, len) }
}

fn memory(number: u64) -> Result<Arc<NativeMemory>, MkaError> {
    MEMORIES.get(number).and_then(|memory| memory.upgrade()).ok_or_else(|| gone("memory"))
}

/// The hits of a packed request. Blocks the thread.
///
/// # Safety
/// `bytes` points to `len` bytes that stay as they are during the call; `reply` to a [`Reply`] that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_recall(
    number: u64,
    bytes: *const u8,
    len: usize,
    reply: *mut Reply,
) {
    // SAFETY: the caller's own promise.
    let bytes = unsafe { request(bytes, len) };
    let work = || memory(number)?.recall_packed_blocking(bytes).map(Some);
    // SAFETY: the caller's own promise.
    unsafe { answer(reply, work) }
}

type Recalling = Pin<Box<dyn Future<Output = Result<Vec<u8>, MkaError>> + Send>>;

/// A recall under way.
struct Pending(Mutex<Option<Recalling>>);

impl Pending {
    fn poll(&self, waker: &Waker) -> Result<Option<Vec<u8>>, MkaError> {
        let mut recalling = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(future) = recalling.as_mut() else { return Ok(None) };
        match future.as_mut().poll(&mut Context::from_waker(waker)) {
            Poll::Pending => Ok(Some(Vec::new())),
            Poll::Ready(hits) => {
                *recalling = None;
                hits.map(Some)
            }
        }
    }
}

/// Begins the recall of a packed request: its number, 8 bytes. It rings `bell` with that number when its hits are there to
/// be taken by [`mka_direct_recalled`]; [`mka_direct_drop`] lets go of it. Returns at once.
///
/// # Safety
/// `bytes` points to `len` bytes that stay as they are during the call; `reply` to a [`Reply`] that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_begin_recall(
    number: u64,
    bytes: *const u8,
    len: usize,
    bell: u64,
    reply: *mut Reply,
) {
    // SAFETY: the caller's own promise.
    let bytes = unsafe { request(bytes, len) };
    let work = || {
        let bell = NativeBell::by_number(bell).ok_or_else(|| gone("bell"))?;
        let mut future: Recalling = Box::pin(memory(number)?.recall_packed(bytes)?);
        let ready = Arc::new(Pending(Mutex::new(None)));
        let number = RECALLS.add(ready.clone());
        let waker = bell.clone().waker(number);
        // The first poll starts the work.
        if let Poll::Ready(hits) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            future = Box::pin(std::future::ready(hits));
            bell.ring(number);
        }
        *ready.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(future);
        Ok(Some(number.to_le_bytes().to_vec()))
    };
    // SAFETY: the caller's own promise.
    unsafe { answer(reply, work) }
}

/// The hits of a recall that was begun, after which it is gone; none yet without bytes, and then it rings `bell`.
/// Returns at once.
///
/// # Safety
/// `reply` points to a [`Reply`] that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_recalled(recall: u64, bell: u64, reply: *mut Reply) {
    let work = || {
        let bell = NativeBell::by_number(bell).ok_or_else(|| gone("bell"))?;
        let given = RECALLS.get(recall).ok_or_else(|| gone("recall"))?.poll(&bell.waker(recall));
        if !matches!(&given, Ok(Some(hits)) if hits.is_empty()) {
            RECALLS.remove(recall);
        }
        given
    };
    // SAFETY: the caller's own promise.
    unsafe { answer(reply, work) }
}

/// Lets go of a recall that was begun; without effect on one that is gone.
#[unsafe(no_mangle)]
pub extern "C" fn mka_direct_drop(recall: u64) {
    // What is dropped is a future of the engine, whose worker ends by itself.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(RECALLS.remove(recall))));
}

/// Gives the bytes of a [`Reply`] back.
///
/// # Safety
/// `data` and `len` are of one reply, whose bytes are not read any more and were not given back before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_free(data: *mut u8, len: usize) {
    if !data.is_null() {
        // SAFETY: `answer` made the pointer from a box of this length.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(data, len)) });
    }
}
