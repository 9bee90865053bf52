// What the projected route's two directions share: the parameters, which channels a thread owns, the weights of a
// token's levels, and the look-back that carries a scan from chunk to chunk inside one launch.
#pragma once
#include "number.cuh"

constexpr int MAX_RATES = 4;
constexpr int THREADS = 256;
constexpr int MAX_RUNS = THREADS / 8; // a head has 8 to 32 lanes
constexpr int PAGE_TOKENS = 64;
constexpr int MAX_SLOTS = 256; // pages that travel in the launch

struct RouteParams {
  const void *keys;      // (b, t, g, d), tokens `row_stride` elements apart
  const void *values;    // (b, t, g, d), likewise
  const float *logits;   // (b, t, 1 + m)
  const float *state;    // (b, m, 2, g, d)
  const float *gate;     // (1)
  const float *rates;    // (m)
  const float *bias;     // (2, g, d), or null
  const float *norm;     // (d), or null
  const float *cosine;   // (t, d/2)
  const float *sine;     // (t, d/2)
  void *out_keys;        // (b, t, g, d), or the pool (s, g, 64, d)
  void *out_raw;         // the keys before the rotation, likewise, or null
  void *out_values;      // likewise
  float *new_state;      // (b, m, 2, g, d)
  float *carries;        // (b, t / carry_rows, m, 2, g, d): the scan before those rows; null: no gradient will be asked
  // Backward.
  const void *dkeys;     // (b, t, g, d)
  const void *dvalues;   // (b, t, g, d)
  void *dkv;             // (b, t, 2, g, d)
  float *dstate;         // (b, m, 2, g, d)
  float *dweights;       // (slices, b, t, 1 + m): shares of the gradients of the weights
  float *dbias;          // (b · chunks, 2, g, d): shares of the gradient of the bias, or null
  float *dnorm;          // (b · chunks, 2, g, d): shares of the gradient of the norm, by head, or null
  float *dlogits;        // (b, t, 1 + m)
  float *dgate;          // (blocks): shares
  // Look-back, `stream` being batch · slices + slice and `part` a head's channels at every rate.
  float *sums;           // (streams, chunks, part): a chunk scanned from zero
  float *prefixes;       // (streams, chunks, part): the scan up to the end of a chunk
  uint32_t *flags;       // (streams, chunks), zeros
  uint64_t seen;
  uint64_t row_stride;
  uint32_t batch, tokens, heads, d; // `heads` of keys
  uint32_t m, chunks, slices; // slices: heads of keys and of values
  uint32_t lanes;        // of a head: d / (2 · channels of a half), rounded up to a power of two, at least 8
  uint32_t carry_rows;   // the backward kernel's chunk
  uint32_t correct;      // bias correction
  uint32_t paged;        // outputs are pools
  uint32_t offset;       // of the first token in its page
  float eps;
  uint32_t slots[MAX_SLOTS];
};
static_assert(sizeof(RouteParams) <= 4096, "parameters of a launch");

