//! The models: one decoder for the Llama layout, and what a family changes in it.
//! Knows no session and no memory: keys, values and attention go through the seam of `attention`.

pub(crate) mod config;
pub(crate) mod decoder;
pub(crate) mod device;
pub(crate) mod families;
pub(crate) mod frequencies;
pub(crate) mod weights;

#[cfg(test)]
mod tests;
