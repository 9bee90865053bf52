// Attention of a few query rows over pages, bf16 and f16, for compute capability 9.0: paged_decode_sm80.cu with another
// end. out = softmax(q kᵀ · scale + bias) v, split over the pages.
//
// Block: (key/value head, split of the page list, tile of 8 query rows), 4 warps as there; 8 splits are a cluster.
// Row i of the tile belongs to block i of the cluster: each block hands every row to its owner through distributed
// shared memory, counted by a barrier of the owner, and the owner adds what it was handed in the order of the blocks.
// Where a head is one cluster nothing goes through memory and nothing is counted there; where it has several, their
// rows do, and the warp that arrives last adds them.
//
// Bound by memory, or where keys are few by the latency of its steps. 9/3 heads x 64 at 4,096 keys on an H200: 9.8 µs
// in 64 splits, where the end through memory takes 10.8 to 11.2. At head_dim 128 three blocks fit an SM, at 64 four,
// but clusters stay within a GPC: 45 and 62 of them at once on 132 SMs.
#include "decode_tile.cuh"

constexpr int CLUSTER = 8;
static_assert(CLUSTER == DECODE_ROWS, "row i of a tile belongs to block i of a cluster");

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(x));
  return x;
}
// All threads of all blocks meet, to know that the others run and that their barriers stand.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }

// The address that `address` of this block has in block `rank`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, uint32_t rank) {
  uint32_t x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(x) : "r"(address), "r"(rank));
  return x;
}
// Stores into another block, counted by a barrier of that block.
__device__ __forceinline__ void store_in_block(uint32_t to, const float4 &x, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];\n" ::"r"(to),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_in_block(uint32_t to, const float2 &x, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];\n" ::"r"(to),
               "f"(x.x), "f"(x.y), "r"(barrier)
               : "memory");
}
// Waits until every byte that the barrier expects is there.
__device__ __forceinline__ void wait_for_stores(uint32_t barrier) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                 "selp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(barrier)
                 : "memory");
}

// What a block is handed of its row: one part of every block of the cluster.
template <int D> struct Handed {
  float4 parts[CLUSTER][D / 4];
  float2 stats[CLUSTER]; // maximum, sum
  uint64_t barrier;
};

// Neighbouring elements of memory as one, past L1 where other blocks wrote them.
template <bool GLOBAL, typename V> __device__ __forceinline__ V load(const V *from) {
  if constexpr (GLOBAL) return __ldcg(from);
  else return *from;
}

// A row as one warp holds it, D / 32 neighbouring columns a lane, its maximum and sum.
template <int D> struct Row {
  static constexpr int N = D / 32;
  float x[N], top, total;

  // Adds `count` parts in their order, 32 at a time: rows of `stride` floats, and {maximum, sum} `stats_stride` apart.
  template <bool GLOBAL>
  __device__ __forceinline__ void add(const float *parts, uint64_t stride, const float2 *stats, uint32_t stats_stride,
                                      uint32_t count) {
    constexpr int FLIGHT = 8;
    const uint32_t lane = threadIdx.x % 32;
    top = -INFINITY, total = 0.0f;
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = 0.0f;
    for (uint32_t first = 0; first < count; first += 32) {
      const uint32_t n = min(count - first, 32u);
      float2 stat = make_float2(-INFINITY, 0.0f);
      if (lane < n) stat = load<GLOBAL>(stats + uint64_t(first + lane) * stats_stride);
      float part[FLIGHT][N];
      const auto fetch = [&](uint32_t i) {
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) {
          if (i + j >= n) continue;
          const float *from = parts + (first + i + j) * stride + lane * N;
          if constexpr (N % 2 == 0) {
#pragma unroll
            for (int k = 0; k < N; k += 2) {
              const float2 two = load<GLOBAL>(reinterpret_cast<const float2 *>(from + k));
              part[j][k] = two.x, part[j][k + 1] = two.y;
            }
          } else {
#pragma unroll
            for (int k = 0; k < N; k++) part[j][k] = load<GLOBAL>(from + k);
          }
        }
      };
      // The first parts fly while their weights are computed.
      fetch(0);
      const float new_top = fmaxf(top, warp_max(stat.x)), rescale = rescale_from(top, new_top);
      const float weight = stat.x == -INFINITY ? 0.0f : exp2f(stat.x - new_top);
      total = fmaf(total, rescale, warp_sum(weight * stat.y));
      top = new_top;
#pragma unroll
      for (int j = 0; j < N; j++) x[j] *= rescale;
      for (uint32_t i = 0; i < n; i += FLIGHT) {
        if (i > 0) fetch(i);
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) {
          const float w = __shfl_sync(0xffffffffu, weight, i + j);
          if (i + j >= n) continue;
#pragma unroll
          for (int k = 0; k < N; k++) x[k] = fmaf(w, part[j][k], x[k]);
        }
      }
    }
  }
};

