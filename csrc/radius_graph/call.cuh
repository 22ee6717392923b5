// What the kernels of a neighbour search share: the sets of points, their graphs, and the checks that only a look at
// values can make. A bad point, graph or cell has no edges, and a bit of `errors` says so.
#pragma once
#include <cmath>
#include <limits>

#include "common/device.cuh"
#include "common/device_errors.hpp"
#include "common/grid.cuh"
#include "radius_graph/geometry.hpp"
#include "radius_graph/lattice_math.hpp"
#include "radius_graph/radius_graph.hpp"

namespace moeyard::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
// As constants, because a kernel cannot call std::numeric_limits.
template <class T>
constexpr T kInfinite = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();
template <class T>
constexpr T kEpsilon = std::numeric_limits<T>::epsilon();
__device__ inline int lane_number() { return int(threadIdx.x) % 32; }

template <class F>
auto with_type(DType dtype, F&& f) {
  return dtype == DType::f64 ? f(double{}) : f(float{});
}

/// Rows [begin, end) of the points.
struct Range {
  int32_t begin = 0, end = 0;
  __device__ int32_t size() const { return end - begin; }
};

/// A cell, and bounds over the points that lie in graphs with it (atomic maxima).
struct CellState {
  Lattice lattice;
  bool usable;
  unsigned largest_home;      // bits of a float that is at least |coordinate| of any wrapped point
  unsigned largest_floor[3];  // cells that a point was moved by
};

/// A set of points on its way into the search.
template <class T>
struct Side {
  PointSet set;
  const T* xyz;   // the caller's coordinates
  Range* range;   // [count] the points that share the graph
  int32_t* cell;  // [count] number of the CellState, -1 for none; null without cells
  T* home;        // [count,3] wrapped into the cell; the caller's own without cells
  Shift* floor;   // [count] xyz = home + floor @ cell; null without cells
};

template <class T>
struct Call {
  Side<T> points, centres;  // of one set both are the same
  Pairs<T> pairs;
  Periodicity periodic;
  RadiusOptions options;
  CellState* cells;
  unsigned* errors;

  __device__ const T* cell_vectors(int32_t cell) const {
    return static_cast<const T*>(periodic.cell) + (periodic.num_cells < 0 ? 0 : 9 * int64_t(cell));
  }
};

// ---- graphs ---------------------------------------------------------------------------------------------------------

/// The first of n sorted ids that is not below `id`; not above it if `above`.
__device__ inline int64_t find_id(const int64_t* ids, int64_t n, int64_t id, bool above) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    (above ? ids[middle] <= id : ids[middle] < id) ? low = middle + 1 : high = middle;
  }
  return low;
}

__device__ inline int64_t graph_of(const PointSet& set, int64_t i) {
  if (set.batch) return set.batch[i];
  if (set.ptr) return max(find_id(set.ptr, set.num_graphs + 1, i, true) - 1, int64_t(0));
  return 0;
}

/// The rows of a graph, none of them out of range whatever the ids are.
__device__ inline Range rows_of(const PointSet& set, int64_t graph) {
  int64_t begin = 0, end = graph == 0 ? set.count : 0;
  if (set.batch) begin = find_id(set.batch, set.count, graph, false), end = find_id(set.batch, set.count, graph, true);
  if (set.ptr) {
    const bool known = graph >= 0 && graph < set.num_graphs;
    begin = known ? set.ptr[graph] : 0, end = known ? set.ptr[graph + 1] : 0;
  }
  begin = min(max(begin, int64_t(0)), set.count);
  return {int32_t(begin), int32_t(min(max(end, begin), set.count))};
}

template <class T>
__device__ bool is_finite(const T* p) {
  return fabs(p[0]) <= kLargest<T> && fabs(p[1]) <= kLargest<T> && fabs(p[2]) <= kLargest<T>;
}

