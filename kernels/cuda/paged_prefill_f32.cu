// Attention of many query rows over pages, f32: out = softmax(q kᵀ · scale + bias) v, one online softmax.
//
// Block: (tile of 64 query rows, key/value head, run of queries), 256 threads; rows are (token, head of the group), so
// that the heads of a group share every page. Thread (y, x) of 16 x 16 scores rows 4y..4y+3 against keys x, x+16, x+32, x+48, and
// owns the same rows' columns 4x..4x+3 (+64, ..) of the output; a row's sixteen threads are half a warp, so that its
// softmax needs no barrier. K and V of a page come by cp.async, each while the other is multiplied.
//
// Bound by arithmetic (FMA, no tensor cores: f32 stays f32). Shared memory 64 · (3d + 4 + 64) · 4 B = 113 KiB at
// d = 128: with the 1 KiB that each block reserves, two are exactly the 228 KiB of a Hopper SM (one block on A100).
// Only K is read by eight rows at once and needs padding.
#include "mma_sm80.cuh"
#include "paged.cuh"

constexpr int ROWS = 64;
constexpr int THREADS = 256;
constexpr int MAX_RUNS = 16;

// Query tokens that attend to pages of their own.
struct Run {
  uint32_t first, queries;
  uint32_t first_page, end_page; // of the list
};

struct PrefillParams {
  PagedParams all;
  Run runs[MAX_RUNS]; // one for each block of the third dimension
};
static_assert(sizeof(PrefillParams) <= 4096, "parameters of a launch");

template <int D> __device__ __forceinline__ void prefill(const PagedParams &p, const Run &run) {
  static_assert(D % 16 == 0, "whole float4 columns");
  constexpr int STRIDE = D + 4; // 16-byte units: odd, so that eight rows meet eight different bank groups
  constexpr int PARTS = (D + 63) / 64; // output columns of a thread, four each
  extern __shared__ __align__(16) float shared[];
  float *q = shared, *k = q + ROWS * D, *v = k + PAGE_TOKENS * STRIDE, *weights = v + PAGE_TOKENS * D;

  const int tid = threadIdx.x, y = tid / 16, x = tid % 16;
  // The last tile sees most: it starts first.
  const uint32_t row0 = run.first * p.group + (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y;
  const uint32_t rows = (run.first + run.queries) * p.group;
  if (row0 >= rows) return;
  const TileView view = view_of_rows(p, row0, ROWS);

  const auto next_page = [&](uint32_t i) {
    while (i < run.end_page && !view.any(page_at(p, i))) i++;
    return i;
  };
  const auto load = [&](float *to, int stride, const void *pool, const Page &page) {
    const float *from = static_cast<const float *>(pool) + (uint64_t(page.slot) * p.g + head) * PAGE_TOKENS * D;
    const uint32_t base = shared_address(to);
    for (int i = tid; i < PAGE_TOKENS * (D / 4); i += THREADS) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      const bool valid = row < int(page.len);
      copy_async_16(base + (row * stride + column) * 4, from + (valid ? row * D + column : 0), valid);
    }
  };

  for (int i = tid; i < ROWS * (D / 4); i += THREADS) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    const bool valid = row0 + row < rows;
    const float *from = static_cast<const float *>(p.q);
    copy_async_16(shared_address(q + row * D + column),
                  valid ? from + output_row(p, head, row0 + row) * D + column : from, valid);
  }
  Visible sees[4];
#pragma unroll
  for (int i = 0; i < 4; i++) sees[i] = visible_to_row(p, row0 + 4 * y + i);
  float o[4][PARTS][4] = {};
  float max[4], sum[4];
