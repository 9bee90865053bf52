//! Layers that rotate by frequencies of their own: each attends, recalls and is restored by these and no others.

use super::*;
use crate::models::frequencies::{Frequencies, LayerFrequencies, RopeScaling};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Passes of a stream: prompts whose runs recall apart and together, and decoded tokens.
const BLOCKS: &[usize] = &[100, 37, 1, 1, 1, 150, 64, 1, 1, 90, 1, 1, 1, 1, 130, 1, 1];

/// Has each of the two layers rotate (0 in `of_layer`) or not (1).
fn rotate_by(decoder: &mut Decoder, of_layer: [usize; 2]) {
    let d = decoder.config.head_dim;
    let rotated = Frequencies::new(1e4, d, &RopeScaling::None);
    let still = Frequencies { inv_freq: vec![0.0; d / 2], scale: 1.0 };
    decoder.frequencies = LayerFrequencies::new(vec![rotated, still], of_layer.to_vec());
}

/// What each layer makes of one stream of queries, keys and values, the same for every layer.
fn attended(decoder: &Decoder, cache: &mut Cache) -> Vec<Vec<f32>> {
    let c = &decoder.config;
    let mut by_layer = vec![Vec::new(); c.num_layers];
    for block in BLOCKS {
        let config = decoder.seam_config().over(cache);
        let position = cache.position();
        let count = config.block_limit(position, *block);
        if let Some(pages) = cache.pages_mut() {
            pages.note_tokens(position, &vec![7; count]);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(position);
        let mut of_heads = |heads: usize| {
            let len = count * heads * c.head_dim;
            let numbers: Vec<f32> = (0..len).map(|_| rng.random_range(-2f32..2.0)).collect();
            Tensor::from_vec(numbers, (count, heads, c.head_dim), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (of_heads(c.num_heads), of_heads(c.num_kv_heads), of_heads(c.num_kv_heads));
        let mut seam = AttentionSeam::open(config, cache, count).unwrap();
        for (layer, own) in by_layer.iter_mut().enumerate() {
            let out = seam.attend(layer, None, &q, &k, &v).unwrap();
            own.extend(out.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        seam.finish();
    }
    by_layer
}

#[test]
fn each_layer_attends_as_in_a_model_whose_layers_all_have_its_frequencies() {
    let mut decoder = load("llama3");
    decoder.config.trained_tokens = 1 << 12;
    for rule in [PageRule::Mka, PageRule::InfLlm, PageRule::Quest, PageRule::TokenSelect] {
        for (is_mirrored, compact) in [(false, false), (false, true), (true, false), (true, true)] {
            let case = format!("{rule:?}, mirrored: {is_mirrored}, compact: {compact}");
            // What a device chooses is not estimated, nor what other rules leave out.
            let estimate = rule == PageRule::Mka && !is_mirrored;
            let reuse_steps = Some(2);
            let config =
                PageConfig { rule, tokens: 128, reuse_steps, compact, estimate, ..config() };
            let [own, rotated, still] = [[0, 1], [0, 0], [1, 1]].map(|of_layer| {
                rotate_by(&mut decoder, of_layer);
                let mut cache = cache(&decoder, 64, Some(config.clone()));
                if is_mirrored {
                    cache.pages_mut().unwrap().mirror_on_device();
                }
                let attended = attended(&decoder, &mut cache);
                assert_eq!(cache.pages().unwrap().mirror.is_some(), is_mirrored, "{case}");
                attended
            });
            // Bit for bit: no layer knows of another.
            assert!(own[0] == rotated[0], "{case}: the layer that rotates");
            assert!(own[1] == still[1], "{case}: the layer that does not");
            let alike = rotated.iter().zip(&still).any(|(rotated, still)| rotated == still);
            assert!(!alike, "{case}: rotation changes nothing");
        }
    }
}

#[test]
fn layers_of_different_frequencies_recall_exactly_with_room_for_every_token() {
    let mut decoder = load("llama3");
    let trained = decoder.config.trained_tokens;
    let tokens = tokens(trained as u32 - 3);
    let dense =
        |decoder: &Decoder| run(decoder, &mut cache(decoder, trained, None), &tokens, &[512]);
    let uniform = [[0, 0], [1, 1]].map(|of_layer| {
        rotate_by(&mut decoder, of_layer);
        dense(&decoder)
    });
    for of_layer in [[0, 1], [1, 0]] {
        rotate_by(&mut decoder, of_layer);
        let expected = dense(&decoder);
        for other in &uniform {
            assert!(difference(&expected, other) > 1e-3, "{of_layer:?}: as if layers were alike");
        }
        let windowed = run(&decoder, &mut cache(&decoder, 64, None), &tokens, &[512]);
        assert!(difference(&expected, &windowed) > 1e-3, "{of_layer:?}: the window is enough");
        for blocks in CUTS {
            let mut recalling = cache(&decoder, 64, Some(config()));
            let off = difference(&expected, &run(&decoder, &mut recalling, &tokens, blocks));
            assert!(off <= 1e-4, "{of_layer:?} in blocks of {blocks:?}: off by {off}");
        }
    }
}

#[test]
fn a_restored_stream_goes_on_by_the_frequencies_of_each_layer() {
    let mut decoder = load("llama3");
    for of_layer in [[0, 1], [1, 0]] {
        rotate_by(&mut decoder, of_layer);
        let config = PageConfig { tokens: 64, ..config() };
        let elsewhere = Arc::new(Elsewhere::default());
        let mut straight = cache(&decoder, 64, Some(config.clone()));
        run(&decoder, &mut straight, &tokens(630), &[64]);
        commit(&mut straight, &elsewhere);
        let mut restored = reopened(&decoder, &straight, &config, &elsewhere);
        let asked = tokens(90);
        let went_on = run(&decoder, &mut straight, &asked, &[50, 1]);
        assert_eq!(run(&decoder, &mut restored, &asked, &[50, 1]), went_on, "{of_layer:?}");
    }
}
