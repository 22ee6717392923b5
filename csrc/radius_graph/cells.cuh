// A hashed grid over the points, for searches in free space that select nothing: cells as wide as the radius, of which
// each is in one bucket, and the cells of a row along x in a row of buckets. So a centre's 27 cells are nine windows of
// places. What else has got into a window is told apart by its distance and, in another graph, by its row.
//
// Which place of its bucket a point gets is left to chance: nothing depends on it.
#pragma once
#include <algorithm>
#include <cmath>

#include "common/scan.cuh"
#include "common/workspace.hpp"
#include "radius_graph/hits.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kFewestBucketBits = 7, kMostBucketBits = 26;
// On either side of the origin. As many again beyond, far wider, reach to where double numbers end to tell cells apart;
// the last holds all that is left. So a coordinate in cells is right to 2e-6 everywhere.
constexpr double kFineCells = double(int64_t(1) << 33), kFarCellsPerFine = 1.0 / (1 << 18);
// Of the whole circle of buckets, the turn from a row of cells to the next along y and along z: the R2 sequence, whose
// points keep far apart (M. Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018).
constexpr uint32_t kTurnY = 0xc13fa9a9u, kTurnZ = 0x91e10da5u;
constexpr uint32_t kTurnOfGraph = 0x9e3779b1u;

/// Whether the nine windows of three buckets each keep apart, rounding down included.
constexpr bool windows_are_disjoint() {
  constexpr uint32_t bucket = 1u << (32 - kFewestBucketBits);
  for (int y = -2; y <= 2; ++y)
    for (int z = -2; z <= 2; ++z) {
      const uint32_t turn = uint32_t(y) * kTurnY + uint32_t(z) * kTurnZ;
      if ((y || z) && (turn < 4 * bucket || 0u - turn < 4 * bucket)) return false;
    }
  return true;
}
static_assert(windows_are_disjoint());

template <class T>
struct alignas(16) Item {
  T xyz[3];
  int32_t id;
};

/// Places [begin, end), and on from the first: [0, wrapped).
struct Window {
  unsigned begin, end, wrapped;
};

template <class T>
struct Cells {
  int64_t points;
  int bits;
  double per_length;  // cells
  unsigned* start;    // [2^bits + 1] first place of each bucket
  Item<T>* items;     // [points] by place; null: there is no grid

  /// Everything for a search with this radius; nothing if `used` is false.
  Cells(int64_t n, double r, bool used, Workspace& w) : points(n), bits(kFewestBucketBits) {
    while (bits < kMostBucketBits && int64_t(1) << bits < 2 * n) ++bits;
    // A little wider, for the edge test's rounding and what underflows in it.
    per_length = 1 / ((r + underflow_length<T>()) * (1 + 1e-5));
    start = w.take<unsigned>(used ? buckets() + 1 : 0);
    items = w.take<Item<T>>(used ? n : 0);
    if (!used) items = nullptr;
  }

  MOEYARD_HD int64_t buckets() const { return int64_t(1) << bits; }

  /// Modulo 2^32, as buckets go round. Any number does for NaN, which has no edges.
  __device__ uint32_t cell(T x) const {
    const double fine = double(x) * per_length, near = within_fine(fine), far = (fine - near) * kFarCellsPerFine;
    return uint32_t(int64_t(floor(near + within_fine(far))));
  }
  static __device__ double within_fine(double x) { return fmin(fmax(x, -kFineCells), kFineCells); }
  __device__ unsigned bucket(const Range& graph, const T (&at)[3], int dy, int dz) const {
    const uint32_t turn = (cell(at[1]) + uint32_t(dy)) * kTurnY + (cell(at[2]) + uint32_t(dz)) * kTurnZ +
                          uint32_t(graph.begin) * kTurnOfGraph;
    return (cell(at[0]) + (turn >> (32 - bits))) & unsigned(buckets() - 1);
  }
  /// One of the nine that hold all that may be near.
  __device__ Window window(const Query<T>& q, int number) const {
    const unsigned last = unsigned(buckets() - 1);
    const unsigned from = (bucket(q.range, q.at, number % 3 - 1, number / 3 - 1) - 1) & last;
    return {start[from], start[min(from + 3, last + 1)], from + 3 > last + 1 ? start[from + 2 - last] : 0};
  }
};

