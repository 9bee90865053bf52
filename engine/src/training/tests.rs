//! Losses and gradients against PyTorch, finite differences and the engine's own forward pass.

use super::base::Base;
use super::config::*;
use super::corpus::{Corpus, Vocabulary};
use super::export;
use super::model::{Batch, Gradients, TrainModel, View};
use super::operations::{Reach, attend, sum_by_token};
use crate::attention::AttentionSeam;
use crate::cache::Cache;
use crate::models::config::DecoderConfig;
use crate::models::decoder::Decoder;
use crate::models::weights::Weights;
use crate::tokenizer::Tokenizer;
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

mod recall;
mod tensor_group;
mod vector;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name)
}

fn tensors(path: PathBuf) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// A CUDA device where the build and the machine have one.
fn card() -> Option<Device> {
    if !cfg!(feature = "cuda") {
        return None;
    }
    match Device::new_cuda_with_stream(0) {
        Ok(card) => Some(card),
        Err(error) => {
            println!("skipped: no CUDA device: {error}");
            None
        }
    }
}

/// A configuration that trains all of the folder `name`.
fn full(kind: MemoryKind) -> TrainingConfig {
    let mut config = TrainingConfig::default();
    config.train.mode = TrainMode::Full;
    config.memory.kind = kind;
    config
}

fn load(name: &str, config: &TrainingConfig, device: &Device) -> crate::Result<TrainModel> {
    let folder = golden(name);
    let decoder = match config.model.scratch.as_ref() {
        Some(shape) => scratch_decoder(shape, 64, 64),
        None => {
            let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
            DecoderConfig::from_json(&text)?
        }
    };
    TrainModel::load(decoder, Some(&Weights::open_folder(&folder)?), config, device, false)
}

fn scratch_decoder(shape: &ScratchSettings, vocab_size: usize, tokens: usize) -> DecoderConfig {
    let text = std::fs::read_to_string(golden("fastmka/config.json")).unwrap();
    DecoderConfig {
        vocab_size,
        hidden_size: shape.hidden,
        intermediate_size: shape.intermediate,
        num_layers: shape.layers,
        num_heads: shape.heads,
        num_kv_heads: shape.kv_heads,
        head_dim: shape.head_dim(),
        trained_tokens: tokens,
        tied_embeddings: true,
        sliding_window: vec![None; shape.layers],
        ..DecoderConfig::from_json(&text).unwrap()
    }
}

fn rows(ids: &Tensor) -> Batch {
    let ids = ids.to_vec2::<i64>().unwrap();
    let tokens = |range: std::ops::Range<usize>| {
        ids.iter().flat_map(|row| row[range.clone()].iter().map(|id| *id as u32)).collect()
    };
    let length = ids[0].len();
    Batch { inputs: tokens(0..length - 1), targets: tokens(1..length), sequences: ids.len() }
}

/// A batch of two sequences of `t` tokens below `vocab`.
fn batch(t: usize, vocab: u32) -> Batch {
    let tokens: Vec<u32> =
        (0..2 * t as u32 + 1).map(|i| (i * i * 31 + i * 7 + 3) % vocab).collect();
    Batch { inputs: tokens[..2 * t].to_vec(), targets: tokens[1..].to_vec(), sequences: 2 }
}

fn gradients(
    model: &TrainModel,
    batch: &Batch,
    teacher: Option<(&TrainModel, f64)>,
    recompute: bool,
) -> (f64, HashMap<String, Tensor>) {
    let mut gradients = Gradients::new(model.parameters.len());
    let tokens = batch.targets.len();
    let mut told = Vec::new();
    let mut finished = |_: &mut Gradients, whole: &[usize]| {
        told.extend(whole.to_vec());
        Ok(())
    };
    let loss =
        model.backward(batch, tokens, teacher, recompute, &mut gradients, &mut finished).unwrap();
    let named: HashMap<String, Tensor> = (0..model.parameters.len())
        .filter_map(|i| Some((model.parameters[i].name.clone(), gradients.get(i)?.clone())))
        .collect();
    // Each parameter with a gradient is handed out once.
    told.sort_unstable();
    told.dedup();
    assert_eq!(told.len(), named.len());
    (loss / tokens as f64, named)
}

