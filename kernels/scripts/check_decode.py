"""Decode over pages: the 16-bit kernels that meet in memory and, on compute capability 9.0, in clusters.

The part `decode` of check_kernels.py. Knows `DecodeParams` of `kernels/cuda/decode_params.cuh` and the choice of kernel
and splits of `kernels/src/attention/cuda/decode.rs`: what changes there changes here.
"""

import math
import struct

import torch
import torch.nn.functional as F
from card import CUDA, SUFFIX, cdiv, compiled_modules, copy_rate, median_us

LOG2_E, NONE = 1.4426950408889634, 2**64 - 1
INLINE_PAGES, MAX_DECODE_TOKENS, DECODE_ROWS, MAX_SPLITS, CLUSTER = 200, 16, 8, 256, 8
MAX_CLUSTER_BYTES = 48 << 20
MEMORY, CLUSTERS = "paged_decode_sm80", "paged_decode_sm90"
TYPES = (torch.bfloat16, torch.float16)
# Heads, key/value heads, head_dim, keys; splits to time where they meet in memory, and in clusters.
SHAPES = [
    (9, 3, 64, 4096, [32, 64], [32, 64]),
    (32, 8, 128, 4096, [16, 32], [16, 32]),
    (9, 3, 64, 65536, [128, 176], [88, 128, 152]),
    (32, 8, 128, 32768, [32, 48], [32]),
    (32, 8, 128, 65536, [32, 48], [32]),
    (32, 8, 128, 131072, [32, 48], [32]),
    (32, 8, 64, 32768, [64], [32, 48]),
    (32, 8, 64, 65536, [64], [32, 48]),
]


def first_visible(i, query_start, window, sliding):
    """First position, less that of the first query, that query token i sees."""
    end = query_start + i + 1
    by_page = (end - window) // 64 * 64 if end > window else 0
    by_token = end - sliding if end > sliding else 0
    return max(max(by_page, by_token) - query_start, -(1 << 30))


