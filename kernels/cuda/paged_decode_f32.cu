// Attention of a few query rows over pages, f32: out = softmax(q kᵀ · scale + bias) v, split over the pages.
// Blocks and memory are those of `decode_rows_f32.cuh`.
#include "decode_rows_f32.cuh"

template <int D> __device__ __forceinline__ void decode(const PagedParams &p) {
  decode_rows<D>(p, blockIdx.y, [&](const float *acc, const float *max, const float *sum, float *weights) {
    finish_split<float, D, D>(p, blockIdx.x, blockIdx.z, blockIdx.y, acc, D, max, sum, weights);
  });
}

#define KERNEL(D) \
  extern "C" __global__ void __launch_bounds__(D) paged_decode_f32_##D(const __grid_constant__ PagedParams p) { \
    decode<D>(p); \
  }
KERNEL(64)
KERNEL(96)
KERNEL(128)
KERNEL(256)
