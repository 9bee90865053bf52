// The projected route, forward: per token and channel of the projected keys and values,
//   u_l = b_l u_l + x,  y = w_0 x + Σ w_l u_l + bias,  keys: y := RMSNorm(y), then RoPE; out into tensors or into pages.
// w are the softmax of the router's logits with gate, bias correction and the EMA's factor 1 - b inside (route.cuh).
//
// A block copies its rows of x into shared memory. A thread walks its run of tokens twice: from zero, for the sums that meet
// in shared memory and in `look_back`; and from what stands before it, writing. Weights of the tokens are computed while
// the sums travel. M = 0 is the append of keys and values to pages: no scan, no mix.
//
// Bound by memory at 256 MB and more, by latency below: x and out once, and 12 bytes a channel for each chunk and each of
// some ten look-back steps, from L2.
#include "route.cuh"

// The rows of a thread's run, from the scans `u` before them: mixed, biased, normed, rotated, stored.
template <typename T, int M, class TILE, int AHEAD, bool IS_KEY, bool NORMED>
__device__ __forceinline__ void write_run(const RouteParams &p, const Place<TILE> &at, const T *from, const float *weights,
                                          float (*u)[2][TILE::Q]) {
  constexpr int Q = TILE::Q, L = M > 0 ? M : 1;
  const uint32_t first = at.first_row(), half = p.d / 2;
  const int rows = NORMED || at.active ? at.rows(p) : 0;
  float rate[L], bias[2][Q] = {}, norm[2][Q] = {};
#pragma unroll
  for (int l = 0; l < M; l++) rate[l] = p.rate[l];
  if (M > 0 && at.active) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int q = 0; q < Q; q++) {
        if (p.bias != nullptr) bias[h][q] = p.bias[at.channel(p) + h * half + q];
        if (NORMED) norm[h][q] = p.norm[at.column + h * half + q];
      }
  }
  // Where the rows go, an address and, for a page's end, how much further; the pages of a run are at most two.
  uint64_t row = (uint64_t(at.batch) * p.tokens + first) * p.heads + at.head, jump = 0;
  int page_rows = TILE::ROWS; // in the first page
  if (p.paged && rows > 0) {
    const uint32_t place = p.offset + first, page = place / PAGE_TOKENS;
    const auto start = [&](uint32_t slot) { return (uint64_t(slot) * p.heads + at.head) * PAGE_TOKENS; };
    row = start(p.slots[page]) + place % PAGE_TOKENS;
    page_rows = PAGE_TOKENS - int(place % PAGE_TOKENS);
    if (page_rows < rows) jump = (start(p.slots[page + 1]) - start(p.slots[page]) - PAGE_TOKENS) * p.d * sizeof(T);
  }
  static_assert(TILE::ROWS <= PAGE_TOKENS, "a run meets the end of a page at most once");
  const uint64_t stride = (p.paged ? p.d : p.heads * p.d) * uint32_t(sizeof(T));
  const uint64_t values = reinterpret_cast<uint64_t>(IS_KEY ? p.out_raw : p.out_values);
  const bool has_plain = values != 0;
  const uint64_t base = IS_KEY ? reinterpret_cast<uint64_t>(p.out_keys) : values, plain_after = values - base;
  uint64_t to = base + (row * p.d + at.column) * sizeof(T);
  // Angles are loaded AHEAD rows before they are used.
  const float *cosines = p.cosine + uint64_t(first) * half + at.column, *sines = p.sine + uint64_t(first) * half + at.column;
  float cosine[AHEAD][Q], sine[AHEAD][Q];
  if constexpr (IS_KEY) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (i < rows && at.active) {
        load_constant(cosines + i * half, cosine[i]);
        load_constant(sines + i * half, sine[i]);
      }
  }
#pragma unroll 1
  for (int r0 = 0; r0 < rows; r0 += AHEAD) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int r = r0 + i;
      if (r >= rows) break;
      float y[2][Q], w[M > 0 ? M + 1 : 1];
      if constexpr (M > 0) load_weights<M>(weights + i * Weights<M, TILE>::STRIDE, w);
      float squares = 0.0f;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        load_floats(from + i * Rows<T, TILE>::STRIDE + h * half, y[h]);
