//! uniffi surface of mka.
