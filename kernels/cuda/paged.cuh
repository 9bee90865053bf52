// What every kernel over pages of keys and values shares: the page list, which keys a query sees, and the end of a
// split softmax.
#pragma once
#include "number.cuh"

constexpr int PAGE_TOKENS = 64;
// Pages that travel in the launch itself (16 bytes each; all parameters together are at most 4 KiB).
constexpr int INLINE_PAGES = 200;
// Query rows of a decode tile, and the most splits of its pages.
constexpr int DECODE_ROWS = 8;
constexpr int MAX_SPLITS = 256;

struct __align__(16) Page {
  uint32_t slot;
  int32_t start; // stream position less that of the first query
  uint32_t len;
  float bias; // added to the scores, which are in units of log 2
};

struct PagedParams {
  const void *q;      // (t, h, d)
  const void *keys;   // (s, g, 64, d)
  const void *values; // (s, g, 64, d)
  void *out;          // (t, h, d)
  float *lse;         // (t, h)
  float *partial;     // decode: (g · tiles · splits, 8, d), then as many (2, 8): maximum and sum
  uint32_t *counters; // decode: (g · tiles), 0 before and after each launch
  const Page *table;  // null: the list is `pages`
  uint64_t query_start;
  uint64_t window_tokens;  // ~0: none
  uint64_t sliding_window; // ~0: none
  uint32_t t, h, g, group;
  uint32_t num_pages, tiles, splits;
  float scale; // times log2 e
  Page pages[INLINE_PAGES];
};
static_assert(sizeof(PagedParams) <= 4096, "parameters of a launch");

// Entry of a list in device memory.
__device__ __forceinline__ Page page_of(const Page *table, uint32_t i) {
  const uint4 x = __ldg(reinterpret_cast<const uint4 *>(table) + i);
  return Page{x.x, int32_t(x.y), x.z, __uint_as_float(x.w)};
}

__device__ __forceinline__ Page page_at(const PagedParams &p, uint32_t i) {
  return p.table == nullptr ? p.pages[i] : page_of(p.table, i);
}

// First position, relative to the first query's, that query token `i` sees; the host keeps distances below 2^30.
template <class Params> __device__ __forceinline__ int32_t first_visible(const Params &p, uint32_t i) {
  const uint64_t end = p.query_start + i + 1;
  const uint64_t by_page = end > p.window_tokens ? (end - p.window_tokens) / PAGE_TOKENS * PAGE_TOKENS : 0;
  const uint64_t by_token = end > p.sliding_window ? end - p.sliding_window : 0;
  const int64_t first = int64_t(by_page > by_token ? by_page : by_token) - int64_t(p.query_start);
  return int32_t(first < -(int64_t(1) << 30) ? -(int64_t(1) << 30) : first);
}

// What a query row sees: keys at first..=last. A row beyond the queries sees none.
struct Visible {
  int32_t first, last;
  __device__ __forceinline__ bool sees(int32_t key) const { return key >= first && key <= last; }
};

template <class Params> __device__ __forceinline__ Visible visible_to_row(const Params &p, uint32_t row) {
  if (row >= p.t * p.group) return Visible{1, 0};
  const uint32_t token = row / p.group;
  return Visible{first_visible(p, token), int32_t(token)};
}

// What some row of rows..rows+n sees, and what all of them see.
struct TileView {
  int32_t any_first, any_last, all_first, all_last;
  __device__ __forceinline__ bool any(const Page &page) const {
    return page.start <= any_last && page.start + int32_t(page.len) > any_first;
  }
  // Every key of the page is there and every row sees it.
  __device__ __forceinline__ bool all(const Page &page) const {
    return page.len == PAGE_TOKENS && page.start >= all_first && page.start + PAGE_TOKENS - 1 <= all_last;
  }
};

template <class Params>
__device__ __forceinline__ TileView view_of_rows(const Params &p, uint32_t row, uint32_t n) {
  const uint32_t rows = p.t * p.group;
  if (row >= rows) return TileView{1, -(1 << 30), 1, -(1 << 30)};
  const uint32_t last_row = row + n <= rows ? row + n - 1 : rows - 1;
  const uint32_t low = row / p.group, high = last_row / p.group;
  // first_visible grows with the token.
  return TileView{first_visible(p, low), int32_t(high), first_visible(p, high), int32_t(low)};
}

// Index of the output row of a tile's row: rows are ordered (token, head of the group).
template <class Params> __device__ __forceinline__ uint64_t output_row(const Params &p, uint32_t head, uint32_t row) {
  return uint64_t(row / p.group) * p.h + uint64_t(head) * p.group + row % p.group;
}

__device__ __forceinline__ float rescale_from(float old_max, float new_max) {
  // Both -inf: nothing was seen yet, and nothing is there to rescale.
  return new_max == -INFINITY ? 1.0f : exp2f(old_max - new_max);
}

// Writes the lse of a row; one warp, of whose lanes lane l knows splits l, l + 32, ..: what e^(maximum - top) and what
// the sum of each is. Overloaded where a list of several parts wants more of it.
template <class Params>
__device__ __forceinline__ void store_lse(const Params &p, uint64_t row, float top, float total,
                                          const float (&)[MAX_SPLITS / 32], const float (&)[MAX_SPLITS / 32]) {
  if (threadIdx.x % 32 == 0) p.lse[row] = total > 0.0f ? top * 0.693147180559945f + logf(total) : -INFINITY;
}

