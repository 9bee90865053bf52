// The choice of stored tokens for a few queries, and the copy of the chosen, without a word to the host. Runs of
// queries that choose among other pages go side by side, each in blocks of its own: the last dimension of the grids.
//
//   mean_queries  each run of `pooled` queries as its mean, rotated to one distance and scaled
//   score         logits of every query row against the keys of its head: landmarks and the keys of outliers, or the
//                 tokens of the landmarks that were chosen; each block's maximum and sum beside them
//   vote          softmax over the keys, summed over the heads of a group, the largest over the queries
//   reach         each token's vote becomes the largest of its neighbours'
//   raise_standing  votes are no less than those that stand for their tokens
//   keep_votes    the chosen tokens and their votes
//   raise         a landmark is asked for as much as the most asked of its outlier's keys
//   recovered     which share of the attention to all stored tokens the chosen hold
//   gather        chosen keys rotated to their positions, chosen values; f32, a page of 64 after the other
//   note_share    sums of two shares over the queries of a turn
//
//   join          where queries are many: what the blocks' maxima and sums make, once for all blocks of `vote`
//
// Keys are f32 or bf16, everything is computed in f32. `score` has four lanes a key (16 bytes each, two shuffles a dot
// product) and keeps 8 rows of accumulators; a block is 64 such quads and takes 256 keys. Bound by memory: 2 d bytes a
// landmark of bf16 against 4 bytes a row and landmark of logits. Many rows of queries over keys of bf16 are
// `score_rows_sm80.cu`'s.
#include "recall.cuh"

constexpr int TILE_ROWS = 8;

struct QueryParams {
  const float *q;      // (t, h, d)
  const float *cosine; // (d/2)
  const float *sine;   // (d/2)
  float *mean;         // (runs, gridDim.y, h, d): gridDim.y means of the longest run
  uint32_t h, d, pooled;
  float scale;
  Run runs[MAX_RUNS];
};

// Block: neighbouring queries of a run and a head; a thread a pair of channels. In the order and with the roundings of
// the host.
extern "C" __global__ void mean_queries(const __grid_constant__ QueryParams p) {
  const Run run = p.runs[blockIdx.z];
  const uint32_t head = blockIdx.x, first = run.first + blockIdx.y * p.pooled, half = p.d / 2;
  const uint32_t end = run.first + run.queries, last = first + p.pooled < end ? first + p.pooled : end;
  if (first >= end) return;
  const float factor = p.scale / float(last - first);
  for (uint32_t i = threadIdx.x; i < half; i += blockDim.x) {
    const float c = p.cosine[i], s = p.sine[i];
    float low = 0.0f, high = 0.0f;
    for (uint32_t token = first; token < last; token++) {
      const float *from = p.q + (uint64_t(token) * p.h + head) * p.d + i;
      const float a = from[0], b = from[half];
      const float x = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s)), y = __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s));
      low = __fadd_rn(low, __fmul_rn(x, factor));
      high = __fadd_rn(high, __fmul_rn(y, factor));
    }
    float *to = p.mean + ((uint64_t(blockIdx.z) * gridDim.y + blockIdx.y) * p.h + head) * p.d + i;
    to[0] = low, to[half] = high;
  }
}