fn norm(x: &Tensor) -> f64 {
    let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

#[test]
fn losses_and_gradients_of_every_parameter_equal_pytorch() {
    let window = |config: &mut TrainingConfig, tokens: (usize, usize)| {
        (config.memory.window_tokens, config.memory.sink_tokens) = tokens;
    };
    for (case, folder, kind) in [
        ("fastmka", "fastmka", MemoryKind::Fastmka),
        ("paper", "fastmka_paper", MemoryKind::Fastmka),
        ("mka", "fastmka", MemoryKind::Mka),
        ("window", "fastmka", MemoryKind::Fastmka),
        ("recall", "fastmka", MemoryKind::None),
        ("fastmka_recall", "fastmka", MemoryKind::Fastmka),
        ("mka_recall", "fastmka", MemoryKind::Mka),
        ("fastmka_vector", "fastmka", MemoryKind::Fastmka),
        ("mka_vector", "fastmka", MemoryKind::Mka),
        ("latent", "latent", MemoryKind::None),
    ] {
        let mut config = full(kind);
        config.memory.learn_rates = true;
        let mut path = golden("training").join(format!("{case}.safetensors"));
        match case {
            "paper" => {
                config.memory.rates = vec![0.9];
                config.memory.bias_correction = false;
            }
            "window" => window(&mut config, (10, 4)),
            "recall" | "fastmka_recall" | "mka_recall" => {
                window(&mut config, (128, 64));
                (config.memory.recall_tokens, config.memory.recall_first_layer) = (64, 1);
                if kind == MemoryKind::Mka {
                    config.memory.rates = vec![0.1, 0.3, 0.5];
                }
            }
            "fastmka_vector" | "mka_vector" => {
                window(&mut config, (128, 64));
                (config.memory.recalled_vector, config.memory.rates) = (true, vec![0.9, 0.99]);
            }
            "latent" => {
                path = golden("latent/golden.safetensors");
                config.model.scratch = Some(latent_shape());
            }
            _ => {}
        }
        let expected = tensors(path);
        let model = load(folder, &config, &Device::Cpu).unwrap();
        let teacher = (case == "window").then_some((&model, 0.6));
        let (loss, found) = gradients(&model, &rows(&expected["ids"]), teacher, false);
        let exact = f64::from(expected["loss"].to_vec1::<f32>().unwrap()[0]);
        assert!((loss - exact).abs() < 1e-4 * exact, "{case}: loss {loss}, expected {exact}");
        let names = expected.keys().filter_map(|name| name.strip_prefix("grad."));
        let mut worst = (0f64, "");
        let mut compared = 0;
        for name in names {
            let exact = &expected[&format!("grad.{name}")];
            let error = norm(&(&found[name] - exact).unwrap()) / norm(exact);
            assert!(error < 2e-3, "{case}: gradient of {name} off by {error}");
            worst = if error > worst.0 { (error, name) } else { worst };
            compared += 1;
        }
        assert_eq!(compared, model.parameters.len(), "{case}");
        let (error, name) = worst;
        let loss = (loss - exact).abs() / exact;
        println!("{case}: loss off by {loss:e}, gradients by at most {error:e} ({name})");
    }
}

#[test]
fn gradients_of_a_token_that_comes_often_are_summed_in_f32() {
    let ids: Vec<u32> = (0..1000).map(|i| if i % 10 == 0 { 3 } else { 1 }).collect();
    let ids = Tensor::from_vec(ids, 1000, &Device::Cpu).unwrap();
    let ones = Tensor::ones((1000, 2), DType::BF16, &Device::Cpu).unwrap();
    let sums = sum_by_token(&ids, &ones, 4).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(sums, [[0.0, 0.0], [900.0, 900.0], [0.0, 0.0], [100.0, 100.0]]);
}

/// Head_dim 64: the card's kernels have none of the golden files' 8.
#[test]
fn a_card_gives_the_losses_and_gradients_of_the_processor() {
    let Some(card) = card() else { return };
    let shape = |latent| ScratchSettings {
        hidden: if latent { 128 } else { 256 },
        layers: 2,
        heads: if latent { 2 } else { 4 },
        kv_heads: 2,
        intermediate: 96,
        latent: latent.then_some(LatentSettings { rank: 48, rope_dim: 32 }),
    };
    // Rates that are not learned take the kernels' fused pass.
    for (case, kind, window, latent) in [
        ("plain", MemoryKind::None, 0, false),
        ("fused", MemoryKind::Fastmka, 0, false),
        ("fused window", MemoryKind::Fastmka, 20, false),
        ("learned rates", MemoryKind::Fastmka, 20, false),
        ("mka", MemoryKind::Mka, 0, false),
        ("recall", MemoryKind::None, 20, false),
        ("fused recall", MemoryKind::Fastmka, 20, false),
        ("latent", MemoryKind::None, 0, true),
    ] {
        for (precision, bound) in [(Precision::F32, 1e-3), (Precision::Bf16, 0.1)] {
            let mut config = full(kind);
            config.seed = 5;
            config.memory.learn_rates = matches!(case, "learned rates" | "mka");
            config.memory.initial_gate = 0.6;
            (config.memory.window_tokens, config.memory.sink_tokens) = (window, 4);
            let recalls = case.ends_with("recall");
            if recalls {
                (config.memory.recall_tokens, config.memory.recall_first_layer) = (64, 1);
            }
            config.model.scratch = Some(shape(latent));
            let decoder = || scratch_decoder(&shape(latent), 64, 512);
            let host = TrainModel::load(decoder(), None, &config, &Device::Cpu, false).unwrap();
            config.precision = precision;
            let model = TrainModel::load(decoder(), None, &config, &card, false).unwrap();
            let batch = batch(if recalls { 201 } else { 75 }, 64);
            let (exact, expected) = gradients(&host, &batch, None, false);
            let (loss, found) = gradients(&model, &batch, None, true);
            assert!((loss - exact).abs() < bound * exact, "{case}: loss {loss}, expected {exact}");
            let largest = expected.values().map(norm).fold(0.0, f64::max);
            for (name, exact) in &expected {
                let gradient = found[name].to_device(&Device::Cpu).unwrap();
                let error = norm(&(&gradient - exact).unwrap());
                // A gradient that is nearly zero is compared with the largest.
                let allowed = bound * (norm(exact) + 0.01 * largest);
                assert!(error < allowed, "{case}, {precision:?}: {name} off by {error}");
            }
            if case == "fused" {
                config.memory.initial_gate = 0.0;
                let shut = TrainModel::load(decoder(), None, &config, &card, false).unwrap();
                let logits = |view| shut.logits(&batch, view).unwrap().to_vec2::<f32>().unwrap();
                assert!(logits(View::Trained) == logits(View::Dense), "{precision:?}: gate 0");
            }
        }
    }
}

/// The loss along each parameter's own gradient rises as the gradient says.
#[test]
fn gradients_of_every_parameter_equal_finite_differences() {
    let shape = |latent| ScratchSettings {
        hidden: 16,
        layers: 2,
        heads: 2,
        kv_heads: if latent { 2 } else { 1 },
        intermediate: 24,
        latent: latent.then_some(LatentSettings { rank: 6, rope_dim: 4 }),
    };
    for (case, kind, window, latent) in [
        ("plain", MemoryKind::None, 0, false),
        ("plain window", MemoryKind::None, 5, false),
        ("fastmka", MemoryKind::Fastmka, 0, false),
        ("window", MemoryKind::Fastmka, 5, false),
        ("mka", MemoryKind::Mka, 0, false),
        ("latent", MemoryKind::None, 0, true),
    ] {
        let mut config = full(kind);
        config.seed = 5;
        config.memory.learn_rates = true;
        config.memory.initial_gate = 0.6;
        (config.memory.window_tokens, config.memory.sink_tokens) = (window, 2);
        config.model.scratch = Some(shape(latent));
        let decoder = scratch_decoder(&shape(latent), 32, 64);
        let model = TrainModel::load(decoder, None, &config, &Device::Cpu, false).unwrap();
        move_from_the_start(&model);
        assert_finite_differences(case, &model, &batch(12, 32), 0.005);
    }
}

/// Adds noise to every parameter but the rates: gradients of a matrix above zeros vanish.
fn move_from_the_start(model: &TrainModel) {
    for (i, parameter) in model.parameters.iter().enumerate() {
        let size = parameter.master().elem_count();
        let noise: Vec<f32> =
            (0..size).map(|j| 0.3 * ((i * 131 + j * 17) as f32 * 0.7).sin()).collect();
        let noise = Tensor::from_vec(noise, parameter.master().shape(), &Device::Cpu).unwrap();
        if !parameter.name.starts_with("rates") {
            parameter.set(&(parameter.master() + noise).unwrap()).unwrap();
        }
    }
}

/// `step` is the distance between the points of a difference.
fn assert_finite_differences(case: &str, model: &TrainModel, batch: &Batch, step: f64) {
    let loss = || {
        let losses = model.losses(batch, View::Trained).unwrap();
        losses.iter().map(|x| f64::from(*x)).sum::<f64>() / losses.len() as f64
    };
    let (direct, found) = gradients(model, batch, None, false);
    assert!((direct - loss()).abs() < 1e-5, "{case}");
    let mut worst = 0f64;
    for parameter in &model.parameters {
        let gradient = &found[&parameter.name];
        let length = norm(gradient);
        let start = parameter.master().copy().unwrap();
        let at = |way: f64| {
            parameter.set(&(&start + (gradient * (way / length)).unwrap()).unwrap()).unwrap();
            loss()
        };
        // Richardson's extrapolation of the central difference.
        let rise = |step: f64| at(step) - at(-step);
        let slope = (8.0 * rise(step) - rise(2.0 * step)) / (12.0 * step);
        parameter.set(&start).unwrap();
        let error = (slope - length).abs();
        let name = &parameter.name;
        worst = worst.max(error / (0.02 * length + 2e-4));
        assert!(
            error < 0.02 * length + 2e-4,
            "{case}: {name} rises by {slope}, its gradient says {length}"
        );
    }
    println!("{case}: errors of at most {worst:.3} of what is allowed");
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    let mut config = full(MemoryKind::Fastmka);
    config.memory.window_tokens = 16;
    let model = load("fastmka", &config, &Device::Cpu).unwrap();
    let batch = batch(40, 128);
    let (loss, kept) = gradients(&model, &batch, None, false);
    let (again, recomputed) = gradients(&model, &batch, None, true);
    assert_eq!(loss, again);
    for (name, gradient) in &kept {
        let bits = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(gradient), bits(&recomputed[name]), "{name}");
    }
}