// Stores this block's part of a tile (in `acc`, 8 rows of `stride` floats, `max`, `sum`: shared memory) and, in the
// last block of the tile to arrive, adds all parts in the order of the splits: one launch, one order of additions.
// `weights`: 8 · MAX_SPLITS floats of shared memory, not overlapping the others. All threads of the block call it.
template <typename T, int D, int THREADS, class Params>
__device__ void finish_split(const Params &p, uint32_t head, uint32_t tile, uint32_t split, const float *acc,
                             int stride, const float *max, const float *sum, float *weights) {
  __shared__ bool is_last;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const uint64_t first_part = (uint64_t(head) * p.tiles + tile) * p.splits;
  const uint64_t parts = uint64_t(p.g) * p.tiles * p.splits;
  float *stats = p.partial + parts * DECODE_ROWS * D;
  const uint32_t rows = p.t * p.group, row0 = tile * DECODE_ROWS;
  const int count = rows - row0 < DECODE_ROWS ? int(rows - row0) : DECODE_ROWS;
  {
    float *to = p.partial + (first_part + split) * DECODE_ROWS * D;
    for (int i = tid; i < count * D / 4; i += THREADS) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      *reinterpret_cast<float4 *>(to + row * D + column) =
          *reinterpret_cast<const float4 *>(acc + row * stride + column);
    }
    float *to_stats = stats + (first_part + split) * 2 * DECODE_ROWS;
    if (tid < DECODE_ROWS) to_stats[tid] = max[tid];
    else if (tid < 2 * DECODE_ROWS) to_stats[tid] = sum[tid - DECODE_ROWS];
  }
  __syncthreads();
  if (tid == 0) {
    uint32_t *counter = p.counters + head * p.tiles + tile;
    // The barrier brought the block's stores here, the fences take them to the last block.
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    is_last = atomicAdd(counter, 1u) == p.splits - 1;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (!is_last) return;

  // Four columns of a row to a thread; where threads are left, several share the splits of a column. Loads of the parts
  // fly while the weights are computed: two waits for memory up to FLIGHT splits a thread.
  constexpr int FLIGHT = 16;
  __shared__ float4 sums[THREADS];
  const int columns = count * (D / 4), shares = columns < THREADS ? THREADS / columns : 1;
  const int share = shares > 1 ? tid / columns : 0;
  int column = shares > 1 ? tid % columns : tid;
  float4 part[FLIGHT];
  const auto fetch = [&](uint32_t first) {
    const float *from = p.partial + first_part * DECODE_ROWS * D + column * 4;
#pragma unroll
    for (int i = 0; i < FLIGHT; i++) {
      const uint32_t s = first + i * shares;
      part[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (share < shares && column < columns && s < p.splits)
        part[i] = __ldcg(reinterpret_cast<const float4 *>(from + uint64_t(s) * DECODE_ROWS * D));
    }
  };
  fetch(share);
  for (int row = warp; row < count; row += THREADS / 32) {
    const float *at = stats + first_part * 2 * DECODE_ROWS + row;
    // Both numbers of every part in one wait for memory.
    float part_max[MAX_SPLITS / 32], part_sum[MAX_SPLITS / 32], top = -INFINITY;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      const uint32_t s = lane + 32 * i;
      const bool there = s < p.splits;
      part_max[i] = there ? __ldcg(at + s * 2 * DECODE_ROWS) : -INFINITY;
      part_sum[i] = there ? __ldcg(at + s * 2 * DECODE_ROWS + DECODE_ROWS) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) top = fmaxf(top, part_max[i]);
    top = warp_max(top);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      part_max[i] = part_max[i] == -INFINITY ? 0.0f : exp2f(part_max[i] - top);
      total += part_max[i] * part_sum[i];
    }
    total = warp_sum(total);
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++)
      if (lane + 32 * i < p.splits) weights[row * MAX_SPLITS + lane + 32 * i] = part_max[i] * scale;
    store_lse(p, output_row(p, head, row0 + row), top, total, part_max, part_sum);
  }
  __syncthreads();
  for (;;) {
    const int row = column / (D / 4);
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (uint32_t first = share; first < p.splits;) {
#pragma unroll
      for (int i = 0; i < FLIGHT; i++) {
        const uint32_t s = first + i * shares;
        const float weight = s < p.splits && column < columns ? weights[row * MAX_SPLITS + s] : 0.0f;
        x.x = fmaf(weight, part[i].x, x.x);
        x.y = fmaf(weight, part[i].y, x.y);
        x.z = fmaf(weight, part[i].z, x.z);
        x.w = fmaf(weight, part[i].w, x.w);
      }
      first += FLIGHT * shares;
      if (first < p.splits) fetch(first);
    }
    if (shares > 1) {
      sums[tid] = x;
      __syncthreads();
      if (tid >= columns) return;
      for (int other = 1; other < shares; other++) {
        const float4 y = sums[tid + other * columns];
        x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
      }
    }
    if (column < columns) {
      T *to = static_cast<T *>(p.out) + output_row(p, head, row0 + row) * D + column % (D / 4) * 4;
      const float four[4] = {x.x, x.y, x.z, x.w};
      store_floats(to, four);
    }
    column += THREADS;
    if (column - tid >= columns || shares > 1) return;
    fetch(share);
  }
}
