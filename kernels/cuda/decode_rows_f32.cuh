// A split of a few query rows over pages, f32: what the kernels share that take one list and several.
//
// Block: (key/value head, split of the page list, tile of 8 query rows), d threads. K of a page goes to shared memory
// by cp.async, one page ahead; a thread then scores one key for its share of the rows. V goes straight to registers:
// a thread owns four columns of 16 keys, loaded before the scores are computed.
//
// Bound by memory: 8 rows are 16 FMA for each float of K or V, below the 35 FMA that an SM does in the time of one
// float. Shared memory 2 · 64 · (d+4) · 4 B = 66 KiB at d = 128, and 8 KiB of q, scores and weights: two
// blocks of a Hopper SM.
#pragma once
#include "mma_sm80.cuh"
#include "paged.cuh"

// Walks the pages of split `split` of `p.splits` and hands what it found, in shared memory, to `finish`: the weighted
// values, (8, D), the maximum and the sum of each row, and 8 · MAX_SPLITS floats that are free. `Params`: q, keys, values,
// sizes and what the queries see as in PagedParams.
template <int D, class Params, class Finish>
__device__ __forceinline__ void decode_rows(const Params &p, uint32_t split, const Finish &finish) {
  static_assert(D % 32 == 0 && D >= PAGE_TOKENS, "whole warps, a thread for each key");
  constexpr int THREADS = D;
  constexpr int PARTS = D / PAGE_TOKENS; // threads that share a key's rows
  constexpr int SHARE = DECODE_ROWS / PARTS;
  static_assert(SHARE * PARTS == DECODE_ROWS, "rows are shared evenly");
  constexpr int COLUMNS = D / 4;
  constexpr int GROUPS = THREADS / COLUMNS; // 4
  constexpr int KEYS = PAGE_TOKENS / GROUPS;
  constexpr int STRIDE = D + 4; // 16-byte units: odd, so that eight rows meet eight different bank groups
  extern __shared__ __align__(16) float shared[];
  float *k = shared; // two pages of (64, STRIDE); at the end (GROUPS, 8, D), then the weights of the splits
  __shared__ __align__(16) float q[DECODE_ROWS][D];
  __shared__ __align__(16) float weights[PAGE_TOKENS][DECODE_ROWS];
  __shared__ float scores[DECODE_ROWS][PAGE_TOKENS];
  __shared__ float row_max[DECODE_ROWS], row_sum[DECODE_ROWS], row_rescale[DECODE_ROWS];
  static_assert(2 * PAGE_TOKENS * STRIDE >= GROUPS * DECODE_ROWS * D + DECODE_ROWS * MAX_SPLITS, "reuse of k");

  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const uint32_t head = blockIdx.x, tile = blockIdx.z;
  const uint32_t row0 = tile * DECODE_ROWS;
  const float *keys = static_cast<const float *>(p.keys), *values = static_cast<const float *>(p.values);

  for (int i = tid; i < DECODE_ROWS * D; i += THREADS) {
    const uint32_t row = row0 + i / D;
    q[i / D][i % D] =
        row < p.t * p.group ? static_cast<const float *>(p.q)[output_row(p, head, row) * D + i % D] : 0.0f;
  }
  if (tid < DECODE_ROWS) row_max[tid] = -INFINITY, row_sum[tid] = 0.0f;
  const TileView view = view_of_rows(p, row0, DECODE_ROWS);

  const uint32_t begin = uint32_t(uint64_t(p.num_pages) * split / p.splits);
  const uint32_t end = uint32_t(uint64_t(p.num_pages) * (split + 1) / p.splits);
  const auto load_keys = [&](const Page &page, int stage) {
    const float *from = keys + (uint64_t(page.slot) * p.g + head) * PAGE_TOKENS * D;
    const uint32_t to = shared_address(k + stage * PAGE_TOKENS * STRIDE);
    for (int i = tid; i < PAGE_TOKENS * COLUMNS; i += THREADS) {
      const int row = i / COLUMNS, column = i % COLUMNS * 4;
      const bool valid = row < int(page.len);
      copy_async_16(to + (row * STRIDE + column) * 4, from + (valid ? row * D + column : 0), valid);
    }
  };
  const int group = tid / COLUMNS, column = tid % COLUMNS * 4;
  float o[DECODE_ROWS][4] = {};
  Page page = {};
  if (begin < end) {
    page = page_at(p, begin);
    load_keys(page, 0);
  }
  copy_commit();
  for (uint32_t i = begin; i < end; i++) {
    const int stage = (i - begin) % 2;
    const Page now = page;
    float4 v[KEYS];
    const float *from = values + ((uint64_t(now.slot) * p.g + head) * PAGE_TOKENS + group) * D + column;
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
      v[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (group + j * GROUPS < int(now.len)) v[j] = __ldg(reinterpret_cast<const float4 *>(from + j * GROUPS * D));
    }
    if (i + 1 < end) {
      page = page_at(p, i + 1);
      load_keys(page, stage ^ 1);
    }
    copy_commit();
    copy_wait<1>();
    __syncthreads();

    if (tid < PARTS * PAGE_TOKENS) {
      const int key = tid % PAGE_TOKENS, part = tid / PAGE_TOKENS;
      const float *at = k + (stage * PAGE_TOKENS + key) * STRIDE;
      float s[SHARE] = {};
#pragma unroll 4
      for (int x = 0; x < D; x += 4) {
        const float4 a = *reinterpret_cast<const float4 *>(at + x);
#pragma unroll
        for (int row = 0; row < SHARE; row++) {
          const float4 b = *reinterpret_cast<const float4 *>(&q[part * SHARE + row][x]);
          s[row] = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, s[row]))));
        }
      }
      const bool all = view.all(now);
