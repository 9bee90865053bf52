//! One binary for every integration test of the kernels.

mod attention;
mod packed;
mod route;
