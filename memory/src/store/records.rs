//! The store's small records over its database: encoded, sealed if the store is encrypted, compacted when it grew.
//! Knows nothing of what a record means; keys and values come encoded by `format`.

use std::sync::Arc;

use super::runs::{Runs, expand};
use crate::cipher::Cipher;
use crate::format::{CIPHER_KEY, Key, Record, RunKey, decode_cipher, encode_cipher};
use crate::storage::RecordChange;
use crate::{EncryptionKey, Error, ErrorKind, Result, Storage};

/// Below this the database's files are not looked at: sled's smallest one takes 1 MB.
const MIN_COMPACT_BYTES: u64 = 4 << 20;
/// The database is compacted when its files take more than so many times what is alive in them.
const MAX_AMPLIFICATION: f64 = 4.0;
/// Nor before they have grown by so much of it since they were compacted last: ten thousand records of 100 bytes take sled
/// 3.8 times their bytes right after it, and every commit would compact them anew.
const MIN_GROWTH: f64 = 1.5;
/// What a database needs for a record besides key and value, about: lengths, page headers, half-empty pages.
const RECORD_OVERHEAD_BYTES: u64 = 16;

/// One change of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) key: Key,
    /// None removes the record.
    pub(crate) record: Option<Record>,
}

impl Change {
    pub(crate) fn put(key: Key, record: Record) -> Self {
        Self { key, record: Some(record) }
    }

    pub(crate) fn remove(key: Key) -> Self {
        Self { key, record: None }
    }
}

/// A key and its value as they are stored; a value that cannot be decrypted is an error.
pub(crate) type Entry = (Vec<u8>, Result<Vec<u8>>);

/// The open database.
pub(crate) struct Records {
    storage: Box<dyn Storage>,
    cipher: Option<Arc<Cipher>>,
    /// The turns that lie together.
    runs: Runs,
    /// Size of the files at which they are looked at again.
    check_at_bytes: u64,
    /// How many times what was alive the files took when they had just been compacted.
    compacted_amplification: f64,
}

impl Records {
    /// The records in `storage`, under the key that they were written with, and every one of them as [`Records::scan`] gives
    /// them; a new database takes the key that is given.
    pub(crate) fn open(
        mut storage: Box<dyn Storage>,
        key: Option<&EncryptionKey>,
    ) -> Result<(Self, Vec<Entry>)> {
        let path = storage.path().display().to_string();
        let refused = |text: &str| Error::invalid(format!("open {path}: {text}"));
        let mut is_empty = true;
        storage
            .scan(&[], &mut |_, _| {
                is_empty = false;
                // One record is enough to know.
                Err(Error::new(ErrorKind::Cancelled, ""))
            })
            .or_else(|error| if is_empty { Err(error) } else { Ok(()) })?;
        let cipher = key.map(|key| Arc::new(Cipher::new(key)));
        match (storage.get(CIPHER_KEY)?, &cipher) {
            (Some(value), Some(cipher)) => {
                if !cipher.matches(&decode_cipher(&value)?) {
                    return Err(refused(
                        "expected the key that the store is encrypted with, got another one",
                    ));
                }
            }
            (Some(_), None) => {
                return Err(refused("the store is encrypted, expected its key, got none"));
            }
            (None, Some(cipher)) if is_empty => {
                let value = encode_cipher(&cipher.check()?);
                storage.write(&[(CIPHER_KEY.to_vec(), Some(value))])?;
            }
            (None, Some(_)) => {
                return Err(refused(
                    "the store is not encrypted, expected no key; export it and import it into a new one",
                ));
            }
            (None, None) => {}
        }
        let mut runs = Runs::default();
        let entries = entries(&*storage, cipher.as_deref(), |key| runs.note(key))?;
        let records = Self {
            storage,
            cipher,
            runs,
            check_at_bytes: MIN_COMPACT_BYTES,
            compacted_amplification: 1.0,
        };
        Ok((records, entries))
    }

