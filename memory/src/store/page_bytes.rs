//! The bytes of a stored page where they lie: in its segment, mapped, or in memory of their own.
//! Knows nothing of what they mean.

use super::lock::Lock;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Pages that a process maps at most: the system gives it 65,530 maps by default, those of its threads, libraries and
/// other memory among them.
const MAX_MAPPED: usize = 16_384;

/// Pages that the process maps now.
static MAPPED: AtomicUsize = AtomicUsize::new(0);

/// The bytes of a page: in the system's file cache, as [`Store::map_page`](crate::Store::map_page) gives them, or the
/// program's own, as they come from a `Vec`. A clone is the program's own.
#[derive(Clone)]
pub struct PageBytes(Place);

enum Place {
    /// `len` bytes at the front of the map.
    Mapped {
        map: Mapped,
        len: usize,
    },
    Own(Vec<u8>),
}

impl Clone for Place {
    fn clone(&self) -> Self {
        Self::Own(self.bytes().to_vec())
    }
}

impl Place {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped { map, len } => &map[..*len],
            Self::Own(bytes) => bytes,
        }
    }
}

/// A map of a part of a file that nothing changes while the store's folder is locked.
pub(super) struct Mapped {
    map: memmap2::Mmap,
    _lock: Arc<Lock>,
}

impl Mapped {
    /// Whether the process has room for one more.
    pub(super) fn has_room() -> bool {
        MAPPED.load(Ordering::Relaxed) < MAX_MAPPED
    }

    pub(super) fn new(map: memmap2::Mmap, lock: &Arc<Lock>) -> Self {
        MAPPED.fetch_add(1, Ordering::Relaxed);
        Self { map, _lock: lock.clone() }
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        MAPPED.fetch_sub(1, Ordering::Relaxed);
    }
}

impl PageBytes {
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
        if self.is_mapped() {
            self.0 = self.0.clone();
        }
        match &mut self.0 {
            Place::Own(bytes) => bytes,
            Place::Mapped { .. } => unreachable!("a clone is the program's own"),
        }
    }
}

impl From<Vec<u8>> for PageBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Place::Own(bytes))
    }
}

impl From<Mapped> for PageBytes {
    fn from(map: Mapped) -> Self {
        let len = map.len();
        Self(Place::Mapped { map, len })
    }
}

impl Deref for PageBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// The bytes of a page to be stored: some that others may hold too, which are not copied, and what stands behind them.
#[derive(Clone)]
pub struct NewPage {
    bytes: Arc<PageBytes>,
    tail: Vec<u8>,
}

impl NewPage {
    /// A page of `bytes` with `tail` behind them.
    pub fn new(bytes: Arc<PageBytes>, tail: Vec<u8>) -> Self {
        Self { bytes, tail }
    }

    /// Its bytes, one part behind the other.
    pub(super) fn parts(&self) -> [&[u8]; 2] {
        [&self.bytes, &self.tail]
    }

    /// Bytes of both parts.
    pub fn num_bytes(&self) -> usize {
        self.bytes.len() + self.tail.len()
    }

    /// Its bytes in one piece.
    pub fn to_vec(&self) -> Vec<u8> {
        self.parts().concat()
    }
}

impl From<PageBytes> for NewPage {
    fn from(bytes: PageBytes) -> Self {
        Self::new(Arc::new(bytes), Vec::new())
    }
}

impl From<Vec<u8>> for NewPage {
    fn from(bytes: Vec<u8>) -> Self {
        PageBytes::from(bytes).into()
    }
}

impl PartialEq for NewPage {
    fn eq(&self, other: &Self) -> bool {
        self.num_bytes() == other.num_bytes()
            && self.parts().into_iter().flatten().eq(other.parts().into_iter().flatten())
    }
}

impl Eq for NewPage {}

impl fmt::Debug for NewPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NewPage({} bytes)", self.num_bytes())
    }
}

impl fmt::Debug for PageBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.is_mapped() { "mapped" } else { "own" };
        write!(f, "PageBytes({} {place})", self.len())
    }
}
