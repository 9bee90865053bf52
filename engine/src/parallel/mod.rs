//! Several processes that work as one: sums over all of them, and which part of a model is whose.
//! Knows no layer, session or parameter.
//!
//! Training shares data or a model ([`training`](crate::training)); an engine shares a model
//! ([`EngineBuilder::tensor_parallel`](crate::EngineBuilder::tensor_parallel)), each process on a device of its own with its
//! heads, their pages, and its part of the MLP.
//!
//! ```no_run
//! use mka::{Engine, ModelSource, Scope};
//!
//! // torchrun --no-python --nproc-per-node 2 ./chat
//! # async fn run() -> mka::Result<()> {
//! let engine = Engine::builder("agent.mka") // the second process writes agent.mka.1
//!     .model(ModelSource::path("model"))
//!     .tensor_parallel_from_env()
//!     .open()
//!     .await?;
//! let mut chat = engine.session(Scope::user("ada").session("trip")).await?;
//! let mut events = chat.send("What did we decide about Kyoto?"); // in every process; each gets the whole answer
//! # Ok(())
//! # }
//! ```
//!
//! Every process makes the same calls in the same order, one stream at a time; each has its own memory folder, in which it
//! remembers the same. Before each block of tokens they hold against each other what they are about to run: where they
//! differ, the call ends with `Incompatible` in all. A stream that is cancelled or dropped in one process is cancelled in
//! all. A process that fails or is gone ends the call of the others with an error, at once where its connections close and
//! after two minutes else; the engine must then be opened again, in all. A turn that not every process committed is taken
//! back when the session is opened. Times that [`SendOptions`](crate::SendOptions) leaves open are the first process's; what
//! is remembered apart from sessions should be given its time.

mod collective;
mod group;
#[cfg(feature = "nccl")]
mod nccl;
mod placement;

pub(crate) use collective::Alone;
pub use collective::{Collective, TcpCollective, group_from_env, local_device};
pub(crate) use group::TensorGroup;
#[cfg(feature = "nccl")]
pub use nccl::NcclCollective;
pub(crate) use placement::{Placement, RATES};
