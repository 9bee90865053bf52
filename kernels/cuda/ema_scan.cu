// Multi-rate EMA: e_t = b e_{t-1} + (1 - b) x_t per channel and rate b; level_t = e_t, or e_t / (1 - b^n), n = seen+t+1.
//
// A chunk is 128 tokens. A thread owns V adjacent channels (4 where c allows, else 1), all rates, one chunk, and walks
// its rows. Three launches: `aggregate` scans every chunk from zero, `carry` runs over the chunks of a channel in
// order and leaves the state before each, `levels` scans again from there and writes. x is read twice, but a level is
// 4 bytes per rate and x at most 4: at bf16 and 3 rates the second read is a seventh of the traffic. Bound by memory.
// One chunk alone (decode) starts from the state and needs the last launch only.
//
// Backward, with h_t = dlevel_t · correction: g_t = h_t + b g_{t+1}, dx_t = Σ (1 - b) g_t, dstate = b g_0, the same
// three steps from the right. drate = Σ g_t (e_{t-1} - x_t) + dlevel_t e_t dcorrection/db. Within a chunk the first sum
// is Σ h_t f_t + G f_last with f_t = b f_{t-1} + e_{t-1} - x_t from f = 0 and G what arrives from the right: a forward
// sweep, so that e is recomputed from the carries and never inverted or stored.
//
// Sums run in a fixed order: the same bits at every run.
#include "number.cuh"

constexpr int MAX_RATES = 4;
constexpr uint32_t CHUNK = 128; // tokens
constexpr int THREADS = 128;

struct EmaParams {
  const void *x;         // (b, t, c)
  const float *rates;    // (m)
  const float *state;    // (b, m, c)
  float *new_state;      // (b, m, c)
  float *carries;        // (b, chunks, m, c): aggregates, then the state before each chunk
  float *levels;         // (b, t, m, c), or null: only new_state is wanted
  const float *dlevels;  // (b, t, m, c)
  const float *dstate;   // (b, m, c): gradient of new_state
  float *adjoints;       // (b, chunks, m, c): aggregates, then what arrives at each chunk from the right
  void *dx;              // (b, t, c)
  float *dstate_in;      // (b, m, c)
  float *partial;        // (m, blocks of `backward`)
  float *drates;         // (m)
  uint64_t seen;
  uint64_t partials;     // blocks of `backward`
  uint32_t batch;
  uint32_t tokens;
  uint32_t channels;
  uint32_t rates_len;
  uint32_t chunks;
  uint32_t first_chunk;  // of `levels`
  uint32_t correct;      // bias correction
};

// correction 1 / (1 - b^n) and its derivative by b.
__device__ __forceinline__ float correction(float log2_rate, float n) {
  return -1.0f / expm1f(n * log2_rate * 0.693147180559945f);
}

__device__ __forceinline__ float correction_slope(float log2_rate, float n) {
  const float c = correction(log2_rate, n);
  // At n = 1 the power is b^0 = 1, also for b = 0.
  const float power = n > 1.0f ? exp2f((n - 1.0f) * log2_rate) : 1.0f;
  return n * power * c * c;
}

__device__ __forceinline__ float count(const EmaParams &p, uint32_t row) { return float(p.seen + row + 1); }

template <typename T, int V> __device__ __forceinline__ void load(float (&to)[V], const T *from) {
  if constexpr (V == 4 && sizeof(T) == 4) {
    const float4 x = __ldg(reinterpret_cast<const float4 *>(from));
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (V == 4) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2 *>(from));
    const T *x = reinterpret_cast<const T *>(&raw);
#pragma unroll
    for (int v = 0; v < V; v++) to[v] = to_float(x[v]);
  } else {
    to[0] = to_float(from[0]);
  }
}

template <typename T, int V> __device__ __forceinline__ void store(T *to, const float (&x)[V]) {
  if constexpr (V == 4 && sizeof(T) == 4) {
    *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
  } else if constexpr (V == 4) {
    uint2 raw;
    T *y = reinterpret_cast<T *>(&raw);
#pragma unroll
    for (int v = 0; v < V; v++) y[v] = from_float<T>(x[v]);
    *reinterpret_cast<uint2 *>(to) = raw;
  } else {
    to[0] = from_float<T>(x[0]);
  }
}