template <typename T, bool TOKENS> __device__ __forceinline__ void score(const VoteParams &p) {
  constexpr int VECTOR = 16 / sizeof(T); // elements of one load
  __shared__ __align__(16) float q[TILE_ROWS][MAX_DIM];
  __shared__ float logits[TILE_ROWS][BLOCK_KEYS];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, quad = tid / 4, part = tid % 4;
  const Own own = work_of_block(p);
  const uint64_t first = uint64_t(blockIdx.x) * BLOCK_KEYS;
  const int count = p.n - first < BLOCK_KEYS ? int(p.n - first) : BLOCK_KEYS;
  for (uint32_t row0 = 0; row0 < own.rows; row0 += TILE_ROWS) {
    __syncthreads();
    for (uint32_t i = tid; i < TILE_ROWS * p.d; i += THREADS) {
      const uint32_t row = row0 + i / p.d;
      const uint64_t token = uint64_t(blockIdx.z) * (p.rows / p.group) + row / p.group;
      const uint64_t at = (token * p.h + own.head * p.group + row % p.group) * p.d + i % p.d;
      // Times log2 e: all logits are in units of log 2.
      q[i / p.d][i % p.d] = row < own.rows ? p.q[at] * 1.4426950408889634f : 0.0f;
    }
    __syncthreads();
    for (int key = quad; key < BLOCK_KEYS; key += THREADS / 4) {
      const T *from = key < count ? key_at<T, TOKENS>(p, own, first + key) : nullptr;
      float sums[TILE_ROWS] = {};
      if (from) {
#pragma unroll 2
        for (uint32_t column = part * VECTOR; column < p.d; column += 4 * VECTOR) {
          const uint4 words = __ldg(reinterpret_cast<const uint4 *>(from + column));
          const T *elements = reinterpret_cast<const T *>(&words);
#pragma unroll
          for (int e = 0; e < VECTOR; e += 4) {
            const float x[4] = {to_float(elements[e]), to_float(elements[e + 1]), to_float(elements[e + 2]),
                                to_float(elements[e + 3])};
#pragma unroll
            for (int row = 0; row < TILE_ROWS; row++) {
              const float4 y = *reinterpret_cast<const float4 *>(&q[row][column + e]);
              sums[row] = fmaf(x[0], y.x, fmaf(x[1], y.y, fmaf(x[2], y.z, fmaf(x[3], y.w, sums[row]))));
            }
          }
        }
      }
      // The four lanes of a quad have the same key: they agree on `from`, and every lane comes here.
#pragma unroll
      for (int row = 0; row < TILE_ROWS; row++) {
        sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], 1);
        sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], 2);
        if (part == 0) logits[row][key] = from ? sums[row] : -INFINITY;
      }
    }
    __syncthreads();
    // A warp a row: 8 rows, 8 warps.
    const uint32_t row = row0 + warp;
    if (row < own.rows) {
      float top = -INFINITY;
      for (int i = lane; i < count; i += 32) top = fmaxf(top, logits[warp][i]);
      top = warp_max(top);
      float sum = 0.0f;
      float *to = p.logits + (uint64_t(own.at) * p.rows + row) * p.n + first;
      for (int i = lane; i < count; i += 32) {
        if (top > -INFINITY) sum += exp2f(logits[warp][i] - top);
        to[i] = logits[warp][i];
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        float *stats = p.stats + ((uint64_t(own.at) * p.blocks + blockIdx.x) * p.rows + row) * 2;
        stats[0] = top, stats[1] = sum;
      }
    }
  }
}
static_assert(THREADS / 32 == TILE_ROWS, "a warp a row");

__device__ __forceinline__ bool is_pinned(const VoteParams &p, uint32_t mark) {
  uint32_t low = 0, high = p.num_pins;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (p.pins[middle] < mark) low = middle + 1;
    else high = middle;
  }
  return low < p.num_pins && p.pins[low] == mark;
}

constexpr int JOINED_ROWS = 32; // of a block: a warp reads them side by side

