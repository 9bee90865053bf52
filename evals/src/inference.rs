//! What a model folder costs to run, with memory and without: speed, time to the first token, memory by phase.
//! Knows no task; every measurement is a process of its own.

use crate::cut;
use crate::job::{self, Ask, Job, Memory, Outcome, Result, Scratch};
use crate::subject::SCAFFOLD_TOKENS;
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct Args {
    /// Model folder, GGUF file or repository id.
    #[arg(long, default_value = "HuggingFaceTB/SmolLM2-135M-Instruct")]
    model: String,
    /// Text file that the prompts are cut from.
    #[arg(long)]
    text: PathBuf,
    /// Bytes of each prompt.
    #[arg(long, value_delimiter = ',', default_value = "4400,26400")]
    bytes: Vec<usize>,
    /// Tokens attended exactly, with memory.
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Tokens attended exactly without memory: the window must hold the prompt, and is at most the model's trained length.
    #[arg(long, default_value_t = 8192)]
    full_window: usize,
    /// Memories looked up for the question, with memory.
    #[arg(long, default_value_t = 8)]
    recall_k: usize,
    /// Tokens decoded.
    #[arg(long, default_value_t = 64)]
    decode: usize,
    /// Where the model runs: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Share the model with the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name, each on its own card or
    /// threads; the first prints, memory and K/V are of it alone.
    #[arg(long)]
    tensor_parallel: bool,
}

/// Peak memory after each phase of one stream; every phase is a process that repeats those before it.
struct Phases {
    opened: Outcome,
    fed: Outcome,
    asked: Outcome,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|e| format!("text {}: {e}", args.text.display()))?;
    let is_silent = args.tensor_parallel && std::env::var("RANK").is_ok_and(|rank| rank != "0");
    let say = |line: &str| {
        if !is_silent {
            println!("{line}");
        }
    };
    say(&format!("revision {}, model {}", job::revision(), args.model));
    say(
        "| memory | window | prompt tokens | prefill tokens/s | first token s | decode tokens/s | recalled tokens | peak MiB: opened | prefilled | decoded | K/V MiB of the window | device |",
    );
    say("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for &bytes in &args.bytes {
        for memory in [false, true] {
            let phases = measure(args, &text, bytes, memory)?;
            say(&row(memory, &phases));
        }
    }
    Ok(())
}

fn measure(args: &Args, text: &str, bytes: usize, memory: bool) -> Result<Phases> {
    let phase = |name: &str, fed: bool, asked: bool| -> Result<Outcome> {
        let scratch = Scratch::new(&format!("inference-{bytes}-{memory}-{name}"))?;
        let path = scratch.write("prompt.txt", cut::beginning(text, bytes))?;
        let job = Job {
            feed: fed.then_some(path),
            through_model: true,
            ask: asked.then(|| Ask {
                message: "Go on with the story.".into(),
                max_new_tokens: args.decode,
                ..Ask::default()
            }),
            ..base(args, memory, scratch.path())
        };
        job::spawn(&job, 0)
    };
    let opened = phase("opened", false, false)?;
    let fed = phase("fed", true, false)?;
    if !memory {
        fed.check_window(args.decode + SCAFFOLD_TOKENS)
            .map_err(|e| format!("--bytes {bytes} without memory (--full-window): {e}"))?;
    }
    Ok(Phases { opened, fed, asked: phase("asked", true, true)? })
}

/// What the processes of a row have in common.
fn base(args: &Args, memory: bool, folder: &Path) -> Job {
    Job {
        store: folder.join("store"),
        model: args.model.clone(),
        window: if memory { args.window } else { args.full_window },
        device: Some(args.device.clone()),
        tensor_parallel: args.tensor_parallel,
        memory: if memory { Memory::Text } else { Memory::Off },
        recall_k: memory.then_some(args.recall_k),
        ..Job::default()
    }
}

fn row(memory: bool, phases: &Phases) -> String {
    let Phases { opened, fed, asked } = phases;
    let window = asked.window;
    let attended = (asked.fed_tokens as usize).min(window);
    let per_token = asked.kv_bytes_per_token;
    let mib = |bytes: u64| bytes >> 20;
    format!(
        "| {} | {window} | {} | {:.0} | {:.2} | {:.1} | {} | {} | {} | {} | {:.1} | {} |",
        if memory { "yes" } else { "no" },
        asked.fed_tokens,
        asked.fed_tokens as f64 / asked.feed_s,
        asked.first_token_s,
        asked.decode_tokens_per_s,
        asked.recalled_tokens,
        mib(opened.peak_rss_bytes),
        mib(fed.peak_rss_bytes),
        mib(asked.peak_rss_bytes),
        (attended * per_token) as f64 / f64::from(1u32 << 20),
        asked.device,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn with_memory_text_is_recalled_and_without_nothing_is() {
        let args = Line::parse_from(["inference", "--text", "book.txt", "--recall-k", "5"]).args;
        let [with, without] = [true, false].map(|memory| base(&args, memory, Path::new("scratch")));
        assert_eq!((with.memory, with.recall_k, with.window), (Memory::Text, Some(5), 1024));
        assert_eq!((without.memory, without.recall_k, without.window), (Memory::Off, None, 8192));
    }
}
