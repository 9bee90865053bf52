//! Sums of gradients over processes, while the backward pass goes on with the next layer.
//! Knows no model; what is sent comes back in the same order.

use super::collective::Collective;
use super::model::Gradients;
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// A bucket of values under way.
type Bucket = Result<Vec<f32>>;

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
    to: Option<Sender<Vec<f32>>>,
    from: Receiver<Bucket>,
    thread: Option<JoinHandle<()>>,
}

impl Reducer {
    pub(super) fn new(mut collective: Box<dyn Collective>) -> Self {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let worker = (world_size > 1).then(|| {
            let (to, inbox) = channel::<Vec<f32>>();
            let (outbox, from) = channel::<Bucket>();
            let thread = std::thread::spawn(move || {
                for mut values in inbox {
                    let reduced = collective.all_reduce_sum(&mut values).map(|()| values);
                    let failed = reduced.is_err();
                    if outbox.send(reduced).is_err() || failed {
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
    pub(super) fn send(&mut self, gradients: &mut Gradients, whole: &[usize]) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        if whole.is_empty() {
            return Ok(());
        }
        let mut values = Vec::new();
        for gradient in whole.iter().filter_map(|index| gradients.get(*index)) {
            values.extend(gradient.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?);
        }
        self.pending.push(whole.to_vec());
        // A thread that has ended has left its error to be read in `finish`.
        if let Some(to) = &worker.to {
            let _ = to.send(values);
        }
        Ok(())
    }

    /// Waits for every bucket, puts the sums in place, and returns the sum of `loss`.
    pub(super) fn finish(&mut self, gradients: &mut Gradients, loss: f64) -> Result<f64> {
        let pending = std::mem::take(&mut self.pending);
        let Some(worker) = &self.worker else { return Ok(loss) };
        for indexes in pending {
            let values = receive(worker)?;
            let mut rest = &values[..];
            for index in indexes {
                let Some(gradient) = gradients.get(index) else { continue };
                let (mine, after) = rest.split_at(gradient.elem_count());
                let sum = Tensor::from_slice(mine, gradient.shape(), gradient.device())?;
                rest = after;
                gradients.replace(index, sum);
            }
        }
        if let Some(to) = &worker.to {
            // In two parts, so that the sum keeps the precision of f64.
            let high = loss as f32;
            let _ = to.send(vec![high, (loss - f64::from(high)) as f32]);
        }
        let parts = receive(worker)?;
        Ok(parts.into_iter().map(f64::from).sum())
    }
}

fn receive(worker: &Worker) -> Bucket {
    worker.from.recv().unwrap_or_else(|_| {
        Err(Error::model("collective: the group ended, expected every process to go on"))
    })
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
