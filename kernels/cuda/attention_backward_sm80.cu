// Dense attention, backward, bf16 and f16. With P = e^(scores - lse), dP = dout vᵀ and dS = P ∘ (dP - delta):
//   dv = Pᵀ dout, dk = scale · dSᵀ q, dq = scale · dS k, delta = rowsum(dout ∘ out) - dlse.
// FlashAttention-2 (arXiv 2307.08691), algorithm 2, with two differences: the transposed scores are what is computed,
// so that Pᵀ and dSᵀ are left operands in the layout in which a warp has them; and a block walks several query heads
// of its key/value head, so that it sums dk and dv in registers and writes them once. Where blocks that walk all of
// them are fewer than keep a card busy, the heads are split among blocks, whose sums a last kernel adds in their order.
//
// attention_backward_rows: per query row {lse · log2 e, delta}; bound by memory.
// attention_backward_kv: a block owns KEYS keys, a warp 16·MT of them, and walks the queries that see them in tiles of
//   ROWS, in turn of SUB rows: four products.
//   Where two warps are partners they own the same 32 keys. Each computes P and dS of its half of a walked tile's rows,
//   hands them to the other through shared memory, and sums half of the columns of dk and dv. What bounds the products
//   are the fragments that pass through shared memory (512 bytes, 4 clocks each): a warp reads 104 and writes 8 for the
//   256 products of a tile at d = 128, where 16 keys and all columns a warp read 160. On an H200 that is 12.2 ms for
//   15.5 (4 x 8192).
//   "_alone" is without partners and takes less shared memory: it is for cards whose blocks get 99 KiB (sm_86, sm_89,
//   sm_120), and has not been timed on one.
// attention_backward_q: a block owns rows of queries, a warp 16·MT of them, and walks their keys: three products.
// Seven products instead of five, but no atomics: equal inputs give equal bits, and on an H100, before partners, this
// was 1.03 to 1.17 times as fast as adding dq to an f32 buffer from the kv kernel (kernels/docs/attention.md).
// Tiles are double-buffered through cp.async, one barrier of the block a tile; partners meet once more.
//
// | kernel | d | stationary x walked (at once) | warps | shared memory | accumulators a thread |
// |---|---|---|---|---|---|
// | kv | 64 | 128 keys x 64 rows (32) | 4 | k v 32 + q dout 2·16 = 64 KiB | 64 + 64 + 32 + 32 |
// | kv, partners | 96 | 128 x 64 (32 a warp) | 8 | 48 + 2·24 + P dS 32 = 128 KiB | 48 + 48 + 32 + 32 |
// | kv, partners | 128 | 128 x 64 (32 a warp) | 8 | 64 + 2·32 + 32 = 160 KiB | 64 + 64 + 32 + 32 |
// | kv, alone | 96 | 128 x 64 (32) | 8 | 48 + 2·24 = 96 KiB | 48 + 48 + 16 + 16 |
// | kv, alone | 128 | 128 x 32 (32) | 8 | 64 + 2·16 = 96 KiB | 64 + 64 + 16 + 16 |
// | kv, dk and dv apart | 256 | 128 x 16 (16) | 8 | 128 + 2·16 = 160 KiB | 128 + 8 + 8 |
// | q | 64 | 128 rows x 64 keys (32) | 4 | q dout 32 + k v 2·16 = 64 KiB | 64 + 32 + 32 |
// | q | 96 | 128 x 32 (32) | 4 | 48 + 2·12 = 72 KiB | 96 + 32 + 32 |
// | q | 128 | 128 x 32 (32) | 4 | 64 + 2·16 = 96 KiB | 128 + 32 + 32 |
// | q | 256 | 128 x 16 (16) | 8 | 128 + 2·16 = 160 KiB | 128 + 8 + 8 |
// The kv kernels take 16 bytes a walked row more for {lse, delta}. Two blocks of 4 warps run on a multiprocessor of
// Hopper; on one of an A100 (164 KiB in all) two at d = 64 and 96, one at 128. At d = 256 both gradients of 16 keys
// would be 256 registers: dk and dv are two launches there, five products for four.
#include "attention_tile.cuh"

