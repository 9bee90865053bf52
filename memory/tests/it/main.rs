//! Everything the memory promises, through its public API and the files it leaves.
//! Knows nothing of the crate's inside.

mod crash;
mod damage;
// Stands in for functions of the C library, whose names and calls are those of this platform.
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
mod disk;
mod doctor;
mod encryption;
mod forget;
mod fork;
mod hygiene;
mod images;
mod index;
mod ingest;
mod log;
mod names;
mod recall;
mod reembed;
mod scope;
mod snapshot;
mod space;
mod storage;
mod support;
mod time;
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
mod torn;
mod transfer;
mod upgrade;
