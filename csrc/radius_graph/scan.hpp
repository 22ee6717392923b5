// The innermost loop: one centre against a packed block of candidates. Each SIMD level does the same operations in the
// same order, so all give the same hits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/simd.hpp"
#include "radius_graph/geometry.hpp"

namespace moeyard::cpu {

/// Lanes of the widest level: blocks are padded to read, and hits may be overwritten, this far past the end.
constexpr int64_t kLanes = 16;

/// Points in the order of their cells or leaves, one array per coordinate; id is the index before sorting.
template <class T>
struct Columns {
  std::vector<T> x, y, z;
  std::vector<int32_t> id;
  int64_t n = 0;

  void resize(int64_t size) {
    n = size;
    if (int64_t(x.size()) >= size + kLanes) return;
    const size_t room = size_t(size + size / 2 + kLanes);
    x.resize(room), y.resize(room), z.resize(room), id.resize(room);
  }
  void set(int64_t k, const T* p, int64_t index) { x[k] = p[0], y[k] = p[1], z[k] = p[2], id[k] = int32_t(index); }
  void append(const Columns& from, int64_t begin, int64_t end) {
    const int64_t at = n;
    resize(n + end - begin);
    std::copy(from.x.begin() + begin, from.x.begin() + end, x.begin() + at);
    std::copy(from.y.begin() + begin, from.y.begin() + end, y.begin() + at);
    std::copy(from.z.begin() + begin, from.z.begin() + end, z.begin() + at);
    std::copy(from.id.begin() + begin, from.id.begin() + end, id.begin() + at);
  }
  /// Fills the lanes after the last candidate with points that are nobody's neighbour.
  void pad() {
    for (int64_t k = n; k < n + kLanes; ++k) x[k] = y[k] = z[k] = std::numeric_limits<T>::infinity(), id[k] = -1;
  }
};

/// Writes the ids of candidates with squared distance < r2 to `hits` (room for n + kLanes), leaving out `self` (-1: no
/// one), and returns their number. Order is that of the block. The block is padded.
template <class T>
using Scan = int64_t (*)(const Columns<T>& block, const T* centre, T r2, int32_t self, int32_t* hits);

template <class T>
Scan<T> pick_scan(Simd level);

}  // namespace moeyard::cpu
