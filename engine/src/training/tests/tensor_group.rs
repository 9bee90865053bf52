//! Tensor parallelism: threads that share one model behind the collective of processes.

use super::*;
use crate::parallel::{Collective, Placement, TcpCollective, TensorGroup};
use crate::training::tensor_group::divide;
use crate::training::{StepReport, Trainer, merge, read_log};
use crate::{Error, ErrorKind};
use std::time::{Duration, Instant};

/// What each of `processes` threads makes of its place, in their order.
fn together<T: Send>(
    processes: usize,
    run: impl Fn(Box<dyn Collective>) -> T + Send + Sync,
) -> Vec<T> {
    let places = TcpCollective::of_threads(processes).unwrap();
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> =
            places.into_iter().map(|place| scope.spawn(move || run(Box::new(place)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Every kind of tensor that a layer can have: biases everywhere, norms of queries and keys.
fn decoder(kv_heads: usize) -> DecoderConfig {
    let shape = ScratchSettings {
        hidden: 32,
        layers: 2,
        heads: 4,
        kv_heads,
        intermediate: 48,
        latent: None,
    };
    let mut decoder = scratch_decoder(&shape, 64, 64);
    (decoder.qkv_bias, decoder.output_bias, decoder.mlp_bias) = (true, true, true);
    decoder.qk_norm = true;
    decoder
}

/// A model with every trained tensor away from its start, the same values whoever holds which part.
fn disturbed(decoder: DecoderConfig, config: &TrainingConfig, group: &TensorGroup) -> TrainModel {
    let model = TrainModel::load_part(decoder, None, config, (&Device::Cpu, group), false).unwrap();
    for parameter in model.parameters.iter().filter(|p| p.name != "rates.logit") {
        let shape = group.whole_shape(&parameter.name, parameter.master().dims());
        let seed = parameter.name.bytes().map(usize::from).sum::<usize>();
        let noise: Vec<f32> = (0..shape.iter().product())
            .map(|j: usize| 0.2 * ((seed * 131 + j * 17) as f32 * 0.7).sin())
            .collect();
        let noise = Tensor::from_vec(noise, shape, &Device::Cpu).unwrap();
        let noise = group.part(&parameter.name, &noise).unwrap();
        parameter.set(&(parameter.master() + noise).unwrap()).unwrap();
    }
    model
}

struct Found {
    loss: f64,
    /// Whole ones.
    gradients: HashMap<String, Tensor>,
    logits: Vec<f32>,
}

fn found(model: &TrainModel, share: f64, recompute: bool) -> Found {
    let batch = batch(30, 64);
    let mut sums = Gradients::new(model.parameters.len());
    let tokens = batch.targets.len();
    let teacher = (share > 0.0).then_some((model, share));
    let loss =
        model.backward(&batch, tokens, teacher, recompute, &mut sums, &mut |_, _| Ok(())).unwrap();
    model.sum_shared(&mut sums).unwrap();
    let gradients = model.parameters.iter().enumerate().map(|(i, parameter)| {
        let gradient = sums.get(i).unwrap_or_else(|| panic!("{}: no gradient", parameter.name));
        (parameter.name.clone(), model.group.whole(&parameter.name, gradient).unwrap())
    });
    let gradients = gradients.collect();
    let logits = model.logits(&batch, View::Trained).unwrap();
    let logits = logits.flatten_all().unwrap().to_vec1().unwrap();
    Found { loss: loss / tokens as f64, gradients, logits }
}

#[test]
fn processes_that_share_a_model_have_the_losses_and_gradients_of_one() {
    // Kind, mode, learned rates, teacher's share, activations computed again, processes, key/value heads.
    for (kind, mode, learn_rates, share, recompute, processes, kv_heads) in [
        (MemoryKind::Fastmka, TrainMode::Lora, false, 0.0, false, 2, 2),
        (MemoryKind::Fastmka, TrainMode::Lora, false, 0.5, true, 2, 2),
        (MemoryKind::Fastmka, TrainMode::Full, true, 0.0, false, 2, 2),
        (MemoryKind::Fastmka, TrainMode::Full, false, 0.0, true, 4, 4),
        (MemoryKind::Fastmka, TrainMode::Gate, false, 0.0, false, 2, 2),
        (MemoryKind::Mka, TrainMode::Full, true, 0.0, false, 2, 2),
        (MemoryKind::Mka, TrainMode::Lora, false, 0.5, false, 2, 2),
        (MemoryKind::None, TrainMode::Full, false, 0.0, false, 2, 2),
        (MemoryKind::None, TrainMode::Lora, false, 0.0, true, 4, 4),
    ] {
        let case = format!("{kind:?}, {mode:?}, {processes} processes");
        let mut config = full(kind);
        config.seed = 5;
        config.train.mode = mode;
        config.memory.learn_rates = learn_rates;
        config.memory.initial_gate = 0.6;
        (config.memory.window_tokens, config.memory.sink_tokens) = (11, 4);
        config.lora.targets = LORA_TARGETS.map(str::to_owned).to_vec();
        (config.lora.rank, config.lora.alpha) = (4, 8.0);
        let alone = disturbed(decoder(kv_heads), &config, &TensorGroup::alone());
        let expected = found(&alone, share, recompute);
        let results = together(processes, |place| {
            let (group, data) = divide(place, processes).unwrap();
            assert_eq!(data.world_size(), 1);
            let model = disturbed(decoder(kv_heads), &config, &group);
            let q = &model.tensors["model.layers.1.self_attn.q_proj.weight"];
            assert_eq!(q.dims(), [32 / processes, 32]);
            found(&model, share, recompute)
        });
        let largest = expected.gradients.values().map(norm).fold(0.0, f64::max);
        let (mut worst, mut worst_loss) = ((0.0, String::new()), 0.0f64);
        for result in &results {
            worst_loss = worst_loss.max((result.loss - expected.loss).abs());
            for (name, exact) in &expected.gradients {
                let error = norm(&(&result.gradients[name] - exact).unwrap());
                let error = error / (norm(exact) + 0.01 * largest);
                if error > worst.0 {
                    worst = (error, name.clone());
                }
            }
            // What every process has, it has to the last bit.
            assert_eq!(result.loss, results[0].loss, "{case}");
            for (name, gradient) in &result.gradients {
                let bits = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert!(bits(gradient) == bits(&results[0].gradients[name]), "{case}: {name}");
            }
            assert!(result.logits == results[0].logits, "{case}: logits");
        }
        let logits = expected.logits.iter().zip(&results[0].logits);
        let worst_logit = logits.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        println!("{case}: loss {worst_loss:e}, logits {worst_logit:e}, gradients {worst:?}");
        assert!(worst_loss < 2e-6 * expected.loss, "{case}: loss off by {worst_loss}");
        assert!(worst_logit < 3e-5, "{case}: logits off by {worst_logit}");
        assert!(worst.0 < 5e-5, "{case}: gradient off by {worst:?}");
    }
}

#[test]
fn parts_of_a_tensor_make_the_whole() {
    let whole: Vec<f32> = (0..48).map(|i| if i == 5 { -0.0 } else { i as f32 * 0.3 }).collect();
    let whole = Tensor::from_vec(whole, (8, 6), &Device::Cpu).unwrap();
    for (name, placement) in [
        ("model.layers.3.self_attn.k_proj.weight", Placement::Split(0)),
        ("model.layers.3.self_attn.o_proj.weight", Placement::Split(1)),
        ("model.layers.3.self_attn.o_proj.bias", Placement::Whole),
        ("model.layers.3.mlp.down_proj.weight", Placement::Split(1)),
        ("model.layers.13.input_layernorm.weight", Placement::Whole),
        ("model.layers.3.self_attn.k_norm.weight", Placement::Shared),
        ("model.embed_tokens.weight", Placement::Whole),
        ("layers.3.lora.up.a", Placement::Shared),
        ("layers.3.lora.up.b", Placement::Split(0)),
        ("layers.3.lora.down.a", Placement::Split(1)),
        ("layers.3.lora.down.b", Placement::Shared),
        ("layers.3.router.down.weight", Placement::Split(1)),
        ("layers.3.router.up.weight", Placement::Whole),
        ("layers.3.gate", Placement::Shared),
        ("rates.logit", Placement::Shared),
    ] {
        assert_eq!(Placement::of(name), placement, "{name}");
        together(2, |place| {
            let group = TensorGroup::new(place).unwrap();
            let part = group.part(name, &whole).unwrap();
            assert_eq!(group.whole_shape(name, part.dims()), [8, 6]);
            let bits = |x: &Tensor| -> Vec<u32> {
                let values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                values.into_iter().map(f32::to_bits).collect()
            };
            assert_eq!(bits(&group.whole(name, &part).unwrap()), bits(&whole), "{name}");
        });
    }
}

#[test]
fn what_differs_between_processes_is_named() {
    let errors = together(3, |place| {
        let hash = u64::from(place.rank() == 2) << 40;
        TensorGroup::new(place).unwrap().agree(&[("the same", 7), ("the gate", hash)]).unwrap_err()
    });
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        assert!(error.to_string().contains("the gate differs"), "{error}");
    }
}

/// A run over the tiny model: adapters on everything, an open gate, a window with sinks.
fn run_config(folder: &Path) -> TrainingConfig {
    let text = |seed: usize| -> String {
        let words = ["the end", " is near", " and the", " king", " of", " sand", ".\n"];
        (0..1500).map(|i| words[(i * i * 7 + i * seed) % 97 % words.len()]).collect()
    };
    for (name, seed) in [("train.txt", 3), ("held_out.txt", 5)] {
        std::fs::write(folder.join(name), text(seed)).unwrap();
    }
    let mut config = full(MemoryKind::Fastmka);
    config.train.mode = TrainMode::Lora;
    config.output = folder.join("run");
    config.model.source = Some(golden("gguf/model.gguf").display().to_string());
    config.data.train = vec![folder.join("train.txt")];
    config.data.held_out = vec![folder.join("held_out.txt")];
    config.data.sequence_tokens = 40;
    config.memory.initial_gate = 0.5;
    (config.memory.window_tokens, config.memory.sink_tokens) = (12, 4);
    config.train.steps = 6;
    config.train.batch = 4;
    config.train.save_every = 3;
    config.train.keep = 5;
    config.train.evaluate_sequences = 2;
    config.lora.targets = LORA_TARGETS.map(str::to_owned).to_vec();
    config.lora.rank = 4;
    config.optimizer.learning_rate = 0.003;
    // Reached: the norm counts.
    config.optimizer.clip_norm = 0.5;
    config
}

fn reports(trainer: &mut Trainer) -> crate::Result<Vec<StepReport>> {
    let mut reports = Vec::new();
    trainer.run(&mut |report| reports.push(report.clone()))?;
    Ok(reports)
}

/// The reports of `processes` threads, `tensor` of which share a model: each thread's.
fn run(config: &TrainingConfig, processes: usize, tensor: usize) -> Vec<Vec<StepReport>> {
    let mut config = config.clone();
    config.train.tensor_parallel = tensor;
    config.train.batch /= processes / tensor;
    together(processes, |place| {
        let mut trainer = Trainer::open_with(config.clone(), place).unwrap();
        assert_eq!(trainer.step_tokens(), 160);
        reports(&mut trainer).unwrap()
    })
}

fn assert_same(case: &str, found: &[StepReport], expected: &[StepReport]) {
    assert_eq!(found.len(), expected.len(), "{case}");
    for (found, expected) in found.iter().zip(expected) {
        let error = (found.loss - expected.loss).abs();
        let norms = (found.gradient_norm / expected.gradient_norm - 1.0).abs();
        println!("{case}, step {}: loss off by {error:e}, norm by {norms:e}", found.step);
        assert!(error < 1e-5, "{case}: loss {}, expected {}", found.loss, expected.loss);
        assert!(norms < 5e-6, "{case}: norm off by {norms}");
        assert_eq!(found.tokens, expected.tokens);
    }
}

#[test]
fn a_shared_run_has_the_curve_of_one_process_and_its_checkpoints_go_either_way() {
    let folder = || tempfile::tempdir().unwrap();
    let alone = folder();
    let expected = reports(&mut Trainer::open(run_config(alone.path())).unwrap()).unwrap();
    assert!(expected.iter().all(|report| report.gradient_norm > 0.5), "{expected:?}");
    for (processes, tensor) in [(2, 2), (4, 2)] {
        let case = format!("{tensor} of {processes}");
        let (shared, whole) = (folder(), folder());
        let all = run(&run_config(shared.path()), processes, tensor);
        // As many sets of data, each process with its own model.
        let others = run(&run_config(whole.path()), processes / tensor, 1);
        for found in all.iter().chain(&others) {
            assert_same(&case, found, &expected);
            let held_out = |reports: &[StepReport]| reports[5].held_out.unwrap().loss;
            let error = (held_out(found) - held_out(&expected)).abs();
            println!("{case}: held-out loss off by {error:e}");
            assert!(error < 1e-5, "{case}: held-out loss off by {error}");
        }
        assert_eq!(read_log(&shared.path().join("run/log.jsonl")).unwrap().len(), 6);
        // A model that was written in parts is the one that one process writes of its checkpoint.
        let merged = folder();
        merge(&shared.path().join("run"), merged.path()).unwrap();
        for name in ["model.safetensors", "mka.safetensors", "config.json", "tokenizer.json"] {
            let file = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
            assert!(file(merged.path()) == file(&shared.path().join("run/model")), "{name}");
        }
        let shapes = |folder: &Path| -> Vec<(String, Vec<usize>)> {
            let path = folder.join("run/checkpoints/step-00000003/trained.safetensors");
            let mut shapes: Vec<_> =
                tensors(path).into_iter().map(|(name, x)| (name, x.dims().to_vec())).collect();
            shapes.sort();
            shapes
        };
        assert_eq!(shapes(shared.path()), shapes(alone.path()));
        for (from, processes, tensor) in
            [(&shared, processes / tensor, 1), (&whole, processes, tensor)]
        {
            let next = folder();
            let config = run_config(next.path());
            let step = "run/checkpoints/step-00000003";
            std::fs::create_dir_all(next.path().join(step)).unwrap();
            for file in std::fs::read_dir(from.path().join(step)).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), next.path().join(step).join(file.file_name())).unwrap();
            }
            for found in run(&config, processes, tensor) {
                assert_eq!(found[0].step, 4);
                let case = format!("{case}, then {tensor} of {processes}");
                assert_same(&case, &found, &expected[3..]);
            }
        }
    }
}

