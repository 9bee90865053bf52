"""Checks and times kernels of `kernels/cuda` where there is a card, nvcc and PyTorch but no Rust.

python3 check_kernels.py [--checks] [--cubins DIR] [route] [ema] [decode] [backward]

Compiles each file for the card with nvcc, launches it through the driver on PyTorch's memory, compares with f64 and
prints a table; --checks leaves the tables out (for compute-sanitizer). Of files that lie compiled in DIR, as
`nvcc -cubin` leaves them, it takes those. Knows the parameter structs of the .cu files:
a struct that changes there changes here.
"""

import math
import os
import re
import struct
import sys

import torch
from card import CUDA, SOURCES, SUFFIX, Module, address, cdiv, compiled_modules, error, median_us, poisoned
from check_decode import decode

RATES = [0.9, 0.99, 0.999, 0.0]


def report(name, errors, bounds):
    good = all(e <= b for e, b in zip(errors, bounds))
    print("ok  " if good else "FAIL", name, " ".join(f"{e:.1e}" for e in errors), flush=True)
    return good


def divisor(by):
    shift = (by - 1).bit_length()
    return struct.pack("<3I", by, -(-(1 << (31 + shift)) // by), shift)


class Tiles:
    """How the blocks of a pass ("append", "forward" or "backward") divide the work, as `Tiles` of
    `kernels/src/route/projected/cuda.rs`."""

    def __init__(self, direction, dtype, t, d, m, normed):
        size, tensors = dtype.itemsize, 2 if direction == "backward" else 1
        lanes = max(8, 1 << (cdiv(d, 8) - 1).bit_length())
        self.threads, self.run, self.heads, self.rates = 128, 8, 1, 0 if direction == "append" else 4
        if direction != "append" and size == 2 and m <= 3 and not normed and lanes <= 16:
            self.rates = 3
            if direction == "forward":
                self.threads, self.run, self.heads = 256, 16, 2
        self.file = "route_" + ("backward" if direction == "backward" else "forward")
        self.kernel = f"{self.file}_{SUFFIX[dtype]}_{self.rates}_{lanes}"
        runs, self.channels = self.threads // (lanes * self.heads), 8 * lanes * self.heads
        self.rows = runs * self.run
        self.shared = tensors * runs * (self.run * self.channels * size + 4 * lanes * size % 128)
        if self.rates:
            weights = (16 if self.rates == 3 else 32) + (16 if tensors == 2 else 0)
            self.shared += runs * (self.run + 1) * weights + runs * self.rates * self.channels * 4 + 16
        self.chunks = cdiv(t, self.rows)
        self.groups = lambda g: 2 * cdiv(g, self.heads)


class Route:
    """One call of the projected route, as `kernels/src/route/projected/cuda.rs` launches it."""

    POINTERS = (
        "keys values logits state gate bias norm cosine sine out_keys out_raw out_values new_state carries dkeys dvalues "
        "dkv dstate dweights dbias dnorm dlogits dgate gate_shares sums prefixes epoch flags seen row_stride"
    ).split()

    def __init__(self, modules, shape, m, dtype, extras="", seen=0, correct=True):
        self.modules, self.shape, self.m, self.dtype, self.seen, self.correct = modules, shape, m, dtype, seen, correct
        b, t, g, d = shape
        random = lambda *dims: torch.randn(*dims, device=CUDA)
        self.kv, self.logits = random(b, t, 2, g, d).to(dtype), random(b, t, 1 + m)
        self.state, self.gate = random(b, m, 2, g, d), torch.tensor([0.7], device=CUDA)
        self.rates = torch.tensor(RATES[:m])
        self.bias = random(2, g, d) * 0.3 if "bias" in extras else None
        self.norm = torch.rand(d, device=CUDA) + 0.5 if "norm" in extras else None
        self.cosine, self.sine = tables(torch.arange(t, device=CUDA) + seen, d)
        self.front, self.back, self.plain = (
            Tiles(direction, dtype, t, d, m, "norm" in extras) for direction in ("forward", "backward", "append")
        )
        self.out, self.new_state = poisoned(2, b, t, g, d, dtype=dtype), poisoned(b, m, 2, g, d)
        self.carries = poisoned(b * self.back.chunks, m, 2, g, d)
        self.dout = random(2, b, t, g, d).to(dtype)
        self.dkv, self.dlogits = poisoned(b, t, 2, g, d, dtype=dtype), poisoned(b, t, 1 + m)
        self.dstate, self.dgate = poisoned(b, m, 2, g, d), poisoned(1)
        self.dweights, self.gate_shares = poisoned(2 * g, b, t, 1 + m), poisoned(cdiv(b * t, 64))
        share = lambda wanted: poisoned(b * self.back.chunks, 2 * g * d) if wanted else None
        self.dbias, self.dnorm = share("bias" in extras), share("norm" in extras)

    def launch(self, tiles, **more):
        """Prepares a launch: nothing of this is in the times."""
        b, t, g, d = self.shape
        blocks = b * tiles.groups(g) * tiles.chunks
        rooms = [poisoned(blocks * tiles.rates * tiles.channels) for _ in range(2)]
        at = dict(
            keys=self.kv, values=self.kv.data_ptr() + g * d * self.kv.element_size(), logits=self.logits,
            state=self.state, gate=self.gate, rates=self.rates.tolist(), bias=self.bias, norm=self.norm,
            cosine=self.cosine, sine=self.sine, sums=rooms[0], prefixes=rooms[1], seen=self.seen, row_stride=2 * g * d,
            batch=b, tokens=t, heads=g, d=d, m=self.m, carry_rows=self.back.rows, correct=self.correct,
        )
        params = route_params(at | more, tiles)
        module = self.modules[tiles.file]
        run = lambda: (module.launch(tiles.kernel, (blocks, 1, 1), tiles.threads, params, tiles.shared), rooms)
        return run, params

    def forward(self, carries=True, scan=True):
        out = dict(out_keys=self.out[0], out_values=self.out[1], new_state=self.new_state)
        tiles = self.front if scan else self.plain
        return self.launch(tiles, carries=self.carries if carries else None, **out)[0]

    def backward(self):
        run, params = self.launch(
            self.back, carries=self.carries, dkeys=self.dout[0], dvalues=self.dout[1], dkv=self.dkv, dstate=self.dstate,
            dweights=self.dweights, dbias=self.dbias, dnorm=self.dnorm, dlogits=self.dlogits, dgate=self.dgate,
            gate_shares=self.gate_shares,
        )
        logits = lambda: self.modules["route_backward"].launch("route_logits", (len(self.gate_shares), 1, 1), 256, params)
        return lambda: (run(), logits())

    def expected(self):
        """Inputs with history, keys, values and state in f64; the EMA in closed form, 64 tokens at a time."""
        b, t, g, d = self.shape
        tensors = [self.kv, self.logits, self.state, self.gate, self.bias, self.norm]
        inputs = [None if x is None else x.double().requires_grad_(True) for x in tensors]
        kv, logits, state, gate, bias, norm = inputs
        weights = torch.softmax(logits, -1)
        tokens = torch.arange(1, t + 1, device=CUDA, dtype=torch.float64) + self.seen
        moved, states = 0, []
        for l in range(self.m):
            rate, last, levels = self.rates[l].double().to(CUDA), state[:, l], []
            i = torch.arange(64, device=CUDA, dtype=torch.float64)
            apart = i[:, None] - i[None, :]
            kernel = torch.where(apart >= 0, (1 - rate) * rate ** apart.clamp(min=0), torch.zeros_like(apart))
            for first in range(0, t, 64):
                x = kv[:, first : first + 64]
                n = x.shape[1]
                level = torch.einsum("ij,bj...->bi...", kernel[:n, :n], x)
                level = level + (rate ** (i[:n] + 1)).view(1, n, 1, 1, 1) * last[:, None]
                levels.append(level)
                last = level[:, -1]
            states.append(last)
            level = torch.cat(levels, 1)
            if self.correct:
                level = level / (1 - rate**tokens).view(1, t, 1, 1, 1)
            moved = moved + weights[..., l + 1].view(b, t, 1, 1, 1) * (level - kv)
        y = kv + gate * moved + (0 if bias is None else bias)
        keys, values = y[:, :, 0], y[:, :, 1]
        if norm is not None:
            keys = keys * torch.rsqrt(keys.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
        return inputs, rotated(keys, self.cosine.double(), self.sine.double()), values, torch.stack(states, 1)

    def check(self):
        b, t, g, d = self.shape
        forward, backward = self.forward(), self.backward()
        forward()
        first = self.out.clone()
        forward()
        inputs, keys, values, state = self.expected()
        backward()
        first_gradients = (self.dkv.clone(), self.dlogits.clone(), self.dgate.clone())
        backward()
        torch.cuda.synchronize()
        same = torch.equal(first, self.out)
        same = same and all(map(torch.equal, first_gradients, (self.dkv, self.dlogits, self.dgate)))
        dout = self.dout.double()
        wanted = [x for x in inputs if x is not None]
        gradients = torch.autograd.grad((keys * dout[0]).sum() + (values * dout[1]).sum(), wanted)
        plain = lambda x: 2 * error(x.to(self.dtype), x) + 1e-5
        errors = [error(self.out[0], keys), error(self.out[1], values), error(self.new_state, state)]
        bounds = [plain(keys), plain(values), 1e-5]
        for got, expected in zip([self.dkv, self.dlogits, self.dstate, self.dgate], gradients):
            errors.append(error(got, expected))
            bounds.append(plain(expected) + 1e-4 if got is self.dkv else 1e-4)
        if self.bias is not None:
            errors.append(error(self.dbias.sum(0).view(2, g, d), gradients[4]))
            bounds.append(1e-4)
        if self.norm is not None:
            errors.append(error(self.dnorm.sum(0).view(2 * g, d).sum(0), gradients[-1]))
            bounds.append(1e-4)
        extras = "+".join(name for name in ("bias", "norm") if getattr(self, name) is not None)
        name = f"route {self.shape} {self.m} {SUFFIX[self.dtype]} {extras}"
        return report(name, errors + [0.0 if same else 1.0], bounds + [0.0])


# The epoch of the launches, then the flags of chunks: zeros at first, kept from launch to launch.
FLAGS = []


def route_params(values, tiles):
    if not FLAGS:
        FLAGS.append(torch.zeros(1 << 17, dtype=torch.int32, device=CUDA))
    values = values | dict(epoch=FLAGS[0], flags=FLAGS[0].data_ptr() + 8)
    bytes_ = b"".join(struct.pack("<Q", address(values.get(name))) for name in Route.POINTERS)
    bytes_ += b"".join(struct.pack("<I", values.get(name, 0)) for name in "batch tokens heads d m".split())
    bytes_ += struct.pack("<I", tiles.chunks)
    groups = tiles.groups(values["heads"])
    bytes_ += divisor(values["batch"] * groups) + divisor(groups)
    bytes_ += b"".join(struct.pack("<I", values.get(name, 0)) for name in "carry_rows correct paged offset".split())
    rates = values.get("rates", []) + [0.0] * (4 - len(values.get("rates", [])))
    bytes_ += struct.pack("<5f", 1e-6, *rates)
    bytes_ += struct.pack("<4f", *[math.log(rate) if rate > 0 else -math.inf for rate in rates])
    for tokens in (tiles.run, tiles.rows):
        bytes_ += struct.pack("<4f", *[rate**tokens for rate in rates])
    bytes_ += b"".join(struct.pack("<17f", *[rate**n for n in range(17)]) for rate in rates)
    slots = values.get("slots", [])
    return bytes_ + struct.pack("<256I", *(slots + [0] * (256 - len(slots))))


def tables(positions, d):
    angles = positions.double()[:, None] * 10_000 ** (-torch.arange(d // 2, device=CUDA, dtype=torch.float64) * 2 / d)
    return angles.cos().float(), angles.sin().float()


def rotated(x, cosine, sine):
    low, high = x.chunk(2, -1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)


def check_append(module, t, g, d, offset):
    keys, values = torch.randn(t, g, d, device=CUDA), torch.randn(t, g, d, device=CUDA)
    slots = [(i * 5 + 3) % 7 for i in range(cdiv(offset + t, 64))]
    pools = [poisoned(7, g, 64, d) for _ in range(3)]
    cosine, sine = tables(torch.arange(t, device=CUDA) + offset, d)
    tiles = Tiles("append", torch.float32, t, d, 0, False)
    params = route_params(dict(
        keys=keys, values=values, cosine=cosine, sine=sine, out_keys=pools[0], out_raw=pools[1], out_values=pools[2],
        row_stride=g * d, batch=1, tokens=t, heads=g, d=d, carry_rows=64, paged=1, offset=offset, slots=slots,
    ), tiles)
    module.launch(tiles.kernel, (2 * g * tiles.chunks, 1, 1), tiles.threads, params, tiles.shared)
    at = torch.arange(offset, offset + t, device=CUDA)
    slot = torch.tensor(slots, device=CUDA)[at // 64]
    errors = [error(pool[slot, :, at % 64], x.double())
              for pool, x in zip(pools, [rotated(keys, cosine, sine), keys, values])]
    elsewhere = sum(int((~pool.isnan()).sum()) - t * g * d for pool in pools)
    return report(f"append {(t, g, d, offset)}", errors + [abs(elsewhere)], [1e-6, 0.0, 0.0, 0])


def check_into_pages(modules, t, d, offset):
    """The route of one stream into pages of bf16 holds what it holds in tensors."""
    case = Route(modules, (1, t, 2, d), 3, torch.bfloat16)
    case.forward()()
    slots = [(i * 5 + 3) % 7 for i in range(cdiv(offset + t, 64))]
    pools = [poisoned(7, 2, 64, d, dtype=torch.bfloat16) for _ in range(3)]
    case.launch(case.front, out_keys=pools[0], out_raw=pools[1], out_values=pools[2], new_state=case.new_state, paged=1,
                offset=offset, slots=slots)[0]()
    at = torch.arange(offset, offset + t, device=CUDA)
    slot = torch.tensor(slots, device=CUDA)[at // 64]
    keys, raw, values = (pool[slot, :, at % 64] for pool in pools)
    errors = [error(keys, case.out[0, 0].double()), error(values, case.out[1, 0].double())]
    turned = rotated(raw.double(), case.cosine.double(), case.sine.double())
    elsewhere = sum(int((~pool.isnan()).sum()) - t * 2 * d for pool in pools)
    return report(f"into pages {(t, d, offset)}", errors + [error(turned, keys.double()), elsewhere], [0.0, 0.0, 1e-2, 0])


def route(checks):
    modules = compiled_modules(["route_forward", "route_backward"])
    shapes = [(1, 1, 1, 64), (2, 65, 4, 128), (1, 127, 1, 256), (3, 200, 1, 96), (1, 2500, 2, 128), (2, 2060, 1, 8),
              (1, 5000, 8, 64), (1, 20_000, 1, 64)]
    good = True
    for shape in [(2, 300, 2, 64), (1, 127, 1, 256), (1, 130, 1, 128), (2, 200, 1, 96)] if checks else shapes:
        for m, dtype, *options in [(3, torch.float32, "bias norm"), (4, torch.bfloat16, "bias", 100),
                                   (1, torch.float16, "norm", 0, False), (3, torch.bfloat16, "bias norm", 3),
                                   (3, torch.bfloat16, "bias"), (2, torch.float16, "", 5), (4, torch.float16, "bias")]:
            good &= Route(modules, shape, m, dtype, *options).check()
    for shape in [(1, 3, 64, 63), (200, 2, 128, 40), (130, 1, 96, 0), (70, 4, 16, 5), (70, 1, 256, 5)]:
        good &= check_append(modules["route_forward"], *shape)
    for shape in [(1, 64, 63), (200, 128, 40), (300, 64, 7)]:
        good &= check_into_pages(modules, *shape)
    if checks:
        return good
    rate = copy_rate()
    print("| b x t x (2, g, d) | MB | forward µs | of copy | backward µs | of copy | no scan µs | of copy |")
    print("|---|---|---|---|---|---|---|---|")
    for b, t, g, d, *dtype in [(1, 16384, 8, 64), (1, 32768, 8, 64), (4, 16384, 8, 64), (1, 131072, 8, 64),
                               (1, 8192, 8, 128), (2, 16384, 8, 128), (4, 32768, 4, 128), (1, 8192, 8, 64, torch.float32),
                               (4, 8192, 8, 64, torch.float32)]:
        case = Route(modules, (b, t, g, d), 3, *(dtype or [torch.bfloat16]))
        size, angles, logits = case.kv.numel() * case.dtype.itemsize, t * d * 4, case.logits.numel() * 4
        cell = lambda us, moved: f"{us:.1f} | {moved / us * 1e6 / rate:.2f}"
        forward = cell(median_us(case.forward(carries=False)), 2 * size + angles + logits)
        case.forward()()
        backward = cell(median_us(case.backward()), 3 * size + angles + 2 * logits)
        plain = cell(median_us(case.forward(carries=False, scan=False)), 2 * size + angles)
        name = f"{b} x {t} x (2, {g}, {d}){' f32' if dtype else ''}"
        print(f"| {name} | {2 * size >> 20} | {forward} | {backward} | {plain} |", flush=True)
    return good


def check_ema(module, shape, m, dtype, seen, correct):
    b, t, c = shape
    x = (torch.randn(b, t, c, device=CUDA) + 0.5).to(dtype)
    state, rates = torch.randn(b, m, c, device=CUDA), torch.tensor(RATES[:m], device=CUDA)
    chunks, width = cdiv(t, 128), 4 if c % 4 == 0 else 1
    blocks, levels_len = cdiv(c, 128 * width), b * t * m * c
    packed, gradient = poisoned(levels_len + b * m * c), torch.randn(levels_len + b * m * c, device=CUDA)
    dx, dstate, drates = poisoned(b, t, c, dtype=dtype), poisoned(b, m, c), poisoned(m)
    pointers = dict(
        x=x, rates=rates, state=state, new_state=packed[levels_len:], carries=poisoned(b * chunks * m * c),
        levels=packed[:levels_len], dlevels=gradient[:levels_len], dstate=gradient[levels_len:],
        adjoints=poisoned(b * chunks * m * c), dx=dx, dstate_in=dstate, partial=poisoned(m, b * chunks * blocks),
        drates=drates,
    )
    params = b"".join(struct.pack("<Q", address(x)) for x in pointers.values())
    params += struct.pack("<2Q", seen, b * chunks * blocks) + struct.pack("<7I", b, t, c, m, chunks, 0, correct)

    def chunked(name, count, typed=True):
        if count > 0:
            name = f"{name}_{SUFFIX[dtype]}_{width}" if typed else f"{name}_{width}"
            module.launch(name, (blocks, count, b), 128, params)

    chunked("ema_aggregate", chunks - 1)
    module.launch("ema_carry", (cdiv(c, 128), m, b), 128, params)
    chunked("ema_levels", chunks)
    chunked("ema_backward_aggregate", chunks - 1, typed=False)
    module.launch("ema_backward_carry", (cdiv(c, 128), m, b), 128, params)
    chunked("ema_backward", chunks)
    module.launch("ema_sum_rates", (m, 1, 1), 128, params)
    torch.cuda.synchronize()
    inputs = [y.double().requires_grad_(True) for y in (x, state, rates)]
    e, levels, rate = inputs[1], [], inputs[2].view(1, m, 1)
    for i in range(t):
        e = rate * e + (1 - rate) * inputs[0][:, i, None]
        levels.append(e / (1 - rate ** (seen + i + 1)) if correct else e)
    levels = torch.stack(levels, 1)
    loss = (levels.flatten() * gradient[:levels_len]).sum() + (e.flatten() * gradient[levels_len:]).sum()
    gradients = torch.autograd.grad(loss, inputs)
    errors = [error(packed[:levels_len], levels.flatten()), error(packed[levels_len:], e.flatten())]
    errors += [error(got, expected) for got, expected in zip((dx, dstate, drates), gradients)]
    plain = 2 * error(gradients[0].to(dtype), gradients[0]) + 1e-5
    return report(f"ema {shape} {m} {SUFFIX[dtype]}", errors, [1e-5, 1e-5, plain, 1e-5, 1e-4])


def ema(_):
    module, good = Module("ema_scan"), True
    for shape in [(1, 1, 1), (1, 1, 8), (2, 127, 12), (1, 128, 4), (3, 129, 7), (1, 1500, 520)]:
        for options in [(3, torch.float32, 0, 1), (4, torch.bfloat16, 10_000, 1), (1, torch.float16, 0, 0)]:
            good &= check_ema(module, shape, *options)
    return good


def backward_tiles(d):
    """(rows, threads, bytes) of a block of each kernel of the backward for a head_dim, by name, from its file."""
    source, tiles = open(os.path.join(SOURCES, "attention_backward_sm80.cu")).read(), {}
    for kernel, arguments in re.findall(r"^  ATTENTION_BACKWARD_(KV|Q)\(NAME, T, (.*)\)", source, re.M):
        size, *rest = arguments.split(", ")
        suffix, _, *rest = rest if kernel == "KV" else ("", "", rest[0], 1, *rest[1:])
        warps, partners, row_tiles, *_, shared = map(int, rest)
        if int(size) == d:
            tiles[kernel.lower() + suffix.strip()] = 16 * row_tiles * warps // partners, 32 * warps, shared
    return tiles


class Backward:
    """One backward of dense attention in 16 bits, as `kernels/src/flash/cuda.rs` launches it: the query heads of a
    key/value head in `splits` parts, blocks `by_tile` or by head, warps `alone` as on cards of 99 KiB."""

    def __init__(self, module, b, tq, tk, h, g, d, left, right, dtype, splits=1, by_tile=0, dlse=False, alone=False):
        self.module, self.d, self.left, self.right, self.name = module, d, left, right, SUFFIX[dtype]
        self.splits, self.by_tile, self.alone = splits, by_tile, alone
        random = lambda t, heads: torch.randn(b, t, heads, d, device=CUDA, dtype=dtype)
        self.inputs, self.dout = (random(tq, h), random(tk, g), random(tk, g)), random(tq, h)
        self.gradients, self.rows = [poisoned(*x.shape, dtype=dtype) for x in self.inputs], poisoned(b, h, tq, 2)
        self.dlse = torch.randn(b, h, tq, device=CUDA) if dlse else None
        self.parts = poisoned(2, splits, b, tk, g, d) if splits > 1 else None
        self.sizes = b, tq, tk, h, g

    def launches(self, out, lse):
        """The kernels of {lse, delta}, of dk and dv with the sum of their parts, and of dq."""
        (b, tq, tk, h, g), d, tiles = self.sizes, self.d, backward_tiles(self.d)
        self.saved = out, lse
        pointers = (*self.inputs, out, self.dout, lse, self.dlse, self.rows, *self.gradients)
        params = b"".join(struct.pack("<Q", address(x)) for x in pointers)
        params += struct.pack("<7if", b, tq, tk, h, g, self.left, self.right, d**-0.5)
        params += struct.pack("<ixxxxQ2i", d, address(self.parts), self.splits, self.by_tile)
        run = lambda name, *launch: self.module.launch(f"attention_backward_{name}", *launch)

        def tiled(kernel, tokens, heads):
            rows, threads, shared = tiles[kernel]
            run(f"{kernel}_{self.name}_{d}", (b * heads * cdiv(tokens, rows), 1, 1), threads, params, shared)

        def keys_and_values():
            for kernel in ("kv_dk", "kv_dv") if d == 256 else ("kv_alone" if self.alone else "kv",):
                tiled(kernel, tk, g * self.splits)
            if self.splits > 1:
                run(f"sum_{self.name}", (cdiv(b * tk * g * d, 4 * 256), 2, 1), 256, params)

        return (
            lambda: run(f"rows_{self.name}", (cdiv(b * h * tq, 32), 1, 1), 256, params),
            keys_and_values,
            lambda: tiled("q", tq, h),
        )

    def plain(self, dtype):
        """Output, lse and gradients of attention without tiles in `dtype`."""
        (b, tq, tk, h, g), inputs = self.sizes, [x.to(dtype).requires_grad_(True) for x in self.inputs]
        q, k, v = inputs[0], *(x.repeat_interleave(h // g, 2) for x in inputs[1:])
        apart = torch.arange(tk, device=CUDA) - torch.arange(tq, device=CUDA)[:, None] - (tk - tq)
        hidden = (apart < -self.left) | (apart > self.right)
        scores = (torch.einsum("bihd,bjhd->bhij", q, k) * self.d**-0.5).masked_fill(hidden, -math.inf)
        # A row that sees no key has zeros for probabilities, and for gradients.
        empty = hidden.all(1)[:, None]
        weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        out = torch.einsum("bhij,bjhd->bihd", weights, v)
        # A row that sees no key has -inf for lse, whose gradient is nothing.
        lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1)
        outputs, gradients = [out], [self.dout.to(dtype)]
        if self.dlse is not None:
            outputs, gradients = [out, lse], gradients + [self.dlse.to(dtype).masked_fill(empty[..., 0], 0.0)]
        gradients = torch.autograd.grad(outputs, inputs, gradients)
        lse = lse.detach().masked_fill(empty[..., 0], -math.inf).float().contiguous()
        return out.detach().contiguous(), lse, gradients

    def check(self):
        out, lse, expected = self.plain(torch.float64)
        bounds = [2 * error(x, y) + 1e-5 for x, y in zip(self.plain(self.dout.dtype)[2], expected)]
        kernels, first = self.launches(out.to(self.dout.dtype), lse), None
        for _ in range(2):
            for kernel in kernels:
                kernel()
            torch.cuda.synchronize()
            same = first is None or all(map(torch.equal, first, self.gradients))
            first = [x.clone() for x in self.gradients]
        errors = [error(got, x) for got, x in zip(self.gradients, expected)]
        how = f"splits {self.splits} by_tile {self.by_tile} dlse {self.dlse is not None} alone {self.alone}"
        name = f"backward {self.sizes} {self.d} {self.left} {self.right} {self.name} {how}"
        return report(name, errors + [0.0 if same else 1.0], bounds + [0.0])


def backward(checks):
    """The 16-bit kernels of the dense backward, against f64; their times beside those of PyTorch's flash backend."""
    module, good, unbounded = Module("attention_backward_sm80"), True, 1 << 29
    shapes = [(2, 200, 200, 4, 2, unbounded, 0), (1, 333, 500, 8, 2, 99, 0), (1, 300, 140, 4, 4, unbounded, 0),
              (1, 257, 257, 6, 2, unbounded, unbounded), (2, 1, 70, 2, 1, unbounded, 0), (1, 130, 64, 3, 1, 31, 0)]
    for d in (64, 96, 128, 256):
        for b, tq, tk, h, g, left, right in shapes:
            for dtype in (torch.bfloat16, torch.float16):
                for splits in sorted({1, h // g}):
                    for by_tile in (0, 1):
                        for alone in (False, True) if "kv_alone" in backward_tiles(d) else (False,):
                            # With and without dlse, in turn.
                            how = splits, by_tile, by_tile == (splits == 1), alone
                            good &= Backward(module, b, tq, tk, h, g, d, left, right, dtype, *how).check()
    if checks:
        return good
    print("| head_dim | batch x tokens | window | rows µs | dk and dv µs | dq µs | all µs | FA2 µs | FA2 / ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for d, b, t, window in [(64, 8, 4096, 0), (64, 4, 8192, 0), (64, 1, 32768, 0), (128, 8, 4096, 0), (128, 4, 8192, 0),
                            (128, 1, 32768, 0), (128, 2, 16384, 1024), (128, 2, 16384, 4096), (96, 4, 8192, 0)]:
        case = Backward(module, b, t, t, 32, 8, d, window - 1 if window else unbounded, 0, torch.bfloat16)
        sides = dict(scale=d**-0.5) | (dict(window_size_left=window - 1, window_size_right=0) if window else {})
        flash, settings = torch.ops.aten, (None, None, t, t, 0.0, True)
        out, lse, seed, offset, _ = flash._flash_attention_forward(*case.inputs, *settings, False, **sides)
        kernels = case.launches(out.contiguous(), lse.contiguous())
        ours = [median_us(kernel, 9) for kernel in kernels] + [median_us(lambda: [run() for run in kernels], 9)]
        saved = case.dout, *case.inputs, out, lse
        theirs = median_us(lambda: flash._flash_attention_backward(*saved, *settings, seed, offset, **sides), 9)
        cells = " | ".join(f"{us:.0f}" for us in (*ours, theirs))
        print(f"| {d} | {b} x {t} | {window or '-'} | {cells} | {theirs / ours[-1]:.2f} |", flush=True)
    return good


def main():
    torch.zeros(1, device=CUDA)  # makes the context that the driver's calls use
    seed = 1
    torch.manual_seed(seed)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, seed {seed}")
    parts = dict(route=route, ema=ema, decode=decode, backward=backward)
    names = [name for name in sys.argv[1:] if name in parts] or list(parts)
    results = [parts[name]("--checks" in sys.argv) for name in names]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