#pragma unroll
  for (int i = 0; i < 4; i++) max[i] = -INFINITY, sum[i] = 0.0f;

  uint32_t at = next_page(run.first_page);
  if (at < run.end_page) load(k, STRIDE, p.keys, page_at(p, at));
  copy_commit();
  while (at < run.end_page) {
    const Page page = page_at(p, at);
    load(v, D, p.values, page);
    copy_commit();
    copy_wait<1>(); // K, and q the first time
    __syncthreads();
    float s[4][4] = {};
#pragma unroll 2
    for (int c = 0; c < D; c += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[i] = *reinterpret_cast<const float4 *>(q + (4 * y + i) * D + c);
        b[i] = *reinterpret_cast<const float4 *>(k + (x + 16 * i) * STRIDE + c);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
          s[i][j] = fmaf(a[i].x, b[j].x, fmaf(a[i].y, b[j].y, fmaf(a[i].z, b[j].z, fmaf(a[i].w, b[j].w, s[i][j]))));
      }
    }
    __syncthreads(); // K is read
    at = next_page(at + 1);
    if (at < run.end_page) load(k, STRIDE, p.keys, page_at(p, at));
    copy_commit();

    const bool all = view.all(page); // what rows behind the last see is not stored
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float top = max[i];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int key = x + 16 * j;
        const bool visible = all || (key < int(page.len) && sees[i].sees(page.start + key));
        s[i][j] = visible ? fmaf(s[i][j], p.scale, page.bias) : -INFINITY;
        top = fmaxf(top, s[i][j]);
      }
#pragma unroll
      for (int offset = 1; offset < 16; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
      const float rescale = rescale_from(max[i], top), base = top == -INFINITY ? 0.0f : top;
      max[i] = top;
      sum[i] *= rescale;
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int e = 0; e < 4; e++) o[i][part][e] *= rescale;
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float weight = exp2f(s[i][j] - base);
        sum[i] += weight;
        weights[(4 * y + i) * PAGE_TOKENS + x + 16 * j] = weight;
      }
    }
    copy_wait<1>(); // V
    __syncthreads();
#pragma unroll 2
    for (int key = 0; key < PAGE_TOKENS; key += 4) {
      float w[4][4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        *reinterpret_cast<float4 *>(w[i]) =
            *reinterpret_cast<const float4 *>(weights + (4 * y + i) * PAGE_TOKENS + key);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int column = 4 * x + 64 * part;
        if (D % 64 == 0 || column < D) {
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const float4 b = *reinterpret_cast<const float4 *>(v + (key + j) * D + column);
#pragma unroll
            for (int i = 0; i < 4; i++) {
              o[i][part][0] = fmaf(w[i][j], b.x, o[i][part][0]);
              o[i][part][1] = fmaf(w[i][j], b.y, o[i][part][1]);
              o[i][part][2] = fmaf(w[i][j], b.z, o[i][part][2]);
              o[i][part][3] = fmaf(w[i][j], b.w, o[i][part][3]);
            }
          }
        }
      }
    }
    __syncthreads(); // V and the weights are read
  }
  copy_wait<0>();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float total = sum[i];
#pragma unroll
    for (int offset = 1; offset < 16; offset *= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    const uint32_t row = row0 + 4 * y + i;
    if (row >= rows) continue;
    const uint64_t to = output_row(p, head, row);
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int column = 4 * x + 64 * part;
      if (D % 64 == 0 || column < D)
        *reinterpret_cast<float4 *>(static_cast<float *>(p.out) + to * D + column) = make_float4(
            o[i][part][0] * scale, o[i][part][1] * scale, o[i][part][2] * scale, o[i][part][3] * scale);
    }
    if (x == 0) p.lse[to] = total > 0.0f ? max[i] * 0.693147180559945f + logf(total) : -INFINITY;
  }
}

// On Hopper the compiler keeps to 128 registers by itself, which two blocks need. On A100 the shared memory holds one
// block: a bound of one lets it take more and spill none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define BOUNDS __launch_bounds__(THREADS)
#else
#define BOUNDS __launch_bounds__(THREADS, 1)
#endif

#define KERNEL(D) \
  extern "C" __global__ void BOUNDS paged_prefill_f32_##D(const __grid_constant__ PrefillParams p) { \
    prefill<D>(p.all, p.runs[blockIdx.z]); \
  }
KERNEL(16)
KERNEL(32)
KERNEL(64)
KERNEL(96)
KERNEL(128)
KERNEL(256)
