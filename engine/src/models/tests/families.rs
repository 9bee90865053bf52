//! Families that change something in the Llama layout: what is read of them, what is refused, and their GGUF files.

use super::*;
use crate::models::families::{LayerRope, Variant};
use serde_json::json;

fn config_json(name: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(golden(name).join("config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The configuration of the golden folder `name` with `changes` to its keys.
fn changed(name: &str, changes: serde_json::Value) -> crate::Result<DecoderConfig> {
    let mut json = config_json(name);
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    DecoderConfig::from_json(&json.to_string())
}

fn unchanged(name: &str) -> DecoderConfig {
    changed(name, json!({})).unwrap()
}

/// Stored pages carry a hash of this text: a release that wrote another for a family that it knew would lose them.
#[test]
fn the_description_of_a_plain_model_is_the_one_that_stored_pages_carry() {
    let expected = concat!(
        "DecoderConfig { family: \"llama\", vocab_size: 128, hidden_size: 32, intermediate_size: 48, num_layers: 2, ",
        "num_heads: 4, num_kv_heads: 2, head_dim: 8, rms_norm_eps: 1e-5, rope_theta: 500000.0, ",
        "rope_scaling: Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_tokens: 32 }, ",
        "trained_tokens: 256, tied_embeddings: false, qkv_bias: false, output_bias: false, mlp_bias: false, ",
        "qk_norm: false, sliding_window: [None, None], eos_token_ids: [2], bos_token_id: Some(1), ",
        "mka: MkaConfig { rates: [0.9, 0.99, 0.999], bias_correction: true } }",
    );
    assert_eq!(format!("{:?}", unchanged("llama3")), expected);
    for name in ["llama3", "mistral", "qwen2", "qwen3", "smollm2", "fastmka"] {
        assert_eq!(unchanged(name).variant, Variant::default(), "{name}");
    }
    for name in ["phi3", "phi3_plain", "granite", "smollm3", "gemma3"] {
        let text = format!("{:?}", unchanged(name));
        assert!(text.contains("bias_correction: true }, variant: Variant { "), "{text}");
    }
}

#[test]
fn both_forms_of_settings_give_the_same_model_of_phi3_and_gemma3() {
    let phi3 = unchanged("phi3");
    let factors = json!([1.0, 1.5, 2.25, 4.0]);
    let short = json!([1.0, 1.25, 1.5, 2.0]);
    let inside = json!({
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32, "long_factor": factors, "short_factor": short,
    });
    let moved = json!({
        "rope_parameters": inside, "rope_scaling": null, "rope_theta": null, "partial_rotary_factor": null,
        "original_max_position_embeddings": null,
    });
    assert_eq!(changed("phi3", moved).unwrap(), phi3);
    let su = json!({"type": "su", "long_factor": factors, "short_factor": short});
    assert_eq!(changed("phi3", json!({"rope_scaling": su})).unwrap(), phi3);

    let full = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0});
    let local = json!({"rope_type": "default", "rope_theta": 10000.0});
    let kinds = ["sliding_attention", "sliding_attention", "full_attention"];
    let moved = json!({
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "layer_types": (kinds.repeat(2)), "rope_scaling": null, "rope_theta": null,
        "rope_local_base_freq": null, "sliding_window_pattern": null,
    });
    assert_eq!(changed("gemma3", moved).unwrap(), unchanged("gemma3"));
    let named = json!({"sliding_window_pattern": null, "_sliding_window_pattern": 3});
    assert_eq!(changed("gemma3", named).unwrap(), unchanged("gemma3"));
}

#[test]
fn longrope_takes_the_factors_of_the_length_that_a_session_may_reach() {
    let scaling = |changes| changed("phi3", changes).unwrap().rope_scaling;
    let long =
        |scale| RopeScaling::LongRope { factors: vec![1.0, 1.5, 2.25, 4.0], is_long: true, scale };
    assert_eq!(unchanged("phi3").rotary_dim(), 8);
    assert_eq!(scaling(json!({})), long((1.0 + 4f64.ln() / 32f64.ln()).sqrt()));
    let mut own = config_json("phi3")["rope_scaling"].clone();
    own["attention_factor"] = json!(1.25);
    assert_eq!(scaling(json!({"rope_scaling": own})), long(1.25));
    let short =
        RopeScaling::LongRope { factors: vec![1.0, 1.25, 1.5, 2.0], is_long: false, scale: 1.0 };
    assert_eq!(scaling(json!({"max_position_embeddings": 32})), short);
}

#[test]
fn a_window_as_long_as_what_phi3_was_trained_on_is_none() {
    for (window, expected) in [(255, Some(255)), (256, None), (1 << 18, None)] {
        let folder = changed("phi3_plain", json!({"sliding_window": window})).unwrap();
        assert_eq!(folder.sliding_window, [expected; 2]);
        let (length, window) = (Value::U32(256), Value::U32(window));
        let mut writer = metadata_of("phi3", &[("attention.sliding_window", window)]);
        writer.metadata.retain(|(key, _)| key != "phi3.context_length");
        let gguf = gguf_config(&writer.set("phi3.context_length", length)).unwrap();
        assert_eq!(gguf.sliding_window, [expected; 2]);
    }
}

#[test]
fn layers_of_smollm3_rotate_by_their_list_or_interval() {
    use LayerRope::{Model, Off};
    let rope = |changes| changed("smollm3", changes).unwrap().variant.layer_rope;
    assert_eq!(rope(json!({})), [Model, Model, Model, Off]);
    assert_eq!(rope(json!({"no_rope_layers": [0, 1, 0, 1]})), [Off, Model, Off, Model]);
    let by_default = json!({"no_rope_layers": null, "no_rope_layer_interval": null});
    assert_eq!(rope(by_default), [Model, Model, Model, Off]);
    let every_second = json!({"no_rope_layers": null, "no_rope_layer_interval": 2});
    assert_eq!(rope(every_second), [Model, Off, Model, Off]);
    assert!(unchanged("smollm3").tied_embeddings);
}

#[test]
fn a_scale_of_attention_that_is_the_plain_one_is_not_applied() {
    let scale = |value: f64| {
        changed("gemma3", json!({"query_pre_attn_scalar": value})).unwrap().query_scale()
    };
    assert_eq!(scale(16.0), None);
    assert!(scale(24.0).is_some_and(|scale| (scale - (16f64 / 24.0).sqrt()).abs() < 1e-12));
    // 1/√8 as a file rounds it.
    let rounded = json!({"attention_multiplier": 0.35355339});
    assert_eq!(changed("granite", rounded).unwrap().query_scale(), None);
    assert_eq!(unchanged("llama3").query_scale(), None);
}

#[test]
fn settings_of_a_family_that_are_not_understood_are_errors_that_name_them() {
    let longrope = |long: &[f64], short: &[f64]| {
        let scaling = json!({"type": "longrope", "long_factor": long, "short_factor": short});
        json!({"rope_scaling": scaling})
    };
    let partly = |part: f64| {
        let parameters = json!({"rope_theta": 10000.0, "partial_rotary_factor": part});
        json!({"rope_parameters": parameters})
    };
    let cases = [
        ("gemma3", json!({"model_type": "gemma3"}), "gemma3_text"),
        ("gemma3", json!({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping"),
        ("gemma3", json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
        ("gemma3", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
        ("gemma3", json!({"hidden_activation": "gelu"}), "gelu_pytorch_tanh"),
        ("gemma3", json!({"sliding_window": null}), "sliding_window"),
        ("gemma3", json!({"sliding_window_pattern": 0}), "sliding_window_pattern"),
        ("gemma3", json!({"layer_types": ["full_attention"]}), "layer_types of 1 entries"),
        ("gemma3", json!({"rope_local_base_freq": -1.0}), "local layers -1"),
        ("gemma3", json!({"rope_parameters": {"full_attention": {}}}), "sliding_attention"),
        ("gemma3", json!({"rope_parameters": {"rope_theta": 1e6}}), "full_attention"),
        ("gemma3", json!({"rope_scaling": {"rope_type": "longrope"}}), "longrope"),
        ("gemma3", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        ("gemma3", json!({"query_pre_attn_scalar": 0}), "query_pre_attn_scalar"),
        ("phi3", json!({"hidden_act": "gelu"}), "hidden_act"),
        ("phi3", json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor"),
        ("phi3", json!({"original_max_position_embeddings": null}), "original_max"),
        ("phi3", json!({"original_max_position_embeddings": 1}), "longrope scales by inf"),
        ("phi3", json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), "yarn"),
        ("phi3", longrope(&[1.0; 3], &[1.0; 4]), "long_factor, expected 4 numbers"),
        ("phi3", longrope(&[1.0; 4], &[1.0, 1.0, 1.0, 0.0]), "short_factor, expected 4 numbers"),
        ("phi3_plain", partly(0.2), "3 rotated channels"),
        ("phi3_plain", partly(0.01), "0 rotated channels"),
        ("granite", json!({"residual_multiplier": 0}), "residual_multiplier"),
        ("granite", json!({"attention_multiplier": "x"}), "attention_multiplier"),
        ("smollm3", json!({"no_rope_layers": [1, 1, 0]}), "4 entries of 0 or 1"),
        ("smollm3", json!({"no_rope_layers": [1, 1, 1, 2]}), "4 entries of 0 or 1"),
        (
            "smollm3",
            json!({"no_rope_layers": null, "no_rope_layer_interval": 0}),
            "no_rope_layer_interval",
        ),
        ("smollm3", json!({"use_sliding_window": true}), "use_sliding_window"),
        ("llama3", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    ];
    for (name, changes, named) in cases {
        let error = changed(name, changes.clone()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model, "{name} {changes}");
        assert!(error.to_string().contains(named), "{name} {changes}: {error}");
    }
}

/// The metadata of a small model of the architecture `arch`, with `settings` of its own.
fn metadata_of(arch: &str, settings: &[(&str, Value)]) -> Writer {
    let mut writer = gguf_metadata();
    for (key, value) in &mut writer.metadata {
        *key = key.replacen("llama.", &format!("{arch}."), 1);
        if *key == "general.architecture" {
            *value = Value::Str(arch.into());
        }
    }
    let writer = writer.set(&format!("{arch}.rope.freq_base"), Value::F32(10_000.0));
    settings
        .iter()
        .fold(writer, |writer, (name, value)| writer.set(&format!("{arch}.{name}"), value.clone()))
}

#[test]
fn metadata_of_a_family_that_are_not_understood_are_errors_that_name_them() {
    let window = || ("attention.sliding_window", Value::U32(16));
    let cases = [
        ("gemma2", vec![], "gemma2"),
        ("llama", vec![("rope.dimension_count", Value::U32(2))], "rope.dimension_count 2"),
        ("phi3", vec![("rope.dimension_count", Value::U32(3))], "3 rotated channels"),
        ("phi3", vec![("rope.dimension_count", Value::U32(6))], "6 rotated channels"),
        ("phi3", vec![("rope.scaling.attn_factor", Value::F32(1.2))], "attn_factor"),
        ("granite", vec![("residual_scale", Value::F32(0.0))], "granite.residual_scale 0"),
        ("granite", vec![("rope.scaling.finetuned", Value::Bool(false))], "finetuned"),
        ("gemma3", vec![], "gemma3.attention.sliding_window"),
        (
            "gemma3",
            vec![window(), ("attention.sliding_window_pattern", Value::U32(0))],
            "sliding_window_pattern 0",
        ),
        (
            "gemma3",
            vec![window(), ("final_logit_softcapping", Value::F32(30.0))],
            "final_logit_softcapping",
        ),
    ];
    for (arch, settings, named) in cases {
        let error = gguf_config(&metadata_of(arch, &settings)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model, "{arch} {settings:?}");
        assert!(error.to_string().contains(named), "{arch} {settings:?}: {error}");
    }
    let gemma3 = gguf_config(&metadata_of("gemma3", &[window()])).unwrap();
    assert_eq!(gemma3.sliding_window, [Some(16); 2]);
    assert_eq!(gemma3.variant.layer_rope, [LayerRope::Local { theta: 10_000.0 }; 2]);
    assert_eq!((gemma3.variant.has_offset_norms, gemma3.query_scale()), (false, None));
    let smollm3 = gguf_config(&metadata_of("smollm3", &[])).unwrap();
    assert_eq!(smollm3.variant.layer_rope, [LayerRope::Model; 2]);
    assert_eq!(gguf_config(&metadata_of("qwen2", &[])).unwrap().variant, Variant::default());
}

#[test]
fn a_gguf_file_of_llama_or_phi3_may_leave_the_base_of_its_rotation_out() {
    for arch in ["llama", "phi3", "qwen2", "smollm3"] {
        let mut writer = metadata_of(arch, &[]);
        writer.metadata.retain(|(key, _)| !key.ends_with("rope.freq_base"));
        let read = gguf_config(&writer);
        if matches!(arch, "llama" | "phi3") {
            assert_eq!(read.unwrap().rope_theta, 10_000.0, "{arch}");
        } else {
            assert!(read.unwrap_err().to_string().contains("rope.freq_base"), "{arch}");
        }
    }
}

/// What llama.cpp's converter calls the tensor `name` in a file of the architecture `arch`.
fn gguf_name(name: &str, arch: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let (layer, place) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let own = match place.strip_suffix(".weight").unwrap() {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" if arch == "gemma3" => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => panic!("{other}"),
    };
    format!("blk.{layer}.{own}.weight")
}

/// Rows of `heads` heads with the pairs of each side by side, as llama.cpp's own RoPE turns them.
fn interleaved(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, cols) = weight.dims2().unwrap();
    let halves = weight.reshape((heads, 2, rows / heads / 2, cols)).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, cols)).unwrap()
}

fn with_f32(writer: Writer, name: &str, tensor: &Tensor) -> Writer {
    let dims: Vec<u64> = tensor.dims().iter().rev().map(|dim| *dim as u64).collect();
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    writer.tensor(name, &dims, 0, &bytes)
}

/// The golden model `name` as llama.cpp's converter writes it, f32, with `settings` of its architecture's own.
fn as_gguf(name: &str, arch: &str, settings: &[(&str, Value)]) -> Writer {
    let c = unchanged(name);
    let count = |number: usize| Value::U32(number as u32);
    let shape = [
        ("embedding_length", count(c.hidden_size)),
        ("block_count", count(c.num_layers)),
        ("feed_forward_length", count(c.intermediate_size)),
        ("context_length", count(c.trained_tokens)),
        ("attention.head_count", count(c.num_heads)),
        ("attention.head_count_kv", count(c.num_kv_heads)),
        ("attention.key_length", count(c.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(c.rms_norm_eps as f32)),
        ("rope.dimension_count", count(c.rotary_dim())),
        ("rope.freq_base", Value::F32(c.rope_theta as f32)),
    ];
    let mut writer = Writer::default().set("general.architecture", Value::Str(arch.into()));
    for (key, value) in shape.iter().chain(settings) {
        writer = writer.set(&format!("{arch}.{key}"), value.clone());
    }
    for (name, tensor) in tensors(golden(name).join("model.safetensors")) {
        let stored = match arch {
            "granite" | "smollm3" if name.ends_with("q_proj.weight") => {
                interleaved(&tensor, c.num_heads)
            }
            "granite" | "smollm3" if name.ends_with("k_proj.weight") => {
                interleaved(&tensor, c.num_kv_heads)
            }
            // A file cannot say that queries are scaled by anything but their head dimension.
            "gemma3" if name.ends_with("q_norm.weight") => {
                ((tensor + 1.0).unwrap() * c.query_scale().unwrap()).unwrap()
            }
            "gemma3" if name.ends_with("norm.weight") => (tensor + 1.0).unwrap(),
            _ => tensor,
        };
        writer = with_f32(writer, &gguf_name(&name, arch), &stored);
    }
    writer
}

#[test]
fn gguf_files_of_every_family_equal_transformers() {
    let number = Value::F32;
    let RopeScaling::LongRope { factors, scale, .. } = unchanged("phi3").rope_scaling else {
        panic!("phi3 without longrope")
    };
    let phi3 = [
        ("rope.scaling.original_context_length", Value::U32(32)),
        ("rope.scaling.attn_factor", number(scale as f32)),
    ];
    let factors: Vec<f32> = factors.into_iter().map(|factor| factor as f32).collect();
    let mut phi3 = as_gguf("phi3", "phi3", &phi3);
    for (name, factors) in [("rope_factors_long", factors), ("rope_factors_short", vec![1.0; 4])] {
        let factors = Tensor::from_vec(factors, 4, &Device::Cpu).unwrap();
        phi3 = with_f32(phi3, &format!("{name}.weight"), &factors);
    }
    let window = || ("attention.sliding_window", Value::U32(16));
    let granite = [
        ("embedding_scale", number(3.0)),
        ("attention.scale", number(0.25)),
        ("residual_scale", number(0.5)),
        ("logit_scale", number(4.0)),
    ];
    let gemma3 = [
        window(),
        ("attention.sliding_window_pattern", Value::U32(3)),
        ("rope.scaling.type", Value::Str("linear".into())),
        ("rope.scaling.factor", number(4.0)),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (name, writer) in [
        ("phi3", phi3),
        ("phi3_plain", as_gguf("phi3_plain", "phi3", &[window()])),
        ("granite", as_gguf("granite", "granite", &granite)),
        ("smollm3", as_gguf("smollm3", "smollm3", &[])),
        ("gemma3", as_gguf("gemma3", "gemma3", &gemma3)),
    ] {
        let path = folder.path().join(format!("{name}.gguf"));
        std::fs::write(&path, writer.bytes()).unwrap();
        let decoder = load_gguf(&path).unwrap();
        let golden = tensors(golden(name).join("golden.safetensors"));
        let mut cache = Cache::new(decoder.cache_shape(128, 512), &Device::Cpu).unwrap();
        let logits = run(&decoder, &mut cache, &ids(&golden["ids"]), &[512]);
        let difference = max_difference(&logits, &expected(&golden));
        assert!(difference <= 2e-4, "{name}: off by {difference}");
    }
}

#[test]
fn a_gguf_file_without_the_factors_that_it_rotates_by_is_refused() {
    let original = ("rope.scaling.original_context_length", Value::U32(128));
    let long = Tensor::from_vec(vec![1f32; 4], 4, &Device::Cpu).unwrap();
    let writer = with_f32(as_gguf("phi3", "phi3", &[original]), "rope_factors_long.weight", &long);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, writer.bytes()).unwrap();
    let error = load_gguf(&path).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Model);
    assert!(error.to_string().contains("rope_factors_short.weight"), "{error}");
}