template <class Params> __device__ __forceinline__ uint32_t rows_of_tile(const Params &p, uint32_t tile) {
  return min(p.t * p.group - tile * DECODE_ROWS, uint32_t(DECODE_ROWS));
}

// Readies the barrier that counts what this block is handed, and tells the cluster; finish_cluster waits for the others.
template <int D> __device__ __forceinline__ void open_cluster(Handed<D> &handed, uint32_t rows) {
  if (threadIdx.x == 0 && cluster_rank() < rows) {
    const uint32_t barrier = shared_address(&handed.barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier),
                 "n"(CLUSTER * (D * 4 + 8))
                 : "memory");
  }
  __syncwarp();
  cluster_arrive();
}

// The parts of this block's warps to the output. All threads of the cluster call it after open_cluster, once the parts
// are visible to the block.
template <typename T, int D, class Params>
__device__ __forceinline__ void finish_cluster(const Params &p, uint32_t head, uint32_t tile,
                                               const float (&parts)[WARPS][DECODE_ROWS][D + 4],
                                               const float (&maxima)[WARPS][DECODE_ROWS],
                                               const float (&sums)[WARPS][DECODE_ROWS], Handed<D> &handed) {
  constexpr int N = D / 32;
  const uint32_t rank = cluster_rank(), rows = rows_of_tile(p, tile), lane = threadIdx.x % 32;
  const uint32_t barrier = shared_address(&handed.barrier);
  cluster_wait();
  for (uint32_t i = threadIdx.x; i < rows * (D / 4); i += WARPS * 32) {
    const uint32_t row = i / (D / 4), column = i % (D / 4);
    float top = maxima[0][row];
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, maxima[w][row]);
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float own = maxima[w][row], weight = own == -INFINITY ? 0.0f : exp2f(own - top);
      const float4 y = *reinterpret_cast<const float4 *>(&parts[w][row][column * 4]);
      x.x = fmaf(weight, y.x, x.x), x.y = fmaf(weight, y.y, x.y);
      x.z = fmaf(weight, y.z, x.z), x.w = fmaf(weight, y.w, x.w);
      sum = fmaf(weight, sums[w][row], sum);
    }
    const uint32_t counted = address_in_block(barrier, row);
    store_in_block(address_in_block(shared_address(&handed.parts[rank][column]), row), x, counted);
    if (column == 0)
      store_in_block(address_in_block(shared_address(&handed.stats[rank]), row), make_float2(top, sum), counted);
  }
  // One warp adds the block's row; nobody writes to the shared memory of a block that owns none.
  if (threadIdx.x >= 32 || rank >= rows) return;
  wait_for_stores(barrier);
  Row<D> own;
  own.template add<false>(reinterpret_cast<const float *>(handed.parts), D, handed.stats, 1, CLUSTER);

  const uint32_t clusters = p.splits / CLUSTER, cluster = blockIdx.y / CLUSTER, row = tile * DECODE_ROWS + rank;
  if (clusters > 1) {
    const uint64_t first = (uint64_t(head) * p.tiles + tile) * clusters * DECODE_ROWS + rank;
    float *all = p.partial + first * D;
    float2 *stats = reinterpret_cast<float2 *>(p.partial + uint64_t(p.g) * p.tiles * clusters * DECODE_ROWS * D) + first;
    float *to = all + uint64_t(cluster) * DECODE_ROWS * D + lane * N;
#pragma unroll
    for (int j = 0; j < N; j++) to[j] = own.x[j];
    if (lane == 0) stats[cluster * DECODE_ROWS] = make_float2(own.top, own.total);
    __syncwarp();
    uint32_t arrived = 0;
    if (lane == 0) {
      uint32_t *counter = p.counters + head * p.t * p.group + row;
      // The warp met after its stores, the fences take them to the last warp.
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      arrived = atomicAdd(counter, 1u) + 1;
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      if (arrived == clusters) *counter = 0;
    }
    __syncwarp();
    if (__shfl_sync(0xffffffffu, arrived, 0) != clusters) return;
    own.template add<true>(all, DECODE_ROWS * D, stats, DECODE_ROWS, clusters);
  }
  const float scale = own.total > 0.0f ? 1.0f / own.total : 0.0f;
  const uint64_t at = output_row(p, head, row);
  T *to = static_cast<T *>(p.out) + at * D + lane * N;
