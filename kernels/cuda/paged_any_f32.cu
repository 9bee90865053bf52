// Attention of f32 queries over a list of pages for the head dimensions that the tiled kernels do not take: out = softmax(scale · q kᵀ + masks) v, one online softmax.
// A warp owns one query row (token, head) and one split of the pages. Of a page's 64 keys a lane scores two; for the
// values a lane owns every 32nd column, so that rows are read whole. Exact arithmetic in f32; bound by L2.
// The splits of a row are joined by the second kernel in their order, so that equal inputs give equal bits.
#include "number.cuh"

constexpr int PAGE_TOKENS = 64;
constexpr int MAX_DIM = 256;
constexpr int MAX_INLINE_PAGES = 128; // 3 KiB of the 4 KiB that a launch may carry
constexpr int WARPS = 4;

struct Page {
  uint64_t start; // stream position of its first token
  uint32_t slot;
  uint32_t len;
  float bias; // added to every score of the page
  uint32_t unused;
};

struct PagedParams {
  const float *q;      // (t, h, d)
  const float *keys;   // (s, g, 64, d)
  const float *values; // (s, g, 64, d)
  float *out;          // (t, h, d)
  float *lse;          // (t, h)
  float *partial;      // (splits, t · h, d + 2): sums, then maximum and weight; unused with one split
  const Page *pages;   // (num_pages); null: they are in `inline_pages`
  uint64_t query_start;
  uint64_t window;  // tokens, rounded to pages; the largest number is none
  uint64_t sliding; // tokens; the largest number is none
  uint32_t t, h, g, d;
  uint32_t num_pages, splits;
  float scale;
  uint32_t unused;
  Page inline_pages[MAX_INLINE_PAGES];
};

__device__ __forceinline__ uint64_t first_visible(const PagedParams &p, uint64_t position) {
  uint64_t first = 0;
  if (position + 1 > p.window) first = (position + 1 - p.window) / PAGE_TOKENS * PAGE_TOKENS;
  if (position + 1 > p.sliding) first = max(first, position + 1 - p.sliding);
  return first;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) paged_any_f32(const __grid_constant__ PagedParams p) {
  __shared__ float queries[WARPS][MAX_DIM];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t row = uint64_t(blockIdx.x) * WARPS + warp; // token · h + head
  const uint64_t rows = uint64_t(p.t) * p.h;
  if (row >= rows) return;
  const uint32_t head = row % p.h, group_head = head / (p.h / p.g);
  const uint64_t position = p.query_start + row / p.h;
  const uint64_t first = first_visible(p, position);
  for (int x = lane; x < p.d; x += 32) queries[warp][x] = p.q[row * p.d + x] * p.scale;
  __syncwarp();

  float maximum = -INFINITY, weight = 0.0f, sums[MAX_DIM / 32] = {};
  const uint32_t from = uint64_t(p.num_pages) * blockIdx.y / p.splits;
  const uint32_t to = uint64_t(p.num_pages) * (blockIdx.y + 1) / p.splits;
  for (uint32_t index = from; index < to; index++) {
    const Page *entry = (p.pages ? p.pages : p.inline_pages) + index;
    const uint64_t page_start = entry->start;
    const uint32_t page_len = entry->len;
    // Keys of the page that this query sees: [begin, end).
    if (page_start > position || page_start + page_len <= first) continue;
    const int begin = first > page_start ? int(first - page_start) : 0;
    const int end = int(min(uint64_t(page_len), position + 1 - page_start));
    const uint64_t at = (uint64_t(entry->slot) * p.g + group_head) * PAGE_TOKENS * p.d;
    float scores[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int key = half * 32 + lane;
      float score = -INFINITY;
      if (key >= begin && key < end) {
        const float *k = p.keys + at + uint64_t(key) * p.d;
        score = 0.0f;
        if (p.d % 4 == 0) {
          for (int x = 0; x < p.d; x += 4) {
            const float4 four = *reinterpret_cast<const float4 *>(k + x);
            score += queries[warp][x] * four.x;
            score += queries[warp][x + 1] * four.y;
            score += queries[warp][x + 2] * four.z;
            score += queries[warp][x + 3] * four.w;
          }
        } else {
          for (int x = 0; x < p.d; x++) score += queries[warp][x] * k[x];
        }
      }
      scores[half] = score + entry->bias;
    }
    const float page_max = warp_max(fmaxf(scores[0], scores[1]));
    if (page_max == -INFINITY) continue;
    const float new_max = fmaxf(maximum, page_max);
    const float rescale = expf(maximum - new_max); // 0 at the first page
    maximum = new_max;
    scores[0] = expf(scores[0] - new_max);
    scores[1] = expf(scores[1] - new_max);
    weight = weight * rescale + warp_sum(scores[0] + scores[1]);
#pragma unroll
    for (int i = 0; i < MAX_DIM / 32; i++) sums[i] *= rescale;
    for (int key = begin; key < end; key++) {
      const float share = __shfl_sync(0xffffffffu, key < 32 ? scores[0] : scores[1], key % 32);
      const float *v = p.values + at + uint64_t(key) * p.d;
#pragma unroll
      for (int i = 0; i < MAX_DIM / 32; i++) {
        const int x = i * 32 + lane;
        if (x < p.d) sums[i] += share * v[x];
      }
    }
  }

  const bool alone = p.splits == 1;
  float *to_row = alone ? p.out + row * p.d : p.partial + (uint64_t(blockIdx.y) * rows + row) * (p.d + 2);
  const float factor = !alone ? 1.0f : weight > 0.0f ? 1.0f / weight : 0.0f;
#pragma unroll
  for (int i = 0; i < MAX_DIM / 32; i++) {
    const int x = i * 32 + lane;
    if (x < p.d) to_row[x] = sums[i] * factor;
  }
  if (lane == 0) {
    if (alone) {
      p.lse[row] = weight > 0.0f ? maximum + logf(weight) : -INFINITY;
    } else {
      to_row[p.d] = maximum;
      to_row[p.d + 1] = weight;
    }
  }
}

// Joins the splits of a row; a warp a row.
extern "C" __global__ void __launch_bounds__(32 * WARPS) paged_any_join_f32(const __grid_constant__ PagedParams p) {
  const int lane = threadIdx.x % 32;
  const uint64_t row = uint64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  const uint64_t rows = uint64_t(p.t) * p.h, stride = rows * (p.d + 2);
  if (row >= rows) return;
  const float *part = p.partial + row * (p.d + 2);
  float maximum = -INFINITY;
  for (uint32_t split = 0; split < p.splits; split++) maximum = fmaxf(maximum, part[split * stride + p.d]);
  float weight = 0.0f, sums[MAX_DIM / 32] = {};
  if (maximum != -INFINITY) {
    for (uint32_t split = 0; split < p.splits; split++) {
      const float *from = part + split * stride;
      const float share = expf(from[p.d] - maximum);
      weight += share * from[p.d + 1];
#pragma unroll
      for (int i = 0; i < MAX_DIM / 32; i++) {
        const int x = i * 32 + lane;
        if (x < p.d) sums[i] += share * from[x];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < MAX_DIM / 32; i++) {
    const int x = i * 32 + lane;
    if (x < p.d) p.out[row * p.d + x] = weight > 0.0f ? sums[i] / weight : 0.0f;
  }
  if (lane == 0) p.lse[row] = weight > 0.0f ? maximum + logf(weight) : -INFINITY;
}
