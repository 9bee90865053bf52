//! evals.
fn main() {}
