// Attention of a few query rows over pages, bf16 and f16: out = softmax(q kᵀ · scale + bias) v, split over the pages.
//
// Block: (key/value head, split of the page list, tile of 8 query rows), 4 warps; warp w takes keys 16w..16w+15 of
// every page, with a softmax of its own. Scores and values are transposed products, so that the 8 rows are the N of
// m16n8k16 and the keys (then the columns of V) its M: Sᵀ = K Qᵀ, Oᵀ = Vᵀ Pᵀ. K and V go from global memory straight
// into fragments, 16 bytes a load: an inner product may take its terms in any order, so a lane's 16 bytes of a key
// are the k indices 2c, 2c+1, 2c+8, 2c+9 of two steps, with q loaded likewise; and V's 16 bytes are the rows r and
// r+8 of four tiles, two keys paired by a byte permutation. No shared memory until the warps' parts meet.
//
// Bound by memory. A warp has 4 KiB of V and 4 KiB of the next page's K in flight at d = 128; registers there: O 32,
// Q 16, K 32, V 32, and about 40 more, so that three blocks fit an SM: up to 96 KiB in flight, where 3.35 TB/s over
// 132 SMs need about 20.
#include "mma_sm80.cuh"
#include "paged.cuh"

constexpr int WARPS = 4;

// 8x8 matrix of 16-bit elements, transposed over the warp.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// N words of 32 bits, read once; zeros where not valid.
template <int N> __device__ __forceinline__ void load_words(uint32_t (&x)[N], const void *from, bool valid) {
  static_assert(N == 2 || N == 4, "8 or 16 bytes");
  if constexpr (N == 4) {
    uint4 y = make_uint4(0, 0, 0, 0);
    if (valid) y = __ldg(static_cast<const uint4 *>(from));
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  } else {
    uint2 y = make_uint2(0, 0);
    if (valid) y = __ldg(static_cast<const uint2 *>(from));
    x[0] = y.x, x[1] = y.y;
  }
}

template <typename T, int D> __device__ __forceinline__ void decode(const PagedParams &p) {
  static_assert(D % 32 == 0, "chunks of 32 columns");
  constexpr int CHUNKS = D / 32;
  // 32-bit words that a lane loads of each value, and blocks of 8 lanes that make a row.
  constexpr int WORDS = D % 64 == 0 ? 4 : 2;
  constexpr int BLOCKS = D / (16 * WORDS);
  constexpr int STRIDE = D + 4;
  static_assert(WARPS * DECODE_ROWS * STRIDE >= DECODE_ROWS * MAX_SPLITS, "weights of the splits fit the parts");
  __shared__ __align__(16) float parts[WARPS][DECODE_ROWS][STRIDE];
  __shared__ float part_max[WARPS][DECODE_ROWS], part_sum[WARPS][DECODE_ROWS];
  __shared__ float tile_max[DECODE_ROWS], tile_sum[DECODE_ROWS];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r = lane / 4, c = lane % 4;
  const uint32_t head = blockIdx.x, split = blockIdx.y, tile = blockIdx.z;
  const uint32_t row0 = tile * DECODE_ROWS;
  const T *keys = static_cast<const T *>(p.keys), *values = static_cast<const T *>(p.values);

  uint32_t q[CHUNKS][4];
  {
    const bool valid = row0 + r < p.t * p.group;
    const uint64_t row = valid ? output_row(p, head, row0 + r) : 0;
    const T *from = static_cast<const T *>(p.q) + row * D + c * 8;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) load_words(q[chunk], from + chunk * 32, valid);
  }
  const Visible sees0 = visible_to_row(p, row0 + 2 * c), sees1 = visible_to_row(p, row0 + 2 * c + 1);
  const TileView view = view_of_rows(p, row0, DECODE_ROWS);

  float o[BLOCKS][WORDS][4] = {};
  float max0 = -INFINITY, max1 = -INFINITY, sum0 = 0.0f, sum1 = 0.0f;
  uint32_t k[CHUNKS][2][4];

  const uint32_t begin = uint32_t(uint64_t(p.num_pages) * split / p.splits);
  const uint32_t end = uint32_t(uint64_t(p.num_pages) * (split + 1) / p.splits);
  const auto load_keys = [&](const Page &page) {
    const uint32_t key = warp * 16 + r;
    const T *from = keys + ((uint64_t(page.slot) * p.g + head) * PAGE_TOKENS + key) * D + c * 8;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      load_words(k[chunk][0], from + chunk * 32, key < page.len);
      load_words(k[chunk][1], from + 8 * D + chunk * 32, key + 8 < page.len);
    }
  };
  Page page = {};
  if (begin < end) {
    page = page_at(p, begin);
    load_keys(page);
  }
  for (uint32_t i = begin; i < end; i++) {
    uint32_t v[BLOCKS][4][WORDS];
    {
      const uint32_t key = warp * 16 + 2 * c;
      const T *from = values + ((uint64_t(page.slot) * p.g + head) * PAGE_TOKENS + key) * D + r * 2 * WORDS;
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int offset = j / 2 * 8 + j % 2; // keys 2c, 2c+1, 2c+8, 2c+9
          load_words(v[block][j], from + offset * D + block * 16 * WORDS, key + offset < page.len);
        }
      }
    }
    // Two chains of products, so that one's latency hides the other's.
    float s[4] = {}, s_odd[4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const uint32_t even[4] = {k[chunk][0][0], k[chunk][1][0], k[chunk][0][1], k[chunk][1][1]};
      const uint32_t odd[4] = {k[chunk][0][2], k[chunk][1][2], k[chunk][0][3], k[chunk][1][3]};
      multiply<T>(s, even, q[chunk][0], q[chunk][1]);
      multiply<T>(s_odd, odd, q[chunk][2], q[chunk][3]);
    }
    const Page now = page;
    if (i + 1 < end) {
      page = page_at(p, i + 1);
      load_keys(page);
    }
    // s[0], s[1]: key r, rows 2c and 2c+1; s[2], s[3]: key r+8.
