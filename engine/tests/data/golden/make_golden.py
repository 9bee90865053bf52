"""Writes the tiny seeded models of this folder and their golden logits.

    pip install torch transformers safetensors tokenizers gguf
    python make_golden.py [FOLDER ...]

Without folders named, all: another version of torch may change their last bits.
One folder a family: config.json, model.safetensors (f32), golden.safetensors with `ids` (t,), `logits` (t, vocab) and
`greedy` (16,): the continuation that `transformers` gives, eager attention, float32, on the CPU.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

HERE = pathlib.Path(__file__).parent
NAMED = set(sys.argv[1:])
VOCAB, HIDDEN, INNER, LAYERS = 128, 32, 48, 2
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation="eager",
)


def wanted(name):
    return not NAMED or name in NAMED


def randomise(model, seed, neutral_norm=1, size=0.3):
    """Weights large enough that the logits are far from flat, norms and biases off their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(neutral_norm + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "embed" in name or "lm_head" in name:
                p.copy_(noise)
            else:
                p.copy_(size * noise)
    return model.float().eval()


def ids_of(seed, length):
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy(model, ids, n=16):
    seq = ids[None]
    for _ in range(n):
        seq = torch.cat([seq, model(seq, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return seq[0, -n:]


def old_form(config, rope_scaling=None):
    """config.json as transformers 4 wrote it."""
    d = json.loads(config.to_json_string(use_diff=False))
    rope = d.pop("rope_parameters", None) or {}
    d["rope_theta"] = rope.get("rope_theta", d.get("rope_theta"))
    d["rope_scaling"] = rope_scaling
    d["torch_dtype"] = "float32"
    d.pop("dtype", None)
    return d


def save(name, model, config_json, ids, tied=False):
    if not wanted(name):
        return
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    state = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
    if tied:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    keep = [k for k in config_json if not k.startswith("_") and config_json[k] is not None]
    (folder / "config.json").write_text(json.dumps({k: config_json[k] for k in sorted(keep)}, indent=1) + "\n")
    write_golden(folder / "golden.safetensors", model, ids)


@torch.no_grad()
def write_golden(path, model, ids):
    logits = model(ids[None], use_cache=False).logits[0]
    print(path.relative_to(HERE), "logits", tuple(logits.shape), "max", float(logits.abs().max()))
    save_file(
        {"ids": ids.to(torch.int64), "logits": logits.contiguous(), "greedy": greedy(model, ids).to(torch.int64)},
        path,
    )


def new_form(config):
    return json.loads(config.to_json_string(use_diff=False))


def heads(h, kv, **more):
    return dict(num_attention_heads=h, num_key_value_heads=kv, **more)


def families():
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )
    config = LlamaConfig(
        **COMMON, **heads(4, 2), max_position_embeddings=256, rope_parameters=dict(rope_theta=500000.0, **scaling)
    )
    save("llama3", randomise(LlamaForCausalLM(config), 1), old_form(config, scaling), ids_of(11, 100))

    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    config = LlamaConfig(**COMMON, **heads(4, 2), max_position_embeddings=128, rope_parameters=dict(rope_theta=10000.0, **yarn))
    save("llama_yarn", randomise(LlamaForCausalLM(config), 2), new_form(config), ids_of(12, 100))

    linear = dict(rope_type="linear", factor=4.0)
    config = LlamaConfig(**COMMON, **heads(4, 4), max_position_embeddings=128, rope_parameters=dict(rope_theta=10000.0, **linear))
    save("llama_linear", randomise(LlamaForCausalLM(config), 3), old_form(config, dict(type="linear", factor=4.0)), ids_of(13, 100))

    config = MistralConfig(
        **COMMON, **heads(4, 2, head_dim=16), max_position_embeddings=256, sliding_window=16,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    )
    save("mistral", randomise(MistralForCausalLM(config), 4), new_form(config), ids_of(14, 48))

    config = Qwen2Config(
        **COMMON, **heads(4, 2), max_position_embeddings=256, tie_word_embeddings=True, use_sliding_window=False,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    )
    save("qwen2", randomise(Qwen2ForCausalLM(config), 5), new_form(config), ids_of(15, 40), tied=True)

    config = Qwen3Config(
        **COMMON, **heads(4, 2, head_dim=16), max_position_embeddings=256, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    )
    save("qwen3", randomise(Qwen3ForCausalLM(config), 6), new_form(config), ids_of(16, 40))

    common = dict(COMMON, hidden_size=24)
    config = LlamaConfig(
        **common, **heads(3, 1), max_position_embeddings=256, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100000.0),
    )
    model = randomise(LlamaForCausalLM(config), 7)
    ids = ids_of(17, 40)
    save("smollm2", model, old_form(config), ids, tied=True)
    shard(model, old_form(config), ids)
    if not wanted("smollm2_bf16"):
        return
    # The same shape in bf16: golden logits in float32 from the rounded weights.
    rounded = LlamaForCausalLM(config).float().eval()
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    save("smollm2_bf16", rounded, dict(old_form(config), torch_dtype="bfloat16"), ids, tied=True)
    folder = HERE / "smollm2_bf16"
    save_file(
        {k: v.bfloat16().contiguous() for k, v in rounded.state_dict().items() if k != "lm_head.weight"},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def shard(model, config_json, ids):
    if not wanted("smollm2_sharded"):
        return
    save("smollm2_sharded", model, config_json, ids, tied=True)
    folder = HERE / "smollm2_sharded"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({k: state[k] for k in keys}, folder / part, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: part for part, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def other_families():
    """Those that change something in the Llama layout."""
    wide = dict(COMMON, hidden_size=64, pad_token_id=0)
    # Beyond the original length transformers takes the long factors, as a session does from its first token on.
    factors = dict(long_factor=[1.0, 1.5, 2.25, 4.0], short_factor=[1.0, 1.25, 1.5, 2.0])
    config = Phi3Config(
        **wide, **heads(4, 2), max_position_embeddings=128, original_max_position_embeddings=32,
        rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.5, **factors),
    )
    old = dict(old_form(config, dict(type="longrope", **factors)), partial_rotary_factor=0.5)
    save("phi3", randomise(Phi3ForCausalLM(config), 20, size=0.15), old, ids_of(20, 100))

    config = Phi3Config(
        **wide, **heads(4, 2), max_position_embeddings=256, sliding_window=16,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    )
    save("phi3_plain", randomise(Phi3ForCausalLM(config), 21, size=0.15), new_form(config), ids_of(21, 48))

    config = GraniteConfig(
        **COMMON, **heads(4, 2), max_position_embeddings=256, tie_word_embeddings=True,
        embedding_multiplier=3.0, attention_multiplier=0.25, residual_multiplier=0.5, logits_scaling=4.0,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    )
    save("granite", randomise(GraniteForCausalLM(config), 22), old_form(config), ids_of(22, 48), tied=True)

    config = SmolLM3Config(
        **dict(COMMON, num_hidden_layers=4, pad_token_id=0), **heads(4, 2), max_position_embeddings=256,
        no_rope_layers=[1, 1, 1, 0], rope_parameters=dict(rope_type="default", rope_theta=5000000.0),
    )
    published = new_form(config)
    # The model that is published leaves out what is the family's default.
    published.pop("tie_word_embeddings")
    save("smollm3", randomise(SmolLM3ForCausalLM(config), 23, size=0.2), published, ids_of(23, 48), tied=True)

    config = Gemma3TextConfig(
        **dict(COMMON, num_hidden_layers=6, pad_token_id=0), **heads(4, 2, head_dim=16), max_position_embeddings=256,
        query_pre_attn_scalar=24, sliding_window=16,
        layer_types=["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(6)],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1000000.0),
            sliding_attention=dict(rope_type="default", rope_theta=10000.0),
        ),
    )
    old = old_form(config, dict(rope_type="linear", factor=4.0))
    old.pop("layer_types")
    old.update(rope_theta=1000000.0, rope_local_base_freq=10000.0, sliding_window_pattern=3)
    # Its norms multiply by one more than they store.
    save("gemma3", randomise(Gemma3ForCausalLM(config), 24, neutral_norm=0), old, ids_of(24, 60), tied=True)


# FastMKA (arXiv 2603.20586, algorithm 2) with multi-rate EMA, bias correction and a per-layer gate, in plain PyTorch.


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


@torch.no_grad()
def fastmka(model, mka, rates, bias_correction, ids):
    c = model.config
    h, g, d = c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    t = len(ids)
    hidden = model.model.embed_tokens(ids)
    inv_freq = 10000.0 ** (-torch.arange(0, d, 2).double() / d)
    angles = torch.arange(t).double()[:, None] * inv_freq[None]
    cos, sin = (f(torch.cat([angles, angles], -1)).float()[None] for f in (torch.cos, torch.sin))
    mask = torch.full((t, t), float("-inf")).triu(1)
    for i, layer in enumerate(model.model.layers):
        a = layer.self_attn
        x = layer.input_layernorm(hidden)
        q = a.q_proj(x)
        levels = [x]
        for b in rates:
            e, out = torch.zeros(c.hidden_size), []
            for n in range(t):
                e = b * e + (1 - b) * x[n]
                out.append(e / (1 - b ** (n + 1)) if bias_correction else e)
            levels.append(torch.stack(out))
        inner = torch.nn.functional.silu(q @ mka[f"layers.{i}.router.down.weight"].T + mka[f"layers.{i}.router.down.bias"])
        weights = torch.softmax(inner @ mka[f"layers.{i}.router.up.weight"].T + mka[f"layers.{i}.router.up.bias"], -1)
        shift = sum(weights[:, l : l + 1] * (levels[l] - x) for l in range(1, len(levels)))
        xf = x + mka[f"layers.{i}.gate"] * shift
        split = lambda y, n: y.view(t, n, d).transpose(0, 1)
        q, k, v = split(q, h), split(a.k_proj(xf), g), split(a.v_proj(xf), g)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(h // g, 0), v.repeat_interleave(h // g, 0)
        scores = torch.softmax(q @ k.transpose(1, 2) / d**0.5 + mask, -1)
        hidden = hidden + a.o_proj((scores @ v).transpose(0, 1).reshape(t, h * d))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


def fastmka_models():
    config = LlamaConfig(**COMMON, **heads(4, 2), max_position_embeddings=256, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
    model = randomise(LlamaForCausalLM(config), 8)
    ids = ids_of(18, 60)
    for name, rates, correction, gates in [
        ("fastmka", [0.9, 0.99, 0.999], True, [0.7, -0.4]),
        ("fastmka_paper", [0.9], False, [1.0, 1.0]),
    ]:
        generator = torch.Generator().manual_seed(9)
        noise = lambda *shape: 0.5 * torch.randn(shape, generator=generator)
        r, m = HIDDEN // 2, 1 + len(rates)
        mka = {}
        for i in range(LAYERS):
            mka[f"layers.{i}.gate"] = torch.tensor([gates[i]])
            mka[f"layers.{i}.router.down.weight"] = noise(r, HIDDEN)
            mka[f"layers.{i}.router.down.bias"] = noise(r)
            mka[f"layers.{i}.router.up.weight"] = noise(m, r)
            mka[f"layers.{i}.router.up.bias"] = noise(m)
        block = dict(version=1, rates=rates, bias_correction=correction)
        save(name, model, dict(new_form(config), mka=block), ids)
        save_file(mka, HERE / name / "mka.safetensors")
        closed = dict(mka, **{f"layers.{i}.gate": torch.zeros(1) for i in range(LAYERS)})
        base = model(ids[None], use_cache=False).logits[0]
        assert (fastmka(model, closed, rates, correction, ids) - base).abs().max() < 1e-4
        logits = fastmka(model, mka, rates, correction, ids)
        print(name, "differs from the base by", float((logits - base).abs().max()))
        save_file({"ids": ids, "logits": logits.contiguous()}, HERE / name / "golden.safetensors")


# A GGUF of the llama architecture, written as llama.cpp's converter does: query and key rows interleaved.


def permute(w, n_head):
    return w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def byte_vocabulary():
    """The 256 byte-level characters of GPT-2, then a few merges and specials."""
    visible = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    chars = {b: chr(b) for b in visible}
    extra = 0
    for b in range(256):
        if b not in chars:
            chars[b] = chr(256 + extra)
            extra += 1
    tokens = [chars[b] for b in range(256)]
    merges = ["t h", "th e", "Ġ the", "i n", "a n", "an d", "Ġ and"]
    tokens += [m.replace(" ", "") for m in merges]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return tokens, merges, specials


def gguf_model():
    import gguf

    tokens, merges, specials = byte_vocabulary()
    vocab = len(tokens) + len(specials)
    common = dict(COMMON, vocab_size=vocab, bos_token_id=vocab - 3, eos_token_id=vocab - 1, hidden_size=64, intermediate_size=96)
    config = LlamaConfig(
        **common, **heads(4, 2), max_position_embeddings=256, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100000.0),
    )
    model = randomise(LlamaForCausalLM(config), 10)
    folder = HERE / "gguf"
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + specials)
    writer.add_token_types([1] * len(tokens) + [3] * len(specials))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocab - 3)
    writer.add_eos_token_id(vocab - 1)
    writer.add_chat_template(
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    rounded = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        w = value.numpy()
        if w.ndim == 1:
            stored, kind = w, gguf.GGMLQuantizationType.F32
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            w = gguf.dequantize(gguf.quantize(w, kind), kind)
            stored = w
            if "q_proj" in key:
                stored = permute(w, 4)
            if "k_proj" in key:
                stored = permute(w, 2)
            stored = gguf.quantize(np.ascontiguousarray(stored), kind)
        rounded[key] = torch.tensor(w)
        if key in names:
            name = names[key]
        else:
            _, _, layer, rest = key.split(".", 3)
            name = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rounded["lm_head.weight"] = rounded["model.embed_tokens.weight"]
    model.load_state_dict(rounded)
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(19))
    write_golden(folder / "golden.safetensors", model, ids)


if __name__ == "__main__":
    families()
    other_families()
    if not NAMED:
        fastmka_models()
        gguf_model()
