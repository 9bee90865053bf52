//! Feeds a text of any length, closes the session, opens it again in the same or another process, and asks.
//!
//! ```sh
//! cargo run --release --bin long_document -- --store book.mka --text book.txt
//! cargo run --release --bin long_document -- --store book.mka --ask "Who is the narrator?"
//! ```

use clap::Parser;
use mka::{
    Device, Engine, Event, FeedEvent, FeedMode, FeedOptions, MemoryConfig, Scope, SendOptions,
};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Feed a document of any length, ask about it later")]
struct Args {
    /// Text file to feed.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Question to answer; may be given many times.
    #[arg(long)]
    ask: Vec<String>,
    /// Memory folder, created if missing.
    #[arg(long, default_value = "document.mka")]
    store: PathBuf,
    /// Model folder, GGUF file or repository id.
    #[arg(long, default_value = mka_examples::DEFAULT_MODEL)]
    model: String,
    /// Where the model runs: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Tokens attended exactly.
    #[arg(long, default_value_t = 2048)]
    window: usize,
    /// Read every token with the model, whatever the length.
    #[arg(long)]
    through_model: bool,
    /// Longest answer in tokens.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    mka_examples::exit(run(Args::parse()).await)
}

async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    if args.text.is_none() && args.ask.is_empty() {
        return Err("expected --text FILE to feed, --ask QUESTION to answer, or both".into());
    }
    let engine = Engine::builder(&args.store)
        .model(mka_examples::model(&args.model)?)
        .device(args.device)
        .memory(MemoryConfig::with_window(args.window))
        .open()
        .await?;
    let scope = Scope::user("reader").session("document");
    if let Some(path) = &args.text {
        // Bytes that are no UTF-8 are replaced: a document is data from outside.
        let bytes = std::fs::read(path).map_err(|e| format!("text {}: {e}", path.display()))?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let mut session = engine.session(scope.clone()).await?;
        let mode = if args.through_model { FeedMode::Model } else { FeedMode::Auto };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let options = FeedOptions::default().mode(mode).name(name);
        let bar = mka_examples::bytes_bar(text.len() as u64);
        let mut feed = session.feed_with(text, options);
        while let Some(event) = feed.next().await {
            match event? {
                FeedEvent::Progress { fed_bytes, .. } => bar.set_position(fed_bytes),
                FeedEvent::Done(summary) => {
                    bar.finish();
                    println!(
                        "fed {} bytes: {} tokens read by the model, {} chunks remembered, {} were there already",
                        summary.bytes,
                        summary.model_tokens,
                        summary.chunks_added,
                        summary.chunks_deduplicated
                    );
                }
                _ => {}
            }
        }
    }
    // A new handle: everything below comes from disk.
    let mut session = engine.session(scope).await?;
    for question in &args.ask {
        println!("? {question}");
        let options = SendOptions::default().max_new_tokens(args.max_new_tokens);
        let mut events = session.send_with(question.as_str(), options);
        while let Some(event) = events.next().await {
            match event? {
                Event::Recalled(hits) => println!("({} passages recalled)", hits.len()),
                Event::Token(token) => {
                    print!("{}", token.text);
                    std::io::stdout().flush()?;
                }
                Event::Done(_) => println!(),
                _ => {}
            }
        }
    }
    Ok(())
}
