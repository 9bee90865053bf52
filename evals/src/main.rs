//! Command line of the evaluations: each one run from one command.
//! Knows the public API of mka only.

mod attention;
mod benchmark;
mod compare;
mod cost;
mod curve;
mod cut;
mod fingerprint;
mod inference;
mod job;
mod longbench;
mod ruler;
mod run;
mod sample;
mod speed;
mod subject;
mod training;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Does memory help, and what does it cost?")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// RULER: thirteen tasks at any length.
    Ruler(benchmark::RulerArgs),
    /// RULER's single-needle tasks alone: niah_single_1 and niah_single_2.
    Needle(benchmark::RulerArgs),
    /// LongBench v1, LongBench-E and LongBench v2.
    Longbench(benchmark::LongBenchArgs),
    /// Memory and speed by length of the stream, and what reopening costs.
    Cost(cost::Args),
    /// Prefill and decode speed of the model alone.
    Speed(speed::Args),
    /// Trains a model from one TOML file: engine/docs/training.md.
    Train(training::Args),
    /// Writes the newest checkpoint of a run as a HuggingFace folder.
    Merge(training::MergeArgs),
    /// What a model folder or a run holds: shape, steps, gates.
    Inspect(training::InspectArgs),
    /// Trains one decoder with each kind of attention and compares them.
    Attention(attention::Args),
    /// Speed, time to the first token and memory of a model, with memory and without.
    Inference(inference::Args),
    /// Differences of two runs, sample by sample, with their uncertainty.
    Compare(compare::Args),
    /// Does jobs read as lines of JSON from standard input: what the other commands start as processes apart.
    #[command(hide = true)]
    Job,
}

fn main() -> ExitCode {
    match start(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", job::described(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn start(command: Command) -> job::Result<()> {
    match command {
        Command::Ruler(args) => {
            let tasks = ruler::TASKS.each_ref().map(|task| task.name);
            benchmark::run_ruler(args, &tasks)
        }
        Command::Needle(args) => benchmark::run_ruler(args, &["niah_single_1", "niah_single_2"]),
        Command::Longbench(args) => benchmark::run_longbench(args),
        Command::Cost(args) => cost::run(&args),
        Command::Speed(args) => speed::run(&args),
        Command::Train(args) => training::run(&args),
        Command::Merge(args) => training::merge(&args),
        Command::Inspect(args) => training::inspect(&args),
        Command::Attention(args) => attention::run(&args),
        Command::Inference(args) => inference::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Job => job::serve(),
    }
}

#[cfg(test)]
mod tests;
