//! Training from the command line: one TOML file in; bar, log, curve and a model folder out.
//! Knows no tensor and no optimizer.

use crate::curve::{self, Line};
use crate::job::{self, Result};
use indicatif::{ProgressBar, ProgressStyle};
use mka::training::{Comparison, Evaluation, StepReport, Trainer, TrainingConfig};
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct Args {
    /// TOML file of the run (engine/docs/training.md).
    config: PathBuf,
    /// Where it runs, in place of the file's device: auto, cpu, cuda or cuda:N.
    #[arg(long)]
    device: Option<String>,
    /// Measure the held-out loss beside the untouched model, dense and behind the window, at the end.
    #[arg(long)]
    compare: bool,
    /// Stop training after this many seconds, as if the last step had come; the rest of the schedule is left out.
    #[arg(long)]
    seconds: Option<f64>,
}

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct MergeArgs {
    /// Folder of a run.
    run: PathBuf,
    /// HuggingFace folder to write.
    out: PathBuf,
}

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct InspectArgs {
    /// HuggingFace folder, or folder of a run.
    folder: PathBuf,
}

pub(crate) fn inspect(args: &InspectArgs) -> Result<()> {
    println!("{}", mka::training::inspect(&args.folder)?);
    Ok(())
}

pub(crate) fn merge(args: &MergeArgs) -> Result<()> {
    mka::training::merge(&args.run, &args.out)?;
    println!("{}", args.out.display());
    Ok(())
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut config = TrainingConfig::load(&args.config)?;
    if let Some(device) = &args.device {
        config.device.clone_from(device);
    }
    let output = config.output.clone();
    let steps = config.train.steps;
    let is_open = matches!(config.device.as_str(), "auto" | "cuda");
    if is_open && mka::Device::available().len() > 1 {
        config.device = mka::parallel::local_device()?.to_string();
    }
    let group = mka::parallel::group_from_env(config.device()?)?;
    let first = group.as_ref().is_none_or(|group| group.rank() == 0);
    let mut trainer = match group {
        Some(group) => Trainer::open_with(config, group)?,
        None => Trainer::open(config)?,
    };
    if first {
        println!(
            "revision {}, {}, {} of {} parameters trained, {} tokens a step, from step {}",
            job::revision(),
            trainer.device(),
            trainer.trained_parameters(),
            trainer.parameters(),
            trainer.step_tokens(),
            trainer.steps_done()
        );
    }
    let bar = ProgressBar::new(steps).with_position(trainer.steps_done());
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {eta}")?);
    if !first {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let mut speed = Speed::default();
    let mut show = |report: &StepReport| {
        speed.add(report);
        bar.set_position(report.step);
        bar.set_message(format!("loss {:.4}, {:.0} tokens/s", report.loss, speed.tokens_per_s()));
        if let Some(held_out) = &report.held_out {
            bar.println(format!("step {}: held-out {}", report.step, line(held_out)));
        }
    };
    trainer.run_for(args.seconds, &mut show)?;
    bar.finish();
    if first {
        println!("{:.0} tokens/s after the first two steps", speed.tokens_per_s());
        plot(&output)?;
    }
    if args.compare {
        // Processes that share a model measure it together.
        let comparison = trainer.compare()?;
        if first {
            print(&comparison);
        }
    }
    Ok(())
}

/// Tokens and time of the steps after the first two, which load kernels and fill caches.
#[derive(Default)]
pub(crate) struct Speed {
    steps: usize,
    tokens: usize,
    seconds: f64,
}

impl Speed {
    pub(crate) fn add(&mut self, report: &StepReport) {
        self.steps += 1;
        if self.steps > 2 {
            self.tokens += report.tokens;
            self.seconds += report.seconds;
        }
    }

    pub(crate) fn tokens_per_s(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 }
    }
}

fn line(evaluation: &Evaluation) -> String {
    let beyond = match evaluation.beyond_window {
        Some(beyond) => format!(", beyond the window {beyond:.4}"),
        None => String::new(),
    };
    format!(
        "loss {:.4}, perplexity {:.3}, inside the window {:.4}{beyond}",
        evaluation.loss, evaluation.perplexity, evaluation.inside_window
    )
}

fn print(comparison: &Comparison) {
    println!("| held-out loss | inside the window | beyond it | gap closed % | tokens |");
    println!("|---|---|---|---|---|");
    let rows = [
        ("untouched, dense", Some(&comparison.dense)),
        ("untouched, window and sinks", Some(&comparison.windowed)),
        ("untouched, window, sinks and recall", comparison.recalled.as_ref()),
        ("trained", Some(&comparison.trained)),
        ("trained, gates shut", Some(&comparison.without_memory)),
    ];
    for (name, evaluation) in rows.into_iter().filter_map(|(name, row)| Some((name, row?))) {
        let number =
            |x: Option<f64>, digits| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.digits$}"));
        println!(
            "| {name} | {:.4} | {} | {} | {} |",
            evaluation.inside_window,
            number(evaluation.beyond_window, 4),
            number(comparison.gap_closed(evaluation).map(|share| share * 100.0), 1),
            evaluation.tokens
        );
    }
}

/// Draws loss.svg from the log.
fn plot(output: &Path) -> Result<()> {
    let log = mka::training::read_log(&output.join("log.jsonl"))?;
    let points = |value: fn(&StepReport) -> Option<f64>| -> Vec<(f64, f64)> {
        log.iter().filter_map(|report| Some((report.step as f64, value(report)?))).collect()
    };
    let lines = [
        Line { name: "training".into(), points: points(|report| Some(report.loss)) },
        Line {
            name: "held out".into(),
            points: points(|report| report.held_out.map(|held_out| held_out.loss)),
        },
    ];
    curve::write(&output.join("loss.svg"), "Loss by step", ("step", "nats a token"), &lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_leaves_a_log_a_curve_and_a_model_that_merges() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["train.txt", "held_out.txt"] {
            std::fs::write(path(name), format!("{name}: the end is near. ").repeat(60)).unwrap();
        }
        let text = format!(
            "output = {:?}\n[model.scratch]\nhidden = 16\nlayers = 1\nheads = 2\nkv_heads = 1\nintermediate = 16\n\
             [data]\ntrain = [{:?}]\nheld_out = [{:?}]\nsequence_tokens = 16\n[train]\nmode = \"full\"\nsteps = 5\n",
            path("run"),
            path("train.txt"),
            path("held_out.txt")
        );
        std::fs::write(path("train.toml"), text).unwrap();
        let args = Args { config: path("train.toml"), device: None, compare: false, seconds: None };
        run(&args).unwrap();
        let svg = std::fs::read_to_string(path("run/loss.svg")).unwrap();
        assert!(svg.contains("Loss by step") && svg.contains("held out"), "{svg}");
        assert_eq!(mka::training::read_log(&path("run/log.jsonl")).unwrap().len(), 5);
        merge(&MergeArgs { run: path("run"), out: path("merged") }).unwrap();
        let file = |name: &str| std::fs::read(path(name)).unwrap();
        assert!(file("run/model/model.safetensors") == file("merged/model.safetensors"));
    }
}
