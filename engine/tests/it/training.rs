//! Training runs through the public API: goes on after a kill, in several processes, and refuses what does not fit.

use crate::tiny_model;
use mka::parallel::{Collective, TcpCollective};
use mka::training::{
    LatentSettings, MemoryKind, Precision, ScratchSettings, StepReport, TrainMode, Trainer,
    TrainingConfig, inspect, merge, read_log,
};
use mka::{Engine, ErrorKind, MemoryConfig, ModelSource};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A run over the tiny model, adapters and gates trained behind a window.
pub(crate) fn config(folder: &Path) -> TrainingConfig {
    let text = |seed: usize| -> String {
        let words = ["the end", " is near", " and the", " king", " of", " sand", ".\n"];
        (0..1500).map(|i| words[(i * i * 7 + i * seed) % 97 % words.len()]).collect()
    };
    for (name, seed) in [("train.txt", 3), ("held_out.txt", 5)] {
        std::fs::write(folder.join(name), text(seed)).unwrap();
    }
    std::fs::write(folder.join("short.txt"), "too short").unwrap();
    let mut config = TrainingConfig::default();
    config.output = folder.join("run");
    config.model.source = Some(tiny_model().display().to_string());
    config.data.train = vec![folder.join("train.txt")];
    config.data.held_out = vec![folder.join("held_out.txt")];
    config.data.sequence_tokens = 48;
    config.memory.window_tokens = 16;
    config.memory.sink_tokens = 4;
    config.train.steps = 8;
    config.train.batch = 2;
    config.train.evaluate_sequences = 2;
    config.lora.rank = 4;
    config.optimizer.learning_rate = 0.01;
    config
}

/// [`config`] over sequences that are long enough for its last queries to choose what they recall.
fn recalling(folder: &Path) -> TrainingConfig {
    let mut config = config(folder);
    config.data.sequence_tokens = 180;
    (config.memory.recall_tokens, config.memory.recall_first_layer) = (64, 1);
    config
}

fn run(config: TrainingConfig) -> mka::Result<Vec<StepReport>> {
    let mut reports = Vec::new();
    Trainer::open(config)?.run(&mut |report| reports.push(report.clone()))?;
    Ok(reports)
}

fn losses(reports: &[StepReport]) -> Vec<f64> {
    reports.iter().map(|report| report.loss).collect()
}

#[test]
fn training_lowers_the_loss_and_writes_a_model_that_the_engine_runs() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.train.steps = 30;
    config.train.distill = 0.3;
    let mut trainer = Trainer::open(config.clone()).unwrap();
    let before = trainer.compare().unwrap();
    // Nothing is trained yet: the gates are shut and the adapters are zero.
    assert_eq!(before.trained.loss, before.windowed.loss);
    assert_eq!(before.without_memory.loss, before.windowed.loss);
    assert_ne!(before.dense.loss, before.windowed.loss);
    assert_eq!(before.gap_closed(&before.trained), Some(0.0));
    assert_eq!(before.recalled.map(|recalled| recalled.loss), None);
    trainer.run(&mut |_| ()).unwrap();
    let after = trainer.compare().unwrap();
    assert_eq!((after.dense.loss, after.windowed.loss), (before.dense.loss, before.windowed.loss));
    assert!(after.trained.loss < before.trained.loss - 0.1, "{after:?}");
    assert_ne!(after.trained.loss, after.without_memory.loss);
    let merged = folder.path().join("merged");
    merge(&config.output, &merged).unwrap();
    for model in [config.output.join("model"), merged] {
        let engine = Engine::builder(folder.path().join("store"))
            .model(ModelSource::path(&model))
            .memory(MemoryConfig::with_window(128))
            .open_blocking()
            .unwrap();
        drop(engine);
        let file = |name: &str| std::fs::read(model.join(name)).unwrap();
        let first = config.output.join("model");
        for name in ["model.safetensors", "mka.safetensors", "config.json", "tokenizer.json"] {
            assert!(file(name) == std::fs::read(first.join(name)).unwrap(), "{name} differs");
        }
    }
    let (run, model) =
        (inspect(&config.output).unwrap(), inspect(&config.output.join("model")).unwrap());
    assert_eq!((run.step, model.step), (Some(30), None));
    assert!(run.gates == model.gates && run.gates.iter().all(|gate| *gate != 0.0), "{run}");
    assert_eq!((run.router_rank, model.router_rank), (Some(32), Some(32)));
    assert_eq!(run.parameters, trainer.trained_parameters());
    assert_eq!(model.rates, [0.9, 0.99, 0.999]);
    let nothing = inspect(folder.path()).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::NotFound);
    // A model that was trained is trained on: the memory starts as it was left.
    let mut again = config.clone();
    again.output = folder.path().join("again");
    again.model.source = Some(config.output.join("model").display().to_string());
    let again = Trainer::open(again).unwrap().evaluate().unwrap();
    assert!((again.loss - after.trained.loss).abs() < 1e-4, "{again:?}, {after:?}");
}

