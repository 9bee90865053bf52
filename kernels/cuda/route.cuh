// What the projected route's two directions share: the parameters, which channels a thread owns, the weights of a
// token's levels, and the look-back that carries a scan from chunk to chunk inside one launch.
#pragma once
#include "number.cuh"

constexpr int MAX_RATES = 4;
constexpr int PAGE_TOKENS = 64;
constexpr int MAX_SLOTS = 256; // pages that travel in the launch

// n / by for n < 2^31, without a division: mul = ceil(2^(31 + shift) / by), shift = ceil(log2(by)).
struct Divisor {
  uint32_t by, mul, shift;
  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return uint32_t((uint64_t(n) * mul) >> (31 + shift)); }
};

struct RouteParams {
  const void *keys;      // (b, t, g, d), tokens `row_stride` elements apart
  const void *values;    // (b, t, g, d), likewise
  const float *logits;   // (b, t, 1 + m)
  const float *state;    // (b, m, 2, g, d)
  const float *gate;     // (1)
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
  float *dweights;       // (groups, b, t, 1 + m): shares of the gradients of the weights
  float *dbias;          // (b · chunks, 2, g, d): shares of the gradient of the bias, or null
  float *dnorm;          // (b · chunks, 2, g, d): shares of the gradient of the norm, by head, or null
  float *dlogits;        // (b, t, 1 + m)
  float *dgate;          // (1)
  float *gate_shares;    // (blocks of route_logits)
  // Look-back; a stream is batch · groups + group, its columns those of a block at every rate.
  float *sums;           // (streams, chunks, columns): a chunk scanned from zero
  float *prefixes;       // (streams, chunks, columns): the scan up to the end of a chunk
  uint64_t *epoch;       // (1): the launch's number, and in the lower half how many of its blocks have read it
  uint32_t *flags;       // (streams, chunks): of this and of earlier launches
  uint64_t seen;
  uint64_t row_stride;
  uint32_t batch, tokens, heads, d; // `heads` of keys
  uint32_t m, chunks;
  Divisor streams, groups;          // groups: blocks that have all heads of keys and of values; streams: batch · groups
  uint32_t carry_rows;              // the backward kernel's chunk, a power of two
  uint32_t correct;                 // bias correction
  uint32_t paged;                   // outputs are pools
  uint32_t offset;                  // of the first token in its page
  float eps;
  float rate[MAX_RATES];            // 0 past m, like their powers
  float log_rate[MAX_RATES];        // natural
  float run_power[MAX_RATES];       // rate^(tokens of a run)
  float chunk_power[MAX_RATES];     // rate^(tokens of a chunk)
  float powers[MAX_RATES][17];      // rate^0 to rate^16, a run's tokens being at most 16
  uint32_t slots[MAX_SLOTS];
};
static_assert(sizeof(RouteParams) <= 4096, "parameters of a launch");

// A block has HEADS heads, of keys or of values, and a chunk of tokens. A thread owns Q channels of the lower half of a
// head, the Q that rotate with them, and a run of ROWS tokens; LANES threads side by side share a run.
template <int THREADS_, int ROWS_, int LANES_, int HEADS_> struct Tile {
  static constexpr int THREADS = THREADS_, Q = 4, ROWS = ROWS_, LANES = LANES_, HEADS = HEADS_;
  static constexpr int RUNS = THREADS / (LANES * HEADS), TOKENS = RUNS * ROWS;
  // Columns of a block at one rate, laid out (head, lane, half, Q).
  static constexpr int HEAD = LANES * 2 * Q, CHANNELS = HEADS * HEAD;
  static __host__ __device__ constexpr int columns(int m) { return m * CHANNELS; }
  static __host__ __device__ constexpr int per_thread(int m) { return (columns(m) + THREADS - 1) / THREADS; }
};

// What a block scans.
struct Chunk {
  uint32_t stream, batch, chunk; // chunk in the order of the scan
  uint32_t first_head;           // of the block, among keys or values
  bool is_key;

  __device__ __forceinline__ Chunk(const RouteParams &p, uint32_t order, uint32_t heads) {
    chunk = p.streams.divide(order);
    stream = order - chunk * p.streams.by;
    batch = p.groups.divide(stream);
    const uint32_t group = stream - batch * p.groups.by, groups = p.groups.by / 2;
    is_key = group < groups;
    first_head = (is_key ? group : group - groups) * heads;
  }
};