struct AttentionBackwardSplitParams {
  AttentionBackwardParams p;
  // (2, splits, b, tk, g, d): dk, then dv, of each split; null where there is one.
  float *parts;
  // Blocks that share the query heads of a key/value head; divides their number.
  int32_t splits;
  // Whether the blocks of one tile of all heads lie together, so that the longest ones come first and none is left alone
  // at the end; else the tiles of a head do, which then share what they walk in the cache.
  int32_t by_tile;

  // The tile and the head that a block works on, of `heads` in all.
  __device__ __forceinline__ int2 place(int block, int num_tiles, int heads) const {
    return by_tile ? make_int2(block / heads, block % heads) : make_int2(block % num_tiles, block / num_tiles);
  }
};

// The keys of a block of the kernel of dk and dv. The first come first: under a causal mask the most queries see them.
struct KeysPlace {
  int key0, split, kv_head, batch;

  __device__ __forceinline__ KeysPlace(const AttentionBackwardSplitParams &all, int block, int keys) {
    const AttentionShape &shape = all.p.shape;
    const int num_tiles = (shape.key_tokens + keys - 1) / keys;
    const int2 place = all.place(block, num_tiles, shape.batch * shape.kv_heads * all.splits);
    key0 = place.x * keys;
    split = place.y % all.splits;
    kv_head = place.y / all.splits % shape.kv_heads;
    batch = place.y / all.splits / shape.kv_heads;
  }

  // Element of k or v where its head's first key lies.
  __device__ __forceinline__ int64_t start(const AttentionShape &shape, int d) const {
    return (int64_t(batch) * shape.key_tokens * shape.kv_heads + kv_head) * d;
  }
};

enum Gradients { KEYS_AND_VALUES, KEYS_ONLY, VALUES_ONLY };

// Shared memory that a block of an A100 may have: the least of the cards with machine code of their own.
constexpr int MAX_BYTES = 163 * 1024;

// Starts the copy of {lse · log2 e, delta} of ROWS query rows. Zeros stand for rows past the end: their q and dout are
// zeros too, so that P = 1 and dS = 1 · (0 - 0) meet zeros in every product.
template <int ROWS> __device__ __forceinline__ void load_rows(uint32_t to, const float2 *from, int first, int limit) {
  if (threadIdx.x < ROWS) {
    const int row = first + threadIdx.x, bytes = row < limit ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(to + 8 * threadIdx.x),
                 "l"(from + (row < limit ? row : 0)), "r"(bytes));
  }
}

// Accumulators as they are, to the rows of a split: 32 bytes of a row at once.
template <int D, int MT, int PARTNERS>
__device__ __forceinline__ void store_part(const float (&x)[MT][D / 8 / PARTNERS][4], float *to, int stride, int first,
                                           int limit, int part) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * m + 8 * half + lane / 4;
      if (row >= limit) continue;
#pragma unroll
      for (int n = 0; n < D / 8 / PARTNERS; ++n)
        *reinterpret_cast<float2 *>(to + int64_t(row) * stride + column_of<PARTNERS>(n, part) + lane % 4 * 2) =
            make_float2(x[m][n][2 * half], x[m][n][2 * half + 1]);
    }
}

// dk and dv from the sums of the splits, in their order; four values a thread, dv in the second half of the grid.
template <typename T> __device__ void attention_backward_sum(const AttentionBackwardSplitParams &all) {
  const AttentionBackwardParams &p = all.p;
  const AttentionShape &shape = p.shape;
  const int64_t part = int64_t(shape.batch) * shape.key_tokens * shape.kv_heads * p.d;
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= part) return;
  const float *from = all.parts + (blockIdx.y * all.splits) * part + at;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  for (int split = 0; split < all.splits; ++split) {
    float x[4];
    load_floats(from + split * part, x);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += x[e];
  }
  store_floats(static_cast<T *>(blockIdx.y == 0 ? p.dk : p.dv) + at, sum);
}

