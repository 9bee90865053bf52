//! Sums of gradients over processes, while the backward pass goes on with the next layer.
//! Knows no model; what is sent comes back in the same order.

use super::model::Gradients;
use crate::error::{Error, Result};
use crate::parallel::Collective;
use candle_core::{Device, Tensor};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// What the thread is asked for, in turn.
enum Request {
    Sum(Tensor),
    /// The sums so far are about to be read.
    Settle,
}

/// A sum, or nothing for [`Request::Settle`].
type Reply = Result<Option<Tensor>>;

/// A thread that owns the collective and reduces bucket after bucket.
pub(super) struct Reducer {
    rank: usize,
    world_size: usize,
    worker: Option<Worker>,
    /// Parameters of each bucket sent and not yet taken back.
    pending: Vec<Vec<usize>>,
}

struct Worker {
    /// None once the thread is told to end.
    to: Option<Sender<Request>>,
    from: Receiver<Reply>,
    thread: Option<JoinHandle<()>>,
}

impl Reducer {
    pub(super) fn new(mut collective: Box<dyn Collective>) -> Self {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let worker = (world_size > 1).then(|| {
            let (to, inbox) = channel::<Request>();
            let (outbox, from) = channel::<Reply>();
            let thread = std::thread::spawn(move || {
                for request in inbox {
                    let reply = match request {
                        Request::Sum(values) => collective.all_reduce_tensor(values).map(Some),
                        Request::Settle => collective.settle().map(|()| None),
                    };
                    let failed = reply.is_err();
                    if outbox.send(reply).is_err() || failed {
                        return;
                    }
                }
            });
            Worker { to: Some(to), from, thread: Some(thread) }
        });
        Self { rank, world_size, worker, pending: Vec::new() }
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn world_size(&self) -> usize {
        self.world_size
    }

    /// Hands the gradients of `whole` to the thread, as one bucket.
    pub(super) fn send(&mut self, gradients: &Gradients, whole: &[usize]) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        if whole.is_empty() {
            return Ok(());
        }
        let values = gradients.joined(whole)?;
        self.pending.push(whole.to_vec());
        worker.ask(Request::Sum(values));
        Ok(())
    }

    /// Waits for every bucket, puts the sums in place, and returns the sum of `loss`.
    pub(super) fn finish(&mut self, gradients: &mut Gradients, loss: f64) -> Result<f64> {
        let pending = std::mem::take(&mut self.pending);
        let Some(worker) = &self.worker else { return Ok(loss) };
        let mut sums = Vec::with_capacity(pending.len());
        for indexes in pending {
            sums.push((indexes, worker.sum()?));
        }
        worker.ask(Request::Settle);
        worker.reply()?;
        for (indexes, sum) in sums {
            gradients.replace_joined(&indexes, &sum)?;
        }
        // In two parts, so that the sum keeps the precision of f64.
        let high = loss as f32;
        let parts = [high, (loss - f64::from(high)) as f32];
        worker.ask(Request::Sum(Tensor::new(&parts, &Device::Cpu)?));
        let parts = worker.sum()?.to_vec1::<f32>()?;
        Ok(parts.into_iter().map(f64::from).sum())
    }
}

impl Worker {
    /// A thread that has ended has left its error to be read as the reply.
    fn ask(&self, request: Request) {
        if let Some(to) = &self.to {
            let _ = to.send(request);
        }
    }

    fn reply(&self) -> Reply {
        self.from.recv().unwrap_or_else(|_| {
            Err(Error::model("collective: the group ended, expected every process to go on"))
        })
    }

    fn sum(&self) -> Result<Tensor> {
        self.reply()?.ok_or_else(|| Error::model("collective: no sum, expected one"))
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        if let Some(worker) = &mut self.worker {
            worker.to = None;
            if let Some(thread) = worker.thread.take() {
                // A thread that panicked has nothing left to say.
                let _ = thread.join();
            }
        }
    }
}
