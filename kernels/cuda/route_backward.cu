// The projected route, backward. With dy the gradient of a token's mix (of the keys through RoPE and the norm):
//   a_l = w_l dy + b_l a_l(next token),  dx = w_0 dy + Σ a_l,  dstate_l = b_l a_l(first) / (1 - b_l),
//   dw_0 = Σ_channels x dy,  dw_l = Σ_channels u_l dy,  dbias = Σ_tokens dy.
// u is scanned again from the carries that the forward left, a scan from the right by `look_back` in mirrored chunks.
//
// route_backward: as route_forward, with the rows of x and of the gradient in shared memory. A run is walked three times:
// u from zero; u again with what stands before it, dw and a from zero; a from the right with what stands after it, dx.
// route_logits: the shares of dw, one for each head, become the gradients of logits and gate; a thread a token.
// route_columns: the shares of dbias and dnorm, one for each chunk, are added in their order.
// Sums run in a fixed order: equal inputs give equal bits.
#include "route.cuh"

constexpr int SUM_THREADS = 256;

// Sums of N values, 4 or 5, over the LANES lanes of a head, at least 8; lane i < N gets that of value i.
template <int LANES, int N> __device__ __forceinline__ float head_sums(const float (&x)[N], uint32_t lane) {
  const bool odd = lane & 1, upper = lane & 2;
  // Odd lanes keep values 1 and 3 of a pair of lanes, even ones 0 and 2; then the upper two lanes of four keep 2 and 3.
  float a = odd ? x[1] : x[0], b = odd ? x[3] : x[2];
  a += __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1);
  b += __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
  float sum = upper ? b : a;
  sum += __shfl_xor_sync(0xffffffffu, upper ? a : b, 2);
#pragma unroll
  for (int offset = 4; offset < LANES; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if constexpr (N == 5) {
    float last = x[4];
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) last += __shfl_xor_sync(0xffffffffu, last, offset);
    if (lane == 4) sum = last;
  }
  return sum;
}

// Adds the columns of each thread over the runs, in their order, and stores the sums as this block's share.
template <class TILE>
__device__ __forceinline__ void store_share(const RouteParams &p, const Place<TILE> &at, const float (&x)[2][TILE::Q],
                                            float *share, float *parts) {
  float columns[1][2][TILE::Q];
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int q = 0; q < TILE::Q; q++) columns[0][h][q] = x[h][q];
  __syncthreads();
  store_run<1, TILE>(at, parts, columns);
  __syncthreads();
  for (int col = threadIdx.x; col < TILE::CHANNELS; col += TILE::THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int run = 0; run < TILE::RUNS; run++) sum += parts[run * TILE::CHANNELS + col];
    uint32_t channel;
    if (at.channel_of_column(p, col, channel))
      share[(uint64_t(at.batch) * p.chunks + at.chunk) * 2 * p.heads * p.d + channel] = sum;
  }
}

// The gradient dy of the mix, in f32, in the place of x and dout, which are read no more: in 16 bits their halves.
template <typename T, int Q> __device__ __forceinline__ void keep(T *x, T *dout, const float (&dy)[Q]) {
  if constexpr (sizeof(T) == 4) {
    store_floats(dout, dy);
  } else {
    Vector<uint32_t, Q / 2> high, low;
#pragma unroll
    for (int i = 0; i < Q / 2; i++) {
      high.x[i] = __byte_perm(__float_as_uint(dy[2 * i]), __float_as_uint(dy[2 * i + 1]), 0x7632);
      low.x[i] = __byte_perm(__float_as_uint(dy[2 * i]), __float_as_uint(dy[2 * i + 1]), 0x5410);
    }
    *reinterpret_cast<Vector<uint32_t, Q / 2> *>(dout) = high;
    *reinterpret_cast<Vector<uint32_t, Q / 2> *>(x) = low;
  }
}
template <typename T, int Q> __device__ __forceinline__ void kept(const T *x, const T *dout, float (&dy)[Q]) {
  if constexpr (sizeof(T) == 4) {
    load_floats(dout, dy);
  } else {
    const auto high = *reinterpret_cast<const Vector<uint32_t, Q / 2> *>(dout);
    const auto low = *reinterpret_cast<const Vector<uint32_t, Q / 2> *>(x);
#pragma unroll
    for (int i = 0; i < Q / 2; i++) {
      dy[2 * i] = __uint_as_float(__byte_perm(low.x[i], high.x[i], 0x5410));
      dy[2 * i + 1] = __uint_as_float(__byte_perm(low.x[i], high.x[i], 0x7632));
    }
  }
}

