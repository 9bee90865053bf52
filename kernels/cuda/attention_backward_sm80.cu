// Dense attention, backward, bf16 and f16. With P = e^(scores - lse), dP = dout vᵀ and dS = P ∘ (dP - delta):
//   dv = Pᵀ dout, dk = scale · dSᵀ q, dq = scale · dS k, delta = rowsum(dout ∘ out) - dlse.
// FlashAttention-2 (arXiv 2307.08691), algorithm 2, with two differences: the transposed scores are what is computed,
// so that Pᵀ and dSᵀ are left operands where they stand, in registers; and a block walks all query heads of its
// key/value head, so that dk and dv are summed in registers and written once. Where that leaves fewer blocks than keep a
// card busy, the query heads are split among blocks, whose sums a last kernel adds up in their order.
//
// attention_backward_rows: per query row {lse · log2 e, delta}; bound by memory.
// attention_backward_kv: a block owns KEYS keys, a warp 16·MT of them, and walks the queries that see them in tiles of
//   ROWS, in turn of SUB rows: four products.
// attention_backward_q: a block owns rows of queries, a warp 16·MT of them, and walks their keys: three products.
// Seven products instead of five, but no atomics: equal inputs give equal bits, and on an H100 this was 1.03 to 1.17
// times as fast as adding dq to an f32 buffer from the kv kernel (kernels/docs/attention.md).
// Tiles are double-buffered through cp.async, one barrier a tile. Bound by arithmetic.
//
// | kernel | d | stationary x walked (at once) | warps | shared memory | accumulators a thread |
// |---|---|---|---|---|---|
// | kv | 64 | 128 keys x 64 rows (32) | 4 | k v 32 + q dout 2·16 = 64 KiB | 64 + 64 + 32 + 32 |
// | kv | 96 | 128 x 64 (32) | 8 | 48 + 2·24 = 96 KiB | 48 + 48 + 16 + 16 |
// | kv | 128 | 128 x 64 (32) | 8 | 64 + 2·32 = 128 KiB | 64 + 64 + 16 + 16 |
// | kv, dk and dv apart | 256 | 128 x 16 (16) | 8 | 128 + 2·16 = 160 KiB | 128 + 8 + 8 |
// | q | 64 | 128 rows x 64 keys (32) | 4 | q dout 32 + k v 2·16 = 64 KiB | 64 + 32 + 32 |
// | q | 96 | 128 x 64 (32) | 8 | 48 + 2·24 = 96 KiB | 48 + 16 + 16 |
// | q | 128 | 128 x 32 (32) | 4, two blocks | 64 + 2·16 = 96 KiB | 128 + 32 + 32 |
// | q | 256 | 128 x 16 (16) | 8 | 128 + 2·16 = 160 KiB | 128 + 8 + 8 |
// The kv kernels take 16 bytes a walked row more for {lse, delta}. At d = 256 both gradients of 16 keys would be
// 256 registers: dk and dv are two launches there, five products for four.
#include "attention_tile.cuh"

struct AttentionBackwardSplitParams {
  AttentionBackwardParams p;
  // (2, splits, b, tk, g, d): dk, then dv, of each split; null where there is one.
  float *parts;
  // Blocks that share the query heads of a key/value head; divides their number.
  int32_t splits;
  // Whether the blocks of one tile of all heads lie together, so that the longest ones come first and none is left alone
  // at the end; else the tiles of a head do, which then share what they walk in the cache.
  int32_t by_tile;

  // The tile and the head that a block works on, of `heads` in all.
  __device__ __forceinline__ int2 place(int num_tiles, int heads) const {
    const int block = int(blockIdx.x);
    return by_tile ? make_int2(block / heads, block % heads) : make_int2(block % num_tiles, block / num_tiles);
  }
};

enum Gradients { KEYS_AND_VALUES, KEYS_ONLY, VALUES_ONLY };

// Starts the copy of {lse · log2 e, delta} of ROWS query rows. Zeros stand for rows past the end: their q and dout are
// zeros too, so that P = 1 and dS = 1 · (0 - 0) meet zeros in every product.
template <int ROWS> __device__ __forceinline__ void load_rows(uint32_t to, const float2 *from, int first, int limit) {
  if (threadIdx.x < ROWS) {
    const int row = first + threadIdx.x, bytes = row < limit ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(to + 8 * threadIdx.x),
                 "l"(from + (row < limit ? row : 0)), "r"(bytes));
  }
}

