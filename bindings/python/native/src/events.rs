//! Streams: a batch of events at a time, as the values that Python has for them, and the numbers that rang a bell.
//! Knows no session.

use crate::made::{Class, set};
use crate::{call, hits};
use mka_bindings::StopReason;
use mka_bindings::open::{self, Batch};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use std::time::Duration;

static TOKEN: Class = Class::named("Token");
static RECALLED: Class = Class::named("Recalled");
static DONE: Class = Class::named("Done");
static USAGE: Class = Class::named("Usage");
static PAGE_USAGE: Class = Class::named("PageUsage");
static PROGRESS: Class = Class::named("Progress");
static FED: Class = Class::named("Fed");

#[pyfunction]
pub(crate) fn next_events(
    py: Python<'_>,
    stream: u64,
    limit_ms: u32,
) -> PyResult<Option<Bound<'_, PyList>>> {
    let limit = Duration::from_millis(limit_ms.into());
    let batch = call(py, || open::stream(stream)?.wait(limit))?;
    batch.map(|batch| list(py, batch)).transpose()
}

#[pyfunction]
pub(crate) fn poll_events(
    py: Python<'_>,
    stream: u64,
    bell: u64,
) -> PyResult<Option<Bound<'_, PyList>>> {
    let batch = call(py, || open::stream(stream)?.poll(&open::bell(bell)?.waker(stream)))?;
    batch.map(|batch| list(py, batch)).transpose()
}

#[pyfunction]
pub(crate) fn rung(py: Python<'_>, bell: u64) -> PyResult<Vec<u64>> {
    call(py, || Ok(open::bell(bell)?.take()))
}

/// The events that this surface knows.
fn list(py: Python<'_>, batch: Batch) -> PyResult<Bound<'_, PyList>> {
    let events = PyList::empty(py);
    match batch {
        Batch::Turn(batch) => {
            for event in batch {
                match event {
                    mka::Event::Token(token) => events.append(self::token(py, &token.text)?)?,
                    mka::Event::Recalled(found) => {
                        let hits = hits::list(py, found)?.to_tuple();
                        events.append(RECALLED.make(py, (hits,))?)?;
                    }
                    mka::Event::Done(usage) => {
                        events.append(DONE.make(py, (self::usage(py, usage)?,))?)?;
                    }
                    _ => {}
                }
            }
        }
        Batch::Feed(batch) => {
            for event in batch {
                match event {
                    mka::FeedEvent::Progress { fed_bytes, committed_bytes, total_bytes } => {
                        let progress = (fed_bytes, committed_bytes, total_bytes);
                        events.append(PROGRESS.make(py, progress)?)?;
                    }
                    mka::FeedEvent::Done(fed) => {
                        let fed = (
                            fed.bytes,
                            fed.model_tokens,
                            fed.chunks_added,
                            fed.chunks_deduplicated,
                        );
                        events.append(FED.make(py, fed)?)?;
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(events)
}

fn token<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyAny>> {
    let token = TOKEN.empty(py)?;
    set(&token, intern!(py, "text"), text)?;
    Ok(token)
}

fn usage(py: Python<'_>, usage: mka::Usage) -> PyResult<Bound<'_, PyAny>> {
    let stop = match StopReason::from(usage.stop) {
        StopReason::EndOfTurn => "end_of_turn",
        StopReason::MaxTokens => "max_tokens",
        StopReason::StopString => "stop_string",
    };
    let pages = |pages: mka::PageUsage| {
        let (share, recovered) =
            (PyTuple::new(py, pages.share)?, PyTuple::new(py, pages.recovered)?);
        PAGE_USAGE.make(py, (pages.stored_tokens, pages.recalled_tokens, share, recovered))
    };
    let fields = (
        usage.prompt_tokens,
        usage.reused_tokens,
        usage.recalled_tokens,
        usage.generated_tokens,
        usage.stream_tokens,
        stop,
        usage.pages.map(pages).transpose()?,
        usage.answer_turn,
    );
    USAGE.make(py, fields)
}
