//! What a layer keeps of a stream: keys and values in room that is written in place, and the state of the EMA.
//! Knows no projection and no position.

use crate::error::Result;
use candle_core::Tensor;

/// Keys or values of one kind, (1, capacity, ..): room that is written in place.
pub(super) struct Kept {
    room: Tensor,
}

impl Kept {
    pub(super) fn new(room: Tensor) -> Self {
        Self { room }
    }

    /// Appends `x` (1, t, ..) after `seen` tokens and returns all of them: (1, seen + t, ..).
    pub(super) fn append(&self, x: &Tensor, seen: usize) -> Result<Tensor> {
        self.room.slice_set(&x.detach().contiguous()?, 1, seen)?;
        Ok(self.room.narrow(1, 0, seen + x.dim(1)?)?)
    }

    pub(super) fn bytes_per_token(&self) -> usize {
        self.room.elem_count() / self.room.dims()[1].max(1) * self.room.dtype().size_in_bytes()
    }
}

/// What one layer keeps of a stream.
pub(super) struct LayerCache {
    /// Keys and values, of each level of full MKA; of latent attention the latent and the rotary key.
    pub(super) levels: Vec<(Kept, Kept)>,
    /// After the last token: (1, m, 2 · g · d).
    pub(super) ema: Option<Tensor>,
}

impl LayerCache {
    pub(super) fn new(levels: Vec<(Kept, Kept)>) -> Self {
        Self { levels, ema: None }
    }

    /// Bytes a token, and bytes whatever the length.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let kept = self.levels.iter().map(|(a, b)| a.bytes_per_token() + b.bytes_per_token()).sum();
        (kept, self.ema.as_ref().map_or(0, |ema| 4 * ema.elem_count()))
    }
}

/// A layer's cache as one pass sees it.
pub(super) struct Cached<'a> {
    pub(super) cache: &'a mut LayerCache,
    /// Tokens before the pass.
    pub(super) seen: usize,
}
