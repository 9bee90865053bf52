// What a decode kernel of 16-bit types is told: pointers, sizes, what each query token sees, and the page list. What
// travels in the launch is cheap: from event to event an empty kernel takes 4.35 µs with 184 bytes of parameters on an
// H200 and 4.51 with 3,304; a table in memory has to be copied there whenever the list changes.
#pragma once
#include "paged.cuh"

// Query tokens of a decode: at most 16 rows of a key/value head.
constexpr int MAX_DECODE_TOKENS = 16;

struct InlinePages {
  Page pages[INLINE_PAGES];
};
// The list is a table in device memory.
struct TablePages {};

template <class List> struct DecodeParams {
  const void *q;      // (t, h, d)
  const void *keys;   // (s, g, 64, d)
  const void *values; // (s, g, 64, d)
  void *out;          // (t, h, d)
  float *lse;         // (t, h)
  float *partial;     // (g · tiles · parts, 8, d), then maximum and sum of each row; parts: the splits, or their clusters
  uint32_t *counters; // (g · tiles), with clusters (g · t · group); 0 before and after each launch
  const Page *table;  // TablePages: (num_pages)
  int32_t first[MAX_DECODE_TOKENS]; // first position that a token sees, less that of the first query
  uint32_t t, h, g, group;
  uint32_t num_pages, tiles, splits;
  float scale;                         // times log2 e
  uint32_t group_inverse;              // 2^16 / group + 1: row / group for rows below 16
  uint32_t split_pages, longer_splits; // of num_pages by splits: the quotient and the remainder
  List list;
};
static_assert(sizeof(DecodeParams<TablePages>) == 176, "as the host packs it");
static_assert(sizeof(DecodeParams<InlinePages>) == 176 + INLINE_PAGES * 16, "as the host packs it");

__device__ __forceinline__ Page page_at(const DecodeParams<InlinePages> &p, uint32_t i) { return p.list.pages[i]; }
__device__ __forceinline__ Page page_at(const DecodeParams<TablePages> &p, uint32_t i) { return page_of(p.table, i); }

// First page of a split; the longer splits come first. No division: pages are asked for before anything else is known.
template <class List> __device__ __forceinline__ uint32_t first_page(const DecodeParams<List> &p, uint32_t split) {
  return split * p.split_pages + min(split, p.longer_splits);
}

template <class List> __device__ __forceinline__ uint32_t token_of(const DecodeParams<List> &p, uint32_t row) {
  return row * p.group_inverse >> 16;
}

template <class List>
__device__ __forceinline__ uint64_t output_row(const DecodeParams<List> &p, uint32_t head, uint32_t row) {
  const uint32_t token = token_of(p, row);
  return uint64_t(token) * p.h + head * p.group + (row - token * p.group);
}

template <class List> __device__ __forceinline__ Visible visible_to_row(const DecodeParams<List> &p, uint32_t row) {
  if (row >= p.t * p.group) return Visible{1, 0};
  const uint32_t token = token_of(p, row);
  return Visible{p.first[token], int32_t(token)};
}

// What some row of a tile sees, and what all of them see; tiles of the grid are never empty.
template <class List> __device__ __forceinline__ TileView view_of_tile(const DecodeParams<List> &p, uint32_t row0) {
  const uint32_t rows = p.t * p.group;
  const uint32_t low = token_of(p, row0), high = token_of(p, min(row0 + DECODE_ROWS, rows) - 1);
  return TileView{p.first[low], int32_t(high), p.first[high], int32_t(low)};
}
