// The k largest of each row, exactly: indices ascending, of equal values those of lower index.
//
// A block of 1024 threads a row. A value's 32 bits become a key of the same order as an unsigned number; three
// histograms of 11, 11 and 10 bits, from the top, leave the key of the k-th largest and how many equal to it are
// taken. Then each warp counts the larger and the equal in its run of the row, a scan over the warps tells where it
// writes, and it writes in order. Bound by one SM's reads of L2: five passes over the row.
#include "number.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int BINS = 2048;

struct SelectParams {
  const float *votes; // (rows, n)
  uint32_t *indices;  // (rows, k)
  uint32_t n, k;
};

// Total order of f32: -NaN < -inf < .. < -0 < 0 < .. < inf < NaN.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) top_k(const SelectParams p) {
  __shared__ uint32_t histogram[BINS];
  __shared__ uint32_t warp_sums[WARPS], warp_larger[WARPS], warp_equal[WARPS];
  __shared__ uint32_t chosen_bin, chosen_rest;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const float *votes = p.votes + uint64_t(blockIdx.x) * p.n;
  uint32_t *indices = p.indices + uint64_t(blockIdx.x) * p.k;

  uint32_t prefix = 0, rest = p.k; // the chosen upper bits, and how many are still to be taken below them
  int known = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; pass++) {
    const int bits = pass < 2 ? 11 : 10, shift = 32 - known - bits;
    for (int i = tid; i < BINS; i += THREADS) histogram[i] = 0;
    __syncthreads();
    // Every lane takes part in each round, so that a warp of one digit can add once.
    for (uint32_t base = 0; base < p.n; base += THREADS) {
      const uint32_t i = base + tid;
      const uint32_t key = i < p.n ? key_of(votes[i]) : 0;
      const bool counts = i < p.n && (known == 0 || key >> (32 - known) == prefix);
      const uint32_t digit = key >> shift & ((1u << bits) - 1);
      const uint32_t mask = __ballot_sync(0xffffffffu, counts);
      if (mask == 0) continue;
      const uint32_t leader = uint32_t(__ffs(int(mask))) - 1;
      const uint32_t first = __shfl_sync(0xffffffffu, digit, int(leader));
      if (__all_sync(0xffffffffu, !counts || digit == first)) {
        if (uint32_t(lane) == leader) atomicAdd(&histogram[first], uint32_t(__popc(mask)));
      } else if (counts) {
        atomicAdd(&histogram[digit], 1u);
      }
    }
    __syncthreads();
    // The bin that holds the rest-th largest: a scan from the top, two bins a thread.
    const int top = BINS - 1 - 2 * tid;
    const uint32_t a = histogram[top], b = histogram[top - 1];
    uint32_t scan = a + b;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, scan, offset);
      if (lane >= offset) scan += other;
    }
    if (lane == 31) warp_sums[warp] = scan;
    __syncthreads();
    uint32_t before = scan - a - b;
    for (int w = 0; w < warp; w++) before += warp_sums[w];
    // Exactly one bin has before < rest <= before + its count.
    if (before < rest && rest <= before + a) {
      chosen_bin = top;
      chosen_rest = rest - before;
    } else if (before + a < rest && rest <= before + a + b) {
      chosen_bin = top - 1;
      chosen_rest = rest - before - a;
    }
    __syncthreads();
    prefix = prefix << bits | chosen_bin;
    rest = chosen_rest;
    known += bits;
    __syncthreads();
  }

  // Now `prefix` is the key of the k-th largest, and `rest` of those equal to it are taken.
  const uint32_t run = ((p.n + WARPS - 1) / WARPS + 31) / 32 * 32;
  const uint64_t begin = uint64_t(warp) * run;
  const uint64_t end = begin + run < p.n ? begin + run : p.n;
  uint32_t larger = 0, equal = 0;
  for (uint64_t base = begin; base < end; base += 32) {
    const bool valid = base + lane < end;
    const uint32_t key = valid ? key_of(votes[base + lane]) : 0;
    larger += __popc(__ballot_sync(0xffffffffu, valid && key > prefix));
    equal += __popc(__ballot_sync(0xffffffffu, valid && key == prefix));
  }
  if (lane == 0) warp_larger[warp] = larger, warp_equal[warp] = equal;
  __syncthreads();
  larger = 0, equal = 0;
  for (int w = 0; w < warp; w++) larger += warp_larger[w], equal += warp_equal[w];
  const uint32_t below = (1u << lane) - 1;
  for (uint64_t base = begin; base < end; base += 32) {
    const bool valid = base + lane < end;
    const uint32_t key = valid ? key_of(votes[base + lane]) : 0;
    const uint32_t larger_mask = __ballot_sync(0xffffffffu, valid && key > prefix);
    const uint32_t equal_mask = __ballot_sync(0xffffffffu, valid && key == prefix);
    const uint32_t larger_before = larger + __popc(larger_mask & below);
    const uint32_t equal_before = equal + __popc(equal_mask & below);
    const bool is_larger = larger_mask >> lane & 1, is_equal = equal_mask >> lane & 1;
    if (is_larger || (is_equal && equal_before < rest))
      indices[larger_before + (equal_before < rest ? equal_before : rest)] = uint32_t(base) + lane;
    larger += __popc(larger_mask);
    equal += __popc(equal_mask);
  }
}
