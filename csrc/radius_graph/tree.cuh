// A tree over the points: sorted by graph and then along a Z-order curve, so that a graph's points keep its range of
// places and 32 in a row lie together; a box around each 32 points, around each 32 boxes, and so on. A warp looks at
// the 32 boxes of a node at once. Any distribution of points has it, and nothing depends on its order but the time.
//
// Computed gaps to a box bound computed distances to its points, because rounding is monotone.
#pragma once
#include <cmath>

#include "common/digit_sort.cuh"
#include "common/workspace.hpp"
#include "radius_graph/call.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kMostLevels = 7;  // 2^31 points have six

/// Boxes per level, level 0 of 32 points each, up to a level of at most 32.
struct TreeShape {
  int64_t points, count[kMostLevels];
  int levels = 0;

  explicit TreeShape(int64_t n) : points(n) {
    do count[levels++] = n = std::max<int64_t>(1, (n + 31) / 32);
    while (n > 32);
  }
};

template <class T>
struct Tree {
  TreeShape shape;
  T *x, *y, *z;  // by place
  const int32_t* id;
  Box<T>* boxes[kMostLevels];

  Tree(int64_t n, const int32_t* id_, Workspace& w) : shape(n), id(id_) {
    x = w.take<T>(n), y = w.take<T>(n), z = w.take<T>(n);
    for (int l = 0; l < kMostLevels; ++l) boxes[l] = w.take<Box<T>>(l < shape.levels ? shape.count[l] : 0);
  }
};

// ---- order ----------------------------------------------------------------------------------------------------------

/// How coordinates become the cells of the curve.
struct Curve {
  double low[3], scale[3];
};

constexpr int kSampleThreads = 1024;

/// A range for each axis from 1,024 points: the median of the smallest of 32, to that of the largest, and a quarter
/// more on either side. A few points far off do not matter; all beyond the range shares its last cells.
template <class T>
__global__ void __launch_bounds__(kSampleThreads)
    find_curve_kernel(const T* home, int64_t n, int axis_bits, Curve* curve) {
  CU_SHARED(double, ends, [2][32]);
  const int warp = int(threadIdx.x) / 32, lane = lane_number();
  const int64_t i = n * threadIdx.x / kSampleThreads;
  for (int c = 0; c < 3; ++c) {
    const double value = i < n ? double(home[3 * i + c]) : NAN;
    double low = fabs(value) <= 1e300 ? value : 1e300, high = fabs(value) <= 1e300 ? value : -1e300;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      low = fmin(low, __shfl_xor_sync(kAllLanes, low, d));
      high = fmax(high, __shfl_xor_sync(kAllLanes, high, d));
    }
    if (lane == 0) ends[0][warp] = low, ends[1][warp] = high;
    __syncthreads();
    if (warp < 2) {
      const double mine = ends[warp][lane];
      int rank = 0;
      for (int other = 0; other < 32; ++other)
        rank += ends[warp][other] < mine || (ends[warp][other] == mine && other < lane);
      const double median = __shfl_sync(kAllLanes, mine, __ffs(int(__ballot_sync(kAllLanes, rank == 16))) - 1);
      if (lane == 0) (warp == 0 ? curve->low : curve->scale)[c] = median;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const double from = curve->low[c], width = fmax(curve->scale[c] - from, 0.0);
      curve->low[c] = from - width / 4;
      curve->scale[c] = width > 0 ? double(1 << axis_bits) / (1.5 * width) : 0;
    }
    __syncthreads();
  }
}

/// The bits of v, two zeros after each.
__device__ inline uint64_t spread_bits(uint64_t v) {
  v = (v | v << 32) & 0x001f00000000ffffu;
  v = (v | v << 16) & 0x001f0000ff0000ffu;
  v = (v | v << 8) & 0x100f00f00f00f00fu;
  v = (v | v << 4) & 0x10c30c30c30c30c3u;
  return (v | v << 2) & 0x1249249249249249u;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    find_keys_kernel(const T* home, const Range* range, int64_t n, int axis_bits, int graph_bits, const Curve* curve,
                     int64_t* key) {
  const int64_t i = thread_number();
  if (i >= n) return;
  uint64_t code = 0;
  for (int c = 0; c < 3; ++c) {
    const double cell = (double(home[3 * i + c]) - curve->low[c]) * curve->scale[c];
    const double last = double((1 << axis_bits) - 1);
    code |= spread_bits(cell > 0 ? uint64_t(fmin(cell, last)) : 0) << c;  // 0 for NaN
  }
  if (graph_bits > 0) code |= uint64_t(range[i].begin) << (3 * axis_bits);
  key[i] = int64_t(code);
}

struct StoredKeys {
  const int64_t* key;
  __device__ int64_t operator()(int64_t item) const { return key[item]; }
};

// ---- boxes ----------------------------------------------------------------------------------------------------------

template <class T>
__device__ Box<T> box_of_lanes(Box<T> box) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2)
    for (int c = 0; c < 3; ++c) {
      box.low[c] = min(box.low[c], __shfl_xor_sync(kAllLanes, box.low[c], d));
      box.high[c] = max(box.high[c], __shfl_xor_sync(kAllLanes, box.high[c], d));
    }
  return box;
}

