//! The decoder against golden logits of `transformers`, and against itself over windows, chunks and restarts.

use super::config::DecoderConfig;
use super::decoder::Decoder;
use super::frequencies::RopeScaling;
use super::weights::Weights;
use crate::attention::AttentionSeam;
use crate::cache::Cache;
use crate::error::ErrorKind;
use crate::gguf::writer::Writer;
use crate::gguf::{Gguf, Value};
use crate::parallel::{TcpCollective, TensorGroup};
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

mod families;

/// Folders of tests/data/golden with a HuggingFace model in them.
const FOLDERS: &[&str] = &[
    "llama3",
    "llama_yarn",
    "llama_linear",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm2",
    "smollm2_sharded",
    "smollm2_bf16",
    "fastmka",
    "fastmka_paper",
    "phi3",
    "phi3_plain",
    "granite",
    "smollm3",
    "gemma3",
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name)
}

fn load_folder(folder: &Path) -> crate::Result<Decoder> {
    load_folder_on(folder, &Device::Cpu)
}

fn load_folder_on(folder: &Path, device: &Device) -> crate::Result<Decoder> {
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    Decoder::load(DecoderConfig::from_json(&text)?, &Weights::open_folder(folder)?, device)
}

/// The processor, and a CUDA device where the build and the machine have one.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        match Device::new_cuda_with_stream(0) {
            Ok(gpu) => devices.push(gpu),
            Err(error) => println!("on the processor alone: no CUDA device: {error}"),
        }
    }
    devices
}

/// What each of `processes` threads that share a model gets from its part: `load` gives it, a cache of its own begins anew.
fn shared(
    processes: usize,
    load: impl Fn(&TensorGroup) -> crate::Result<Decoder> + Sync,
    tokens: &[u32],
    blocks: &[usize],
) -> Vec<crate::Result<Vec<Vec<f32>>>> {
    let places = TcpCollective::of_threads(processes).unwrap();
    std::thread::scope(|scope| {
        let load = &load;
        let run = move |place| {
            let decoder = load(&TensorGroup::new(Box::new(place))?)?;
            let mut cache = Cache::new(decoder.cache_shape(128, 512), decoder.device()).unwrap();
            Ok(run(&decoder, &mut cache, tokens, blocks))
        };
        let threads: Vec<_> =
            places.into_iter().map(|place| scope.spawn(move || run(place))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn load(name: &str) -> Decoder {
    load_folder(&golden(name)).unwrap()
}

fn load_gguf(path: &Path) -> crate::Result<Decoder> {
    load_gguf_part(path, &TensorGroup::alone())
}

fn load_gguf_part(path: &Path, group: &TensorGroup) -> crate::Result<Decoder> {
    let (weights, gguf) = Weights::open_gguf(path)?;
    Decoder::load_part(DecoderConfig::from_gguf(&gguf)?, &weights, &Device::Cpu, group)
}

fn tensors(path: PathBuf) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    tensor.to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect()
}

/// Logits of every token, run in blocks of `blocks` in turn.
fn run(decoder: &Decoder, cache: &mut Cache, tokens: &[u32], blocks: &[usize]) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    let mut rest = tokens;
    for block in blocks.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let config = decoder.seam_config();
        let count = config.block_limit(cache.position(), *block).min(rest.len());
        let (now, after) = rest.split_at(count);
        let mut seam = AttentionSeam::open(config, cache, count).unwrap();
        let hidden = decoder.forward(now, &mut seam).unwrap();
        seam.finish();
        logits.extend(decoder.logits(&hidden).unwrap().to_vec2::<f32>().unwrap());
        rest = after;
    }
    logits
}

fn max_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().flatten().zip(b.iter().flatten()).map(|(x, y)| (x - y).abs());
    differences.fold(0.0, f32::max)
}

fn expected(golden: &HashMap<String, Tensor>) -> Vec<Vec<f32>> {
    golden["logits"].to_vec2::<f32>().unwrap()
}