    pub(crate) fn cipher(&self) -> Option<&Arc<Cipher>> {
        self.cipher.as_ref()
    }

    /// Every key and value, those of turns that lie together as if each lay by itself.
    pub(crate) fn scan(&self) -> Result<Vec<Entry>> {
        entries(&*self.storage, self.cipher.as_deref(), |_| ())
    }

    /// Every key and value as the database has them, for a copy of the store.
    pub(crate) fn scan_raw(&self) -> Result<Vec<RecordChange>> {
        let mut entries = Vec::new();
        self.storage.scan(&[], &mut |key, value| {
            entries.push((key.to_vec(), Some(value.to_vec())));
            Ok(())
        })?;
        Ok(entries)
    }

    /// Applies all changes or none; they are on the disk when this returns.
    /// After an error it is unknown which of the two happened, until the store is opened again.
    pub(crate) fn write(&mut self, changes: &[Change]) -> Result<()> {
        let plain = changes.iter().map(|change| {
            let value = change.record.as_ref().map(|record| record.encode(&change.key));
            (change.key, value)
        });
        let read = |run: &RunKey| {
            let key = run.encode();
            let Some(value) = self.storage.get(&key)? else { return Ok(None) };
            Ok(Some(match &self.cipher {
                Some(cipher) => cipher.open(&key, &value)?,
                None => value,
            }))
        };
        let packed = self.runs.pack(plain.collect(), &read)?;
        let mut batch = Vec::with_capacity(packed.batch.len());
        for (key, value) in &packed.batch {
            let value = match (value, &self.cipher) {
                (Some(value), Some(cipher)) => Some(cipher.seal(key, value)?),
                (value, _) => value.clone(),
            };
            batch.push((key.clone(), value));
        }
        self.storage.write(&batch)?;
        self.runs.done(packed);
        Ok(())
    }

    /// Removes records whose keys are none of this format.
    pub(crate) fn remove_unknown(&mut self, keys: &[Vec<u8>]) -> Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let batch: Vec<RecordChange> = keys.iter().map(|key| (key.clone(), None)).collect();
        self.storage.write(&batch)
    }

    /// Bytes of the files.
    pub(crate) fn disk_bytes(&self) -> Result<u64> {
        self.storage.disk_bytes()
    }

    /// Bytes of keys and values, and what any database adds to them.
    pub(crate) fn live_bytes(&self) -> Result<u64> {
        let mut live = 0;
        self.storage.scan(&[], &mut |key, value| {
            live += (key.len() + value.len()) as u64 + RECORD_OVERHEAD_BYTES;
            Ok(())
        })?;
        Ok(live)
    }

    /// Compacts the files if they take more than four times what is alive in them, and half as much again as they took
    /// of it when they were compacted last.
    /// After an error the records are as they were, or [cannot be read](Self::can_be_read) any more.
    pub(crate) fn compact_if_grown(&mut self) -> Result<bool> {
        let mut disk = self.storage.disk_bytes()?;
        if disk < self.check_at_bytes {
            return Ok(false);
        }
        // If it fails, as on a full disk, the next commits need not try it again.
        self.check_at_bytes = ((disk as f64 * MIN_GROWTH) as u64).max(MIN_COMPACT_BYTES);
        let live = self.live_bytes()? as f64;
        let grown = disk as f64 > self.max_amplification() * live;
        if grown {
            tracing::debug!(disk, live, "compact the database");
            self.storage.compact()?;
            disk = self.storage.disk_bytes()?;
            self.compacted_amplification = disk as f64 / live.max(1.0);
        }
        // Counting reads every record: not again before the files have grown by half, or hold what is too much by now.
        let next = (disk as f64 * MIN_GROWTH).min(self.max_amplification() * live) as u64;
        self.check_at_bytes = next.max(MIN_COMPACT_BYTES);
        Ok(grown)
    }

    /// How many times what is alive the files may take.
    fn max_amplification(&self) -> f64 {
        MAX_AMPLIFICATION.max(self.compacted_amplification * MIN_GROWTH)
    }

    /// Compacts the files whatever they take; after an error it is as after one of
    /// [`compact_if_grown`](Self::compact_if_grown).
    pub(crate) fn compact(&mut self) -> Result<()> {
        self.storage.compact()
    }

    /// Whether the database answers. After a compaction that failed it may be closed.
    pub(crate) fn can_be_read(&self) -> bool {
        self.storage.get(CIPHER_KEY).is_ok()
    }
}

