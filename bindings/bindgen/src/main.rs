//! uniffi's generator at the version that the bindings crate is built with; maturin runs it for Python.
//! Knows no type of the surface: it reads them from the compiled library.

use std::path::PathBuf;

fn main() {
    uniffi::uniffi_bindgen_main();
    if let Err(error) = lighten() {
        eprintln!("uniffi-bindgen: {error}");
        std::process::exit(1);
    }
}

/// Takes out of the Python that was just written what makes an import of it twice as long and changes nothing else.
fn lighten() -> Result<(), String> {
    let Some(path) = written() else { return Ok(()) };
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let text = std::fs::read_to_string(&path).map_err(failed)?;
    let text = lighter(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    std::fs::write(&path, text).map_err(failed)
}

/// The module that the arguments have uniffi write, if it is Python.
fn written() -> Option<PathBuf> {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |names: [&str; 2]| {
        let at = arguments.iter().position(|argument| names.contains(&argument.as_str()))?;
        arguments.get(at + 1)
    };
    (value(["--language", "-l"])? == "python")
        .then_some(PathBuf::from(value(["--out-dir", "-o"])?).join("mka_bindings.py"))
}

/// Imports asyncio where a call is awaited, and leaves out a decorator under which every class has its own methods.
fn lighter(text: &str) -> Result<String, String> {
    let mut text = text.to_owned();
    for (old, new) in [
        ("\nimport asyncio\n", "\n"),
        (
            "\n        return asyncio.get_running_loop()\n",
            "\n        import asyncio\n        return asyncio.get_running_loop()\n",
        ),
        ("\nfrom dataclasses import dataclass\n", "\n"),
    ] {
        let found = text.matches(old).count();
        if found != 1 {
            return Err(format!("uniffi wrote {old:?} {found} times, expected once"));
        }
        text = text.replace(old, new);
    }
    let lines: Vec<&str> = text.lines().filter(|line| line.trim() != "@dataclass").collect();
    Ok(lines.join("\n") + "\n")
}
