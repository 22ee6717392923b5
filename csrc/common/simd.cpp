#include "common/simd.hpp"

#include <cstdlib>

#include "common/check.hpp"

namespace moeyard {

std::string simd_name(Simd level) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[int(level)];
}

Simd simd_best() {
#ifdef MOEYARD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Simd::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return Simd::avx2;
#endif
  return Simd::baseline;
}

Simd simd_level() {
  static const Simd level = [] {
    const Simd best = simd_best();
    const char* wanted = std::getenv("MOEYARD_SIMD");
    if (!wanted || !*wanted) return best;
    for (Simd candidate : {Simd::baseline, Simd::avx2, Simd::avx512}) {
      if (simd_name(candidate) != wanted) continue;
      if (candidate > best) fail_value("MOEYARD_SIMD=", wanted, ": this machine's best level is ", simd_name(best));
      return candidate;
    }
    fail_value("MOEYARD_SIMD: expected baseline, avx2 or avx512, got '", wanted, "'");
  }();
  return level;
}

}  // namespace moeyard
