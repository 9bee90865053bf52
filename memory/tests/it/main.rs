//! Everything the memory promises, through its public API and the files it leaves.
//! Knows nothing of the crate's inside.

mod crash;
mod damage;
mod forget;
mod index;
mod ingest;
mod log;
mod recall;
mod scope;
mod snapshot;
mod support;