/// [`Records::scan`]; `note` gets the keys as the database has them.
fn entries(
    storage: &dyn Storage,
    cipher: Option<&Cipher>,
    mut note: impl FnMut(&[u8]),
) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    storage.scan(&[], &mut |key, value| {
        if key != CIPHER_KEY {
            note(key);
            let plain = match cipher {
                Some(cipher) => cipher.open(key, value),
                None => Ok(value.to_vec()),
            };
            match RunKey::decode(key) {
                Some(run) => entries.extend(expand(&run, plain)),
                None => entries.push((key.to_vec(), plain)),
            }
        }
        Ok(())
    })?;
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Visit;
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    const RECORD_BYTES: u64 = 100;

    /// A database that takes `needs` times what is alive in it however it is written, and what was overwritten.
    struct Wasteful {
        records: BTreeMap<Vec<u8>, Vec<u8>>,
        needs: u64,
        garbage: u64,
        num_compacted: Arc<AtomicU64>,
    }

    impl Storage for Wasteful {
        fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
            Ok(self.records.get(key).cloned())
        }

        fn scan(&self, from: &[u8], each: &mut Visit<'_>) -> Result<()> {
            self.records.range(from.to_vec()..).try_for_each(|(key, value)| each(key, value))
        }

        fn write(&mut self, changes: &[RecordChange]) -> Result<()> {
            for (key, value) in changes {
                let old = match value {
                    Some(value) => self.records.insert(key.clone(), value.clone()),
                    None => self.records.remove(key),
                };
                self.garbage += old.map_or(0, |_| self.needs * RECORD_BYTES);
            }
            Ok(())
        }

        fn disk_bytes(&self) -> Result<u64> {
            Ok(self.records.len() as u64 * self.needs * RECORD_BYTES + self.garbage)
        }

        fn compact(&mut self) -> Result<()> {
            self.garbage = 0;
            self.num_compacted.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }

        fn path(&self) -> &Path {
            Path::new("memory")
        }
    }

    #[test]
    fn a_database_is_compacted_for_what_was_overwritten_and_not_for_what_it_needs() {
        let num_compacted = Arc::new(AtomicU64::new(0));
        let wasteful = Wasteful {
            records: BTreeMap::new(),
            needs: 6,
            garbage: 0,
            num_compacted: num_compacted.clone(),
        };
        let (mut records, _) = Records::open(Box::new(wasteful), None).unwrap();
        let mut write = |keys: std::ops::Range<u64>| {
            let value = vec![7; (RECORD_BYTES - 8 - RECORD_OVERHEAD_BYTES) as usize];
            let batch: Vec<_> =
                keys.map(|key| (key.to_be_bytes().to_vec(), Some(value.clone()))).collect();
            records.storage.write(&batch).unwrap();
            records.compact_if_grown().unwrap()
        };
        // Once it is known what the database needs, growing by what is alive compacts nothing.
        write(0..10_000);
        let first = num_compacted.load(Ordering::Relaxed);
        assert_eq!(first, 1);
        assert!((10_000..11_000).all(|key| !write(key..key + 1)));
        // Each record written once more doubles the files.
        let compacted = (0..11).filter(|i| write(i * 1000..(i + 1) * 1000)).count();
        assert_eq!(compacted, 1);
        assert_eq!(num_compacted.load(Ordering::Relaxed), 2);
    }
}
