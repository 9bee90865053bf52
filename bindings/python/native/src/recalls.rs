//! Recalls, blocking and begun: from Python's options to the engine's, and hits out.
//! Knows neither datetime nor filter: times come in milliseconds, a filter as the engine's JSON.

use crate::{call, exception, hits};
use mka::{Recall, Scope};
use mka_bindings::{MkaError, Recalling, open};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyList};

/// User, agent and session.
type Whose = (String, Option<String>, Option<String>);

fn scope((user, agent, session): Whose) -> Scope {
    let mut scope = Scope::user(user);
    if let Some(agent) = agent {
        scope = scope.agent(agent);
    }
    if let Some(session) = session {
        scope = scope.session(session);
    }
    scope
}

#[pyfunction]
pub(crate) fn recall<'py>(
    py: Python<'py>,
    memory: u64,
    query: &str,
    whose: Whose,
    options: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyList>> {
    let (scope, options) = (scope(whose), asked(options)?);
    let found = call(py, || {
        let memory = open::memory(memory)?.handle("recall")?;
        Ok(memory.recall_blocking(&scope, query, options)?)
    })?;
    hits::list(py, found)
}

#[pyfunction]
pub(crate) fn begin_recall(
    py: Python<'_>,
    memory: u64,
    query: String,
    whose: Whose,
    options: &Bound<'_, PyDict>,
    bell: u64,
) -> PyResult<PyRecalling> {
    let (scope, options) = (scope(whose), asked(options)?);
    call(py, || {
        let memory = open::memory(memory)?.handle("recall")?;
        Ok(PyRecalling(Recalling::begin(memory, scope, query, options, open::bell(bell)?)))
    })
}

/// A recall that was begun; dropping it lets go of the work.
#[pyclass(frozen, name = "Recalling")]
pub(crate) struct PyRecalling(Recalling);

#[pymethods]
impl PyRecalling {
    /// What it rings with when it is to be asked.
    #[getter]
    fn number(&self) -> u64 {
        self.0.number()
    }

    /// The hits, once; None yet, and then it rings again.
    fn hits<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        call(py, || self.0.hits())?.map(|found| hits::list(py, found)).transpose()
    }
}

/// The engine's options; one that is None is left out.
fn asked(options: &Bound<'_, PyDict>) -> PyResult<Recall> {
    let mut recall = Recall::default();
    for (name, value) in options {
        if value.is_none() {
            continue;
        }
        match name.extract::<&str>()? {
            "k" => recall.k = number("k", &value)?,
            "before_turn" => recall.before_turn = Some(number("before_turn", &value)?),
            "except_turns" => recall.except_turns = turns(&value)?,
            "across_sessions" => recall.across_sessions = value.is_truthy()?,
            "roles" => recall.roles = roles(&value)?,
            "since" => recall.since_ms = Some(number("since", &value)?),
            "until" => recall.until_ms = Some(number("until", &value)?),
            "as_of" => recall.as_of_ms = Some(number("as_of", &value)?),
            "now" => recall.now_ms = Some(number("now", &value)?),
            "stale" => recall.stale = value.is_truthy()?,
            "half_life" => recall.half_life_ms = Some(number("half_life", &value)?),
            "min_score" => recall.min_score = number("min_score", &value)?,
            "min_relevance" => recall.min_relevance = number("min_relevance", &value)?,
            "filter" => recall.filter = Some(filter(&value)?),
            "follow_up" => recall.follow_up = value.is_truthy()?,
            other => {
                let text = format!("recall: unexpected option {other}");
                return Err(PyTypeError::new_err(text));
            }
        }
    }
    Ok(recall)
}

fn invalid(py: Python<'_>, text: String) -> PyErr {
    exception(py, &MkaError::InvalidArgument(text))
}

fn number<'py, T>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py, Error = PyErr>,
{
    value.extract().map_err(|error: PyErr| {
        let py = value.py();
        if value.is_instance_of::<PyInt>() {
            return invalid(py, format!("recall: {name} {value}: {}", error.value(py)));
        }
        match value.get_type().name() {
            Ok(class) => {
                PyTypeError::new_err(format!("recall: {name} is {class}, expected a number"))
            }
            Err(error) => error,
        }
    })
}

fn turns(numbers: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    numbers.try_iter()?.map(|turn| number("except_turns", &turn?)).collect()
}

fn roles(names: &Bound<'_, PyAny>) -> PyResult<Vec<mka::Role>> {
    let role = |name: PyResult<Bound<'_, PyAny>>| {
        let name = name?;
        let known = name.extract::<&str>().ok();
        match hits::ROLES.iter().find(|(role, _)| Some(*role) == known) {
            Some((_, role)) => Ok((*role).into()),
            None => {
                let known = hits::ROLES.map(|(role, _)| role).join(", ");
                let text = format!("role {}: expected one of {known}", name.repr()?);
                Err(invalid(name.py(), text))
            }
        }
    };
    names.try_iter()?.map(role).collect()
}

fn filter(json: &Bound<'_, PyAny>) -> PyResult<mka::Filter> {
    serde_json::from_str(json.extract()?)
        .map_err(|error| invalid(json.py(), format!("recall: filter: {error}")))
}
