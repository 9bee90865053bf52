// Cross-entropy of rows of logits with their targets, and its gradient. One block a row; the row is read twice, the
// second time from the cache.
#include "number.cuh"

struct CrossEntropyParams {
  const void *logits;      // (n, words)
  const uint32_t *targets; // (n)
  float *losses;           // (n)
  void *dlogits;           // (n, words) or null
  uint64_t words;
  float scale; // of the gradient
};

constexpr int THREADS = 512;

// A maximum and Σ e^(x - maximum).
struct Sum {
  float max, sum;
};

__device__ __forceinline__ Sum merge(Sum a, Sum b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * __expf(a.max - max) + b.sum * __expf(b.max - max)};
}

template <typename T> __device__ void cross_entropy(const CrossEntropyParams &p) {
  __shared__ float maxima[THREADS / 32], sums[THREADS / 32];
  const uint64_t start = uint64_t(blockIdx.x) * p.words;
  const T *logits = static_cast<const T *>(p.logits) + start;
  const uint32_t target = p.targets[blockIdx.x];
  // Rows of whole fours begin at a multiple of four.
  const uint64_t fours = p.words % 4 == 0 ? p.words / 4 : 0;
  // Finite, so that no difference of two is no number.
  Sum mine = {-3.0e38f, 0.0f};
  for (uint64_t i = threadIdx.x; i < fours; i += THREADS) {
    float x[4];
    load_floats(logits + 4 * i, x);
    const float max = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    if (max > mine.max) mine = {max, mine.sum * __expf(mine.max - max)};
#pragma unroll
    for (int j = 0; j < 4; j++) mine.sum += __expf(x[j] - mine.max);
  }
  for (uint64_t i = 4 * fours + threadIdx.x; i < p.words; i += THREADS)
    mine = merge(mine, {to_float(logits[i]), 1.0f});
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1)
    mine = merge(mine, {__shfl_xor_sync(0xffffffffu, mine.max, offset), __shfl_xor_sync(0xffffffffu, mine.sum, offset)});
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = mine.max, sums[threadIdx.x / 32] = mine.sum;
  __syncthreads();
  Sum all = {maxima[0], sums[0]};
#pragma unroll
  for (int i = 1; i < THREADS / 32; i++) all = merge(all, {maxima[i], sums[i]});
  if (threadIdx.x == 0) p.losses[blockIdx.x] = all.max + logf(all.sum) - to_float(logits[target]);
  if (!p.dlogits) return;
  T *dlogits = static_cast<T *>(p.dlogits) + start;
  const float factor = p.scale / all.sum;
  for (uint64_t i = threadIdx.x; i < fours; i += THREADS) {
    float x[4];
    load_floats(logits + 4 * i, x);
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = __expf(x[j] - all.max) * factor - (4 * i + j == target ? p.scale : 0.0f);
    store_floats(dlogits + 4 * i, x);
  }
  for (uint64_t i = 4 * fours + threadIdx.x; i < p.words; i += THREADS)
    dlogits[i] = from_float<T>(__expf(to_float(logits[i]) - all.max) * factor - (i == target ? p.scale : 0.0f));
}

#define KERNEL(T, name)                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_##name(const CrossEntropyParams p) { \
    cross_entropy<T>(p);                                                                                   \
  }

KERNEL(float, f32)
KERNEL(__nv_bfloat16, bf16)
KERNEL(__half, f16)