// Block: 32 rows of one head of a run; a warp every eighth block of keys, then all warps together.
extern "C" __global__ void __launch_bounds__(THREADS) join(const __grid_constant__ VoteParams p) {
  __shared__ float tops[THREADS / 32][JOINED_ROWS], sums[THREADS / 32][JOINED_ROWS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Own own = work_of_block(p);
  const uint32_t row = blockIdx.x * JOINED_ROWS + lane;
  const bool is_there = row < own.rows;
  const float2 *stats = reinterpret_cast<const float2 *>(p.stats) + uint64_t(own.at) * p.blocks * p.rows + row;
  float top = -INFINITY, sum = 0.0f;
#pragma unroll 4
  for (uint32_t i = warp; i < p.blocks; i += THREADS / 32) {
    const float2 at = is_there ? stats[uint64_t(i) * p.rows] : make_float2(-INFINITY, 0.0f);
    const float larger = fmaxf(top, at.x);
    if (larger > -INFINITY) sum = sum * exp2f(top - larger) + at.y * exp2f(at.x - larger);
    top = larger;
  }
  tops[warp][lane] = top, sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || !is_there) return;
  for (int i = 1; i < THREADS / 32; i++) top = fmaxf(top, tops[i][lane]);
  sum = 0.0f;
  for (int i = 0; i < THREADS / 32; i++)
    if (tops[i][lane] > -INFINITY) sum += sums[i][lane] * exp2f(tops[i][lane] - top);
  p.norms[uint64_t(own.at) * p.rows + row] = top + log2f(sum);
}

template <bool TOKENS> __device__ __forceinline__ void vote(const VoteParams &p) {
  __shared__ float norm[MAX_ROWS];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const Own own = work_of_block(p);
  for (uint32_t row = tid; p.is_joined && row < own.rows; row += THREADS)
    norm[row] = p.norms[uint64_t(own.at) * p.rows + row];
  for (uint32_t row = warp; !p.is_joined && row < own.rows; row += THREADS / 32) {
    const float *stats = p.stats + (uint64_t(own.at) * p.blocks * p.rows + row) * 2;
    float top = -INFINITY;
    for (uint32_t i = lane; i < p.blocks; i += 32) top = fmaxf(top, stats[uint64_t(i) * p.rows * 2]);
    top = warp_max(top);
    float sum = 0.0f;
    for (uint32_t i = lane; i < p.blocks; i += 32) {
      const float *at = stats + uint64_t(i) * p.rows * 2;
      if (at[0] > -INFINITY) sum += at[1] * exp2f(at[0] - top);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      norm[row] = top + log2f(sum);
      if (blockIdx.x == 0) p.norms[uint64_t(own.at) * p.rows + row] = norm[row];
    }
  }
  __syncthreads();
  const uint64_t step = uint64_t(gridDim.x) * THREADS;
  for (uint64_t i = uint64_t(blockIdx.x) * THREADS + tid; i < p.n; i += step) {
    const float *logits = p.logits + uint64_t(own.at) * p.rows * p.n + i;
    float vote = 0.0f;
    for (uint32_t row = 0; row < own.rows; row += p.group) {
      float sum = 0.0f;
#pragma unroll 4
      for (uint32_t j = row; j < row + p.group; j++) sum += exp2f(logits[uint64_t(j) * p.n] - norm[j]);
      vote = fmaxf(vote, sum);
    }
    const bool is_mark = TOKENS || i < most_marks(p);
    const uint32_t mark = TOKENS ? mark_at(p, own, i / SPAN) : uint32_t(i);
    if (p.num_pins > 0) {
      if (is_mark && is_pinned(p, mark)) vote = INFINITY;
    }
    // Below every vote: what the run does not see is never among the largest.
    if (is_mark && mark >= own.marks) vote = -1.0f;
    p.votes[own.at * p.n + i] = vote;
  }
}

// A thread an outlier. What stood for its keys is no landmark: below every vote, it is never among the largest.
extern "C" __global__ void __launch_bounds__(THREADS) raise_votes(const __grid_constant__ VoteParams p) {
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= p.num_outliers) return;
  const Own own = work_of_block(p);
  const uint32_t mark = p.outliers[uint64_t(own.head) * p.num_outliers + i];
  float *votes = p.votes + own.at * p.n;
  float *keys = votes + most_marks(p) + uint64_t(i) * SPAN;
  float vote = 0.0f;
  for (int key = 0; key < SPAN; key++) {
    vote = fmaxf(vote, keys[key]);
    keys[key] = -1.0f;
  }
  if (mark < own.marks) votes[mark] = fmaxf(votes[mark], vote);
}

