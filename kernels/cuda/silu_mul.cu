// silu(gate) · up, the gated half of a Llama MLP, its gradients, and silu of a sum with a bias. Four values a thread at a
// time; bound by memory.
#include "number.cuh"

struct SiluMulParams {
  const void *gate; // (len)
  const void *up;   // (len)
  void *out;        // (len)
  uint64_t len;
};

struct SiluMulBackwardParams {
  const void *gate; // (len)
  const void *up;   // (len)
  const void *dout; // (len)
  void *dgate;      // (len)
  void *dup;        // (len)
  uint64_t len;
};

struct SiluBiasParams {
  const void *x;    // (n, c)
  const void *bias; // (c)
  const void *dout; // (n, c), or null forward
  void *out;        // (n, c): silu(x + bias), or the gradient of x
  uint64_t len;
  uint32_t c;
};

// With e = exp(-|g|) the sigmoid is 1 / (1 + e) for g ≥ 0 and e / (1 + e) below: no overflow either side.
__device__ __forceinline__ float sigmoid(float g) {
  const float e = expf(-fabsf(g));
  return (g >= 0.0f ? 1.0f : e) / (1.0f + e);
}
__device__ __forceinline__ float slope(float g, float s) { return s * (1.0f + g * (1.0f - s)); }

template <typename T> __device__ void silu_mul(const SiluMulParams &p) {
  const T *gate = static_cast<const T *>(p.gate);
  const T *up = static_cast<const T *>(p.up);
  T *out = static_cast<T *>(p.out);
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  const uint64_t first = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, fours = p.len / 4;
  for (uint64_t i = first; i < fours; i += step) {
    float g[4], u[4];
    load_floats(gate + 4 * i, g);
    load_floats(up + 4 * i, u);
#pragma unroll
    for (int j = 0; j < 4; j++) g[j] = g[j] * sigmoid(g[j]) * u[j];
    store_floats(out + 4 * i, g);
  }
  for (uint64_t i = 4 * fours + first; i < p.len; i += step) {
    const float g = to_float(gate[i]);
    out[i] = from_float<T>(g * sigmoid(g) * to_float(up[i]));
  }
}

template <typename T> __device__ void silu_mul_backward(const SiluMulBackwardParams &p) {
  const T *gate = static_cast<const T *>(p.gate);
  const T *up = static_cast<const T *>(p.up);
  const T *dout = static_cast<const T *>(p.dout);
  T *dgate = static_cast<T *>(p.dgate);
  T *dup = static_cast<T *>(p.dup);
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  const uint64_t first = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, fours = p.len / 4;
  for (uint64_t i = first; i < fours; i += step) {
    float g[4], u[4], d[4];
    load_floats(gate + 4 * i, g);
    load_floats(up + 4 * i, u);
    load_floats(dout + 4 * i, d);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float s = sigmoid(g[j]), silu = g[j] * s;
      u[j] = d[j] * u[j] * slope(g[j], s);
      d[j] = d[j] * silu;
    }
    store_floats(dgate + 4 * i, u);
    store_floats(dup + 4 * i, d);
  }
  for (uint64_t i = 4 * fours + first; i < p.len; i += step) {
    const float g = to_float(gate[i]), s = sigmoid(g), d = to_float(dout[i]);
    dgate[i] = from_float<T>(d * to_float(up[i]) * slope(g, s));
    dup[i] = from_float<T>(d * g * s);
  }
}

template <typename T> __device__ void silu_bias(const SiluBiasParams &p) {
  const T *x = static_cast<const T *>(p.x), *bias = static_cast<const T *>(p.bias);
  const T *dout = static_cast<const T *>(p.dout);
  T *out = static_cast<T *>(p.out);
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.len; i += step) {
    const float g = to_float(x[i]) + to_float(bias[i % p.c]), s = sigmoid(g);
    out[i] = from_float<T>(dout ? to_float(dout[i]) * slope(g, s) : g * s);
  }
}

#define KERNELS(T, name)                                                                                             \
  extern "C" __global__ void silu_mul_##name(const SiluMulParams p) { silu_mul<T>(p); }                              \
  extern "C" __global__ void silu_mul_backward_##name(const SiluMulBackwardParams p) { silu_mul_backward<T>(p); }    \
  extern "C" __global__ void silu_bias_##name(const SiluBiasParams p) { silu_bias<T>(p); }

KERNELS(float, f32)
KERNELS(__nv_bfloat16, bf16)
KERNELS(__half, f16)
