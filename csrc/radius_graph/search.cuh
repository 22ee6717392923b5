// The kernels of a search: how many edges each centre has, and the edges. A warp works on one centre at a time.
#pragma once
#include "radius_graph/edges.cuh"
#include "radius_graph/lists.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kSearchThreads = 128, kSearchWarps = kSearchThreads / 32;

/// The last hit that a capped centre keeps, when it keeps not all of them.
template <class T>
struct Bound {
  T d2;  // infinite: it keeps all
  int32_t j;
  Shift s;

  __device__ bool keeps(T d2_, int64_t j_, const Shift& s_) const {
    if (d2_ != d2) return d2_ < d2;
    return j_ != j ? j_ < j : !(s < s_);
  }
};

/// What the kernels of one search read and write.
template <class T>
struct Search {
  Call<T> call;
  Tree<T> tree;
  T limit2;          // the largest square of an edge's length
  Bound<T>* bounds;  // [centres] of a symmetric selection; else null
  int64_t* offsets;  // [centres + 1] first edges
  RadiusOutputs out;
  uint64_t* keys;  // [capacity + 32] of edges, not yet in order; null where each centre's are selected in a list
  void* lists;     // memory of lists, if they do not fit shared memory
  int64_t list_room;

  __device__ int64_t first_centre() const { return int64_t(blockIdx.x) * kSearchWarps + threadIdx.x / 32; }
  __device__ int64_t step() const { return int64_t(gridDim.x) * kSearchWarps; }
  /// Centres in the order of the tree lie together, and so do the points that they ask for.
  __device__ int64_t centre(int64_t number) const { return call.pairs.same ? tree.id[number] : number; }
};

/// Whether either end of a pair keeps it, for a symmetric selection.
template <class T>
__device__ bool kept(const Search<T>& s, const Centre<T>& centre, bool hit, T d2, uint64_t key) {
  if (!hit || !s.bounds) return hit;
  const int64_t j = int64_t(key >> 32);
  const Shift shift = shift_of(s.call, centre, j, int64_t(key & 0xffffffffu));
  if (s.bounds[centre.i].keeps(d2, j, shift)) return true;
  return s.bounds[j].keeps(d2, centre.i, {{-shift.n[0], -shift.n[1], -shift.n[2]}});
}

/// Calls take(hit, key) for all that is within the limit, until it returns false.
template <class T, class Take>
__device__ void for_each_kept(const Search<T>& s, Centre<T>& centre, Take&& take) {
  if (centre.isolated) return;
  Limit<T> limit(centre, s.limit2);
  if (centre.periodic() && !centre.choose_images(s.call, limit.reach())) return;
  for_each_hit<false>(s.call, s.tree, centre, limit, [&](bool hit, T d2, uint64_t key) {
    if (!take(kept(s, centre, hit, d2, key), key)) limit.end();
  });
}

// ---- counts ---------------------------------------------------------------------------------------------------------

/// How many edges each centre has.
template <class T>
__global__ void __launch_bounds__(kSearchThreads) count_edges_kernel(Search<T> s) {
  const RadiusOptions& options = s.call.options;
  for (int64_t w = s.first_centre(); w < s.call.centres.set.count; w += s.step()) {
    Centre<T> centre(s.call, s.centre(w));
    // Of a crowd only the cap matters.
    const int64_t most = options.max_neighbors > 0 && !s.bounds ? options.max_neighbors : int64_t(1) << 62;
    int64_t n = 0;
    for_each_kept(s, centre, [&](bool hit, uint64_t) { return (n += __popc(__ballot_sync(kAllLanes, hit))) <= most; });
    const bool cut = options.max_neighbors > 0 && n > options.max_neighbors && !s.bounds;
    if (lane_number() > 0) continue;
    if (cut) atomicAdd(reinterpret_cast<unsigned long long*>(s.out.truncated), 1ull);
    s.out.num_neighbors[centre.i] = int32_t(cut ? options.max_neighbors : n);
  }
}

/// The same for the k nearest: a matter of numbers alone.
template <class T>
__global__ void __launch_bounds__(kThreads) count_nearest_kernel(Search<T> s) {
  const int64_t i = thread_number();
  if (i >= s.call.centres.set.count) return;
  const Centre<T> centre(s.call, i);
  const int64_t others = centre.query.range.size() - (s.call.pairs.same && !s.call.options.loop);
  s.out.num_neighbors[i] =
      centre.isolated ? 0
                      : int32_t(centre.periodic() ? s.call.options.k : min(s.call.options.k, max(others, int64_t(0))));
}

// ---- edges ----------------------------------------------------------------------------------------------------------

