// Dense attention, forward, bf16 and f16: out = softmax(q kᵀ · scale) v, lse = log Σ e^score.
// FlashAttention-2 (arXiv 2307.08691), algorithm 1. A block takes ROWS queries of one head and walks their keys in tiles
// of KEYS from the last to the first; tiles that no query sees are never loaded, and only tiles on an edge are masked.
// A warp owns 16·MT whole query rows: scores, probabilities (left operand of the second product) and output stay in its
// registers. All warps load: values of tile n while its scores are computed, keys of tile n - 1 during softmax and the
// second product, by cp.async into one tile each. Bound by arithmetic.
//
// | d | ROWS x KEYS | warps | shared memory (q + k + v) | accumulators a thread (output + scores) |
// |---|---|---|---|---|
// | 64 | 128 x 64 | 4 | 16 + 8 + 8 = 32 KiB | 64 + 64 |
// | 96 | 128 x 64 | 4 | 24 + 12 + 12 = 48 KiB | 96 + 64 |
// | 128 | 128 x 64 | 4 | 32 + 16 + 16 = 64 KiB | 128 + 64 |
// | 256 | 128 x 64 | 8 | 64 + 32 + 32 = 128 KiB | 128 + 32 |
//
// With two row tiles a warp, a fragment of keys or values feeds four products: at one, loading them through ldmatrix
// (512 bytes, 4 clocks, for 2 products) would bound the tensor cores at half their rate.
#include "attention_tile.cuh"

template <typename T, int D, int WARPS, int MT, int KEYS>
__device__ __forceinline__ void attention_forward(const AttentionForwardParams &p) {
  constexpr int THREADS = 32 * WARPS, ROWS = 16 * MT * WARPS, NT = KEYS / 8;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t q_tile = shared_address(memory);
  const uint32_t k_tile = q_tile + TILE_BYTES<ROWS, D>, v_tile = k_tile + TILE_BYTES<KEYS, D>;
  const AttentionShape &shape = p.shape;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * MT;

  // The last rows first: under a causal mask they see the most keys, and short tiles fill the end of the grid.
  const int num_tiles = (shape.query_tokens + ROWS - 1) / ROWS;
  const int row0 = (num_tiles - 1 - int(blockIdx.x % num_tiles)) * ROWS;
  const int head = int(blockIdx.x / num_tiles) % shape.query_heads;
  const int batch = int(blockIdx.x / num_tiles) / shape.query_heads;
  const int kv_head = head / (shape.query_heads / shape.kv_heads);
  const int q_stride = shape.query_heads * D, kv_stride = shape.kv_heads * D;
  const int64_t q_start = int64_t(batch) * shape.query_tokens * q_stride + int64_t(head) * D;
  const int64_t kv_start = int64_t(batch) * shape.key_tokens * kv_stride + int64_t(kv_head) * D;
  const T *q = static_cast<const T *>(p.q) + q_start;
  const T *k = static_cast<const T *>(p.k) + kv_start, *v = static_cast<const T *>(p.v) + kv_start;

  const int first_key = shape.first_key(row0), end_key = shape.end_key(row0 + ROWS);
  const int first_tile = first_key / KEYS, end_tile = end_key > first_key ? (end_key + KEYS - 1) / KEYS : first_tile;
  const float to_exp2 = shape.scale * LOG2_E;

  float out[MT][D / 8][4];
  clear(out);
  // Per row of this thread (lane/4 and lane/4 + 8 of each row tile): the maximum raw score of the row, and this
  // thread's share of the row's sum.
  float row_max[MT][2], row_sum[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) row_max[m][half] = -INFINITY, row_sum[m][half] = 0.f;

  if (first_tile < end_tile) {
    load_tile<T, D, ROWS, THREADS>(q_tile, q, q_stride, row0, shape.query_tokens);
    load_tile<T, D, KEYS, THREADS>(k_tile, k, kv_stride, (end_tile - 1) * KEYS, shape.key_tokens);
    copy_commit();
  }
  for (int key0 = (end_tile - 1) * KEYS; key0 >= first_tile * KEYS; key0 -= KEYS) {
    copy_wait<0>();
    __syncthreads(); // The keys are there, and no warp reads the values of the tile before any more.
    load_tile<T, D, KEYS, THREADS>(v_tile, v, kv_stride, key0, shape.key_tokens);
    copy_commit();

    float scores[MT][NT][4];
    clear(scores);
    multiply_rows<T, D, MT, NT>(scores, q_tile, warp_row, k_tile, 0);

    copy_wait<0>();
    __syncthreads(); // The values are there, and no warp reads these keys any more.
    if (key0 > first_tile * KEYS) {
      load_tile<T, D, KEYS, THREADS>(k_tile, k, kv_stride, key0 - KEYS, shape.key_tokens);
      copy_commit();
    }

    if (shape.is_edge(row0, ROWS, key0, KEYS))
      hide(scores, row0 + warp_row, key0, [&](int row) { return shape.keys_of(row); });

#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float max = row_max[m][half];
#pragma unroll
        for (int n = 0; n < NT; ++n) max = fmaxf(max, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        // The four lanes of a quad hold one row.
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
        // While a row has seen no key its maximum is -inf: 0 in its place, never -inf - -inf.
        const float shift = max == -INFINITY ? 0.f : max * to_exp2;
        const float correction = exp2_fast(row_max[m][half] * to_exp2 - shift);
        row_max[m][half] = max;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[m][n][e] = exp2_fast(fmaf(scores[m][n][e], to_exp2, -shift));
            sum += scores[m][n][e];
          }
        row_sum[m][half] = row_sum[m][half] * correction + sum;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[m][n][2 * half] *= correction;
          out[m][n][2 * half + 1] *= correction;
        }
      }

    uint32_t probabilities[MT][NT / 2][4];
    as_left<T>(probabilities, scores);
    multiply_columns<T, D, MT, NT / 2>(out, probabilities, v_tile, 0);
  }

  float *const lse = p.lse + (int64_t(batch) * shape.query_heads + head) * shape.query_tokens;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[m][n][2 * half] *= inverse;
        out[m][n][2 * half + 1] *= inverse;
      }
      const int row = row0 + warp_row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && row < shape.query_tokens)
        lse[row] =
            sum == 0.f ? -INFINITY : row_max[m][half] * shape.scale + logf(sum);
    }
  // Only this warp ever read its rows of the query tile.
  store_rows<T, D, MT>(out, memory, warp_row, static_cast<T *>(p.out) + q_start, q_stride, row0, shape.query_tokens);
}

#define ATTENTION_FORWARD(NAME, T, D, WARPS, MT, KEYS, BLOCKS)                                                         \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                     \
      attention_forward_##NAME##_##D(const __grid_constant__ AttentionForwardParams p) {                               \
    attention_forward<T, D, WARPS, MT, KEYS>(p);                                                                       \
  }

#define ATTENTION_FORWARD_TYPE(NAME, T)                                                                                \
  ATTENTION_FORWARD(NAME, T, 64, 4, 2, 64, 2)                                                                          \
  ATTENTION_FORWARD(NAME, T, 96, 4, 2, 64, 2)                                                                          \
  ATTENTION_FORWARD(NAME, T, 128, 4, 2, 64, 2)                                                                         \
  ATTENTION_FORWARD(NAME, T, 256, 8, 1, 64, 1)

ATTENTION_FORWARD_TYPE(bf16, __nv_bfloat16)
ATTENTION_FORWARD_TYPE(f16, __half)
