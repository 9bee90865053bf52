// Whole pages from their slots to a run in the order of the list, or back: one block copies 16 bytes a thread,
// several times over. Bound by memory.
#include "number.cuh"

struct GatherParams {
  const uint4 *from;
  uint4 *to;
  const uint32_t *slots; // (n)
  uint64_t page;         // 16-byte units of a page
};

constexpr int THREADS = 256;
constexpr int UNROLL = 4;

// Grid: x over the units of a page, THREADS · UNROLL a block; y over the pages.
template <bool SCATTER> __device__ void copy(const GatherParams &p) {
  const uint64_t i = blockIdx.y;
  const uint64_t slot = p.slots[i];
  const uint4 *from = p.from + (SCATTER ? i : slot) * p.page;
  uint4 *to = p.to + (SCATTER ? slot : i) * p.page;
  const uint64_t first = uint64_t(blockIdx.x) * THREADS * UNROLL + threadIdx.x;
  uint4 x[UNROLL];
#pragma unroll
  for (int j = 0; j < UNROLL; j++)
    if (first + j * THREADS < p.page) x[j] = __ldg(from + first + j * THREADS);
#pragma unroll
  for (int j = 0; j < UNROLL; j++)
    if (first + j * THREADS < p.page) to[first + j * THREADS] = x[j];
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_pages(const GatherParams p) { copy<false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) scatter_pages(const GatherParams p) { copy<true>(p); }