__global__ void __launch_bounds__(kThreads) check_ptr_kernel(PointSet set, unsigned* errors) {
  const int64_t g = thread_number();
  if (g > set.num_graphs) return;
  const int64_t least = g == 0 ? 0 : set.ptr[g - 1], most = g == 0 ? 0 : set.count;
  const bool last = g == set.num_graphs && set.ptr[g] != set.count;
  if (set.ptr[g] < least || set.ptr[g] > most || last) atomicOr(errors, unsigned(kBadGraphPtr));
}

/// The range of every row of `side` among `points`, its cell, and a look at its values.
template <class T>
__global__ void __launch_bounds__(kThreads)
    find_graphs_kernel(Side<T> side, PointSet points, Periodicity periodic, unsigned* errors) {
  const int64_t i = thread_number();
  if (i >= side.set.count) return;
  if (side.set.batch && (side.set.batch[i] < 0 || (i > 0 && side.set.batch[i - 1] > side.set.batch[i])))
    atomicOr(errors, unsigned(kBadBatch));
  if (!is_finite(side.xyz + 3 * i)) atomicOr(errors, unsigned(kPointNotFinite));
  const int64_t graph = graph_of(side.set, i);
  side.range[i] = rows_of(points, graph);
  if (!side.cell) return;
  const bool has_cell = periodic.num_cells < 0 || graph < periodic.num_cells;
  const bool has_pbc = periodic.num_pbc < 0 || graph < periodic.num_pbc;
  if (!has_cell || !has_pbc) atomicOr(errors, unsigned(kBadCell));
  // One cell may serve graphs with several sets of axes, or the other way round.
  const bool each = periodic.num_cells >= 0 || periodic.num_pbc >= 0;
  side.cell[i] = has_cell && has_pbc && graph >= 0 ? int32_t(each ? graph : 0) : -1;
}

// ---- cells ----------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) find_lattices_kernel(Call<T> call, int64_t count) {
  const int64_t g = thread_number();
  if (g >= count) return;
  const Periodicity& p = call.periodic;
  CellState state{};
  const LatticeFault fault =
      find_lattice(call.cell_vectors(int32_t(g)), p.pbc ? p.pbc + (p.num_pbc < 0 ? 0 : 3 * g) : nullptr, state.lattice);
  state.usable = fault == LatticeFault::none;
  if (!state.usable) atomicOr(call.errors, unsigned(kBadCell));
  call.cells[g] = state;
}

template <class T>
__global__ void __launch_bounds__(kThreads) wrap_kernel(Side<T> side, CellState* cells, unsigned* errors) {
  const int64_t i = thread_number();
  if (i >= side.set.count) return;
  const int32_t cell = side.cell[i];
  const T* const xyz = side.xyz + 3 * i;
  double home[3] = {NAN, NAN, NAN};  // no edges
  Shift moved{{0, 0, 0}};
  if (cell >= 0 && cells[cell].usable && is_finite(xyz)) {
    const Lattice& lattice = cells[cell].lattice;
    const double p[3] = {double(xyz[0]), double(xyz[1]), double(xyz[2])};
    const WrappedPoint point = wrap_point(lattice, p);
    if (point.far_axis() >= 0) {
      atomicOr(errors, unsigned(kPointTooFar));
    } else {
      double largest = 0;
      for (int k = 0; k < 3; ++k) {
        home[k] = point.home[k], moved.n[k] = int32_t(point.moved[k]);
        largest = fmax(largest, fabs(home[k]));
        atomicMax(&cells[cell].largest_floor[k], unsigned(moved.n[k] < 0 ? -moved.n[k] : moved.n[k]));
      }
      // Rounded up, and finite.
      atomicMax(&cells[cell].largest_home, __float_as_uint(float(fmin(largest * 1.0001, 3e38))));
    }
  }
  for (int c = 0; c < 3; ++c) side.home[3 * i + c] = T(home[c]);
  side.floor[i] = moved;
}

}  // namespace
}  // namespace moeyard::cuda
