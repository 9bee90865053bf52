// Attention of a few query rows over the union of several page lists with one softmax, f32: each list has a pool, queries
// and a window of its own, as sinks, recalled tokens and window of a stream have. One launch in the place of one a list
// and their merges.
//
// Blocks and memory are those of `decode_rows_f32.cuh`; the splits of all lists lie behind one another, and whichever
// block of a tile arrives last adds them up in that order.
#include "decode_rows_f32.cuh"

constexpr int MAX_PARTS = 4;

struct Part {
  const void *q;      // (t, h, d)
  const void *keys;   // (s, g, 64, d)
  const void *values; // (s, g, 64, d)
  uint64_t query_start;
  uint64_t window_tokens;  // ~0: none
  uint64_t sliding_window; // ~0: none
  uint32_t first_page, num_pages; // of the list
  uint32_t first_split, splits;
};

struct UnionParams {
  void *out;              // (t, h, d)
  float *lse;             // (1 + parts, t, h): of all, then of each part
  float *partial;         // (g · tiles · splits, 8, d), then as many (2, 8): maximum and sum
  uint32_t *counters;     // (g · tiles), 0 before and after each launch
  const Page *table;      // null: the list is `pages`
  float *sums;            // (h + 1): the share of part `counted`, and `recovered`, are added to it; null: nothing is
  const float *recovered; // (1), or null
  uint32_t t, h, g, group;
  uint32_t tiles, splits, parts, counted;
  float scale; // times log2 e
  Part part[MAX_PARTS];
  Page pages[INLINE_PAGES];
};
static_assert(sizeof(UnionParams) == 96 + MAX_PARTS * 64 + INLINE_PAGES * 16, "as the host packs it");
static_assert(sizeof(UnionParams) <= 4096, "parameters of a launch");

// One part as a walk over pages sees it; what is rarely asked for stays in the launch's parameters.
struct PartView {
  const UnionParams &all;
  const Part &own;
  const void *q, *keys, *values;
  uint32_t t, h, g, group;
  uint32_t num_pages, splits;
  float scale;
};

__device__ __forceinline__ Page page_at(const PartView &p, uint32_t i) {
  const uint32_t at = p.own.first_page + i;
  return p.all.table == nullptr ? p.all.pages[at] : page_of(p.all.table, at);
}

__device__ __forceinline__ int32_t first_visible(const PartView &p, uint32_t i) { return first_visible(p.own, i); }

// Of all and of each part, and the share of the counted one. A row is written by one warp of one block, and launches
// follow one another: the sums have one order.
__device__ __forceinline__ void store_lse(const UnionParams &p, uint64_t row, float top, float total,
                                          const float (&scale)[MAX_SPLITS / 32],
                                          const float (&sum)[MAX_SPLITS / 32]) {
  const uint32_t lane = threadIdx.x % 32;
  const auto lse_of = [&](float x) { return x > 0.0f ? top * 0.693147180559945f + logf(x) : -INFINITY; };
  if (lane == 0) p.lse[row] = lse_of(total);
  for (uint32_t part = 0; part < p.parts; part++) {
    const uint32_t first = p.part[part].first_split, end = first + p.part[part].splits;
    float own = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      const uint32_t s = lane + 32 * i;
      if (s >= first && s < end) own += scale[i] * sum[i];
    }
    own = warp_sum(own);
    if (lane != 0) continue;
    p.lse[uint64_t(1 + part) * p.t * p.h + row] = lse_of(own);
    if (p.sums == nullptr || part != p.counted) continue;
    if (total > 0.0f) p.sums[row] += own / total;
    if (row == 0 && p.recovered != nullptr) p.sums[p.h] += *p.recovered;
  }
}

template <int D> __device__ __forceinline__ void attend(const UnionParams &p) {
  const uint32_t split = blockIdx.y;
  uint32_t at = 0;
  while (at + 1 < p.parts && split >= p.part[at + 1].first_split) at++;
  const Part &own = p.part[at];
  const PartView view = {p,       own,   own.q,         own.keys,   own.values, p.t, p.h,
                         p.g,     p.group, own.num_pages, own.splits, p.scale};
  decode_rows<D>(view, split - own.first_split,
                 [&](const float *acc, const float *max, const float *sum, float *weights) {
                   finish_split<float, D, D>(p, blockIdx.x, blockIdx.z, split, acc, D, max, sum, weights);
                 });
}

#define KERNEL(D) \
  extern "C" __global__ void __launch_bounds__(D) paged_union_f32_##D(const __grid_constant__ UnionParams p) { \
    attend<D>(p); \
  }
KERNEL(64)
KERNEL(96)
KERNEL(128)
KERNEL(256)
