//! Memory that the allocator keeps goes back to the system.
//! Knows nothing of what took it.

/// Gives back what was freed when it is dropped: the last field of what takes much memory.
///
/// glibc's allocator keeps a heap for each thread, and what is freed stays in it for that thread's next use. A process that
/// opened sessions one after the other, each on another thread, grew by all of a session's window and pages with each.
/// Another allocator does this by itself, or not at all.
pub(crate) struct GivesBack;

impl Drop for GivesBack {
    fn drop(&mut self) {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: it takes a number of bytes and looks at the allocator's own heaps, under their locks, whoever calls it.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}
