//! What a session holds of its id and of its engine, beside what its callers see.
//! Knows no model.

use super::*;
use crate::Engine;
use std::panic::{AssertUnwindSafe, catch_unwind};

#[test]
fn a_panic_while_a_session_is_opened_leaves_its_id_free() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::builder(folder.path()).open_blocking().unwrap();
    let scope = Scope::user("ada").session("trip");
    let (shared, claimed) = (engine.shared.clone(), scope.clone());
    let opened = catch_unwind(AssertUnwindSafe(|| {
        Session::begin(shared, claimed, |_, _| panic!("as the test wants"))
    }));
    assert!(opened.is_err());
    engine.session_blocking(scope).unwrap();
}
