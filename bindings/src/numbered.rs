//! Objects that are reached by number.
//! Knows no object; a number is used once in a process, so that one that is gone is unknown, never another one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

static NEXT: AtomicU64 = AtomicU64::new(1);

/// A number that nothing has.
pub(crate) fn fresh() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What can be reached by number.
pub(crate) struct Numbered<T> {
    objects: Mutex<BTreeMap<u64, T>>,
}

impl<T: Clone> Numbered<T> {
    pub(crate) const fn new() -> Self {
        Self { objects: Mutex::new(BTreeMap::new()) }
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<u64, T>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an object; its number.
    pub(crate) fn add(&self, object: T) -> u64 {
        let number = fresh();
        self.objects().insert(number, object);
        number
    }

    pub(crate) fn get(&self, number: u64) -> Option<T> {
        self.objects().get(&number).cloned()
    }

    pub(crate) fn remove(&self, number: u64) -> Option<T> {
        self.objects().remove(&number)
    }
}

/// The number of an object, taken out of its table with the object.
pub(crate) struct Entry<T: Clone + 'static> {
    table: &'static Numbered<T>,
    pub(crate) number: u64,
}

impl<T: Clone + 'static> Entry<T> {
    pub(crate) fn new(table: &'static Numbered<T>, object: T) -> Self {
        Self { table, number: table.add(object) }
    }
}

impl<T: Clone + 'static> Drop for Entry<T> {
    fn drop(&mut self) {
        self.table.remove(self.number);
    }
}
