//! What the example programs share: the default model and a progress bar.
//! Knows the public API of mka only.

use indicatif::{ProgressBar, ProgressStyle};
use mka::ModelSource;

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