#[test]
fn logits_equal_transformers_on_every_family_however_the_prompt_is_cut() {
    for (name, device) in
        FOLDERS.iter().flat_map(|name| devices().into_iter().map(move |d| (name, d)))
    {
        let decoder = load_folder_on(&golden(name), &device).unwrap();
        let golden = tensors(golden(name).join("golden.safetensors"));
        let tokens = ids(&golden["ids"]);
        for blocks in [&[512][..], &[1][..], &[7, 1, 30]] {
            let mut cache = Cache::new(decoder.cache_shape(128, 512), &device).unwrap();
            let logits = run(&decoder, &mut cache, &tokens, blocks);
            let difference = max_difference(&logits, &expected(&golden));
            let case = format!("{name} on {device:?} in blocks of {blocks:?}");
            assert!(difference <= 1e-4, "{case}: off by {difference}");
        }
    }
}

#[test]
fn processes_that_share_a_model_have_the_logits_of_transformers_on_every_family() {
    for (name, device) in
        FOLDERS.iter().flat_map(|name| devices().into_iter().map(move |d| (name, d)))
    {
        let folder = golden(name);
        let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let config = DecoderConfig::from_json(&text).unwrap();
        let processes = if config.num_kv_heads == 1 { 1 } else { 2 };
        let golden = tensors(folder.join("golden.safetensors"));
        let tokens = ids(&golden["ids"]);
        let load = |group: &TensorGroup| {
            let weights = Weights::open_folder(&folder)?;
            let decoder = Decoder::load_part(config.clone(), &weights, &device, group)?;
            assert_eq!(decoder.config.num_kv_heads * processes, config.num_kv_heads);
            Ok(decoder)
        };
        let results: Vec<_> =
            shared(processes, load, &tokens, &[9, 1, 40]).into_iter().map(Result::unwrap).collect();
        let difference = max_difference(&results[0], &expected(&golden));
        assert!(difference <= 1e-4, "{name} on {device:?}: off by {difference}");
        assert!(results.iter().all(|other| *other == results[0]), "{name} on {device:?}");
    }
}

#[test]
fn packed_weights_are_shared_too_and_what_cannot_be_is_refused() {
    let load = |group: &TensorGroup| load_gguf_part(&golden("gguf/model.gguf"), group);
    let tokens: Vec<u32> = (0..150).map(|i| i * 7 % 200).collect();
    // Blocks long enough that inputs are not rounded to 8 bits, which no two ways of adding up would round alike.
    let whole = shared(1, load, &tokens, &[50]).pop().unwrap().unwrap();
    for result in shared(2, load, &tokens, &[50]) {
        let difference = max_difference(&result.unwrap(), &whole);
        assert!(difference <= 1e-4, "off by {difference}");
    }
    for refused in shared(4, load, &tokens, &[50]) {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let text = error.to_string();
        assert!(text.contains("4, expected a divisor of the 2 key/value heads"), "{text}");
    }
    // Processes that would share two models are told so.
    let other = |group: &TensorGroup| match group.index() {
        0 => load(group),
        _ => {
            let (weights, gguf) = Weights::open_gguf(&golden("gguf/model.gguf"))?;
            let mut config = DecoderConfig::from_gguf(&gguf)?;
            config.rms_norm_eps *= 2.0;
            Decoder::load_part(config, &weights, &Device::Cpu, group)
        }
    };
    for refused in shared(2, other, &tokens, &[50]) {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Incompatible);
    }
}

#[test]
fn greedy_continuation_equals_transformers() {
    for name in FOLDERS.iter().filter(|name| !name.starts_with("fastmka")) {
        let decoder = load(name);
        let golden = tensors(golden(name).join("golden.safetensors"));
        let mut cache = Cache::new(decoder.cache_shape(128, 512), &Device::Cpu).unwrap();
        let mut logits = run(&decoder, &mut cache, &ids(&golden["ids"]), &[512]);
        let mut generated = Vec::new();
        for _ in 0..16 {
            let last = logits.last().unwrap();
            let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
            generated.push(best as u32);
            logits = run(&decoder, &mut cache, &[best as u32], &[1]);
        }
        assert_eq!(generated, ids(&golden["greedy"]), "{name}");
    }
}

