"""Writes golden losses and gradients of training, from a plain PyTorch transcription of the equations in float64.

    pip install torch safetensors numpy
    python make_golden_training.py

Reads the seeded models `fastmka` and `fastmka_paper` of this folder. One file a case in `training/`: `ids` (2, 31),
`loss` (1,), and `grad.NAME` for every trained tensor. `latent/` is a model of its own: multi-head latent attention.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
torch.set_default_dtype(torch.float64)


def rms(x, weight, eps=1e-5):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x, theta=10000.0):
    """x (b, t, h, d), half-split."""
    d, t = x.shape[-1], x.shape[1]
    inv = theta ** (-torch.arange(0, d, 2) / d)
    angles = torch.arange(t)[:, None] * inv[None]
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, window=0, sinks=0):
    """q (b, t, h, d), k and v (b, t, g, d): one softmax over the window and the first `sinks` tokens."""
    b, t, h, d = q.shape
    g = k.shape[2]
    k, v = k.repeat_interleave(h // g, 2), v.repeat_interleave(h // g, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
    i, j = torch.arange(t)[:, None], torch.arange(t)[None]
    seen = j <= i
    if window:
        seen &= (i - j < window) | (j < sinks)
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def ema(x, rate, correction):
    """x (b, t, c), the recurrence token by token."""
    e, out = torch.zeros_like(x[:, 0]), []
    for n in range(x.shape[1]):
        e = rate * e + (1 - rate) * x[:, n]
        out.append(e / (1 - rate ** (n + 1)) if correction else e)
    return torch.stack(out, 1)


def decoder(w, c, ids, kind="none", rates=(), correction=True, window=0, sinks=0):
    """Logits of a Llama with the memory `kind` in every layer: the hidden-space equations, as they are published."""
    b, t = ids.shape
    h, g, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p = lambda name: w[f"model.layers.{i}.{name}.weight"]
        n = rms(x, p("input_layernorm"))
        q = n @ p("self_attn.q_proj").T
        heads = lambda y, number: y.view(b, t, number, d)
        attend = lambda n: attention(
            rope(heads(q, h)), rope(heads(n @ p("self_attn.k_proj").T, g)), heads(n @ p("self_attn.v_proj").T, g), window, sinks
        ).reshape(b, t, h * d)
        if kind == "none":
            out = attend(n)
        else:
            m = lambda name: w[f"layers.{i}.{name}"]
            inner = torch.nn.functional.silu(q @ m("router.down.weight").T + m("router.down.bias"))
            share = (inner @ m("router.up.weight").T + m("router.up.bias")).softmax(-1)
            levels = [ema(n, rate, correction) for rate in rates]
            if kind == "fastmka":
                shift = sum(share[..., l + 1 : l + 2] * (level - n) for l, level in enumerate(levels))
                out = attend(n + m("gate") * shift)
            else:
                first = attend(n)
                shift = sum(share[..., l + 1 : l + 2] * (attend(level) - first) for l, level in enumerate(levels))
                out = first + m("gate") * shift
        x = x + out @ p("self_attn.o_proj").T
        n = rms(x, p("post_attention_layernorm"))
        x = x + (torch.nn.functional.silu(n @ p("mlp.gate_proj").T) * (n @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def ids_of(seed, vocab):
    return torch.randint(3, vocab, (2, 31), generator=torch.Generator().manual_seed(seed))


def write(path, w, ids, loss):
    loss.backward()
    out = {"ids": ids, "loss": loss.detach()[None].float()}
    out |= {f"grad.{name}": x.grad.float().contiguous() for name, x in w.items() if x.grad is not None}
    save_file(out, path)
    print(path.relative_to(HERE), float(loss.detach()), len(out) - 2, "gradients")


def cross_entropy(logits, ids):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def fastmka_cases():
    folder = HERE / "training"
    folder.mkdir(exist_ok=True)
    for case, model, kind, window, sinks, distill in [
        ("fastmka", "fastmka", "fastmka", 0, 0, 0.0),
        ("paper", "fastmka_paper", "fastmka", 0, 0, 0.0),
        ("mka", "fastmka", "mka", 0, 0, 0.0),
        ("window", "fastmka", "fastmka", 10, 4, 0.6),
    ]:
        config = json.loads((HERE / model / "config.json").read_text())
        w = load_file(HERE / model / "model.safetensors") | load_file(HERE / model / "mka.safetensors")
        w = {name: x.double().requires_grad_() for name, x in w.items()}
        ids = ids_of(20, config["vocab_size"])
        rates = torch.tensor(config["mka"]["rates"], dtype=torch.float32).double()
        w["rates.logit"] = torch.log(rates / (1 - rates)).requires_grad_()
        rates = torch.sigmoid(w["rates.logit"])
        logits = decoder(w, config, ids[:, :-1], kind, list(rates), config["mka"]["bias_correction"], window, sinks)
        loss = cross_entropy(logits, ids)
        if distill:
            with torch.no_grad():
                teacher = decoder(w, config, ids[:, :-1]).log_softmax(-1)
            kl = (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1).mean()
            loss = (1 - distill) * loss + distill * kl
        write(folder / f"{case}.safetensors", w, ids, loss)


def latent_case():
    """DeepSeek-V2 (arXiv 2405.04434), section 2.1, queries not compressed."""
    folder = HERE / "latent"
    folder.mkdir(exist_ok=True)
    vocab, hidden, h, d, r, rank, inner = 64, 32, 2, 16, 8, 12, 24
    generator = torch.Generator().manual_seed(21)
    noise = lambda *shape, scale=0.3: scale * torch.randn(shape, generator=generator)
    at = "model.layers.0."
    w = {
        "model.embed_tokens.weight": noise(vocab, hidden, scale=1.0),
        at + "input_layernorm.weight": 1 + noise(hidden),
        at + "self_attn.q_proj.weight": noise(h * (d + r), hidden),
        at + "self_attn.kv_a_proj_with_mqa.weight": noise(rank + r, hidden),
        at + "self_attn.kv_a_layernorm.weight": 1 + noise(rank),
        at + "self_attn.kv_b_proj.weight": noise(h * 2 * d, rank),
        at + "self_attn.o_proj.weight": noise(hidden, h * d),
        at + "post_attention_layernorm.weight": 1 + noise(hidden),
        at + "mlp.gate_proj.weight": noise(inner, hidden),
        at + "mlp.up_proj.weight": noise(inner, hidden),
        at + "mlp.down_proj.weight": noise(hidden, inner),
        "model.norm.weight": 1 + noise(hidden),
    }
    w = {name: x.float() for name, x in w.items()}
    save_file(w, folder / "model.safetensors")
    w = {name: x.double().requires_grad_() for name, x in w.items()}
    p = lambda name: w[at + name + ".weight"]
    ids = ids_of(22, vocab)
    x = w["model.embed_tokens.weight"][ids[:, :-1]]
    b, t = x.shape[:2]
    n = rms(x, p("input_layernorm"))
    q = (n @ p("self_attn.q_proj").T).view(b, t, h, d + r)
    q = torch.cat([q[..., :d], rope(q[..., d:])], -1)
    down = n @ p("self_attn.kv_a_proj_with_mqa").T
    kv = (rms(down[..., :rank], p("self_attn.kv_a_layernorm")) @ p("self_attn.kv_b_proj").T).view(b, t, h, 2 * d)
    key = rope(down[..., None, rank:]).expand(b, t, h, r)
    out = attention(q, torch.cat([kv[..., :d], key], -1), kv[..., d:])
    x = x + out.reshape(b, t, h * d) @ p("self_attn.o_proj").T
    n = rms(x, p("post_attention_layernorm"))
    x = x + (torch.nn.functional.silu(n @ p("mlp.gate_proj").T) * (n @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    logits = rms(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T
    write(folder / "golden.safetensors", w, ids, cross_entropy(logits, ids))


if __name__ == "__main__":
    fastmka_cases()
    latent_case()
