"""The table of `bench_cuda attention` for PyTorch: scaled_dot_product_attention pinned to cuDNN and to FlashAttention-2.

python torch_attention.py
Same shapes, same count of operations, same flush of L2, medians of 21 rounds by CUDA events. Windows run through
aten's flash op with window_size_left: a mask tensor would take another kernel. "n/a" where a backend refuses a row.
"""

import math
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

TOKENS, HEADS, KV_HEADS, ROUNDS = 32_768, 32, 8, 21
FLUSH = torch.empty(32 << 20, dtype=torch.float32, device="cuda")


def median_seconds(work):
    """Median device seconds of `work`, L2 flushed before each round, after three rounds of warm-up."""
    seconds = []
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
            seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def forward_flops(t, d, window):
    """4·b·h·pairs·d, pairs the visible (query, key) pairs of one head: t²/2 under a causal mask."""
    pairs = t * t / 2
    if window is not None and window < t:
        pairs = window * (window + 1) / 2 + (t - window) * window
    return 4 * (TOKENS // t) * HEADS * d * pairs


def cell(work, flops):
    try:
        seconds = median_seconds(work)
    except Exception as error:  # A backend that refuses a shape says so with one of several types.
        torch.cuda.synchronize()
        return f"n/a | n/a | {str(error).splitlines()[0][:80]}"
    return f"{seconds * 1e6:.1f} | {flops / seconds / 1e12:.0f} |"


def random(b, t, h, d, grad=True):
    return torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def dense(backend, d, t, expand):
    """Rows of one backend: K/V heads shared through enable_gqa, or expanded before the clock starts."""
    b = TOKENS // t
    flops = forward_flops(t, d, None)
    kv_heads = HEADS if expand else KV_HEADS
    # SDPA takes (b, h, t, d): views of the layout (b, t, h, d) that our kernels read.
    q, k, v = (random(b, t, h, d) for h in (HEADS, kv_heads, kv_heads))
    views = [x.transpose(1, 2) for x in (q, k, v)]
    dout = random(b, t, HEADS, d, grad=False).transpose(1, 2)

    def forward():
        with sdpa_kernel(backend):
            return sdpa(*views, is_causal=True, scale=1 / math.sqrt(d), enable_gqa=not expand)

    name = f"{backend.name}, {'expanded' if expand else 'gqa'}"
    with torch.no_grad():
        print(f"| {d} | {b} x {t} | - | {name} | forward | {cell(forward, flops)}")
    try:
        out = forward()
    except Exception as error:
        print(f"| {d} | {b} x {t} | - | {name} | backward | n/a | n/a | {str(error).splitlines()[0][:80]}")
        return
    # Gradients are returned, not added into .grad: no kernel but the backward's is timed.
    backward = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    print(f"| {d} | {b} x {t} | - | {name} | backward | {cell(backward, 2.5 * flops)}")


def windowed(d, t, window):
    """Forward and backward of aten's flash op; a query sees itself and `window - 1` keys before it."""
    b = TOKENS // t
    flops = forward_flops(t, d, window)
    q, k, v, dout = (random(b, t, h, d, grad=False) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    sides = {"scale": 1 / math.sqrt(d), "window_size_left": window - 1, "window_size_right": 0}
    ops = torch.ops.aten

    def forward():
        return ops._flash_attention_forward(q, k, v, None, None, t, t, 0.0, True, False, **sides)

    label = f"| {d} | {b} x {t} | {window} | aten flash, gqa |"
    print(f"{label} forward | {cell(forward, flops)}")
    try:
        out, lse, seed, offset, _ = forward()
    except Exception as error:
        print(f"{label} backward | n/a | n/a | {str(error).splitlines()[0][:80]}")
        return
    backward = lambda: ops._flash_attention_backward(
        dout, q, k, v, out, lse, None, None, t, t, 0.0, True, seed, offset, **sides
    )
    print(f"{label} backward | {cell(backward, 2.5 * flops)}")


def main():
    print(
        f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, CUDA {torch.version.cuda}, "
        f"{torch.cuda.get_device_name()}\n"
    )
    print(f"bf16, causal, {HEADS} query heads on {KV_HEADS}; backward counts 2.5 times the forward\n")
    print("| d | b x t | window | backend | pass | µs | TFLOP/s | |\n|---|---|---|---|---|---|---|---|")
    for d in (64, 128):
        for t in (4_096, 8_192, 16_384, 32_768):
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                for expand in (False, True):
                    dense(backend, d, t, expand)
        for window in (1_024, 4_096):
            windowed(d, 16_384, window)


if __name__ == "__main__":
    main()