#[test]
fn gguf_with_interleaved_heads_equals_transformers() {
    let decoder = load_gguf(&golden("gguf/model.gguf")).unwrap();
    let golden = tensors(golden("gguf/golden.safetensors"));
    let mut cache = Cache::new(decoder.cache_shape(128, 512), &Device::Cpu).unwrap();
    let logits = run(&decoder, &mut cache, &ids(&golden["ids"]), &[512]);
    let difference = max_difference(&logits, &expected(&golden));
    assert!(difference <= 2e-4, "off by {difference}");
    // Token by token the activations are rounded to eight bits, as ggml does: each of the 15 products in a row adds
    // an error of about 1/256, so that the logits are within a few per cent.
    let mut cache = Cache::new(decoder.cache_shape(128, 512), &Device::Cpu).unwrap();
    let logits = run(&decoder, &mut cache, &ids(&golden["ids"]), &[1]);
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let exact = expected(&golden);
    let pairs = logits.iter().flatten().zip(exact.iter().flatten());
    let relative =
        norm(&mut pairs.map(|(x, y)| x - y)) / norm(&mut exact.iter().flatten().copied());
    assert!(relative <= 0.06, "off by {relative} of the norm");
}

/// Trap of other loaders: `rope_parameters` not read, theta 10,000 taken in silence.
#[test]
fn both_forms_of_rope_settings_give_the_same_model() {
    let text = std::fs::read_to_string(golden("smollm2/config.json")).unwrap();
    let old = DecoderConfig::from_json(&text).unwrap();
    assert_eq!(old.rope_theta, 100_000.0);
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let object = json.as_object_mut().unwrap();
    let theta = object.remove("rope_theta").unwrap();
    let parameters = serde_json::json!({"rope_theta": theta, "rope_type": "default"});
    object.insert("rope_parameters".into(), parameters);
    assert_eq!(DecoderConfig::from_json(&json.to_string()).unwrap(), old);
    // transformers 5 writes null where a window is off.
    json["sliding_window"] = serde_json::Value::Null;
    assert_eq!(DecoderConfig::from_json(&json.to_string()).unwrap(), old);
}

#[test]
fn settings_that_are_not_understood_are_errors_that_name_them() {
    let text = std::fs::read_to_string(golden("llama3/config.json")).unwrap();
    let base: serde_json::Value = serde_json::from_str(&text).unwrap();
    let cases = [
        ("model_type", serde_json::json!("gpt2"), "gpt2"),
        ("hidden_act", serde_json::json!("gelu"), "gelu"),
        ("hidden_size", serde_json::json!("x"), "hidden_size"),
        ("hidden_size", serde_json::json!(null), "hidden_size"),
        ("num_attention_heads", serde_json::json!(0), "num_attention_heads"),
        ("num_hidden_layers", serde_json::json!(u32::MAX), "at most 4096 layers"),
        ("num_key_value_heads", serde_json::json!(3), "num_key_value_heads"),
        ("head_dim", serde_json::json!(7), "head_dim"),
        ("rope_scaling", serde_json::json!({"rope_type": "longrope"}), "longrope"),
        ("rope_scaling", serde_json::json!({"type": "dynamic", "factor": 2.0}), "dynamic"),
        ("rope_scaling", serde_json::json!({"type": "linear"}), "factor"),
        ("rope_scaling", serde_json::json!([1]), "object"),
        ("mka", serde_json::json!({"version": 2}), "version"),
        ("mka", serde_json::json!({"version": 1, "rates": [1.5]}), "rates"),
        ("mka", serde_json::json!({"version": 1, "kind": "mka"}), "kind"),
        ("mka", serde_json::json!({"version": 1, "recalled_vector": true}), "recalled_vector"),
    ];
    for (key, value, named) in cases {
        let mut json = base.clone();
        json[key] = value.clone();
        let error = DecoderConfig::from_json(&json.to_string()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model, "{key} {value}");
        assert!(error.to_string().contains(named), "{key} {value}: {error}");
    }
    assert!(DecoderConfig::from_json("{").is_err());
}