// Which rows and channels a thread owns; blockIdx is (channels, chunk, batch).
template <int V> struct Place {
  uint32_t channel, chunk, batch, first, last;
  bool inside;
  __device__ Place(const EmaParams &p, uint32_t chunk) : chunk(chunk), batch(blockIdx.z) {
    channel = (blockIdx.x * THREADS + threadIdx.x) * V;
    inside = channel < p.channels;
    first = chunk * CHUNK;
    last = min(first + CHUNK, p.tokens);
  }
  __device__ uint64_t row(const EmaParams &p, uint32_t row) const {
    return (uint64_t(batch) * p.tokens + row) * p.channels + channel;
  }
  __device__ uint64_t level(const EmaParams &p, uint32_t row, int m) const {
    return ((uint64_t(batch) * p.tokens + row) * p.rates_len + m) * p.channels + channel;
  }
  __device__ uint64_t state(const EmaParams &p, int m) const {
    return (uint64_t(batch) * p.rates_len + m) * p.channels + channel;
  }
  __device__ uint64_t carry(const EmaParams &p, int m) const {
    return ((uint64_t(batch) * p.chunks + chunk) * p.rates_len + m) * p.channels + channel;
  }
};

template <int V>
__device__ __forceinline__ void advance(const EmaParams &p, const float (&b)[MAX_RATES], const float (&x)[V],
                                        float (&e)[MAX_RATES][V]) {
#pragma unroll
  for (int m = 0; m < MAX_RATES; m++)
#pragma unroll
    for (int v = 0; v < V; v++) e[m][v] = fmaf(b[m], e[m][v], (1.0f - b[m]) * x[v]);
}

__device__ __forceinline__ void load_rates(const EmaParams &p, float (&b)[MAX_RATES]) {
#pragma unroll
  for (int m = 0; m < MAX_RATES; m++) b[m] = m < p.rates_len ? p.rates[m] : 0.0f;
}

// Every chunk but the last, from zero.
template <typename T, int V> __device__ void aggregate(const EmaParams &p) {
  const Place<V> at(p, blockIdx.y);
  if (!at.inside) return;
  float b[MAX_RATES], e[MAX_RATES][V] = {};
  load_rates(p, b);
  const T *x = static_cast<const T *>(p.x);
#pragma unroll 8
  for (uint32_t row = at.first; row < at.last; row++) {
    float value[V];
    load<T, V>(value, x + at.row(p, row));
    advance<V>(p, b, value, e);
  }
#pragma unroll
  for (int m = 0; m < MAX_RATES; m++)
    if (m < p.rates_len) store<float, V>(p.carries + at.carry(p, m), e[m]);
}

// One thread a channel and rate; blockIdx is (channels, rate, batch). In place: aggregates become carries.
__device__ void carry(const EmaParams &p) {
  const uint32_t channel = blockIdx.x * THREADS + threadIdx.x, m = blockIdx.y, batch = blockIdx.z;
  if (channel >= p.channels) return;
  const float power = exp2f(float(CHUNK) * log2f(p.rates[m]));
  float e = p.state[(uint64_t(batch) * p.rates_len + m) * p.channels + channel];
  const uint64_t step = uint64_t(p.rates_len) * p.channels;
  float *to = p.carries + (uint64_t(batch) * p.chunks * p.rates_len + m) * p.channels + channel;
  // Sixteen loads under way at a time: the loop is bound by latency.
  for (uint32_t chunk = 0; chunk < p.chunks; chunk += 16) {
    float sums[16];
#pragma unroll
    for (uint32_t i = 0; i < 16; i++) sums[i] = chunk + i + 1 < p.chunks ? to[(chunk + i) * step] : 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < 16; i++) {
      if (chunk + i < p.chunks) to[(chunk + i) * step] = e;
      e = fmaf(power, e, sums[i]);
    }
  }
}

