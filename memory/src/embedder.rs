//! The seam to whatever turns text into vectors.
//! Knows no model, tokenizer or weights.

use crate::Result;

/// Turns texts into vectors; the store records whose vectors it holds and never mixes two.
pub trait Embedder: Send + Sync {
    /// A name that changes whenever the vectors would: model, revision, dimension, pooling.
    fn identity(&self) -> String;

    /// Numbers per vector.
    fn dim(&self) -> usize;

    /// One vector per text, `(texts, dim)` row-major, each of unit length.
    /// An empty slice gives an empty vector. Called without any lock of the store held.
    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>>;
}
