//! The uniffi surface of mka: conversion only, no logic.
//! Knows the public API of the engine and nothing below it.

uniffi::setup_scaffolding!();

/// Version of the library behind the bindings.
#[uniffi::export]
pub fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}
