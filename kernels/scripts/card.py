"""The card as the checks here use it: kernels compiled by nvcc, launched through the driver on PyTorch's memory, timed.

Knows no kernel.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cuda")
DRIVER = ctypes.CDLL("libcuda.so.1")
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CUDA = "cuda"


def cdiv(a, b):
    return -(-a // b)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), device=CUDA, dtype=dtype)


def address(x):
    return x.data_ptr() if torch.is_tensor(x) else x or 0


def call(result, what):
    if result:
        raise RuntimeError(f"{what}: CUDA error {result}")


def compiled(stem):
    """The machine code of one .cu file for the card: of the folder after --cubins if it is there, else by nvcc."""
    if "--cubins" in sys.argv:
        path = os.path.join(sys.argv[sys.argv.index("--cubins") + 1], stem + ".cubin")
        if os.path.exists(path):
            return open(path, "rb").read()
    source, out = os.path.join(SOURCES, stem + ".cu"), os.path.join(tempfile.mkdtemp(), stem + ".cubin")
    arch = "sm_%d%d" % torch.cuda.get_device_capability()
    arch += "a" if arch == "sm_90" else ""
    command = ["nvcc", "-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-Xptxas", "-v", "-o", out, source]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernel = ""
    for line in report.splitlines():
        if "Compiling entry" in line:
            kernel = line.split("'")[1]
        elif "spill" in line and " 0 bytes spill stores" not in line:
            print(f"{kernel}: {line.strip()}")
    return open(out, "rb").read()


class Module:
    """One .cu file, compiled and loaded."""

    def __init__(self, stem, image=None):
        self.module, self.functions = ctypes.c_void_p(), {}
        call(DRIVER.cuModuleLoadData(ctypes.byref(self.module), image or compiled(stem)), "load " + stem)

    def prepare(self, name, grid, block, params, shared=0):
        """The launch as a function without arguments; nothing but the launch is in it."""
        if name not in self.functions:
            function = ctypes.c_void_p()
            call(DRIVER.cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()), name)
            if shared > 48 * 1024:
                call(DRIVER.cuFuncSetAttribute(function, MAX_SHARED, shared), name)
            self.functions[name] = function
        params += b"\0" * (-len(params) % 8)
        buffer = ctypes.create_string_buffer(params, len(params))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        launch = (self.functions[name], *grid, block, 1, 1, shared, stream, arguments, None)
        return lambda kept=buffer: call(DRIVER.cuLaunchKernel(*launch), name)

    def launch(self, name, grid, block, params, shared=0):
        self.prepare(name, grid, block, params, shared)()


def compiled_modules(stems):
    """Several files by name, compiled side by side."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(compiled, stems))
    return {stem: Module(stem, image) for stem, image in zip(stems, images)}


def median_us(work, rounds=15):
    """Median of the device's times, L2 flushed before each: written twice, then read."""
    flush = torch.empty(32 << 20, dtype=torch.float32, device=CUDA)
    times = []
    for i in range(rounds + 3):
        flush.zero_()
        flush.zero_()
        flush.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_rate():
    x = torch.empty(256 << 20, dtype=torch.uint8, device=CUDA).random_()
    y = torch.empty_like(x)
    rate = 2 * x.numel() / median_us(lambda: y.copy_(x)) * 1e6
    print(f"copy {rate / 1e9:.0f} GB/s (256 MiB, read and written)")
    return rate


def error(got, expected):
    """Largest difference over the largest value expected; NaN is infinite."""
    difference = (got.double() - expected.detach()).abs()
    difference = torch.where(difference.isnan(), torch.full_like(difference, float("inf")), difference)
    return float((difference.max() / expected.detach().abs().max().clamp(min=1e-6)).detach())
