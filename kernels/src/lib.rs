//! Pure functions on tensors.