template <typename T, int V> __device__ void levels(const EmaParams &p) {
  const Place<V> at(p, p.first_chunk + blockIdx.y);
  if (!at.inside) return;
  float b[MAX_RATES], log2_rate[MAX_RATES], e[MAX_RATES][V] = {};
  load_rates(p, b);
#pragma unroll
  for (int m = 0; m < MAX_RATES; m++) {
    log2_rate[m] = log2f(b[m]);
    if (m < p.rates_len) load<float, V>(e[m], p.chunks == 1 ? p.state + at.state(p, m) : p.carries + at.carry(p, m));
  }
  const T *x = static_cast<const T *>(p.x);
#pragma unroll 4
  for (uint32_t row = at.first; row < at.last; row++) {
    float value[V];
    load<T, V>(value, x + at.row(p, row));
    advance<V>(p, b, value, e);
    if (p.levels == nullptr) continue;
#pragma unroll
    for (int m = 0; m < MAX_RATES; m++) {
      if (m >= p.rates_len) continue;
      const float factor = p.correct ? correction(log2_rate[m], count(p, row)) : 1.0f;
      float level[V];
#pragma unroll
      for (int v = 0; v < V; v++) level[v] = e[m][v] * factor;
      store<float, V>(p.levels + at.level(p, row, m), level);
    }
  }
  if (at.last == p.tokens) {
#pragma unroll
    for (int m = 0; m < MAX_RATES; m++)
      if (m < p.rates_len) store<float, V>(p.new_state + at.state(p, m), e[m]);
  }
}

// What each chunk but the first sends to its left from its own rows: Σ b^(t - first + 1) h_t.
template <int V> __device__ void backward_aggregate(const EmaParams &p) {
  const Place<V> at(p, blockIdx.y + 1);
  if (!at.inside) return;
  float b[MAX_RATES], log2_rate[MAX_RATES], g[MAX_RATES][V] = {};
  load_rates(p, b);
#pragma unroll
  for (int m = 0; m < MAX_RATES; m++) log2_rate[m] = log2f(b[m]);
#pragma unroll 4
  for (uint32_t row = at.last; row-- > at.first;) {
#pragma unroll
    for (int m = 0; m < MAX_RATES; m++) {
      if (m >= p.rates_len) continue;
      const float factor = p.correct ? correction(log2_rate[m], count(p, row)) : 1.0f;
      float d[V];
      load<float, V>(d, p.dlevels + at.level(p, row, m));
#pragma unroll
      for (int v = 0; v < V; v++) g[m][v] = b[m] * fmaf(d[v], factor, g[m][v]);
    }
  }
#pragma unroll
  for (int m = 0; m < MAX_RATES; m++)
    if (m < p.rates_len) store<float, V>(p.adjoints + at.carry(p, m), g[m]);
}

// From the last chunk to the first, as `carry`: adjoints[chunk] becomes what arrives at its last row from the right.
__device__ void backward_carry(const EmaParams &p) {
  const uint32_t channel = blockIdx.x * THREADS + threadIdx.x, m = blockIdx.y, batch = blockIdx.z;
  if (channel >= p.channels) return;
  const float log2_rate = log2f(p.rates[m]);
  const float power = exp2f(float(CHUNK) * log2_rate);
  const float last_power = exp2f(float(p.tokens - (p.chunks - 1) * CHUNK) * log2_rate);
  float g = p.dstate[(uint64_t(batch) * p.rates_len + m) * p.channels + channel];
  const uint64_t step = uint64_t(p.rates_len) * p.channels;
  float *to = p.adjoints + (uint64_t(batch) * p.chunks * p.rates_len + m) * p.channels + channel;
  for (uint32_t done = 0; done < p.chunks; done += 16) {
    float sums[16];
#pragma unroll
    for (uint32_t i = 0; i < 16; i++) sums[i] = done + i + 1 < p.chunks ? to[(p.chunks - 1 - done - i) * step] : 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < 16; i++) {
      if (done + i < p.chunks) to[(p.chunks - 1 - done - i) * step] = g;
      g = fmaf(done + i == 0 ? last_power : power, g, sums[i]);
    }
  }
}

