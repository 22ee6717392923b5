#include "radius_graph/emit.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/buffer.hpp"
#include "common/huge_pages.hpp"
#include "common/parallel.hpp"
#include "common/simd.hpp"
#include "radius_graph/geometry.hpp"
#include "radius_graph/graphs.hpp"

namespace moeyard::cpu {
namespace {

// Centres whose edges are written before their geometry is: about 1,500 edges.
constexpr int64_t kTile = 64;
// Rows of hits to ask for ahead: shuffled points find theirs anywhere in the arena.
constexpr int64_t kAhead = 16;
constexpr int64_t kWide = 8;

inline void prefetch(const void* at) {
  __builtin_prefetch(at);
  __builtin_prefetch(static_cast<const char*>(at) + 64);
}

// ---- indices and shifts ---------------------------------------------------------------------------------------------

/// Edges of the centres [begin, end), none at or after edge `limit`. Whole vectors are written while they stay below
/// `limit`: what runs over is the next centre's, which comes next.
struct EmitIds {
  template <Simd>
  static MOEYARD_INLINE void run(const HitStore& store, int64_t begin, int64_t end, int64_t limit,
                                 const RadiusOutputs& out) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < store.centres()) prefetch(store.hits(i + kAhead));
      const int64_t first = store.offset(i), stop = std::min(store.offset(i + 1), limit);
      out.num_neighbors[i] = int32_t(store.count(i));
      if (store.stride() == 1)
        row(store.hits(i), i, first, stop, limit, out);
      else
        periodic_row(store.hits(i), i, first, stop, out);
    }
  }

  static MOEYARD_INLINE void row(const int32_t* hit, int64_t i, int64_t first, int64_t stop, int64_t limit,
                                 const RadiusOutputs& out) {
    int64_t e = first;
    for (; e < stop && e + kWide <= limit; e += kWide, hit += kWide)
      for (int64_t l = 0; l < kWide; ++l) out.centre[e + l] = i, out.neighbour[e + l] = hit[l];
    for (; e < stop; ++e) out.centre[e] = i, out.neighbour[e] = *hit++;
  }

  static MOEYARD_INLINE void periodic_row(const int32_t* hit, int64_t i, int64_t first, int64_t stop,
                                          const RadiusOutputs& out) {
    for (int64_t e = first; e < stop; ++e, hit += 4) {
      out.centre[e] = i, out.neighbour[e] = hit[0];
      std::memcpy(out.cell_shift + 3 * e, hit + 1, 3 * sizeof(int32_t));
    }
  }
};

// ---- geometry -------------------------------------------------------------------------------------------------------

/// Four numbers, of which points use three: one load instead of three.
template <class T>
struct Quad {
  T v[4];
};

template <class T>
Buffer<Quad<T>> quads(const PointSet& set, int threads) {
  const T* xyz = static_cast<const T*>(set.xyz);
  Buffer<Quad<T>> padded(set.count);
  parallel_for(set.count, 1 << 14, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) padded[i] = {{xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2], T(0)}};
  });
  return padded;
}

template <class T>
MOEYARD_INLINE Quad<T> operator-(const Quad<T>& a, const Quad<T>& b) {
  Quad<T> d;
  for (int c = 0; c < 4; ++c) d.v[c] = a.v[c] - b.v[c];
  return d;
}

template <class T>
struct EmitGeometry {
  /// Edges [begin, end); their indices are there.
  template <Simd>
  static MOEYARD_INLINE void run(const Quad<T>* points, const Quad<T>* centres, int64_t begin, int64_t end,
                                 const RadiusOutputs& out) {
    T *distance = static_cast<T*>(out.distance), *vector = static_cast<T*>(out.vector);
    int64_t e = begin;
    // Rows of four numbers, one over the other: the fourth of each is overwritten by the next edge.
    for (; e + 1 < end; ++e) {
      const Quad<T> d = points[out.neighbour[e]] - centres[out.centre[e]];
      std::memcpy(vector + 3 * e, d.v, sizeof(d));
    }
    for (; e < end; ++e) {
      const Quad<T> d = points[out.neighbour[e]] - centres[out.centre[e]];
      std::memcpy(vector + 3 * e, d.v, 3 * sizeof(T));
    }
    for (e = begin; e < end; ++e)
      distance[e] = std::sqrt((vector[3 * e] * vector[3 * e] + vector[3 * e + 1] * vector[3 * e + 1]) +
                              vector[3 * e + 2] * vector[3 * e + 2]);
  }
};

