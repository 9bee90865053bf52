#!/usr/bin/env python3
"""llama_server.py MODEL.gguf [--port 8080] [--context 8192] [--threads 2]: llama.cpp's server on loopback.

A peer for `evals .. --endpoint 'llama=http://127.0.0.1:8080/v1,model'`: the same samples through llama.cpp's own
attention, chat template and OpenAI interface. Needs `pip install xllamacpp`, which carries llama.cpp prebuilt.
Stop it with an interrupt.
"""

import argparse
import threading

import xllamacpp


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.n_ctx = args.context
    params.n_parallel = 1
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}, xllamacpp {xllamacpp.__version__}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