// In place, P of transposed scores, and dS of dP; `stats` are {lse · log2 e, delta} of the columns.
template <bool WITH_DS, int MT, int NT, int DS_MT>
__device__ __forceinline__ void weigh(float (&scores)[MT][NT][4], float (&ds)[DS_MT][NT][4], const uint8_t *stats,
                                      float to_exp2) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    // Columns 2·(lane%4) and the next of each 8: the numbers of both in one load.
    const float4 pair = reinterpret_cast<const float4 *>(stats)[4 * n + threadIdx.x % 4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[m][n][e] = exp2_fast(fmaf(scores[m][n][e], to_exp2, -(e % 2 == 0 ? pair.x : pair.z)));
        if constexpr (WITH_DS) ds[m][n][e] = scores[m][n][e] * (ds[m][n][e] - (e % 2 == 0 ? pair.y : pair.w));
      }
  }
}

// The gradients of a block's keys: dk and dv through the room of the keys and values, or their sums of this split.
template <typename T, int D, int PARTNERS, int MT, Gradients WHICH, int DK_MT, int DV_MT>
__device__ __forceinline__ void store_gradients(const AttentionBackwardSplitParams &all, const KeysPlace &to,
                                                int kv_stride, const float (&dk)[DK_MT][D / 8 / PARTNERS][4],
                                                const float (&dv)[DV_MT][D / 8 / PARTNERS][4], uint8_t *keys,
                                                uint8_t *values, int warp_row, int part) {
  constexpr bool WITH_KEYS = WHICH != VALUES_ONLY, WITH_VALUES = WHICH != KEYS_ONLY;
  const AttentionBackwardParams &p = all.p;
  const AttentionShape &shape = p.shape;
  const int64_t kv_start = to.start(shape, D);
  if (all.splits > 1) {
    const int64_t size = int64_t(shape.batch) * shape.key_tokens * kv_stride;
    float *sums = all.parts + to.split * size + kv_start;
    if constexpr (WITH_KEYS)
      store_part<D, MT, PARTNERS>(dk, sums, kv_stride, to.key0 + warp_row, shape.key_tokens, part);
    if constexpr (WITH_VALUES)
      store_part<D, MT, PARTNERS>(dv, sums + all.splits * size, kv_stride, to.key0 + warp_row, shape.key_tokens, part);
    return;
  }
  __syncthreads(); // No warp reads the keys any more: they are the room through which the gradients leave.
  if constexpr (WITH_VALUES)
    store_rows<T, D, MT, PARTNERS>(dv, values, warp_row, static_cast<T *>(p.dv) + kv_start, kv_stride, to.key0,
                                   shape.key_tokens, part);
  if constexpr (WITH_KEYS)
    store_rows<T, D, MT, PARTNERS>(dk, keys, warp_row, static_cast<T *>(p.dk) + kv_start, kv_stride, to.key0,
                                   shape.key_tokens, part);
}