// A block has one head of keys (0..g) or values (g..2g) and a chunk of tokens. A thread owns Q channels of the lower half
// of the head, the Q that rotate with them, and a run of ROWS tokens; `lanes` threads side by side share a run.
template <int Q, int ROWS> struct Place {
  uint32_t head, batch, chunk; // chunk in the order of the scan
  uint32_t lane, run, runs;
  uint32_t column;             // of the lower half
  bool active, is_key;

  __device__ Place(const RouteParams &p, uint32_t order) {
    head = order % p.slices;
    batch = order / p.slices % p.batch;
    chunk = order / p.slices / p.batch;
    lane = threadIdx.x % p.lanes;
    run = threadIdx.x / p.lanes;
    runs = THREADS / p.lanes;
    column = lane * Q;
    active = column < p.d / 2;
    is_key = head < p.heads;
  }
  __device__ uint32_t rows() const { return runs * ROWS; } // of a chunk
  __device__ uint32_t first_row() const { return chunk * rows() + run * ROWS; }
  // In a row of (2, g, d), and in one of (g, d).
  __device__ uint32_t channel(const RouteParams &p) const { return head * p.d + column; }
  __device__ uint32_t head_channel(const RouteParams &p) const { return (is_key ? head : head - p.heads) * p.d + column; }
  // Columns of a block at every rate, laid out (rate, half, lane, Q).
  __device__ int part(const RouteParams &p, int m) const { return m * 2 * Q * p.lanes; }
  __device__ int rate_of_column(const RouteParams &p, int col) const { return col / (2 * Q * int(p.lanes)); }
  // Its channel in (2, g, d); false if it has none.
  __device__ bool channel_of_column(const RouteParams &p, int col, uint32_t &channel) const {
    const uint32_t within = col % (2 * Q * p.lanes), half = within / (Q * p.lanes), low = within % (Q * p.lanes);
    channel = head * p.d + half * (p.d / 2) + low;
    return low < p.d / 2;
  }
};

__device__ __forceinline__ float rate_of(const RouteParams &p, int l) { return l < int(p.m) ? p.rates[l] : 0.0f; }

// The same elements, of which the compiler knows nothing: it converts them to f32 where they are used, and does not keep
// the converted ones from an earlier use in twice as many registers.
template <typename T, int N> __device__ __forceinline__ void forget(Vector<T, N> &x) {
  if constexpr (sizeof(T) * N % 4 == 0 && sizeof(T) < 4) {
    uint32_t *words = reinterpret_cast<uint32_t *>(&x);
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) * N / 4; i++) asm volatile("" : "+r"(words[i]));
  }
}

// b^n.
__device__ __forceinline__ float power(float b, uint32_t n) { return n == 0 ? 1.0f : exp2f(float(n) * log2f(b)); }

// 1 / (1 - b^n), n the tokens up to this one; 1 without correction.
__device__ __forceinline__ float correction(const RouteParams &p, float rate, uint32_t row) {
  const float n = float(p.seen + row + 1);
  // Past b^n < 2^-25 the factor is 1.
  if (!p.correct || n * logf(rate) < -17.5f) return 1.0f;
  return -1.0f / expm1f(n * logf(rate));
}

// A token's softmax: lambda[0] of the token itself, then of the levels.
template <int M> __device__ __forceinline__ void softmax(const RouteParams &p, uint64_t row, float (&lambda)[M + 1]) {
  const float *logits = p.logits + row * (p.m + 1);
  float top = logits[0];
  for (uint32_t l = 1; l <= p.m; l++) top = fmaxf(top, logits[l]);
  float sum = 0.0f;
#pragma unroll
  for (int l = 0; l <= M; l++) {
    lambda[l] = l <= int(p.m) ? expf(logits[l] - top) : 0.0f;
    sum += lambda[l];
  }
#pragma unroll
  for (int l = 0; l <= M; l++) lambda[l] /= sum;
}

// Where the weights of a chunk's row lie: a run further by one, so that the runs of a warp meet different banks.
template <int ROWS> __device__ __forceinline__ uint32_t weight_slot(uint32_t row) { return row + row / ROWS; }

// weights of the block's tokens: out = weights[0] · x + Σ weights[1 + l] · u_l, where u = b u + x is the scan without its
// factor 1 - b. Zeros past the last token.
template <int M, int ROWS>
__device__ __forceinline__ void load_weights(const RouteParams &p, uint32_t batch, uint32_t first, uint32_t rows,
                                             float (*weights)[M + 1]) {
  for (uint32_t i = threadIdx.x; i < rows; i += THREADS) {
    const uint32_t row = first + i;
    float *to = weights[weight_slot<ROWS>(i)];
#pragma unroll
    for (int l = 0; l <= M; l++) to[l] = 0.0f;
    if (row >= p.tokens) continue;
    float lambda[M + 1];
    softmax<M>(p, uint64_t(batch) * p.tokens + row, lambda);
    const float gate = p.gate[0];
    float moved = 0.0f;
#pragma unroll
    for (int l = 0; l < M; l++) {
      if (l >= int(p.m)) continue;
      const float rate = rate_of(p, l);
      moved += lambda[l + 1];
      to[l + 1] = gate * lambda[l + 1] * correction(p, rate, row) * (1.0f - rate);
    }
    to[0] = 1.0f - gate * moved;
  }
}

