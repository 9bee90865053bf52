// Rotary embedding, half-split layout: y[i] = x[i] c - x[i+d/2] s ; y[i+d/2] = x[i+d/2] c + x[i] s.
// One thread a pair; bound by memory. `sign` -1 is the inverse rotation, which is also the gradient.
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

template <typename T> __device__ void rope(const RopeParams &p) {
  const T *x = static_cast<const T *>(p.x);
  T *y = static_cast<T *>(p.y);
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.pairs; i += step) {
    const uint64_t row = i / p.half; // token · heads + head
    const uint32_t j = uint32_t(i - row * p.half);
    const uint64_t angle = row / p.heads * p.half + j;
    const uint64_t at = row * 2 * p.half + j;
    const float c = p.cosine[angle], s = p.sign * p.sine[angle];
    const float a = to_float(x[at]), b = to_float(x[at + p.half]);
    // Each product is rounded by itself, as the CPU does it: no fused multiply-add.
    y[at] = from_float<T>(__fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s)));
    y[at + p.half] = from_float<T>(__fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s)));
  }
}

extern "C" __global__ void rope_f32(const RopeParams p) { rope<float>(p); }
extern "C" __global__ void rope_bf16(const RopeParams p) { rope<__nv_bfloat16>(p); }
extern "C" __global__ void rope_f16(const RopeParams p) { rope<__half>(p); }
