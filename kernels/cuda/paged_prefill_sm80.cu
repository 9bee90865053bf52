// Attention of many query rows over pages, bf16 and f16: out = softmax(q kᵀ · scale + bias) v, one online softmax.
//
// Block: (tile of 128 query rows, key/value head); rows are (token, head of the group), so that the heads of a group
// share every page. A warp owns 16 · MT rows against the page's 64 keys, S and O in the accumulators of m16n8k16, P
// turned from accumulators into A fragments without leaving registers; Q, K and V come by ldmatrix (V transposed).
// K and V of the next page arrive by cp.async while this one is multiplied. Pages that no row sees are not loaded,
// and a warp passes over a page that none of its own rows sees.
//
// Bound by arithmetic. MT = 2 (4 warps) up to d = 128: every K and V fragment feeds two products, so that ldmatrix
// (4 cycles) keeps up with mma; at d = 256 O alone is 128 registers with MT = 1 (8 warps). A warp scores KEYS keys at
// a time: 32 where O and S of a whole page would not fit 255 registers. Rows of shared memory are
// d + 8 elements: 16-byte units odd, so that the eight rows of an ldmatrix meet different banks. Shared memory
// (128 + 4 · 64) · (d + 8) · 2 B = 102 KiB at d = 128: two blocks on Hopper; one, 198 KiB, at d = 256.
//
// Source: FlashAttention-2 (arXiv 2307.08691) algorithm 1.
#include "mma_sm80.cuh"
#include "paged.cuh"

constexpr int ROWS = 128;

