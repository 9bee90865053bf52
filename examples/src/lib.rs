//! What the example programs share: the default model and a progress bar.
//! Knows the public API of mka only.

use indicatif::{ProgressBar, ProgressStyle};
use mka::ModelSource;
use std::error::Error;
use std::process::ExitCode;

/// The model that the examples use where none is named.
pub const DEFAULT_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// A folder, a GGUF file or a repository id as the command line gives it.
///
/// # Errors
/// If it is none of them.
pub fn model(name: &str) -> mka::Result<ModelSource> {
    name.parse()
}

/// A bar of `bytes` bytes with the time left.
pub fn bytes_bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    if let Ok(style) =
        ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left")
    {
        bar.set_style(style);
    }
    bar
}

/// How a program ends: what went wrong is told in words, with status 1.
pub fn exit(result: Result<(), Box<dyn Error>>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", described(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// An error and what caused it, but for causes that the text before them says already.
pub fn described(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an error says, and its cause.
    #[derive(Debug)]
    struct Caused(&'static str, Option<Box<Caused>>);

    impl std::fmt::Display for Caused {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.0)
        }
    }

    impl std::error::Error for Caused {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            self.1.as_ref().map(|cause| cause.as_ref() as &(dyn std::error::Error + 'static))
        }
    }

    #[test]
    fn an_error_is_told_with_the_causes_that_it_does_not_name() {
        let disk = Caused("disk full", None);
        let write = Caused("write a.txt: disk full", Some(Box::new(disk)));
        let save = Caused("save", Some(Box::new(write)));
        assert_eq!(described(&save), "save: write a.txt: disk full");
        let plain: Box<dyn std::error::Error> = "book.txt: \"quoted\"".into();
        assert_eq!(described(plain.as_ref()), "book.txt: \"quoted\"");
    }
}
