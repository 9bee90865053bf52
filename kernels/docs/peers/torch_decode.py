"""One decoded token over 4K and 64K keys with each backend of PyTorch's scaled_dot_product_attention, in µs.

The counterpart of `bench_cuda paged_decode`: the same heads, bf16, the same rounds (three of warm-up, median of 21
between two events), L2 flushed the same way (128 MiB written twice, then read,
before each round: what is only read leaves L2 without being written back while the work runs).

    python torch_decode.py
"""

import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROUNDS = 21
FLUSH_FLOATS = 32 << 20
HEADS = [(32, 8, 128), (9, 3, 64)]
KEYS = [4096, 65536]
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def median_us(work, flush):
    """Median device time of `work` over the rounds."""
    times = []
    for round_idx in range(ROUNDS + 3):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        flush.zero_()
        flush.zero_()
        flush.sum()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if round_idx >= 3:
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def cell(backend, q, k, v, flush):
    """The time with one backend; with K and V repeated per query head, marked so, where it takes no grouped heads."""
    group = q.shape[1] // k.shape[1]
    repeated = (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    refusal = ""
    for keys, values, grouped, mark in [(k, v, True, ""), (*repeated, False, " (K, V repeated)")]:
        try:
            with sdpa_kernel(backend):
                work = lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)
                work()
                return f"{median_us(work, flush):.1f}{mark}"
        except RuntimeError as error:
            refusal = str(error).splitlines()[0]
    return f"refused: {refusal}"


def main():
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return
    print(
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"{torch.cuda.get_device_name()}"
    )
    flush = torch.empty(FLUSH_FLOATS, dtype=torch.float32, device="cuda")
    names = [backend.name for backend in BACKENDS]
    print("| heads | keys | " + " | ".join(names) + " |")
    print("|---" * (2 + len(names)) + "|")
    torch.manual_seed(1)
    for h, g, d in HEADS:
        for keys in KEYS:
            make = lambda heads, tokens: torch.randn(1, heads, tokens, d, dtype=torch.bfloat16, device="cuda")
            q, k, v = make(h, 1), make(g, keys), make(g, keys)
            cells = [cell(backend, q, k, v, flush) for backend in BACKENDS]
            print(f"| {h}/{g} x {d} | {keys} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    with torch.no_grad():
        main()