#[test]
fn training_recalls_behind_the_window_and_is_compared_with_recall_alone() {
    let folder = tempfile::tempdir().unwrap();
    for kind in [MemoryKind::None, MemoryKind::Fastmka] {
        let mut config = recalling(folder.path());
        config.output = folder.path().join(format!("{kind:?}"));
        config.memory.kind = kind;
        config.train.distill = 0.3;
        let mut trainer = Trainer::open(config).unwrap();
        let before = trainer.compare().unwrap();
        let recalled = before.recalled.unwrap();
        // Nothing is trained yet: what is recalled alone tells the trained model from the windowed one.
        assert_eq!(before.trained.loss, recalled.loss);
        assert_eq!(before.without_memory.loss, recalled.loss);
        assert_ne!(before.windowed.loss, recalled.loss);
        assert_ne!(before.dense.loss, recalled.loss);
        assert_eq!(before.windowed.inside_window, recalled.inside_window);
        trainer.run(&mut |_| ()).unwrap();
        let after = trainer.compare().unwrap();
        assert_eq!(after.recalled.map(|recalled| recalled.loss), Some(recalled.loss));
        assert!(after.trained.loss < before.trained.loss - 0.1, "{after:?}");
        let without = after.without_memory.loss;
        assert_eq!(after.trained.loss == without, kind == MemoryKind::None, "{after:?}");
    }
}

#[test]
fn a_model_trained_with_a_recalled_vector_is_refused_by_a_session_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.data.sequence_tokens = 100;
    config.memory.recalled_vector = true;
    config.train.steps = 20;
    let mut trainer = Trainer::open(config.clone()).unwrap();
    let before = trainer.compare().unwrap();
    assert_eq!(before.trained.loss, before.windowed.loss);
    trainer.run(&mut |_| ()).unwrap();
    assert!(trainer.evaluate().unwrap().loss < before.trained.loss - 0.1);
    let decoding = trainer.measure_decoding(8, 2).unwrap_err();
    assert!(decoding.to_string().contains("memory.recalled_vector"), "{decoding}");
    let error = Engine::builder(folder.path().join("store"))
        .model(ModelSource::path(config.output.join("model")))
        .open_blocking()
        .unwrap_err();
    assert!(error.to_string().contains("mka.recalled_vector"), "{error}");
}

#[test]
fn every_kind_of_attention_learns_from_scratch() {
    let folder = tempfile::tempdir().unwrap();
    for (name, kind, kv_heads, latent) in [
        ("mha", MemoryKind::None, 4, false),
        ("mqa", MemoryKind::None, 1, false),
        ("mla", MemoryKind::None, 4, true),
        ("mka", MemoryKind::Mka, 2, false),
        ("fastmka", MemoryKind::Fastmka, 2, false),
    ] {
        let mut config = config(folder.path());
        config.output = folder.path().join(name);
        config.model.source = None;
        let mut shape = ScratchSettings::default();
        (shape.hidden, shape.layers, shape.heads, shape.intermediate) = (32, 2, 4, 64);
        shape.kv_heads = kv_heads;
        shape.latent = latent.then_some(LatentSettings { rank: 16, rope_dim: 4 });
        config.model.scratch = Some(shape);
        config.memory.kind = kind;
        config.memory.initial_gate = 1.0;
        config.memory.window_tokens = 0;
        config.train.mode = TrainMode::Full;
        config.train.steps = 20;
        config.train.accumulate = 2;
        let reports = run(config).unwrap();
        let (first, last) = (reports[0].loss, reports[19].loss);
        assert!((first - (320f64).ln()).abs() < 0.3, "{name} starts at {first}");
        assert!(last < first - 1.0, "{name}: {first} to {last}");
        let held_out = reports[19].held_out.unwrap();
        assert!((held_out.perplexity.ln() - held_out.loss).abs() < 1e-9);
    }
}

