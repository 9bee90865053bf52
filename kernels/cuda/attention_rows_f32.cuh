// The two steps that every f32 attention kernel is made of, on plain FMA: a warp holds ROWS rows, a tile in shared
// memory holds 32 rows of the other side, one a lane. d is any multiple of 32 up to 256.
#pragma once
#include "attention.cuh"

namespace f32 {

constexpr int WARPS = 8, ROWS = 4, BLOCK_ROWS = WARPS * ROWS, TILE = 32, THREADS = 32 * WARPS;
constexpr int MAX_CHUNKS = 8; // of 32 columns

// Rows are padded by 16 bytes: the lanes of a quarter warp read 16 bytes each from rows d/4 + 1 (odd) units apart, hence
// from different banks.
__device__ __forceinline__ int pitch(int d) { return d + 4; }

// Rows [first, first + 32) of a matrix; rows from `limit` on become zeros.
__device__ __forceinline__ void load(float *tile, const float *from, int64_t stride, int first, int limit, int d) {
  static_assert(BLOCK_ROWS == TILE, "one loader for the warps' rows and for the tiles");
  for (int i = threadIdx.x; i < TILE * d / 4; i += THREADS) {
    const int row = i / (d / 4), x = i % (d / 4) * 4;
    float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
    if (first + row < limit) value = *reinterpret_cast<const float4 *>(from + (first + row) * stride + x);
    *reinterpret_cast<float4 *>(tile + row * pitch(d) + x) = value;
  }
}

// dot[r] = row r of the warp · row `lane` of the tile.
__device__ __forceinline__ void dots(float (&dot)[ROWS], const float *rows, const float *tile, int d) {
  const float *mine = tile + threadIdx.x % 32 * pitch(d);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) dot[r] = 0.f;
#pragma unroll 4
  for (int x = 0; x < d; x += 4) {
    const float4 b = *reinterpret_cast<const float4 *>(mine + x);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float4 a = *reinterpret_cast<const float4 *>(rows + r * pitch(d) + x);
      dot[r] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
    }
  }
}

// sum[r][c] += Σ_j weight[r] of lane j · tile[j][32 c + lane].
__device__ __forceinline__ void add_rows(float (&sum)[ROWS][MAX_CHUNKS], const float (&weight)[ROWS],
                                         const float *tile, int d) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int j = 0; j < TILE; ++j) {
    float w[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) w[r] = __shfl_sync(0xffffffffu, weight[r], j);
#pragma unroll
    for (int c = 0; c < MAX_CHUNKS; ++c)
      if (32 * c < d) {
        const float x = tile[j * pitch(d) + 32 * c + lane];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[r][c] = fmaf(w[r], x, sum[r][c]);
      }
  }
}

// Row r of the warp, times `factor`, to `to`.
__device__ __forceinline__ void store(const float (&sum)[MAX_CHUNKS], float factor, float *to, int d) {
#pragma unroll
  for (int c = 0; c < MAX_CHUNKS; ++c)
    if (32 * c < d) to[32 * c + threadIdx.x % 32] = sum[c] * factor;
}

} // namespace f32
