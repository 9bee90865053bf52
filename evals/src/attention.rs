//! The attention benchmark: one decoder from scratch with each kind of attention, on the same text, tokens and steps.
//! Knows no tensor; each kind and seed runs in a process of its own, so that peak memory is its own, and is logged as it
//! ends.

use crate::curve::{self, Line};
use crate::fingerprint;
use crate::job::{self, Result};
use crate::run;
use crate::training::Speed;
use mka::training::{
    DecodeReport, Evaluation, LatentSettings, MemoryKind, Precision, ScratchSettings, StepReport,
    TrainMode, Trainer, TrainingConfig,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The log of finished rows, in the folder.
const FILE: &str = "rows.jsonl";

/// A kind of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// A key/value head for every query head.
    Mha,
    /// One key/value head.
    Mqa,
    /// A key/value head for some query heads.
    Gqa,
    /// Multi-head latent attention: a latent vector and a rotary key.
    Mla,
    /// Memory-keyed attention: one attention a level, over grouped heads.
    Mka,
    /// Its fused form: one attention over fused keys and values, over grouped heads.
    Fastmka,
}

impl Kind {
    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

#[derive(clap::Args, Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Args {
    /// Kinds to compare.
    #[arg(long, value_delimiter = ',', default_value = "mha,mqa,gqa,mla,mka,fastmka")]
    attention: Vec<Kind>,
    /// Text files to train on.
    #[arg(long, value_delimiter = ',', required = true)]
    text: Vec<PathBuf>,
    /// Text files to measure the held-out loss on.
    #[arg(long, value_delimiter = ',', required = true)]
    held_out: Vec<PathBuf>,
    /// `bytes`, a tokenizer.json or a GGUF file.
    #[arg(long, default_value = "bytes")]
    tokenizer: String,
    /// Folder for logs, table and plots.
    #[arg(long)]
    out: PathBuf,
    /// Width of the decoder; GPT-2 has 768.
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    /// Layers; GPT-2 has 12.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Query heads; GPT-2 has 12.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Key/value heads of gqa, mka and fastmka.
    #[arg(long, default_value_t = 2)]
    kv_heads: usize,
    /// Width of mla's latent vector; 0: four heads' width.
    #[arg(long, default_value_t = 0)]
    latent_rank: usize,
    /// Width of mla's rotary key; 0: half a head's width.
    #[arg(long, default_value_t = 0)]
    latent_rope: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// Sequences of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Steps.
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Highest learning rate.
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Held-out sequences measured.
    #[arg(long, default_value_t = 16)]
    evaluate: usize,
    /// Tokens decoded after a prompt of half a sequence.
    #[arg(long, default_value_t = 32)]
    decode: usize,
    /// Seeds; the table holds means, with the spread of the perplexity.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
    /// f32, or bf16 on a CUDA device.
    #[arg(long, default_value = "f32")]
    precision: String,
    /// Where the model runs: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Train these two in this process and print the result as JSON: what the command starts for each.
    #[arg(long, hide = true, num_args = 2, value_names = ["KIND", "SEED"])]
    #[serde(skip)]
    only: Vec<String>,
}

/// What one kind and seed gave.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Row {
    kind: Kind,
    seed: u64,
    parameters: usize,
    /// Mean of the last tenth of the steps.
    train_loss: f64,
    held_out: Evaluation,
    train_s: f64,
    tokens_per_s: f64,
    peak_bytes: u64,
    decoding: DecodeReport,
    losses: Vec<f64>,
    device: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let [kind, seed] = &args.only[..] {
        let kind = <Kind as clap::ValueEnum>::from_str(kind, true)?;
        println!("{}", serde_json::to_string(&train(args, kind, seed.parse()?)?)?);
        return Ok(());
    }
    let args = &Args {
        attention: run::each_once(&args.attention),
        seeds: run::each_once(&args.seeds),
        ..args.clone()
    };
    let header = header_of(args)?;
    let (log, done, revisions) =
        run::begin::<Row>(&args.out, FILE, ("attention", &header), (None, 1))?;
    let revisions = revisions.join(", ");
    let mut rows: Vec<Row> = Vec::new();
    for seed in &args.seeds {
        for kind in &args.attention {
            if let Some(row) = done.iter().find(|row| row.kind == *kind && row.seed == *seed) {
                rows.push(row.clone());
                continue;
            }
            let row = spawn(&kind.name(), *seed)?;
            log.append(&row)?;
            eprintln!(
                "{} seed {seed}: perplexity {:.3}, {:.0} tokens/s",
                kind.name(),
                row.held_out.perplexity,
                row.tokens_per_s
            );
            rows.push(row);
        }
    }
    let header = serde_json::json!({"revision": revisions, "settings": args, "rows": rows});
    let write = |name: &str, text: &str| {
        let path = args.out.join(name);
        std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
    };
    write("attention.json", &serde_json::to_string_pretty(&header)?)?;
    let table = table(args, &revisions, &rows);
    write("attention.md", &table)?;
    print!("{table}");
    let lines: Vec<Line> = rows
        .iter()
        .filter(|row| Some(&row.seed) == args.seeds.first())
        .map(|row| Line {
            name: row.kind.name(),
            points: row.losses.iter().enumerate().map(|(i, y)| ((i + 1) as f64, *y)).collect(),
        })
        .collect();
    curve::write(
        &args.out.join("loss.svg"),
        "Training loss by step",
        ("step", "nats a token"),
        &lines,
    )
}

