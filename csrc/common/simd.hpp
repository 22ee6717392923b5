// Which instruction set the CPU kernels use. All levels give the same bits (but for the matrix products of expert_ffn);
// MOEYARD_SIMD=baseline|avx2|avx512 forces a lower one than the machine has, so that tests can run them all. Elsewhere
// than on x86-64 there is one level, and the compiler's own vector instructions (NEON) are in it.
#pragma once
#include <string>
#include <utility>

#ifdef __x86_64__
#define MOEYARD_X86 1
// No "fma": a contraction that slipped through would change bits.
#define MOEYARD_TARGET_AVX2 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt")))
#define MOEYARD_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,lzcnt,popcnt")))
#endif

// A function compiled into each of its callers, with their instruction set.
#define MOEYARD_INLINE inline __attribute__((always_inline))
#define MOEYARD_INLINE_LAMBDA __attribute__((always_inline))

namespace moeyard {

enum class Simd : int { baseline = 0, avx2 = 1, avx512 = 2 };

/// The best level of this machine that was also compiled in.
Simd simd_best();

/// The level in force: MOEYARD_SIMD if set, else simd_best(). Read once per process. Throws std::invalid_argument for
/// an unknown name or a level that this machine cannot run.
Simd simd_level();

std::string simd_name(Simd level);

#ifdef MOEYARD_X86
template <class Kernel, class... Args>
MOEYARD_TARGET_AVX512 auto run_avx512(const Args&... args) {
  return Kernel::template run<Simd::avx512>(args...);
}
template <class Kernel, class... Args>
MOEYARD_TARGET_AVX2 auto run_avx2(const Args&... args) {
  return Kernel::template run<Simd::avx2>(args...);
}
#endif

/// Calls Kernel::run<level>(args...), compiled for the level in force. `run` and all that should use the level's
/// instructions must be MOEYARD_INLINE: a function that is not inlined is compiled for the baseline.
template <class Kernel, class... Args>
auto run_on_level(const Args&... args) {
#ifdef MOEYARD_X86
  switch (simd_level()) {
    case Simd::avx512: return run_avx512<Kernel>(args...);
    case Simd::avx2: return run_avx2<Kernel>(args...);
    case Simd::baseline: break;
  }
#endif
  return Kernel::template run<Simd::baseline>(args...);
}

}  // namespace moeyard
