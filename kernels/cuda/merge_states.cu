// Merge of attention over two sets of keys, and its gradient: with w = e^(lse_i - lse), out = w_a a + w_b b.
// A warp a row of d values; bound by memory. A state that saw no key has lse = -inf and w = 0.
#include "number.cuh"

struct MergeParams {
  const void *a, *b;          // (rows, d)
  const float *a_lse, *b_lse; // (rows)
  void *out;                  // (rows, d)
  float *lse;                 // (rows)
  uint64_t rows;
  uint32_t d;
};

struct MergeBackwardParams {
  const void *a, *b, *dout;   // (rows, d)
  const float *a_lse, *b_lse; // (rows)
  const float *dlse;          // (rows) or null
  void *da, *db;              // (rows, d)
  float *da_lse, *db_lse;     // (rows)
  uint64_t rows;
  uint32_t d;
};

struct Weights {
  float a, b, lse;
};

__device__ __forceinline__ Weights weights(float a, float b) {
  const float max = fmaxf(a, b);
  if (max == -INFINITY) return Weights{0.0f, 0.0f, -INFINITY};
  const float x = expf(a - max), y = expf(b - max), sum = x + y;
  return Weights{x / sum, y / sum, max + logf(sum)};
}

template <typename T> __device__ void merge(const MergeParams &p) {
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x / 32;
  for (uint64_t row = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; row < p.rows; row += step) {
    const Weights w = weights(p.a_lse[row], p.b_lse[row]);
    const T *a = static_cast<const T *>(p.a) + row * p.d, *b = static_cast<const T *>(p.b) + row * p.d;
    T *out = static_cast<T *>(p.out) + row * p.d;
    for (uint32_t i = lane; i < p.d; i += 32) out[i] = from_float<T>(w.a * to_float(a[i]) + w.b * to_float(b[i]));
    if (lane == 0) p.lse[row] = w.lse;
  }
}

template <typename T> __device__ void merge_backward(const MergeBackwardParams &p) {
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x / 32;
  for (uint64_t row = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; row < p.rows; row += step) {
    const Weights w = weights(p.a_lse[row], p.b_lse[row]);
    const uint64_t at = row * p.d;
    const T *a = static_cast<const T *>(p.a) + at, *b = static_cast<const T *>(p.b) + at;
    const T *dout = static_cast<const T *>(p.dout) + at;
    T *da = static_cast<T *>(p.da) + at, *db = static_cast<T *>(p.db) + at;
    float dot = 0.0f;
    for (uint32_t i = lane; i < p.d; i += 32) {
      const float g = to_float(dout[i]);
      dot += g * (to_float(a[i]) - to_float(b[i]));
      da[i] = from_float<T>(w.a * g);
      db[i] = from_float<T>(w.b * g);
    }
    dot = warp_sum(dot);
    if (lane == 0) {
      const float dlse = p.dlse == nullptr ? 0.0f : p.dlse[row];
      p.da_lse[row] = w.a * w.b * dot + w.a * dlse;
      p.db_lse[row] = -w.a * w.b * dot + w.b * dlse;
    }
  }
}

extern "C" __global__ void merge_states_f32(const MergeParams p) { merge<float>(p); }
extern "C" __global__ void merge_states_bf16(const MergeParams p) { merge<__nv_bfloat16>(p); }
extern "C" __global__ void merge_states_f16(const MergeParams p) { merge<__half>(p); }
extern "C" __global__ void merge_states_backward_f32(const MergeBackwardParams p) { merge_backward<float>(p); }
extern "C" __global__ void merge_states_backward_bf16(const MergeBackwardParams p) {
  merge_backward<__nv_bfloat16>(p);
}
extern "C" __global__ void merge_states_backward_f16(const MergeBackwardParams p) { merge_backward<__half>(p); }