template <typename T, int D, int WARPS, int PARTNERS, int MT, int ROWS, int SUB, Gradients WHICH, int LAUNCHED_BYTES>
__device__ __forceinline__ void attention_backward_kv(const AttentionBackwardSplitParams &all) {
  const AttentionBackwardParams &p = all.p;
  constexpr bool WITH_KEYS = WHICH != VALUES_ONLY, WITH_VALUES = WHICH != KEYS_ONLY;
  constexpr int THREADS = 32 * WARPS, KEYS = 16 * MT * WARPS / PARTNERS, NT = SUB / 8;
  static_assert(ROWS <= THREADS && ROWS % SUB == 0 && SUB % 16 == 0, "a walked tile is whole sub-tiles");
  static_assert(PARTNERS == 1 || (PARTNERS == 2 && ROWS == 2 * SUB && WHICH == KEYS_AND_VALUES),
                "a half of a walked tile each; the rooms are written once a step");
  // In bytes: keys, values, then q, dout and {lse, delta} twice.
  constexpr int K = 0, V = K + TILE_BYTES<KEYS, D>, Q = V + TILE_BYTES<KEYS, D>;
  constexpr int DOUT = Q + 2 * TILE_BYTES<ROWS, D>, STATS = DOUT + 2 * TILE_BYTES<ROWS, D>;
  // Rooms of each two partners: P of the rows of one and of the other, then dS.
  constexpr int ROOM = STATS + 2 * 8 * ROWS, HALF_ROOM = 16 * MT * SUB * 2;
  constexpr int BYTES = ROOM + (PARTNERS == 2 ? WARPS / PARTNERS * 4 * HALF_ROOM : 0);
  static_assert(BYTES == LAUNCHED_BYTES && BYTES <= MAX_BYTES, "what a launch asks for, of what the card has");
  static_assert(PARTNERS == 1 || WARPS / PARTNERS < 16, "a named barrier for each two partners, beside the block's");
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const AttentionShape &shape = p.shape;
  const int warp = threadIdx.x / 32;
  const int pair = warp / PARTNERS, part = warp % PARTNERS, warp_row = pair * 16 * MT;
  const uint32_t room = shared + ROOM + pair * 4 * HALF_ROOM;

  const KeysPlace place(all, blockIdx.x, KEYS);
  const int key0 = place.key0, batch = place.batch;
  const int q_stride = shape.query_heads * D, kv_stride = shape.kv_heads * D;
  const int64_t q_start = int64_t(batch) * shape.query_tokens * q_stride;
  const int group = shape.query_heads / shape.kv_heads / all.splits; // query heads of this block
  const int end_row = shape.end_row(key0 + KEYS), first_row = shape.first_row(key0) / ROWS * ROWS;
  const float to_exp2 = shape.scale * LOG2_E;

  const auto load_rows_of = [&](int head, int row0, int buffer) {
    const int64_t start = q_start + int64_t(head) * D;
    load_tile<T, D, ROWS, THREADS>(shared + Q + buffer * TILE_BYTES<ROWS, D>, static_cast<const T *>(p.q) + start,
                                   q_stride, row0, shape.query_tokens);
    load_tile<T, D, ROWS, THREADS>(shared + DOUT + buffer * TILE_BYTES<ROWS, D>,
                                   static_cast<const T *>(p.dout) + start, q_stride, row0, shape.query_tokens);
    load_rows<ROWS>(shared + STATS + buffer * ROWS * 8,
                    p.rows + (int64_t(batch) * shape.query_heads + head) * shape.query_tokens, row0,
                    shape.query_tokens);
  };

  float dk[WITH_KEYS ? MT : 1][D / 8 / PARTNERS][4], dv[WITH_VALUES ? MT : 1][D / 8 / PARTNERS][4];
  if constexpr (WITH_KEYS) clear(dk);
  if constexpr (WITH_VALUES) clear(dv);

  // The tiles of one query head after those of another; none where no row sees these keys.
  int head = (place.kv_head * all.splits + place.split) * group, row0 = first_row, buffer = 0;
  const int end_head = first_row < end_row ? head + group : head;
  if (head < end_head) {
    const int64_t kv_start = place.start(shape, D);
    load_tile<T, D, KEYS, THREADS>(shared + K, static_cast<const T *>(p.k) + kv_start, kv_stride, key0,
                                   shape.key_tokens);
    if constexpr (WITH_KEYS)
      load_tile<T, D, KEYS, THREADS>(shared + V, static_cast<const T *>(p.v) + kv_start, kv_stride, key0,
                                     shape.key_tokens);
    load_rows_of(head, row0, 0);
    copy_commit();
  }
  while (head < end_head) {
    copy_wait<0>();
    __syncthreads(); // This step's tiles are there, and no warp reads those of the step before any more.
    const bool last_of_head = row0 + ROWS >= end_row;
    const int next_row0 = last_of_head ? first_row : row0 + ROWS;
    head += last_of_head;
    if (head < end_head) {
      load_rows_of(head, next_row0, buffer ^ 1);
      copy_commit();
    }
    const uint32_t q_tile = shared + Q + buffer * TILE_BYTES<ROWS, D>;
    const uint32_t dout_tile = shared + DOUT + buffer * TILE_BYTES<ROWS, D>;
    const bool edge = shape.is_edge(row0, ROWS, key0, KEYS);

    // Not unrolled: the sub-tiles of a step would share registers that there are none of.
#pragma unroll 1
    for (int sub = 0; sub < ROWS; sub += SUB * PARTNERS) {
      const int own = sub + SUB * part;
      float scores[MT][NT][4]; // transposed: rows are keys, columns are queries
      clear(scores);
      multiply_rows<T, D, MT, NT>(scores, shared + K, warp_row, q_tile, own);
      if (edge) hide(scores, key0 + warp_row, row0 + own, [&](int key) { return shape.rows_of(key); });
      float ds[WITH_KEYS ? MT : 1][NT][4];
      if constexpr (WITH_KEYS) {
        clear(ds);
        multiply_rows<T, D, MT, NT>(ds, shared + V, warp_row, dout_tile, own);
      }

      weigh<WITH_KEYS>(scores, ds, memory + STATS + (buffer * ROWS + own) * 8, to_exp2);

      // Left operands of dv and dk: the columns of this warp's rows, then those of its partner's.
      uint32_t left[MT][NT / 2][4], left_ds[MT][NT / 2][4];
      if constexpr (WITH_VALUES) as_left<T>(left, scores);
      if constexpr (WITH_KEYS) as_left<T>(left_ds, ds);
      if constexpr (PARTNERS == 2) {
        give_left(left, room + part * HALF_ROOM);
        give_left(left_ds, room + (2 + part) * HALF_ROOM);
      }
      if constexpr (WITH_VALUES) multiply_columns<T, D, MT, NT / 2, PARTNERS>(dv, left, dout_tile, own, part);
      if constexpr (WITH_KEYS) multiply_columns<T, D, MT, NT / 2, PARTNERS>(dk, left_ds, q_tile, own, part);
      if constexpr (PARTNERS == 2) {
        meet<64>(1 + pair);
        const int others = SUB - own;
        take_left(left, room + (1 - part) * HALF_ROOM);
        multiply_columns<T, D, MT, NT / 2, PARTNERS>(dv, left, dout_tile, others, part);
        take_left(left, room + (3 - part) * HALF_ROOM);
        multiply_columns<T, D, MT, NT / 2, PARTNERS>(dk, left, q_tile, others, part);
      }
    }
    row0 = next_row0, buffer ^= 1;
  }

  if constexpr (WITH_KEYS) scale_by(dk, shape.scale);
  // The place is computed again: over the loop it would take registers that there are none of.
  const KeysPlace to(all, fresh(blockIdx.x), KEYS);
  store_gradients<T, D, PARTNERS, MT, WHICH>(all, to, kv_stride, dk, dv, memory + K, memory + V, warp_row, part);
}