template <class TILE> struct Place : Chunk {
  uint32_t lane, run, part;      // part: the thread's head, of the block's
  uint32_t head, column;         // column of the lower half
  bool active;

  __device__ __forceinline__ Place(const RouteParams &p, uint32_t order) : Chunk(p, order, TILE::HEADS) {
    lane = threadIdx.x % TILE::LANES;
    run = threadIdx.x / TILE::LANES % TILE::RUNS;
    part = threadIdx.x / (TILE::LANES * TILE::RUNS);
    head = first_head + part;
    column = lane * TILE::Q;
    active = column < p.d / 2 && head < p.heads;
  }
  __device__ __forceinline__ uint32_t first_row() const { return chunk * TILE::TOKENS + run * TILE::ROWS; }
  // Of the thread's run, those before the end.
  __device__ __forceinline__ int rows(const RouteParams &p) const {
    const int left = int(p.tokens) - int(first_row());
    return left < 0 ? 0 : left < TILE::ROWS ? left : TILE::ROWS;
  }
  // In a row of (2, g, d).
  __device__ __forceinline__ uint32_t channel(const RouteParams &p) const {
    return ((is_key ? 0 : p.heads) + head) * p.d + column;
  }
  // Where the thread's channels of rate l begin in a row of columns.
  __device__ __forceinline__ int own_columns(int l) const {
    return l * TILE::CHANNELS + int(part * TILE::LANES + lane) * 2 * TILE::Q;
  }
  // The channel of a column in (2, g, d); false if it has none.
  __device__ __forceinline__ bool channel_of_column(const RouteParams &p, int col, uint32_t &channel) const {
    const uint32_t within = col % TILE::CHANNELS, half = within / TILE::Q % 2;
    const uint32_t low = within % TILE::HEAD / (2 * TILE::Q) * TILE::Q + within % TILE::Q;
    const uint32_t of = first_head + within / TILE::HEAD;
    channel = ((is_key ? 0 : p.heads) + of) * p.d + half * (p.d / 2) + low;
    return low < p.d / 2 && of < p.heads;
  }
};

// A block's rows of keys or values (or of their gradients) in shared memory. A run lies PAD elements further, so that the
// runs of a warp meet different banks.
template <typename T, class TILE> struct Rows {
  static constexpr int STRIDE = TILE::CHANNELS;
  static constexpr int PAD = TILE::LANES * TILE::Q * sizeof(T) % 128 / sizeof(T);
  static constexpr int RUN = TILE::ROWS * STRIDE + PAD;
  alignas(16) T at[TILE::RUNS * RUN];

  // Starts the copy of the chunk's rows, `stride` elements apart, the first at `from`: the block's first head.
  __device__ __forceinline__ void fetch(const RouteParams &p, const Place<TILE> &place, const T *from, uint64_t stride) {
    constexpr uint32_t PIECE = 16 / sizeof(T), PIECES = STRIDE / PIECE; // of a row
    static_assert(TILE::THREADS % PIECES == 0 && TILE::TOKENS % (TILE::THREADS / PIECES) == 0, "a pass has whole rows");
    const uint32_t piece = threadIdx.x % PIECES, within = piece % (TILE::HEAD / PIECE) * PIECE;
    const uint32_t part = piece / (TILE::HEAD / PIECE);
    if (within >= p.d || place.first_head + part >= p.heads) return;
    const uint32_t first = place.chunk * TILE::TOKENS, left = p.tokens - first;
    const T *source = from + uint64_t(threadIdx.x / PIECES) * stride + part * p.d + within;
    const uint64_t step = TILE::THREADS / PIECES * stride;
#pragma unroll
    for (uint32_t i = 0; i < TILE::TOKENS * PIECES / TILE::THREADS; i++) {
      const uint32_t row = threadIdx.x / PIECES + i * (TILE::THREADS / PIECES);
      const uint32_t to = uint32_t(__cvta_generic_to_shared(at + row * STRIDE + row / TILE::ROWS * PAD + piece * PIECE));
      // Zeros past the end.
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(row < left ? 16 : 0) : "memory");
      source += step;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  // Ends with a barrier.
  static __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
  }
  // The thread's channels of the first row of its run; the rows follow STRIDE apart.
  __device__ __forceinline__ const T *run(const Place<TILE> &place) const {
    return at + place.run * RUN + place.part * TILE::HEAD + place.column;
  }
};

// 1 / (1 - b^n), n the tokens up to this one; 1 without correction.
__device__ __forceinline__ float correction(const RouteParams &p, int l, uint32_t row) {
  const float x = float(p.seen + row + 1) * p.log_rate[l];
  // Past b^n < 2^-25 the factor is 1.
  return !p.correct || x < -17.5f ? 1.0f : __fdividef(-1.0f, expm1f(x));
}

