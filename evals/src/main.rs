//! Command line of the evaluations: `needle`, `cost`, `speed` and `compare`, each one run from one command.
//! Knows the public API of mka only.

mod compare;
mod cost;
mod job;
#[allow(dead_code, unused_imports)]
mod longbench;
mod needle;
#[allow(dead_code)]
mod ruler;
#[allow(dead_code)]
mod run;
#[allow(dead_code)]
mod sample;
mod speed;
#[allow(dead_code)]
mod subject;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Does memory help, and what does it cost?")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// RULER's single-needle tasks at given lengths and depths.
    Needle(needle::Args),
    /// Memory and speed by length of the stream, and what reopening costs.
    Cost(cost::Args),
    /// Prefill and decode speed of the model alone.
    Speed(speed::Args),
    /// Differences of two runs, sample by sample, with their uncertainty.
    Compare(compare::Args),
    /// Runs one job read as JSON from standard input: what the other commands start as a process of its own.
    #[command(hide = true)]
    Job,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    match Args::parse().command {
        Command::Needle(args) => needle::run(&args),
        Command::Cost(args) => cost::run(&args),
        Command::Speed(args) => speed::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Job => job::serve(),
    }
}
