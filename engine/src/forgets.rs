//! Counts what is forgotten of each user while an engine is open: what a session still holds from before may hold the words,
//! and nothing of it may reach the disk again.
//! Knows no store.

use mka_memory::Scope;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

/// By user, as long as somebody looks at the number.
#[derive(Default)]
pub(crate) struct Forgets(Mutex<HashMap<String, Arc<RwLock<u64>>>>);

/// What was forgotten of one user up to a moment.
#[derive(Clone)]
pub(crate) struct Seen {
    forgets: Arc<RwLock<u64>>,
    count: u64,
}

impl Forgets {
    /// What has been forgotten of the user of `scope` so far, once nothing is being forgotten.
    pub(crate) fn seen(&self, scope: &Scope) -> Seen {
        let forgets = self.of(scope);
        let count = *forgets.read().unwrap_or_else(PoisonError::into_inner);
        Seen { forgets, count }
    }

    /// Does `forget`, which may erase words of the user of `scope`: no turn of theirs is committed meanwhile. What was seen
    /// before is out of date afterwards, if what came of it says so.
    pub(crate) fn during<T>(
        &self,
        scope: &Scope,
        forget: impl FnOnce() -> T,
        has_erased: impl FnOnce(&T) -> bool,
    ) -> T {
        let forgets = self.of(scope);
        let mut count = forgets.write().unwrap_or_else(PoisonError::into_inner);
        let done = forget();
        *count += u64::from(has_erased(&done));
        done
    }

    fn of(&self, scope: &Scope) -> Arc<RwLock<u64>> {
        let mut users = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A number that nobody has seen is as good as none.
        users.retain(|user, forgets| user == scope.user_id() || Arc::strong_count(forgets) > 1);
        users.entry(scope.user_id().to_owned()).or_default().clone()
    }
}

impl Seen {
    /// Keeps things as they were seen while the guard is held; None if something was forgotten since.
    pub(crate) fn hold(&self) -> Option<RwLockReadGuard<'_, u64>> {
        let count = self.forgets.read().unwrap_or_else(PoisonError::into_inner);
        (*count == self.count).then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_of_one_user_is_news_to_those_who_saw_less_of_them() {
        let forgets = Forgets::default();
        let (ada, bob) = (Scope::user("ada"), Scope::user("bob"));
        let (of_ada, of_bob) = (forgets.seen(&ada.clone().session("a")), forgets.seen(&bob));
        assert_eq!(forgets.during(&ada, || 0, |erased| *erased > 0), 0);
        assert!(of_ada.hold().is_some());
        assert_eq!(forgets.during(&ada, || 7, |erased| *erased > 0), 7);
        assert!(of_ada.hold().is_none() && of_bob.hold().is_some());
        assert!(forgets.seen(&ada).hold().is_some());
        drop((of_ada, of_bob));
        forgets.seen(&bob);
        assert_eq!(forgets.0.lock().unwrap().len(), 1);
    }
}
