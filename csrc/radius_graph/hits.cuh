// A centre and its hits, found in the tree by a warp: points of its graph, and their periodic images, that pass the
// edge test.
//
// A hit has a key, the neighbour's row above the number of its image among those that the centre asks for: keys of one
// centre are ordered like (neighbour, shift).
#pragma once
#include "radius_graph/tree.cuh"

namespace moeyard::cuda {
namespace {

/// Image n of n_count along each axis from n_first on; the centre's own copy alone without a cell.
struct Images {
  int32_t first[3] = {0, 0, 0}, count[3] = {1, 1, 1};

  __device__ int64_t total() const { return int64_t(count[0]) * count[1] * count[2]; }
  __device__ Shift operator[](int64_t number) const {
    const int64_t rest = number / count[2];
    return {{int32_t(first[0] + rest / count[1]), int32_t(first[1] + rest % count[1]),
             int32_t(first[2] + number % count[2])}};
  }
};

template <class T>
struct Centre {
  int64_t i;
  Query<T> query;
  const CellState* cell = nullptr;
  const T* vectors = nullptr;
  Images images;
  bool isolated;  // has no edges

  __device__ bool periodic() const { return cell && cell->lattice.any(); }

  __device__ Centre(const Call<T>& call, int64_t i_) : i(i_) {
    const Side<T>& side = call.centres;
    for (int c = 0; c < 3; ++c) query.at[c] = side.home[3 * i + c];
    query.range = side.range[i];
    isolated = !is_finite(query.at) || query.range.size() == 0;
    if (!side.cell || isolated) return;
    cell = call.cells + side.cell[i];
    vectors = call.cell_vectors(side.cell[i]);
  }

  /// Chooses the images that a point within `reach` may have; false, and isolated, if they are too many.
  __device__ bool choose_images(const Call<T>& call, double reach) {
    const T* const xyz = call.centres.xyz + 3 * i;
    const double p[3] = {double(xyz[0]), double(xyz[1]), double(xyz[2])};
    double total = query.range.size();
    for (int k = 0; k < 3; ++k) {
      if (!cell->lattice.periodic[k]) continue;
      const double width = reach / cell->lattice.spacing[k] + 1e-9;
      const double at = lattice_math::dot(p, cell->lattice.reciprocal[k]) - call.centres.floor[i].n[k];
      const double first = floor(at - width), last = floor(at + width);
      total *= last - first + 1;
      if (!(total <= kMaxImages)) break;
      images.first[k] = int32_t(first), images.count[k] = int32_t(last - first + 1);
    }
    isolated = !(total <= kMaxImages);
    if (isolated) atomicOr(call.errors, unsigned(kTooManyImages));
    return !isolated;
  }
};

/// What the rounding of the edge test, of wrapped coordinates and of images can add up to: a few epsilon times the
/// largest number that takes part. 16 is generous.
template <class T>
__device__ double rounding(const CellState& state, double radius) {
  double largest = 2 * double(__uint_as_float(state.largest_home));
  for (int k = 0; k < 3; ++k) {
    if (!state.lattice.periodic[k]) continue;
    const double cells = radius / state.lattice.spacing[k] + 2 + state.largest_floor[k];
    largest += 4 * cells * lattice_math::norm(state.lattice.vector[k]);
  }
  return 16 * double(kEpsilon<T>) * largest + underflow_length<T>();
}

/// The edge test: the square of the distance from centre i to image s of j; infinite for the centre itself where that
/// is no edge, and for the direction of a pair that is not wanted.
template <class T>
__device__ T edge2(const Call<T>& call, const Centre<T>& centre, int64_t j, const Shift& s) {
  constexpr T kNone = kInfinite<T>;
  const int64_t i = centre.i;
  if (call.pairs.same) {
    if (i == j && !call.options.loop && !s.n[0] && !s.n[1] && !s.n[2]) return kNone;
    if (call.options.half && (i > j || (i == j && negative(s)))) return kNone;
  }
  return squared_norm(centre.vectors ? call.pairs(i, j, s, centre.vectors) : call.pairs(i, j));
}

/// The shift of an image: from the caller's coordinates, not from the wrapped ones.
template <class T>
__device__ Shift shift_of(const Call<T>& call, const Centre<T>& centre, int64_t j, int64_t image) {
  Shift s{{0, 0, 0}};
  if (!centre.cell) return s;
  const Shift n = centre.images[image], &of_point = call.points.floor[j], &of_centre = call.centres.floor[centre.i];
  for (int k = 0; k < 3; ++k) s.n[k] = n.n[k] - of_point.n[k] + of_centre.n[k];
  return s;
}

__device__ inline uint64_t key_of(int64_t j, int64_t image) { return uint64_t(j) << 32 | uint64_t(image); }

/// How far a search goes: to squared distances of the edge test up to d2, inclusive, and to squared distances of
/// wrapped coordinates that such points may have.
template <class T>
struct Limit {
  T d2, wrapped2;
  double slack;

  __device__ Limit(const Centre<T>& centre, T d2_)
      : slack(centre.periodic() ? rounding<T>(*centre.cell, sqrt(double(d2_))) : 0) {
    set(centre, d2_);
  }
  /// Nothing is within any more.
  __device__ void end() { d2 = wrapped2 = T(-1); }
  __device__ double reach() const { return sqrt(double(d2)) * (1 + 1e-5) + slack; }
  __device__ void set(const Centre<T>& centre, T d2_) {
    d2 = wrapped2 = d2_;
    if (centre.periodic()) wrapped2 = T(fmin(reach() * reach(), double(kLargest<T>)));
  }
};

/// Calls take(hit, d2, key) for 32 points at a time, of which each lane has one; hits pass the edge test with
/// d2 <= limit.d2, which `take` may lower.
template <bool kNearestFirst, class T, class Take>
__device__ void for_each_hit(const Call<T>& call, const Tree<T>& tree, const Centre<T>& centre, const Limit<T>& limit,
                             Take&& take) {
  for (int64_t image = 0; image < centre.images.total(); ++image) {
    Query<T> q = centre.query;
    if (centre.periodic()) {
      const Shift n = centre.images[image];
      for (int c = 0; c < 3; ++c) {
        double at = double(q.at[c]);
        for (int k = 0; k < 3; ++k) at -= n.n[k] * centre.cell->lattice.vector[k][c];
        q.at[c] = T(at);
      }
    }
    const auto visit = [&](int64_t first) {
      const int64_t place = first + lane_number();
      uint64_t key = 0;
      T d2 = kInfinite<T>;
      if (place >= q.range.begin && place < q.range.end) {
        const T d[3] = {tree.x[place] - q.at[0], tree.y[place] - q.at[1], tree.z[place] - q.at[2]};
        if ((d[0] * d[0] + d[1] * d[1]) + d[2] * d[2] <= limit.wrapped2) {
          const int64_t j = tree.id[place];
          key = key_of(j, image);
          d2 = edge2(call, centre, j, shift_of(call, centre, j, image));
        }
      }
      take(d2 <= limit.d2, d2, key);
    };
    walk<kNearestFirst>(tree, q, limit.wrapped2, visit);
  }
}

}  // namespace
}  // namespace moeyard::cuda