template <class T>
__device__ Box<T> empty_box() {
  constexpr T kNone = kInfinite<T>;
  return {{kNone, kNone, kNone}, {-kNone, -kNone, -kNone}};
}

/// Points to their places, those that are not finite as NaN, and the boxes around 32.
template <class T>
__global__ void __launch_bounds__(kThreads) place_points_kernel(Tree<T> tree, const T* home) {
  const int64_t place = thread_number();
  Box<T> box = empty_box<T>();
  if (place < tree.shape.points) {
    const T* const p = home + 3 * int64_t(tree.id[place]);
    const bool finite = is_finite(p);
    const T nowhere = T(NAN);
    tree.x[place] = finite ? p[0] : nowhere, tree.y[place] = finite ? p[1] : nowhere,
    tree.z[place] = finite ? p[2] : nowhere;
    if (finite) box = {{p[0], p[1], p[2]}, {p[0], p[1], p[2]}};
  }
  box = box_of_lanes(box);
  if (lane_number() == 0 && place / 32 < tree.shape.count[0]) tree.boxes[0][place / 32] = box;
}

template <class T>
__global__ void __launch_bounds__(kThreads) join_boxes_kernel(const Box<T>* below, int64_t count, Box<T>* above) {
  const int64_t i = thread_number();
  const Box<T> box = box_of_lanes(i < count ? below[i] : empty_box<T>());
  if (lane_number() == 0 && i < count) above[i / 32] = box;
}

// ---- walk -----------------------------------------------------------------------------------------------------------

/// A point that asks for points of its graph: rows, which in the tree are places too.
template <class T>
struct Query {
  T at[3];
  Range range;
};

/// The square of the gap between a point and a box.
template <class T>
__device__ T gap2(const Box<T>& box, const T (&at)[3]) {
  T d[3];
#pragma unroll
  for (int c = 0; c < 3; ++c)
    d[c] = at[c] < box.low[c] ? box.low[c] - at[c] : at[c] > box.high[c] ? at[c] - box.high[c] : T(0);
  return (d[0] * d[0] + d[1] * d[1]) + d[2] * d[2];
}

/// Calls visit(first place) for every 32 places whose box may hold a point with a squared distance up to `limit`, which
/// may fall on the way: then `kNearestFirst` is worth its price.
template <bool kNearestFirst, class T, class Visit>
__device__ void walk(const Tree<T>& tree, const Query<T>& q, const T& limit, Visit&& visit) {
  const int lane = lane_number();
  int64_t base[kMostLevels] = {};   // the node whose boxes are looked at, as the first of them
  unsigned left[kMostLevels] = {};  // of these, those still to be visited
  T gap = 0;
  // Which of a node's boxes are worth a visit.
  const auto look = [&](int level) {
    const int64_t box = base[level] + lane;
    const int shift = 5 * (level + 1);
    bool wanted = box < tree.shape.count[level] && box << shift < q.range.end && (box + 1) << shift > q.range.begin;
    if (wanted) gap = gap2(tree.boxes[level][box], q.at), wanted = gap <= limit;
    return __ballot_sync(kAllLanes, wanted);
  };
  int level = tree.shape.levels - 1;
  base[level] = 0, left[level] = kNearestFirst ? ~0u : look(level);
  while (level < tree.shape.levels) {
    unsigned open = left[level];
    if (kNearestFirst && open) open &= look(level);
    if (!open) {
      ++level;
      continue;
    }
    int next = __ffs(int(open)) - 1;
    if constexpr (kNearestFirst) {
      const unsigned order = open >> lane & 1u ? __float_as_uint(float(gap)) : ~0u;
      const unsigned nearest = __reduce_min_sync(kAllLanes, order);
      next = __ffs(int(__ballot_sync(kAllLanes, order == nearest) & open)) - 1;
    }
    left[level] = open & ~(1u << next);
    const int64_t box = base[level] + next;
    if (level == 0) {
      visit(box * 32);
    } else {
      base[--level] = box * 32;
      left[level] = kNearestFirst ? ~0u : look(level);
    }
  }
}

}  // namespace
}  // namespace moeyard::cuda
