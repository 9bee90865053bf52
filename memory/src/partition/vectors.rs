//! A chunk's sentence vectors: at hand, or left where the log has them until somebody asks.
//! Knows no file; whoever keeps them elsewhere gives them by the chunk's place among the turn's.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Where vectors are that were not read when the store was opened.
pub(crate) trait Elsewhere: fmt::Debug + Send + Sync {
    /// The vectors of a turn's `at`-th chunk, read when they are first asked for and kept from then on; none if they are
    /// damaged.
    fn vectors(&self, at: u32) -> &[f32];

    /// Whether they were asked for.
    fn is_read(&self) -> bool;
}

/// One row per sentence, `(n, dim)`; reads as a slice.
pub(crate) enum Vectors {
    Here(Box<[f32]>),
    /// Those of the chunk at this place among its turn's: one at least.
    Elsewhere(Arc<dyn Elsewhere>, u32),
}

impl Vectors {
    /// Whether the chunk has no vectors. Reads nothing.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Here(vectors) if vectors.is_empty())
    }

    /// Whether they are in memory, here or elsewhere.
    pub(super) fn is_read(&self) -> bool {
        match self {
            Self::Here(_) => true,
            Self::Elsewhere(place, _) => place.is_read(),
        }
    }

    /// Whether they are at hand.
    pub(super) fn is_here(&self) -> bool {
        matches!(self, Self::Here(_))
    }
}

impl Deref for Vectors {
    type Target = [f32];

    #[inline]
    fn deref(&self) -> &[f32] {
        match self {
            Self::Here(vectors) => vectors,
            Self::Elsewhere(place, at) => place.vectors(*at),
        }
    }
}

impl From<Vec<f32>> for Vectors {
    fn from(vectors: Vec<f32>) -> Self {
        Self::Here(vectors.into())
    }
}

impl Default for Vectors {
    fn default() -> Self {
        Self::Here(Box::default())
    }
}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(vectors) => write!(f, "Vectors({})", vectors.len()),
            Self::Elsewhere(..) => f.write_str("Vectors(not read)"),
        }
    }
}
