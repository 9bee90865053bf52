//! Prefill and decode speed of a model through the public API, to stand beside a peer's in the same run.
//! Knows no memory: recall is off and the window holds the prompt.

use crate::cut;
use crate::job::{self, Ask, Job, Result, Scratch};
use crate::subject::SCAFFOLD_TOKENS;
use std::path::PathBuf;

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct Args {
    /// Model folder, GGUF file or repository id.
    #[arg(long, default_value = "HuggingFaceTB/SmolLM2-135M-Instruct")]
    model: String,
    /// Text file that the prompts are cut from.
    #[arg(long)]
    text: PathBuf,
    /// Bytes of each prompt, which the window of 4,096 tokens must hold.
    #[arg(long, value_delimiter = ',', default_value = "2200,8800")]
    bytes: Vec<usize>,
    /// Tokens decoded after each prompt.
    #[arg(long, default_value_t = 128)]
    decode: usize,
    /// Where the model runs: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Repetitions; the best is printed.
    #[arg(long, default_value_t = 3)]
    repeat: usize,
}

const WINDOW: usize = 4096;

pub(crate) fn run(args: &Args) -> Result<()> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|e| format!("text {}: {e}", args.text.display()))?;
    for &bytes in &args.bytes {
        let (mut prefill, mut decode, mut tokens) = (0f64, 0f64, 0);
        let mut device = String::new();
        for repeat in 0..args.repeat.max(1) {
            let scratch = Scratch::new(&format!("speed-{bytes}-{repeat}"))?;
            let path = scratch.write("prompt.txt", cut::beginning(&text, bytes))?;
            let job = Job {
                store: scratch.path().join("store"),
                model: args.model.clone(),
                window: WINDOW,
                device: Some(args.device.clone()),
                feed: Some(path),
                through_model: true,
                ask: Some(Ask {
                    message: "Go on with the story.".into(),
                    max_new_tokens: args.decode,
                    ..Ask::default()
                }),
                ..Job::default()
            };
            let outcome = job::spawn(&job, 0)?;
            outcome.check_window(args.decode + SCAFFOLD_TOKENS)?;
            tokens = outcome.fed_tokens;
            device = outcome.device;
            prefill = prefill.max(outcome.fed_tokens as f64 / outcome.feed_s);
            decode = decode.max(outcome.decode_tokens_per_s);
        }
        let line = serde_json::json!({
            "engine": "mka", "revision": job::revision(), "device": device, "prompt_tokens": tokens,
            "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode,
        });
        println!("{line}");
    }
    Ok(())
}
