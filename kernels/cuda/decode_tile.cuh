// One warp's part of a decode tile: 8 query rows against 16 keys of every page of its split, in registers.
//
// Scores and values are transposed products, so that the 8 rows are the N of m16n8k16 and the keys (then the columns
// of V) its M: Sᵀ = K Qᵀ, Oᵀ = Vᵀ Pᵀ. K and V go from global memory straight into fragments, 16 bytes a load: an inner
// product may take its terms in any order, so a lane's 16 bytes of a key are the k indices 2c, 2c+1, 2c+8, 2c+9 of two
// steps, with q loaded likewise; and V's 16 bytes are the rows r and r+8 of four tiles, two keys paired by a byte
// permutation.
#pragma once
#include "decode_params.cuh"
#include "mma_sm80.cuh"

// Warps of a block: 16 keys each of a page.
constexpr int WARPS = 4;
static_assert(WARPS * 16 == PAGE_TOKENS, "a page's keys are shared evenly");

// 8x8 matrix of 16-bit elements, transposed over the warp.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// N words of 32 bits; zeros where not valid. PINNED: in the order of the source; the assembler moves other loads freely,
// also behind products that wait for one before.
template <bool PINNED, int N>
__device__ __forceinline__ void load_words(uint32_t (&x)[N], const void *from, bool valid) {
  static_assert(N == 2 || N == 4, "8 or 16 bytes");
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = 0;
  if (!valid) return;
  if constexpr (PINNED && N == 4) {
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(from)
                 : "memory");
  } else if constexpr (PINNED) {
    asm volatile("ld.global.v2.u32 {%0,%1}, [%2];\n" : "=r"(x[0]), "=r"(x[1]) : "l"(from) : "memory");
  } else if constexpr (N == 4) {
    const uint4 y = __ldg(static_cast<const uint4 *>(from));
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  } else {
    const uint2 y = __ldg(static_cast<const uint2 *>(from));
    x[0] = y.x, x[1] = y.y;
  }
}

template <typename T, int D> struct DecodeTile {
  static_assert(D % 32 == 0, "chunks of 32 columns");
  static constexpr int CHUNKS = D / 32;
  // 32-bit words that a lane loads of each value, and blocks of 8 lanes that make a row.
  static constexpr int WORDS = D % 64 == 0 ? 4 : 2;
  static constexpr int BLOCKS = D / (16 * WORDS);
  // Whether loads keep their place and a page's entry is read a page early: at 256 either would spill 16 to 96 bytes.
  // As it is nothing spills on sm_90a, and on sm_80 20 bytes at 256 with the list in a table.
  static constexpr bool PINNED = D < 256;
  using Keys = uint32_t[CHUNKS][2][4];
  using Values = uint32_t[BLOCKS][4][WORDS];

  uint32_t q[CHUNKS][4];
  Visible sees0, sees1;
  TileView view;
  float scale;
  float o[BLOCKS][WORDS][4];
  float max0, max1, sum0, sum1;

  template <class List>
  __device__ __forceinline__ void begin(const DecodeParams<List> &p, uint32_t head, uint32_t row0, int r, int c) {
    const bool valid = row0 + r < p.t * p.group;
    const uint64_t row = valid ? output_row(p, head, row0 + r) : 0;
    const T *from = static_cast<const T *>(p.q) + row * D + c * 8;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) load_words<PINNED>(q[chunk], from + chunk * 32, valid);
    sees0 = visible_to_row(p, row0 + 2 * c), sees1 = visible_to_row(p, row0 + 2 * c + 1);
    view = view_of_tile(p, row0);
    scale = p.scale;
    max0 = max1 = -INFINITY, sum0 = sum1 = 0.0f;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
      for (int word = 0; word < WORDS; word++)
#pragma unroll
        for (int j = 0; j < 4; j++) o[block][word][j] = 0.0f;
  }

  // Adds the warp's 16 keys of page `now`, of which the lane's first is `key`; `k_is_free` runs when the scores no
  // longer need k.
  template <class Free>
  __device__ __forceinline__ void add(const Keys &k, const Values &v, const Page &now, int key, Free k_is_free) {
    // Two chains of products, so that one's latency hides the other's.
    float s[4] = {}, s_odd[4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const uint32_t even[4] = {k[chunk][0][0], k[chunk][1][0], k[chunk][0][1], k[chunk][1][1]};
      const uint32_t odd[4] = {k[chunk][0][2], k[chunk][1][2], k[chunk][0][3], k[chunk][1][3]};
      multiply<T>(s, even, q[chunk][0], q[chunk][1]);
      multiply<T>(s_odd, odd, q[chunk][2], q[chunk][3]);
    }
    k_is_free();
    // s[0], s[1]: key r, rows 2c and 2c+1; s[2], s[3]: key r+8.
#pragma unroll
    for (int j = 0; j < 4; j++) s[j] = fmaf(s[j] + s_odd[j], scale, now.bias);
    if (!view.all(now)) {
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

  // The warp's part into shared memory: 8 rows of D + 4 floats, then 8 maxima and 8 sums.
  __device__ __forceinline__ void store(float *part, float *maxima, float *sums) {
    const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      sum0 += __shfl_xor_sync(0xffffffffu, sum0, offset);
      sum1 += __shfl_xor_sync(0xffffffffu, sum1, offset);
    }
    if (r == 0) {
      maxima[2 * c] = max0, maxima[2 * c + 1] = max1;
      sums[2 * c] = sum0, sums[2 * c + 1] = sum1;
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
      for (int word = 0; word < WORDS; word++) {
        const int column = block * 16 * WORDS + r * 2 * WORDS + 2 * word;
        const float(&from)[4] = o[block][word];
        *reinterpret_cast<float2 *>(part + 2 * c * (D + 4) + column) = make_float2(from[0], from[2]);
        *reinterpret_cast<float2 *>(part + (2 * c + 1) * (D + 4) + column) = make_float2(from[1], from[3]);
      }
    }
  }
};