#pragma unroll
  for (int j = 0; j < N; j++) own.x[j] *= scale;
  if constexpr (N % 2 == 0) {
#pragma unroll
    for (int j = 0; j < N; j += 2) reinterpret_cast<uint32_t *>(to)[j / 2] = pack<T>(own.x[j], own.x[j + 1]);
  } else {
#pragma unroll
    for (int j = 0; j < N; j++) to[j] = from_float<T>(own.x[j]);
  }
  if (lane == 0) p.lse[at] = own.total > 0.0f ? own.top * 0.693147180559945f + logf(own.total) : -INFINITY;
}

template <typename T, int D, class Params> __device__ __forceinline__ void decode(const Params &p) {
  __shared__ __align__(16) float parts[WARPS][DECODE_ROWS][D + 4];
  __shared__ float part_max[WARPS][DECODE_ROWS], part_sum[WARPS][DECODE_ROWS];
  __shared__ Handed<D> handed;
  const uint32_t head = blockIdx.x, split = blockIdx.y, tile_idx = blockIdx.z;
  const int warp = threadIdx.x / 32;
  open_cluster(handed, rows_of_tile(p, tile_idx));
  DecodeTile<T, D> tile;
  walk_pages(tile, p, head, split, tile_idx * DECODE_ROWS);
  tile.store(&parts[warp][0][0], part_max[warp], part_sum[warp]);
  __syncthreads();
  finish_cluster<T, D>(p, head, tile_idx, parts, part_max, part_sum, handed);
}

// At head_dim 256 the walk and the clusters together would spill 8 bytes.
#define KERNEL(list, List, type, T, D, BLOCKS) \
  extern "C" __global__ void __cluster_dims__(1, CLUSTER, 1) __launch_bounds__(WARPS * 32, BLOCKS) \
      paged_decode_##list##_##type##_##D(const __grid_constant__ DecodeParams<List> p) { \
    decode<T, D>(p); \
  }
#define KERNEL_LIST(list, List, type, T) \
  KERNEL(list, List, type, T, 64, 4) \
  KERNEL(list, List, type, T, 96, 4) \
  KERNEL(list, List, type, T, 128, 2)
#define KERNEL_TYPE(type, T) KERNEL_LIST(inline, InlinePages, type, T) KERNEL_LIST(table, TablePages, type, T)
KERNEL_TYPE(bf16, __nv_bfloat16)
KERNEL_TYPE(f16, __half)