// A token's softmax: lambda[0] of the token itself, then of the levels; of its logits, in place.
template <int M> __device__ __forceinline__ void softmax(const RouteParams &p, float (&lambda)[M + 1]) {
  float top = lambda[0];
#pragma unroll
  for (int l = 1; l <= M; l++) top = l <= int(p.m) ? fmaxf(top, lambda[l]) : top;
  float sum = 0.0f;
#pragma unroll
  for (int l = 0; l <= M; l++) {
    lambda[l] = l <= int(p.m) ? __expf(lambda[l] - top) : 0.0f;
    sum += lambda[l];
  }
  const float scale = __fdividef(1.0f, sum);
#pragma unroll
  for (int l = 0; l <= M; l++) lambda[l] *= scale;
}

// What a block keeps of its tokens' routers: the token's own weight, then those of the levels. A run lies further by one
// token, so that the runs of a warp meet different banks.
template <int M, class TILE> struct Weights {
  static constexpr int STRIDE = M <= 3 ? 4 : 8, EACH = (TILE::TOKENS + TILE::THREADS - 1) / TILE::THREADS;
  alignas(16) float of[TILE::RUNS * (TILE::ROWS + 1)][STRIDE];

  // Of the thread's tokens; kept in registers until `store`, so that the loads fly early.
  static __device__ __forceinline__ void load(const RouteParams &p, const Chunk &at, float (&logits)[EACH][M + 1]) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const uint32_t token = threadIdx.x + i * TILE::THREADS, row = at.chunk * TILE::TOKENS + token;
      const bool there = token < TILE::TOKENS && row < p.tokens;
      const float *from = p.logits + (uint64_t(at.batch) * p.tokens + row) * (p.m + 1);
#pragma unroll
      for (int l = 0; l <= M; l++) logits[i][l] = there && l <= int(p.m) ? __ldg(from + l) : 0.0f;
    }
  }

  // out = w[0] · x + Σ w[1 + l] · u_l, where u = b u + x is the scan without its factor 1 - b. Zeros past the last token.
  // Into `scaled`, if not null, go w[1 + l] b_l^r, r being the token's place in its run.
  __device__ __forceinline__ void store(const RouteParams &p, const Chunk &at, float (&lambda)[EACH][M + 1],
                                        float4 *scaled = nullptr) {
    const float gate = p.gate[0];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const uint32_t token = threadIdx.x + i * TILE::THREADS, row = at.chunk * TILE::TOKENS + token;
      if (token >= TILE::TOKENS) return;
      softmax<M>(p, lambda[i]);
      float w[STRIDE] = {}, moved = 0.0f;
#pragma unroll
      for (int l = 0; l < M; l++) {
        if (l >= int(p.m)) continue;
        moved += lambda[i][l + 1];
        w[l + 1] = gate * lambda[i][l + 1] * correction(p, l, row) * (1.0f - p.rate[l]);
      }
      w[0] = 1.0f - gate * moved;
      float *to = of[token + token / TILE::ROWS];
#pragma unroll
      for (int j = 0; j < STRIDE; j += 4) {
        const float4 four = make_float4(w[j], w[j + 1], w[j + 2], w[j + 3]);
        *reinterpret_cast<float4 *>(to + j) = row < p.tokens ? four : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
      if (scaled == nullptr) continue;
      float x[4] = {};
#pragma unroll
      for (int l = 0; l < M; l++) x[l] = row < p.tokens ? w[l + 1] * p.powers[l][token % TILE::ROWS] : 0.0f;
      scaled[token + token / TILE::ROWS] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }

  // Of the first token of a run; the others follow STRIDE apart.
  __device__ __forceinline__ const float *run(uint32_t run) const { return of[run * (TILE::ROWS + 1)]; }
};

template <int M> __device__ __forceinline__ void load_weights(const float *from, float (&w)[M + 1]) {
  const float4 four = *reinterpret_cast<const float4 *>(from);
  w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
  if constexpr (M == 4) w[4] = from[4];
}

// A flag is an epoch times 4 and one of these: what an earlier launch left reads as nothing.
enum Flag : uint32_t { SUM = 1, PREFIX = 2 };

