// One step of AdamW on one tensor in place, and the sums of squares of a gradient. Bound by memory.
#include "number.cuh"

struct AdamWParams {
  const float *gradient; // (len)
  float *master;         // (len)
  float *first;          // (len)
  float *second;         // (len)
  void *value;           // (len): the master in the type that the model reads, or null where that is f32 and the master itself
  uint64_t len;
  float scale; // of the gradient
  float beta1, beta2;
  float correct1, correct2; // 1 - beta^step
  float eps, decay, rate;
};

struct SquareSumParams {
  const float *x; // (len)
  float *sums;    // (gridDim.x)
  uint64_t len;
};

constexpr int THREADS = 256;

template <typename T> __device__ void adamw(const AdamWParams &p) {
  T *value = static_cast<T *>(p.value);
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.len; i += step) {
    const float g = p.gradient ? p.gradient[i] * p.scale : 0.0f;
    const float first = p.first[i] * p.beta1 + g * (1.0f - p.beta1);
    const float second = p.second[i] * p.beta2 + g * g * (1.0f - p.beta2);
    const float root = sqrtf(second / p.correct2) + p.eps;
    const float change = first / p.correct1 / root + p.master[i] * p.decay;
    const float master = p.master[i] - change * p.rate;
    p.first[i] = first, p.second[i] = second, p.master[i] = master;
    if (value) value[i] = from_float<T>(master);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) square_sum(const SquareSumParams p) {
  __shared__ float warps[THREADS / 32];
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  float sum = 0.0f;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.len; i += step) sum += p.x[i] * p.x[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < THREADS / 32; i++) sum += warps[i];
  p.sums[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) adamw_f32(const AdamWParams p) { adamw<float>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) adamw_bf16(const AdamWParams p) { adamw<__nv_bfloat16>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) adamw_f16(const AdamWParams p) { adamw<__half>(p); }