/// Every family: as `transformers` without memory, and the same bits with a memory whose gates are shut.
#[test]
fn a_patched_model_of_every_family_starts_as_the_pretrained_one() {
    for name in ["llama3", "llama_yarn", "llama_linear", "mistral", "qwen2", "qwen3", "smollm2"] {
        for kind in [MemoryKind::Fastmka, MemoryKind::Mka] {
            let mut config = full(kind);
            config.train.mode = TrainMode::Lora;
            let model = load(name, &config, &Device::Cpu).unwrap();
            let golden = tensors(golden(name).join("golden.safetensors"));
            let ids: Vec<u32> =
                golden["ids"].to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect();
            let batch = Batch { targets: ids.clone(), inputs: ids, sequences: 1 };
            let logits = |view| model.logits(&batch, view).unwrap().to_vec2::<f32>().unwrap();
            let patched = logits(View::Trained);
            assert_eq!(patched, logits(View::Dense), "{name}");
            let expected = golden["logits"].to_vec2::<f32>().unwrap();
            let worst = patched.iter().flatten().zip(expected.iter().flatten());
            let worst = worst.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-4, "{name}: off by {worst}");
        }
    }
}

/// What is written after training is what the engine runs: memory, merged adapters, learned rates.
#[test]
fn an_exported_model_is_the_trained_one_in_the_engine() {
    for (name, rank) in [("fastmka", 0), ("qwen2", 3), ("qwen3", 5)] {
        let mut config = full(MemoryKind::Fastmka);
        config.train.mode = TrainMode::Lora;
        config.lora.targets = LORA_TARGETS.map(str::to_owned).to_vec();
        // As large as what trains: a product that dwarfs the weights would only test f32.
        (config.lora.rank, config.lora.alpha) = (2, 2.0);
        config.memory.router_rank = rank;
        config.memory.learn_rates = true;
        let base = Base::folder(&golden(name), Some(Vocabulary::Bytes)).unwrap();
        let model = load(name, &config, &Device::Cpu).unwrap();
        for (i, parameter) in model.parameters.iter().enumerate() {
            let shift = 0.05 * ((i * 7 + 1) as f64).sin();
            parameter.set(&(parameter.master() + shift).unwrap()).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        export::write(&base, &model, &config, folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
        let decoder = Decoder::load(
            DecoderConfig::from_json(&text).unwrap(),
            &Weights::open_folder(folder.path()).unwrap(),
            &Device::Cpu,
        )
        .unwrap();
        let ids: Vec<u32> = (0..50u32).map(|i| (i * i * 13 + 5) % 128).collect();
        let mut cache = Cache::new(decoder.cache_shape(128, 64), &Device::Cpu).unwrap();
        let mut seam = AttentionSeam::open(decoder.seam_config(), &mut cache, ids.len()).unwrap();
        let hidden = decoder.forward(&ids, &mut seam).unwrap();
        let engine = decoder.logits(&hidden).unwrap().to_vec2::<f32>().unwrap();
        let batch = Batch { targets: ids.clone(), inputs: ids, sequences: 1 };
        let trained = model.logits(&batch, View::Trained).unwrap().to_vec2::<f32>().unwrap();
        let largest = trained.iter().flatten().map(|x| x.abs()).fold(0.0, f32::max);
        let worst = engine.iter().flatten().zip(trained.iter().flatten());
        let worst = worst.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-4 * largest.max(1.0), "{name}: off by {worst} of {largest}");
    }
}

#[test]
fn a_model_from_a_gguf_file_is_written_with_every_end_token_that_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut bytes = std::fs::read(golden("gguf/model.gguf")).unwrap();
    // Keys of one length: what begins a document in the file ends a turn in its copy.
    let (from, to) = (b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eot_token_id");
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    std::fs::write(&path, bytes).unwrap();
    let written = |path: &Path| {
        let mut config = full(MemoryKind::None);
        config.model.source = Some(path.display().to_string());
        config.data.sequence_tokens = 16;
        let text = Base::open(&config).unwrap().config_json(&config, &[]).unwrap();
        DecoderConfig::from_json(&text).unwrap().eos_token_ids
    };
    let (_, gguf) = Weights::open_gguf(&path).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let special = tokenizer.special_ids();
    // The file names one of them, its vocabulary has both.
    let both = [special.eos.unwrap(), tokenizer.id("<|endoftext|>").unwrap()];
    assert_eq!(both, [special.eos.unwrap(), special.eot.unwrap()]);
    assert_eq!(written(&path), both);
    assert_eq!(written(&golden("gguf/model.gguf")), both);
}

/// Whatever the kind, a stream that is read at once, in chunks or token by token is the same.
#[test]
fn prefill_chunks_and_decoding_agree_for_every_kind() {
    for (case, folder, kind) in [
        ("plain", "mistral", MemoryKind::None),
        ("fastmka", "fastmka", MemoryKind::Fastmka),
        ("mka", "fastmka", MemoryKind::Mka),
        ("latent", "latent", MemoryKind::None),
    ] {
        let mut config = full(kind);
        if case == "latent" {
            config.model.scratch = Some(latent_shape());
        }
        let model = load(folder, &config, &Device::Cpu).unwrap();
        let ids: Vec<u32> = (0..45u32).map(|i| (i * i * 13 + 5) % 64).collect();
        let batch = Batch { targets: ids.clone(), inputs: ids.clone(), sequences: 1 };
        let whole = model.logits(&batch, View::Trained).unwrap().to_vec2::<f32>().unwrap();
        let largest = whole.iter().flatten().map(|x| x.abs()).fold(1.0, f32::max);
        for cut in [45, 17, 1] {
            let mut stream = super::decode::Stream::new(&model, 45).unwrap();
            let parts = ids
                .chunks(cut)
                .flat_map(|part| stream.run(part).unwrap().to_vec2::<f32>().unwrap());
            let worst = parts.flatten().zip(whole.iter().flatten().copied());
            let worst = worst.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-5 * largest, "{case} in parts of {cut}: off by {worst}");
        }
    }
}

