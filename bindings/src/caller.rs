//! A waker that calls a plain function of the caller's own language.
//! Knows no stream and no language.

use std::ffi::c_void;
use std::sync::Arc;
use std::task::{Wake, Waker};

/// Somebody who waits, as their language knows them: a pointer, how to tell them, and how to let go of the pointer.
#[repr(C)]
#[derive(Debug)]
pub struct Caller {
    /// Theirs; one reference of it belongs to this value.
    pub context: *mut c_void,
    /// Tells them to ask again. It is called from any thread, any number of times, also from within a call of theirs; it
    /// returns at once and calls nothing of the library.
    pub wake: extern "C" fn(*mut c_void),
    /// Takes the reference back, once, from any thread: `context` is not used after it.
    pub release: extern "C" fn(*mut c_void),
}

// SAFETY: whoever makes one promises that both functions may be called with `context` from any thread.
unsafe impl Send for Caller {}
// SAFETY: as above; nothing is written through a shared reference.
unsafe impl Sync for Caller {}

impl Caller {
    pub(crate) fn waker(self) -> Waker {
        Waker::from(Arc::new(self))
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        (self.release)(self.context);
    }
}

impl Wake for Caller {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        (self.wake)(self.context);
    }
}

#[cfg(test)]
mod tests {
    use super::Caller;
    use std::ffi::c_void;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Counts {
        woken: AtomicU32,
        released: AtomicU32,
    }

    extern "C" fn wake(counts: *mut c_void) {
        // SAFETY: the test's own counts, which outlive the waker.
        unsafe { &*counts.cast::<Counts>() }.woken.fetch_add(1, Ordering::Relaxed);
    }

    extern "C" fn release(counts: *mut c_void) {
        // SAFETY: as above.
        unsafe { &*counts.cast::<Counts>() }.released.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn a_caller_is_told_each_time_and_released_once_behind_the_last_waker() {
        let mut counts = Counts::default();
        let context = std::ptr::from_mut(&mut counts).cast();
        let waker = Caller { context, wake, release }.waker();
        let second = waker.clone();
        waker.wake_by_ref();
        waker.wake();
        assert_eq!(counts.released.load(Ordering::Relaxed), 0);
        drop(second);
        assert_eq!(counts.woken.load(Ordering::Relaxed), 2);
        assert_eq!(counts.released.load(Ordering::Relaxed), 1);
    }
}
