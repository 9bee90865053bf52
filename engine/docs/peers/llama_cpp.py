"""Measures llama.cpp, through llama-cpp-python, on a GGUF: the peer that the engine's CPU speed is compared with.

Knows nothing of mka. Usage: `python llama_cpp.py MODEL.gguf [--threads 2] [--repeats 3]`; prints one JSON line. Needs
`pip install llama-cpp-python numpy`, which builds for the machine that it runs on. Take numbers on an idle machine only.

Prefill: tokens per second through one call on a prompt of 512 and of 2,048 tokens, caches empty, logits of the last token only.
Decode: 128 greedy tokens after a prompt of 512, timed from the first to the last forward pass of one token. The end of turn is
not stopped at. Each number is the best of the repeats; one short pass before them warms up.
"""

import argparse
import json
import os
import platform
import sys
import time

# This file has the name of the package that it measures: its own folder must not come first.
sys.path = [folder for folder in sys.path if os.path.abspath(folder) != os.path.dirname(os.path.abspath(__file__))]

import llama_cpp
import numpy

CONTEXT_TOKENS = 4096
BATCH_TOKENS = 512
PROMPT_TOKENS = (512, 2048)
DECODE_PROMPT_TOKENS = 512
DECODE_TOKENS = 128
TEXT = "The keeper wrote down the wind, the tide and the names of the ships that passed the light that evening. "


def best_id(model):
    """Argmax of the logits of the last token, read in place."""
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(numpy.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())


def prefill_seconds(model, ids):
    model.reset()
    begin = time.perf_counter()
    model.eval(ids)
    best_id(model)  # waits for the result
    return time.perf_counter() - begin


def decode_seconds(model, ids, num_tokens):
    model.reset()
    model.eval(ids)
    token = best_id(model)
    begin = time.perf_counter()
    for _ in range(num_tokens):
        model.eval([token])
        token = best_id(model)
    return time.perf_counter() - begin


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="path of a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    model = llama_cpp.Llama(arguments.model, n_ctx=CONTEXT_TOKENS, n_batch=BATCH_TOKENS, n_threads=arguments.threads,
                            n_threads_batch=arguments.threads, n_gpu_layers=0, verbose=False)
    repeats = max(PROMPT_TOKENS) // 10
    ids = model.tokenize((TEXT * repeats).encode(), add_bos=False)
    assert len(ids) >= max(PROMPT_TOKENS), f"text of {len(ids)} tokens, expected {max(PROMPT_TOKENS)}"
    prefill_seconds(model, ids[:64])

    prefill = {str(num_tokens): round(num_tokens / min(prefill_seconds(model, ids[:num_tokens])
                                                       for _ in range(arguments.repeats)), 1)
               for num_tokens in PROMPT_TOKENS}
    decode = DECODE_TOKENS / min(decode_seconds(model, ids[:DECODE_PROMPT_TOKENS], DECODE_TOKENS)
                                 for _ in range(arguments.repeats))
    print(json.dumps({
        "peer": "llama.cpp",
        "llama_cpp_python": llama_cpp.__version__,
        "system_info": llama_cpp.llama_print_system_info().decode().strip(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "model": os.path.basename(arguments.model),
        "model_bytes": os.path.getsize(arguments.model),
        "threads": arguments.threads,
        "context_tokens": CONTEXT_TOKENS,
        "batch_tokens": BATCH_TOKENS,
        "repeats": arguments.repeats,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": round(decode, 1),
    }))


if __name__ == "__main__":
    main()