// Counts a block in: the epoch so far. The last block makes way for the next launch, and is told so.
__device__ __forceinline__ uint64_t count_in(const RouteParams &p, bool &last) {
  uint64_t before;
  asm volatile("atom.add.relaxed.gpu.global.u64 %0, [%1], 1;" : "=l"(before) : "l"(p.epoch) : "memory");
  last = uint32_t(before) + 1 == gridDim.x;
  if (last) *p.epoch = ((before >> 32) + 1) << 32;
  return before;
}

// The launch's epoch times 4.
__device__ __forceinline__ uint32_t enter(const RouteParams &p) {
  bool last;
  return uint32_t(count_in(p, last) >> 32) * 4;
}

__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Not an acquire: the reader fences once, when it has seen all that it waits for.
__device__ __forceinline__ uint32_t load_flag(const uint32_t *flag) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  return x;
}

// Makes what the block's threads stored before a barrier visible to whoever sees the flag. One thread calls it.
__device__ __forceinline__ void publish(uint32_t *flag, uint32_t value) {
  fence();
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// The scan of a block's columns through its runs and from chunk to chunk. A thread has the columns threadIdx.x + k ·
// THREADS. Blocks start in the order of their index, and the order of the scan is theirs: what a block waits for is
// running.
template <int M, class TILE, bool REVERSED> struct Scan {
  static constexpr int COLUMNS = TILE::columns(M), K = TILE::per_thread(M), RUNS = TILE::RUNS, THREADS = TILE::THREADS;
  // The last warps, which have the fewest columns: one waits for its stores to arrive, the other for flags.
  static constexpr uint32_t PUBLISHER = THREADS - 32, LOOKER = THREADS / 32 - 2;
  struct Shared {
    uint32_t epoch;
    uint32_t since; // chunks between the nearest prefix and this one
  };
  float own[K][RUNS]; // runs scanned from zero, in the order of the scan
  float sum[K];       // of the chunk
  float carry[K];     // the scan before the chunk

  // Before a barrier.
  static __device__ __forceinline__ void begin(const RouteParams &p, Shared &shared) {
    if (p.chunks > 1 && threadIdx.x == PUBLISHER) shared.epoch = enter(p);
  }

  static __device__ __forceinline__ int rate_of_column(int k) { return (threadIdx.x + k * THREADS) / TILE::CHANNELS; }
  static __device__ __forceinline__ bool has(int k) { return int(threadIdx.x) + k * THREADS < COLUMNS; }

  // From `parts`, (runs, columns), which the block's threads stored before a barrier.
  __device__ __forceinline__ void add_runs(const RouteParams &p, const float *parts) {
#pragma unroll
    for (int k = 0; k < K; k++) {
      sum[k] = 0.0f;
      if (!has(k)) continue;
      const float power = p.run_power[rate_of_column(k)];
#pragma unroll
      for (int i = 0; i < RUNS; i++) {
        own[k][i] = parts[(REVERSED ? RUNS - 1 - i : i) * COLUMNS + threadIdx.x + k * THREADS];
        sum[k] = fmaf(power, sum[k], own[k][i]);
      }
    }
  }

  // `parts` becomes the scan before every run, of all tokens. A barrier follows.
  __device__ __forceinline__ void store_before(const RouteParams &p, float *parts) const {
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (!has(k)) continue;
      const float power = p.run_power[rate_of_column(k)];
      float before = carry[k];
#pragma unroll
      for (int i = 0; i < RUNS; i++) {
        parts[(REVERSED ? RUNS - 1 - i : i) * COLUMNS + threadIdx.x + k * THREADS] = before;
        before = fmaf(power, before, own[k][i]);
      }
    }
  }

  __device__ __forceinline__ void publish_sum(const RouteParams &p, const Chunk &at, const Shared &shared) const {
    if (at.chunk == 0 || at.chunk + 1 >= p.chunks) return; // nobody folds it
    const uint64_t chunk = uint64_t(at.stream) * p.chunks + at.chunk;
#pragma unroll
    for (int k = 0; k < K; k++)
      if (has(k)) p.sums[chunk * COLUMNS + threadIdx.x + k * THREADS] = sum[k];
    __syncthreads();
    if (threadIdx.x == PUBLISHER) publish(p.flags + chunk, shared.epoch + SUM);
  }

  // The scan up to the end of the chunk. Has a barrier.
  __device__ __forceinline__ void publish_prefix(const RouteParams &p, const Chunk &at, const Shared &shared) const {
    const uint64_t chunk = uint64_t(at.stream) * p.chunks + at.chunk;
    const bool last = at.chunk + 1 >= p.chunks;
#pragma unroll
    for (int k = 0; k < K; k++)
      if (!last && has(k))
        p.prefixes[chunk * COLUMNS + threadIdx.x + k * THREADS] =
            fmaf(p.chunk_power[rate_of_column(k)], carry[k], sum[k]);
    __syncthreads();
    if (!last && threadIdx.x == PUBLISHER) publish(p.flags + chunk, shared.epoch + PREFIX);
  }

  // carry = a left fold: the prefix of a chunk is b^tokens · the prefix of the one before + its sum, from the nearest
  // chunk whose prefix is published. Where that is decides no bit: a fold from a later prefix goes on with what a longer
  // fold would have had.
  __device__ __forceinline__ void look_back(const RouteParams &p, const Chunk &at, Shared &shared) {
    if (at.chunk == 0) return;
    const uint64_t row = uint64_t(at.stream) * p.chunks;
    const uint32_t *flags = p.flags + row;
    if (threadIdx.x / 32 == LOOKER) {
      const int other = int(at.chunk) - 1 - int(threadIdx.x % 32);
      uint32_t found;
      for (;;) {
        const uint32_t flag = other < 0 ? 0 : load_flag(flags + other) - shared.epoch;
        const uint32_t prefix = __ballot_sync(0xffffffffu, flag == PREFIX);
        const uint32_t missing = __ballot_sync(0xffffffffu, flag != PREFIX && flag != SUM);
        found = __ffs(prefix) - 1;
        if (prefix != 0 && (missing & ((1u << found) - 1)) == 0) break;
      }
      fence();
      if (threadIdx.x % 32 == 0) shared.since = found;
    }
    __syncthreads();
    const uint32_t count = shared.since;
    const float *sums = p.sums + (row + at.chunk - count) * COLUMNS + threadIdx.x;
    const float *prefix = p.prefixes + (row + at.chunk - count - 1) * COLUMNS + threadIdx.x;
    float power[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
      power[k] = has(k) ? p.chunk_power[rate_of_column(k)] : 0.0f;
      carry[k] = has(k) ? __ldcg(prefix + k * THREADS) : 0.0f;
    }
    // Eight chunks of every column in one wait for memory.
    for (uint32_t begin = 0; begin < count; begin += 8) {
      float other[K][8];
#pragma unroll
      for (int k = 0; k < K; k++)
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
          other[k][i] = begin + i < count && has(k) ? __ldcg(sums + i * COLUMNS + k * THREADS) : 0.0f;
      sums += 8 * COLUMNS;
#pragma unroll
      for (int k = 0; k < K; k++)
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
          if (begin + i < count) carry[k] = fmaf(power[k], carry[k], other[k][i]);
    }
  }
};

