//! What a session costs by length: peak memory, decode speed, feeding, and reopening to the bit.
//! Knows no task and no score.

use crate::job::{self, Ask, Job, Result, Scratch};
use crate::subject::Model;
use std::path::PathBuf;

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct Args {
    /// Model folder, GGUF file or repository id.
    #[arg(long, default_value = "HuggingFaceTB/SmolLM2-135M-Instruct")]
    model: String,
    /// Text files to feed, repeated where they are too short.
    #[arg(long, value_delimiter = ',', required = true)]
    haystack: Vec<PathBuf>,
    /// Tokens (about) fed through the model.
    #[arg(long, value_delimiter = ',', default_value = "2048,4096,8192,32768")]
    lengths: Vec<usize>,
    /// Tokens (about) fed as text memory.
    #[arg(long, value_delimiter = ',', default_value = "131072,1048576")]
    text_lengths: Vec<usize>,
    /// Tokens attended exactly.
    #[arg(long, default_value_t = 2048)]
    window: usize,
    /// Tokens decoded to measure the speed.
    #[arg(long, default_value_t = 128)]
    decode: usize,
}

/// The beginning of `text`, repeated where it is too short, with about `tokens` tokens, and how many it has.
fn beginning(text: &str, tokens: usize, model: &Model) -> Result<(String, usize)> {
    // English prose; every further guess goes by what the one before it had.
    let mut chars = tokens * 4;
    for _ in 0..3 {
        let cut: String = text.chars().cycle().take(chars).collect();
        chars = chars * tokens / model.count_tokens(&cut)?.max(1);
    }
    let cut: String = text.chars().cycle().take(chars).collect();
    let counted = model.count_tokens(&cut)?;
    Ok((cut, counted))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut text = String::new();
    for path in &args.haystack {
        let bytes = std::fs::read(path).map_err(|e| format!("haystack {}: {e}", path.display()))?;
        text.push_str(&String::from_utf8_lossy(&bytes));
    }
    if text.is_empty() {
        return Err("cost: the haystack is empty".into());
    }
    let tokenizer = Model::open(&args.model)?;
    println!("revision {}, window {}", job::revision(), args.window);
    println!(
        "| fed as | tokens | read by the model | feed s | tokens/s | peak MiB | reopen s | first token s | of feeding % | decoded | decode tok/s | same bits |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let model = args.lengths.iter().map(|length| (true, *length));
    let memory = args.text_lengths.iter().map(|length| (false, *length));
    for (through_model, length) in model.chain(memory) {
        let scratch = Scratch::new(&format!("cost-{through_model}-{length}"))?;
        let path = scratch.path().join("text.txt");
        let (cut, tokens) = beginning(&text, length, &tokenizer)?;
        std::fs::write(&path, cut)?;
        let base = Job {
            store: scratch.path().join("store"),
            model: args.model.clone(),
            window: args.window,
            recall_k: 0,
            ..Job::default()
        };
        let peek = Some("And then".to_owned());
        // The same process goes on after feeding; the next one reopens: both look at the same next token.
        let fed = job::spawn(
            &Job { feed: Some(path), through_model, peek: peek.clone(), ..base.clone() },
            0,
        )?;
        let again = job::spawn(&Job { peek, ..base.clone() }, 0)?;
        let ask = Ask {
            message: "Go on with the story.".into(),
            max_new_tokens: args.decode,
            ..Ask::default()
        };
        let asked = job::spawn(&Job { ask: Some(ask), ..base }, 0)?;
        let to_first = asked.open_s + asked.first_token_s;
        println!(
            "| {} | {tokens} | {} | {:.1} | {:.0} | {} | {:.2} | {:.2} | {:.2} | {} | {:.1} | {} |",
            if through_model { "model" } else { "text" },
            fed.fed_tokens,
            fed.feed_s,
            tokens as f64 / fed.feed_s,
            fed.peak_rss_bytes >> 20,
            asked.open_s,
            asked.first_token_s,
            to_first / fed.feed_s * 100.0,
            asked.generated_tokens,
            asked.decode_tokens_per_s,
            if fed.logits_hash == again.logits_hash { "yes" } else { "NO" }
        );
    }
    Ok(())
}