// Accumulators as they are, to the rows of a split: 32 bytes of a row at once.
template <int D, int MT>
__device__ __forceinline__ void store_part(const float (&x)[MT][D / 8][4], float *to, int stride, int first, int limit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * m + 8 * half + lane / 4;
      if (row >= limit) continue;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2 *>(to + int64_t(row) * stride + 8 * n + lane % 4 * 2) =
            make_float2(x[m][n][2 * half], x[m][n][2 * half + 1]);
    }
}

// dk and dv from the sums of the splits, in their order; four values a thread, dv in the second half of the grid.
template <typename T> __device__ void attention_backward_sum(const AttentionBackwardSplitParams &all) {
  const AttentionBackwardParams &p = all.p;
  const AttentionShape &shape = p.shape;
  const int64_t part = int64_t(shape.batch) * shape.key_tokens * shape.kv_heads * p.d;
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= part) return;
  const float *from = all.parts + (blockIdx.y * all.splits) * part + at;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  for (int split = 0; split < all.splits; ++split) {
    float x[4];
    load_floats(from + split * part, x);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += x[e];
  }
  store_floats(static_cast<T *>(blockIdx.y == 0 ? p.dk : p.dv) + at, sum);
}

template <typename T, int D, int WARPS, int MT, int ROWS, int SUB, Gradients WHICH>
__device__ __forceinline__ void attention_backward_kv(const AttentionBackwardSplitParams &all) {
  const AttentionBackwardParams &p = all.p;
  constexpr bool WITH_KEYS = WHICH != VALUES_ONLY, WITH_VALUES = WHICH != KEYS_ONLY;
  constexpr int THREADS = 32 * WARPS, KEYS = 16 * MT * WARPS, NT = SUB / 8;
  static_assert(ROWS <= THREADS && ROWS % SUB == 0 && SUB % 16 == 0, "a walked tile is whole sub-tiles");
  // In bytes: keys, values, then q, dout and {lse, delta} twice.
  constexpr int K = 0, V = K + TILE_BYTES<KEYS, D>, Q = V + TILE_BYTES<KEYS, D>;
  constexpr int DOUT = Q + 2 * TILE_BYTES<ROWS, D>, STATS = DOUT + 2 * TILE_BYTES<ROWS, D>;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const AttentionShape &shape = p.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp * 16 * MT;

  // The first keys first: under a causal mask the most queries see them.
  const int num_tiles = (shape.key_tokens + KEYS - 1) / KEYS;
  const int2 place = all.place(num_tiles, shape.batch * shape.kv_heads * all.splits);
  const int key0 = place.x * KEYS;
  const int split = place.y % all.splits;
  const int kv_head = place.y / all.splits % shape.kv_heads;
  const int batch = place.y / all.splits / shape.kv_heads;
  const int group = shape.query_heads / shape.kv_heads / all.splits; // query heads of this block
  const int first_head = (kv_head * all.splits + split) * group;
  const int q_stride = shape.query_heads * D, kv_stride = shape.kv_heads * D;
  const int64_t q_start = int64_t(batch) * shape.query_tokens * q_stride;
  const int64_t kv_start = int64_t(batch) * shape.key_tokens * kv_stride + int64_t(kv_head) * D;

  const int first_row = shape.first_row(key0), end_row = shape.end_row(key0 + KEYS);
  const int first_tile = first_row / ROWS;
  const int tiles_a_head = end_row > first_row ? (end_row + ROWS - 1) / ROWS - first_tile : 0;
  const float to_exp2 = shape.scale * LOG2_E;

  // Walked tile `step` is rows of query head first_head + step / tiles_a_head.
  const auto load_step = [&](int step) {
    const int head = first_head + step / tiles_a_head;
    const int row0 = (first_tile + step % tiles_a_head) * ROWS, buffer = step % 2;
    const int64_t start = q_start + int64_t(head) * D;
    load_tile<T, D, ROWS, THREADS>(shared + Q + buffer * TILE_BYTES<ROWS, D>, static_cast<const T *>(p.q) + start,
                                   q_stride, row0, shape.query_tokens);
    load_tile<T, D, ROWS, THREADS>(shared + DOUT + buffer * TILE_BYTES<ROWS, D>,
                                   static_cast<const T *>(p.dout) + start, q_stride, row0, shape.query_tokens);
    load_rows<ROWS>(shared + STATS + buffer * ROWS * 8,
                    p.rows + (int64_t(batch) * shape.query_heads + head) * shape.query_tokens, row0,
                    shape.query_tokens);
  };

  float dk[WITH_KEYS ? MT : 1][D / 8][4], dv[WITH_VALUES ? MT : 1][D / 8][4];
  if constexpr (WITH_KEYS) clear(dk);
  if constexpr (WITH_VALUES) clear(dv);

  const int num_steps = group * tiles_a_head;
  if (num_steps > 0) {
    load_tile<T, D, KEYS, THREADS>(shared + K, static_cast<const T *>(p.k) + kv_start, kv_stride, key0,
                                   shape.key_tokens);
    if constexpr (WITH_KEYS)
      load_tile<T, D, KEYS, THREADS>(shared + V, static_cast<const T *>(p.v) + kv_start, kv_stride, key0,
                                     shape.key_tokens);
    load_step(0);
    copy_commit();
  }
  for (int step = 0; step < num_steps; ++step) {
    copy_wait<0>();
    __syncthreads(); // This step's tiles are there, and no warp reads those of the step before any more.
    if (step + 1 < num_steps) {
      load_step(step + 1);
      copy_commit();
    }
    const int row0 = (first_tile + step % tiles_a_head) * ROWS, buffer = step % 2;
    const uint32_t q_tile = shared + Q + buffer * TILE_BYTES<ROWS, D>;
    const uint32_t dout_tile = shared + DOUT + buffer * TILE_BYTES<ROWS, D>;
    const bool edge = shape.is_edge(row0, ROWS, key0, KEYS);

    // Not unrolled: the sub-tiles of a step would share registers that there are none of.
#pragma unroll 1
    for (int sub = 0; sub < ROWS; sub += SUB) {
      float probabilities[MT][NT][4]; // transposed: rows are keys, columns are queries
      clear(probabilities);
      multiply_rows<T, D, MT, NT>(probabilities, shared + K, warp_row, q_tile, sub);

      // Columns 2·(lane%4) and the next of each 8: {lse, delta} of both in one load.
      const float4 *stats = reinterpret_cast<const float4 *>(memory + STATS + (buffer * ROWS + sub) * 8) + lane % 4;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float4 pair = stats[4 * n];
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            probabilities[m][n][e] =
                exp2_fast(fmaf(probabilities[m][n][e], to_exp2, -(e % 2 == 0 ? pair.x : pair.z)));
      }
      if (edge) {
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int key = key0 + warp_row + 16 * m + 8 * half + lane / 4;
            // No row sees a key past the end.
            const int low = key < shape.key_tokens ? key - shape.right - shape.offset() : INT32_MAX;
            const int high = key + shape.left - shape.offset();
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int row = row0 + sub + 8 * n + lane % 4 * 2 + e;
                if (row < low || row > high) probabilities[m][n][2 * half + e] = 0.f;
              }
          }
      }

      uint32_t left[MT][NT / 2][4];
      if constexpr (WITH_VALUES) {
        as_left<T>(left, probabilities);
        multiply_columns<T, D, MT, NT / 2>(dv, left, dout_tile, sub);
      }
      if constexpr (WITH_KEYS) {
        float ds[MT][NT][4];
        clear(ds);
        multiply_rows<T, D, MT, NT>(ds, shared + V, warp_row, dout_tile, sub);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float4 pair = stats[4 * n];
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              ds[m][n][e] = probabilities[m][n][e] * (ds[m][n][e] - (e % 2 == 0 ? pair.y : pair.w));
        }
        as_left<T>(left, ds);
        multiply_columns<T, D, MT, NT / 2>(dk, left, q_tile, sub);
      }
    }
  }

  if constexpr (WITH_KEYS) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[m][n][e] *= shape.scale;
  }
  if (all.splits > 1) {
    const int64_t part = int64_t(shape.batch) * shape.key_tokens * kv_stride;
    float *to = all.parts + split * part + kv_start;
    if constexpr (WITH_KEYS) store_part<D, MT>(dk, to, kv_stride, key0 + warp_row, shape.key_tokens);
    if constexpr (WITH_VALUES)
      store_part<D, MT>(dv, to + all.splits * part, kv_stride, key0 + warp_row, shape.key_tokens);
    return;
  }
  __syncthreads(); // No warp reads the keys any more: they are the room through which the gradients leave.
  if constexpr (WITH_VALUES)
    store_rows<T, D, MT>(dv, memory + V, warp_row, static_cast<T *>(p.dv) + kv_start, kv_stride, key0,
                         shape.key_tokens);
  if constexpr (WITH_KEYS) {
    store_rows<T, D, MT>(dk, memory + K, warp_row, static_cast<T *>(p.dk) + kv_start, kv_stride, key0,
                         shape.key_tokens);
  }
}