template <typename T, int D, int WARPS, int MT, int KEYS, int SUB, int LAUNCHED_BYTES>
__device__ __forceinline__ void attention_backward_q(const AttentionBackwardSplitParams &all) {
  const AttentionBackwardParams &p = all.p;
  constexpr int THREADS = 32 * WARPS, ROWS = 16 * MT * WARPS, NT = SUB / 8;
  static_assert(KEYS % SUB == 0 && SUB % 16 == 0, "a walked tile is whole sub-tiles");
  constexpr int Q = 0, DOUT = Q + TILE_BYTES<ROWS, D>, K = DOUT + TILE_BYTES<ROWS, D>;
  constexpr int V = K + 2 * TILE_BYTES<KEYS, D>, BYTES = V + 2 * TILE_BYTES<KEYS, D>;
  static_assert(BYTES == LAUNCHED_BYTES && BYTES <= MAX_BYTES, "what a launch asks for, of what the card has");
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = shared_address(memory);
  const AttentionShape &shape = p.shape;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * MT;

  const int num_tiles = (shape.query_tokens + ROWS - 1) / ROWS;
  const int2 place = all.place(blockIdx.x, num_tiles, shape.batch * shape.query_heads);
  const int row0 = (num_tiles - 1 - place.x) * ROWS;
  const int head = place.y % shape.query_heads, batch = place.y / shape.query_heads;
  const int kv_head = head / (shape.query_heads / shape.kv_heads);
  const int q_stride = shape.query_heads * D, kv_stride = shape.kv_heads * D;
  const int64_t q_start = int64_t(batch) * shape.query_tokens * q_stride + int64_t(head) * D;
  const int64_t kv_start = int64_t(batch) * shape.key_tokens * kv_stride + int64_t(kv_head) * D;

  const int first_key = shape.first_key(row0), end_key = shape.end_key(row0 + ROWS);
  const int first_tile = first_key / KEYS, end_tile = end_key > first_key ? (end_key + KEYS - 1) / KEYS : first_tile;
  const float to_exp2 = shape.scale * LOG2_E;

  const auto load_step = [&](int tile, int buffer) {
    load_tile<T, D, KEYS, THREADS>(shared + K + buffer * TILE_BYTES<KEYS, D>, static_cast<const T *>(p.k) + kv_start,
                                   kv_stride, tile * KEYS, shape.key_tokens);
    load_tile<T, D, KEYS, THREADS>(shared + V + buffer * TILE_BYTES<KEYS, D>, static_cast<const T *>(p.v) + kv_start,
                                   kv_stride, tile * KEYS, shape.key_tokens);
  };

  float dq[MT][D / 8][4];
  clear(dq);
  float lse[MT][2], delta[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + warp_row + 16 * m + 8 * half + lane / 4;
      const int64_t at = (int64_t(batch) * shape.query_heads + head) * shape.query_tokens + row;
      const float2 pair = row < shape.query_tokens ? p.rows[at] : make_float2(0.f, 0.f);
      lse[m][half] = pair.x, delta[m][half] = pair.y;
    }

  if (first_tile < end_tile) {
    load_tile<T, D, ROWS, THREADS>(shared + Q, static_cast<const T *>(p.q) + q_start, q_stride, row0,
                                   shape.query_tokens);
    load_tile<T, D, ROWS, THREADS>(shared + DOUT, static_cast<const T *>(p.dout) + q_start, q_stride, row0,
                                   shape.query_tokens);
    load_step(end_tile - 1, 0);
    copy_commit();
  }
  for (int tile = end_tile - 1, buffer = 0; tile >= first_tile; --tile, buffer ^= 1) {
    copy_wait<0>();
    __syncthreads(); // This tile is there, and no warp reads the one before any more.
    if (tile > first_tile) {
      load_step(tile - 1, buffer ^ 1);
      copy_commit();
    }
    const int key0 = tile * KEYS;
    const uint32_t k_tile = shared + K + buffer * TILE_BYTES<KEYS, D>;
    const uint32_t v_tile = shared + V + buffer * TILE_BYTES<KEYS, D>;
    const bool edge = shape.is_edge(row0, ROWS, key0, KEYS);

#pragma unroll
    for (int sub = 0; sub < KEYS; sub += SUB) {
      float scores[MT][NT][4], ds[MT][NT][4];
      clear(scores);
      multiply_rows<T, D, MT, NT>(scores, shared + Q, warp_row, k_tile, sub);
      if (edge) hide(scores, row0 + warp_row, key0 + sub, [&](int row) { return shape.keys_of(row); });
      clear(ds);
      multiply_rows<T, D, MT, NT>(ds, shared + DOUT, warp_row, v_tile, sub);
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float probability = exp2_fast(fmaf(scores[m][n][e], to_exp2, -lse[m][e / 2]));
            ds[m][n][e] = probability * (ds[m][n][e] - delta[m][e / 2]);
          }
      uint32_t left[MT][NT / 2][4];
      as_left<T>(left, ds);
      multiply_columns<T, D, MT, NT / 2>(dq, left, k_tile, sub);
    }
  }

  scale_by(dq, shape.scale);
  // Only this warp ever read its rows of the query tile.
  store_rows<T, D, MT>(dq, memory + Q, warp_row, static_cast<T *>(p.dq) + q_start, q_stride, row0,
                       shape.query_tokens);
}