/// The metadata of a small model of the architecture llama, as a GGUF file.
fn gguf_metadata() -> Writer {
    let number = Value::U32;
    Writer::default()
        .set("general.architecture", Value::Str("llama".into()))
        .set("llama.embedding_length", number(8))
        .set("llama.block_count", number(2))
        .set("llama.attention.head_count", number(2))
        .set("llama.feed_forward_length", number(16))
        .set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .set("llama.context_length", number(64))
        .tensor("token_embd.weight", &[8, 4], 0, &[0; 8 * 4 * 4])
}

fn gguf_config(writer: &Writer) -> crate::Result<DecoderConfig> {
    let gguf = Gguf::parse(&writer.bytes(), Path::new("test.gguf")).unwrap();
    DecoderConfig::from_gguf(&gguf)
}

#[test]
fn a_gguf_file_of_more_layers_than_any_model_has_is_refused() {
    assert_eq!(gguf_config(&gguf_metadata()).unwrap().num_layers, 2);
    for layers in [4097, u32::MAX] {
        let mut writer = gguf_metadata();
        writer.metadata.retain(|(key, _)| key != "llama.block_count");
        let error = gguf_config(&writer.set("llama.block_count", Value::U32(layers))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model);
        let text = error.to_string();
        assert!(text.contains("llama.block_count") && text.contains("at most 4096"), "{text}");
    }
}

#[test]
fn rope_scaling_of_a_gguf_file_is_read_whole_or_refused_by_name() {
    let kind = |name: &str| ("llama.rope.scaling.type", Value::Str(name.into()));
    let number = |key: &'static str, value: f32| (key, Value::F32(value));
    let factor = |value: f32| number("llama.rope.scaling.factor", value);
    let original = || ("llama.rope.scaling.original_context_length", Value::U32(64));
    let read = |settings: Vec<(&str, Value)>| {
        let write = |writer: Writer, (key, value)| writer.set(key, value);
        let writer = settings.into_iter().fold(gguf_metadata(), write);
        gguf_config(&writer).map(|config| config.rope_scaling)
    };
    let linear = RopeScaling::Linear { factor: 4.0 };
    let none = RopeScaling::None;
    let mut yarn = RopeScaling::yarn(4.0, 64);
    assert_eq!(read(vec![]).unwrap(), none);
    assert_eq!(read(vec![kind("none"), factor(0.0)]).unwrap(), none);
    assert_eq!(read(vec![factor(1.0)]).unwrap(), none);
    assert_eq!(read(vec![factor(4.0)]).unwrap(), linear);
    assert_eq!(read(vec![number("llama.rope.scale_linear", 4.0)]).unwrap(), linear);
    assert_eq!(read(vec![kind("linear"), factor(4.0)]).unwrap(), linear);
    let neutral = vec![
        kind("yarn"),
        factor(4.0),
        original(),
        number("llama.rope.scaling.attn_factor", 1.0),
        number("llama.rope.scaling.yarn_attn_factor", 1.0),
        number("llama.rope.scaling.yarn_ext_factor", -1.0),
        number("llama.rope.scaling.yarn_log_multiplier", 0.0),
    ];
    assert_eq!(read(neutral).unwrap(), yarn);
    if let RopeScaling::Yarn { beta_fast, beta_slow, .. } = &mut yarn {
        (*beta_fast, *beta_slow) = (24.0, 2.0);
    }
    let ramp = vec![
        kind("yarn"),
        factor(4.0),
        original(),
        number("llama.rope.scaling.yarn_beta_fast", 24.0),
        number("llama.rope.scaling.yarn_beta_slow", 2.0),
    ];
    assert_eq!(read(ramp).unwrap(), yarn);

    for wrong in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        for settings in [
            vec![factor(wrong)],
            vec![kind("linear"), factor(wrong)],
            vec![kind("yarn"), factor(wrong), original()],
        ] {
            let error = read(settings).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Model);
            assert!(error.to_string().contains("rope.scaling.factor"), "{error}");
        }
    }
    assert!(read(vec![kind("linear")]).unwrap_err().to_string().contains("scaling.factor"));
    assert!(
        read(vec![kind("longrope"), factor(4.0)]).unwrap_err().to_string().contains("longrope")
    );
    for name in ["attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"] {
        let key = format!("llama.rope.scaling.{name}");
        let settings = vec![kind("yarn"), factor(4.0), original(), (key.as_str(), Value::F32(0.5))];
        let error = read(settings).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains(&key), "{error}");
    }
}

