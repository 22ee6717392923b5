// CUDA's vector types with CUDA's names, sizes and alignments, so that no CUDA header is needed.
#pragma once
#include <cstddef>

// Pairs and quadruples are as aligned as they are large, up to 16 bytes; triples only as much as an element.
#define MOEYARD_VECTOR_TYPES(T, name)                                                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                      \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }              \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

MOEYARD_VECTOR_TYPES(signed char, char)
MOEYARD_VECTOR_TYPES(unsigned char, uchar)
MOEYARD_VECTOR_TYPES(short, short)
MOEYARD_VECTOR_TYPES(unsigned short, ushort)
MOEYARD_VECTOR_TYPES(int, int)
MOEYARD_VECTOR_TYPES(unsigned, uint)
MOEYARD_VECTOR_TYPES(long long, longlong)
MOEYARD_VECTOR_TYPES(unsigned long long, ulonglong)
MOEYARD_VECTOR_TYPES(float, float)
MOEYARD_VECTOR_TYPES(double, double)
#undef MOEYARD_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