/// All edges of each centre, by way of their keys in global memory.
template <class T>
__global__ void __launch_bounds__(kSearchThreads) all_edges_kernel(Search<T> s) {
  for (int64_t w = s.first_centre(); w < s.call.centres.set.count; w += s.step()) {
    Centre<T> centre(s.call, s.centre(w));
    KeyRow row(s.keys, s.offsets, centre.i, s.out.capacity);
    if (row.wanted <= 0) continue;
    for_each_kept(s, centre, [&](bool hit, uint64_t key) {
      row.take(hit, key);
      return true;
    });
    row.tidy();
    write_edges(s.call, s.out, s.offsets[centre.i], centre, row.key, row.n);
  }
}

/// The k nearest in free space, or within the limit.
template <class T>
__device__ void find_nearest(const Search<T>& s, Centre<T>& centre, NearestList<T>& list, T limit2) {
  Limit<T> limit(centre, limit2);
  if (centre.periodic() && !centre.choose_images(s.call, limit.reach())) return;
  for_each_hit<true>(s.call, s.tree, centre, limit,
                     [&](bool hit, T d2, uint64_t key) { list.take(hit, d2, key, centre, limit); });
}

/// The k nearest of a periodic graph, in growing distances: along the shortest cell vector alone a point meets two
/// images of itself per length, which bounds what can ever be needed.
template <class T>
__device__ void find_nearest_images(const Search<T>& s, Centre<T>& centre, NearestList<T>& list) {
  const double shortest = centre.cell->lattice.shortest(), bound = (0.5 * double(list.k) + 1) * shortest;
  for (double radius = 0.5 * shortest; !centre.isolated; radius *= 2) {
    list.clear();
    // All that is nearer than the bound and more is asked for in the end: the edge test's rounding comes on top.
    const double reach = min(radius, bound) * (radius < bound ? 1 : 1 + 1e-3);
    find_nearest(s, centre, list, T(reach * reach));
    if (list.n >= list.k || radius >= bound) return;
  }
}

template <class T>
__device__ NearestList<T> make_list(const Search<T>& s, void* shared) {
  const int64_t k = s.call.options.k > 0 ? s.call.options.k : s.call.options.max_neighbors, room = s.list_room;
  const int64_t warp = s.lists ? s.first_centre() : int64_t(threadIdx.x) / 32;
  char* const memory =
      static_cast<char*>(s.lists ? s.lists : shared) + warp * room * int64_t(sizeof(uint64_t) + sizeof(T));
  uint64_t* const key = reinterpret_cast<uint64_t*>(memory);
  return {reinterpret_cast<T*>(key + room), key, k, room};
}

template <class T>
__device__ void fill_list(const Search<T>& s, Centre<T>& centre, NearestList<T>& list) {
  list.clear();
  if (!centre.isolated) {
    if (s.call.options.k > 0 && centre.periodic())
      find_nearest_images(s, centre, list);
    else
      find_nearest(s, centre, list, s.limit2);
  }
  list.tidy();
}

/// The edges of each centre that are selected by distance.
template <class T>
__global__ void __launch_bounds__(kSearchThreads) nearest_edges_kernel(Search<T> s) {
  CU_DYN_SHARED(char, shared);
  NearestList<T> list = make_list(s, shared);
  for (int64_t w = s.first_centre(); w < s.call.centres.set.count; w += s.step()) {
    Centre<T> centre(s.call, s.centre(w));
    const int64_t count = s.offsets[centre.i + 1] - s.offsets[centre.i];
    if (count == 0 || s.offsets[centre.i] >= s.out.capacity) continue;
    fill_list(s, centre, list);
    sort_keys(list.key, list.n);
    // Points whose squared distances are infinite: rows must not stay unwritten.
    if (list.n < count) {
      atomicOr(s.call.errors, unsigned(kPointsTooDistant));
      for (int64_t at = list.n + lane_number(); at < count; at += 32) list.key[at] = key_of(centre.i, 0);
      __syncwarp();
    }
    write_edges(s.call, s.out, s.offsets[centre.i], centre, list.key, count);
  }
}

/// Where each centre's selection ends.
template <class T>
__global__ void __launch_bounds__(kSearchThreads) bounds_kernel(Search<T> s, Bound<T>* bounds) {
  CU_DYN_SHARED(char, shared);
  NearestList<T> list = make_list(s, shared);
  for (int64_t w = s.first_centre(); w < s.call.centres.set.count; w += s.step()) {
    Centre<T> centre(s.call, s.centre(w));
    fill_list(s, centre, list);
    Bound<T> bound{kInfinite<T>, 0, {{0, 0, 0}}};
    if (list.n == list.k) {
      const uint64_t last = list.key[list.k - 1];
      bound = {list.d2[list.k - 1], int32_t(last >> 32),
               shift_of(s.call, centre, int64_t(last >> 32), int64_t(last & 0xffffffffu))};
    }
    if (lane_number() == 0) bounds[centre.i] = bound;
  }
}

}  // namespace
}  // namespace moeyard::cuda