#pragma unroll
        for (int q = 0; q < Q; q++) {
          if constexpr (M > 0) {
            const float x = y[h][q];
            y[h][q] = fmaf(w[0], x, bias[h][q]);
#pragma unroll
            for (int l = 0; l < M; l++) {
              u[l][h][q] = fmaf(rate[l], u[l][h][q], x);
              y[h][q] = fmaf(w[l + 1], u[l][h][q], y[h][q]);
            }
            if constexpr (NORMED) squares = fmaf(y[h][q], y[h][q], squares);
          }
        }
      }
      if constexpr (NORMED) {
        if (!at.active) squares = 0.0f;
#pragma unroll
        for (int offset = TILE::LANES / 2; offset > 0; offset /= 2)
          squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        const float scale = rsqrtf(squares / float(p.d) + p.eps);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int q = 0; q < Q; q++) y[h][q] *= scale * norm[h][q];
      }
      if (r == page_rows) to += jump;
      if (!NORMED || at.active) {
        if (!IS_KEY || has_plain) {
          T *plain = reinterpret_cast<T *>(to + plain_after);
          store_floats(plain, y[0]);
          store_floats(plain + half, y[1]);
        }
        if constexpr (IS_KEY) {
          float low[Q], high[Q];
#pragma unroll
          for (int q = 0; q < Q; q++) {
            // Each product is rounded by itself, as `rotate` does it.
            low[q] = __fsub_rn(__fmul_rn(y[0][q], cosine[i][q]), __fmul_rn(y[1][q], sine[i][q]));
            high[q] = __fadd_rn(__fmul_rn(y[1][q], cosine[i][q]), __fmul_rn(y[0][q], sine[i][q]));
          }
          store_floats(reinterpret_cast<T *>(to), low);
          store_floats(reinterpret_cast<T *>(to) + half, high);
          if (r + AHEAD < rows) {
            load_constant(cosines + (AHEAD + i) * half, cosine[i]);
            load_constant(sines + (AHEAD + i) * half, sine[i]);
          }
        }
      }
      to += stride;
    }
    from += AHEAD * Rows<T, TILE>::STRIDE;
    weights += AHEAD * Weights<L, TILE>::STRIDE;
    cosines += AHEAD * half, sines += AHEAD * half;
  }
  if constexpr (M > 0) {
    if (!at.active || rows == 0 || first + rows != p.tokens) return;
#pragma unroll
    for (int l = 0; l < M; l++) {
      if (l >= int(p.m)) continue;
      float *state = p.new_state + (uint64_t(at.batch) * p.m + l) * 2 * p.heads * p.d + at.channel(p);
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int q = 0; q < Q; q++) state[h * half + q] = (1.0f - rate[l]) * u[l][h][q];
    }
  }
}

template <typename T, int M, class TILE> struct ForwardShared {
  Rows<T, TILE> x;
  Weights<M, TILE> weights;
  alignas(16) float parts[TILE::RUNS * TILE::columns(M)];
  typename Scan<M, TILE, false>::Shared scan;
};
template <typename T, class TILE> struct ForwardShared<T, 0, TILE> {
  Rows<T, TILE> x;
};