#pragma unroll
    for (int j = 0; j < 4; j++) s[j] = fmaf(s[j] + s_odd[j], p.scale, now.bias);
    if (!view.all(now)) {
      const int key = warp * 16 + r;
      const bool low = key < int(now.len), high = key + 8 < int(now.len);
      if (!low || !sees0.sees(now.start + key)) s[0] = -INFINITY;
      if (!low || !sees1.sees(now.start + key)) s[1] = -INFINITY;
      if (!high || !sees0.sees(now.start + key + 8)) s[2] = -INFINITY;
      if (!high || !sees1.sees(now.start + key + 8)) s[3] = -INFINITY;
    }
    float top0 = fmaxf(s[0], s[2]), top1 = fmaxf(s[1], s[3]);
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      top0 = fmaxf(top0, __shfl_xor_sync(0xffffffffu, top0, offset));
      top1 = fmaxf(top1, __shfl_xor_sync(0xffffffffu, top1, offset));
    }
    top0 = fmaxf(top0, max0), top1 = fmaxf(top1, max1);
    const float rescale0 = rescale_from(max0, top0), rescale1 = rescale_from(max1, top1);
    max0 = top0, max1 = top1;
    const float base0 = top0 == -INFINITY ? 0.0f : top0, base1 = top1 == -INFINITY ? 0.0f : top1;
    s[0] = exp2f(s[0] - base0), s[2] = exp2f(s[2] - base0);
    s[1] = exp2f(s[1] - base1), s[3] = exp2f(s[3] - base1);
    sum0 = fmaf(sum0, rescale0, s[0] + s[2]);
    sum1 = fmaf(sum1, rescale1, s[1] + s[3]);
    const uint32_t p0 = transpose_8x8(pack<T>(s[0], s[1])), p1 = transpose_8x8(pack<T>(s[2], s[3]));
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
      for (int word = 0; word < WORDS; word++) {
        float(&to)[4] = o[block][word];
        to[0] *= rescale0, to[1] *= rescale1, to[2] *= rescale0, to[3] *= rescale1;
        const uint32_t a[4] = {__byte_perm(v[block][0][word], v[block][1][word], 0x5410),
                               __byte_perm(v[block][0][word], v[block][1][word], 0x7632),
                               __byte_perm(v[block][2][word], v[block][3][word], 0x5410),
                               __byte_perm(v[block][2][word], v[block][3][word], 0x7632)};
        multiply<T>(to, a, p0, p1);
      }
    }
  }

#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    sum0 += __shfl_xor_sync(0xffffffffu, sum0, offset);
    sum1 += __shfl_xor_sync(0xffffffffu, sum1, offset);
  }
  if (r == 0) {
    part_max[warp][2 * c] = max0, part_max[warp][2 * c + 1] = max1;
    part_sum[warp][2 * c] = sum0, part_sum[warp][2 * c + 1] = sum1;
  }
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
      const int column = block * 16 * WORDS + r * 2 * WORDS + 2 * word;
      const float(&from)[4] = o[block][word];
      *reinterpret_cast<float2 *>(&parts[warp][2 * c][column]) = make_float2(from[0], from[2]);
      *reinterpret_cast<float2 *>(&parts[warp][2 * c + 1][column]) = make_float2(from[1], from[3]);
    }
  }
  __syncthreads();
  // The four parts into the first, in the order of the warps.
  for (int i = threadIdx.x; i < DECODE_ROWS * D; i += WARPS * 32) {
    const int row = i / D, column = i % D;
    float top = part_max[0][row];
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, part_max[w][row]);
    float x = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float weight = part_max[w][row] == -INFINITY ? 0.0f : exp2f(part_max[w][row] - top);
      x = fmaf(weight, parts[w][row][column], x);
      sum = fmaf(weight, part_sum[w][row], sum);
    }
    parts[0][row][column] = x;
    if (column == 0) tile_max[row] = top, tile_sum[row] = sum;
  }
  __syncthreads();
  finish_split<T, D, WARPS * 32>(p, head, tile, split, &parts[0][0][0], STRIDE, tile_max, tile_sum, &parts[0][0][0]);
}

// Blocks of an SM, as the splits of the host count them.
#define KERNEL(name, T, D, BLOCKS) \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) name(const __grid_constant__ PagedParams p) { \
    decode<T, D>(p); \
  }
#define KERNEL_TYPE(name, T) \
  KERNEL(name##_64, T, 64, 4) KERNEL(name##_96, T, 96, 4) KERNEL(name##_128, T, 128, 3) KERNEL(name##_256, T, 256, 2)
KERNEL_TYPE(paged_decode_bf16, __nv_bfloat16)
KERNEL_TYPE(paged_decode_f16, __half)
