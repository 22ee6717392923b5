// Atomics, fences, and loads and stores with a cache hint (which means nothing here).
#pragma once
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "emulation/engine.hpp"

namespace moeyard::emulation {

// No floats: sums in the order of the scheduler are not deterministic.
template <class T>
concept AtomicWord = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;

// Really atomic, so that ThreadSanitizer knows it as such, and relaxed as on the device: it orders nothing else.
template <AtomicWord T, class F>
T read_modify_write(T* address, F f) {
  preempt();
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  auto* const word = reinterpret_cast<Word*>(address);
  Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, Word(f(T(old))), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return T(old);
}

}  // namespace moeyard::emulation

#define ATOMIC(name, result)                                                                   \
  template <class T>                                                                           \
  T name(T* address, std::type_identity_t<T> value) {                                          \
    return moeyard::emulation::read_modify_write(address, [=](T old) -> T { return result; }); \
  }
ATOMIC(atomicAdd, T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value)))  // wraps around
ATOMIC(atomicSub, T(std::make_unsigned_t<T>(old) - std::make_unsigned_t<T>(value)))
ATOMIC(atomicExch, (void(old), value))
ATOMIC(atomicMin, value < old ? value : old)
ATOMIC(atomicMax, old < value ? value : old)
ATOMIC(atomicOr, old | value)
ATOMIC(atomicAnd, old& value)
ATOMIC(atomicXor, old ^ value)
#undef ATOMIC

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return moeyard::emulation::read_modify_write(address, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence() { moeyard::emulation::fence(); }
inline void __threadfence_block() { moeyard::emulation::fence(); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
