//! Sums over the cards of several processes through NCCL, on a stream of their own beside the backward pass.
//! Knows no parameter; numbers of the host, and the meeting of the processes, stay with TCP.

use super::collective::{Collective, TcpCollective};
use crate::error::{Error, ErrorKind, Result};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaStream};
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp, result::NcclError};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Storage, Tensor};
use std::sync::Arc;

/// Processes with a card each.
///
/// Equal inputs give equal bits where NCCL chooses the same algorithm: one machine, the same number of cards.
pub struct NcclCollective {
    group: TcpCollective,
    /// The card.
    ordinal: usize,
    comm: Comm,
    /// The stream that the last tensor came from, and all that NCCL may still read.
    compute: Option<Arc<CudaStream>>,
    held: Vec<Tensor>,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time, and `&mut self` sees to that.
unsafe impl Send for NcclCollective {}

impl std::fmt::Debug for NcclCollective {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NcclCollective").field("group", &self.group).finish_non_exhaustive()
    }
}

fn failed(what: &str, error: &NcclError) -> Error {
    Error::new(ErrorKind::Device, format!("nccl: {what}: {:?}", error.0))
}

impl NcclCollective {
    /// Makes the processes of `group` one NCCL group, this one with the card `ordinal`.
    ///
    /// # Errors
    /// If the card or NCCL cannot be used, or two processes name one card.
    pub fn join(mut group: TcpCollective, ordinal: usize) -> Result<Self> {
        let context = CudaContext::new(ordinal).w()?;
        let stream = context.new_stream().w()?;
        // Rank 0 makes the group's name; a sum with zeros hands it to the others, a byte a number.
        let mut name = [0f32; 128];
        if group.rank() == 0 {
            let id = Id::new().map_err(|error| failed("name a group", &error))?;
            name = id.internal().map(|byte| f32::from(byte as u8));
        }
        group.all_reduce_sum(&mut name)?;
        let id = Id::uninit(name.map(|byte| byte as u8 as _));
        let comm = Comm::from_rank(stream, group.rank(), group.world_size(), id)
            .map_err(|error| failed("join the group, one card a process", &error))?;
        Ok(Self { group, ordinal, comm, compute: None, held: Vec::new() })
    }
}

impl Collective for NcclCollective {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn world_size(&self) -> usize {
        self.group.world_size()
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<()> {
        self.group.all_reduce_sum(values)
    }

    fn all_reduce_tensor(&mut self, values: Tensor) -> Result<Tensor> {
        let candle_core::Device::Cuda(device) = values.device().clone() else {
            let mut sum = values.to_vec1::<f32>()?;
            self.all_reduce_sum(&mut sum)?;
            return Ok(Tensor::from_vec(sum, values.shape(), values.device())?);
        };
        let values = values.force_contiguous()?;
        let compute = device.cuda_stream();
        // On the stream that will read and free it. SAFETY: NCCL writes all of it before it is read.
        let mut sum = unsafe { device.alloc::<f32>(values.elem_count()) }?;
        self.comm.stream().join(&compute).w()?;
        {
            let (storage, _) = values.storage_and_layout();
            let Storage::Cuda(storage) = &*storage else {
                return Err(Error::model("nccl: a tensor that is not on its device"));
            };
            let source = storage.as_cuda_slice::<f32>()?;
            self.comm
                .all_reduce(source, &mut sum, &ReduceOp::Sum)
                .map_err(|error| failed("sum", &error))?;
        }
        let shape = values.shape().clone();
        // The driver would give its memory away as soon as the stream of the backward pass lets it go.
        self.held.push(values);
        self.compute = Some(compute);
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(sum, device));
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }

    fn settle(&mut self) -> Result<()> {
        if let Some(compute) = self.compute.take() {
            compute.join(&self.comm.stream()).w()?;
        }
        self.held.clear();
        Ok(())
    }

    fn split(&mut self, group: usize) -> Result<Box<dyn Collective>> {
        Ok(Box::new(Self::join(self.group.split(group)?, self.ordinal)?))
    }
}

impl Drop for NcclCollective {
    fn drop(&mut self) {
        // What NCCL still reads outlives it.
        let _ = self.comm.stream().synchronize();
    }
}
