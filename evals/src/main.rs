//! Command line of the evaluations: each one run from one command.
//! Knows the public API of mka only.

mod benchmark;
mod compare;
mod cost;
mod cut;
mod job;
mod longbench;
mod ruler;
mod run;
mod sample;
mod speed;
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
    /// Differences of two runs, sample by sample, with their uncertainty.
    Compare(compare::Args),
    /// Runs one job read as JSON from standard input: what the other commands start as a process of its own.
    #[command(hide = true)]
    Job,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    match Args::parse().command {
        Command::Ruler(args) => {
            let tasks = ruler::TASKS.each_ref().map(|task| task.name);
            benchmark::run_ruler(args, &tasks)
        }
        Command::Needle(args) => benchmark::run_ruler(args, &["niah_single_1", "niah_single_2"]),
        Command::Longbench(args) => benchmark::run_longbench(args),
        Command::Cost(args) => cost::run(&args),
        Command::Speed(args) => speed::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Job => job::serve(),
    }
}