template <typename T, int D, int MT, int KEYS> __device__ __forceinline__ void prefill(const PagedParams &p) {
  static_assert(D % 32 == 0, "whole k steps");
  constexpr int WARPS = ROWS / (16 * MT);
  constexpr int THREADS = WARPS * 32;
  constexpr int STRIDE = D + 8;
  constexpr int PAGE = PAGE_TOKENS * STRIDE;
  constexpr int CHUNKS = D / 8; // of 16 bytes
  constexpr int NS = KEYS / 8, NO = D / 8;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t q_at = shared_address(shared);
  const uint32_t kv_at = q_at + ROWS * STRIDE * 2; // two stages of K, V

  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  // The last tile sees most: it starts first.
  const uint32_t row0 = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y;
  const uint32_t rows = p.t * p.group;
  const TileView view = view_of_rows(p, row0, ROWS);
  const uint32_t warp_row0 = row0 + warp * 16 * MT;
  const TileView warp_view = view_of_rows(p, warp_row0, 16 * MT);

  const auto next_page = [&](uint32_t i) {
    while (i < p.num_pages && !view.any(page_at(p, i))) i++;
    return i;
  };
  const auto load = [&](const Page &page, int stage) {
    const uint64_t from = (uint64_t(page.slot) * p.g + head) * PAGE_TOKENS * D;
    const T *keys = static_cast<const T *>(p.keys) + from, *values = static_cast<const T *>(p.values) + from;
    const uint32_t to = kv_at + stage * 2 * PAGE * 2;
    for (int i = tid; i < PAGE_TOKENS * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, column = i % CHUNKS * 8;
      const bool valid = row < int(page.len);
      const int offset = valid ? row * D + column : 0;
      copy_async_16(to + (row * STRIDE + column) * 2, keys + offset, valid);
      copy_async_16(to + (PAGE + row * STRIDE + column) * 2, values + offset, valid);
    }
  };

  for (int i = tid; i < ROWS * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, column = i % CHUNKS * 8;
    const bool valid = row0 + row < rows;
    const T *from = static_cast<const T *>(p.q);
    copy_async_16(q_at + (row * STRIDE + column) * 2,
                  valid ? from + output_row(p, head, row0 + row) * D + column : from, valid);
  }
  // In shared memory, since only the pages at an edge of what is visible ask for it.
  __shared__ Visible sees[ROWS];
  for (int i = tid; i < ROWS; i += THREADS) sees[i] = visible_to_row(p, row0 + i);
  float o[MT][NO][4] = {};
  float max[MT][2], sum[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      max[m][i] = -INFINITY, sum[m][i] = 0.0f;
    }
  }
  // Where a lane's row of an ldmatrix lies: A of Q, B of K (keys are columns), B of V (transposed).
  const uint32_t q_lane = q_at + ((warp * 16 * MT + lane % 16) * STRIDE + lane / 16 * 8) * 2;
  const uint32_t k_lane = ((lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8) * 2;
  const uint32_t v_lane = (lane % 16 * STRIDE + lane / 16 * 8) * 2;

  uint32_t at = next_page(0);
  if (at < p.num_pages) load(page_at(p, at), 0);
  copy_commit();
  for (int stage = 0; at < p.num_pages; stage ^= 1) {
    const Page page = page_at(p, at);
    at = next_page(at + 1);
    if (at < p.num_pages) load(page_at(p, at), stage ^ 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    const bool any = warp_view.any(page), all = warp_view.all(page);
#pragma unroll 1
    for (int key0 = 0; any && key0 < PAGE_TOKENS; key0 += KEYS) {
      const uint32_t k_at = kv_at + (stage * 2 * PAGE + key0 * STRIDE) * 2 + k_lane;
      const uint32_t v_at = kv_at + ((stage * 2 + 1) * PAGE + key0 * STRIDE) * 2 + v_lane;
      float s[MT][NS][4] = {};
#pragma unroll 4
      for (int step = 0; step < D / 16; step++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) load_matrix_x4(a[m], q_lane + (m * 16 * STRIDE + step * 16) * 2);
#pragma unroll
        for (int n = 0; n < NS; n += 2) {
          uint32_t b[4];
          load_matrix_x4(b, k_at + (n * 8 * STRIDE + step * 16) * 2);
#pragma unroll
          for (int m = 0; m < MT; m++) {
            multiply<T>(s[m][n], a[m], b[0], b[1]);
            multiply<T>(s[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < MT; m++) {
        // Accumulators 0 and 1 are of row lane/4 of the m tile, 2 and 3 of row lane/4 + 8.
        float top[2] = {max[m][0], max[m][1]};
#pragma unroll
        for (int n = 0; n < NS; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            s[m][n][e] = fmaf(s[m][n][e], p.scale, page.bias);
          }
        }
        if (!all) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const Visible row = sees[(warp * MT + m) * 16 + 8 * i + lane / 4];
#pragma unroll
            for (int n = 0; n < NS; n++) {
#pragma unroll
              for (int e = 0; e < 2; e++) {
                const int key = key0 + n * 8 + lane % 4 * 2 + e;
                if (key >= int(page.len) || !row.sees(page.start + key)) s[m][n][2 * i + e] = -INFINITY;
              }
            }
          }
        }
#pragma unroll
        for (int n = 0; n < NS; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) top[e / 2] = fmaxf(top[e / 2], s[m][n][e]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
          top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
          const float rescale = rescale_from(max[m][i], top[i]), base = top[i] == -INFINITY ? 0.0f : top[i];
          max[m][i] = top[i];
          sum[m][i] *= rescale;
#pragma unroll
          for (int n = 0; n < NO; n++) o[m][n][2 * i] *= rescale, o[m][n][2 * i + 1] *= rescale;
#pragma unroll
          for (int n = 0; n < NS; n++) {
            s[m][n][2 * i] = exp2f(s[m][n][2 * i] - base);
            s[m][n][2 * i + 1] = exp2f(s[m][n][2 * i + 1] - base);
            sum[m][i] += s[m][n][2 * i] + s[m][n][2 * i + 1];
          }
        }
      }
#pragma unroll
      for (int step = 0; step < KEYS / 16; step++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
          a[m][0] = pack<T>(s[m][2 * step][0], s[m][2 * step][1]);
          a[m][1] = pack<T>(s[m][2 * step][2], s[m][2 * step][3]);
          a[m][2] = pack<T>(s[m][2 * step + 1][0], s[m][2 * step + 1][1]);
          a[m][3] = pack<T>(s[m][2 * step + 1][2], s[m][2 * step + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < NO; n += 2) {
          uint32_t b[4];
          load_matrix_x4_transposed(b, v_at + (step * 16 * STRIDE + n * 8) * 2);
#pragma unroll
          for (int m = 0; m < MT; m++) {
            multiply<T>(o[m][n], a[m], b[0], b[1]);
            multiply<T>(o[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    __syncthreads(); // this stage is read
  }
  copy_wait<0>();
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float total = sum[m][i];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const uint32_t row = warp_row0 + 16 * m + 8 * i + lane / 4;
      if (row >= rows) continue;
      const uint64_t to = output_row(p, head, row);
      const float scale = total > 0.0f ? 1.0f / total : 0.0f;
      uint32_t *out = reinterpret_cast<uint32_t *>(static_cast<T *>(p.out) + to * D) + lane % 4;
#pragma unroll
      for (int n = 0; n < NO; n++) out[n * 4] = pack<T>(o[m][n][2 * i] * scale, o[m][n][2 * i + 1] * scale);
      if (lane % 4 == 0) p.lse[to] = total > 0.0f ? max[m][i] * 0.693147180559945f + logf(total) : -INFINITY;
    }
  }
}

#define KERNEL(name, T, D, MT, KEYS) \
  extern "C" __global__ void __launch_bounds__(ROWS / (16 * MT) * 32) name(const __grid_constant__ PagedParams p) { \
    prefill<T, D, MT, KEYS>(p); \
  }
KERNEL(paged_prefill_bf16_64, __nv_bfloat16, 64, 2, 64)
KERNEL(paged_prefill_bf16_96, __nv_bfloat16, 96, 2, 32)
KERNEL(paged_prefill_bf16_128, __nv_bfloat16, 128, 2, 32)
KERNEL(paged_prefill_bf16_256, __nv_bfloat16, 256, 1, 64)
KERNEL(paged_prefill_f16_64, __half, 64, 2, 64)
KERNEL(paged_prefill_f16_96, __half, 96, 2, 32)
KERNEL(paged_prefill_f16_128, __half, 128, 2, 32)
KERNEL(paged_prefill_f16_256, __half, 256, 1, 64)
