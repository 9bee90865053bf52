//! mka.