/// What the rows of a folder have in common: everything but which of them are asked for.
fn header_of(args: &Args) -> Result<Value> {
    let mut header = serde_json::to_value(args)?;
    if let Some(header) = header.as_object_mut() {
        header.retain(|key, _| !["attention", "seeds", "out"].contains(&key.as_str()));
    }
    header["device"] = job::device_name(&args.device)?.into();
    let texts = args.text.iter().chain(&args.held_out).map(PathBuf::as_path);
    let tokenizer = Some(Path::new(&args.tokenizer)).filter(|_| args.tokenizer != "bytes");
    header["files"] = fingerprint::of_files(texts.chain(tokenizer))?;
    Ok(header)
}

/// Runs this program again for one kind and seed, with the same arguments.
fn spawn(kind: &str, seed: u64) -> Result<Row> {
    let output = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .args(["--only", kind, &seed.to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("attention {kind}: {}: {}", output.status, said.trim()).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn settings(args: &Args, kind: Kind, seed: u64) -> Result<TrainingConfig> {
    let mut config = TrainingConfig::default();
    // Nothing is written there: neither checkpoint nor model is kept.
    config.output = args.out.join(format!("{}-{seed}", kind.name()));
    config.seed = seed;
    config.device.clone_from(&args.device);
    config.precision = match args.precision.as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        other => return Err(format!("precision {other:?}, expected f32 or bf16").into()),
    };
    let head_dim = args.hidden / args.heads.max(1);
    let or = |value: usize, other: usize| if value == 0 { other } else { value };
    let mut shape = ScratchSettings::default();
    (shape.hidden, shape.layers, shape.heads) = (args.hidden, args.layers, args.heads);
    shape.intermediate = (args.hidden * 8 / 3).next_multiple_of(64);
    shape.kv_heads = match kind {
        Kind::Mha | Kind::Mla => args.heads,
        Kind::Mqa => 1,
        Kind::Gqa | Kind::Mka | Kind::Fastmka => args.kv_heads,
    };
    shape.latent = (kind == Kind::Mla).then_some(LatentSettings {
        rank: or(args.latent_rank, 4 * head_dim),
        rope_dim: or(args.latent_rope, head_dim / 2),
    });
    config.model.scratch = Some(shape);
    config.memory.kind = match kind {
        Kind::Mka => MemoryKind::Mka,
        Kind::Fastmka => MemoryKind::Fastmka,
        _ => MemoryKind::None,
    };
    config.memory.initial_gate = 1.0;
    config.data.train.clone_from(&args.text);
    config.data.held_out.clone_from(&args.held_out);
    config.data.tokenizer = Some(args.tokenizer.clone());
    config.data.sequence_tokens = args.tokens;
    config.train.mode = TrainMode::Full;
    config.train.steps = args.steps;
    config.train.batch = args.batch;
    config.train.evaluate_sequences = args.evaluate;
    config.optimizer.learning_rate = args.learning_rate;
    config.optimizer.weight_decay = 0.1;
    config.optimizer.warmup_steps = args.steps / 10;
    Ok(config)
}

fn train(args: &Args, kind: Kind, seed: u64) -> Result<Row> {
    let mut trainer = Trainer::open(settings(args, kind, seed)?)?;
    let (mut reports, mut speed) = (Vec::new(), Speed::default());
    for _ in 0..args.steps {
        let report = trainer.step()?;
        speed.add(&report);
        reports.push(report);
    }
    let tail = (reports.len() / 10).max(1);
    let last: f64 = reports.iter().rev().take(tail).map(|report| report.loss).sum();
    let peak_bytes = match mka::training::peak_device_bytes(trainer.device()) {
        Some(bytes) => bytes,
        None => job::peak_rss_bytes(),
    };
    let prompt = (args.tokens / 2).max(1);
    let tokens = args.decode.min(args.tokens - prompt);
    Ok(Row {
        kind,
        seed,
        parameters: trainer.parameters(),
        train_loss: last / tail as f64,
        held_out: trainer.evaluate()?,
        train_s: reports.iter().map(|report: &StepReport| report.seconds).sum(),
        tokens_per_s: speed.tokens_per_s(),
        peak_bytes,
        decoding: trainer.measure_decoding(prompt, tokens)?,
        losses: reports.iter().map(|report| report.loss).collect(),
        device: trainer.device().to_string(),
    })
}

fn table(args: &Args, revisions: &str, rows: &[Row]) -> String {
    let mut text = format!(
        "revision {revisions}, {}, hidden {}, {} layers, {} heads, sequences of {}, {} steps of {} tokens, seeds {:?}\n\n",
        rows.first().map_or("-", |row| &row.device),
        args.hidden,
        args.layers,
        args.heads,
        args.tokens,
        args.steps,
        args.batch * args.tokens,
        args.seeds
    );
    text += "| attention | parameters | train loss | held-out perplexity | ± | train s | eval s | train tokens/s | peak MiB | K/V bytes a token | prefill tokens/s | decode tokens/s |\n";
    text += "|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for kind in &args.attention {
        let mine: Vec<&Row> = rows.iter().filter(|row| row.kind == *kind).collect();
        let Some(first) = mine.first() else { continue };
        let mean = |value: fn(&Row) -> f64| {
            mine.iter().map(|row| value(row)).sum::<f64>() / mine.len() as f64
        };
        let perplexity = mean(|row| row.held_out.perplexity);
        let spread = mine.iter().map(|row| (row.held_out.perplexity - perplexity).abs());
        text += &format!(
            "| {} | {} | {:.4} | {:.3} | {:.3} | {:.1} | {:.2} | {:.0} | {:.0} | {} | {:.0} | {:.1} |\n",
            kind.name(),
            first.parameters,
            mean(|row| row.train_loss),
            perplexity,
            spread.fold(0.0, f64::max),
            mean(|row| row.train_s),
            mean(|row| row.held_out.seconds),
            mean(|row| row.tokens_per_s),
            mean(|row| row.peak_bytes as f64) / (1 << 20) as f64,
            first.decoding.cache_bytes_per_token,
            mean(|row| row.decoding.prefill_tokens_per_s),
            mean(|row| row.decoding.decode_tokens_per_s),
        );
    }
    text
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
    fn every_kind_is_trained_and_measured() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("{name}: the end is near. ").repeat(40)).unwrap();
            path.display().to_string()
        };
        let (text, held_out) = (file("text"), file("held out"));
        let out = folder.path().display().to_string();
        let line = ["attention", "--text", &text, "--held-out", &held_out, "--out", &out];
        let sizes =
            "--hidden 32 --layers 1 --tokens 32 --batch 2 --steps 4 --decode 4 --device cpu";
        let args = Line::parse_from(line.into_iter().chain(sizes.split(' '))).args;
        let rows: Vec<Row> =
            args.attention.iter().map(|kind| train(&args, *kind, 1).unwrap()).collect();
        let bytes: Vec<usize> = rows.iter().map(|row| row.decoding.cache_bytes_per_token).collect();
        // One layer, heads of 8, f32: 2 · heads · 8 · 4 bytes; latent 32 + 4; three levels more for mka.
        assert_eq!(bytes, [256, 64, 128, 144, 512, 128]);
        for row in &rows {
            assert!(row.losses.len() == 4 && row.train_loss.is_finite(), "{row:?}");
            assert!(row.decoding.decode_tokens_per_s > 0.0 && row.peak_bytes > 0, "{row:?}");
        }
        // A second start takes what the first one finished.
        let header = header_of(&args).unwrap();
        let (log, _, _) =
            run::begin::<Row>(&args.out, FILE, ("attention", &header), (None, 1)).unwrap();
        rows.iter().for_each(|row| log.append(row).unwrap());
        drop(log);
        let twice = [args.attention.clone(), vec![Kind::Mha]].concat();
        run(&Args { attention: twice, seeds: vec![1, 1], ..args.clone() }).unwrap();
        let json = std::fs::read_to_string(args.out.join("attention.json")).unwrap();
        let written: Value = serde_json::from_str(&json).unwrap();
        let kinds: Vec<&Value> =
            written["rows"].as_array().unwrap().iter().map(|row| &row["kind"]).collect();
        assert_eq!(kinds, ["mha", "mqa", "gqa", "mla", "mka", "fastmka"]);
        // With other settings it is another run.
        let other = Args { steps: 5, ..args.clone() };
        let error = run(&other).unwrap_err().to_string();
        assert!(error.contains("header.steps: 4 in the folder, 5 now"), "{error}");
        // So it is with another text of the same name.
        std::fs::write(&text, "The beginning is near. ".repeat(40)).unwrap();
        let error = run(&args).unwrap_err().to_string();
        assert!(error.contains(&format!("header.files.{text}: ")), "{error}");
        assert!(!error.contains("held out"), "{error}");
        let table = table(&args, "here", &rows);
        assert_eq!(table.lines().filter(|line| line.starts_with("| ")).count(), 7, "{table}");
    }
}
