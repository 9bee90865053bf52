//! The recalled memory vector by its definition, at the start of training, and against finite differences.

use super::*;
use crate::training::vector::{CHUNK, recalled};

fn values(shape: (usize, usize), seed: usize) -> Tensor {
    let values = (0..shape.0 * shape.1).map(|i| ((i * 37 + seed * 11) as f32 * 0.61).sin());
    Tensor::from_vec(values.collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
}

#[test]
fn a_query_recalls_the_weighted_mean_of_the_chunks_behind_its_window() {
    let (b, t, h, g, d, window) = (2, 230, 4, 2, 6, 17);
    let (q, kv) = (values((b * t, h * d), 1), values((b * t, 2 * g * d), 2));
    let found = recalled(&q, &kv, b, window, d).unwrap();
    assert_eq!(found.dims(), [b * t, 1, 2 * g * d]);
    let found = found.squeeze(1).unwrap().to_vec2::<f32>().unwrap();
    let rows = |x: &Tensor| -> Vec<Vec<f64>> {
        let rows = x.to_vec2::<f32>().unwrap().into_iter();
        rows.map(|row| row.into_iter().map(f64::from).collect()).collect()
    };
    let (q, kv) = (rows(&q), rows(&kv));
    for (row, i) in (0..b).flat_map(|row| (0..t).map(move |i| (row, i))) {
        let older = (i + 1).saturating_sub(window) / CHUNK;
        let mean = |chunk: usize, x: usize| {
            let tokens = chunk * CHUNK..(chunk + 1) * CHUNK;
            tokens.map(|j| kv[row * t + j][x]).sum::<f64>() / CHUNK as f64
        };
        let score = |chunk: usize| -> f64 {
            let head = |head: usize| -> f64 {
                let own = |x: usize| q[row * t + i][head * d + x] * mean(chunk, head / 2 * d + x);
                (0..d).map(own).sum::<f64>() / (d as f64).sqrt()
            };
            (0..h).map(head).sum::<f64>() / h as f64
        };
        let weights: Vec<f64> = (0..older).map(|chunk| score(chunk).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for x in 0..2 * g * d {
            let exact = match older {
                0 => kv[row * t + i][x],
                _ => (0..older).map(|chunk| weights[chunk] / sum * mean(chunk, x)).sum(),
            };
            let error = (f64::from(found[row * t + i][x]) - exact).abs();
            assert!(error < 1e-5, "sequence {row}, token {i}: off by {error}");
        }
    }
}

fn recalling(kind: MemoryKind, window: usize) -> TrainingConfig {
    let mut config = full(kind);
    config.seed = 5;
    (config.memory.recalled_vector, config.memory.window_tokens) = (true, window);
    config.memory.sink_tokens = 2;
    config
}

#[test]
fn a_model_with_a_recalled_vector_starts_as_the_pretrained_one() {
    for (name, kind) in [
        ("llama3", MemoryKind::Fastmka),
        ("qwen2", MemoryKind::Fastmka),
        ("qwen3", MemoryKind::Mka),
    ] {
        let mut config = recalling(kind, 20);
        config.train.mode = TrainMode::Lora;
        let model = load(name, &config, &Device::Cpu).unwrap();
        let batch = batch(200, 128);
        let logits = |view| model.logits(&batch, view).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(logits(View::Trained), logits(View::Windowed), "{name}");
        // What is behind the window counts once the gate is open.
        config.memory.initial_gate = 0.5;
        let open = load(name, &config, &Device::Cpu).unwrap();
        config.memory.recalled_vector = false;
        let without = load(name, &config, &Device::Cpu).unwrap();
        let logits = |model: &TrainModel| model.logits(&batch, View::Trained).unwrap();
        let (open, without) = (logits(&open), logits(&without));
        assert!(norm(&(open - without).unwrap()) > 1e-2, "{name}");
    }
}

#[test]
fn gradients_of_a_model_with_a_recalled_vector_equal_finite_differences() {
    for kind in [MemoryKind::Fastmka, MemoryKind::Mka] {
        let mut config = recalling(kind, 5);
        config.memory.learn_rates = true;
        config.memory.initial_gate = 0.6;
        let shape = ScratchSettings {
            hidden: 16,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            intermediate: 24,
            latent: None,
        };
        config.model.scratch = Some(shape.clone());
        let decoder = scratch_decoder(&shape, 32, 512);
        let model = TrainModel::load(decoder, None, &config, &Device::Cpu, false).unwrap();
        move_from_the_start(&model);
        assert_finite_differences(&format!("{kind:?}"), &model, &batch(150, 32), 0.0015);
        // A stream keeps no chunks to recall from.
        let mut stream = crate::training::decode::Stream::new(&model, 8).unwrap();
        let error = stream.run(&[1, 2, 3]).unwrap_err();
        assert!(error.to_string().contains("memory.recalled_vector"), "{error}");
    }
}