template <typename T, int M, class TILE, int AHEAD, bool NORMS>
__device__ __forceinline__ void route_forward(const RouteParams &p) {
  constexpr int Q = TILE::Q, L = M > 0 ? M : 1;
  extern __shared__ __align__(16) unsigned char memory[];
  ForwardShared<T, M, TILE> &shared = *reinterpret_cast<ForwardShared<T, M, TILE> *>(memory);
  const Place<TILE> at(p, blockIdx.x);
  const uint32_t first = at.first_row(), half = p.d / 2, width = 2 * p.heads * p.d;
  shared.x.fetch(p, at,
                 static_cast<const T *>(at.is_key ? p.keys : p.values) + at.first_head * p.d +
                     (uint64_t(at.batch) * p.tokens + at.chunk * TILE::TOKENS) * p.row_stride,
                 p.row_stride);
  const T *from = shared.x.run(at);
  float u[L][2][Q] = {};
  const float *weights = nullptr;
  if constexpr (M > 0) {
    float logits[Weights<M, TILE>::EACH][M + 1], rate[M];
    Scan<M, TILE, false> scan;
    scan.begin(p, shared.scan);
    shared.weights.load(p, at, logits);
#pragma unroll
    for (int l = 0; l < M; l++) rate[l] = p.rate[l];
    shared.x.wait();
    scan_run<M, TILE>(from, half, rate, u);
    store_run<M, TILE>(at, shared.parts, u);
    __syncthreads();
    scan.add_runs(p, shared.parts);
    scan.publish_sum(p, at, shared.scan);
    shared.weights.store(p, at, logits);
#pragma unroll
    for (int k = 0; k < scan.K; k++) {
      const int l = scan.rate_of_column(k);
      uint32_t channel;
      scan.carry[k] = 0.0f;
      if (at.chunk == 0 && scan.has(k) && l < int(p.m) &&
          at.channel_of_column(p, threadIdx.x + k * TILE::THREADS, channel))
        scan.carry[k] = p.state[(uint64_t(at.batch) * p.m + l) * width + channel] / (1.0f - p.rate[l]);
    }
    scan.look_back(p, at, shared.scan);
    scan.store_before(p, shared.parts);
    scan.publish_prefix(p, at, shared.scan);
    load_run<M, TILE>(at, shared.parts, u);
    if (p.carries != nullptr && at.active && first < p.tokens && (first & (p.carry_rows - 1)) == 0) {
      const uint64_t chunks = (p.tokens + p.carry_rows - 1) / p.carry_rows;
#pragma unroll
      for (int l = 0; l < M; l++) {
        if (l >= int(p.m)) continue;
        float *to = p.carries + ((at.batch * chunks + first / p.carry_rows) * p.m + l) * width + at.channel(p);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int q = 0; q < Q; q++) to[h * half + q] = u[l][h][q];
      }
    }
    weights = shared.weights.run(at.run);
  } else {
    shared.x.wait();
  }
  if (!at.is_key) write_run<T, M, TILE, AHEAD, false, false>(p, at, from, weights, u);
  else if (NORMS && p.norm != nullptr) write_run<T, M, TILE, AHEAD, true, NORMS>(p, at, from, weights, u);
  else write_run<T, M, TILE, AHEAD, true, false>(p, at, from, weights, u);
}

#define ROUTE_FORWARD(NAME, T, M, LANES, THREADS, ROWS, HEADS, AHEAD, NORMS, BLOCKS)                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                         \
      route_forward_##NAME##_##M##_##LANES(const __grid_constant__ RouteParams p) {                                     \
    route_forward<T, M, Tile<THREADS, ROWS, LANES, HEADS>, AHEAD, NORMS>(p);                                         \
  }
// By the lanes of a head: 8 up to 64 channels, 16 up to 128, 32 up to 256. Without rates: the append. Four rates: any call,
// with fewer the others are 0 and have no weight. Three rates: without norm, in 16 bits.
#define ROUTE_FORWARD_LANES(NAME, T, LANES)                                                                             \
  ROUTE_FORWARD(NAME, T, 0, LANES, 128, 8, 1, 2, false, 4) ROUTE_FORWARD(NAME, T, 4, LANES, 128, 8, 1, 1, true, 3)
#define ROUTE_FORWARD_TYPE(NAME, T)                                                                                     \
  ROUTE_FORWARD_LANES(NAME, T, 8) ROUTE_FORWARD_LANES(NAME, T, 16) ROUTE_FORWARD_LANES(NAME, T, 32)

ROUTE_FORWARD_TYPE(f32, float)
ROUTE_FORWARD_TYPE(bf16, __nv_bfloat16)
ROUTE_FORWARD_TYPE(f16, __half)

#define ROUTE_FORWARD_16_BIT(NAME, T)                                                                                   \
  ROUTE_FORWARD(NAME, T, 3, 8, 256, 16, 2, 2, false, 2) ROUTE_FORWARD(NAME, T, 3, 16, 256, 16, 2, 2, false, 2)

ROUTE_FORWARD_16_BIT(bf16, __nv_bfloat16)
ROUTE_FORWARD_16_BIT(f16, __half)