// The second walk, from the scans `u` before the run: shares of dw, and in `a` Σ b^r w dy, the run scanned from its end
// from zero. Keys leave dy for the third walk.
template <typename T, int M, class TILE, bool IS_KEY, bool NORMED>
__device__ __forceinline__ void walk_forward(const RouteParams &p, const Place<TILE> &at, T *x_rows, T *dout_rows,
                                             const float *weights, const float4 *scaled, const float (&rate)[M],
                                             float (&u)[M][2][TILE::Q],
                                             float (&a)[M][2][TILE::Q], float (&dnorm)[2][TILE::Q]) {
  constexpr int Q = TILE::Q, AHEAD = 1;
  const uint32_t first = at.first_row(), half = p.d / 2;
  const int rows = at.rows(p);
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
  const uint32_t head = (at.is_key ? 0 : p.heads) + at.head;
  float *dweights = p.dweights + ((uint64_t(head) * p.batch + at.batch) * p.tokens + first) * (p.m + 1) + at.lane;
  const bool writes = at.head < p.heads && at.lane <= p.m;
#pragma unroll 1
  for (int r0 = 0; r0 < TILE::ROWS; r0 += AHEAD) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int r = r0 + i;
      T *x_row = x_rows + i * Rows<T, TILE>::STRIDE, *dout_row = dout_rows + i * Rows<T, TILE>::STRIDE;
      float x[2][Q], dy[2][Q];
      const bool there = at.active && r < rows;
      // Rows past the end are zeros; lanes without channels read what is not theirs.
#pragma unroll
      for (int h = 0; h < 2; h++) {
        load_floats(x_row + h * half, x[h]);
        load_floats(dout_row + h * half, dy[h]);
        if (p.d != TILE::HEAD && !at.active) {
#pragma unroll
          for (int q = 0; q < Q; q++) x[h][q] = dy[h][q] = 0.0f;
        }
#pragma unroll
        for (int q = 0; q < Q; q++) {
#pragma unroll
          for (int l = 0; l < M; l++) u[l][h][q] = fmaf(rate[l], u[l][h][q], x[h][q]);
        }
      }
      if constexpr (IS_KEY) {
        if (there) {
#pragma unroll
          for (int q = 0; q < Q; q++) {
            const float low = dy[0][q], high = dy[1][q];
            dy[0][q] = fmaf(low, cosine[i][q], high * sine[i][q]);
            dy[1][q] = fmaf(high, cosine[i][q], -low * sine[i][q]);
          }
          if (r + AHEAD < rows) {
            load_constant(cosines + (AHEAD + i) * half, cosine[i]);
            load_constant(sines + (AHEAD + i) * half, sine[i]);
          }
        }
      }
      if constexpr (NORMED) {
        // With n = y / rms and g = dn ∘ weight: dy = (g - n mean(g n)) / rms, dweight = dn ∘ n.
        float w[M + 1], y[2][Q], norm[2][Q] = {}, squares = 0.0f, dot = 0.0f;
        load_weights<M>(weights + i * Weights<M, TILE>::STRIDE, w);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float bias[Q] = {};
          if (there) {
            load_constant(p.norm + at.column + h * half, norm[h]);
            if (p.bias != nullptr) load_constant(p.bias + at.channel(p) + h * half, bias);
          }
#pragma unroll
          for (int q = 0; q < Q; q++) {
            float value = fmaf(w[0], x[h][q], bias[q]);
#pragma unroll
            for (int l = 0; l < M; l++) value = fmaf(w[l + 1], u[l][h][q], value);
            if (!there) value = 0.0f;
            y[h][q] = value;
            squares = fmaf(value, value, squares);
            dot = fmaf(dy[h][q] * norm[h][q], value, dot);
          }
        }
#pragma unroll
        for (int offset = TILE::LANES / 2; offset > 0; offset /= 2) {
          squares += __shfl_xor_sync(0xffffffffu, squares, offset);
          dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        }
        const float scale = rsqrtf(squares / float(p.d) + p.eps), mean = dot * scale * scale / float(p.d);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int q = 0; q < Q; q++) {
            dnorm[h][q] = fmaf(dy[h][q] * scale, y[h][q], dnorm[h][q]);
            dy[h][q] = scale * fmaf(-mean, y[h][q], dy[h][q] * norm[h][q]);
          }
      }
      if (IS_KEY && at.active) {
        keep(x_row, dout_row, dy[0]);
        keep(x_row + half, dout_row + half, dy[1]);
      }
      const float4 four = scaled[i];
      const float power[4] = {four.x, four.y, four.z, four.w};
      float dw[M + 1] = {};
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int q = 0; q < Q; q++) dw[0] = fmaf(x[h][q], dy[h][q], dw[0]);
#pragma unroll
      for (int l = 0; l < M; l++) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int q = 0; q < Q; q++) {
            dw[l + 1] = fmaf(u[l][h][q], dy[h][q], dw[l + 1]);
            a[l][h][q] = fmaf(power[l], dy[h][q], a[l][h][q]);
          }
      }
      const float share = head_sums<TILE::LANES>(dw, at.lane);
      if (writes && r < rows) *dweights = share;
      dweights += p.m + 1;
    }
    x_rows += AHEAD * Rows<T, TILE>::STRIDE, dout_rows += AHEAD * Rows<T, TILE>::STRIDE;
    weights += AHEAD * Weights<M, TILE>::STRIDE;
    scaled += AHEAD;
    cosines += AHEAD * half, sines += AHEAD * half;
  }
}