class Case:
    """Queries over pages in random slots. `pages`: (start position, tokens, bias of natural scores) of each."""

    def __init__(self, h, g, d, dtype, pages, t=1, query_start=None, window=NONE, sliding=NONE):
        self.h, self.g, self.d, self.dtype, self.t, self.group = h, g, d, dtype, t, h // g
        self.query_start = pages[-1][0] + pages[-1][1] - t if query_start is None else query_start
        self.first = [first_visible(i, self.query_start, window, sliding) for i in range(t)]
        self.tiles = cdiv(t * self.group, DECODE_ROWS)
        slots = len(pages) + 3
        order = torch.randperm(slots)[: len(pages)].tolist()
        self.pages = [(slot, start - self.query_start, n, bias * LOG2_E) for slot, (start, n, bias) in zip(order, pages)]
        self.keys, self.values = (torch.randn(slots, g, 64, d, device=CUDA, dtype=dtype) for _ in range(2))
        for slot, _, n, _ in self.pages:
            if n < 64:
                self.keys[slot, :, n:], self.values[slot, :, n:] = math.nan, math.nan
        self.q = torch.randn(t, h, d, device=CUDA, dtype=dtype)
        self.out, self.lse = torch.empty_like(self.q), torch.empty(t, h, device=CUDA)
        self.counters = torch.zeros(4096, dtype=torch.int32, device=CUDA)
        words = [struct.unpack("<4i", struct.pack("<IiIf", *page)) for page in self.pages]
        self.table = torch.tensor(words, dtype=torch.int32).to(CUDA)
        self.bytes = 2 * sum(n for _, n, _ in pages) * g * d * 2

    def lists(self):
        return ["table"] + ["inline"] * (len(self.pages) <= INLINE_PAGES)

    def ends(self, modules):
        return [end for end in modules if end == MEMORY or self.d <= 128]

    def work(self, modules, end, splits, kind):
        """The launch of the kernel that ends so, as a function without arguments."""
        parts = self.g * self.tiles * (splits // CLUSTER if end == CLUSTERS else splits)
        partial = torch.full((parts * DECODE_ROWS * (self.d + 2),), math.nan, device=CUDA)
        tensors = (self.q, self.keys, self.values, self.out, self.lse, partial, self.counters, self.table)
        params = struct.pack("<8Q", *(x.data_ptr() for x in tensors))
        params += struct.pack("<16i", *self.first, *[0] * (MAX_DECODE_TOKENS - self.t))
        params += struct.pack("<7If", self.t, self.h, self.g, self.group, len(self.pages), self.tiles, splits,
                              self.d**-0.5 * LOG2_E)
        params += struct.pack("<4I", 65536 // self.group + 1, *divmod(len(self.pages), splits), 0)
        if kind == "inline":
            params += b"".join(struct.pack("<IiIf", *page) for page in self.pages)
            params += b"\0" * (176 + 16 * INLINE_PAGES - len(params))
        name = f"paged_decode_{kind}_{SUFFIX[self.dtype]}_{self.d}"
        launch = modules[end].prepare(name, (self.g, splits, self.tiles), 128, params)
        return lambda kept=partial: launch()

    def expected(self, dtype=torch.float64):
        """Output and lse from the definition."""
        parts = [(self.keys[s, :, :n], self.values[s, :, :n]) for s, _, n, _ in self.pages]
        k, v = (torch.cat([x[i] for x in parts], 1).to(dtype).repeat_interleave(self.group, 0) for i in range(2))
        at = torch.cat([torch.arange(n) + start for _, start, n, _ in self.pages]).to(CUDA)
        bias = torch.cat([torch.full((n,), b / LOG2_E, dtype=dtype) for _, _, n, b in self.pages]).to(CUDA)
        scores = torch.einsum("thd,hkd->thk", self.q.to(dtype), k) * self.d**-0.5 + bias
        first = torch.tensor(self.first, device=CUDA)[:, None]
        token = torch.arange(self.t, device=CUDA)[:, None]
        scores = scores.masked_fill(((at[None] < first) | (at[None] > token))[:, None], -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        return torch.einsum("thk,hkd->thd", weights, v), torch.logsumexp(scores, -1)


def error(got, expected):
    """Largest difference over the largest value expected; NaN is infinite, and so is an infinity in one alone."""
    same = got.double() == expected
    difference = (got.double() - expected).abs().masked_fill(same, 0.0).nan_to_num(math.inf, math.inf, math.inf)
    return float(difference.max() / expected.masked_fill(expected.isinf(), 0.0).abs().max().clamp(min=1e-6))


def cases():
    def pages(n, last=64, bias=0.0, start=0):
        return [(start + 64 * i, 64 if i + 1 < n else last, bias) for i in range(n)]

    for dtype in TYPES:
        for d in (64, 96, 128, 256):
            for group, g in ((1, 2), (3, 3), (4, 2), (7, 1), (8, 1), (16, 1)):
                yield f"9 pages, group {group}", Case(group * g, g, d, dtype, pages(9, 33))
            yield "one token", Case(3, 1, d, dtype, pages(1, 1))
            yield "127 pages", Case(4, 1, d, dtype, pages(127, 5))
            yield "203 pages", Case(3, 1, d, dtype, pages(203, 7))
            yield "tokens", Case(4, 2, d, dtype, pages(5, 20), t=7 if d < 128 else 4)
            yield "tokens, odd group", Case(6, 2, d, dtype, pages(40, 63), t=5)
            yield "window", Case(6, 2, d, dtype, pages(20, 17), t=2, window=500)
            yield "sliding", Case(8, 2, d, dtype, pages(20, 50), t=3, sliding=333)
            recalled = [(1000 + 640 * i + 64 * (i % 3), 64 - i % 2 * 31, 0.5 * i - 1) for i in range(6)]
            mixed = recalled + pages(7, 40, 0.25, 100_000)
            yield "recalled, bias", Case(9, 3, d, dtype, mixed)
            yield "recalled, window", Case(9, 3, d, dtype, mixed, t=2, window=98_000)
            # Rows that see nothing: queries before every key.
            yield "nothing seen", Case(4, 2, d, dtype, pages(3, 64, 0.0, 640), query_start=100)


def check(modules):
    """Both ends against f64 with poisoned outputs, parts and ends of pages, twice for the same bits."""
    fine, worst, bad = dict.fromkeys(modules, 0), dict.fromkeys(modules, 0.0), []
    for what, case in cases():
        out, lse = case.expected()
        bound = 2 * error(out.to(case.dtype), out) + 3e-3 * (4 if case.dtype == torch.bfloat16 else 1)
        for end in case.ends(modules):
            for kind in case.lists():
                for splits in (1, 3, 8, 16, 32) if end == MEMORY else (8, 16, 24, 40, 72):
                    if splits > max(2 * len(case.pages), CLUSTER):
                        continue
                    run, first, same = case.work(modules, end, splits, kind), None, True
                    for _ in range(2):
                        case.out.fill_(math.nan)
                        case.lse.fill_(math.nan)
                        run()
                        torch.cuda.synchronize()
                        same = same and (first is None or torch.equal(first, case.out))
                        first = case.out.clone()
                    errors = error(case.out, out), error(case.lse, lse)
                    zero = not int(case.counters.abs().sum())
                    worst[end] = max(worst[end], errors[0] / bound)
                    if errors[0] <= bound and errors[1] <= 1e-3 and same and zero:
                        fine[end] += 1
                    else:
                        bad.append(f"{what} {case.dtype} {case.d} {end} {kind} {splits}: out {errors[0]:.1e} of "
                                   f"{bound:.1e}, lse {errors[1]:.1e}, same bits {same}, counters at zero {zero}")
                        case.counters.zero_()
    for end in modules:
        print(f"{end}: {fine[end]} launches as good as they must be, worst error {worst[end]:.2f} of its bound")
    print(f"failed: {len(bad)}")
    for line in bad[:40]:
        print("FAIL", line)
    return not bad


def planned(case, has_clusters):
    """The end and the splits that `decode.rs` takes."""
    pages, tiles = len(case.pages), case.g * case.tiles
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    even = lambda splits: cdiv(pages, cdiv(pages, splits))
    wave = processors * (2 if case.d == 128 else 3) // tiles // CLUSTER
    if has_clusters and case.d <= 128 and pages * 64 * case.g * case.d * 4 <= MAX_CLUSTER_BYTES and wave:
        return CLUSTERS, cdiv(even(max(min(wave, pages // CLUSTER), 1) * CLUSTER), CLUSTER) * CLUSTER
    wave = processors * (4 if case.d < 128 else 2) // tiles
    splits = min(wave, max(2 * processors // tiles, 128), pages // 2)
    return MEMORY, even(max(1, min(splits, MAX_SPLITS)))


def peers(case, keys):
    """cuDNN's and flash's time over contiguous keys, in µs; NaN where one refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    make = lambda heads, tokens: torch.randn(1, heads, tokens, case.d, dtype=torch.bfloat16, device=CUDA)
    q, k, v = make(case.h, 1), make(case.g, keys), make(case.g, keys)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend), torch.no_grad():
                work = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                work()
                yield median_us(work, 21)
        except RuntimeError:
            yield math.nan


def bench(modules):
    """The engine's choice beside other splits and PyTorch over contiguous keys; False if a result is wrong."""
    rate, good = copy_rate(), True
    print("| heads x head_dim | keys | MB | in memory, µs (splits) | in clusters, µs (splits) | ours | of copy | cuDNN µs "
          "| flash µs | ours / cuDNN |\n" + "|---" * 10 + "|")
    for h, g, d, keys, in_memory, in_clusters in SHAPES:
        case = Case(h, g, d, torch.bfloat16, [(64 * i, 64, 0.0) for i in range(keys // 64)])
        expected = case.expected(torch.float32)[0].double()
        chosen, cells, ours = planned(case, CLUSTERS in modules), [], math.nan
        for end, splits in ((MEMORY, in_memory), (CLUSTERS, in_clusters)):
            if end not in modules:
                cells.append("")
                continue
            times = []
            for s in sorted({*splits, chosen[1]} if chosen[0] == end else splits):
                run = case.work(modules, end, s, case.lists()[-1])
                case.out.fill_(math.nan)
                us = median_us(run, 21)
                right = error(case.out, expected) <= 2e-2
                good &= right
                times.append(f"{us:.1f} ({s}){'' if right else ' WRONG'}")
                if (end, s) == chosen:
                    ours = us
            cells.append(", ".join(times))
        cudnn, flash = peers(case, keys)
        print(f"| {h}/{g} x {d} | {keys} | {case.bytes >> 20} | {' | '.join(cells)} | {ours:.1f} | "
              f"{case.bytes / ours * 1e6 / rate:.2f} | {cudnn:.1f} | {flash:.1f} | {ours / cudnn:.2f} |", flush=True)
    return good


def decode(checks):
    """Few query tokens over pages in random slots: every kind of list and end, then the times of several splits."""
    stems = [MEMORY] + [CLUSTERS] * (torch.cuda.get_device_capability() == (9, 0))
    modules = compiled_modules(stems)
    good = check(modules)
    return good if checks else bench(modules) and good
