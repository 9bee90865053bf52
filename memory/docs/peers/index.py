"""Measures hnswlib and usearch on the vectors that `bench_index --out FOLDER` wrote.

Knows nothing of mka: it reads rows, queries and exact answers from files.

    pip install hnswlib usearch numpy
    python3 memory/docs/peers/index.py FOLDER/100000 [hnswlib | usearch]

Prints, for each library and ef, recall_at_10 and the median microseconds of one query, by the process's processor
clock on one thread, so that other work on the machine does not count.
"""

import sys
import time

import hnswlib
import numpy as np
from usearch.index import Index

DIM, K = 384, 10
EFS = [10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 400, 640]


def report(name, size, rate, search, queries, exact):
    for ef in EFS:
        micros, hits = [], 0
        for turn in range(2):
            for query, answer in zip(queries, exact):
                start = time.process_time_ns()
                found = search(query, ef)
                if turn:
                    micros.append((time.process_time_ns() - start) / 1e3)
                    hits += len(set(found) & set(answer))
        recall = hits / exact.size
        print(f"| {size} | {name} | {rate:.0f} | ef {ef} | {recall:.4f} | {np.median(micros):.1f} |", flush=True)
        if recall >= 0.99:
            break


def main(folder, only=""):
    rows = np.fromfile(f"{folder}/rows.f32", "<f4").reshape(-1, DIM)
    queries = np.fromfile(f"{folder}/queries.f32", "<f4").reshape(-1, DIM)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = np.fromfile(f"{folder}/exact.u32", "<u4").reshape(-1, K)
    print("| rows | library | rows/s in | setting | recall_at_10 | µs |")
    print("|---|---|---|---|---|---|")

    if only != "usearch":
        measure_hnswlib(rows, queries, exact)
    if only != "hnswlib":
        measure_usearch(rows, queries, exact)


def measure_hnswlib(rows, queries, exact):
    size = len(rows)
    # Inner products of unit vectors: hnswlib's "cosine" scales each query once more.
    graph = hnswlib.Index(space="ip", dim=DIM)
    graph.init_index(max_elements=size, ef_construction=200, M=16, random_seed=1)
    graph.set_num_threads(1)
    start = time.process_time()
    for at in range(0, size, 1000):
        graph.add_items(rows[at : at + 1000], np.arange(at, min(at + 1000, size)), num_threads=1)
    rate = size / (time.process_time() - start)

    def search(query, ef):
        graph.set_ef(max(ef, K))
        return graph.knn_query(query, k=K, num_threads=1)[0][0]

    report("hnswlib M16 efc200", size, rate, search, queries, exact)


def measure_usearch(rows, queries, exact):
    size = len(rows)
    index = Index(ndim=DIM, metric="ip", dtype="f32", connectivity=16, expansion_add=200, expansion_search=64)
    start = time.process_time()
    for at in range(0, size, 1000):
        index.add(np.arange(at, min(at + 1000, size)), rows[at : at + 1000], threads=1)
    rate = size / (time.process_time() - start)

    def search(query, ef):
        index.expansion_search = max(ef, K)
        return index.search(query, K, threads=1).keys

    report("usearch M16 efc200", size, rate, search, queries, exact)


if __name__ == "__main__":
    main(*sys.argv[1:])
