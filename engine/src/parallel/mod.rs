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
//! // for rank in 0 1; do RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 MASTER_PORT=29500 ./chat & done; wait
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
//! What that asks of a program:
//!
//! - Every process makes the same calls in the same order, one at a time: a stream is read to its end, or its session used
//!   again, before anything else is called. Before each block of tokens the processes hold against each other what they are
//!   about to run: where they differ, the call ends with `Incompatible` in all.
//! - A process waits two minutes for the others, also for a caller that reads its stream more slowly than the others do.
//! - A stream that is cancelled or dropped in one process is cancelled in all.
//! - A failure that is one process's own (its disk, its device), and a process that is gone, end the group: calls of the
//!   others end with an error, and the engine must be opened again in all. A card that waits in a sum of NCCL waits on: a
//!   launcher that ends the processes of a job together has to end that.
//! - Each process remembers the same in its own folder, with the same [`MemoryConfig`](crate::MemoryConfig) and embedder. A
//!   turn that not every process committed is taken back when the session is opened: the window is then read again, pages
//!   begin anew, and turns may have other numbers in each process. A folder that lacks the session is refused: for more
//!   processes than before, copy the first one's folder.
//!   A session whose first commit not all of them made is refused too.
//! - The recalled text of a prompt, and times that [`SendOptions`](crate::SendOptions) leaves open, are the first process's;
//!   what is remembered apart from sessions should be given its time, and forgotten by anything but a turn's number.
//! - Prompts pass between the processes unencrypted: keep the port to the loopback or a private network.

mod collective;
mod group;
#[cfg(feature = "nccl")]
mod nccl;
mod placement;

pub(crate) use collective::Alone;
pub use collective::{Collective, TcpCollective, group_from_env, local_device};
pub(crate) use group::{TensorGroup, agree};
#[cfg(feature = "nccl")]
pub use nccl::NcclCollective;
pub(crate) use placement::{Placement, RATES};
