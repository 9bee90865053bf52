//! Prefill and decoding of a model in training: what each kind of attention keeps of a token, and how fast it reads it.
//! Knows no session. A pretrained model's sessions run in the engine; this measures kinds that sessions do not run too.

use super::cache::{Cached, LayerCache};
use super::layers::Pass;
use super::model::TrainModel;
use crate::error::{Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Speed of one stream, and what its cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DecodeReport {
    /// Tokens of the prompt over the time until the logits of its last one.
    pub prefill_tokens_per_s: f64,
    /// Tokens after it over their time, greedy, one at a time.
    pub decode_tokens_per_s: f64,
    /// Time until the first token after the prompt.
    pub first_token_s: f64,
    /// What the cache grows by with each token.
    pub cache_bytes_per_token: usize,
    /// What a stream holds whatever its length: the state of the EMA.
    pub state_bytes: usize,
}

/// One stream with its cache.
pub(super) struct Stream<'a> {
    model: &'a TrainModel,
    caches: Vec<LayerCache>,
    position: usize,
    capacity: usize,
}

impl<'a> Stream<'a> {
    /// An empty stream with room for `capacity` tokens.
    pub(super) fn new(model: &'a TrainModel, capacity: usize) -> Result<Self> {
        let caches =
            model.layers().iter().map(|layer| layer.cache(capacity)).collect::<Result<_>>()?;
        Ok(Self { model, caches, position: 0, capacity })
    }

    /// Logits of every one of `tokens`, which go on from those before: (t, vocab), f32.
    pub(super) fn run(&mut self, tokens: &[u32]) -> Result<Tensor> {
        if self.position + tokens.len() > self.capacity {
            return Err(Error::invalid(format!(
                "decode: {} tokens, expected at most {}",
                self.position + tokens.len(),
                self.capacity
            )));
        }
        let pass = self.model.pass_from(self.position, tokens.len());
        let mut hidden = self.model.embed_ids(tokens)?;
        for (layer, cache) in self.model.layers().iter().zip(&mut self.caches) {
            let mut cached = Cached { cache, seen: self.position };
            hidden = layer.forward_cached(&hidden, &pass, &mut cached)?.detach();
        }
        self.position += tokens.len();
        self.model.logits_of(&hidden)
    }

    fn bytes(&self) -> (usize, usize) {
        self.caches.iter().map(LayerCache::bytes).fold((0, 0), |sum, x| (sum.0 + x.0, sum.1 + x.1))
    }
}

/// Reads `prompt` and decodes `tokens` more.
pub(super) fn measure(model: &TrainModel, prompt: &[u32], tokens: usize) -> Result<DecodeReport> {
    let mut stream = Stream::new(model, prompt.len() + tokens)?;
    let best = |logits: Tensor| -> Result<u32> {
        let last = logits.narrow(0, logits.dim(0)? - 1, 1)?.squeeze(0)?;
        Ok(last.argmax(0)?.to_scalar::<u32>()?)
    };
    let started = Instant::now();
    let mut next = best(stream.run(prompt)?)?;
    let first_token_s = started.elapsed().as_secs_f64();
    let started = Instant::now();
    for _ in 0..tokens {
        next = best(stream.run(&[next])?)?;
    }
    let (per_token, state_bytes) = stream.bytes();
    Ok(DecodeReport {
        prefill_tokens_per_s: prompt.len() as f64 / first_token_s,
        decode_tokens_per_s: tokens as f64 / started.elapsed().as_secs_f64(),
        first_token_s,
        cache_bytes_per_token: per_token,
        state_bytes,
    })
}

/// A pass of one sequence from `start` on.
pub(super) fn pass(angles: mka_kernels::RotaryAngles, t: usize) -> Pass {
    let row_angles = angles.clone();
    Pass {
        b: 1,
        t,
        angles,
        row_angles,
        memory: true,
        adapters: true,
        window_tokens: 0,
        sink_tokens: 0,
        recall: None,
    }
}