template <class T>
void periodic_geometry(const Pairs<T>& pairs, const T* cells, const PointSet& homes, bool cell_each, int64_t begin,
                       int64_t end, const RadiusOutputs& out) {
  T *distance = static_cast<T*>(out.distance), *vector = static_cast<T*>(out.vector);
  int64_t centre = -1;
  const T* cell = cells;
  for (int64_t e = begin; e < end; ++e) {
    if (out.centre[e] != centre) {
      centre = out.centre[e];
      if (cell_each) cell = cells + 9 * graph_of(homes, centre);
    }
    const int32_t* s = out.cell_shift + 3 * e;
    const Vec3<T> d = pairs(centre, out.neighbour[e], {{s[0], s[1], s[2]}}, cell);
    vector[3 * e] = d.x, vector[3 * e + 1] = d.y, vector[3 * e + 2] = d.z;
    distance[e] = std::sqrt(squared_norm(d));
  }
}

template <class T>
void pad(const RadiusOutputs& out, int64_t begin) {
  for (int64_t e = begin; e < out.capacity; ++e) {
    out.centre[e] = out.neighbour[e] = 0;
    if (out.cell_shift) std::fill_n(out.cell_shift + 3 * e, 3, 0);
    if (!out.distance) continue;
    static_cast<T*>(out.distance)[e] = T(out.padding);
    std::fill_n(static_cast<T*>(out.vector) + 3 * e, 3, T(0));
  }
}

}  // namespace

template <class T>
void emit(const HitStore& store, const PointSet& points, const PointSet& centres, const Periodicity& periodic,
          const RadiusOutputs& out, int threads) {
  const bool same = centres.xyz == nullptr, geometry = out.distance != nullptr;
  const PointSet& homes = same ? points : centres;
  const int64_t edges = std::min(store.offset(homes.count), out.capacity);
  advise_huge_pages(std::min(out.centre, out.neighbour), out.capacity * 16);
  if (geometry) advise_huge_pages(out.distance, edges * int64_t(sizeof(T)));
  if (geometry) advise_huge_pages(out.vector, edges * int64_t(3 * sizeof(T)));
  if (out.cell_shift) advise_huge_pages(out.cell_shift, edges * 12);

  const Pairs<T> pairs{static_cast<const T*>(points.xyz), static_cast<const T*>(homes.xyz), same};
  Buffer<Quad<T>> quad_points, quad_homes;
  if (geometry && !periodic.cell) {
    quad_points = quads<T>(points, threads);
    if (!same) quad_homes = quads<T>(homes, threads);
  }
  const Quad<T>* quad_centres = same ? quad_points.data() : quad_homes.data();
  // Few large pieces: threads that meet in one huge page both wait for it.
  parallel_for(homes.count, std::max<int64_t>(homes.count / 16, 1 << 11), threads, [&](int64_t begin, int64_t end) {
    const int64_t limit = std::min(store.offset(end), out.capacity);
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t next = std::min(i + kTile, end), first = std::min(store.offset(i), limit);
      run_on_level<EmitIds>(store, i, next, limit, out);
      if (!geometry) continue;
      const int64_t stop = std::min(store.offset(next), limit);
      if (periodic.cell)
        periodic_geometry(pairs, static_cast<const T*>(periodic.cell), homes, periodic.num_cells >= 0, first, stop,
                          out);
      else
        run_on_level<EmitGeometry<T>>(quad_points.data(), quad_centres, first, stop, out);
    }
  });
  pad<T>(out, edges);
}

template void emit<float>(const HitStore&, const PointSet&, const PointSet&, const Periodicity&, const RadiusOutputs&,
                          int);
template void emit<double>(const HitStore&, const PointSet&, const PointSet&, const Periodicity&, const RadiusOutputs&,
                           int);

}  // namespace moeyard::cpu
