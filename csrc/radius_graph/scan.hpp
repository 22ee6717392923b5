// The innermost loop: one centre against a packed block of candidates. Each SIMD level does the same operations in the
// same order, so all give the same hits.
#pragma once
#include <cstdint>

#include "common/simd.hpp"
#include "radius_graph/candidates.hpp"

namespace moeyard::cpu {

/// Writes the ids of candidates with squared distance < r2 to `hits` (room for n + kLanes), leaving out `self` (-1: no
/// one), and returns their number. Order is that of the block. The block is padded.
template <class T>
using Scan = int64_t (*)(const Columns<T>& block, const T* centre, T r2, int32_t self, int32_t* hits);

template <class T>
Scan<T> pick_scan(Simd level);

}  // namespace moeyard::cpu
