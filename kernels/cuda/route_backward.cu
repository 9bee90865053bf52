// The projected route, backward. With dy the gradient of a token's mix (of the keys through RoPE and the norm):
//   a_l = w_l dy + b_l a_l(next token),  dx = w_0 dy + Σ a_l,  dstate_l = b_l a_l(first) / (1 - b_l),
//   dw_0 = Σ_channels x dy,  dw_l = Σ_channels u_l dy,  dbias = Σ_tokens dy.
// u is scanned again from the carries that the forward left, a scan from the right by `look_back` in mirrored chunks.
//
// route_backward: as route_forward, a run being 8 tokens and a thread Q channels of each half of a head, Q = 2 but for
// head_dim 256: 128 tokens a block at head_dim 64. x and the gradient are read once and dx written once; dy stays in
// registers.
// route_logits: the shares of dw, one for each head, become the gradients of logits and gate; a thread a token.
// route_columns: the shares of dbias and dnorm, one for each chunk, are added in their order.
// Bound by memory. Sums run in a fixed order: equal inputs give equal bits.
#include "route.cuh"

// Sums of N values, 4 or 5, over the `lanes` lanes of a head, at least 8; lane i < N gets that of value i.
template <int N> __device__ __forceinline__ float head_sums(const float (&x)[N], uint32_t lane, uint32_t lanes) {
  const bool odd = lane & 1, upper = lane & 2;
  // Odd lanes keep values 1 and 3 of a pair of lanes, even ones 0 and 2; then the upper two lanes of four keep 2 and 3.
  float a = odd ? x[1] : x[0], b = odd ? x[3] : x[2];
  a += __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1);
  b += __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
  float sum = upper ? b : a;
  sum += __shfl_xor_sync(0xffffffffu, upper ? a : b, 2);
  for (uint32_t offset = 4; offset < lanes; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if constexpr (N == 5) {
    float last = x[4];
    for (uint32_t offset = 1; offset < lanes; offset *= 2) last += __shfl_xor_sync(0xffffffffu, last, offset);
    if (lane == 4) sum = last;
  }
  return sum;
}

// Adds the two columns of each thread over the runs, in their order, and stores the sums as this block's share.
template <int Q, int ROWS>
__device__ __forceinline__ void store_share(const RouteParams &p, const Place<Q, ROWS> &at, const float (&x)[2][Q],
                                            float *share, float *parts) {
  const int part = 2 * Q * p.lanes;
  float columns[1][2][Q];
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int q = 0; q < Q; q++) columns[0][h][q] = x[h][q];
  __syncthreads();
  store_run<1>(p, at, part, parts, columns);
  __syncthreads();
  for (int col = threadIdx.x; col < part; col += THREADS) {
    float sum = 0.0f;
    for (uint32_t run = 0; run < at.runs; run++) sum += parts[run * part + col];
    uint32_t channel;
    if (at.channel_of_column(p, col, channel))
      share[(uint64_t(at.batch) * p.chunks + at.chunk) * 2 * p.heads * p.d + channel] = sum;
  }
}

template <typename T, int M, int Q> __device__ void route_backward(const RouteParams &p) {
  constexpr int ROWS = 8;
  using V = Vector<T, Q>;
  using F = Vector<float, Q>;
  // The scan runs from the right: `mirrored.chunk` counts from the last chunk.
  const Place<Q, ROWS> mirrored(p, blockIdx.x);
  Place<Q, ROWS> at = mirrored;
  at.chunk = p.chunks - 1 - mirrored.chunk;
  const uint32_t first = at.first_row(), half = p.d / 2, width = 2 * p.heads * p.d;
  const int part = at.part(p, M);

  V x[ROWS][2] = {}, dout[ROWS][2] = {};
  {
    const uint32_t head = at.head_channel(p);
    const T *from = static_cast<const T *>(at.is_key ? p.keys : p.values) + head;
    const T *dfrom = static_cast<const T *>(at.is_key ? p.dkeys : p.dvalues) + head;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (!at.active || first + r >= p.tokens) continue;
      const uint64_t row = uint64_t(at.batch) * p.tokens + first + r;
      x[r][0] = *reinterpret_cast<const V *>(from + row * p.row_stride);
      x[r][1] = *reinterpret_cast<const V *>(from + row * p.row_stride + half);
      dout[r][0] = *reinterpret_cast<const V *>(dfrom + row * p.heads * p.d);
      dout[r][1] = *reinterpret_cast<const V *>(dfrom + row * p.heads * p.d + half);
    }
  }

  __shared__ float weights[MAX_RUNS * (ROWS + 1)][M + 1];
  __shared__ __align__(16) float parts[THREADS * 2 * Q * M], carries[32 * 2 * Q * M];
