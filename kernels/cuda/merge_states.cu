// Attention over two disjoint sets of keys, joined: lse = ln(e^a + e^b), out = e^(a - lse) out_a + e^(b - lse) out_b.
// A warp a row (token, head); bound by memory. A state that saw no key (lse = -inf) is neutral.
#include "number.cuh"

struct MergeParams {
  const float *out_a; // (rows, d)
  const float *lse_a; // (rows)
  const float *out_b;
  const float *lse_b;
  float *out;
  float *lse;
  uint64_t rows;
  uint32_t d;
  uint32_t unused;
};

extern "C" __global__ void __launch_bounds__(128) merge_states_f32(const MergeParams p) {
  const int lane = threadIdx.x % 32;
  const uint64_t step = uint64_t(gridDim.x) * 4;
  for (uint64_t row = uint64_t(blockIdx.x) * 4 + threadIdx.x / 32; row < p.rows; row += step) {
    const float a = p.lse_a[row], b = p.lse_b[row], maximum = fmaxf(a, b);
    // Neither saw a key: -inf minus -inf is never formed.
    const float share_a = maximum == -INFINITY ? 0.0f : expf(a - maximum);
    const float share_b = maximum == -INFINITY ? 0.0f : expf(b - maximum);
    const float sum = share_a + share_b;
    for (uint32_t x = lane; x < p.d; x += 32) {
      const uint64_t at = row * p.d + x;
      p.out[at] = sum > 0.0f ? (p.out_a[at] * share_a + p.out_b[at] * share_b) / sum : 0.0f;
    }
    if (lane == 0) p.lse[row] = sum > 0.0f ? maximum + logf(sum) : -INFINITY;
  }
}
