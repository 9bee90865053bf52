//! Where chance comes from: generators fixed by the seed of the run and the place of a sample in it.
//! Knows no task.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What is drawn. Every purpose has a stream of its own, so that a longer haystack changes no key and no value.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stream {
    /// Keys, values, names, words: what the answer is made of.
    Answer,
    /// What lies around it.
    Haystack,
    /// Where in it the answer lies.
    Places,
    /// The worked example.
    Example,
}

/// Chance of one sample; the same for whoever makes it, alone or in a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seed([u8; 32]);

impl Seed {
    /// Chance of sample `index`; each `attempt` at it (below 2^32) has another, and the first is the sample's own.
    pub(super) fn new(seed: u64, task: &str, length: usize, index: usize, attempt: usize) -> Self {
        let place = index as u64 ^ (attempt as u64) << 32;
        let parts = [seed, fnv1a(task), length as u64, place];
        let mut bytes = [0; 32];
        for (bytes, part) in bytes.chunks_exact_mut(8).zip(parts) {
            bytes.copy_from_slice(&part.to_le_bytes());
        }
        Self(bytes)
    }

    /// Chance that every sample of the task at that length has in common, whatever the attempt.
    pub(super) fn shared(mut self) -> Self {
        self.0[24..].fill(0xff);
        self
    }

    pub(super) fn rng(&self, stream: Stream) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::from_seed(self.0);
        rng.set_stream(stream as u64);
        rng
    }
}

pub(super) fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
