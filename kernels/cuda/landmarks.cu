// Landmarks of pages and their scores: which keys of a long stream a query asks for.
//
// landmarks: mean of every `span` keys of a page, one thread an element; bound by memory.
//
// score, then vote: s = q · landmark · scale for every query row, softmax over all landmarks for each row by itself,
// then the sum over the rows of the key/value head. `score` writes the logits (in units of log 2) and each block's
// maximum and sum; `vote` joins those in the order of the blocks and adds the rows' probabilities. In `score` four
// lanes share a landmark (16 bytes each, two shuffles a dot product) and keep 8 rows of accumulators; a block is 64
// such quads and takes 256 landmarks. Bound by memory (the landmarks), beside the logits: 4 B a row and landmark
// against 2 d B a landmark.
#include "number.cuh"

constexpr int PAGE_TOKENS = 64;
constexpr int THREADS = 256;
constexpr int BLOCK_LANDMARKS = 256;
constexpr int TILE_ROWS = 8;
constexpr int MAX_ROWS = 512;
constexpr int MAX_DIM = 256;

struct LandmarkParams {
  const void *keys;     // (s, g, 64, d)
  const uint32_t *lens; // (s): keys of each page
  void *means;          // (s, g, 64 / span, d)
  uint64_t elements;
  uint32_t g, d, span;
};

template <typename T> __device__ void landmarks(const LandmarkParams &p) {
  const uint32_t marks = PAGE_TOKENS / p.span;
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.elements; i += step) {
    const uint32_t column = uint32_t(i % p.d), mark = uint32_t(i / p.d % marks);
    const uint64_t page_head = i / p.d / marks;
    const uint32_t len = p.lens[page_head / p.g], first = mark * p.span;
    const uint32_t end = len < first + p.span ? len : first + p.span;
    const T *from = static_cast<const T *>(p.keys) + page_head * PAGE_TOKENS * p.d + column;
    float sum = 0.0f;
    for (uint32_t key = first; key < end; key++) sum += to_float(from[uint64_t(key) * p.d]);
    static_cast<T *>(p.means)[i] = from_float<T>(first < end ? sum / float(end - first) : 0.0f);
  }
}

struct ScoreParams {
  const void *q;         // (t, h, d)
  const void *landmarks; // (n, g, d)
  float *logits;         // (g, rows, n), rows = t · group
  float *stats;          // (g, blocks, rows, 2): maximum and sum of each block
  float *votes;          // (g, n)
  uint64_t n;
  uint32_t rows, h, g, group, d, blocks;
  float scale; // times log2 e
};

