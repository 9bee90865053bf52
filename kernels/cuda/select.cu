// The k largest of each row, exactly: indices ascending, of equal values those of lower index.
//
// A value's 32 bits become a key of the same order as an unsigned number; three histograms of 11, 11 and 10 bits, from
// the top, leave the key of the k-th largest and how many equal to it are taken. Then the larger and the equal are
// counted in runs of the row, which tells where each run writes, and each writes in order.
//
//   top_k        a block of 1024 threads a row. Bound by one SM's reads of L2: five passes over the row
//   top_k_count, top_k_tally, top_k_write
//                a long row over several blocks, BLOCK_VOTES each: three launches of the first, one of each other; what
//                a launch found stands in device memory for the next
#include "number.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int BINS = 2048;

constexpr uint32_t BLOCK_VOTES = 8192; // of one block of a long row
constexpr int PASSES = 3;

struct SelectParams {
  const float *votes; // (rows, n)
  uint32_t *indices;  // (rows, k)
  uint32_t n, k;
};

struct LongParams {
  const float *votes;   // (rows, n)
  uint32_t *indices;    // (rows, k)
  uint32_t *histograms; // (rows, PASSES, BINS), 0 before the first launch
  uint32_t *found;      // (rows, PASSES, 2): upper bits of the k-th largest, and how many are still to be taken
  uint32_t *counts;     // (rows, blocks, 2): the larger and the equal in each block's part
  uint32_t n, k, pass;
};

// Total order of f32: -NaN < -inf < .. < -0 < 0 < .. < inf < NaN.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The chosen upper bits of the k-th largest key, and how many are still to be taken below them.
struct Found {
  uint32_t prefix, rest;
};

__device__ __forceinline__ constexpr int bits_of(int pass) { return pass < 2 ? 11 : 10; }
__device__ __forceinline__ constexpr int known_before(int pass) { return 11 * pass; }

