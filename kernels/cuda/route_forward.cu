// The projected route, forward: per token and channel of the projected keys and values,
//   u_l = b_l u_l + x,  y = w_0 x + Σ w_l u_l + bias,  keys: y := RMSNorm(y), then RoPE; out into tensors or into pages.
// w are the softmax of the router's logits with gate, bias correction and the EMA's factor 1 - b inside (route.cuh).
//
// Block: one head and 8 to 32 runs of tokens, at head_dim 64 256 tokens; a thread owns 4 channels of the lower half,
// the 4 that rotate with them and a run of 8 tokens. x is read once, into registers. Every run is
// scanned from zero; the sums meet in shared memory and in `look_back`, and each run is scanned again from what stands
// before it.
//
// Bound by memory: x and out once, and 12 bytes a channel for each chunk and each of some ten look-back steps, from L2.
// M = 0 is the append of keys and values to pages: no scan, no mix.
#include "route.cuh"

template <typename T, int M> __device__ void route_forward(const RouteParams &p) {
  constexpr int Q = 4, ROWS = 8;
  using V = Vector<T, Q>;
  const Place<Q, ROWS> at(p, blockIdx.x);
  const uint32_t first = at.first_row(), half = p.d / 2, width = 2 * p.heads * p.d;

  V x[ROWS][2] = {};
  {
    const T *from = static_cast<const T *>(at.is_key ? p.keys : p.values) + at.head_channel(p);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (!at.active || first + r >= p.tokens) continue;
      const T *row = from + (uint64_t(at.batch) * p.tokens + first + r) * p.row_stride;
      x[r][0] = *reinterpret_cast<const V *>(row);
      x[r][1] = *reinterpret_cast<const V *>(row + half);
    }
  }

  __shared__ float weights[M > 0 ? MAX_RUNS * (ROWS + 1) : 1][M + 1];
  __shared__ __align__(16) float parts[M > 0 ? THREADS * 2 * Q * M : 4], carries[M > 0 ? 32 * 2 * Q * M : 4];
  float rate[M > 0 ? M : 1], u[M > 0 ? M : 1][2][Q] = {}, sum[M > 0 ? M : 1], carry[M > 0 ? M : 1];
  if constexpr (M > 0) {
    const int part = at.part(p, M);
    load_weights<M, ROWS>(p, at.batch, at.chunk * at.rows(), at.rows(), weights);
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

    float initial[M];
    scan_runs<M, false>(p, at, part, parts, sum);
#pragma unroll
    for (int k = 0; k < M; k++) {
      const int col = threadIdx.x + k * THREADS, l = at.rate_of_column(p, col);
      uint32_t channel;
      initial[k] = 0.0f;
      if (col < part && l < int(p.m) && at.channel_of_column(p, col, channel))
        initial[k] = p.state[(uint64_t(at.batch) * p.m + l) * width + channel] / (1.0f - rate_of(p, l));
    }
    look_back(p, at, part, initial, sum, carry);
#pragma unroll
    for (int k = 0; k < M; k++)
      if (int(threadIdx.x) + k * THREADS < part) carries[threadIdx.x + k * THREADS] = carry[k];
    __syncthreads();
    before_run<M>(p, at, part, parts, carries, at.run * ROWS, u);
    if (p.carries != nullptr && at.active && first % p.carry_rows == 0 && first < p.tokens) {
      const uint64_t rows = (p.tokens + p.carry_rows - 1) / p.carry_rows;
#pragma unroll
      for (int l = 0; l < M; l++) {
        if (l >= int(p.m)) continue;
        float *to = p.carries + ((at.batch * rows + first / p.carry_rows) * p.m + l) * width + at.channel(p);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int q = 0; q < Q; q++) to[h * half + q] = u[l][h][q];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) forget(x[r][0]), forget(x[r][1]);
  }

  // Not left early: the norm below sums over all lanes of a head.
  const bool normed = at.is_key && p.norm != nullptr;
  float bias[2][Q] = {}, norm[2][Q] = {};
  if (at.active) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int q = 0; q < Q; q++) {
        if (p.bias != nullptr) bias[h][q] = p.bias[at.channel(p) + h * half + q];
        if (normed) norm[h][q] = p.norm[at.column + h * half + q];
      }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint32_t row = first + r;
    const float *w = weights[M > 0 ? at.run * (ROWS + 1) + r : 0];
    float y[2][Q];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int q = 0; q < Q; q++) {
        const float value = to_float(x[r][h].x[q]);
        y[h][q] = value;
        if constexpr (M > 0) {
          y[h][q] = fmaf(w[0], value, bias[h][q]);
#pragma unroll
          for (int l = 0; l < M; l++) {
            u[l][h][q] = fmaf(rate[l], u[l][h][q], value);
            y[h][q] = fmaf(w[l + 1], u[l][h][q], y[h][q]);
          }
        }
      }
    if constexpr (M > 0) {
      if (row + 1 == p.tokens && at.active) {
#pragma unroll
        for (int l = 0; l < M; l++) {
          if (l >= int(p.m)) continue;
          float *to = p.new_state + (uint64_t(at.batch) * p.m + l) * width + at.channel(p);
#pragma unroll
          for (int h = 0; h < 2; h++)
#pragma unroll
            for (int q = 0; q < Q; q++) to[h * half + q] = (1.0f - rate[l]) * u[l][h][q];
        }
      }
      if (p.norm != nullptr) {
        float squares = 0.0f;
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int q = 0; q < Q; q++) squares = fmaf(y[h][q], y[h][q], squares);
        if (!at.active) squares = 0.0f;
        for (uint32_t offset = p.lanes / 2; offset > 0; offset /= 2)
          squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        const float scale = rsqrtf(squares / float(p.d) + p.eps);
        if (normed) {
#pragma unroll
          for (int h = 0; h < 2; h++)
#pragma unroll
            for (int q = 0; q < Q; q++) y[h][q] *= scale * norm[h][q];
        }
      }
    }
    if (!at.active || row >= p.tokens) continue;
    const uint32_t head = at.is_key ? at.head : at.head - p.heads;
    uint64_t to = (uint64_t(at.batch) * p.tokens + row) * p.heads + head;
    if (p.paged) {
      const uint32_t place = p.offset + row;
      to = (uint64_t(p.slots[place / PAGE_TOKENS]) * p.heads + head) * PAGE_TOKENS + place % PAGE_TOKENS;
    }
    to = to * p.d + at.column;
    V low, high;