#pragma unroll
      for (int row = 0; row < SHARE; row++) {
        const int tile_row = part * SHARE + row;
        const bool sees = all || (key < int(now.len) && visible_to_row(p, row0 + tile_row).sees(now.start + key));
        scores[tile_row][key] = sees ? fmaf(s[row], p.scale, now.bias) : -INFINITY;
      }
    }
    __syncthreads();
    for (int row = warp; row < DECODE_ROWS; row += THREADS / 32) {
      const float a = scores[row][lane], b = scores[row][lane + 32];
      const float old = row_max[row], top = fmaxf(old, warp_max(fmaxf(a, b)));
      const float base = top == -INFINITY ? 0.0f : top;
      const float x = exp2f(a - base), y = exp2f(b - base);
      const float sum = warp_sum(x + y);
      weights[lane][row] = x;
      weights[lane + 32][row] = y;
      __syncwarp(); // every lane has read the old maximum
      if (lane == 0) {
        const float rescale = rescale_from(old, top);
        row_max[row] = top;
        row_rescale[row] = rescale;
        row_sum[row] = fmaf(row_sum[row], rescale, sum);
      }
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < DECODE_ROWS; row++) {
      const float rescale = row_rescale[row];
#pragma unroll
      for (int x = 0; x < 4; x++) o[row][x] *= rescale;
    }
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
      const float4 low = *reinterpret_cast<const float4 *>(&weights[group + j * GROUPS][0]);
      const float4 high = *reinterpret_cast<const float4 *>(&weights[group + j * GROUPS][4]);
      const float w[DECODE_ROWS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int row = 0; row < DECODE_ROWS; row++) {
        o[row][0] = fmaf(w[row], v[j].x, o[row][0]);
        o[row][1] = fmaf(w[row], v[j].y, o[row][1]);
        o[row][2] = fmaf(w[row], v[j].z, o[row][2]);
        o[row][3] = fmaf(w[row], v[j].w, o[row][3]);
      }
    }
  }
  copy_wait<0>();
  __syncthreads();
  float *parts = k;
#pragma unroll
  for (int row = 0; row < DECODE_ROWS; row++)
    *reinterpret_cast<float4 *>(parts + (group * DECODE_ROWS + row) * D + column) =
        make_float4(o[row][0], o[row][1], o[row][2], o[row][3]);
  __syncthreads();
  for (int i = tid; i < DECODE_ROWS * D; i += THREADS) {
    float x = parts[i];
#pragma unroll
    for (int other = 1; other < GROUPS; other++) x += parts[other * DECODE_ROWS * D + i];
    parts[i] = x;
  }
  __syncthreads();
  finish(parts, row_max, row_sum, parts + GROUPS * DECODE_ROWS * D);
}
