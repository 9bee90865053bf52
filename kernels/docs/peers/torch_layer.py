"""The table of `bench_cuda layer` for PyTorch: a GQA layer with cuDNN attention, and FastMKA as it is published.

python torch_layer.py [--lengths 2048,4096,8192,16384,32768] [--tokens 32768] [--no-loop]
The same shapes, tokens, flush of L2 and rounds; bf16, RMS norms in f32, RoPE from tables. "loop" is FastMKA on the hidden
states with the EMA as a loop over tokens, state in bf16, which is how the published implementation runs it: two levels
beside the token's own, router of half the query width. It is timed once a row, up to 8,192 tokens of one stream (a step
of more than 8,192 tokens in all up to 4,096).
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROUNDS, LOOP_TOKENS = 7, 8_192
RATE = 0.9
SHAPES = {"1B": (2048, 8192, 32, 8, 64), "7B": (3584, 18_944, 28, 4, 128)}
FLUSH = torch.empty(32 << 20, dtype=torch.float32, device="cuda")


def median_ms(work):
    times = []
    for round_ in range(ROUNDS + 3):
        FLUSH.zero_()
        FLUSH.zero_()
        FLUSH.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if round_ >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def rms_norm(x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Layer(torch.nn.Module):
    def __init__(self, hidden, inner, heads, kv_heads, head_dim, t):
        super().__init__()
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False, dtype=torch.bfloat16, device="cuda")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        q_size, kv_size = heads * head_dim, kv_heads * head_dim
        self.q, self.k, self.v = linear(hidden, q_size), linear(hidden, kv_size), linear(hidden, kv_size)
        self.o = linear(q_size, hidden)
        self.gate, self.up, self.down = linear(hidden, inner), linear(hidden, inner), linear(inner, hidden)
        self.router_down, self.router_up = linear(q_size, q_size // 2), linear(q_size // 2, 3)
        angles = torch.arange(t, device="cuda")[:, None] * 10_000 ** (
            -torch.arange(head_dim // 2, device="cuda") * 2 / head_dim
        )
        self.cos, self.sin = (f(angles).to(torch.bfloat16)[None, None] for f in (torch.cos, torch.sin))

    def rotate(self, x):
        low, high = x.chunk(2, -1)
        return torch.cat((low * self.cos - high * self.sin, high * self.cos + low * self.sin), -1)

    def mixed(self, x, q):
        """λ_1 x + λ_2 EMA(x) + λ_3 session, the last zero; the EMA token by token."""
        weights = torch.softmax(self.router_up(F.silu(self.router_down(q))), -1)
        state, levels = torch.zeros_like(x[:, 0]), []
        for i in range(x.shape[1]):
            state = RATE * state + (1 - RATE) * x[:, i]
            levels.append(state)
        return weights[..., :1] * x + weights[..., 1:2] * torch.stack(levels, 1)

    def forward(self, x, fastmka=False):
        b, t, _ = x.shape
        normed = rms_norm(x)
        q = self.q(normed)
        source = self.mixed(normed, q) if fastmka else normed
        heads = lambda x, h: x.view(b, t, h, self.head_dim).transpose(1, 2)
        q, k = self.rotate(heads(q, self.heads)), self.rotate(heads(self.k(source), self.kv_heads))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, heads(self.v(source), self.kv_heads), is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).reshape(b, t, -1))
        normed = rms_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def once_ms(work):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default="2048,4096,8192,16384,32768", help="tokens of a stream")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of a row: batch times length")
    parser.add_argument("--no-loop", action="store_true", help="leave out the published loop")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}; ms")
    print("| layer | b x t | pass | GQA, cuDNN | published loop |\n|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for t in map(int, args.lengths.split(",")):
            b = args.tokens // t
            if b == 0:
                continue
            layer = Layer(*shape, t)
            x = torch.randn(b, t, shape[0], device="cuda", dtype=torch.bfloat16, requires_grad=True)

            def step(fastmka=False, x=x):
                layer(x, fastmka).float().sum().backward()

            with torch.no_grad():
                forward = median_ms(lambda: layer(x))
                loop = "-"
                if t <= LOOP_TOKENS and not args.no_loop:
                    loop = f"{once_ms(lambda: layer(x, True)):.1f}"
            print(f"| {name} | {b} x {t} | forward | {forward:.2f} | {loop} |")
            loop = "-"
            full = median_ms(step)
            if (t <= 4096 or b * t <= LOOP_TOKENS) and not args.no_loop:
                loop = f"{once_ms(lambda: step(True)):.1f}"
            print(f"| {name} | {b} x {t} | step | {full:.2f} | {loop} |", flush=True)
            del layer, x


if __name__ == "__main__":
    main()
