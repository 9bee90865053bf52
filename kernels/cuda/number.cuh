// Element types of the kernels and their conversion to f32, in which everything is computed.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// N neighbouring elements, loaded and stored as one.
template <typename T, int N> struct alignas(sizeof(T) * N) Vector {
  T x[N];
};

__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&pair);
}
__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&pair);
}

// Four neighbouring elements, rounded and stored as one.
template <typename T> __device__ __forceinline__ void store_floats(T *to, const float (&x)[4]) {
  if constexpr (sizeof(T) == 4) *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
  else *reinterpret_cast<uint2 *>(to) = make_uint2(pack(T(), x[0], x[1]), pack(T(), x[2], x[3]));
}

// The same, read.
__device__ __forceinline__ void unpack(__nv_bfloat16, uint32_t pair, float &low, float &high) {
  low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ void unpack(__half, uint32_t pair, float &low, float &high) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2 *>(&pair));
  low = both.x, high = both.y;
}
template <typename T> __device__ __forceinline__ void load_floats(const T *from, float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    const float4 four = *reinterpret_cast<const float4 *>(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    const uint2 two = *reinterpret_cast<const uint2 *>(from);
    unpack(T(), two.x, x[0], x[1]);
    unpack(T(), two.y, x[2], x[3]);
  }
}

// What no kernel writes while this one runs.
__device__ __forceinline__ void load_constant(const float *from, float (&x)[4]) {
  const float4 four = __ldg(reinterpret_cast<const float4 *>(from));
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

// Sum over the 32 lanes of a warp, in every lane; the order of additions is fixed.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
