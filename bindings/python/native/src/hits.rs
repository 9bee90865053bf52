//! Hits as Python has them: text, score and relevance at once, and the rest when it is asked for.
//! Knows no call.

use crate::made::{Class, set};
use mka_bindings::{Role, Trust};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyAttributeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyFloat, PyList};

static HIT: Class = Class::named("Hit");
static WHY: Class = Class::named("Why");
static SOURCE: Class = Class::named("Source");

/// Roles by the names that they have in Python.
pub(crate) const ROLES: [(&str, Role); 6] = [
    ("system", Role::System),
    ("user", Role::User),
    ("assistant", Role::Assistant),
    ("document", Role::Document),
    ("recalled", Role::Recalled),
    ("tool", Role::Tool),
];

fn role(role: mka::Role) -> &'static str {
    match Role::from(role) {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Document => "document",
        Role::Recalled => "recalled",
        Role::Tool => "tool",
    }
}

fn trust(trust: mka::Trust) -> &'static str {
    match Trust::from(trust) {
        Trust::Host => "host",
        Trust::User => "user",
        Trust::Model => "model",
        Trust::Document => "document",
    }
}

/// What of a hit is made when it is asked for: most of it never is.
#[pyclass(frozen)]
pub(crate) struct Rest(mka::Hit);

#[pymethods]
impl Rest {
    /// The field of this name.
    fn read<'py>(&self, py: Python<'py>, field: &str) -> PyResult<Bound<'py, PyAny>> {
        let hit = &self.0;
        match field {
            "chunk" => hit.chunk.to_string().into_bound_py_any(py),
            "why" => why(py, &hit.why),
            "source" => source(py, &hit.source),
            "trust" => trust(hit.trust).into_bound_py_any(py),
            "count" => hit.count.into_bound_py_any(py),
            "stale" => hit.stale.into_bound_py_any(py),
            other => Err(PyAttributeError::new_err(format!("a hit has no {other} left to read"))),
        }
    }
}

fn why<'py>(py: Python<'py>, why: &mka::Why) -> PyResult<Bound<'py, PyAny>> {
    let fields = (
        why.bm25,
        why.coverage,
        why.bm25_rank,
        why.cosine,
        why.cosine_rank,
        why.recency,
        why.follow_up,
    );
    WHY.make(py, fields)
}

/// As `mka._filter.plain` has it: a number without a fraction is an int.
fn metadata<'py>(py: Python<'py>, metadata: &mka::Metadata) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (key, value) in metadata {
        match value {
            mka::Value::Flag(flag) => dict.set_item(key, flag)?,
            mka::Value::Number(number) if number.fract() == 0.0 => {
                let whole = PyFloat::new(py, *number).call_method0(intern!(py, "__int__"))?;
                dict.set_item(key, whole)?;
            }
            mka::Value::Number(number) => dict.set_item(key, number)?,
            mka::Value::Text(text) => dict.set_item(key, text)?,
            _ => {}
        }
    }
    Ok(dict)
}

fn source<'py>(py: Python<'py>, source: &mka::Source) -> PyResult<Bound<'py, PyAny>> {
    let fields = (
        &source.user,
        source.agent.as_deref(),
        &source.session,
        source.turn,
        role(source.role),
        source.bytes.start,
        source.bytes.end,
        source.time_ms,
        source.name.as_deref(),
        source.subject.as_deref(),
        source.expires_ms,
        metadata(py, &source.metadata)?,
    );
    SOURCE.make(py, fields)
}

fn hit(py: Python<'_>, mut hit: mka::Hit) -> PyResult<Bound<'_, PyAny>> {
    let made = HIT.empty(py)?;
    set(&made, intern!(py, "text"), std::mem::take(&mut hit.text))?;
    set(&made, intern!(py, "score"), hit.score)?;
    set(&made, intern!(py, "relevance"), hit.relevance)?;
    set(&made, intern!(py, "_rest"), Rest(hit))?;
    Ok(made)
}

/// The hits, best first.
pub(crate) fn list(py: Python<'_>, hits: Vec<mka::Hit>) -> PyResult<Bound<'_, PyList>> {
    let hits: Vec<_> = hits.into_iter().map(|each| hit(py, each)).collect::<PyResult<_>>()?;
    PyList::new(py, hits)
}
