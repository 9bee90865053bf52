// silu(gate) · up, the gated half of a Llama MLP. One thread a value; bound by memory.
#include "number.cuh"

struct SiluMulParams {
  const void *gate; // (len)
  const void *up;   // (len)
  void *out;        // (len)
  uint64_t len;
};

template <typename T> __device__ void silu_mul(const SiluMulParams &p) {
  const T *gate = static_cast<const T *>(p.gate);
  const T *up = static_cast<const T *>(p.up);
  T *out = static_cast<T *>(p.out);
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.len; i += step) {
    const float g = to_float(gate[i]);
    // With e = exp(-|g|) sigmoid is 1 / (1 + e) for g ≥ 0 and e / (1 + e) below: no overflow either side.
    const float e = expf(-fabsf(g));
    const float numerator = g >= 0.0f ? 1.0f : e;
    out[i] = from_float<T>(g * numerator / (1.0f + e) * to_float(up[i]));
  }
}

extern "C" __global__ void silu_mul_f32(const SiluMulParams p) { silu_mul<float>(p); }
extern "C" __global__ void silu_mul_bf16(const SiluMulParams p) { silu_mul<__nv_bfloat16>(p); }
extern "C" __global__ void silu_mul_f16(const SiluMulParams p) { silu_mul<__half>(p); }
