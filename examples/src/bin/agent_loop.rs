//! Memory without a model: an agent, whose language model lives elsewhere, remembers, recalls and forgets.

use clap::Parser;
use mka::{Context, Engine, Forget, NewTurn, Recall, Role, Scope};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "An agent's memory, with a rule in place of a language model")]
struct Args {
    /// Memory folder, created if missing.
    #[arg(long, default_value = "agent.mka")]
    store: PathBuf,
}

/// Stands where a call to a language model would, which reads `context.text`: it quotes the best memory.
fn answer(context: &Context, question: &str) -> String {
    match context.hits.first() {
        Some(best) => format!("About \"{question}\" I remember: {}", best.text),
        None => format!("I know nothing about \"{question}\"."),
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    mka_examples::exit(run(Args::parse()).await)
}

async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let engine = Engine::builder(&args.store).open().await?;
    let scope = Scope::user("ada").agent("planner").session("trip");
    let memory = engine.memory();
    let facts = [
        "The hotel in Kyoto is the Sakura Inn, booked from the 3rd of May.",
        "Ada is allergic to peanuts.",
        "The train from Osaka leaves at 9:14 from platform 11.",
        "The passport number is X1234567.",
    ];
    let turns = facts.iter().map(|fact| NewTurn::new(Role::User, *fact)).collect();
    let committed = memory.remember(&scope, turns).await?;
    println!("remembered {} chunks", committed.chunks_added);

    let session = engine.session(scope.clone()).await?;
    for question in ["Where do we stay in Kyoto?", "When does the train leave?"] {
        let context = session.context(question, 200).await?;
        println!("{}", answer(&context, question));
    }

    let receipt = memory.forget(&scope, Forget::matching("passport")).await?;
    memory.verify(receipt.clone()).await?;
    let left = memory.recall(&scope, "passport number", Recall::default()).await?;
    let gone = !left.iter().any(|hit| hit.text.contains("X1234567"));
    println!("erased {} turns, passport gone: {gone}", receipt.turns);
    Ok(())
}
