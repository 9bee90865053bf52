// What every dense attention kernel shares: the shape of the problem and which keys a query sees.
#pragma once
#include "number.cuh"

// Row strides are query_heads · d and kv_heads · d elements; query head i reads key/value head i / group.
struct AttentionShape {
  int32_t batch;
  int32_t query_tokens; // at most 2^28, as are key_tokens: no sum below leaves 32 bits
  int32_t key_tokens;
  int32_t query_heads;
  int32_t kv_heads;
  // A query at position i sees the keys i - left <= j <= i + right; either is 2^29 where that side has no bound.
  int32_t left;
  int32_t right;
  float scale;

  // Position of query 0: queries are aligned to the end of the keys. Negative where there are more queries than keys.
  __device__ __forceinline__ int offset() const { return key_tokens - query_tokens; }

  // The keys that any query of the rows [first, end) may see, and the reverse; an empty range has end <= first.
  __device__ __forceinline__ int first_key(int first_row) const { return max(0, first_row + offset() - left); }
  __device__ __forceinline__ int end_key(int end_row) const {
    return min(key_tokens, min(end_row, query_tokens) + offset() + right);
  }
  __device__ __forceinline__ int first_row(int first_key) const { return max(0, first_key - right - offset()); }
  __device__ __forceinline__ int end_row(int end_key) const {
    return min(query_tokens, min(end_key, key_tokens) + left - offset());
  }

  // The first and the last key that a query sees, and the reverse; where there is none, the first comes after the last.
  __device__ __forceinline__ int2 keys_of(int row) const {
    const int position = row + offset();
    return make_int2(position - left, min(position + right, key_tokens - 1));
  }
  __device__ __forceinline__ int2 rows_of(int key) const {
    return make_int2(key < key_tokens ? key - right - offset() : INT32_MAX, key + left - offset());
  }

  // Whether some pair of a tile is masked, or its keys run past the end. Rows past the end need no mask: they are
  // loaded as zeros and never stored.
  __device__ __forceinline__ bool is_edge(int row, int rows, int key, int keys) const {
    return key + keys > key_tokens || key + keys - 1 > row + offset() + right || key < row + rows - 1 + offset() - left;
  }
};

struct AttentionForwardParams {
  const void *q; // (b, tq, h, d)
  const void *k; // (b, tk, g, d)
  const void *v; // (b, tk, g, d)
  void *out;     // (b, tq, h, d)
  float *lse;    // (b, h, tq)
  AttentionShape shape;
  int32_t d;
};

struct AttentionBackwardParams {
  const void *q;     // (b, tq, h, d)
  const void *k;     // (b, tk, g, d)
  const void *v;     // (b, tk, g, d)
  const void *out;   // (b, tq, h, d)
  const void *dout;  // (b, tq, h, d)
  const float *lse;  // (b, h, tq)
  const float *dlse; // (b, h, tq) or null
  float2 *rows;      // (b, h, tq): {lse · log2 e, delta}
  void *dq;          // (b, tq, h, d)
  void *dk;          // (b, tk, g, d)
  void *dv;          // (b, tk, g, d)
  AttentionShape shape;
  int32_t d;
};

constexpr float LOG2_E = 1.4426950408889634f;

// 2^x on the special function unit; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Lanes that share a row of attention_backward_rows. A warp a row waits for memory once for 4 d bytes: on an H200,
// 1,048,576 rows took 227 to 277 µs at d = 64 and 128 alike, and take 71 to 80 and 132 to 138 at eight lanes.
// kernels/src/flash/tile.rs has the same number; its test reads it here.
constexpr int ROW_LANES = 8;

// rows = {lse · log2 e, rowsum(dout ∘ out) - dlse} of the rows of (b, tq, h). A row that saw no key has lse = -inf; +inf
// in its place makes every probability 2^(s - inf) = 0, and its gradients 0, without a mask.
template <typename T> __device__ void attention_backward_rows(const AttentionBackwardParams &p) {
  const AttentionShape &shape = p.shape;
  // In 32 bits: 2^32 rows of 128 bytes or more are not on one card.
  const uint32_t num_rows = uint32_t(shape.batch) * shape.query_tokens * shape.query_heads;
  const uint32_t row = blockIdx.x * (blockDim.x / ROW_LANES) + threadIdx.x / ROW_LANES;
  if (row >= num_rows) return;
  const uint32_t head = row % shape.query_heads, token = row / shape.query_heads;
  const uint32_t batch = token / shape.query_tokens;
  const uint64_t at = uint64_t(batch * shape.query_heads + head) * shape.query_tokens + token % shape.query_tokens;
  const float lse = p.lse[at];
  float delta = p.dlse != nullptr && threadIdx.x % ROW_LANES == 0 ? -p.dlse[at] : 0.f;
  const T *out = static_cast<const T *>(p.out) + uint64_t(row) * p.d;
  const T *dout = static_cast<const T *>(p.dout) + uint64_t(row) * p.d;
#pragma unroll 2
  for (int x = threadIdx.x % ROW_LANES * 4; x < p.d; x += 4 * ROW_LANES) {
    float left[4], right[4];
    load_floats(out + x, left);
    load_floats(dout + x, right);
#pragma unroll
    for (int e = 0; e < 4; ++e) delta += left[e] * right[e];
  }
#pragma unroll
  for (int offset = ROW_LANES / 2; offset > 0; offset >>= 1) delta += __shfl_xor_sync(0xffffffffu, delta, offset);
  if (threadIdx.x % ROW_LANES == 0) p.rows[at] = make_float2(lse == -INFINITY ? INFINITY : lse * LOG2_E, delta);
}