// In place: what every run scanned from zero, (runs, part), becomes the scan before it, of this chunk's tokens alone;
// `sum` is that of the chunk. From the last run to the first if REVERSED. A thread has the columns threadIdx.x + k ·
// THREADS.
template <int K, bool REVERSED, int Q, int ROWS>
__device__ __forceinline__ void scan_runs(const RouteParams &p, const Place<Q, ROWS> &at, int part, float *parts,
                                          float (&sum)[K]) {
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int col = threadIdx.x + k * THREADS;
    sum[k] = 0.0f;
    if (col >= part) continue;
    const float run_power = power(rate_of(p, at.rate_of_column(p, col)), ROWS);
    for (uint32_t first = 0; first < at.runs; first += 8) {
      float own[8];
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) own[i] = parts[(REVERSED ? at.runs - 1 - first - i : first + i) * part + col];
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) {
        parts[(REVERSED ? at.runs - 1 - first - i : first + i) * part + col] = sum[k];
        sum[k] = fmaf(run_power, sum[k], own[i]);
      }
    }
  }
}

enum Flag : uint32_t { NOTHING, SUM, PREFIX };

// Not an acquire: the reader fences once, when it has seen all that it waits for.
__device__ __forceinline__ uint32_t load_flag(const uint32_t *flag) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  return x;
}

// Makes what the block's threads stored before visible to whoever sees the flag. All threads call it.
__device__ __forceinline__ void publish(uint32_t *flag, Flag value) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(uint32_t(value)) : "memory");
  }
}

// Blocks start in the order of their index, and the order of the scan is theirs: what a block waits for is running.
//
// carry = the scan before chunk `at.chunk`, given this chunk's own `sum` from zero: a left fold, prefix of a chunk =
// b^rows · prefix of the one before + its sum, from the nearest chunk whose prefix is published. Where that is decides
// no bit: a fold from a later prefix goes on with what a longer fold would have had.
template <int K, int Q, int ROWS>
__device__ __forceinline__ void look_back(const RouteParams &p, const Place<Q, ROWS> &at, int part,
                                          const float (&initial)[K], const float (&sum)[K], float (&carry)[K]) {
#pragma unroll
  for (int k = 0; k < K; k++) carry[k] = initial[k];
  if (p.chunks == 1) return;
  const uint64_t stream = at.batch * p.slices + at.head;
  uint32_t *flags = p.flags + stream * p.chunks;
  float *sums = p.sums + stream * p.chunks * part, *prefixes = p.prefixes + stream * p.chunks * part;
  const bool last = at.chunk + 1 == p.chunks; // nobody waits for it
  float chunk_power[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int col = threadIdx.x + k * THREADS;
    chunk_power[k] = power(rate_of(p, at.rate_of_column(p, col)), at.rows());
    if (col >= part || last) continue;
    // The first chunk's sum is published as its prefix at once.
    if (at.chunk > 0) sums[uint64_t(at.chunk) * part + col] = sum[k];
    else prefixes[col] = fmaf(chunk_power[k], carry[k], sum[k]);
  }
  if (!last) publish(flags + at.chunk, at.chunk > 0 ? SUM : PREFIX);
  if (at.chunk == 0) return;

  __shared__ uint32_t since; // chunks between the nearest prefix and this one
  if (threadIdx.x < 32) {
    const int other = int(at.chunk) - 1 - int(threadIdx.x);
    uint32_t found;
    for (;;) {
      const uint32_t flag = other < 0 ? NOTHING : load_flag(flags + other);
      const uint32_t prefix = __ballot_sync(0xffffffffu, flag == PREFIX);
      const uint32_t missing = __ballot_sync(0xffffffffu, flag == NOTHING);
      found = __ffs(prefix) - 1;
      if (prefix != 0 && (missing & ((1u << found) - 1)) == 0) break;
    }
    __threadfence();
    if (threadIdx.x == 0) since = found;
  }
  __syncthreads();
  const uint32_t first = at.chunk - since;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int col = threadIdx.x + k * THREADS;
    if (col < part) carry[k] = __ldcg(prefixes + uint64_t(first - 1) * part + col);
  }
  // Eight chunks of every column in one wait for memory.
  for (uint32_t begin = first; begin < at.chunk; begin += 8) {
    float own[K][8];
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int col = threadIdx.x + k * THREADS;
#pragma unroll
      for (uint32_t i = 0; i < 8; i++)
        own[k][i] = begin + i < at.chunk && col < part ? __ldcg(sums + uint64_t(begin + i) * part + col) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
      for (uint32_t i = 0; i < 8; i++)
        if (begin + i < at.chunk) carry[k] = fmaf(chunk_power[k], carry[k], own[k][i]);
  }
}

