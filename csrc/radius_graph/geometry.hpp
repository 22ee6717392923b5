// The one place where coordinates are subtracted: search, fill and selection of both devices take their distances from
// here.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/host_device.hpp"

namespace moeyard {

template <class T>
struct Vec3 {
  T x, y, z;
};

template <class T>
MOEYARD_HD T squared_norm(const Vec3<T>& d) {
  return (d.x * d.x + d.y * d.y) + d.z * d.z;
}

// As a constant, because a kernel cannot call std::numeric_limits.
template <class T>
constexpr double kSmallestNormal = std::numeric_limits<T>::min();

/// Below this, squares in T underflow and the edge test is coarser than its relative rounding: part of every slack.
template <class T>
MOEYARD_HD double underflow_length() {
  return 8 * sqrt(kSmallestNormal<T>);
}

struct Shift {
  int32_t n[3];
};

MOEYARD_HD bool negative(const Shift& s) { return s.n[0] ? s.n[0] < 0 : s.n[1] ? s.n[1] < 0 : s.n[2] < 0; }

MOEYARD_HD bool operator<(const Shift& a, const Shift& b) {
  for (int k = 0; k < 3; ++k)
    if (a.n[k] != b.n[k]) return a.n[k] < b.n[k];
  return false;
}

/// [n,3] coordinates.
template <class T>
struct View {
  const T* xyz;
  int64_t n;
};

template <class T>
struct Box {
  T low[3], high[3];
};

/// Vectors from centres to points by their global indices.
template <class T>
struct Pairs {
  const T* points;
  const T* centres;
  bool same;  // one set: directions of a pair mirror each other

  MOEYARD_HD Vec3<T> operator()(int64_t i, int64_t j) const {
    const T *p = points + 3 * j, *c = centres + 3 * i;
    return {p[0] - c[0], p[1] - c[1], p[2] - c[2]};
  }

  MOEYARD_HD Vec3<T> operator()(int64_t i, int64_t j, const Shift& s, const T* cell) const {
    if (!same || i < j || (i == j && !negative(s))) return shifted(points + 3 * j, s, cell, centres + 3 * i);
    const Vec3<T> d = shifted(points + 3 * i, {{-s.n[0], -s.n[1], -s.n[2]}}, cell, points + 3 * j);
    return {-d.x, -d.y, -d.z};
  }

 private:
  static MOEYARD_HD Vec3<T> shifted(const T* p, const Shift& s, const T* cell, const T* from) {
    T d[3];
    for (int c = 0; c < 3; ++c)
      d[c] = (p[c] + ((T(s.n[0]) * cell[c] + T(s.n[1]) * cell[3 + c]) + T(s.n[2]) * cell[6 + c])) - from[c];
    return {d[0], d[1], d[2]};
  }
};

}  // namespace moeyard
