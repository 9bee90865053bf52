//! Vectors of the latest questions, so that an agent that asks again does not embed again.
//! Knows nothing of scopes: a question's vector depends on its text alone.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::Store;
use crate::Result;

/// Questions kept: an agent's turn asks the same one a few times, in recall, context and tools.
const KEPT: usize = 64;
/// Longer questions are documents, and are not asked twice.
const MAX_QUERY_BYTES: usize = 4096;

/// The latest questions and their vectors, newest last.
#[derive(Debug, Default)]
pub(super) struct Queries(Mutex<VecDeque<(Box<str>, Vec<f32>)>>);

impl Queries {
    fn find(&self, query: &str) -> Option<Vec<f32>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|(known, _)| **known == *query).map(|(_, vector)| vector.clone())
    }

    fn keep(&self, query: &str, vector: &[f32]) {
        if query.len() > MAX_QUERY_BYTES {
            return;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((query.into(), vector.to_vec()));
    }
}

impl Store {
    /// The vector of a question.
    pub(super) fn embed_query(&self, query: &str) -> Result<Vec<f32>> {
        if let Some(vector) = self.queries.find(query) {
            return Ok(vector);
        }
        let vector = self.embed(&[query])?;
        self.queries.keep(query, &vector);
        Ok(vector)
    }
}