const CHILD: &str = "MKA_TRAINING_TEST_FOLDER";
const TENSOR: &str = "MKA_TRAINING_TEST_TENSOR";

/// What a child process does: the run in the folder that a variable names, as the process that others say.
fn child() -> bool {
    let Some(folder) = std::env::var_os(CHILD) else { return false };
    let recalls = std::env::var("MKA_TRAINING_TEST_RECALL").is_ok();
    let folder = Path::new(&folder);
    let mut config = if recalls { recalling(folder) } else { config(folder) };
    let slow = std::env::var("MKA_TRAINING_TEST_SLOW").is_ok();
    if slow {
        config.train.save_every = 1;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    config.train.steps = number("MKA_TRAINING_TEST_STEPS").unwrap_or(8);
    config.train.tensor_parallel = number(TENSOR).unwrap_or(1) as usize;
    let mut trainer = match TcpCollective::from_env().unwrap() {
        Some(group) => {
            config.train.batch = 2 * config.train.tensor_parallel / group.world_size();
            Trainer::open_with(config, Box::new(group)).unwrap()
        }
        None => Trainer::open(config).unwrap(),
    };
    trainer
        .run(&mut |report| {
            println!("step {} {}", report.step, report.loss);
            if slow {
                std::thread::sleep(Duration::from_millis(40));
            }
        })
        .unwrap();
    true
}

/// `processes` that find each other, `tensor` of which share a model.
fn spawn_group(
    test: &str,
    folder: &Path,
    (processes, tensor): (usize, usize),
    steps: u64,
) -> Vec<std::process::Child> {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let start = |rank: usize| {
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", processes.to_string()),
            ("MASTER_ADDR", "127.0.0.1".into()),
            ("MASTER_PORT", port.to_string()),
            ("MKA_TRAINING_TEST_STEPS", steps.to_string()),
            (TENSOR, tensor.to_string()),
        ];
        spawn(test, folder, &variables)
    };
    (0..processes).map(start).collect()
}

fn spawn(test: &str, folder: &Path, variables: &[(&str, String)]) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", test])
        .env(CHILD, folder)
        .envs(variables.iter().map(|(name, value)| (name, value.as_str())))
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

#[test]
fn killed_and_run_again_a_run_has_the_same_curve() {
    if child() {
        return;
    }
    let test = "training::killed_and_run_again_a_run_has_the_same_curve";
    let slow = ("MKA_TRAINING_TEST_SLOW", String::from("1"));
    let recalls = ("MKA_TRAINING_TEST_RECALL", String::from("1"));
    for recall in [false, true] {
        let variables =
            if recall { vec![slow.clone(), recalls.clone()] } else { vec![slow.clone()] };
        let straight = tempfile::tempdir().unwrap();
        let config = if recall { recalling } else { config };
        run(config(straight.path())).unwrap();
        let expected = read_log(&straight.path().join("run/log.jsonl")).unwrap();
        assert_eq!(expected.len(), 8);
        let folder = tempfile::tempdir().unwrap();
        for pause in [200, 330, 170] {
            let mut child = spawn(test, folder.path(), &variables);
            std::thread::sleep(Duration::from_millis(pause));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(spawn(test, folder.path(), &variables).wait().unwrap().success());
        let log = read_log(&folder.path().join("run/log.jsonl")).unwrap();
        assert_eq!(losses(&log), losses(&expected));
        let held_out = |log: &[StepReport]| log.last().unwrap().held_out.map(|e| e.loss);
        assert_eq!(held_out(&log), held_out(&expected));
        let model =
            |folder: &Path| std::fs::read(folder.join("run/model/mka.safetensors")).unwrap();
        assert!(model(folder.path()) == model(straight.path()));
    }
}

#[test]
fn several_processes_have_the_losses_of_one_at_the_same_global_batch() {
    if child() {
        return;
    }
    let alone = tempfile::tempdir().unwrap();
    let expected = losses(&run(config(alone.path())).unwrap());
    let test = "training::several_processes_have_the_losses_of_one_at_the_same_global_batch";
    // Each with its own model, all with one, and two with each of two.
    for shape in [(2, 1), (2, 2), (4, 2)] {
        let folder = tempfile::tempdir().unwrap();
        config(folder.path());
        for child in spawn_group(test, folder.path(), shape, 8) {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success());
            let text = String::from_utf8(output.stdout).unwrap();
            let found: Vec<f64> = text
                .lines()
                .filter_map(|line| line.split_once("step ")?.1.split_once(' ')?.1.parse().ok())
                .collect();
            assert_eq!(found.len(), expected.len(), "{text}");
            for (found, expected) in found.iter().zip(&expected) {
                let error = (found - expected).abs();
                println!("{shape:?}: loss off by {error:e}");
                // Sums in another order, eight updates of 0.01 later: up to 1e-5 where a gradient is near zero.
                assert!(error < 5e-5, "{shape:?}: {found}, expected {expected}");
            }
        }
        let log = read_log(&folder.path().join("run/log.jsonl")).unwrap();
        assert_eq!(log.len(), expected.len());
    }
}