fn latent_shape() -> ScratchSettings {
    ScratchSettings {
        hidden: 32,
        layers: 1,
        heads: 2,
        kv_heads: 2,
        intermediate: 24,
        latent: Some(LatentSettings { rank: 12, rope_dim: 8 }),
    }
}

#[test]
fn attention_over_window_and_sinks_is_one_softmax() {
    let (b, t, h, d) = (2, 23, 2, 4);
    let values = |seed: usize| {
        let values = (0..b * t * h * d).map(|i| ((i * 37 + seed) as f32 * 0.61).sin());
        Tensor::from_vec(values.collect::<Vec<_>>(), (b, t, h, d), &Device::Cpu).unwrap()
    };
    let (q, k, v) = (values(1), values(2), values(3));
    for (window, sinks) in [(5, 3), (1, 1), (7, 7), (20, 4), (22, 9), (23, 4), (40, 4), (6, 0)] {
        let out = attend(&q, &k, &v, &Reach::WindowAndSinks { window, sinks }).unwrap();
        let floats = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (q, k, v, out) = (floats(&q), floats(&k), floats(&v), floats(&out));
        let at = |row: usize, i: usize, head: usize| ((row * t + i) * h + head) * d;
        for (row, head, i) in
            (0..b).flat_map(|row| (0..h).flat_map(move |head| (0..t).map(move |i| (row, head, i))))
        {
            let seen: Vec<usize> = (0..=i).filter(|j| i - j < window || *j < sinks).collect();
            let dot = |j: &usize| -> f64 {
                let (a, b) = (at(row, i, head), at(row, *j, head));
                (0..d).map(|x| f64::from(q[a + x]) * f64::from(k[b + x])).sum::<f64>() / 2.0
            };
            let weights: Vec<f64> = seen.iter().map(|j| dot(j).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for x in 0..d {
                let exact: f64 = seen
                    .iter()
                    .zip(&weights)
                    .map(|(j, weight)| weight / sum * f64::from(v[at(row, *j, head) + x]))
                    .sum();
                let found = f64::from(out[at(row, i, head) + x]);
                assert!((found - exact).abs() < 1e-5, "window {window}, sinks {sinks}, row {i}");
            }
        }
    }
}

#[test]
fn an_epoch_holds_every_sequence_once_and_follows_from_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    std::fs::write(&path, "the end is near. ".repeat(20)).unwrap();
    let corpus = |tokens| {
        Corpus::read("data.train", std::slice::from_ref(&path), &Vocabulary::Bytes, tokens)
    };
    let ten = corpus(10).unwrap();
    assert_eq!(ten.len(), 34);
    let epoch = |epoch: u64, seed| -> Vec<usize> {
        (epoch * 34..(epoch + 1) * 34).map(|number| ten.shuffled(number, seed)).collect()
    };
    let mut sorted = epoch(3, 1);
    assert_ne!(sorted, epoch(3, 2));
    assert_ne!(sorted, epoch(4, 1));
    assert_eq!(sorted, epoch(3, 1));
    sorted.sort_unstable();
    assert_eq!(sorted, (0..34).collect::<Vec<_>>());
    let (inputs, targets) = ten.sequence(33);
    assert_eq!(inputs[1..], targets[..9]);
    // The last target is the end of the document.
    assert_eq!(targets[9], 256);
    let error = corpus(341).err().unwrap();
    assert!(error.to_string().contains("341 tokens"), "{error}");
}

#[test]
fn a_tensor_that_the_decoder_does_not_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama3").join(file), folder.path().join(file)).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let mut weights = tensors(path.clone());
    let extra = "model.layers.0.self_attn.extra_proj.weight";
    weights.insert(extra.into(), weights["model.norm.weight"].clone());
    candle_core::safetensors::save(&weights, &path).unwrap();
    let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let decoder = DecoderConfig::from_json(&text).unwrap();
    let weights = Weights::open_folder(folder.path()).unwrap();
    let config = full(MemoryKind::Fastmka);
    let error =
        TrainModel::load(decoder, Some(&weights), &config, &Device::Cpu, false).err().unwrap();
    assert!(error.to_string().contains(extra), "{error}");
}
