//! The library in the wheel: the whole uniffi surface, and beside it a module that gives Python's own objects for what is
//! called at every token and every recall.
//! Knows the classes of `mka._values` and `mka._errors` by their names, and no call that is made seldom.
//!
//! uniffi's price for a value is Python's bytecode for each of its bytes, which at eight hits is more than the recall of
//! them may cost. Every call lets go of the interpreter while the library works; no panic reaches it.

mod events;
mod hits;
mod made;
mod recalls;

use mka_bindings::{MkaError, open};
use pyo3::prelude::*;

mka_bindings::uniffi_reexport_scaffolding!();

/// The module `mka._native.direct`; `src/mka/_direct.py` loads it and says what its functions do.
#[pymodule]
mod direct {
    #[pymodule_export]
    use crate::events::{next_events, poll_events, rung};
    #[pymodule_export]
    use crate::hits::Rest;
    #[pymodule_export]
    use crate::recalls::{PyRecalling, begin_recall, recall};
}

/// What `work` gives, done while other threads of Python run.
fn call<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, MkaError> + Send) -> PyResult<T> {
    py.detach(|| open::without_panic(work)).map_err(|error| exception(py, &error))
}

/// The exception of the error's kind.
fn exception(py: Python<'_>, error: &MkaError) -> PyErr {
    let of_kind = py.import("mka._errors").and_then(|errors| errors.getattr("of_kind"));
    match of_kind.and_then(|of_kind| of_kind.call1((error.kind(), error.to_string()))) {
        Ok(exception) => PyErr::from_value(exception),
        Err(failed) => failed,
    }
}
