//! Plain C functions for what a caller asks for at every token: numbers and bytes, no conversion.
//! Knows no foreign language; what the bytes mean is in `packed`, and everything that is not hot goes through uniffi.
//!
//! A stream is named by the number that its `number` method gives. No panic leaves a function.

use crate::caller::Caller;
use crate::error::MkaError;
use crate::open;
use crate::packed;

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

impl From<Result<Option<Vec<u8>>, MkaError>> for Reply {
    fn from(result: Result<Option<Vec<u8>>, MkaError>) -> Self {
        let (code, bytes) = match result {
            Ok(Some(bytes)) => (0, bytes),
            Ok(None) => (1, Vec::new()),
            Err(error) => (2, format!("{}\0{error}", error.kind()).into_bytes()),
        };
        let (len, data) = match bytes.len() {
            0 => (0, std::ptr::null_mut()),
            len => (len, Box::into_raw(bytes.into_boxed_slice()).cast()),
        };
        Self { data, len, code }
    }
}

/// The events of stream `stream` that are ready; if there are none yet, or behind what there was, the stream tells `caller`
/// when it is to be asked again, and lets go of it at the latest when the stream does. Returns at once.
///
/// # Safety
/// `caller` holds what its fields ask for; `reply` points to a [`Reply`] that may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_poll_for(stream: u64, caller: Caller, reply: *mut Reply) {
    let waker = caller.waker();
    let batch = open::without_panic(|| Ok(open::stream(stream)?.poll(&waker)?.map(packed::events)));
    // SAFETY: the caller's own promise.
    unsafe { reply.write(batch.into()) }
}

/// Gives the bytes of a [`Reply`] back.
///
/// # Safety
/// `data` and `len` are of one reply, whose bytes are not read any more and were not given back before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mka_direct_free(data: *mut u8, len: usize) {
    if !data.is_null() {
        // SAFETY: a reply's pointer was made from a box of this length.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(data, len)) });
    }
}