// The warp's 16 keys of a page from `block_row` of the pool on. `key`: the lane's first, 16 · warp + r.
template <typename T, int D>
__device__ __forceinline__ void load_keys(typename DecodeTile<T, D>::Keys &k, const void *pool, uint64_t block_row,
                                          const Page &page, uint32_t key, int c) {
  constexpr bool PINNED = DecodeTile<T, D>::PINNED;
  const T *from = static_cast<const T *>(pool) + (block_row + key) * D + c * 8;
#pragma unroll
  for (int chunk = 0; chunk < DecodeTile<T, D>::CHUNKS; chunk++) {
    load_words<PINNED>(k[chunk][0], from + chunk * 32, key < page.len);
    load_words<PINNED>(k[chunk][1], from + 8 * D + chunk * 32, key + 8 < page.len);
  }
}

// The values of the same keys. `key`: the lane's first, 16 · warp + 2c.
template <typename T, int D>
__device__ __forceinline__ void load_values(typename DecodeTile<T, D>::Values &v, const void *pool, uint64_t block_row,
                                            const Page &page, uint32_t key, int r) {
  constexpr int WORDS = DecodeTile<T, D>::WORDS, BLOCKS = DecodeTile<T, D>::BLOCKS;
  constexpr bool PINNED = DecodeTile<T, D>::PINNED;
  const T *from = static_cast<const T *>(pool) + (block_row + key) * D + r * 2 * WORDS;
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int offset = j / 2 * 8 + j % 2; // keys 2c, 2c+1, 2c+8, 2c+9
      load_words<PINNED>(v[block][j], from + offset * D + block * 16 * WORDS, key + offset < page.len);
    }
  }
}

// Adds the warp's keys of the split's pages to its tile. A page's K is asked for when the scores of the one before are
// there, its V when the one before is done, so that one of the two is under way at any time.
template <typename T, int D, class Params>
__device__ __forceinline__ void walk_pages(DecodeTile<T, D> &tile, const Params &p, uint32_t head, uint32_t split,
                                           uint32_t row0) {
  constexpr bool PINNED = DecodeTile<T, D>::PINNED;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const uint32_t key = warp * 16 + r, value = warp * 16 + 2 * c;
  const uint32_t begin = first_page(p, split), end = first_page(p, split + 1);
  typename DecodeTile<T, D>::Keys k;
  typename DecodeTile<T, D>::Values v;
  const auto row = [&](const Page &page) { return (uint64_t(page.slot) * p.g + head) * PAGE_TOKENS; };
  // Keys and values of the first page are asked for before anything else is known. `next`: a table's entry is there
  // before its keys are asked for.
  Page page = {}, next = {};
  if (begin < end) {
    page = page_at(p, begin);
    load_keys<T, D>(k, p.keys, row(page), page, key, c);
    if constexpr (PINNED) load_values<T, D>(v, p.values, row(page), page, value, r);
    if (PINNED && begin + 1 < end) next = page_at(p, begin + 1);
  }
  tile.begin(p, head, row0, r, c);
  for (uint32_t i = begin; i < end; i++) {
    const Page now = page;
    if constexpr (!PINNED) load_values<T, D>(v, p.values, row(now), now, value, r);
    tile.add(k, v, now, key, [&] {
      if (i + 1 < end) {
        page = PINNED ? next : page_at(p, i + 1);
        load_keys<T, D>(k, p.keys, row(page), page, key, c);
      }
      if (PINNED && i + 2 < end) next = page_at(p, i + 2);
    });
    // A branch of its own: the assembler would move the loads behind the products that wait for k.
    if constexpr (PINNED)
      if (i + 1 < end) load_values<T, D>(v, p.values, row(page), page, value, r);
  }
}