fn copy_of(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let folder = copy_of("qwen2");
    let path = folder.path().join("model.safetensors");
    let whole = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let name = "model.layers.1.self_attn.k_proj.bias";
    let mut missing = whole.clone();
    missing.remove(name);
    candle_core::safetensors::save(&missing, &path).unwrap();
    let error = load_folder(folder.path()).err().unwrap();
    assert!(
        error.to_string().contains(name) && error.to_string().contains("found none"),
        "{error}"
    );
    let mut misshapen = whole;
    let zeros = Tensor::zeros(5, candle_core::DType::F32, &Device::Cpu).unwrap();
    misshapen.insert(name.into(), zeros);
    candle_core::safetensors::save(&misshapen, &path).unwrap();
    let error = load_folder(folder.path()).err().unwrap();
    assert!(error.to_string().contains("[5]") && error.to_string().contains(name), "{error}");
}

#[test]
fn damaged_weight_files_are_errors() {
    for (name, file) in [("smollm2", "model.safetensors"), ("gguf", "model.gguf")] {
        let folder = copy_of(name);
        let path = folder.path().join(file);
        let whole = std::fs::read(&path).unwrap();
        let open = || match name {
            "gguf" => load_gguf(&path).map(|_| ()),
            _ => load_folder(folder.path()).map(|_| ()),
        };
        assert!(open().is_ok());
        for cut in [0, 1, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(open().is_err(), "{name} cut at {cut}");
        }
        for at in [0, 4, 9, 16, 40] {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            std::fs::write(&path, &bytes).unwrap();
            // A flipped byte of a name or a number may leave a file that loads; it may never panic.
            let _ = open();
        }
    }
}

#[test]
fn a_shard_that_is_not_there_or_leaves_the_folder_is_an_error() {
    let folder = copy_of("smollm2_sharded");
    std::fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert_eq!(load_folder(folder.path()).err().unwrap().kind(), ErrorKind::NotFound);
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "../../etc/passwd"}}"#).unwrap();
    assert!(load_folder(folder.path()).err().unwrap().to_string().contains("file name"));
}

/// A gate of 0 is the pretrained model, bit for bit, and the gate that is open is not.
#[test]
fn a_closed_gate_is_the_pretrained_model_bit_for_bit() {
    let with_mka = copy_of("fastmka");
    let path = with_mka.path().join("mka.safetensors");
    let open = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let mut closed = open.clone();
    for layer in 0..2 {
        let zero = Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap();
        closed.insert(format!("layers.{layer}.gate"), zero);
    }
    let tokens: Vec<u32> = (0..70).map(|i| (i * 37 + 5) % 128).collect();
    let logits = |folder: &Path| {
        let decoder = load_folder(folder).unwrap();
        let mut cache = Cache::new(decoder.cache_shape(128, 512), &Device::Cpu).unwrap();
        run(&decoder, &mut cache, &tokens, &[33])
    };
    let opened = logits(with_mka.path());
    candle_core::safetensors::save(&closed, &path).unwrap();
    let shut = logits(with_mka.path());
    std::fs::remove_file(&path).unwrap();
    let plain = logits(with_mka.path());
    assert_eq!(shut, plain);
    assert!(max_difference(&opened, &plain) > 1.0);
}

/// Far past window and trained length, keys, values and summary do not depend on how the stream was cut.
#[test]
fn chunked_prefill_equals_token_by_token_far_past_the_window_with_the_gate_open() {
    for name in ["fastmka", "mistral", "qwen3"] {
        let decoder = load(name);
        let tokens: Vec<u32> = (0..700u32).map(|i| (i * i * 31 + i * 7 + 3) % 128).collect();
        let mut one = Cache::new(decoder.cache_shape(128, 200), &Device::Cpu).unwrap();
        let by_token = run(&decoder, &mut one, &tokens, &[1]);
        let mut many = Cache::new(decoder.cache_shape(128, 200), &Device::Cpu).unwrap();
        let by_block = run(&decoder, &mut many, &tokens, &[200, 3, 64]);
        let difference = max_difference(&by_token, &by_block);
        assert!(difference <= 2e-3, "{name}: logits off by {difference}");
        let pages = one.window_pages(700);
        assert_eq!(pages, many.window_pages(700));
        assert!(pages.len() <= 1 + 3 + 1 && pages[0] == 0);
        for page in pages {
            let floats = |cache: &Cache| -> Vec<f32> {
                let (_, bytes) = cache.page_bytes(&[page]).unwrap().remove(0);
                bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
            };
            let (a, b) = (floats(&one), floats(&many));
            let worst = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-4, "{name} page {page}: off by {worst}");
        }
    }
}

