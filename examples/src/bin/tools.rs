//! A model that calls a tool: it is offered a calculator, its calls are read from the answer, run, and given back.
//!
//! The default model's chat template lists no tools; `--model Qwen/Qwen2.5-0.5B-Instruct` is one whose does.

use clap::Parser;
use mka::{
    Device, Engine, ErrorKind, Event, Events, Scope, SendOptions, ToolCall, ToolResult, tool_calls,
};
use std::io::Write;

/// One tool, as OpenAI and transformers write it.
const ADD: &str = r#"{
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"]
        }
    }
}"#;

#[derive(Parser)]
#[command(about = "A conversation in which a local model calls a tool")]
struct Args {
    /// The message.
    #[arg(long, default_value = "What is 1234.5 plus 8765.5?")]
    prompt: String,
    /// Memory folder, created if missing.
    #[arg(long, default_value = "tools.mka")]
    store: String,
    /// Model folder, GGUF file or repository id.
    #[arg(long, default_value = mka_examples::DEFAULT_MODEL)]
    model: String,
    /// Which conversation; tools are offered at its beginning.
    #[arg(long, default_value = "tools")]
    session: String,
    /// Where the model runs: auto, cpu, cuda or cuda:N.
    #[arg(long)]
    device: Option<Device>,
    /// Longest answer in tokens.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Most answers that call tools before the program gives up.
    #[arg(long, default_value_t = 4)]
    rounds: usize,
}

/// Runs one call; what went wrong is a result too, from which the model can go on.
fn run(call: &ToolCall) -> ToolResult {
    let sum = || {
        let arguments: serde_json::Value = serde_json::from_str(&call.arguments).ok()?;
        Some(arguments["a"].as_f64()? + arguments["b"].as_f64()?)
    };
    let content = match call.name.as_str() {
        "add" => {
            sum().map_or_else(|| "expected two numbers, a and b".to_owned(), |n| n.to_string())
        }
        other => format!("there is no tool {other}, expected add"),
    };
    ToolResult::new(content).name(&call.name)
}

/// Prints an answer as it comes, and gives its text.
async fn print(mut events: Events) -> mka::Result<String> {
    let mut answer = String::new();
    while let Some(event) = events.next().await {
        if let Event::Token(token) = event? {
            print!("{}", token.text);
            // What the terminal does not take is lost, and the conversation goes on.
            let _ = std::io::stdout().flush();
            answer.push_str(&token.text);
        }
    }
    println!();
    Ok(answer)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let mut builder = Engine::builder(&args.store).model(mka_examples::model(&args.model)?);
    if let Some(device) = args.device {
        builder = builder.device(device);
    }
    let engine = builder.open().await?;
    let mut chat = engine.session(Scope::user("me").session(&args.session)).await?;
    let options = SendOptions::default().max_new_tokens(args.max_new_tokens).tools([ADD]);
    let answered = print(chat.send_with(&args.prompt, options.clone())).await;
    let mut answer = match answered {
        Err(error) if error.kind() == ErrorKind::InvalidArgument => {
            eprintln!("{}: {error}", args.model);
            eprintln!("a model whose template lists tools: --model Qwen/Qwen2.5-0.5B-Instruct");
            std::process::exit(1);
        }
        answered => answered?,
    };
    for _ in 0..args.rounds {
        let results: Vec<ToolResult> = tool_calls(&answer).iter().map(run).collect();
        if results.is_empty() {
            return Ok(());
        }
        results.iter().for_each(|result| eprintln!("[{}]", result.content));
        answer = print(chat.send_tool(results, options.clone())).await?;
    }
    Ok(())
}