#[test]
fn a_killed_process_ends_the_one_that_shares_its_model() {
    if child() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    config(folder.path());
    let test = "training::a_killed_process_ends_the_one_that_shares_its_model";
    // More steps than it will live to see.
    let [mut first, mut second] =
        spawn_group(test, folder.path(), (2, 2), 1_000_000).try_into().expect("two of two");
    let mut lines = BufReader::new(second.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("step 2 ")));
    second.kill().unwrap();
    second.wait().unwrap();
    // What it prints is read, so that it never waits for a reader.
    let output = first.stdout.take().unwrap();
    let reader = std::thread::spawn(move || BufReader::new(output).lines().count());
    let started = Instant::now();
    let status = loop {
        if let Some(status) = first.try_wait().unwrap() {
            break status;
        }
        assert!(started.elapsed() < Duration::from_secs(100), "it waits for the dead");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(!status.success());
    reader.join().unwrap();
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_another_models_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.train.keep = 5;
    config.train.save_every = 3;
    config.train.steps = 6;
    let straight = run(config.clone()).unwrap();
    let newest = config.output.join("checkpoints/step-00000006/trained.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    let mut reports = Vec::new();
    let mut trainer = Trainer::open(config.clone()).unwrap();
    assert_eq!(trainer.steps_done(), 3);
    trainer.run(&mut |report| reports.push(report.clone())).unwrap();
    assert_eq!(losses(&reports), losses(&straight[3..]));

    let refused = |change: &dyn Fn(&mut TrainingConfig), named: &str| {
        let mut other = config.clone();
        change(&mut other);
        let error = Trainer::open(other).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
        assert!(error.to_string().contains(named), "{error}");
    };
    refused(&|c| c.optimizer.learning_rate = 0.5, "learning_rate");
    let text = folder.path().join("other.txt");
    std::fs::write(&text, "another text altogether. ".repeat(40)).unwrap();
    refused(&|c| c.data.train = vec![text.clone()], "training text");
    let scratch = |c: &mut TrainingConfig| {
        let mut shape = ScratchSettings::default();
        (shape.hidden, shape.layers, shape.heads, shape.kv_heads) = (16, 1, 2, 1);
        (c.model.source, c.model.scratch) = (None, Some(shape));
        c.train.mode = TrainMode::Full;
    };
    refused(&scratch, "base model");
    for step in ["step-00000003", "step-00000006"] {
        let state = config.output.join("checkpoints").join(step).join("state.json");
        std::fs::write(state, "{").unwrap();
    }
    assert_eq!(Trainer::open(config).unwrap_err().kind(), ErrorKind::Corrupted);
}

#[test]
fn a_memory_that_was_trained_is_trained_on_with_its_own_rates_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = config(folder.path());
    (first.train.steps, first.memory.learn_rates, first.memory.initial_gate) = (4, true, 0.5);
    let mut trainer = Trainer::open(first.clone()).unwrap();
    trainer.run(&mut |_| ()).unwrap();
    let expected = trainer.evaluate().unwrap().loss;
    let model = first.output.join("model");
    let rates = inspect(&model).unwrap().rates;
    assert_ne!(rates, first.memory.rates);
    let mut next = first.clone();
    next.output = folder.path().join("next");
    next.model.source = Some(model.display().to_string());
    let error = Trainer::open(next.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    let named = format!("memory.rates: {:?}, expected {rates:?}", first.memory.rates);
    assert!(error.to_string().contains(&named), "{error}");
    // What the error names can be written into the file.
    let path = folder.path().join("next.toml");
    let text = format!(
        "output = \"run\"\n[model]\nsource = \"model\"\n[data]\ntrain = [\"a.txt\"]\n\
        held_out = [\"b.txt\"]\n[memory]\nrates = {rates:?}\n"
    );
    std::fs::write(&path, text).unwrap();
    next.memory.rates = TrainingConfig::load(&path).unwrap().memory.rates;
    assert_eq!(next.memory.rates, rates);
    let loss = Trainer::open(next.clone()).unwrap().evaluate().unwrap().loss;
    assert!((loss - expected).abs() < 1e-4, "{loss}, expected {expected}");
    next.memory.bias_correction = false;
    let error = Trainer::open(next).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    assert!(error.to_string().contains("memory.bias_correction: false, expected true"), "{error}");
}

/// The checkpoints of a run in bf16 are as those of one in f32: a machine without a card can merge them.
#[test]
fn a_run_in_bf16_is_merged_on_the_processor() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.train.steps = 2;
    run(config.clone()).unwrap();
    let path = config.output.join("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("precision = \"f32\""), "{text}");
    std::fs::write(&path, text.replace("precision = \"f32\"", "precision = \"bf16\"")).unwrap();
    let merged = folder.path().join("merged");
    merge(&config.output, &merged).unwrap();
    for name in ["model.safetensors", "mka.safetensors", "config.json"] {
        let file = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert!(file(&merged) == file(&config.output.join("model")), "{name} differs");
    }
}

