#!/usr/bin/env python3
"""link_stubs.py CUDARC_SOURCE OUT: static stand-ins for the CUDA libraries that cudarc links against.

OUT/libX.a holds a trampoline for every function that cudarc declares of library X; the first call opens the real
library with dlopen. A binary linked this way names no CUDA library: it starts on a machine without a driver, where
every driver call returns CUDA_ERROR_NO_DEVICE, and uses the driver where there is one.
"""

import os
import re
import subprocess
import sys
import tempfile

# link name: (module of cudarc, file names to open in order)
LIBRARIES = {
    "cuda": ("driver", ["libcuda.so.1", "libcuda.so"]),
    "cublas": ("cublas", ["libcublas.so.13"]),
    "cublasLt": ("cublaslt", ["libcublasLt.so.13"]),
    "curand": ("curand", ["libcurand.so.10"]),
    "nvrtc": ("nvrtc", ["libnvrtc.so.13"]),
    "nccl": ("nccl", ["libnccl.so.2"]),
}

RESOLVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
static const char *const names[] = {%(names)s};
static const char *const files[] = {%(files)s, 0};
void *%(prefix)s_table[%(count)d] __attribute__((visibility("hidden")));
static long no_device(void) { return 100; } /* CUDA_ERROR_NO_DEVICE */
__attribute__((visibility("hidden"))) void *%(prefix)s_resolve(unsigned long index) {
  static void *handle;
  for (int i = 0; files[i] && !handle; i++) handle = dlopen(files[i], RTLD_NOW | RTLD_GLOBAL);
  void *function = handle ? dlsym(handle, names[index]) : 0;
  if (!function) {
    if (%(is_driver)d && !handle) {
      function = (void *)no_device;
    } else {
      fprintf(stderr, "fatal: %%s: %%s %%s; put the folder that holds it on LD_LIBRARY_PATH\n", names[index],
              handle ? "not found in" : "cannot load", files[0]);
      exit(70);
    }
  }
  return %(prefix)s_table[index] = function;
}
"""

# The slow path keeps every register that can carry an argument: six integer, eight vector.
INTEGER_REGISTERS = ["rdi", "rsi", "rdx", "rcx", "r8", "r9"]


def functions(source, module):
    text = open(f"{source}/src/{module}/sys/mod.rs").read()
    declared = re.findall(r'extern "C" \{\s*(?:#\[[^\]]*\]\s*)*fn (\w+)\(', text)
    loaded = re.findall(r'load::<_F>\("(\w+)"\)', text)
    names = sorted(set(declared) | set(loaded))
    if not names:
        sys.exit(f"link_stubs: no function found in cudarc's {module}: its layout has changed")
    return names


def trampolines(prefix, names):
    lines = [".text"]
    for index, name in enumerate(names):
        lines += [
            f".globl {name}",
            f".type {name},@function",
            f"{name}: .cfi_startproc",
            f" mov {prefix}_table+{8 * index}(%rip),%rax",
            " test %rax,%rax",
            " je 1f",
            " jmp *%rax",
            f"1: mov ${index},%eax",
            f" jmp {prefix}_slow",
            ".cfi_endproc",
            f".size {name},.-{name}",
        ]
    save = [f" mov %{r},{8 * i}(%rsp)" for i, r in enumerate(INTEGER_REGISTERS)]
    save += [f" movups %xmm{i},{64 + 16 * i}(%rsp)" for i in range(8)]
    load = [f" mov {8 * i}(%rsp),%{r}" for i, r in enumerate(INTEGER_REGISTERS)]
    load += [f" movups {64 + 16 * i}(%rsp),%xmm{i}" for i in range(8)]
    lines += [f".type {prefix}_slow,@function", f"{prefix}_slow: push %rbp", " mov %rsp,%rbp"]
    lines += [" sub $208,%rsp", " and $-16,%rsp", *save, " mov %eax,%edi", f" call {prefix}_resolve"]
    lines += [*load, " leave", " jmp *%rax", f".size {prefix}_slow,.-{prefix}_slow"]
    lines += ['.section .note.GNU-stack,"",@progbits', ""]
    return "\n".join(lines)


def main():
    source, out = sys.argv[1:]
    if os.uname().machine != "x86_64":
        sys.exit("link_stubs: trampolines are written for x86_64 alone; install the CUDA toolkit instead")
    os.makedirs(out, exist_ok=True)
    for library, (module, files) in LIBRARIES.items():
        names = functions(source, module)
        prefix = f"mka_{library}"
        fields = {
            "names": ",".join(f'"{name}"' for name in names),
            "files": ",".join(f'"{file}"' for file in files),
            "prefix": prefix,
            "count": len(names),
            "is_driver": int(library == "cuda"),
        }
        with tempfile.TemporaryDirectory() as work:
            with open(f"{work}/resolve.c", "w") as file:
                file.write(RESOLVER % fields)
            with open(f"{work}/trampolines.S", "w") as file:
                file.write(trampolines(prefix, names))
            for name, suffix in (("resolve", "c"), ("trampolines", "S")):
                command = ["gcc", "-O1", "-fPIC", "-c", f"{work}/{name}.{suffix}", "-o", f"{work}/{name}.o"]
                subprocess.run(command, check=True)
            archive = f"{out}/lib{library}.a"
            if os.path.exists(archive):
                os.remove(archive)
            subprocess.run(["ar", "rcs", archive, f"{work}/resolve.o", f"{work}/trampolines.o"], check=True)
        print(f"{library}: {len(names)} functions")


if __name__ == "__main__":
    main()
