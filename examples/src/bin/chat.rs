//! A chat that remembers: interactive, or one message with `--prompt`.
//!
//! `/memory [words]` shows what is remembered, `/forget words` erases it, `/again` answers in other words, `/quit` leaves.

use clap::Parser;
use mka::{
    Device, Engine, Event, Events, Forget, MemoryConfig, Recall, Scope, SendOptions, Session,
};
use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Parser)]
#[command(about = "Chat with a local model that remembers")]
struct Args {
    /// One message; without it the program reads messages from the terminal.
    #[arg(long)]
    prompt: Option<String>,
    /// Memory folder, created if missing.
    #[arg(long, default_value = "chat.mka")]
    store: String,
    /// Model folder, GGUF file or repository id.
    #[arg(long, default_value = mka_examples::DEFAULT_MODEL)]
    model: String,
    /// Who is talking.
    #[arg(long, default_value = "me")]
    user: String,
    /// Which conversation.
    #[arg(long, default_value = "chat")]
    session: String,
    /// Where the model runs: auto, cpu, cuda or cuda:N.
    #[arg(long)]
    device: Option<Device>,
    /// With `--prompt`: share the model with the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name.
    #[arg(long, requires = "prompt")]
    tensor_parallel: bool,
    /// Tokens attended exactly.
    #[arg(long, default_value_t = 2048)]
    window: usize,
    /// 0 always takes the most likely token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Longest answer in tokens.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Print what each turn cost.
    #[arg(long)]
    usage: bool,
}

/// Milliseconds since 1970: another seed for each answer.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The least that an answer given again is drawn with.
const AGAIN_TEMPERATURE: f32 = 0.7;

#[tokio::main]
async fn main() -> ExitCode {
    mka_examples::exit(run(Args::parse()).await)
}

async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let mut builder = Engine::builder(&args.store)
        .model(mka_examples::model(&args.model)?)
        .memory(MemoryConfig::with_window(args.window));
    if let Some(device) = args.device {
        builder = builder.device(device);
    }
    if args.tensor_parallel {
        builder = builder.tensor_parallel_from_env();
    }
    let engine = builder.open().await?;
    if args.usage {
        eprintln!("model {} on {}", engine.model_name().unwrap_or("none"), engine.device());
    }
    let scope = Scope::user(&args.user).session(&args.session);
    let mut chat = engine.session(scope.clone()).await?;
    if let Some(prompt) = &args.prompt {
        let events = chat.send_with(prompt, options(&args));
        return print(events, &args).await;
    }
    let terminal = std::io::stdin().is_terminal();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            eprint!("> ");
        }
        let Some(line) = lines.next().transpose()? else { return Ok(()) };
        let (command, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        match command {
            "" => {}
            "/quit" => return Ok(()),
            "/again" => {
                // The most likely tokens would be the same ones.
                let temperature = args.temperature.max(AGAIN_TEMPERATURE);
                let options = options(&args).temperature(temperature).seed(now_ms());
                report(print(chat.regenerate(options), &args).await);
            }
            "/memory" => report(show(&engine, &scope, rest.trim()).await),
            "/forget" if rest.trim().is_empty() => eprintln!("/forget needs the words to erase"),
            "/forget" => {
                // The session's own window may hold the words: it is closed while they are erased.
                drop(chat);
                report(forget(&engine, &scope, rest.trim()).await);
                chat = reopen(&engine, &scope).await?;
            }
            _ => report(print(chat.send_with(line.as_str(), options(&args)), &args).await),
        }
    }
}

async fn reopen(engine: &Engine, scope: &Scope) -> Result<Session, mka::Error> {
    engine.session(scope.clone()).await
}

fn options(args: &Args) -> SendOptions {
    SendOptions::default().temperature(args.temperature).max_new_tokens(args.max_new_tokens)
}

/// Whether another process is the first.
fn is_another() -> bool {
    std::env::var("RANK").is_ok_and(|rank| rank != "0")
}

/// A turn that failed is told; the conversation goes on.
fn report(result: Result<(), Box<dyn std::error::Error>>) {
    if let Err(error) = result {
        eprintln!("error: {}", mka_examples::described(error.as_ref()));
    }
}

async fn print(mut events: Events, args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    while let Some(event) = events.next().await {
        match event? {
            // Every process that shares the model has the whole answer.
            _ if args.tensor_parallel && is_another() => {}
            Event::Token(token) => {
                print!("{}", token.text);
                std::io::stdout().flush()?;
            }
            Event::Done(usage) => {
                println!();
                if args.usage {
                    eprintln!(
                        "prompt {} (reused {}, recalled {}), generated {}, stream {} tokens",
                        usage.prompt_tokens,
                        usage.reused_tokens,
                        usage.recalled_tokens,
                        usage.generated_tokens,
                        usage.stream_tokens
                    );
                }
            }
            Event::Recalled(hits) if args.usage => eprintln!("recalled {} memories", hits.len()),
            _ => {}
        }
    }
    Ok(())
}

async fn show(
    engine: &Engine,
    scope: &Scope,
    words: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    if words.is_empty() {
        for chunk in engine.memory().chunks(scope, 0..100, None).await? {
            println!("turn {}: {}", chunk.latest.turn, chunk.text.trim());
        }
        return Ok(());
    }
    for hit in engine.memory().recall(scope, words, Recall::default()).await? {
        println!("{:.2} turn {}: {}", hit.score, hit.source.turn, hit.text.trim());
    }
    Ok(())
}

async fn forget(
    engine: &Engine,
    scope: &Scope,
    words: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    let receipt = engine.memory().forget(scope, Forget::matching(words)).await?;
    engine.memory().verify(receipt.clone()).await?;
    println!("erased {} turns and {} chunks; verified", receipt.turns, receipt.chunks);
    Ok(())
}
