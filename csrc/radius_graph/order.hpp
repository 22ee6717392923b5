// Puts what a scan found of one centre in order: two dozen indices, where a general sort spends most of its time on
// mispredicted branches.
#pragma once
#include <cstdint>

#include "common/simd.hpp"

namespace moeyard::cpu {

/// `ids` can be read and `out` is overwritten up to this far past the end.
constexpr int64_t kOrderMargin = 32;

/// Writes ids[0..n) plus `base` to `out`, ascending. Overwrites `ids`; `out` may be the
/// same.
using Order = void (*)(int32_t* ids, int64_t n, int32_t base, int32_t* out);

Order pick_order(Simd level);

}  // namespace moeyard::cpu
