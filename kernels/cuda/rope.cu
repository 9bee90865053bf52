// Rotary embedding, half-split layout: y[i] = x[i] c - x[i+d/2] s ; y[i+d/2] = x[i+d/2] c + x[i] s.
// Bound by memory. `sign` -1 is the inverse rotation, which is also the gradient.
#include "number.cuh"

struct RopeParams {
  const void *x;       // (t, h, d), contiguous
  const float *cosine; // (t, d/2)
  const float *sine;   // (t, d/2)
  void *y;             // (t, h, d), contiguous
  uint64_t pairs;      // t · h · d/2
  uint32_t heads;
  uint32_t half;
  float sign;
};

// A thread takes N neighbouring pairs: 16 bytes of each half where head_dim allows, one pair otherwise.
template <typename T, int N> __device__ __forceinline__ void rotate(const RopeParams &p) {
  using V = Vector<T, N>;
  const T *x = static_cast<const T *>(p.x);
  T *y = static_cast<T *>(p.y);
  const uint32_t per_head = p.half / N;
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.pairs / N; i += step) {
    const uint64_t row = i / per_head; // token · heads + head
    const uint32_t j = uint32_t(i - row * per_head) * N;
    const uint64_t angle = row / p.heads * p.half + j;
    const uint64_t at = row * 2 * p.half + j;
    const V a = *reinterpret_cast<const V *>(x + at), b = *reinterpret_cast<const V *>(x + at + p.half);
    V low, high;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float c = p.cosine[angle + n], s = p.sign * p.sine[angle + n];
      const float u = to_float(a.x[n]), v = to_float(b.x[n]);
      // Each product is rounded by itself, as the CPU does it: no fused multiply-add.
      low.x[n] = from_float<T>(__fsub_rn(__fmul_rn(u, c), __fmul_rn(v, s)));
      high.x[n] = from_float<T>(__fadd_rn(__fmul_rn(v, c), __fmul_rn(u, s)));
    }
    *reinterpret_cast<V *>(y + at) = low;
    *reinterpret_cast<V *>(y + at + p.half) = high;
  }
}

template <typename T> __device__ __forceinline__ void rope(const RopeParams &p) {
  constexpr int wide = 16 / sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y)) % 16 == 0;
  if (aligned && p.half % wide == 0) {
    rotate<T, wide>(p);
  } else {
    rotate<T, 1>(p);
  }
}

extern "C" __global__ void rope_f32(const RopeParams p) { rope<float>(p); }
extern "C" __global__ void rope_bf16(const RopeParams p) { rope<__nv_bfloat16>(p); }
extern "C" __global__ void rope_f16(const RopeParams p) { rope<__half>(p); }
