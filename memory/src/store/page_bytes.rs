//! The bytes of a stored page where they lie: in its segment, mapped, or in memory of their own.
//! Knows nothing of what they mean.

use std::fmt;
use std::ops::Deref;

/// The bytes of a page: in the system's file cache, as [`Store::map_page`](crate::Store::map_page) gives them, or the
/// program's own, as they come from a `Vec`.
#[derive(Clone)]
pub struct PageBytes(Place);

enum Place {
    /// `len` bytes at the front of the map.
    Mapped {
        map: memmap2::Mmap,
        len: usize,
    },
    Own(Vec<u8>),
}

impl Clone for Place {
    /// In memory of its own, as what is cloned is written to.
    fn clone(&self) -> Self {
        match self {
            Self::Mapped { map, len } => Self::Own(map[..*len].to_vec()),
            Self::Own(bytes) => Self::Own(bytes.clone()),
        }
    }
}

impl PageBytes {
    pub(super) fn mapped(map: memmap2::Mmap) -> Self {
        let len = map.len();
        Self(Place::Mapped { map, len })
    }

    /// Whether they lie in a file: none of the program's own memory is theirs.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0, Place::Mapped { .. })
    }

    /// Keeps the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        match &mut self.0 {
            Place::Mapped { len: own, .. } => *own = len.min(*own),
            Place::Own(bytes) => {
                bytes.truncate(len);
                bytes.shrink_to_fit();
            }
        }
    }

    /// To be written to: in memory of their own from here on.
    pub fn to_mut(&mut self) -> &mut [u8] {
        if let Place::Mapped { map, len } = &self.0 {
            self.0 = Place::Own(map[..*len].to_vec());
        }
        match &mut self.0 {
            Place::Own(bytes) => bytes,
            Place::Mapped { .. } => &mut [],
        }
    }
}

impl From<Vec<u8>> for PageBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Place::Own(bytes))
    }
}

impl Deref for PageBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Place::Mapped { map, len } => &map[..*len],
            Place::Own(bytes) => bytes,
        }
    }
}

impl fmt::Debug for PageBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.is_mapped() { "mapped" } else { "own" };
        write!(f, "PageBytes({} {place})", self.len())
    }
}
