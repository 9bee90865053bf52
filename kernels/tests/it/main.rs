//! One binary for every integration test of the kernels.

mod attention;
#[cfg(feature = "cuda")]
mod cuda;
mod elementwise;
mod encoder;
mod flash;
mod key_codes;
mod packed;
mod panels;
mod projected;
mod recall;
mod rope;
mod route;
mod select;
mod tape;