// The third walk, from the last row to the first, `a` being the scan after the run: dx.
template <typename T, int M, class TILE, bool IS_KEY>
__device__ __forceinline__ void walk_back(const RouteParams &p, const Place<TILE> &at, const T *x_rows, const T *dout_rows,
                                          const float *weights, const float (&rate)[M], float (&a)[M][2][TILE::Q],
                                          float (&dbias)[2][TILE::Q]) {
  constexpr int Q = TILE::Q;
  const uint32_t first = at.first_row(), half = p.d / 2, width = 2 * p.heads * p.d;
  const int rows = at.active ? at.rows(p) : 0;
  T *to = static_cast<T *>(p.dkv) + (uint64_t(at.batch) * p.tokens + first + rows) * width + at.channel(p);
  x_rows += rows * Rows<T, TILE>::STRIDE, dout_rows += rows * Rows<T, TILE>::STRIDE;
  weights += rows * Weights<M, TILE>::STRIDE;
#pragma unroll 2
  for (int r = rows - 1; r >= 0; r--) {
    x_rows -= Rows<T, TILE>::STRIDE, dout_rows -= Rows<T, TILE>::STRIDE;
    weights -= Weights<M, TILE>::STRIDE;
    to -= width;
    float w[M + 1], dy[2][Q], dx[2][Q];
    load_weights<M>(weights, w);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if constexpr (IS_KEY) kept(x_rows + h * half, dout_rows + h * half, dy[h]);
      else load_floats(dout_rows + h * half, dy[h]);
#pragma unroll
      for (int q = 0; q < Q; q++) {
        dbias[h][q] += dy[h][q];
        dx[h][q] = w[0] * dy[h][q];
#pragma unroll
        for (int l = 0; l < M; l++) {
          a[l][h][q] = fmaf(rate[l], a[l][h][q], w[l + 1] * dy[h][q]);
          dx[h][q] += a[l][h][q];
        }
      }
      store_floats(to + h * half, dx[h]);
    }
  }
  if (first > 0 || rows == 0) return;
#pragma unroll
  for (int l = 0; l < M; l++) {
    if (l >= int(p.m)) continue;
    float *state = p.dstate + (uint64_t(at.batch) * p.m + l) * width + at.channel(p);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int q = 0; q < Q; q++) state[h * half + q] = rate[l] / (1.0f - rate[l]) * a[l][h][q];
  }
}

template <typename T, int M, class TILE> struct BackwardShared {
  Rows<T, TILE> x, dout;
  Weights<M, TILE> weights;
  float4 scaled[TILE::RUNS * (TILE::ROWS + 1)];
  alignas(16) float parts[TILE::RUNS * TILE::columns(M)];
  typename Scan<M, TILE, true>::Shared scan;
};

