//! A recall that goes on while its caller does something else, and rings a bell when it is to be asked.
//! Knows no foreign language and no bytes.

use crate::bell::NativeBell;
use crate::error::MkaError;
use crate::numbered;
use mka::{MemoryHandle, Recall, Scope};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

type Work = Pin<Box<dyn Future<Output = mka::Result<Vec<mka::Hit>>> + Send>>;

/// A recall under way; dropping it lets go of the work.
pub struct Recalling {
    bell: Arc<NativeBell>,
    number: u64,
    /// None once the hits were given.
    work: Mutex<Option<Work>>,
}

impl Recalling {
    /// Begins a recall, which rings `bell` when it is to be asked for its hits. Returns at once.
    pub fn begin(
        memory: MemoryHandle,
        scope: Scope,
        query: String,
        recall: Recall,
        bell: Arc<NativeBell>,
    ) -> Self {
        let number = numbered::fresh();
        let mut work: Work = Box::pin(async move { memory.recall(&scope, &query, recall).await });
        // The first poll starts the work.
        let waker = bell.clone().waker(number);
        if let Poll::Ready(hits) = work.as_mut().poll(&mut Context::from_waker(&waker)) {
            work = Box::pin(std::future::ready(hits));
            bell.ring(number);
        }
        Self { bell, number, work: Mutex::new(Some(work)) }
    }

    /// What it rings with.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The hits, once; none yet, and then it rings again.
    ///
    /// # Errors
    /// Those of the recall; `InvalidArgument` for hits that were given before.
    pub fn hits(&self) -> Result<Option<Vec<mka::Hit>>, MkaError> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(future) = work.as_mut() else {
            return Err(MkaError::InvalidArgument("recall: its hits were given before".into()));
        };
        let waker = self.bell.clone().waker(self.number);
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => Ok(None),
            Poll::Ready(hits) => {
                *work = None;
                Ok(Some(hits?))
            }
        }
    }
}

impl fmt::Debug for Recalling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recalling").field("number", &self.number).finish_non_exhaustive()
    }
}
