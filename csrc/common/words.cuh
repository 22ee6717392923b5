// Words of 1 to 16 bytes, as kernels move them that copy rows: read once, written once.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "common/device.cuh"

namespace moeyard::cuda {
namespace {

constexpr int kVector = 16;  // bytes of the widest word

/// The unsigned type that the hardware moves as one word.
template <int kBytes>
struct Bits;
template <>
struct Bits<1> {
  using type = uint8_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<8> {
  using type = uint64_t;
};
template <>
struct Bits<16> {
  using type = uint4;
};

/// N elements that are loaded and stored together.
template <class T, int N>
struct alignas(N * sizeof(T)) Word {
  T item[N];
};

/// Zeros without a look at the address, unless `wanted`. Past the first-level cache.
template <class W>
__device__ W load_if(bool wanted, const W* from) {
  using B = typename Bits<sizeof(W)>::type;
  W word;
  B bits{};
  if constexpr (sizeof(W) == kVector)
    bits = load_streaming_if(wanted, reinterpret_cast<const B*>(from));
  else if (wanted)
    bits = __ldg(reinterpret_cast<const B*>(from));
  memcpy(&word, &bits, sizeof(W));
  return word;
}
template <class W>
__device__ W load(const W* from) {
  return load_if(true, from);
}

template <class W>
__device__ void store(W* to, const W& word) {
  using B = typename Bits<sizeof(W)>::type;
  B bits;
  memcpy(&bits, &word, sizeof(W));
  if constexpr (sizeof(W) == kVector)
    store_streaming(reinterpret_cast<B*>(to), bits);
  else
    *reinterpret_cast<B*>(to) = bits;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Bytes of the widest word in which rows of row_bytes at these addresses can be moved.
inline int64_t word_bytes(int64_t row_bytes, std::initializer_list<const void*> addresses) {
  uint64_t bits = uint64_t(row_bytes) | kVector;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return int64_t(bits & (0 - bits));
}

/// Calls f with an unsigned word of so many bytes.
template <class F>
void with_word(int64_t bytes, F&& f) {
  switch (bytes) {
    case 16: return f(uint4{});
    case 8: return f(uint64_t{});
    case 4: return f(uint32_t{});
    case 2: return f(uint16_t{});
    default: return f(uint8_t{});
  }
}

}  // namespace
}  // namespace moeyard::cuda