struct ReachParams {
  const float *votes;    // (runs · g, n)
  const uint32_t *marks; // (runs · g, num_marks), landmarks whose tokens were scored, ascending; null: all
  float *pooled;         // (runs · g, n)
  uint64_t n;
  uint32_t num_marks, reach;
};

constexpr int MOST_NEAR = 64; // tokens to either side that a block keeps in shared memory

// The votes of tokens that lie as they stand, a block 256 of them at a time.
__device__ __forceinline__ void reach_in_order(const ReachParams &p, const float *votes) {
  __shared__ float near[THREADS + 2 * MOST_NEAR];
  const int tid = threadIdx.x, reach = p.reach;
  const uint64_t step = uint64_t(gridDim.x) * THREADS;
  for (uint64_t first = uint64_t(blockIdx.x) * THREADS; first < p.n; first += step) {
    __syncthreads();
    for (int i = tid; i < THREADS + 2 * reach; i += THREADS) {
      const uint64_t at = first + i - reach; // Before the first it is larger than any.
      const float vote = at < p.n ? votes[at] : -1.0f;
      near[i] = vote < INFINITY ? vote : -1.0f;
    }
    __syncthreads();
    if (first + tid >= p.n) continue;
    float vote = votes[first + tid];
    if (vote >= 0.0f && vote < INFINITY)
      for (int i = tid; i <= tid + 2 * reach; i++) vote = fmaxf(vote, near[i]);
    p.pooled[uint64_t(blockIdx.y) * p.n + first + tid] = vote;
  }
}

// A thread a vote at a time. Pinned tokens and those that are not seen keep theirs, and give it to no other.
extern "C" __global__ void __launch_bounds__(THREADS) reach(const __grid_constant__ ReachParams p) {
  const float *votes = p.votes + uint64_t(blockIdx.y) * p.n;
  if (!p.marks && p.reach <= MOST_NEAR) return reach_in_order(p, votes);
  const uint32_t *marks = p.marks ? p.marks + uint64_t(blockIdx.y) * p.num_marks : nullptr;
  const auto token = [&](uint64_t i) { return marks ? uint64_t(marks[i / SPAN]) * SPAN + i % SPAN : i; };
  const uint64_t step = uint64_t(gridDim.x) * THREADS;
  for (uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x; i < p.n; i += step) {
    float vote = votes[i];
    if (vote >= 0.0f && vote < INFINITY) {
      const uint64_t first = i > p.reach ? i - p.reach : 0, last = i + p.reach < p.n ? i + p.reach : p.n - 1;
      const uint64_t own = token(i);
      for (uint64_t j = first; j <= last; j++) {
        const uint64_t other = token(j), apart = other > own ? other - own : own - other;
        if (apart <= p.reach && votes[j] < INFINITY) vote = fmaxf(vote, votes[j]);
      }
    }
    p.pooled[uint64_t(blockIdx.y) * p.n + i] = vote;
  }
}

struct StandingParams {
  const uint32_t *tokens; // (lists · g, k): counted from the first that was ever stored
  const float *standing;  // (lists · g, k): their votes
  const uint32_t *marks;  // of tokens: (g, num_marks), landmarks whose tokens were scored, ascending; null: all
  float *votes;           // (g, n)
  uint64_t n;
  uint32_t num_marks, k, g, span, gone; // span: tokens of a vote; gone: tokens that are not stored any more
};

// A thread a standing vote, of one list after the other.
extern "C" __global__ void __launch_bounds__(THREADS) raise_standing(const __grid_constant__ StandingParams p) {
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x, list = blockIdx.y, head = list % p.g;
  if (i >= p.k) return;
  if (p.tokens[uint64_t(list) * p.k + i] < p.gone) return;
  const uint32_t token = p.tokens[uint64_t(list) * p.k + i] - p.gone;
  const float vote = p.standing[uint64_t(list) * p.k + i];
  uint64_t at = token / p.span;
  if (p.marks) {
    const uint32_t *marks = p.marks + uint64_t(head) * p.num_marks, mark = token / SPAN;
    uint32_t low = 0, high = p.num_marks;
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (marks[middle] < mark) low = middle + 1;
      else high = middle;
    }
    if (low == p.num_marks || marks[low] != mark) return;
    at = uint64_t(low) * SPAN + token % SPAN;
  }
  // What is not seen has a vote below 0 and keeps it. Votes from 0 on are ordered as their bits are.
  if (at >= p.n || !(vote > 0.0f)) return;
  float *own = p.votes + uint64_t(head) * p.n + at;
  if (*own >= 0.0f) atomicMax(reinterpret_cast<int *>(own), __float_as_int(vote));
}

