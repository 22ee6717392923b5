// Barriers and warp collectives as kernels call them. Which collective a lane takes part in is told by its mask and
// by its line, so lanes that call "the same" function from two places of the source do not meet.
#pragma once
#include <cstring>
#include <type_traits>

#include "emulation/engine.hpp"

#define HERE moeyard::emulation::Location where = std::source_location::current()
constexpr int warpSize = 32;

namespace moeyard::emulation {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T shuffled(const char* name, unsigned mask, T value, unsigned source, Location where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles 32 and 64 bits");
  const uint64_t bits = collective(name, WarpOp::shuffle, mask, packed(value), source, where);
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate, Location where) {
  return unsigned(collective(name, WarpOp::ballot, mask, predicate, 0, where));
}

}  // namespace moeyard::emulation

inline void __syncthreads(HERE) { moeyard::emulation::barrier(moeyard::emulation::BarrierOp::plain, 0, where); }
inline int __syncthreads_count(int predicate, HERE) {
  return moeyard::emulation::barrier(moeyard::emulation::BarrierOp::count, predicate, where);
}
inline int __syncthreads_and(int predicate, HERE) {
  return moeyard::emulation::barrier(moeyard::emulation::BarrierOp::all, predicate, where);
}
inline int __syncthreads_or(int predicate, HERE) {
  return moeyard::emulation::barrier(moeyard::emulation::BarrierOp::any, predicate, where);
}
inline void __syncwarp(unsigned mask = moeyard::emulation::kAllLanes, HERE) {
  moeyard::emulation::collective("__syncwarp", moeyard::emulation::WarpOp::sync, mask, 0, 0, where);
}

// `width` is a power of two: the warp falls into parts of that many lanes, and none reads from another part.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, HERE) {
  const unsigned lane = moeyard::emulation::current->lane, inside = unsigned(width - 1);
  return moeyard::emulation::shuffled("__shfl_sync", mask, value, (lane & ~inside) | (unsigned(source) & inside),
                                      where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, HERE) {
  const unsigned lane = moeyard::emulation::current->lane, other = lane ^ unsigned(bits);
  // As on the device: a later part is out of reach, an earlier one is not.
  const unsigned source = other / unsigned(width) > lane / unsigned(width) ? lane : other;
  return moeyard::emulation::shuffled("__shfl_xor_sync", mask, value, source, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HERE) {
  const unsigned lane = moeyard::emulation::current->lane;
  const unsigned source = (lane & unsigned(width - 1)) >= delta ? lane - delta : lane;
  return moeyard::emulation::shuffled("__shfl_up_sync", mask, value, source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HERE) {
  const unsigned lane = moeyard::emulation::current->lane;
  const unsigned source = (lane & unsigned(width - 1)) + delta < unsigned(width) ? lane + delta : lane;
  return moeyard::emulation::shuffled("__shfl_down_sync", mask, value, source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HERE) {
  return moeyard::emulation::ballot("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, HERE) {
  return moeyard::emulation::ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HERE) {
  return moeyard::emulation::ballot("__all_sync", mask, predicate == 0, where) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, HERE) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA matches 32 and 64 bits");
  using namespace moeyard::emulation;
  return unsigned(collective("__match_any_sync", WarpOp::match, mask, packed(value), 0, where));
}

#define REDUCTION(name, T, op)                                                                                        \
  inline T name(unsigned mask, T value, HERE) {                                                                       \
    return T(moeyard::emulation::collective(#name, moeyard::emulation::WarpOp::op, mask, unsigned(value), 0, where)); \
  }
REDUCTION(__reduce_add_sync, int, add)
REDUCTION(__reduce_add_sync, unsigned, add)
REDUCTION(__reduce_min_sync, int, min_signed)
REDUCTION(__reduce_min_sync, unsigned, min_unsigned)
REDUCTION(__reduce_max_sync, int, max_signed)
REDUCTION(__reduce_max_sync, unsigned, max_unsigned)
#undef REDUCTION