template <typename T, int D, int WARPS, int MT, int KEYS, int SUB>
__device__ __forceinline__ void attention_backward_q(const AttentionBackwardSplitParams &all) {
  const AttentionBackwardParams &p = all.p;
  constexpr int THREADS = 32 * WARPS, ROWS = 16 * MT * WARPS, NT = SUB / 8;
  static_assert(KEYS % SUB == 0 && SUB % 16 == 0, "a walked tile is whole sub-tiles");
  constexpr int Q = 0, DOUT = Q + TILE_BYTES<ROWS, D>, K = DOUT + TILE_BYTES<ROWS, D>;
  constexpr int V = K + 2 * TILE_BYTES<KEYS, D>;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const AttentionShape &shape = p.shape;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * MT;

  const int num_tiles = (shape.query_tokens + ROWS - 1) / ROWS;
  const int2 place = all.place(num_tiles, shape.batch * shape.query_heads);
  const int row0 = (num_tiles - 1 - place.x) * ROWS;
  const int head = place.y % shape.query_heads, batch = place.y / shape.query_heads;
  const int kv_head = head / (shape.query_heads / shape.kv_heads);
  const int q_stride = shape.query_heads * D, kv_stride = shape.kv_heads * D;
  const int64_t q_start = int64_t(batch) * shape.query_tokens * q_stride + int64_t(head) * D;
  const int64_t kv_start = int64_t(batch) * shape.key_tokens * kv_stride + int64_t(kv_head) * D;

  const int first_key = shape.first_key(row0), end_key = shape.end_key(row0 + ROWS);
  const int first_tile = first_key / KEYS, end_tile = end_key > first_key ? (end_key + KEYS - 1) / KEYS : first_tile;
  const float to_exp2 = shape.scale * LOG2_E;

  const auto load_step = [&](int tile, int buffer) {
    load_tile<T, D, KEYS, THREADS>(shared + K + buffer * TILE_BYTES<KEYS, D>, static_cast<const T *>(p.k) + kv_start,
                                   kv_stride, tile * KEYS, shape.key_tokens);
    load_tile<T, D, KEYS, THREADS>(shared + V + buffer * TILE_BYTES<KEYS, D>, static_cast<const T *>(p.v) + kv_start,
                                   kv_stride, tile * KEYS, shape.key_tokens);
  };

  float dq[MT][D / 8][4];
  clear(dq);
  float lse[MT][2], delta[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + warp_row + 16 * m + 8 * half + lane / 4;
      const int64_t at = (int64_t(batch) * shape.query_heads + head) * shape.query_tokens + row;
      const float2 pair = row < shape.query_tokens ? p.rows[at] : make_float2(0.f, 0.f);
      lse[m][half] = pair.x, delta[m][half] = pair.y;
    }

  if (first_tile < end_tile) {
    load_tile<T, D, ROWS, THREADS>(shared + Q, static_cast<const T *>(p.q) + q_start, q_stride, row0,
                                   shape.query_tokens);
    load_tile<T, D, ROWS, THREADS>(shared + DOUT, static_cast<const T *>(p.dout) + q_start, q_stride, row0,
                                   shape.query_tokens);
    load_step(end_tile - 1, 0);
    copy_commit();
  }
  for (int tile = end_tile - 1, buffer = 0; tile >= first_tile; --tile, buffer ^= 1) {
    copy_wait<0>();
    __syncthreads(); // This tile is there, and no warp reads the one before any more.
    if (tile > first_tile) {
      load_step(tile - 1, buffer ^ 1);
      copy_commit();
    }
    const int key0 = tile * KEYS;
    const uint32_t k_tile = shared + K + buffer * TILE_BYTES<KEYS, D>;
    const uint32_t v_tile = shared + V + buffer * TILE_BYTES<KEYS, D>;
    const bool edge = shape.is_edge(row0, ROWS, key0, KEYS);

#pragma unroll
    for (int sub = 0; sub < KEYS; sub += SUB) {
      float probabilities[MT][NT][4], ds[MT][NT][4];
      clear(probabilities);
      clear(ds);
      multiply_rows<T, D, MT, NT>(probabilities, shared + Q, warp_row, k_tile, sub);
      multiply_rows<T, D, MT, NT>(ds, shared + DOUT, warp_row, v_tile, sub);
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int position = row0 + warp_row + 16 * m + 8 * half + lane / 4 + shape.offset();
          const int low = position - shape.left, high = min(position + shape.right, shape.key_tokens - 1);
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int at = 2 * half + e, key = key0 + sub + 8 * n + lane % 4 * 2 + e;
              const bool hidden = edge && (key < low || key > high);
              const float probability =
                  hidden ? 0.f : exp2_fast(fmaf(probabilities[m][n][at], to_exp2, -lse[m][half]));
              ds[m][n][at] = probability * (ds[m][n][at] - delta[m][half]);
            }
        }
      uint32_t left[MT][NT / 2][4];
      as_left<T>(left, ds);
      multiply_columns<T, D, MT, NT / 2>(dq, left, k_tile, sub);
    }
  }

