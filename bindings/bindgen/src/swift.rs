//! uniffi's generator of Swift sources and headers.
//! Knows no type of the surface: it reads them from the compiled library.

fn main() {
    uniffi::uniffi_bindgen_swift();
}
