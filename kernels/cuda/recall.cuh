// What the kernels that score stored keys and those that vote over the scores have in common.
#pragma once
#include "number.cuh"

constexpr int PAGE_TOKENS = 64;
constexpr int SPAN = 8; // keys of a landmark
constexpr int THREADS = 256;
constexpr int BLOCK_KEYS = 256;
constexpr int MAX_ROWS = 512;
constexpr int MAX_DIM = 256;
constexpr int MAX_RUNS = 16;

// Queries that choose among the same pages, the first ones stored.
struct Run {
  uint32_t first, queries, pages;
};

struct VoteParams {
  const float *q;              // (runs, rows / group, h, d)
  const void *keys;            // landmarks (n, g, d), or stored keys (pages, g, 64, d)
  const uint32_t *marks;       // of stored keys: (runs, g, num_marks), landmarks whose tokens are scored; null: all
  const void *outlier_keys;    // of landmarks: (outliers · SPAN, g, d)
  const uint32_t *outliers;    // (g, outliers): the landmark of each, ignored where a run does not see it
  const uint32_t *pins;        // landmarks that are chosen whatever they are asked for, ascending
  float *logits;               // (runs, g, rows, n)
  float *stats;                // (runs, g, blocks, rows, 2): maximum and sum of each block
  float *norms;                // (runs, g, rows): log2 of the sum of 2^logit
  float *votes;                // (runs, g, n)
  uint64_t n;                  // keys of the run of most pages, those of outliers last
  uint32_t num_marks, num_outliers, num_pins;
  uint32_t rows, h, g, group, d, blocks, pooled; // rows: of the longest run
  uint32_t is_joined;                            // whether `join` made the norms
  Run runs[MAX_RUNS];
};

// What a block works on: one head of one run.
struct Own {
  uint32_t head, at; // at: run · g + head
  uint32_t rows, marks;
};

__device__ __forceinline__ Own work_of_block(const VoteParams &p) {
  const Run run = p.runs[blockIdx.z];
  const uint32_t means = (run.queries + p.pooled - 1) / p.pooled;
  return Own{blockIdx.y, blockIdx.z * p.g + blockIdx.y, means * p.group, run.pages * (PAGE_TOKENS / SPAN)};
}

__device__ __forceinline__ uint32_t mark_at(const VoteParams &p, const Own &own, uint64_t i) {
  return p.marks ? p.marks[uint64_t(own.at) * p.num_marks + i] : uint32_t(i);
}

// Landmarks that the run of most pages has: of the keys, those before the outliers'.
__device__ __forceinline__ uint64_t most_marks(const VoteParams &p) { return p.n - uint64_t(p.num_outliers) * SPAN; }

// Key `i` of a head; null for none.
template <typename T, bool TOKENS>
__device__ __forceinline__ const T *key_at(const VoteParams &p, const Own &own, uint64_t i) {
  if (TOKENS) {
    const uint32_t mark = mark_at(p, own, i / SPAN);
    if (mark >= own.marks) return nullptr;
    const uint64_t token = uint64_t(mark) * SPAN + i % SPAN;
    const uint64_t row = (token / PAGE_TOKENS * p.g + own.head) * PAGE_TOKENS + token % PAGE_TOKENS;
    return static_cast<const T *>(p.keys) + row * p.d;
  }
  if (i < own.marks) return static_cast<const T *>(p.keys) + (i * p.g + own.head) * p.d;
  if (i < most_marks(p)) return nullptr;
  const uint64_t outlier = i - most_marks(p);
  if (p.outliers[uint64_t(own.head) * p.num_outliers + outlier / SPAN] >= own.marks) return nullptr;
  return static_cast<const T *>(p.outlier_keys) + (outlier * p.g + own.head) * p.d;
}