template <typename T, int M, class TILE, bool NORMS> __device__ __forceinline__ void route_backward(const RouteParams &p) {
  constexpr int Q = TILE::Q;
  extern __shared__ __align__(16) unsigned char memory[];
  BackwardShared<T, M, TILE> &shared = *reinterpret_cast<BackwardShared<T, M, TILE> *>(memory);
  // The scan runs from the right: `mirrored.chunk` counts from the last chunk.
  const Place<TILE> mirrored(p, blockIdx.x);
  Place<TILE> at = mirrored;
  at.chunk = p.chunks - 1 - mirrored.chunk;
  const uint32_t half = p.d / 2, width = 2 * p.heads * p.d;
  const uint64_t first = uint64_t(at.batch) * p.tokens + at.chunk * TILE::TOKENS;
  shared.x.fetch(p, at, static_cast<const T *>(at.is_key ? p.keys : p.values) + at.first_head * p.d + first * p.row_stride,
                 p.row_stride);
  shared.dout.fetch(p, at,
                    static_cast<const T *>(at.is_key ? p.dkeys : p.dvalues) + (first * p.heads + at.first_head) * p.d,
                    p.heads * p.d);
  float logits[Weights<M, TILE>::EACH][M + 1], rate[M], u[M][2][Q] = {}, a[M][2][Q] = {}, dnorm[2][Q] = {}, dbias[2][Q] = {};
  Scan<M, TILE, true> scan;
  Scan<M, TILE, false> before; // of u
  scan.begin(p, shared.scan);
  shared.weights.load(p, at, logits);
#pragma unroll
  for (int k = 0; k < before.K; k++) {
    const int l = before.rate_of_column(k);
    uint32_t channel;
    const bool there = before.has(k) && l < int(p.m) && at.channel_of_column(p, threadIdx.x + k * TILE::THREADS, channel);
    before.carry[k] =
        there ? __ldg(p.carries + ((uint64_t(at.batch) * p.chunks + at.chunk) * p.m + l) * width + channel) : 0.0f;
  }
#pragma unroll
  for (int l = 0; l < M; l++) rate[l] = p.rate[l];
  shared.weights.store(p, at, logits, shared.scaled);
  shared.x.wait();
  T *x_rows = shared.x.at + (shared.x.run(at) - shared.x.at), *dout_rows = shared.dout.at + (shared.dout.run(at) - shared.dout.at);
  const float *weights = shared.weights.run(at.run);
  const float4 *scaled = shared.scaled + at.run * (TILE::ROWS + 1);
  scan_run<M, TILE>(x_rows, half, rate, u);
  store_run<M, TILE>(at, shared.parts, u);
  __syncthreads();
  before.add_runs(p, shared.parts);
  before.store_before(p, shared.parts);
  __syncthreads();
  load_run<M, TILE>(at, shared.parts, u);
  if (!at.active) { // no channels: nothing in the sums over a head
#pragma unroll
    for (int i = 0; i < M * 2 * Q; i++) u[i / (2 * Q)][i / Q % 2][i % Q] = 0.0f;
  }
  if (!at.is_key) walk_forward<T, M, TILE, false, false>(p, at, x_rows, dout_rows, weights, scaled, rate, u, a, dnorm);
  else if (NORMS && p.norm != nullptr) walk_forward<T, M, TILE, true, NORMS>(p, at, x_rows, dout_rows, weights, scaled, rate, u, a, dnorm);
  else walk_forward<T, M, TILE, true, false>(p, at, x_rows, dout_rows, weights, scaled, rate, u, a, dnorm);

  __syncthreads(); // nobody reads the scans of u any more
  store_run<M, TILE>(at, shared.parts, a);
  __syncthreads();
  scan.add_runs(p, shared.parts);
  scan.publish_sum(p, mirrored, shared.scan);
#pragma unroll
  for (int k = 0; k < scan.K; k++) scan.carry[k] = 0.0f; // arrives at the last token from the right
  scan.look_back(p, mirrored, shared.scan);
  scan.store_before(p, shared.parts);
  scan.publish_prefix(p, mirrored, shared.scan);
  load_run<M, TILE>(at, shared.parts, a);
  if (at.is_key) walk_back<T, M, TILE, true>(p, at, x_rows, dout_rows, weights, rate, a, dbias);
  else walk_back<T, M, TILE, false>(p, at, x_rows, dout_rows, weights, rate, a, dbias);
  if (p.dbias != nullptr) store_share<TILE>(p, at, dbias, p.dbias, shared.parts);
  if (NORMS && p.dnorm != nullptr) store_share<TILE>(p, at, dnorm, p.dnorm, shared.parts);
}

// Four threads a token of (b, t), each adding every fourth head's share; the last block adds the shares of dgate.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) route_logits(const __grid_constant__ RouteParams p) {
  constexpr int M = MAX_RATES, WARPS = SUM_THREADS / 32, EACH = 4;
  const uint64_t rows = uint64_t(p.batch) * p.tokens;
  const uint64_t row = uint64_t(blockIdx.x) * (SUM_THREADS / EACH) + threadIdx.x / EACH;
  const uint32_t first = threadIdx.x % EACH;
  float dw[M + 1] = {}, dgate = 0.0f;
  if (row < rows && p.m == 3) {
#pragma unroll 4
    for (uint32_t head = first; head < 2 * p.heads; head += EACH) {
      const float4 four = __ldg(reinterpret_cast<const float4 *>(p.dweights) + head * rows + row);
      dw[0] += four.x, dw[1] += four.y, dw[2] += four.z, dw[3] += four.w;
    }
  } else if (row < rows) {
    for (uint32_t head = first; head < 2 * p.heads; head += EACH)
#pragma unroll
      for (int l = 0; l <= M; l++)
        if (l <= int(p.m)) dw[l] += p.dweights[(head * rows + row) * (p.m + 1) + l];
  }