// Ends a block that called `look_back`: publishes the scan up to the end of its chunk. It comes last, since nobody needs
// it who has the sums: it only shortens the folds of the chunks after.
template <int K, int Q, int ROWS>
__device__ __forceinline__ void publish_prefix(const RouteParams &p, const Place<Q, ROWS> &at, int part,
                                               const float (&sum)[K], const float (&carry)[K]) {
  if (at.chunk == 0 || at.chunk + 1 >= p.chunks) return;
  const uint64_t stream = at.batch * p.slices + at.head;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int col = threadIdx.x + k * THREADS;
    const float chunk_power = power(rate_of(p, at.rate_of_column(p, col)), at.rows());
    if (col < part)
      p.prefixes[(stream * p.chunks + at.chunk) * part + col] = fmaf(chunk_power, carry[k], sum[k]);
  }
  publish(p.flags + stream * p.chunks + at.chunk, PREFIX);
}

// A thread's scans before its run: of the chunk's tokens, from `parts`, and of all before, from `carries` times b^tokens
// between. Both are laid out (rate, half, lane, Q).
template <int M, int Q, int ROWS>
__device__ __forceinline__ void before_run(const RouteParams &p, const Place<Q, ROWS> &at, int part, const float *parts,
                                           const float *carries, uint32_t rows_between, float (&u)[M][2][Q]) {
#pragma unroll
  for (int l = 0; l < M; l++) {
    const float between = power(rate_of(p, l), rows_between);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int col = ((l * 2 + h) * p.lanes + at.lane) * Q;
      const auto own = *reinterpret_cast<const Vector<float, Q> *>(parts + at.run * part + col);
      const auto carry = *reinterpret_cast<const Vector<float, Q> *>(carries + col);
#pragma unroll
      for (int q = 0; q < Q; q++) u[l][h][q] = fmaf(between, carry.x[q], own.x[q]);
    }
  }
}

template <int M, int Q, int ROWS>
__device__ __forceinline__ void store_run(const RouteParams &p, const Place<Q, ROWS> &at, int part, float *parts,
                                          const float (&u)[M][2][Q]) {
#pragma unroll
  for (int l = 0; l < M; l++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Vector<float, Q> x;
#pragma unroll
      for (int q = 0; q < Q; q++) x.x[q] = u[l][h][q];
      *reinterpret_cast<Vector<float, Q> *>(parts + at.run * part + ((l * 2 + h) * p.lanes + at.lane) * Q) = x;
    }
}
