//! Lets Apple's linker leave the names of Python's own functions to the interpreter that loads the library, as Linux's does.
//! Knows nothing of this crate.

fn main() {
    pyo3_build_config::add_extension_module_link_args();
}