// ---- building -------------------------------------------------------------------------------------------------------

/// Where a point goes: its bucket, and how many of that came before it.
struct Ticket {
  unsigned bucket, number;
};

template <class T>
__global__ void __launch_bounds__(kThreads) clear_buckets_kernel(Cells<T> cells) {
  const int64_t i = thread_number();
  if (i <= cells.buckets()) cells.start[i] = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    count_points_kernel(Cells<T> cells, const T* xyz, const Range* range, Ticket* tickets) {
  const int64_t i = thread_number();
  if (i >= cells.points) return;
  const T at[3] = {xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]};
  const unsigned bucket = cells.bucket(range[i], at, 0, 0);
  tickets[i] = {bucket, atomicAdd(&cells.start[bucket], 1u)};
}

struct BucketStarts {
  unsigned* start;
  int64_t buckets;
  __device__ unsigned operator()(int64_t i) const { return start[i]; }
  __device__ void operator()(int64_t i, unsigned before, unsigned) const { start[i] = before; }
  __device__ void total(unsigned all) const { start[buckets] = all; }
};

template <class T>
__global__ void __launch_bounds__(kThreads) place_items_kernel(Cells<T> cells, const T* xyz, const Ticket* tickets) {
  const int64_t i = thread_number();
  if (i >= cells.points) return;
  const Ticket ticket = tickets[i];
  cells.items[cells.start[ticket.bucket] + ticket.number] = {{xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]}, int32_t(i)};
}

template <class T>
void build_cells(const Cells<T>& cells, const Side<T>& side, Ticket* tickets, unsigned* sums, Stream stream) {
  const dim3 block(kThreads);
  cu_launch(clear_buckets_kernel<T>, grid_of(cells.buckets() + 1), block, 0, stream, cells);
  cu_launch(count_points_kernel<T>, grid_of(cells.points), block, 0, stream, cells, side.home, side.range, tickets);
  const BucketStarts starts{cells.start, cells.buckets()};
  prefix_sums(starts, starts, cells.buckets(), sums, stream);
  cu_launch(place_items_kernel<T>, grid_of(cells.points), block, 0, stream, cells, side.home, tickets);
}

// ---- looking --------------------------------------------------------------------------------------------------------

/// Rows that may be neighbours of a centre, if they are near: `count` from `begin` on, but for one.
struct Eligible {
  int32_t begin, count, barred = -1;

  template <class T>
  __device__ Eligible(const Call<T>& call, const Centre<T>& centre) {
    const Range& graph = centre.query.range;
    const bool half = call.pairs.same && call.options.half;
    begin = half ? max(graph.begin, int32_t(centre.i)) : graph.begin;
    count = max(graph.end - begin, 0);
    if (call.pairs.same && !call.options.loop) barred = int32_t(centre.i);
  }
  __device__ bool operator()(int32_t j) const {
    return (unsigned(j) - unsigned(begin) < unsigned(count)) & (j != barred);
  }
};

/// Calls take(hit, j) for all items of a centre's windows: each thread for its own centre, or a warp for one, whose
/// lanes make equally many calls.
template <int kTogether, class T, class Take>
__device__ void for_each_item(const Call<T>& call, const Cells<T>& cells, const Centre<T>& centre, T limit2,
                              Take&& take) {
  const Eligible eligible(call, centre);
  const Query<T>& q = centre.query;
  const auto look = [&](unsigned begin, unsigned end) {
    for (unsigned first = begin; first < end; first += kTogether) {
      const unsigned place = kTogether > 1 ? first + unsigned(lane_number()) : first;
      const Item<T> item = cells.items[kTogether > 1 ? min(place, end - 1) : place];
      const Vec3<T> d{item.xyz[0] - q.at[0], item.xyz[1] - q.at[1], item.xyz[2] - q.at[2]};
      take((place < end) & (squared_norm(d) <= limit2) & eligible(item.id), item.id);
    }
  };
  for (int number = 0; number < 9; ++number) {
    const Window window = cells.window(q, number);
    look(window.begin, window.end);
    if (window.wrapped > 0) look(0, window.wrapped);
  }
}

}  // namespace
}  // namespace moeyard::cuda
