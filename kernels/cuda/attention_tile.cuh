// Tiles of attention in shared memory and the two matrix products over them, on mma.m16n8k16.
// A tile is row-major, D 16-bit elements a row, its 16-byte chunks swizzled so that the 8 rows of an 8x8 matrix that
// ldmatrix reads lie in 8 different groups of banks.
#pragma once
#include "attention.cuh"
#include "mma_sm80.cuh"

// Byte offset of a chunk of 8 elements in a tile. Where a row fills whole 128-byte lines the chunk is turned by the row
// within its line. Otherwise a row is an odd number of half lines: its parity moves it by half a line, and the chunk is
// turned within the half by the rest of the row.
template <int D> __device__ __forceinline__ uint32_t tile_at(uint32_t row, uint32_t chunk) {
  static_assert(D % 32 == 0, "a row is a number of 64-byte half lines");
  const uint32_t turn = D % 64 == 0 ? row & 7 : row >> 1 & 3;
  return row * (2 * D) + ((chunk ^ turn) << 4);
}

// The address `chunks` (2 or 4 or a multiple) further in the row, from an address whose chunk was less than that before
// its turn. Tiles start at multiples of 128 bytes, so that the turned bits of the address are those of the chunk alone.
template <int D> __device__ __forceinline__ uint32_t tile_step(uint32_t at, int chunks) {
  constexpr int TURNED = D % 64 == 0 ? 7 : 3;
  return (at ^ (chunks & TURNED) << 4) + ((chunks & ~TURNED) << 4);
}

// The same number, of which the compiler knows nothing: the addresses of a loop's steps are computed from it at each
// step, at one instruction, and not all kept in registers from before the loop.
__device__ __forceinline__ uint32_t fresh(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <int ROWS, int D> constexpr int TILE_BYTES = ROWS * D * 2;

// Starts the copy of the rows [first, first + ROWS) of a matrix into a tile; rows from `limit` on become zeros.
// A thread copies the same chunks of every STEP-th row: neither its swizzle nor its column changes on the way.
template <typename T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const T *from, int stride, int first, int limit) {
  constexpr int LINE = D % 64 != 0 ? 4 : THREADS / 8 <= ROWS ? 8 : 16; // chunks that neighbouring threads copy
  constexpr int STEP = THREADS / LINE;
  static_assert(D / 8 % LINE == 0 && ROWS % STEP == 0 && STEP % 8 == 0, "whole steps that keep the swizzle");
  const int row = threadIdx.x / LINE, chunk = threadIdx.x % LINE;
  const uint32_t to = tile + tile_at<D>(row, chunk);
  const T *source = from + int64_t(first + row) * stride + chunk * 8;
#pragma unroll
  for (int j = 0; j < ROWS / STEP; ++j, source += int64_t(STEP) * stride)
#pragma unroll
    for (int part = 0; part < D / 8 / LINE; ++part)
      // An address past the end is formed but not read.
      copy_async_16(to + j * STEP * D * 2 + part * LINE * 16, source + part * LINE * 8, first + row + j * STEP < limit);
}

