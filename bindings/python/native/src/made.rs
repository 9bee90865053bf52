//! Values of the package: frozen dataclasses with slots, made by their class, or field by field where that is too slow.
//! Knows what no field means.

use pyo3::IntoPyObjectExt;
use pyo3::call::PyCallArgs;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyType};

/// A class of `mka._values`, looked up when it is needed first.
pub(crate) struct Class {
    name: &'static str,
    class: PyOnceLock<Py<PyType>>,
}

impl Class {
    pub(crate) const fn named(name: &'static str) -> Self {
        Self { name, class: PyOnceLock::new() }
    }

    fn get<'py>(&self, py: Python<'py>) -> PyResult<&Bound<'py, PyType>> {
        self.class.import(py, "mka._values", self.name)
    }

    /// A value of `fields`, in their order.
    pub(crate) fn make<'py>(
        &self,
        py: Python<'py>,
        fields: impl PyCallArgs<'py>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.get(py)?.call1(fields)
    }

    /// A value whose fields are empty: the constructor of a frozen dataclass costs four times as much as to [`set`] them.
    pub(crate) fn empty<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let class = self.get(py)?;
        // SAFETY: a class of the package is no variable-sized type; a reference of what is made is given to us, or an error.
        unsafe {
            Bound::from_owned_ptr_or_err(py, ffi::PyType_GenericAlloc(class.as_type_ptr(), 0))
        }
    }
}

/// Sets a field of a value, frozen or not, as `object.__setattr__` does.
pub(crate) fn set<'py>(
    value: &Bound<'py, PyAny>,
    field: &Bound<'py, PyString>,
    to: impl IntoPyObject<'py>,
) -> PyResult<()> {
    let py = value.py();
    let to = to.into_bound_py_any(py)?;
    // SAFETY: three objects that live during the call, whose references stay ours.
    match unsafe { ffi::PyObject_GenericSetAttr(value.as_ptr(), field.as_ptr(), to.as_ptr()) } {
        0 => Ok(()),
        _ => Err(PyErr::fetch(py)),
    }
}
