//! uniffi's generator at the version that the bindings crate is built with; maturin runs it for Python.
//! Knows no type of the surface: it reads them from the compiled library.

fn main() {
    uniffi::uniffi_bindgen_main();
}
