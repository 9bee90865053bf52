//! Where a forward pass runs: on a thread of the pool that its ops share.
//! Knows no op.

/// Runs `work` on a thread of rayon's global pool and waits for it.
///
/// A parallel op that is called from outside the pool hands itself over and sleeps: two thread switches, tens of
/// microseconds, in each of the several hundred small ops of one decoded token. Called from inside, it starts at once.
pub fn on_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}
