// Points in columns, one array per coordinate: the form in which candidates are compared with a centre.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/buffer.hpp"
#include "common/simd.hpp"

namespace moeyard::cpu {

/// Lanes of the widest level: columns may be read, and hits may be overwritten, this far past the end.
constexpr int64_t kLanes = 16;

/// Points in the order of their cells or leaves; id is the index before sorting.
template <class T>
class Columns {
 public:
  int64_t n = 0;
  T *x = nullptr, *y = nullptr, *z = nullptr;
  int32_t* id = nullptr;

  Columns() = default;
  explicit Columns(int64_t size) {
    reserve(size);
    n = size;
  }

  int64_t room() const { return room_; }

  /// Room for `size` points; keeps the n that there are.
  void reserve(int64_t size) {
    if (size <= room_) return;
    Columns grown;
    grown.room_ = size;
    grown.xyz_ = Buffer<T>(3 * (size + kLanes));
    grown.ids_ = Buffer<int32_t>(size + kLanes);
    grown.x = grown.xyz_.data(), grown.y = grown.x + size + kLanes, grown.z = grown.y + size + kLanes;
    grown.id = grown.ids_.data();
    if (n) {
      std::copy_n(x, n, grown.x), std::copy_n(y, n, grown.y), std::copy_n(z, n, grown.z);
      std::copy_n(id, n, grown.id);
    }
    grown.n = n;
    *this = std::move(grown);
  }

  void set(int64_t k, const T* p, int64_t index) { x[k] = p[0], y[k] = p[1], z[k] = p[2], id[k] = int32_t(index); }

  /// Appends points [begin, end) of `from`; there is room. Copies whole vectors, past the end: calling memcpy for the
  /// dozen points of a run would take longer than copying them.
  MOEYARD_INLINE void append(const Columns& from, int64_t begin, int64_t end) {
    for (int64_t k = begin, at = n; k < end; k += kLanes, at += kLanes) {
      std::memcpy(x + at, from.x + k, kLanes * sizeof(T));
      std::memcpy(y + at, from.y + k, kLanes * sizeof(T));
      std::memcpy(z + at, from.z + k, kLanes * sizeof(T));
      std::memcpy(id + at, from.id + k, kLanes * sizeof(int32_t));
    }
    n += end - begin;
  }

  /// Fills the lanes after the last candidate with points that are nobody's neighbour.
  MOEYARD_INLINE void pad() {
    for (int64_t k = n; k < n + kLanes; ++k) x[k] = y[k] = z[k] = std::numeric_limits<T>::infinity(), id[k] = -1;
  }

 private:
  int64_t room_ = -1;  // nothing allocated: even an empty block has lanes to pad
  Buffer<T> xyz_;
  Buffer<int32_t> ids_;
};

/// Points [begin, end) of columns.
struct Range {
  int64_t begin, end;
};

/// Makes `block` the points of some ranges, padded.
template <class T>
struct Pack {
  template <Simd>
  static MOEYARD_INLINE void run(const Columns<T>& from, const Range* ranges, int count, Columns<T>* block) {
    for (int k = 0; k < count; ++k) block->append(from, ranges[k].begin, ranges[k].end);
    block->pad();
  }
};
template <class T>
void pack(const Columns<T>& from, const Range* ranges, int count, Columns<T>& block) {
  int64_t size = 0;
  for (int k = 0; k < count; ++k) size += ranges[k].end - ranges[k].begin;
  block.n = 0;
  block.reserve(size);
  run_on_level<Pack<T>>(from, ranges, count, &block);
}

}  // namespace moeyard::cpu
