//! An array of plain numbers, either owned or lying in a memory-mapped file.
//! Knows nothing of what the numbers mean or of how the file was opened.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Bytes that stay where they are as long as they are held: a mapped file.
pub(crate) type Held = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Numbers whose every bit pattern is a value, so that bytes can be read as them where they lie.
pub(crate) trait Plain: Copy + Send + Sync + 'static {
    fn of_le(bytes: &[u8]) -> Self;
}

impl Plain for i8 {
    fn of_le(bytes: &[u8]) -> Self {
        bytes[0] as i8
    }
}

impl Plain for u32 {
    fn of_le(bytes: &[u8]) -> Self {
        Self::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

/// An array that reads as a slice.
pub(crate) enum Column<T> {
    Owned(Vec<T>),
    /// `start` is aligned for `T`, and `len` numbers lie within the bytes: see [`Column::within`].
    Held {
        held: Held,
        start: usize,
        len: usize,
    },
}

impl<T: Plain> Column<T> {
    /// `len` little-endian numbers from byte `start` of `held` on: where they lie if they are aligned, else copied.
    /// None if the bytes end before.
    pub(crate) fn within(held: &Held, start: usize, len: usize) -> Option<Self> {
        let size = size_of::<T>();
        let all = held.as_ref().as_ref();
        let bytes = all.get(start..start.checked_add(len.checked_mul(size)?)?)?;
        if cfg!(target_endian = "little") && bytes.as_ptr().addr().is_multiple_of(align_of::<T>()) {
            return Some(Self::Held { held: held.clone(), start, len });
        }
        Some(Self::Owned(bytes.chunks_exact(size).map(T::of_le).collect()))
    }
}

impl<T> From<Vec<T>> for Column<T> {
    fn from(numbers: Vec<T>) -> Self {
        Self::Owned(numbers)
    }
}

impl<T: Plain> Deref for Column<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(numbers) => numbers,
            Self::Held { held, start, len } => {
                let bytes = held.as_ref().as_ref();
                // SAFETY: `within` saw that the bytes are there and aligned; what holds them gives the same bytes as
                // long as it lives, and any bits are a `T`.
                unsafe { std::slice::from_raw_parts(bytes.as_ptr().add(*start).cast(), *len) }
            }
        }
    }
}

impl<T: Plain> fmt::Debug for Column<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Column({})", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_reads_the_same_aligned_or_not_and_never_beyond_the_end() {
        let mut bytes = vec![0u8; 4 * 16];
        bytes[..].iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8);
        let held: Held = Arc::new(bytes.clone());
        for start in 0..8 {
            let column: Column<u32> = Column::within(&held, start, 5).unwrap();
            let plain: Vec<u32> =
                bytes[start..start + 20].chunks_exact(4).map(u32::of_le).collect();
            assert_eq!(&column[..], plain);
        }
        assert!(Column::<u32>::within(&held, 48, 5).is_none());
        assert!(Column::<u32>::within(&held, 0, usize::MAX / 2).is_none());
        assert!(Column::<i8>::within(&held, 64, 0).is_some());
    }
}