#define ATTENTION_BACKWARD_KV(NAME, T, D, SUFFIX, WHICH, WARPS, PARTNERS, MT, ROWS, SUB, BLOCKS, BYTES)                \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                     \
      attention_backward_kv##SUFFIX##_##NAME##_##D(const __grid_constant__ AttentionBackwardSplitParams p) {           \
    attention_backward_kv<T, D, WARPS, PARTNERS, MT, ROWS, SUB, WHICH, BYTES>(p);                                      \
  }

#define ATTENTION_BACKWARD_Q(NAME, T, D, WARPS, MT, KEYS, SUB, BLOCKS, BYTES)                                          \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                     \
      attention_backward_q_##NAME##_##D(const __grid_constant__ AttentionBackwardSplitParams p) {                      \
    attention_backward_q<T, D, WARPS, MT, KEYS, SUB, BYTES>(p);                                                        \
  }

// The last number of a line is the shared memory of a launch. kernels/src/flash/tile.rs has the same keys or rows,
// warps and bytes a block; its test, and check_kernels.py, read them here.
#define ATTENTION_BACKWARD_TYPE(NAME, T)                                                                               \
  extern "C" __global__ void attention_backward_rows_##NAME(const __grid_constant__ AttentionBackwardSplitParams p) {  \
    attention_backward_rows<T>(p.p);                                                                                   \
  }                                                                                                                    \
  extern "C" __global__ void attention_backward_sum_##NAME(const __grid_constant__ AttentionBackwardSplitParams p) {   \
    attention_backward_sum<T>(p);                                                                                      \
  }                                                                                                                    \
  ATTENTION_BACKWARD_KV(NAME, T, 64, , KEYS_AND_VALUES, 4, 1, 2, 64, 32, 2, 66560)                                     \
  ATTENTION_BACKWARD_KV(NAME, T, 96, , KEYS_AND_VALUES, 8, 2, 2, 64, 32, 1, 132096)                                    \
  ATTENTION_BACKWARD_KV(NAME, T, 96, _alone, KEYS_AND_VALUES, 8, 1, 1, 64, 32, 1, 99328)                               \
  ATTENTION_BACKWARD_KV(NAME, T, 128, , KEYS_AND_VALUES, 8, 2, 2, 64, 32, 1, 164864)                                   \
  ATTENTION_BACKWARD_KV(NAME, T, 128, _alone, KEYS_AND_VALUES, 8, 1, 1, 32, 32, 1, 98816)                              \
  ATTENTION_BACKWARD_KV(NAME, T, 256, _dk, KEYS_ONLY, 8, 1, 1, 16, 16, 1, 164096)                                      \
  ATTENTION_BACKWARD_KV(NAME, T, 256, _dv, VALUES_ONLY, 8, 1, 1, 16, 16, 1, 164096)                                    \
  ATTENTION_BACKWARD_Q(NAME, T, 64, 4, 2, 64, 32, 2, 65536)                                                            \
  ATTENTION_BACKWARD_Q(NAME, T, 96, 4, 2, 32, 32, 2, 73728)                                                            \
  ATTENTION_BACKWARD_Q(NAME, T, 128, 4, 2, 32, 32, 2, 98304)                                                           \
  ATTENTION_BACKWARD_Q(NAME, T, 256, 8, 1, 16, 16, 1, 163840)

ATTENTION_BACKWARD_TYPE(bf16, __nv_bfloat16)
ATTENTION_BACKWARD_TYPE(f16, __half)
