"""Training throughput of SmolLM2-135M's shape in PyTorch: adapters on q, k, v and o, causal SDPA, bf16.

python torch_train.py [--tokens 8192] [--batch 1] [--steps 20] [--recompute] [--full]

Weights are random: the speed does not depend on them. Frozen weights are bf16, adapters f32 under autocast, AdamW fused;
the loss is cross-entropy over the whole vocabulary. Prints tokens/s after five steps, and the peak memory.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM = 49_152, 576, 1_536, 30, 9, 3, 64


class Adapted(nn.Module):
    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.02)
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5) if rank else None
        self.b = nn.Parameter(torch.zeros(outputs, rank)) if rank else None

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y if self.a is None else y + 2.0 * F.linear(F.linear(x, self.a), self.b)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Layer(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN, 1e-5), nn.RMSNorm(HIDDEN, 1e-5)
        self.q = Adapted(HIDDEN, HEADS * DIM, rank)
        self.k = Adapted(HIDDEN, KV_HEADS * DIM, rank)
        self.v = Adapted(HIDDEN, KV_HEADS * DIM, rank)
        self.o = Adapted(HEADS * DIM, HIDDEN, rank)
        self.gate, self.up = Adapted(HIDDEN, INNER, 0), Adapted(HIDDEN, INNER, 0)
        self.down = Adapted(INNER, HIDDEN, 0)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        y = self.norm1(x)
        q = rotate(self.q(y).view(b, t, HEADS, DIM).transpose(1, 2), cos, sin)
        k = rotate(self.k(y).view(b, t, KV_HEADS, DIM).transpose(1, 2), cos, sin)
        v = self.v(y).view(b, t, KV_HEADS, DIM).transpose(1, 2)
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, HEADS * DIM))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recompute", action="store_true", help="keep only the inputs of layers")
    parser.add_argument("--full", action="store_true", help="train every weight instead of adapters")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank = 0 if args.full else 16
    embedding = nn.Parameter((torch.randn(VOCAB, HIDDEN) * 0.02).to(device))
    layers = nn.ModuleList(Layer(rank) for _ in range(LAYERS)).to(device)
    norm = nn.RMSNorm(HIDDEN, 1e-5).to(device)
    trained = [embedding, *layers.parameters(), *norm.parameters()]
    if not args.full:
        adapters = [p for name, p in layers.named_parameters() if name.endswith((".a", ".b"))]
        for parameter in {*trained} - {*adapters}:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.bfloat16)
        trained = adapters
    optimizer = torch.optim.AdamW(trained, 3e-4, weight_decay=0.0, fused=device == "cuda")
    inverse = 1.0 / 100_000.0 ** (torch.arange(0, DIM, 2, device=device) / DIM)
    angles = torch.outer(torch.arange(args.tokens, device=device), inverse)
    cos, sin = angles.cos(), angles.sin()
    ids = torch.randint(0, VOCAB, (args.batch, args.tokens + 1), device=device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if device == "cpu" else SDPBackend.FLASH_ATTENTION
        ):
            x = F.embedding(ids[:, :-1], embedding)
            for layer in layers:
                if args.recompute:
                    x = checkpoint(layer, x, cos, sin, use_reentrant=False)
                else:
                    x = layer(x, cos, sin)
            logits = F.linear(norm(x), embedding).float().flatten(0, 1)
            loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss

    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times = []
    for _ in range(args.steps + 5):
        start = time.perf_counter()
        step().item()
        sync()
        times.append(time.perf_counter() - start)
    rest = sorted(times[5:])
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(
        f"torch {torch.__version__}, {name}: {args.batch} x {args.tokens} tokens, recompute {args.recompute}, "
        f"full {args.full}: {args.batch * args.tokens / rest[len(rest) // 2]:.0f} tokens/s "
        f"(median of {args.steps} steps), peak {peak:.0f} MiB"
    )


if __name__ == "__main__":
    main()
