// Dense attention, backward, f32, without atomics. With P = e^(scores - lse), dP = dout vᵀ and dS = P ∘ (dP - delta):
//   dv = Pᵀ dout, dk = scale · dSᵀ q, dq = scale · dS k, delta = rowsum(dout ∘ out) - dlse.
// attention_backward_rows: per query row {lse · log2 e, delta}, eight lanes a row.
// attention_backward_kv: a block takes 32 keys, a warp 4 of them, and walks the queries of all heads of the group.
// attention_backward_q: a block takes 32 queries, a warp 4 of them, and walks their keys.
// Tiles of 32 rows, one a lane, as in the forward kernel. Plain FMA; bound by shared memory.
// Shared memory: two tiles of the block's rows and two walked ones, 4 · 32 · (d + 4) floats: 130 KiB at d = 256.
#include "attention_rows_f32.cuh"

extern "C" __global__ void attention_backward_rows_f32(const __grid_constant__ AttentionBackwardParams p) {
  attention_backward_rows<float>(p);
}

extern "C" __global__ void __launch_bounds__(f32::THREADS)
    attention_backward_kv_f32(const __grid_constant__ AttentionBackwardParams p) {
  using namespace f32;
  extern __shared__ __align__(16) float memory_f32[];
  const AttentionShape &shape = p.shape;
  const int d = p.d, lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * ROWS;
  float *k_tile = memory_f32, *v_tile = k_tile + TILE * pitch(d), *q_tile = v_tile + TILE * pitch(d);
  float *dout_tile = q_tile + TILE * pitch(d);

  const int num_tiles = (shape.key_tokens + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int key0 = int(blockIdx.x % num_tiles) * BLOCK_ROWS;
  const int kv_head = int(blockIdx.x / num_tiles) % shape.kv_heads;
  const int batch = int(blockIdx.x / num_tiles) / shape.kv_heads;
  const int group = shape.query_heads / shape.kv_heads;
  const int64_t q_stride = int64_t(shape.query_heads) * d, kv_stride = int64_t(shape.kv_heads) * d;
  const int64_t kv_start = int64_t(batch) * shape.key_tokens * kv_stride + int64_t(kv_head) * d;

  float dk[ROWS][MAX_CHUNKS] = {}, dv[ROWS][MAX_CHUNKS] = {};
  load(k_tile, static_cast<const float *>(p.k) + kv_start, kv_stride, key0, shape.key_tokens, d);
  load(v_tile, static_cast<const float *>(p.v) + kv_start, kv_stride, key0, shape.key_tokens, d);
  const int first_row = shape.first_row(key0) / TILE * TILE, end_row = shape.end_row(key0 + BLOCK_ROWS);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t q_start = int64_t(batch) * shape.query_tokens * q_stride + int64_t(head) * d;
    for (int row0 = first_row; row0 < end_row; row0 += TILE) {
      __syncthreads(); // No warp reads the tiles before any more.
      load(q_tile, static_cast<const float *>(p.q) + q_start, q_stride, row0, shape.query_tokens, d);
      load(dout_tile, static_cast<const float *>(p.dout) + q_start, q_stride, row0, shape.query_tokens, d);
      __syncthreads();
      const int row = row0 + lane, position = row + shape.offset();
      const int64_t at = (int64_t(batch) * shape.query_heads + head) * shape.query_tokens + row;
      const float2 stats = row < shape.query_tokens ? p.rows[at] : make_float2(INFINITY, 0.f);
      float probability[ROWS], ds[ROWS];
      dots(probability, k_tile + warp_row * pitch(d), q_tile, d);
      dots(ds, v_tile + warp_row * pitch(d), dout_tile, d);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int key = key0 + warp_row + r;
        const bool visible = key >= position - shape.left && key <= position + shape.right && key < shape.key_tokens;
        probability[r] = visible ? exp2f(fmaf(probability[r], shape.scale * LOG2_E, -stats.x)) : 0.f;
        ds[r] = probability[r] * (ds[r] - stats.y);
      }
      add_rows(dv, probability, dout_tile, d);
      add_rows(dk, ds, q_tile, d);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int key = key0 + warp_row + r;
    if (key >= shape.key_tokens) continue;
    store(dk[r], shape.scale, static_cast<float *>(p.dk) + kv_start + key * kv_stride, d);
    store(dv[r], 1.f, static_cast<float *>(p.dv) + kv_start + key * kv_stride, d);
  }
}

extern "C" __global__ void __launch_bounds__(f32::THREADS)
    attention_backward_q_f32(const __grid_constant__ AttentionBackwardParams p) {
  using namespace f32;
  extern __shared__ __align__(16) float memory_f32[];
  const AttentionShape &shape = p.shape;
  const int d = p.d, lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * ROWS;
  float *q_tile = memory_f32, *dout_tile = q_tile + TILE * pitch(d), *k_tile = dout_tile + TILE * pitch(d);
  float *v_tile = k_tile + TILE * pitch(d);

  const int num_tiles = (shape.query_tokens + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int row0 = (num_tiles - 1 - int(blockIdx.x % num_tiles)) * BLOCK_ROWS;
  const int head = int(blockIdx.x / num_tiles) % shape.query_heads;
  const int batch = int(blockIdx.x / num_tiles) / shape.query_heads;
  const int kv_head = head / (shape.query_heads / shape.kv_heads);
  const int64_t q_stride = int64_t(shape.query_heads) * d, kv_stride = int64_t(shape.kv_heads) * d;
  const int64_t q_start = int64_t(batch) * shape.query_tokens * q_stride + int64_t(head) * d;
  const int64_t kv_start = int64_t(batch) * shape.key_tokens * kv_stride + int64_t(kv_head) * d;

  float dq[ROWS][MAX_CHUNKS] = {};
  float2 stats[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = row0 + warp_row + r;
    const int64_t at = (int64_t(batch) * shape.query_heads + head) * shape.query_tokens + row;
    stats[r] = row < shape.query_tokens ? p.rows[at] : make_float2(INFINITY, 0.f);
  }
  load(q_tile, static_cast<const float *>(p.q) + q_start, q_stride, row0, shape.query_tokens, d);
  load(dout_tile, static_cast<const float *>(p.dout) + q_start, q_stride, row0, shape.query_tokens, d);
  const int end_key = shape.end_key(row0 + BLOCK_ROWS);
  for (int key0 = shape.first_key(row0) / TILE * TILE; key0 < end_key; key0 += TILE) {
    __syncthreads(); // No warp reads the tiles before any more.
    load(k_tile, static_cast<const float *>(p.k) + kv_start, kv_stride, key0, shape.key_tokens, d);
    load(v_tile, static_cast<const float *>(p.v) + kv_start, kv_stride, key0, shape.key_tokens, d);
    __syncthreads();
    float score[ROWS], ds[ROWS];
    dots(score, q_tile + warp_row * pitch(d), k_tile, d);
    dots(ds, dout_tile + warp_row * pitch(d), v_tile, d);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int position = row0 + warp_row + r + shape.offset(), key = key0 + lane;
      const bool visible = key >= position - shape.left && key <= position + shape.right && key < shape.key_tokens;
      const float probability = visible ? exp2f(fmaf(score[r], shape.scale * LOG2_E, -stats[r].x)) : 0.f;
      ds[r] = probability * (ds[r] - stats[r].y);
    }
    add_rows(dq, ds, k_tile, d);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = row0 + warp_row + r;
    if (row < shape.query_tokens)
      store(dq[r], shape.scale, static_cast<float *>(p.dq) + q_start + row * q_stride, d);
  }
}
