// x / rms(x) · weight over rows of c, with the sum that comes before it where there is one, and its gradients.
// Bound by memory: a row is read twice, the second time from the cache.
#include "number.cuh"

struct RmsNormParams {
  const void *x;      // (n, c)
  const void *added;  // (n, c) or null: then x + added is normed
  const void *weight; // (c) or null: ones
  void *sum;          // (n, c): x + added, if there is one
  void *out;          // (n, c)
  float *inverse;     // (n): 1 / rms
  uint32_t rows;
  uint32_t c;
  float eps;
};

struct RmsNormBackwardParams {
  const void *x;        // (n, c): what was normed
  const void *weight;   // (c) or null
  const float *inverse; // (n)
  const void *dout;     // (n, c)
  const void *added;    // (n, c) or null: a gradient of x from elsewhere
  void *dx;             // (n, c)
  uint32_t rows;
  uint32_t c;
};

struct RmsNormWeightParams {
  const void *x;        // (n, c)
  const float *inverse; // (n)
  const void *dout;     // (n, c)
  float *partial;       // (parts, c)
  float *dweight;       // (c)
  uint32_t rows;
  uint32_t c;
  uint32_t rows_of_part;
  uint32_t parts;
  uint32_t lanes; // threads along a row, a power of two
};

constexpr int THREADS = 256;

// N neighbouring elements as f32.
template <typename T, int N> __device__ __forceinline__ void load(const T *from, float (&x)[N]) {
  if constexpr (N == 4) load_floats(from, x);
  else x[0] = to_float(*from);
}
template <typename T, int N> __device__ __forceinline__ void store(T *to, const float (&x)[N]) {
  if constexpr (N == 4) store_floats(to, x);
  else *to = from_float<T>(x[0]);
}

// Sum over the ROW threads of a row: a warp, or the block.
template <int ROW> __device__ __forceinline__ float row_sum(float x) {
  x = warp_sum(x);
  if constexpr (ROW > 32) {
    __shared__ float sums[ROW / 32];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW / 32; i++) x += sums[i];
    // The next call writes again.
    __syncthreads();
  }
  return x;
}

template <typename T, int N, int ROW> __device__ void forward(const RmsNormParams &p) {
  const uint32_t row = blockIdx.x * (THREADS / ROW) + threadIdx.x / ROW;
  if (row >= p.rows) return;
  const uint64_t start = uint64_t(row) * p.c;
  const T *x = static_cast<const T *>(p.x) + start;
  const T *added = p.added ? static_cast<const T *>(p.added) + start : nullptr;
  const T *weight = static_cast<const T *>(p.weight);
  T *sum = static_cast<T *>(p.sum) + start;
  T *out = static_cast<T *>(p.out) + start;
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x % ROW * N; i < p.c; i += ROW * N) {
    float v[N];
    load<T, N>(x + i, v);
    if (added) {
      float a[N];
      load<T, N>(added + i, a);
#pragma unroll
      // What is normed is the sum as it is stored.
      for (int j = 0; j < N; j++) v[j] = to_float(from_float<T>(v[j] + a[j]));
      store<T, N>(sum + i, v);
    }
#pragma unroll
    for (int j = 0; j < N; j++) squares += v[j] * v[j];
  }
  const float inverse = rsqrtf(row_sum<ROW>(squares) / float(p.c) + p.eps);
  if (threadIdx.x % ROW == 0) p.inverse[row] = inverse;
  // A thread reads what it wrote itself.
  const T *normed = added ? sum : x;
  for (uint32_t i = threadIdx.x % ROW * N; i < p.c; i += ROW * N) {
    float v[N], w[N];
    load<T, N>(normed + i, v);
    if (weight) load<T, N>(weight + i, w);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] *= weight ? inverse * w[j] : inverse;
    store<T, N>(out + i, v);
  }
}