#[test]
fn a_run_that_goes_on_in_the_same_processes_has_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let straight = run(&run_config(folder.path()), 2, 2);
    let run_folder = folder.path().join("run");
    std::fs::remove_dir_all(run_folder.join("checkpoints/step-00000006")).unwrap();
    let again = run(&run_config(folder.path()), 2, 2);
    let losses = |reports: &[StepReport]| -> Vec<f64> { reports.iter().map(|r| r.loss).collect() };
    for (straight, again) in straight.iter().zip(&again) {
        assert_eq!(losses(again), losses(&straight[3..]));
    }
}

#[test]
fn what_processes_cannot_share_is_refused_by_name() {
    let refused = |processes: usize, change: &(dyn Fn(&mut TrainingConfig) + Sync)| {
        let folder = tempfile::tempdir().unwrap();
        // It writes the text, which no process may read meanwhile.
        let mut config = run_config(folder.path());
        config.train.tensor_parallel = 2;
        change(&mut config);
        let errors = together(processes, |place| {
            let config = config.clone();
            Trainer::open_with(config, place).map(|_| ()).unwrap_err()
        });
        assert!(errors.iter().all(|error| error.kind() == ErrorKind::InvalidArgument));
        errors[0].to_string()
    };
    let shape = |config: &mut TrainingConfig, heads, kv_heads, intermediate| {
        let (hidden, layers, latent) = (16 * heads, 1, None);
        let shape = ScratchSettings { hidden, layers, heads, kv_heads, intermediate, latent };
        (config.model.source, config.model.scratch) = (None, Some(shape));
        config.train.mode = TrainMode::Full;
    };
    for (processes, change, expected) in [
        (
            3,
            &(|_: &mut TrainingConfig| ()) as &(dyn Fn(&mut TrainingConfig) + Sync),
            "train.tensor_parallel: 2, expected a divisor of the number of processes, 3",
        ),
        (
            2,
            &|config: &mut TrainingConfig| shape(config, 3, 3, 32),
            "tensor_parallel: 2, expected a divisor of the 3 key/value heads",
        ),
        (
            2,
            &|config: &mut TrainingConfig| shape(config, 2, 2, 33),
            "tensor_parallel: 2, expected a divisor of the 33 columns inside the MLP",
        ),
        (
            2,
            &|config: &mut TrainingConfig| {
                shape(config, 2, 2, 32);
                let scratch = config.model.scratch.as_mut().unwrap();
                scratch.latent = Some(LatentSettings { rank: 8, rope_dim: 4 });
                config.memory.kind = MemoryKind::None;
                config.memory.window_tokens = 0;
            },
            "tensor_parallel: 2, expected 1 with latent attention",
        ),
        (
            2,
            &|config: &mut TrainingConfig| {
                shape(config, 2, 2, 32);
                config.memory.recalled_vector = true;
            },
            "tensor_parallel: 2, expected 1 with memory.recalled_vector",
        ),
        (
            2,
            &|config: &mut TrainingConfig| config.train.tensor_parallel = 0,
            "train.tensor_parallel: 0, expected above 0",
        ),
    ] {
        assert_eq!(refused(processes, change), expected);
    }
    let folder = tempfile::tempdir().unwrap();
    let mut config = run_config(folder.path());
    config.train.tensor_parallel = 2;
    let error = Trainer::open(config).unwrap_err().to_string();
    assert!(error.contains("expected a divisor of the number of processes, 1"), "{error}");
}