// acc (16·MT x 8·NT) += A (rows from a_row) · B (rows from b_row)ᵀ, summed over D.
template <typename T, int D, int MT, int NT>
__device__ __forceinline__ void multiply_rows(float (&acc)[MT][NT][4], uint32_t a, int a_row, uint32_t b, int b_row) {
  static_assert(NT % 2 == 0, "one ldmatrix brings the fragments of 16 columns");
  const int lane = threadIdx.x % 32;
  // Matrices of a left fragment: (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
  const uint32_t left_at = fresh(a + tile_at<D>(a_row + lane % 16, lane / 16));
  // Of two right fragments: (columns 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
  const uint32_t right_at = fresh(b + tile_at<D>(b_row + lane % 8 + lane / 16 * 8, lane / 8 % 2));
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) load_matrix_x4(left[m], tile_step<D>(left_at, 2 * k) + 32 * D * m);
#pragma unroll
    for (int n = 0; n < NT / 2; ++n) {
      uint32_t right[4];
      load_matrix_x4(right, tile_step<D>(right_at, 2 * k) + 32 * D * n);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        multiply<T>(acc[m][2 * n], left[m], right[0], right[1]);
        multiply<T>(acc[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Of D columns that PARTNERS warps divide, tiles of 16 in turn, the first of the n-th 8 that warp `part` holds.
template <int PARTNERS> __device__ __forceinline__ int column_of(int n, int part) {
  return 16 * (n / 2 * PARTNERS + part) + n % 2 * 8;
}

// acc (16·MT x D / PARTNERS) += A (16·MT x 16·KT, in registers) · B (16·KT rows from b_row, columns of warp `part`).
template <typename T, int D, int MT, int KT, int PARTNERS = 1>
__device__ __forceinline__ void multiply_columns(float (&acc)[MT][D / 8 / PARTNERS][4], const uint32_t (&a)[MT][KT][4],
                                                 uint32_t b, int b_row, int part = 0) {
  static_assert(D / 16 % PARTNERS == 0 && PARTNERS <= 2, "whole tiles of columns, stepped over as tile_step can");
  const int lane = threadIdx.x % 32;
  // Matrices as stored: (k 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15); each is transposed on the way.
  const uint32_t right_at = fresh(b + tile_at<D>(b_row + lane % 16, 2 * part + lane / 16));
#pragma unroll
  for (int k = 0; k < KT; ++k) {
#pragma unroll
    for (int n = 0; n < D / 16 / PARTNERS; ++n) {
      uint32_t right[4];
      load_matrix_x4_transposed(right, tile_step<D>(right_at, 2 * PARTNERS * n) + 32 * D * k);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        multiply<T>(acc[m][2 * n], a[m][k], right[0], right[1]);
        multiply<T>(acc[m][2 * n + 1], a[m][k], right[2], right[3]);
      }
    }
  }
}

// Accumulators rounded to T as the left operand of the next product. An accumulator holds rows lane/4 and lane/4 + 8 at
// columns 2·(lane%4) and the next of 8, a left fragment the same of 2 x 8 columns: no lane gives anything to another.
template <typename T, int MT, int NT>
__device__ __forceinline__ void as_left(uint32_t (&a)[MT][NT / 2][4], const float (&c)[MT][NT][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < NT / 2; ++k) {
      a[m][k][0] = pack<T>(c[m][2 * k][0], c[m][2 * k][1]);
      a[m][k][1] = pack<T>(c[m][2 * k][2], c[m][2 * k][3]);
      a[m][k][2] = pack<T>(c[m][2 * k + 1][0], c[m][2 * k + 1][1]);
      a[m][k][3] = pack<T>(c[m][2 * k + 1][2], c[m][2 * k + 1][3]);
    }
}

// A left operand from one warp to another through `room`, 512 bytes a fragment: a lane gets what the same lane gave.
template <int MT, int KT> __device__ __forceinline__ void give_left(const uint32_t (&a)[MT][KT][4], uint32_t room) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < KT; ++k) store_shared_16(room + (m * KT + k) * 512 + threadIdx.x % 32 * 16, a[m][k]);
}
template <int MT, int KT> __device__ __forceinline__ void take_left(uint32_t (&a)[MT][KT][4], uint32_t room) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int k = 0; k < KT; ++k) load_shared_16(a[m][k], room + (m * KT + k) * 512 + threadIdx.x % 32 * 16);
}

// -inf for the scores of a row, from first_row on, outside of the columns {first, last} that range(row) gives; the
// scores' columns are numbered from first_column.
template <int MT, int NT, typename Range>
__device__ __forceinline__ void hide(float (&scores)[MT][NT][4], int first_row, int first_column, Range range) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int2 seen = range(first_row + 16 * m + 8 * half + lane / 4);
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = first_column + 8 * n + lane % 4 * 2 + e;
          if (column < seen.x || column > seen.y) scores[m][n][2 * half + e] = -INFINITY;
        }
    }
}

template <int A, int B> __device__ __forceinline__ void clear(float (&x)[A][B][4]) {
#pragma unroll
  for (int i = 0; i < A; ++i)
#pragma unroll
    for (int j = 0; j < B; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][j][e] = 0.f;
}

template <int A, int B> __device__ __forceinline__ void scale_by(float (&x)[A][B][4], float factor) {
#pragma unroll
  for (int i = 0; i < A; ++i)
#pragma unroll
    for (int j = 0; j < B; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][j][e] *= factor;
}

// Writes a warp's accumulators (16·MT rows, its D / PARTNERS columns) to the rows [first + tile_row, ..) of a matrix,
// through the same place of `tile`, in 16-byte stores; rows from `limit` on are left out. No other warp may still read
// that place.
template <typename T, int D, int MT, int PARTNERS = 1>
__device__ __forceinline__ void store_rows(const float (&acc)[MT][D / 8 / PARTNERS][4], uint8_t *tile, int tile_row,
                                           T *to, int stride, int first, int limit, int part = 0) {
  constexpr int CHUNKS = D / 8 / PARTNERS;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < CHUNKS; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile_row + 16 * m + 8 * half + lane / 4;
        *reinterpret_cast<uint32_t *>(tile + tile_at<D>(row, column_of<PARTNERS>(n, part) / 8) + lane % 4 * 4) =
            pack<T>(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * MT * CHUNKS; i += 32) {
    const int row = tile_row + i / CHUNKS, column = column_of<PARTNERS>(i % CHUNKS, part);
    if (first + row < limit)
      *reinterpret_cast<uint4 *>(to + int64_t(first + row) * stride + column) =
          *reinterpret_cast<const uint4 *>(tile + tile_at<D>(row, column / 8));
  }
}