struct KeptParams {
  const float *votes;    // (runs · g, n)
  const uint32_t *marks; // (runs · g, num_marks); null: all
  const uint32_t *best;  // (runs · g, k)
  uint32_t *tokens;      // (runs · g, k)
  float *standing;       // (runs · g, k)
  uint64_t n;
  uint32_t num_marks, k, gone;
};

extern "C" __global__ void __launch_bounds__(THREADS) keep_votes(const __grid_constant__ KeptParams p) {
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x, own = blockIdx.y;
  if (i >= p.k) return;
  const uint64_t to = uint64_t(own) * p.k + i;
  const uint32_t best = p.best[to];
  const uint32_t mark = p.marks ? p.marks[uint64_t(own) * p.num_marks + best / SPAN] : best / SPAN;
  p.tokens[to] = p.gone + mark * SPAN + best % SPAN;
  p.standing[to] = p.votes[uint64_t(own) * p.n + best];
}

struct RecoveredParams {
  const float *mark_logits;  // (g, group, num_marks' n); null: every landmark was taken
  const float *mark_norms;   // (g, group)
  const uint32_t *marks;     // (g, num_marks)
  const float *token_logits; // (g, group, num_tokens' n)
  const float *token_norms;  // (g, group)
  const uint32_t *best;      // (g, k): of the tokens that were scored
  float *recovered;          // (1)
  uint64_t mark_n, token_n;
  uint32_t num_marks, k, g, group;
};

__device__ __forceinline__ float block_sum(float x) {
  __shared__ float sums[THREADS / 32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < THREADS / 32; i++) sum += sums[i];
  return sum;
}

// One block, one query token: the votes of the chosen tokens among those that were scored, less what stands behind the
// landmarks that were not taken, each for SPAN tokens.
extern "C" __global__ void __launch_bounds__(THREADS) recovered(const RecoveredParams p) {
  float total = 0.0f;
  for (uint32_t head = 0; head < p.g; head++) {
    float held = 0.0f, taken = 0.0f, share = 0.0f;
    for (uint32_t j = 0; j < p.group; j++) {
      const uint64_t row = uint64_t(head) * p.group + j;
      const float token_norm = p.token_norms[row];
      float sum = 0.0f;
      for (uint32_t i = threadIdx.x; i < p.k; i += THREADS)
        sum += exp2f(p.token_logits[row * p.token_n + p.best[uint64_t(head) * p.k + i]] - token_norm);
      held += block_sum(sum);
      if (!p.mark_logits) continue;
      sum = 0.0f;
      for (uint32_t i = threadIdx.x; i < p.num_marks; i += THREADS)
        sum += exp2f(p.mark_logits[row * p.mark_n + p.marks[uint64_t(head) * p.num_marks + i]] - p.mark_norms[row]);
      taken += block_sum(sum);
    }
    const float left = 1.0f - fminf(taken / float(p.group), 1.0f);
    for (uint32_t j = 0; j < p.group; j++) {
      const uint64_t row = uint64_t(head) * p.group + j;
      share += p.mark_logits ? 1.0f / (1.0f + SPAN * left * exp2f(p.mark_norms[row] - p.token_norms[row])) : 1.0f;
    }
    total += fminf(held / float(p.group), 1.0f) * share / float(p.group);
  }
  if (threadIdx.x == 0) *p.recovered = total / float(p.g);
}