#[test]
fn processes_of_other_runs_do_not_share_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = run_config(folder.path());
    config.train.tensor_parallel = 2;
    let errors = together(2, |place| {
        let mut config = config.clone();
        config.optimizer.learning_rate += place.rank() as f64;
        Trainer::open_with(config, place).unwrap_err()
    });
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        assert!(error.to_string().contains("a setting of the run differs"), "{error}");
    }
}

#[test]
fn replicas_are_of_one_run_at_one_step_and_their_number_stays() {
    let folder = tempfile::tempdir().unwrap();
    let whole = run_config(folder.path());
    let mut config = whole.clone();
    config.train.batch = 2;
    let refused = |change: &(dyn Fn(&mut TrainingConfig) + Sync), named: &str| {
        let errors = together(2, |place| {
            let mut config = config.clone();
            if place.rank() == 1 {
                change(&mut config);
            }
            Trainer::open_with(config, place).unwrap_err()
        });
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
            assert!(error.to_string().contains(named), "{error}");
        }
    };
    let other = folder.path().join("other.txt");
    std::fs::write(&other, "another text altogether. ".repeat(40)).unwrap();
    refused(
        &|config: &mut TrainingConfig| config.data.train = vec![other.clone()],
        "the training text differs",
    );
    refused(
        &|config: &mut TrainingConfig| config.optimizer.learning_rate = 0.5,
        "a setting of the run differs",
    );
    run(&whole, 2, 1);
    // A folder that only one of them has.
    refused(
        &|config: &mut TrainingConfig| config.output = folder.path().join("elsewhere"),
        "the step that the run goes on from differs",
    );
    let error = Trainer::open(config.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    assert!(error.to_string().contains("number of replicas 2, expected 1"), "{error}");
    // One from before the number was written is taken as it is.
    let path = config.output.join("checkpoints/step-00000006/state.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut state: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(state.as_object_mut().unwrap().remove("replicas"), Some(serde_json::json!(2)));
    std::fs::write(&path, state.to_string()).unwrap();
    assert_eq!(Trainer::open(config).unwrap().steps_done(), 6);
}

#[test]
fn a_process_that_dies_ends_the_others_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let mut config = run_config(folder.path());
    (config.train.tensor_parallel, config.train.batch) = (2, 2);
    let errors: Vec<Option<Error>> = together(4, |place| {
        let dies = place.rank() == 3;
        let mut trainer = Trainer::open_with(config.clone(), place).unwrap();
        trainer.step().unwrap();
        // Dropped, its connections close, as those of a process that was killed do.
        if dies { None } else { Some(trainer.step().unwrap_err()) }
    });
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    let errors: Vec<Error> = errors.into_iter().flatten().collect();
    assert_eq!(errors.len(), 3);
    for error in errors {
        assert!(error.to_string().contains("collective: "), "{error}");
    }
}