#pragma unroll
    for (int q = 0; q < Q; q++) low.x[q] = from_float<T>(y[0][q]), high.x[q] = from_float<T>(y[1][q]);
    T *out = static_cast<T *>(at.is_key ? p.out_raw : p.out_values);
    if (out != nullptr) {
      *reinterpret_cast<V *>(out + to) = low;
      *reinterpret_cast<V *>(out + to + half) = high;
    }
    if (!at.is_key) continue;
    const float4 c = __ldg(reinterpret_cast<const float4 *>(p.cosine + uint64_t(row) * half + at.column));
    const float4 s = __ldg(reinterpret_cast<const float4 *>(p.sine + uint64_t(row) * half + at.column));
    const float cosine[Q] = {c.x, c.y, c.z, c.w}, sine[Q] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int q = 0; q < Q; q++) {
      // Each product is rounded by itself, as `rotate` does it.
      low.x[q] = from_float<T>(__fsub_rn(__fmul_rn(y[0][q], cosine[q]), __fmul_rn(y[1][q], sine[q])));
      high.x[q] = from_float<T>(__fadd_rn(__fmul_rn(y[1][q], cosine[q]), __fmul_rn(y[0][q], sine[q])));
    }
    T *keys = static_cast<T *>(p.out_keys) + to;
    *reinterpret_cast<V *>(keys) = low;
    *reinterpret_cast<V *>(keys + half) = high;
  }
  if constexpr (M > 0) publish_prefix(p, at, at.part(p, M), sum, carry);
}

// In f32 a block needs the registers of two.
#define ROUTE_FORWARD(NAME, T, M)                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, sizeof(T) == 4 ? 1 : 2)                        \
      route_forward_##NAME##_##M(const __grid_constant__ RouteParams p) {                              \
    route_forward<T, M>(p);                                                                            \
  }
#define ROUTE_FORWARD_TYPE(NAME, T) ROUTE_FORWARD(NAME, T, 0) ROUTE_FORWARD(NAME, T, 3) ROUTE_FORWARD(NAME, T, 4)

ROUTE_FORWARD_TYPE(f32, float)
ROUTE_FORWARD_TYPE(bf16, __nv_bfloat16)
ROUTE_FORWARD_TYPE(f16, __half)