#[test]
fn device_memory_is_constant_in_the_length_of_the_stream() {
    let decoder = load("smollm2");
    let mut cache = Cache::new(decoder.cache_shape(64, 32), &Device::Cpu).unwrap();
    for _ in 0..30 {
        run(&decoder, &mut cache, &[5; 100], &[32]);
        assert!(cache.window_pages(cache.position()).len() <= 4);
    }
    assert_eq!(cache.position(), 3000);
}

#[test]
fn a_restored_cache_continues_bit_for_bit() {
    for name in ["fastmka", "mistral", "smollm2", "phi3", "smollm3", "gemma3"] {
        let decoder = load(name);
        let tokens: Vec<u32> = (0..400u32).map(|i| (i * 17 + i / 3) % 128).collect();
        for stop in [1usize, 63, 64, 65, 200, 333] {
            let mut cache = Cache::new(decoder.cache_shape(128, 64), &Device::Cpu).unwrap();
            run(&decoder, &mut cache, &tokens[..stop], &[64]);
            let pages = cache.page_bytes(&cache.window_pages(stop as u64)).unwrap();
            let ema = cache.ema_bytes().unwrap();
            let angles = |positions| decoder.frequencies.angles(positions);
            let restored = Cache::new(decoder.cache_shape(128, 64), &Device::Cpu).unwrap();
            let mut restored = restored.restored(stop as u64, &ema, &pages, angles).unwrap();
            let straight = run(&decoder, &mut cache, &tokens[stop..], &[50, 1]);
            let again = run(&decoder, &mut restored, &tokens[stop..], &[50, 1]);
            assert_eq!(straight, again, "{name} restored at {stop}");
        }
    }
}

#[test]
fn a_rewound_cache_continues_as_if_nothing_had_followed() {
    let decoder = load("fastmka");
    let mut cache = Cache::new(decoder.cache_shape(128, 64), &Device::Cpu).unwrap();
    run(&decoder, &mut cache, &[9; 300], &[64]);
    let checkpoint = cache.checkpoint();
    let first = run(&decoder, &mut cache, &[1, 2, 3, 4, 5], &[2]);
    assert!(cache.rewind(&checkpoint));
    assert_eq!(run(&decoder, &mut cache, &[1, 2, 3, 4, 5], &[2]), first);
    // Once the pages are gone, nothing is changed and the answer is no.
    run(&decoder, &mut cache, &[7; 2000], &[64]);
    assert!(!cache.rewind(&checkpoint));
    assert_eq!(cache.position(), 2305);
}

