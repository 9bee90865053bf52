// One page as the disk has it, keys and values of every layer behind one another, and its landmarks, to where each layer
// keeps its own: a block copies 16 bytes a thread, several times over. Bound by memory.
#include "number.cuh"

constexpr int MOST_LAYERS = 64;

struct Place {
  uint4 *keys;
  uint4 *values;
  uint4 *landmarks;
};

struct PlaceParams {
  const uint4 *numbers;   // (layers, keys and values, half)
  const uint4 *landmarks; // (layers, marks)
  uint64_t half;          // 16-byte units of a layer's keys, and of its values
  uint64_t marks;         // of its landmarks
  Place places[MOST_LAYERS];
};

constexpr int THREADS = 256;
constexpr int UNROLL = 4;

// Grid: x over the units of a half, THREADS · UNROLL a block; y over the layers; z keys, values and landmarks.
extern "C" __global__ void __launch_bounds__(THREADS) place_page(const PlaceParams p) {
  const uint64_t layer = blockIdx.y;
  const Place place = p.places[layer];
  const bool is_landmarks = blockIdx.z == 2;
  const uint64_t count = is_landmarks ? p.marks : p.half;
  const uint4 *from = is_landmarks ? p.landmarks + layer * p.marks : p.numbers + (2 * layer + blockIdx.z) * p.half;
  uint4 *to = is_landmarks ? place.landmarks : blockIdx.z == 1 ? place.values : place.keys;
  const uint64_t first = uint64_t(blockIdx.x) * THREADS * UNROLL + threadIdx.x;
  uint4 x[UNROLL];
#pragma unroll
  for (int j = 0; j < UNROLL; j++)
    if (first + j * THREADS < count) x[j] = __ldg(from + first + j * THREADS);
#pragma unroll
  for (int j = 0; j < UNROLL; j++)
    if (first + j * THREADS < count) to[first + j * THREADS] = x[j];
}
