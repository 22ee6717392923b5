// Vectors of one number per lane, for kernels that do the same for several rows (or columns) at once. The compiler's
// vector types: + - * / and comparisons work lane by lane with IEEE rounding, so a lane gets the bits that a scalar
// would. Everything is MOEYARD_INLINE, to be compiled for the caller's instruction set (see simd.hpp).
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/dtype.hpp"
#include "common/simd.hpp"

#define MOEYARD_LANES 1

namespace moeyard {

template <class T, int W>
struct LaneType {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Lanes = typename LaneType<T, W>::type;

/// How many numbers of type T a register of the level holds.
template <Simd level, class T>
constexpr int kLanesOf = (level == Simd::avx512 ? 64
                          : level == Simd::avx2 ? 32
                                                : 16) /
                         int(sizeof(T));

/// Numbers per vector; 1 for a plain number.
template <class V>
constexpr int kWidth = 1;
template <class V>
  requires requires(V v) { v[0]; }
constexpr int kWidth<V> = int(sizeof(V) / sizeof(V{}[0]));

template <class V>
struct ElementOf {
  using type = V;
};
template <class V>
  requires requires(V v) { v[0]; }
struct ElementOf<V> {
  using type = std::remove_cvref_t<decltype(V{}[0])>;
};
template <class V>
using element_t = typename ElementOf<V>::type;

// Vectors that need not be aligned are moved with memcpy, which becomes one instruction.
template <class V>
MOEYARD_INLINE V load_lanes(const element_t<V>* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
MOEYARD_INLINE void store_lanes(element_t<V>* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

/// c in every lane. Subtracting 0 changes no number, -0 included, so that nothing is left of it.
template <class V>
MOEYARD_INLINE V broadcast(element_t<V> c) {
  return c - V{};
}

/// at(l) in lane l. Not by way of memory: a vector can't be loaded before the last of its numbers is written.
template <class V, class At, size_t... l>
MOEYARD_INLINE V each_lane(At&& at, std::index_sequence<l...>) {
  return V{at(l)...};
}
template <class V, class At>
MOEYARD_INLINE V each_lane(At&& at) {
  return each_lane<V>(at, std::make_index_sequence<size_t(kWidth<V>)>());
}

/// b where neither is lower, or one is NaN.
template <class V>
MOEYARD_INLINE V lower(V a, V b) {
  return a < b ? a : b;
}
template <class V>
MOEYARD_INLINE V higher(V a, V b) {
  return a > b ? a : b;
}

/// Whether any lane of a comparison holds.
template <class M>
MOEYARD_INLINE bool any_lane(M mask) {
  element_t<M> all = 0;
  for (int l = 0; l < kWidth<M>; ++l) all |= mask[l];
  return all != 0;
}

template <class V, size_t... i>
MOEYARD_INLINE void unzip_lanes(V a, V b, V& even, V& odd, std::index_sequence<i...>) {
  even = __builtin_shufflevector(a, b, (2 * i)...);
  odd = __builtin_shufflevector(a, b, (2 * i + 1)...);
}
template <class V, size_t... i>
MOEYARD_INLINE void zip_lanes(V a, V b, V& low, V& high, std::index_sequence<i...>) {
  constexpr size_t W = sizeof...(i);
  low = __builtin_shufflevector(a, b, (i / 2 + i % 2 * W)...);
  high = __builtin_shufflevector(a, b, (W / 2 + i / 2 + i % 2 * W)...);
}

/// Turns 8 x 8 numbers: pairs and then quads within the halves of a register, and then the halves. Each of the 24 steps
/// is one instruction of AVX2, which unzipping whole registers is not.
template <class V>
MOEYARD_INLINE void transpose_8(V (&v)[8]) {
  V pairs[8], quads[8];
  for (int j = 0; j < 8; j += 2) {
    pairs[j] = __builtin_shufflevector(v[j], v[j + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[j + 1] = __builtin_shufflevector(v[j], v[j + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int j = 0; j < 8; j += 4)
    for (int i = 0; i < 2; ++i) {
      quads[j + 2 * i] = __builtin_shufflevector(pairs[j + i], pairs[j + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      quads[j + 2 * i + 1] = __builtin_shufflevector(pairs[j + i], pairs[j + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; ++j) {
    v[j] = __builtin_shufflevector(quads[j], quads[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[j + 4] = __builtin_shufflevector(quads[j], quads[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

/// v holds a row-major matrix of W rows and N columns, W the number of lanes and N a power of 2; then v[j] is column j.
/// Each round moves the lowest bit of every element's position to the top.
template <int N, class V>
MOEYARD_INLINE void rows_to_columns(V (&v)[N]) {
  if constexpr (N == 8 && kWidth<V> == 8) return transpose_8(v);
  V next[N];
  for (int round = 1; round < N; round *= 2) {
    for (int j = 0; j < N / 2; ++j)
      unzip_lanes(v[2 * j], v[2 * j + 1], next[j], next[j + N / 2], std::make_index_sequence<size_t(kWidth<V>)>());
    for (int j = 0; j < N; ++j) v[j] = next[j];
  }
}

/// The inverse of rows_to_columns.
template <int N, class V>
MOEYARD_INLINE void columns_to_rows(V (&v)[N]) {
  if constexpr (N == 8 && kWidth<V> == 8) return transpose_8(v);
  V next[N];
  for (int round = 1; round < N; round *= 2) {
    for (int j = 0; j < N / 2; ++j)
      zip_lanes(v[j], v[j + N / 2], next[2 * j], next[2 * j + 1], std::make_index_sequence<size_t(kWidth<V>)>());
    for (int j = 0; j < N; ++j) v[j] = next[j];
  }
}

// ---- the 16-bit floats, as the scalar conversions in dtype.hpp ---------------------------------------------------

template <class V>
MOEYARD_INLINE V load_as(const element_t<V>* from) {
  return load_lanes<V>(from);
}
template <class V>
MOEYARD_INLINE V load_as(const bf16* from) {
  constexpr int W = kWidth<V>;
  const auto half = load_lanes<Lanes<uint16_t, W>>(reinterpret_cast<const uint16_t*>(from));
  return (V)(__builtin_convertvector(half, Lanes<uint32_t, W>) << 16);
}
template <class V>
MOEYARD_INLINE V load_as(const f16* from) {
  constexpr int W = kWidth<V>;
  using U = Lanes<uint32_t, W>;
  const U half = __builtin_convertvector(load_lanes<Lanes<uint16_t, W>>(reinterpret_cast<const uint16_t*>(from)), U);
  const U sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  const V magnitude = (V)(rest << 13) * std::bit_cast<float>(uint32_t(254 - 15) << 23);
  return (V)(sign | (rest >= 0x7c00u ? (0x7f800000u | ((rest & 0x3ffu) << 13)) : (U)magnitude));
}

template <class V>
MOEYARD_INLINE void store_as(element_t<V>* to, V v) {
  store_lanes<V>(to, v);
}
template <class V>
MOEYARD_INLINE void store_as(bf16* to, V v) {
  constexpr int W = kWidth<V>;
  using U = Lanes<uint32_t, W>;
  const U bits = (U)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U half = (bits & 0x7fffffffu) > 0x7f800000u ? broadcast<U>(0x7fc0u) : rounded;
  store_lanes(reinterpret_cast<uint16_t*>(to), __builtin_convertvector(half, Lanes<uint16_t, W>));
}
template <class V>
MOEYARD_INLINE void store_as(f16* to, V v) {
  constexpr int W = kWidth<V>;
  using U = Lanes<uint32_t, W>;
  const U bits = (U)v, sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  const U subnormal = (U)((V)rest + 0.5f) - 0x3f000000u;
  const U normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const U finite = rest < 0x38800000u ? subnormal : rest >= 0x477ff000u ? broadcast<U>(0x7c00u) : normal;
  const U half = sign | (rest > 0x7f800000u ? broadcast<U>(0x7e00u) : finite);
  store_lanes(reinterpret_cast<uint16_t*>(to), __builtin_convertvector(half, Lanes<uint16_t, W>));
}

}  // namespace moeyard
