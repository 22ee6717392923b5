// Lists of hits that a warp keeps in shared or global memory: sorting them, and keeping the nearest.
#pragma once
#include "radius_graph/hits.cuh"

namespace moeyard::cuda {
namespace {

/// Sorts n items, for a whole warp: after(a, b) says whether item a belongs behind item b, which `swap` changes. A
/// bitonic network in which larger items always move up, so that those past the end may be thought of as infinite.
template <class After, class Swap>
__device__ void sort_list(int64_t n, After&& after, Swap&& swap) {
  for (int64_t size = 2; size / 2 < n; size *= 2)
    for (int64_t stride = size / 2; stride > 0; stride /= 2) {
      __syncwarp();
      for (int64_t pair = lane_number();; pair += 32) {
        const int64_t block = pair / stride * (2 * stride), offset = pair % stride, low = block + offset;
        if (low >= n) break;
        // The first step of a merge compares with the mirror image.
        const int64_t high = stride == size / 2 ? block + 2 * stride - 1 - offset : low + stride;
        if (high < n && after(low, high)) swap(low, high);
      }
    }
  __syncwarp();
}

__device__ inline void sort_keys(uint64_t* key, int64_t n) {
  sort_list(
      n, [&](int64_t a, int64_t b) { return key[a] > key[b]; },
      [&](int64_t a, int64_t b) {
        const uint64_t other = key[a];
        key[a] = key[b], key[b] = other;
      });
}

/// The keys of all hits of a centre, in global memory where its edges go. Of the centre on which the capacity ends only
/// the first edges are wanted, and there is room for 32 more.
struct KeyRow {
  uint64_t* key;
  int64_t wanted, n = 0;  // wanted: up to 0 beyond the capacity
  bool cut;

  __device__ KeyRow(uint64_t* keys, const int64_t* offsets, int64_t i, int64_t capacity)
      : key(keys + offsets[i]), wanted(min(offsets[i + 1], capacity) - offsets[i]), cut(offsets[i + 1] > capacity) {}

  __device__ void take(bool hit, uint64_t key_) {
    const unsigned hits = __ballot_sync(kAllLanes, hit);
    if (cut && n > wanted) tidy();
    if (hit) key[n + __popc(hits & ((1u << lane_number()) - 1))] = key_;
    n += __popc(hits);
  }

  /// Leaves the wanted ones, sorted.
  __device__ void tidy() {
    sort_keys(key, n);
    n = min(n, wanted);
  }
};

/// The k nearest hits so far, ties by key, and some more that came since it was last tidied.
template <class T>
struct NearestList {
  T* d2;
  uint64_t* key;
  int64_t k, room;  // room: at least k + 32
  int64_t n = 0;
  bool full = false;  // the last of k is a bound

  __device__ bool after(int64_t a, int64_t b) const { return d2[a] > d2[b] || (d2[a] == d2[b] && key[a] > key[b]); }

  /// Empties it, when no lane reads it any more.
  __device__ void clear() {
    __syncwarp();
    n = 0, full = false;
  }

  /// Leaves the k nearest, sorted.
  __device__ void tidy() {
    sort_list(
        n, [&](int64_t a, int64_t b) { return after(a, b); },
        [&](int64_t a, int64_t b) {
          const T other_d2 = d2[a];
          const uint64_t other = key[a];
          d2[a] = d2[b], key[a] = key[b];
          d2[b] = other_d2, key[b] = other;
        });
    n = min(n, k);
    full = n == k;
  }

  /// Takes each lane's hit, and lowers the limit when it can. What is no nearer than a full list goes by.
  __device__ void take(bool hit, T d2_, uint64_t key_, const Centre<T>& centre, Limit<T>& limit) {
    const unsigned hits = __ballot_sync(kAllLanes, hit);
    if (!hits) return;
    if (hit) {
      const int64_t at = n + __popc(hits & ((1u << lane_number()) - 1));
      d2[at] = d2_, key[at] = key_;
    }
    n += __popc(hits);
    if (n < k || (full && n + 32 <= room)) return;
    tidy();
    limit.set(centre, d2[k - 1]);
  }
};

}  // namespace
}  // namespace moeyard::cuda