#pragma unroll
  for (int l = 0; l <= M; l++) {
    dw[l] += __shfl_xor_sync(0xffffffffu, dw[l], 1);
    dw[l] += __shfl_xor_sync(0xffffffffu, dw[l], 2);
  }
  if (row < rows && first == 0) {
    float lambda[M + 1];
#pragma unroll
    for (int l = 0; l <= M; l++) lambda[l] = l <= int(p.m) ? p.logits[row * (p.m + 1) + l] : 0.0f;
    softmax<M>(p, lambda);
    // w_0 = 1 - gate Σ λ_l, w_l = gate λ_l k_l with k = correction · (1 - b).
    const float gate = p.gate[0];
    float dlambda[M + 1] = {}, mean = 0.0f;
#pragma unroll
    for (int l = 0; l < M; l++) {
      if (l >= int(p.m)) continue;
      const float slope = fmaf(correction(p, l, uint32_t(row % p.tokens)) * (1.0f - p.rate[l]), dw[l + 1], -dw[0]);
      dgate = fmaf(lambda[l + 1], slope, dgate);
      dlambda[l + 1] = gate * slope;
      mean = fmaf(lambda[l + 1], dlambda[l + 1], mean);
    }
#pragma unroll
    for (int l = 0; l <= M; l++)
      if (l <= int(p.m)) p.dlogits[row * (p.m + 1) + l] = lambda[l] * (dlambda[l] - mean);
  }
  __shared__ float sums[WARPS];
  __shared__ bool last;
  const auto block_sum = [&](float x) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < WARPS; w++) sum += sums[w];
    return sum;
  };
  const float share = block_sum(dgate);
  if (threadIdx.x == 0) {
    p.gate_shares[blockIdx.x] = share;
    fence();
    count_in(p, last);
    fence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0.0f;
  for (uint32_t i = threadIdx.x; i < gridDim.x; i += SUM_THREADS) sum += __ldcg(p.gate_shares + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.dgate[0] = sum;
}

struct ColumnParams {
  const float *from; // (rows, columns)
  float *to;         // (columns)
  uint64_t rows;
  uint32_t columns;
};

// 32 columns a block; a warp adds every eighth row, then the warps' sums are added.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) route_columns(const __grid_constant__ ColumnParams p) {
  constexpr int WARPS = SUM_THREADS / 32;
  const uint32_t column = blockIdx.x * 32 + threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0.0f;
  if (column < p.columns) {
#pragma unroll 8
    for (uint64_t row = warp; row < p.rows; row += WARPS) sum += p.from[row * p.columns + column];
  }
  __shared__ float sums[WARPS][32];
  sums[warp][threadIdx.x % 32] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.columns) return;
  float total = 0.0f;
  for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
  p.to[column] = total;
}

// As in route_forward.cu.
#define ROUTE_BACKWARD(NAME, T, M, LANES, NORMS, BLOCKS)                                                                \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS)                                                             \
      route_backward_##NAME##_##M##_##LANES(const __grid_constant__ RouteParams p) {                                    \
    route_backward<T, M, Tile<128, 8, LANES, 1>, NORMS>(p);                                                          \
  }
#define ROUTE_BACKWARD_TYPE(NAME, T)                                                                                    \
  ROUTE_BACKWARD(NAME, T, 4, 8, true, 2) ROUTE_BACKWARD(NAME, T, 4, 16, true, 2) ROUTE_BACKWARD(NAME, T, 4, 32, true, 2)

ROUTE_BACKWARD_TYPE(f32, float)
ROUTE_BACKWARD_TYPE(bf16, __nv_bfloat16)
ROUTE_BACKWARD_TYPE(f16, __half)

#define ROUTE_BACKWARD_16_BIT(NAME, T) ROUTE_BACKWARD(NAME, T, 3, 8, false, 4) ROUTE_BACKWARD(NAME, T, 3, 16, false, 4)

ROUTE_BACKWARD_16_BIT(bf16, __nv_bfloat16)
ROUTE_BACKWARD_16_BIT(f16, __half)