template <typename T, int V> __device__ void backward(const EmaParams &p) {
  const Place<V> at(p, blockIdx.y);
  float slope[MAX_RATES] = {};
  if (at.inside) {
    float b[MAX_RATES], log2_rate[MAX_RATES], e[MAX_RATES][V] = {}, f[MAX_RATES][V] = {}, g[MAX_RATES][V] = {};
    load_rates(p, b);
    const T *x = static_cast<const T *>(p.x);
#pragma unroll
    for (int m = 0; m < MAX_RATES; m++) {
      log2_rate[m] = log2f(b[m]);
      if (m >= p.rates_len) continue;
      load<float, V>(e[m], p.carries + at.carry(p, m));
      load<float, V>(g[m], p.adjoints + at.carry(p, m));
    }
    for (uint32_t row = at.first; row < at.last; row++) {
      float value[V];
      load<T, V>(value, x + at.row(p, row));
#pragma unroll
      for (int m = 0; m < MAX_RATES; m++) {
        if (m >= p.rates_len) continue;
        const float factor = p.correct ? correction(log2_rate[m], count(p, row)) : 1.0f;
        const float factor_slope = p.correct ? correction_slope(log2_rate[m], count(p, row)) : 0.0f;
        float d[V];
        load<float, V>(d, p.dlevels + at.level(p, row, m));
#pragma unroll
        for (int v = 0; v < V; v++) {
          f[m][v] = fmaf(b[m], f[m][v], e[m][v] - value[v]);
          e[m][v] = fmaf(b[m], e[m][v], (1.0f - b[m]) * value[v]);
          slope[m] = fmaf(d[v], fmaf(factor, f[m][v], factor_slope * e[m][v]), slope[m]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < MAX_RATES; m++)
#pragma unroll
      for (int v = 0; v < V; v++) slope[m] = fmaf(g[m][v], f[m][v], slope[m]);
    T *dx = static_cast<T *>(p.dx);
    for (uint32_t row = at.last; row-- > at.first;) {
      float sum[V] = {};
#pragma unroll
      for (int m = 0; m < MAX_RATES; m++) {
        if (m >= p.rates_len) continue;
        const float factor = p.correct ? correction(log2_rate[m], count(p, row)) : 1.0f;
        float d[V];
        load<float, V>(d, p.dlevels + at.level(p, row, m));
#pragma unroll
        for (int v = 0; v < V; v++) {
          const float h = fmaf(d[v], factor, g[m][v]);
          sum[v] = fmaf(1.0f - b[m], h, sum[v]);
          g[m][v] = b[m] * h;
        }
      }
      store<T, V>(dx + at.row(p, row), sum);
    }
    if (at.chunk == 0) {
#pragma unroll
      for (int m = 0; m < MAX_RATES; m++)
        if (m < p.rates_len) store<float, V>(p.dstate_in + at.state(p, m), g[m]);
    }
  }
  __shared__ float sums[THREADS / 32][MAX_RATES];
#pragma unroll
  for (int m = 0; m < MAX_RATES; m++) {
    const float sum = warp_sum(slope[m]);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][m] = sum;
  }
  __syncthreads();
  if (threadIdx.x < p.rates_len) {
    float sum = 0.0f;
    for (int w = 0; w < THREADS / 32; w++) sum += sums[w][threadIdx.x];
    const uint64_t block = (uint64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    p.partial[threadIdx.x * p.partials + block] = sum;
  }
}

// One block a rate.
__device__ void sum_rates(const EmaParams &p) {
  float sum = 0.0f;
  for (uint64_t i = threadIdx.x; i < p.partials; i += THREADS) sum += p.partial[blockIdx.x * p.partials + i];
  __shared__ float sums[THREADS / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < THREADS / 32; w++) total += sums[w];
    p.drates[blockIdx.x] = total;
  }
}

#define KERNEL(name, body) \
  extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ EmaParams p) { body(p); }
#define TYPED(suffix, T, V)                           \
  KERNEL(ema_aggregate_##suffix##_##V, (aggregate<T, V>)) \
  KERNEL(ema_levels_##suffix##_##V, (levels<T, V>))       \
  KERNEL(ema_backward_##suffix##_##V, (backward<T, V>))

TYPED(f32, float, 1)
TYPED(f32, float, 4)
TYPED(bf16, __nv_bfloat16, 1)
TYPED(bf16, __nv_bfloat16, 4)
TYPED(f16, __half, 1)
TYPED(f16, __half, 4)
KERNEL(ema_backward_aggregate_1, backward_aggregate<1>)
KERNEL(ema_backward_aggregate_4, backward_aggregate<4>)
KERNEL(ema_carry, carry)
KERNEL(ema_backward_carry, backward_carry)
KERNEL(ema_sum_rates, sum_rates)