// Adds the digits of votes[begin..end) that follow `prefix` to `histogram`, in shared memory.
__device__ __forceinline__ void count_digits(const float *votes, uint32_t begin, uint32_t end, int pass,
                                             uint32_t prefix, uint32_t *histogram) {
  const int tid = threadIdx.x, lane = tid % 32, known = known_before(pass), bits = bits_of(pass);
  const int shift = 32 - known - bits;
  // Every lane takes part in each round, so that a warp of one digit can add once.
  for (uint32_t base = begin; base < end; base += THREADS) {
    const uint32_t i = base + tid;
    const uint32_t key = i < end ? key_of(votes[i]) : 0;
    const bool counts = i < end && (known == 0 || key >> (32 - known) == prefix);
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
}

// `found`, and the bin that holds the rest-th largest: a scan from the top, two bins a thread. Every thread of the
// block comes here.
__device__ __forceinline__ Found narrowed(const uint32_t *histogram, int pass, Found found) {
  __shared__ uint32_t warp_sums[WARPS];
  __shared__ uint32_t chosen_bin, chosen_rest;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
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
  if (before < found.rest && found.rest <= before + a) {
    chosen_bin = top;
    chosen_rest = found.rest - before;
  } else if (before + a < found.rest && found.rest <= before + a + b) {
    chosen_bin = top - 1;
    chosen_rest = found.rest - before - a;
  }
  __syncthreads();
  const Found next = {found.prefix << bits_of(pass) | chosen_bin, chosen_rest};
  __syncthreads();
  return next;
}

// What of votes[begin..end) is larger than the k-th largest, and what equals it: a warp's part.
__device__ __forceinline__ void tally(const float *votes, uint64_t begin, uint64_t end, uint32_t key_k,
                                      uint32_t &larger, uint32_t &equal) {
  const int lane = threadIdx.x % 32;
  larger = 0, equal = 0;
  for (uint64_t base = begin; base < end; base += 32) {
    const bool valid = base + lane < end;
    const uint32_t key = valid ? key_of(votes[base + lane]) : 0;
    larger += __popc(__ballot_sync(0xffffffffu, valid && key > key_k));
    equal += __popc(__ballot_sync(0xffffffffu, valid && key == key_k));
  }
}

// Writes what is taken of votes[begin..end), a warp's part, before which `larger` are larger and `equal` are equal.
__device__ __forceinline__ void write(const float *votes, uint64_t begin, uint64_t end, Found found, uint32_t larger,
                                      uint32_t equal, uint32_t *indices) {
  const int lane = threadIdx.x % 32;
  const uint32_t below = (1u << lane) - 1, rest = found.rest;
  for (uint64_t base = begin; base < end; base += 32) {
    const bool valid = base + lane < end;
    const uint32_t key = valid ? key_of(votes[base + lane]) : 0;
    const uint32_t larger_mask = __ballot_sync(0xffffffffu, valid && key > found.prefix);
    const uint32_t equal_mask = __ballot_sync(0xffffffffu, valid && key == found.prefix);
    const uint32_t larger_before = larger + __popc(larger_mask & below);
    const uint32_t equal_before = equal + __popc(equal_mask & below);
    const bool is_larger = larger_mask >> lane & 1, is_equal = equal_mask >> lane & 1;
    if (is_larger || (is_equal && equal_before < rest))
      indices[larger_before + (equal_before < rest ? equal_before : rest)] = uint32_t(base) + lane;
    larger += __popc(larger_mask);
    equal += __popc(equal_mask);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) top_k(const SelectParams p) {
  __shared__ uint32_t histogram[BINS];
  __shared__ uint32_t warp_larger[WARPS], warp_equal[WARPS];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const float *votes = p.votes + uint64_t(blockIdx.x) * p.n;
  Found found = {0, p.k};
#pragma unroll 1
  for (int pass = 0; pass < PASSES; pass++) {
    for (int i = tid; i < BINS; i += THREADS) histogram[i] = 0;
    __syncthreads();
    count_digits(votes, 0, p.n, pass, found.prefix, histogram);
    __syncthreads();
    found = narrowed(histogram, pass, found);
  }
  const uint32_t run = ((p.n + WARPS - 1) / WARPS + 31) / 32 * 32;
  const uint64_t begin = uint64_t(warp) * run;
  const uint64_t end = begin + run < p.n ? begin + run : p.n;
  uint32_t larger, equal;
  tally(votes, begin, end, found.prefix, larger, equal);
  if (lane == 0) warp_larger[warp] = larger, warp_equal[warp] = equal;
  __syncthreads();
  larger = 0, equal = 0;
  for (int w = 0; w < warp; w++) larger += warp_larger[w], equal += warp_equal[w];
  write(votes, begin, end, found, larger, equal, p.indices + uint64_t(blockIdx.x) * p.k);
}

// What the launches before `pass` found, of which the last one's histogram is read here; the row's first block writes
// it down for the next launch.
__device__ __forceinline__ Found found_before(const LongParams &p, int pass) {
  uint32_t *found = p.found + uint64_t(blockIdx.y) * PASSES * 2;
  if (pass == 0) return Found{0, p.k};
  Found last = {0, p.k};
  if (pass > 1) last = Found{found[(pass - 2) * 2], found[(pass - 2) * 2 + 1]};
  const Found own = narrowed(p.histograms + (uint64_t(blockIdx.y) * PASSES + pass - 1) * BINS, pass - 1, last);
  if (blockIdx.x == 0 && threadIdx.x == 0) found[(pass - 1) * 2] = own.prefix, found[(pass - 1) * 2 + 1] = own.rest;
  return own;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) top_k_count(const LongParams p) {
  __shared__ uint32_t histogram[BINS];
  const int tid = threadIdx.x;
  for (int i = tid; i < BINS; i += THREADS) histogram[i] = 0;
  const Found found = found_before(p, int(p.pass));
  __syncthreads();
  const uint32_t begin = blockIdx.x * BLOCK_VOTES, end = p.n - begin < BLOCK_VOTES ? p.n : begin + BLOCK_VOTES;
  count_digits(p.votes + uint64_t(blockIdx.y) * p.n, begin, end, int(p.pass), found.prefix, histogram);
  __syncthreads();
  uint32_t *to = p.histograms + (uint64_t(blockIdx.y) * PASSES + p.pass) * BINS;
  for (int i = tid; i < BINS; i += THREADS)
    if (histogram[i] > 0) atomicAdd(&to[i], histogram[i]);
}

// A warp's part of a block's.
__device__ __forceinline__ void part_of_warp(const LongParams &p, uint64_t &begin, uint64_t &end) {
  constexpr uint32_t PART = BLOCK_VOTES / WARPS;
  begin = uint64_t(blockIdx.x) * BLOCK_VOTES + (threadIdx.x / 32) * PART;
  end = begin + PART < p.n ? begin + PART : p.n;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) top_k_tally(const LongParams p) {
  __shared__ uint32_t sums[2];
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  const Found found = found_before(p, PASSES);
  __syncthreads();
  uint64_t begin, end;
  part_of_warp(p, begin, end);
  uint32_t larger, equal;
  tally(p.votes + uint64_t(blockIdx.y) * p.n, begin, end, found.prefix, larger, equal);
  if (threadIdx.x % 32 == 0) atomicAdd(&sums[0], larger), atomicAdd(&sums[1], equal);
  __syncthreads();
  if (threadIdx.x < 2) p.counts[(uint64_t(blockIdx.y) * gridDim.x + blockIdx.x) * 2 + threadIdx.x] = sums[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) top_k_write(const LongParams p) {
  __shared__ uint32_t warp_larger[WARPS], warp_equal[WARPS];
  __shared__ uint32_t before[2];
  const int tid = threadIdx.x, warp = tid / 32;
  const uint32_t *last = p.found + (uint64_t(blockIdx.y) * PASSES + PASSES - 1) * 2;
  const Found found = {last[0], last[1]};
  const float *votes = p.votes + uint64_t(blockIdx.y) * p.n;
  if (tid < 2) before[tid] = 0;
  __syncthreads();
  const uint32_t *counts = p.counts + uint64_t(blockIdx.y) * gridDim.x * 2;
  for (uint32_t i = tid; i < blockIdx.x * 2; i += THREADS) atomicAdd(&before[i % 2], counts[i]);
  uint64_t begin, end;
  part_of_warp(p, begin, end);
  uint32_t larger, equal;
  tally(votes, begin, end, found.prefix, larger, equal);
  if (tid % 32 == 0) warp_larger[warp] = larger, warp_equal[warp] = equal;
  __syncthreads();
  larger = before[0], equal = before[1];
  for (int w = 0; w < warp; w++) larger += warp_larger[w], equal += warp_equal[w];
  write(votes, begin, end, found, larger, equal, p.indices + uint64_t(blockIdx.y) * p.k);
}
