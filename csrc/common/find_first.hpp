// The first element that breaks a rule, found in parallel: an error message then names the same element however many
// threads looked for it.
#pragma once
#include <atomic>
#include <cstdint>

#include "common/parallel.hpp"

namespace moeyard {

/// The least i in [0, n) with bad(i), or n.
template <class Bad>
int64_t find_first(int64_t n, int threads, Bad&& bad) {
  constexpr int64_t kGrain = 1 << 15;
  std::atomic<int64_t> first{n};
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    while (i < end && !bad(i)) ++i;
    if (i == end) return;
    for (int64_t known = first; i < known && !first.compare_exchange_weak(known, i);) {
    }
  });
  return first;
}

}  // namespace moeyard
