"""Writes golden losses and gradients of training, from a plain PyTorch transcription of the equations in float64.

    pip install torch safetensors numpy
    python make_golden_training.py

Reads the seeded models `fastmka` and `fastmka_paper` of this folder. One file a case in `training/`: `ids` (2, t + 1),
`loss` (1,), and `grad.NAME` for every trained tensor. `latent/` is a model of its own: multi-head latent attention.

Recall and the recalled vector are the rules of docs/training.md, query by query. A choice has no gradient, but another
one gives other gradients: the ids of those cases are such that no choice is close, and the script checks it.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
# How far the next vote is below the least that is taken, as a share of it: thirty times what f32 moves one by here.
MARGIN = 3e-4
torch.set_default_dtype(torch.float64)


def rms(x, weight, eps=1e-5):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x, positions=None, theta=10000.0):
    """x (.., t, h, d), half-split, of the tokens 0 to t - 1 or at `positions` (t,)."""
    d, t = x.shape[-1], x.shape[-3]
    positions = torch.arange(t) if positions is None else positions
    inv = theta ** (-torch.arange(0, d, 2) / d)
    angles = positions[:, None] * inv[None]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, seen):
    """q (b, t, h, d), k and v (b, t, g, d), seen (b or 1, h or 1, t, t): one softmax over what each query sees."""
    h, d = q.shape[2:]
    g = k.shape[2]
    k, v = k.repeat_interleave(h // g, 2), v.repeat_interleave(h // g, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def window_and_sinks(t, window=0, sinks=0):
    """(1, 1, t, t): the last `window` tokens, all without a window, and the first `sinks`."""
    i, j = torch.arange(t)[:, None], torch.arange(t)[None]
    seen = j <= i
    if window:
        seen &= (i - j < window) | (j < sinks)
    return seen[None, None]


def votes(queries, keys):
    """queries (n, group, d), keys (m, d) -> (m,): softmax of each head, sum over the group, largest of the queries."""
    shares = (queries @ keys.T / keys.shape[-1] ** 0.5).softmax(-1)
    return shares.sum(1).max(0).values


def most(scores, count):
    """Indexes of the `count` largest. No other may be within MARGIN of them: f32 then chooses the same ones."""
    order = scores.argsort(descending=True)
    if count < len(order):
        last, next_one = scores[order[count - 1]], scores[order[count]]
        margin = float(1 - next_one / last)
        assert margin > MARGIN, f"votes are {margin} apart, expected more than {MARGIN}"
    return order[:count]


def choice(queries, keys, tokens, window):
    """Which `tokens` of the older keys (n, d) the queries (at most a page, group, d) recall, both without RoPE."""
    eights = torch.stack([eight.mean(0) for eight in queries.split(8)])
    eights = rope(eights, torch.full((len(eights),), window))
    candidates = torch.arange(len(keys))
    if len(keys) > 4 * tokens:
        landmarks = keys.unflatten(0, (-1, 8)).mean(1)
        best = most(votes(eights, landmarks), 4 * tokens // 8)
        candidates = (8 * best[:, None] + torch.arange(8)).flatten()
    return candidates[most(votes(eights, keys[candidates]), tokens)]


@torch.no_grad()
def recall(q, k, window, sinks, tokens, chooses):
    """(b, h, t, t) of q (b, t, h, d) and k (b, t, g, d) without RoPE: what is seen with `tokens` recalled.

    Pages of 64 begin behind the sinks and leave the window whole; queries whose windows begin in one choose together.
    """
    b, t, h, _ = q.shape
    group = h // k.shape[2]
    seen = torch.zeros(b, h, t, t, dtype=torch.bool)
    pages = (torch.arange(t) + 1 - window - sinks).div(64, rounding_mode="floor").clamp(min=0)
    for page in range(int(pages[-1]) + 1):
        at = (pages == page).nonzero().flatten()
        start = sinks + 64 * page
        seen[:, :, at, :sinks] = True
        seen[:, :, at, start:] = True
        if 64 * page <= tokens:
            seen[:, :, at, sinks:start] = True
        elif chooses:
            for row in range(b):
                for kv_head in range(k.shape[2]):
                    heads = range(kv_head * group, (kv_head + 1) * group)
                    older = k[row, sinks:start, kv_head]
                    found = sinks + choice(q[row, at][:, heads], older, tokens, window)
                    for head in heads:
                        seen[row, head, at[:, None], found] = True
    return seen & window_and_sinks(t)


def recalled_vector(n, q, k, window):
    """r (b, t, c) of n (b, t, c), q (b, t, h, d) and k (b, t, g, d) without RoPE, token by token."""
    b, t, h, d = q.shape
    chunks = lambda x: torch.stack([chunk.mean(1) for chunk in x[:, : t // 64 * 64].split(64, 1)], 1)
    stored, keys = chunks(n), chunks(k).repeat_interleave(h // k.shape[2], 2)
    out = []
    for i in range(t):
        older = max(i + 1 - window, 0) // 64
        if older == 0:
            out.append(n[:, i])
            continue
        scores = torch.einsum("bhd,bchd->bhc", q[:, i], keys[:, :older]).mean(1) / d**0.5
        out.append(torch.einsum("bc,bcx->bx", scores.softmax(-1), stored[:, :older]))
    return torch.stack(out, 1)


def ema(x, rate, correction):
    """x (b, t, c), the recurrence token by token."""
    e, out = torch.zeros_like(x[:, 0]), []
    for n in range(x.shape[1]):
        e = rate * e + (1 - rate) * x[:, n]
        out.append(e / (1 - rate ** (n + 1)) if correction else e)
    return torch.stack(out, 1)


def decoder(
    w, c, ids, kind="none", rates=(), correction=True, window=0, sinks=0, tokens=0, first_layer=0, vector=False
):
    """Logits of a Llama with the memory `kind` in every layer: the hidden-space equations, as they are published.

    With `tokens`, layers from `first_layer` on recall as many behind the window.
    With `vector`, the recalled vector is one more level.
    """
    b, t = ids.shape
    h, g, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p = lambda name: w[f"model.layers.{i}.{name}.weight"]
        n = rms(x, p("input_layernorm"))
        q = n @ p("self_attn.q_proj").T
        heads = lambda y, number: y.view(b, t, number, d)
        key = lambda n: heads(n @ p("self_attn.k_proj").T, g)

        def attend(n):
            k, v = key(n), heads(n @ p("self_attn.v_proj").T, g)
            if tokens:
                seen = recall(heads(q, h), k, window, sinks, tokens, i >= first_layer)
            else:
                seen = window_and_sinks(t, window, sinks)
            return attention(rope(heads(q, h)), rope(k), v, seen).reshape(b, t, h * d)

        if kind == "none":
            out = attend(n)
        else:
            m = lambda name: w[f"layers.{i}.{name}"]
            inner = torch.nn.functional.silu(q @ m("router.down.weight").T + m("router.down.bias"))
            share = (inner @ m("router.up.weight").T + m("router.up.bias")).softmax(-1)
            levels = [ema(n, rate, correction) for rate in rates]
            levels += [recalled_vector(n, heads(q, h), key(n), window)] if vector else []
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


def ids_of(seed, vocab, length=31):
    return torch.randint(3, vocab, (2, length), generator=torch.Generator().manual_seed(seed))


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
    # The queries of the last page are 20; from five older pages on landmarks are taken first.
    length = 128 + 64 - 1 + 6 * 64 + 20 + 1
    recalling = dict(window=128, sinks=64, tokens=64, first_layer=1)
    vector = dict(window=128, sinks=64, vector=True)
    # Quick ones leave keys of neighbouring tokens apart: with slow ones votes are close.
    slow, quick = [0.9, 0.99, 0.999], [0.1, 0.3, 0.5]
    for case, model, kind, rates, options, distill, (seed, tokens) in [
        ("fastmka", "fastmka", "fastmka", slow, {}, 0.0, (20, 31)),
        ("paper", "fastmka_paper", "fastmka", slow[:1], {}, 0.0, (20, 31)),
        ("mka", "fastmka", "mka", slow, {}, 0.0, (20, 31)),
        ("window", "fastmka", "fastmka", slow, dict(window=10, sinks=4), 0.6, (20, 31)),
        ("recall", "fastmka", "none", slow, recalling, 0.0, (160, length)),
        ("fastmka_recall", "fastmka", "fastmka", slow, recalling, 0.0, (432, length)),
        ("mka_recall", "fastmka", "mka", quick, recalling, 0.0, (587, length)),
        # The recalled vector takes the place of the slowest level in the router.
        ("fastmka_vector", "fastmka", "fastmka", slow[:2], vector, 0.0, (21, length)),
        ("mka_vector", "fastmka", "mka", slow[:2], vector, 0.0, (21, length)),
    ]:
        config = json.loads((HERE / model / "config.json").read_text())
        w = load_file(HERE / model / "model.safetensors") | load_file(HERE / model / "mka.safetensors")
        w = {name: x.double().requires_grad_() for name, x in w.items()}
        ids = ids_of(seed, config["vocab_size"], tokens)
        rates = torch.tensor(rates, dtype=torch.float32).double()
        w["rates.logit"] = torch.log(rates / (1 - rates)).requires_grad_()
        rates = torch.sigmoid(w["rates.logit"])
        logits = decoder(w, config, ids[:, :-1], kind, list(rates), config["mka"]["bias_correction"], **options)
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
    out = attention(q, torch.cat([kv[..., :d], key], -1), kv[..., d:], window_and_sinks(t))
    x = x + out.reshape(b, t, h * d) @ p("self_attn.o_proj").T
    n = rms(x, p("post_attention_layernorm"))
    x = x + (torch.nn.functional.silu(n @ p("mlp.gate_proj").T) * (n @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    logits = rms(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T
    write(folder / "golden.safetensors", w, ids, cross_entropy(logits, ids))


if __name__ == "__main__":
    fastmka_cases()
    latent_case()