#pragma unroll
  for (int k = 0; k < M; k++) {
    const int col = threadIdx.x + k * THREADS, l = at.rate_of_column(p, col);
    uint32_t channel;
    if (col >= part) continue;
    const bool there = l < int(p.m) && at.channel_of_column(p, col, channel);
    carries[col] =
        there ? p.carries[((uint64_t(at.batch) * p.chunks + at.chunk) * p.m + l) * width + channel] : 0.0f;
  }
  load_weights<M, ROWS>(p, at.batch, at.chunk * at.rows(), at.rows(), weights);
  float rate[M], u[M][2][Q] = {};
#pragma unroll
  for (int l = 0; l < M; l++) rate[l] = rate_of(p, l);
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int q = 0; q < Q; q++)
#pragma unroll
        for (int l = 0; l < M; l++) u[l][h][q] = fmaf(rate[l], u[l][h][q], to_float(x[r][h].x[q]));
  store_run<M>(p, at, part, parts, u);
  __syncthreads();
  float sum[M];
  scan_runs<M, false>(p, at, part, parts, sum);
  __syncthreads();
  before_run<M>(p, at, part, parts, carries, at.run * ROWS, u);
#pragma unroll
  for (int r = 0; r < ROWS; r++) forget(x[r][0]), forget(x[r][1]);

  float dy[ROWS][2][Q], a[M][2][Q] = {}, run_power[M], dnorm[2][Q] = {};
#pragma unroll
  for (int l = 0; l < M; l++) run_power[l] = 1.0f;
  const bool normed = at.is_key && p.norm != nullptr; // alike in the whole block
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint32_t row = first + r;
    const bool there = at.active && row < p.tokens;
    const float *w = weights[at.run * (ROWS + 1) + r];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int q = 0; q < Q; q++) {
        dy[r][h][q] = to_float(dout[r][h].x[q]);
#pragma unroll
        for (int l = 0; l < M; l++) u[l][h][q] = fmaf(rate[l], u[l][h][q], to_float(x[r][h].x[q]));
      }
    if (at.is_key && there) {
      const F c = *reinterpret_cast<const F *>(p.cosine + uint64_t(row) * half + at.column);
      const F s = *reinterpret_cast<const F *>(p.sine + uint64_t(row) * half + at.column);
#pragma unroll
      for (int q = 0; q < Q; q++) {
        const float low = dy[r][0][q], high = dy[r][1][q];
        dy[r][0][q] = fmaf(low, c.x[q], high * s.x[q]);
        dy[r][1][q] = fmaf(high, c.x[q], -low * s.x[q]);
      }
    }
    if (normed) {
      // With n = y / rms and g = dn ∘ weight: dy = (g - n mean(g n)) / rms, dweight = dn ∘ n.
      float y[2][Q] = {}, squares = 0.0f, dot = 0.0f;
      if (there) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int q = 0; q < Q; q++) {
            float value = p.bias != nullptr ? p.bias[at.channel(p) + h * half + q] : 0.0f;
            value = fmaf(w[0], to_float(x[r][h].x[q]), value);
#pragma unroll
            for (int l = 0; l < M; l++) value = fmaf(w[l + 1], u[l][h][q], value);
            y[h][q] = value;
            squares = fmaf(value, value, squares);
            dot = fmaf(dy[r][h][q] * p.norm[at.column + h * half + q], value, dot);
          }
      }
      for (uint32_t offset = p.lanes / 2; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        dot += __shfl_xor_sync(0xffffffffu, dot, offset);
      }
      if (there) {
        const float scale = rsqrtf(squares / float(p.d) + p.eps), mean = dot * scale * scale / float(p.d);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int q = 0; q < Q; q++) {
            dnorm[h][q] = fmaf(dy[r][h][q] * scale, y[h][q], dnorm[h][q]);
            dy[r][h][q] = scale * fmaf(-mean, y[h][q], dy[r][h][q] * p.norm[at.column + h * half + q]);
          }
      }
    }
    float dw[M + 1] = {};
#pragma unroll
    for (int l = 0; l < M; l++) {
      const float weight = run_power[l] * w[l + 1];
      run_power[l] *= rate[l];
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int q = 0; q < Q; q++) {
          dw[l + 1] = fmaf(u[l][h][q], dy[r][h][q], dw[l + 1]);
          // Σ b^r w dy: these tokens scanned from the right from zero, forward.
          a[l][h][q] = fmaf(weight, dy[r][h][q], a[l][h][q]);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int q = 0; q < Q; q++) dw[0] = fmaf(to_float(x[r][h].x[q]), dy[r][h][q], dw[0]);
    const float share = head_sums<M + 1>(dw, at.lane, p.lanes);
    if (row < p.tokens && at.lane <= p.m)
      p.dweights[((uint64_t(at.head) * p.batch + at.batch) * p.tokens + row) * (p.m + 1) + at.lane] = share;
  }

  __syncthreads(); // nobody reads the scans of u any more
  store_run<M>(p, at, part, parts, a);
  __syncthreads();
  const float nothing[M] = {}; // arrives at the last token from the right
  float carry[M];
  scan_runs<M, true>(p, at, part, parts, sum);
  look_back(p, mirrored, part, nothing, sum, carry);
