// Logits of many rows of queries against stored keys of bf16, by tensor cores, as exact as by f32: a query is the sum of
// three bf16, whose products with a key are exact in f32 and are added up in f32.
//
// A block takes 256 keys, a warp 32 of them: their numbers stay in registers while rows pass by, 16 at once. The order of
// channels in a dot product is free: a lane has eight neighbouring channels of a key, one load of 16 bytes, and hands them
// to two instructions. Bound by memory: 4 bytes a row and key of logits against 2 d of keys.
// 173 µs a launch, where recall.cu's took 342: the mean of feeding 131,072 tokens of the default model, whose launches have
// 64,000 keys in the mean (H200, 09da87c).
#include "mma_sm80.cuh"
#include "recall.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int WARP_KEYS = BLOCK_KEYS / WARPS;
constexpr int TILES = WARP_KEYS / 8;    // of 8 keys, an instruction's
constexpr int ROWS = 16;                // of a query tile, an instruction's
constexpr int PARTS = 3;                // bf16 that a query is the sum of
constexpr int LOGIT_STEP = BLOCK_KEYS + 8; // floats from one row of logits to the next: eight rows begin at other banks
static_assert(WARP_KEYS % 8 == 0, "a warp's keys are whole tiles");
static_assert(BLOCK_KEYS == 2 * 128, "a row of logits is two float4 for each lane of a warp");
static_assert(LOGIT_STEP % 4 == 0, "each row of logits begins at a float4");

// CHUNKS: of 32 channels, the last one filled up with zeros.
template <int CHUNKS> __device__ __forceinline__ void score_rows(const VoteParams &p) {
  constexpr int STEP = CHUNKS * 32 + 32; // numbers from one query to the next
  __shared__ __align__(16) __nv_bfloat16 q[PARTS][ROWS][STEP];
  __shared__ __align__(16) float logits[ROWS][LOGIT_STEP];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, eighth = lane / 4, part = lane % 4;
  const Own own = work_of_block(p);
  const uint64_t first = uint64_t(blockIdx.x) * BLOCK_KEYS;
  const int count = p.n - first < BLOCK_KEYS ? int(p.n - first) : BLOCK_KEYS;

  uint4 keys[TILES][CHUNKS];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int key = warp * WARP_KEYS + tile * 8 + eighth;
    const __nv_bfloat16 *from = key < count ? key_at<__nv_bfloat16, true>(p, own, first + key) : nullptr;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const uint32_t column = chunk * 32 + part * 8;
      const bool is_there = from && column < p.d;
      keys[tile][chunk] = is_there ? __ldg(reinterpret_cast<const uint4 *>(from + column)) : make_uint4(0, 0, 0, 0);
    }
  }

  for (uint32_t row0 = 0; row0 < own.rows; row0 += ROWS) {
    __syncthreads();
    for (int i = tid; i < ROWS * CHUNKS * 32; i += THREADS) {
      const uint32_t at = i / (CHUNKS * 32), column = i % (CHUNKS * 32), row = row0 + at;
      float x = 0.0f;
      if (row < own.rows && column < p.d) {
        const uint64_t token = uint64_t(blockIdx.z) * (p.rows / p.group) + row / p.group;
        // Times log2 e: all logits are in units of log 2.
        x = p.q[(token * p.h + own.head * p.group + row % p.group) * p.d + column] * 1.4426950408889634f;
      }
#pragma unroll
      for (int j = 0; j < PARTS; j++) {
        const __nv_bfloat16 rounded = __float2bfloat16_rn(x);
        q[j][at][column] = rounded;
        x -= __bfloat162float(rounded);
      }
    }
    __syncthreads();
    float sums[TILES][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int column = chunk * 32 + part * 8 + half * 4;
        // The smallest parts first.
#pragma unroll
        for (int j = PARTS - 1; j >= 0; j--) {
          const uint2 low = *reinterpret_cast<const uint2 *>(&q[j][eighth][column]);
          const uint2 high = *reinterpret_cast<const uint2 *>(&q[j][eighth + 8][column]);
          const uint32_t a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            const uint4 &key = keys[tile][chunk];
            multiply<__nv_bfloat16>(sums[tile], a, half ? key.z : key.x, half ? key.w : key.y);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int column = warp * WARP_KEYS + tile * 8 + part * 2;
      *reinterpret_cast<float2 *>(&logits[eighth][column]) = make_float2(sums[tile][0], sums[tile][1]);
      *reinterpret_cast<float2 *>(&logits[eighth + 8][column]) = make_float2(sums[tile][2], sums[tile][3]);
    }
    __syncthreads();
    // A warp two rows, a lane eight keys of one landmark or two: n is a multiple of SPAN.
    for (int at = warp; at < ROWS && row0 + at < own.rows; at += WARPS) {
      float x[2][4], top = -INFINITY;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int i = j * 128 + lane * 4;
        const bool is_seen = i < count && mark_at(p, own, (first + i) / SPAN) < own.marks;
        load_floats(&logits[at][i], x[j]);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          x[j][e] = is_seen ? x[j][e] : -INFINITY;
          top = fmaxf(top, x[j][e]);
        }
      }
      top = warp_max(top);
      const uint64_t row = row0 + at;
      float *to = p.logits + (uint64_t(own.at) * p.rows + row) * p.n + first;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int i = j * 128 + lane * 4;
        if (top > -INFINITY) {
#pragma unroll
          for (int e = 0; e < 4; e++) sum += exp2f(x[j][e] - top);
        }
        if (i < count) store_floats(to + i, x[j]);
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        float *stats = p.stats + ((uint64_t(own.at) * p.blocks + blockIdx.x) * p.rows + row) * 2;
        stats[0] = top, stats[1] = sum;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) score_rows_32(const __grid_constant__ VoteParams p) {
  score_rows<1>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) score_rows_64(const __grid_constant__ VoteParams p) {
  score_rows<2>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) score_rows_96(const __grid_constant__ VoteParams p) {
  score_rows<3>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) score_rows_128(const __grid_constant__ VoteParams p) {
  score_rows<4>(p);
}
