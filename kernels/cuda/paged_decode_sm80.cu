// Attention of a few query rows over pages, bf16 and f16: out = softmax(q kᵀ · scale + bias) v, split over the pages.
//
// Block: (key/value head, split of the page list, tile of 8 query rows), 4 warps; warp w takes keys 16w..16w+15 of
// every page, with a softmax of its own (decode_tile.cuh). No shared memory until the warps' parts meet; the blocks'
// parts meet in memory, where the last block of a tile adds them.
//
// Bound by memory. A warp has 4 KiB of V and 4 KiB of the next page's K in flight at d = 128; registers there: O 32,
// Q 16, K 32, V 32, and about 45 more, so that three blocks fit an SM: up to 96 KiB in flight.
#include "decode_tile.cuh"

template <typename T, int D, class Params> __device__ __forceinline__ void decode(const Params &p) {
  constexpr int STRIDE = D + 4;
  static_assert(WARPS * STRIDE >= MAX_SPLITS, "weights of the splits fit the parts");
  __shared__ __align__(16) float parts[WARPS][DECODE_ROWS][STRIDE];
  __shared__ float part_max[WARPS][DECODE_ROWS], part_sum[WARPS][DECODE_ROWS];
  __shared__ float tile_max[DECODE_ROWS], tile_sum[DECODE_ROWS];

  const uint32_t head = blockIdx.x, split = blockIdx.y, tile_idx = blockIdx.z;
  const int warp = threadIdx.x / 32;
  DecodeTile<T, D> tile;
  walk_pages(tile, p, head, split, tile_idx * DECODE_ROWS);
  tile.store(&parts[warp][0][0], part_max[warp], part_sum[warp]);
  __syncthreads();
  // The four parts into the first, in the order of the warps.
  for (int i = threadIdx.x; i < DECODE_ROWS * D; i += WARPS * 32) {
    const int row = i / D, column = i % D;
    float top = part_max[0][row];
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, part_max[w][row]);
    float x = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float weight = part_max[w][row] == -INFINITY ? 0.0f : exp2f(part_max[w][row] - top);
      x = fmaf(weight, parts[w][row][column], x);
      sum = fmaf(weight, part_sum[w][row], sum);
    }
    parts[0][row][column] = x;
    if (column == 0) tile_max[row] = top, tile_sum[row] = sum;
  }
  __syncthreads();
  finish_split<T, D, WARPS * 32>(p, head, tile_idx, split, &parts[0][0][0], STRIDE, tile_max, tile_sum,
                                 &parts[0][0][0]);
}

// Blocks of an SM, as the splits of the host count them.
#define KERNEL(list, List, type, T, D, BLOCKS) \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) \
      paged_decode_##list##_##type##_##D(const __grid_constant__ DecodeParams<List> p) { \
    decode<T, D>(p); \
  }
#define KERNEL_LIST(list, List, type, T) \
  KERNEL(list, List, type, T, 64, 4) \
  KERNEL(list, List, type, T, 96, 4) \
  KERNEL(list, List, type, T, 128, 3) \
  KERNEL(list, List, type, T, 256, 2)
#define KERNEL_TYPE(type, T) KERNEL_LIST(inline, InlinePages, type, T) KERNEL_LIST(table, TablePages, type, T)
KERNEL_TYPE(bf16, __nv_bfloat16)
KERNEL_TYPE(f16, __half)