#[test]
fn tokens_outside_the_vocabulary_are_an_error() {
    let decoder = load("smollm2");
    let mut cache = Cache::new(decoder.cache_shape(64, 32), &Device::Cpu).unwrap();
    let mut seam = AttentionSeam::open(decoder.seam_config(), &mut cache, 1).unwrap();
    let error = decoder.forward(&[128], &mut seam).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

/// The default model, if it is in the cache folder: logits and continuation against `transformers`.
#[test]
fn the_default_model_equals_transformers() {
    let Some(path) = crate::testing::smollm2_gguf() else { return };
    let decoder = load_gguf(&path).unwrap();
    // Trap of another loader: a cap of 4,096 tokens on a model of 8,192.
    assert_eq!((decoder.config.trained_tokens, decoder.config.rope_theta), (8192, 100_000.0));
    let golden = tensors(golden("smollm2_135m_q4_1.safetensors"));
    let tokens = ids(&golden["ids"]);
    let mut cache = Cache::new(decoder.cache_shape(512, 512), &Device::Cpu).unwrap();
    let logits = run(&decoder, &mut cache, &tokens, &[512]).pop().unwrap();
    let expected = golden["logits"].to_vec1::<f32>().unwrap();
    let difference = max_difference(std::slice::from_ref(&logits), std::slice::from_ref(&expected));
    assert!(difference <= 1e-3, "logits off by {difference}");
    let best = |logits: &[f32]| (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    let greedy = ids(&golden["greedy"]);
    let mut next = best(&logits).unwrap() as u32;
    for expected in &greedy[..8] {
        assert_eq!(next, *expected);
        next = best(&run(&decoder, &mut cache, &[next], &[1]).pop().unwrap()).unwrap() as u32;
    }
}

/// The default model in three processes, one of its three key/value heads each: packed rows and columns of whole blocks.
#[test]
fn the_default_model_is_shared_by_three_processes() {
    let Some(path) = crate::testing::smollm2_gguf() else { return };
    let load = |group: &TensorGroup| load_gguf_part(&path, group);
    let tokens: Vec<u32> = (0..60).map(|i| i * 911 % 40_000).collect();
    let whole = shared(1, load, &tokens, &[60]).pop().unwrap().unwrap();
    for result in shared(3, load, &tokens, &[60]) {
        let difference = max_difference(&result.unwrap(), &whole);
        assert!(difference <= 2e-3, "off by {difference}");
    }
}

/// The default model in f32 on both devices: the same greedy tokens, over a prompt of several windows and past it.
#[cfg(feature = "cuda")]
#[test]
fn the_default_model_decodes_the_same_tokens_on_cuda() {
    let path = crate::hub::cache_folder().unwrap().join("models/SmolLM2-135M-Instruct-Q4_1.gguf");
    let gpu = match mka_kernels::cuda::open(0) {
        Ok(gpu) if path.exists() => gpu,
        Ok(_) => return println!("skipped: no file {}", path.display()),
        Err(error) => return println!("skipped: no CUDA device: {error}"),
    };
    let decode = |device: &Device| {
        let (weights, gguf) = Weights::open_gguf(&path).unwrap();
        let config = DecoderConfig::from_gguf(&gguf).unwrap();
        let decoder = Decoder::load(config, &weights.decoded(), device).unwrap();
        let tokenizer = crate::tokenizer::Tokenizer::from_gguf(&gguf).unwrap();
        let text = include_str!("../../../README.md").repeat(2);
        let prompt = tokenizer.encode_document(&text).unwrap();
        assert!(prompt.len() > 1500, "{} tokens", prompt.len());
        let mut cache = Cache::new(decoder.cache_shape(512, 256), device).unwrap();
        let step = |cache: &mut Cache, tokens: &[u32]| {
            let mut seam = AttentionSeam::open(decoder.seam_config(), cache, tokens.len()).unwrap();
            let hidden = decoder.forward(tokens, &mut seam).unwrap();
            seam.finish();
            let last = hidden.narrow(0, tokens.len() - 1, 1).unwrap();
            decoder.logits(&last).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let mut logits = Vec::new();
        for block in prompt.chunks(256) {
            logits = step(&mut cache, block);
        }
        let first = logits.clone();
        let mut generated = Vec::new();
        let (before, start) = (mka_kernels::cuda::launches(), std::time::Instant::now());
        for _ in 0..128 {
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            generated.push(best as u32);
            logits = step(&mut cache, &[best as u32]);
        }
        if device.is_cuda() {
            println!(
                "decode: {:.1} launches of the kernels of mka a token, {:.2} ms a token",
                (mka_kernels::cuda::launches() - before) as f64 / 128.0,
                start.elapsed().as_secs_f64() * 1e3 / 128.0
            );
        }
        (first, generated)
    };
    let (cpu_logits, cpu_tokens) = decode(&Device::Cpu);
    let (gpu_logits, gpu_tokens) = decode(&gpu);
    let error = cpu_logits.iter().zip(&gpu_logits).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    println!("logits after the prompt differ by at most {error}");
    assert!(error < 2e-3, "{error}");
    assert_eq!(cpu_tokens, gpu_tokens);
}