#pragma unroll
  for (int k = 0; k < M; k++)
    if (int(threadIdx.x) + k * THREADS < part) carries[threadIdx.x + k * THREADS] = carry[k];
  __syncthreads();
  before_run<M>(p, at, part, parts, carries, (at.runs - 1 - at.run) * ROWS, a);
  float dbias[2][Q] = {};
#pragma unroll
  for (int r = ROWS - 1; r >= 0; r--) {
    const uint32_t row = first + r;
    const float *w = weights[at.run * (ROWS + 1) + r];
    V dx[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int q = 0; q < Q; q++) {
        dbias[h][q] += dy[r][h][q];
        float sum = w[0] * dy[r][h][q];
#pragma unroll
        for (int l = 0; l < M; l++) {
          a[l][h][q] = fmaf(rate[l], a[l][h][q], w[l + 1] * dy[r][h][q]);
          sum += a[l][h][q];
        }
        dx[h].x[q] = from_float<T>(sum);
      }
    if (!at.active || row >= p.tokens) continue;
    T *to = static_cast<T *>(p.dkv) + (uint64_t(at.batch) * p.tokens + row) * width + at.channel(p);
    *reinterpret_cast<V *>(to) = dx[0];
    *reinterpret_cast<V *>(to + half) = dx[1];
    if (row > 0) continue;
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
  publish_prefix(p, mirrored, part, sum, carry);
  if (p.dbias != nullptr) store_share(p, at, dbias, p.dbias, parts);
  if (p.dnorm != nullptr) store_share(p, at, dnorm, p.dnorm, parts);
}

// A thread a token of (b, t); dgate has one share a block.
extern "C" __global__ void __launch_bounds__(THREADS) route_logits(const __grid_constant__ RouteParams p) {
  constexpr int M = MAX_RATES, WARPS = THREADS / 32;
  const uint64_t rows = uint64_t(p.batch) * p.tokens, row = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
  float dgate = 0.0f;
  if (row < rows) {
    float lambda[M + 1], dw[M + 1] = {};
    softmax<M>(p, row, lambda);
    for (uint32_t slice = 0; slice < p.slices; slice++)
#pragma unroll
      for (int l = 0; l <= M; l++)
        if (l <= int(p.m)) dw[l] += p.dweights[(slice * rows + row) * (p.m + 1) + l];
    // w_0 = 1 - gate Σ λ_l, w_l = gate λ_l k_l with k = correction · (1 - b).
    const float gate = p.gate[0];
    float dlambda[M + 1] = {}, mean = 0.0f;
#pragma unroll
    for (int l = 0; l < M; l++) {
      if (l >= int(p.m)) continue;
      const float rate = rate_of(p, l);
      const float slope = fmaf(correction(p, rate, uint32_t(row % p.tokens)) * (1.0f - rate), dw[l + 1], -dw[0]);
      dgate = fmaf(lambda[l + 1], slope, dgate);
      dlambda[l + 1] = gate * slope;
      mean = fmaf(lambda[l + 1], dlambda[l + 1], mean);
    }
#pragma unroll
    for (int l = 0; l <= M; l++)
      if (l <= int(p.m)) p.dlogits[row * (p.m + 1) + l] = lambda[l] * (dlambda[l] - mean);
  }
  __shared__ float sums[WARPS];
  dgate = warp_sum(dgate);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = dgate;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int w = 0; w < WARPS; w++) sum += sums[w];
    p.dgate[blockIdx.x] = sum;
  }
}

struct ColumnParams {
  const float *from; // (rows, columns)
  float *to;         // (columns)
  uint64_t rows;
  uint32_t columns;
};

// 32 columns a block; a warp adds every eighth row, then the warps' sums are added.
extern "C" __global__ void __launch_bounds__(THREADS) route_columns(const __grid_constant__ ColumnParams p) {
  constexpr int WARPS = THREADS / 32;
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

// 16-bit at Q = 2: two blocks of an SM; else the registers of both.
#define ROUTE_BACKWARD(NAME, T, M, Q)                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, sizeof(T) == 4 || Q == 4 ? 1 : 2)                \
      route_backward_##NAME##_##M##_##Q(const __grid_constant__ RouteParams p) {                         \
    route_backward<T, M, Q>(p);                                                                          \
  }
#define ROUTE_BACKWARD_TYPE(NAME, T)                                                                     \
  ROUTE_BACKWARD(NAME, T, 3, 2) ROUTE_BACKWARD(NAME, T, 4, 2) ROUTE_BACKWARD(NAME, T, 3, 4) ROUTE_BACKWARD(NAME, T, 4, 4)

ROUTE_BACKWARD_TYPE(f32, float)
ROUTE_BACKWARD_TYPE(bf16, __nv_bfloat16)
ROUTE_BACKWARD_TYPE(f16, __half)