#[test]
fn a_checkpoint_is_kept_though_damaged_ones_of_later_steps_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    (config.train.steps, config.train.save_every, config.train.keep) = (8, 2, 5);
    run(config.clone()).unwrap();
    let checkpoints = config.output.join("checkpoints");
    for step in ["step-00000006", "step-00000008"] {
        std::fs::write(checkpoints.join(step).join("state.json"), "{").unwrap();
    }
    // What somebody put beside them is none of them.
    std::fs::create_dir(checkpoints.join("step-00000008.copy")).unwrap();
    config.train.keep = 2;
    let mut trainer = Trainer::open(config).unwrap();
    assert_eq!(trainer.steps_done(), 4);
    trainer.step().unwrap();
    assert_eq!(trainer.save().unwrap(), checkpoints.join("step-00000005"));
    let entries = std::fs::read_dir(&checkpoints).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    assert_eq!(names, ["step-00000004", "step-00000005", "step-00000008.copy"]);
}

#[test]
fn a_checkpoint_that_cannot_be_read_now_is_an_error_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    (config.train.steps, config.train.save_every, config.train.keep) = (4, 2, 5);
    run(config.clone()).unwrap();
    let newest = config.output.join("checkpoints/step-00000004");
    let (state, moments) = (newest.join("state.json"), newest.join("moments.safetensors"));
    let text = std::fs::read_to_string(&state).unwrap();
    let later = text.replace("\"version\": 1", "\"version\": 2");
    assert_ne!(later, text);
    std::fs::write(&state, later).unwrap();
    let error = Trainer::open(config.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    std::fs::write(&state, text).unwrap();
    // A folder in the place of a file cannot be read, and is there.
    let bytes = std::fs::read(&moments).unwrap();
    std::fs::remove_file(&moments).unwrap();
    std::fs::create_dir(&moments).unwrap();
    let error = Trainer::open(config.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Storage, "{error}");
    std::fs::remove_dir(&moments).unwrap();
    std::fs::write(&moments, bytes).unwrap();
    assert_eq!(Trainer::open(config).unwrap().steps_done(), 4);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_the_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.train.save_every = 1;
    config.optimizer.learning_rate = 1e30;
    config.optimizer.warmup_steps = 0;
    config.optimizer.clip_norm = 0.0;
    let error = run(config.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
    let text = error.to_string();
    assert!(text.contains("expected a finite number") && text.contains("step-0000000"), "{text}");
    assert!(Trainer::open(config).unwrap().steps_done() >= 1);
}

#[test]
fn what_no_run_could_use_is_refused_by_name() {
    type Change = fn(&mut TrainingConfig);
    let cases: [(Change, ErrorKind, &str); 21] = [
        (
            |c| c.data.train = vec![c.output.with_file_name("short.txt")],
            ErrorKind::InvalidArgument,
            "one sequence",
        ),
        (|c| c.data.sequence_tokens = 257, ErrorKind::InvalidArgument, "trained length"),
        (|c| c.data.train.clear(), ErrorKind::InvalidArgument, "data.train"),
        (|c| c.data.held_out = c.data.train.clone(), ErrorKind::InvalidArgument, "trained on too"),
        (|c| c.data.train = vec!["/nowhere".into()], ErrorKind::NotFound, "/nowhere"),
        (|c| c.train.steps = 0, ErrorKind::InvalidArgument, "train.steps"),
        (|c| c.train.distill = 1.5, ErrorKind::InvalidArgument, "train.distill"),
        (|c| c.memory.rates = vec![1.0], ErrorKind::InvalidArgument, "memory.rates"),
        (|c| c.memory.rates.clear(), ErrorKind::InvalidArgument, "memory.rates"),
        (|c| c.memory.recall_tokens = 100, ErrorKind::InvalidArgument, "memory.recall_tokens: 100"),
        (
            |c| (c.memory.recall_tokens, c.memory.window_tokens) = (64, 0),
            ErrorKind::InvalidArgument,
            "memory.window_tokens: 0",
        ),
        (
            |c| (c.memory.recalled_vector, c.memory.window_tokens) = (true, 0),
            ErrorKind::InvalidArgument,
            "memory.recalled_vector",
        ),
        (
            |c| (c.memory.recalled_vector, c.memory.kind) = (true, MemoryKind::None),
            ErrorKind::InvalidArgument,
            "memory.recalled_vector",
        ),
        // The tiny model has two layers, and three are left out by default.
        (|c| c.memory.recall_tokens = 64, ErrorKind::InvalidArgument, "recall_first_layer: 3"),
        (|c| c.lora.targets = vec!["head".into()], ErrorKind::InvalidArgument, "head"),
        (|c| c.optimizer.learning_rate = f64::NAN, ErrorKind::InvalidArgument, "learning_rate"),
        (|c| c.precision = Precision::Bf16, ErrorKind::InvalidArgument, "bf16"),
        (|c| c.device = "abacus".into(), ErrorKind::InvalidArgument, "abacus"),
        (|c| c.model.source = None, ErrorKind::InvalidArgument, "source"),
        (
            |c| c.model.scratch = Some(ScratchSettings::default()),
            ErrorKind::InvalidArgument,
            "source",
        ),
        (|c| c.model.source = Some("/nowhere".into()), ErrorKind::NotFound, "/nowhere"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (change, kind, named) in cases {
        let mut config = config(folder.path());
        change(&mut config);
        let error = Trainer::open(config).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(named), "{named}: {error}");
    }
}

#[test]
fn a_training_file_is_read_whole_or_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.toml");
    let text = "output = \"run\"\nseed = 3\n[model]\nsource = \"model.gguf\"\n[data]\ntrain = [\"a.txt\"]\n\
        held_out = [\"b.txt\"]\n[memory]\nkind = \"mka\"\nrates = [0.9]\n[train]\nmode = \"gate\"\n";
    std::fs::write(&path, text).unwrap();
    let config = TrainingConfig::load(&path).unwrap();
    assert_eq!((config.seed, config.memory.kind), (3, MemoryKind::Mka));
    assert_eq!((config.train.mode, config.lora.rank), (TrainMode::Gate, 16));
    for (from, to, named) in [
        ("seed", "sead", "sead"),
        ("\"mka\"", "\"rnn\"", "rnn"),
        ("\"gate\"", "\"some\"", "some"),
        ("[0.9]", "[0.9", "training file"),
        ("seed = 3", "seed = -3", "seed"),
        ("[\"b.txt\"]", "[]", "held_out"),
    ] {
        std::fs::write(&path, text.replace(from, to)).unwrap();
        let error = TrainingConfig::load(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().contains(named) || named == "seed", "{named}: {error}");
    }
    let missing = TrainingConfig::load(&folder.path().join("none.toml")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}