#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[m][n][e] *= shape.scale;
  // Only this warp ever read its rows of the query tile.
  store_rows<T, D, MT>(dq, memory + Q, warp_row, static_cast<T *>(p.dq) + q_start, q_stride, row0,
                       shape.query_tokens);
}

#define ATTENTION_BACKWARD_KV(NAME, T, D, SUFFIX, WHICH, WARPS, MT, ROWS, SUB, BLOCKS)                                 \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                     \
      attention_backward_kv##SUFFIX##_##NAME##_##D(const __grid_constant__ AttentionBackwardSplitParams p) {           \
    attention_backward_kv<T, D, WARPS, MT, ROWS, SUB, WHICH>(p);                                                       \
  }

#define ATTENTION_BACKWARD_Q(NAME, T, D, WARPS, MT, KEYS, SUB, BLOCKS)                                                 \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                     \
      attention_backward_q_##NAME##_##D(const __grid_constant__ AttentionBackwardSplitParams p) {                      \
    attention_backward_q<T, D, WARPS, MT, KEYS, SUB>(p);                                                               \
  }

#define ATTENTION_BACKWARD_TYPE(NAME, T)                                                                               \
  extern "C" __global__ void attention_backward_rows_##NAME(const __grid_constant__ AttentionBackwardSplitParams p) {  \
    attention_backward_rows<T>(p.p);                                                                                   \
  }                                                                                                                    \
  extern "C" __global__ void attention_backward_sum_##NAME(const __grid_constant__ AttentionBackwardSplitParams p) {   \
    attention_backward_sum<T>(p);                                                                                      \
  }                                                                                                                    \
  ATTENTION_BACKWARD_KV(NAME, T, 64, , KEYS_AND_VALUES, 4, 2, 64, 32, 2)                                               \
  ATTENTION_BACKWARD_KV(NAME, T, 96, , KEYS_AND_VALUES, 8, 1, 64, 32, 1)                                               \
  ATTENTION_BACKWARD_KV(NAME, T, 128, , KEYS_AND_VALUES, 8, 1, 64, 32, 1)                                              \
  ATTENTION_BACKWARD_KV(NAME, T, 256, _dk, KEYS_ONLY, 8, 1, 16, 16, 1)                                                 \
  ATTENTION_BACKWARD_KV(NAME, T, 256, _dv, VALUES_ONLY, 8, 1, 16, 16, 1)                                               \
  ATTENTION_BACKWARD_Q(NAME, T, 64, 4, 2, 64, 32, 2)                                                                   \
  ATTENTION_BACKWARD_Q(NAME, T, 96, 8, 1, 64, 32, 1)                                                                   \
  ATTENTION_BACKWARD_Q(NAME, T, 128, 4, 2, 32, 32, 2)                                                                  \
  ATTENTION_BACKWARD_Q(NAME, T, 256, 8, 1, 16, 16, 1)

ATTENTION_BACKWARD_TYPE(bf16, __nv_bfloat16)
ATTENTION_BACKWARD_TYPE(f16, __half)
