// What a search writes: counts and where each centre's edges begin, the edges, and what is left of the capacity.
#pragma once
#include "radius_graph/hits.cuh"

namespace moeyard::cuda {
namespace {

__global__ void begin_search_kernel(RadiusOutputs out, unsigned* num_long_rows) {
  *out.truncated = 0;
  *num_long_rows = 0;
}

struct Counts {
  const int32_t* count;
  __device__ int64_t operator()(int64_t i) const { return count[i]; }
};
struct Offsets {
  int64_t *offsets, centres;
  RadiusOutputs out;
  __device__ void operator()(int64_t i, int64_t before, int64_t) const { offsets[i] = before; }
  __device__ void total(int64_t all) const { offsets[centres] = *out.num_edges = all; }
};

template <class T>
__device__ void write_geometry(const RadiusOutputs& out, int64_t e, const Vec3<T>& d) {
  T* const vector = static_cast<T*>(out.vector) + 3 * e;
  vector[0] = d.x, vector[1] = d.y, vector[2] = d.z;
  static_cast<T*>(out.distance)[e] = sqrt(squared_norm(d));
}

/// The edges of a centre from edge `first` on, for a whole warp.
template <class T>
__device__ void write_edges(const Call<T>& call, const RadiusOutputs& out, int64_t first, const Centre<T>& centre,
                            const uint64_t* keys, int64_t n) {
  n = min(n, out.capacity - first);
  for (int64_t k = lane_number(); k < n; k += 32) {
    const int64_t e = first + k, j = int64_t(keys[k] >> 32);
    const Shift shift = shift_of(call, centre, j, int64_t(keys[k] & 0xffffffffu));
    out.centre[e] = centre.i, out.neighbour[e] = j;
    if (out.cell_shift)
      for (int c = 0; c < 3; ++c) out.cell_shift[3 * e + c] = shift.n[c];
    if (out.distance)
      write_geometry(out, e, centre.vectors ? call.pairs(centre.i, j, shift, centre.vectors) : call.pairs(centre.i, j));
  }
}

/// What is left of the capacity: 0 -> 0.
template <class T>
__global__ void __launch_bounds__(kThreads) pad_edges_kernel(RadiusOutputs out) {
  if (thread_number() == 0) *out.overflow = *out.num_edges > out.capacity;
  for (int64_t e = *out.num_edges + thread_number(); e < out.capacity; e += int64_t(gridDim.x) * kThreads) {
    out.centre[e] = out.neighbour[e] = 0;
    for (int c = 0; c < 3; ++c) {
      if (out.cell_shift) out.cell_shift[3 * e + c] = 0;
      if (out.vector) static_cast<T*>(out.vector)[3 * e + c] = T(0);
    }
    if (out.distance) static_cast<T*>(out.distance)[e] = T(out.padding);
  }
}

}  // namespace
}  // namespace moeyard::cuda
