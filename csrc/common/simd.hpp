// Which instruction set the CPU kernels use. All levels give the same bits; MOEYARD_SIMD=baseline|avx2|avx512 forces a
// lower one than the machine has, so that tests can run them all.
#pragma once
#include <string>

namespace moeyard {

enum class Simd : int { baseline = 0, avx2 = 1, avx512 = 2 };

/// The best level of this machine that was also compiled in.
Simd simd_best();

/// The level in force: MOEYARD_SIMD if set, else simd_best(). Read once per process. Throws std::invalid_argument for
/// an unknown name or a level that this machine cannot run.
Simd simd_level();

std::string simd_name(Simd level);

}  // namespace moeyard
