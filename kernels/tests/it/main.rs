//! Tests of the kernels against their references.
//! One binary: a module for each operation.

mod packed;
