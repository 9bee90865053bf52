// Pages as the disk has them, keys and values of every layer behind one another, and their landmarks, to where each layer
// keeps its own: a block copies 16 bytes a thread, several times over. Bound by memory.
#include "number.cuh"

constexpr int MOST_LAYERS = 64;

struct Place {
  uint4 *keys;
  uint4 *values;
  uint4 *landmarks;
};

struct PlaceParams {
  const uint4 *numbers;     // (n, layers, keys and values, half), pages `page` apart
  const uint4 *landmarks;   // (n, layers, marks), pages `marks_page` apart
  uint64_t page;            // 16-byte units from one page to the next
  uint64_t marks_page;      // the same of landmarks
  uint64_t half;            // units of a layer's keys, and of its values
  uint64_t marks;           // of its landmarks
  Place places[MOST_LAYERS];
};

constexpr int THREADS = 256;
constexpr int UNROLL = 4;

// Grid: x over the units of a half, THREADS · UNROLL a block; y over the layers; z keys, values and landmarks of each page.
extern "C" __global__ void __launch_bounds__(THREADS) place_pages(const __grid_constant__ PlaceParams p) {
  const uint64_t layer = blockIdx.y, i = blockIdx.z / 3, kind = blockIdx.z % 3;
  const Place place = p.places[layer];
  const uint64_t count = kind == 2 ? p.marks : p.half;
  const uint4 *from = kind == 2 ? p.landmarks + i * p.marks_page + layer * p.marks
                                : p.numbers + i * p.page + (2 * layer + kind) * p.half;
  uint4 *to = (kind == 2 ? place.landmarks : kind == 1 ? place.values : place.keys) + i * count;
  const uint64_t first = uint64_t(blockIdx.x) * THREADS * UNROLL + threadIdx.x;
  uint4 x[UNROLL];
#pragma unroll
  for (int j = 0; j < UNROLL; j++)
    if (first + j * THREADS < count) x[j] = __ldg(from + first + j * THREADS);
#pragma unroll
  for (int j = 0; j < UNROLL; j++)
    if (first + j * THREADS < count) to[first + j * THREADS] = x[j];
}
