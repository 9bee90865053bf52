//! The seam to the database of small records: six calls that any transactional store can answer.
//! Knows nothing of what a record means, nor of segments; keys and values are bytes.

use std::path::Path;

use crate::Result;

/// One change of a batch: a key, and its new value or none to remove it.
pub type RecordChange = (Vec<u8>, Option<Vec<u8>>);

/// What [`Storage::scan`] calls with each key and its value.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> Result<()> + 'a;

/// A database of small records, sorted by key. Keys have at most 32 bytes, values at most 4 KB.
///
/// One store owns it, and one thread at a time calls it.
/// Two implementations come with the crate, see [`Backend`]; [`Store::open_with`](crate::Store::open_with) takes others.
pub trait Storage: Send {
    /// The value under `key`, as it was last written.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Calls `each` with every key and value from `from` on, by ascending key, until it fails.
    fn scan(&self, from: &[u8], each: &mut Visit<'_>) -> Result<()>;

    /// Applies all changes or none; they are on the disk when this returns, power loss included.
    /// After an error it is unknown which of the two happened, until the database is opened again.
    fn write(&mut self, changes: &[RecordChange]) -> Result<()>;

    /// Bytes that its files take on the disk.
    fn disk_bytes(&self) -> Result<u64>;

    /// Rewrites its files without what was overwritten or removed; a crash leaves the old ones or the new ones.
    /// After an error the records are as they were, or every further call fails.
    fn compact(&mut self) -> Result<()>;

    /// Where it lies, for the text of errors.
    fn path(&self) -> &Path;
}

/// Which database keeps a store's small records. Both pass the same tests of crashes, damage and power loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Backend {
    /// sled 0.34, a log-structured tree.
    #[default]
    Sled,
    /// redb 4, a copy-on-write B-tree in one file.
    Redb,
}
