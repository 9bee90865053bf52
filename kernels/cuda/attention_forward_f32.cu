// Dense attention, forward, f32: out = softmax(q kᵀ · scale) v, lse = log Σ e^score, with one online softmax.
// A block takes 32 queries of one head, a warp 4 of them, and walks their keys in tiles of 32: a lane scores one key, then
// owns every 32nd column of the output. Plain FMA; bound by shared memory (5 loads of 16 bytes for 16 FMA). For tests and
// for models in f32; 16-bit models take attention_forward_sm80.cu.
// Shared memory: q, k and v, 3 · 32 · (d + 4) floats: 25.5 KiB at d = 64, 97.5 KiB at 256.
#include "attention_rows_f32.cuh"

extern "C" __global__ void __launch_bounds__(f32::THREADS)
    attention_forward_f32(const __grid_constant__ AttentionForwardParams p) {
  using namespace f32;
  extern __shared__ __align__(16) float memory_f32[];
  const AttentionShape &shape = p.shape;
  const int d = p.d, lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * ROWS;
  float *q_tile = memory_f32, *k_tile = q_tile + TILE * pitch(d), *v_tile = k_tile + TILE * pitch(d);

  const int num_tiles = (shape.query_tokens + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int row0 = (num_tiles - 1 - int(blockIdx.x % num_tiles)) * BLOCK_ROWS;
  const int head = int(blockIdx.x / num_tiles) % shape.query_heads;
  const int batch = int(blockIdx.x / num_tiles) / shape.query_heads;
  const int kv_head = head / (shape.query_heads / shape.kv_heads);
  const int64_t q_stride = int64_t(shape.query_heads) * d, kv_stride = int64_t(shape.kv_heads) * d;
  const int64_t q_start = int64_t(batch) * shape.query_tokens * q_stride + int64_t(head) * d;
  const int64_t kv_start = int64_t(batch) * shape.key_tokens * kv_stride + int64_t(kv_head) * d;

  float out[ROWS][MAX_CHUNKS] = {}, row_max[ROWS], row_sum[ROWS] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) row_max[r] = -INFINITY;
  load(q_tile, static_cast<const float *>(p.q) + q_start, q_stride, row0, shape.query_tokens, d);
  const int end_key = shape.end_key(row0 + BLOCK_ROWS);
  for (int key0 = shape.first_key(row0) / TILE * TILE; key0 < end_key; key0 += TILE) {
    __syncthreads(); // No warp reads the tiles before any more.
    load(k_tile, static_cast<const float *>(p.k) + kv_start, kv_stride, key0, shape.key_tokens, d);
    load(v_tile, static_cast<const float *>(p.v) + kv_start, kv_stride, key0, shape.key_tokens, d);
    __syncthreads();
    float weight[ROWS];
    dots(weight, q_tile + warp_row * pitch(d), k_tile, d);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int position = row0 + warp_row + r + shape.offset(), key = key0 + lane;
      const bool visible = key >= position - shape.left && key <= position + shape.right && key < shape.key_tokens;
      const float score = visible ? weight[r] * shape.scale : -INFINITY;
      const float max = fmaxf(row_max[r], warp_max(score));
      // While a row has seen no key its maximum is -inf: 0 in its place, never -inf - -inf.
      const float shift = max == -INFINITY ? 0.f : max;
      const float correction = expf(row_max[r] - shift);
      row_max[r] = max;
      weight[r] = expf(score - shift);
      row_sum[r] = row_sum[r] * correction + warp_sum(weight[r]);
#pragma unroll
      for (int c = 0; c < MAX_CHUNKS; ++c) out[r][c] *= correction;
    }
    add_rows(out, weight, v_tile, d);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = row0 + warp_row + r;
    if (row >= shape.query_tokens) continue;
    const bool none = row_sum[r] == 0.f;
    store(out[r], none ? 0.f : 1.f / row_sum[r], static_cast<float *>(p.out) + q_start + row * q_stride, d);
    if (lane == 0)
      p.lse[(int64_t(batch) * shape.query_heads + head) * shape.query_tokens + row] =
          none ? -INFINITY : row_max[r] + logf(row_sum[r]);
  }
}