struct ChosenParams {
  const void *keys;      // (pages, g, 64, d), before RoPE
  const void *values;    // (pages, g, 64, d)
  const uint32_t *marks; // (runs, g, num_marks): the landmarks whose tokens were scored; null: all
  const uint32_t *best;  // (runs, g, k): of the tokens that were scored; null: all
  const float *cosine;   // (positions, d/2)
  const float *sine;     // (positions, d/2)
  float *out_keys;       // (runs, ceil(k / 64), g, 64, d)
  float *out_values;     // (runs, ceil(k / 64), g, 64, d)
  uint64_t first;        // compact: the position of the first; else that of the first stored token
  uint32_t num_marks, k, g, d, compact;
};

// Block: one page of the result of a run and one head.
template <typename T> __device__ __forceinline__ void gather(const ChosenParams &p) {
  const uint32_t head = blockIdx.y, own = blockIdx.z * p.g + head, half = p.d / 2;
  for (uint32_t i = threadIdx.x; i < PAGE_TOKENS * half; i += blockDim.x) {
    const uint32_t offset = i / half, pair = i % half, at = blockIdx.x * PAGE_TOKENS + offset;
    const uint64_t page = uint64_t(blockIdx.z) * gridDim.x + blockIdx.x;
    const uint64_t to = ((page * p.g + head) * PAGE_TOKENS + offset) * p.d + pair;
    float low = 0.0f, high = 0.0f, value_low = 0.0f, value_high = 0.0f;
    if (at < p.k) {
      const uint32_t scored = p.best ? p.best[uint64_t(own) * p.k + at] : at;
      const uint32_t mark = p.marks ? p.marks[uint64_t(own) * p.num_marks + scored / SPAN] : scored / SPAN;
      const uint64_t token = uint64_t(mark) * SPAN + scored % SPAN;
      const uint64_t row = (token / PAGE_TOKENS * p.g + head) * PAGE_TOKENS + token % PAGE_TOKENS;
      const uint64_t angle = (p.first + (p.compact ? uint64_t(at) : token)) * half + pair;
      const float c = p.cosine[angle], s = p.sine[angle];
      const T *key = static_cast<const T *>(p.keys) + row * p.d + pair;
      const T *value = static_cast<const T *>(p.values) + row * p.d + pair;
      const float a = to_float(key[0]), b = to_float(key[half]);
      // Each product is rounded by itself, as the host does it.
      low = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
      high = __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s));
      value_low = to_float(value[0]), value_high = to_float(value[half]);
    }
    p.out_keys[to] = low, p.out_keys[to + half] = high;
    p.out_values[to] = value_low, p.out_values[to + half] = value_high;
  }
}

struct ShareParams {
  const float *lse;       // (h): of the recalled tokens
  const float *all;       // (h): of all
  const float *recovered; // (1); null: not estimated
  float *sums;            // (h + 1): each head's share, and recovered; added to
  uint32_t h;
};

// One warp.
extern "C" __global__ void note_share(const ShareParams p) {
  for (uint32_t i = threadIdx.x; i < p.h; i += 32)
    if (p.all[i] > -INFINITY) p.sums[i] += expf(p.lse[i] - p.all[i]);
  if (threadIdx.x == 0 && p.recovered) p.sums[p.h] += *p.recovered;
}

extern "C" __global__ void __launch_bounds__(THREADS) score_landmarks(const __grid_constant__ VoteParams p) {
  score<__nv_bfloat16, false>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) score_tokens_f32(const __grid_constant__ VoteParams p) {
  score<float, true>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) score_tokens_bf16(const __grid_constant__ VoteParams p) {
  score<__nv_bfloat16, true>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) vote_landmarks(const __grid_constant__ VoteParams p) {
  vote<false>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) vote_tokens(const __grid_constant__ VoteParams p) {
  vote<true>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) gather_f32(const ChosenParams p) { gather<float>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) gather_bf16(const ChosenParams p) { gather<__nv_bfloat16>(p); }