// u_l = b_l u_l + x over the rows of a thread's run.
template <int M, class TILE, typename T>
__device__ __forceinline__ void scan_run(const T *from, uint32_t half, const float (&rate)[M], float (&u)[M][2][TILE::Q]) {
#pragma unroll 4
  for (int r = 0; r < TILE::ROWS; r++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x[TILE::Q];
      load_floats(from + r * Rows<T, TILE>::STRIDE + h * half, x);
#pragma unroll
      for (int q = 0; q < TILE::Q; q++)
#pragma unroll
        for (int l = 0; l < M; l++) u[l][h][q] = fmaf(rate[l], u[l][h][q], x[q]);
    }
}

// A thread's scans at its channels, to and from a row of columns of its run.
template <int M, class TILE>
__device__ __forceinline__ void store_run(const Place<TILE> &at, float *parts, const float (&u)[M][2][TILE::Q]) {
#pragma unroll
  for (int l = 0; l < M; l++) {
    float4 *to = reinterpret_cast<float4 *>(parts + at.run * TILE::columns(M) + at.own_columns(l));
#pragma unroll
    for (int h = 0; h < 2; h++) to[h] = make_float4(u[l][h][0], u[l][h][1], u[l][h][2], u[l][h][3]);
  }
}

template <int M, class TILE>
__device__ __forceinline__ void load_run(const Place<TILE> &at, const float *parts, float (&u)[M][2][TILE::Q]) {
#pragma unroll
  for (int l = 0; l < M; l++) {
    const float4 *from = reinterpret_cast<const float4 *>(parts + at.run * TILE::columns(M) + at.own_columns(l));
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float4 four = from[h];
      u[l][h][0] = four.x, u[l][h][1] = four.y, u[l][h][2] = four.z, u[l][h][3] = four.w;
    }
  }
}
