// What the permute and unpermute kernels do with single rows: copies, sums and dot products, as plain loops that the
// compiler turns into the vector instructions of the caller's SIMD level. Every order of sums is fixed.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.hpp"
#include "common/simd.hpp"

#ifdef MOEYARD_X86
#include <emmintrin.h>
#endif

namespace moeyard::cpu {

template <class T>
MOEYARD_INLINE sum_t<T> to_sum(T v) {
  if constexpr (std::is_integral_v<T>)
    return sum_t<T>(v);
  else
    return to_float(v);
}

template <class T>
MOEYARD_INLINE T from_sum(sum_t<T> v) {
  if constexpr (std::is_integral_v<T>)
    return T(v);
  else
    return from_float<T>(v);
}

// Sixteen running sums and a fixed tree over them: the order depends on n alone.
template <class T>
MOEYARD_INLINE sum_t<T> dot(const T* a, const T* b, int64_t n) {
  constexpr int kLanes = 16;
  sum_t<T> lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += to_sum(a[i + l]) * to_sum(b[i + l]);
  for (int l = 0; i < n; ++i, ++l) lane[l] += to_sum(a[i]) * to_sum(b[i]);
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <class T>
MOEYARD_INLINE void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
}

template <class T>
struct Term {
  const T* row;
  sum_t<T> weight;
};

// to = sum (zero for the first terms) + the terms, one after the other. N at a time, so that a sum is loaded and stored
// once per N rows. `to` is `sum` itself, or the output, whose type the total is rounded to.
template <int N, bool kWeighted, bool kFirst, class T, class To>
MOEYARD_INLINE void add_terms(const Term<T>* terms, const sum_t<T>* sum, int64_t n, To* to) {
  const T* row[N];
  sum_t<T> weight[N];
  for (int j = 0; j < N; ++j) row[j] = terms[j].row, weight[j] = terms[j].weight;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    sum_t<T> s = kFirst ? sum_t<T>{} : sum[i];
    for (int j = 0; j < N; ++j) s += kWeighted ? weight[j] * to_sum(row[j][i]) : to_sum(row[j][i]);
    if constexpr (std::is_same_v<To, sum_t<T>>)
      to[i] = s;
    else
      to[i] = from_sum<T>(s);
  }
}

template <class T>
MOEYARD_INLINE void scale_row(const T* from, sum_t<T> weight, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_sum<T>(weight * to_sum(from[i]));
}

// Copies around the caches: the line that is written is not read first, and pushes nothing out. Whole cache lines only,
// because a line written in part costs more than it saves.
MOEYARD_INLINE void stream_bytes(const void* from, int64_t bytes, void* to) {
#ifdef MOEYARD_X86
  constexpr int64_t kLine = 64;
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  int64_t i = std::min(bytes, int64_t(-reinterpret_cast<uintptr_t>(to) % kLine));
  if (i) std::memcpy(target, source, size_t(i));
  for (; i + kLine <= bytes; i += kLine)
    for (int64_t part = i; part < i + kLine; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + part)));
  if (i < bytes) std::memcpy(target + i, source + i, size_t(bytes - i));
#else
  std::memcpy(to, from, size_t(bytes));
#endif
}

// Makes streamed bytes visible to other threads; before a task ends.
inline void end_stream() {
#ifdef MOEYARD_X86
  _mm_sfence();
#endif
}

}  // namespace moeyard::cpu