// With y = x · inverse and g = dout · weight: dx = inverse (g - y mean(g y)) + added.
template <typename T, int N, int ROW> __device__ void backward(const RmsNormBackwardParams &p) {
  const uint32_t row = blockIdx.x * (THREADS / ROW) + threadIdx.x / ROW;
  if (row >= p.rows) return;
  const uint64_t start = uint64_t(row) * p.c;
  const T *x = static_cast<const T *>(p.x) + start;
  const T *dout = static_cast<const T *>(p.dout) + start;
  const T *weight = static_cast<const T *>(p.weight);
  const T *added = p.added ? static_cast<const T *>(p.added) + start : nullptr;
  T *dx = static_cast<T *>(p.dx) + start;
  const float inverse = p.inverse[row];
  float along = 0.0f;
  for (uint32_t i = threadIdx.x % ROW * N; i < p.c; i += ROW * N) {
    float v[N], g[N], w[N];
    load<T, N>(x + i, v);
    load<T, N>(dout + i, g);
    if (weight) load<T, N>(weight + i, w);
#pragma unroll
    for (int j = 0; j < N; j++) along += g[j] * (weight ? w[j] : 1.0f) * v[j];
  }
  along = row_sum<ROW>(along) * inverse * inverse / float(p.c);
  for (uint32_t i = threadIdx.x % ROW * N; i < p.c; i += ROW * N) {
    float v[N], g[N], w[N], a[N];
    load<T, N>(x + i, v);
    load<T, N>(dout + i, g);
    if (weight) load<T, N>(weight + i, w);
    if (added) load<T, N>(added + i, a);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float d = inverse * (g[j] * (weight ? w[j] : 1.0f) - v[j] * along);
      v[j] = added ? d + a[j] : d;
    }
    store<T, N>(dx + i, v);
  }
}

// Σ over the rows of a part of dout · x · inverse. `lanes` threads along a row, the others on further rows.
template <typename T> __device__ void weight_parts(const RmsNormWeightParams &p) {
  __shared__ float sums[THREADS];
  const uint32_t lane = threadIdx.x % p.lanes, sub = threadIdx.x / p.lanes, subs = THREADS / p.lanes;
  const uint32_t column = blockIdx.x * p.lanes + lane;
  const uint32_t first = blockIdx.y * p.rows_of_part;
  const uint32_t end = min(first + p.rows_of_part, p.rows);
  const T *x = static_cast<const T *>(p.x), *dout = static_cast<const T *>(p.dout);
  float sum = 0.0f;
  if (column < p.c) {
#pragma unroll 4
    for (uint32_t row = first + sub; row < end; row += subs) {
      const uint64_t at = uint64_t(row) * p.c + column;
      sum += to_float(dout[at]) * to_float(x[at]) * p.inverse[row];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (sub == 0 && column < p.c) {
    for (uint32_t i = 1; i < subs; i++) sum += sums[i * p.lanes + lane];
    p.partial[uint64_t(blockIdx.y) * p.c + column] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_weight(const RmsNormWeightParams p) {
  const uint32_t column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= p.c) return;
  float sum = 0.0f;
#pragma unroll 8
  for (uint32_t i = 0; i < p.parts; i++) sum += p.partial[uint64_t(i) * p.c + column];
  p.dweight[column] = sum;
}

#define KERNELS(T, name)                                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_##name(const RmsNormParams p) {                       \
    if (p.c % 4 != 0) forward<T, 1, 32>(p);                                                                            \
    else forward<T, 4, 32>(p);                                                                                         \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_wide_##name(const RmsNormParams p) {                  \
    if (p.c % 4 != 0) forward<T, 1, THREADS>(p);                                                                       \
    else forward<T, 4, THREADS>(p);                                                                                    \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_backward_##name(const RmsNormBackwardParams p) {      \
    if (p.c % 4 != 0) backward<T, 1, 32>(p);                                                                           \
    else backward<T, 4, 32>(p);                                                                                        \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_backward_wide_##name(const RmsNormBackwardParams p) { \
    if (p.c % 4 != 0) backward<T, 1, THREADS>(p);                                                                      \
    else backward<T, 4, THREADS>(p);                                                                                   \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_weight_parts_##name(const RmsNormWeightParams p) {    \
    weight_parts<T>(p);                                                                                                \
  }

KERNELS(float, f32)
KERNELS(__nv_bfloat16, bf16)
KERNELS(__half, f16)