template <typename T> __device__ void score(const ScoreParams &p) {
  constexpr int VECTOR = 16 / sizeof(T); // elements of one load
  __shared__ __align__(16) float q[TILE_ROWS][MAX_DIM];
  __shared__ float logits[TILE_ROWS][BLOCK_LANDMARKS];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, quad = tid / 4, part = tid % 4;
  const uint32_t head = blockIdx.y;
  const uint64_t first = uint64_t(blockIdx.x) * BLOCK_LANDMARKS;
  const int count = p.n - first < BLOCK_LANDMARKS ? int(p.n - first) : BLOCK_LANDMARKS;
  for (uint32_t row0 = 0; row0 < p.rows; row0 += TILE_ROWS) {
    __syncthreads();
    for (uint32_t i = tid; i < TILE_ROWS * p.d; i += THREADS) {
      const uint32_t row = row0 + i / p.d;
      const uint64_t at = (uint64_t(row / p.group) * p.h + head * p.group + row % p.group) * p.d + i % p.d;
      q[i / p.d][i % p.d] = row < p.rows ? to_float(static_cast<const T *>(p.q)[at]) : 0.0f;
    }
    __syncthreads();
    for (int mark = quad; mark < BLOCK_LANDMARKS; mark += THREADS / 4) {
      const bool valid = mark < count;
      const T *from =
          static_cast<const T *>(p.landmarks) + ((valid ? first + mark : 0) * p.g + head) * p.d;
      float sums[TILE_ROWS] = {};
#pragma unroll 2
      for (uint32_t column = part * VECTOR; column < p.d; column += 4 * VECTOR) {
        const uint4 words = __ldg(reinterpret_cast<const uint4 *>(from + column));
        const T *elements = reinterpret_cast<const T *>(&words);
#pragma unroll
        for (int e = 0; e < VECTOR; e += 4) {
          const float x[4] = {to_float(elements[e]), to_float(elements[e + 1]), to_float(elements[e + 2]),
                              to_float(elements[e + 3])};
#pragma unroll
          for (int row = 0; row < TILE_ROWS; row++) {
            const float4 y = *reinterpret_cast<const float4 *>(&q[row][column + e]);
            sums[row] = fmaf(x[0], y.x, fmaf(x[1], y.y, fmaf(x[2], y.z, fmaf(x[3], y.w, sums[row]))));
          }
        }
      }
#pragma unroll
      for (int row = 0; row < TILE_ROWS; row++) {
        sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], 1);
        sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], 2);
        if (part == 0) logits[row][mark] = valid ? sums[row] * p.scale : -INFINITY;
      }
    }
    __syncthreads();
    // A warp a row: 8 rows, 8 warps.
    const uint32_t row = row0 + warp;
    if (row < p.rows) {
      float top = -INFINITY;
      for (int i = lane; i < BLOCK_LANDMARKS; i += 32) top = fmaxf(top, logits[warp][i]);
      top = warp_max(top);
      float sum = 0.0f;
      float *to = p.logits + (uint64_t(head) * p.rows + row) * p.n + first;
      for (int i = lane; i < count; i += 32) {
        sum += exp2f(logits[warp][i] - top);
        to[i] = logits[warp][i];
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        float *stats = p.stats + ((uint64_t(head) * p.blocks + blockIdx.x) * p.rows + row) * 2;
        stats[0] = top, stats[1] = sum;
      }
    }
  }
}
static_assert(THREADS / 32 == TILE_ROWS, "a warp a row");

extern "C" __global__ void __launch_bounds__(THREADS) vote_landmarks(const ScoreParams p) {
  __shared__ float norm[MAX_ROWS]; // log2 of the sum of 2^logit
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const uint32_t head = blockIdx.y;
  for (uint32_t row = warp; row < p.rows; row += THREADS / 32) {
    const float *stats = p.stats + (uint64_t(head) * p.blocks * p.rows + row) * 2;
    float top = -INFINITY;
    for (uint32_t i = lane; i < p.blocks; i += 32) top = fmaxf(top, stats[uint64_t(i) * p.rows * 2]);
    top = warp_max(top);
    float sum = 0.0f;
    for (uint32_t i = lane; i < p.blocks; i += 32) {
      const float *at = stats + uint64_t(i) * p.rows * 2;
      sum += at[1] * exp2f(at[0] - top);
    }
    sum = warp_sum(sum);
    if (lane == 0) norm[row] = top + log2f(sum);
  }
  __syncthreads();
  const uint64_t step = uint64_t(gridDim.x) * THREADS;
  for (uint64_t i = uint64_t(blockIdx.x) * THREADS + tid; i < p.n; i += step) {
    const float *logits = p.logits + uint64_t(head) * p.rows * p.n + i;
    float vote = 0.0f;
#pragma unroll 4
    for (uint32_t row = 0; row < p.rows; row++) vote += exp2f(logits[row * p.n] - norm[row]);
    p.votes[head * p.n + i] = vote;
  }
}

extern "C" __global__ void landmarks_f32(const LandmarkParams p) { landmarks<float>(p); }
extern "C" __global__ void landmarks_bf16(const LandmarkParams p) { landmarks<__nv_bfloat16>(p); }
extern "C" __global__ void landmarks_f16(const LandmarkParams p) { landmarks<__half>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) score_landmarks_f32(const ScoreParams p) { score<float>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) score_landmarks_bf16(const ScoreParams p) {
  score<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) score_landmarks_f16(const ScoreParams p) { score<__half>(p); }
